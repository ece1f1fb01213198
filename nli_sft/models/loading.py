"""Loading the tokenizer, the base, adapters and tuned models, and counting parameters."""

import difflib
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeGuard

import torch
from accelerate import PartialState
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl import ModelConfig, SFTConfig, get_peft_config, get_quantization_config

from .. import UserError
from ..configs import from_recipe
from ..data.demo import is_demo
from ..data.prompts import PROMPTS, Prompt, PromptEncoder, control_tokens, load_prompt
from ..hub.download import download_tuned
from ..runs import REPAIR, is_run, is_trained, read_run, weight_files
from .bases import (
    DEQUANTIZED_ON_LOADING,
    base_name,
    check_base,
    check_tokenizer,
    find_damage,
    has_tokenizer,
    load_config,
    locate_model,
    one_line,
    quantization_of,
    skeleton,
)

logger = logging.getLogger(__name__)

SAVED = "lora_modules_to_save"


@dataclass(frozen=True)
class ParameterCounts:
    """How large a model is.

    Attributes:
        total: parameters; each 4-bit weight counts as one.
        trainable: those that training changes.
        stored: elements of their tensors, `sum(p.numel())`. It is smaller than `total` for 4-bit weights, because
            bitsandbytes packs two of them into a byte.
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

    4-bit parameters on the meta device, which are not packed yet, are counted as they will be stored.
    """
    total = trainable = stored = 0
    parameter: Any
    for parameter in model.parameters():  # yields tied weights once
        elements = getattr(parameter, "ds_numel", parameter.numel())  # under ZeRO-3 numel() is that of a shard
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
    """The tokenizer of a model. Without a padding token it pads with its end-of-sequence token.

    That is safe here because labels are masked by position, not by token.
    """
    check_tokenizer(name)
    tokenizer = _from_pretrained(AutoTokenizer, name, revision=revision, trust_remote_code=trust_remote_code)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise UserError(
            f"{name}: the tokenizer has neither a padding nor an end-of-sequence token; set one in its "
            "tokenizer_config.json"
        )
    return tokenizer


def apply_template(tokenizer: PreTrainedTokenizerBase, args: SFTConfig) -> None:
    """Apply `eos_token` and `chat_template_path` to a tokenizer, as TRL does, but before prompts are encoded.

    The template of another model comes with that model's end-of-sequence token.

    Raises:
        UserError: if the token or template does not exist, or the template uses control tokens that the tokenizer
            lacks. TRL would add them to the model with untrained embeddings.
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
            raise UserError(f"chat_template_path {path}: its tokenizer has no chat template; give one that has")
        lacking = [token for token in control_tokens(source) if token not in tokenizer.get_vocab()]
        used = [token for token in lacking if token in str(source.chat_template) or token == source.eos_token]
        if used:
            raise UserError(
                f"chat_template_path {path}: its template uses {', '.join(used)}, which the base does not have as "
                f"{'a token' if len(used) == 1 else 'tokens'}; give a .jinja file with a template that does not use "
                f"{'it' if len(used) == 1 else 'them'}"
            )
        tokenizer.chat_template, tokenizer.eos_token = source.get_chat_template(), source.eos_token
    if args.eos_token is not None:
        if args.eos_token not in tokenizer.get_vocab():
            raise UserError(f"eos_token {args.eos_token!r} is not a token of this model; remove or change it")
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
        args: what to load, with the dtype that `Precision.suit` has chosen.
        device: where to load it. By default plain weights stay where the Trainer expects them, and quantised ones go
            to this process's device.
        dequantize: convert quantised weights to `args.dtype`, without changing their values.

    Raises:
        UserError: if the model cannot be loaded, or lacks weights, which would be initialised at random.
    """
    name, config = base_name(args), check_base(args, trust_remote_code)
    quantized = quantization_of(config)
    arguments: dict[str, Any] = {}
    if quantized is None:
        quantization_config = get_quantization_config(args)
        if quantization_config is not None:
            arguments["quantization_config"] = quantization_config
    elif quantized.startswith("bitsandbytes"):
        # The checkpoint's own config, except for the dtype to compute in, which depends on the device.
        config.quantization_config["bnb_4bit_compute_dtype"] = args.dtype
    elif quantized in DEQUANTIZED_ON_LOADING:
        config.quantization_config["dequantize"] = True
    if device is None and (quantized or arguments):
        device = PartialState().device
    model, loading = _from_pretrained(
        AutoModelForCausalLM,
        name,
        config=config,
        revision=args.model_revision,
        trust_remote_code=trust_remote_code,
        use_safetensors=True,  # a pickle can run code when it is loaded
        dtype=args.dtype,
        attn_implementation=args.attn_implementation,
        device_map=None if device is None else {"": device},
        output_loading_info=True,
        **arguments,
    )
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])
        raise UserError(
            f"model_name_or_path {name} lacks {len(missing)} weights, such as {missing[0]}, which would be "
            "initialised at random; give a complete causal language model"
        )
    text_config = model.config.get_text_config()
    if getattr(text_config, "output_router_logits", False):
        text_config.output_router_logits = False  # TRL sets it for recipes with the router's loss
    return model.dequantize(dtype=getattr(torch, args.dtype or "", None)) if dequantize else model


