"""The plots of a report. Each is readable on a phone, and its title states the finding.

Colours are those of Okabe and Ito (2008), "Color Universal Design", which people of every colour vision can
distinguish. Before and after also differ in lightness and marker, for print in greyscale.
"""

import io
import re
import textwrap
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from ..evaluation.calibration import accuracy_at
from ..evaluation.comparison import points
from .content import Evaluation, Training

BEFORE, AFTER, CONTROL, INK = "#8c8c8c", "#0072B2", "#D55E00", "#222222"
BLUES = LinearSegmentedColormap.from_list("blues", ["#ffffff", "#cfe3f1", "#56a0d0", "#0072B2", "#00466e"])
# Of the probabilities of labels; a middle label of three is grey.
LABEL_COLOURS = {2: ["#0072b2", "#d55e00"], 3: ["#0072b2", "#c4c4c4", "#d55e00"]}
MORE_COLOURS = ["#0072b2", "#56b4e9", "#009e73", "#f0e442", "#e69f00", "#d55e00", "#cc79a7", "#c4c4c4"]
WIDTH = 4.8  # inches
TITLE_CHARACTERS = 50

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: small files, and the reader's own font
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#999999",
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlepad": 10,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "grid.color": "#ececec",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "figure.constrained_layout.use": True,
}

# matplotlib computes the layout with DejaVu Sans, which is wide: other fonts fit as well.
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, 'DejaVu Sans', sans-serif"


def label_colours(labels: int) -> list[str]:
    """A colour for each of so many labels. More than eight share some."""
    return LABEL_COLOURS.get(labels) or [MORE_COLOURS[index % len(MORE_COLOURS)] for index in range(labels)]


@dataclass(frozen=True)
class Plot:
    """A figure as SVG and PNG, with the name of its file, its title and a description for screen readers."""

    name: str
    title: str
    description: str
    svg: str
    figure: Figure

    @cached_property
    def png(self) -> bytes:
        """For places that cannot show SVG."""
        buffer = io.BytesIO()
        with mpl.rc_context(STYLE):
            self.figure.savefig(buffer, format="png", dpi=144)
        return buffer.getvalue()

    def on_white(self) -> str:
        """The SVG for a file of its own, readable on a dark page."""
        return self.svg.replace("<svg ", '<svg style="background: white" ', 1)


def evaluation_plots(evaluation: Evaluation) -> dict[str, Plot]:
    """{name: plot} of one split; without `slices` if no slice is large enough."""
    if len(evaluation.compared) == 1:
        return {
            "accuracies": accuracies(evaluation),
            "confusion": confusion(evaluation, evaluation.main),
            "reliability": reliability(evaluation),
            "abstention": abstention(evaluation),
        }
    plots = {
        "accuracies": accuracies(evaluation),
        "confusion_before": confusion(evaluation, "base"),
        "confusion_after": confusion(evaluation, "tuned"),
        "movement": movement(evaluation),
        "reliability": reliability(evaluation),
        "abstention": abstention(evaluation),
    }
    if evaluation.slices:
        plots["slices"] = slice_dumbbells(evaluation)
    return plots


def training_plots(training: Training) -> dict[str, Plot]:
    """{name: plot} of the training: loss and accuracy, if they were logged."""
    plots = {}
    if training.losses or training.validations:
        plots["loss"] = loss(training)
    if any("eval_accuracy" in entry for entry in training.validations):
        plots["accuracy"] = validation_accuracy(training)
    return plots


