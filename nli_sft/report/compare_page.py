"""How runs look side by side: tables for a terminal, a page, JSON, and plots."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, PercentFormatter

from ..evaluation.comparison import points
from . import _environment
from .compare import (
    Estimate,
    LearningCurve,
    PairedTest,
    Ranking,
    Replicates,
    RunRecord,
    between_replicates,
    judged_apart,
    paired_tests,
    why_apart,
)
from .content import duration
from .figures import AFTER, BEFORE, CONTROL, INK, STYLE, WIDTH, Plot, _plot
from .tables import NONE, Table

# Okabe and Ito's colours, and markers, so that runs can be told apart in grey too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#222222")
MARKERS = "osD^vPX"

# More curves than this cannot be told apart.
MOST_CURVES = 12


@dataclass(frozen=True)
class View:
    """All that is said of one ranking.

    Attributes:
        apart: why these runs are not ranked with those before; empty for the first.
        claims: what can and what cannot be said, in sentences.
        tests: any two runs against each other.
    """

    ranking: Ranking
    apart: str
    sheets: list[Table]
    claims: list[str]
    tests: list[PairedTest]
    plots: list[Plot]


def build_views(rankings: Sequence[Ranking]) -> list[View]:
    """Say and draw everything on each ranking."""
    return [
        View(
            ranking=ranking,
            apart=why_apart(rankings[0], ranking) if number else "",
            sheets=sheets(ranking, tests),
            claims=claims(ranking, tests),
            tests=tests,
            plots=plots(ranking, f"ranking-{number + 1}-" if number else ""),
        )
        for number, ranking in enumerate(rankings)
        for tests in [paired_tests(ranking)]
    ]


def sheets(ranking: Ranking, tests: Sequence[PairedTest]) -> list[Table]:
    """The tables of one ranking."""
    found = [_accuracies(ranking), _costs(ranking)]
    if ranking.differing:
        rows = [[run.name, *(_text(value) for value in ranking.differences(run).values())] for run in ranking.runs]
        found.append(Table("Settings that differ", ["run", *ranking.differing], rows))
    if ranking.replicates:
        found.append(_replicates(ranking))
    for key in ranking.judged:
        names = [*ranking.bases, *(run.name for run in ranking.runs)]
        matrix = _matrix(key, names, [test for test in tests if test.evaluation == key])
        if matrix is not None:
            found.append(matrix)
    return found


def _accuracies(ranking: Ranking) -> Table:
    controls = [
        (key, model)
        for key in ranking.judged
        for model in ("tuned", "hypothesis_only")
        if any(key in run.judged and run.judged[key].accuracy(model) for run in ranking.runs)
    ]
    columns = ["run", "validation", *(key if m == "tuned" else f"{key}, {m.replace('_', ' ')}" for key, m in controls)]
    rows = []
    for base in ranking.bases:
        row = [base, _estimate(ranking.base_validation(base))]
        for key, model in controls:
            judged = ranking.base_results(base, key)
            row.append(_estimate(judged and judged.accuracy("base")) if model == "tuned" else NONE)
        rows.append(row)
    for run in ranking.runs:
        row = [run.name, _estimate(run.validation)]
        for key, model in controls:
            row.append(_estimate(run.judged[key].accuracy(model)) if key in run.judged else NONE)
        rows.append(row)
    data = ranking.runs[0].config
    title = f"{len(ranking.runs)} {'run' if len(ranking.runs) == 1 else 'runs'} by validation accuracy"
    note = (
        f"Accuracy with its 95% interval. Validation: {data['validation_pairs']:,} pairs, fingerprint "
        f"{data['validation_fingerprint']}; prompt {data['prompt']}, fingerprint {data['prompt_fingerprint']}."
    )
    return Table(title, columns, rows, note)


def _costs(ranking: Ranking) -> Table:
    columns = ["run", "training", "pairs/s", "peak memory", "trainable parameters"]
    rows = []
    for run in ranking.runs:
        cost, parameters = run.cost, run.record["parameters"]
        memory = next((kind for kind in ("gpu", "ram") if f"peak_{kind}_gib" in cost), None)
        rows.append(
            [
                run.name,
                duration(cost["training_seconds"]),
                f"{cost['pairs_per_second']:,.0f}" if "pairs_per_second" in cost else NONE,
                f"{cost[f'peak_{memory}_gib']:.1f} GiB {memory.upper()}" if memory else NONE,
                f"{parameters['trainable']:,}\n({parameters['trainable'] / parameters['total']:.1%})",
            ]
        )
    measured = [index for index in range(len(columns)) if any(row[index] != NONE for row in rows)]
    return Table("Cost", [columns[i] for i in measured], [[row[i] for i in measured] for row in rows])


def _replicates(ranking: Ranking) -> Table:
    rows = [
        [group.name, _estimate(group.validation), *(_estimate(group.accuracy(key)) for key in ranking.judged)]
        for group in ranking.replicates
    ]
    note = "Mean over seeds with Student's 95% interval (logit scale): what another seed may give, not other pairs."
    return Table("Seeds as replicates", ["runs", "validation", *ranking.judged], rows, note)


def _matrix(key: str, names: Sequence[str], tests: Sequence[PairedTest]) -> Table | None:
    tested = {name for test in tests for name in (test.first, test.second)}
    if not tested:
        return None
    names = [name for name in names if name in tested]
    cells = {}
    for test in tests:
        for row, column, sign in ((test.second, test.first, 1), (test.first, test.second, -1)):
            difference = points(sign * test.comparison.difference)
            cells[row, column] = difference if test.better else f"({difference})"
    rows = [[row, *(cells.get((row, column), NONE) for column in names)] for row in names]
    note = (
        "Row minus column, in points, on the pairs that both answered. In brackets: not significant by the 95% "
        "interval (bootstrap by premise) or the test by premise, corrected for all pairs of runs."
    )
    return Table(f"Differences on {key}", ["", *names], rows, note)


def claims(ranking: Ranking, tests: Sequence[PairedTest]) -> list[str]:
    """What can be said of the best run by validation, against its base and the next method, and of replicates."""
    best = ranking.runs[0]
    seeds = next(method.runs for method in ranking.methods if best in method.runs)
    rivals = {best.base, *[run.name for run in ranking.runs if run not in seeds][:1]}
    told = [str(test) for test in tests if test.second == best.name and test.first in rivals]
    return [*told, *between_replicates(ranking), *judged_apart(ranking)]


def plots(ranking: Ranking, prefix: str) -> list[Plot]:
    """Accuracy by method, by number of training pairs, by cost and by epoch, of which there is something to see.

    Args:
        prefix: what the plots' names begin with.
    """
    of_the_same_pairs = [
        key
        for key in ranking.judged
        if len({run.judged[key].summary["data_fingerprint"] for run in ranking.runs if key in run.judged}) == 1
    ]
    found = []
    for key in of_the_same_pairs:
        if sum(method.accuracy(key) is not None for method in ranking.methods) > 1:
            found.append(accuracy_plot(ranking, key, f"{prefix}{key}"))
        if any(_learned(curve, key) for curve in ranking.learning_curves):
            found.append(pairs_plot(ranking, key, f"{prefix}{key}-by-pairs"))
    found.append(cost_plot(ranking, f"{prefix}cost"))
    if any(len(run.curve) > 1 for run in ranking.runs):
        found.append(epochs_plot(ranking, f"{prefix}epochs"))
    return found


def accuracy_plot(ranking: Ranking, key: str, name: str) -> Plot:
    """Accuracy on one evaluation by method, the bases below: the mean with its interval, and each seed's."""
    methods = [(method, method.accuracy(key)) for method in ranking.methods]
    methods = sorted((pair for pair in methods if pair[1] is not None), key=lambda pair: pair[1].value)
    bases = [(base, ranking.base_results(base, key)) for base in reversed(ranking.bases)]
    rows = [(base, judged.accuracy("base"), BEFORE) for base, judged in bases if judged is not None]
    first = len(rows)
    rows += [(method.name, accuracy, AFTER) for method, accuracy in methods]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 1.3 + 0.3 * len(rows)))
        axes = figure.add_subplot()
        for y, (_, accuracy, colour) in enumerate(rows):
            axes.plot([accuracy.low, accuracy.high], [y, y], color=colour, linewidth=2)
            axes.plot(accuracy.value, y, "s" if colour == BEFORE else "o", color=colour, markersize=6)
            style = {"textcoords": "offset points", "ha": "center", "fontsize": 7.5}
            axes.annotate(f"{accuracy.value:.1%}", (accuracy.value, y), (0, 6), **style)
        controls = [(y, method.accuracy(key, "hypothesis_only")) for y, (method, _) in enumerate(methods, first)]
        controls = [(estimate.value, y) for y, estimate in controls if estimate is not None]
        if controls:
            axes.plot(*zip(*controls, strict=True), "D", color=CONTROL, markersize=5, label="hypothesis-only baseline")
        repeated = [(y, method) for y, (method, _) in enumerate(methods, first) if len(method.runs) > 1]
        seeds = [(run.judged[key].accuracy().value, y) for y, method in repeated for run in method.runs]
        if seeds:
            axes.plot(*zip(*seeds, strict=True), "|", color=INK, markersize=6, label="one seed")
        axes.set_yticks(range(len(rows)), [name for name, *_ in rows])
        axes.set(ylim=(-0.6, len(rows) - 0.2), xlabel="accuracy, with its 95% interval")
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.grid(axis="x")
        if controls or seeds:
            _legend(figure, axes)
    best, accuracy = methods[-1]
    title = f"Highest on {key}: {best.name}, {accuracy.value:.1%}"
    told = "; ".join(f"{name}: {_on_one_line(accuracy)}" for name, accuracy, _ in reversed(rows))
    return _plot(name, figure, title, f"Accuracy on {key}, with 95% intervals. {told}.")