def adapter_config(args: ModelConfig) -> PeftConfig | None:
    """PEFT's config of a recipe, `None` without an adapter.

    TRL turns a list of one module into a string, which PEFT reads as a pattern of the whole name. A plain name such as
    `q_proj` would match nothing, so it becomes a set of one name here.
    """
    config: Any = get_peft_config(args)
    if config is not None and _is_plain_name(args.lora_target_modules):
        config.target_modules = {args.lora_target_modules}
    return config


def _is_plain_name(modules: str | list[str] | None) -> TypeGuard[str]:
    return isinstance(modules, str) and bool(re.fullmatch(r"[\w.]+", modules))  # not all-linear, which has a hyphen


def check_adapter(args: ModelConfig, trust_remote_code: bool = False) -> None:
    """Check the adapter of a recipe against the structure of its base, from the base's config alone.

    Raises:
        UserError: for a module or parameter that the base does not have, with the closest name; for the output
            embedding as a target; for tied weights that would be trained apart; or with PEFT's own error.
    """
    peft_config = adapter_config(args)
    if peft_config is None:
        return
    config = load_config(args, trust_remote_code)
    try:
        model = skeleton(config, trust_remote_code)
    except Exception:  # loading the base reports what is wrong
        return
    check_modules(args, model)
    try:
        with torch.device("meta"):
            get_peft_model(model, peft_config, low_cpu_mem_usage=True)
    except (ValueError, NotImplementedError) as error:
        raise UserError(f"lora_target_modules: {' '.join(str(error).split())}") from error


def check_modules(args: ModelConfig, model: PreTrainedModel) -> None:
    """Check that a model without an adapter has everything that the `lora_` keys name, and that it can be trained.

    Raises:
        UserError: as `check_adapter`.
    """
    modules = dict(model.named_modules())
    layers = [name for name, module in modules.items() if getattr(getattr(module, "weight", None), "ndim", 0) == 2]
    head = next((name for name, module in modules.items() if module is model.get_output_embeddings()), None)
    targets: Any = args.lora_target_modules or []
    targets = [targets] if _is_plain_name(targets) else targets
    if isinstance(targets, str):
        is_pattern = targets.lower() != "all-linear"
        matched = [name for name in modules if is_pattern and re.fullmatch(targets, name)]
        if is_pattern and not matched:
            hint = "; give several modules as a list" if re.search(r"[,\s]", targets) else ""
            raise UserError(f"lora_target_modules: the pattern {targets} matches no module's full name{hint}")
    else:
        matched = [name for target in targets for name in _find(target, modules, layers, "lora_target_modules")]
    if head in matched:
        raise UserError(
            f"lora_target_modules: {head} cannot have an adapter, because TRL computes the loss from its weights; "
            "remove it"
        )
    for name in args.lora_target_parameters or []:
        parameters = [name for name, _ in model.named_parameters()]
        _find(name, parameters, parameters, "lora_target_parameters")
    saved = [name for key in args.lora_modules_to_save or [] for name in _find(key, modules, layers, SAVED, ending="")]
    if head in saved and model.config.get_text_config().tie_word_embeddings:
        raise UserError(
            f"{SAVED}: {head} shares its weights with the embedding (tie_word_embeddings), and would be trained apart "
            "from it; remove it"
        )


