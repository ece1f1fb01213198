"""Ctrl-C ends any script with one message, status 130 and no traceback."""

import os
import signal
import subprocess
import sys
import time

import pytest

from nli_sft import configs
from nli_sft.configs import EvalConfig, run_script

# Like torchrun, it forwards SIGINT and raises an error after its processes have ended.
LAUNCHER = """
import os, signal, subprocess, sys
def pass_on(number, frame):
    for child in children:
        child.send_signal(number)
    raise RuntimeError("the launcher's traceback")
own = os.environ | {"TORCHELASTIC_RUN_ID": "none"}
ranks = [{"RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
children = [subprocess.Popen([sys.executable, "-c", sys.argv[1], rank["RANK"]], env=own | rank) for rank in ranks]
signal.signal(signal.SIGINT, pass_on)
try:
    signal.pause()
finally:
    for child in children:
        child.wait()
"""

# Rank 0 ends first.
WORKER = """
import nli_sft.script, sys, time
print("ready", flush=True)
try:
    time.sleep(30)
finally:
    time.sleep(0.5 * int(sys.argv[1]))
"""


def _heed_ctrl_c():
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # background jobs of a shell start with SIGINT ignored


def interrupt(*command, ready):
    """The stderr and status of a command interrupted, with its children, after `ready` lines of "ready"."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(
        [sys.executable, "-c", *command], **pipes, start_new_session=True, preexec_fn=_heed_ctrl_c
    )
    assert process.stdout
    for _ in range(ready):
        assert process.stdout.readline() == "ready\n"
    time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    return process.communicate(timeout=30)[1], process.returncode


def test_interrupting_imports_leaves_no_traceback():
    message, status = interrupt(WORKER, "0", ready=1)
    assert status == 130
    assert message.strip().startswith("Stopped by Ctrl-C. Start again with: python ")
    assert message.count("\n") == 2


def test_one_of_several_processes_prints_the_message():
    message, status = interrupt(LAUNCHER, WORKER, ready=2)
    assert message.count("Stopped by Ctrl-C") == 1
    assert "Traceback" not in message
    assert status == -signal.SIGKILL


@pytest.mark.parametrize("moment", ["parse_recipe", "main"])
def test_run_script_leaves_no_traceback(monkeypatch, capsys, moment):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(sys, "argv", ["recipes/eval.py", "--run", "outputs/mine"])
    if moment == "parse_recipe":
        monkeypatch.setattr(configs, moment, stopped)
    try:
        with pytest.raises(SystemExit) as ended:
            run_script(stopped, (EvalConfig,))
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended.value.code == 130
    assert "Stopped by Ctrl-C. Start again with: python " in capsys.readouterr().err
