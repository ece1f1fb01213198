"""A run in Weights & Biases, and the same record in Trackio and TensorBoard.

`open_run` opens the run before the Trainer exists, so that the Trainer's own callback joins it. wandb and trackio are
imported only where `report_to` names them. Nothing that a tracker does may stop or fail the work it watches: what one
of them raises is told once, and that tracker is left alone from then on.
"""

import copy
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import torch
from accelerate import PartialState
from transformers import Trainer, TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from . import UserError
from .labels import LABELS
from .ledger import RUN_FILES, run_cost
from .runs import evaluation_folders, read_json, write_json

if TYPE_CHECKING:
    from .configs import TrackingConfig
    from .report.content import Evaluation, Report

logger = logging.getLogger(__name__)

PROJECT = "nli-sft"

# What it takes to go on with a run: its id in W&B, and the last steps told.
STATE_FILE = "tracking.json"
NOTHING = {"train": -1, "eval": -1}

# A larger table is slow to open in W&B.
MOST_ROWS = 10_000

# How long the end of a script waits for W&B to upload; what is left stays on disk for `wandb sync`.
FINISH_SECONDS = 300.0

# And how long it waits for the data to be noted as what the adapter was made from.
USE_SECONDS = 30.0

# What makes an adapter usable without the rest of its folder.
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
    """Open a run in the trackers that `report_to` names. Every process calls it; only the main one opens anything.

    Args:
        run: the run folder; made if it is not there.
        settings: project, group, tags and notes.
        config: flat, as `ledger.run_config` makes it.
        job_type: what is being done, `train` or `eval`.
        resumed: whether to go on with the run that the folder already has. In W&B that is the same run where this part
            and the last are both online. Offline, W&B cannot resume: there it is a new run in the same group, whose
            config names the one before it (`resumed_from`) and the first (`origin`).

    Raises:
        UserError: if a tracker is not installed.
    """
    tracker = Tracker(run, resumed=resumed)
    if PartialState().is_main_process:
        config = dict(config)
        if config.get("gpu") is None and torch.cuda.is_available():
            config["gpu"] = torch.cuda.get_device_name()
        method = "full" if not config.get("use_peft") else "lora" if config["quantisation"] == "none" else "qlora"
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
        for name in [report_to] if isinstance(report_to, str) else report_to or ():
            if name in SINKS:
                tracker.open(name, about)
    return tracker


class Tracker:
    """A run in the trackers that `open_run` opened for it. On other processes than the main one it does nothing.

    Attributes:
        run: the run folder.
        state: what its tracking.json holds: `wandb`, the run there, and for each tracker `told`: the last step whose
            loss (`train`) and the last whose evaluation (`eval`) was told.
    """

    def __init__(self, run: str | Path, *, resumed: bool):
        self.run = Path(run)
        path = self.run / STATE_FILE
        self.state = {"wandb": None, "told": {}}
        if resumed and path.is_file():
            self.state = read_json(path, {"told": dict})
        self._sinks: dict[str, _Sink] = {}

    def open(self, name: str, about: Mapping[str, Any]) -> None:
        """Open the run in one tracker."""
        with self._forgiving(name):
            try:
                self._sinks[name] = SINKS[name](self, about)
                self.state["told"].setdefault(name, NOTHING.copy())
            except ImportError as error:
                raise UserError(
                    f"report_to names {name}, which is not installed; pip install {name}, or set report_to: none"
                ) from error
        self.save()

    def save(self) -> None:
        """Write tracking.json."""
        write_json(self.run / STATE_FILE, self.state)

    def watch(self, trainer: Trainer) -> None:
        """Let the Trainer's callbacks for these trackers join this run, and stand between them and the training."""
        for sink in SINKS.values():
            trainer.pop_callback(sink.trainer_callback)
        if self._sinks:
            trainer.add_callback(_Joining(self, {name: sink.callback() for name, sink in self._sinks.items()}))

    def publish_training(self, record: Mapping) -> None:
        """What is known when training has ended and the run folder is written: validation, cost, files, adapter."""
        self.tell_all("summarise", training_figures(record))
        self.tell_all("publish_training", record)

    def publish_evaluation(self, report: "Report") -> None:
        """What was judged: figures, predictions and other tables, plots and the report. The report is written."""
        figures = training_figures(report.record)
        for evaluation in report.evaluations:
            figures |= evaluation_figures(evaluation)
        self.tell_all("summarise", figures)
        self.tell_all("publish_evaluation", report)

    def finish(self) -> None:
        """End the run in every tracker."""
        self.tell_all("finish")

    def tell_all(self, method: str, *arguments: object) -> None:
        """Call a method of every tracker."""
        for name, sink in list(self._sinks.items()):
            self.tell(name, getattr(sink, method), *arguments)

    def tell(self, name: str, function: Callable, *arguments: object, **keywords: object) -> None:
        """Call a function of one tracker, unless that tracker has failed before."""
        if name in self._sinks:
            with self._forgiving(name):
                function(*arguments, **keywords)

    @contextmanager
    def _forgiving(self, name: str) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # whatever it is, it is not worth a training
            self._sinks.pop(name, None)
            logger.warning("%s failed and is left alone from here on: %s", name, " ".join(str(error).split()))