def pairs_plot(ranking: Ranking, key: str, name: str) -> Plot:
    """Accuracy on one evaluation against the number of training pairs: the mean over seeds with its interval."""
    curves = {curve.name: _learned(curve, key) for curve in ranking.learning_curves}
    curves = {curve: points for curve, points in curves.items() if points}
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.2 + 0.09 * len(curves)))
        axes = figure.add_subplot()
        for number, (curve, points) in enumerate(curves.items()):
            style = _style(number)
            pairs, estimates = list(points), list(points.values())
            axes.fill_between(
                pairs, [e.low for e in estimates], [e.high for e in estimates], color=style["color"], alpha=0.15, lw=0
            )
            axes.plot(pairs, [e.value for e in estimates], linewidth=1.2, label=curve, **style)
        judged = {base: ranking.base_results(base, key) for base in ranking.bases}
        _base_lines(axes, {base: judged and judged.accuracy("base") for base, judged in judged.items()})
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:,g}")
        axes.xaxis.set_minor_formatter("")
        axes.set(xlabel="training pairs", ylabel=f"accuracy on {key}")
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.grid(axis="y")
        _legend(figure, axes)
    most, accuracy, best = max((max(points), points[max(points)].value, curve) for curve, points in curves.items())
    title = f"{key}: {best} reaches {accuracy:.1%} with {most:,} training pairs"
    told = "; ".join(
        f"{curve}: " + ", ".join(f"{pairs:,} {_on_one_line(estimate)}" for pairs, estimate in points.items())
        for curve, points in curves.items()
    )
    return _plot(name, figure, title, f"Accuracy on {key} by training pairs, with 95% intervals. {told}.")


