"""What a recipe may say: small dataclasses beside TRL's, and a parser that takes nothing else.

A recipe is one flat YAML file. Its keys are the fields of the dataclasses that a script asks for; flags on the command
line have the same names and win over the file.
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
from typing import NoReturn, TypeVar

import torch
import yaml
from trl import TrlParser

from .. import UserError
from ..interrupts import end_launcher, is_elastic, say_goodbye
from ..labels import LABELS
from ..models.precision import choose_precision, default_device
from .keys import REFUSED, check_paths, check_training, field_values, idle_keys, refuse_idle_keys, refuse_keys

Config = TypeVar("Config")

# Of a key whose value is chosen to suit the machine or the run folder.
AUTO = "auto"

# The tokens of a forward pass, unless a recipe says otherwise.
BATCH_TOKENS = 8192


@dataclass
class DataConfig:
    """Data."""

    dataset_name: str = field(metadata={"help": "Hub id, folder, file or URL of premise-hypothesis pairs."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    dataset_revision: str | None = field(
        default=None, metadata={"help": "Commit of a Hub data set: a moving set is a moving result."}
    )
    premise_column: str | None = field(default=None, metadata={"help": "Column of the premise, if unusual."})
    hypothesis_column: str | None = field(default=None, metadata={"help": "Column of the hypothesis, if unusual."})
    label_column: str | None = field(default=None, metadata={"help": "Column of the label, if unusual."})
    uid_column: str | None = field(default=None, metadata={"help": "Column of the pair's id, if unusual."})
    label_spellings: list[str] | None = field(
        default=None, metadata={"help": f"How the set writes the labels, in the order {', '.join(LABELS)}."}
    )

    def columns(self) -> dict[str, str]:
        """The columns named by the user, as `sources.load_pairs` takes them."""
        named = {role: getattr(self, f"{role}_column") for role in ("premise", "hypothesis", "label", "uid")}
        return {role: column for role, column in named.items() if column is not None}


@dataclass
class TrainDataConfig(DataConfig):
    """Training data."""

    train_split: str | None = field(
        default=None, metadata={"help": "Split to train on, where it is not called train: train_r1, say."}
    )
    validation_split: str | None = field(
        default=None,
        metadata={"help": "Split to validate on, where it is not called validation or dev: validation_matched, say."},
    )
    max_train_samples: int | None = field(
        default=None,
        metadata={"help": "Train on so many pairs, taken by premise, with the label shares of the whole."},
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Validate on so many pairs, taken in the same way."}
    )
    train_mix: list[str] | None = field(
        default=None,
        metadata={
            "help": "Further sources to train on, each with how many of its pairs go with one of the run's own: "
            "demo=0.25 mnli.jsonl=0.5."
        },
    )
    balance: str | None = field(
        default=None,
        metadata={
            "help": "Leave training pairs out until all labels are as frequent (label), or until no premise has two "
            "pairs of one label (premise).",
            "choices": ["label", "premise"],
        },
    )
    validation_fraction: float = field(
        default=0.1, metadata={"help": "Share of premises held out where the source has no validation split."}
    )


@dataclass
class PromptConfig:
    """Prompt and label words."""

    prompt: str = field(
        default="plain", metadata={"help": "A built-in prompt, or a .yaml or .json file with your own."}
    )
    label_words: list[str] | None = field(
        default=None, metadata={"help": f"What the model says for {', '.join(LABELS)}, in that order."}
    )
    train_on_end: bool = field(
        default=False, metadata={"help": "Whether the end of the turn is part of the answer that is trained."}
    )
    hypothesis_only_control: bool = field(
        default=False,
        metadata={"help": "Also train the same base without the premise: what a result must be measured against."},
    )
    drop_too_long: bool = field(
        default=False, metadata={"help": "Drop (and count) rows longer than max_length instead of stopping."}
    )


@dataclass
class BatchConfig:
    """Batches and memory."""

    batching: str = field(
        default="trie",
        metadata={
            "help": "trie computes each shared prefix once; padded is for models that cannot (chosen by itself then).",
            "choices": ["trie", "padded"],
        },
    )
    max_row_tokens: int = field(default=512, metadata={"help": "The longest row of a trie, in tokens."})
    max_batch_tokens: str = field(
        default=BATCH_TOKENS,
        metadata={
            "help": "The most tokens of a forward pass on tries; larger batches go in parts, to the same effect. auto "
            "is what the estimate says fits in the memory that is free."
        },
    )
    cuda_graph: str = field(
        default="auto",
        metadata={
            "help": "Replay the training step as CUDA graphs: auto where the step can be recorded, true to insist.",
            "choices": ["auto", "true", "false"],
        },
    )
    group_by_premise: bool = field(
        default=False, metadata={"help": "Put pairs with the same premise into the same batch, where tries share it."}
    )

    def __post_init__(self):
        """Make a number of `max_batch_tokens`: an argument parser knows one type a field, and here that is text."""
        given = str(self.max_batch_tokens)
        if given != AUTO:
            if not given.isdecimal() or int(given) == 0:
                raise RecipeError(f"max_batch_tokens takes a number of tokens or {AUTO}, not {given!r}")
            self.max_batch_tokens = int(given)


@dataclass
class MachineConfig:
    """Hardware and the run folder."""

    precision: str = field(
        default="auto",
        metadata={
            "help": "auto is bf16 where the device has it natively, fp16 on older cards, fp32 on most CPUs.",
            "choices": ["auto", "bf16", "fp16", "fp32"],
        },
    )
    estimate: bool = field(
        default=False,
        metadata={"help": "Only say what memory the training would take, before anything but a config is downloaded."},
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata={"help": "Clear what an earlier run wrote into output_dir, and nothing else; a used one is refused."},
    )


@dataclass
class TrackingConfig:
    """Weights & Biases."""

    wandb_entity: str | None = field(default=None, metadata={"help": "User or team; your default one if empty."})
    wandb_project: str | None = field(
        default=None, metadata={"help": "nli-sft if neither this nor WANDB_PROJECT is set."}
    )
    wandb_group: str | None = field(
        default=None, metadata={"help": "The study that the run belongs to; base-source by default."}
    )
    wandb_tags: list[str] | None = field(default=None, metadata={"help": "Tags beside source, method and seed."})
    wandb_notes: str | None = field(default=None, metadata={"help": "What the run is for, in a sentence."})


@dataclass
class EvalConfig(DataConfig):
    """Evaluation."""

    run: str = field(default="", metadata={"help": "The run folder that recipes/sft.py made."})
    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Hub id, folder, file or URL to evaluate on; by default the run's source."},
    )
    split: str | None = field(
        default=None, metadata={"help": "Split to evaluate on: test by default, or all of a single file."}
    )
    sources: list[str] | None = field(
        default=None,
        metadata={"help": "Further sources for the same report, such as hans.jsonl or demo:test (name:split)."},
    )
    suite: str | None = field(
        default=None,
        metadata={"help": "Evaluate on a suite of sets instead: one of recipes/suites, or a .yaml file of your own."},
    )
    suite_root: str | None = field(
        default=None, metadata={"help": "A folder with the sets of the suite by name; the others are fetched."}
    )
    calibration_pairs: int = field(
        default=1000,
        metadata={"help": "Fit the temperature on so many validation pairs of the run's own source; 0 for none."},
    )
    max_samples: int | None = field(
        default=None,
        metadata={"help": "Evaluate on so many pairs, taken by premise, with the label shares of the whole."},
    )
    unconstrained_samples: int = field(
        default=200, metadata={"help": "So many pairs are also answered without constraints, to see what is said."}
    )
    per_device_eval_batch_size: int = field(
        default=64, metadata={"help": "Prompts a forward pass; halved by itself if they do not fit in memory."}
    )
    precision: str = field(
        default="auto",
        metadata={
            "help": "As in training: by default what the device has.",
            "choices": ["auto", "bf16", "fp16", "fp32"],
        },
    )
    batching: str | None = field(
        default=None, metadata={"help": "trie or padded; as in training by default.", "choices": ["trie", "padded"]}
    )
    seed: int = field(default=42, metadata={"help": "Seed of max_samples."})
    trust_remote_code: bool = field(
        default=False,
        metadata={
            "help": "Run code that comes with the base model. What the run says is not enough: it may be anyone's."
        },
    )

    def __post_init__(self):
        if not self.run:
            raise RecipeError("run is missing; give the run folder as --run outputs/<model>-<method>")
        if self.suite is not None and (self.dataset_name or self.split or self.sources):
            raise RecipeError("suite lists its own sets; leave out dataset_name, split and sources")
        if self.suite_root is not None and self.suite is None:
            raise RecipeError("suite_root holds the sets of a suite; name one with --suite")


MACHINE = ("precision", "bf16", "fp16", "use_cpu")

# Never written to a run folder, a card or W&B.
SECRETS = ("hub_token",)

# What transformers 5.23 also calls gradient_checkpointing and its kwargs. Older ones do not know these names.
SYNONYMS = ("activation_checkpointing", "activation_checkpointing_kwargs")


class RecipeError(UserError):
    """A recipe or command line that cannot be meant; the message names the key and the fix."""


def parse_recipe(types: Sequence[type], argv: Sequence[str] | None = None, positional: str | None = None) -> tuple:
    """Parse the command line, and the YAML file that `--config` names, into one instance of each type.

    Stricter than `TrlParser`, through which it goes: unknown and repeated keys, abbreviated flags, values of the wrong
    type or outside a field's choices are errors in one sentence, with the nearest right name. So is what `check_keys`
    refuses.

    Args:
        types: dataclass types, without a field in common.
        argv: the arguments; those of the process by default.
        positional: the key that takes arguments without a flag, wherever they stand; by default they are errors.

    Returns:
        One instance of each type, in order.

    Raises:
        RecipeError: with that sentence.
    """
    return _parse(types, sys.argv[1:] if argv is None else list(argv), positional)


def run_script(main: Callable, types: Sequence[type], positional: str | None = None) -> None:
    """Call a script's `main` with its parsed configs; what the user got wrong ends in a sentence, not a traceback."""
    # What libraries deprecate is for those who write code, not for those who run it.
    warnings.simplefilter("ignore", FutureWarning)
    configs = ()
    try:
        configs = parse_recipe(types, positional=positional)
        main(*configs)
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        # The second one ends at once; but torchrun passes on the first, after the terminal has sent it.
        signal.signal(signal.SIGINT, signal.SIG_IGN if is_elastic() else signal.SIG_DFL)
        training = next((config for config in configs if hasattr(config, "resume_from_checkpoint")), None)
        say_goodbye(training and training.output_dir)
        sys.exit(128 + signal.SIGINT)
    except SystemExit as stop:  # the trainer has said it all
        if stop.code == 128 + signal.SIGINT:
            end_launcher()
        raise


