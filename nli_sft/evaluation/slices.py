"""Named subsets (slices) of pairs, the change in accuracy on each, and sentences about the significant changes.

A slice depends on the pair alone (texts, gold label, columns of its source), never on a prediction, so that it cannot
be chosen to fit a result. The word lists follow the cues for SNLI's labels in Gururangan et al. (2018), "Annotation
Artifacts in Natural Language Inference Data".
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import t as student_t
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

from ..labels import LABELS
from .comparison import MIN_PREMISES, bootstrap_interval, change_p_value, points

# Smaller slices are left out: they show little, and each one makes the correction stricter for the others.
MIN_PAIRS = 30
LEVEL = 0.05


def _words_in(text: str) -> frozenset[str]:
    return frozenset(text.split())


NEGATIONS = _words_in("no not never none nobody nothing nowhere neither nor without cannot")
NUMBERS = _words_in(
    "zero one two three four five six seven eight nine ten eleven twelve dozen twenty thirty forty fifty hundred "
    "thousand million"
)
COLOURS = _words_in(
    "red blue green yellow black white brown orange pink purple gray grey gold golden silver beige tan violet "
    "turquoise maroon blond blonde"
)
MOODS_AND_PURPOSES = _words_in(
    "happy sad angry excited tired bored scared afraid nervous proud lonely hungry upset worried calm glad joyful "
    "because since want wants wanting hope hopes hoping try tries trying plan plans planning wait waits waiting "
    "prepare prepares preparing practice practices practicing"
)
KINDS_OF_PERSON = _words_in(
    "man men woman women boy boys girl girls child children kid kids baby babies toddler toddlers lady ladies guy "
    "guys gentleman mother father mom dad son daughter teenager teenagers couple"
)
ANY_PERSON = _words_in("person persons people human humans someone somebody anyone anybody individual group")

# scikit-learn's list includes negations and numbers, but these can determine the label.
FUNCTION_WORDS = (ENGLISH_STOP_WORDS | {"does", "did", "being", "having", "s"}) - NEGATIONS - NUMBERS

# The "s" of a possessive is a separate word, so that "man's" matches "man" in the premise.
_WORD = re.compile(r"[^\W_]+(?:'t)?")


@dataclass(frozen=True)
class Slice:
    """The change in accuracy on one slice.

    Attributes:
        family, name: the property that divides the pairs, and its value.
        where: the slice as a clause that follows "where".
        pairs: number of pairs.
        before, after: accuracy in the slice; change: their difference; interval: its 95 % bootstrap interval.
        rest_change, rest_after: the same figures of all other pairs.
        p_change, p_contrast, p_after: p-values of the hypotheses that accuracy on the slice did not change, changed as
            on the other pairs, and is after tuning the same as on the other pairs. Clustered by premise, and
            corrected together over all slices (Holm, 1979).
    """

    family: str
    name: str
    where: str
    pairs: int
    before: float
    after: float
    change: float
    interval: tuple[float, float]
    rest_change: float
    rest_after: float
    p_change: float
    p_contrast: float
    p_after: float

    @property
    def changed(self) -> bool:
        return self.p_change < LEVEL

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"interval": list(self.interval)}


def describe(pairs: pd.DataFrame, labels: Sequence[str] = LABELS) -> dict[tuple[str, str, str], np.ndarray]:
    """The members of every slice: {(family, name, where): (n,) booleans}.

    Args:
        pairs: premise, hypothesis, label (a name), and optionally hard, agreement, subset, genre, rule, and
            trained_on if the run was trained on some of them.
        labels: the label set of the pairs.
    """
    premise_words = [set(words(text)) for text in pairs["premise"]]
    hypothesis_words = [words(text) for text in pairs["hypothesis"]]
    content = [set(ws) - FUNCTION_WORDS for ws in hypothesis_words]
    new = np.array([len(c - p) for c, p in zip(content, premise_words, strict=True)])
    # A hypothesis without content words counts as fully shared.
    shared = 1 - new / np.maximum(1, [len(c) for c in content])
    length = np.array([len(ws) for ws in hypothesis_words])

    def has(test: Callable[[str], bool]) -> np.ndarray:
        return np.array([any(map(test, ws)) for ws in hypothesis_words])

    # (family, name, where): members
    label_slices = {
        ("Gold label", label, f"the gold label is {label}"): (pairs["label"] == label).to_numpy()
        for label in labels
        if label in set(pairs["label"])
    }
    little, much = shared < 1 / 3, shared >= 2 / 3
    overlap = "of the hypothesis's content words are in the premise"
    kind = has(KINDS_OF_PERSON.__contains__)
    anybody = has(ANY_PERSON.__contains__) & ~kind
    text_slices = {
        ("Hypothesis length", "up to 5 words", "the hypothesis has up to 5 words"): length <= 5,
        ("Hypothesis length", "6 to 9 words", "the hypothesis has 6 to 9 words"): (length > 5) & (length < 10),
        ("Hypothesis length", "10 words or more", "the hypothesis has 10 words or more"): length >= 10,
        ("Word overlap", "under a third", f"under a third {overlap}"): little,
        ("Word overlap", "a third to two thirds", f"a third to two thirds {overlap}"): ~little & ~much,
        ("Word overlap", "two thirds or more", f"two thirds or more {overlap}"): much,
        ("New content words", "none", "the hypothesis brings no new content word"): new == 0,
        ("New content words", "one", "the hypothesis brings one new content word"): new == 1,
        ("New content words", "two or more", "the hypothesis brings two or more new content words"): new >= 2,
        ("Hypothesis has", "a negation", "the hypothesis has a negation"): has(_is_negation),
        ("Hypothesis has", "a number", "the hypothesis has a number"): has(_is_number),
        ("Hypothesis has", "a colour", "the hypothesis has a colour"): has(COLOURS.__contains__),
        ("Hypothesis has", "a mood or purpose", "the hypothesis has a word of mood or purpose"): has(
            MOODS_AND_PURPOSES.__contains__
        ),
        ("Person words", "a kind (man, child)", "the hypothesis names a kind of person (man, child)"): kind,
        ("Person words", "any (person, people)", "the hypothesis says person, people or the like"): anybody,
        ("Person words", "none", "the hypothesis has no word for a person"): ~kind & ~anybody,
    }
    return label_slices | text_slices | source_slices(pairs, labels)


def _is_negation(word: str) -> bool:
    return word in NEGATIONS or word.endswith("n't")


def _is_number(word: str) -> bool:
    return word in NUMBERS or word.isdigit()


def source_slices(pairs: pd.DataFrame, labels: Sequence[str] = LABELS) -> dict[tuple[str, str, str], np.ndarray]:
    """The slices of `describe` that come from columns of the source."""
    members = {}
    if "trained_on" in pairs:
        members[("Training data", "unseen", "the pair is not in the training data")] = ~pairs["trained_on"].to_numpy()
    if "hard" in pairs:
        hard = pairs["hard"].eq(True).to_numpy()
        members[("Difficulty", "hard", "the pair belongs to the hard subset")] = hard
    for column, family, where in (
        ("agreement", "Annotators agreeing", "the gold label is that of {} of the annotators"),
        ("subset", "Subset", "the subset is {}"),
        ("genre", "Genre", "the genre is {}"),
        ("rule", "Rule", "the rule is {}"),
    ):
        for value in sorted(set(pairs[column].dropna())) if column in pairs else []:
            members[(family, str(value), where.format(value))] = (pairs[column] == value).to_numpy()
    # HANS needs subset and label: a constant answer is right on half of every subset.
    if "subset" in pairs and len(labels) == 2:
        for value, label in product(sorted(set(pairs["subset"].dropna())), labels):
            where = f"the subset is {value} and the gold label is {label}"
            inside = (pairs["subset"] == value) & (pairs["label"] == label)
            members[("Subset and label", f"{value}, {label}", where)] = inside.to_numpy()
    return members


def words(text: str) -> list[str]:
    """Lower-case words; `isn't` stays one, with its negation."""
    return _WORD.findall(text.lower().replace("’", "'"))


def slice_changes(
    pairs: pd.DataFrame, right_before: np.ndarray, right_after: np.ndarray, labels: Sequence[str] = LABELS
) -> list[Slice]:
    """The change on every slice with at least `MIN_PAIRS` pairs and `MIN_PREMISES` premises.

    Contrasts with the other pairs use a t-test with errors clustered by premise (Cameron and Miller, 2015).

    Args:
        pairs, labels: as for `describe`.
        right_before, right_after: (n,) whether each prediction was right.
    """
    premises = pd.factorize(pairs["premise"])[0]
    change = right_after.astype(int) - right_before.astype(int)
    found, p_values = [], []
    for (family, name, where), inside in describe(pairs, labels).items():
        groups = pd.factorize(premises[inside])[0]
        # A slice of all pairs adds nothing.
        if inside.all() or inside.sum() < MIN_PAIRS or groups.max() + 1 < MIN_PREMISES:
            continue
        found.append(
            {
                "family": family,
                "name": name,
                "where": where,
                "pairs": int(inside.sum()),
                "before": float(right_before[inside].mean()),
                "after": float(right_after[inside].mean()),
                "change": float(change[inside].mean()),
                "interval": bootstrap_interval(change[inside], groups),
                "rest_change": float(change[~inside].mean()),
                "rest_after": float(right_after[~inside].mean()),
            }
        )
        p_values += [
            change_p_value(change[inside], groups),
            contrast_p_value(change, inside, premises),
            contrast_p_value(right_after.astype(int), inside, premises),
        ]
    corrected = holm(np.array(p_values)).reshape(-1, 3).tolist()
    return [
        Slice(**fields, p_change=p_change, p_contrast=p_contrast, p_after=p_after)
        for fields, (p_change, p_contrast, p_after) in zip(found, corrected, strict=True)
    ]


def contrast_p_value(values: np.ndarray, inside: np.ndarray, groups: np.ndarray) -> float:
    """Two-sided p-value of the hypothesis that `values` have the same mean inside and outside, clustered by group.

    Args:
        values: (n,) numbers.
        inside: (n,) booleans, some of each.
        groups: (n,) group numbers 0, 1, … without gaps.
    """
    mean_inside, mean_outside = values[inside].mean(), values[~inside].mean()
    # The influence of each value on the difference of the means; that of a group is the sum of its values'.
    influence = np.where(inside, (values - mean_inside) / inside.sum(), -(values - mean_outside) / (~inside).sum())
    by_group = np.bincount(groups, weights=influence)
    n = len(by_group)
    error = np.sqrt(n / (n - 1) * (by_group**2).sum())
    if error < 1e-12:  # the values are constant inside and constant outside
        return 1.0 if np.isclose(mean_inside, mean_outside) else 0.0
    return float(2 * student_t.sf(abs(mean_inside - mean_outside) / error, df=n - 1))


def holm(p_values: np.ndarray) -> np.ndarray:
    """Holm's step-down correction (1979): rejecting below 0.05 keeps the family-wise error rate below 0.05."""
    order = np.argsort(p_values)
    stepped = np.maximum.accumulate(p_values[order] * np.arange(len(p_values), 0, -1))
    corrected = np.empty_like(stepped)
    corrected[order] = np.minimum(stepped, 1)
    return corrected


