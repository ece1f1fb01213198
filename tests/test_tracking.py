"""Logging to W&B. Offline runs are read with `wandb leet inspect`."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import wandb
import wandb_server
from own_wandb import own_wandb  # noqa: F401, a fixture
from past_runs import write_past_run
from PIL import Image
from tracked import At, settings, train

import nli_sft
from nli_sft.report import write_report
from nli_sft.report.compare import RunRecord
from nli_sft.report.content import Report
from nli_sft.tracking import MAX_ROWS, evaluation_tables, open_run

pytestmark = pytest.mark.usefixtures("own_wandb")


class Logged:
    """The records of an offline run."""

    def __init__(self, folder):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
        lines = subprocess.run(command, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL).stdout
        records = [json.loads(line) for line in lines.splitlines()]
        self.run = next(record["run"] for record in records if record["type"] == "run")
        self.config = self.run["config"]["update"]
        self.history = [record["history"]["item"] for record in records if record["type"] == "history"]
        self.artifacts = [record["artifact"] for record in records if record["type"] == "artifact"]
        self.files = {file["path"] for r in records if r["type"] == "files" for file in r["files"]["files"]}
        self.summary = {}
        for record in records:
            if record["type"] == "summary":
                self.summary |= record["summary"].get("update", {})

    def steps(self, key):
        return [entry["train/global_step"] for entry in self.history if key in entry]


def offline_runs():
    """All offline runs of this test, oldest first."""
    return [
        Logged(path) for path in sorted(Path("wandb").glob("offline-run-*"), key=lambda path: path.stat().st_ctime)
    ]


def track_evaluation(folder, **about):
    write_report(Report(folder))
    run = RunRecord(folder)
    tracker = open_run(
        folder, report_to="wandb", settings=settings(**about), config=run.config, job_type="eval", resumed=True
    )
    tracker.publish_evaluation(Report(folder))
    tracker.finish()
    return run


def test_a_training_logs_config_history_and_summary(tmp_path):
    train(tmp_path / "tiny-lora", report_to=["wandb"], wandb_project="study", wandb_tags=["smoke"])
    (logged,) = offline_runs()
    about = {key: logged.run[key] for key in ("project", "run_group", "job_type", "display_name", "notes", "tags")}
    assert about == {
        "project": "study",
        "run_group": "tiny-pairs",
        "job_type": "train",
        "display_name": "tiny-lora",
        "notes": "what for",
        "tags": ["smoke", "pairs", "lora", "seed42"],
    }
    record = json.loads((tmp_path / "tiny-lora" / "run.json").read_text())
    assert {
        key: logged.config[key]
        for key in ("model", "quantisation", "lora_r", "learning_rate", "seed", "world_size", "prompt", "label_words")
    } == {
        "model": "somewhere/tiny",
        "quantisation": "none",
        "lora_r": 4,
        "learning_rate": 1e-2,
        "seed": 42,
        "world_size": 1,
        "prompt": "plain",
        "label_words": ["entailment", "neutral", "contradiction"],
    }
    assert logged.config["prompt_fingerprint"] == record["prompt_fingerprint"]
    assert logged.config["train_fingerprint"] == record["data"]["train"]["fingerprint"]
    assert logged.config["validation_fingerprint"] == record["data"]["validation"]["fingerprint"]
    assert logged.config["parameters_trainable"] == record["parameters"]["trainable"]
    assert logged.config["version_transformers"] == record["versions"]["transformers"]
    assert {"model_revision", "gpu", "git_commit", "git_dirty", "version_torch", "dropped_unlabelled"} <= set(
        logged.config
    )
    assert not [key for key in logged.config if "." in key]
    assert not [key for key, value in logged.config.items() if isinstance(value, dict) and key != "_wandb"]

    assert logged.steps("eval/accuracy") == logged.steps("eval/loss") == [0, 2, 4, 6], (
        "the base first, and each step once"
    )
    for field in ("loss", "learning_rate", "grad_norm", "pairs_per_second", "memory_gib"):
        assert logged.steps(f"train/{field}") == [1, 2, 3, 4, 5, 6], field
    losses = [entry["train/loss"] for entry in logged.history if "train/loss" in entry]
    assert losses == [entry["loss"] for entry in record["history"] if "loss" in entry]
    assert logged.summary["validation/accuracy"] == record["validation"]["eval_accuracy"]
    assert logged.summary["cost/seconds"] == record["seconds"]

    (adapter,) = logged.artifacts
    assert adapter["type"] == "model"
    contents = {content["path"] for content in adapter["manifest"]["contents"]}
    assert contents >= {"adapter_model.safetensors", "adapter_config.json", "prompt.json", "tokenizer.json"}
    metadata = json.loads(adapter["metadata"])
    assert metadata["validation/accuracy"] == record["validation"]["eval_accuracy"]
    assert metadata["train_fingerprint"] == record["data"]["train"]["fingerprint"]
    assert {"run.json", "recipe.yaml", "prompt.json"} <= logged.files


def test_an_evaluation_logs_figures_tables_plots_and_files(tmp_path):
    folder = write_past_run(
        tmp_path / "run", 0.8, evaluations=("snli-test", "stress_1.0-test"), resources=None, use_peft=True
    )
    (folder / "figures").mkdir()
    Image.new("RGB", (2, 2)).save(folder / "figures" / "snli-test-accuracies.png")
    track_evaluation(folder)
    (logged,) = offline_runs()
    evaluation = Report(folder).own
    assert logged.run["job_type"] == "eval"
    expected = {
        "snli-test/accuracy": evaluation.metrics["tuned"]["accuracy"],
        "snli-test/accuracy_low": evaluation.metrics["tuned"]["accuracy_interval"][0],
        "snli-test/macro_f1": evaluation.metrics["tuned"]["macro_f1"],
        "snli-test/f1_neutral": evaluation.metrics["tuned"]["per_label"]["neutral"]["f1"],
        "snli-test/nll": evaluation.metrics["tuned"]["nll"],
        "snli-test/ece": evaluation.metrics["tuned"]["ece"],
        "snli-test/base_accuracy": evaluation.metrics["base"]["accuracy"],
        "snli-test/difference": evaluation.comparison.difference,
        "snli-test/difference_low": evaluation.comparison.interval[0],
        "snli-test/mcnemar_p": evaluation.comparison.p_value,
        "cost/seconds": 105.0,
        "validation/accuracy": 0.8,
    }
    assert {key: logged.summary[key] for key in expected} == pytest.approx(expected)
    assert "stress_1_0-test/accuracy" in logged.summary

    (media,) = [entry for entry in logged.history if "report._type" in entry]
    assert media["report._type"] == "html-file"
    assert media["figures/snli-test-accuracies._type"] == "image-file"
    for table, rows in (("predictions", 600), ("confusion", 18), ("per_label", 6), ("slices", len(evaluation.slices))):
        assert media[f"snli-test/{table}.nrows"] == rows
    by_kind = {}
    for artifact in logged.artifacts:
        by_kind.setdefault(artifact["type"], []).append({c["path"] for c in artifact["manifest"]["contents"]})
    assert by_kind["predictions"] == [{"metrics.json", "predictions.parquet"}] * 2
    assert by_kind["report"] == [{"report.html", "report.md"}]
    assert {"run.json", "eval/snli-test/predictions.parquet", "eval/snli-test/metrics.json"} <= logged.files
    # The uploaded files form a run folder, even if the original has changed since.
    (sent,) = Path("wandb").glob("offline-run-*/files")
    (folder / "run.json").unlink()
    assert RunRecord(sent).validation.value == 0.8


def test_the_predictions_table_holds_both_models_and_is_capped_with_a_warning(tmp_path, caplog, monkeypatch):
    evaluation = Report(write_past_run(tmp_path / "run", 0.8)).own
    tables = evaluation_tables(evaluation)
    row = tables["predictions"][0]
    assert list(row) == [
        *("uid", "premise", "hypothesis", "gold", "bucket"),
        *("base", "base_p_entailment", "base_p_neutral", "base_p_contradiction"),
        *("tuned", "tuned_p_entailment", "tuned_p_neutral", "tuned_p_contradiction"),
    ]
    assert {row["bucket"] for row in tables["predictions"]} == {"fixed", "regressed", "both_right", "both_wrong"}
    assert sum(row["pairs"] for row in tables["confusion"] if row["model"] == "tuned") == 600
    assert caplog.text == ""
    assert MAX_ROWS == 10_000
    monkeypatch.setattr("nli_sft.tracking.MAX_ROWS", 100)
    shown = evaluation_tables(evaluation)["predictions"]
    assert len(shown) == 100
    assert (shown[0], shown[-1]) == (tables["predictions"][0], tables["predictions"][-1])
    assert "shows 100 of 600 pairs; the predictions artifact holds all" in caplog.text


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A run folder of a training that was killed at step 6, with a checkpoint at 4 and logs up to 5."""
    folder = tmp_path_factory.mktemp("killed") / "run"
    result = subprocess.run(
        [sys.executable, Path(__file__).with_name("tracked.py"), folder, "6"],
        cwd=folder.parent,
        env=os.environ | {"WANDB_MODE": "offline"},
        capture_output=True,
        stdin=subprocess.DEVNULL,
    )
    assert result.returncode == -9
    assert not (folder / "run.json").exists()
    return folder


