import numpy as np
import pandas as pd
import pytest

from nli_sft.evaluation.comparison import change_p_value, mcnemar
from nli_sft.evaluation.slices import (
    MIN_PAIRS,
    Slice,
    contrast_p_value,
    describe,
    explain,
    holm,
    slice_changes,
    words,
)
from nli_sft.labels import TWO_WAY_LABELS


def pair(premise, hypothesis, label="neutral", **columns):
    return {"premise": premise, "hypothesis": hypothesis, "label": label} | columns


def slices_of(premise, hypothesis, label="neutral", **columns):
    """(family, name) of every slice that a pair is in."""
    members = describe(pd.DataFrame([pair(premise, hypothesis, label, **columns)]))
    return {(family, name) for (family, name, _), inside in members.items() if inside[0]}


def test_words_keep_negations_and_split_possessives():
    found = words("The man's dog ISN’T here, can't 2 swim!")
    assert found == ["the", "man", "s", "dog", "isn't", "here", "can't", "2", "swim"]


@pytest.mark.parametrize(
    ("hypothesis", "expected"),
    [
        ("Nobody sleeps.", ("Hypothesis has", "a negation")),
        ("A dog isn't asleep.", ("Hypothesis has", "a negation")),
        ("Three dogs sleep.", ("Hypothesis has", "a number")),
        ("There are 3 dogs.", ("Hypothesis has", "a number")),
        ("A grey dog.", ("Hypothesis has", "a colour")),
        ("A sad dog.", ("Hypothesis has", "a mood or purpose")),
        ("It is waiting.", ("Hypothesis has", "a mood or purpose")),
        ("A woman sleeps.", ("Person words", "a kind (man, child)")),
        ("A person sleeps.", ("Person words", "any (person, people)")),
        ("A dog sleeps.", ("Person words", "none")),
        ("A dog is here now.", ("Hypothesis length", "up to 5 words")),
        ("A dog is right here now.", ("Hypothesis length", "6 to 9 words")),
        ("A dog is here now and there is one more.", ("Hypothesis length", "10 words or more")),
    ],
)
def test_words_of_the_hypothesis_make_slices(hypothesis, expected):
    assert expected in slices_of("Animals.", hypothesis)


def test_a_person_word_counts_once():
    found = slices_of("Animals.", "A person sees a man.")
    assert {name for family, name in found if family == "Person words"} == {"a kind (man, child)"}
    assert not {name for family, name in slices_of("Nobody.", "A dog knows.") if family == "Hypothesis has"}


@pytest.mark.parametrize(
    ("hypothesis", "overlap", "new"),
    [
        ("A man is sleeping.", "two thirds or more", "none"),
        ("The man's asleep, sleeping.", "two thirds or more", "one"),
        ("A man is running.", "a third to two thirds", "one"),
        ("A cat is running outdoors.", "under a third", "two or more"),
        ("No man is sleeping.", "two thirds or more", "one"),
        ("It is.", "two thirds or more", "none"),
    ],
)
def test_new_and_shared_content_words(hypothesis, overlap, new):
    found = slices_of("A man is sleeping on a bench.", hypothesis)
    assert ("Word overlap", overlap) in found
    assert ("New content words", new) in found


def test_columns_of_the_source_make_slices():
    found = slices_of("P.", "H.", hard=True, subset="colours", rule="R1", agreement="3 of 5")
    assert {("Difficulty", "hard"), ("Subset", "colours"), ("Rule", "R1"), ("Annotators agreeing", "3 of 5")} <= found
    assert not any(family == "Subset and label" for family, _ in found)
    assert not slices_of("P.", "H.", hard=None, subset=None) & {("Difficulty", "hard"), ("Subset", "None")}


def test_two_way_sets_are_sliced_by_subset_and_label():
    table = pd.DataFrame(
        [pair("P.", "H.", label, subset="order") for label in ("entailment", "non-entailment", "entailment")]
    )
    inside = {
        name: mask
        for (family, name, _), mask in describe(table, TWO_WAY_LABELS).items()
        if family == "Subset and label"
    }
    assert list(inside["order, entailment"]) == [True, False, True]
    assert list(inside["order, non-entailment"]) == [False, True, False]


def test_holm_steps_down():
    # Sorted: 0.01·4, 0.02·3, 0.03·2, 0.5·1, none smaller than the one before, none above 1.
    assert holm(np.array([0.03, 0.01, 0.5, 0.02])) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert holm(np.array([0.6, 0.9])) == pytest.approx([1, 1])
    assert len(holm(np.array([]))) == 0


def test_the_contrast_keeps_its_level_when_pairs_of_a_premise_are_correlated():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(100), 4)
    false_alarms = 0
    for _ in range(400):
        inside = np.repeat(rng.uniform(size=100) < 0.4, 4)  # one value per premise
        values = np.repeat(rng.integers(-1, 2, 100), 4)
        false_alarms += contrast_p_value(values, inside, groups) < 0.05
    assert 0.02 < false_alarms / 400 < 0.09


