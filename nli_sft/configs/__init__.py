"""Dataclasses for what TRL's configs lack, and a strict parser of recipes.

A recipe is a flat YAML file. Its keys are the fields of the dataclasses that a script uses. Command-line flags have
the same names and override the file.
"""

import argparse
import difflib
import json
import math
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import yaml
from trl import TrlParser

from .. import UserError
from ..interrupts import end_launcher, is_elastic, say_goodbye
from ..labels import LABELS, check_labels
from ..models.precision import choose_precision, default_device
from .keys import REFUSED, check_paths, check_training, field_values, idle_keys, refuse_idle_keys, refuse_keys

Config = TypeVar("Config")

# Value of a key that is chosen by machine or run folder.
AUTO = "auto"

# Default of max_batch_tokens.
BATCH_TOKENS = 8192


@dataclass
class DataConfig:
    """Data."""

    dataset_name: str = field(
        metadata={"help": "Data set of premise-hypothesis pairs: a Hub id, a folder, a file, a URL, or demo."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    dataset_revision: str | None = field(
        default=None, metadata={"help": "Revision of a Hub data set. Give a commit to make results reproducible."}
    )
    premise_column: str | None = field(
        default=None, metadata={"help": "Premise column. The usual names are found automatically."}
    )
    hypothesis_column: str | None = field(
        default=None, metadata={"help": "Hypothesis column. The usual names are found automatically."}
    )
    label_column: str | None = field(
        default=None, metadata={"help": "Label column. The usual names are found automatically."}
    )
    uid_column: str | None = field(
        default=None, metadata={"help": "Column of the pair's id. The usual names are found automatically."}
    )
    label_spellings: list[str] | None = field(
        default=None, metadata={"help": "How the data spells the labels, in the order of labels."}
    )

    def columns(self) -> dict[str, str]:
        """The columns named by the user, as `sources.load_pairs` takes them."""
        named = {role: getattr(self, f"{role}_column") for role in ("premise", "hypothesis", "label", "uid")}
        return {role: column for role, column in named.items() if column is not None}


@dataclass
class TrainDataConfig(DataConfig):
    """Training data."""

    train_split: str | None = field(
        default=None, metadata={"help": "Training split, if it is not called train. Example: train_r1."}
    )
    validation_split: str | None = field(
        default=None,
        metadata={
            "help": "Validation split, if it is not called validation or dev. Example: validation_matched.",
        },
    )
    max_train_samples: int | None = field(
        default=None,
        metadata={"help": "Train on at most this many pairs, sampled by premise with the same label proportions."},
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Validate on at most this many pairs, sampled in the same way."}
    )
    train_mix: list[str] | None = field(
        default=None,
        metadata={
            "help": "More sources to train on, each with its number of pairs per pair of dataset_name: "
            "demo=0.25 mnli.jsonl=0.5."
        },
    )
    balance: str | None = field(
        default=None,
        metadata={
            "help": "Drop training pairs to balance them. label: equally many pairs of each label; premise: at most "
            "one pair of each label per premise.",
            "choices": ["label", "premise"],
        },
    )
    class_weights: list[str] | None = field(
        default=None,
        metadata={
            "help": "Weights of the labels in the loss: balanced (rare labels weigh more), or a number for each label."
        },
    )
    validation_fraction: float = field(
        default=0.1, metadata={"help": "Share of premises to hold out if the source has no validation split."}
    )


@dataclass
class PromptConfig:
    """Labels, prompt and label words."""

    labels: list[str] | None = field(
        default=None,
        metadata={"help": f"The labels, two or more: supported not_supported. SNLI's by default: {' '.join(LABELS)}."},
    )
    prompt: str = field(
        default="plain",
        metadata={"help": "A built-in prompt, such as plain or few_shot, or your own in a .yaml or .json file."},
    )
    label_words: list[str] | None = field(
        default=None, metadata={"help": "Words that the model answers, in the order of labels. The labels by default."}
    )
    train_on_end: bool = field(
        default=False, metadata={"help": "Also train on the end-of-turn token after the label."}
    )
    hypothesis_only_control: bool = field(
        default=False, metadata={"help": "Also train a hypothesis-only baseline, for comparison."}
    )
    drop_too_long: bool = field(
        default=False, metadata={"help": "Drop and count pairs longer than max_length instead of stopping."}
    )

    def __post_init__(self):
        if self.labels is not None:
            check_labels(self.labels)


@dataclass
class BatchConfig:
    """Batches and memory."""

    batching: str = field(
        default="trie",
        metadata={
            "help": "trie computes each shared prefix once; padded is ordinary padding. Models that do not support "
            "tries use padded.",
            "choices": ["trie", "padded"],
        },
    )
    max_row_tokens: int = field(default=512, metadata={"help": "Maximum length of a trie row, in tokens."})
    max_batch_tokens: int | str = field(
        default=BATCH_TOKENS,
        metadata={
            "help": "Maximum tokens per forward pass. Larger batches are split into micro-batches with the same "
            "gradient. auto: what fits in free memory."
        },
    )
    cuda_graph: str = field(
        default="auto",
        metadata={
            "help": "Replay the training step as CUDA graphs. auto: if possible; true: stop if not possible.",
            "choices": ["auto", "true", "false"],
        },
    )
    group_by_premise: bool = field(
        default=False, metadata={"help": "Put pairs with the same premise into the same batch. Saves time on tries."}
    )

    def __post_init__(self):
        """Convert `max_batch_tokens`, which the argument parser reads as text, to a number."""
        given = str(self.max_batch_tokens)
        if given != AUTO:
            if not given.isdecimal() or int(given) == 0:
                raise RecipeError(f"max_batch_tokens is {given!r}; it must be a number of tokens or {AUTO}")
            self.max_batch_tokens = int(given)


@dataclass
class MachineConfig:
    """Hardware and the run folder."""

    precision: str = field(
        default="auto",
        metadata={
            "help": "auto: bf16 if the device supports it natively, fp16 on older GPUs, fp32 on most CPUs.",
            "choices": ["auto", "bf16", "fp16", "fp32"],
        },
    )
    estimate: bool = field(
        default=False,
        metadata={"help": "Print the memory that training would need, then exit. Downloads no weights."},
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata={"help": "Delete an earlier run in output_dir first. Other files in it stay."},
    )


@dataclass
class TrackingConfig:
    """Weights & Biases."""

    wandb_entity: str | None = field(default=None, metadata={"help": "W&B user or team. Yours by default."})
    wandb_project: str | None = field(
        default=None, metadata={"help": "W&B project. By default WANDB_PROJECT, or nli-sft if that is not set."}
    )
    wandb_group: str | None = field(
        default=None, metadata={"help": "W&B group of the run. By default named after base model and data."}
    )
    wandb_tags: list[str] | None = field(
        default=None, metadata={"help": "W&B tags, added to source, method and seed."}
    )
    wandb_notes: str | None = field(default=None, metadata={"help": "W&B notes: what the run is for."})


@dataclass
class EvalConfig(DataConfig):
    """Evaluation."""

    run: str = field(default="", metadata={"help": "Run folder made by recipes/sft.py."})
    model: str | None = field(
        default=None,
        metadata={"help": "Any causal language model or PEFT adapter instead of a run: a folder or a Hub id."},
    )
    model_revision: str | None = field(default=None, metadata={"help": "Revision of model on the Hub."})
    adapter: str | None = field(
        default=None, metadata={"help": "Adapter to put on model: a folder or a Hub id. Its base is evaluated too."}
    )
    prompt: list[str] | None = field(
        default=None,
        metadata={
            "help": "Prompts to ask model with, built in or files. Several are compared: plain few_shot my.yaml. By "
            "default its prompt.json, or plain."
        },
    )
    labels: list[str] | None = field(
        default=None, metadata={"help": f"The labels of model, two or more. SNLI's by default: {' '.join(LABELS)}."}
    )
    label_words: list[str] | None = field(
        default=None, metadata={"help": "Words that model answers, in the order of labels. The labels by default."}
    )
    output_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder for the results of model, outputs/<model>-<prompt> by default. Each of several prompts "
            "gets a folder in it."
        },
    )
    dtype: str | None = field(
        default=None, metadata={"help": "Of the weights of model. By default as saved, or as precision needs it."}
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "Attention implementation of model."})
    load_in_8bit: bool = field(default=False, metadata={"help": "Quantise model to 8 bits."})
    load_in_4bit: bool = field(default=False, metadata={"help": "Quantise model to 4 bits."})
    report_to: list[str] | None = field(
        default=None,
        metadata={"help": "wandb logs the evaluation of model to W&B. A run is logged as its recipe says."},
    )
    dataset_name: str | None = field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default=None,
        metadata={"help": "Data set to evaluate on: a Hub id, a folder, a file or a URL. The run's own by default."},
    )
    split: str | None = field(
        default=None, metadata={"help": "Split to evaluate on. test by default; a single file is taken whole."}
    )
    sources: list[str] | None = field(
        default=None,
        metadata={"help": "More data sets for the same report, as name or name:split: hans.jsonl demo:test."},
    )
    suite: str | None = field(
        default=None,
        metadata={"help": "Evaluate on a suite of data sets: a name from recipes/suites, or a .yaml file."},
    )
    suite_root: str | None = field(
        default=None, metadata={"help": "Folder that holds data sets of the suite by name. Others are downloaded."}
    )
    calibration_pairs: int = field(
        default=1000,
        metadata={"help": "Number of validation pairs to fit the temperature on. 0 turns calibration off."},
    )
    max_samples: int | None = field(
        default=None,
        metadata={"help": "Evaluate on at most this many pairs, sampled by premise with the same label proportions."},
    )
    unconstrained_samples: int = field(
        default=200, metadata={"help": "Number of pairs of the first set to answer by unconstrained generation too."}
    )
    per_device_eval_batch_size: int = field(
        default=64, metadata={"help": "Prompts per forward pass. Halved automatically if memory runs out."}
    )
    precision: str = field(
        default="auto",
        metadata={
            "help": "auto: bf16 if the device supports it natively, fp16 on older GPUs, fp32 on most CPUs.",
            "choices": ["auto", "bf16", "fp16", "fp32"],
        },
    )
    batching: str | None = field(
        default=None,
        metadata={"help": "trie or padded. By default as in training.", "choices": ["trie", "padded"]},
    )
    seed: int = field(default=42, metadata={"help": "Random seed of max_samples."})
    trust_remote_code: bool = field(
        default=False,
        metadata={"help": "Run code that comes with the base model. Never read from the run, which may be anyone's."},
    )

    def __post_init__(self):
        if not self.run and self.model is None:
            raise RecipeError(
                "run is missing; give the run folder as --run outputs/<model>-<method>, or any model as --model"
            )
        if self.run and self.model is not None:
            raise RecipeError("run and model are both given; a run is evaluated with its own model, so leave out one")
        if self.model is not None and self.dataset_name is None and self.suite is None:
            raise RecipeError(
                "dataset_name is missing; give the pairs to evaluate model on as --dataset_name, or a --suite"
            )
        if self.run:
            refuse_with_run({key: getattr(self, key) for key in OF_A_MODEL})
        if self.suite is not None and (self.dataset_name or self.split or self.sources):
            raise RecipeError("suite lists its own sets; leave out dataset_name, split and sources")
        if self.suite_root is not None and self.suite is None:
            raise RecipeError("suite_root holds the sets of a suite; name one with --suite")


