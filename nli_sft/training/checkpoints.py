"""Checkpoints for interrupted training, which resumes from the newest complete one and reaches the same weights.

A checkpoint is written under another name and renamed when all of it is on disk. Its `checkpoint.json` lists every
file with its size and hash, so that truncated or corrupted files are found; it also holds what the Trainer keeps in
memory only: the loss since the last log, the token count, the training time so far.

However training ends, the run folder can be resumed:

    SIGTERM (Slurm's preemption, a shutdown)   saved at the end of the step; exit status 143
    Ctrl-C                                     likewise, with status 130; a second Ctrl-C ends it at once
    SIGKILL, power, a process or worker dying  the newest complete checkpoint remains; other processes end with errors
    a full disk                                the partial checkpoint is removed, the one before remains
    a loss or gradient that is not a number    stopped before the weights change; the last good checkpoint remains
"""

import errno
import gc
import json
import logging
import math
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NoReturn

import torch
import xxhash
import yaml
from torch.distributed import DistError
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import rotate_checkpoints
from trl import SFTTrainer

from .. import UserError
from ..configs import AUTO
from ..data.prompts import Prompt
from ..interrupts import command, end_launcher
from ..runs import read_run, write_json, write_run
from . import private_api  # noqa: F401 (it checks what this module depends on)

logger = logging.getLogger(__name__)

MANIFEST = "checkpoint.json"

# The Trainer's state that a manifest holds.
PROGRESS = (
    "seconds",
    "loss_since_log",
    "last_logged_step",
    "total_loss",
    "trained_tokens",
    "metrics",
)

# Seconds after SIGTERM in which processes must agree to stop. When a process dies, torchrun and accelerate send the
# others SIGTERM, and SIGKILL 30 seconds later.
STOP_TIMEOUT = 25

# Seconds within which a second SIGINT under torchrun is the first one, forwarded by the launcher.
FORWARDING_TIME = 3

# The folder for checkpoints that are being written.
UNFINISHED = "_unfinished"


def find_checkpoint(wanted: str | None, run: str | Path) -> str | None:
    """The checkpoint that `resume_from_checkpoint` means, or `None` to start from the beginning.

    Args:
        wanted: `auto` for the newest complete one in `run`, if there is any; a folder; or `None`.
        run: the run folder.

    Raises:
        UserError: if the folder is not a complete checkpoint, or all checkpoints in `run` are damaged.
    """
    if wanted is None:
        return None
    if wanted != AUTO:
        flaw = find_damage(Path(wanted))
        if flaw is not None:
            raise UserError(f"resume_from_checkpoint {wanted}: {flaw}; give a checkpoint's folder, or auto")
        return wanted
    found, flaws = _newest_checkpoint(run)
    if found is None and flaws:
        raise UserError(
            f"{run} has no checkpoint to resume from: {'; '.join(flaws)}. Start again in another output_dir, or in "
            "this one with --overwrite_output_dir true and without resume_from_checkpoint"
        )
    for flaw in flaws:
        logger.warning("Skipping a checkpoint: %s/%s", run, flaw)
    return found


def _newest_checkpoint(run: str | Path) -> tuple[str | None, list[str]]:
    """The newest complete checkpoint, and what is wrong with newer ones."""
    flaws = []
    for folder in sorted(Path(run).glob("checkpoint-*"), key=_step, reverse=True):
        flaw = find_damage(folder)
        if flaw is None:
            return str(folder), flaws
        flaws.append(f"{folder.name}: {flaw}")
    return None, flaws


def is_finished(run: str | Path, recipe: Mapping[str, object]) -> bool:
    """Whether a run folder holds a finished training with this recipe."""
    if not (Path(run) / "run.json").is_file():
        return False
    saved, _, _ = read_run(run)
    new = yaml.safe_load(yaml.safe_dump(dict(recipe)))  # as YAML reads it back
    return all(saved.get(key) == new.get(key) for key in {*saved, *new} - {"resume_from_checkpoint"})


