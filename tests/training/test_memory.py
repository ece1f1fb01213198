import weakref
from copy import copy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import get_peft_model
from tiny import few_pairs, tiny_llama
from transformers import AutoConfig, LlamaConfig, MistralConfig, PhiConfig
from trl import ModelConfig, SFTConfig, get_peft_config

from nli_sft.configs import BatchConfig
from nli_sft.data.prompts import PROMPTS, PromptEncoder
from nli_sft.models.loading import count_parameters, load_model
from nli_sft.models.precision import Precision
from nli_sft.training import memory as estimate
from nli_sft.training.memory import (
    GIB,
    SHARE_OF_FREE,
    TOKENS_PER_PAIR,
    Batch,
    MemoryEstimate,
    _LiveBytes,
    advise,
    choose_batch_tokens,
    estimate_memory,
    free_memory,
    largest_pass,
    plan_memory,
)
from nli_sft.training.trainer import NLITrainer
from nli_sft.trie import row_tokens

FP32, BF16 = Precision("fp32", ""), Precision("bf16", "")
LORA: dict[str, Any] = {"use_peft": True, "lora_r": 4, "lora_target_modules": "all-linear", "lora_dropout": 0.0}
STEP: dict[str, Any] = {"rows": 4, "length": 64, "predicted": 8, "several_passes": False}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_llama(300).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def training(tmp_path):
    return SFTConfig(str(tmp_path), use_cpu=True, bf16=False, gradient_checkpointing=False)


