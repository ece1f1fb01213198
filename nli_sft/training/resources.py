"""Resources of a run: time by phase, RAM, GPU memory, disk, throughput."""

import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers.utils import cached_file


class ResourceRecorder:
    """Measures its process from its creation on.

    ```python
    resources = ResourceRecorder()
    with resources.phase("loading"):
        model = load_model(args)
    with resources.phase("training") as phase:
        trainer.train()
        phase.count(pairs=30_000, tokens=900_000)
    record["resources"] = resources.summary(run=output_dir, model=args.model_name_or_path)
    ```

    On several processes each makes its own, and all call `summary`.
    """

    def __init__(self):
        self._start = time.perf_counter()
        self._phases: dict[str, Phase] = {}
        self._earlier_seconds = 0.0
        self._device: torch.device = PartialState().device  # pyright: ignore[reportAttributeAccessIssue] (set by then)

    @contextmanager
    def phase(self, name: str) -> Iterator["Phase"]:
        """Time a part of the run. A name used twice adds up."""
        phase = self._phases.setdefault(name, Phase())
        start = time.perf_counter()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        try:
            yield phase
        finally:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)  # kernels still running belong to this phase
                phase.allocated = max(phase.allocated, torch.cuda.max_memory_allocated(self._device))
                phase.reserved = max(phase.reserved, torch.cuda.max_memory_reserved(self._device))
            phase.seconds += time.perf_counter() - start

    def add_earlier(self, phase: str, seconds: float) -> None:
        """Add the time that a resumed run took before it was interrupted.

        Args:
            phase: the one that was resumed.
            seconds: of that phase.
        """
        self._phases.setdefault(phase, Phase()).seconds += seconds
        self._earlier_seconds = seconds

    def summary(self, *, run: str | Path | None = None, model: str | None = None) -> dict[str, Any]:
        """All figures, ready for JSON. Every process must call it; all get the same.

        Args:
            run: the run folder, whose size is measured.
            model: name or path of the base model, whose size in its folder or in the cache is measured.

        Returns:
            - `seconds`: since the recorder was made, plus those of `add_earlier`;
            - `phases`: {name: {seconds, and if counted pairs, tokens, pairs_per_second, tokens_per_second}};
            - `processes`: for each, {peak_ram_bytes, device}; `device` is `None` on a CPU, else {name, memory_bytes,
              peak_allocated_bytes, peak_reserved_bytes}, the peaks over all phases;
            - `disk`: {run_bytes, model_bytes}, each `None` if unknown;
            - `hardware`: {cpu, cores, ram_bytes, platform}.
        """
        return {
            "seconds": self._earlier_seconds + time.perf_counter() - self._start,
            "phases": {name: phase.as_dict() for name, phase in self._phases.items()},
            "processes": gather_object([{"peak_ram_bytes": _peak_ram_bytes(), "device": self._device_figures()}]),
            "disk": {"run_bytes": None if run is None else folder_bytes(run), "model_bytes": _model_bytes(model)},
            "hardware": {
                "cpu": _cpu_name(),
                "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
                "ram_bytes": psutil.virtual_memory().total,
                "platform": platform.platform(terse=True),
            },
        }

    def _device_figures(self) -> dict[str, object] | None:
        if self._device.type != "cuda":
            return None
        properties = torch.cuda.get_device_properties(self._device)
        return {
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "peak_allocated_bytes": max((phase.allocated for phase in self._phases.values()), default=0),
            "peak_reserved_bytes": max((phase.reserved for phase in self._phases.values()), default=0),
        }


class Phase:
    """One part of a run: its time, peak device memory, pairs and tokens."""

    def __init__(self):
        self.seconds = 0.0
        self.allocated = self.reserved = 0
        self.pairs: int | None = None
        self.tokens: int | None = None

    def count(self, *, pairs: int | None = None, tokens: int | None = None) -> None:
        """Record how many pairs and tokens all processes together processed in this phase."""
        self.pairs, self.tokens = pairs, tokens

    def as_dict(self) -> dict[str, int | float]:
        figures: dict[str, int | float] = {"seconds": self.seconds}
        for name, number in (("pairs", self.pairs), ("tokens", self.tokens)):
            if number is not None:
                figures[name] = number
                figures[f"{name}_per_second"] = number / self.seconds
        return figures


def folder_bytes(path: str | Path) -> int:
    """The size of all files below a folder. Links are not followed, because the Hub's cache links each file twice."""
    files = (Path(root, name) for root, _, names in os.walk(path) for name in names)
    return sum(file.lstat().st_size for file in files)


def _model_bytes(model: str | None) -> int | None:
    if model is None:
        return None
    if Path(model).is_dir():
        return folder_bytes(model)
    config = cached_file(model, "config.json", local_files_only=True, _raise_exceptions_for_missing_entries=False)
    # <cache>/models--<owner>--<name>/snapshots/<commit>/config.json
    return None if config is None else folder_bytes(Path(config).parents[2])


def _peak_ram_bytes() -> int:
    """The most RAM that this process has used since it started."""
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset  # pyright: ignore[reportAttributeAccessIssue] (Windows only)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux kibibytes


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")  # platform.processor() is empty or the architecture on Linux
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
