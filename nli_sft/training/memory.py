"""Predict the memory of a training before any weights are there.

The model is built on the meta device from its config, quantised and with its adapter. One training step is simulated
with PyTorch's fake tensors, which have shapes but no content, and all storages that it makes and frees are counted.
Nothing here depends on the architecture: the code of the model itself shows what attention, activation functions,
adapters and checkpointing keep for the backward pass.

    peak = weights + adapter + optimizer + gradients + activations + attention mask     counted
           + WORKSPACE, for cuBLAS and kernels                                          measured
    device = FRAGMENTATION x peak + CONTEXT                                             measured

The measured terms apply to GPUs; on a CPU the estimate is what is counted. `activations` is everything else at the
step's peak, temporary results of the backward pass included. Not included: the evaluation before the first step, and
other programs. With `torch_compile`, which computes some activations twice to save memory, it is an upper bound.
"""

import gc
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any
from unittest import mock

import bitsandbytes as bnb
import torch
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset
from peft import get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from transformers import PretrainedConfig
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.quantizers.base import get_keys_to_not_convert
from trl import ModelConfig, SFTConfig, get_quantization_config

from .. import UserError
from ..configs import AUTO, BATCH_TOKENS, BatchConfig
from ..data.prompts import Prompt, PromptEncoder, row_lengths
from ..models.bases import load_config, quantization_of, skeleton
from ..models.loading import adapter_config
from ..models.precision import Precision
from ..trie import row_tokens, unsupported_reason
from .batches import GroupShuffleSampler, ShardedBatchSampler, TokenRows, TrieCollator
from .launchers import launched_with

GIB = 2**30

# Fitted to measured peaks; see docs/results.md. torch counts WORKSPACE as allocated, and not the others.
WORKSPACE = 0.1 * GIB
FRAGMENTATION = 1.05
CONTEXT = 0.6 * GIB

# Nodes that a pair adds to a trie: 34 for SNLI, the built-in prompts and random batches of 64; more in smaller ones.
TOKENS_PER_PAIR = 40

# Assumptions for English text and chat templates, used before there is a tokenizer.
LETTERS_PER_TOKEN, TOKENS_PER_TURN = 4, 5

# Batches that are packed to measure their tokens, where the data are loaded.
MEASURED_BATCHES = 16

# The share of free memory that `max_batch_tokens: auto` may fill. Later batches may be larger than those measured.
SHARE_OF_FREE = 0.85

# Optimizer state in bytes, for each byte or each element of a trained weight.
STATES_PER_BYTE = {"sgd": 0, "adafactor": 0, "lion": 1, "lion_32bit": 1}
STATES_PER_ELEMENT = {"8bit": 2, "lion_8bit": 1, "paged_lion_8bit": 1}

# 4-bit weights have a 32-bit scale for each block of 64, which nested quantisation stores in a byte.
SCALE_BYTES, NESTED_SCALE_BYTES = 4 / 64, 1 / 64 + 4 / (64 * 256)

COUNTED = ("weights", "adapter", "gradients", "optimizer", "activations", "attention_mask")