# Keys of an evaluation of a model. A run has its own values.
OF_A_MODEL = (
    *("adapter", "prompt", "labels", "label_words", "model_revision", "output_dir", "dtype", "attn_implementation"),
    *("load_in_8bit", "load_in_4bit", "report_to"),
)


def refuse_with_run(values: Mapping[str, object]) -> None:
    """Raise `RecipeError` for the first of these keys that is given beside a run."""
    for key, value in values.items():
        if value:
            raise RecipeError(f"{key} is given, but a run has its own; leave it out, or evaluate a --model")


MACHINE = ("precision", "bf16", "fp16", "use_cpu")

# Never written to a run folder, a model card or W&B.
SECRETS = ("hub_token",)

# Names of gradient_checkpointing and its kwargs in transformers 5.23 that older versions do not accept.
SYNONYMS = ("activation_checkpointing", "activation_checkpointing_kwargs")


class RecipeError(UserError):
    """An invalid recipe or command line. The message names the key and the fix."""


def parse_recipe(types: Sequence[type], argv: Sequence[str] | None = None, positional: str | None = None) -> tuple:
    """Parse the command line, and the YAML file that `--config` names, into one instance of each type.

    Stricter than `TrlParser`, on which it is built: unknown or repeated keys, abbreviated flags, values of the wrong
    type and the keys refused by `keys.py` raise an error of one sentence, with the closest valid name.

    Args:
        types: dataclass types with no field in common.
        argv: the arguments. Those of the process by default.
        positional: the key that takes arguments without a flag. By default they are errors.

    Returns:
        One instance of each type, in order.

    Raises:
        RecipeError: if the recipe or the command line is invalid.
    """
    return _parse(types, sys.argv[1:] if argv is None else list(argv), positional)


