"""A recipe with the Hub, over HTTP: download of base and data, training, evaluation and push."""

import io
import json

import pyarrow.parquet as pq
import pytest
import yaml
from datasets import ClassLabel, Dataset, Features, Value
from huggingface_hub import ModelCard
from launching import launch
from loopback_hub import TOKEN, LoopbackHub
from tiny import few_pairs

from nli_sft.labels import LABELS


@pytest.fixture(scope="module")
def hub(workspace):
    with LoopbackHub() as server:
        server.add_folder("tiny/base", workspace / "base")
        server.add("stanfordnlp/snli", snli(), "dataset")
        yield server


def snli():
    """A data set like stanfordnlp/snli: Parquet by split, label ids with names, -1 for no label."""
    features = Features(premise=Value("string"), hypothesis=Value("string"), label=ClassLabel(names=list(LABELS)))
    files = {}
    for split, copies in (("train", 8), ("validation", 2), ("test", 3)):
        pairs = few_pairs(copies)
        rows = {name: [*pairs[name]] for name in features}
        for name, value in (("premise", "A dog."), ("hypothesis", "A cat."), ("label", -1)):
            rows[name].append(value)
        buffer = io.BytesIO()
        Dataset.from_dict(rows, features=features).to_parquet(buffer)
        files[f"plain_text/{split}-00000-of-00001.parquet"] = buffer.getvalue()
        assert pq.read_table(io.BytesIO(buffer.getvalue())).num_rows == len(pairs) + 1
    splits = [{"split": split, "path": f"plain_text/{split}-*"} for split in ("train", "validation", "test")]
    card = {
        "license": "cc-by-sa-4.0",
        "configs": [{"config_name": "plain_text", "data_files": splits}],
    }
    files["README.md"] = f"---\n{yaml.safe_dump(card)}---\n# SNLI\n".encode()
    return files


@pytest.fixture(scope="module")
def trained(hub, workspace, tmp_path_factory):
    """A run whose base and data come from the Hub, with the token in its recipe."""
    folder = tmp_path_factory.mktemp("hub")
    revision = hub.repositories["model", "tiny/base"].branches["main"]
    recipe = {
        "model_name_or_path": "tiny/base",
        "model_revision": revision,
        "dataset_name": "stanfordnlp/snli",
        "dataset_revision": hub.repositories["dataset", "stanfordnlp/snli"].branches["main"],
        "use_peft": True,
        "lora_r": 4,
        "lora_target_modules": "all-linear",
        "max_length": 256,
        "learning_rate": 1e-2,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 32,
        "eval_on_start": True,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_accuracy",
        "report_to": "wandb",
        "output_dir": str(folder / "tiny-lora"),
        "hub_token": TOKEN,
        "bf16": False,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    environment = hub.environment(folder / "cache", token=None)
    result = launch("sft.py", "--config", folder / "recipe.yaml", cwd=folder, **environment)
    assert result.returncode == 0, result.output
    return folder, result.output


def test_base_and_data_come_from_the_hub(hub, trained):
    record = json.loads((trained[0] / "tiny-lora" / "run.json").read_text())
    assert record["model"] == "tiny/base"
    assert record["data"]["train"]["pairs"] == 96
    assert record["data"]["dropped"] == {"unlabelled": 2, "too_long": 0}
    assert ("model", "me/tiny-lora") not in hub.repositories, "training pushes nothing"
    assert any(request.endswith("plain_text/train-00000-of-00001.parquet") for request in hub.requests)
    revision = hub.repositories["model", "tiny/base"].branches["main"]
    assert f"GET /tiny/base/resolve/{revision}/model.safetensors" in hub.requests


def test_the_token_is_not_written_anywhere(hub, trained):
    folder, output = trained
    assert TOKEN not in output
    files = [path for path in folder.rglob("*") if path.is_file() and path != folder / "recipe.yaml"]
    assert any(path.suffix == ".wandb" for path in files)
    assert any(path.name == "training_args.bin" for path in files)
    assert [path for path in files if TOKEN.encode() in path.read_bytes()] == []


def test_the_card_of_an_evaluated_run_has_the_test_split(hub, trained):
    folder, _ = trained
    environment = hub.environment(folder / "cache")
    arguments = ["--run", folder / "tiny-lora", "--hub_model_id", "me/tiny-lora", "--hub_private_repo", "true"]
    result = launch("eval.py", "--run", folder / "tiny-lora", "--unconstrained_samples=6", cwd=folder, **environment)
    assert result.returncode == 0, result.output
    result = launch("push.py", *arguments, "--eval_results", cwd=folder, **environment)
    assert result.returncode == 0, result.output
    assert f"{hub.url}/me/tiny-lora/commit/" in "".join(result.output.split())
    assert hub.repositories["model", "me/tiny-lora"].private
    there = hub.files("me/tiny-lora")
    metrics = json.loads(there["eval/snli-test/metrics.json"])
    card = ModelCard(there["README.md"].decode())
    measured = {(r.dataset_split, r.metric_type): r.metric_value for r in card.data.eval_results}
    assert measured["test", "accuracy"] == pytest.approx(metrics["tuned"]["accuracy"], abs=1e-6)
    assert measured["test", "f1"] == pytest.approx(metrics["tuned"]["macro_f1"], abs=1e-6)
    assert "| snli test | after tuning, shuffled premises | 36 |" in card.text
    assert {"report.html", ".eval_results/snli-test.yaml"} <= set(there)
    assert not [name for name, data in there.items() if name.endswith((".parquet", ".npy")) or TOKEN.encode() in data]
