"""Show a comparison of runs: tables for a terminal, an HTML page, JSON, and plots."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, PercentFormatter

from ..evaluation.comparison import points
from . import jinja_environment
from .compare import (
    Estimate,
    EvaluationRecord,
    LearningCurve,
    PairedTest,
    Ranking,
    Replicates,
    RunRecord,
    compare_replicates,
    explain_separation,
    explain_unequal_pairs,
    paired_tests,
)
from .content import duration
from .figures import AFTER, BEFORE, CONTROL, INK, STYLE, WIDTH, Plot, make_plot
from .tables import NONE, Table

# Colours of Okabe and Ito, with markers so that runs can be distinguished in greyscale.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#222222")
MARKERS = "osD^vPX"

# More curves than this cannot be distinguished.
MAX_CURVES = 12

# A legend with longer names than this has one column.
LONG_NAME = 30


@dataclass(frozen=True)
class View:
    """Everything that is shown of one ranking.

    Attributes:
        separation: why these runs are not ranked with the first ranking; empty for the first.
        tables: accuracies first.
        claims: what the tests support and what they do not, in sentences.
        tests: of every two runs.
    """

    ranking: Ranking
    separation: str
    tables: list[Table]
    claims: list[str]
    tests: list[PairedTest]
    plots: list[Plot]


def build_views(rankings: Sequence[Ranking]) -> list[View]:
    """Build tables, claims and plots of each ranking."""
    return [
        View(
            ranking=ranking,
            separation=explain_separation(rankings[0], ranking) if number else "",
            tables=_tables(ranking, tests),
            claims=_claims(ranking, tests),
            tests=tests,
            plots=_plots(ranking, f"ranking-{number + 1}-" if number else ""),
        )
        for number, ranking in enumerate(rankings)
        for tests in [paired_tests(ranking)]
    ]


def _tables(ranking: Ranking, tests: Sequence[PairedTest]) -> list[Table]:
    tables = [_accuracies(ranking), *([_costs(ranking)] if ranking.is_trained else [])]
    if ranking.differing:
        rows = [[run.name, *map(_text, ranking.differences(run).values())] for run in ranking.runs]
        tables.append(Table("Settings that differ", ["run", *ranking.differing], rows))
    if ranking.replicates:
        tables.append(_replicates(ranking))
    names = [*ranking.bases, *(run.name for run in (*ranking.baselines, *ranking.runs))]
    matrices = (
        _matrix(key, names, [test for test in tests if test.evaluation == key]) for key in ranking.evaluation_keys
    )
    return [*tables, *(matrix for matrix in matrices if matrix is not None)]


def _accuracies(ranking: Ranking) -> Table:
    measured = [
        (key, model)
        for key in ranking.evaluation_keys
        for model in (None, "hypothesis_only")  # None is the model that the run is about
        if any(_accuracy(run.evaluations.get(key), model) for run in ranking.runs)
    ]
    columns = ["run", *(key if model is None else f"{key}, hypothesis-only" for key, model in measured)]
    rows = []
    if not ranking.is_trained:
        for run in ranking.runs:
            results = (_accuracy(run.evaluations.get(key), model) for key, model in measured)
            rows.append([run.name, *map(_estimate, results)])
        title = f"{len(rows)} {'model' if len(rows) == 1 else 'models'} that were not trained here"
        return Table(title, columns, rows, "Accuracy with its 95% interval.")
    columns.insert(1, "validation")
    for base in ranking.bases:
        results = (
            _accuracy(ranking.base_evaluation(base, key), "base") if model is None else None for key, model in measured
        )
        rows.append([base, *map(_estimate, [ranking.base_validation(base), *results])])
    for run in (*ranking.baselines, *ranking.runs):
        results = (_accuracy(run.evaluations.get(key), model) for key, model in measured)
        rows.append([run.name, *map(_estimate, [run.validation if run.is_trained else None, *results])])
    data = ranking.runs[0].config
    title = f"{len(ranking.runs)} {'run' if len(ranking.runs) == 1 else 'runs'} by validation accuracy"
    note = (
        f"Accuracy with its 95% interval. Validation: {data['validation_pairs']:,} pairs, fingerprint "
        f"{data['validation_fingerprint']}; prompt {data['prompt']}, fingerprint {data['prompt_fingerprint']}."
    )
    return Table(title, columns, rows, note)


def _accuracy(evaluation: EvaluationRecord | None, model: str | None = None) -> Estimate | None:
    return evaluation and evaluation.accuracy(model)


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
        [group.name, *map(_estimate, [group.validation, *(group.accuracy(key) for key in ranking.evaluation_keys)])]
        for group in ranking.replicates
    ]
    note = "Mean over seeds with Student's 95% interval (logit scale), which covers other seeds but not other pairs."
    return Table("Means over seeds", ["runs", "validation", *ranking.evaluation_keys], rows, note)


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
        "interval (bootstrap by premise) or by the test by premise, corrected for all pairs of runs."
    )
    return Table(f"Differences on {key}", ["", *names], rows, note)


def _claims(ranking: Ranking, tests: Sequence[PairedTest]) -> list[str]:
    """The best run against its base, the next method and the best baseline; replicates; unequal pairs."""
    best = ranking.runs[0]
    seeds = next(method.runs for method in ranking.methods if best in method.runs)
    rivals = {best.base, *[run.name for run in ranking.runs if run not in seeds][:1]}
    rivals |= {run.name for run in ranking.baselines[:1]}
    claims = [str(test) for test in tests if test.second == best.name and test.first in rivals]
    return [*claims, *compare_replicates(ranking), *explain_unequal_pairs(ranking)]


def _plots(ranking: Ranking, prefix: str) -> list[Plot]:
    """Accuracy by method, by number of training pairs, by cost and by epoch, where there is something to show.

    Args:
        prefix: of the plots' names.
    """
    plots = []
    for key in ranking.evaluation_keys:
        evaluations = [run.evaluations[key] for run in ranking.runs if key in run.evaluations]
        if len({evaluation.summary["data_fingerprint"] for evaluation in evaluations}) > 1:
            continue  # accuracies on different pairs
        if sum(method.accuracy(key) is not None for method in ranking.methods) > 1:
            plots.append(accuracy_plot(ranking, key, f"{prefix}{key}"))
        if any(_accuracies_by_pairs(curve, key) for curve in ranking.learning_curves):
            plots.append(pairs_plot(ranking, key, f"{prefix}{key}-by-pairs"))
    if ranking.is_trained:
        plots.append(cost_plot(ranking, f"{prefix}cost"))
    if any(len(run.curve) > 1 for run in ranking.runs):
        plots.append(epochs_plot(ranking, f"{prefix}epochs"))
    return plots


def accuracy_plot(ranking: Ranking, key: str, name: str) -> Plot:
    """Accuracy on one evaluation by method, with the bases below: mean, interval and each seed."""
    methods = [(method, found) for method in ranking.methods if (found := method.accuracy(key)) is not None]
    methods.sort(key=lambda pair: pair[1].value)
    bases = _base_accuracies(ranking, key)
    rows = [(base, bases[base], BEFORE) for base in reversed(bases)]
    baselines = [(run.name, _accuracy(run.evaluations.get(key))) for run in reversed(ranking.baselines)]
    rows += [(name, accuracy, BEFORE) for name, accuracy in baselines if accuracy is not None]
    first = len(rows)
    rows += [(method.name, accuracy, AFTER) for method, accuracy in methods]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 1.3 + 0.34 * len(rows)))
        axes = figure.add_subplot()
        for y, (_, accuracy, colour) in enumerate(rows):
            axes.plot([accuracy.low, accuracy.high], [y, y], color=colour, linewidth=2)
            axes.plot(accuracy.value, y, "s" if colour == BEFORE else "o", color=colour, markersize=6)
            place = (accuracy.value, y)
            axes.annotate(
                f"{accuracy.value:.1%}", place, (0, 6), textcoords="offset points", ha="center", fontsize=7.5
            )
        hypothesis_only = [
            (found.value, y)
            for y, (method, _) in enumerate(methods, first)
            if (found := method.accuracy(key, "hypothesis_only")) is not None
        ]
        seeds = [
            (found.value, y)
            for y, (method, _) in enumerate(methods, first)
            for run in method.runs
            if len(method.runs) > 1 and (found := run.evaluations[key].accuracy()) is not None
        ]
        if hypothesis_only:
            axes.plot(
                *zip(*hypothesis_only, strict=True), "D", color=CONTROL, markersize=5, label="hypothesis-only baseline"
            )
        if seeds:
            axes.plot(*zip(*seeds, strict=True), "|", color=INK, markersize=6, label="one seed")
        axes.set_yticks(range(len(rows)), [row for row, *_ in rows])
        axes.set(ylim=(-0.6, len(rows) - 0.2), xlabel="accuracy, with its 95% interval")
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.grid(axis="x")
        if hypothesis_only or seeds:
            _legend(figure, axes)
    best, accuracy = methods[-1]
    title = f"Highest on {key}: {best.name}, {accuracy.value:.1%}"
    values = "; ".join(f"{row}: {_on_one_line(accuracy)}" for row, accuracy, _ in reversed(rows))
    return make_plot(name, figure, title, f"Accuracy on {key}, with 95% intervals. {values}.")


def pairs_plot(ranking: Ranking, key: str, name: str) -> Plot:
    """Accuracy on one evaluation by number of training pairs: mean over seeds and interval."""
    curves = {curve.name: _accuracies_by_pairs(curve, key) for curve in ranking.learning_curves}
    curves = {curve: accuracies for curve, accuracies in curves.items() if accuracies}
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.2 + 0.09 * len(curves)))
        axes = figure.add_subplot()
        for number, (curve, accuracies) in enumerate(curves.items()):
            style = _style(number)
            pairs, estimates = list(accuracies), list(accuracies.values())
            lows, highs = [e.low for e in estimates], [e.high for e in estimates]
            axes.fill_between(pairs, lows, highs, color=style["color"], alpha=0.15, lw=0)
            axes.plot(pairs, [e.value for e in estimates], linewidth=1.2, label=curve, **style)
        _base_lines(axes, _base_accuracies(ranking, key))
        _log_axis(axes)
        axes.set(xlabel="training pairs", ylabel="accuracy")
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.grid(axis="y")
        _legend(figure, axes)
    most, accuracy, best = max((max(by_pairs), by_pairs[max(by_pairs)].value, c) for c, by_pairs in curves.items())
    title = f"{key}: {best} reaches {accuracy:.1%} with {most:,} training pairs"
    values = "; ".join(
        f"{curve}: " + ", ".join(f"{pairs:,} {_on_one_line(estimate)}" for pairs, estimate in by_pairs.items())
        for curve, by_pairs in curves.items()
    )
    return make_plot(name, figure, title, f"Accuracy on {key} by training pairs, with 95% intervals. {values}.")


def _accuracies_by_pairs(curve: LearningCurve, key: str) -> dict[int, Estimate]:
    """{training pairs: accuracy on one evaluation}, where it was measured."""
    accuracies = {pairs: runs.accuracy(key) for pairs, runs in curve.points.items()}
    return {pairs: accuracy for pairs, accuracy in accuracies.items() if accuracy is not None}


def cost_plot(ranking: Ranking, name: str) -> Plot:
    """Validation accuracy with its 95 % interval by seconds of training; replicates share a style."""
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
        seconds = [run.cost["training_seconds"] for run in ranking.runs]
        if max(seconds) > 5 * min(seconds):
            _log_axis(axes)
        axes.margins(x=0.15)
        axes.set(xlabel="seconds of training", ylabel="validation accuracy")
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.grid(axis="y")
        _legend(figure, axes)
    values = "; ".join(f"{r.name}: {r.validation.value:.1%} in {_seconds(r)}" for r in ranking.runs)
    return make_plot(name, figure, title, f"Validation accuracy by training time. {values}.")


def epochs_plot(ranking: Ranking, name: str) -> Plot:
    """Validation accuracy of the best methods by epoch; replicates share a style."""
    methods = [method for method in ranking.methods if any(len(run.curve) > 1 for run in method.runs)][:MAX_CURVES]
    shown = [run for method in methods for run in method.runs if len(run.curve) > 1]
    first, last = min(e for run in shown for _, e, _ in run.curve), max(e for run in shown for _, e, _ in run.curve)
    title = f"Learning curves of {len(shown)} runs, from epoch {first:g} to {last:g}"
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.2 + 0.09 * len(methods)))
        axes = figure.add_subplot()
        for number, method in enumerate(methods):
            style = _style(number, markersize=3.5)
            for run in (run for run in method.runs if run in shown):
                _, epochs, accuracies = zip(*run.curve, strict=True)
                axes.plot(epochs, accuracies, linewidth=1.2, alpha=0.85, label=_once(method, run), **style)
        axes.set(xlabel="epoch", ylabel="validation accuracy")
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.grid(axis="y")
        _legend(figure, axes)
    values = "; ".join(f"{run.name}: {run.curve[0][2]:.1%} to {run.curve[-1][2]:.1%}" for run in shown)
    return make_plot(name, figure, title, f"Validation accuracy by epoch. {values}.")


def _style(number: int, markersize: float = 6) -> dict[str, Any]:
    # When the colours repeat, each is combined with another marker.
    marker = MARKERS[(number + number // len(COLOURS)) % len(MARKERS)]
    return {"color": COLOURS[number % len(COLOURS)], "marker": marker, "markersize": markersize}


def _once(method: Replicates, run: RunRecord) -> str | None:
    """A method's name for the first of its runs, so that the legend lists it once."""
    return method.name if run is method.runs[0] else None


