"""The three labels of natural language inference: order, names, and parsing."""

import math
import re
import unicodedata
from collections.abc import Sequence

from . import UserError

# In the order of SNLI's ids. Whatever has one entry per label in this package is in this order.
LABELS = ("entailment", "neutral", "contradiction")

# Sets such as HANS do not distinguish neutral from contradiction. `to_two_way` maps three-way labels to these.
TWO_WAY_LABELS = ("entailment", "non-entailment")

UNLABELLED = -1

# Zero-width characters that editors and web pages leave around words.
INVISIBLE = dict.fromkeys(map(ord, "\u200b\u200c\u200d\u2060\ufeff\u00ad"))

_SPELLINGS = {
    **{name: index for index, name in enumerate(LABELS)},
    **{name[0]: index for index, name in enumerate(LABELS)},
    **{str(index): index for index in range(len(LABELS))},
    "contradictory": 2,  # in XNLI's training files
}
_TWO_WAY_SPELLINGS = {"entailment": 0, **{f"{no}{sign}entailment": 1 for no in ("non", "not") for sign in "-_ "}}
_UNLABELLED_SPELLINGS = {"", "-", "-1", "none", "nan", "null", "<na>"}


def parse_label(value: object, spellings: Sequence[str] | None = None, two_way: bool = False) -> int:
    """Parse a gold label to its SNLI id, or to `UNLABELLED` if annotators did not agree.

    Args:
        value: an id, a name in any case, a first letter, or a mark for "no label" (`-`, `-1`, empty, `None`).
        spellings: how the set spells its labels, in the order of `LABELS` (of `TWO_WAY_LABELS` for a two-way set).
        two_way: whether the labels are `TWO_WAY_LABELS`.

    Raises:
        UserError: for any other value.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return UNLABELLED
    text = _normal(value)
    if spellings is not None:
        known = {_normal(spelling): index for index, spelling in enumerate(spellings)}
    else:
        known = _TWO_WAY_SPELLINGS if two_way else _SPELLINGS
    if text in known:
        return known[text]
    if text in _UNLABELLED_SPELLINGS:
        return UNLABELLED
    expected = map(str, spellings or (TWO_WAY_LABELS if two_way else (*LABELS, "0", "1", "2", "e", "n", "c")))
    fix = "" if spellings else "; set label_spellings if the data spells labels differently"
    shown = repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:60]}…"
    raise UserError(f"unknown label {shown}; expected one of {', '.join(expected)}, or - or -1 for no label{fix}")


def check_spellings(spellings: Sequence[str] | None) -> None:
    """Raise `UserError` unless `label_spellings` has a different spelling for each of three or two labels."""
    if spellings is None:
        return
    if len(spellings) not in (len(LABELS), len(TWO_WAY_LABELS)):
        raise UserError(
            f"label_spellings has {len(spellings)} entries; give one each for {', '.join(LABELS)}, in that order, "
            f"or for {', '.join(TWO_WAY_LABELS)}"
        )
    normal = [_normal(spelling) for spelling in spellings]
    repeated = next((one for one, text in zip(spellings, normal, strict=True) if normal.count(text) > 1), None)
    if repeated is not None:
        raise UserError(f"label_spellings has {str(repeated)!r} more than once; give each label its own")


def is_id(value: object) -> bool:
    """Whether `value` is one of SNLI's ids 0, 1 and 2, as a number or as text."""
    return not isinstance(value, bool) and _normal(value) in ("0", "1", "2")


def is_name(value: object) -> bool:
    """Whether `value` is the name of a label, of a set with three or with two."""
    return not is_id(value) and (_normal(value) in _SPELLINGS or is_two_way_name(value))


def _normal(value: object) -> str:
    """Normalize a label: `1`, `1.0`, `"1"` and `"1.0"` are equal, and so are `"No"` and `"no "`."""
    text = str(value)
    if not text.isascii():  # combining accents, full-width and zero-width characters
        text = unicodedata.normalize("NFKC", text).translate(INVISIBLE)
    return re.sub(r"^(-?\d+)\.0+$", r"\1", text.strip().lower())


def is_two_way_name(value: object) -> bool:
    """Whether `value` is a name that only two-way sets use."""
    return _TWO_WAY_SPELLINGS.get(_normal(value)) == 1


def to_two_way(label: int) -> int:
    """Map a three-way label id to `TWO_WAY_LABELS`: neutral and contradiction both count as non-entailment."""
    return min(label, 1)
