"""Checks of recipe keys. Every key takes effect, or is refused with a reason before anything is loaded.

Most keys of a recipe belong to TRL and transformers. `REFUSED` lists those that have no effect here or would do harm.
tests/configs/test_keys.py lists the supported ones, and fails if an installed TRL has a key in neither list.
"""

import copy
import difflib
import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import UserError
from ..labels import LABELS

if TYPE_CHECKING:
    from trl import SFTConfig

# Metrics of an evaluation during training, reported with the prefix `eval_`.
LOWER_IS_BETTER = ("loss", "nll", "ece")
METRICS = ("accuracy", "macro_f1", *LOWER_IS_BETTER)  # and the F1 of each label, such as f1_entailment

_ALREADY_PACKED = "batching: trie already packs the pairs without truncating any"
_OWN_EVALUATION = "evaluations score the labels of each pair and keep no logits"
_OWN_COLUMNS = "nli-sft builds the rows, with fixed columns"
_OWN_LOADER = "batches are sharded so that they are the same for any number of processes"
_LABEL_LOSS = "the loss is on the label tokens only"
_PUSH = "training does not push; use recipes/push.py, which pushes a run with its results"
_LAUNCHER = "use accelerate launch --config_file accelerate_configs/... instead"
_LIGER = "TRL is removing it, and the trainer already computes the loss without all logits"
_SIGTERM = "SIGTERM always saves a checkpoint"

# Refused if set to anything but the default.
REFUSED = {
    "packing": _ALREADY_PACKED,
    "packing_strategy": _ALREADY_PACKED,
    "padding_free": _ALREADY_PACKED,
    "eval_packing": _ALREADY_PACKED,
    "assistant_only_loss": _LABEL_LOSS,
    "completion_only_loss": _LABEL_LOSS,
    "dataset_text_field": "use premise_column and hypothesis_column",
    "dataset_kwargs": _OWN_COLUMNS,
    "dataset_num_proc": "pairs are encoded in one process",
    "remove_unused_columns": _OWN_COLUMNS,
    "label_names": _OWN_COLUMNS,
    "length_column_name": _OWN_COLUMNS,
    "shuffle_dataset": "every epoch is shuffled already, by seed or data_seed",
    "truncation_mode": "pairs are never truncated; set drop_too_long: true to drop those longer than max_length",
    "pad_token": "padding is masked whatever its token, and TRL is removing the key",
    "model_init_kwargs": "use model_revision, dtype and attn_implementation",
    "lora_task_type": "the model is always a causal language model",
    "use_cache": "training never uses a cache",
    "use_liger_kernel": _LIGER,
    "liger_kernel_config": _LIGER,
    "activation_offloading": "use max_batch_tokens and gradient_checkpointing to save memory",
    "auto_find_batch_size": "a step that runs out of memory is repeated in smaller parts; see max_batch_tokens: auto",
    "accelerator_config": _OWN_LOADER,
    "dataloader_in_order": _OWN_LOADER,
    "dataloader_multiprocessing_context": "the workers use no device, so the default start method works",
    "parallelism_config": "only data parallelism, FSDP and ZeRO are supported; see accelerate_configs/",
    "fsdp": _LAUNCHER,
    "fsdp_config": _LAUNCHER,
    "deepspeed": _LAUNCHER,
    "bf16_full_eval": "evaluations use the precision of the training",
    "fp16_full_eval": "evaluations use the precision of the training",
    "prediction_loss_only": _OWN_EVALUATION,
    "eval_do_concat_batches": _OWN_EVALUATION,
    "eval_use_gather_object": _OWN_EVALUATION,
    "eval_accumulation_steps": _OWN_EVALUATION,
    "include_for_metrics": _OWN_EVALUATION,
    "batch_eval_metrics": _OWN_EVALUATION,
    "include_num_input_tokens_seen": "the logs already count them as num_tokens, without padding",
    "logging_nan_inf_filter": "a NaN loss always stops training",
    "enable_jit_checkpoint": _SIGTERM,
    "restore_callback_states_from_checkpoint": "resuming always restores what it needs",
    "push_to_hub": _PUSH,
    "hub_model_id": _PUSH,
    "hub_private_repo": _PUSH,
    "hub_strategy": _PUSH,
    "hub_always_push": _PUSH,
    "hub_revision": _PUSH,
    "do_train": "recipes/sft.py always trains",
    "do_predict": "recipes/eval.py evaluates on the test split",
}