@pytest.mark.slow
def test_a_change_keeps_its_level_when_pairs_of_a_premise_are_correlated():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(100), 4)
    drawn = [np.repeat(rng.choice([-1, 0, 1], 100, p=[0.2, 0.6, 0.2]), 4) for _ in range(2_000)]
    by_pair = np.mean([mcnemar((change > 0).sum(), (change < 0).sum()) < 0.05 for change in drawn])
    assert by_pair > 0.15, "a test that treats these pairs as independent rejects too often"
    assert np.mean([change_p_value(change, groups) < 0.05 for change in drawn]) <= 0.06


def test_the_contrast_detects_a_difference():
    inside = np.arange(200) < 100
    assert contrast_p_value(np.where(inside, 1, 0), inside, np.arange(200)) == 0
    assert contrast_p_value(np.ones(200), inside, np.arange(200)) == 1


def many_pairs(n=600):
    """Every third hypothesis has a negation; each premise has three pairs."""
    rows = [
        pair(f"Scene {k // 3} of dogs.", "Nothing barks." if k % 3 == 0 else "Something barks loudly.")
        for k in range(n)
    ]
    for k, row in enumerate(rows):
        row["label"] = ("entailment", "neutral", "contradiction")[k % 2 + (k % 3 > 1)]
    return pd.DataFrame(rows)


def test_figures_of_a_slice():
    pairs = many_pairs()
    before = np.zeros(600, bool)
    after = (np.arange(600) % 3 == 0) & (np.arange(600) < 300)  # right on half of the negations, and on nothing else
    found = {s.name: s for s in slice_changes(pairs, before, after)}
    s = found["a negation"]
    assert (s.pairs, s.before, s.after, s.change) == (200, 0, 0.5, 0.5)
    assert (s.rest_change, s.rest_after) == (0, 0)
    assert s.interval[0] < 0.5 < s.interval[1]
    assert s.p_change < 1e-20
    assert s.p_contrast < 1e-20
    assert s.changed


def test_small_slices_and_slices_of_all_pairs_are_left_out():
    pairs = many_pairs(90)  # 30 negations, one per premise
    names = {s.name for s in slice_changes(pairs, np.zeros(90, bool), np.ones(90, bool))}
    assert "a negation" in names
    assert "up to 5 words" not in names  # all of them
    fewer = many_pairs(87)
    assert "a negation" not in {s.name for s in slice_changes(fewer, np.zeros(87, bool), np.ones(87, bool))}
    assert MIN_PAIRS == 30
    one_premise = many_pairs().assign(premise="One scene.")
    assert slice_changes(one_premise, np.zeros(600, bool), np.ones(600, bool)) == []


def test_chance_alone_gives_no_finding():
    rng = np.random.default_rng(0)
    pairs = many_pairs(900)
    found = 0
    for _ in range(40):
        before, after = rng.uniform(size=(2, 900)) < 0.5
        found += any(min(s.p_change, s.p_contrast, s.p_after) < 0.05 for s in slice_changes(pairs, before, after))
    assert found <= 6  # 5 % of 40 is 2


def made(where="it rains", change=0.3, rest_change=0.1, after=0.6, rest_after=0.7, **p_values):
    p_values = {"p_change": 0.5, "p_contrast": 0.5, "p_after": 0.5} | p_values
    return Slice(
        "F",
        "n",
        where,
        100,
        after - change,
        after,
        change,
        (0, 1),
        rest_change=rest_change,
        rest_after=rest_after,
        **p_values,
    )


def test_nothing_is_explained_without_significance():
    sentences = explain([made(), made(change=-0.3)])
    assert len(sentences) == 2
    assert "Nothing can be said" in sentences[0]
    assert "rains" not in " ".join(sentences)
    assert "no slice has 30 pairs" in explain([])[0]


def test_only_significant_slices_are_named():
    sentences = explain(
        [
            made("it rains", p_change=0.01, p_contrast=0.01),
            made("it snows", change=0.9, p_contrast=0.06),
            made("it hails", change=-0.2, p_change=0.001),
            made("it thaws", after=0.1, p_after=0.02),
        ]
    )
    text = " ".join(sentences)
    assert 2 <= len(sentences) <= 5
    assert "Of 4 slices, accuracy rose significantly on 1 and fell significantly on 1." in text
    assert "fell most where it hails: from 80.0% to 60.0% of 100 pairs" in text
    assert "helped most where it rains: +30.0 points, against +10.0 on all other pairs" in text
    assert "weakest where it thaws: 10.0% right, against 70.0% on all other pairs" in text
    assert "snows" not in text


def test_there_are_two_to_five_sentences():
    s = {"p_change": 0.01, "p_contrast": 0.01, "p_after": 0.01}
    many = [made("A", change=0.5, **s), made("B", change=-0.5, **s), made("C", change=-0.1, **s)]
    sentences = explain(many)
    assert len(sentences) == 4
    assert sum(" where B" in sentence for sentence in sentences[:3]) == 1  # mentioned once, as what fell most
    assert len(explain([made("A", change=-0.1, p_change=0.01), *many])) == 4
    worse = made("D", change=-0.7, rest_change=0.1, p_contrast=0.01)
    assert len(explain([*many, worse])) == 5
    assert len(explain([made("A", p_change=0.01)])) == 2
