import numpy as np
import pandas as pd
import pytest
import torch
from tiny import few_pairs

from nli_sft.decoding import LabelScores
from nli_sft.evaluation import exchange_premises, write_evaluation
from nli_sft.labels import LABELS


def scores(choice):
    """Three-way scores of a model that gives its choice a probability of 0.8, and the label words a mass of 0.5."""
    probabilities = torch.full((len(choice), 3), 0.1)
    probabilities[torch.arange(len(choice)), torch.tensor(choice)] = 0.8
    return LabelScores(torch.tensor(choice), probabilities.log(), (probabilities / 2).log())


def test_every_premise_is_exchanged_and_nothing_else_changes():
    pairs = few_pairs()
    exchanged = exchange_premises(pairs)
    assert all(new != old for new, old in zip(exchanged["premise"], pairs["premise"], strict=True))
    assert sorted(exchanged["premise"]) == sorted(pairs["premise"])
    assert len(set(zip(pairs["premise"], exchanged["premise"], strict=True))) == len(set(pairs["premise"]))
    for column in ("uid", "hypothesis", "label"):
        assert list(exchanged[column]) == list(pairs[column])
    assert exchanged.features == pairs.features


def test_what_is_written_joins_pairs_and_predictions(tmp_path):
    pairs = few_pairs()
    said = [0, 1, 2] * 4
    write_evaluation(tmp_path, pairs, {"base": scores([1] * 12), "tuned": scores(said)}, {"pairs": 12})
    table = pd.read_parquet(tmp_path / "predictions.parquet")
    assert list(table["uid"]) == list(pairs["uid"])
    assert list(table["label"]) == [LABELS[label] for label in pairs["label"]]
    assert list(table["tuned_prediction"]) == [LABELS[label] for label in said]
    assert set(table["base_prediction"]) == {"neutral"}
    assert table["tuned_p_contradiction"][2] == pytest.approx(0.8)
    assert np.exp(table["base_joint_neutral"][0]) == pytest.approx(0.4)
