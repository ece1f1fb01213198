import pytest

from nli_sft.labels import (
    LABELS,
    TWO_WAY_LABELS,
    UNLABELLED,
    check_labels,
    check_spellings,
    counts_as,
    parse_label,
    placeholder,
)


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
    words = ["yes", "maybe", "no"]
    assert [parse_label(word, spellings=words) for word in ("No", "yes", "MAYBE", "-")] == [2, 0, 1, UNLABELLED]
    with pytest.raises(ValueError, match="yes, maybe, no"):
        parse_label("entailment", spellings=words)
    accents = ["\u00e9tabli", "ouvert", "exclu"]
    assert parse_label("E\u0301TABLI", spellings=accents) == 0, "an accent in one code point or two"


def test_two_way():
    names = ("entailment", "not_entailment", "non-entailment", "not entailment", "NON ENTAILMENT", "Not_Entailment")
    assert [parse_label(name, TWO_WAY_LABELS) for name in names] == [0, 1, 1, 1, 1, 1]
    assert [TWO_WAY_LABELS[label] for label in counts_as(LABELS, TWO_WAY_LABELS)] == [
        "entailment",
        "non-entailment",
        "non-entailment",
    ]


FEVER = ("SUPPORTS", "REFUTES", "NOT ENOUGH INFO")


@pytest.mark.parametrize(
    ("labels", "value", "label"),
    [
        (("entailment", "not_entailment"), "non-entailment", 1),
        (("entails", "neutral"), "Entails", 0),
        (FEVER, "not_enough_info", 2),
        (FEVER, "Not-Enough Info ", 2),
        (("1", "2", "3", "4", "5"), 4, 3),
        (("1", "2", "3", "4", "5"), "4.0", 3),
        (("-1", "0", "1"), -1, 0),
        (("favor", "against", "none"), "None", 2),
        (("favor", "against", "none"), None, UNLABELLED),
        (FEVER, "-", UNLABELLED),
    ],
)
def test_names_of_another_label_set(labels, value, label):
    assert parse_label(value, labels) == label


@pytest.mark.parametrize("value", ["s", 0, "0", "entailment", "contradictory"])
def test_letters_and_ids_are_those_of_snli_only(value):
    with pytest.raises(ValueError, match=r"expected one of SUPPORTS, REFUTES, NOT ENOUGH INFO, or - .* or labels to"):
        parse_label(value, FEVER)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["supported"], "labels has 1 entry; give two or more"),
        (["a", ""], "labels: '' is empty"),
        (["a", " b"], "labels: ' b' is empty, or has a space around it"),
        (["a", "b\nc"], "control character"),
        (["premise", "b"], "labels: premise is a placeholder"),
        (["not_a", "a", "NON-A"], "labels: not_a and NON-A read the same"),
        (["contradiction", "neutral", "entailment"], "write SNLI's labels as entailment, neutral, contradiction"),
        (["Entailment", "Neutral", "Contradiction"], "write SNLI's labels as entailment, neutral, contradiction"),
    ],
)
def test_unusable_label_sets(labels, message):
    with pytest.raises(ValueError, match=message):
        check_labels(labels)


def test_placeholders():
    assert check_labels(list(FEVER)) == FEVER
    assert [placeholder(label) for label in (*FEVER, "non-entailment")] == [
        "SUPPORTS",
        "REFUTES",
        "NOT_ENOUGH_INFO",
        "non_entailment",
    ]


def test_one_spelling_per_label():
    check_spellings(["yes", "no"])
    check_spellings(["yes", "no"], ("supported", "not_supported"))
    with pytest.raises(ValueError, match="2 entries; give one each for SUPPORTS, REFUTES, NOT ENOUGH INFO, in that"):
        check_spellings(["yes", "no"], FEVER)


def test_other_label_sets_are_not_mapped():
    assert counts_as(FEVER, list(FEVER)) == [0, 1, 2]
    for labels in (FEVER, ("entailment", "not_entailment")):
        with pytest.raises(ValueError, match=f"the labels of the model are {', '.join(labels)}, those of the set ent"):
            counts_as(labels, TWO_WAY_LABELS)
