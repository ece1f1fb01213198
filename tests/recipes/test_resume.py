"""Trainings that are killed from outside, and go on with `--resume_from_checkpoint auto`."""

import json
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from launching import ddp_command, launch, launch_command
from safetensors.torch import load_file

from nli_sft.training.checkpoints import MANIFEST, find_checkpoint

AUTO = ["--resume_from_checkpoint", "auto"]
OPTIONS = ["--num_train_epochs", "5", "--per_device_train_batch_size", "8", "--eval_strategy", "steps"]
OPTIONS += ["--save_strategy", "steps", "--eval_steps", "3", "--save_steps", "3", "--logging_steps", "2"]


def start(recipe, output, *arguments, cwd, command=launch_command):
    command = command("sft.py", "--config", recipe, "--output_dir", output, *arguments)
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
    histories = [
        [{key: value for key, value in entry.items() if not key.endswith(timed)} for entry in history(folder)]
        for folder in (output, whole)
    ]
    assert histories[0] == histories[1]


def history(folder):
    return json.loads((folder / "run.json").read_text())["history"]


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
    process = start(recipe, output, *OPTIONS, *AUTO, "--dataloader_num_workers", "2", cwd=workspace)
    wait_for(lambda: (output / "checkpoint-6").is_dir(), process)
    assert process.poll() is None, "it ended before it could be told to"
    trainer, *data_workers = workers(process)
    assert len(data_workers) == 2
    for told in (*data_workers, trainer, process):
        told.send_signal(signal.SIGTERM)
    assert process.wait(60) != 0
    psutil.wait_procs([trainer], timeout=60)
    log = (workspace / "preempted.log").read_text()
    assert "No checkpoint yet: starting from the beginning." in log
    assert "Stopped by SIGTERM after step" in " ".join(log.split())
    assert not (output / "run.json").exists(), "a run that is not at its end does not look like one"
    # As if it had taken long until then.
    manifest = Path(find_checkpoint("auto", output)) / MANIFEST
    seconds = json.loads(manifest.read_text())["progress"]["seconds"]
    manifest.write_text(manifest.read_text().replace(str(seconds), "1000.0"))
    result = launch("sft.py", "--config", recipe, "--output_dir", output, *OPTIONS, *AUTO, cwd=workspace)
    assert result.returncode == 0, result.output
    assert "Resuming from" in result.output
    ended_the_same(output, whole)
    record = json.loads((output / "run.json").read_text())
    training = record["resources"]["phases"]["training"]
    assert 1000 < record["train"]["train_runtime"] < training["seconds"] < record["seconds"] < 1200
    assert training["pairs_per_second"] == pytest.approx(5 * 96 / training["seconds"])
    # Queued once more: what is finished is left alone.
    before = (output / "run.json").read_bytes()
    result = launch("sft.py", "--config", recipe, "--output_dir", output, *OPTIONS, *AUTO, cwd=workspace)
    assert "is finished." in " ".join(result.output.split())
    assert (output / "run.json").read_bytes() == before


def test_a_checkpoint_of_a_prompt_that_reads_otherwise_is_refused(whole, recipe, workspace, tmp_path):
    """Nothing in the recipe changed: the template that came with the base did."""
    changed = shutil.copytree(workspace / "base", tmp_path / "base")
    template = changed / "chat_template.jinja"
    template.write_text("Be brief. " + template.read_text())
    checkpoint = find_checkpoint("auto", whole)
    arguments = ["--model_name_or_path", changed, "--resume_from_checkpoint", checkpoint]
    result = launch("sft.py", "--config", recipe, "--output_dir", tmp_path / "run", *arguments, cwd=workspace)
    assert result.returncode != 0
    assert "the prompt as rendered differs from what was trained" in " ".join(result.output.split())
    assert not (tmp_path / "run").exists()


def of_two(options):
    return [*options, "--lora_dropout", "0", "--per_device_train_batch_size", "4"]


def broken_off(recipe, workspace, name):
    """A training by two processes that has reached its second checkpoint: (launcher, its processes, run folder)."""
    output = workspace / "outputs" / name
    process = start(recipe, output, *of_two(OPTIONS), *AUTO, cwd=workspace, command=ddp_command)
    wait_for(lambda: (output / "checkpoint-6").is_dir(), process)
    own = workers(process)
    assert sorted(worker.environ()["LOCAL_RANK"] for worker in own) == ["0", "1"]
    return process, {worker.environ()["LOCAL_RANK"]: worker for worker in own}, output


def test_a_process_of_two_dies(recipe, workspace):
    """The other says so and ends, and the training goes on, on two processes as on one."""
    whole = workspace / "outputs" / "two-whole"
    result = launch("sft.py", "--config", recipe, "--output_dir", whole, *of_two(OPTIONS), cwd=workspace, processes=2)
    assert result.returncode == 0, result.output
    process, own, output = broken_off(recipe, workspace, "two-killed")
    own["1"].kill()
    assert process.wait(60) != 0
    log = " ".join((workspace / "two-killed.log").read_text().split())
    said = re.search(r"error: another process of this training has ended, after step \d+ .*? on any number", log)
    assert re.search(r"go on from checkpoint-\d+ with resume_from_checkpoint: auto", said[0]), log
    assert 'nli_sft/training/checkpoints.py", line' not in log, "a traceback of ours"

    on_one = shutil.copytree(output, workspace / "outputs" / "two-then-one")
    arguments = ["--config", recipe, *AUTO, "--output_dir"]
    result = launch("sft.py", *arguments, output, *of_two(OPTIONS), cwd=workspace, processes=2)
    assert result.returncode == 0, result.output
    ended_the_same(output, whole)
    batch = ["--per_device_train_batch_size", "8"]  # as many in all
    result = launch("sft.py", *arguments, on_one, *of_two(OPTIONS), *batch, cwd=workspace)
    assert "Resuming from" in result.output, result.output
    losses = [[entry["loss"] for entry in history(folder) if "loss" in entry] for folder in (on_one, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    assert history(on_one)[-1]["step"] == history(whole)[-1]["step"]


@pytest.mark.slow
def test_sigterm_while_another_process_hangs(recipe, workspace):
    """As under NCCL, where nothing tells of a dead process: the one that waits for it cannot see a signal either."""
    process, own, output = broken_off(recipe, workspace, "two-stopped")
    own["1"].suspend()
    time.sleep(1)
    process.terminate()
    assert process.wait(60) != 0
    log = " ".join((workspace / f"{output.name}.log").read_text().split())
    assert re.search(r"error: told to stop \(SIGTERM\) after step \d+, but not all .* go on from checkpoint-\d+", log)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_killed_at_any_moment(whole, recipe, workspace, seed):
    """SIGKILL between the first step and the last file, and again while it goes on; then to the end."""
    output = workspace / "outputs" / f"killed-{seed}"
    moment = random.Random(seed)
    for _ in range(2):
        process = start(recipe, output, *OPTIONS, *AUTO, cwd=workspace)
        log = workspace / f"{output.name}.log"
        begun = log.read_text().count(" training pairs, ")
        wait_for(lambda: log.read_text().count(" training pairs, ") > begun, process)  # noqa: B023
        time.sleep(moment.uniform(0, 6))
        if process.poll() is None:
            kill(process)
    result = launch("sft.py", "--config", recipe, "--output_dir", output, *OPTIONS, *AUTO, cwd=workspace)
    assert result.returncode == 0, result.output
    ended_the_same(output, whole)
