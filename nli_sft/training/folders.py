"""Checks of the output folder before training: is it free, what to clear, does the checkpoint fit the recipe."""

import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME

from .. import UserError
from ..data.prompts import Prompt
from ..runs import BOOKKEEPING, DEFAULT, HYPOTHESIS_ONLY, read_run
from .checkpoints import UNFINISHED

logger = logging.getLogger(__name__)

# Files that only a run, or a command on one, writes.
MARKS = ("run.json", "recipe.yaml", "prompt.json", f"checkpoint-*/{TRAINER_STATE_NAME}", "eval/*/metrics.json")

# Training overwrites files of these names.
MODELS = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
REST = (
    "training_args.bin",
    "trained_pairs.npy",
    "decision.json",
    "decision_template.jinja",
    "tracking.json",
    "report.html",
    "report.md",
    "eval/*/predictions.parquet",
    "runs/*/events.out.tfevents.*",
)

# Text that marks a README.md as written by PEFT, TRL or recipes/push.py.
GENERATED = ("[More Information Needed]", "has been trained using [TRL]", "\n- nli-sft\n")

# With another value of these, a checkpoint has other weights, another optimizer, or another task.
FIXED = {
    "model_name_or_path",
    "model_revision",
    "load_in_4bit",
    "load_in_8bit",
    "bnb_4bit_quant_type",
    "use_bnb_nested_quant",
    "use_peft",
    "lora_r",
    "lora_alpha",
    "lora_target_modules",
    "lora_target_parameters",
    "lora_modules_to_save",
    "use_rslora",
    "use_dora",
    "optim",
    "train_on_end",
    "chat_template_path",
    "eos_token",
}

# Loaded with the optimizer's state: a later value in the recipe has no effect.
KEPT = {"weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"}

# Their results (the prompt and its label words) are compared instead.
RESOLVED = {"prompt", "label_words"}


def check_folder(run: str | Path, *, base: str, checkpoint: str | None = None, overwrite: bool = False) -> None:
    """Refuse a folder in which training would mix with other files.

    Args:
        run: the folder to train in.
        base: the model to start from.
        checkpoint: the one to resume from, if any.
        overwrite: whether `clear` will be called.

    Raises:
        UserError: if the folder holds a run or a model that is neither resumed nor overwritten, or holds the base.
    """
    run = Path(run)
    if overwrite and checkpoint is not None:
        raise UserError(
            f"overwrite_output_dir would clear {run}, which resume_from_checkpoint needs; set only one of the two"
        )
    if checkpoint is not None and Path(checkpoint).resolve().parent == run.resolve():
        return
    found = next(_marks(run), None)
    if found is None and (model := next(_matches(run, (*MODELS, "pytorch_model*.bin")), None)):
        raise UserError(
            f"output_dir {run} holds a model that this package did not train ({model.name}), and training would "
            "overwrite it; choose another folder"
        )
    if found is None:
        return
    if not overwrite:
        raise UserError(
            f"output_dir {run} already holds a run ({found.relative_to(run)}); choose another folder, resume it with "
            "--resume_from_checkpoint auto, or delete its files with --overwrite_output_dir true"
        )
    if run.resolve() in (Path(base).resolve(), *Path(base).resolve().parents):
        raise UserError(
            f"model_name_or_path {base} is in output_dir {run}, which overwrite_output_dir would clear; choose "
            "another output_dir"
        )


def clear(run: str | Path) -> None:
    """Delete what a run, its hypothesis-only baseline and commands on it wrote into a folder; keep all other files."""
    run = Path(run)
    if next(_marks(run), None) is None:
        return
    for folder in (*run.glob(f"checkpoint-*/{TRAINER_STATE_NAME}"), *run.glob(UNFINISHED)):
        shutil.rmtree(folder if folder.is_dir() else folder.parent)
    written = [*_matches(run, (*MARKS, *MODELS, *REST)), *_figures(run), *_suites(run)]
    readme = run / "README.md"
    if readme.is_file() and any(sign in readme.read_text("utf-8", errors="replace") for sign in GENERATED):
        written.append(readme)
    for path in written:
        path.unlink()
    if (run / HYPOTHESIS_ONLY).is_dir():
        clear(run / HYPOTHESIS_ONLY)
    for folder in (*run.glob("eval/*"), *run.glob("runs/*"), *map(run.joinpath, ("eval", "runs", "figures"))):
        _remove_empty(folder)
    _remove_empty(run / HYPOTHESIS_ONLY)


