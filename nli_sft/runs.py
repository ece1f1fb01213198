"""The run folder: one training and all that is known of it, complete on its own.

outputs/<model>-<method>/
  adapter_model.safetensors, adapter_config.json, tokenizer files     (or the full model)
  recipe.yaml        the recipe as resolved: running it again makes this run again
  prompt.json        the prompt, as `prompts.load_prompt` reads it back
  run.json           fingerprints, versions, git state, parameters, history, time
  trained_pairs.npy  a number for each pair that was trained on, by which an evaluation knows it again
  eval/<source>-<split>/metrics.json, predictions.parquet
"""

import json
import os
import platform
import re
import subprocess
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

import numpy as np
import yaml

from . import UserError, __version__
from .prompts import Prompt, load_prompt

# The control inside a run folder: a run of its own, trained in the same way without the premise.
HYPOTHESIS_ONLY = "hypothesis_only"

TRAINED_PAIRS = "trained_pairs.npy"

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes", "tokenizers")


def write_json(path: Path, content: Mapping) -> None:
    """Write whole or not at all: a reader, or a crash, never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False, encoding="utf-8") as file:
        file.write(text)
    os.replace(file.name, path)


def write_run(path: str | Path, *, recipe: Mapping, prompt: Prompt, record: Mapping) -> None:
    """Write the files of a run folder that say what the run was."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True)
    launch = f"# accelerate launch -q recipes/sft.py --config {path / 'recipe.yaml'}\n"
    (path / "recipe.yaml").write_text(launch + text, encoding="utf-8")
    write_json(path / "prompt.json", asdict(prompt))
    write_json(path / "run.json", record)


def read_run(path: str | Path) -> tuple[dict, Prompt, dict]:
    """(recipe, prompt, record) of a run folder.

    Raises:
        UserError: naming the folder and the file that is missing.
    """
    path = Path(path)
    for name in ("recipe.yaml", "prompt.json", "run.json"):
        if not (path / name).is_file():
            raise UserError(f"{path} is not a run folder: it has no {name}; recipes/sft.py writes one when it ends")
    recipe = yaml.safe_load((path / "recipe.yaml").read_text(encoding="utf-8"))
    record = json.loads((path / "run.json").read_text(encoding="utf-8"))
    return recipe, load_prompt(str(path / "prompt.json")), record


def write_trained_pairs(path: str | Path, keys: np.ndarray) -> None:
    """Keep what was trained on, as `sources.text_keys` tells it: 8 bytes a pair."""
    Path(path).mkdir(parents=True, exist_ok=True)
    np.save(Path(path) / TRAINED_PAIRS, np.unique(keys))


def trained_on(path: str | Path, keys: np.ndarray) -> np.ndarray | None:
    """Which pairs a run was trained on, (n,) booleans; `None` if its folder does not tell."""
    file = Path(path) / TRAINED_PAIRS
    return np.isin(keys, np.load(file, allow_pickle=False)) if file.is_file() else None


def evaluation_folder(path: str | Path, source: str, split: str) -> Path:
    """Where a run keeps what it did on one split of one source."""
    name = Path(source).name
    for suffix in (".gz", ".jsonl", ".csv", ".tsv", ".parquet"):
        name = name.removesuffix(suffix)
    # Whatever they are called, the folder is one below the run's: names may come from a recipe of somebody else.
    return Path(path) / "eval" / re.sub(r"[^\w.+-]", "-", f"{name}-{split}")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that can move a number."""
    installed = {"nli-sft": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            installed[name] = metadata.version(name)
    return installed


def git_state() -> dict[str, object] | None:
    """Commit of the working folder and whether it has uncommitted changes; `None` outside a repository."""
    try:
        commit = _git("rev-parse", "HEAD")
        return {"commit": commit, "dirty": bool(_git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True).stdout.strip()
