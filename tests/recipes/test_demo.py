"""The demo as a new user runs it: from a wheel, in an empty folder, without a network or an account."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pandas as pd
import pytest
import yaml
from launching import ROOT, launch

from nli_sft.classifier import NLIClassifier
from nli_sft.evaluation.comparison import choice_warning

METHODS = ("lora", "qlora", "full")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel, built from a copy, since a build leaves files that the next one would include."""
    source, made = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "nli_sft", source / "nli_sft", ignore=shutil.ignore_patterns("__pycache__"))
    pip("wheel", "--no-build-isolation", "--wheel-dir", made, source)
    return next(made.glob("*.whl"))


@pytest.fixture(scope="module")
def demo(wheel, tmp_path_factory):
    """(folder, output) of a shortened demo that runs on the installed wheel."""
    installed, folder = tmp_path_factory.mktemp("installed"), tmp_path_factory.mktemp("demo")
    pip("install", "--target", installed, wheel)
    environment = {"PYTHONPATH": str(installed), "HOME": str(folder), "COLUMNS": "80", "WANDB_MODE": "online"}
    short = ("--max_train_samples=48", "--max_eval_samples=24", "--per_device_train_batch_size=16", "--eval_steps=0.5")
    output = ""
    for command in (
        ("sft.py", "--config", ROOT / "recipes/demo/lora.yaml", *short, "--save_steps=0.5"),
        ("eval.py", "--run", "outputs/demo-lora", "--max_samples=120", "--unconstrained_samples=6"),
    ):
        result = launch(*command, cwd=folder, **environment)
        assert result.returncode == 0, result.output
        output += result.output
    base = json.loads((folder / "outputs/demo-lora/adapter_config.json").read_text())["base_model_name_or_path"]
    assert Path(base).is_relative_to(installed), "the demo ran on this tree, not on the wheel"
    return folder, output


def pip(command, *arguments):
    subprocess.run(
        [sys.executable, "-m", "pip", command, "--quiet", "--no-deps", "--no-index", *map(str, arguments)],
        check=True,
        env=os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"},
    )


def test_the_wheel_holds_the_whole_package(wheel):
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith("nli_sft/")}
    there = {path.relative_to(ROOT).as_posix() for path in (ROOT / "nli_sft").rglob("*") if path.is_file()}
    assert packed == {name for name in there if "__pycache__" not in name}
    assert "nli_sft/data/demo/base/model.safetensors" in packed
    assert wheel.stat().st_size < 8 * 2**20


def test_the_demo_writes_a_run_with_report_and_baseline(demo):
    run = demo[0] / "outputs/demo-lora"
    assert yaml.safe_load((run / "recipe.yaml").read_text())["model_name_or_path"] == "demo"
    assert json.loads((run / "run.json").read_text())["resources"]["disk"]["model_bytes"] > 5 * 2**20
    assert (run / "report.html").is_file()
    metrics = json.loads((run / "eval/demo-test/metrics.json").read_text())
    assert {"base", "tuned", "shuffled", "hypothesis_only"} <= set(metrics)
    assert list(demo[0].glob("wandb/offline-run-*"))


def test_the_fitted_temperature_is_saved_with_the_run(demo):
    run = demo[0] / "outputs/demo-lora"
    fitted = json.loads((run / "eval/demo-test/metrics.json").read_text())["tuned"]["calibrated"]["temperature"]
    assert fitted != 1.0
    assert json.loads((run / "run.json").read_text())["temperature"] == fitted
    assert json.loads((run / "decision.json").read_text())["temperature"] == {"choice": fitted}
    assert NLIClassifier.from_pretrained(run, device="cpu").temperature == fitted


def test_the_demo_ends_with_a_table_of_at_most_80_columns(demo):
    output = demo[1]
    lines = output.splitlines()
    start = next(number for number, line in enumerate(lines) if line.strip() == "demo test: accuracy")
    table = lines[start : next(n for n, line in enumerate(lines) if line.startswith("Report: "))]
    assert max(map(len, table)) <= 80
    for name in (
        "all pairs",
        "95% interval",
        "easy",
        "hard",
        "rule: action",
        "rule: weather",
        "unconstrained  ",
        "invalid answers  ",
    ):
        assert any(line.strip().startswith(name) for line in table), name
    row = next(line.split() for line in table if line.strip().startswith("all pairs"))
    assert row[2] == "120"
    assert len(row) == 7, "pairs, base, tuned, with shuffled premises, hypothesis-only"
    assert "Training: " in output
    assert "of RAM" in output


def test_the_demo_shows_progress_and_no_noise(demo):
    output = demo[1]
    assert "accuracy=" in output
    assert "label accuracy on validation" in output
    assert "Training the hypothesis-only baseline" in output
    # With 24 validation pairs, both trainings warn before and after. The real demo has enough pairs.
    few = choice_warning(24)
    assert output.count(few) == output.count("Warning") == 4
    assert choice_warning(yaml.safe_load((ROOT / "recipes/demo/lora.yaml").read_text())["max_eval_samples"]) is None
    output = output.replace(few, "")
    for noise in ("{'loss'", "{'eval_loss'", "Warning", "warnings.warn", "kernels", "Traceback", "Run summary"):
        assert noise not in output, noise
    assert "Not logged in to W&B: this run stays offline" in output
    assert "login:" not in output


def test_make_demo_evaluates_the_run_of_its_recipe():
    commands = subprocess.run(["make", "-n", "demo"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    recipe = yaml.safe_load((ROOT / "recipes/demo/lora.yaml").read_text())
    assert "recipes/sft.py --config recipes/demo/lora.yaml" in commands
    assert f"recipes/eval.py --run {recipe['output_dir']}\n" in commands
    assert f"{recipe['output_dir']}/report.html" in commands


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_the_demo_improves_from_chance_to_over_90_percent(method, tmp_path):
    run = f"outputs/demo-{method}"
    for command in (("sft.py", "--config", ROOT / f"recipes/demo/{method}.yaml"), ("eval.py", "--run", run)):
        result = launch(*command, cwd=tmp_path)
        assert result.returncode == 0, result.output
    metrics = json.loads((tmp_path / run / "eval/demo-test/metrics.json").read_text())
    assert metrics["pairs"] == 2_000
    assert 0.29 < metrics["base"]["accuracy"] < 0.37
    assert metrics["tuned"]["accuracy"] >= 0.90
    assert metrics["hypothesis_only"]["accuracy"] < 0.45
    table = pd.read_parquet(tmp_path / run / "eval/demo-test/predictions.parquet")
    hard = table[table["hard"]]
    assert len(hard) == 1_000
    assert (hard["tuned_prediction"] == hard["label"]).mean() >= 0.80
