import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from xml.etree import ElementTree

import pytest
import wandb
import wandb_server
import yaml
from launching import ROOT
from own_wandb import own_wandb  # noqa: F401, a fixture
from past_runs import as_wandb_run, write_past_run
from trl import ModelConfig, SFTConfig

from nli_sft.configs import BatchConfig, PromptConfig, TrainDataConfig, parse_recipe
from nli_sft.tracking import training_figures

SCRIPT = ROOT / "recipes" / "compare.py"


@pytest.fixture
def compare(own_wandb, monkeypatch, capsys):  # noqa: F811
    """Run the script in this process; returns its output and its exit code or error message."""

    def run(*arguments, columns=250):
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        error = None
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as ended:
            error = ended.code
        return capsys.readouterr().out, error

    return run


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """Two methods with three seeds each, and paths that are not runs."""
    folder = tmp_path_factory.mktemp("study") / "outputs"
    for seed, wobble in ((1, 0.0), (2, 0.01), (3, -0.01)):
        write_past_run(folder / f"full-seed{seed}", 0.80 + wobble, seed=seed)
        write_past_run(folder / f"lora-seed{seed}", 0.60 + wobble, seed=seed, use_peft=True, lora_r=8, seconds=40.0)
    (folder / "interrupted" / "checkpoint-10").mkdir(parents=True)
    (folder / "notes.txt").write_text("not a run")
    return folder


@pytest.fixture(scope="module")
def compared(outputs):
    out = outputs.parent
    files = {kind: out / "written" / f"compare.{kind}" for kind in ("html", "json")}
    files["figures"] = out / "written" / "figures"
    flags = [part for kind, path in files.items() for part in (f"--{kind}", path)]
    # As a user launches it: without accelerate, with outputs/* expanded by the shell.
    result = subprocess.run(
        [sys.executable, SCRIPT, *sorted(outputs.iterdir()), *flags],
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "250"},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return files, result.stdout


def test_the_terminal_shows_base_first_then_runs_by_validation_accuracy(compared):
    _, output = compared
    names = re.findall(r"^ *((?:base|full|lora)[\w -]*?) +\d+\.\d%", output, flags=re.MULTILINE)
    assert names[:7] == ["base tiny", *(f"{m}-seed{s}" for m in ("full", "lora") for s in (2, 1, 3))]
    assert "interrupted: it holds no finished run" in output
    assert "full (3 seeds) is better than lora (3 seeds): 80.0% against 60.0% on validation" in output
    assert "lora_r" in output
    assert "output_dir" not in output


def test_all_files_have_the_same_runs(compared):
    files, _ = compared
    figures = json.loads(files["json"].read_text())
    (ranking,) = figures["rankings"]
    names = [run["name"] for run in ranking["runs"]]
    page = files["html"].read_text()
    assert all(name in page for name in names)
    assert page.count("data:image/svg+xml;base64,") == 3


def test_the_figures_are_small_svg_files(compared):
    files, output = compared
    figures = {path.name: path.read_text() for path in files["figures"].iterdir()}
    assert set(figures) == {"snli-test.svg", "cost.svg", "epochs.svg"}
    assert all(name in output for name in figures)
    for svg in figures.values():
        assert ElementTree.fromstring(svg).get("style") == "background: white", "text must be readable on dark pages"
        assert len(svg) < 60_000
        assert "dc:date" not in svg, "the files must be reproducible"
    assert "full (3 seeds)" in figures["snli-test.svg"]


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium")
def test_the_page_opens_in_a_browser(compared, tmp_path):
    files, _ = compared
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--enable-logging=stderr", "--log-level=0", "--dump-dom", files["html"].as_uri()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "Comparison of runs</h1>" in result.stdout
    assert result.stdout.count("<tr>") > 15
    assert "CONSOLE" not in result.stderr, "errors on the page"