def find_damage(checkpoint: Path) -> str | None:
    """Why training cannot resume from a folder, or `None` if it can."""
    if not (checkpoint / TRAINER_STATE_NAME).is_file():
        return f"it has no {TRAINER_STATE_NAME}"
    if not (checkpoint / MANIFEST).is_file():
        return f"it has no {MANIFEST}, so it may be incomplete"
    try:
        manifest = _read(checkpoint)
        files = {checkpoint / name: (one["bytes"], one["xxh3"]) for name, one in manifest["files"].items()}
        missing = set(PROGRESS) - set(manifest["progress"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"its {MANIFEST} is damaged"
    if missing:
        return f"its {MANIFEST} lacks {', '.join(sorted(missing))}"
    for file, (size, _) in files.items():
        if not file.is_file():
            return f"{file.relative_to(checkpoint)} is missing"
        if file.stat().st_size != size:
            return (
                f"{file.relative_to(checkpoint)} has {file.stat().st_size:,} bytes, not the {size:,} that were written"
            )
    if not any(checkpoint.glob("rng_state*")):
        return "it was written with save_only_model, without the optimizer"
    hashes = zip(files, _hash_all(files), strict=True)
    changed = next((file for file, found in hashes if found != files[file][1]), None)
    return None if changed is None else f"{changed.relative_to(checkpoint)} has changed since it was written"


def ignore_sigterm(_worker: int) -> None:
    """A data loader's `worker_init_fn`: workers ignore Ctrl-C, and SIGTERM unless the trainer sent it.

    Slurm, torchrun and `timeout` signal the whole process group, and the trainer needs its workers to finish the step
    before it saves.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):  # macOS and Windows do not report the sender of a signal
        return

    def listen() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=listen, daemon=True).start()


class ResumableTrainer(SFTTrainer):
    """An `SFTTrainer` that writes checkpoints atomically, saves when it is interrupted, and resumes exactly.

    Attributes:
        earlier_seconds: training time before the checkpoint from which it resumes; else 0.
        made_from: recipe, prompt and record of the run, as `runs.write_run` takes them, or `None`. With them every
            checkpoint is a run folder too, which can be evaluated.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.add_callback(_Watch(self))
        self.earlier_seconds = 0.0
        self.made_from: tuple[Mapping, Prompt, Mapping] | None = None
        self._stop_signal: signal.Signals | None = None
        self._signal_time = 0.0
        self._agreed_to_stop = threading.Event()
        self._saving = False
        self._loss_is_finite = True

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """Train, from a checkpoint that `find_checkpoint` found or from the beginning.

        Args:
            resume_from_checkpoint: a checkpoint's folder; or, as for `Trainer`, whether to take the newest one.

        Raises:
            SystemExit: with status 143 after SIGTERM, or 130 after Ctrl-C, once the checkpoint is written.
            UserError: if the disk is full, the loss is not a number, or a data loader worker or another process died.
        """
        if isinstance(resume_from_checkpoint, bool):
            wanted = AUTO if resume_from_checkpoint else None
            resume_from_checkpoint = find_checkpoint(wanted, self._run)
        self._resumed_from = resume_from_checkpoint
        self._began = time.perf_counter()
        eval_on_start = self.args.eval_on_start
        self._stop_signal = None
        handlers = {number: signal.signal(number, self._remember) for number in (signal.SIGTERM, signal.SIGINT)}
        # Twice: the pipe to a worker breaks when it dies, and torch raises again on SIGCHLD.
        dead_workers = _DeadWorkers(self.args.dataloader_num_workers)
        # Under torchrun and accelerate, SIGTERM may mean that a process has died for which this one is waiting.
        elastic = self.args.world_size > 1 and "TORCHELASTIC_RUN_ID" in os.environ
        with dead_workers, dead_workers, _StopSignals(self) if elastic else nullcontext():
            try:
                return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
            except RuntimeError as error:
                if not _is_lost_process(error):
                    raise
                if elastic:  # its SIGTERM would end this process before it can report the error
                    handlers[signal.SIGTERM] = signal.SIG_IGN
                raise UserError(
                    f"another process of this training ended after step {self.state.global_step} (it was killed, or "
                    f"reports its own error): {self._resume_hint()}, on any number of processes"
                ) from error
            finally:
                for number, handler in handlers.items():
                    signal.signal(number, handler)
                self.args.eval_on_start = eval_on_start
        with dead_workers:
            time.sleep(0.5)  # the second error may still come
        with dead_workers:
            gc.collect()  # as long as the loader exists, every process that ends raises the error again
        raise UserError(
            f"a data loader worker died after step {self.state.global_step}, often because RAM ran out "
            f"({dead_workers.reason}): resume with resume_from_checkpoint: auto, and with fewer "
            "dataloader_num_workers if it happens again"
        )

    def _remember(self, number, _frame) -> None:
        # torchrun forwards signals that its processes have already received from the terminal.
        forwarded = "TORCHELASTIC_RUN_ID" in os.environ and time.monotonic() - self._signal_time < FORWARDING_TIME
        if number == signal.SIGINT and self._stop_signal == signal.SIGINT and not forwarded:
            end_launcher()
            os._exit(128 + signal.SIGINT)
        if number == signal.SIGINT and self._stop_signal is None and self.args.process_index == 0:
            # Not by print, which may be what was interrupted.
            os.write(2, b"\nStopping after this step or evaluation and a save. Press Ctrl-C again to stop at once.\n")
        if self._stop_signal is None:
            self._stop_signal, self._signal_time = signal.Signals(number), time.monotonic()

    @property
    def _run(self) -> Path:
        return Path(str(self.args.output_dir))

    def _resume_hint(self) -> str:
        newest, _ = _newest_checkpoint(self._run)
        start = f"resume from {Path(newest).name}" if newest else "start again from the beginning"
        return f"{start} with resume_from_checkpoint: {AUTO}"

    def _save_checkpoint(self, model, trial) -> None:
        run, name = self._run, f"checkpoint-{self.state.global_step}"
        unfinished, final = run / UNFINISHED / name, run / name
        if self.args.should_save:
            shutil.rmtree(run / UNFINISHED, ignore_errors=True)  # of a process that was killed
        self.accelerator.wait_for_everyone()
        progress = self._progress()
        try:
            self._saving = True
            super()._save_checkpoint(model, trial)
            self._saving = False
            self.accelerator.wait_for_everyone()
            if self.state.best_global_step == self.state.global_step:
                self.state.best_model_checkpoint = str(final)
            if self.args.should_save:
                self.state.save_to_json(str(unfinished / TRAINER_STATE_NAME))
                self._write_made_from(unfinished, final, progress)
                _write_manifest(unfinished, progress)
                shutil.rmtree(final, ignore_errors=True)
                os.replace(unfinished, final)
        except Exception as error:
            full = _is_disk_full(error, run)
            shutil.rmtree(run / UNFINISHED, ignore_errors=True)
            if not full:
                raise
            raise UserError(
                f"the disk that holds {run} is full: {name} could not be written. Free some space, then "
                f"{self._resume_hint()}"
            ) from error
        finally:
            self._saving = False
        if self.args.should_save:
            shutil.rmtree(run / UNFINISHED, ignore_errors=True)
            rotate_checkpoints(
                output_dir=str(run),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )
        self.accelerator.wait_for_everyone()

    def _write_made_from(self, folder: Path, final: Path, progress: Mapping) -> None:
        if self.made_from is None:
            return
        recipe, prompt, record = self.made_from
        history, step = self.state.log_history, self.state.global_step
        metrics = next((entry for entry in history if entry["step"] == step and "eval_accuracy" in entry), {})
        so_far = {
            "train": {"train_runtime": progress["seconds"]},
            "validation": {key: value for key, value in metrics.items() if key.startswith("eval_")},
            "best_checkpoint_step": self.state.best_global_step,
            "history": history,
            "seconds": progress["seconds"],
        }
        write_run(folder, recipe=recipe, prompt=prompt, record={**record, **so_far}, name=final)

    def _init_training_state(self, max_steps, *args, **kwargs):
        # Fractions of all steps become numbers of steps before the Trainer compares them with a checkpoint's state.
        # Where they differ, the new ones count.
        for name in ("logging_steps", "eval_steps", "save_steps"):
            steps = getattr(self.args, name)
            if steps is not None and steps < 1:
                setattr(self.args, name, math.ceil(max_steps * steps))
        done = super()._init_training_state(max_steps, *args, **kwargs)
        self.state.compute_steps(self.args, max_steps)
        return done

    def _issue_warnings_after_load(self, load_result) -> None:
        # A tied weight is one tensor with two names, of which a file holds one.
        assert self.model is not None
        named = dict(self.model.named_parameters(remove_duplicate=False))
        missing = [name for name in load_result.missing_keys if name in named]
        loaded = {id(tensor) for name, tensor in named.items() if name not in missing}
        tied = {name for name in missing if id(named[name]) in loaded}
        keys = [name for name in load_result.missing_keys if name not in tied]
        super()._issue_warnings_after_load(type(load_result)(keys, load_result.unexpected_keys))

    def _use_learning_rate(self) -> None:
        """Use the recipe's learning rate; optimizer and scheduler were loaded with that of the checkpoint."""
        scheduler: Any = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)
        optimizer: Any = self.optimizer
        for index, before in enumerate(getattr(scheduler, "base_lrs", [])):
            if before and before != self.args.learning_rate:
                group = optimizer.param_groups[index]
                group["lr"] = group["lr"] * self.args.learning_rate / before
                group["initial_lr"] = scheduler.base_lrs[index] = self.args.learning_rate
                scheduler._last_lr[index] = group["lr"]  # for the next log

    def _get_output_dir(self, trial) -> str:
        folder = super()._get_output_dir(trial)
        return str(Path(folder, UNFINISHED)) if self._saving else folder

    def _reduce(self, tensor: torch.Tensor, reduction: str) -> torch.Tensor:
        reduced = self.accelerator.reduce(tensor, reduction=reduction)
        assert isinstance(reduced, torch.Tensor)  # accelerate reduces nested tensors, too
        return reduced

    def _progress(self) -> dict[str, Any]:
        """What the Trainer keeps in memory only, between one log and the next."""
        return {
            "seconds": self.earlier_seconds + time.perf_counter() - self._began,
            # Averaged over the processes, as in the log.
            "loss_since_log": self._reduce(self._tr_loss, "mean").item(),
            "last_logged_step": self._globalstep_last_logged,
            "total_loss": self._total_loss_scalar,
            "trained_tokens": self._total_train_tokens,
            "metrics": dict(self._metrics["train"]),
        }

    def _restore_progress(self, progress: Mapping[str, Any]) -> None:
        self.earlier_seconds = progress["seconds"]
        self._tr_loss += progress["loss_since_log"]
        self._globalstep_last_logged = progress["last_logged_step"]
        self._total_loss_scalar = progress["total_loss"]
        self._total_train_tokens = progress["trained_tokens"]
        self._metrics["train"].update(progress["metrics"])
        # The run folder may have been moved since the path in the state was written.
        best = self._run / f"checkpoint-{self.state.best_global_step}"
        if self.state.best_global_step and best.is_dir():
            self.state.best_model_checkpoint = str(best)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As TRL's, but loss, runtime and speeds of a resumed run are those of the whole run.

        With loss scaling, logs `loss_scale` too, and no `grad_norm` for skipped steps, where it is not a number.
        """
        if "train_loss" in logs:
            steps = self.state.global_step
            logs["train_loss"] = self._total_loss_scalar / max(steps, 1)
            seconds = logs["train_runtime"] + self.earlier_seconds
            batch = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
            logs["train_steps_per_second"] = round(steps / seconds, 3)
            logs["train_samples_per_second"] = round(batch * steps / seconds, 3)
            logs["train_runtime"] = seconds
        if self.accelerator.scaler is not None and "grad_norm" in logs:
            logs["loss_scale"] = self.accelerator.scaler.get_scale()
            if not math.isfinite(logs["grad_norm"]):
                del logs["grad_norm"]
        super().log(logs, start_time)

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self._loss_is_finite &= math.isfinite(loss)
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm)
        # Loss scaling tries scales that are too large, and skips the step when the gradient overflows.
        scaled = self.accelerator.scaler is not None or self.is_deepspeed_enabled
        self._loss_is_finite &= scaled or math.isfinite(norm)  # pyright: ignore[reportArgumentType] (a number here)
        return norm

    def first_bad_step(self) -> int | None:
        """The step whose loss or gradient was not finite, for trainers that know it only later; called before logs."""
        return None

    def _any_process(self, *flags: bool) -> list[bool]:
        """Whether a flag is set on any process, for each flag."""
        if self.accelerator.num_processes == 1:
            return list(flags)
        counts = torch.tensor(flags, dtype=torch.int32, device=self.args.device)
        return self._reduce(counts, "sum").bool().tolist()


class _StopSignals(AbstractContextManager):
    """Ends a process that waits in a collective for a dead one, where the signal handler is never called.

    Python runs signal handlers between two instructions of the main thread. The number of the signal, however, is
    written to a socket at once, and another thread reads it.
    """

    def __init__(self, trainer: ResumableTrainer):
        self._trainer = trainer

    def __enter__(self):
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._trainer._agreed_to_stop.clear()
        self._before = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._listen, daemon=True).start()

    def __exit__(self, *exception):
        self._trainer._agreed_to_stop.set()
        signal.set_wakeup_fd(self._before)
        self._writer.close()

    def _listen(self) -> None:
        while number := self._reader.recv(1):
            if number[0] in (signal.SIGTERM, signal.SIGINT) and not self._trainer._agreed_to_stop.wait(STOP_TIMEOUT):
                trainer, name = self._trainer, signal.Signals(number[0]).name
                sys.stderr.write(
                    f"error: {name} received after step {trainer.state.global_step}, but some processes did not "
                    f"respond within {STOP_TIMEOUT} s and may have died: {trainer._resume_hint()}\n"
                )
                sys.stderr.flush()
                os._exit(128 + number[0])


class _DeadWorkers(AbstractContextManager):
    """Suppresses the errors that torch raises, anywhere in the program, when a data loader worker has died.

    Attributes:
        reason: the latest one, as text: the error itself would keep the loader alive.
    """

    def __init__(self, workers: int):
        self.workers = workers
        self.reason = ""

    def __exit__(self, kind, error, traceback) -> bool:
        # Errors that a worker passes on, which also mention it, are no deaths.
        died = isinstance(error, RuntimeError) and "DataLoader worker (pid" in str(error)
        suppressed = self.workers > 0 and (died or isinstance(error, (ConnectionError, EOFError)))
        if suppressed:
            self.reason = str(error).partition("\n")[0].strip(" .") or type(error).__name__
        return suppressed


class _Watch(TrainerCallback):
    """Restores what a manifest adds to the Trainer's state, and checks once a step whether to stop."""

    def __init__(self, trainer: ResumableTrainer):
        self._trainer = trainer
        self._stopping = False

    def on_train_begin(self, args, state, control, **kwargs):
        if self._trainer._resumed_from is not None:
            self._trainer._restore_progress(_read(Path(self._trainer._resumed_from))["progress"])
            self._trainer._use_learning_rate()
            args.eval_on_start = False  # the base was evaluated when the run began

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        finite, self._trainer._loss_is_finite = self._trainer._loss_is_finite, True
        self._stopping, not_finite = self._trainer._any_process(self._trainer._stop_signal is not None, not finite)
        if self._stopping:
            self._trainer._agreed_to_stop.set()
        if not_finite:
            self._refuse(state.global_step + 1, args)

    def _refuse(self, step: int, args) -> NoReturn:
        last, _ = _newest_checkpoint(args.output_dir)
        raise UserError(
            f"the loss or its gradient is not a number at step {step}, so training was stopped; "
            + (f"{Path(last).name} is the last good checkpoint. " if last else "there is no checkpoint yet. ")
            + "Resume with resume_from_checkpoint: auto and a lower learning_rate"
            + (", or with precision: fp32" if args.fp16 else "")
        )

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_log or control.should_evaluate or control.should_save or control.should_training_stop:
            bad = self._trainer.first_bad_step()
            if bad is not None:
                self._refuse(bad, args)
        # At the end of an epoch an evaluation may follow, whose result belongs in the checkpoint.
        if self._stopping and not float(state.epoch).is_integer():
            control.should_save = True

    def on_epoch_end(self, args, state, control, **kwargs):
        if self._stopping:
            control.should_save = True

    def on_save(self, args, state, control, **kwargs):
        if self._stopping:
            number = self._trainer._stop_signal or signal.SIGTERM  # another process received it
            if args.process_index == 0:
                name = "Ctrl-C" if number == signal.SIGINT else number.name
                resume = command(resume=True)
                logger.warning("Stopped by %s; step %d is saved. Resume with: %s", name, state.global_step, resume)
            sys.exit(128 + number)


def _write_manifest(folder: Path, progress: Mapping[str, object]) -> None:
    """Write a checkpoint's list of files, once all of them have reached the disk."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    listed = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "xxh3": found}
        for path, found in zip(files, _hash_all(files), strict=True)
    }
    write_json(folder / MANIFEST, {"files": listed, "progress": progress})


def _hash_all(files: Iterable[Path]) -> list[str]:
    """XXH3 of each file: about 10 GB a second, much faster than writing them."""
    with ThreadPoolExecutor(max_workers=4) as pool:
        return list(pool.map(_hash, files))


def _hash(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def _read(checkpoint: Path) -> dict:
    return json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))


def _step(checkpoint: Path) -> int:
    number = checkpoint.name.removeprefix("checkpoint-")
    return int(number) if number.isdecimal() else -1


def _is_lost_process(error: RuntimeError) -> bool:
    """Whether a collective failed. NCCL raises an error of its own, Gloo a `RuntimeError` that names its source."""
    return isinstance(error, DistError) or "/gloo/" in str(error)


def _is_disk_full(error: BaseException, folder: Path) -> bool:
    """Whether an error comes from a full disk. Those of torch and safetensors have no errno."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return "No space left" in str(error) or shutil.disk_usage(folder).free < 2**20
