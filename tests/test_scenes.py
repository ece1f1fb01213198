import hashlib
import json
import math
import re
import subprocess
import sys
from collections import Counter
from itertools import islice
from random import Random

import pytest
import torch
from safetensors import safe_open
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from trl import ModelConfig

from nli_sft.classifier import load_base
from nli_sft.labels import LABELS
from nli_sft.models import load_model, load_tokenizer, locate_model
from nli_sft.prompts import PROMPTS
from nli_sft.scenes import BASE_MODEL, SPLIT_SIZES, generate_pairs, world
from nli_sft.scenes import scene as scenes
from nli_sft.scenes.corpus import draw_documents, render_chat
from nli_sft.scenes.language import premise
from nli_sft.scenes.pairs import CLAIMS, RULES, Claim, Ledger, draw_hypothesis
from nli_sft.scenes.scene import Actor, Scene, draw_scene, held_out, judge

CONCEPTS = {topic: {concept.name: concept for concept in concepts} for topic, concepts in CLAIMS.items()}


@pytest.fixture(scope="module")
def pairs():
    return {"train": generate_pairs("train", 9_000), "dev": generate_pairs("dev"), "test": generate_pairs("test")}


def actor(**told):
    """An actor of whom this is told, by the names of concepts."""
    made = Actor()
    for topic, name in {"count": "one", **told}.items():
        assert made.tell(topic, CONCEPTS[topic][name]), (topic, name)
    return made


# What is made


def test_default_sizes_columns_and_unique_uids(pairs):
    assert SPLIT_SIZES == {"train": 24_000, "dev": 1_000, "test": 2_000}
    assert len(pairs["dev"]) == 1_000
    assert len(pairs["test"]) == 2_000
    rows = [pair for split in pairs.values() for pair in split]
    assert len({pair["uid"] for pair in rows}) == len(rows)
    for pair in rows:
        assert list(pair) == ["uid", "premise", "hypothesis", "label", "rule", "hard"]
        assert pair["label"] in LABELS
        assert pair["rule"] in RULES


def test_labels_are_those_of_the_package():
    assert scenes.LABELS == LABELS


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


def test_every_rule_makes_every_label(pairs):
    made = Counter((pair["rule"], pair["label"]) for pair in pairs["train"])
    for rule in set(RULES):
        for label in LABELS:
            assert made[rule, label] >= 20, (rule, label)


def test_same_pairs_in_another_process():
    code = (
        "import json, sys\nfrom nli_sft.scenes import generate_pairs\n"
        "json.dump([generate_pairs(split, 60, seed=5) for split in ('train', 'dev', 'test')], sys.stdout)"
    )
    here = [generate_pairs(split, 60, seed=5) for split in ("train", "dev", "test")]
    for hash_seed in ("1", "2"):
        there = subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": hash_seed}, capture_output=True, check=True, text=True
        )
        assert json.loads(there.stdout) == here
    assert generate_pairs("dev", 60, seed=6) != here[1]


def test_a_larger_draw_begins_with_the_smaller():
    assert generate_pairs("train", 300)[:100] == generate_pairs("train", 100)


def test_generating_does_not_import_torch():
    code = "import sys, nli_sft.scenes as s; s.generate_pairs('dev', 3); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# How splits differ


def test_no_premise_is_in_two_splits(pairs):
    train, dev, test = ({pair["premise"] for pair in pairs[split]} for split in ("train", "dev", "test"))
    assert not train & dev
    assert not train & test
    assert not dev & test


def test_half_of_test_is_hard_and_nothing_else_is(pairs):
    assert sum(pair["hard"] for pair in pairs["test"]) == 1_000
    assert not any(pair["hard"] for split in ("train", "dev") for pair in pairs[split])
    assert 40 <= sum(pair["hard"] for pair in pairs["test"][:100]) <= 60


def said(concepts, text):
    """The concept that a text speaks of, if any; the longest, for "reading" is in "reading a letter"."""
    forms = {form: concept for concept in concepts for wording in concept.words for form in wording}
    found = [form for form in forms if re.search(rf"\b{form}\b", text.lower())]
    return forms[max(found, key=len)].name if found else None


def combinations(text):
    """Held-out combinations in the words of a premise about one actor alone: (garment, place), (kind, action)."""
    kind = said([kind for kind in world.KINDS if kind.name in scenes.NARROW_KINDS], text)
    both = [(said(world.GARMENTS, text), said(world.PLACES, text)), (kind, said(world.ACTIONS, text))]
    return [pair for pair in both if None not in pair and held_out(*pair)]