def test_runs_with_another_prompt_are_ranked_separately(compare, outputs, tmp_path):
    other = write_past_run(tmp_path / "no-premise", 0.9, prompt="hypothesis_only")
    output, error = compare(outputs / "full-seed1", outputs / "lora-seed1", other)
    assert error is None
    assert "Not ranked with full-seed1: no-premise. They differ in prompt_fingerprint (" in output


def test_folders_and_wandb_can_be_mixed(compare, outputs, tmp_path, monkeypatch):
    online = write_past_run(tmp_path / "online", 0.75, seed=7)
    with wandb_server.serving([as_wandb_run(online, 1), as_wandb_run(outputs / "lora-seed1", 2)]) as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
        wandb.teardown()
        file = tmp_path / "out.json"
        _, error = compare(outputs / "full-seed1", "team/snli", "--filters", '{"config.lora_r": 1}', "--json", file)
    assert error is None
    (ranking,) = json.loads(file.read_text())["rankings"]
    sources = [(run["name"], run["source"]) for run in ranking["runs"]]
    assert sources == [("full-seed1", str(outputs / "full-seed1")), ("online", "team/snli/id1")]
    assert ranking["tests"][-1]["pairs"] == 600, "tested on their shared pairs"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "error: runs is missing"),
        (["nowhere/at/all"], "error: nowhere/at/all does not exist"),
        ([".", "--filters", "{"], "error: filters is not JSON"),
        (["."], "error: no runs to compare"),
        ([".", "--htm", "x"], "error: unknown key 'htm'; did you mean 'html'?"),
    ],
)
def test_bad_input_ends_with_an_error_message(compare, arguments, message):
    _, error = compare(*arguments)
    assert error.startswith(message)


def test_a_table_much_wider_than_the_terminal_is_not_printed(compare, outputs):
    def shown(width):
        folders = [outputs / f"{method}-seed{seed}" for method in ("full", "lora") for seed in (1, 2, 3)]
        output, _ = compare(*folders, columns=width)
        return " ".join(output.split())

    assert "Differences on snli-test: too wide for this terminal; write it with --html." in shown(40)
    assert "too wide" not in shown(120)


def test_help_begins_with_a_summary():
    shown = subprocess.run([sys.executable, SCRIPT, "--help"], capture_output=True, text=True, check=True).stdout
    assert shown.index("usage: compare.py [--config") < shown.index("Compare runs: ") < shown.index("--figures")
    assert "python recipes/compare.py outputs/* --html compare.html" in shown, "with its line breaks"


def test_the_sweep_uses_keys_and_a_metric_that_exist(tmp_path):
    """W&B's agent replaces ${args} with --key=value. The metric must be one that training logs."""
    sweep = yaml.safe_load((ROOT / "recipes" / "sweep.yaml").read_text())
    grid = [f"--{key}={spec['values'][0]}" for key, spec in sweep["parameters"].items()]
    (tmp_path / "accelerate").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "accelerate").chmod(0o755)
    command = [part for word in sweep["command"] for part in (grid if word == "${args}" else [word])]
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "WANDB_RUN_ID": "abc123"}
    launched = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.split()
    script = launched.index("recipes/sft.py")
    assert (ROOT / launched[script - 1]).is_file()
    arguments = [str(ROOT / part) if part.endswith(".yaml") else part for part in launched[script + 1 :]]
    types = (TrainDataConfig, PromptConfig, BatchConfig, SFTConfig, ModelConfig)
    *_, training_args, model_args = parse_recipe(types, [*arguments, "--bf16=false"])
    assert (training_args.learning_rate, training_args.seed, model_args.lora_r) == (1e-4, 1, 16)
    assert training_args.output_dir == "outputs/sweep/abc123"
    record = {"validation": {"eval_accuracy": 0.5}, "seconds": 1.0, "train": {"train_runtime": 1.0}}
    assert sweep["metric"]["name"] in training_figures(record)
