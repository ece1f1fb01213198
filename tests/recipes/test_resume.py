"""Trainings that are killed and resume with `--resume_from_checkpoint auto`."""

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
from launching import accelerate_command, ddp_command, launch
from safetensors.torch import load_file

from nli_sft.training.checkpoints import MANIFEST, find_checkpoint

AUTO = ["--resume_from_checkpoint", "auto"]
OPTIONS = ["--num_train_epochs", "5", "--per_device_train_batch_size", "8", "--eval_strategy", "steps"]
OPTIONS += ["--save_strategy", "steps", "--eval_steps", "3", "--save_steps", "3", "--logging_steps", "2"]


def start(recipe, output, *arguments, cwd, command=accelerate_command):
    command = command("sft.py", "--config", recipe, "--output_dir", output, *arguments)
    with (cwd / f"{output.name}.log").open("a") as log:
        return subprocess.Popen(command, cwd=cwd, stdout=log, stderr=log, stdin=subprocess.DEVNULL)


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition() and process.poll() is None:
        assert time.monotonic() < end, "timed out"
        time.sleep(0.01)


def workers(launcher):
    """The training processes of a launched command."""
    below = psutil.Process(launcher.pid).children(recursive=True)
    return [process for process in below if any(part.endswith("sft.py") for part in process.cmdline())]


def kill(launcher):
    """Kill all processes at the same time, as a power cut does."""
    for process in psutil.Process(launcher.pid).children(recursive=True):
        process.kill()
    launcher.kill()
    launcher.wait()


def assert_same_run(output, uninterrupted):
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (output, uninterrupted))
    assert all(first[name].equal(second[name]) for name in second)
    timed = ("runtime", "per_second", "flos", "memory_gib")
    histories = [
        [{key: value for key, value in entry.items() if not key.endswith(timed)} for entry in history(folder)]
        for folder in (output, uninterrupted)
    ]
    assert histories[0] == histories[1]


def history(folder):
    return json.loads((folder / "run.json").read_text())["history"]


@pytest.fixture(scope="module")
def uninterrupted(workspace, recipe):
    """The uninterrupted run."""
    output = workspace / "outputs" / "whole"
    result = launch("sft.py", "--config", recipe, "--output_dir", output, *OPTIONS, cwd=workspace)
    assert result.returncode == 0, result.output
    return output


def test_sigterm_saves_and_auto_resumes(uninterrupted, recipe, workspace):
    """As if Slurm preempted a job: SIGTERM to every process, then the same command again."""
    output = workspace / "outputs" / "preempted"
    process = start(recipe, output, *OPTIONS, *AUTO, "--dataloader_num_workers", "2", cwd=workspace)
    wait_for(lambda: (output / "checkpoint-6").is_dir(), process)
    assert process.poll() is None, "it ended before it got the signal"
    trainer, *data_workers = workers(process)
    assert len(data_workers) == 2
    for receiver in (*data_workers, trainer, process):
        receiver.send_signal(signal.SIGTERM)
    assert process.wait(60) != 0
    psutil.wait_procs([trainer], timeout=60)
    log = (workspace / "preempted.log").read_text()
    assert "No checkpoint yet; starting from scratch." in log
    assert "Stopped by SIGTERM; step" in " ".join(log.split())
    assert not (output / "run.json").exists(), "only finished runs have one"
    # As if training had taken long so far.
    manifest = Path(find_checkpoint("auto", output)) / MANIFEST
    seconds = json.loads(manifest.read_text())["progress"]["seconds"]
    manifest.write_text(manifest.read_text().replace(str(seconds), "1000.0"))
    result = launch("sft.py", "--config", recipe, "--output_dir", output, *OPTIONS, *AUTO, cwd=workspace)
    assert result.returncode == 0, result.output
    assert "Resuming from" in result.output
    assert_same_run(output, uninterrupted)
    record = json.loads((output / "run.json").read_text())
    training = record["resources"]["phases"]["training"]
    assert 1000 < record["train"]["train_runtime"] < training["seconds"] < record["seconds"] < 1200
    assert training["pairs_per_second"] == pytest.approx(5 * 96 / training["seconds"])
    # Started once more, a finished run is left as it is.
    before = (output / "run.json").read_bytes()
    result = launch("sft.py", "--config", recipe, "--output_dir", output, *OPTIONS, *AUTO, cwd=workspace)
    assert "is already finished." in " ".join(result.output.split())
    assert (output / "run.json").read_bytes() == before


