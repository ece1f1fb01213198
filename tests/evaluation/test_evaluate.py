import re

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from tiny import chatml_tokenizer, few_pairs, tiny_llama
from tiny_run import make_base, make_run
from trl import ModelConfig

from nli_sft import UserError
from nli_sft.classifier import NLIClassifier
from nli_sft.configs import BatchConfig
from nli_sft.data.prompts import PROMPTS, PromptEncoder
from nli_sft.data.sources import pairs_dataset
from nli_sft.evaluation import evaluate as evaluation
from nli_sft.evaluation.evaluate import (
    Checks,
    EvalTask,
    evaluate_model,
    evaluate_run,
    predict,
    shuffle_premises,
    write_evaluation,
)
from nli_sft.evaluation.scoring import LabelScores
from nli_sft.evaluation.sets import EvaluationSet
from nli_sft.hub.export import write_merged
from nli_sft.hub.push import PushConfig, push
from nli_sft.labels import LABELS
from nli_sft.models.loading import load_encoder
from nli_sft.runs import write_run


def scores(choice):
    """Three-way scores of a model that gives its choice a probability of 0.8, with a label mass of 0.5."""
    probabilities = torch.full((len(choice), 3), 0.1)
    probabilities[torch.arange(len(choice)), torch.tensor(choice)] = 0.8
    return LabelScores(torch.tensor(choice), probabilities.log(), (probabilities / 2).log())


def test_shuffling_replaces_every_premise_and_nothing_else():
    pairs = few_pairs()
    shuffled = shuffle_premises(pairs)
    assert all(new != old for new, old in zip(shuffled["premise"], pairs["premise"], strict=True))
    assert sorted(shuffled["premise"]) == sorted(pairs["premise"])
    assert len(set(zip(pairs["premise"], shuffled["premise"], strict=True))) == len(set(pairs["premise"]))
    for column in ("uid", "hypothesis", "label"):
        assert list(shuffled[column]) == list(pairs[column])
    assert shuffled.features == pairs.features


def test_an_answer_that_continues_without_a_space_counts_for_its_label(chatml, monkeypatch):
    """A model that was not trained to end its turn says "neutralral…"; one that never says a label is invalid."""
    encoder = PromptEncoder(PROMPTS["plain"], chatml)
    pairs = few_pairs().select(range(3))
    tail, other = chatml("ral", add_special_tokens=False)["input_ids"], chatml("Who knows?")["input_ids"]
    generated = [encoder.answers[0] + tail, encoder.answers[1] + tail, other]
    monkeypatch.setattr(evaluation, "generate_unconstrained", lambda *_: generated)
    result = evaluation.unconstrained_generation(tiny_llama(len(chatml)), encoder, pairs, batch_size=3)
    assert result["invalid_share"] == pytest.approx(1 / 3)
    assert result["accuracy"] == pytest.approx(2 / 3)
    assert result["accuracy_of_valid"] == 1


def test_the_predictions_file_has_pairs_and_predictions(tmp_path):
    pairs = few_pairs()
    predicted = [0, 1, 2] * 4
    write_evaluation(tmp_path, pairs, {"base": scores([1] * 12), "tuned": scores(predicted)}, {"pairs": 12})
    table = pd.read_parquet(tmp_path / "predictions.parquet")
    assert list(table["uid"]) == list(pairs["uid"])
    assert list(table["label"]) == [LABELS[label] for label in pairs["label"]]
    assert list(table["tuned_prediction"]) == [LABELS[label] for label in predicted]
    assert set(table["base_prediction"]) == {"neutral"}
    assert table["tuned_p_contradiction"][2] == pytest.approx(0.8)
    assert np.exp(table["base_unconstrained_neutral"][0]) == pytest.approx(0.4)