def accuracies(evaluation: Evaluation) -> Plot:
    """Accuracy with Wilson intervals of the base, the tuned model, the controls and the majority baseline."""
    label, share = evaluation.most_frequent_label
    best_control = max(
        [(f"always {label}", share)]
        + [
            (evaluation.names[m], evaluation.metrics[m]["accuracy"])
            for m in evaluation.models
            if m not in ("base", "tuned")
        ],
        key=lambda control: control[1],
    )
    above = evaluation.metrics[evaluation.main]["accuracy"] - best_control[1]
    name = evaluation.names[evaluation.main].capitalize()
    title = f"{name}: {points(above)} points against the best baseline ({best_control[0]})"
    rows = [
        ("tuned", AFTER, "o"),
        ("base", BEFORE, "s"),
        ("hypothesis_only", CONTROL, "D"),
        ("shuffled", CONTROL, "^"),
    ]
    rows = [row for row in rows if row[0] in evaluation.models][::-1]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.9 + 0.34 * (len(rows) + 1)))
        axes = figure.add_subplot()
        for y, (model, colour, marker) in enumerate(rows, start=1):
            accuracy = evaluation.metrics[model]["accuracy"]
            axes.plot(evaluation.metrics[model]["accuracy_interval"], [y, y], color=colour, linewidth=2)
            axes.plot(accuracy, y, marker, color=colour, markersize=7)
            axes.annotate(
                f"{accuracy:.1%}", (accuracy, y), (0, 7), textcoords="offset points", ha="center", fontsize=8.5
            )
        axes.plot(share, 0, "|", color=INK, markersize=12, markeredgewidth=1.5)
        axes.annotate(f"{share:.1%}", (share, 0), (0, 7), textcoords="offset points", ha="center", fontsize=8.5)
        axes.set_yticks(range(len(rows) + 1), [f"always {label}", *(evaluation.names[model] for model, *_ in rows)])
        axes.set(xlim=(-0.01, 1.02), ylim=(-0.5, len(rows) + 0.7))
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x")
        axes.xaxis.set_major_formatter(PercentFormatter(1))
    description = "Accuracy with 95% intervals: " + ", ".join(
        f"{evaluation.names[model]} {evaluation.metrics[model]['accuracy']:.1%}" for model, *_ in rows[::-1]
    )
    return make_plot(f"{evaluation.key}-accuracies", figure, title, f"{description}, always {label} {share:.1%}.")


def confusion(evaluation: Evaluation, model: str) -> Plot:
    """Confusion matrix: shares of each gold label's pairs, and counts."""
    counts = np.array(evaluation.metrics[model]["confusion"])
    names = evaluation.label_names
    shares = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    predicted = counts.sum(axis=0) / counts.sum()
    when = evaluation.names[model].capitalize()
    if predicted.max() > 0.8:
        title = f"{when}, the answer is {names[predicted.argmax()]} for {predicted.max():.0%} of pairs"
    else:
        wrong = np.where(np.eye(len(names), dtype=bool), -1, shares)
        gold, answer = np.unravel_index(wrong.argmax(), wrong.shape)
        title = (
            f"{when}, the most common mistake is {names[answer]} for {names[gold]}: {wrong.max():.0%} of such pairs"
        )
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.5))
        axes = figure.add_subplot()
        axes.imshow(shares, cmap=BLUES, vmin=0, vmax=1, aspect="auto")
        for (row, column), share in np.ndenumerate(shares):
            ink = "white" if share > 0.5 else INK
            axes.text(column, row - 0.08, f"{share:.0%}", ha="center", va="center", color=ink, fontsize=12)
            axes.text(column, row + 0.2, f"{counts[row, column]:,}", ha="center", va="center", color=ink, fontsize=8)
        axes.set_xticks(range(len(names)), names)
        axes.set_yticks(range(len(names)), names)
        axes.set(xlabel="answer", ylabel="gold")
        axes.spines[:].set_visible(False)
        # White lines between the cells.
        axes.set_xticks(np.arange(1, len(names)) - 0.5, minor=True)
        axes.set_yticks(np.arange(1, len(names)) - 0.5, minor=True)
        axes.grid(which="minor", color="white", linewidth=2)
        axes.tick_params(which="minor", length=0)
    rows = "; ".join(
        f"gold {name}: " + ", ".join(f"{answer} {counts[g, a]:,}" for a, answer in enumerate(names))
        for g, name in enumerate(names)
    )
    return make_plot(f"{evaluation.key}-confusion-{model}", figure, title, f"Confusion matrix. {rows}.")