def run_script(main: Callable, types: Sequence[type], positional: str | None = None) -> None:
    """Call a script's `main` with its parsed configs. A `UserError` is printed without a traceback."""
    # Deprecations in libraries are for developers, not for users of a script.
    warnings.simplefilter("ignore", FutureWarning)
    configs: tuple = ()
    try:
        configs = parse_recipe(types, positional=positional)
        main(*configs)
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        # A second Ctrl-C kills at once. Under torchrun it is ignored: torchrun forwards the first one as a second.
        signal.signal(signal.SIGINT, signal.SIG_IGN if is_elastic() else signal.SIG_DFL)
        training = next((config for config in configs if hasattr(config, "resume_from_checkpoint")), None)
        say_goodbye(training and training.output_dir)
        sys.exit(128 + signal.SIGINT)
    except SystemExit as stop:  # the trainer has printed the message
        if stop.code == 128 + signal.SIGINT:
            end_launcher()
        raise


# Keys of one launch, not of the run: a recipe that is run again starts from scratch and deletes nothing.
ONCE = ("overwrite_output_dir", "resume_from_checkpoint")


def resolve_recipe(configs: Sequence[Any]) -> dict[str, object]:
    """All values that differ from the defaults, in one dict. Dumped as YAML, it is a recipe for the same run."""
    resolved = {}
    for config in configs:
        defaults = _defaults(type(config), {f.name: getattr(config, f.name) for f in fields(config)})
        for f in fields(config):
            value = getattr(config, f.name)
            if f.init and f.name not in (*SECRETS, *SYNONYMS, *ONCE) and value != defaults.get(f.name, MISSING):
                resolved[f.name] = value.value if isinstance(value, Enum) else value
    for key in idle_keys(*field_values(configs)):
        resolved.pop(key, None)
    if "precision" in resolved:  # replaces TRL's two flags
        resolved = {key: value for key, value in resolved.items() if key not in ("bf16", "fp16")}
    return resolved