def _find(wanted: str, names, nearby, key: str, ending: str = ".") -> list[str]:
    """The names that end in `wanted`, as PEFT matches them."""
    found = [name for name in names if name == wanted or name.endswith(f"{ending}{wanted}")]
    if not found:
        last = sorted({name.rpartition(".")[2] for name in nearby})
        near = difflib.get_close_matches(wanted.rpartition(".")[2].lower(), last, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(last)}"
        raise UserError(f"{key}: the model has no {wanted!r}; {hint}")
    return found


@dataclass(frozen=True)
class ModelSource:
    """What a model, its tokenizer and its prompt are loaded from.

    Attributes:
        model_args: the model, or the base of a tuned one.
        tuned: the folder of a run or an adapter; `None` for a model that `model_args` names alone.
        prompt: its own, or the one that the user gave.
        recipe, record: as `runs.read_run` returns them; empty for models that are no run.
    """

    model_args: ModelConfig
    tuned: Path | None
    prompt: Prompt
    recipe: Mapping[str, Any] = field(default_factory=dict)
    record: Mapping[str, Any] = field(default_factory=dict)

    def load_encoder(self, trust_remote_code: bool = False) -> PromptEncoder:
        """The tokenizer with the prompt. An adapter without a tokenizer has that of its base.

        Raises:
            UserError: if files are damaged, or prompt or answers are rendered differently than in training.
        """
        name, revision = str(self.tuned), None
        if self.tuned is not None:
            check_files(self.tuned)
        if self.tuned is None or not is_run(self.tuned):
            with _no_key():
                check_base(self.model_args, trust_remote_code)
        if self.tuned is None or not (is_run(self.tuned) or has_tokenizer(self.tuned)):
            name, revision = base_name(self.model_args), self.model_args.model_revision
        with _no_key():
            tokenizer = load_tokenizer(name, revision, trust_remote_code)
        encoder = PromptEncoder(
            self.prompt,
            tokenizer,
            train_on_end=self.recipe.get("train_on_end", False),
            max_length=self.recipe.get("max_length"),
        )
        encoder.check_rendered(self.record.get("rendered"), name)
        return encoder

    def load_model(
        self, model_args: ModelConfig, trust_remote_code: bool = False, *, device: torch.device | None = None
    ) -> PreTrainedModel | PeftModel:
        """The model, ready for evaluation, on this process's device by default.

        Args:
            model_args: those of this source, with the dtype that `Precision.suit` has chosen.
        """
        if self.tuned is not None:
            return load_tuned(self.tuned, model_args, trust_remote_code, device=device)
        return load_model(model_args, trust_remote_code, device=device or PartialState().device).eval()


def find_model(
    name: str | Path,
    *,
    revision: str | None = None,
    adapter: str | Path | None = None,
    prompt: str | None = None,
    label_words: Sequence[str] | None = None,
    labels: Sequence[str] | None = None,
    settings: ModelConfig | None = None,
) -> ModelSource:
    """Find a run, an adapter with its base, or any causal language model, in a folder or on the Hub.

    Args:
        name: a run, an adapter, whose base is the one that its adapter_config.json names, or a model.
        revision: of `name` on the Hub.
        adapter: an adapter to put on the model `name`.
        prompt, label_words, labels: for models that are no run, as for `load_prompt`. By default the prompt is the
            folder's prompt.json if it has one, else `plain`.
        settings: dtype, quantisation and attention of models that are no run.

    Raises:
        UserError: if there is no such model, or a run is given an adapter, a prompt or labels.
    """
    source = _locate(name, revision, adapter, settings)
    if not source.record:
        folder = source.tuned or Path(base_name(source.model_args)).expanduser()
        return replace(source, prompt=_prompt_for(adapter or name, folder, prompt, label_words, labels))
    own = {"prompt": prompt, "label_words": label_words, "labels": labels}
    if given := next((key for key, value in own.items() if value is not None), None):
        raise UserError(f"{adapter or name} is a run and keeps the prompt it was trained with; leave out {given}")
    return source


