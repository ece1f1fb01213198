"""The run folder: one training with everything that describes it.

outputs/<model>-<method>/
  adapter_model.safetensors, adapter_config.json, tokenizer files     (or the full model)
  recipe.yaml        the resolved recipe, which repeats this run
  prompt.json        the prompt, as `prompts.load_prompt` reads it back
  run.json           fingerprints, versions, git state, parameters, history, time; the fitted temperature
  decision.json, decision_template.jinja      for transformers' `pipeline("decision")` (`hub/decision.py`)
  trained_pairs.npy  a hash of each training pair, for the train-test overlap of evaluations
  eval/<source>-<split>/metrics.json, predictions.parquet
"""

import json
import logging
import os
import platform
import re
import shlex
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xxhash
import yaml

from . import UserError, __version__
from .data.prompts import Prompt, load_prompt
from .labels import LABELS

logger = logging.getLogger(__name__)

# The hypothesis-only baseline inside a run folder: a run of its own, trained in the same way without premises.
HYPOTHESIS_ONLY = "hypothesis_only"

TRAINED_PAIRS = "trained_pairs.npy"

# Types of the keys that readers of a run folder rely on.
RECIPE_TYPES = {"model_name_or_path": str, "dataset_name": str}
RECORD_TYPES = {
    "model": str,
    "parameters": dict,
    "data": dict,
    "validation": dict,
    "history": list,
    "versions": dict,
    "train": dict,
    "resources": dict,
    "seconds": (int, float),
    "temperature": (int, float),
}
METRICS_TYPES = {"source": str, "split": str, "pairs": int}

# Keys about where a run is kept, what it prints and how its batches are fed, not about what it learns; and sizes that
# follow from other keys.
BOOKKEEPING = re.compile(
    r"parameters_\w+|output_dir|run_name|report_to|resume_from_checkpoint|disable_tqdm|save_\w+|logging_\w+|log_level\w*|"
    r"wandb_\w+|trackio_\w+|project|hub_\w+|push_to_hub|hypothesis_only_control|"
    r"use_cpu|eval_on_start|per_device_eval_batch_size|dataloader_(num_workers|pin_memory|persistent_workers|prefetch_factor)"
)

# The files of a run that `tracking` uploads to W&B. `report.compare.fetch_runs` rebuilds a run folder from them.
COMPARED_FILES = ("run.json", "recipe.yaml", "prompt.json", "eval/*/metrics.json", "eval/*/predictions.parquet")

# Shown for a key that a recipe leaves out.
DEFAULT = "default"

# Files of weights are hashed whole up to this size. Of larger ones, the size and 1,024 evenly spread blocks of 256 KiB
# are hashed, the header included: training changes every block, and reading 256 MiB takes a fraction of a second.
HASHED_WHOLE = 2**30
BLOCKS, BLOCK = 1024, 2**18

REPAIR = "take it from a copy, or train the run again"

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes", "tokenizers")


# The file in accelerate_configs/ for what `launchers.launched_with` finds.
ACCELERATE_CONFIGS = {"ddp": "ddp", "fsdp": "fsdp2", "zero2": "deepspeed_zero2", "zero3": "deepspeed_zero3"}


def launch_command(script: str | Path, *arguments: object, record: Mapping = {}) -> str:  # noqa: B006 (never changed)
    """The command that starts a script of recipes/: plain `python`, or accelerate for several processes.

    Args:
        record: of a run, to start as many processes as it had; one by default.
    """
    launch, processes = ["python"], record.get("world_size", 1)
    if processes > 1:
        config = ACCELERATE_CONFIGS.get(record.get("launcher", ""), "ddp")
        file = Path(script).parent.parent / "accelerate_configs" / f"{config}.yaml"
        launch = ["accelerate", "launch", "--config_file", str(file), "--num_processes", str(processes)]
    return shlex.join([*launch, str(script), *map(str, arguments)])


def training_command(run: str | Path, record: Mapping) -> str:
    """The command that repeats a run in a new folder beside it, or the evaluation of a model that was not trained."""
    recipe = Path(run) / "recipe.yaml"
    if not is_trained(record):
        return launch_command("recipes/eval.py", "--config", recipe, record=record)
    return launch_command("recipes/sft.py", "--config", recipe, "--output_dir", f"{Path(run)}-again", record=record)