def from_recipe(config_type: type[Config], recipe: Mapping[str, object]) -> Config:
    """Build a dataclass from a resolved recipe, ignoring the keys of other dataclasses."""
    names = {f.name for f in fields(config_type) if f.init}  # pyright: ignore[reportArgumentType] (a dataclass)
    return config_type(**{key: value for key, value in recipe.items() if key in names})


def _defaults(config_type: Any, values: dict[str, object]) -> dict[str, object]:
    """The fields after `__post_init__` if the user sets only those that have no default.

    Device and precision have none here, so that a recipe keeps them: their defaults depend on the machine.
    """
    given = {
        f.name: values[f.name]
        for f in fields(config_type)
        if f.init and (f.name in MACHINE or (f.default is MISSING and f.default_factory is MISSING))
    }
    instance = config_type(**given)
    return {f.name: getattr(instance, f.name) for f in fields(config_type) if f.name not in given}


class _Parser(TrlParser):
    """TRL's parser, with one group of flags per dataclass and errors of one sentence, without the usage."""

    def _add_dataclass_arguments(self, dtype: Any) -> None:
        # transformers reads the title of a group from this attribute.
        dtype._argument_group_name = _TRL_TITLES.get(dtype.__name__) or _title(dtype)
        super()._add_dataclass_arguments(dtype)

    def error(self, message: str) -> NoReturn:
        # argparse names all spellings of a flag; a recipe has one.
        message = re.sub(r"^argument --(\w+)(/\S+)?: ", r"\1: ", message)
        for pattern, plain in _PLAIN_ERRORS.items():
            message = re.sub(pattern, plain, message)
        missing = re.match(r"the following arguments are required: --(\w+)", message)
        raise RecipeError(
            f"{missing[1]} is missing; give it in the recipe or as --{missing[1]}" if missing else message
        )


