import json
import shlex
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from launching import ROOT, launch

from nli_sft.labels import LABELS

pytest.importorskip("lm_eval.models", reason="needs lm-evaluation-harness: pip install -e '.[benchmark]'")

MAKE_TASK = ROOT / "recipes" / "lm_eval_task" / "make_task.py"


def test_the_printed_command_gives_the_unconstrained_scores_of_eval(lora_run, workspace, tmp_path):
    """Write a task, run the printed command, and compare the answers with those of recipes/eval.py."""
    run, _ = lora_run
    arguments = [sys.executable, MAKE_TASK, "--run", run, "--output_dir", tmp_path]
    made = subprocess.run(arguments, capture_output=True, text=True, cwd=workspace)
    assert made.returncode == 0, made.stdout + made.stderr
    command = shlex.split(made.stdout[made.stdout.index("lm_eval --model") :].replace("\\\n", ""))
    harness = subprocess.run(
        [sys.executable, "-m", *command, "--device", "cpu"], capture_output=True, text=True, cwd=workspace
    )
    assert harness.returncode == 0, harness.stdout + harness.stderr
    (path,) = tmp_path.rglob("samples_*.jsonl")
    samples = sorted(map(json.loads, path.open()), key=lambda sample: sample["doc_id"])

    result = launch("eval.py", "--run", run, "--unconstrained_samples=0", cwd=workspace)
    assert result.returncode == 0, result.output
    ours = pd.read_parquet(run / "eval" / "data-test" / "predictions.parquet")
    unconstrained = ours[[f"tuned_unconstrained_{label}" for label in LABELS]].to_numpy()
    assert [sample["doc"]["uid"] for sample in samples] == list(ours["uid"])
    theirs = np.array([[float(answer[0][0]) for answer in sample["resps"]] for sample in samples])
    assert theirs.argmax(axis=1).tolist() == unconstrained.argmax(axis=1).tolist()
    right = [LABELS[label] == gold for label, gold in zip(unconstrained.argmax(axis=1), ours["label"], strict=True)]
    assert [sample["acc"] for sample in samples] == [float(r) for r in right]


def test_a_missing_run_is_an_error(workspace):
    made = subprocess.run(
        [sys.executable, MAKE_TASK, "--run", "nowhere"], capture_output=True, text=True, cwd=workspace
    )
    assert made.returncode == 1
    assert "nowhere is not a run folder" in made.stderr
