import numpy as np
import pandas as pd
import pytest

from nli_sft.data.prompts import PROMPTS, Prompt, load_prompt
from nli_sft.evaluation.robustness import (
    against_annotators,
    by_subset,
    edits,
    label_orders,
    prompt_choices,
    sensitivity,
    set_figures,
)
from nli_sft.labels import LABELS, TWO_WAY_LABELS


def test_hans_is_split_by_heuristic_and_label():
    """A model that always predicts entailment is right on half of each heuristic."""
    pairs = pd.DataFrame(
        {"subset": ["overlap", "overlap", "subsequence"], "label": ["entailment", "non-entailment", "non-entailment"]}
    )
    assert by_subset(pairs, np.array([True, False, False]), TWO_WAY_LABELS) == {
        "overlap, entailment": {"n": 1, "accuracy": 1.0},
        "overlap, non-entailment": {"n": 1, "accuracy": 0.0},
        "subsequence, non-entailment": {"n": 1, "accuracy": 0.0},
    }
    three_way = pairs.assign(label=["entailment", "neutral", "neutral"])
    assert by_subset(three_way, np.array([True, False, True]), LABELS) == {
        "overlap": {"n": 2, "accuracy": 0.5},
        "subsequence": {"n": 1, "accuracy": 1.0},
    }


def test_the_distance_from_identical_annotators_is_zero():
    counts = np.array([[76, 20, 4], [100, 0, 0], [10, 30, 60]])
    result = against_annotators(counts, counts / 100)
    assert [result["js_divergence"], result["kl_divergence"]] == pytest.approx([0, 0], abs=1e-9)
    assert result["entropy_correlation"] == pytest.approx(1)
    assert result["annotators_per_pair"] == 100


def test_distances_by_hand():
    """Annotators (1/2, 1/2, 0), model (1, 0, 0), mean m = (3/4, 1/4, 0); JS = (KL(p, m) + KL(q, m)) / 2."""
    result = against_annotators(np.array([[50, 50, 0]]), np.array([[1.0, 0.0, 0.0]]))
    annotators = 0.5 * np.log(0.5 / 0.75) + 0.5 * np.log(0.5 / 0.25)
    assert result["js_divergence"] == pytest.approx((annotators + np.log(1 / 0.75)) / 2)
    assert result["js_distance"] == pytest.approx(np.sqrt(result["js_divergence"]))
    assert result["brier"] == pytest.approx(0.5**2 + 0.5**2)
    assert 10 < result["kl_divergence"] < 20, "a label of probability 0 costs much, but not infinity"
    assert result["entropy_correlation"] is None, "a single pair has no correlation"


def test_edits_count_pairs_where_original_and_edit_are_right():
    pairs = pd.DataFrame({"uid": ["a", "b", "a1", "a2", "b1"], "edit_of": [None, None, "a", "a", "b"]})
    right = np.array([True, False, True, False, True])
    assert edits(pairs, right) == {
        "n": 3,
        "original_right": pytest.approx(2 / 3),
        "edit_right": pytest.approx(2 / 3),
        "both_right": pytest.approx(1 / 3),
    }


def test_metrics_without_their_column_are_left_out():
    pairs = pd.DataFrame({"label": ["neutral", "neutral"], "label_counts": [None, np.array([0, 5, 0])]})
    figures = set_figures(pairs, np.array([True, True]), np.full((2, 3), 1 / 3))
    assert list(figures) == ["annotators"]
    assert figures["annotators"]["n"] == 1
    nothing = pd.DataFrame({"label": ["neutral"], "label_counts": [None], "edit_of": [None]})
    assert set_figures(nothing, np.array([True]), np.full((1, 3), 1 / 3)) == {}


def test_label_orders_permute_the_list_of_labels_only():
    prompt = PROMPTS["plain"]
    orders = label_orders(prompt)
    texts = {order: other.turns()[-1]["content"] for order, other in orders.items()}
    assert len(set(texts.values())) == 6
    assert texts["entailment, neutral, contradiction"] == prompt.turns()[-1]["content"]
    assert "Answer contradiction, entailment or neutral." in texts["contradiction, entailment, neutral"]
    own = label_orders(Prompt(name="own", user="{premise} {hypothesis}? {labels}", label_words=("yes", "maybe", "no")))
    assert (
        own["neutral, contradiction, entailment"].turns()[0]["content"] == "{premise} {hypothesis}? maybe, no or yes"
    )
    assert all(other.label_words == ("yes", "maybe", "no") for other in own.values())
    assert label_orders(PROMPTS["definitions"]) == {}


def test_two_labels_have_two_orders_and_five_stand_at_every_place_once():
    two = label_orders(load_prompt("plain", labels=("entails", "not enough")))
    assert [other.turns()[-1]["content"].splitlines()[0].partition("Answer ")[2] for other in two.values()] == [
        "entails or not enough.",
        "not enough or entails.",
    ]
    five = label_orders(load_prompt("plain", labels=tuple("12345")))
    assert list(five) == ["1, 2, 3, 4, 5", "2, 3, 4, 5, 1", "3, 4, 5, 1, 2", "4, 5, 1, 2, 3", "5, 1, 2, 3, 4"]


def test_other_prompts_ask_for_the_same_words_and_show_the_premise():
    own = Prompt(name="own", user="{premise} {hypothesis}", label_words=("true", "unclear", "false"))
    choices = prompt_choices(own)
    assert list(choices) == ["own", "plain", "definitions", "few_shot"]
    assert all(prompt.label_words == own.label_words for prompt in choices.values())
    assert list(prompt_choices(PROMPTS["plain"])) == ["plain", "definitions", "few_shot"]
    labels = ("supported", "not_supported")
    other = Prompt(name="own", user="{premise} {hypothesis}", labels=labels, label_words=("yes", "no"))
    assert [(name, prompt.labels, prompt.label_words) for name, prompt in prompt_choices(other).items()] == [
        ("own", labels, ("yes", "no")),
        ("plain", labels, ("yes", "no")),
    ]


def test_flips_are_pairs_with_different_predictions_across_variants():
    choices = [np.array([0, 1, 2, 2]), np.array([0, 1, 2, 1]), np.array([0, 0, 2, 2])]
    result = sensitivity({"a": 1.0, "b": 0.75, "c": 0.5}, choices)
    assert result["flips"] == 0.5
    assert result["mean"] == 0.75
    assert result["spread"] == 0.5
    assert result["n"] == 4
