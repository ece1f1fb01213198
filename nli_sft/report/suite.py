"""The tables on a suite: accuracy on every set, missing sets, and the further checks."""

from collections.abc import Mapping, Sequence

from ..evaluation.calibration import temperature_text
from ..evaluation.comparison import points
from .content import Evaluation
from .tables import NONE, Table

SCORED = ("base", "tuned", "hypothesis_only")
CHECKS = {
    "label_orders": "Other label orders",
    "prompts": "Other prompts",
}


def suite_tables(suite: Mapping, evaluations: Sequence[Evaluation]) -> list[Table]:
    """The tables on one suite: accuracies, then those checks that were run.

    Args:
        suite: as `suites.write_suite` wrote it.
        evaluations: of the run.
    """
    by_key = {evaluation.key: evaluation for evaluation in evaluations}
    evaluated = {name: by_key[key] for name, key in suite["evaluated"].items() if key in by_key}
    tables = [_accuracies(suite, evaluated), _missing(suite)]
    tables += [_annotators(evaluated), _edits(evaluated), _calibration(evaluated)]
    for evaluation in evaluated.values():
        tables += [_check(evaluation, check) for check in CHECKS]
    return [table for table in tables if table is not None]


def _accuracies(suite: Mapping, evaluated: Mapping[str, Evaluation]) -> Table:
    columns = ["set", "pairs", "before", "after", "95% interval", "change", "majority", "hypothesis-only"]
    rows = []
    for name in suite["order"]:
        if name in evaluated:
            rows += _set_rows(name, evaluated[name])
        else:
            rows.append([name, "missing", *[NONE] * (len(columns) - 2)])
    first = next(iter(evaluated.values()))
    is_tuned = first.main == "tuned"
    if not is_tuned:
        columns[2] = "accuracy"
    note = (
        "Rows with a dot are parts of the set above. Majority: always the most frequent label. The interval (Wilson) "
    )
    note += "is that of the accuracy"
    note += " after tuning; the report has intervals of the changes." if is_tuned else "."
    measured = [index for index in range(len(columns)) if any(row[index] not in (NONE, "missing") for row in rows)]
    columns, *rows = ([cells[index] for index in measured] for cells in (columns, *rows))
    if "hypothesis-only" in columns:
        note += " Hypothesis-only: the same base tuned without the premises."
    speeds = [f"{first.names[m]} {first.summary[m]['pairs_per_second']:,.0f}" for m in SCORED if m in first.summary]
    note += f" Pairs per second, in one pass over all sets: {', '.join(speeds)}."
    return Table(f"Suite {suite['suite']}", columns, rows, note)


def _set_rows(name: str, evaluation: Evaluation) -> list[list[str]]:
    summary, metrics, is_tuned = evaluation.summary, evaluation.metrics, evaluation.main == "tuned"
    row = [
        name,
        f"{metrics[evaluation.main]['n']:,}",
        f"{metrics['base']['accuracy']:.1%}",
        f"{metrics['tuned']['accuracy']:.1%}" if is_tuned else NONE,
        _interval(metrics[evaluation.main]),
        points(evaluation.comparison.difference) if is_tuned else NONE,
        f"{evaluation.most_frequent_label[1]:.1%}",
        f"{metrics['hypothesis_only']['accuracy']:.1%}" if "hypothesis_only" in metrics else NONE,
    ]
    rows = [row]
    if "shuffled" in metrics:
        shuffled, after = metrics["shuffled"], [NONE, f"{metrics['shuffled']['accuracy']:.1%}"]
        shown = after if is_tuned else after[::-1]
        rows.append(["· shuffled premises", f"{shuffled['n']:,}", *shown, _interval(shuffled), *[NONE] * 3])
    parts = {model: summary.get(model, {}).get("by_subset", {}) for model in SCORED}
    for part, figures in parts[evaluation.main].items():
        base, tuned, control = (f"{p[part]['accuracy']:.1%}" if part in p else NONE for p in parts.values())
        change = points(figures["accuracy"] - parts["base"][part]["accuracy"]) if is_tuned else NONE
        rows.append([f"· {part}", f"{figures['n']:,}", base, tuned, NONE, change, NONE, control])
    return rows