# Said of one start of a training, not of the run: one that is run again starts from the beginning and clears nothing.
ONCE = ("overwrite_output_dir", "resume_from_checkpoint")


def resolve_recipe(configs: Sequence[object]) -> dict[str, object]:
    """What parsed configs say beyond the defaults, flat: dumped as YAML, it is a recipe for the same run."""
    resolved = {}
    for config in configs:
        defaults = _untouched(type(config), {f.name: getattr(config, f.name) for f in fields(config)})
        for f in fields(config):
            value = getattr(config, f.name)
            if f.init and f.name not in (*SECRETS, *SYNONYMS, *ONCE) and value != defaults.get(f.name, MISSING):
                resolved[f.name] = value.value if isinstance(value, Enum) else value
    for key in idle_keys(*field_values(configs)):
        resolved.pop(key, None)
    if "precision" in resolved:  # says what TRL's two flags say
        resolved = {key: value for key, value in resolved.items() if key not in ("bf16", "fp16")}
    return resolved


def from_recipe(config_type: type[Config], recipe: Mapping[str, object]) -> Config:
    """Build one dataclass from the keys that it knows in a resolved recipe, such as that of a run folder."""
    names = {f.name for f in fields(config_type) if f.init}
    return config_type(**{key: value for key, value in recipe.items() if key in names})


