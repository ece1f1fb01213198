"""What a training will hold in a device's memory, before any weights are there.

The model is built from its config alone, on the meta device, quantised and with its adapter. One training step of it
is then played through with PyTorch's fake tensors, which have shapes and types and no content; every storage that is
made or let go is counted. So nothing about an architecture is written down here: what attention, activation
functions, adapters and checkpointing keep for the backward pass is found out from the code that will run.

    peak = weights + adapter + optimiser + gradients + activations + attention mask     counted
           + WORKSPACE, which cuBLAS and the kernels take                               measured
    device = FRAGMENTATION x peak + CONTEXT                                             measured

`activations` is what the step held at its highest beyond the rest, the passing results of the backward pass included.
Not part of it: the first step's evaluation, other programs on the device.
"""

import gc
import weakref
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass, replace
from unittest import mock

import bitsandbytes as bnb
import torch
from peft import get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.quantizers.base import get_keys_to_not_convert
from trl import ModelConfig, SFTConfig, get_peft_config, get_quantization_config

from . import UserError
from .configs import BatchConfig
from .launchers import launched_with
from .models import locate_model
from .precision import Precision

GIB = 2**30

# Fitted to measured peaks; see recipes/README.md. The first is inside what torch calls allocated, the others are not.
WORKSPACE = 0.1 * GIB
FRAGMENTATION = 1.05
CONTEXT = 0.6 * GIB

# Of SNLI under the built-in prompts, in random order and batches of 64: 34 (see trie.py), and more in smaller ones.
TOKENS_PER_PAIR = 40

# Bytes that an optimiser keeps for each byte, or each element, of a trained weight.
STATES_PER_BYTE = {"sgd": 0, "adafactor": 0, "lion": 1, "lion_32bit": 1}
STATES_PER_ELEMENT = {"8bit": 2, "lion_8bit": 1, "paged_lion_8bit": 1}

# 4-bit weights carry a scale for each block of 64, which nested quantisation stores in a byte.
SCALE_BYTES, NESTED_SCALE_BYTES = 4 / 64, 1 / 64 + 4 / (64 * 256)


@dataclass(frozen=True)
class MemoryEstimate:
    """What one device holds at the peak of a training step, in bytes.

    Attributes:
        weights, adapter, gradients, optimizer, activations, attention_mask: see the module.
        rows, length: of the largest pass.
        capacity: the memory of the device; `None` if it is not known.
    """

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    attention_mask: int
    rows: int
    length: int
    capacity: int | None = None

    @property
    def allocated(self) -> int:
        """What `torch.cuda.max_memory_allocated` will say."""
        parts = (self.weights, self.adapter, self.gradients, self.optimizer, self.activations, self.attention_mask)
        return int(sum(parts) + WORKSPACE)

    @property
    def total(self) -> int:
        """What the device will show as used."""
        return int(self.allocated * FRAGMENTATION + CONTEXT)

    @property
    def fits(self) -> bool | None:
        return None if self.capacity is None else self.total <= self.capacity

    def __str__(self) -> str:
        parts = ", ".join(
            f"{name.replace('_', ' ')} {getattr(self, name) / GIB:.2f}"
            for name in ("weights", "adapter", "gradients", "optimizer", "activations", "attention_mask")
            if getattr(self, name) or name == "activations"
        )
        verdict = {None: "", True: ": it fits", False: ": it does not fit"}[self.fits]
        capacity = "" if self.capacity is None else f" of {self.capacity / GIB:.1f}"
        return (
            f"Memory per device, estimated: {self.total / GIB:.1f}{capacity} GiB{verdict} ({parts}; "
            f"{self.rows} x {self.length} tokens a pass)"
        )

    def as_dict(self) -> dict[str, int | bool | None]:
        figures = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return figures | {"allocated": self.allocated, "total": self.total, "fits": self.fits}


