import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from past_runs import write_past_run

from nli_sft import UserError, runs
from nli_sft.data.prompts import PROMPTS, load_prompt
from nli_sft.hub.card import read_evaluations
from nli_sft.report.compare import RunRecord
from nli_sft.report.content import Report
from nli_sft.runs import (
    evaluation_folder,
    evaluation_folders,
    fingerprints,
    git_state,
    read_run,
    trained_on,
    training_command,
    weights_fingerprint,
    write_json,
    write_run,
    write_trained_pairs,
)

ROOT = Path(__file__).parents[1]

RECIPE = {"model_name_or_path": "hub/tiny", "lora_r": 8, "dataset_name": "snli"}


def test_what_is_written_is_read_back(tmp_path):
    prompt = load_prompt("few_shot", ["yes", "maybe", "no"])
    write_run(tmp_path / "run", recipe=RECIPE, prompt=prompt, record={"seconds": 1.5})
    recipe, read, record = read_run(tmp_path / "run")
    assert recipe == RECIPE
    assert record == {"seconds": 1.5}
    assert read == prompt
    assert read.fingerprint == prompt.fingerprint
    first = (tmp_path / "run" / "recipe.yaml").read_text().splitlines()[0]
    command = f"python recipes/sft.py --config {tmp_path}/run/recipe.yaml --output_dir {tmp_path}/run-again"
    assert first == f"# {command}"


@pytest.mark.parametrize(
    ("record", "command"),
    [
        ({}, "python"),
        ({"world_size": 1, "launcher": "one process"}, "python"),
        ({"world_size": 4, "launcher": "ddp"}, "accelerate_configs/ddp.yaml"),
        ({"world_size": 4, "launcher": "fsdp"}, "accelerate_configs/fsdp2.yaml"),
        ({"world_size": 2, "launcher": "zero3"}, "accelerate_configs/deepspeed_zero3.yaml"),
    ],
)
def test_a_command_starts_as_many_processes_as_the_run_had(record, command):
    if record.get("world_size", 1) > 1:
        assert (ROOT / command).is_file()
        command = f"accelerate launch --config_file {command} --num_processes {record['world_size']}"
    assert training_command("my run", record) == (
        f"{command} recipes/sft.py --config 'my run/recipe.yaml' --output_dir 'my run-again'"
    )


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(runs.os, "replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_json(tmp_path / "run.json", {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["recipe.yaml", "prompt.json", "run.json"])
def test_an_incomplete_folder_names_what_is_missing(tmp_path, name):
    write_run(tmp_path, recipe={}, prompt=PROMPTS["plain"], record={})
    (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=f"is not a run folder: it has no {name}"):
        read_run(tmp_path)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "metrics.json"
    write_json(path, {"accuracy": 0.5})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"accuracy": float("nan")})
    assert json.loads(path.read_text()) == {"accuracy": 0.5}
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.json"]


def test_evaluation_folders_are_named_after_source_and_split():
    assert str(evaluation_folder("out", "stanfordnlp/snli", "test")) == "out/eval/snli-test"
    assert str(evaluation_folder("out", "data/hans.jsonl.gz", "all")) == "out/eval/hans-all"


@pytest.mark.parametrize(
    ("source", "split"), [("snli", "../../../x"), ("..", "test"), ("a/..", "/etc"), ("x", "..\\..")]
)
def test_evaluation_folders_stay_inside_the_run_folder(tmp_path, source, split):
    folder = evaluation_folder(tmp_path / "run", source, split)
    assert folder.resolve().parent == (tmp_path / "run" / "eval").resolve()


def test_pairs_of_the_training_set_are_recognised(tmp_path):
    keys = np.array([7, 2**64 - 1, 7], dtype=np.uint64)
    assert trained_on(tmp_path, keys) is None, "a folder of an earlier version, or from the Hub"
    write_trained_pairs(tmp_path / "new", keys)
    assert trained_on(tmp_path / "new", np.array([8, 7, 2**64 - 1], dtype=np.uint64)).tolist() == [False, True, True]


def git(*arguments, folder):
    command = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
    subprocess.run(command, check=True, capture_output=True)


def test_git_state_is_that_of_this_package_in_any_working_directory(tmp_path, monkeypatch):
    elsewhere, checkout = tmp_path / "elsewhere", tmp_path / "checkout"
    for folder in (elsewhere, checkout):
        folder.mkdir()
        git("init", "-q", folder=folder)
        git("commit", "-q", "--allow-empty", "-m", "x", folder=folder)
    monkeypatch.chdir(elsewhere)
    monkeypatch.setenv("GIT_DIR", str(elsewhere / ".git"))  # as in a hook
    module = checkout / "nli_sft" / "runs.py"
    module.parent.mkdir()
    module.write_text("")
    monkeypatch.setattr(runs, "__file__", str(module))
    assert git_state() is None, "installed inside another repository"
    monkeypatch.delenv("GIT_DIR")
    git("add", ".", folder=checkout)
    git("commit", "-q", "-m", "y", folder=checkout)
    commit = (checkout / ".git" / "refs" / "heads").iterdir().__next__().read_text().strip()
    monkeypatch.setenv("GIT_DIR", str(elsewhere / ".git"))
    assert git_state() == {"commit": commit, "dirty": False}
    module.write_text("x = 1")
    assert git_state() == {"commit": commit, "dirty": True}
    monkeypatch.setattr(runs, "__file__", str(tmp_path / "runs.py"))
    assert git_state() is None, "installed without git"