def check_resumption(checkpoint: str | Path, recipe: Mapping, prompt: Prompt, data: Mapping) -> None:
    """Compare a recipe with the one that a checkpoint was made with.

    Logs the differences that are allowed. A checkpoint without a record is not checked.

    Args:
        recipe: as resolved.
        data: {split: {fingerprint, …}}, as in the record of a run.

    Raises:
        UserError: listing differences in the task, or in the shape of weights and optimizer.
    """
    checkpoint = Path(checkpoint)
    if not (checkpoint / "run.json").is_file():
        return
    old_recipe, old_prompt, record = read_run(checkpoint)
    conflicts = _differences(old_recipe, recipe, FIXED)
    if old_prompt.label_words != prompt.label_words:
        words = (", ".join(one.label_words) for one in (old_prompt, prompt))
        conflicts.append("label_words {}, now {}".format(*words))
    elif old_prompt.fingerprint != prompt.fingerprint:
        conflicts.append(
            f"prompt {old_prompt.name} ({old_prompt.fingerprint}), now {prompt.name} ({prompt.fingerprint})"
        )
    for split in ("train", "validation"):
        before, now = (one[split]["fingerprint"] for one in (record["data"], data))
        if before != now:
            conflicts.append(f"{split} pairs with fingerprint {before}, now {now}")
    if conflicts:
        raise UserError(
            f"{checkpoint} was made with {'; '.join(conflicts)}. Training cannot resume from it with these changes: "
            "set the old values, or train in another output_dir"
        )
    others = {key for key in {*old_recipe, *recipe} - FIXED - RESOLVED - KEPT if not BOOKKEEPING.fullmatch(key)}
    changed, kept = _differences(old_recipe, recipe, others), _differences(old_recipe, recipe, KEPT)
    if changed:
        logger.warning("%s was made with %s. Training uses the new values.", checkpoint.name, "; ".join(changed))
    if kept:
        logger.warning("%s was made with %s. The optimizer keeps the old values.", checkpoint.name, "; ".join(kept))


def _differences(old: Mapping, new: Mapping, keys: set[str]) -> list[str]:
    return [
        f"{key} {old.get(key, DEFAULT)}, now {new.get(key, DEFAULT)}"
        for key in sorted(keys)
        if not _is_same(old.get(key, DEFAULT), new.get(key, DEFAULT))
    ]


def _is_same(one: object, other: object) -> bool:
    if one == other or [one] == other or one == [other]:
        return True
    if not (isinstance(one, str) and isinstance(other, str)):
        return False
    return Path(one).exists() and Path(other).exists() and Path(one).samefile(other)


def _marks(run: Path) -> Iterator[Path]:
    yield from _matches(run, MARKS)
    if (run / HYPOTHESIS_ONLY).is_dir():
        yield from _matches(run / HYPOTHESIS_ONLY, MARKS)


def _matches(folder: Path, patterns: tuple[str, ...]) -> Iterator[Path]:
    return (path for pattern in patterns for path in sorted(folder.glob(pattern)) if path.is_file())


def _figures(run: Path) -> Iterator[Path]:
    """The figures of a report, each an SVG with a PNG beside it."""
    for path in run.glob("figures/*.svg"):
        if path.with_suffix(".png").is_file():
            yield from (path, path.with_suffix(".png"))


def _suites(run: Path) -> Iterator[Path]:
    return (path for path in run.glob("eval/*.json") if '"evaluated"' in path.read_text("utf-8", errors="replace"))


def _remove_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
