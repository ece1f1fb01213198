"""The same training and the same predictions on any number of processes."""

import json

import pandas as pd
import pytest
from launching import launch

# 94 pairs in batches of 20, and no dropout: its random numbers would be each process's own.
OPTIONS = ["--lora_dropout", "0", "--max_train_samples", "94", "--max_eval_samples", "23", "--learning_rate", "1e-3"]


def train(recipe, workspace, processes, batching):
    output = workspace / "outputs" / f"{batching}-on-{processes}"
    arguments = ["--config", recipe, "--output_dir", output, "--batching", batching, *OPTIONS]
    arguments += ["--per_device_train_batch_size", 20 // processes]
    result = launch("sft.py", *arguments, cwd=workspace, processes=processes)
    assert result.returncode == 0, result.output
    return output


def history(folder, name):
    return [entry[name] for entry in json.loads((folder / "run.json").read_text())["history"] if name in entry]


@pytest.mark.parametrize("batching", ["trie", pytest.param("padded", marks=pytest.mark.slow)])
def test_one_two_and_four_processes_learn_and_answer_the_same(recipe, workspace, batching):
    one, *others = (train(recipe, workspace, processes, batching) for processes in (1, 2, 4))
    assert len(history(one, "loss")) == 10
    for other in others:
        for name in ("loss", "grad_norm", "mean_token_accuracy", "eval_loss", "eval_accuracy"):
            assert history(other, name) == pytest.approx(history(one, name), rel=1e-3), (name, other)
        assert history(other, "num_tokens") == history(one, "num_tokens")

    answers = {}
    for processes in (1, 2, 4):
        arguments = ["--run", one, "--max_samples", "35", "--precision", "fp32"]
        result = launch("eval.py", *arguments, cwd=workspace, processes=processes)
        assert result.returncode == 0, result.output
        (table,) = one.glob("eval/*/predictions.parquet")
        metrics = json.loads(table.with_name("metrics.json").read_text())
        answers[processes] = pd.read_parquet(table), {m: metrics[m]["accuracy"] for m in ("base", "tuned", "shuffled")}
    for processes in (2, 4):
        assert answers[processes][1] == answers[1][1]
        predictions = [answers[number][0] for number in (1, processes)]
        pd.testing.assert_frame_equal(*predictions, rtol=1e-4)  # each pair once, in order