def reliability(evaluation: Evaluation) -> Plot:
    """Accuracy by confidence, before and after tuning, and the distribution of confidence."""
    after = evaluation.metrics[evaluation.main]
    gap = after["mean_confidence"] - after["accuracy"]
    manner = "well calibrated" if abs(gap) < 0.02 else "overconfident" if gap > 0 else "underconfident"
    sure = f"{after['mean_confidence']:.0%} confident"
    when = "After tuning, the" if evaluation.main == "tuned" else "The"
    title = f"{when} model is {manner}: {sure}, {after['accuracy']:.0%} right"
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.6))
        axes, below = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
        axes.plot([0, 1], [0, 1], color="#bbbbbb", linewidth=1, linestyle=(0, (4, 3)))
        styles = (("base", BEFORE, "s", -1), ("tuned", AFTER, "o", 1))
        for model, colour, marker, shift in (style for style in styles if style[0] in evaluation.compared):
            metrics = evaluation.metrics[model]
            bins = metrics["reliability"]
            label = f"{evaluation.names[model]}: ECE {metrics['ece']:.3f}"
            confidence, accuracy = [b["confidence"] for b in bins], [b["accuracy"] for b in bins]
            axes.plot(confidence, accuracy, marker=marker, markersize=4.5, linewidth=1.5, color=colour, label=label)
            # Two bars side by side in each bin.
            width = (bins[0]["high"] - bins[0]["low"]) * 0.4
            middles = [(b["low"] + b["high"]) / 2 + shift * width / 2 for b in bins]
            below.bar(middles, [b["n"] / metrics["n"] for b in bins], width, color=colour)
        axes.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy")
        axes.legend(loc="upper left")
        axes.grid()
        below.set(xlabel="confidence in the answer", ylabel="pairs")
        for axis in (axes.yaxis, below.yaxis, below.xaxis):
            axis.set_major_formatter(PercentFormatter(1, decimals=0))
        below.yaxis.set_major_locator(MaxNLocator(2))
    description = "; ".join(
        f"{evaluation.names[m]}: mean confidence {evaluation.metrics[m]['mean_confidence']:.1%}, accuracy "
        f"{evaluation.metrics[m]['accuracy']:.1%}, expected calibration error {evaluation.metrics[m]['ece']:.3f}"
        for m in evaluation.compared
    )
    return make_plot(f"{evaluation.key}-reliability", figure, title, f"Reliability diagram. {description}.")


def abstention(evaluation: Evaluation) -> Plot:
    """Accuracy by the share of pairs answered, the most confident first."""
    after = evaluation.abstention(evaluation.main)
    most = accuracy_at(0.8, after), accuracy_at(1, after)
    name = evaluation.names[evaluation.main].capitalize()
    title = f"{name}: {most[0]:.1%} right on the 80% most confident answers, {most[1]:.1%} on all"
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.2))
        axes = figure.add_subplot()
        styles = (("base", BEFORE, (0, (4, 2))), ("tuned", AFTER, "-"))
        for model, colour, style in (one for one in styles if one[0] in evaluation.compared):
            coverage, accuracy = evaluation.abstention(model)
            shown = np.unique(np.linspace(0, len(coverage) - 1, 500).astype(int))  # keeps the SVG small
            axes.plot(
                coverage[shown],
                accuracy[shown],
                linewidth=1.5,
                color=colour,
                linestyle=style,
                label=evaluation.names[model],
            )
        axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="pairs answered, most confident first", ylabel="accuracy")
        axes.legend(loc="lower left")
        axes.grid()
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(PercentFormatter(1, decimals=0))
    description = "; ".join(
        f"{evaluation.names[model]}: "
        + ", ".join(f"{accuracy_at(c, evaluation.abstention(model)):.1%} of {c:.0%}" for c in (0.2, 0.5, 0.8, 1))
        for model in evaluation.compared
    )
    return make_plot(f"{evaluation.key}-abstention", figure, title, f"Accuracy against coverage. {description}.")


