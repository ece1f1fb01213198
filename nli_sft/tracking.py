"""Log a run to Weights & Biases. Other trackers get transformers' own callbacks.

`open_run` opens the run before the Trainer exists, and the Trainer's callback joins it. W&B can never fail a training:
its first error is logged and disables it.
"""

import copy
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import torch
from accelerate import PartialState
from transformers import Trainer
from transformers.integrations import WandbCallback

from . import UserError
from .runs import COMPARED_FILES, evaluation_folders, is_trained, read_json, run_cost, write_json

if TYPE_CHECKING:
    from .configs import TrackingConfig
    from .report.content import Evaluation, Report

logger = logging.getLogger(__name__)

PROJECT = "nli-sft"

# Holds what resuming needs: the id of the run in W&B, the id of its first part, mode and project.
STATE_FILE = "tracking.json"

# Larger tables are slow to open in W&B.
MAX_ROWS = 10_000

# The longest wait for uploads at the end of a script; the rest stays on disk for `wandb sync`.
FINISH_SECONDS = 300.0

# The longest wait for W&B to record the data as an input of the run.
USE_SECONDS = 30.0

# The files of an adapter artifact.
ADAPTER_FILES = ("adapter_*", "*token*", "*.jinja", "prompt.json")


def open_run(
    run: str | Path,
    *,
    report_to: str | Sequence[str] | None,
    settings: "TrackingConfig",
    config: Mapping[str, object],
    job_type: str = "train",
    resumed: bool = False,
) -> "Tracker":
    """Open a run in W&B if `report_to` names it. Every process calls this; only the main process opens the run.

    Args:
        run: the run folder, created if needed.
        settings: project, group, tags and notes.
        config: flat, as `runs.run_config` makes it.
        job_type: `train` or `eval`.
        resumed: whether to resume the run of the folder. If both parts are online, they are one run in W&B. Offline,
            W&B cannot resume: the new part is a run of its own in the same group, whose config names the previous part
            (`resumed_from`) and the first (`origin`).
    """
    tracker = Tracker(run)
    if "wandb" in ([report_to] if isinstance(report_to, str) else report_to or ()) and PartialState().is_main_process:
        config = dict(config)
        if config.get("gpu") is None and torch.cuda.is_available():
            config["gpu"] = torch.cuda.get_device_name()
        method = "full" if not config.get("use_peft") else "lora" if config["quantisation"] == "none" else "qlora"
        if config.get("trained") is False:
            method = "not-trained"
        base, source = (Path(str(config[key])).name for key in ("model", "dataset_name"))
        about = {
            "entity": settings.wandb_entity,
            "project": settings.wandb_project or os.environ.get("WANDB_PROJECT") or PROJECT,
            "group": settings.wandb_group or f"{base}-{source}",
            "job_type": job_type,
            "name": config.get("run_name") or Path(run).resolve().name,
            "tags": [*(settings.wandb_tags or ()), source, method, f"seed{config['seed']}"],
            "notes": settings.wandb_notes,
            "config": config,
        }
        tracker.open(about, resumed)
    return tracker


class Tracker:
    """A run in W&B whose failures are harmless. Until opened, and on all but the main process, it does nothing."""

    def __init__(self, run: str | Path):
        self._folder = Path(run)
        self._run: _WandbRun | None = None
        self._failed = False

    def open(self, about: Mapping[str, Any], resumed: bool) -> None:
        """Start the run, or resume that of the folder; `about` holds the arguments of `wandb.init`."""

        def start():
            self._run = _WandbRun(self._folder, about, resumed)

        self.attempt(start)

    def watch(self, trainer: Trainer) -> None:
        """Make the Trainer's callback for W&B join this run."""
        trainer.pop_callback(WandbCallback)
        if self._run is not None:
            trainer.add_callback(_Joining(self, self._run.logged))

    def publish_training(self, record: Mapping) -> None:
        """Publish validation, cost, files and the adapter, once the run folder is written."""
        if self._run is not None:
            self.attempt(self._run.summarise, training_figures(record))
            self.attempt(self._run.publish_training, record)

    def publish_evaluation(self, report: "Report") -> None:
        """Publish metrics, predictions and other tables, plots and the report, once the report is written."""
        if self._run is not None:
            figures = training_figures(report.record)
            for evaluation in report.evaluations:
                figures |= evaluation_figures(evaluation)
            self.attempt(self._run.summarise, figures)
            self.attempt(self._run.publish_evaluation, report)

    def finish(self) -> None:
        """End the run."""
        if self._run is not None:
            self.attempt(self._run.finish)

    def attempt(self, function: Callable, *arguments: object, **keywords: object) -> None:
        """Call a function that uses W&B, unless one has failed before."""
        if self._failed:
            return
        try:
            function(*arguments, **keywords)
        except UserError:
            raise
        except Exception as error:  # no error of W&B may end a training
            self._failed = True
            logger.warning("W&B failed; nothing more is logged to it: %s", " ".join(str(error).split()))