def _locate(
    name: str | Path, revision: str | None, adapter: str | Path | None, settings: ModelConfig | None
) -> ModelSource:
    """As `find_model`, with the prompt `plain` for models that are no run."""
    if Path(name).expanduser().exists():
        name = Path(name).expanduser()
    folder = _find_folder(name, revision)
    tuned = folder if adapter is None else _find_folder(adapter)
    if adapter is not None and folder is not None and (is_adapter(folder) or is_run(folder)):
        raise UserError(f"{name} is {'a run' if is_run(folder) else 'an adapter'} itself; leave out adapter")
    if adapter is not None and (tuned is None or not is_adapter(tuned)):
        raise UserError(f"adapter {adapter} has no adapter_config.json, so it is not an adapter; give one")
    if tuned is not None and is_run(tuned):
        source = run_source(tuned)
        return source if adapter is None else replace(source, model_args=_named(source.model_args, name, revision))
    # The weights stay frozen, as under an adapter: `Precision.suit` may choose 16 bits for them.
    settings = replace(settings or ModelConfig(dtype="auto"), use_peft=True)
    if tuned is None or not is_adapter(tuned):
        return ModelSource(_named(settings, name, revision), None, PROMPTS["plain"])
    config = _adapter_config(adapter or name, tuned)
    base = config.base_model_name_or_path
    if adapter is not None:
        if base and Path(base).name != Path(name).name:
            logger.warning("%s was trained on %s, but is put on %s.", adapter, base, name)
        return ModelSource(_named(settings, name, revision), tuned, PROMPTS["plain"])
    if not base or (Path(base).is_absolute() and not Path(base).is_dir()):
        missing = f"its base {base} does not exist here" if base else "adapter_config.json names no base"
        raise UserError(f"{name}: {missing}; give the base as the model, and {name} as its adapter")
    return ModelSource(_named(settings, base, config.revision), tuned, PROMPTS["plain"])


def _find_folder(name: str | Path, revision: str | None = None) -> Path | None:
    """The folder of a name: a local one, or that of a downloaded run or adapter; `None` for a model on the Hub."""
    folder = Path(name).expanduser()
    if folder.exists() or is_demo(str(name)):
        return Path(locate_model(str(name))).expanduser()
    return download_tuned(str(name), revision)


def run_source(folder: Path) -> ModelSource:
    """A run. If it was not trained, but only evaluated, its weights are those of the model that its recipe names.

    Raises:
        UserError: if the folder is not a run.
    """
    recipe, prompt, record = read_run(folder)
    model_args = from_recipe(ModelConfig, recipe)
    if is_trained(record):
        return ModelSource(model_args, folder, prompt, recipe, record)
    settings = from_recipe(ModelConfig, {"dtype": "auto"} | recipe)
    source = _locate(recipe["model"], recipe.get("model_revision"), recipe.get("adapter"), settings)
    return replace(source, prompt=prompt, recipe=recipe, record=record)


def _named(model_args: ModelConfig, name: str | Path, revision: str | None) -> ModelConfig:
    return replace(model_args, model_name_or_path=str(name), model_revision=revision or "main")


def _prompt_for(
    name: str | Path,
    folder: Path,
    prompt: str | None,
    label_words: Sequence[str] | None,
    labels: Sequence[str] | None,
) -> Prompt:
    """The prompt for a model that is no run; `folder` is that of its prompt.json, if it has one."""
    if prompt is None and (folder / "prompt.json").is_file():
        prompt = str(folder / "prompt.json")
    if prompt is None:
        prompt = "plain"
        logger.warning("%s has no prompt.json, so the prompt plain is used; set another with prompt.", name)
    return load_prompt(prompt, label_words, labels)


