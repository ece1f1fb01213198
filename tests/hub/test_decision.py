from dataclasses import replace

import pytest
import torch
from jinja2 import TemplateError
from tiny import CHATML, SCENES, TOKENIZERS, chatml_tokenizer, sentencepiece_tokenizer, tiny_llama
from tiny_run import make_base, make_run
from transformers import pipeline

from nli_sft.classifier import NLIClassifier
from nli_sft.data.prompts import PROMPTS, Prompt, PromptEncoder
from nli_sft.hub.decision import CONFIG, TEMPLATE, label_tokens, write_decision_files
from nli_sft.labels import LABELS
from nli_sft.models.loading import load_encoder
from nli_sft.runs import keep_temperature

pytest.importorskip("transformers.decision", reason="this transformers has no decision pipeline")

PAIRS = [
    *((premise, hypothesis) for premise, hypothesis, _ in SCENES),
    ("  A {dog} {{ runs }}. ", '{% if x %}\\n"It\'s" {# late #}\n'),
    ("Ein Hund läuft 😀\n\nschnell.", "{hypothesis} {premise}"),
]
HARD = Prompt(
    name="hard",
    system='Say {labels}. "Quotes", {{ braces }}, \\ and \t😀.\n'.replace("{{ braces }}", "}} {% raw %} {#"),
    user="{premise}\n{hypothesis}\n\n",
    examples=(('A "man" {% sleeps %}.', "He's {{ awake }}\n", "contradiction"),),
)


def ask(decide, pairs=PAIRS, labels=LABELS):
    """The pipeline's probabilities, (pairs, labels)."""
    question = {"type": "choice", "criteria": dict.fromkeys(labels)}
    states = [{"premise": premise, "hypothesis": hypothesis} for premise, hypothesis in pairs]
    answers = [decide({"state": state, "questions": {"label": question}})["label"] for state in states]
    assert all(list(answer["probabilities"]) == list(labels) for answer in answers)
    return torch.tensor([list(answer["probabilities"].values()) for answer in answers])


def classify(classifier, pairs=PAIRS):
    predictions = classifier(*zip(*pairs, strict=True))
    return torch.tensor([list(prediction.probabilities.values()) for prediction in predictions])


def largest_difference(folder, encoder, temperature=1.0):
    """Between the pipeline and `NLIClassifier`, with a random model."""
    model = tiny_llama(len(encoder.tokenizer)).float()
    write_decision_files(folder, encoder, temperature)
    decide = pipeline("decision", model=model, tokenizer=encoder.tokenizer, decision_config=folder)
    asked = ask(decide, labels=encoder.prompt.labels)
    return (asked - classify(NLIClassifier(model, encoder, temperature=temperature))).abs().max()


@pytest.mark.parametrize("prompt", [PROMPTS["plain"], PROMPTS["few_shot"], HARD], ids=lambda prompt: prompt.name)
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_pipeline_returns_our_probabilities(kind, prompt, tmp_path):
    tokenizer = TOKENIZERS[kind]()
    encoder = PromptEncoder(prompt, tokenizer)
    assert label_tokens(encoder), f"{kind} could not be tested"
    assert largest_difference(tmp_path, encoder) < 1e-5


@pytest.mark.parametrize("labels", [("entailment", "not_entailment"), ("SUPPORTS", "REFUTES", "NOT ENOUGH INFO", "1")])
def test_the_pipeline_answers_in_other_labels(labels, tmp_path):
    encoder = PromptEncoder(PROMPTS["plain"].with_labels(labels), chatml_tokenizer())
    assert label_tokens(encoder)
    assert largest_difference(tmp_path, encoder) < 1e-5


def test_an_adapter_answers_at_the_temperature_of_its_run(tmp_path):
    run = make_run(tmp_path / "run", make_base(tmp_path / "base"), evaluated=False)
    keep_temperature(run, 2.5)
    write_decision_files(run, load_encoder(run), 2.5)
    decide = pipeline("decision", model=str(run), decision_config=str(run), dtype="float32")
    classifier = NLIClassifier.from_pretrained(run, device="cpu", dtype="float32")
    assert (ask(decide) - classify(classifier)).abs().max() < 1e-5
    classifier.temperature = 1.0
    assert (ask(decide) - classify(classifier)).abs().max() > 1e-2


def test_a_request_that_the_prompt_does_not_fit_is_refused(tmp_path):
    encoder = PromptEncoder(PROMPTS["plain"], chatml_tokenizer())
    write_decision_files(tmp_path, encoder)
    model = tiny_llama(len(encoder.tokenizer))
    decide = pipeline("decision", model=model, tokenizer=encoder.tokenizer, decision_config=tmp_path)
    state = {"premise": "A man sleeps.", "hypothesis": "A person is awake."}

    def asked(state, labels):
        return decide({"state": state, "questions": {"q": {"type": "choice", "criteria": dict.fromkeys(labels)}}})

    assert asked(state, LABELS)
    with pytest.raises(TemplateError, match="entailment"):
        asked(state, reversed(LABELS))
    for wrong in ("A man sleeps.", {"premise": "A man sleeps."}, state | {"hypothesis": None}):
        with pytest.raises(TemplateError, match="hypothesis"):
            asked(wrong, LABELS)


def test_a_hypothesis_only_prompt_needs_no_premise(tmp_path):
    encoder = PromptEncoder(PROMPTS["hypothesis_only"], chatml_tokenizer())
    assert largest_difference(tmp_path, encoder) < 1e-5
    assert "premise is not" not in (tmp_path / TEMPLATE).read_text()


def test_labels_with_a_common_first_token_have_no_decision_files(tmp_path):
    tokenizer = chatml_tokenizer()
    words = "entailment", "entailed not", "contradiction"
    write_decision_files(tmp_path, PromptEncoder(PROMPTS["plain"], tokenizer))
    assert {path.name for path in tmp_path.iterdir()} == {CONFIG, TEMPLATE}
    write_decision_files(tmp_path, PromptEncoder(replace(PROMPTS["plain"], label_words=words), tokenizer))
    assert list(tmp_path.iterdir()) == []


def test_a_first_token_that_is_another_alone_cannot_be_a_label():
    tokenizer = sentencepiece_tokenizer()
    tokenizer.chat_template = CHATML.replace("<|im_start|>", "<s>").replace("<|im_end|>", "</s>")
    encoder = PromptEncoder(PROMPTS["plain"], tokenizer)  # its answers follow a line break, without a space
    assert len({answer[0] for answer in encoder.answers}) == len(LABELS)
    assert label_tokens(encoder) is None