def estimate_memory(
    model_args: ModelConfig,
    training_args: SFTConfig,
    precision: Precision,
    *,
    rows: int,
    length: int,
    predicted: int,
    several_passes: bool,
    capacity: int | None = None,
) -> MemoryEstimate:
    """Play one training step of a recipe through, without its weights.

    Args:
        model_args: with the type of weights that `Precision.suit` has chosen.
        precision: what matrix products are computed in.
        rows, length: of the largest pass, padding included.
        predicted: tokens in it that have a label.
        several_passes: whether a step makes more than one, so that gradients are there before the backward pass.
        capacity: the memory of the device in bytes.

    Raises:
        UserError: if the model's config cannot be had.
    """
    model = build_on_meta(model_args, precision, training_args.trust_remote_code)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    trained_bytes = sum(parameter.nbytes for parameter in trained)
    frozen_bytes = sum(_stored_bytes(parameter, model_args) for parameter in model.parameters()) - trained_bytes
    optimizer = _optimizer_bytes(training_args.optim, trained)
    gradients = trained_bytes
    sharded = _sharded(training_args)
    if training_args.world_size > 1 and not sharded:
        gradients *= 2  # DDP sends them from buckets of their own

    peak, mask = _play_step(model, model_args, training_args, precision, rows, length, predicted, several_passes)
    activations = max(peak - mask - trained_bytes, 0)
    share = {
        part: training_args.world_size if part in sharded else 1 for part in ("weights", "gradients", "optimizer")
    }
    return MemoryEstimate(
        weights=int(frozen_bytes if model_args.use_peft else trained_bytes) // share["weights"],
        adapter=trained_bytes // share["weights"] if model_args.use_peft else 0,
        gradients=gradients // share["gradients"],
        optimizer=optimizer // share["optimizer"],
        activations=activations,
        attention_mask=mask,
        rows=rows,
        length=length,
        capacity=capacity,
    )


def nearest_fit(
    model_args: ModelConfig, training_args: SFTConfig, precision: Precision, *, rows: int, length: int, **step
) -> str | None:
    """The least change to a recipe that makes it fit on its device, as a sentence; `None` if none of them does.

    Tried in this order: checkpointing, which costs time; fewer tokens a pass, down to one row; both; and with both a
    base in 4 bits, which changes what is trained.

    Args:
        rows, length, step: as for `estimate_memory`.
    """
    checkpointed = copy(training_args)
    checkpointed.gradient_checkpointing = True
    quantised = replace(model_args, use_peft=True, load_in_4bit=True, use_bnb_nested_quant=True)
    if not model_args.use_peft:
        quantised.lora_target_modules = "all-linear"
    fewer = [rows >> halvings for halvings in range(1, rows.bit_length())]
    as_is = [] if training_args.gradient_checkpointing else [(model_args, training_args, count) for count in fewer]
    candidates = [(model_args, checkpointed, rows), *as_is, *((model_args, checkpointed, count) for count in fewer)]
    if not model_args.load_in_4bit:
        candidates.append((precision.suit(quantised), checkpointed, rows))
        candidates += [(precision.suit(quantised), checkpointed, count) for count in fewer[-1:]]
    for model, training, count in candidates:
        if estimate_memory(model, training, precision, rows=count, length=length, **step).fits:
            changes = []
            if model is not model_args:
                changes.append("load_in_4bit: true" if model_args.use_peft else "use_peft: true, load_in_4bit: true")
            if training is not training_args and not training_args.gradient_checkpointing:
                changes.append("gradient_checkpointing: true")
            if count < rows:
                changes.append(f"max_batch_tokens: {count * length}")
            return f"It would fit with {' and '.join(changes)}."
    return None


