"""Tokenizer, base model, adapter: loading them, and counting what they hold."""

import difflib
import re
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl import ModelConfig, SFTConfig, get_peft_config, get_quantization_config

from .. import UserError
from ..data.prompts import PromptEncoder, control_tokens
from ..runs import REPAIR, read_run, weight_files
from .bases import (
    DEQUANTIZED_ON_LOADING,
    check_base,
    check_tokenizer,
    find_damage,
    load_config,
    locate_model,
    one_line,
    quantization_of,
    skeleton,
)

SAVED = "lora_modules_to_save"


@dataclass(frozen=True)
class ParameterCounts:
    """How large a model is.

    Attributes:
        total: parameters, each 4-bit weight counted as the one weight it is.
        trainable: those that training changes.
        stored: elements of the tensors that hold them. bitsandbytes keeps two 4-bit weights in a byte, so
            `sum(p.numel())`, which many tools print as the total, gives this.
    """

    total: int
    trainable: int
    stored: int

    @property
    def trainable_share(self) -> float:
        return self.trainable / self.total

    def __str__(self) -> str:
        line = f"{self.trainable:,} trainable of {self.total:,} parameters ({self.trainable_share:.2%})"
        return line if self.stored == self.total else f"{line}, stored as {self.stored:,} elements"

    def as_dict(self) -> dict[str, int | float]:
        return asdict(self) | {"trainable_share": self.trainable_share}


def count_parameters(model: torch.nn.Module) -> ParameterCounts:
    """Count the distinct parameters of a model, on any device, the meta device included.

    A 4-bit parameter is packed when its weights are quantised. On the meta device none is yet: it is counted as it
    will be stored.
    """
    total = trainable = stored = 0
    for parameter in model.parameters():  # tied weights are given once
        elements = getattr(parameter, "ds_numel", parameter.numel())  # of which ZeRO-3 leaves each process a part
        if type(parameter).__name__ == "Params4bit":
            per_element = 2 * parameter.quant_storage.itemsize
            weights = elements * per_element if parameter.bnb_quantized else elements
            stored += weights // per_element
        else:
            weights = elements
            stored += elements
        total += weights
        trainable += weights if parameter.requires_grad else 0
    return ParameterCounts(total, trainable, stored)