_PLAIN_ERRORS = {
    r": invalid int value: '(.*)'$": r" is '\1'; it must be a whole number",
    r": invalid float value: '(.*)'$": r" is '\1'; it must be a number",
    r": Truthy value expected: got (.*) but expected one of .*$": r" is '\1'; it must be true or false",
    r": expected one argument$": " has no value; write it as --key value",
    r": expected at least one argument$": " has no values; give some, or leave it out",
}

_TRL_TITLES = {"ModelConfig": "Model and adapter (trl.ModelConfig)", "SFTConfig": "Training (trl.SFTConfig)"}

# Keys of other versions of TRL and transformers, or of PEFT and bitsandbytes, with their names here.
_OTHER_NAMES = {
    "warmup_ratio": "warmup_steps, which below 1 is a share of all steps",
    "torch_dtype": "dtype",
    "group_by_length": "train_sampling_strategy: group_by_length",
    "no_cuda": "use_cpu",
    "revision": "model_revision",
    "bnb_4bit_compute_dtype": "precision",
    "learning_rate_scheduler": "lr_scheduler_type",
    "batch_size": "per_device_train_batch_size",
    "epochs": "num_train_epochs",
    "target_modules": "lora_target_modules",
    "modules_to_save": "lora_modules_to_save",
}


def _title(config_type: type) -> str:
    return (config_type.__doc__ or config_type.__name__).splitlines()[0].rstrip(".")


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The script's docstring, then each key once, with its default if it has one."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        name = action.option_strings[0]
        if not name.startswith("--"):
            return ", ".join(action.option_strings)
        if action.choices is not None:
            return f"{name} {{{','.join(map(str, action.choices))}}}"
        if action.nargs == "?":
            return f"{name} [true|false]"
        return f"{name} {'VALUE [VALUE ...]' if action.nargs == '+' else 'VALUE'}"

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class _StrictLoader(yaml.SafeLoader):
    """A YAML loader that refuses repeated keys. The plain one keeps the last."""

    def construct_mapping(self, node, deep=False):
        seen = {}
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                raise RecipeError(f"line {key_node.start_mark.line + 1}: <<: is not supported; write its keys out")
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise RecipeError(f"line {key_node.start_mark.line + 1}: {key!r} cannot be a key; write key: value")
            if key in seen:
                raise RecipeError(f"key {key!r} is on lines {seen[key]} and {key_node.start_mark.line + 1}; keep one")
            seen[key] = key_node.start_mark.line + 1
        return super().construct_mapping(node, deep)


