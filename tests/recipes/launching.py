"""Launch the scripts as a user does, and read what they write."""

import json
import os
import struct
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from wandb.proto import wandb_internal_pb2

ROOT = Path(__file__).parents[2]


def launch_command(script, *arguments, processes=1):
    """The command with which a user runs a recipe script."""
    if processes == 1:
        command = [sys.executable]
    else:  # accelerate starts only one process on a CPU
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        command.append("--")  # otherwise it reads --run as an abbreviation of its own --run-path
    return [*command, str(ROOT / "recipes" / script), *map(str, arguments)]


def accelerate_command(script, *arguments):
    """One process by accelerate_configs/cpu.yaml."""
    return _configured("cpu", ROOT / "recipes" / script, *arguments)


def ddp_command(script, *arguments):
    """Two processes by accelerate_configs/ddp.yaml, which accelerate starts on a CPU too."""
    return _configured("ddp", ROOT / "recipes" / script, *arguments)


def fsdp_command(script, *arguments):
    """Two processes by accelerate_configs/fsdp2.yaml."""
    return _configured("fsdp2", Path(__file__).with_name("fsdp_on_cpu.py"), ROOT / "recipes" / script, *arguments)


def zero2_command(script, *arguments):
    """Two processes by accelerate_configs/deepspeed_zero2.yaml; DeepSpeed runs on CPUs too."""
    return _configured("deepspeed_zero2", ROOT / "recipes" / script, *arguments)


def zero3_command(script, *arguments):
    """Two processes by accelerate_configs/deepspeed_zero3.yaml."""
    return _configured("deepspeed_zero3", ROOT / "recipes" / script, *arguments)


def _configured(name, *arguments):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]  # a free port
    config = ROOT / "accelerate_configs" / f"{name}.yaml"
    return [*command, "--config_file", str(config), *map(str, arguments)]


def launch(script, *arguments, cwd, processes=1, command=None, **environment):
    """Run a recipe script as a user does. Scripts that run as one process share one import of the libraries."""
    read_on_import = set(environment) - {"COLUMNS"}
    if command or processes > 1 or read_on_import:
        result = subprocess.run(
            command(script, *arguments) if command else launch_command(script, *arguments, processes=processes),
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=400,
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
        )
    else:
        result = run_preloaded([ROOT / "recipes" / script, *arguments], cwd, os.environ | environment)
    result.output = result.stdout + result.stderr
    return result


def run_preloaded(argv, cwd, environment):
    """Run a Python script in a fork of a process that has imported the libraries (`preloaded.py`)."""
    with tempfile.NamedTemporaryFile("r+") as stdout, tempfile.NamedTemporaryFile("r+") as stderr:
        request = {"argv": [*map(str, argv)], "cwd": str(cwd), "environment": dict(environment)}
        server = _preloaded()
        server.stdin.write(json.dumps(request | {"stdout": stdout.name, "stderr": stderr.name}) + "\n")
        server.stdin.flush()
        status = int(server.stdout.readline())
        return subprocess.CompletedProcess(argv, status, stdout.read(), stderr.read())


@cache
def _preloaded():
    command = [sys.executable, str(Path(__file__).with_name("preloaded.py"))]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def read_wandb(folder: Path) -> list:
    """The records of an offline W&B run: protobuf messages in LevelDB's log format, in blocks of 32 KiB."""
    path = min(folder.glob("wandb/offline-run-*/*.wandb"))  # the first
    data, records, parts = path.read_bytes(), [], b""
    position = 7  # W&B's own header
    while position < len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        if kind == 0:
            break
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            records.append(wandb_internal_pb2.Record.FromString(parts))
            parts = b""
    return records