def test_sets_in_one_pass_are_scored_as_they_are_alone(chatml):
    model = tiny_llama(len(chatml))
    prompts = [PROMPTS["plain"], PROMPTS["few_shot"], PROMPTS["plain"]]
    sets = [few_pairs(2), few_pairs().select(range(5)), shuffle_premises(few_pairs())]
    tasks = [
        EvalTask("set", pairs, PromptEncoder(prompt, chatml)) for pairs, prompt in zip(sets, prompts, strict=True)
    ]
    options = {"batch_size": 7, "batch_args": BatchConfig(max_row_tokens=64)}  # few-shot prompts are longer
    together = predict(model, tasks, **options)
    for task, scores in zip(tasks, together, strict=True):
        (alone,) = predict(model, [task], **options)
        padded = predict(model, [task], batch_size=7, batch_args=BatchConfig(batching="padded"))[0]
        for name, values in vars(scores).items():
            assert len(values) == len(task.pairs)
            torch.testing.assert_close(values, getattr(alone, name), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(values, getattr(padded, name), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("labels", [("entailment", "not_entailment"), ("1", "2", "3", "4", "5")])
def test_a_run_with_other_labels_is_evaluated_in_them(tmp_path, labels):
    base, prompt = make_base(tmp_path / "base"), PROMPTS["plain"].with_labels(labels)
    run = make_run(tmp_path / "run", base, prompt=prompt, evaluated=False)
    pairs = few_pairs(2, labels)
    pairs = pairs.add_column("subset", ["overlap"] * len(pairs))
    options = {"batch_size": 16, "batch_args": BatchConfig(), "unconstrained_samples": 4}
    (results,) = evaluate_run(
        run,
        ModelConfig(model_name_or_path=str(base)),
        [EvaluationSet("few", "test", pairs, 0)],
        calibration_pairs=few_pairs(4, labels),
        checks=Checks(label_order_pairs=12, prompt_pairs=6),
        **options,
    )
    for model in ("base", "tuned"):
        scores, result = results[model]
        right = scores.choice.numpy() == np.array(pairs["label"])
        assert (result["labels"], result["label_mapping"]) == (list(labels), None)
        assert result["accuracy"] == pytest.approx(right.mean())
        assert np.array(result["confusion"]).trace() == right.sum()
        assert result["calibrated"]["fitted_on_pairs"] == 48
        assert len(result["label_orders"]["accuracy"]) == len(labels)
        assert list(result["prompts"]["accuracy"]) == ["plain"], "the others name SNLI's labels"
        assert result["unconstrained_generation"]["n"] == 4
    subsets = {"overlap": 2}.get(labels[0], len(results["tuned"][1]["by_subset"]))
    assert subsets == (2 if len(labels) == 2 else 1)
    with pytest.raises(UserError, match=f"labels of the model are {', '.join(labels)}, those of the set entailment, "):
        evaluate_run(run, ModelConfig(str(base)), [EvaluationSet("snli", "test", few_pairs(), 0)], **options)


def test_a_run_is_evaluated_with_baseline_calibration_and_checks(tmp_path):
    base = make_base(tmp_path / "base")
    run = make_run(tmp_path / "run", base, evaluated=False)
    make_run(run / "hypothesis_only", base, prompt=PROMPTS["hypothesis_only"], evaluated=False)
    hans = {"uid": ["x", "y"], "premise": ["A man.", "A cat."], "hypothesis": ["A person.", "A dog."]}
    hans |= {"label": ["entailment", "non-entailment"], "subset": ["overlap", "overlap"]}
    sets = [EvaluationSet("few", "test", few_pairs(2), 0), EvaluationSet("hans", "all", pairs_dataset(hans), 0)]
    first, second = evaluate_run(
        run,
        ModelConfig(model_name_or_path=str(base)),
        sets,
        batch_size=16,
        batch_args=BatchConfig(),
        unconstrained_samples=0,
        calibration_pairs=few_pairs(4),
        checks=Checks(label_order_pairs=12, prompt_pairs=6),
    )
    assert set(first) == {"base", "tuned", "shuffled", "hypothesis_only"}
    assert set(second) == {"base", "tuned", "hypothesis_only"}
    for by_model in (first, second):
        for model in ("base", "tuned", "hypothesis_only"):
            scores, result = by_model[model]
            assert result["calibrated"]["temperature"] == first[model][1]["calibrated"]["temperature"]
            assert result["calibrated"]["fitted_on_pairs"] == 48
    assert first["tuned"][1]["calibrated"]["temperature"] != first["base"][1]["calibrated"]["temperature"]
    assert set(second["tuned"][1]["by_subset"]) == {"overlap, entailment", "overlap, non-entailment"}
    for model in ("base", "tuned"):
        orders, prompts = first[model][1]["label_orders"], first[model][1]["prompts"]
        assert len(orders["accuracy"]) == 6
        assert orders["n"] == 12
        assert list(prompts["accuracy"]) == ["plain", "definitions", "few_shot"]
        assert prompts["n"] == 6
        assert orders["refused"] == prompts["refused"] == {}
    assert first["base"][1]["label_orders"]["flips"] > 0, "a random model depends on every word"
    assert "label_orders" not in second["tuned"][1]
    assert "label_orders" not in first["hypothesis_only"][1]


def test_a_prompt_that_the_chat_template_refuses_is_reported(chatml):
    encoder = PromptEncoder(PROMPTS["plain"], chatml)
    template = chatml.chat_template
    try:
        chatml.chat_template = template.replace(
            "{% for m in messages %}",
            "{% if messages|length > 2 %}{{ raise_exception('one question only') }}{% endif %}{% for m in messages %}",
        )
        variants, refused = evaluation._prompt_variants(encoder, few_pairs(), Checks(prompt_pairs=3))
    finally:
        chatml.chat_template = template
    assert [variant for _, variant in variants] == ["plain", "definitions"]
    assert "one question only" in refused["prompts"]["few_shot"]


@pytest.mark.parametrize("batching", ["trie", "padded"])
def test_nan_weights_are_an_error(chatml, batching):
    model = tiny_llama(len(chatml))
    # A single row of the embedding: only pairs with that word have NaN scores.
    word = chatml.convert_tokens_to_ids(chatml.tokenize(" dogs"))[0]
    encoder = PromptEncoder(PROMPTS["plain"], chatml)
    pairs = few_pairs()
    affected = sum(word in prompt for prompt in encoder.encode(pairs["premise"], pairs["hypothesis"]))
    assert 0 < affected < len(pairs)
    model.model.embed_tokens.weight.data[word] = torch.nan
    tasks = [EvalTask("few test", pairs, encoder)]
    with pytest.raises(UserError) as error:
        evaluate_model(model, tasks, name="tuned", batch_size=8, batch_args=BatchConfig(batching=batching))
    message = re.fullmatch(
        r"tuned on few test: the scores of (\d+) of 12 pairs are NaN or infinite, and so are weights of the model, "
        r"such as model.embed_tokens.weight: take an earlier checkpoint, or train with a lower learning_rate",
        str(error.value),
    )
    # Pairs in one row of a trie share attention sums, and NaN times a weight of 0 is NaN.
    assert affected <= int(message[1]) if batching == "trie" else affected == int(message[1])


def test_overflow_in_fp16_has_an_error_of_its_own(chatml):
    tasks = [EvalTask("few test", few_pairs(), PromptEncoder(PROMPTS["plain"], chatml))]
    options = {"name": "base", "batch_size": 8, "batch_args": BatchConfig()}
    model = tiny_llama(len(chatml))
    model.model.norm.weight.data.fill_(6e4)  # fp16 ends at 65,504
    evaluate_model(model, tasks, **options)
    with pytest.raises(UserError, match="12 of 12 pairs are NaN or infinite, though the weights are not.*fp32"):
        evaluate_model(model.half(), tasks, **options)


def test_a_run_whose_prompt_has_changed_is_not_loaded(tmp_path):
    """Evaluation, NLIClassifier, push and export all load their encoder here."""
    run = tmp_path / "run"
    tokenizer = chatml_tokenizer()
    tokenizer.save_pretrained(run)
    rendered = PromptEncoder(PROMPTS["plain"], tokenizer).rendered
    write_run(
        run,
        recipe={"model_name_or_path": "base", "dataset_name": "x"},
        prompt=PROMPTS["plain"],
        record={"rendered": rendered},
    )
    (run / "adapter_config.json").write_text("{}")
    save_file({}, run / "adapter_model.safetensors")  # never loaded
    assert load_encoder(run).rendered == rendered
    tokenizer.chat_template = "Be brief.\n" + tokenizer.chat_template
    tokenizer.save_pretrained(run)
    changed = "the prompt as rendered differs from what was trained"
    with pytest.raises(UserError, match=changed):
        load_encoder(run)
    with pytest.raises(UserError, match=changed):
        evaluate_run(str(run), ModelConfig(), [], batch_size=1, batch_args=BatchConfig(), unconstrained_samples=0)
    with pytest.raises(UserError, match=changed):
        NLIClassifier.from_pretrained(run)
    with pytest.raises(UserError, match=changed):
        push(PushConfig(run=str(run), hub_model_id="me/run", without_results=True, base_model="me/base"))
    with pytest.raises(UserError, match=changed):
        write_merged(run, tmp_path / "merged", ModelConfig(), torch.device("cpu"))