def training_figures(record: Mapping) -> dict[str, float]:
    """The summary of a training: `validation/...` of the kept checkpoint, and `cost/...`."""
    if not is_trained(record):
        return {}
    figures = {f"validation/{key.removeprefix('eval_')}": value for key, value in record["validation"].items()}
    return figures | {f"cost/{key}": value for key, value in run_cost(record).items()}


def evaluation_figures(evaluation: "Evaluation") -> dict[str, float]:
    """The figures of one evaluation, such as `snli-test/accuracy`; of the main model unless a name says otherwise."""
    tuned = evaluation.metrics[evaluation.main]
    low, high = tuned["accuracy_interval"]
    figures = {
        "pairs": tuned["n"],
        "accuracy": tuned["accuracy"],
        "accuracy_low": low,
        "accuracy_high": high,
        **{key: tuned[key] for key in ("macro_f1", "nll", "ece", "label_mass")},
        **{f"f1_{label}".replace("-", "_"): per_label["f1"] for label, per_label in tuned["per_label"].items()},
    }
    if len(evaluation.compared) == 2:
        comparison = evaluation.comparison
        figures |= {
            "difference": comparison.difference,
            "difference_low": comparison.interval[0],
            "difference_high": comparison.interval[1],
            "mcnemar_p": comparison.p_value,
        }
    for model in evaluation.models:
        if model != evaluation.main:
            figures[f"{model}_accuracy"] = evaluation.metrics[model]["accuracy"]
        if answers := evaluation.unconstrained(model):
            figures[f"{model}_names_no_label"] = answers["invalid_share"]
    return {f"{_section(evaluation)}/{key}": figure for key, figure in figures.items()}


def _section(evaluation: "Evaluation") -> str:
    return evaluation.key.replace(".", "_")


class _Joining(WandbCallback):
    """transformers' callback for W&B on the open run: logs each step once, with speed and memory."""

    def __init__(self, tracker: Tracker, logged: dict[str, int]):
        super().__init__()
        self._tracker = tracker
        self._logged = logged  # the last step of each kind in W&B

    def setup(self, args, state, model, **kwargs):
        # The run is already open. The original would add some 200 defaults to its config.
        self._initialized = True

    def on_train_begin(self, args, state, control, **kwargs):
        self._last = time.perf_counter(), state.global_step
        self._tracker.attempt(super().on_train_begin, args, state, control, **kwargs)
        # W&B may lack what was logged before the checkpoint: a killed process loses what it had not sent, and offline
        # it all belongs to another run.
        for entry in state.log_history:
            at_that_step = copy.copy(state)
            at_that_step.global_step = entry["step"]
            self._log(args, at_that_step, control, {k: v for k, v in entry.items() if k != "step"}, **kwargs)

    def on_log(self, args, state, control, logs=None, **kwargs):
        logs = logs or {}
        if "loss" in logs:
            speed = self._speed_and_memory(args, state)
            state.log_history[-1].update(speed)
            logs = logs | speed
        self._log(args, state, control, logs, **kwargs)

    def _speed_and_memory(self, args, state) -> dict[str, float]:
        (before, first), now = self._last, time.perf_counter()
        self._last = now, state.global_step
        batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        speed = (state.global_step - first) * batch / (now - before)
        return {"pairs_per_second": speed, "memory_gib": _memory_bytes() / 2**30}

    def _log(self, args, state, control, logs, **kwargs) -> None:
        """Log what W&B does not have: a resumed training repeats the steps after its checkpoint, and every training
        repeats an evaluation at its end."""
        kind = "train" if "loss" in logs else "eval" if "eval_loss" in logs else None
        if kind == "eval":
            logs = logs | {"eval_global_step": state.global_step}
        if kind is None or state.global_step > self._logged[kind]:
            self._tracker.attempt(super().on_log, args, state, control, logs=logs, **kwargs)
            self._logged |= {kind: state.global_step} if kind else {}

    def on_save(self, *arguments, **keywords):
        self._tracker.attempt(super().on_save, *arguments, **keywords)

    def on_predict(self, *arguments, **keywords):
        self._tracker.attempt(super().on_predict, *arguments, **keywords)

    def on_train_end(self, *arguments, **keywords):
        self._tracker.attempt(super().on_train_end, *arguments, **keywords)


