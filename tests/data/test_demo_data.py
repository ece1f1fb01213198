"""What the package ships for the demo: pairs and a base model."""

import hashlib
import math
import re
from collections import Counter

import pandas as pd
import pytest
import torch
from safetensors import safe_open
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from trl import ModelConfig

from nli_sft.data.demo import BASE_MODEL, PAIRS
from nli_sft.labels import LABELS
from nli_sft.models.loading import load_model, load_tokenizer, locate_model

SIZES = {"train": 24_000, "validation": 1_000, "test": 2_000}


@pytest.fixture(scope="module")
def pairs():
    return {split: pd.read_parquet(PAIRS / f"{split}.parquet").to_dict("records") for split in SIZES}


def test_labels_are_balanced_and_premises_repeat(pairs):
    for split in pairs.values():
        counts = Counter(pair["label"] for pair in split)
        assert max(counts.values()) - min(counts.values()) <= 2
        # Three hypotheses a premise, one of each label.
        premises = Counter(pair["premise"] for pair in split)
        assert len(split) / len(premises) > 2.9
    first = pairs["train"][:3]
    assert len({pair["premise"] for pair in first}) == 1
    assert {pair["label"] for pair in first} == set(LABELS)


def test_no_premise_is_in_two_splits(pairs):
    train, validation, test = ({pair["premise"] for pair in pairs[split]} for split in ("train", "validation", "test"))
    assert not train & validation
    assert not train & test
    assert not validation & test


def test_half_of_the_test_split_is_hard_and_no_other_pair(pairs):
    assert sum(pair["hard"] for pair in pairs["test"]) == 1_000
    assert not any(pair["hard"] for split in ("train", "validation") for pair in pairs[split])
    assert 40 <= sum(pair["hard"] for pair in pairs["test"][:100]) <= 60


def test_sentences_are_well_formed(pairs):
    for split in pairs.values():
        for pair in split:
            for sentence in (pair["premise"], pair["hypothesis"]):
                assert re.fullmatch(r"[A-Z][a-z', -]*[a-z]\.", sentence), sentence
                assert not re.search(r"\b(\w+) \1\b|,,| ,|  |\ba [aeiou]|\ban [^aeiou]", sentence), sentence
                assert not re.search(r"\bone \w+s are\b|\b(two|three|four|five|some) \w+ is\b", sentence), sentence
                assert not re.search(r"\b(is|are)\.$", sentence), sentence


def test_negation_is_balanced_across_labels(pairs):
    counts = Counter(pair["label"] for pair in pairs["train"] if " not " in pair["hypothesis"])
    assert min(counts.values()) > 0.25 * len(pairs["train"]) / 3
    assert max(counts.values()) < 1.15 * min(counts.values())


def test_hypotheses_alone_do_not_predict_the_label(pairs):
    train, test = pairs["train"], pairs["test"]
    words = CountVectorizer(ngram_range=(1, 2), token_pattern=r"\S+")
    model = LogisticRegression(max_iter=300)
    model.fit(words.fit_transform([p["hypothesis"] for p in train]), [p["label"] for p in train])
    assert model.score(words.transform([p["hypothesis"] for p in test]), [p["label"] for p in test]) < 0.45


@pytest.mark.parametrize("model", [LogisticRegression(max_iter=1_000), HistGradientBoostingClassifier(max_iter=60)])
def test_overlap_and_length_do_not_predict_the_label(pairs, model):
    def features(pair):
        premise, hypothesis = (pair[side].lower().rstrip(".").split() for side in ("premise", "hypothesis"))
        new = sum(word not in premise for word in hypothesis)
        return [1 - new / len(hypothesis), len(hypothesis), len(premise), new]

    train, test = pairs["train"], pairs["test"]
    model.fit([features(p) for p in train], [p["label"] for p in train])
    assert model.score([features(p) for p in test], [p["label"] for p in test]) < 0.50


def test_the_base_is_small_and_matches_its_card():
    weights, card = BASE_MODEL / "model.safetensors", (BASE_MODEL / "README.md").read_text()
    assert weights.stat().st_size <= 8 * 2**20
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == re.search(r"sha256.*\| ([0-9a-f]{64}) \|", card)[1]
    tensors = safe_open(weights, "pt")
    parameters = sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    assert f"| parameters | {parameters:,} |" in card


def test_demo_names_the_built_in_base_unless_written_as_a_path(tmp_path, monkeypatch):
    (tmp_path / "demo").mkdir()  # a folder of that name is ./demo
    monkeypatch.chdir(tmp_path)
    assert locate_model("demo") == str(BASE_MODEL)
    assert locate_model("scenes") == str(BASE_MODEL), "the name in runs of version 0.1"
    assert locate_model("./demo") == "./demo"
    assert load_tokenizer("demo").chat_template == load_tokenizer(str(BASE_MODEL)).chat_template
    base = load_model(ModelConfig(model_name_or_path="demo"), device=torch.device("cpu"))
    assert base.num_parameters() == 2_853_312


def test_tokens_outside_the_corpus_have_distinct_embeddings():
    model, tokenizer = load_model(ModelConfig(model_name_or_path="demo")), load_tokenizer("demo")
    rows = model.get_output_embeddings().weight
    for words in ("neutral", "contradiction"):
        pieces = rows[sorted(set(tokenizer(words).input_ids))]
        distances = torch.cdist(pieces, pieces) + torch.eye(len(pieces)) * 10
        assert distances.min() > 0.5