def training_figures(record: Mapping) -> dict[str, float]:
    """What stands for a training as a whole: `validation/...` of the checkpoint that was kept, and `cost/...`."""
    figures = {f"validation/{key.removeprefix('eval_')}": value for key, value in record["validation"].items()}
    return figures | {f"cost/{key}": value for key, value in run_cost(record).items()}


def evaluation_figures(evaluation: "Evaluation") -> dict[str, float]:
    """The figures of one evaluation, such as `snli-test/accuracy`, of the tuned model where no other is named."""
    tuned, comparison = evaluation.metrics["tuned"], evaluation.comparison
    low, high = tuned["accuracy_interval"]
    figures = {
        "pairs": tuned["n"],
        "accuracy": tuned["accuracy"],
        "accuracy_low": low,
        "accuracy_high": high,
        **{key: tuned[key] for key in ("macro_f1", "nll", "ece", "mass_on_labels")},
        **{f"f1_{label}".replace("-", "_"): per_label["f1"] for label, per_label in tuned["per_label"].items()},
        "difference": comparison.difference,
        "difference_low": comparison.interval[0],
        "difference_high": comparison.interval[1],
        "mcnemar_p": comparison.p_value,
    }
    for model in evaluation.models:
        if model != "tuned":
            figures[f"{model}_accuracy"] = evaluation.metrics[model]["accuracy"]
        free = evaluation.summary.get(model, {}).get("free_generation")
        if free:
            figures[f"{model}_names_no_label"] = free["invalid_share"]
    return {f"{_section(evaluation)}/{key}": figure for key, figure in figures.items()}


def _section(evaluation: "Evaluation") -> str:
    return evaluation.key.replace(".", "_")


class _Joining(TrainerCallback):
    """Passes the Trainer's events on to the callbacks of the trackers: each step once, with speed and memory."""

    def __init__(self, tracker: Tracker, callbacks: Mapping[str, TrainerCallback]):
        self._tracker = tracker
        self._callbacks = callbacks

    def on_train_begin(self, args, state, control, **kwargs):
        self._last = time.perf_counter(), state.global_step
        self._pass_on("on_train_begin", args, state, control, **kwargs)
        # A resumed training knows what was logged before its checkpoint, and a tracker may not: what a killed process
        # had not sent is lost, and where a run cannot be resumed all of it belongs to another run.
        for entry in state.log_history:
            at_that_step = copy.copy(state)
            at_that_step.global_step = entry["step"]
            self._log(args, at_that_step, control, {k: v for k, v in entry.items() if k != "step"}, **kwargs)

    def on_log(self, args, state, control, logs=None, **kwargs):
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
        """Tell each tracker what it has not been told: a resumed training repeats what came after its checkpoint, and
        the end of any training repeats an evaluation."""
        kind = "train" if "loss" in logs else "eval" if "eval_loss" in logs else None
        if kind == "eval":
            logs = logs | {"eval_global_step": state.global_step}
        for name, callback in self._callbacks.items():
            told = self._tracker.state["told"][name]
            if kind is None or state.global_step > told[kind]:
                self._tracker.tell(name, callback.on_log, args, state, control, logs=logs, **kwargs)
                told |= {kind: state.global_step} if kind else {}
        self._tracker.save()

    def on_save(self, *arguments, **keywords):
        self._pass_on("on_save", *arguments, **keywords)

    def on_predict(self, *arguments, **keywords):
        self._pass_on("on_predict", *arguments, **keywords)

    def on_train_end(self, *arguments, **keywords):
        self._pass_on("on_train_end", *arguments, **keywords)

    def _pass_on(self, event: str, *arguments, **keywords) -> None:
        for name, callback in self._callbacks.items():
            self._tracker.tell(name, getattr(callback, event), *arguments, **keywords)