def _learned(curve: LearningCurve, key: str) -> dict[int, Estimate]:
    """{training pairs: accuracy on one evaluation}, where it was judged."""
    accuracies = {pairs: runs.accuracy(key) for pairs, runs in curve.points.items()}
    return {pairs: accuracy for pairs, accuracy in accuracies.items() if accuracy is not None}


def cost_plot(ranking: Ranking, name: str) -> Plot:
    """Validation accuracy, with its 95 % interval, against seconds of training; replicates look alike."""
    cheapest = min(ranking.runs, key=lambda run: run.cost["training_seconds"])
    best = ranking.runs[0]
    title = f"Best on validation: {best.name}, {best.validation.value:.1%}, in {_seconds(best)} of training"
    if cheapest is not best:
        title += f"; cheapest: {cheapest.name}, {cheapest.validation.value:.1%}, in {_seconds(cheapest)}"
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.2 + 0.09 * len(ranking.methods)))
        axes = figure.add_subplot()
        for number, method in enumerate(ranking.methods):
            style = _style(number)
            for run in method.runs:
                seconds, accuracy = run.cost["training_seconds"], run.validation
                axes.plot([seconds, seconds], [accuracy.low, accuracy.high], color=style["color"], linewidth=1.2)
                axes.plot(seconds, accuracy.value, linestyle="none", label=_once(method, run), **style)
        _base_lines(axes, {base: ranking.base_validation(base) for base in ranking.bases})
        axes.set_xscale("log")
        axes.margins(x=0.15)
        axes.set(xlabel="seconds of training", ylabel="validation accuracy")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:,g}")
        axes.xaxis.set_minor_formatter("")
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.grid(axis="y")
        _legend(figure, axes)
    told = "; ".join(f"{r.name}: {r.validation.value:.1%} in {_seconds(r)}" for r in ranking.runs)
    return _plot(name, figure, title, f"Validation accuracy against training time. {told}.")


