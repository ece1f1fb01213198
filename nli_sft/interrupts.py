"""Ctrl-C: what a script says when it is stopped, and the command that goes on."""

import os
import shlex
import sys
import time
from functools import cache
from pathlib import Path

import psutil


def exit_message(output_dir: str | Path | None = None) -> str:
    """The sentence with which a stopped script ends.

    Args:
        output_dir: of a training. Where this process has written a checkpoint in it, the command goes on from there.
    """
    saved = output_dir is not None and _saved_since_start(Path(output_dir))
    if not saved:
        return f"Stopped by Ctrl-C. Start it again with: {command()}"
    return f"Stopped by Ctrl-C. Saved checkpoints are kept. Resume with: {command(resume=True)}"


def say_goodbye(output_dir: str | Path | None = None) -> None:
    """Write `exit_message`, once for all processes, and see that the launcher adds no traceback to it."""
    if os.environ.get("RANK", "0") == "0":
        sys.stderr.write(f"\n{exit_message(output_dir)}\n")
        sys.stderr.flush()
    end_launcher()


def end_launcher(patience: float = 10) -> None:
    """End torchrun, or accelerate with several processes, before it answers Ctrl-C with a traceback.

    It would when the last process has ended; the first one waits for the others, `patience` seconds at most.
    """
    if not is_elastic() or os.environ.get("LOCAL_RANK") != "0":
        return
    launcher, end = psutil.Process().parent(), time.monotonic() + patience
    while time.monotonic() < end:
        if all(child.pid == os.getpid() or child.status() == psutil.STATUS_ZOMBIE for child in launcher.children()):
            launcher.kill()  # it handles every other signal with a traceback
            return
        time.sleep(0.05)


def is_elastic() -> bool:
    """Whether torchrun, which accelerate uses for several processes, started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def command(resume: bool = False) -> str:
    """What the user typed to start this process, its launcher included; with `resume`, what goes on with it."""
    script, *arguments = sys.argv
    if resume:
        arguments = [*_without(arguments, ("resume_from_checkpoint", "overwrite_output_dir"))]
        arguments += ["--resume_from_checkpoint", "auto"]
    return shlex.join([*_launcher(script), script, *arguments])


@cache  # asked for at the start: by the end the launcher may be gone
def _launcher(script: str) -> list[str]:
    try:
        typed = psutil.Process().parent().cmdline()
        typed = typed[: typed.index(script)]
    except (ValueError, AttributeError, psutil.Error):
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
