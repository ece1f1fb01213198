import pytest
import torch
from tiny import TOKENIZERS, few_pairs, tiny_llama

from nli_sft.configs import BatchConfig
from nli_sft.data.prompts import PROMPTS, PromptEncoder, load_prompt
from nli_sft.evaluation import scoring
from nli_sft.evaluation.scoring import (
    LabelScores,
    Scorer,
    distinguishing_prefixes,
    generate_labels,
    generate_unconstrained,
    named_label,
    score_prompts,
)

LABEL_WORDS = {
    "built in": None,
    "one token": ["a", "b", "c"],
    "shared first tokens": ["entailment", "entailed not", "entail or not"],
}


@pytest.mark.parametrize("words", LABEL_WORDS)
@pytest.mark.parametrize("family", ["chatml", "byte_level", "sentencepiece"])
@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("max_row_tokens", [None, 128])
def test_scoring_and_generation_agree_on_every_pair(words, family, padding_side, max_row_tokens):
    tokenizer = TOKENIZERS[family]()
    tokenizer.padding_side = padding_side
    encoder = PromptEncoder(load_prompt("plain", LABEL_WORDS[words]), tokenizer)
    if words == "shared first tokens":
        assert len({answer[0] for answer in encoder.answers}) < 3
    pairs = few_pairs(4)
    prompts = encoder.encode(pairs["premise"], pairs["hypothesis"])
    model = tiny_llama(len(tokenizer), seed=1)
    predicted = generate_labels(model, tokenizer, prompts, encoder.answers)
    scores = score_prompts(
        model, prompts, encoder.answers, tokenizer.pad_token_id, batch_size=7, max_row_tokens=max_row_tokens
    )
    assert scores.choice.tolist() == predicted
    assert len(set(predicted)) > 1, "a model that always predicts one label tests nothing"
    torch.testing.assert_close(scores.log_probs.exp().sum(dim=1), torch.ones(len(prompts)))
    # Tokens after the distinguishing prefix are forced, so they can be left out.
    prefixes = distinguishing_prefixes(encoder.answers)
    if words == "shared first tokens":
        assert max(map(len, prefixes)) > 1
        assert sum(map(len, prefixes)) < sum(map(len, encoder.answers))
    short = score_prompts(
        model, prompts, prefixes, tokenizer.pad_token_id, batch_size=7, max_row_tokens=max_row_tokens
    )
    assert short.choice.tolist() == predicted
    torch.testing.assert_close(short.log_probs, scores.log_probs, rtol=1e-4, atol=1e-5)
    # Without padding, one by one, the predictions are the same.
    assert [generate_labels(model, tokenizer, [prompt], encoder.answers)[0] for prompt in prompts[:6]] == predicted[:6]


@pytest.mark.parametrize("max_row_tokens", [None, 128])
def test_unconstrained_scores_match_plain_forward_passes(chatml, max_row_tokens):
    encoder = PromptEncoder(PROMPTS["plain"], chatml)
    pairs = few_pairs()
    prompts = encoder.encode(pairs["premise"], pairs["hypothesis"])
    model = tiny_llama(len(chatml))
    scores = score_prompts(model, prompts, encoder.answers, 0, batch_size=5, max_row_tokens=max_row_tokens)
    for prompt, sums in zip(prompts, scores.unconstrained, strict=True):
        for answer, score in zip(encoder.answers, sums, strict=True):
            with torch.no_grad():
                log_probs = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
            steps = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
            expected = sum(log_probs[step, token] for step, token in zip(steps, answer, strict=True))
            torch.testing.assert_close(score, expected, rtol=1e-4, atol=1e-4)
    assert (scores.label_mass < 1).all()


def test_constrained_probabilities_by_hand():
    """Answers x y, x z and w: the first step chooses between x and w, the second between y and z."""
    answers = [[1, 2], [1, 3], [4]]
    log = torch.tensor([[[0.3, 0.1], [0.3, 0.4], [0.2, 1.0]], [[0.2, 0.1], [0.2, 0.4], [0.3, 1.0]]]).log()
    log[:, 2, 1] = 0
    scores = LabelScores.from_token_log_probs(log, answers)
    expected = torch.tensor([[0.6 * 0.2, 0.6 * 0.8, 0.4], [0.4 * 0.2, 0.4 * 0.8, 0.6]])
    torch.testing.assert_close(scores.log_probs.exp(), expected)
    assert scores.choice.tolist() == [1, 2]
    torch.testing.assert_close(scores.label_mass[0], torch.tensor(0.03 + 0.12 + 0.2))


def test_greedy_may_leave_the_most_probable_answer():
    """Greedy takes x (0.55) and then has 0.3 at best, although w has 0.45: `choice` is what `generate` gives."""
    answers = [[1, 2], [1, 3], [4]]
    log = torch.tensor([[[0.55, 0.5], [0.55, 0.5], [0.45, 1.0]]]).log()
    log[:, 2, 1] = 0
    scores = LabelScores.from_token_log_probs(log, answers)
    assert scores.choice.tolist() == [0]
    assert scores.log_probs.argmax(dim=1).tolist() == [2]