# Values equivalent to the default, as configs hold them after `__post_init__`.
_PLAIN = {
    "completion_only_loss": True,
    "dataset_kwargs": {"skip_prepare_dataset": True},  # as NLITrainer sets it
    "include_num_input_tokens_seen": "no",
}

# Keys that take effect on padded batches only.
_PADDED_ONLY = {
    "pad_to_multiple_of": "it has no effect on tries",
    "label_smoothing_factor": "smoothing needs the logits of whole batches, which tries do not compute",
}

# Keys that have no effect unless another key has a certain value: (other key, that value in words, test, keys).
_SWITCHES: tuple[tuple[str, str, Callable[[Any], bool], tuple[str, ...]], ...] = (
    (
        "use_peft",
        "true",
        bool,
        (
            *("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_target_parameters"),
            *("lora_modules_to_save", "use_rslora", "use_dora"),
        ),
    ),
    ("max_steps", "-1", lambda value: value < 1, ("num_train_epochs",)),
    (
        "lr_scheduler_type",
        "a schedule that warms up, such as constant_with_warmup",
        lambda value: _as_yaml(value) not in ("constant", "reduce_lr_on_plateau"),
        ("warmup_steps",),
    ),
    (
        "optim",
        "an optimizer of the Adam family",
        lambda value: _as_yaml(value) not in ("sgd", "adafactor", "adagrad", "rmsprop"),
        ("adam_beta1", "adam_beta2", "adam_epsilon"),
    ),
    ("load_in_4bit", "true", bool, ("bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage")),
    ("eval_strategy", "steps", lambda value: value == "steps", ("eval_steps",)),
    (
        "eval_strategy",
        "steps or epoch",
        lambda value: value != "no",
        ("load_best_model_at_end", "metric_for_best_model", "eval_delay", "do_eval"),
    ),
    ("save_strategy", "steps", lambda value: value == "steps", ("save_steps",)),
    ("logging_strategy", "steps", lambda value: value == "steps", ("logging_steps",)),
    ("gradient_checkpointing", "true", bool, ("gradient_checkpointing_kwargs",)),
    ("dataloader_num_workers", "1 or more", bool, ("dataloader_persistent_workers", "dataloader_prefetch_factor")),
    ("train_sampling_strategy", "random", lambda value: value == "random", ("group_by_premise",)),
    ("batching", "trie", lambda value: value == "trie", ("max_row_tokens", "max_batch_tokens")),
    (
        "optim",
        "an optimizer of GaLore or APOLLO",
        lambda value: any(name in str(value).lower() for name in ("galore", "apollo")),
        ("optim_target_modules",),
    ),
)


def _is_steps(value: float) -> bool:
    return 0 < value < 1 or (value >= 1 and float(value).is_integer())