def slice_dumbbells(evaluation: Evaluation) -> Plot:
    """Accuracy before and after on every slice; the band is before plus the 95 % interval of the change."""
    slices = evaluation.slices
    rose = sum(s.changed and s.change > 0 for s in slices)
    fell = sum(s.changed and s.change < 0 for s in slices)
    title = f"Accuracy rose on {rose} of {len(slices)} slices and fell on {fell}; other changes may be chance"
    if rose + fell == len(slices):
        title = title.partition(";")[0]
    with mpl.rc_context(STYLE):
        families = list(dict.fromkeys(s.family for s in slices))
        figure = Figure(figsize=(WIDTH + 0.6, 1.2 + 0.25 * (len(slices) + len(families))))
        axes = figure.add_subplot()
        y, ticks, names = 0.0, [], []
        for family in families:
            axes.text(-0.02, y, family, fontweight="bold", fontsize=8.5, ha="right", va="center")
            y += 1
            for s in (s for s in slices if s.family == family):
                colour = AFTER if s.changed else "#9cc3dc"
                axes.plot(
                    [s.before + s.interval[0], s.before + s.interval[1]], [y, y], color=colour, linewidth=5, alpha=0.35
                )
                axes.plot([s.before, s.after], [y, y], color=colour, linewidth=1.2)
                axes.plot(s.before, y, "s", color=BEFORE, markersize=4.5)
                axes.plot(s.after, y, "o", color=colour, markersize=6)
                ticks.append(y)
                names.append(f"{s.name}  ({s.pairs:,})")
                y += 1
        overall = evaluation.comparison.after
        axes.axvline(overall, color=AFTER, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
        axes.set_yticks(ticks, names)
        axes.set(
            xlim=(-0.01, 1.02),
            ylim=(y - 0.4, -0.8),
            xlabel="accuracy (pairs in brackets; dashed: all pairs after tuning)",
        )
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        axes.grid(axis="x")
        before, after = axes.plot([], [], "s", color=BEFORE)[0], axes.plot([], [], "o", color=AFTER)[0]
        faint = axes.plot([], [], "o", color="#9cc3dc")[0]
        labels = ["before", "after", "after, change within chance"]
        figure.legend([before, after, faint], labels, loc="outside lower center", ncols=3, columnspacing=1.2)
    description = "; ".join(f"{s.family}, {s.name}: {s.before:.1%} to {s.after:.1%}" for s in slices)
    return make_plot(f"{evaluation.key}-slices", figure, title, f"Accuracy by slice. {description}.")


def movement(evaluation: Evaluation) -> Plot:
    """Probability of the gold label before and after tuning, per pair."""
    before, after = evaluation.p_gold("base"), evaluation.p_gold("tuned")
    rose = (after > before).mean()
    title = (
        f"The right label became more likely for {rose:.0%} of pairs; its median probability went from "
        f"{np.median(before):.2f} to {np.median(after):.2f}"
    )
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.6))
        axes = figure.add_subplot()
        # The log scale starts below 1, so that a single pair is visible.
        limits = [[0, 1], [0, 1]]
        axes.hist2d(before, after, bins=40, range=limits, cmap=BLUES, norm=LogNorm(vmin=0.4), rasterized=True)
        axes.plot([0, 1], [0, 1], color="#999999", linewidth=1, linestyle=(0, (4, 3)))
        box = {"facecolor": "white", "alpha": 0.85, "edgecolor": "none", "pad": 2}
        axes.text(0.03, 0.97, "more likely", va="top", fontsize=8.5, bbox=box)
        axes.text(0.97, 0.03, "less likely", ha="right", fontsize=8.5, bbox=box)
        axes.set(
            xlabel="probability of the gold label before (darker: more pairs)",
            ylabel="after",
            xlim=(0, 1),
            ylim=(0, 1),
        )
    description = f"Two-dimensional histogram. {title}."
    return make_plot(f"{evaluation.key}-movement", figure, title, description)


def loss(training: Training) -> Plot:
    """Training and validation loss and, below, the learning rate."""
    losses, validations = training.losses, training.validations
    if training.best:
        lowest = min(validations, key=lambda entry: entry["eval_loss"])
        title = f"Validation loss is lowest, {lowest['eval_loss']:.3f}, after epoch {lowest['epoch']:.3g}"
        title += f"; the checkpoint of epoch {training.best['epoch']:.3g} was kept"
    elif validations:
        title = f"Validation loss ends at {validations[-1]['eval_loss']:.3f}; the last checkpoint was kept"
    else:
        title = f"Training loss ends at {losses[-1]['loss']:.3f}"
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.4))
        axes, below = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
        axes.plot(
            [e["epoch"] for e in losses], [e["loss"] for e in losses], color=BEFORE, linewidth=1.2, label="training"
        )
        _validation_line(axes, training, "eval_loss")
        axes.set(ylabel="loss, nats per label token")
        axes.legend(loc="upper right")
        axes.grid(axis="y")
        rates = [(e["epoch"], e["learning_rate"]) for e in losses if "learning_rate" in e]
        if rates:
            below.plot(*zip(*rates, strict=True), color=INK, linewidth=1.2)
        below.set(xlabel="epoch", ylabel="rate")
        below.set_ylim(bottom=0)
        below.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        below.xaxis.set_major_locator(MaxNLocator(integer=True))
    return make_plot("training-loss", figure, title, f"Loss by epoch, with the learning rate below. {title}.")


