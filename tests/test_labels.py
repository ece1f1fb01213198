import pytest

from nli_sft.labels import TWO_WAY_LABELS, UNLABELLED, parse_label, to_two_way


@pytest.mark.parametrize(
    ("value", "label"),
    [(0, 0), (2, 2), ("1", 1), ("Entailment", 0), (" CONTRADICTION ", 2), ("n", 1), (1.0, 1), ("neutral", 1)]
    + [
        ("\u200bneutral", 1),
        ("neutral\xa0", 1),
        ("\uff4e\uff45\uff55\uff54\uff52\uff41\uff4c", 1),
        ("contradictory", 2),
    ],
)
def test_reads_ids_names_and_letters(value, label):
    assert parse_label(value) == label


@pytest.mark.parametrize("value", [-1, "-1", "-", "", " ", None, float("nan"), "NULL", "<NA>", "None"])
def test_signs_for_no_label(value):
    assert parse_label(value) == UNLABELLED


@pytest.mark.parametrize("value", [3, "maybe", "non-entailment", 0.5])
def test_unknown_label_says_what_was_expected(value):
    with pytest.raises(ValueError, match="unknown label .* expected one of entailment, neutral, contradiction"):
        parse_label(value)


def test_own_spellings():
    assert [parse_label(word, ["yes", "maybe", "no"]) for word in ("No", "yes", "MAYBE", "-")] == [2, 0, 1, UNLABELLED]
    with pytest.raises(ValueError, match="yes, maybe, no"):
        parse_label("entailment", ["yes", "maybe", "no"])
    assert parse_label("E\u0301TABLI", ["\u00e9tabli", "ouvert", "exclu"]) == 0, "an accent in one code point or two"


def test_two_way():
    assert [parse_label(name, two_way=True) for name in ("entailment", "not_entailment", "non-entailment")] == [
        0,
        1,
        1,
    ]
    assert {parse_label(name, two_way=True) for name in ("not entailment", "NON ENTAILMENT", "Not_Entailment")} == {1}
    assert [TWO_WAY_LABELS[to_two_way(label)] for label in range(3)] == [
        "entailment",
        "non-entailment",
        "non-entailment",
    ]
