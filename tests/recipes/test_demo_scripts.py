"""The scripts that generate the demo's pairs and its base model."""

import math
import re
from itertools import islice

import make_pairs
import pretrain
import pyarrow.parquet as pq
import pytest
from corpus import draw_documents, render_chat
from pairs import CLAIMS, SPLIT_SIZES, generate_pairs
from pretrain import CORPUS_PROMPT, answer_accuracy
from safetensors.torch import load_file
from scene import Actor, infer_label
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig

from nli_sft.data.demo import PAIRS
from nli_sft.data.prompts import PROMPTS
from nli_sft.data.sources import load_pairs
from nli_sft.models.loading import load_model, load_tokenizer

CONCEPTS = {topic: {concept.name: concept for concept in concepts} for topic, concepts in CLAIMS.items()}


def frozen(split):
    """The rows of the Parquet file in the package."""
    return pq.read_table(PAIRS / make_pairs.FILES[split]).to_pylist()


@pytest.mark.parametrize("split", SPLIT_SIZES)
def test_the_generator_makes_the_first_frozen_rows(split):
    assert generate_pairs(split, 300) == frozen(split)[:300]


@pytest.mark.slow
@pytest.mark.parametrize("split", SPLIT_SIZES)
def test_the_generator_makes_all_frozen_rows(split):
    assert generate_pairs(split) == frozen(split)


def test_another_seed_gives_other_premises(tmp_path, monkeypatch):
    sizes = ("--train", "30", "--dev", "6", "--test", "6")
    monkeypatch.setattr("sys.argv", ["make_pairs.py", "--output_dir", str(tmp_path), "--seed", "1", *sizes])
    make_pairs.main()
    train = load_pairs(str(tmp_path), "train")
    assert len(train) == 30
    assert not set(train["premise"]) & {pair["premise"] for pair in frozen("train")}
    assert len(load_pairs(str(tmp_path), "validation")) == 6


def actor(**attributes):
    """An actor with these attributes, given as names of concepts."""
    made = Actor()
    for topic, name in {"count": "one", **attributes}.items():
        assert made.add(topic, CONCEPTS[topic][name]), (topic, name)
    return made


@pytest.mark.parametrize(
    ("attributes", "topic", "claim", "label"),
    [
        ({"kind": "boy"}, "kind", "child", "entailment"),
        ({"kind": "boy"}, "kind", "person", "entailment"),
        ({"kind": "boy"}, "kind", "girl", "contradiction"),
        ({"kind": "boy"}, "kind", "woman", "contradiction"),
        ({"kind": "child"}, "kind", "boy", "neutral"),
        ({"kind": "farmer"}, "kind", "man", "neutral"),
        ({"kind": "farmer"}, "kind", "boy", "contradiction"),
        ({"kind": "farmer"}, "kind", "soldier", None),
        ({"kind": "puppy"}, "kind", "dog", "entailment"),
        ({"kind": "dog"}, "kind", "puppy", "neutral"),
        ({"kind": "boy", "action": "running"}, "action", "moving", "entailment"),
        ({"kind": "boy", "action": "running"}, "action", "awake", "entailment"),
        ({"kind": "boy", "action": "running"}, "action", "sleeping", "contradiction"),
        ({"kind": "boy", "action": "running"}, "action", "walking", "contradiction"),
        ({"kind": "man", "action": "playing a guitar"}, "action", "making music", "entailment"),
        ({"kind": "man", "action": "playing a guitar"}, "action", "playing a violin", "contradiction"),
        ({"kind": "man", "action": "playing a guitar"}, "action", "sitting", "neutral"),
        ({"kind": "man", "action": "playing a guitar"}, "action", "singing a song", "neutral"),
        ({"kind": "man", "action": "playing a guitar"}, "action", "moving", None),
        ({"kind": "man", "action": "playing an instrument"}, "action", "playing a guitar", "neutral"),
        ({"kind": "man", "action": "lying on a blanket"}, "action", "awake", "neutral"),
        ({"kind": "girl", "action": "eating fruit"}, "action", "eating an apple", "neutral"),
        ({"kind": "girl", "action": "eating an apple"}, "action", "eating", "entailment"),
        ({"kind": "girl", "action": "eating an apple"}, "action", "eating cake", "contradiction"),
        ({"kind": "boy", "place": "in a park"}, "place", "outdoors", "entailment"),
        ({"kind": "boy", "place": "in a park"}, "place", "in a kitchen", "contradiction"),
        ({"kind": "boy", "place": "in a park"}, "place", "near trees", None),
        ({"kind": "boy", "place": "on a street"}, "place", "near trees", "neutral"),
        ({"kind": "boy", "action": "flying a kite"}, "place", "outdoors", "entailment"),
        ({"kind": "boy", "action": "flying a kite"}, "place", "in a kitchen", "contradiction"),
        ({"kind": "boy", "action": "playing chess"}, "place", "indoors", "neutral"),
        ({"kind": "boy", "weather": "in the rain"}, "place", "outdoors", "entailment"),
        ({"kind": "boy", "mood": "angry"}, "mood", "in a bad mood", "entailment"),
        ({"kind": "boy", "mood": "angry"}, "mood", "calm", "contradiction"),
        ({"kind": "boy", "mood": "angry"}, "mood", "sad", "neutral"),
        ({"kind": "boy"}, "mood", "happy", "neutral"),
        ({"kind": "boy", "clothes": "red hat"}, "clothes", "hat", "entailment"),
        ({"kind": "boy", "clothes": "hat"}, "clothes", "red hat", "neutral"),
        ({"kind": "boy", "clothes": "red hat"}, "clothes", "blue hat", "contradiction"),
        ({"kind": "boy", "clothes": "red hat"}, "clothes", "red helmet", "contradiction"),
        ({"kind": "boy", "clothes": "red hat"}, "clothes", "blue coat", "neutral"),
        ({"kind": "boy", "clothes": "red scarf"}, "clothes", "warm clothes", "entailment"),
        ({"kind": "boy", "count": "three"}, "count", "more than one", "entailment"),
        ({"kind": "boy", "count": "three"}, "count", "at least four", "contradiction"),
        ({"kind": "boy", "count": "three"}, "count", "two", "contradiction"),
        ({"kind": "boy", "count": "some"}, "count", "three", "neutral"),
        ({"kind": "boy", "count": "some"}, "count", "one", "contradiction"),
        ({"kind": "person", "count": "two", "relation": "brothers"}, "kind", "man", "neutral"),
        ({"kind": "person", "count": "two", "relation": "brothers"}, "kind", "woman", "contradiction"),
        ({"kind": "boy", "count": "two", "relation": "brothers"}, "relation", "relatives", "entailment"),
        ({"kind": "boy", "count": "two", "relation": "friends"}, "relation", "strangers", "contradiction"),
        ({"kind": "boy", "count": "two", "relation": "friends"}, "relation", "cousins", "neutral"),
        ({"kind": "boy", "action": "running", "purpose": "for money"}, "purpose", "just for fun", "contradiction"),
        ({"kind": "boy", "action": "running", "purpose": "for money"}, "purpose", "to win a prize", "neutral"),
        ({"kind": "boy", "time": "at night"}, "time", "dark", "entailment"),
        ({"kind": "boy", "time": "in the evening"}, "time", "dark", None),
        ({"kind": "boy", "time": "at night"}, "time", "morning", "contradiction"),
        ({"kind": "boy", "weather": "in a strong wind"}, "weather", "raining", "neutral"),
    ],
)  # fmt: skip
def test_labels_follow_from_facts(attributes, topic, claim, label):
    assert infer_label(CONCEPTS[topic][claim].features, actor(**attributes).facts) == label


