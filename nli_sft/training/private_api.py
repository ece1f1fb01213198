"""Private names of transformers, TRL and accelerate that training depends on, checked on import.

Most private names raise an error when they disappear. Those below do not: nothing happens if a new version no longer
calls an overridden method or no longer reads an attribute. So they are checked here.
"""

import inspect
from collections.abc import Callable, Iterator
from importlib.metadata import version
from types import CodeType

from accelerate import Accelerator
from transformers import Trainer
from trl import SFTTrainer

# Methods of the Trainer that training overrides, and what for.
OVERRIDDEN = {
    "_get_grad_norm": "stop a training at a gradient that is not finite",
    "_clip_grad_norm": "leave clipping to the CUDA graph of a step",
    "_save_checkpoint": "write checkpoints atomically, with a manifest",
    "_init_training_state": "read the progress of a resumed training",
    "_issue_warnings_after_load": "suppress false warnings about tied weights of a resumed model",
    "_get_output_dir": "write checkpoints to a separate folder until they are complete",
    "_get_train_sampler": "make the order of pairs independent of the number of processes",
    "get_batch_samples": "count the labelled tokens of a step on the CPU",
}

# Attributes that hold SFTTrainer's metrics.
ATTRIBUTES = {
    "_metrics": "report entropy and token accuracy of tries",
    "_total_train_tokens": "count the tokens of a training",
}


def missing() -> list[str]:
    """What the installed versions lack, one sentence each."""
    found = [*_missing_methods(), *_missing_attributes()]
    if "dynamo_plugin" not in _names(Accelerator.prepare_model):
        purpose = "compile models layer by layer and not as a whole"
        found.append(f"accelerate {version('accelerate')} no longer reads dynamo_plugin, needed to {purpose}")
    return found


def _missing_methods() -> Iterator[str]:
    called = set().union(*(_names(method) for method in _functions(Trainer)))
    for name, purpose in OVERRIDDEN.items():
        if name not in called:
            yield f"transformers {version('transformers')} no longer calls Trainer.{name}, needed to {purpose}"


def _missing_attributes() -> Iterator[str]:
    set_at_start = _names(SFTTrainer.__init__)
    for name, purpose in ATTRIBUTES.items():
        if name not in set_at_start:
            yield f"trl {version('trl')} no longer has SFTTrainer.{name}, needed to {purpose}"


def _functions(owner: type) -> list[Callable]:
    return [function for _, function in inspect.getmembers(owner, inspect.isfunction)]


def _names(function: Callable) -> set[str]:
    """Every attribute and global that a function names, nested functions included."""
    codes, names = [inspect.unwrap(function).__code__], set()
    while codes:
        code = codes.pop()
        names |= set(code.co_names)
        codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return names


if absent := missing():
    raise ImportError(f"{'; '.join(absent)}. Install the versions of constraints.txt.")