def _memory_bytes() -> int:
    """The most GPU memory held so far; without a GPU, the RAM held now."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else psutil.Process().memory_info().rss


class _JoiningWandb(WandbCallback):
    def setup(self, args, state, model, **kwargs):
        # The run is open, and its config was made to be compared; this would add some 200 defaults, and nested ones.
        self._initialized = True


class _JoiningTrackio(TrackioCallback):
    def setup(self, args, state, model, **kwargs):
        self._initialized = True

    def on_train_end(self, args, state, control, **kwargs):
        pass  # what follows the training is part of the run; `Tracker.finish` ends it


class _Sink:
    """A run in one tracker. One without a place for files and tables leaves the last two methods as they are."""

    trainer_callback: type[TrainerCallback]

    def __init__(self, tracker: Tracker, about: Mapping[str, Any]):
        raise NotImplementedError

    def callback(self) -> TrainerCallback:
        """The Trainer's callback for this tracker, as part of this run."""
        raise NotImplementedError

    def summarise(self, figures: Mapping[str, float]) -> None:
        """Put figures that stand for the run as a whole beside its history."""
        raise NotImplementedError

    def finish(self) -> None:
        raise NotImplementedError

    def publish_training(self, record: Mapping) -> None:
        pass

    def publish_evaluation(self, report: "Report") -> None:
        pass


class _Wandb(_Sink):
    trainer_callback = WandbCallback

    def __init__(self, tracker: Tracker, about: Mapping[str, Any]):
        import wandb

        self._wandb, self._folder = wandb, tracker.run
        mode = wandb.setup().settings.mode
        if mode == "online" and not wandb.login(prompt=False, verify=False):
            logger.warning("Not logged in to W&B: this run stays offline. `wandb login`, then `wandb sync`, sends it.")
            mode = "offline"
        try:
            self._run = self._open(tracker, about, mode)
        except Exception as error:
            if mode != "online":
                raise
            logger.warning("W&B cannot be reached: this run stays offline. `wandb sync` sends it. (%s)", error)
            self._run = self._open(tracker, about, "offline")
        # Summaries hold the last value, so a resumed run tells how far it has come.
        summary = self._run.summary if self._run.resumed else {}
        tracker.state["told"]["wandb"] = {
            kind: int(summary.get(key, -1))
            for kind, key in (("train", "train/global_step"), ("eval", "eval/global_step"))
        }
        self._run.define_metric("train/global_step")
        self._run.define_metric("*", step_metric="train/global_step", step_sync=True)

    def _open(self, tracker: Tracker, about: Mapping[str, Any], mode: str):
        before = tracker.state["wandb"]
        about = dict(about)
        if before is None:
            pass
        elif before["mode"] == mode == "online":
            del about["job_type"]  # an evaluation that goes on with a training does not make it one
            about |= {"id": before["id"], "resume": "allow"}
        else:
            about["config"] = {**about["config"], "origin": before["origin"], "resumed_from": before["id"]}
        patience = self._wandb.setup().settings.finish_timeout or FINISH_SECONDS
        # Offline, where no address is to be told, its summary of some thirty figures would bury what we print.
        quiet = {"quiet": True} if mode == "offline" else {}
        settings = self._wandb.Settings(finish_timeout=patience, **quiet)
        run = self._wandb.init(**about, mode=mode, settings=settings)
        origin = before["origin"] if before else run.id
        tracker.state["wandb"] = {"id": run.id, "origin": origin, "mode": mode, "project": about["project"]}
        return run

    def callback(self) -> TrainerCallback:
        return _JoiningWandb()

    def summarise(self, figures: Mapping[str, float]) -> None:
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
        judged = evaluation_folders(self._folder)
        stale = {path for path in self._folder.glob("eval/*/*") if path.parent not in judged}
        for pattern in RUN_FILES:
            for path in set(self._folder.glob(pattern)) - stale:
                # A copy, where W&B would make a link: `wandb sync` must not send what the folder has become by then.
                copy = Path(self._run.dir, path.relative_to(self._folder))
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, copy)
                self._run.save(str(copy), base_path=self._run.dir, policy="now")

    def _artifact(self, name: str, kind: str, metadata: Mapping):
        return self._wandb.Artifact(re.sub(r"[^\w.-]", "-", name)[-128:], type=kind, metadata=dict(metadata))

    def _use(self, artifact) -> None:
        # W&B waits until the server has the artifact, however long that takes; here it is given a while.
        def use():
            with suppress(Exception):
                self._run.use_artifact(artifact)

        thread = Thread(target=use, daemon=True)
        thread.start()
        thread.join(USE_SECONDS)

    def _table(self, rows: Sequence[Mapping[str, object]]):
        return self._wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])