def test_absurd_attributes_are_not_added():
    sleeper = actor(kind="boy", action="sleeping")
    assert not sleeper.add("mood", CONCEPTS["mood"]["bored"])
    assert not sleeper.add("purpose", CONCEPTS["purpose"]["for money"])
    assert not actor(kind="horse").add("place", CONCEPTS["place"]["in a bedroom"])
    assert not actor(kind="dog").add("action", CONCEPTS["action"]["reading a book"])
    assert not actor(kind="boy", place="in the desert").add("action", CONCEPTS["action"]["playing chess"])


def test_the_corpus_has_neither_label_words_nor_premises_of_other_splits():
    documents = list(islice(draw_documents("test"), 3_000))
    text = "\n".join(documents)
    assert not re.search("entail|neutral|contradict", text, re.IGNORECASE)
    # It expresses all labels, in conversations and in prose.
    assert text.count("<|im_start|>assistant\n") > 1_000
    for phrase in ("Yes.", "No.", "Maybe.", "Unknown.", "Not so.", "It is not the case that", "Perhaps ", "So "):
        assert text.count(phrase) > 30
    premises = {line.split(": ", 1)[1] for line in text.splitlines() if line.startswith(("Premise: ", "Text: "))}
    assert len(premises) > 500
    assert not premises & {pair["premise"] for split in ("dev", "test") for pair in frozen(split)}


def test_pretraining_writes_a_model_that_loads(tmp_path, capsys):
    pretrain.main(
        f"--output_dir {tmp_path} --documents 300 --steps 12 --batch_size 4 --window 64 --hidden_size 64 --layers 2 "
        "--vocab_size 600 --device cpu".split()
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {model.dtype}
    assert str(model.dtype) == "torch.bfloat16"
    assert len(tokenizer) == 600 == model.config.vocab_size
    messages = [{"role": "user", "content": "Premise: ä"}, {"role": "assistant", "content": "neutral"}]
    ids = tokenizer.apply_chat_template(messages, return_dict=False)
    assert tokenizer.decode(ids) == render_chat(messages)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    card = (tmp_path / "README.md").read_text()
    assert "--steps 12" in card
    loss = float(re.search(r"final loss.*\| (\S+) \|", card)[1])
    assert loss < math.log(600)  # it has learned something
    assert re.search(r"sha256.*\| [0-9a-f]{64} \|", card)


def test_the_base_solves_the_task_in_corpus_words_only():
    model, tokenizer = load_model(ModelConfig(model_name_or_path="demo")), load_tokenizer("demo")
    assert answer_accuracy(model, tokenizer, CORPUS_PROMPT, n=90) > 0.95
    for prompt in ("plain", "definitions"):
        assert 0.29 < answer_accuracy(model, tokenizer, PROMPTS[prompt], n=90) < 0.37, prompt