def test_a_checkpoint_with_another_rendered_prompt_is_refused(uninterrupted, recipe, workspace, tmp_path):
    """The recipe is the same, but the base's chat template has changed."""
    changed = shutil.copytree(workspace / "base", tmp_path / "base")
    template = changed / "chat_template.jinja"
    template.write_text("Be brief. " + template.read_text())
    checkpoint = find_checkpoint("auto", uninterrupted)
    arguments = ["--model_name_or_path", changed, "--resume_from_checkpoint", checkpoint]
    result = launch("sft.py", "--config", recipe, "--output_dir", tmp_path / "run", *arguments, cwd=workspace)
    assert result.returncode != 0
    assert "the prompt as rendered differs from what was trained" in " ".join(result.output.split())
    assert not (tmp_path / "run").exists()


def for_two(options):
    return [*options, "--lora_dropout", "0", "--per_device_train_batch_size", "4"]


def start_two(recipe, workspace, name):
    """Train on two processes up to the second checkpoint. Returns (launcher, its processes, run folder)."""
    output = workspace / "outputs" / name
    process = start(recipe, output, *for_two(OPTIONS), *AUTO, cwd=workspace, command=ddp_command)
    wait_for(lambda: (output / "checkpoint-6").is_dir(), process)
    own = workers(process)
    assert sorted(worker.environ()["LOCAL_RANK"] for worker in own) == ["0", "1"]
    return process, {worker.environ()["LOCAL_RANK"]: worker for worker in own}, output


def test_one_of_two_processes_is_killed(recipe, workspace):
    """The other one reports it and ends. Training resumes on one or two processes."""
    uninterrupted = workspace / "outputs" / "two-whole"
    result = launch(
        "sft.py", "--config", recipe, "--output_dir", uninterrupted, *for_two(OPTIONS), cwd=workspace, processes=2
    )
    assert result.returncode == 0, result.output
    process, own, output = start_two(recipe, workspace, "two-killed")
    own["1"].kill()
    assert process.wait(60) != 0
    log = " ".join((workspace / "two-killed.log").read_text().split())
    error = re.search(r"error: another process of this training ended after step \d+ .*? on any number", log)
    assert error is not None, log
    assert re.search(r"resume from checkpoint-\d+ with resume_from_checkpoint: auto", error[0]), log
    assert 'nli_sft/training/checkpoints.py", line' not in log, "a traceback"

    on_one = shutil.copytree(output, workspace / "outputs" / "two-then-one")
    arguments = ["--config", recipe, *AUTO, "--output_dir"]
    result = launch("sft.py", *arguments, output, *for_two(OPTIONS), cwd=workspace, processes=2)
    assert result.returncode == 0, result.output
    assert_same_run(output, uninterrupted)
    batch = ["--per_device_train_batch_size", "8"]  # the same global batch
    result = launch("sft.py", *arguments, on_one, *for_two(OPTIONS), *batch, cwd=workspace)
    assert "Resuming from" in result.output, result.output
    losses = [[entry["loss"] for entry in history(folder) if "loss" in entry] for folder in (on_one, uninterrupted)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    assert history(on_one)[-1]["step"] == history(uninterrupted)[-1]["step"]


@pytest.mark.slow
def test_sigterm_while_another_process_hangs(recipe, workspace):
    """As with NCCL, which does not report dead processes: one that waits for them cannot handle signals."""
    process, own, output = start_two(recipe, workspace, "two-stopped")
    own["1"].suspend()
    time.sleep(1)
    process.terminate()
    assert process.wait(60) != 0
    log = " ".join((workspace / f"{output.name}.log").read_text().split())
    message = r"error: SIGTERM received after step \d+, but some processes did not .* resume from checkpoint-\d+"
    assert re.search(message, log)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_killed_at_any_moment(uninterrupted, recipe, workspace, seed):
    """SIGKILL at a random moment, again after resuming, then a run to the end."""
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
    assert_same_run(output, uninterrupted)