def saved_bytes(model, rows, length):
    """Bytes that autograd saves in a forward pass on a CPU, without weights."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes(), tensor  # keeps them alive, so that no address is reused
        return tensor

    ids = torch.zeros(rows, length, dtype=torch.long)
    mask = torch.zeros(rows, 1, length, length)
    own.add(mask.untyped_storage().data_ptr())
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        causal_lm = model.get_base_model() if hasattr(model, "peft_config") else model
        causal_lm.base_model(input_ids=ids, attention_mask=mask, position_ids=ids, use_cache=False)
    return sum(nbytes for nbytes, _ in kept.values())


@pytest.mark.parametrize("method", [{}, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("rows", [4, 16])
def test_the_estimate_matches_a_real_model(base, training, method, rows):
    args = ModelConfig(base, **method)
    model = load_model(args).train()
    if method:
        model = get_peft_model(model, get_peft_config(args))
    counts = count_parameters(model)
    estimated = estimate_memory(args, training, FP32, **{**STEP, "rows": rows})
    trained, frozen = 4 * counts.trainable, 4 * (counts.total - counts.trainable)
    assert (estimated.weights, estimated.adapter) == ((frozen, trained) if method else (trained, 0))
    assert estimated.gradients == trained
    assert estimated.optimizer == 2 * trained
    assert estimated.attention_mask == rows * 64 * 64 * 4
    # Temporary results of the backward pass are relatively large in a model as small as this.
    saved = saved_bytes(model, rows, 64)
    assert saved * 0.95 < estimated.activations < saved * 1.35


def test_the_estimated_weights_of_a_quantised_base_match_a_real_one(base, training):
    args = ModelConfig(base, dtype="bfloat16", load_in_4bit=True, **LORA)
    really = 0
    for parameter in load_model(args).parameters():
        state = getattr(parameter, "quant_state", None)
        really += parameter.nbytes + (state.absmax.nbytes if state is not None else 0)
    estimated = estimate_memory(args, training, BF16, **STEP)
    assert estimated.weights == pytest.approx(really, rel=0.01)
    assert estimated.adapter == estimate_memory(args, training, FP32, **STEP).adapter / 2, "TRL keeps it in bf16"


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_packed_weights_are_counted_as_packed(base, training, tmp_path, method):
    model = AutoConfig.from_pretrained(base)
    model.quantization_config = {"quant_method": method, "bits": 4, "group_size": 128}
    model.save_pretrained(tmp_path / "packed")
    packed = estimate_memory(ModelConfig(str(tmp_path / "packed"), dtype="bfloat16", **LORA), training, BF16, **STEP)
    args = ModelConfig(base, dtype="bfloat16", load_in_4bit=True, **LORA)
    bitsandbytes = estimate_memory(args, training, BF16, **STEP)
    assert packed.weights == bitsandbytes.weights
    assert packed.adapter == 2 * bitsandbytes.adapter, "TRL keeps it in bf16 with bitsandbytes only"


def test_checkpointing_and_fewer_tokens_need_less(base, training):
    args, checkpointed = ModelConfig(base), copy(training)
    checkpointed.gradient_checkpointing = True
    plain = estimate_memory(args, training, FP32, **{**STEP, "rows": 16})
    assert estimate_memory(args, checkpointed, FP32, **{**STEP, "rows": 16}).activations < 0.8 * plain.activations
    assert estimate_memory(args, training, FP32, **{**STEP, "rows": 8}).activations < 0.6 * plain.activations
    assert estimate_memory(args, training, BF16, **{**STEP, "rows": 16}).activations < 0.9 * plain.activations


def test_gradients_of_earlier_passes_count_at_the_peak_of_the_next(base, training):
    once = estimate_memory(ModelConfig(base), training, FP32, **{**STEP, "rows": 16})
    twice = estimate_memory(ModelConfig(base), training, FP32, **{**STEP, "rows": 16, "several_passes": True})
    assert once.activations < twice.activations <= once.activations + once.gradients


def test_dropout_saves_a_mask_of_bytes(base, training):
    def activations(dropout):
        args = ModelConfig(base, **{**LORA, "lora_dropout": dropout})
        return estimate_memory(args, training, FP32, **{**STEP, "rows": 16}).activations

    config = AutoConfig.from_pretrained(base)
    wide, narrow = config.intermediate_size, config.hidden_size
    nodes = 16 * 64 * config.num_hidden_layers
    # Each of the seven adapters saves a mask and its own copy of its input; without dropout, four inputs are shared.
    kept, masks = 4 * nodes * (3 * narrow), nodes * (6 * narrow + wide)
    assert kept + masks <= activations(0.05) - activations(0.0) < kept + 2 * masks


@pytest.mark.parametrize(("optim", "bytes_per_weight"), [("adamw_torch", 8), ("sgd", 0), ("adamw_8bit", 2)])
def test_the_optimiser_state_depends_on_the_optimiser(base, training, optim, bytes_per_weight):
    training.optim = optim
    estimated = estimate_memory(ModelConfig(base), training, FP32, **STEP)
    assert estimated.optimizer == bytes_per_weight * estimated.weights / 4


def test_advice_names_only_options_not_in_use(base, training):
    fits = estimate_memory(ModelConfig(base), training, FP32, capacity=16 * GIB, **STEP)
    assert fits.fits
    assert "16.0 GiB: it fits" in str(fits)
    assert "GiB: it does not fit" in str(replace(fits, capacity=1))
    lora, quantised = ModelConfig(base, **LORA), ModelConfig(base, load_in_4bit=True, **LORA)
    fewer = "a smaller max_batch_tokens"
    adapter = "use_peft: true with load_in_4bit: true"
    assert advise(ModelConfig(base), training) == f"Try gradient_checkpointing: true, then {fewer}, then {adapter}."
    training.gradient_checkpointing = True
    assert advise(lora, training) == f"Try {fewer}, then load_in_4bit: true."
    assert advise(quantised, training) == f"Try {fewer}."


def test_errors_of_the_simulation_do_not_stop_training(base, training, monkeypatch):
    def fail(*_, **__):
        raise KeyError

    monkeypatch.setattr(estimate, "_trace_step", fail)
    failed = plan(base, training, BatchConfig())
    assert failed.estimate is None
    assert str(failed) == "No estimate: the training step cannot be simulated (KeyError: )."


def test_free_memory_is_infinite_if_it_cannot_be_read(monkeypatch):
    def fail(device):
        raise RuntimeError("no driver")

    monkeypatch.setattr(torch.cuda, "mem_get_info", fail)
    assert free_memory(torch.device("cuda")) == float("inf")


def test_free_memory_excludes_models_in_reference_cycles(monkeypatch):
    class Model:
        pass

    model, gone = Model(), []
    model.itself = model
    weakref.finalize(model, gone.append, True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 if gone else 0, 2))
    for name in ("memory_reserved", "memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda device: 0)
    del model
    assert free_memory(torch.device("cuda")) == 1


def plan(base, training, batch_args, prompt="plain", **data) -> Any:
    return plan_memory(ModelConfig(base), training, batch_args, FP32, PROMPTS[prompt], **data)


def test_a_recipe_is_estimated_by_its_largest_pass(base, training):
    training.per_device_train_batch_size = 64
    small = plan(base, training, BatchConfig(max_row_tokens=512)).estimate
    assert small.length == 512
    assert small.rows == -(-64 * TOKENS_PER_PAIR // (512 - 20)), "each row starts with the instruction"
    assert plan(base, training, BatchConfig(max_row_tokens=512, max_batch_tokens=1024)).estimate.rows == 2
    padded = plan(base, training, BatchConfig(batching="padded")).estimate
    assert (padded.rows, padded.length) == (64, training.max_length)


def test_rows_grow_with_a_long_instruction(base, training, chatml):
    """Without a tokenizer, their length is estimated from the prompt's text."""
    training.per_device_train_batch_size = 72
    guessed = plan(base, training, BatchConfig(max_row_tokens=128), "few_shot").estimate
    encoder = PromptEncoder(PROMPTS["few_shot"], chatml)
    rows = encoder.encode_rows(few_pairs(6), max_length=None)
    measured = plan(base, training, BatchConfig(max_row_tokens=128), "few_shot", encoder=encoder, rows=rows).estimate
    wanted = row_tokens("trie", 128, LlamaConfig(), 1, encoder.instruction_tokens)
    assert 128 < wanted / 2 < measured.length <= wanted
    assert guessed.length > 500


