"""Label sets: their names and order, and the labels in data. SNLI's three are the default."""

import math
import re
import unicodedata
from collections.abc import Sequence
from functools import cache

from . import UserError

# In the order of SNLI's ids. Whatever has one entry per label in this package is in the order of its label set.
LABELS = ("entailment", "neutral", "contradiction")

# Sets such as HANS do not distinguish neutral from contradiction. `counts_as` maps SNLI's labels to these.
TWO_WAY_LABELS = ("entailment", "non-entailment")

UNLABELLED = -1

# Names that prompts use for other things.
RESERVED = ("premise", "hypothesis", "labels")

# Zero-width characters that editors and web pages leave around words.
INVISIBLE = dict.fromkeys(map(ord, "\u200b\u200c\u200d\u2060\ufeff\u00ad"))

_SNLI_SPELLINGS = {
    **{name[0]: index for index, name in enumerate(LABELS)},
    **{str(index): index for index in range(len(LABELS))},
    "contradictory": 2,  # in XNLI's training files
}
_UNLABELLED_SPELLINGS = {"", "-", "-1", "none", "nan", "null", "<na>"}


class UnknownLabel(UserError):
    """A label in data that is none of the label set."""


def check_labels(labels: Sequence[str]) -> tuple[str, ...]:
    """The label set as a tuple.

    Raises:
        UserError: unless it has two or more names that data and prompts can tell apart.
    """
    if len(labels) < 2:
        raise UserError(f"labels has {len(labels)} entry; give two or more, such as [supported, not_supported]")
    for label in labels:
        if not label or label != label.strip() or not label.isprintable():
            raise UserError(f"labels: {label!r} is empty, or has a space around it or a control character; remove it")
        if placeholder(label) in RESERVED:
            raise UserError(f"labels: {label} is a placeholder of prompts; give the label another name")
    names = [_name(label) for label in labels]
    for what, read in (("data", names), ("prompts", [placeholder(label) for label in labels])):
        for index, name in enumerate(read):
            if (first := read.index(name)) < index:
                raise UserError(f"labels: {labels[first]} and {labels[index]} read the same in {what}; rename one")
    if set(names) == set(LABELS) and tuple(labels) != LABELS:
        raise UserError(f"labels: write SNLI's labels as {', '.join(LABELS)}, in that order, or leave labels out")
    return tuple(labels)


def placeholder(label: str) -> str:
    """The name of a label's placeholder in prompts: `not_enough_info` for `not enough info`."""
    return re.sub(r"\W+", "_", label)


def parse_label(value: object, labels: Sequence[str] = LABELS, spellings: Sequence[str] | None = None) -> int:
    """Parse a gold label to its index in `labels`, or to `UNLABELLED` if annotators did not agree.

    Args:
        value: a name in any case, with spaces, hyphens or underscores between words; a mark for "no label" (`-`, `-1`,
            empty, `None`); of SNLI's labels also an id or a first letter.
        labels: the label set.
        spellings: how the data spells the labels instead, in the order of `labels`.

    Raises:
        UserError: for any other value.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return UNLABELLED
    text = _normal(value)
    if spellings is not None:
        label = {_normal(spelling): index for index, spelling in enumerate(spellings)}.get(text)
    else:
        label = _spellings(tuple(labels)).get(_name(value))
    if label is not None:
        return label
    if text in _UNLABELLED_SPELLINGS:
        return UNLABELLED
    expected = map(str, spellings or (*labels, *(("0", "1", "2", "e", "n", "c") if tuple(labels) == LABELS else ())))
    fix = "; set label_spellings if the data spells them differently, or labels to train on other labels"
    shown = repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:60]}…"
    raise UnknownLabel(
        f"unknown label {shown}; expected one of {', '.join(expected)}, or - or -1 for no label"
        + ("" if spellings else fix)
    )


def check_spellings(spellings: Sequence[str] | None, labels: Sequence[str] = LABELS) -> None:
    """Raise `UserError` unless `label_spellings` has a different spelling for each label, or for each of two."""
    if spellings is None:
        return
    two_way = tuple(labels) == LABELS
    if len(spellings) != len(labels) and not (two_way and len(spellings) == len(TWO_WAY_LABELS)):
        raise UserError(
            f"label_spellings has {len(spellings)} entries; give one each for {', '.join(labels)}, in that order"
            + (f", or for {', '.join(TWO_WAY_LABELS)}" if two_way else "")
        )
    normal = [_normal(spelling) for spelling in spellings]
    repeated = next((one for one, text in zip(spellings, normal, strict=True) if normal.count(text) > 1), None)
    if repeated is not None:
        raise UserError(f"label_spellings has {str(repeated)!r} more than once; give each label its own")


def counts_as(labels: Sequence[str], gold_labels: Sequence[str]) -> list[int]:
    """For each label of a model, the index of the label of a set that it counts as.

    SNLI's neutral and contradiction both count as the non-entailment of `TWO_WAY_LABELS`.

    Raises:
        UserError: if the two label sets differ otherwise.
    """
    if list(labels) == list(gold_labels):
        return list(range(len(labels)))
    if tuple(labels) == LABELS and tuple(gold_labels) == TWO_WAY_LABELS:
        return [0, 1, 1]
    raise UserError(
        f"the labels of the model are {', '.join(labels)}, those of the set {', '.join(gold_labels)}; evaluate on a "
        f"set with the same labels, or set label_spellings to what the set writes for {', '.join(labels)}"
    )


def is_id(value: object) -> bool:
    """Whether `value` is a number that may stand for a label, as a number or as text."""
    return not isinstance(value, bool) and re.fullmatch(r"\d+", _normal(value)) is not None


def is_name(value: object, labels: Sequence[str] = LABELS) -> bool:
    """Whether `value` is the name of one of `labels`, or for SNLI's also of a set with two."""
    if tuple(labels) != LABELS:
        return _name(value) in _spellings(tuple(labels))
    return not is_id(value) and (_name(value) in _spellings(LABELS) or is_two_way_name(value))


def is_two_way_name(value: object) -> bool:
    """Whether `value` is a name that only two-way sets use."""
    return _name(value) == _name(TWO_WAY_LABELS[1])


@cache
def _spellings(labels: tuple[str, ...]) -> dict[str, int]:
    """{what data may write: index in `labels`}"""
    return {_name(label): index for index, label in enumerate(labels)} | (_SNLI_SPELLINGS if labels == LABELS else {})


def _normal(value: object) -> str:
    """Normalize a label: `1`, `1.0`, `"1"` and `"1.0"` are equal, and so are `"No"` and `"no "`."""
    text = str(value)
    if not text.isascii():  # combining accents, full-width and zero-width characters
        text = unicodedata.normalize("NFKC", text).translate(INVISIBLE)
    return re.sub(r"^(-?\d+)\.0+$", r"\1", text.strip().lower())


def _name(value: object) -> str:
    """Normalize a name further: `Not_supported`, `not supported` and `non-supported` are equal."""
    name = re.sub(r"(?<=[^\W_])[-_ ]+(?=[^\W_])", " ", _normal(value))
    return re.sub(r"^not ", "non ", name)