def test_hard_premises_hold_what_training_never_shows(pairs):
    # Read off the words, not the facts; two actors are left out, for words do not say who of them does what.
    alone = {
        split: [pair for pair in rows if not re.search(r"\b(while|and|near|next to|beside|ing) ", pair["premise"])]
        for split, rows in pairs.items()
    }
    roles = "|".join(active.name for active, _ in world.ROLES)
    alone = {s: [p for p in rows if not re.search(rf"\b({roles})\b", p["premise"])] for s, rows in alone.items()}
    hard = [pair for pair in alone["test"] if pair["hard"]]
    assert len(hard) > 200
    assert all(combinations(pair["premise"]) for pair in hard)
    seen = [pair for split in ("train", "dev") for pair in alone[split]]
    assert len(seen) > 2_000
    assert not [pair for pair in seen if combinations(pair["premise"])]


def test_training_hypotheses_keep_clear_of_held_out_combinations():
    rng, ledger, checked = Random(0), Ledger(), 0
    while checked < 150:
        scene = draw_scene(rng)
        if scene.unseen or len(scene.actors) == 2 or "action" in scene.actors[0].told:
            continue
        found = draw_hypothesis(scene, "", "neutral", ledger, rng)
        kind = scene.actors[0].told["kind"].name
        if found and found[1] == "action" and kind in scenes.NARROW_KINDS:
            claimed = said(world.ACTIONS, found[0])
            assert not held_out(kind, claimed)
            checked += 1


def test_over_a_million_pairs_are_possible():
    # Some people doing something in one outfit at one place are a premise of their own, and by far not the only kind
    # of premise; all such premises of training are counted, for each allows three hypotheses at least.
    people = [k for k in world.PEOPLE if k.told]
    count = 0
    for action in (a for a in world.ACTIONS if a.told):
        for place in (p for p in world.PLACES if p.told):
            made = Actor()
            if not made.tell("place", place) or not made.tell("action", action):
                continue
            kinds = sum(
                not scenes.clash(k.features | k.needs, made.background)
                and not (k.name in scenes.NARROW_KINDS and held_out(k.name, action.name))
                for k in people
            )
            outfits = sum(not held_out(o.name.split()[-1], place.name) for o in world.OUTFITS.values() if not
                          scenes.clash(o.features | o.needs, made.background))  # fmt: skip
            count += kinds * outfits
    counts = sum(c.told for c in world.COUNTS)
    assert 3 * count * counts > 10**6
    # That is no idle number: scenes hardly ever come twice.
    rng = Random(1)
    assert len({draw_scene(rng).signature for _ in range(3_000)}) > 2_900


# Labels follow from facts


