"""Trainings that are killed from outside, and go on with `--resume_from_checkpoint auto`."""

import json
import random
import signal
import subprocess
import time

import psutil
import pytest
from launching import launch, launch_command
from safetensors.torch import load_file

AUTO = ["--resume_from_checkpoint", "auto"]
OPTIONS = ["--num_train_epochs", "5", "--per_device_train_batch_size", "8", "--eval_strategy", "steps"]
OPTIONS += ["--save_strategy", "steps", "--eval_steps", "3", "--save_steps", "3", "--logging_steps", "2"]


def start(recipe, output, *arguments, cwd, processes=1):
    command = launch_command("sft.py", "--config", recipe, "--output_dir", output, *arguments, processes=processes)
    with (cwd / f"{output.name}.log").open("a") as log:
        return subprocess.Popen(command, cwd=cwd, stdout=log, stderr=log, stdin=subprocess.DEVNULL)


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition() and process.poll() is None:
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.01)


def workers(launcher):
    """The processes that train, below the one that a user starts."""
    below = psutil.Process(launcher.pid).children(recursive=True)
    return [process for process in below if any(part.endswith("sft.py") for part in process.cmdline())]


def kill(launcher):
    """All of it at once, as when the power goes."""
    for process in psutil.Process(launcher.pid).children(recursive=True):
        process.kill()
    launcher.kill()
    launcher.wait()


def ended_the_same(output, whole):
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (output, whole))
    assert all(first[name].equal(second[name]) for name in second)
    timed = ("runtime", "per_second", "flos", "memory_gib")
    histories = []
    for folder in (output, whole):
        history = json.loads((folder / "run.json").read_text())["history"]
        histories.append([{k: v for k, v in entry.items() if not k.endswith(timed)} for entry in history])
    assert histories[0] == histories[1]


@pytest.fixture(scope="module")
def whole(workspace, recipe):
    """The run that was never killed."""
    output = workspace / "outputs" / "whole"
    result = launch("sft.py", "--config", recipe, "--output_dir", output, *OPTIONS, cwd=workspace)
    assert result.returncode == 0, result.output
    return output


def test_sigterm_saves_and_auto_goes_on(whole, recipe, workspace):
    """As Slurm preempts a job: SIGTERM to every process of it, and the same command again."""
    output = workspace / "outputs" / "preempted"
    process = start(recipe, output, *OPTIONS, *AUTO, cwd=workspace)
    wait_for(lambda: (output / "checkpoint-6").is_dir(), process)
    assert process.poll() is None, "it ended before it could be told to"
    (worker,) = workers(process)
    worker.send_signal(signal.SIGTERM)
    assert process.wait(60) != 0
    log = (workspace / "preempted.log").read_text()
    assert "No checkpoint yet: starting from the beginning." in log
    assert "Stopped by SIGTERM after step" in " ".join(log.split())
    assert not (output / "run.json").exists(), "a run that is not at its end does not look like one"
    result = launch("sft.py", "--config", recipe, "--output_dir", output, *OPTIONS, *AUTO, cwd=workspace)
    assert result.returncode == 0, result.output
    assert "Going on from" in result.output
    ended_the_same(output, whole)
    # Queued once more: what is finished is left alone, unless the recipe asks for more of it.
    before = (output / "run.json").read_bytes()
    result = launch("sft.py", "--config", recipe, "--output_dir", output, *OPTIONS, *AUTO, cwd=workspace)
    assert "is finished." in " ".join(result.output.split())
    assert (output / "run.json").read_bytes() == before
    more = [*OPTIONS, "--num_train_epochs", "6"]
    result = launch("sft.py", "--config", recipe, "--output_dir", output, *more, *AUTO, cwd=workspace)
    assert json.loads((output / "run.json").read_text())["history"][-1]["epoch"] == 6, result.output


def test_a_process_of_two_dies(recipe, workspace):
    options = [*OPTIONS, "--per_device_train_batch_size", "4"]
    whole, output = workspace / "outputs" / "two-whole", workspace / "outputs" / "two-killed"
    result = launch("sft.py", "--config", recipe, "--output_dir", whole, *options, cwd=workspace, processes=2)
    assert result.returncode == 0, result.output
    process = start(recipe, output, *options, *AUTO, cwd=workspace, processes=2)
    wait_for(lambda: (output / "checkpoint-6").is_dir(), process)
    own = workers(process)
    assert len(own) >= 2
    own[-1].kill()
    assert process.wait(120) != 0
    arguments = ["--config", recipe, "--output_dir", output, *options, *AUTO]
    result = launch("sft.py", *arguments, cwd=workspace, processes=2)
    assert result.returncode == 0, result.output
    ended_the_same(output, whole)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_killed_at_any_moment(whole, recipe, workspace, seed):
    """SIGKILL between the first step and the last file, and again while it goes on; then to the end."""
    output = workspace / "outputs" / f"killed-{seed}"
    moment = random.Random(seed)
    for _ in range(2):
        process = start(recipe, output, *OPTIONS, *AUTO, cwd=workspace)
        log = workspace / f"{output.name}.log"
        begun = log.read_text().count("pairs to train on")
        wait_for(lambda: log.read_text().count("pairs to train on") > begun, process)  # noqa: B023
        time.sleep(moment.uniform(0, 6))
        if process.poll() is None:
            kill(process)
    result = launch("sft.py", "--config", recipe, "--output_dir", output, *OPTIONS, *AUTO, cwd=workspace)
    assert result.returncode == 0, result.output
    ended_the_same(output, whole)
