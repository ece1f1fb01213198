"""Checks of a base model before its weights are loaded: whether it can be trained, and which inputs it takes.

A base is a folder or a Hub id with a causal language model in safetensors. Anything else (an adapter, a GGUF file,
pickles, an encoder, an incomplete download) ends in one sentence that says what it is and what to do.
"""

import json
import logging
import os
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
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
# The JSON files of a model besides the index of its weights.
JSON_FILES = (
    "adapter_config.json",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack")

# Names of modules and buffers with one row for each position, which limit the length of a sequence. Models that
# compute positions (RoPE, ALiBi) have none.
POSITION_TABLES = re.compile(r"(^|\.)(wpe|embed_positions|position_embeddings?|positions_embed|pos_encoding)$")

# No gradient passes through weights of these formats, so they are dequantised on loading.
DEQUANTIZED_ON_LOADING = ("fp8", "mxfp4")


def locate_model(name: str) -> str:
    """What transformers loads: the packaged base for `demo`, else the name itself."""
    return str(BASE_MODEL) if is_demo(name) else name


def one_line(error: BaseException) -> str:
    """A library's error message on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def check_base(model_args: ModelConfig, trust_remote_code: bool = False, *, weights: bool = True) -> PretrainedConfig:
    """The config of a recipe's base, after checking that it is a causal language model that can be loaded.

    Args:
        weights: whether to check the weights too. A memory estimate needs the config only.

    Raises:
        UserError: naming the base, what is wrong with it, and what to do.
    """
    name = base_name(model_args)
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


def base_name(model_args: ModelConfig) -> str:
    """The base that a recipe names.

    Raises:
        UserError: if it names none.
    """
    if not model_args.model_name_or_path:
        raise UserError("model_name_or_path is missing; give it in the recipe or as --model_name_or_path")
    return model_args.model_name_or_path


def load_config(model_args: ModelConfig, trust_remote_code: bool = False) -> PretrainedConfig:
    """The config of a recipe's base.

    Raises:
        UserError: if it cannot be loaded.
    """
    name = base_name(model_args)
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
        text_config.pad_token_id = None  # torch.nn.Embedding refuses it
    return config


def _check_hub_id(name: str, revision: str | None) -> None:
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"{_base(name)} does not exist; give a Hub id or a folder") from error
    with suppress(OSError):  # loading the config reports what is wrong
        if find_adapter_config_file(name, revision=revision) is not None:
            raise UserError(_is_adapter(name, None))


def _check_files(name: str, path: Path) -> None:
    """Check that a folder on disk holds everything that a base is loaded from."""
    if path.is_file():
        raise UserError(_is_gguf(name) if path.suffix == ".gguf" else f"{_base(name)} is a file; give its folder")
    if (path / "adapter_config.json").is_file():
        raise UserError(_is_adapter(name, path))
    if any(path.glob("*.gguf")) and not any(path.glob("*.safetensors")):
        raise UserError(_is_gguf(name))
    if not (path / "config.json").is_file():
        checkpoints = sorted(path.glob("checkpoint-*"), key=lambda checkpoint: checkpoint.stat().st_mtime)
        hint = f"; its newest checkpoint is {checkpoints[-1]}" if checkpoints else ""
        inside = [
            file.parent for pattern in ("*/", "snapshots/*/") for file in sorted(path.glob(f"{pattern}config.json"))
        ]
        if inside and not checkpoints:
            hint = f"; there is one in {inside[0]}"
        raise UserError(
            f"{_base(name)} has no config.json, so it is not a model folder{hint}; a base needs config.json, "
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
            return f"{file.name} should hold a JSON object, not {content!r:.40}"
    return None


def check_tokenizer(name: str) -> None:
    """Refuse a folder without a tokenizer, where transformers would make an empty one for some models.

    Raises:
        UserError: if the folder has no tokenizer files.
    """
    path = Path(locate_model(name))
    if path.is_dir() and not has_tokenizer(path):
        raise UserError(f"{_base(name)} has no tokenizer; copy the tokenizer files of the model it was made from")


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has the files of a tokenizer."""
    return any(any(folder.glob(pattern)) for pattern in TOKENIZER_FILES)


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
                f"{_base(name)} has pickled weights, which can run code and are not loaded; convert it once: "
                f"AutoModelForCausalLM.from_pretrained({name!r}).save_pretrained(...) writes safetensors"
            )
        others = sorted(file.name for file in path.glob("*.safetensors") if file.name not in shards)
        only = f", only {others[0]}; save the model with transformers" if others else ""
        raise UserError(f"{_base(name)} has no weights: it has no model.safetensors{only}")
    if missing:
        raise UserError(
            f"{_base(name)} lacks {len(missing)} of the {len(shards)} files that {index.name} lists, such as "
            f"{missing[0]}; download it again"
        )
    for shard in shards:
        _check_safetensors(name, path / shard)