# Valid ranges of numbers. Infinity and NaN are never valid.
_RANGES: dict[str, tuple[Callable[[float], bool], tuple[str, ...]]] = {
    "at least 1": (
        lambda value: value >= 1,
        (
            *("max_train_samples", "max_eval_samples", "max_samples", "pairs", "max_length", "max_row_tokens"),
            *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
            *("lora_r", "lora_alpha", "save_total_limit", "torch_empty_cache_steps", "dataloader_prefetch_factor"),
            *("ddp_bucket_cap_mb", "ddp_timeout"),
        ),
    ),
    "above 0": (
        lambda value: value > 0,
        ("num_train_epochs", "learning_rate", "adam_epsilon", "neftune_noise_alpha"),
    ),
    "0 or more": (
        lambda value: value >= 0,
        (
            *("weight_decay", "max_grad_norm", "eval_delay", "dataloader_num_workers", "router_aux_loss_coef"),
            *("calibration_pairs", "unconstrained_samples"),
        ),
    ),
    "above 0 and below 1": (lambda value: 0 < value < 1, ("validation_fraction",)),
    "0 or more and below 1": (
        lambda value: 0 <= value < 1,
        ("lora_dropout", "label_smoothing_factor", "adam_beta1", "adam_beta2"),
    ),
    "from 0 to 1": (lambda value: 0 <= value <= 1, ("max_difference", "max_flips")),
    "a whole number of steps, or a share of all steps between 0 and 1": (
        _is_steps,
        ("logging_steps", "eval_steps", "save_steps"),
    ),
    "0, a whole number of steps, or a share of all steps between 0 and 1": (
        lambda value: value == 0 or _is_steps(value),
        ("warmup_steps",),
    ),
    "at least 1, or -1 for whole epochs": (lambda value: value >= 1 or value == -1, ("max_steps",)),
    "from 0 to 4294967295": (lambda value: 0 <= value < 2**32, ("seed", "data_seed")),
    "from 1 to 65535": (lambda value: 1 <= value < 2**16, ("port",)),
}
RANGE_OF = {key: (words, test) for words, (test, keys) in _RANGES.items() for key in keys}

_CHOICES = {"bnb_4bit_quant_storage": ("uint8", "bfloat16", "float16", "float32", "float64", "int8")}

# Keys that name output paths.
_FOLDERS = ("output_dir", "figures")
_FILES = ("html", "json", "svg")


def refuse_keys(values: Mapping[str, object], defaults: Mapping[str, object]) -> None:
    """Refuse values that are not supported.

    Args:
        values: all keys with their values.
        defaults: all keys with their defaults.

    Raises:
        UserError: for a key of `REFUSED`, a number out of range, or a key that has no effect on tries.
    """
    is_training = "max_steps" in values  # recipes/push.py has keys of the same names
    if values.get("class_weights") and values.get("label_smoothing_factor"):
        raise UserError("label_smoothing_factor would have no effect with class_weights; remove one of the two")
    for key, value in _given(values, defaults).items():
        if is_training and key in REFUSED and value != _PLAIN.get(key, MISSING):
            raise UserError(f"remove {key}: {REFUSED[key]}")
        if key in _PADDED_ONLY and values.get("batching") == "trie":
            raise UserError(f"{key}: {_PADDED_ONLY[key]}; set batching: padded, or remove {key}")
        if key in RANGE_OF:
            _check_range(key, value)
        if key in _CHOICES and value not in _CHOICES[key]:
            raise UserError(f"{key} is {value}; it must be one of {', '.join(_CHOICES[key])}")
        if key.endswith("_kwargs") and isinstance(value, str):
            _check_json(key, value)
        if key == "ddp_backend" and "RANK" not in os.environ:
            raise UserError("ddp_backend needs several processes; use accelerate launch, or remove ddp_backend")


def refuse_idle_keys(
    values: Mapping[str, object], defaults: Mapping[str, object], changed: Collection[str] = ()
) -> None:
    """Refuse keys that have no effect because of another key.

    Args:
        values, defaults: as for `refuse_keys`.
        changed: keys set on the command line. Keys of a recipe file that these make idle are not refused, so that
            `--use_peft false` is enough to train all weights.

    Raises:
        UserError: naming both keys.
    """
    for key, switch, wanted in _idle(values, defaults):
        if switch not in changed:
            now = _as_yaml(values[switch])
            raise UserError(f"{key} has no effect with {switch}: {now}; set {switch}: {wanted}, or remove {key}")


