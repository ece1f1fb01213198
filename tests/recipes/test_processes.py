"""Training and predictions are the same on any number of processes, with replicated and with sharded models."""

import json

import pandas as pd
import pytest
import torch
from launching import fsdp_command, launch, zero2_command, zero3_command
from trl import ModelConfig

from nli_sft.configs import TrainDataConfig, from_recipe
from nli_sft.data.prompts import PromptEncoder
from nli_sft.data.sources import load_train_and_validation
from nli_sft.evaluation.scoring import score_prompts
from nli_sft.models.loading import load_tokenizer, load_tuned
from nli_sft.runs import read_run

# 94 pairs in batches of 20. No dropout, whose random numbers differ between processes.
OPTIONS = ["--lora_dropout", "0", "--max_train_samples", "94", "--max_eval_samples", "23", "--learning_rate", "1e-3"]


def train(recipe, workspace, processes, batching):
    output = workspace / "outputs" / f"{batching}-on-{processes}"
    arguments = ["--config", recipe, "--output_dir", output, "--batching", batching, *OPTIONS]
    arguments += ["--per_device_train_batch_size", 20 // processes]
    result = launch("sft.py", *arguments, cwd=workspace, processes=processes)
    assert result.returncode == 0, result.output
    assert result.output.count("94 training pairs, 23 validation pairs") == 1, "only the main process prints"
    return output


def history(folder, name):
    return [entry[name] for entry in json.loads((folder / "run.json").read_text())["history"] if name in entry]


@pytest.mark.parametrize(
    ("batching", "processes"),
    [
        ("trie", 2),
        pytest.param("padded", 2, marks=pytest.mark.slow),
        pytest.param("trie", 4, marks=pytest.mark.slow),
    ],
)
def test_several_processes_train_and_predict_as_one_does(recipe, workspace, batching, processes):
    one, several = (train(recipe, workspace, number, batching) for number in (1, processes))
    assert len(history(one, "loss")) == 10
    for name in ("loss", "grad_norm", "mean_token_accuracy", "eval_loss", "eval_accuracy"):
        assert history(several, name) == pytest.approx(history(one, name), rel=1e-3), name
    assert history(several, "num_tokens") == history(one, "num_tokens")

    predictions, accuracies = [], []
    for number in (1, processes):
        arguments = ["--run", one, "--max_samples", "35", "--precision", "fp32"]
        result = launch("eval.py", *arguments, cwd=workspace, processes=number)
        assert result.returncode == 0, result.output
        (table,) = one.glob("eval/*/predictions.parquet")
        metrics = json.loads(table.with_name("metrics.json").read_text())
        predictions.append(pd.read_parquet(table))
        accuracies.append({model: metrics[model]["accuracy"] for model in ("base", "tuned", "shuffled")})
    assert accuracies[0] == accuracies[1]
    pd.testing.assert_frame_equal(*predictions, rtol=1e-4)  # each pair once, in order


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("spreading", [fsdp_command, zero2_command, zero3_command])
def test_a_sharded_model_trains_the_same_and_is_saved_in_full(recipe, workspace, method, spreading):
    if spreading is not fsdp_command:
        pytest.importorskip("deepspeed")
    options = [*OPTIONS, "--use_peft", str(method == "lora"), "--max_steps", "6", "--learning_rate", "1e-2"]
    options += ["--eval_strategy", "steps", "--save_strategy", "steps", "--eval_steps", "3", "--save_steps", "3"]
    whole, spread = (workspace / "outputs" / f"{method}-{name}" for name in ("whole", "spread"))
    for output, batch, command in ((whole, 20, None), (spread, 10, spreading)):
        arguments = ["--config", recipe, "--output_dir", output, *options, "--per_device_train_batch_size", batch]
        result = launch("sft.py", *arguments, cwd=workspace, command=command)
        assert result.returncode == 0, result.output
    assert json.loads((spread / "run.json").read_text())["world_size"] == 2
    for name in ("loss", "grad_norm", "eval_loss", "eval_accuracy"):
        assert history(spread, name) == pytest.approx(history(whole, name), rel=1e-3), name

    # The last evaluation was on the sharded model. One process loads the saved one.
    made_by, prompt, record = read_run(spread)
    encoder = PromptEncoder(prompt, load_tokenizer(str(spread)))
    pairs = load_train_and_validation(from_recipe(TrainDataConfig, made_by), seed=42)["validation"]
    scores = score_prompts(
        load_tuned(spread, ModelConfig(str(workspace / "base"), dtype="float32")),
        encoder.encode(pairs["premise"], pairs["hypothesis"]),
        encoder.answers,
        encoder.tokenizer.pad_token_id,
        batch_size=8,
        max_row_tokens=512,
    )
    gold = torch.tensor(pairs["label"])
    assert len(gold) == 23
    nll = -scores.log_probs[torch.arange(23), gold].mean().item()
    assert nll == pytest.approx(record["validation"]["eval_nll"], rel=1e-5)
    assert (scores.choice == gold).float().mean().item() == pytest.approx(record["validation"]["eval_accuracy"])