def _check_safetensors(name: str, file: Path) -> None:
    """Opening the file reads its header and compares the file's size with it."""
    try:
        with safe_open(file, framework="pt"):
            return
    except (SafetensorError, OSError) as error:
        with file.open("rb") as opened:
            is_pointer = opened.read(40).startswith(b"version https://git-lfs")
        fix = "it is a Git LFS pointer; run git lfs pull in that folder" if is_pointer else "download it again"
        raise UserError(f"{_base(name)}: {file.name} cannot be read ({one_line(error)}); {fix}") from error


def _check_kind(name: str, config: PretrainedConfig) -> None:
    kind = config.model_type
    if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return  # the code that comes with the model decides
    if config.is_encoder_decoder or kind in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
        what = "an encoder-decoder model"
    elif kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
        what = "an encoder with bidirectional attention"
    elif type(config) not in AutoModelForCausalLM._model_mapping:
        what = "not a causal language model that transformers knows"
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
    name = base_name(model_args)
    if kind == "None":
        raise UserError(
            f"{_base(name)} has a quantization_config without a quant_method, as MLX writes it; give the model that "
            "it was made from"
        )
    for bits in (4, 8):
        if kind is not None and getattr(model_args, f"load_in_{bits}bit") and kind != f"bitsandbytes {bits}-bit":
            raise UserError(f"{_base(name)} is already quantised ({kind}); remove load_in_{bits}bit")


def _check_packages(name: str, config: PretrainedConfig) -> None:
    """Check that the packages for the base's quantisation are installed."""
    if quantization_of(config) is None or not AutoHfQuantizer.supports_quant_method(config.quantization_config):
        return
    try:
        quantizer = AutoHfQuantizer.from_config(config.quantization_config, pre_quantized=True)
        quantizer.validate_environment(dtype=torch.bfloat16, device_map=None)
    except ImportError as error:
        raise UserError(f"{_base(name)}: its quantisation needs a missing package ({one_line(error)})") from error
    except Exception:  # about devices, which loading the weights reports
        return


def suit_base(model_args: ModelConfig, config: PretrainedConfig, trust_remote_code: bool = False) -> ModelConfig:
    """A recipe's model settings, adjusted to its base: quantisation, and adapter dropout on experts.

    Args:
        config: of `check_base`.

    Raises:
        UserError: for full fine-tuning of quantised weights, or an adapter that PEFT does not support for this model.
    """
    kind = quantization_of(config)
    if kind is not None:
        if not model_args.use_peft:
            raise UserError(
                f"{_base(base_name(model_args))} is quantised ({kind}), and quantised weights cannot be fine-tuned in "
                "full; set use_peft: true, or give the model that it was made from"
            )
        if kind == "bitsandbytes 4-bit":
            model_args = replace(model_args, load_in_4bit=True)
        elif kind == "bitsandbytes 8-bit":
            model_args = replace(model_args, load_in_8bit=True)
        elif model_args.dtype in (None, "float32"):
            model_args = replace(model_args, dtype="bfloat16")  # their kernels compute in 16 bits
        if kind in DEQUANTIZED_ON_LOADING:
            logger.warning("The base's %s weights are converted to %s on loading.", kind, model_args.dtype)
    return _suit_experts(model_args, config, trust_remote_code)