def _base_accuracies(ranking: Ranking, key: str) -> dict[str, Estimate]:
    """{base: its accuracy on one evaluation}, where it was measured."""
    accuracies = {base: _accuracy(ranking.base_evaluation(base, key), "base") for base in ranking.bases}
    return {base: accuracy for base, accuracy in accuracies.items() if accuracy is not None}


def _base_lines(axes: Axes, bases: Mapping[str, Estimate | None]) -> None:
    for base, estimate in bases.items():
        if estimate is not None:
            axes.axhline(estimate.value, color=BEFORE, linewidth=1, linestyle=(0, (4, 3)), label=base, zorder=0)


def _log_axis(axes: Axes) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:,g}")
    axes.xaxis.set_minor_formatter("")


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    columns = 1 if max(map(len, labels)) > LONG_NAME else 2
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, columnspacing=1.2)


def _seconds(run: RunRecord) -> str:
    return duration(run.cost["training_seconds"])


def render_page(views: Sequence[View]) -> str:
    """One self-contained HTML file."""
    return jinja_environment(autoescape=True).get_template("compare.html.jinja").render(views=views)


def plot_files(views: Iterable[View]) -> dict[str, str]:
    """{file name: SVG} of all plots."""
    return {f"{plot.name}.svg": plot.on_white() for view in views for plot in view.plots}


