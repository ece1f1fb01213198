"""Metrics of stress sets beyond accuracy: by subset, against annotators, on minimal edits, across prompt variants.

All are computed from predictions and columns of the source; no model runs here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import permutations
from typing import Any

import numpy as np
import pandas as pd
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy, spearmanr

from ..data.prompts import PROMPTS, Prompt, listed
from ..labels import LABELS, placeholder

# Probabilities are clipped to this: 0 for a label that an annotator gave makes the divergence infinite. The code of
# ChaosNLI (Nie et al., 2020) does the same.
MIN_PROBABILITY = 1e-15


def set_figures(
    pairs: pd.DataFrame, right: np.ndarray, probabilities: np.ndarray, labels: Sequence[str] = LABELS
) -> dict[str, Any]:
    """Metrics of one model on one set that need extra columns, ready for JSON.

    Args:
        pairs: label (a name), and the `sources.EXTRA_COLUMNS` that the source has.
        right: (n,) whether each prediction was right.
        probabilities: (n, labels) probability of each label of the model.
        labels: the label set of the pairs.

    Returns:
        `by_subset`, `annotators` and `edits`, those whose columns there are; see the functions below.
    """
    figures = {}
    if "subset" in pairs:
        figures["by_subset"] = by_subset(pairs, right, labels)
    if "label_counts" in pairs and (has_counts := pairs["label_counts"].notna().to_numpy(bool)).any():
        figures["annotators"] = against_annotators(
            np.stack(pairs["label_counts"][has_counts].tolist()), probabilities[has_counts]
        )
    if "edit_of" in pairs and pairs["edit_of"].notna().to_numpy().any():
        figures["edits"] = edits(pairs, right)
    return figures


def by_subset(pairs: pd.DataFrame, right: np.ndarray, labels: Sequence[str]) -> dict[str, dict[str, float]]:
    """{subset: {n, accuracy}}; of two labels by `subset, label`: a constant answer is right on half of each subset."""
    names = pairs["subset"]
    if len(labels) == 2:
        names = names + ", " + pairs["label"]
    groups = pd.Series(right).groupby(names.to_numpy())
    return {str(name): {"n": len(group), "accuracy": float(group.mean())} for name, group in groups}


def against_annotators(counts: np.ndarray, probabilities: np.ndarray) -> dict[str, Any]:
    """Distance between a model's probabilities and the shares of annotators who gave each label (Nie et al., 2020).

    Args:
        counts: (n, labels) annotators by label, at least one for each pair.
        probabilities: (n, labels).

    Returns:
        Means over pairs: `js_divergence` and `kl_divergence` (of the model from the annotators) in nats, and
        `js_distance`, the square root of the first, which ChaosNLI reports as JSD; `brier`, the squared distance
        between probabilities and shares, summed over labels, 0 to 2; `entropy_correlation`, Spearman's
        correlation of the entropies of annotators and model, `None` if one of them is constant;
        `annotators_per_pair`; `n`.
    """
    annotators = counts / counts.sum(axis=1, keepdims=True)
    model = np.maximum(probabilities, MIN_PROBABILITY)
    model /= model.sum(axis=1, keepdims=True)
    # NaN if rounding makes it negative. The stubs of scipy lack `axis`.
    distance = np.nan_to_num(jensenshannon(annotators, model, axis=1))  # pyright: ignore[reportCallIssue]
    uncertainty = entropy(annotators, axis=1), entropy(model, axis=1)
    varies = all(values.max() - values.min() > 1e-12 for values in uncertainty)
    # scipy's stubs take the result for a tuple of objects.
    correlation = float(spearmanr(*uncertainty).statistic) if varies else None  # pyright: ignore[reportAttributeAccessIssue]
    return {
        "n": len(counts),
        "annotators_per_pair": float(counts.sum(axis=1).mean()),
        "js_divergence": float((distance**2).mean()),
        "js_distance": float(distance.mean()),
        "brier": float(((probabilities - annotators) ** 2).sum(axis=1).mean()),
        "kl_divergence": float(entropy(annotators, model, axis=1).mean()),
        "entropy_correlation": correlation,
    }


def edits(pairs: pd.DataFrame, right: np.ndarray) -> dict[str, float]:
    """How often original, minimal edit, and both are predicted right (Kaushik et al., 2020).

    Args:
        pairs: uid and edit_of, the uid of the original, which is empty for originals.
    """
    right_by_uid = dict(zip(pairs["uid"], right, strict=True))
    edited = pairs["edit_of"].notna().to_numpy()
    original = np.array([right_by_uid[uid] for uid in pairs["edit_of"][edited]])
    return {
        "n": int(edited.sum()),
        "original_right": float(original.mean()),
        "edit_right": float(right[edited].mean()),
        "both_right": float((original & right[edited]).mean()),
    }


def label_orders(prompt: Prompt) -> dict[str, Prompt]:
    """The prompt with its labels listed in other orders; empty if the prompt has no `{labels}`.

    All orders of up to three labels. Of more, those in which every label stands at every place once.
    """
    if "{labels}" not in prompt.user:
        return {}
    labels, turns = prompt.labels, range(len(prompt.labels))
    orders = permutations(labels) if len(labels) <= 3 else (labels[turn:] + labels[:turn] for turn in turns)
    slots = {order: listed([f"{{{placeholder(label)}}}" for label in order]) for order in orders}
    return {
        ", ".join(order): replace(prompt, user=prompt.user.replace("{labels}", text)) for order, text in slots.items()
    }


def prompt_choices(prompt: Prompt) -> dict[str, Prompt]:
    """The prompt and all built-in prompts for its labels that show the premise, with the same label words."""
    fitting = (p for p in PROMPTS.values() if p.fits_any_labels or p.labels == prompt.labels)
    built_in = (p.with_labels(prompt.labels, prompt.label_words) for p in fitting if p.reads_premise)
    others = {p.name: p for p in built_in if p.fingerprint != prompt.fingerprint}
    return {prompt.name: prompt} | others


def sensitivity(accuracies: Mapping[str, float], choices: Sequence[np.ndarray]) -> dict[str, Any]:
    """How much a model's predictions on the same pairs depend on the prompt variant.

    Args:
        accuracies: by prompt variant.
        choices: for each variant, the (n,) predicted label ids.

    Returns:
        `n`; `accuracy` by variant; their `mean`, standard `deviation` and `spread` (largest minus smallest); `flips`,
        the share of pairs whose prediction is not the same for all variants.
    """
    values, predicted = np.array(list(accuracies.values())), np.stack(choices)
    return {
        "n": predicted.shape[1],
        "accuracy": dict(accuracies),
        "mean": float(values.mean()),
        "deviation": float(values.std()),
        "spread": float(values.max() - values.min()),
        "flips": float((predicted != predicted[0]).any(axis=0).mean()),
    }
