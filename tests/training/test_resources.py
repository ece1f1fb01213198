import json
import re
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from nli_sft.training.resources import ResourceRecorder, folder_bytes


def test_phases_are_timed_and_counted():
    resources = ResourceRecorder()
    with resources.phase("training") as phase:
        time.sleep(0.05)
        phase.count(pairs=100, tokens=5_000)
    with resources.phase("evaluation"):
        pass
    summary = resources.summary()
    training = summary["phases"]["training"]
    assert training["seconds"] >= 0.05
    assert training["pairs_per_second"] == pytest.approx(100 / training["seconds"])
    assert training["tokens_per_second"] == pytest.approx(5_000 / training["seconds"])
    assert set(summary["phases"]["evaluation"]) == {"seconds"}
    assert summary["seconds"] >= training["seconds"]


def test_repeated_phases_add_up_and_failed_ones_are_timed():
    resources = ResourceRecorder()
    with resources.phase("loading"):
        time.sleep(0.02)
    with suppress(RuntimeError), resources.phase("loading"):
        time.sleep(0.02)
        raise RuntimeError
    assert resources.summary()["phases"]["loading"]["seconds"] >= 0.04


def test_time_before_resuming_counts():
    resources = ResourceRecorder()
    with resources.phase("training") as phase:
        resources.add_earlier("training", 100.0)
        phase.count(pairs=200)
    summary = resources.summary()
    assert 100 < summary["phases"]["training"]["seconds"] < summary["seconds"]
    assert summary["phases"]["training"]["pairs_per_second"] == pytest.approx(2, rel=0.01)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_ram_is_the_figure_of_the_kernel():
    status = Path("/proc/self/status").read_text()
    (kibibytes,) = map(int, re.findall(r"VmHWM:\s+(\d+) kB", status))
    peak = ResourceRecorder().summary()["processes"][0]["peak_ram_bytes"]
    assert peak == pytest.approx(kibibytes * 1024, rel=0.02)


def test_disk_usage_does_not_follow_links(tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "weights").write_bytes(b"x" * 1_000)
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "model.safetensors").symlink_to(tmp_path / "blobs" / "weights")
    assert 1_000 <= folder_bytes(tmp_path) < 1_500
    disk = ResourceRecorder().summary(run=tmp_path, model=str(tmp_path / "blobs"))["disk"]
    assert disk["run_bytes"] == folder_bytes(tmp_path)
    assert disk["model_bytes"] == 1_000


def test_the_cache_entry_of_a_hub_model_is_measured(tmp_path, monkeypatch):
    entry = tmp_path / "models--owner--name"
    snapshot = entry / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (entry / "blobs").mkdir()
    (entry / "blobs" / "weights").write_bytes(b"x" * 5_000)
    (snapshot / "config.json").write_text("{}")
    monkeypatch.setattr("nli_sft.training.resources.cached_file", lambda *_, **__: str(snapshot / "config.json"))
    assert ResourceRecorder().summary(model="owner/name")["disk"]["model_bytes"] == 5_002


def test_an_uncached_model_has_no_size():
    assert ResourceRecorder().summary(model="no-such-owner/no-such-model")["disk"]["model_bytes"] is None


def test_the_summary_is_json_and_names_the_machine():
    summary = ResourceRecorder().summary()
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert summary["hardware"]["cpu"]
    assert summary["hardware"]["cores"] >= 1
    assert summary["hardware"]["ram_bytes"] > 2**28