class _Trackio(_Sink):
    trainer_callback = TrackioCallback

    def __init__(self, tracker: Tracker, about: Mapping[str, Any]):
        import trackio

        self._trackio = trackio
        trackio.init(
            **{key: about[key] for key in ("project", "group", "name", "config")},
            space_id=about["config"].get("trackio_space_id"),
            resume="allow" if "trackio" in tracker.state["told"] else "never",
            embed=False,
        )

    def callback(self) -> TrainerCallback:
        return _JoiningTrackio()

    def summarise(self, figures: Mapping[str, float]) -> None:
        self._trackio.log(dict(figures))

    def finish(self) -> None:
        self._trackio.finish()


class _TensorBoard(_Sink):
    trainer_callback = TensorBoardCallback

    def __init__(self, tracker: Tracker, about: Mapping[str, Any]):
        from torch.utils.tensorboard import SummaryWriter

        self._tracker = tracker
        self._writer = SummaryWriter(os.environ.get("TENSORBOARD_LOGGING_DIR", str(tracker.run / "runs")))
        self._writer.add_text("config", f"```json\n{json.dumps(about['config'], indent=2, default=str)}\n```")

    def callback(self) -> TrainerCallback:
        callback = TensorBoardCallback()
        callback.logging_dir = self._writer.log_dir
        return callback

    def summarise(self, figures: Mapping[str, float]) -> None:
        for name, figure in figures.items():
            self._writer.add_scalar(name, figure, max(0, *self._tracker.state["told"]["tensorboard"].values()))

    def finish(self) -> None:
        self._writer.close()


# By the name that `report_to` has for them.
SINKS: dict[str, type[_Sink]] = {"wandb": _Wandb, "trackio": _Trackio, "tensorboard": _TensorBoard}


def evaluation_tables(evaluation: "Evaluation") -> dict[str, list[dict[str, object]]]:
    """The tables of one evaluation, row by row: predictions, confusion, per_label, and slices where there are any.

    Of more than `MOST_ROWS` pairs, so many are taken, evenly spaced; a line in the log says so.
    """
    table = evaluation.table.assign(bucket=evaluation.bucket)
    if len(table) > MOST_ROWS:
        logger.warning(
            "The W&B table of %s shows %s of %s pairs; the predictions artifact holds all.",
            evaluation.name,
            f"{MOST_ROWS:,}",
            f"{len(table):,}",
        )
        table = table.iloc[np.linspace(0, len(table) - 1, MOST_ROWS).astype(int)]
    columns = {"uid": "uid", "premise": "premise", "hypothesis": "hypothesis", "label": "gold", "bucket": "bucket"}
    for model in ("base", "tuned"):
        columns[f"{model}_prediction"] = model
        columns |= {f"{model}_p_{label}": f"{model}_p_{label}" for label in LABELS}
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
        "predictions": table[list(columns)].rename(columns=columns).to_dict("records"),
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
