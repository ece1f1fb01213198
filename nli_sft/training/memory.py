"""What a training will hold in a device's memory, before any weights are there.

The model is built from its config alone, on the meta device, quantised and with its adapter. One training step of it
is then simulated with PyTorch's fake tensors, which have shapes and types and no content; every storage that is
made or let go is counted. So nothing about an architecture is written down here: what attention, activation
functions, adapters and checkpointing keep for the backward pass is found out from the code that will run.

    peak = weights + adapter + optimiser + gradients + activations + attention mask     counted
           + WORKSPACE, which cuBLAS and the kernels take                               measured
    device = FRAGMENTATION x peak + CONTEXT                                             measured

What is measured is a GPU's; on a CPU the estimate is what is counted. `activations` is what the step held at its
highest beyond the rest, the passing results of the backward pass included. Not part of it: the first step's
evaluation, other programs on the device. Compiled layers (`torch_compile`) compute some activations again instead of
keeping them, which the play does not show: with them the estimate is an upper bound.
"""

import gc
import weakref
from collections.abc import Callable
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from itertools import islice
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
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.quantizers.base import get_keys_to_not_convert
from trl import ModelConfig, SFTConfig, get_quantization_config

from .. import UserError
from ..configs import AUTO, BATCH_TOKENS, BatchConfig
from ..data.prompts import Prompt, PromptEncoder, row_lengths
from ..models.bases import load_config
from ..models.loading import adapter_config
from ..models.precision import Precision
from ..trie import row_tokens, unsupported_reason
from .batches import GroupShuffleSampler, ShardedBatchSampler, TokenRows, TrieCollator
from .launchers import launched_with

GIB = 2**30

# Fitted to measured peaks; see docs/results.md. The first is inside what torch calls allocated, the others are not.
WORKSPACE = 0.1 * GIB
FRAGMENTATION = 1.05
CONTEXT = 0.6 * GIB

# Of SNLI under the built-in prompts, in random order and batches of 64: 34 (see trie.py), and more in smaller ones.
TOKENS_PER_PAIR = 40

# What is supposed of English, and of a chat template around each turn, where there is no tokenizer yet.
LETTERS_PER_TOKEN, TOKENS_PER_TURN = 4, 5

# Batches that are packed to see how many tokens they have, where the data are at hand.
MEASURED_BATCHES = 16

# The share of the free memory that `max_batch_tokens: auto` may fill: other batches may be larger than those measured,
# and the aim of the estimate is 15 %.
SHARE_OF_FREE = 0.85

# Bytes that an optimiser keeps for each byte, or each element, of a trained weight.
STATES_PER_BYTE = {"sgd": 0, "adafactor": 0, "lion": 1, "lion_32bit": 1}
STATES_PER_ELEMENT = {"8bit": 2, "lion_8bit": 1, "paged_lion_8bit": 1}

# 4-bit weights carry a scale for each block of 64, which nested quantisation stores in a byte.
SCALE_BYTES, NESTED_SCALE_BYTES = 4 / 64, 1 / 64 + 4 / (64 * 256)