def test_killed_and_resumed_offline_is_one_history_in_a_linked_part(killed, tmp_path):
    """Offline, a killed run loses what was not written and cannot resume, so the new part logs everything."""
    folder = shutil.copytree(killed, tmp_path / "run")
    before = json.loads((folder / "tracking.json").read_text())["wandb"]
    train(folder, report_to=["wandb"], resume=True)
    (logged,) = offline_runs()
    assert logged.config["resumed_from"] == logged.config["origin"] == before["id"]
    assert logged.run["run_group"] == "tiny-pairs"
    assert logged.steps("train/loss") == logged.steps("train/memory_gib") == [1, 2, 3, 4, 5, 6], "each step once"
    assert logged.steps("eval/accuracy") == [0, 2, 4, 6]
    history = json.loads((folder / "run.json").read_text())["history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert [entry["train/loss"] for entry in logged.history if "train/loss" in entry] == losses
    after = json.loads((folder / "tracking.json").read_text())["wandb"]
    assert after == before | {"id": logged.run["run_id"]}, "so that the evaluation names the first part too"


@pytest.mark.parametrize("arrived", [0, 2, 5], ids=lambda step: f"up to {step} arrived")
def test_killed_and_resumed_online_is_one_run_with_each_step_once(killed, tmp_path, monkeypatch, arrived):
    """W&B resumes the run, with fewer or more logged steps than the checkpoint."""
    folder = shutil.copytree(killed, tmp_path / "run")
    state = json.loads((folder / "tracking.json").read_text())
    state["wandb"]["mode"] = "online"
    (folder / "tracking.json").write_text(json.dumps(state))
    with wandb_server.serving([]) as server:
        run = server.has_begun(state["wandb"]["id"], _rows_up_to(arrived))
        monkeypatch.setenv("WANDB_MODE", "online")
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
        wandb.teardown()
        train(folder, report_to=["wandb"], resume=True)
        wandb.teardown()
    after = json.loads((folder / "tracking.json").read_text())["wandb"]
    assert after == state["wandb"]
    assert list(server.live) == [after["id"]], "no other run"
    entries = list(map(json.loads, run["history"]))
    assert [entry["train/global_step"] for entry in entries if "train/loss" in entry] == [1, 2, 3, 4, 5, 6]
    assert [entry["train/global_step"] for entry in entries if "eval/accuracy" in entry] == [0, 2, 4, 6]
    assert run["complete"]
    validation = json.loads((folder / "run.json").read_text())["validation"]["eval_accuracy"]
    assert json.loads(run["summary"])["validation/accuracy"] == pytest.approx(validation)
    assert {"run.json", "recipe.yaml", "prompt.json"} <= set(run["files"])
    artifacts = [variables["input"]["artifactTypeName"] for op, variables in server.asked if op == "CreateArtifact"]
    assert sorted(artifacts) == ["dataset", "model"]
    assert "UseArtifact" in [operation for operation, _ in server.asked], "the data is an input of the run"


def _rows_up_to(last):
    rows = []
    for step in range(last + 1):
        if step:
            rows.append({"train/loss": 1.0, "train/global_step": step})
        if step % 2 == 0:
            rows.append({"eval/accuracy": 0.5, "eval/global_step": step, "train/global_step": step})
    return rows


def test_a_new_training_in_an_old_folder_is_a_new_run(tmp_path):
    for _ in range(2):
        train(tmp_path / "run", report_to=["wandb"], steps=2)
    first, second = offline_runs()
    assert first.run["run_id"] != second.run["run_id"]
    assert "origin" not in second.config
    assert second.steps("train/loss") == [1, 2]


def test_without_a_login_the_run_is_offline_with_a_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    wandb.teardown()
    train(tmp_path / "run", report_to=["wandb"], steps=2)
    (logged,) = offline_runs()
    assert logged.steps("train/loss") == [1, 2]
    lines = [record.getMessage() for record in caplog.records if record.name == "nli_sft.tracking"]
    assert lines == ["Not logged in to W&B: this run stays offline. To upload it: `wandb login`, `wandb sync`."]


def test_an_unreachable_server_does_not_fail_a_training(tmp_path, monkeypatch, caplog):
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "2")
    wandb.teardown()
    train(tmp_path / "run", report_to=["wandb"], steps=2)
    (logged,) = offline_runs()
    assert logged.steps("train/loss") == [1, 2]
    assert "W&B cannot be reached: this run stays offline" in caplog.text


