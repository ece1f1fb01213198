"""How runs look side by side: tables for a terminal, Markdown, a page, JSON and CSV, and two plots."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, PercentFormatter

from ..comparison import points
from ..ledger import (
    Estimate,
    PairedTest,
    Ranking,
    Replicates,
    RunRecord,
    between_replicates,
    judged_apart,
    paired_tests,
    why_apart,
)
from . import _environment
from .content import duration
from .figures import BEFORE, STYLE, WIDTH, Plot, _plot
from .sheets import NONE, Sheet, escape_markdown

# Okabe and Ito's colours, and markers, so that runs can be told apart in grey too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#222222")
MARKERS = "osD^vPX"

# More curves than this cannot be told apart.
MOST_CURVES = 12


@dataclass(frozen=True)
class Side:
    """All that is said of one ranking.

    Attributes:
        apart: why these runs are not ranked with those before; empty for the first.
        claims: what can and what cannot be said, in sentences.
        tests: any two runs against each other.
    """

    ranking: Ranking
    apart: str
    sheets: list[Sheet]
    claims: list[str]
    tests: list[PairedTest]
    plots: list[Plot]


def lay_out(rankings: Sequence[Ranking]) -> list[Side]:
    """Say and draw everything on each ranking."""
    return [
        Side(
            ranking=ranking,
            apart=why_apart(rankings[0], ranking) if number else "",
            sheets=sheets(ranking, tests),
            claims=claims(ranking, tests),
            tests=tests,
            plots=plots(ranking, f"ranking-{number}"),
        )
        for number, ranking in enumerate(rankings)
        for tests in [paired_tests(ranking)]
    ]


def sheets(ranking: Ranking, tests: Sequence[PairedTest]) -> list[Sheet]:
    """The tables of one ranking."""
    found = [_accuracies(ranking)]
    if ranking.differing:
        rows = [[run.name, *(_text(value) for value in ranking.differences(run).values())] for run in ranking.runs]
        found.append(Sheet("What differs, and only that", ["run", *ranking.differing], rows))
    if ranking.replicates:
        found.append(_replicates(ranking))
    for key in ranking.judged:
        names = [*ranking.bases, *(run.name for run in ranking.runs)]
        matrix = _matrix(key, names, [test for test in tests if test.evaluation == key])
        if matrix is not None:
            found.append(matrix)
    return found


def _accuracies(ranking: Ranking) -> Sheet:
    controls = [
        (key, model)
        for key in ranking.judged
        for model in ("tuned", "hypothesis_only")
        if any(key in run.judged and run.judged[key].accuracy(model) for run in ranking.runs)
    ]
    columns = ["run", "validation", *(key if m == "tuned" else f"{key}, {m.replace('_', ' ')}" for key, m in controls)]
    columns += ["training", "pairs/s", "peak memory", "energy", "trainable"]
    rows = []
    for base in ranking.bases:
        row = [base, _estimate(ranking.base_validation(base))]
        for key, model in controls:
            judged = ranking.base_judged(base, key)
            row.append(_estimate(judged and judged.accuracy("base")) if model == "tuned" else NONE)
        rows.append([*row, *[NONE] * 5])
    for run in ranking.runs:
        row = [run.name, _estimate(run.validation)]
        for key, model in controls:
            row.append(_estimate(run.judged[key].accuracy(model)) if key in run.judged else NONE)
        rows.append([*row, *_cost(run)])
    measured = [i for i in range(len(columns)) if any(row[i] != NONE for row in rows)]
    columns, rows = [columns[i] for i in measured], [[row[i] for i in measured] for row in rows]
    data = ranking.runs[0].config
    title = f"{len(ranking.runs)} {'run' if len(ranking.runs) == 1 else 'runs'} by validation accuracy"
    note = (
        f"Accuracy with its 95% interval. Validation: {data['validation_pairs']:,} pairs, fingerprint "
        f"{data['validation_fingerprint']}; prompt {data['prompt']}, fingerprint {data['prompt_fingerprint']}."
    )
    return Sheet(title, columns, rows, note)


def _cost(run: RunRecord) -> list[str]:
    cost, trainable = run.cost, run.record["parameters"]
    memory = (
        f"{cost['peak_gpu_gib']:.1f} GiB GPU"
        if "peak_gpu_gib" in cost
        else f"{cost['peak_ram_gib']:.1f} GiB RAM"
        if "peak_ram_gib" in cost
        else NONE
    )
    return [
        duration(cost["training_seconds"]),
        f"{cost['pairs_per_second']:,.0f}" if "pairs_per_second" in cost else NONE,
        memory,
        f"{cost['energy_wh']:,.1f} Wh" if "energy_wh" in cost else NONE,
        f"{trainable['trainable']:,} ({trainable['trainable'] / trainable['total']:.1%})",
    ]


def _replicates(ranking: Ranking) -> Sheet:
    rows = [
        [group.name, _estimate(group.validation), *(_estimate(group.accuracy(key)) for key in ranking.judged)]
        for group in ranking.replicates
    ]
    note = "Mean over seeds with Student's 95% interval: it holds what another seed may give, not other pairs."
    return Sheet("Seeds as replicates", ["runs", "validation", *ranking.judged], rows, note)


def _matrix(key: str, names: Sequence[str], tests: Sequence[PairedTest]) -> Sheet | None:
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
        "Points by which the row is above the column on the pairs that both judged. In brackets: no claim, the 95% "
        "interval (bootstrap by premise) or McNemar's test, corrected for all pairs of runs, allows none."
    )
    return Sheet(f"Differences on {key}", ["", *names], rows, note)


def claims(ranking: Ranking, tests: Sequence[PairedTest]) -> list[str]:
    """What can be said of the best run by validation, against its base and the next, and of sets of replicates."""
    best, rivals = ranking.runs[0].name, {ranking.runs[0].base, *(run.name for run in ranking.runs[1:2])}
    told = [str(test) for test in tests if test.second == best and test.first in rivals]
    return [*told, *between_replicates(ranking), *judged_apart(ranking)]


def plots(ranking: Ranking, name: str) -> list[Plot]:
    """Accuracy against cost, and the learning curves overlaid."""
    groups = _colour_groups(ranking)
    found = [cost_plot(ranking, groups, name)]
    if any(len(run.curve) > 1 for run in ranking.runs):
        found.append(curves_plot(ranking, groups, name))
    return found


def _colour_groups(ranking: Ranking) -> dict[str, int]:
    """{name of a run: number of its colour}; replicates share one."""
    groups = [[run.name for run in group.runs] for group in ranking.replicates]
    grouped = {name for group in groups for name in group}
    groups += [[run.name] for run in ranking.runs if run.name not in grouped]
    return {name: number for number, group in enumerate(groups) for name in group}


def cost_plot(ranking: Ranking, groups: dict[str, int], name: str) -> Plot:
    """Validation accuracy, with its 95 % interval, against seconds of training."""
    cheapest = min(ranking.runs, key=lambda run: run.cost["training_seconds"])
    best = ranking.runs[0]
    title = f"Best on validation: {best.name}, {best.validation.value:.1%}, in {_seconds(best)} of training"
    if cheapest is not best:
        title += f"; cheapest: {cheapest.name}, {cheapest.validation.value:.1%}, in {_seconds(cheapest)}"
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.2 + 0.09 * len(ranking.runs)))
        axes = figure.add_subplot()
        for run in ranking.runs:
            seconds, accuracy = run.cost["training_seconds"], run.validation
            style = _style(groups[run.name])
            axes.plot([seconds, seconds], [accuracy.low, accuracy.high], color=style["color"], linewidth=1.2)
            axes.plot(seconds, accuracy.value, linestyle="none", label=run.name, **style)
        _base_line(axes, ranking)
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
    return _plot(f"{name}-cost", figure, title, f"Validation accuracy against training time. {told}.")


def curves_plot(ranking: Ranking, groups: dict[str, int], name: str) -> Plot:
    """Validation accuracy by epoch, all runs in one."""
    shown = [run for run in ranking.runs if len(run.curve) > 1][:MOST_CURVES]
    first, last = min(e for run in shown for _, e, _ in run.curve), max(e for run in shown for _, e, _ in run.curve)
    title = f"Learning curves of {len(shown)} runs, from epoch {first:g} to {last:g}"
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.2 + 0.09 * len(ranking.runs)))
        axes = figure.add_subplot()
        for run in shown:
            _, epochs, accuracies = zip(*run.curve, strict=True)
            style = _style(groups[run.name]) | {"markersize": 3.5}
            axes.plot(epochs, accuracies, linewidth=1.2, alpha=0.85, label=run.name, **style)
        axes.set(xlabel="epoch", ylabel="validation accuracy")
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.grid(axis="y")
        _legend(figure, axes)
    told = "; ".join(f"{run.name}: {run.curve[0][2]:.1%} to {run.curve[-1][2]:.1%}" for run in shown)
    return _plot(f"{name}-curves", figure, title, f"Validation accuracy by epoch. {told}.")


def _style(group: int) -> dict[str, object]:
    return {"color": COLOURS[group % len(COLOURS)], "marker": MARKERS[group % len(MARKERS)], "markersize": 6}


def _base_line(axes, ranking: Ranking) -> None:
    for base in ranking.bases:
        estimate = ranking.base_validation(base)
        if estimate is not None:
            axes.axhline(estimate.value, color=BEFORE, linewidth=1, linestyle=(0, (4, 3)), label=base, zorder=0)


def _legend(figure: Figure, axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, columnspacing=1.2)


def _seconds(run: RunRecord) -> str:
    return duration(run.cost["training_seconds"])


def page(sides: Sequence[Side]) -> str:
    """All of it as one HTML file that needs no other."""
    return _environment(autoescape=True).get_template("ledger.html.jinja").render(sides=sides)


def markdown(sides: Sequence[Side]) -> str:
    """All of it but the plots, as Markdown."""
    parts = ["# Runs side by side"]
    for side in sides:
        parts += [escape_markdown(side.apart), *(sheet.markdown() for sheet in side.sheets)]
        parts.append("\n".join(f"- {escape_markdown(claim)}" for claim in side.claims))
    return "\n\n".join(part for part in parts if part) + "\n"


def as_dict(sides: Sequence[Side]) -> dict[str, object]:
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


def as_frame(sides: Sequence[Side]) -> pd.DataFrame:
    """One row a run, the figures flat: for CSV."""
    rows = []
    for number, side in enumerate(sides, start=1):
        for run in side.ranking.runs:
            row = {"ranking": number, "name": run.name, "source": run.source}
            row |= {f"validation_{key}": figure for key, figure in asdict(run.validation).items()}
            for key, judged in run.judged.items():
                for model in judged.models:
                    row |= {f"{key}_{model}_{k}": v for k, v in asdict(judged.accuracy(model)).items() if k != "n"}
            rows.append(row | {f"cost_{key}": figure for key, figure in run.cost.items()})
            rows[-1] |= side.ranking.differences(run)
    return pd.DataFrame(rows)


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
    return NONE if estimate is None else f"{estimate.value:.1%} ({estimate.low:.1%} to {estimate.high:.1%})"


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
