"""What stress sets ask beyond accuracy: by subset, against people who disagree, on minimal edits, under other prompts.

Everything here is computed from predictions and what the source tells of the pairs; nothing is run.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import permutations

import numpy as np
import pandas as pd
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy, spearmanr

from ..data.prompts import PROMPTS, Prompt
from ..labels import LABELS, TWO_WAY_LABELS

# A probability of 0 makes the divergence from people who disagree infinite, so none counts as less (as ChaosNLI's own
# code, Nie et al. 2020, does).
LEAST_PROBABILITY = 1e-15


def set_figures(pairs: pd.DataFrame, right: np.ndarray, probabilities: np.ndarray) -> dict[str, object]:
    """What can be said of one model on one set beside `metrics.compute`, ready for JSON.

    Args:
        pairs: label (a name), and those of `sources.EXTRA_COLUMNS` that the source has.
        right: (n,) whether each answer was right.
        probabilities: (n, 3) probability of each label.

    Returns:
        As the columns allow: `by_subset`, `annotators`, `edits`; see the functions below.
    """
    figures = {}
    if "subset" in pairs:
        figures["by_subset"] = by_subset(pairs, right)
    if "label_counts" in pairs and (told := pairs["label_counts"].notna().to_numpy()).any():
        figures["annotators"] = against_annotators(np.stack(pairs["label_counts"][told]), probabilities[told])
    if "edit_of" in pairs and pairs["edit_of"].notna().any():
        figures["edits"] = edits(pairs, right)
    return figures


def by_subset(pairs: pd.DataFrame, right: np.ndarray) -> dict[str, dict[str, float]]:
    """{subset: {n, accuracy}}; of a two-way set `subset, label`, since a constant answer is right on half of each."""
    names = pairs["subset"]
    if set(pairs["label"]) == set(TWO_WAY_LABELS):
        names = names + ", " + pairs["label"]
    groups = pd.Series(right).groupby(names.to_numpy())
    return {name: {"n": len(group), "accuracy": float(group.mean())} for name, group in groups}


def against_annotators(counts: np.ndarray, probabilities: np.ndarray) -> dict[str, float]:
    """How near a model's probabilities are to the shares of annotators who gave each label (Nie et al., 2020).

    Args:
        counts: (n, 3) annotators by label, some on every pair.
        probabilities: (n, 3).

    Returns:
        Means over pairs: `js_divergence` and `kl_divergence` (of the model from the annotators) in nats, and
        `js_distance`, the square root of the first, which ChaosNLI's table of results calls JSD;
        `entropy_correlation`, Spearman's, between the entropy of the annotators' labels and of the model's, `None`
        where one of them does not vary; `annotators_per_pair`; `n`.
    """
    people = counts / counts.sum(axis=1, keepdims=True)
    model = np.maximum(probabilities, LEAST_PROBABILITY)
    model /= model.sum(axis=1, keepdims=True)
    distance = np.nan_to_num(jensenshannon(people, model, axis=1))  # equal ones can come out a hair below 0
    uncertainty = entropy(people, axis=1), entropy(model, axis=1)
    varies = all(values.max() - values.min() > 1e-12 for values in uncertainty)
    return {
        "n": len(counts),
        "annotators_per_pair": float(counts.sum(axis=1).mean()),
        "js_divergence": float((distance**2).mean()),
        "js_distance": float(distance.mean()),
        "kl_divergence": float(entropy(people, model, axis=1).mean()),
        "entropy_correlation": float(spearmanr(*uncertainty).statistic) if varies else None,
    }


def edits(pairs: pd.DataFrame, right: np.ndarray) -> dict[str, float]:
    """Of pairs and their minimal edits: how often the original, the edit, and both are right (Kaushik et al., 2020).

    Args:
        pairs: uid, and edit_of, the uid of the original, empty for originals.
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
    """The prompt with its labels listed in each of the six orders; empty if it does not list them as `{labels}`."""
    if "{labels}" not in prompt.user:
        return {}
    return {
        ", ".join(order): replace(
            prompt, user=prompt.user.replace("{labels}", "{{{}}}, {{{}}} or {{{}}}".format(*order))
        )
        for order in permutations(LABELS)
    }


def prompt_choices(prompt: Prompt) -> dict[str, Prompt]:
    """The prompt itself and all built-in ones that read the premise, asking for the same label words."""
    built_in = (replace(p, label_words=prompt.label_words) for p in PROMPTS.values() if p.reads_premise)
    others = {p.name: p for p in built_in if p.fingerprint != prompt.fingerprint}
    return {prompt.name: prompt} | others


def sensitivity(accuracies: Mapping[str, float], choices: Sequence[np.ndarray]) -> dict[str, object]:
    """How much a model's answers to the same pairs depend on how it is asked.

    Args:
        accuracies: by way of asking.
        choices: for each way the (n,) label ids that were answered.

    Returns:
        `n`; `accuracy` by way; their `mean`, `deviation` (standard, over these ways) and `spread` (largest less
        smallest); `flips`: the share of pairs that are not answered alike in all ways.
    """
    values, answers = np.array(list(accuracies.values())), np.stack(choices)
    return {
        "n": answers.shape[1],
        "accuracy": dict(accuracies),
        "mean": float(values.mean()),
        "deviation": float(values.std()),
        "spread": float(values.max() - values.min()),
        "flips": float((answers != answers[0]).any(axis=0).mean()),
    }