def _parse(types: Sequence[type], argv: list[str], positional: str | None) -> tuple:
    parser = _Parser(
        list(types),  # pyright: ignore[reportArgumentType] (dataclasses)
        allow_abbrev=False,
        usage="%(prog)s [--config RECIPE.yaml] [--key value ...]",
        description=sys.modules["__main__"].__doc__,
        formatter_class=_Help,
    )
    actions = {option: action for action in parser._actions for option in action.option_strings}
    if "--use_cpu" in actions:  # without it, TRL stops on a machine without a GPU
        parser.set_defaults(use_cpu=not torch.accelerator.is_available())
    if "--report_to" in actions:  # a string or a list, for which transformers makes a flag of one value
        actions["--report_to"].nargs = "+"
    if "--max_batch_tokens" in actions:  # an int or auto
        actions["--max_batch_tokens"].type = str
    for action in parser._actions:  # --key false does the same as --no_key
        is_negation = action.nargs == 0 and action.option_strings[0].startswith("--no_")
        if is_negation or ("--max_steps" in actions and action.dest in REFUSED):
            action.help = argparse.SUPPRESS
    defaults = vars(parser.parse_args(_stand_ins(parser, [])))
    argv, config_path = _take_config_flag(argv)
    tokens = []
    if config_path is not None:
        recipe, written = read_yaml(config_path), read_yaml(config_path, as_written=True)
        try:
            for key, value in recipe.items():
                tokens += _as_flags(str(key), value, written.get(key, value), actions)
            # Check the file on its own first, so that its errors name it.
            values = vars(parser.parse_args([*tokens, *_stand_ins(parser, tokens)]))
            refuse_keys(values, defaults)
        except UserError as error:
            raise RecipeError(f"{config_path}: {error}") from None
    changed = {token.split("=")[0] for token in argv if token.startswith("--")}
    for flag in changed:
        _check_known(flag, actions)
    tokens += _place_strays(argv, actions, positional)
    if "--bf16" in actions:
        tokens += _precision_flags(parser.parse_args(tokens))
    values = vars(parser.parse_args(tokens))
    refuse_keys(values, defaults)
    refuse_idle_keys(
        values, defaults, changed={flag.removeprefix("--") for flag in changed} if config_path is not None else ()
    )
    check_paths(values)
    configs = _run(parser, tokens)
    for config in configs:
        if hasattr(config, "metric_for_best_model"):
            check_training(config, next((one.labels for one in configs if getattr(one, "labels", None)), LABELS))
    return configs


def _place_strays(argv: list[str], actions: dict[str, argparse.Action], positional: str | None) -> list[str]:
    """Give arguments without a flag to the positional key, or raise with the right way to write them."""
    taken, strays, room = [], [], 0
    for token in argv:
        if token.startswith("--"):
            nargs = actions[token.split("=")[0]].nargs
            room = 0 if "=" in token or nargs == 0 else math.inf if nargs == "+" else 1
        elif room:
            room -= 1
        else:
            strays.append(token)
            continue
        taken.append(token)
    if strays and positional is None:
        raise RecipeError(_explain_stray(strays[0], actions))
    if not strays:
        return taken
    flag = f"--{positional}"
    place = taken.index(flag) + 1 if flag in taken else len(taken)
    return [*taken[:place], *([] if flag in taken else [flag]), *strays, *taken[place:]]


def _explain_stray(token: str, actions: dict[str, argparse.Action]) -> str:
    if token.endswith((".yaml", ".yml")):
        return f"{token} has no flag; give a recipe as --config {token}"
    if token.startswith("-") or "=" in token:
        return f"{token} is not a flag; flags begin with two dashes: --{token.lstrip('-')}"
    if "--run" in actions:
        return f"{token} has no flag; give a run folder as --run {token}"
    return f"{token} has no flag; write every argument as --key value"


def _precision_flags(parsed: argparse.Namespace) -> list[str]:
    """Flags that make TRL's bf16 and fp16 agree with `precision`. TRL's default is bf16 on every machine."""
    wanted = getattr(parsed, "precision", "auto")
    if parsed.bf16 and parsed.fp16:
        raise RecipeError("bf16 and fp16 are both true; keep one of them, or precision: auto")
    flag = "bf16" if parsed.bf16 else "fp16" if parsed.fp16 else "fp32" if parsed.bf16 is False else None
    if flag is not None:
        if wanted not in ("auto", flag):
            raise RecipeError(f"precision is {wanted}, but bf16 and fp16 mean {flag}; remove bf16 and fp16")
        wanted = flag
    chosen = choose_precision(wanted, torch.device("cpu") if parsed.use_cpu else default_device()).name
    flags = [f"--bf16={chosen == 'bf16'}", f"--fp16={chosen == 'fp16'}"]
    return [*flags, f"--precision={chosen}"] if hasattr(parsed, "precision") else flags


def _take_config_flag(argv: list[str]) -> tuple[list[str], Path | None]:
    rest, path = [], None
    arguments = iter(argv)
    for token in arguments:
        if token == "--config" or token.startswith("--config="):
            value = token.partition("=")[2] or next(arguments, None)
            if value is None or path is not None:
                raise RecipeError("--config takes one recipe file; give it once")
            path = Path(value)
        else:
            rest.append(token)
    return rest, path