def explain(slices: list[Slice]) -> list[str]:
    """Two to five sentences about where tuning helped, based on significant slices only."""
    if not slices:
        return [
            f"Nothing can be said about where tuning helped: no slice has {MIN_PAIRS} pairs on {MIN_PREMISES} "
            f"different premises."
        ]
    rose = [s for s in slices if s.changed and s.change > 0]
    fell = sorted((s for s in slices if s.changed and s.change < 0), key=lambda s: s.change)
    contrasts = sorted((s for s in slices if s.p_contrast < LEVEL), key=lambda s: s.change - s.rest_change)
    uneven = sorted((s for s in slices if s.p_after < LEVEL), key=lambda s: s.after - s.rest_after)
    if not (rose or fell or contrasts or uneven):
        return [
            f"Nothing can be said about where tuning helped: on none of the {len(slices)} slices is the change, or "
            f"the difference from the other pairs, statistically significant.",
            "More pairs could show smaller differences.",
        ]

    sentences = [
        f"Of {len(slices)} slices, accuracy rose significantly on {len(rose)} and fell significantly on {len(fell)}."
    ]
    if fell:
        worst = fell[0]
        sentences.append(
            f"It fell most where {worst.where}: from {worst.before:.1%} to {worst.after:.1%} of {worst.pairs:,} pairs."
        )
    if not contrasts:
        sentences.append("On none does the change differ significantly from that on the other pairs.")
    if contrasts and contrasts[-1].change > contrasts[-1].rest_change:
        sentences.append(_contrast_sentence("most", contrasts[-1]))
    if contrasts and contrasts[0].change < contrasts[0].rest_change and contrasts[0] not in fell[:1]:
        sentences.append(_contrast_sentence("least", contrasts[0]))
    if uneven and uneven[0].after < uneven[0].rest_after:
        weakest = uneven[0]
        sentences.append(
            f"The tuned model is weakest where {weakest.where}: {weakest.after:.1%} right, against "
            f"{weakest.rest_after:.1%} on all other pairs."
        )
    return sentences


def _contrast_sentence(rank: str, s: Slice) -> str:
    return (
        f"Tuning helped {rank} where {s.where}: {points(s.change)} points, against {points(s.rest_change)} on all "
        f"other pairs."
    )