def validation_accuracy(training: Training) -> Plot:
    """Label accuracy on validation by epoch."""
    measured = [e for e in training.validations if "eval_accuracy" in e]
    best = max(measured, key=lambda e: e["eval_accuracy"])
    title = f"Label accuracy on validation peaks at {best['eval_accuracy']:.1%}, after epoch {best['epoch']:.3g}"
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.4))
        axes = figure.add_subplot()
        _validation_line(axes, training, "eval_accuracy")
        axes.set(xlabel="epoch", ylabel="label accuracy")
        axes.set_xlim(left=0)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=1))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="y")
        axes.legend(loc="lower right")
    return make_plot("training-accuracy", figure, title, f"Label accuracy by epoch. {title}.")


def speeds(title: str, parts: dict[str, dict[str, dict[str, float]]]) -> Plot:
    """Throughput and peak memory of several methods, one panel per task.

    Args:
        parts: {task: {method: `pairs_per_second` and, on a GPU, `peak_bytes`}}. Methods called tries are highlighted.
    """
    with mpl.rc_context(STYLE):
        bars = [len(methods) for methods in parts.values()]
        figure = Figure(figsize=(1.4 * WIDTH, 0.5 + 0.27 * sum(bars) + 0.5 * len(parts)))
        panels = figure.subplots(len(parts), squeeze=False, height_ratios=bars)[:, 0]
        for axes, (task, methods) in zip(panels, parts.items(), strict=True):
            rates = [method["pairs_per_second"] for method in methods.values()]
            axes.barh(
                list(methods), rates, height=0.7, color=[AFTER if "tries" in name else BEFORE for name in methods]
            )
            for place, method in enumerate(methods.values()):
                memory = f", {method['peak_bytes'] / 2**30:.1f} GiB" if method.get("peak_bytes") else ""
                axes.annotate(
                    f"{method['pairs_per_second']:,.0f} pairs/s{memory}",
                    (method["pairs_per_second"], place),
                    (4, 0),
                    textcoords="offset points",
                    va="center",
                )
            axes.set(xlim=(0, 1.45 * max(rates)), xticks=[])
            axes.set_title(task, fontsize=9, fontweight="normal")
            axes.invert_yaxis()
            axes.spines[["bottom", "left"]].set_visible(False)
    values = "; ".join(
        f"{task}: " + ", ".join(f"{name} {method['pairs_per_second']:,.0f}" for name, method in methods.items())
        for task, methods in parts.items()
    )
    return make_plot("speed", figure, title, f"Pairs per second. {values}.")


def _validation_line(axes: Axes, training: Training, key: str) -> None:
    measured = [e for e in training.validations if key in e]
    axes.plot(
        [e["epoch"] for e in measured], [e[key] for e in measured], "o-", color=AFTER, markersize=5, label="validation"
    )
    if training.best and key in training.best:
        place = training.best["epoch"], training.best[key]
        axes.plot(*place, "o", markersize=11, markerfacecolor="none", markeredgecolor=CONTROL, label="checkpoint kept")


def make_plot(name: str, figure: Figure, title: str, description: str) -> Plot:
    """Put a title across the whole width of a figure, and render it."""
    salt: dict[Any, Any] = {"svg.hashsalt": name}  # makes the SVG reproducible
    with mpl.rc_context(STYLE | salt):
        figure.suptitle(textwrap.fill(title, TITLE_CHARACTERS), x=0.01, ha="left", fontsize=10, fontweight="bold")
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    svg = re.sub(r"font-family: [^;\"]*", f"font-family: {FONT}", buffer.getvalue())
    return Plot(name, title, description, svg[svg.index("<svg") :], figure)