def read_yaml(path: Path, as_written: bool = False) -> dict[str, Any]:
    """Read a YAML file without repeated keys.

    Args:
        as_written: return every value as its text in the file. YAML converts yes, on, ~, 1.0 and 2024-01-01.
    """
    try:
        recipe = yaml.load(path.read_text(encoding="utf-8-sig"), yaml.BaseLoader if as_written else _StrictLoader)
    except OSError as error:
        raise RecipeError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 text; save it as UTF-8") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, RecipeError):
            raise RecipeError(f"{path}: {error}") from None
        raise RecipeError(f"{path}: not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(recipe, dict):
        raise RecipeError(f"{path}: expected lines of the form key: value")
    return recipe


def _check_known(flag: str, actions: dict[str, argparse.Action]) -> None:
    if flag in actions:
        return
    if flag[2:] in _OTHER_NAMES:
        raise RecipeError(f"unknown key {flag[2:]!r}; here it is {_OTHER_NAMES[flag[2:]]}")
    near = difflib.get_close_matches(flag, actions, n=5, cutoff=0.6)
    near.sort(key=lambda name: -len(os.path.commonprefix([name, flag])))  # lora_rank means lora_r, not local_rank
    raise RecipeError(f"unknown key {flag[2:]!r}{f'; did you mean {near[0][2:]!r}?' if near else ''}")


def _as_flags(key: str, value: Any, written: Any, actions: dict[str, argparse.Action]) -> list[str]:
    """A key of a recipe as command-line flags, so that the same rules check file and flags.

    Text, lists and numbers are taken as `written`, such as yes, on, 1.0 and 0123456.
    """
    flag = f"--{key}"
    if isinstance(value, dict) and flag not in actions:
        inside = f", such as {next(iter(value))}," if value else ""
        raise RecipeError(f"{key} has nested keys, but a recipe is flat; write them{inside} without {key} above")
    _check_known(flag, actions)
    action = actions[flag]
    takes_list = action.nargs == "+"
    if any(isinstance(item, (dict, list)) for item in (value if isinstance(value, list) else [])):
        raise RecipeError(f"{key} takes a list of words, not of mappings or lists; quote each word")
    if isinstance(value, dict) and not key.endswith("_kwargs") and key not in REFUSED:
        raise RecipeError(f"{key} takes {'a list' if takes_list else 'one value'}, not nested keys")
    if value is None:
        if action.default is None:
            return []
        raise RecipeError(f"{key} is empty; give a value or remove the line")
    if isinstance(value, list) and len(value) == 1 and not takes_list:
        value, written = value[0], written[0]  # TRL turns some values into lists, such as report_to
    if isinstance(value, list):
        if not takes_list:
            raise RecipeError(f"{key} takes one value, not a list")
        return [flag, *map(str, written)]
    if isinstance(value, bool) and action.choices is not None:
        word = "no" if value is False else "yes"
        raise RecipeError(f'{key}: YAML reads an unquoted {word} as {str(value).lower()}; write {key}: "{word}"')
    if isinstance(value, dict):
        value = json.dumps({name: _as_number(item) for name, item in value.items()})
    elif takes_list or (action.type is str and not isinstance(value, bool)) or type(value) in (int, float):
        value = written
    return [flag, str(value)] if takes_list else [f"{flag}={value}"]


def _as_number(value: object) -> object:
    """Numbers such as 1e-4, which YAML reads as text."""
    if isinstance(value, str):
        with suppress(ValueError):
            return float(value)
    return value


def _stand_ins(parser: _Parser, tokens: list[str]) -> list[str]:
    """Placeholders for required fields that the command line may give later."""
    given = {token.split("=")[0] for token in tokens}
    required = [action.option_strings[0] for action in parser._actions if action.required]
    return [f"{flag}=x" for flag in required if flag not in given]


def _run(parser: _Parser, tokens: list[str]) -> tuple:
    try:
        return parser.parse_args_into_dataclasses(args=tokens, look_for_args_file=False)
    except RecipeError:
        raise
    except (ValueError, TypeError, ImportError) as error:  # raised by __post_init__
        raise RecipeError(" ".join(str(error).split())) from error