def write_json(path: Path, content: Mapping) -> None:
    """Write atomically: neither readers nor a crash leave half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False, encoding="utf-8") as file:
        try:
            file.write(text)
            file.close()
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def write_run(
    path: str | Path, *, recipe: Mapping, prompt: Prompt, record: Mapping, name: str | Path | None = None
) -> None:
    """Write the files of a run folder that describe the run.

    Args:
        name: the folder's final name, if it is not `path`.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True)
    launch = f"# {training_command(name or path, record)}\n"
    (path / "recipe.yaml").write_text(launch + text, encoding="utf-8")
    write_json(path / "prompt.json", asdict(prompt))
    write_json(path / "run.json", record)


class _Content(dict):
    """The content of a JSON or YAML file in a run folder. Reading a missing key raises a `UserError`."""

    def __init__(self, path: Path, values: Mapping):
        super().__init__(
            {key: _Content(path, value) if isinstance(value, dict) else value for key, value in values.items()}
        )
        self._path = path

    def __missing__(self, key: str):
        raise UserError(f"{self._path} has no {key!r}, so it is damaged or from elsewhere; {_repair(self._path)}")

    def __reduce__(self):
        return dict, (dict(self),)


def _repair(path: Path) -> str:
    if path.name in ("metrics.json", "predictions.parquet"):
        return f"delete {path.parent} and evaluate the run again with recipes/eval.py"
    return REPAIR


def _read(path: Path, parse: Callable[[str], object], types: Mapping[str, Any]) -> dict:
    """A file with a mapping, of which some keys must have a type.

    Raises:
        UserError: naming the file, and what is wrong with it.
    """
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing; {_repair(path)}") from None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = str(error.strerror if isinstance(error, OSError) else error)
        raise UserError(f"{path} cannot be read ({' '.join(reason.split())}); {_repair(path)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} should hold a mapping, not {content!r:.40}; {_repair(path)}")
    for key, kind in types.items():
        if key in content and not isinstance(content[key], kind):
            raise UserError(f"{path}: {key} should not be {content[key]!r:.40}; {_repair(path)}")
    return _Content(path, content)


def read_json(path: Path, types: Mapping[str, Any] = {}) -> dict:  # noqa: B006 (never changed)
    """A JSON file of a run folder: an object whose keys, if present, have `types`.

    Raises:
        UserError: if it is missing or damaged; and later, when a missing key is read.
    """
    return _read(path, json.loads, types)


def keep_temperature(run: str | Path, temperature: float) -> None:
    """Add the temperature fitted to a run's scores to its record; `NLIClassifier` and exports apply it."""
    path = Path(run) / "run.json"
    write_json(path, read_json(path) | {"temperature": temperature})


def read_recipe(path: str | Path) -> dict:
    """The recipe of a run folder.

    Raises:
        UserError: if it is damaged.
    """
    recipe = _read(Path(path) / "recipe.yaml", yaml.safe_load, RECIPE_TYPES)
    if "model" in recipe:  # of recipes/eval.py, for a model that is no run
        recipe |= {
            "model_name_or_path": recipe["model"],
            "dataset_name": recipe.get("dataset_name", recipe.get("suite")),
        }
    for key in RECIPE_TYPES:
        recipe[key]  # must be there
    return recipe


def is_trained(record: Mapping) -> bool:
    """Whether a run was trained; else recipes/eval.py has evaluated a model that is no run, and keeps its results."""
    return record.get("trained", True)


def is_run(path: Path) -> bool:
    """Whether a folder holds a run, or what is left of one: then `read_run` says what is missing."""
    return (path / "recipe.yaml").is_file() or (path / "run.json").is_file()


def read_run(path: str | Path) -> tuple[dict, Prompt, dict]:
    """(recipe, prompt, record) of a run folder.

    Raises:
        UserError: naming the folder and the file that is missing, or the one that is damaged.
    """
    path = Path(path)
    for name in ("recipe.yaml", "prompt.json", "run.json"):
        if not (path / name).is_file():
            raise UserError(f"{path} is not a run folder: it has no {name}; recipes/sft.py writes one when it ends")
    recipe, record = read_recipe(path), read_json(path / "run.json", RECORD_TYPES)
    read_json(path / "prompt.json")  # cut short, it may still be YAML
    return recipe, load_prompt(str(path / "prompt.json")), record


def read_metrics(folder: Path) -> dict:
    """The content of an evaluation's `metrics.json`.

    Raises:
        UserError: if it is missing or damaged.
    """
    summary = read_json(folder / "metrics.json", METRICS_TYPES)
    for key in METRICS_TYPES:
        summary[key]
    return summary


