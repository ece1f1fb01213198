import numpy as np
import pandas as pd
import pytest
import torch
from tiny import few_pairs

from nli_sft import evaluation
from nli_sft.decoding import LabelScores
from nli_sft.evaluation import exchange_premises, write_evaluation
from nli_sft.labels import LABELS
from nli_sft.prompts import PROMPTS, PromptEncoder


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


def test_an_answer_that_goes_on_without_a_space_still_names_its_label(chatml, monkeypatch):
    """A model that was not trained to end its turn says "neutralral…"; one that never says a label is invalid."""
    encoder = PromptEncoder(PROMPTS["plain"], chatml)
    pairs = few_pairs().select(range(3))
    tail, other = chatml("ral", add_special_tokens=False)["input_ids"], chatml("Who knows?")["input_ids"]
    said = [encoder.answers[0] + tail, encoder.answers[1] + tail, other]
    monkeypatch.setattr(evaluation, "generate_freely", lambda *_: said)
    free = evaluation.free_generation(None, encoder, pairs, batch_size=3)
    assert free["invalid_share"] == pytest.approx(1 / 3)
    assert free["accuracy"] == pytest.approx(2 / 3)
    assert free["accuracy_of_valid"] == 1


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