def _interval(metrics: Mapping) -> str:
    low, high = metrics["accuracy_interval"]
    return f"{100 * low:.1f}–{100 * high:.1f}"


def _missing(suite: Mapping) -> Table | None:
    by_reason: dict[str, list[str]] = {}
    for name, reason in suite["missing"].items():
        by_reason.setdefault(reason, []).append(name)
    rows = [[", ".join(names), reason] for reason, names in by_reason.items()]
    return Table("Missing from the suite", ["set", "reason"], rows) if rows else None


def _figures(evaluated: Mapping[str, Evaluation], key: str) -> list[tuple[str, str, Mapping]]:
    """(set, model, figures under `key`), set by set, for every model that has them."""
    return [
        (name, model, evaluation.summary[model][key])
        for name, evaluation in evaluated.items()
        for model in evaluation.models
        if key in evaluation.summary.get(model, {})
    ]


def _annotators(evaluated: Mapping[str, Evaluation]) -> Table | None:
    columns = ["set and model", "pairs", "annotators per pair", "JS divergence", "JS distance", "KL divergence"]
    rows = [
        [
            f"{name}, {evaluated[name].names[model]}",
            f"{figures['n']:,}",
            f"{figures['annotators_per_pair']:.0f}",
            *(f"{figures[key]:.3f}" for key in ("js_divergence", "js_distance", "kl_divergence")),
            NONE if figures["entropy_correlation"] is None else f"{figures['entropy_correlation']:.3f}",
        ]
        for name, model, figures in _figures(evaluated, "annotators")
    ]
    note = "Divergences in nats, 0 at best. Entropy correlation: Spearman's, over pairs; 1 at best."
    title = "Compared with all annotators"
    return Table(title, [*columns, "entropy correlation"], rows, note) if rows else None


def _edits(evaluated: Mapping[str, Evaluation]) -> Table | None:
    rows = [
        [
            f"{name}, {evaluated[name].names[model]}",
            f"{figures['n']:,}",
            *(f"{figures[k]:.1%}" for k in ("original_right", "edit_right", "both_right")),
        ]
        for name, model, figures in _figures(evaluated, "edits")
    ]
    columns = ["set and model", "edits", "original right", "edit right", "both right"]
    return Table("Pairs and their minimal edits", columns, rows) if rows else None


def _calibration(evaluated: Mapping[str, Evaluation]) -> Table | None:
    rows = [
        [
            f"{name}, {evaluated[name].names[model]}",
            temperature_text(figures),
            *(
                f"{evaluated[name].metrics[model][key]:.3f} → {f'{figures[key]:.3f}' if key in figures else NONE}"
                for key in ("ece", "nll", "brier")
            ),
        ]
        for name, model, figures in _figures(evaluated, "calibrated")
    ]
    note = "Before → after dividing log-probabilities by a temperature fitted on validation pairs of the run's source."
    if any(row[1].startswith("none") for row in rows):
        note += " None: no temperature calibrates the model; the search ended at its bound."
    columns = ["set and model", "temperature", "ECE", "log loss, nats", "Brier score"]
    return Table("Calibration", columns, rows, note) if rows else None


def _check(evaluation: Evaluation, check: str) -> Table | None:
    figures = {m: evaluation.summary[m][check] for m in ("base", "tuned") if check in evaluation.summary.get(m, {})}
    if not figures:
        return None
    columns = ["prompt", *(evaluation.names[model] for model in figures)]
    first = next(iter(figures.values()))
    rows = [[variant, *(f"{f['accuracy'][variant]:.1%}" for f in figures.values())] for variant in first["accuracy"]]
    rows.append(["mean", *(f"{f['mean']:.1%}" for f in figures.values())])
    rows.append(["range, points", *(f"{100 * f['spread']:.1f}" for f in figures.values())])
    rows.append(["pairs with different answers", *(f"{f['flips']:.1%}" for f in figures.values())])
    refused = "".join(f" {variant} is left out: {why}." for variant, why in first["refused"].items())
    note = f"Accuracy on {first['n']:,} pairs of {evaluation.name}.{refused}"
    return Table(f"{CHECKS[check]}: {evaluation.name}", columns, rows, note)