@pytest.mark.parametrize("most_tokens", [8192, 256])
@pytest.mark.parametrize("by_premise", [False, True])
def test_with_loaded_data_passes_are_those_of_training(base, training, chatml, most_tokens, by_premise):
    training.per_device_train_batch_size = 18
    encoder = PromptEncoder(PROMPTS["plain"], chatml)
    rows = encoder.encode_rows(few_pairs(6), max_length=None)
    batch_args = BatchConfig(max_row_tokens=128, max_batch_tokens=most_tokens, group_by_premise=by_premise)
    estimated = plan(base, training, batch_args, encoder=encoder, rows=rows).estimate
    trainer = NLITrainer(
        encoder=encoder, batch_args=batch_args, model=tiny_llama(len(chatml)), args=training, train_dataset=rows
    )
    shapes = [part["input_ids"].shape for batch in trainer.get_train_dataloader() for part in batch["micro_batches"]]
    assert estimated.rows * estimated.length == max(rows * length for rows, length in shapes)
    assert len(shapes) == 4 if most_tokens == 8192 else len(shapes) > 4


def test_a_model_that_cannot_run_on_tries_is_estimated_on_padded_batches(training, tmp_path):
    config = MistralConfig(vocab_size=300, hidden_size=64, intermediate_size=64, num_hidden_layers=1, sliding_window=8)
    config.save_pretrained(tmp_path / "windowed")
    estimated = plan(str(tmp_path / "windowed"), training, BatchConfig()).estimate
    assert (estimated.rows, estimated.length) == (training.per_device_train_batch_size, training.max_length)


def test_a_missing_config_is_reported(training):
    unknown = plan("./nowhere", training, BatchConfig())
    assert unknown.estimate is None
    assert str(unknown).startswith("No estimate: model_name_or_path ./nowhere: cannot load its config")


def test_a_cpu_estimate_has_no_cuda_context(base, training):
    on_cpu = estimate_memory(ModelConfig(base), training, FP32, **STEP)
    on_gpu = replace(on_cpu, device="cuda")
    assert on_cpu.total == on_cpu.tensors < 0.1 * GIB < on_gpu.total
    assert str(on_cpu).startswith("RAM for the training")
    assert str(on_gpu).startswith("Memory per device")


def test_with_compiled_layers_the_estimate_is_an_upper_bound(base, training):
    training.torch_compile = True
    bound = estimate_memory(ModelConfig(base), training, FP32, capacity=16 * GIB, **STEP)
    assert "at most " in str(bound)
    assert bound.fits
    small = replace(bound, capacity=1)
    assert small.fits is None
    assert "GiB: it may fit, since compiled layers use less" in str(small)