DAMAGE = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "a list": lambda path: path.write_text("[1, 2]"),
    "not text": lambda path: path.write_bytes(b"\xff\xfe\x00\x81" * 9),
    "no key": lambda path: path.write_text("{}"),
    "a folder": lambda path: path.unlink() or path.mkdir(),
}


@pytest.fixture(scope="module")
def past(tmp_path_factory):
    return write_past_run(tmp_path_factory.mktemp("past") / "run", 0.8)


def read_all(folder):
    """Read everything that compare, report and card read of a run folder."""
    run = RunRecord(folder)
    for _ in (run.validation, run.curve, run.cost, run.base):
        pass
    for evaluation in run.evaluations.values():
        evaluation.accuracy("tuned"), evaluation.table
    read_evaluations(folder)
    Report(folder).provenance()


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize(
    "name",
    [
        "run.json",
        "recipe.yaml",
        "prompt.json",
        "eval/snli-test/metrics.json",
        "eval/snli-test/predictions.parquet",
        "eval/stress.json",
    ],
)
def test_a_damaged_file_is_named_in_one_line(past, tmp_path, name, damage):
    folder = shutil.copytree(past, tmp_path / "run")
    write_json(folder / "eval" / "stress.json", {"suite": "stress", "order": [], "evaluated": {}, "missing": {}})
    read_all(folder)
    DAMAGE[damage](folder / name)
    with pytest.raises(UserError, match=name.rpartition("/")[2].replace(".", r"\.")) as error:
        read_all(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("run.json", "data", 5),
        ("run.json", "history", {}),
        ("run.json", "seconds", "long"),
        ("run.json", "parameters", None),
        ("eval/snli-test/metrics.json", "pairs", "600"),
        ("eval/snli-test/metrics.json", "weights", []),
    ],
)
def test_a_value_of_another_type_is_refused(past, tmp_path, name, key, value):
    folder = shutil.copytree(past, tmp_path / "run")
    write_json(folder / name, json.loads((folder / name).read_text()) | {key: value})
    with pytest.raises(UserError, match=f"{key} should not be"):
        read_all(folder)


def test_predictions_without_a_column_are_refused(past, tmp_path):
    folder = shutil.copytree(past, tmp_path / "run")
    path = folder / "eval" / "snli-test" / "predictions.parquet"
    pd.read_parquet(path).drop(columns="tuned_p_neutral").to_parquet(path)
    with pytest.raises(UserError, match="predictions.parquet has no column 'tuned_p_neutral'; delete"):
        read_all(folder)


def write_weights(folder, content, name="model.safetensors"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)


def test_an_evaluation_of_other_weights_is_not_read(past, tmp_path, caplog):
    folder = shutil.copytree(past, tmp_path / "run")
    write_weights(folder, b"one")
    write_weights(folder / "hypothesis_only", b"two")
    metrics = folder / "eval" / "snli-test" / "metrics.json"
    write_json(metrics, json.loads(metrics.read_text()) | {"weights": fingerprints(folder)})
    assert evaluation_folders(folder) == [metrics.parent]
    assert not caplog.text
    write_weights(folder / "hypothesis_only", b"new")
    assert evaluation_folders(folder) == []
    write_weights(folder / "hypothesis_only", b"two")
    write_weights(folder, b"new")
    assert RunRecord(folder).evaluations == {}
    assert read_evaluations(folder) == []
    assert "snli-test: it was computed with other weights than the folder holds now (tuned)" in caplog.text
    with pytest.raises(UserError, match="has not been evaluated"):
        Report(folder)


def test_an_adapter_left_in_the_folder_is_other_weights(tmp_path):
    write_weights(tmp_path, b"full")
    of_full = weights_fingerprint(tmp_path)
    write_weights(tmp_path, b"adapter", "adapter_model.safetensors")
    assert weights_fingerprint(tmp_path) == of_full, "without a config it is not loaded"
    (tmp_path / "adapter_config.json").write_text("{}")
    assert weights_fingerprint(tmp_path) not in (of_full, None)
    assert weights_fingerprint(tmp_path / "nowhere") is None


def test_large_files_are_hashed_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "HASHED_WHOLE", 2**20)
    monkeypatch.setattr(runs, "BLOCK", 2**10)
    content = bytearray(2**21)
    write_weights(tmp_path, content)
    first = weights_fingerprint(tmp_path)
    content[-1500:] = bytes(1000) + b"x" * 500
    content[2**20 : 2**20 + 4096] = b"y" * 4096
    write_weights(tmp_path, content)
    assert weights_fingerprint(tmp_path) != first