def epochs_plot(ranking: Ranking, name: str) -> Plot:
    """Validation accuracy by epoch, the best methods in one; replicates look alike."""
    methods = [method for method in ranking.methods if any(len(run.curve) > 1 for run in method.runs)][:MOST_CURVES]
    shown = [run for method in methods for run in method.runs if len(run.curve) > 1]
    first, last = min(e for run in shown for _, e, _ in run.curve), max(e for run in shown for _, e, _ in run.curve)
    title = f"Learning curves of {len(shown)} runs, from epoch {first:g} to {last:g}"
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.2 + 0.09 * len(methods)))
        axes = figure.add_subplot()
        for number, method in enumerate(methods):
            style = _style(number) | {"markersize": 3.5}
            for run in (run for run in method.runs if run in shown):
                _, epochs, accuracies = zip(*run.curve, strict=True)
                axes.plot(epochs, accuracies, linewidth=1.2, alpha=0.85, label=_once(method, run), **style)
        axes.set(xlabel="epoch", ylabel="validation accuracy")
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.grid(axis="y")
        _legend(figure, axes)
    told = "; ".join(f"{run.name}: {run.curve[0][2]:.1%} to {run.curve[-1][2]:.1%}" for run in shown)
    return _plot(name, figure, title, f"Validation accuracy by epoch. {told}.")


def _style(number: int) -> dict[str, object]:
    # Where the colours begin again, each comes with another marker.
    marker = MARKERS[(number + number // len(COLOURS)) % len(MARKERS)]
    return {"color": COLOURS[number % len(COLOURS)], "marker": marker, "markersize": 6}


def _once(method: Replicates, run: RunRecord) -> str | None:
    """A method's name at the first of its runs, so that the legend has it once."""
    return method.name if run is method.runs[0] else None


def _base_lines(axes, bases: dict[str, Estimate | None]) -> None:
    for base, estimate in bases.items():
        if estimate is not None:
            axes.axhline(estimate.value, color=BEFORE, linewidth=1, linestyle=(0, (4, 3)), label=base, zorder=0)


def _legend(figure: Figure, axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, columnspacing=1.2)


def _seconds(run: RunRecord) -> str:
    return duration(run.cost["training_seconds"])


def page(sides: Sequence[View]) -> str:
    """All of it as one HTML file that needs no other."""
    return _environment(autoescape=True).get_template("compare.html.jinja").render(sides=sides)


def drawings(sides: Sequence[View]) -> dict[str, str]:
    """{file name: SVG} of all plots."""
    return {f"{plot.name}.svg": plot.on_white() for side in sides for plot in side.plots}


def as_dict(sides: Sequence[View]) -> dict[str, object]:
    """All of it as figures, ready for JSON."""
    return {
        "rankings": [
            {
                "not_ranked_with_the_first": side.apart or None,
                "bases": {base: _figures(side.ranking.base_validation(base)) for base in side.ranking.bases},
                "runs": [
                    {
                        "name": run.name,
                        "source": run.source,
                        "validation": _figures(run.validation),
                        "evaluations": {
                            key: {model: _figures(judged.accuracy(model)) for model in judged.models}
                            for key, judged in run.judged.items()
                        },
                        "differs": side.ranking.differences(run),
                        "cost": run.cost,
                    }
                    for run in side.ranking.runs
                ],
                "replicates": [_replicate_figures(group, side.ranking) for group in side.ranking.replicates],
                "tests": [
                    {
                        "evaluation": test.evaluation,
                        "first": test.first,
                        "second": test.second,
                        **test.comparison.as_dict(),
                        "p_value_corrected": test.p_value,
                        "better": test.better,
                    }
                    for test in side.tests
                ],
                "claims": side.claims,
            }
            for side in sides
        ]
    }


def _figures(estimate: Estimate | None) -> dict[str, float] | None:
    return estimate and asdict(estimate)


def _replicate_figures(group: Replicates, ranking: Ranking) -> dict[str, object]:
    return {
        "name": group.name,
        "runs": [run.name for run in group.runs],
        "validation": _figures(group.validation),
        "evaluations": {key: _figures(group.accuracy(key)) for key in ranking.judged},
    }


def _estimate(estimate: Estimate | None) -> str:
    return NONE if estimate is None else f"{estimate.value:.1%}\n({100 * estimate.low:.1f}–{100 * estimate.high:.1f})"


def _on_one_line(estimate: Estimate) -> str:
    return _estimate(estimate).replace("\n", " ")


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