def label_sets(summary: Mapping) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(label set of the models, label set of the pairs) of an evaluation.

    Args:
        summary: the content of its `metrics.json`.
    """
    figures = next((one for one in summary.values() if isinstance(one, Mapping) and "labels" in one), {})
    label_names = tuple(figures.get("labels") or LABELS)
    return tuple(figures.get("label_mapping") or label_names), label_names


def read_predictions(folder: Path) -> pd.DataFrame:
    """The content of an evaluation's `predictions.parquet`, one row for each pair.

    Raises:
        UserError: if it is missing, damaged, or lacks a column that every evaluation has.
    """
    path = folder / "predictions.parquet"
    try:
        table = pd.read_parquet(path)
    except (OSError, ValueError, TypeError) as error:  # Arrow's errors are among these
        reason = " ".join(str(error).split())
        raise UserError(f"{path} cannot be read as Parquet ({reason:.200}); {_repair(path)}") from error
    models = [name.removesuffix("_prediction") for name in table if name.endswith("_prediction")]
    needed = ["uid", "premise", "hypothesis", "label"]
    labels, _ = label_sets(read_metrics(folder))
    needed += [f"{model}_{what}_{label}" for model in models for what in ("p", "unconstrained") for label in labels]
    missing = [name for name in needed if name not in table]
    if missing or not models:
        raise UserError(f"{path} has no column {(missing or ['tuned_prediction'])[0]!r}; {_repair(path)}")
    return table


def is_checkpoint(path: str | Path) -> bool:
    """Whether a folder has the name of a checkpoint."""
    return re.fullmatch(r"checkpoint-\d+", Path(path).resolve().name) is not None


def weight_files(path: str | Path) -> list[Path]:
    """The safetensors of a run folder: those of its adapter, or of its full model."""
    path = Path(path)
    pattern = "adapter_model*.safetensors" if (path / "adapter_config.json").is_file() else "model*.safetensors"
    return sorted(file for file in path.glob(pattern) if file.is_file())


def weights_fingerprint(path: str | Path) -> str | None:
    """A hash of the weights of a run folder, 32 hexadecimal digits; `None` if it has none.

    XXH3 of the safetensors, of whole files up to 1 GiB (0.2 s) and of 256 MiB of larger ones.
    """
    digest = xxhash.xxh3_128()
    files = weight_files(path)
    for file in files:
        size = file.stat().st_size
        digest.update(str(size).encode())
        with file.open("rb") as opened:
            for start in range(0, size, BLOCK if size <= HASHED_WHOLE else size // BLOCKS):
                opened.seek(start)
                digest.update(opened.read(BLOCK))
    return digest.hexdigest() if files else None


def fingerprints(run: str | Path) -> dict[str, str]:
    """Hashes of the weights of a run, as `tuned`, and of its hypothesis-only baseline, to which evaluations belong."""
    found = {"tuned": weights_fingerprint(run), HYPOTHESIS_ONLY: weights_fingerprint(Path(run) / HYPOTHESIS_ONLY)}
    return {model: value for model, value in found.items() if value is not None}


def evaluation_folders(run: str | Path) -> list[Path]:
    """The evaluations in a run folder that belong to its weights. Others are skipped with a warning.

    Evaluations of other weights remain if a run was trained again in its folder, or files were copied into it.

    Raises:
        UserError: if the `metrics.json` of one is damaged.
    """
    folders = sorted(path.parent for path in Path(run).glob("eval/*/metrics.json"))
    now = fingerprints(run) if folders else {}
    kept = []
    for folder in folders:
        evaluated = read_json(folder / "metrics.json", {"weights": dict}).get("weights", {})
        others = [model for model, value in evaluated.items() if now.get(model, value) != value]
        if others:
            logger.warning(
                "Skipping %s: it was computed with other weights than the folder holds now (%s). "
                "To evaluate again: recipes/eval.py --run %s",
                folder, ", ".join(others), run,
            )  # fmt: skip
        else:
            kept.append(folder)
    return kept


def rendered_prompt(path: str | Path) -> dict[str, str] | None:
    """The rendered prompt that a run or a checkpoint has recorded (`PromptEncoder.rendered`), or `None`."""
    file = Path(path) / "run.json"
    return read_json(file, {"rendered": dict}).get("rendered") if file.is_file() else None


def write_trained_pairs(path: str | Path, keys: np.ndarray) -> None:
    """Save the hashes of the training pairs (`sources.pair_hashes`), 8 bytes each."""
    Path(path).mkdir(parents=True, exist_ok=True)
    np.save(Path(path) / TRAINED_PAIRS, np.unique(keys))


def trained_on(path: str | Path, keys: np.ndarray) -> np.ndarray | None:
    """Which pairs a run was trained on, (n,) booleans; `None` if its folder has no record."""
    run = Path(path).resolve().parent if is_checkpoint(path) else Path(path)
    file = run / TRAINED_PAIRS
    if not file.is_file():
        return None
    try:
        return np.isin(keys, np.load(file, allow_pickle=False))
    except (ValueError, EOFError, TypeError) as error:
        raise UserError(f"{file} is damaged; delete it (without it, training pairs are not recognised)") from error


def evaluation_folder(path: str | Path, source: str, split: str) -> Path:
    """The folder of a run's evaluation on one split of one source."""
    name = Path(source).name
    for suffix in (".gz", ".jsonl", ".csv", ".tsv", ".parquet"):
        name = name.removesuffix(suffix)
    # Names may come from somebody else's recipe and must not lead out of the run folder.
    return Path(path) / "eval" / re.sub(r"[^\w.+-]", "-", f"{name}-{split}")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that can affect results."""
    installed = {"nli-sft": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            installed[name] = metadata.version(name)
    return installed


def git_state() -> dict[str, object] | None:
    """Commit of this package's checkout, and whether it has uncommitted changes.

    `None` if the package was installed without one, even in an environment inside another repository.
    """
    here = Path(__file__)
    try:
        _git("ls-files", "--error-unmatch", here.name, folder=here.parent)  # fails if it is not this repository's
        commit = _git("rev-parse", "HEAD", folder=here.parent)
        changes = _git("status", "--porcelain", "--untracked-files=no", folder=here.parent)
        return {"commit": commit, "dirty": bool(changes)}
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str, folder: Path) -> str:
    # In a hook, git sets variables that name another repository.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.strip()


def _of_a_model(prompt: Prompt, record: Mapping) -> dict[str, object]:
    """What a config says of a model that was only evaluated. Its recipe may call an adapter `model`."""
    return {"trained": False, "model": record["model"], "adapter": record["adapter"], "prompt": prompt.name}


def run_config(recipe: Mapping, prompt: Prompt, record: Mapping) -> dict[str, object]:
    """A run's config for W&B and comparisons: flat, with stable keys without periods.

    Args:
        recipe, prompt, record: as in a run folder; the record needs only what is known when training starts.
    """
    data, parameters = record["data"], record["parameters"]
    sources = data.get("sources", {})
    git = record.get("git") or {}
    devices = [process["device"] for process in record.get("resources", {}).get("processes", [])]
    quantisation = {"load_in_4bit": "4 bit", "load_in_8bit": "8 bit"}
    config = {
        "model": record["model"],
        "model_revision": recipe.get("model_revision"),
        "quantisation": next((name for key, name in quantisation.items() if recipe.get(key)), "none"),
        "prompt": prompt.name,
        "prompt_fingerprint": record["prompt_fingerprint"],
        "labels": list(prompt.labels),
        "label_words": list(prompt.label_words),
        "seed": 42,  # the Trainer's default, where the recipe says nothing else
        **recipe,
        **(_of_a_model(prompt, record) if not is_trained(record) else {}),
        **{f"parameters_{name}": number for name, number in parameters.items()},
        **{f"dropped_{reason}": number for reason, number in data.get("dropped", {}).items()},
        **{f"pairs_of_{source}": counts["pairs"] for source, counts in sources.items() if len(sources) > 1},
        "gpu": devices[0]["name"] if devices and devices[0] else record.get("gpu"),
        "world_size": record.get("world_size"),
        "git_commit": git.get("commit"),
        "git_dirty": git.get("dirty"),
        **{f"version_{package}": version for package, version in record["versions"].items()},
    }
    for split in ("train", "validation"):
        config |= {f"{split}_{key}": value for key, value in data.get(split, {}).items()}
    return {re.sub(r"\W", "_", key): value for key, value in config.items()}


def run_cost(record: Mapping) -> dict[str, float]:
    """The measured cost of a run: seconds in total and of training, throughput, peak memory in GiB."""
    resources = record.get("resources", {})
    training = resources.get("phases", {}).get("training", {})
    processes = resources.get("processes", [])
    devices = [process["device"] for process in processes if process["device"]]
    cost = {
        "seconds": record["seconds"],
        "training_seconds": training.get("seconds", record["train"]["train_runtime"]),
        "pairs_per_second": training.get("pairs_per_second"),
        "tokens_per_second": training.get("tokens_per_second"),
        "peak_ram_gib": sum(process["peak_ram_bytes"] for process in processes) / 2**30 or None,
        "peak_gpu_gib": max((device["peak_allocated_bytes"] for device in devices), default=0) / 2**30 or None,
    }
    return {name: figure for name, figure in cost.items() if figure is not None}