def _untouched(config_type: type, values: dict[str, object]) -> dict[str, object]:
    """What the fields hold after `__post_init__` when the user sets only what has no default.

    Device and precision are always part of a resolved recipe: their defaults depend on the machine.
    """
    given = {
        f.name: values[f.name]
        for f in fields(config_type)
        if f.init and (f.name in MACHINE or (f.default is MISSING and f.default_factory is MISSING))
    }
    instance = config_type(**given)
    return {f.name: getattr(instance, f.name) for f in fields(config_type) if f.name not in given}


class _Parser(TrlParser):
    """TRL's parser with the flags of each dataclass in a group; an error is one sentence, without 200 flags before."""

    def _add_dataclass_arguments(self, dtype: type) -> None:
        # What transformers reads the title of a group from.
        package = dtype.__module__.partition(".")[0]
        dtype._argument_group_name = f"{dtype.__name__} of {package}" if package == "trl" else _title(dtype)
        super()._add_dataclass_arguments(dtype)

    def error(self, message: str) -> NoReturn:
        # argparse names all spellings of a flag; a recipe knows one.
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

# What keys of other versions of TRL and transformers, or of PEFT and bitsandbytes, are called here.
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
    """What --help says: the script's own words as they stand, then every key with its default."""


class _StrictLoader(yaml.SafeLoader):
    """YAML without repeated keys, of which the plain loader keeps the last."""

    def construct_mapping(self, node, deep=False):
        seen = {}
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                raise RecipeError(f"line {key_node.start_mark.line + 1}: <<: is not supported; write its keys out")
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise RecipeError(f"line {key_node.start_mark.line + 1}: {key!r} cannot be a key; write key: value")
            if key in seen:
                raise RecipeError(
                    f"key {key!r} stands on lines {seen[key]} and {key_node.start_mark.line + 1}; keep one"
                )
            seen[key] = key_node.start_mark.line + 1
        return super().construct_mapping(node, deep)