def as_dict(views: Iterable[View]) -> dict[str, object]:
    """Every figure, ready for JSON."""
    return {"rankings": [_ranking_figures(view) for view in views]}


def _ranking_figures(view: View) -> dict[str, object]:
    ranking = view.ranking
    return {
        "not_ranked_with_the_first": view.separation or None,
        "bases": {base: _figures(ranking.base_validation(base)) for base in ranking.bases},
        "runs": [_run_figures(run, ranking) for run in ranking.runs],
        "baselines": [_run_figures(run, ranking) for run in ranking.baselines],
        "replicates": [_replicate_figures(group, ranking) for group in ranking.replicates],
        "tests": [
            {
                "evaluation": test.evaluation,
                "first": test.first,
                "second": test.second,
                **test.comparison.as_dict(),
                "p_value_corrected": test.p_value,
                "better": test.better,
            }
            for test in view.tests
        ],
        "claims": view.claims,
    }


def _run_figures(run: RunRecord, ranking: Ranking) -> dict[str, object]:
    return {
        "name": run.name,
        "source": run.source,
        "validation": _figures(run.validation) if run.is_trained else None,
        "evaluations": {
            key: {model: _figures(evaluation.accuracy(model)) for model in evaluation.models}
            for key, evaluation in run.evaluations.items()
        },
        "differs": ranking.differences(run),
        "cost": run.cost,
    }


def _figures(estimate: Estimate | None) -> dict[str, float] | None:
    return estimate and asdict(estimate)


def _replicate_figures(group: Replicates, ranking: Ranking) -> dict[str, object]:
    return {
        "name": group.name,
        "runs": [run.name for run in group.runs],
        "validation": _figures(group.validation),
        "evaluations": {key: _figures(group.accuracy(key)) for key in ranking.evaluation_keys},
    }


def _estimate(estimate: Estimate | None) -> str:
    return NONE if estimate is None else f"{estimate.value:.1%}\n({100 * estimate.low:.1f}–{100 * estimate.high:.1f})"


def _on_one_line(estimate: Estimate) -> str:
    return _estimate(estimate).replace("\n", " ")


def _text(value: object) -> str:
    if value is None:
        return NONE
    if isinstance(value, float):
        return f"{value:g}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
