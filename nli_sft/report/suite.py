"""What a suite shows of a run: all its sets in one table, missing ones included, and the checks that go with it."""

from collections.abc import Mapping, Sequence

from ..evaluation.calibration import temperature_text
from ..evaluation.comparison import points
from .content import MODEL_NAMES, Evaluation
from .tables import NONE, Table

SCORED = ("base", "tuned", "hypothesis_only")
CHECKS = {
    "label_orders": "Other orders of the labels",
    "prompts": "Other prompts",
}


def suite_tables(suite: Mapping, evaluations: Sequence[Evaluation]) -> list[Table]:
    """The tables on one suite: accuracies, then what was asked beyond them, as far as it was.

    Args:
        suite: what `suites.write_suite` wrote.
        evaluations: those of the run.
    """
    by_key = {evaluation.key: evaluation for evaluation in evaluations}
    judged = {name: by_key[key] for name, key in suite["evaluated"].items() if key in by_key}
    found = [_accuracies(suite, judged), _missing(suite), _annotators(judged), _edits(judged), _calibration(judged)]
    for evaluation in judged.values():
        found += [_check(evaluation, check) for check in CHECKS]
    return [sheet for sheet in found if sheet is not None]


def _accuracies(suite: Mapping, judged: Mapping[str, Evaluation]) -> Table:
    columns = ["set", "pairs", "before", "after", "95% interval", "change", "majority", "hypothesis-only"]
    rows = []
    for name in suite["order"]:
        if name in judged:
            rows += _set_rows(name, judged[name])
        else:
            rows.append([name, "missing", *[NONE] * (len(columns) - 2)])
    note = (
        "Rows with a dot are parts of the set above. Majority: always the most frequent label. Intervals of the "
        "accuracy after tuning are Wilson's; the report has those of the changes."
    )
    if all(row[-1] == NONE for row in rows):
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    else:
        note += " Hypothesis-only: the same base tuned without the premises."
    some = next(iter(judged.values())).summary
    speeds = [f"{MODEL_NAMES[m]} {some[m]['pairs_per_second']:,.0f}" for m in SCORED if m in some]
    note += f" Pairs per second, in one pass over all sets: {', '.join(speeds)}."
    return Table(f"Suite {suite['suite']}", columns, rows, note)


def _set_rows(name: str, evaluation: Evaluation) -> list[list[str]]:
    summary, metrics, c = evaluation.summary, evaluation.metrics, evaluation.comparison
    row = [
        name,
        f"{c.pairs:,}",
        f"{c.before:.1%}",
        f"{c.after:.1%}",
        _interval(metrics["tuned"]),
        points(c.difference),
        f"{evaluation.most_frequent_label[1]:.1%}",
        f"{metrics['hypothesis_only']['accuracy']:.1%}" if "hypothesis_only" in metrics else NONE,
    ]
    rows = [row]
    if "shuffled" in metrics:
        shuffled = metrics["shuffled"]
        after = f"{shuffled['accuracy']:.1%}"
        rows.append(["· shuffled premises", f"{shuffled['n']:,}", NONE, after, _interval(shuffled), *[NONE] * 3])
    parts = {model: summary.get(model, {}).get("by_subset", {}) for model in SCORED}
    for part in parts["tuned"]:
        base, tuned, control = (f"{p[part]['accuracy']:.1%}" if part in p else NONE for p in parts.values())
        change = points(parts["tuned"][part]["accuracy"] - parts["base"][part]["accuracy"])
        rows.append([f"· {part}", f"{parts['tuned'][part]['n']:,}", base, tuned, NONE, change, NONE, control])
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


def _told(judged: Mapping[str, Evaluation], key: str) -> list[tuple[str, str, Mapping]]:
    """(set, model, figures) of every model that has figures of that kind, set by set."""
    return [
        (name, model, evaluation.summary[model][key])
        for name, evaluation in judged.items()
        for model in evaluation.models
        if key in evaluation.summary.get(model, {})
    ]


def _annotators(judged: Mapping[str, Evaluation]) -> Table | None:
    columns = ["set and model", "pairs", "annotators per pair", "JS divergence", "JS distance", "KL divergence"]
    rows = [
        [
            f"{name}, {MODEL_NAMES[model]}",
            f"{told['n']:,}",
            f"{told['annotators_per_pair']:.0f}",
            *(f"{told[key]:.3f}" for key in ("js_divergence", "js_distance", "kl_divergence")),
            NONE if told["entropy_correlation"] is None else f"{told['entropy_correlation']:.3f}",
        ]
        for name, model, told in _told(judged, "annotators")
    ]
    note = "Divergences in nats, 0 at best. Entropy correlation: Spearman's, over pairs; 1 at best."
    title = "Compared with all annotators"
    return Table(title, [*columns, "entropy correlation"], rows, note) if rows else None


def _edits(judged: Mapping[str, Evaluation]) -> Table | None:
    rows = [
        [
            f"{name}, {MODEL_NAMES[model]}",
            f"{told['n']:,}",
            *(f"{told[k]:.1%}" for k in ("original_right", "edit_right", "both_right")),
        ]
        for name, model, told in _told(judged, "edits")
    ]
    columns = ["set and model", "edits", "original right", "edit right", "both right"]
    return Table("Pairs and their minimal edits", columns, rows) if rows else None


def _calibration(judged: Mapping[str, Evaluation]) -> Table | None:
    rows = [
        [
            f"{name}, {MODEL_NAMES[model]}",
            temperature_text(told),
            *(
                f"{judged[name].metrics[model][key]:.3f} → {f'{told[key]:.3f}' if key in told else NONE}"
                for key in ("ece", "nll", "brier")
            ),
        ]
        for name, model, told in _told(judged, "calibrated")
    ]
    note = "Before → after dividing log-probabilities by a temperature fitted on validation pairs of the run's source."
    if any(row[1].startswith("none") for row in rows):
        note += " None: the search ended at its bound, so no temperature calibrates the model."
    columns = ["set and model", "temperature", "ECE", "log loss, nats", "Brier score"]
    return Table("Calibration", columns, rows, note) if rows else None


def _check(evaluation: Evaluation, check: str) -> Table | None:
    told = {m: evaluation.summary[m][check] for m in ("base", "tuned") if check in evaluation.summary.get(m, {})}
    if not told:
        return None
    columns = ["prompt", *(MODEL_NAMES[model] for model in told)]
    some = next(iter(told.values()))
    rows = [[way, *(f"{t['accuracy'][way]:.1%}" for t in told.values())] for way in some["accuracy"]]
    rows.append(["mean", *(f"{t['mean']:.1%}" for t in told.values())])
    rows.append(["range, points", *(f"{100 * t['spread']:.1f}" for t in told.values())])
    rows.append(["pairs with different answers", *(f"{t['flips']:.1%}" for t in told.values())])
    refused = "".join(f" {way} is left out: {why}." for way, why in some["refused"].items())
    note = f"Accuracy on {some['n']:,} pairs of {evaluation.name}.{refused}"
    return Table(f"{CHECKS[check]}: {evaluation.name}", columns, rows, note)
