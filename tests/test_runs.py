import json
import subprocess

import numpy as np
import pytest

from nli_sft.prompts import PROMPTS, load_prompt
from nli_sft.runs import (
    evaluation_folder,
    git_state,
    read_run,
    trained_on,
    versions,
    write_json,
    write_run,
    write_trained_pairs,
)


def test_what_is_written_is_read_back(tmp_path):
    prompt = load_prompt("few_shot", ["yes", "maybe", "no"])
    write_run(tmp_path / "run", recipe={"lora_r": 8, "dataset_name": "snli"}, prompt=prompt, record={"seconds": 1.5})
    recipe, read, record = read_run(tmp_path / "run")
    assert recipe == {"lora_r": 8, "dataset_name": "snli"}
    assert record == {"seconds": 1.5}
    assert read == prompt
    assert read.fingerprint == prompt.fingerprint
    assert (tmp_path / "run" / "recipe.yaml").read_text().startswith("# accelerate launch -q recipes/sft.py --config ")


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


def test_evaluation_folders_are_named_after_what_was_judged():
    assert str(evaluation_folder("out", "stanfordnlp/snli", "test")) == "out/eval/snli-test"
    assert str(evaluation_folder("out", "data/hans.jsonl.gz", "all")) == "out/eval/hans-all"


@pytest.mark.parametrize(
    ("source", "split"), [("snli", "../../../x"), ("..", "test"), ("a/..", "/etc"), ("x", "..\\..")]
)
def test_no_name_of_a_source_or_split_leads_out_of_the_run_folder(tmp_path, source, split):
    folder = evaluation_folder(tmp_path / "run", source, split)
    assert folder.resolve().parent == (tmp_path / "run" / "eval").resolve()


def test_a_run_knows_the_pairs_again_that_it_was_trained_on(tmp_path):
    keys = np.array([7, 2**64 - 1, 7], dtype=np.uint64)
    assert trained_on(tmp_path, keys) is None, "a folder of an earlier version, or from the Hub"
    write_trained_pairs(tmp_path / "new", keys)
    assert trained_on(tmp_path / "new", np.array([8, 7, 2**64 - 1], dtype=np.uint64)).tolist() == [False, True, True]


def test_versions_and_git(tmp_path, monkeypatch):
    assert versions()["transformers"].startswith("5.")
    monkeypatch.chdir(tmp_path)
    assert git_state() is None
    for command in (
        ["init", "-q"],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-m", "x"],
    ):
        subprocess.run(["git", *command], check=True)
    (tmp_path / "new").touch()
    assert git_state()["dirty"] is False
    assert len(git_state()["commit"]) == 40
    subprocess.run(["git", "add", "new"], check=True)
    assert git_state()["dirty"] is True