@dataclass(frozen=True)
class Batch:
    """A batch of one device as it stands before the model, before it is cut into passes.

    Attributes:
        rows, length: padding included.
        predicted: tokens in it that have a label.
        cut: whether `max_batch_tokens` holds for it, as it does for tries.
    """

    rows: int
    length: int
    predicted: int
    cut: bool

    def passes(self, most_tokens: int) -> int:
        """How many forward passes it takes, with at most so many tokens in one."""
        return -(-self.rows // max(1, most_tokens // self.length)) if self.cut else 1


@dataclass(frozen=True)
class MemoryEstimate:
    """What one device holds at the peak of a training step, in bytes.

    Attributes:
        weights, adapter, gradients, optimizer, activations, attention_mask: see the module.
        rows, length: of the largest pass.
        device: its type, such as `cuda`.
        compiled: whether layers are compiled, so that all this is an upper bound.
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
    device: str
    compiled: bool
    capacity: int | None = None

    @property
    def tensors(self) -> int:
        """The sum of the parts, and all that is taken of a CPU's RAM."""
        return self.weights + self.adapter + self.gradients + self.optimizer + self.activations + self.attention_mask

    @property
    def allocated(self) -> int:
        """What `torch.cuda.max_memory_allocated` will say on a GPU."""
        return int(self.tensors + WORKSPACE)

    @property
    def on_gpu(self) -> int:
        """What a GPU will show as used."""
        return int(self.allocated * FRAGMENTATION + CONTEXT)

    @property
    def total(self) -> int:
        """What the training takes of its device."""
        return self.tensors if self.device == "cpu" else self.on_gpu

    @property
    def fits(self) -> bool | None:
        """`None` where that is not known: compiled layers may fit although their upper bound does not."""
        if self.capacity is None:
            return None
        return True if self.total <= self.capacity else None if self.compiled else False

    def __str__(self) -> str:
        names = ("weights", "adapter", "gradients", "optimizer", "activations", "attention_mask")
        parts = [f"{name.replace('_', ' ')} {getattr(self, name) / GIB:.2f}" for name in names if getattr(self, name)]
        about = f"{', '.join(parts)}; {self.rows} x {self.length} tokens a pass"
        what = "Memory per device"
        if self.device == "cpu":
            what, about = "RAM for the training", f"{about}; a GPU would hold {self.on_gpu / GIB:.1f}"
        size = f"{'at most ' if self.compiled else ''}{self.total / GIB:.1f}"
        if self.capacity is None:
            return f"{what}, estimated: {size} GiB ({about})"
        fits = {True: "it fits", False: "it does not fit", None: "it may fit, since compiled layers hold less"}
        return f"{what}, estimated: {size} of {self.capacity / GIB:.1f} GiB: {fits[self.fits]} ({about})"

    def as_dict(self) -> dict[str, int | bool | str | None]:
        return asdict(self) | {"allocated": self.allocated, "total": self.total, "fits": self.fits}


@dataclass(frozen=True)
class MemoryPlan:
    """How a training will use the memory of its devices.

    Attributes:
        max_batch_tokens: that of the recipe, or what was chosen for `auto`.
        estimate: `None` where there is none.
        text: what a user reads of it.
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
    """Estimate a recipe, and choose `max_batch_tokens` where it says `auto`. Every process must call it.

    Args:
        model_args: with the type of weights that `Precision.suit` has chosen.
        prompt: what pairs are put into; its length is guessed from its text where there is no encoder yet.
        encoder, rows: the encoder and the training rows that it made, where they are at hand. Else a pair is taken to
            add `TOKENS_PER_PAIR` to a trie.
    """
    free = min(gather_object([free_memory(training_args.device)]))
    plans: list[MemoryPlan | None] = [None]
    if training_args.process_index == 0:
        plans = [_plan(model_args, training_args, batch_args, precision, prompt, encoder, rows, free)]
    return broadcast_object_list(plans)[0]


def _plan(model_args, training_args, batch_args, precision, prompt, encoder, rows, free) -> MemoryPlan:
    on_gpu = training_args.device.type == "cuda"
    auto = batch_args.max_batch_tokens == AUTO
    tokens = BATCH_TOKENS if auto else batch_args.max_batch_tokens
    accumulates = training_args.gradient_accumulation_steps > 1

    def play(most_tokens: int) -> MemoryEstimate:
        step = largest_pass(batches, most_tokens, accumulates)
        return estimate_memory(model_args, training_args, precision, capacity=capacity, **step)

    try:
        capacity = torch.cuda.get_device_properties(training_args.device).total_memory if on_gpu else None
        config = load_config(model_args, training_args.trust_remote_code)
        if rows is None:
            batches = [suppose_batch(config, training_args, batch_args, prompt)]
        else:
            batches = measure_batches(config, training_args, batch_args, encoder, rows)
        if auto and on_gpu and batches[0].cut:
            tokens = choose_batch_tokens(play, batches, free)
        estimate = play(tokens)
    except UserError as error:
        return MemoryPlan(tokens, None, f"No estimate: {error}")
    except Exception as error:  # of code that was not written for fake tensors; a training needs no estimate
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
        return MemoryPlan(tokens, None, f"No estimate: the training step cannot be simulated ({reason}).")
    chosen = f"max_batch_tokens: {AUTO} is {tokens:,}.\n" if auto and batches[0].cut else ""
    advice = f" {advise(model_args, training_args)}" if estimate.fits is False else ""
    return MemoryPlan(tokens, estimate, f"{chosen}{estimate}.{advice}")


def choose_batch_tokens(play: Callable[[int], MemoryEstimate], batches: list[Batch], free: float) -> int:
    """Tokens of a pass: a whole batch, halved until it fits in a device's free memory with a margin, or a single row.

    Args:
        play: estimates a step with so many tokens a pass.
        batches: those of the training, or some of them.
        free: bytes.
    """
    length, rows = max(batch.length for batch in batches), max(batch.rows for batch in batches)
    while rows > 1 and play(rows * length).total > SHARE_OF_FREE * free:
        rows = -(-rows // 2)
    return rows * length


def advise(model_args: ModelConfig, training_args: SFTConfig) -> str:
    """What takes less memory and is not in the recipe yet, the cheapest first."""
    measures = [] if training_args.gradient_checkpointing else ["gradient_checkpointing: true"]
    measures += ["a smaller max_batch_tokens"]
    if not model_args.load_in_4bit:
        measures += ["load_in_4bit: true" if model_args.use_peft else "use_peft: true with load_in_4bit: true"]
    return f"Try {', then '.join(measures)}."


def free_memory(device: torch.device) -> float:
    """Bytes of a GPU that a new training may take, what torch holds in reserve included; infinite elsewhere."""
    if device.type != "cuda":
        return float("inf")
    gc.collect()  # a model of an earlier training may wait in a reference cycle
    try:
        free, _ = torch.cuda.mem_get_info(device)
    except Exception:  # on one process, while the others wait for its figure
        return float("inf")
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def suppose_batch(
    config: PretrainedConfig, training_args: SFTConfig, batch_args: BatchConfig, prompt: Prompt
) -> Batch:
    """A batch of one device before data and tokenizer are there."""
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
    """The first batches of one device, in the order of the training."""
    longest = int(row_lengths(rows).max())
    length = _row_tokens(config, batch_args, longest, encoder.instruction_tokens)
    pairs, processes = training_args.per_device_train_batch_size, training_args.world_size
    if length is None:
        return [Batch(pairs, longest, pairs * max(map(len, encoder.answers)), cut=False)]
    groups = rows["premise"][:] if batch_args.group_by_premise else range(len(rows))
    seed = training_args.seed if training_args.data_seed is None else training_args.data_seed
    batches = ShardedBatchSampler(GroupShuffleSampler(groups, seed), pairs * processes, 0, processes, drop_last=False)
    pack = TrieCollator(encoder.answers, length, max_batch_tokens=pairs * longest * length)  # in one part
    measured, taken = [], TokenRows(rows, encoder.answers)
    for batch in islice(batches, MEASURED_BATCHES):
        (part,) = pack([taken[pair] for pair in batch])["micro_batches"]
        measured.append(Batch(*part["input_ids"].shape, part["predict"].numel(), cut=True))
    return measured


def largest_pass(batches: list[Batch], most_tokens: int, accumulates: bool) -> dict[str, int | bool]:
    """What `estimate_memory` wants to know of the largest pass of any batch, at most so many tokens to a pass."""
    passes = [(batch, batch.passes(most_tokens)) for batch in batches]
    batch, count = max(passes, key=lambda item: -(-item[0].rows // item[1]) * item[0].length)
    return {
        "rows": -(-batch.rows // count),
        "length": batch.length,
        "predicted": -(-batch.predicted // count),
        "several_passes": accumulates or any(count > 1 for _, count in passes),
    }


def _row_tokens(config: PretrainedConfig, batch_args: BatchConfig, longest: int, instruction: int) -> int | None:
    """As `trie.row_tokens`, but in silence: the trainer will say it where a model cannot run on tries."""
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

    peak, mask = _trace_step(model, model_args, training_args, precision, rows, length, predicted, several_passes)
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
        device=training_args.device.type,
        compiled=training_args.torch_compile,
        capacity=capacity,
    )


def build_on_meta(model_args: ModelConfig, precision: Precision, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of a recipe without content."""
    config = load_config(model_args, trust_remote_code)
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
        if (peft_config := adapter_config(model_args)) is not None:
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


def _trace_step(
    model, model_args, training_args, precision, rows, length, predicted, several_passes
) -> tuple[int, int]:
    """(peak of a step beyond the weights, attention mask), in bytes."""
    autocast = precision.name != "fp32"
    peft = model_args.use_peft
    model.train()
    if training_args.gradient_checkpointing:
        checkpoint = dict(training_args.gradient_checkpointing_kwargs or {"use_reentrant": False})
        if checkpoint.get("use_reentrant") is False:  # what is computed again must be computed as on CUDA too
            checkpoint["context_fn"] = lambda: (nullcontext(), _EmulateCuda())
        # transformers 5.17 knows it by its older name alone.
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
        weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())

    def _free(self, key: int, nbytes: int) -> None:
        self._counted.discard(key)
        self.now -= nbytes


