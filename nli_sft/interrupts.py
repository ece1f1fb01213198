"""Ctrl-C: what a script says when it is stopped, and the command that goes on."""

import shlex
import sys
from functools import cache
from pathlib import Path

import psutil


def farewell(output_dir: str | Path | None = None) -> str:
    """The sentence with which a stopped script ends.

    Args:
        output_dir: of a training. Where this process has written a checkpoint in it, the command goes on from there.
    """
    saved = output_dir is not None and _saved_since_start(Path(output_dir))
    if not saved:
        return f"Stopped by Ctrl-C. Start it again with: {command()}"
    return f"Stopped by Ctrl-C; what was saved stays. Go on with: {command(resume=True)}"


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
