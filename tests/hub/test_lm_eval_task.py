import json
import os
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from tiny import TOKENIZERS, few_pairs, tiny_llama
from trl import ModelConfig

from nli_sft.configs import BatchConfig, from_recipe
from nli_sft.data.prompts import PROMPTS, Prompt, PromptEncoder
from nli_sft.data.sources import load_pairs, pairs_dataset, subsample
from nli_sft.evaluation.evaluate import EvalTask, predict
from nli_sft.hub.lm_eval_task import model_args, write_task
from nli_sft.models.loading import load_encoder, load_tuned
from nli_sft.runs import read_run

needs_harness = pytest.mark.skipif(
    find_spec("lm_eval") is None,
    reason="needs lm-evaluation-harness: pip install -e '.[benchmark]'",
)

BRACES = Prompt(name="braces", user='{{"premise": "{premise}", "{% x %}": "{hypothesis}", \'y\': "{labels}"}}\n')


def harness_answers(folder, name, model, encoder):
    """The harness's log-probabilities of the answers and `acc`, pair by pair, and the mean `acc`."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    options = {"add_bos_token": False} if encoder.is_chat else {}
    harness = HFLM(pretrained=model, tokenizer=encoder.tokenizer, batch_size=16, **options)
    tasks = TaskManager(include_path=str(folder), include_defaults=False)
    results = simple_evaluate(model=harness, tasks=[name], task_manager=tasks, bootstrap_iters=0, log_samples=True)
    samples = sorted(results["samples"][name], key=lambda sample: sample["doc_id"])
    scores = np.array([[answer[0][0] for answer in sample["resps"]] for sample in samples])
    return scores, [sample["acc"] for sample in samples], results["results"][name]["acc,none"]


def assert_alike(folder, model, encoder, pairs):
    write_task(folder, "pairs", encoder, pairs)
    scores, accuracies, mean = harness_answers(folder, "pairs", model, encoder)
    (ours,) = predict(model, [EvalTask("pairs", pairs, encoder)], batch_size=16, batch_args=BatchConfig())
    unconstrained = ours.unconstrained.numpy()
    # The harness counts the line break before an answer as part of it: the same offset for all three.
    differences = scores - scores[:, :1], unconstrained - unconstrained[:, :1]
    np.testing.assert_allclose(*differences, atol=2e-3)
    assert scores.argmax(axis=1).tolist() == unconstrained.argmax(axis=1).tolist()
    right = unconstrained.argmax(axis=1) == np.array(pairs["label"])
    assert accuracies == right.astype(float).tolist()
    assert mean == pytest.approx(right.mean())
    return ours


@needs_harness
@pytest.mark.parametrize(
    ("tokenizer", "prompt"),
    [
        # The harness takes no tokenizer without a beginning or end of the text, as is our `wordpiece`.
        *((name, PROMPTS["plain"]) for name in ("chatml", "byte_level", "sentencepiece")),
        ("chatml", PROMPTS["few_shot"]),
        ("byte_level", BRACES),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_acc_agrees_with_unconstrained_scores_on_every_pair(tokenizer, prompt, tmp_path):
    tokenizer = TOKENIZERS[tokenizer]()
    pairs = few_pairs(17).select(range(200))
    ours = assert_alike(tmp_path, tiny_llama(len(tokenizer)), PromptEncoder(prompt, tokenizer), pairs)
    assert len(set(ours.unconstrained.argmax(dim=1).tolist())) > 1, "a single answer tests nothing"


@needs_harness
def test_both_labels_of_non_entailment_are_accepted(chatml, tmp_path):
    rows = few_pairs()
    labels = ["entailment" if label == 0 else "non-entailment" for label in rows["label"]]
    pairs = pairs_dataset({key: list(rows[key]) for key in ("uid", "premise", "hypothesis")} | {"label": labels})
    encoder, model = PromptEncoder(PROMPTS["plain"], chatml), tiny_llama(len(chatml))
    write_task(tmp_path, "two_way", encoder, pairs)
    scores, accuracies, _ = harness_answers(tmp_path, "two_way", model, encoder)
    assert accuracies == [float(bool(s.argmax()) == label) for s, label in zip(scores, pairs["label"], strict=True)]


def test_a_task_in_other_labels(chatml, tmp_path):
    labels = ("supported", "disputed", "refuted", "unknown")
    encoder = PromptEncoder(PROMPTS["plain"].with_labels(labels), chatml)
    pairs = few_pairs(1, labels)
    task = yaml.safe_load(write_task(tmp_path, "pairs", encoder, pairs).read_text())
    assert task["doc_to_choice"] == list(labels)
    lines = Path(task["dataset_kwargs"]["data_files"]["test"]).read_text().splitlines()
    assert [json.loads(line)["gold"] for line in lines] == pairs["label"][:]


def test_a_task_uses_the_prompt_object(chatml, tmp_path):
    encoder = PromptEncoder(PROMPTS["plain"], chatml)
    task = yaml.safe_load(write_task(tmp_path, "pairs", encoder, few_pairs()).read_text())
    assert task["metadata"]["prompt_fingerprint"] == PROMPTS["plain"].fingerprint
    assert task["doc_to_choice"] == ["entailment", "neutral", "contradiction"]
    assert Path(task["dataset_kwargs"]["data_files"]["test"]).read_text().count("\n") == 12
    assert model_args(encoder, "base", "adapter") == "pretrained=base,peft=adapter,add_bos_token=False"
    plain = PromptEncoder(PROMPTS["plain"], TOKENIZERS["sentencepiece"]())
    assert model_args(plain, "base") == "pretrained=base"


@pytest.mark.slow
@needs_harness
def test_your_own_run(tmp_path):
    """On 200 pairs of the test split of the run folder in NLI_SFT_RUN."""
    run = os.environ.get("NLI_SFT_RUN")
    if run is None:
        pytest.skip("NLI_SFT_RUN names no run folder")
    recipe, _, _ = read_run(run)
    pairs = subsample(load_pairs(recipe["dataset_name"], "test"), 200, seed=0)
    with torch.inference_mode():
        assert_alike(tmp_path, load_tuned(run, from_recipe(ModelConfig, recipe)).float(), load_encoder(run), pairs)