def estimate_recipe(
    model_args: ModelConfig, training_args: SFTConfig, batch_args: BatchConfig, precision: Precision
) -> tuple[MemoryEstimate, str | None]:
    """What a recipe takes, and what would make it fit if it does not.

    The data are not read for this: a pair is taken to add `TOKENS_PER_PAIR` to a trie.

    Raises:
        UserError: if the config cannot be had, or the model cannot be played through.
    """
    batch = training_args.per_device_train_batch_size
    rows, length = batch, training_args.max_length or 256
    several_passes = training_args.gradient_accumulation_steps > 1
    if batch_args.batching == "trie":
        length = batch_args.max_row_tokens
        whole, most = -(-batch * TOKENS_PER_PAIR // length), max(1, batch_args.max_batch_tokens // length)
        rows, several_passes = min(whole, most), several_passes or whole > most
    device = training_args.device
    step = {
        "rows": rows,
        "length": length,
        "predicted": min(2 * batch, rows * length),
        "several_passes": several_passes,
        "capacity": torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None,
    }
    try:
        estimate = estimate_memory(model_args, training_args, precision, **step)
        if estimate.fits is not False:
            return estimate, None
        return estimate, nearest_fit(model_args, training_args, precision, **step)
    except (RuntimeError, NotImplementedError, TypeError) as error:  # of code that was not written for fake tensors
        name = model_args.model_name_or_path
        raise UserError(f"the memory of {name} cannot be estimated ({str(error).splitlines()[0]})") from error


def build_on_meta(model_args: ModelConfig, precision: Precision, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of a recipe without content: its config is all that is read."""
    try:
        config = AutoConfig.from_pretrained(
            locate_model(model_args.model_name_or_path),
            revision=model_args.model_revision,
            trust_remote_code=trust_remote_code,
        )
    except (OSError, ValueError) as error:
        name = model_args.model_name_or_path
        raise UserError(f"model_name_or_path {name}: cannot load its config ({str(error).splitlines()[0]})") from error
    dtype = config.dtype if model_args.dtype == "auto" else getattr(torch, model_args.dtype or "float32")
    # Under ZeRO-3 transformers would give each process a part, and the meta device has none.
    whole = mock.patch("transformers.modeling_utils.is_deepspeed_zero3_enabled", return_value=False)
    with whole, torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config,
            dtype=dtype,
            # Other implementations need a GPU, and keep as little.
            attn_implementation="eager" if model_args.attn_implementation == "eager" else "sdpa",
            trust_remote_code=trust_remote_code,
        )
        if (quantisation := get_quantization_config(model_args)) is not None:
            model = replace_with_bnb_linear(
                model, modules_to_not_convert=get_keys_to_not_convert(model), quantization_config=quantisation
            )
            model.requires_grad_(False)
        if (peft_config := get_peft_config(model_args)) is not None:
            model = get_peft_model(model, peft_config, low_cpu_mem_usage=True)
    if quantisation is not None and precision.name == "bf16":
        for name, parameter in model.named_parameters():  # as TRL does, see `NLITrainer`
            if parameter.requires_grad and "lora_magnitude_vector" not in name:
                parameter.data = parameter.data.bfloat16()
    return model


def _stored_bytes(parameter: torch.Tensor, model_args: ModelConfig) -> float:
    kind = type(parameter).__name__
    if kind == "Params4bit":
        return parameter.numel() * (0.5 + (NESTED_SCALE_BYTES if model_args.use_bnb_nested_quant else SCALE_BYTES))
    return parameter.numel() if kind == "Int8Params" else parameter.nbytes


def _optimizer_bytes(name: str, trained: list[torch.Tensor]) -> int:
    name = str(getattr(name, "value", name))
    for part, per_element in STATES_PER_ELEMENT.items():
        if name == part or ("8bit" in name and part == "8bit" and "lion" not in name):
            return per_element * sum(parameter.numel() for parameter in trained)
    return STATES_PER_BYTE.get(name, 2) * sum(parameter.nbytes for parameter in trained)


def _sharded(training_args: SFTConfig) -> set[str]:
    """What a launcher spreads over the processes instead of giving each a copy."""
    everything = {"weights", "gradients", "optimizer"}
    sharded = {"fsdp": everything, "zero3": everything, "zero2": {"gradients", "optimizer"}}
    return sharded.get(launched_with(training_args), set())


def _play_step(
    model, model_args, training_args, precision, rows, length, predicted, several_passes
) -> tuple[int, int]:
    """(peak of a step beyond the weights, attention mask), in bytes."""
    autocast = precision.name != "fp32"
    peft = model_args.use_peft
    model.train()
    if training_args.gradient_checkpointing:
        model.activation_checkpointing_enable(training_args.gradient_checkpointing_kwargs or {})
        if peft:
            model.enable_input_require_grads()
    causal_lm = model.get_base_model() if peft else model
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode())
        _give_fake_content(model)
        live = stack.enter_context(_LiveBytes(there=[*model.parameters(), *model.buffers()]))
        stack.enter_context(_quantised_layers_without_content())
        ids = torch.zeros(rows, length, dtype=torch.long)
        before = live.now
        attention_mask = torch.zeros(rows, 1, length, length, dtype=precision.dtype if autocast else model.dtype)
        mask = live.now - before
        if several_passes:
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.grad = torch.empty_like(parameter)
        with _cuda_autocast(precision) if autocast else ExitStack():
            hidden = causal_lm.base_model(
                input_ids=ids, attention_mask=attention_mask, position_ids=ids, use_cache=False
            ).last_hidden_state
            # The head works in tiles (see TRL's fused head); only its gradient is as large as itself.
            head = causal_lm.get_output_embeddings().weight
            loss = (hidden.flatten(0, 1)[:predicted].float() * head[:1].float()).sum()
            del hidden
        loss.backward()
        peak = live.peak
        del loss, ids, attention_mask
    gc.collect()
    return peak, mask


def _give_fake_content(model: torch.nn.Module) -> None:
    """Exchange every tensor on the meta device for a fake one that takes part in arithmetic on a device."""
    made: dict[int, torch.Tensor] = {}  # tied weights stay tied
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and id(tensor) not in made:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                    if tensors is module._parameters:
                        fake = torch.nn.Parameter(fake, requires_grad=tensor.requires_grad)
                    made[id(tensor)] = fake
                    fake.was = tensor  # keeps the id from being given to another
                if tensor is not None:
                    tensors[name] = made[id(tensor)]


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages made since it was entered and not yet let go.

    Args:
        there: tensors that were there before, and whose views are nothing new.
    """

    def __init__(self, there: list[torch.Tensor]):
        super().__init__()
        self.now = self.peak = 0
        self._counted = {tensor.untyped_storage()._cdata for tensor in there}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._counted:
                    self._count(storage)
        return result

    def _count(self, storage) -> None:
        self._counted.add(storage._cdata)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._let_go, storage._cdata, storage.nbytes())

    def _let_go(self, key: int, nbytes: int) -> None:
        self._counted.discard(key)
        self.now -= nbytes


class _InFloat32(TorchFunctionMode):
    """What autocast computes in fp32 on CUDA and leaves in 16 bits on a CPU: the part of its list that models use."""

    FUNCTIONS = frozenset(
        {
            torch.pow,
            torch.Tensor.pow,
            torch.Tensor.__pow__,
            torch.rsqrt,
            torch.Tensor.rsqrt,
            torch.exp,
            torch.Tensor.exp,
            torch.nn.functional.layer_norm,
            torch.nn.functional.softmax,
            torch.nn.functional.softplus,
            torch.softmax,
            torch.Tensor.softmax,
            torch.cumsum,
        }
    )

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in self.FUNCTIONS and torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map(_to_float32, (args, kwargs or {}))
        return function(*args, **kwargs or {})


def _to_float32(value):
    return value.float() if isinstance(value, torch.Tensor) and value.dtype.is_floating_point else value


@contextmanager
def _cuda_autocast(precision: Precision):
    """Autocast on a CPU that treats operations as it does on CUDA."""
    before = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", True)  # PEFT asks for CUDA's alone
    try:
        with torch.autocast("cpu", precision.dtype), _InFloat32():
            yield
    finally:
        torch.set_autocast_enabled("cuda", before)


@contextmanager
def _quantised_layers_without_content():
    def forward(layer, x):
        compute_dtype = getattr(layer, "compute_dtype", None) or x.dtype
        shape = (layer.out_features, layer.in_features)
        return _Dequantised.apply(x.to(compute_dtype), shape).to(x.dtype)

    with (
        mock.patch.object(bnb.nn.Linear4bit, "forward", forward),
        mock.patch.object(bnb.nn.Linear8bitLt, "forward", forward),
    ):
        yield


class _Dequantised(torch.autograd.Function):
    """A layer whose weights are unpacked for each product and kept for none, as bitsandbytes does."""

    @staticmethod
    def forward(ctx, x, shape):
        ctx.shape = shape
        return x @ torch.empty(shape, dtype=x.dtype).t()

    @staticmethod
    def backward(ctx, gradient):
        return gradient @ torch.empty(ctx.shape, dtype=gradient.dtype), None