def _parse(types: Sequence[type], argv: list[str], positional: str | None) -> tuple:
    parser = _Parser(
        list(types),
        allow_abbrev=False,
        usage="%(prog)s [--config RECIPE.yaml] [--key value ...]",
        description=sys.modules["__main__"].__doc__,
        formatter_class=_Help,
    )
    actions = {option: action for action in parser._actions for option in action.option_strings}
    if "--use_cpu" in actions:  # TRL stops where there is no GPU unless it is told so
        parser.set_defaults(use_cpu=not torch.accelerator.is_available())
    if "--report_to" in actions:  # which takes several, as no argument parser can know
        actions["--report_to"].nargs = "+"
    defaults = vars(parser.parse_args(_stand_ins(parser, [])))
    argv, config_path = _take_config_flag(argv)
    tokens = []
    if config_path is not None:
        recipe, written = read_yaml(config_path), read_yaml(config_path, as_written=True)
        try:
            for key, value in recipe.items():
                tokens += _as_flags(str(key), value, written.get(key, value), actions)
            # The file by itself first, so that what is wrong in it is told as such.
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
            check_training(config)
    return configs


def _place_strays(argv: list[str], actions: dict[str, argparse.Action], positional: str | None) -> list[str]:
    """Give the arguments that no flag takes to the positional key, or say how they are meant to be written."""
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
        return f"{token} stands alone; give a recipe as --config {token}"
    if token.startswith("-") or "=" in token:
        return f"{token} is no flag; flags begin with two dashes: --{token.lstrip('-')}"
    if "--run" in actions:
        return f"{token} stands alone; give a run folder as --run {token}"
    return f"{token} stands alone; write every argument as --key value"