def _memory_bytes() -> int:
    """Peak GPU memory; without a GPU, current RAM."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else psutil.Process().memory_info().rss


class _WandbRun:
    """An open run in W&B.

    Attributes:
        logged: the last step for which W&B has a loss (`train`) and an evaluation (`eval`).
    """

    def __init__(self, folder: Path, about: Mapping[str, Any], resumed: bool):
        import wandb  # slow to import

        self._wandb, self._folder = wandb, folder
        path = folder / STATE_FILE
        before = read_json(path, {"wandb": dict | None})["wandb"] if resumed and path.is_file() else None
        mode = wandb.setup().settings.mode
        if mode == "online" and not wandb.login(prompt=False, verify=False):
            logger.warning("Not logged in to W&B: this run stays offline. To upload it: `wandb login`, `wandb sync`.")
            mode = "offline"
        try:
            self._run = self._open(before, about, mode)
        except Exception as error:
            if mode != "online":
                raise
            logger.warning("W&B cannot be reached: this run stays offline. Upload it with `wandb sync`. (%s)", error)
            self._run = self._open(before, about, "offline")
        # Summaries hold the last values, so they show how far a resumed run had come.
        summary = self._run.summary if self._run.resumed else {}
        self.logged = {kind: int(summary.get(f"{kind}/global_step", -1)) for kind in ("train", "eval")}
        self._run.define_metric("train/global_step")
        self._run.define_metric("*", step_metric="train/global_step", step_sync=True)

    def _open(self, before: Mapping[str, str] | None, about: Mapping[str, Any], mode: str):
        about = dict(about)
        if before is None:
            pass
        elif before["mode"] == mode == "online":
            del about["job_type"]  # an evaluation that resumes the run of a training keeps its job type
            about |= {"id": before["id"], "resume": "allow"}
        else:
            about["config"] = {**about["config"], "origin": before["origin"], "resumed_from": before["id"]}
        patience = self._wandb.setup().settings.finish_timeout or FINISH_SECONDS
        # Offline, W&B prints no URL, only a long summary that would hide our output.
        quiet = {"quiet": True} if mode == "offline" else {}
        settings = self._wandb.Settings(finish_timeout=patience, **quiet)
        run = self._wandb.init(**about, mode=mode, settings=settings)
        origin = before["origin"] if before else run.id
        state = {"id": run.id, "origin": origin, "mode": mode, "project": about["project"]}
        write_json(self._folder / STATE_FILE, {"wandb": state})
        return run

    def summarise(self, figures: Mapping[str, float]) -> None:
        """Add figures to the summary of the run."""
        self._run.summary.update(dict(figures))

    def finish(self) -> None:
        self._run.finish()

    def publish_training(self, record: Mapping) -> None:
        self._save_files()
        config = self._run.config
        keys = ("model", "model_revision", "prompt_fingerprint", "train_fingerprint", "validation_fingerprint")
        origin = {key: config.get(key) for key in keys}
        if (self._folder / "adapter_config.json").is_file():  # WANDB_LOG_MODEL=end sends a full model
            adapter = self._artifact(f"{self._run.name}-adapter", "model", origin | training_figures(record))
            for path in sorted({path for pattern in ADAPTER_FILES for path in self._folder.glob(pattern)}):
                adapter.add_file(str(path))
            self._run.log_artifact(adapter)
        if self._run.settings.mode == "online":  # offline, W&B records no input; the metadata below names the data
            data = self._artifact(Path(str(config["dataset_name"])).name, "dataset", record["data"])
            with data.new_file("data.json") as file:
                json.dump(record["data"], file, indent=2, sort_keys=True)
            self._use(data)

    def publish_evaluation(self, report: "Report") -> None:
        self._save_files()
        media = {}
        for evaluation in report.evaluations:
            for name, table in evaluation_tables(evaluation).items():
                media[f"{_section(evaluation)}/{name}"] = self._table(table)
            predictions = self._artifact(
                f"{self._run.name}-{evaluation.key}", "predictions", evaluation_figures(evaluation)
            )
            for name in ("metrics.json", "predictions.parquet"):
                predictions.add_file(str(self._folder / "eval" / evaluation.key / name))
            self._run.log_artifact(predictions)
        for path in sorted(self._folder.glob("figures/*.png")):
            media[f"figures/{path.stem}"] = self._wandb.Image(str(path))
        media["report"] = self._wandb.Html(str(self._folder / "report.html"), inject=False)
        self._run.log(media)
        document = self._artifact(f"{self._run.name}-report", "report", {})
        for name in ("report.html", "report.md"):
            document.add_file(str(self._folder / name))
        self._run.log_artifact(document)

    def _save_files(self) -> None:
        current = evaluation_folders(self._folder)
        stale = {path for path in self._folder.glob("eval/*/*") if path.parent not in current}
        for pattern in COMPARED_FILES:
            for path in set(self._folder.glob(pattern)) - stale:
                # Copied, not linked as W&B would: the folder may change before `wandb sync`.
                copy = Path(self._run.dir, path.relative_to(self._folder))
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, copy)
                self._run.save(str(copy), base_path=self._run.dir, policy="now")

    def _artifact(self, name: str, kind: str, metadata: Mapping):
        return self._wandb.Artifact(re.sub(r"[^\w.-]", "-", name)[-128:], type=kind, metadata=dict(metadata))

    def _use(self, artifact) -> None:
        # W&B would wait for the server without a limit.
        def use():
            with suppress(Exception):
                self._run.use_artifact(artifact)

        thread = Thread(target=use, daemon=True)
        thread.start()
        thread.join(USE_SECONDS)

    def _table(self, rows: Sequence[Mapping[str, object]]):
        return self._wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])


def evaluation_tables(evaluation: "Evaluation") -> dict[str, list[dict[str, object]]]:
    """{name: rows} of the tables of one evaluation: predictions, confusion, per_label and, if there are any, slices.

    At most `MAX_ROWS` pairs are taken, evenly spaced; a warning is logged if there are more.
    """
    table = evaluation.table
    if len(evaluation.compared) == 2:
        table = table.assign(bucket=evaluation.bucket)
    if len(table) > MAX_ROWS:
        logger.warning(
            "The W&B table of %s shows %s of %s pairs; the predictions artifact holds all.",
            evaluation.name,
            f"{MAX_ROWS:,}",
            f"{len(table):,}",
        )
        table = table.take(np.linspace(0, len(table) - 1, MAX_ROWS).astype(int))
    columns = {"uid": "uid", "premise": "premise", "hypothesis": "hypothesis", "label": "gold", "bucket": "bucket"}
    for model in evaluation.compared:
        columns[f"{model}_prediction"] = model
        columns |= {f"{model}_p_{label}": f"{model}_p_{label}" for label in evaluation.labels}
    columns = {column: name for column, name in columns.items() if column in table}
    per_label, confusion = [], []
    for model in evaluation.models:
        figures = evaluation.metrics[model]
        for gold, counts in zip(evaluation.label_names, figures["confusion"], strict=True):
            per_label.append({"model": model, "label": gold, **figures["per_label"][gold]})
            confusion += [
                {"model": model, "gold": gold, "predicted": predicted, "pairs": count}
                for predicted, count in zip(evaluation.label_names, counts, strict=True)
            ]
    tables = {
        "predictions": table.filter(items=list(columns)).set_axis(list(columns.values()), axis=1).to_dict("records"),
        "confusion": confusion,
        "per_label": per_label,
    }
    if evaluation.slices:
        tables["slices"] = [
            {key: value for key, value in one.as_dict().items() if key != "interval"}
            | dict(zip(("change_low", "change_high"), one.interval, strict=True))
            for one in evaluation.slices
        ]
    return tables