def load_tokenizer(name: str, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, with a padding token: the end-of-sequence token where it has none of its own.

    Sharing the two is safe here: labels are masked by position, not by token.
    """
    check_tokenizer(name)
    tokenizer = _from_pretrained(AutoTokenizer, name, revision=revision, trust_remote_code=trust_remote_code)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise UserError(
            f"{name}: the tokenizer has neither a padding nor an end-of-sequence token; name one in its "
            "tokenizer_config.json"
        )
    return tokenizer


def apply_template(tokenizer: PreTrainedTokenizerBase, args: SFTConfig) -> None:
    """Apply `eos_token` and `chat_template_path` to a tokenizer, as TRL does: before prompts are encoded, not after.

    A template of another model comes with that model's end-of-sequence token.

    Raises:
        UserError: if there is no such token or template, or the template's model has control tokens that the tokenizer
            lacks: TRL adds them to the model, where their embeddings would have to be learned.
    """
    path = args.chat_template_path
    if path is not None and path.endswith((".jinja", ".j2")):
        try:
            tokenizer.chat_template = Path(path).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text; save it in that encoding"
            raise UserError(f"chat_template_path {path}: {reason}") from error
    elif path is not None:
        source = _from_pretrained(AutoTokenizer, path, key="chat_template_path")
        if source.chat_template is None:
            raise UserError(f"chat_template_path {path}: its tokenizer has no chat template; name one that has")
        lacking = [token for token in control_tokens(source) if token not in tokenizer.get_vocab()]
        used = [token for token in lacking if token in str(source.chat_template) or token == source.eos_token]
        if used:
            raise UserError(
                f"chat_template_path {path}: its template uses {', '.join(used)}, which the base does not have as "
                f"{'a token' if len(used) == 1 else 'tokens'}; save the template as a .jinja file that does without"
            )
        tokenizer.chat_template, tokenizer.eos_token = source.get_chat_template(), source.eos_token
    if args.eos_token is not None:
        if args.eos_token not in tokenizer.get_vocab():
            raise UserError(f"eos_token {args.eos_token!r} is not a token of this model; leave it out, or name one")
        tokenizer.eos_token = args.eos_token


def load_model(
    args: ModelConfig,
    trust_remote_code: bool = False,
    *,
    device: torch.device | None = None,
    dequantize: bool = False,
) -> PreTrainedModel:
    """A base model, quantised if the recipe or its own config says so. Safetensors only.

    Args:
        args: what to load, and the type to compute in, as `Precision.suit` has chosen it.
        device: where to load it. By default plain weights stay where the Trainer finds them, and quantised ones go to
            this process's device: each process holds all of them.
        dequantize: turn quantised weights back into plain ones, in `args.dtype`: the same values.

    Raises:
        UserError: if it cannot be loaded, or weights are missing that would begin at random.
    """
    config = check_base(args, trust_remote_code)
    quantized = quantization_of(config)
    how = {}
    if quantized is None:
        how = {"quantization_config": get_quantization_config(args)}
    elif quantized.startswith("bitsandbytes"):
        # The checkpoint's own, but for the type to compute in, which the device decides.
        config.quantization_config["bnb_4bit_compute_dtype"] = args.dtype
    elif quantized in DEQUANTIZED_ON_LOADING:
        config.quantization_config["dequantize"] = True
    if device is None and (quantized or how["quantization_config"]):
        device = PartialState().device
    model, loading = _from_pretrained(
        AutoModelForCausalLM,
        args.model_name_or_path,
        config=config,
        revision=args.model_revision,
        trust_remote_code=trust_remote_code,
        use_safetensors=True,  # a pickle can run code when it is loaded
        dtype=args.dtype,
        attn_implementation=args.attn_implementation,
        device_map=None if device is None else {"": device},
        output_loading_info=True,
        **{key: value for key, value in how.items() if value is not None},
    )
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])
        raise UserError(
            f"model_name_or_path {args.model_name_or_path} lacks {len(missing)} weights, such as {missing[0]}, which "
            "would begin at random; give a whole causal language model"
        )
    text_config = model.config.get_text_config()
    if getattr(text_config, "output_router_logits", False):
        text_config.output_router_logits = False  # TRL asks for them where a recipe trains with the router's loss
    return model.dequantize(dtype=getattr(torch, args.dtype, None)) if dequantize else model


def adapter_config(args: ModelConfig) -> PeftConfig | None:
    """PEFT's config of a recipe, `None` without an adapter.

    TRL makes a text of a list of one module, and PEFT takes a text for a pattern of the whole name, which a plain name
    such as `q_proj` never matches. It is taken for the name that it is.
    """
    config = get_peft_config(args)
    if config is not None and _is_plain_name(args.lora_target_modules):
        config.target_modules = {args.lora_target_modules}
    return config


def _is_plain_name(modules: str | list[str] | None) -> bool:
    return isinstance(modules, str) and bool(re.fullmatch(r"[\w.]+", modules))  # which all-linear is not


def check_adapter(args: ModelConfig, trust_remote_code: bool = False) -> None:
    """Hold the adapter of a recipe against the structure of its base, which the base's config alone gives.

    Raises:
        UserError: for a module or parameter that the base has not, with the nearest that it has; for the output
            embedding as a target; for tied weights that would be trained apart; or with what PEFT cannot adapt.
    """
    if not args.use_peft:
        return
    config = load_config(args, trust_remote_code)
    try:
        model = skeleton(config, trust_remote_code)
    except Exception:  # whatever a base of another kind raises, loading it says what is wrong
        return
    check_modules(args, model)
    try:
        with torch.device("meta"):
            get_peft_model(model, adapter_config(args), low_cpu_mem_usage=True)
    except (ValueError, NotImplementedError) as error:
        raise UserError(f"lora_target_modules: {' '.join(str(error).split())}") from error


def check_modules(args: ModelConfig, model: torch.nn.Module) -> None:
    """See that everything that the `lora_` keys name is in a model without an adapter, and may be trained there.

    Raises:
        UserError: as `check_adapter`.
    """
    modules = dict(model.named_modules())
    layers = [name for name, module in modules.items() if getattr(getattr(module, "weight", None), "ndim", 0) == 2]
    head = next((name for name, module in modules.items() if module is model.get_output_embeddings()), None)
    targets = args.lora_target_modules or []
    targets = [targets] if _is_plain_name(targets) else targets
    if isinstance(targets, str):
        is_pattern = targets.lower() != "all-linear"
        matched = [name for name in modules if is_pattern and re.fullmatch(targets, name)]
        if is_pattern and not matched:
            hint = "; give several modules as a list" if re.search(r"[,\s]", targets) else ""
            raise UserError(f"lora_target_modules: the pattern {targets} matches the whole name of no module{hint}")
    else:
        matched = [name for target in targets for name in _find(target, modules, layers, "lora_target_modules")]
    if head in matched:
        raise UserError(
            f"lora_target_modules: {head} cannot have an adapter, because TRL computes the loss from its weights; "
            "leave it out"
        )
    for name in args.lora_target_parameters or []:
        parameters = [name for name, _ in model.named_parameters()]
        _find(name, parameters, parameters, "lora_target_parameters")
    saved = [name for key in args.lora_modules_to_save or [] for name in _find(key, modules, layers, SAVED, ending="")]
    if head in saved and model.config.get_text_config().tie_word_embeddings:
        raise UserError(
            f"{SAVED}: {head} shares its weights with the embedding (tie_word_embeddings), and would be trained apart "
            "from it; leave it out"
        )


def _find(wanted: str, names, nearby, key: str, ending: str = ".") -> list[str]:
    """The names that end in a part of that name, as PEFT looks for them."""
    found = [name for name in names if name == wanted or name.endswith(f"{ending}{wanted}")]
    if not found:
        last = sorted({name.rpartition(".")[2] for name in nearby})
        near = difflib.get_close_matches(wanted.rpartition(".")[2].lower(), last, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(last)}"
        raise UserError(f"{key}: no part of the model is called {wanted!r}; {hint}")
    return found


def load_encoder(run: str | Path, trust_remote_code: bool = False) -> PromptEncoder:
    """The encoder with which a run was trained.

    Raises:
        UserError: if prompt or answers come out otherwise than they were trained.
    """
    recipe, prompt, record = read_run(run)
    check_files(run)
    tokenizer = load_tokenizer(str(run), trust_remote_code=trust_remote_code)
    encoder = PromptEncoder(prompt, tokenizer, train_on_end=recipe.get("train_on_end", False))
    encoder.check_rendered(record.get("rendered"), run)
    return encoder


def load_tuned(
    path: str | Path,
    model_args: ModelConfig,
    trust_remote_code: bool = False,
    *,
    device: torch.device | None = None,
    dequantize: bool = False,
) -> PreTrainedModel | PeftModel:
    """The tuned model of a run folder, ready for evaluation: its adapter on its base, or the full model.

    The one way to load it: evaluation, classifier and export get the same weights in the same type.

    Args:
        path: the run folder.
        model_args: the base of the run and its quantisation, in a type that `Precision.suit` has chosen.
        device: where to load it; this process's device by default.
        dequantize: as for `load_model`, before the adapter is put on.

    Raises:
        UserError: if the weights, or those of the base, are not there as safetensors.
    """
    path, device = Path(path), device or PartialState().device
    if not is_adapter(path):
        full = ModelConfig(
            model_name_or_path=str(path),
            dtype=model_args.dtype,
            attn_implementation=model_args.attn_implementation,
        )
        return load_model(full, trust_remote_code, device=device).eval()
    if not (path / "adapter_model.safetensors").is_file():  # PEFT would fall back on a pickle
        raise UserError(f"{path} has no adapter_model.safetensors; other formats can run code and are not read")
    base = load_model(model_args, trust_remote_code, device=device, dequantize=dequantize)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*missing adapter keys")  # which would begin at random
            return PeftModel.from_pretrained(base, path).eval()
    except Exception as error:  # of PEFT, safetensors or torch
        raise UserError(
            f"{path}: adapter_config.json and adapter_model.safetensors do not fit the base ({one_line(error):.300}); "
            f"{REPAIR}"
        ) from error


def check_files(run: str | Path) -> None:
    """See that the files that the model of a run folder is loaded from are there and can be read.

    Raises:
        UserError: naming the first that is not.
    """
    run = Path(run)
    damage = find_damage(run) or _missing_file(run)
    for file in weight_files(run) if damage is None else ():
        try:
            with safe_open(file, framework="pt"):  # reads the header, which says how long the file must be
                pass
        except (SafetensorError, OSError) as error:
            damage = f"{file.name} cannot be read ({one_line(error)})"
    if damage is not None:
        raise UserError(f"{run}: {damage}; {REPAIR}")


def _missing_file(run: Path) -> str | None:
    if not is_adapter(run) and any(run.glob("adapter_model*")):
        return "adapter_config.json is missing"
    if not weight_files(run):
        name = "adapter_model.safetensors" if is_adapter(run) else "model.safetensors"
        return f"it has no {name}; other formats can run code and are not read"
    return None


def is_adapter(path: Path) -> bool:
    """Whether a run folder holds an adapter rather than a full model."""
    return (path / "adapter_config.json").is_file()


def _from_pretrained(auto_class: type, name: str, key: str = "model_name_or_path", **arguments):
    try:
        return auto_class.from_pretrained(locate_model(name), **arguments)
    except Exception as error:  # also of tokenizers, safetensors, and packages that a format needs
        if "ignore_mismatched_sizes" in str(error):  # which points at a table above it
            error = ValueError("its weights have other shapes than config.json says; download both again")
        if auto_class is AutoTokenizer:
            fix = "check its tokenizer files, such as tokenizer.json and tokenizer_config.json"
            raise UserError(f"{key} {name}: cannot load the tokenizer ({one_line(error)}); {fix}") from error
        raise UserError(f"{key} {name}: cannot load the model ({one_line(error)})") from error