def test_a_server_that_stops_does_not_fail_a_training(tmp_path, monkeypatch):
    monkeypatch.setattr("nli_sft.tracking.FINISH_SECONDS", 2.0)
    monkeypatch.setattr("nli_sft.tracking.USE_SECONDS", 1.0)
    monkeypatch.setattr("wandb.apis.public.api.Api._HTTP_TIMEOUT", 1)
    with wandb_server.serving([]) as server:
        monkeypatch.setenv("WANDB_MODE", "online")
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
        wandb.teardown()
        train(
            tmp_path / "run",
            report_to=["wandb"],
            callbacks=[At(3, lambda: (server.shutdown(), server.server_close()))],
        )
    assert (tmp_path / "run" / "run.json").is_file()


# W&B's thread calls a service that has ended
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_failing_tracker_is_reported_once_and_training_finishes(tmp_path, caplog):
    def die():
        import psutil

        for process in psutil.Process().children(recursive=True):
            if "wandb-core" in process.name():
                process.kill()
                process.wait(10)

    train(tmp_path / "run", report_to=["wandb"], callbacks=[At(3, die)])
    assert (tmp_path / "run" / "run.json").is_file()
    lines = [record.getMessage() for record in caplog.records if record.name == "nli_sft.tracking"]
    assert len(lines) == 1
    assert lines[0].startswith("W&B failed; nothing more is logged to it: ")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert [entry["step"] for entry in record["history"] if "loss" in entry] == [1, 2, 3, 4, 5, 6]


def test_nothing_is_opened_without_report_to(tmp_path):
    train(tmp_path / "run", report_to="none", steps=1)
    assert not Path("wandb").exists()
    assert not (tmp_path / "run" / "tracking.json").exists()


def test_no_module_needs_wandb_to_be_imported():
    modules = list(Path(nli_sft.__file__).parent.rglob("*.py"))
    assert len(modules) > 20
    for path in modules:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [name.name for name in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.split(".")[0] == "wandb"], path