@pytest.mark.parametrize(
    ("told", "topic", "claim", "label"),
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
def test_labels_follow_from_facts(told, topic, claim, label):
    assert judge(CONCEPTS[topic][claim].features, actor(**told).facts) == label


def test_what_would_be_silly_is_not_told():
    sleeper = actor(kind="boy", action="sleeping")
    assert not sleeper.tell("mood", CONCEPTS["mood"]["bored"])
    assert not sleeper.tell("purpose", CONCEPTS["purpose"]["for money"])
    assert not actor(kind="horse").tell("place", CONCEPTS["place"]["in a bedroom"])
    assert not actor(kind="dog").tell("action", CONCEPTS["action"]["reading a book"])
    assert not actor(kind="boy", place="in the desert").tell("action", CONCEPTS["action"]["playing chess"])


def hypotheses(scene, rule, label, tries=4_000):
    """All sentences that a rule makes of a scene with this label, over many draws."""
    made, rng = set(), Random(0)
    for _ in range(tries):
        claim = Claim(scene, rule, label, rng)
        if claim.label == label:
            made.add(claim.sentence())
    return made


SOLO = Scene(
    [actor(kind="boy", mood="happy", looks="tall", clothes="red boots", place="in a park", action="running",
           time="at night", weather="in the rain", purpose="to win a prize")]
)  # fmt: skip
GROUP = Scene([actor(kind="girl", count="two", relation="sisters", action="playing chess", manner="quietly")])
TWO = Scene(
    [actor(kind="woman", clothes="blue coat", role="chasing"), actor(kind="dog", count="three", fur="brown")], "role"
)
TWO.actors[1].tell("role", dict(world.ROLES)[CONCEPTS["role"]["chasing"]])
BOTH = Scene(
    [actor(kind="man", action="running", clothes="white cap"), actor(kind="girl", count="two", action="sleeping")],
    "while",
)


@pytest.mark.parametrize(
    ("scene", "rule", "label", "sentence"),
    [
        (SOLO, "action", "entailment", "The boy is not sleeping."),
        (SOLO, "action", "contradiction", "The child is taking a nap."),
        (SOLO, "action", "neutral", "The boy is singing a song."),
        (SOLO, "kind", "entailment", "The person is a boy."),
        (SOLO, "kind", "contradiction", "A girl is running."),
        (SOLO, "kind", "neutral", "The boy is not a tourist."),
        (SOLO, "count", "contradiction", "More than four boys are running."),
        (SOLO, "mood", "entailment", "The boy is not sad."),
        (SOLO, "mood", "contradiction", "The boy is furious."),
        (SOLO, "mood", "neutral", "The child is excited."),
        (SOLO, "looks", "contradiction", "The boy is not tall."),
        (SOLO, "clothes", "neutral", "The boy is wearing a green scarf."),
        (SOLO, "clothes", "contradiction", "The boy is wearing blue sneakers."),
        (SOLO, "colour", "entailment", "The boy's boots are red."),
        (SOLO, "colour", "contradiction", "The boy's boots are orange."),
        (SOLO, "place", "entailment", "The boy is outdoors."),
        (SOLO, "place", "contradiction", "The boy is running in a library."),
        (SOLO, "time", "entailment", "It is dark."),
        (SOLO, "weather", "contradiction", "It is not raining."),
        (SOLO, "purpose", "neutral", "The boy is running for money."),
        (SOLO, "purpose", "contradiction", "The boy is running just for fun."),
        (GROUP, "count", "entailment", "At least two children are playing chess."),
        (GROUP, "relation", "contradiction", "The girls are not relatives."),
        (GROUP, "relation", "neutral", "The girls are friends."),
        (GROUP, "manner", "contradiction", "The girls are playing chess noisily."),
        (GROUP, "manner", "neutral", "The girls are playing chess in a hurry."),
        (TWO, "role", "entailment", "The dogs are being chased by the woman."),
        (TWO, "role", "contradiction", "The dogs are chasing the woman."),
        (TWO, "role", "contradiction", "The woman is feeding the dogs."),
        (TWO, "colour", "entailment", "The dogs are brown."),
        (TWO, "kind", "neutral", "The animals are puppies."),
        (BOTH, "binding", "contradiction", "The man is asleep."),
        (BOTH, "binding", "entailment", "The girls are not running."),
        (BOTH, "binding", "neutral", "The girls are wearing white caps."),
        (BOTH, "role", "contradiction", "The man is feeding the girls."),
    ],
)  # fmt: skip
def test_rules_say_what_they_should(scene, rule, label, sentence):
    made = {other: hypotheses(scene, rule, other) for other in LABELS}
    assert sentence in made[label]
    assert all(sentence not in made[other] for other in LABELS if other != label)


def test_premises_tell_everything():
    told = {premise(SOLO, Random(seed)) for seed in range(40)}
    assert "A happy tall boy in red boots is running in a park in the rain at night to win a prize." in told
    for text in told:
        assert all(word in text for word in ("tall", "red boots", "park", "running", "rain", "night", "prize"))
    assert "Two girls, who are sisters, are playing chess quietly." in {premise(GROUP, Random(s)) for s in range(20)}
    assert "A woman in a blue coat is chasing three brown dogs." in {premise(TWO, Random(s)) for s in range(20)}


def test_wordings_for_one_and_for_several_match():
    verbs = [(one.split()[0], several.split()[0]) for a in world.ACTIONS for one, several in a.words]
    assert len(verbs) > 80
    assert all(one == several for one, several in verbs)
    assert not [form for a in world.ACTIONS for one, form in a.words if " a " in form and " a " not in one]
    assert CONCEPTS["action"]["fixing a clock"].words[1] == ("repairing a clock", "repairing clocks")


def test_sentences_are_well_formed(pairs):
    for split in pairs.values():
        for pair in split:
            for sentence in (pair["premise"], pair["hypothesis"]):
                assert re.fullmatch(r"[A-Z][a-z', -]*[a-z]\.", sentence), sentence
                assert not re.search(r"\b(\w+) \1\b|,,| ,|  |\ba [aeiou]|\ban [^aeiou]", sentence), sentence
                assert not re.search(r"\bone \w+s are\b|\b(two|three|four|five|some) \w+ is\b", sentence), sentence
                assert not re.search(r"\b(is|are)\.$", sentence), sentence


# Nothing gives labels away


def test_negation_is_shared_by_all_labels(pairs):
    counts = Counter(pair["label"] for pair in pairs["train"] if " not " in pair["hypothesis"])
    assert min(counts.values()) > 0.25 * len(pairs["train"]) / 3
    assert max(counts.values()) < 1.15 * min(counts.values())


def test_the_hypothesis_alone_does_not_tell(pairs):
    train, test = pairs["train"], pairs["test"]
    words = CountVectorizer(ngram_range=(1, 2), token_pattern=r"\S+")
    model = LogisticRegression(max_iter=300)
    model.fit(words.fit_transform([p["hypothesis"] for p in train]), [p["label"] for p in train])
    assert model.score(words.transform([p["hypothesis"] for p in test]), [p["label"] for p in test]) < 0.45


@pytest.mark.parametrize("model", [LogisticRegression(max_iter=1_000), HistGradientBoostingClassifier(max_iter=60)])
def test_overlap_and_length_do_not_tell(pairs, model):
    def features(pair):
        told, claimed = (pair[side].lower().rstrip(".").split() for side in ("premise", "hypothesis"))
        new = sum(word not in told for word in claimed)
        return [1 - new / len(claimed), len(claimed), len(told), new]

    train, test = pairs["train"], pairs["test"]
    model.fit([features(p) for p in train], [p["label"] for p in train])
    assert model.score([features(p) for p in test], [p["label"] for p in test]) < 0.50


# What the base model reads


def test_the_corpus_is_without_label_words_and_without_held_out_premises(pairs):
    documents = list(islice(draw_documents("test"), 3_000))
    text = "\n".join(documents)
    assert not re.search("entail|neutral|contradict", text, re.IGNORECASE)
    # The search is not vain: relations are shown, in chat and in prose.
    assert text.count("<|im_start|>assistant\n") > 1_000
    for sign in ("Yes.", "No.", "Maybe.", "Unknown.", "Not so.", "It is not the case that", "Perhaps ", "So "):
        assert text.count(sign) > 30
    premises = {line.split(": ", 1)[1] for line in text.splitlines() if line.startswith(("Premise: ", "Text: "))}
    assert len(premises) > 500
    assert not premises & {pair["premise"] for split in ("dev", "test") for pair in pairs[split]}


def test_pretraining_makes_a_model_that_loads(tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    from safetensors.torch import load_file

    from nli_sft.scenes import pretrain

    pretrain.main(
        f"--output_dir {tmp_path} --documents 300 --steps 12 --batch_size 4 --window 64 --hidden_size 64 --layers 2 "
        "--vocab_size 600 --device cpu".split()
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
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


# The base model that comes with the package


def test_the_base_is_small_and_is_the_one_that_its_card_tells_of():
    weights, card = BASE_MODEL / "model.safetensors", (BASE_MODEL / "README.md").read_text()
    assert weights.stat().st_size <= 8 * 2**20
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == re.search(r"sha256.*\| ([0-9a-f]{64}) \|", card)[1]
    tensors = safe_open(weights, "pt")
    parameters = sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    assert f"| parameters | {parameters:,} |" in card


def test_the_base_knows_the_world_and_not_the_label_words():
    from nli_sft.scenes.pretrain import OWN_WORDS, answers_right

    model, tokenizer = load_model(ModelConfig(model_name_or_path="scenes")), load_tokenizer("scenes")
    assert answers_right(model, tokenizer, OWN_WORDS, n=90) > 0.95
    for prompt in ("plain", "definitions"):
        assert 0.29 < answers_right(model, tokenizer, PROMPTS[prompt], n=90) < 0.37, prompt


def test_scenes_is_a_model_name_wherever_one_stands(tmp_path, monkeypatch):
    (tmp_path / "scenes").mkdir()  # a folder of that name is ./scenes
    monkeypatch.chdir(tmp_path)
    assert locate_model("scenes") == str(BASE_MODEL)
    assert locate_model("./scenes") == "./scenes"
    assert load_tokenizer("scenes").chat_template == load_tokenizer(str(BASE_MODEL)).chat_template
    assert load_base(ModelConfig(model_name_or_path="scenes"), torch.device("cpu")).num_parameters() == 2_853_312


def test_tokens_that_the_corpus_never_holds_are_told_apart():
    model, tokenizer = load_model(ModelConfig(model_name_or_path="scenes")), load_tokenizer("scenes")
    rows = model.get_output_embeddings().weight
    for words in ("neutral", "contradiction"):
        pieces = rows[sorted(set(tokenizer(words).input_ids))]
        distances = torch.cdist(pieces, pieces) + torch.eye(len(pieces)) * 10
        assert distances.min() > 0.5