class _EmulateCuda(TorchFunctionMode):
    """What keeps more or less on CUDA than on a CPU, as on CUDA.

    Autocast computes `IN_FLOAT32` in fp32 there (the part of its list that models use), and dropout keeps a mask of
    bytes, not of numbers.
    """

    IN_FLOAT32 = {
        *(torch.pow, torch.Tensor.pow, torch.Tensor.__pow__, torch.rsqrt, torch.Tensor.rsqrt, torch.cumsum),
        *(torch.exp, torch.Tensor.exp, torch.softmax, torch.Tensor.softmax, torch.nn.functional.softmax),
        *(torch.nn.functional.layer_norm, torch.nn.functional.softplus),
    }

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.nn.functional.dropout and kwargs["p"] and kwargs["training"]:
            return torch.native_dropout(*args, kwargs["p"], True)[0]
        if function in self.IN_FLOAT32 and torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map(_to_float32, (args, kwargs))
        return function(*args, **kwargs)


def _to_float32(value):
    return value.float() if isinstance(value, torch.Tensor) and value.dtype.is_floating_point else value


@contextmanager
def _cuda_autocast(precision: Precision):
    """Autocast on a CPU that treats operations as it does on CUDA."""
    before = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", True)  # PEFT asks for CUDA's alone
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
    """A layer whose weights are unpacked for each product and kept for none, as bitsandbytes does."""

    @staticmethod
    def forward(ctx, x, shape):
        ctx.shape = shape
        return x @ torch.empty(shape, dtype=x.dtype).t()

    @staticmethod
    def backward(ctx, gradient):
        return gradient @ torch.empty(ctx.shape, dtype=gradient.dtype), None