@contextmanager
def _no_key() -> Iterator[None]:
    """Errors name the model, but not the key of a recipe: the user gave no recipe."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).removeprefix("model_name_or_path ")) from error


def _adapter_config(name: str | Path, folder: Path) -> PeftConfig:
    """The config of an adapter.

    Raises:
        UserError: if it cannot be read, or the adapter is not one for a causal language model.
    """
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except Exception as error:  # of JSON, or of a type of adapter that this PEFT does not know
        raise UserError(f"{name}: adapter_config.json cannot be read ({one_line(error)})") from error
    if config.is_prompt_learning:
        raise UserError(f"{name} is a prompt-learning adapter, which is not supported; give one such as LoRA")
    if config.task_type not in (None, "CAUSAL_LM"):
        raise UserError(f"{name} is an adapter for {config.task_type}; give one for a causal language model")
    return config


def load_encoder(run: str | Path, trust_remote_code: bool = False) -> PromptEncoder:
    """The encoder with which a run was trained.

    Raises:
        UserError: if files are damaged, or prompt or answers are rendered differently than in training.
    """
    return run_source(Path(run)).load_encoder(trust_remote_code)


def load_tuned(
    path: str | Path,
    model_args: ModelConfig,
    trust_remote_code: bool = False,
    *,
    device: torch.device | None = None,
    dequantize: bool = False,
) -> PreTrainedModel | PeftModel:
    """The tuned model of a run folder, ready for evaluation: its adapter on its base, or the full model.

    Evaluation, classifier and export all load it here, with the same weights and dtype.

    Args:
        path: the run folder.
        model_args: the base of the run and its quantisation, with the dtype that `Precision.suit` has chosen.
        device: where to load it; this process's device by default.
        dequantize: as for `load_model`; applies to the base, before the adapter is loaded.

    Raises:
        UserError: if its weights, or those of the base, cannot be loaded from safetensors.
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
        raise UserError(f"{path} has no adapter_model.safetensors; other formats can run code and are not loaded")
    base = load_model(model_args, trust_remote_code, device=device, dequantize=dequantize)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*missing adapter keys")  # they would be initialised at random
            # PEFT reads a name that transformers deprecates.
            warnings.filterwarnings("ignore", message=".?is_gradient_checkpointing", category=FutureWarning)
            return PeftModel.from_pretrained(base, str(path)).eval()
    except Exception as error:  # of PEFT, safetensors or torch
        raise UserError(
            f"{path}: adapter_config.json and adapter_model.safetensors do not fit the base ({one_line(error):.300}); "
            f"{REPAIR}"
        ) from error


def check_files(run: str | Path) -> None:
    """Check that the files from which a run folder's model is loaded exist and can be read.

    Raises:
        UserError: naming the first that cannot.
    """
    run = Path(run)
    damage = find_damage(run) or _missing_file(run)
    for file in weight_files(run) if damage is None else ():
        try:
            with safe_open(file, framework="pt"):  # compares the file's size with its header
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
        return f"it has no {name}; other formats can run code and are not loaded"
    return None


def is_adapter(path: Path) -> bool:
    """Whether a run folder holds an adapter rather than a full model."""
    return (path / "adapter_config.json").is_file()


def _from_pretrained(auto_class: Any, name: str, key: str = "model_name_or_path", **arguments):
    try:
        return auto_class.from_pretrained(locate_model(name), **arguments)
    except Exception as error:  # also of tokenizers, safetensors, and packages that a format needs
        if "ignore_mismatched_sizes" in str(error):  # that message refers to a table printed above it
            error = ValueError("the shapes of its weights differ from config.json; download both again")
        if auto_class is AutoTokenizer:
            fix = "check its tokenizer files, such as tokenizer.json and tokenizer_config.json"
            raise UserError(f"{key} {name}: cannot load the tokenizer ({one_line(error)}); {fix}") from error
        raise UserError(f"{key} {name}: cannot load the model ({one_line(error)})") from error