def _precision_flags(said: argparse.Namespace) -> list[str]:
    """The flags of the precision chosen. TRL's two say the same as ours; its own default is bf16 on every machine."""
    wanted = getattr(said, "precision", "auto")
    if said.bf16 and said.fp16:
        raise RecipeError("bf16 and fp16 are both true; keep one of them, or precision: auto")
    flag = "bf16" if said.bf16 else "fp16" if said.fp16 else "fp32" if said.bf16 is False else None
    if flag is not None:
        if wanted not in ("auto", flag):
            raise RecipeError(f"precision is {wanted}, but bf16 and fp16 say {flag}; keep precision and remove them")
        wanted = flag
    chosen = choose_precision(wanted, torch.device("cpu") if said.use_cpu else default_device()).name
    flags = [f"--bf16={chosen == 'bf16'}", f"--fp16={chosen == 'fp16'}"]
    return [*flags, f"--precision={chosen}"] if hasattr(said, "precision") else flags


def _take_config_flag(argv: list[str]) -> tuple[list[str], Path | None]:
    rest, path = [], None
    arguments = iter(argv)
    for token in arguments:
        if token == "--config" or token.startswith("--config="):
            value = token.partition("=")[2] or next(arguments, None)
            if value is None or path is not None:
                raise RecipeError("--config takes one recipe file, once")
            path = Path(value)
        else:
            rest.append(token)
    return rest, path


def read_yaml(path: Path, as_written: bool = False) -> dict[str, object]:
    """The keys of a YAML file, each of which may stand there once.

    Args:
        as_written: give every value as the text that stands in the file; YAML itself takes yes, on, ~, 1.0 and
            2024-01-01 for something else.
    """
    try:
        recipe = yaml.load(path.read_text(encoding="utf-8-sig"), yaml.BaseLoader if as_written else _StrictLoader)
    except OSError as error:
        raise RecipeError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 text; save it in that encoding") from error
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


def _as_flags(key: str, value: object, written: object, actions: dict[str, argparse.Action]) -> list[str]:
    """One line of a recipe as command line flags, so that file and flags are checked by the same rules.

    Lists, numbers, and single values of a key that takes text, stay as they are `written`: yes, on, 1.0, 0123456.
    """
    flag = f"--{key}"
    if isinstance(value, dict) and flag not in actions:
        inside = f", such as {next(iter(value))}," if value else ""
        raise RecipeError(f"{key} holds keys of its own, but a recipe is flat; write them{inside} without {key} above")
    _check_known(flag, actions)
    action = actions[flag]
    takes_list = action.nargs == "+"
    if any(isinstance(item, (dict, list)) for item in (value if isinstance(value, list) else [])):
        raise RecipeError(f"{key} takes a list of words, not of mappings or lists; put quotes around each")
    if isinstance(value, dict) and not key.endswith("_kwargs") and key not in REFUSED:
        raise RecipeError(f"{key} takes {'a list' if takes_list else 'one value'}, not keys of its own")
    if value is None:
        if action.default is None:
            return []
        raise RecipeError(f"{key} is empty; give a value or remove the line")
    if isinstance(value, list) and len(value) == 1 and not takes_list:
        value, written = value[0], written[0]  # TRL itself turns some values into lists, such as report_to
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
    """YAML takes 1e-4 for a text, for want of a dot."""
    if isinstance(value, str):
        with suppress(ValueError):
            return float(value)
    return value


def _stand_ins(parser: _Parser, tokens: list[str]) -> list[str]:
    """Values for required fields that a recipe leaves to the command line."""
    said = {token.split("=")[0] for token in tokens}
    required = [action.option_strings[0] for action in parser._actions if action.required]
    return [f"{flag}=x" for flag in required if flag not in said]


def _run(parser: _Parser, tokens: list[str]) -> tuple:
    try:
        return parser.parse_args_into_dataclasses(args=tokens, look_for_args_file=False)
    except RecipeError:
        raise
    except (ValueError, TypeError, ImportError) as error:  # raised by the dataclasses' own checks
        raise RecipeError(" ".join(str(error).split())) from error
