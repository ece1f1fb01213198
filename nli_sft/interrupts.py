"""Messages after Ctrl-C, and the command that resumes."""

import os
import shlex
import sys
import time
from functools import cache
from pathlib import Path

import psutil


def exit_message(output_dir: str | Path | None = None) -> str:
    """The last message of a stopped script.

    Args:
        output_dir: of a training. If this process has saved a checkpoint in it, the command resumes from there.
    """
    saved = output_dir is not None and _saved_since_start(Path(output_dir))
    if not saved:
        return f"Stopped by Ctrl-C. Start again with: {command()}"
    return f"Stopped by Ctrl-C. Saved checkpoints are kept. Resume with: {command(resume=True)}"


def say_goodbye(output_dir: str | Path | None = None) -> None:
    """Print `exit_message` on the main process, and keep the launcher from adding a traceback."""
    if os.environ.get("RANK", "0") == "0":
        sys.stderr.write(f"\n{exit_message(output_dir)}\n")
        sys.stderr.flush()
    end_launcher()


def end_launcher(patience: float = 10) -> None:
    """Kill torchrun, or accelerate with several processes, before it prints a traceback.

    It prints one when its last process ends. The first process waits up to `patience` seconds for the others.
    """
    if not is_elastic() or os.environ.get("LOCAL_RANK") != "0":
        return
    launcher, end = psutil.Process().parent(), time.monotonic() + patience
    while launcher is not None and time.monotonic() < end:
        if all(child.pid == os.getpid() or child.status() == psutil.STATUS_ZOMBIE for child in launcher.children()):
            launcher.kill()  # it prints a traceback on every other signal
            return
        time.sleep(0.05)


def is_elastic() -> bool:
    """Whether torchrun started this process. accelerate uses it for several processes."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def command(resume: bool = False) -> str:
    """The command that started this process, with its launcher; with `resume`, the one that resumes it."""
    script, *arguments = sys.argv
    if resume:
        arguments = [*_without(arguments, ("resume_from_checkpoint", "overwrite_output_dir"))]
        arguments += ["--resume_from_checkpoint", "auto"]
    return shlex.join([*_launcher(script), script, *arguments])


@cache  # filled at the start: later the launcher may be gone
def _launcher(script: str) -> list[str]:
    try:
        parent = psutil.Process().parent()
        typed = parent.cmdline() if parent else []
        typed = typed[: typed.index(script)]
    except (ValueError, psutil.Error):
        return ["python"]
    if len(typed) > 1 and Path(typed[1]).name in ("accelerate", "torchrun"):
        return [Path(typed[1]).name, *typed[2:]]
    return ["python", *typed[1:]] if len(typed) > 1 else ["python"]


def _without(arguments: list[str], keys: tuple[str, ...]) -> list[str]:
    kept, dropping = [], False
    for argument in arguments:
        if argument.startswith("--"):
            dropping = argument[2:].partition("=")[0] in keys
        if not dropping:
            kept.append(argument)
    return kept


def _saved_since_start(output_dir: Path) -> bool:
    began = psutil.Process().create_time()
    return any(path.stat().st_mtime >= began for path in output_dir.glob("checkpoint-*/checkpoint.json"))