def test_generation_is_constrained_whatever_the_model_prefers(chatml):
    encoder = PromptEncoder(PROMPTS["plain"], chatml)
    model = tiny_llama(len(chatml))
    shout = chatml("!", add_special_tokens=False)["input_ids"][-1]
    with torch.no_grad():
        model.lm_head.weight[shout] += 100 * model.lm_head.weight.mean(0).sign()
    prompts = encoder.encode(["A man sleeps."] * 2, ["He is awake.", "He rests."])
    assert set(generate_labels(model, chatml, prompts, encoder.answers)) <= {0, 1, 2}


def test_a_repetition_penalty_does_not_change_predictions(chatml):
    encoder = PromptEncoder(PROMPTS["plain"], chatml)
    pairs = few_pairs(2)
    prompts = encoder.encode(pairs["premise"], pairs["hypothesis"])
    model = tiny_llama(len(chatml), seed=1)
    predicted = generate_labels(model, chatml, prompts, encoder.answers)
    unconstrained = generate_unconstrained(model, chatml, prompts, 4)
    model.generation_config.repetition_penalty = 5.0
    assert generate_labels(model, chatml, prompts, encoder.answers) == predicted
    assert generate_unconstrained(model, chatml, prompts, 4) == unconstrained


def test_out_of_memory_halves_the_batch_and_loses_nothing(chatml, monkeypatch):
    encoder = PromptEncoder(PROMPTS["plain"], chatml)
    pairs = few_pairs(2)
    prompts = encoder.encode(pairs["premise"], pairs["hypothesis"])
    model = tiny_llama(len(chatml))
    options = {
        "model": model,
        "prompts": prompts,
        "answers": encoder.answers,
        "pad_token_id": 0,
        "max_row_tokens": 128,
    }
    expected = score_prompts(**options, batch_size=4)
    real, seen = scoring.score_packed, []

    def small_device(model, batch):
        if len(batch["answer_nodes"]) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        seen.append(len(batch["answer_nodes"]))
        return real(model, batch)

    monkeypatch.setattr(scoring, "score_packed", small_device)
    scores = score_prompts(**options, batch_size=24)
    torch.testing.assert_close(scores.unconstrained, expected.unconstrained)
    assert sum(seen) == len(prompts)
    assert max(seen) == 3  # 24, 12 and 6 did not fit


def test_other_errors_are_not_treated_as_out_of_memory(chatml, monkeypatch):
    def broken(*_):
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(scoring, "score_padded", broken)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        score_prompts(None, [[1], [2]], [[1], [2], [3]], 0, batch_size=2, max_row_tokens=None)


@pytest.mark.parametrize(
    ("text", "label"),
    [
        (" Entailment.", 0),
        ("The answer is neutral", 1),
        ("contradiction\nentailment", 2),
        ("entailment or neutral", None),
        ("non-entailment", None),
        ("entailments", None),
        ("0", None),
        ("", None),
    ],
)
def test_named_label(text, label):
    assert named_label(text, ("entailment", "neutral", "contradiction")) == label


@pytest.mark.parametrize(("wanted", "recorded"), [("auto", [128, 256]), ("false", [])])
def test_a_scorer_records_graphs_once_for_each_length_of_rows(chatml, monkeypatch, wanted, recorded):
    lengths = []
    monkeypatch.setattr(scoring, "scoring_graphs", lambda model, pairs, row_tokens: lengths.append(row_tokens))
    encoder = PromptEncoder(PROMPTS["plain"], chatml)
    scorer = Scorer(tiny_llama(len(chatml)), encoder, BatchConfig(cuda_graph=wanted), batch_size=4)
    pairs = few_pairs()
    prompts = encoder.encode(pairs["premise"], pairs["hypothesis"])
    for row_tokens in (128, 128, 256):
        monkeypatch.setattr(scoring.trie, "row_tokens", lambda *_, tokens=row_tokens: tokens)
        scorer(prompts)
    scorer(prompts[:4])  # one batch is not worth a graph
    assert lengths == recorded


def test_a_scorer_keeps_to_padded_batches(chatml, caplog):
    encoder = PromptEncoder(PROMPTS["plain"], chatml)
    model = tiny_llama(len(chatml))
    model.config.is_encoder_decoder = True  # as of a model that cannot run on tries
    scorer = Scorer(model, encoder, BatchConfig(), batch_size=4)
    prompts = encoder.encode(["A man sleeps."], ["A man rests."])
    for _ in range(2):
        scorer(prompts)
    assert [message.partition(":")[0] for message in caplog.messages] == ["Padded batches instead of tries"]
