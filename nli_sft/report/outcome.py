"""The table that the terminal shows after an evaluation: accuracy by model and by part of the set, and cost."""

from collections.abc import Mapping, Sequence

import numpy as np

from ..data.sources import SPLIT_NAMES
from ..evaluation.slices import source_slices
from .content import Evaluation, duration, mass_text, size_text
from .tables import NONE, Table

COLUMNS = {
    "base": "base",
    "tuned": "tuned",
    "shuffled": "tuned, shuffled premises",
    "hypothesis_only": "hypothesis-only",
}
UNCONSTRAINED = "Unconstrained: an answer without exactly one label is invalid and counts as wrong."


def outcome_table(evaluation: Evaluation, trained: Mapping) -> Table:
    """Accuracy on all pairs and on every part that the source names; unconstrained answers; time and memory.

    Args:
        evaluation: of the run on one set.
        trained: the `resources` in the record of the run; may be empty.
    """
    models = evaluation.models
    right = {model: evaluation.right(model) for model in models}
    rows = [_row("all pairs", np.ones(len(evaluation.table), dtype=bool), right)]
    low_high = (evaluation.metrics[model]["accuracy_interval"] for model in models)
    rows.append(["95% interval", "", *(f"{100 * low:.1f}–{100 * high:.1f}" for low, high in low_high)])
    for (family, name, _), inside in source_slices(evaluation.table, evaluation.label_names).items():
        if family == "Difficulty":
            rows.append(_row("easy", ~inside, right))
            rows.append(_row("hard", inside, right))
        else:
            rows.append(_row(f"{family.split()[0].lower()}: {name}", inside, right))
    unconstrained = [evaluation.unconstrained(model) for model in models]
    if any(unconstrained):
        n = next(answers["n"] for answers in unconstrained if answers)
        for name, key in (("unconstrained", "accuracy"), ("invalid answers", "invalid_share")):
            rows.append([name, f"{n:,}", *(f"{answers[key]:.1%}" if answers else NONE for answers in unconstrained)])
    seconds = [evaluation.summary.get(model, {}).get("seconds") for model in models]
    rows.append(["time to score", "", *(NONE if s is None else duration(s) for s in seconds)])
    costs = (("Training", trained), ("Evaluation", evaluation.summary.get("resources", {})))
    note = ". ".join(f"{what}: {_cost(resources)}" for what, resources in costs if resources)
    if any(unconstrained):
        note = f"{UNCONSTRAINED} {note}".strip()
    columns = COLUMNS if evaluation.main == "tuned" else evaluation.names
    return Table(f"{evaluation.name}: accuracy", ["", "pairs", *(columns[model] for model in models)], rows, note)


def prompt_table(prompts: Sequence[str], evaluations: Sequence[Evaluation]) -> Table:
    """The metrics of one model with several prompts on one set, in their order; the best one is marked."""
    metrics = [evaluation.metrics[evaluation.main] for evaluation in evaluations]
    best = max(range(len(metrics)), key=lambda index: metrics[index]["accuracy"])
    rows = []
    for index, (prompt, figures) in enumerate(zip(prompts, metrics, strict=True)):
        low, high = figures["accuracy_interval"]
        rows.append(
            [
                f"{prompt} (best)" if index == best else prompt,
                f"{figures['accuracy']:.1%}",
                f"{100 * low:.1f}–{100 * high:.1f}",
                *(f"{figures[key]:.3f}" for key in ("macro_f1", "nll", "ece")),
                mass_text(figures["label_mass"]),
            ]
        )
    own = evaluations[0]
    note = f"{metrics[0]['n']:,} pairs. Label mass: what the model would give the label words without constraints."
    if own.summary["split"] not in SPLIT_NAMES["validation"]:
        note += (
            f" The best prompt is chosen on these pairs, so its accuracy on them is too high by chance: choose on "
            f"validation pairs (--split validation), and evaluate that prompt alone on {own.summary['split']}."
        )
    columns = ["prompt", "accuracy", "95% interval", "macro-F1", "log loss, nats", "ECE", "label mass"]
    return Table(f"{own.name}: prompts", columns, rows, note)


def _row(name: str, inside: np.ndarray, right: Mapping[str, np.ndarray]) -> list[str]:
    shares = (f"{of_model[inside].mean():.1%}" if inside.any() else NONE for of_model in right.values())
    return [name, f"{inside.sum():,}", *shares]


def _cost(resources: Mapping) -> str:
    processes = resources["processes"]
    parts = [duration(resources["seconds"]), f"{size_text(sum(p['peak_ram_bytes'] for p in processes))} of RAM"]
    devices = [process["device"] for process in processes if process["device"]]
    if devices:
        parts.append(f"{size_text(max(device['peak_allocated_bytes'] for device in devices))} of GPU memory")
    return ", ".join(parts)