def idle_keys(values: Mapping[str, object], defaults: Mapping[str, object]) -> set[str]:
    """The keys that `refuse_idle_keys` would refuse."""
    return {key for key, _, _ in _idle(values, defaults)}


def field_values(configs: Sequence[Any]) -> tuple[dict[str, object], dict[str, object]]:
    """The values of all fields of the configs, and their defaults."""
    values, defaults = {}, {}
    for config in configs:
        for f in fields(config):
            if f.init:
                values[f.name] = getattr(config, f.name)
                defaults[f.name] = f.default if f.default_factory is MISSING else f.default_factory()
    return values, defaults


def check_training(args: "SFTConfig", labels: Sequence[str] = LABELS) -> None:
    """Check what would otherwise fail only after the model is loaded, or after the first evaluation.

    Args:
        labels: the label set, which names some metrics.

    Raises:
        UserError: for an unknown metric, tracker, optimizer, schedule or compiler option.
    """
    _check_best_model(args, labels)
    _check_trackers(args)
    _check_schedule(args)
    _check_step(args)


def check_paths(values: Mapping[str, object]) -> None:
    """Check that output paths can be written.

    Raises:
        UserError: naming the key and the obstacle.
    """
    for key in (*_FOLDERS, *_FILES):
        if values.get(key) is not None:
            try:
                _check_path(key, str(values[key]), is_folder=key in _FOLDERS)
            except OSError as error:
                raise UserError(f"{key} {values[key]}: cannot write there ({error.strerror})") from error


def _given(values: Mapping[str, object], defaults: Mapping[str, object]) -> dict[str, object]:
    """Values that are neither empty nor the default. A nested config that holds its defaults counts as empty."""

    def is_plain(value):
        return value is None or (is_dataclass(value) and value == type(value)())

    return {key: value for key, value in values.items() if not is_plain(value) and value != defaults[key]}


def _idle(values: Mapping[str, object], defaults: Mapping[str, object]) -> list[tuple[str, str, str]]:
    """(idle key, the key that makes it idle, the value that key must have)"""
    given = _given(values, defaults)
    return [
        (key, switch, wanted)
        for switch, wanted, is_on, keys in _SWITCHES
        if switch in values and not is_on(values[switch])
        for key in keys
        if key in given
    ]


def _check_range(key: str, value: object) -> None:
    words, is_inside = RANGE_OF[key]
    if isinstance(value, (int, float)) and not (math.isfinite(value) and is_inside(value)):
        raise UserError(f"{key} is {value}; it must be {words}")


def _check_json(key: str, text: str) -> None:
    try:
        is_mapping = isinstance(json.loads(text), dict)
    except json.JSONDecodeError:
        is_mapping = False
    if not is_mapping:
        raise UserError(f'{key} is {text}; write it as nested keys in a recipe, or as JSON: {{"name": 1}}')


def _as_yaml(value: object) -> str:
    value = value.value if isinstance(value, Enum) else value
    return str(value).lower() if isinstance(value, bool) else str(value)


def _check_path(key: str, name: str, is_folder: bool) -> None:
    path = Path(name).expanduser()
    if not name:
        raise UserError(f"{key} is empty; name a {'folder' if is_folder else 'file'}")
    if path.exists() and path.is_dir() != is_folder:
        there = "this is a file; name a folder" if is_folder else "this is a folder; name a file in it"
        raise UserError(f"{key} {name}: {there}")
    folder = path if is_folder else path.parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise UserError(f"{key} {name}: {folder} is a file, not a folder")
    tempfile.TemporaryFile(dir=folder).close()
    if path.is_file() and not os.access(path, os.W_OK):
        raise UserError(f"{key} {name}: the file is write-protected; name another")


