"""What is given as base: whether it can be trained, and what it can read. Known before any weights are loaded.

A base is a folder or a Hub id with a causal language model in safetensors. What people give besides (an adapter, a
GGUF file, pickles, an encoder, half a download) ends in one sentence that says what it is and what to do.
"""

import json
import logging
import os
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft import PeftConfig, get_peft_model
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)
from transformers.quantizers import AutoHfQuantizer
from transformers.utils.peft_utils import find_adapter_config_file
from trl import ModelConfig, SFTConfig, get_peft_config

from .. import UserError
from ..data.demo import BASE_MODEL, is_demo

logger = logging.getLogger(__name__)

TOKENIZER_FILES = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken", "tekken.json")
# What a model is loaded from beside its weights and their index: JSON objects.
JSON_FILES = (
    "adapter_config.json",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack")

# Names of modules and buffers with one row a position. A token beyond the last row cannot be read; models that
# compute positions (RoPE, ALiBi) have no such table.
POSITION_TABLES = re.compile(r"(^|\.)(wpe|embed_positions|position_embeddings?|positions_embed|pos_encoding)$")

# Weights of these formats take no gradient to what is below them: they become plain weights when they are loaded.
DEQUANTIZED_ON_LOADING = ("fp8", "mxfp4")


def locate_model(name: str) -> str:
    """What transformers loads: for `demo` the folder of the base that comes with this package, else the name."""
    if not name:
        raise UserError("model_name_or_path is missing; give it in the recipe or as --model_name_or_path")
    return str(BASE_MODEL) if is_demo(name) else name


def one_line(error: BaseException) -> str:
    """The whole message of a library's error, on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def check_base(model_args: ModelConfig, trust_remote_code: bool = False, *, weights: bool = True) -> PretrainedConfig:
    """The config of a recipe's base, once it is clear that it is a causal language model that can be loaded.

    Args:
        weights: whether a folder must hold the weights too. An estimate needs the config alone.

    Raises:
        UserError: naming the base, what is wrong with it, and what to do.
    """
    name = model_args.model_name_or_path
    path = Path(locate_model(name))
    if path.exists():
        if weights:
            _check_files(name, path)
    else:
        _check_hub_id(name, model_args.model_revision)
    config = load_config(model_args, trust_remote_code)
    _check_kind(name, config)
    _check_quantization(model_args, config)
    if weights:
        _check_packages(name, config)
    return config


def load_config(model_args: ModelConfig, trust_remote_code: bool = False) -> PretrainedConfig:
    """The config of a recipe's base, which is all that is read of it.

    Raises:
        UserError: if it cannot be had.
    """
    name = model_args.model_name_or_path
    try:
        config = AutoConfig.from_pretrained(
            locate_model(name),
            revision=model_args.model_revision,
            trust_remote_code=trust_remote_code,
            attn_implementation=model_args.attn_implementation,
        )
    except Exception as error:  # also of code that comes with a model
        raise UserError(f"model_name_or_path {name}: cannot load its config ({one_line(error)})") from error
    text_config = config.get_text_config()
    if (getattr(text_config, "pad_token_id", None) or 0) >= getattr(text_config, "vocab_size", float("inf")):
        text_config.pad_token_id = None  # an embedding cannot be made with it
    return config


def _check_hub_id(name: str, revision: str | None) -> None:
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"{_base(name)} is not there; give a Hub id or a folder") from error
    with suppress(OSError):  # loading the config says what is wrong
        if find_adapter_config_file(name, revision=revision) is not None:
            raise UserError(_is_adapter(name, None))


def _check_files(name: str, path: Path) -> None:
    """Look through a folder on disk for what keeps a base from being loaded."""
    if path.is_file():
        raise UserError(_is_gguf(name) if path.suffix == ".gguf" else f"{_base(name)} is a file; give its folder")
    if (path / "adapter_config.json").is_file():
        raise UserError(_is_adapter(name, path))
    if any(path.glob("*.gguf")) and not any(path.glob("*.safetensors")):
        raise UserError(_is_gguf(name))
    if not (path / "config.json").is_file():
        checkpoints = sorted(path.glob("checkpoint-*"), key=lambda checkpoint: checkpoint.stat().st_mtime)
        there = f"; its newest checkpoint is {checkpoints[-1]}" if checkpoints else ""
        inside = [
            file.parent for pattern in ("*/", "snapshots/*/") for file in sorted(path.glob(f"{pattern}config.json"))
        ]
        if inside and not checkpoints:
            there = f"; there is one in {inside[0]}"
        raise UserError(
            f"{_base(name)} has no config.json, so it is no model folder{there}; a base holds config.json, "
            "model.safetensors and the files of its tokenizer"
        )
    damage = find_damage(path)
    if damage is not None:
        raise UserError(f"{_base(name)}: {damage}; download it again")
    _check_weights(name, path)


def find_damage(folder: Path) -> str | None:
    """Which of a model's JSON files cannot be read, and why; `None` if all can."""
    for file in (folder / name for name in JSON_FILES if (folder / name).is_file()):
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            return f"{file.name} cannot be read ({one_line(error)})"
        if not isinstance(content, dict):
            return f"{file.name} should hold keys and values, not {content!r:.40}"
    return None


def check_tokenizer(name: str) -> None:
    """Refuse a folder without a tokenizer: transformers would make an empty one for some models.

    Raises:
        UserError: saying that there is none.
    """
    path = Path(locate_model(name))
    if path.is_dir() and not any(any(path.glob(pattern)) for pattern in TOKENIZER_FILES):
        raise UserError(f"{_base(name)} has no tokenizer; copy the tokenizer files of the model it was made from")


def _check_weights(name: str, path: Path) -> None:
    index = path / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{_base(name)}: {index.name} is damaged; download it again") from error
    else:
        shards = ["model.safetensors"]
    missing = [shard for shard in shards if not (path / shard).is_file()]
    if missing and not index.is_file():
        if any(any(path.glob(pattern)) for pattern in PICKLES):
            raise UserError(
                f"{_base(name)} has its weights as pickles, which can run code and are not read; convert it once: "
                f"AutoModelForCausalLM.from_pretrained({name!r}).save_pretrained(...) writes safetensors"
            )
        others = sorted(file.name for file in path.glob("*.safetensors") if file.name not in shards)
        only = f", only {others[0]}; give the files that transformers saves" if others else ""
        raise UserError(f"{_base(name)} has no weights: there is no model.safetensors in it{only}")
    if missing:
        raise UserError(
            f"{_base(name)} lacks {len(missing)} of the {len(shards)} files that {index.name} lists, such as "
            f"{missing[0]}; download it again"
        )
    for shard in shards:
        _check_safetensors(name, path / shard)


def _check_safetensors(name: str, file: Path) -> None:
    """Read the header alone: it says how long the file must be."""
    try:
        with safe_open(file, framework="pt"):
            return
    except (SafetensorError, OSError) as error:
        with file.open("rb") as opened:
            is_pointer = opened.read(40).startswith(b"version https://git-lfs")
        fix = "it is a pointer of Git LFS; run git lfs pull there" if is_pointer else "download it again"
        raise UserError(f"{_base(name)}: {file.name} cannot be read ({one_line(error)}); {fix}") from error


def _check_kind(name: str, config: PretrainedConfig) -> None:
    kind = config.model_type
    if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return  # code that comes with the model knows
    if config.is_encoder_decoder or kind in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
        what = "an encoder-decoder model"
    elif kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
        what = "an encoder, which reads texts in both directions"
    elif type(config) not in AutoModelForCausalLM._model_mapping:
        what = "no causal language model of transformers"
    else:
        return
    raise UserError(f"{_base(name)} is {what} ({kind}); give a causal language model, such as Qwen/Qwen3-0.6B")


def quantization_of(config: PretrainedConfig) -> str | None:
    """How a checkpoint is quantised, such as `bitsandbytes 4-bit` or `gptq`; `None` if it is not."""
    found = getattr(config, "quantization_config", None) or getattr(
        config.get_text_config(), "quantization_config", None
    )
    if not found:
        return None
    found = found if isinstance(found, dict) else found.to_dict()
    for bits in (4, 8):
        if found.get(f"load_in_{bits}bit"):
            return f"bitsandbytes {bits}-bit"
    method = found.get("quant_method")
    return str(getattr(method, "value", method))


def _check_quantization(model_args: ModelConfig, config: PretrainedConfig) -> None:
    kind = quantization_of(config)
    if kind == "None":
        raise UserError(
            f"{_base(model_args.model_name_or_path)} has a quantization_config without a quant_method, as MLX writes "
            "it; give the model that it was made from"
        )
    for bits in (4, 8):
        if kind is not None and getattr(model_args, f"load_in_{bits}bit") and kind != f"bitsandbytes {bits}-bit":
            raise UserError(
                f"{_base(model_args.model_name_or_path)} is quantised already ({kind}); leave load_in_{bits}bit out"
            )


def _check_packages(name: str, config: PretrainedConfig) -> None:
    """See that the packages are there which the quantisation of a base needs."""
    if quantization_of(config) is None or not AutoHfQuantizer.supports_quant_method(config.quantization_config):
        return
    try:
        quantizer = AutoHfQuantizer.from_config(config.quantization_config, pre_quantized=True)
        quantizer.validate_environment(dtype=torch.bfloat16, device_map=None)
    except ImportError as error:
        raise UserError(f"{_base(name)}: a package is missing for its weights ({one_line(error)})") from error
    except Exception:  # what a device cannot do is said where it is known
        return


def suit_base(model_args: ModelConfig, config: PretrainedConfig, trust_remote_code: bool = False) -> ModelConfig:
    """A recipe's model with what its base decides: quantisation, and the dropout of adapters on experts.

    Args:
        config: of `check_base`.

    Raises:
        UserError: for full fine-tuning of quantised weights, or an adapter that PEFT cannot put on this model.
    """
    kind = quantization_of(config)
    if kind is not None:
        if not model_args.use_peft:
            raise UserError(
                f"{_base(model_args.model_name_or_path)} is quantised ({kind}), and quantised weights cannot be "
                "trained in full; set use_peft: true, or give the model that it was made from"
            )
        if kind == "bitsandbytes 4-bit":
            model_args = replace(model_args, load_in_4bit=True)
        elif kind == "bitsandbytes 8-bit":
            model_args = replace(model_args, load_in_8bit=True)
        elif model_args.dtype in (None, "float32"):
            model_args = replace(model_args, dtype="bfloat16")  # their kernels compute in 16 bits
        if kind in DEQUANTIZED_ON_LOADING:
            logger.warning("The base's %s weights become %s when they are loaded.", kind, model_args.dtype)
    return _suit_experts(model_args, config, trust_remote_code)


def _suit_experts(model_args: ModelConfig, config: PretrainedConfig, trust_remote_code: bool) -> ModelConfig:
    """PEFT adapts fused experts as bare parameters, which take neither dropout nor DoRA."""
    has_experts = any("expert" in key for key in config.get_text_config().to_dict())
    if not model_args.use_peft or not (has_experts or model_args.lora_target_parameters):
        return model_args
    try:
        get_peft_model(skeleton(config, trust_remote_code), get_peft_config(model_args), low_cpu_mem_usage=True)
    except ValueError as error:
        if "use_dora" in str(error):
            raise UserError("use_dora: PEFT has no DoRA for the experts of this base; leave it out") from error
        if "lora_dropout" not in str(error):
            return model_args  # what else is wrong is said where the adapter is made
        logger.warning(
            "lora_dropout is 0, not %s: PEFT adapts the experts of this base as parameters, without dropout.",
            model_args.lora_dropout,
        )
        return replace(model_args, lora_dropout=0.0)
    return model_args


def skeleton(config: PretrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """A model without content, as its config describes it.

    Raises:
        UserError: if there is no such model, or not with its `attn_implementation`.
    """
    # Under ZeRO-3 transformers would give each process a part, and the meta device has none.
    whole = mock.patch("transformers.modeling_utils.is_deepspeed_zero3_enabled", return_value=False)
    try:
        with whole, torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
    except Exception as error:  # also of code that comes with a model
        attention = config._attn_implementation
        plain = attention in (None, "eager", "sdpa")
        key = _base(config.name_or_path) if plain else f"attn_implementation {attention}"
        raise UserError(f"{key}: the base cannot be built from its config ({one_line(error)})") from error


def batching_beside_router(batching: str, training_args: SFTConfig, config: PretrainedConfig) -> str:
    """Where experts are balanced by a router's loss, train without it on tries, or with it on padded batches.

    The loss counts what each token of a batch is routed to, and on a trie a token stands for many. TRL adds it with
    the coefficient that a base's config names; one that the recipe names is kept, and batches are padded.
    """
    text_config = config.get_text_config()
    has_loss = hasattr(text_config, "output_router_logits") and getattr(text_config, "router_aux_loss_coef", 0)
    if batching == "padded" or not (training_args.router_aux_loss_coef or has_loss):
        return batching
    if training_args.router_aux_loss_coef is None:
        training_args.router_aux_loss_coef = 0.0
        logger.warning("router_aux_loss_coef is 0: tries go without the router's loss; batching: padded has it.")
    elif training_args.router_aux_loss_coef:
        logger.warning("Padded batches instead of tries: router_aux_loss_coef asks for the router's loss.")
        return "padded"
    return batching


@dataclass(frozen=True)
class InputLimits:
    """What a model can read.

    Attributes:
        tokens: rows of its embedding; token ids are below.
        positions: the longest sequence where each position has a row of its own, as in GPT-2 and OPT; `None` for
            models that compute positions.
    """

    tokens: int
    positions: int | None

    @classmethod
    def of(cls, model: torch.nn.Module) -> "InputLimits":
        """Look them up in a model, on any device, the meta device included."""
        positions = [len(table) for name, table in model.named_buffers() if _is_position_table(name)]
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Embedding) and _is_position_table(name):
                if module.padding_idx is not None:
                    raise UserError(
                        "the base counts positions from its padding token on, as RoBERTa does, which is not "
                        "supported; give a causal language model, such as Qwen/Qwen3-0.6B"
                    )
                positions.append(module.num_embeddings - getattr(module, "offset", 0))
        return cls(model.get_input_embeddings().num_embeddings, min(positions, default=None))

    def fit_length(self, max_length: int | None) -> int | None:
        """`max_length`, or the positions there are if these are fewer."""
        if self.positions is None or (max_length is not None and max_length <= self.positions):
            return max_length
        logger.warning("max_length is %d: the base has no more positions.", self.positions)
        return self.positions

    def fit_padding(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Pad with a token that the embedding has, where the tokenizer's own lies beyond it."""
        if tokenizer.pad_token_id < self.tokens:
            return
        for token, number in (
            (tokenizer.eos_token, tokenizer.eos_token_id),
            (tokenizer.unk_token, tokenizer.unk_token_id),
        ):
            if number is not None and number < self.tokens:
                logger.warning(
                    "The padding token %r (id %d) lies beyond the %d rows of the embedding; padding with %r.",
                    tokenizer.pad_token,
                    tokenizer.pad_token_id,
                    self.tokens,
                    token,
                )
                tokenizer.pad_token = token
                return
        raise UserError(
            f"the tokenizer's padding token {tokenizer.pad_token!r} (id {tokenizer.pad_token_id}) lies beyond the "
            f"{self.tokens:,} rows of the base's embedding; take the tokenizer that belongs to the base"
        )

    def check(self, rows: Iterable[Sequence[int]], tokenizer: PreTrainedTokenizerBase, fed_after: int = 0) -> None:
        """Refuse token ids that the model cannot read.

        Args:
            rows: the token ids of each row.
            fed_after: tokens that are fed after each row, such as those of an answer.

        Raises:
            UserError: naming the token, or the length of the longest row.
        """
        longest, highest = 0, -1
        for row in rows:
            longest, highest = max(longest, len(row) + fed_after), max(highest, *row)
        if highest >= self.tokens:
            raise UserError(
                f"the tokenizer writes {tokenizer.convert_ids_to_tokens(highest)!r} as token {highest}, but the "
                f"model's embedding has {self.tokens:,} rows; take the tokenizer that belongs to the model, or "
                "resize the embedding (resize_token_embeddings) and save both"
            )
        if self.positions is not None and longest > self.positions:
            raise UserError(
                f"the longest pair takes {longest} tokens with its prompt, but the model has {self.positions} "
                "positions; leave out longer pairs, or take a shorter prompt"
            )


def _is_position_table(name: str) -> bool:
    return bool(POSITION_TABLES.search(name)) and not re.search("vision|visual|image|audio", name)


def _base(name: str) -> str:
    return f"model_name_or_path {name}"


def _is_adapter(name: str, path: Path | None) -> str:
    if path is not None and _is_prompt_learning(path):
        return f"{_base(name)} is an adapter of learned prompts, which no model can be merged with; give its base"
    if path is not None and (path / "recipe.yaml").is_file():
        merge = f"python recipes/export.py --run {name} --output_dir {os.path.normpath(name)}-merged"
    else:
        merge = f"AutoPeftModelForCausalLM.from_pretrained({name!r}).merge_and_unload().save_pretrained(...)"
    return f"{_base(name)} is an adapter, not a whole model; merge it into its base and give the result: {merge}"


def _is_prompt_learning(path: Path) -> bool:
    try:
        return PeftConfig.from_pretrained(path).is_prompt_learning
    except Exception:  # a damaged one is an adapter still
        return False


def _is_gguf(name: str) -> str:
    return (
        f"{_base(name)} is a GGUF file, which is for llama.cpp; give the model that it was made from, in safetensors"
    )
