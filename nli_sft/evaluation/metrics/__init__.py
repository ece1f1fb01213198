"""Metrics of label predictions: accuracy, per-label scores, confusion matrix, calibration.

Training, evaluation and reports get all metrics from `compute`. It runs the `evaluate` module of this folder, which
`evaluate.load(str(METRICS_PATH))` loads anywhere, also offline.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binomtest
from sklearn.metrics import confusion_matrix, log_loss, precision_recall_fscore_support

from ...labels import LABELS, counts_as

METRICS_PATH = Path(__file__).parent

# As Guo et al. (2017), "On Calibration of Modern Neural Networks".
RELIABILITY_BINS = 15


def compute(
    gold: Sequence[int] | np.ndarray,
    predicted: Sequence[int] | np.ndarray,
    probabilities: Sequence[Sequence[float]] | np.ndarray | None = None,
    mass: Sequence[float] | np.ndarray | None = None,
    label_names: Sequence[str] = LABELS,
    labels: Sequence[str] | None = None,
) -> dict[str, Any]:
    """The metrics of one model on one set of pairs, ready for JSON.

    Args:
        gold: (n,) label ids, indices of `label_names`.
        predicted: (n,) label ids, indices of `labels`.
        probabilities: (n, labels) probability of each label; rows sum to 1. Needed for the calibration metrics.
        mass: (n,) label mass: the total probability of the label words without constraints.
        label_names: the label set of the gold labels.
        labels: the label set of the model; `label_names` by default. If they differ, predictions are mapped by
            `labels.counts_as`, and probabilities added.

    Returns:
        - `n`, `accuracy`, `accuracy_interval` [low, high]: 95 % Wilson score interval (Wilson, 1927), which treats the
          pairs as independent;
        - `macro_f1`, `per_label` {name: {precision, recall, f1, n}}, 0 where undefined;
        - `confusion`: counts; rows are gold labels, columns predictions, in the order of `labels`;
        - `labels`, the label set of the gold labels, and `label_mapping` {label of the model: label of the set}, or
          `None` if they are the same;
        - with probabilities: `nll`, mean negative log-likelihood of the gold label in nats; `brier`, mean squared
          distance between probabilities and gold, summed over labels, 0 to 2 (Brier, 1950); `ece`, expected
          calibration error; `mean_confidence`; `reliability`, its non-empty bins
          [{low, high, n, confidence, accuracy}];
        - with mass: its mean, `label_mass`.

    Raises:
        ValueError: if there are no pairs, lengths or shapes differ, or an id is no label.
        UserError: if the label sets differ and there is no mapping.
    """
    from .metrics import NLIMetrics  # here, so that importing this does not import `evaluate`

    if len(gold) != len(predicted):
        raise ValueError(f"{len(gold)} gold labels but {len(predicted)} predictions")
    if not len(gold):
        raise ValueError("no pairs to compute metrics on")
    module = NLIMetrics(keep_in_memory=True, cache_dir=tempfile.gettempdir())  # a home folder may be read-only
    result = module.compute(
        predictions=predicted,
        references=gold,
        probabilities=probabilities,
        mass=mass,
        label_names=label_names,
        labels=labels,
    )
    assert result is not None, "None only in processes other than the first of a distributed metric"
    return result


def compute_arrays(
    gold: Sequence[int],
    predicted: Sequence[int],
    probabilities: Sequence[Sequence[float]] | np.ndarray | None,
    mass: Sequence[float] | np.ndarray | None,
    label_names: Sequence[str],
    labels: Sequence[str] | None = None,
) -> dict[str, Any]:
    """The computation itself, with the arguments and the result of `compute`."""
    names = list(label_names)
    own_names = names if labels is None else list(labels)
    mapping = np.array(counts_as(own_names, names))
    gold_ids, predicted_ids = _ids(gold, names), mapping[_ids(predicted, own_names)]

    ids = list(range(len(names)))
    per_label: tuple[np.ndarray, ...] = precision_recall_fscore_support(  # pyright: ignore[reportAssignmentType]
        gold_ids,
        predicted_ids,
        labels=ids,
        zero_division=0,  # pyright: ignore[reportArgumentType]
    )
    precision, recall, f1, support = per_label  # each (labels,)
    right = gold_ids == predicted_ids
    interval = binomtest(int(right.sum()), len(gold)).proportion_ci(method="wilson")
    result = {
        "n": len(gold),
        "accuracy": float(right.mean()),
        "accuracy_interval": [float(interval.low), float(interval.high)],
        "macro_f1": float(f1.mean()),
        "per_label": {
            name: {"precision": float(p), "recall": float(r), "f1": float(f), "n": int(n)}
            for name, p, r, f, n in zip(names, precision, recall, f1, support, strict=True)
        },
        "confusion": confusion_matrix(gold_ids, predicted_ids, labels=ids).tolist(),
        "labels": names,
        "label_mapping": None
        if own_names == names
        else {name: names[label] for name, label in zip(own_names, mapping, strict=True)},
    }
    if probabilities is not None:
        result |= _calibration(gold_ids, predicted_ids, _mapped(probabilities, len(gold), mapping), ids)
    if mass is not None:
        result["label_mass"] = float(np.mean(mass))
    return result


def _ids(ids: Sequence[int] | np.ndarray, names: Sequence[str]) -> np.ndarray:
    """(n,) ids, once they are known to be of these labels."""
    values = np.asarray(ids)
    if values.min() < 0 or values.max() >= len(names):
        raise ValueError(f"expected label ids from 0 to {len(names) - 1}, found {values.min()} to {values.max()}")
    return values


def _mapped(probabilities: Sequence[Sequence[float]] | np.ndarray, n: int, mapping: np.ndarray) -> np.ndarray:
    """(n, labels of the set) probabilities that sum to 1, from those of the model's labels."""
    values = np.asarray(probabilities, dtype=np.float64)
    if values.shape != (n, len(mapping)):
        raise ValueError(f"expected probabilities of shape ({n}, {len(mapping)}), found {values.shape}")
    values = values / values.sum(axis=1, keepdims=True)  # float32 probabilities sum to 1 only approximately
    return values @ np.eye(mapping.max() + 1)[mapping]


def _calibration(gold: np.ndarray, predicted: np.ndarray, probabilities: np.ndarray, ids: list[int]) -> dict[str, Any]:
    rows = np.arange(len(gold))
    confidence = probabilities[rows, predicted]
    right = gold == predicted
    edges = np.linspace(0, 1, RELIABILITY_BINS + 1)
    bins = np.digitize(confidence, edges[1:-1], right=True)  # a bin includes its upper edge, as in Guo et al.
    reliability = [
        {
            "low": float(edges[b]),
            "high": float(edges[b + 1]),
            "n": int((bins == b).sum()),
            "confidence": float(confidence[bins == b].mean()),
            "accuracy": float(right[bins == b].mean()),
        }
        for b in np.unique(bins)
    ]
    return {
        "nll": float(log_loss(gold, probabilities, labels=ids)),
        "brier": float(((probabilities - np.eye(len(ids))[gold]) ** 2).sum(axis=1).mean()),
        "ece": sum(b["n"] * abs(b["accuracy"] - b["confidence"]) for b in reliability) / len(gold),
        "mean_confidence": float(confidence.mean()),
        "reliability": reliability,
    }