def _suit_experts(model_args: ModelConfig, config: PretrainedConfig, trust_remote_code: bool) -> ModelConfig:
    """PEFT adapts fused experts as parameters, without dropout or DoRA."""
    has_experts = any("expert" in key for key in config.get_text_config().to_dict())
    adapter = get_peft_config(model_args)
    if adapter is None or not (has_experts or model_args.lora_target_parameters):
        return model_args
    try:
        get_peft_model(skeleton(config, trust_remote_code), adapter, low_cpu_mem_usage=True)
    except ValueError as error:
        if "use_dora" in str(error):
            raise UserError("use_dora: PEFT does not support DoRA for the experts of this base; remove it") from error
        if "lora_dropout" not in str(error):
            return model_args  # making the adapter reports other errors
        logger.warning(
            "lora_dropout is 0, not %s: PEFT adapts the experts of this base as parameters, without dropout.",
            model_args.lora_dropout,
        )
        return replace(model_args, lora_dropout=0.0)
    return model_args


def skeleton(config: PretrainedConfig, trust_remote_code: bool = False, **options: Any) -> PreTrainedModel:
    """The model that a config describes, on the meta device.

    Args:
        options: for `AutoModelForCausalLM.from_config`; the dtype is float32 by default.

    Raises:
        UserError: if the model cannot be built, or not with its `attn_implementation`.
    """
    # Under ZeRO-3 transformers would shard the parameters, which the meta device cannot.
    unsharded = mock.patch("transformers.modeling_utils.is_deepspeed_zero3_enabled", return_value=False)
    try:
        with unsharded, torch.device("meta"):
            options = {"dtype": torch.float32, **options}
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code, **options)
    except Exception as error:  # also of code that comes with a model
        attention = config._attn_implementation
        is_default = attention in (None, "eager", "sdpa")
        key = _base(str(config.name_or_path)) if is_default else f"attn_implementation {attention}"
        raise UserError(f"{key}: the base cannot be built from its config ({one_line(error)})") from error


def batching_beside_router(batching: str, training_args: SFTConfig, config: PretrainedConfig) -> str:
    """The batching for a mixture of experts: on tries without the router's balancing loss, or padded with it.

    That loss counts the experts of each token, and on a trie one token stands for many. TRL adds it with the
    coefficient of the base's config, which is set to 0 here; if the recipe sets a coefficient, batches are padded.
    """
    text_config = config.get_text_config()
    has_loss = hasattr(text_config, "output_router_logits") and getattr(text_config, "router_aux_loss_coef", 0)
    if batching == "padded" or not (training_args.router_aux_loss_coef or has_loss):
        return batching
    if training_args.router_aux_loss_coef is None:
        training_args.router_aux_loss_coef = 0.0
        logger.warning("router_aux_loss_coef is 0: tries do not support the router's loss; batching: padded does.")
    elif training_args.router_aux_loss_coef:
        logger.warning("Padded batches instead of tries: router_aux_loss_coef is set, and tries do not support it.")
        return "padded"
    return batching