def test_checkpoints_are_recomputed_in_the_types_of_cuda(training, tmp_path):
    """On CUDA, autocast computes Phi's norms and GELU in fp32, also when recomputing."""
    PhiConfig(
        vocab_size=300, hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4
    ).save_pretrained(tmp_path / "phi")
    training.gradient_checkpointing = True

    def activations(checkpoint):
        training.gradient_checkpointing_kwargs = checkpoint
        args = ModelConfig(str(tmp_path / "phi"), dtype="bfloat16", **LORA)
        return estimate_memory(args, training, BF16, **{**STEP, "rows": 16}).activations

    # Reentrant checkpoints are recomputed where CUDA's types cannot be simulated.
    assert activations({"use_reentrant": True}) < activations({"use_reentrant": False}) == activations(None)


# A device on which a row of 100 tokens takes 1 GiB, and the weights 2 GiB.
BATCHES = [Batch(rows=rows, length=100, predicted=4 * rows, cut=True) for rows in (7, 8, 5)]


def row_by_row(most_tokens):
    rows = largest_pass(BATCHES, most_tokens, False)["rows"]
    parts = dict.fromkeys(("adapter", "gradients", "optimizer", "attention_mask"), 0)
    weights = (2 + rows) * GIB - estimate.WORKSPACE - estimate.CONTEXT
    return MemoryEstimate(int(weights), activations=0, rows=rows, length=100, device="cuda", compiled=False, **parts)


@pytest.mark.parametrize(("free", "rows"), [(80, 8), (8.5, 4), (4, 1), (1, 1)])
def test_auto_halves_a_batch_until_it_fits_into_free_memory(monkeypatch, free, rows):
    monkeypatch.setattr(estimate, "FRAGMENTATION", 1.0)
    assert choose_batch_tokens(row_by_row, BATCHES, free * GIB) == rows * 100


def test_memory_reserved_by_torch_is_free(monkeypatch):
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda _: (10 * GIB, 16 * GIB))
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda _: 5 * GIB)
    monkeypatch.setattr("torch.cuda.memory_allocated", lambda _: 2 * GIB)
    assert free_memory(torch.device("cuda")) == 13 * GIB
    assert free_memory(torch.device("cpu")) == float("inf")


def test_auto_on_a_gpu_and_on_a_cpu(base, training, chatml, monkeypatch):
    training.per_device_train_batch_size = 36
    encoder = PromptEncoder(PROMPTS["plain"], chatml)
    rows = encoder.encode_rows(few_pairs(6), max_length=None)
    auto = BatchConfig(max_row_tokens=128, max_batch_tokens="auto")
    on_cpu = plan(base, training, auto, encoder=encoder, rows=rows)
    assert on_cpu.max_batch_tokens == 8192
    assert str(on_cpu).startswith("max_batch_tokens: auto is 8,192.\nRAM for the training")

    monkeypatch.setattr(SFTConfig, "device", torch.device("cuda"))
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: SimpleNamespace(total_memory=16 * GIB))
    monkeypatch.setattr(estimate, "free_memory", lambda _: 16 * GIB)
    full = plan(base, training, auto, encoder=encoder, rows=rows)
    assert full.max_batch_tokens > 4 * 128
    too_little = (full.estimate.total - 2**20) / SHARE_OF_FREE
    monkeypatch.setattr(estimate, "free_memory", lambda _: too_little)
    some = plan(base, training, auto, encoder=encoder, rows=rows)
    assert 128 <= some.max_batch_tokens < full.max_batch_tokens
    assert some.estimate.total <= SHARE_OF_FREE * too_little < full.estimate.total
    assert str(some).startswith(f"max_batch_tokens: auto is {some.max_batch_tokens:,}.\n")
    given = plan(base, training, BatchConfig(max_row_tokens=128), encoder=encoder, rows=rows)
    assert given.max_batch_tokens == 8192
    assert str(given).startswith("Memory per device")


def test_a_view_of_a_weight_does_not_count():
    """Linear layers transpose their weight, which must not count twice."""
    weight = torch.zeros(8, 4)
    with _LiveBytes(there=[weight]) as live:
        assert weight.t()[1:].shape == (3, 8)
        assert live.now == 0
        made = torch.zeros(2, 8) @ weight
        assert live.now >= made.nbytes
