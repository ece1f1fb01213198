"""The folder of a run before a training: is it free, what is cleared, does a checkpoint suit the recipe."""

import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME

from .. import UserError
from ..data.prompts import Prompt
from ..report.compare import BOOKKEEPING, DEFAULT
from ..runs import HYPOTHESIS_ONLY, read_run
from .checkpoints import UNFINISHED

logger = logging.getLogger(__name__)

# A folder with any of these was written by a run, or by commands on it.
MARKS = ("run.json", "recipe.yaml", "prompt.json", f"checkpoint-*/{TRAINER_STATE_NAME}", "eval/*/metrics.json")

# A training writes files of these names, over whatever has them.
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
    "tracking.json",
    "report.html",
    "report.md",
    "eval/*/predictions.parquet",
    "runs/*/events.out.tfevents.*",
)

# What is in the README.md that PEFT, TRL or recipes/push.py wrote, and hardly in anybody's own.
GENERATED = ("[More Information Needed]", "has been trained using [TRL]", "\n- nli-sft\n")

# A checkpoint made with another value of these has weights or an optimizer of another shape, or learned another task.
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

# The optimizer's state brings its own; what a recipe says later is not heard.
KEPT = {"weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"}

# What these lead to is compared instead.
RESOLVED = {"prompt", "label_words"}


def check_folder(run: str | Path, *, base: str, checkpoint: str | None = None, overwrite: bool = False) -> None:
    """Refuse a folder in which a training would mix with what is there.

    Args:
        run: the folder to train in.
        base: the model to start from.
        checkpoint: the one to go on from, if any.
        overwrite: whether `clear` will be called.

    Raises:
        UserError: if the folder holds a run, or a model, that is not gone on with or overwritten; or if there is
            something in it that must not be.
    """
    run = Path(run)
    if overwrite and checkpoint is not None:
        raise UserError(
            f"overwrite_output_dir would clear {run}, which resume_from_checkpoint goes on with; keep one of the two"
        )
    if checkpoint is not None and Path(checkpoint).resolve().parent == run.resolve():
        return
    found = next(_marks(run), None)
    if found is None and (model := next(_matches(run, (*MODELS, "pytorch_model*.bin")), None)):
        raise UserError(
            f"output_dir {run} holds a model that no run of this package made ({model.name}), and training would "
            "write over it; name another folder"
        )
    if found is None:
        return
    if not overwrite:
        raise UserError(
            f"output_dir {run} holds a run already ({found.relative_to(run)}); name another folder, go on with "
            "--resume_from_checkpoint auto, or clear what that run wrote with --overwrite_output_dir true"
        )
    if run.resolve() in (Path(base).resolve(), *Path(base).resolve().parents):
        raise UserError(
            f"model_name_or_path {base} is in output_dir {run}, which overwrite_output_dir would clear; name another "
            "output_dir"
        )


def clear(run: str | Path) -> None:
    """Remove what a run, its control and the commands on it wrote into a folder. All other files stay."""
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
    """Compare what a training would go on with to what the checkpoint was made from.

    What can differ is told in one line. A checkpoint that does not say what it was made from is taken as it is.

    Args:
        recipe: as resolved.
        data: {split: {fingerprint, …}}, as in the record of a run.

    Raises:
        UserError: listing what must be the same and is not: the task, or the shape of weights and optimizer.
    """
    checkpoint = Path(checkpoint)
    if not (checkpoint / "run.json").is_file():
        return
    then, asked_then, record = read_run(checkpoint)
    stops = _differences(then, recipe, FIXED)
    if asked_then.label_words != prompt.label_words:
        words = (", ".join(one.label_words) for one in (asked_then, prompt))
        stops.append("label_words {}, now {}".format(*words))
    elif asked_then.fingerprint != prompt.fingerprint:
        stops.append(f"prompt {asked_then.name} ({asked_then.fingerprint}), now {prompt.name} ({prompt.fingerprint})")
    for split in ("train", "validation"):
        before, now = (one[split]["fingerprint"] for one in (record["data"], data))
        if before != now:
            stops.append(f"{split} pairs with fingerprint {before}, now {now}")
    if stops:
        raise UserError(
            f"{checkpoint} was made with {'; '.join(stops)}. Training cannot go on from it with that: say what was "
            "said then, or train in another output_dir"
        )
    others = {key for key in {*then, *recipe} - FIXED - RESOLVED - KEPT if not BOOKKEEPING.fullmatch(key)}
    changed, kept = _differences(then, recipe, others), _differences(then, recipe, KEPT)
    if changed:
        logger.warning("%s was made with %s. Training goes on as it is now.", checkpoint.name, "; ".join(changed))
    if kept:
        logger.warning("%s was made with %s. The optimizer keeps what it had.", checkpoint.name, "; ".join(kept))


def _differences(then: Mapping, now: Mapping, keys: set[str]) -> list[str]:
    return [
        f"{key} {then.get(key, DEFAULT)}, now {now.get(key, DEFAULT)}"
        for key in sorted(keys)
        if not _is_same(then.get(key, DEFAULT), now.get(key, DEFAULT))
    ]


def _is_same(one: object, other: object) -> bool:
    if one == other or [one] == other or one == [other]:
        return True
    paths = isinstance(one, str) and isinstance(other, str) and Path(one).exists() and Path(other).exists()
    return paths and Path(one).samefile(other)


def _marks(run: Path) -> Iterator[Path]:
    yield from _matches(run, MARKS)
    if (run / HYPOTHESIS_ONLY).is_dir():
        yield from _matches(run / HYPOTHESIS_ONLY, MARKS)


def _matches(folder: Path, patterns: tuple[str, ...]) -> Iterator[Path]:
    return (path for pattern in patterns for path in sorted(folder.glob(pattern)) if path.is_file())


def _figures(run: Path) -> Iterator[Path]:
    """Those of a report: each is there as SVG and as PNG."""
    for path in run.glob("figures/*.svg"):
        if path.with_suffix(".png").is_file():
            yield from (path, path.with_suffix(".png"))


def _suites(run: Path) -> Iterator[Path]:
    return (path for path in run.glob("eval/*.json") if '"evaluated"' in path.read_text("utf-8", errors="replace"))


def _remove_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