@dataclass(frozen=True)
class Batch:
    """The batch of one device, before it is split into forward passes.

    Attributes:
        rows, length: padding included.
        predicted: tokens that have a label.
        cut: whether `max_batch_tokens` applies, as it does for tries.
    """

    rows: int
    length: int
    predicted: int
    cut: bool

    def passes(self, most_tokens: int) -> int:
        """The number of forward passes with at most `most_tokens` tokens each."""
        return -(-self.rows // max(1, most_tokens // self.length)) if self.cut else 1


@dataclass(frozen=True)
class MemoryEstimate:
    """Memory of one device at the peak of a training step, in bytes.

    Attributes:
        weights, adapter, gradients, optimizer, activations, attention_mask: see the module.
        rows, length: of the largest pass.
        device: its type, such as `cuda`.
        compiled: whether layers are compiled, which makes the estimate an upper bound.
        capacity: the memory of the device; `None` if unknown.
    """

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    attention_mask: int
    rows: int
    length: int
    device: str
    compiled: bool
    capacity: int | None = None

    @property
    def tensors(self) -> int:
        return sum(getattr(self, name) for name in COUNTED)

    @property
    def allocated(self) -> int:
        """What `torch.cuda.max_memory_allocated` will report on a GPU."""
        return int(self.tensors + WORKSPACE)

    @property
    def on_gpu(self) -> int:
        """What nvidia-smi will report as used."""
        return int(self.allocated * FRAGMENTATION + CONTEXT)

    @property
    def total(self) -> int:
        return self.tensors if self.device == "cpu" else self.on_gpu

    @property
    def fits(self) -> bool | None:
        """`None` if unknown: compiled layers may fit even if their upper bound does not."""
        if self.capacity is None:
            return None
        return True if self.total <= self.capacity else None if self.compiled else False

    def __str__(self) -> str:
        sizes = [
            f"{name.replace('_', ' ')} {getattr(self, name) / GIB:.2f}" for name in COUNTED if getattr(self, name)
        ]
        about = f"{', '.join(sizes)}; {self.rows} x {self.length} tokens a pass"
        what = "Memory per device"
        if self.device == "cpu":
            what, about = "RAM for the training", f"{about}; a GPU would need {self.on_gpu / GIB:.1f}"
        size = f"{'at most ' if self.compiled else ''}{self.total / GIB:.1f}"
        if self.capacity is None:
            return f"{what}, estimated: {size} GiB ({about})"
        fits = {True: "it fits", False: "it does not fit", None: "it may fit, since compiled layers use less"}
        return f"{what}, estimated: {size} of {self.capacity / GIB:.1f} GiB: {fits[self.fits]} ({about})"

    def as_dict(self) -> dict[str, int | bool | str | None]:
        return asdict(self) | {"allocated": self.allocated, "total": self.total, "fits": self.fits}


@dataclass(frozen=True)
class MemoryPlan:
    """How training will use the memory of its devices.

    Attributes:
        max_batch_tokens: that of the recipe, or what was chosen for `auto`.
        estimate: `None` if it failed.
        text: for the log.
    """

    max_batch_tokens: int
    estimate: MemoryEstimate | None
    text: str

    def __str__(self) -> str:
        return self.text


def plan_memory(
    model_args: ModelConfig,
    training_args: SFTConfig,
    batch_args: BatchConfig,
    precision: Precision,
    prompt: Prompt,
    *,
    encoder: PromptEncoder | None = None,
    rows: Dataset | None = None,
) -> MemoryPlan:
    """Estimate a recipe, and choose `max_batch_tokens` if it is `auto`. Every process must call it.

    Args:
        model_args: with the dtype that `Precision.suit` has chosen.
        prompt: the prompt, whose length is guessed from its text if there is no encoder yet.
        encoder, rows: the encoder and its training rows, if they are loaded. Otherwise a pair is assumed to add
            `TOKENS_PER_PAIR` to a trie.
    """
    free = min(gather_object([free_memory(training_args.device)]))
    plans: list[Any] = [None]
    if training_args.process_index == 0:
        plans = [_plan(model_args, training_args, batch_args, precision, prompt, encoder, rows, free)]
    return broadcast_object_list(plans)[0]


def _plan(model_args, training_args, batch_args, precision, prompt, encoder, rows, free) -> MemoryPlan:
    on_gpu = training_args.device.type == "cuda"
    auto = batch_args.max_batch_tokens == AUTO
    tokens = BATCH_TOKENS if auto else batch_args.max_batch_tokens
    accumulates = training_args.gradient_accumulation_steps > 1

    def estimate_for(most_tokens: int) -> MemoryEstimate:
        step = largest_pass(batches, most_tokens, accumulates)
        return estimate_memory(model_args, training_args, precision, capacity=capacity, **step)

    try:
        capacity = torch.cuda.get_device_properties(training_args.device).total_memory if on_gpu else None
        config = load_config(model_args, training_args.trust_remote_code)
        if rows is None:
            batches = [guess_batch(config, training_args, batch_args, prompt)]
        else:
            batches = measure_batches(config, training_args, batch_args, encoder, rows)
        if auto and on_gpu and batches[0].cut:
            tokens = choose_batch_tokens(estimate_for, batches, free)
        estimate = estimate_for(tokens)
    except UserError as error:
        return MemoryPlan(tokens, None, f"No estimate: {error}")
    except Exception as error:  # of model code that fake tensors do not support; training works without an estimate
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
        return MemoryPlan(tokens, None, f"No estimate: the training step cannot be simulated ({reason}).")
    chosen = f"max_batch_tokens: {AUTO} is {tokens:,}.\n" if auto and batches[0].cut else ""
    advice = f" {advise(model_args, training_args)}" if estimate.fits is False else ""
    return MemoryPlan(tokens, estimate, f"{chosen}{estimate}.{advice}")


def choose_batch_tokens(estimate: Callable[[int], MemoryEstimate], batches: list[Batch], free: float) -> int:
    """Tokens of a pass: a whole batch, halved until it fits in the free memory with a margin, or a single row.

    Args:
        estimate: from the tokens of a pass, the memory of a step.
        batches: some of the training's batches.
        free: bytes.
    """
    length, rows = max(batch.length for batch in batches), max(batch.rows for batch in batches)
    while rows > 1 and estimate(rows * length).total > SHARE_OF_FREE * free:
        rows = -(-rows // 2)
    return rows * length


def advise(model_args: ModelConfig, training_args: SFTConfig) -> str:
    """Settings that reduce memory and are not in the recipe yet, the cheapest first."""
    measures = [] if training_args.gradient_checkpointing else ["gradient_checkpointing: true"]
    measures += ["a smaller max_batch_tokens"]
    if not model_args.load_in_4bit:
        measures += ["load_in_4bit: true" if model_args.use_peft else "use_peft: true with load_in_4bit: true"]
    return f"Try {', then '.join(measures)}."


def free_memory(device: torch.device) -> float:
    """Bytes of a GPU that training may use, including unallocated reserves of torch; infinite elsewhere."""
    if device.type != "cuda":
        return float("inf")
    gc.collect()  # an earlier model may be in a reference cycle
    try:
        free, _ = torch.cuda.mem_get_info(device)
    except Exception:  # the other processes are waiting for a number
        return float("inf")
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def guess_batch(config: PretrainedConfig, training_args: SFTConfig, batch_args: BatchConfig, prompt: Prompt) -> Batch:
    """The batch of one device, without data or tokenizer."""
    pairs, longest = training_args.per_device_train_batch_size, training_args.max_length or 256
    turns = prompt.turns()
    shared = "".join(turn["content"] for turn in turns).partition("{premise}")[0].partition("{hypothesis}")[0]
    instruction = len(shared) // LETTERS_PER_TOKEN + len(turns) * TOKENS_PER_TURN
    length = _row_tokens(config, batch_args, longest, instruction)
    if length is None:
        return Batch(pairs, longest, min(2 * pairs, pairs * longest), cut=False)
    rows = -(-pairs * TOKENS_PER_PAIR // (length - instruction))  # every row begins with the instruction
    return Batch(rows, length, min(2 * pairs, rows * length), cut=True)


def measure_batches(
    config: PretrainedConfig, training_args: SFTConfig, batch_args: BatchConfig, encoder: PromptEncoder, rows: Dataset
) -> list[Batch]:
    """The first batches of one device, in the order of training."""
    longest = int(row_lengths(rows).max())
    length = _row_tokens(config, batch_args, longest, encoder.instruction_tokens)
    pairs, processes = training_args.per_device_train_batch_size, training_args.world_size
    if length is None:
        return [Batch(pairs, longest, pairs * max(map(len, encoder.answers)), cut=False)]
    groups = rows["premise"][:] if batch_args.group_by_premise else range(len(rows))
    seed = training_args.seed if training_args.data_seed is None else training_args.data_seed
    batches = ShardedBatchSampler(GroupShuffleSampler(groups, seed), pairs * processes, 0, processes, drop_last=False)
    pack = TrieCollator(encoder.answers, length, max_batch_tokens=pairs * longest * length)  # as one micro-batch
    measured, token_rows = [], TokenRows(rows, encoder.answers)
    for batch in islice(batches, MEASURED_BATCHES):
        (micro_batch,) = pack([token_rows[pair] for pair in batch])["micro_batches"]
        n_rows, length = micro_batch["input_ids"].shape
        measured.append(Batch(n_rows, length, micro_batch["predict"].numel(), cut=True))
    return measured


def largest_pass(batches: list[Batch], most_tokens: int, accumulates: bool) -> dict[str, Any]:
    """The arguments of `estimate_memory` for the largest pass of any batch, with at most `most_tokens` a pass."""
    passes = [(batch, batch.passes(most_tokens)) for batch in batches]
    batch, count = max(passes, key=lambda item: -(-item[0].rows // item[1]) * item[0].length)
    return {
        "rows": -(-batch.rows // count),
        "length": batch.length,
        "predicted": -(-batch.predicted // count),
        "several_passes": accumulates or any(count > 1 for _, count in passes),
    }


def _row_tokens(config: PretrainedConfig, batch_args: BatchConfig, longest: int, instruction: int) -> int | None:
    """`trie.row_tokens` without its warning, which the trainer will log."""
    if unsupported_reason(config, longest) is not None:
        return None
    return row_tokens(batch_args.batching, batch_args.max_row_tokens, config, longest, instruction)


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
    """Simulate one training step of a recipe without its weights.

    Args:
        model_args: with the dtype that `Precision.suit` has chosen.
        precision: of matrix products.
        rows, length: of the largest pass, padding included.
        predicted: tokens in it that have a label.
        several_passes: whether a step has more than one, so that gradients exist before the last backward pass.
        capacity: the memory of the device in bytes.

    Raises:
        UserError: if the model's config cannot be loaded.
    """
    model = build_on_meta(model_args, precision, training_args.trust_remote_code)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    trained_bytes = sum(parameter.nbytes for parameter in trained)
    frozen_bytes = sum(_stored_bytes(parameter, model_args) for parameter in model.parameters()) - trained_bytes
    optimizer = _optimizer_bytes(training_args.optim, trained)
    gradients = trained_bytes
    sharded = {"fsdp": COUNTED, "zero3": COUNTED, "zero2": ("gradients", "optimizer")}.get(
        launched_with(training_args), ()
    )
    if training_args.world_size > 1 and not sharded:
        gradients *= 2  # DDP copies them to buckets

    peak, mask = _trace_step(model, model_args, training_args, precision, rows, length, predicted, several_passes)

    def share(name: str) -> int:
        return training_args.world_size if name in sharded else 1

    return MemoryEstimate(
        weights=int(frozen_bytes if model_args.use_peft else trained_bytes) // share("weights"),
        adapter=trained_bytes // share("weights") if model_args.use_peft else 0,
        gradients=gradients // share("gradients"),
        optimizer=optimizer // share("optimizer"),
        activations=max(peak - mask - trained_bytes, 0),
        attention_mask=mask,
        rows=rows,
        length=length,
        device=training_args.device.type,
        compiled=training_args.torch_compile,
        capacity=capacity,
    )


def build_on_meta(model_args: ModelConfig, precision: Precision, trust_remote_code: bool = False) -> Any:
    """The model of a recipe on the meta device, quantised and with its adapter."""
    config = load_config(model_args, trust_remote_code)
    dtype = config.dtype if model_args.dtype == "auto" else getattr(torch, model_args.dtype or "float32")
    # Other implementations need a GPU, and keep as little as SDPA.
    attention = "eager" if model_args.attn_implementation == "eager" else "sdpa"
    model: Any = skeleton(config, trust_remote_code, dtype=dtype, attn_implementation=attention)
    with torch.device("meta"):
        if (quantization := get_quantization_config(_packed_as_bitsandbytes(model_args, config))) is not None:
            model = replace_with_bnb_linear(
                model, modules_to_not_convert=get_keys_to_not_convert(model), quantization_config=quantization
            )
            model.requires_grad_(False)
        if (peft_config := adapter_config(model_args)) is not None:
            model = get_peft_model(model, peft_config, low_cpu_mem_usage=True)
    if (model_args.load_in_4bit or model_args.load_in_8bit) and precision.name == "bf16":
        for name, parameter in model.named_parameters():  # as TRL does, see `NLITrainer`
            if parameter.requires_grad and "lora_magnitude_vector" not in name:
                parameter.data = parameter.data.bfloat16()
    return model


def _packed_as_bitsandbytes(model_args: ModelConfig, config: PretrainedConfig) -> ModelConfig:
    """GPTQ and AWQ pack weights like bitsandbytes, which stands in for them: their own layers need a GPU."""
    if quantization_of(config) not in ("gptq", "awq"):
        return model_args
    found: Any = config.quantization_config
    bits = found.get("bits", found.get("w_bit")) if isinstance(found, dict) else getattr(found, "bits", None)
    return replace(model_args, load_in_4bit=bits == 4, load_in_8bit=bits == 8)


def _stored_bytes(parameter: torch.Tensor, model_args: ModelConfig) -> float:
    kind = type(parameter).__name__
    if kind == "Params4bit":
        return parameter.numel() * (0.5 + (NESTED_SCALE_BYTES if model_args.use_bnb_nested_quant else SCALE_BYTES))
    return parameter.numel() if kind == "Int8Params" else parameter.nbytes


def _optimizer_bytes(name: str, trained: Sequence[torch.Tensor]) -> int:
    name = str(getattr(name, "value", name))
    for kind, per_element in STATES_PER_ELEMENT.items():
        if name == kind or ("8bit" in name and kind == "8bit" and "lion" not in name):
            return per_element * sum(parameter.numel() for parameter in trained)
    return STATES_PER_BYTE.get(name, 2) * sum(parameter.nbytes for parameter in trained)


def _trace_step(
    model, model_args, training_args, precision, rows, length, predicted, several_passes
) -> tuple[int, int]:
    """(peak of a step beyond the weights, attention mask), in bytes."""
    autocast = precision.name != "fp32"
    peft = model_args.use_peft
    model.train()
    if training_args.gradient_checkpointing:
        checkpoint: dict[str, Any] = {**(training_args.gradient_checkpointing_kwargs or {"use_reentrant": False})}
        if checkpoint.get("use_reentrant") is False:  # recomputation must emulate CUDA too
            checkpoint["context_fn"] = lambda: (nullcontext(), _EmulateCuda())
        # transformers 5.17 has only the older name.
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)(checkpoint)
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
        with _cuda_autocast(precision) if autocast else _EmulateCuda():
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
    """Replace every tensor on the meta device by a fake one on the CPU, which can be computed with."""
    fakes: dict[int, Any] = {}  # tied weights stay tied
    originals = []  # kept, so that no id is reused
    for module in model.modules():
        tensors: Any
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in fakes:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                    if tensors is module._parameters:
                        fake = torch.nn.Parameter(fake, requires_grad=tensor.requires_grad)
                    fakes[id(tensor)] = fake
                    originals.append(tensor)
                tensors[name] = fakes[id(tensor)]


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that were made in it and not yet freed.

    Args:
        there: existing tensors, whose views do not count.
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
        weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())

    def _free(self, key: int, nbytes: int) -> None:
        self._counted.discard(key)
        self.now -= nbytes


class _EmulateCuda(TorchFunctionMode):
    """Makes operations on a CPU keep what they keep on CUDA.

    There autocast computes `IN_FLOAT32` in fp32 (the part of its list that models use), and dropout keeps a mask of
    bytes.
    """

    IN_FLOAT32 = {
        *(torch.pow, torch.Tensor.pow, torch.Tensor.__pow__, torch.rsqrt, torch.Tensor.rsqrt, torch.cumsum),
        *(torch.exp, torch.Tensor.exp, torch.softmax, torch.Tensor.softmax, torch.nn.functional.softmax),
        *(torch.nn.functional.layer_norm, torch.nn.functional.softplus),
    }

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.nn.functional.dropout and kwargs["p"] and kwargs["training"]:
            (values,) = args
            return torch.native_dropout(values, kwargs["p"], True)[0]
        if function in self.IN_FLOAT32 and torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map(_to_float32, (args, kwargs))
        return function(*args, **kwargs)


def _to_float32(value):
    return value.float() if isinstance(value, torch.Tensor) and value.dtype.is_floating_point else value


@contextmanager
def _cuda_autocast(precision: Precision):
    """Autocast on a CPU with the rules of CUDA."""
    before = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", True)  # PEFT checks CUDA's only
    try:
        with torch.autocast("cpu", precision.dtype), _EmulateCuda():
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
    """A layer whose weights are unpacked for each product and not kept, as by bitsandbytes."""

    @staticmethod
    def forward(ctx, x, shape):
        ctx.shape = shape
        return x @ torch.empty(shape, dtype=x.dtype).t()

    @staticmethod
    def backward(ctx, gradient):
        return gradient @ torch.empty(ctx.shape, dtype=gradient.dtype), None