def _check_best_model(args: "SFTConfig", labels: Sequence[str]) -> None:
    name = args.metric_for_best_model
    if args.save_strategy == "best" and (name is None or args.eval_strategy == "no"):
        raise UserError(
            "save_strategy: best needs an evaluation metric; set eval_strategy: steps or epoch, and "
            "metric_for_best_model, such as eval_accuracy"
        )
    if name is None:
        return
    name = name.removeprefix("eval_")
    metrics = *METRICS, *(f"f1_{label}" for label in labels)
    if name not in metrics:
        reported = ", ".join(f"eval_{metric}" for metric in metrics)
        raise UserError(
            f"metric_for_best_model: {args.metric_for_best_model!r} is not a metric; choose one of {reported}"
        )
    lower = name in LOWER_IS_BETTER
    if args.greater_is_better == lower:
        raise UserError(
            f"metric_for_best_model: {'lower' if lower else 'higher'} {name} is better; set "
            f"greater_is_better: {_as_yaml(not lower)}"
        )


def _check_trackers(args: "SFTConfig") -> None:
    # Slow to import, and used in training only.
    from transformers.integrations import get_available_reporting_integrations
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    for name in [args.report_to] if isinstance(args.report_to, str) else args.report_to or []:
        if name not in INTEGRATION_TO_CALLBACK:
            if name in ("all", "none"):
                raise UserError(f"report_to: {name} cannot be combined with other trackers")
            if "," in name:
                raise UserError(f"report_to is {name!r}; give several trackers as a list: [{name}]")
            known = [*INTEGRATION_TO_CALLBACK]
            near = difflib.get_close_matches(name, known, n=1) or [f"one of {', '.join(known)}, all or none"]
            raise UserError(f"report_to: unknown tracker {name!r}; did you mean {near[0]}?")
        if name not in get_available_reporting_integrations():
            raise UserError(f"report_to names {name}, which is not installed; install it, or set report_to: none")


def _check_schedule(args: "SFTConfig") -> None:
    """Look up the optimizer and build the schedule for a dummy one: transformers does so after loading the model."""
    import torch
    from transformers import Trainer, get_scheduler

    if args.optim_args is not None and not re.fullmatch(r"\s*\w+\s*=[^,=]+(,\s*\w+\s*=[^,=]+)*", args.optim_args):
        raise UserError(f"optim_args is {args.optim_args!r}; write it as name=value,name=value")
    optim = _as_yaml(args.optim)
    try:
        made = Trainer.get_optimizer_cls_and_kwargs(args)
        without = copy.copy(args)
        without.optim_args = None
        idle = args.optim_args is not None and made == Trainer.get_optimizer_cls_and_kwargs(without)
    except ImportError as error:
        raise UserError(f"optim: {optim} is not installed ({' '.join(str(error).split())})") from error
    except ValueError:  # some optimizers need the model
        idle = False
    if idle:
        raise UserError(f"optim_args has no effect with optim: {optim}; remove optim_args")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    name = _as_yaml(args.lr_scheduler_type)
    options: Any = args.lr_scheduler_kwargs or {}  # refuse_keys has checked that it is a mapping
    try:
        get_scheduler(name, optimizer, 1, 10, scheduler_specific_kwargs=dict(options))
    except (TypeError, ValueError) as error:
        raise UserError(f"lr_scheduler_kwargs do not fit lr_scheduler_type: {name} ({error})") from error


def _check_step(args: "SFTConfig") -> None:
    """Check options of gradient checkpointing and of torch.compile."""
    import torch

    known = ("use_reentrant", "preserve_rng_state", "determinism_check", "debug", "early_stop")
    for key in args.gradient_checkpointing_kwargs or {}:
        if key not in known:
            raise UserError(f"gradient_checkpointing_kwargs has no key {key!r}; valid keys are {', '.join(known)}")
    for key, names in (
        ("torch_compile_backend", torch.compiler.list_backends(exclude_tags=())),
        ("torch_compile_mode", ["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]),
    ):
        value = getattr(args, key)
        if args.torch_compile and value not in (None, *names):
            raise UserError(f"{key} is {value}; it must be one of {', '.join(names)}")