@dataclass(frozen=True)
class InputLimits:
    """Limits of a model's input.

    Attributes:
        tokens: rows of its embedding; token ids must be below.
        positions: the longest sequence for models with learned positions, such as GPT-2 and OPT; `None` for models
            that compute positions.
    """

    tokens: int
    positions: int | None

    @classmethod
    def of(cls, model: PreTrainedModel) -> "InputLimits":
        """The limits of a model on any device, the meta device included."""
        positions = [len(table) for name, table in model.named_buffers() if _is_position_table(name)]
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Embedding) and _is_position_table(name):
                if module.padding_idx is not None:
                    raise UserError(
                        "model_name_or_path: the base numbers positions from its padding token on, as RoBERTa does, "
                        "which is not supported; give a causal language model, such as Qwen/Qwen3-0.6B"
                    )
                positions.append(module.num_embeddings - int(getattr(module, "offset", 0)))
        embeddings: Any = model.get_input_embeddings()
        return cls(embeddings.num_embeddings, min(positions, default=None))

    def fit_length(self, max_length: int | None) -> int | None:
        """`max_length`, but no more than there are positions."""
        if self.positions is None or (max_length is not None and max_length <= self.positions):
            return max_length
        logger.warning("max_length is %d: the base has no more positions.", self.positions)
        return self.positions

    def fit_padding(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Replace a padding token that the embedding does not have."""
        padding: Any = tokenizer.pad_token_id
        if padding < self.tokens:
            return
        substitutes: list[tuple[Any, Any]] = [
            (tokenizer.eos_token, tokenizer.eos_token_id),
            (tokenizer.unk_token, tokenizer.unk_token_id),
        ]
        for token, number in substitutes:
            if number is not None and number < self.tokens:
                logger.warning(
                    "The padding token %r (id %d) is beyond the %d rows of the embedding; padding with %r.",
                    tokenizer.pad_token,
                    padding,
                    self.tokens,
                    token,
                )
                tokenizer.pad_token = token
                return
        raise UserError(
            f"the tokenizer's padding token {tokenizer.pad_token!r} (id {padding}) is beyond the {self.tokens:,} rows "
            "of the base's embedding; use the base's own tokenizer"
        )

    def check(self, rows: Iterable[Sequence[int]], tokenizer: PreTrainedTokenizerBase, fed_after: int = 0) -> None:
        """Refuse token ids and lengths beyond the model's limits.

        Args:
            rows: the token ids of each row.
            fed_after: tokens that follow each row, such as those of an answer.

        Raises:
            UserError: naming the token, or the length of the longest row.
        """
        longest, highest = 0, -1
        for row in rows:
            longest, highest = max(longest, len(row) + fed_after), max(highest, *row)
        if highest >= self.tokens:
            raise UserError(
                f"the tokenizer encodes {tokenizer.convert_ids_to_tokens(highest)!r} as token {highest}, but the "
                f"model's embedding has {self.tokens:,} rows; use the model's own tokenizer, or resize the embedding "
                "(resize_token_embeddings) and save both"
            )
        if self.positions is not None and longest > self.positions:
            raise UserError(
                f"the longest pair has {longest} tokens with its prompt, but the model has {self.positions} "
                "positions; remove longer pairs, or use a shorter prompt"
            )


def _is_position_table(name: str) -> bool:
    return bool(POSITION_TABLES.search(name)) and not re.search("vision|visual|image|audio", name)


def _base(name: str) -> str:
    return f"model_name_or_path {name}"


def _is_adapter(name: str, path: Path | None) -> str:
    if path is not None and _is_prompt_learning(path):
        return f"{_base(name)} is a prompt-learning adapter, which cannot be merged; give its base"
    if path is not None and (path / "recipe.yaml").is_file():
        merge = f"python recipes/export.py --run {name} --output_dir {os.path.normpath(name)}-merged"
    else:
        merge = f"AutoPeftModelForCausalLM.from_pretrained({name!r}).merge_and_unload().save_pretrained(...)"
    return f"{_base(name)} is an adapter, not a whole model; merge it into its base and give the result: {merge}"


def _is_prompt_learning(path: Path) -> bool:
    try:
        return PeftConfig.from_pretrained(str(path)).is_prompt_learning
    except Exception:  # a damaged config is still that of an adapter
        return False


def _is_gguf(name: str) -> str:
    return f"{_base(name)} is a GGUF file, for llama.cpp; give the model that it was made from, in safetensors"
