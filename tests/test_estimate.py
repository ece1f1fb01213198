from copy import copy

import pytest
import torch
from peft import get_peft_model
from tiny import tiny_llama
from trl import ModelConfig, SFTConfig, get_peft_config

from nli_sft import UserError
from nli_sft.configs import BatchConfig
from nli_sft.estimate import GIB, TOKENS_PER_PAIR, _LiveBytes, estimate_memory, estimate_recipe, nearest_fit
from nli_sft.models import count_parameters, load_model
from nli_sft.precision import Precision

FP32, BF16 = Precision("fp32", ""), Precision("bf16", "")
LORA = {"use_peft": True, "lora_r": 4, "lora_target_modules": "all-linear", "lora_dropout": 0.0}
STEP = {"rows": 4, "length": 64, "predicted": 8, "several_passes": False}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_llama(300).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def training(tmp_path):
    return SFTConfig(str(tmp_path), use_cpu=True, bf16=False, gradient_checkpointing=False)


def really_saved(model, rows, length):
    """Bytes that autograd keeps of a forward pass on a CPU, weights aside."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes(), tensor  # held, so that no address is used twice
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
def test_it_says_what_a_real_model_holds(base, training, method, rows):
    args = ModelConfig(base, **method)
    model = load_model(args).train()
    if method:
        model = get_peft_model(model, get_peft_config(args))
    counts = count_parameters(model)
    estimate = estimate_memory(args, training, FP32, **STEP | {"rows": rows})
    trained, frozen = 4 * counts.trainable, 4 * (counts.total - counts.trainable)
    assert (estimate.weights, estimate.adapter) == ((frozen, trained) if method else (trained, 0))
    assert estimate.gradients == trained
    assert estimate.optimizer == 2 * trained
    assert estimate.attention_mask == rows * 64 * 64 * 4
    # What the backward pass needs besides is largest in a model as small as this.
    saved = really_saved(model, rows, 64)
    assert saved * 0.95 < estimate.activations < saved * 1.35


def test_the_weights_of_a_quantised_base_are_those_that_it_has(base, training):
    args = ModelConfig(base, dtype="bfloat16", load_in_4bit=True, **LORA)
    really = 0
    for parameter in load_model(args).parameters():
        state = getattr(parameter, "quant_state", None)
        really += parameter.nbytes + (state.absmax.nbytes if state is not None else 0)
    estimate = estimate_memory(args, training, BF16, **STEP)
    assert estimate.weights == pytest.approx(really, rel=0.01)
    assert estimate.adapter == estimate_memory(args, training, FP32, **STEP).adapter / 2, "TRL keeps it in bf16"


def test_checkpointing_and_fewer_tokens_hold_less(base, training):
    args, checkpointed = ModelConfig(base), copy(training)
    checkpointed.gradient_checkpointing = True
    plain = estimate_memory(args, training, FP32, **STEP | {"rows": 16})
    assert estimate_memory(args, checkpointed, FP32, **STEP | {"rows": 16}).activations < 0.8 * plain.activations
    assert estimate_memory(args, training, FP32, **STEP | {"rows": 8}).activations < 0.6 * plain.activations
    assert estimate_memory(args, training, BF16, **STEP | {"rows": 16}).activations < 0.9 * plain.activations


def test_gradients_of_earlier_passes_are_there_when_the_next_is_at_its_height(base, training):
    once = estimate_memory(ModelConfig(base), training, FP32, **STEP | {"rows": 16})
    twice = estimate_memory(ModelConfig(base), training, FP32, **STEP | {"rows": 16, "several_passes": True})
    assert once.activations < twice.activations <= once.activations + once.gradients


@pytest.mark.parametrize(("optim", "bytes_per_weight"), [("adamw_torch", 8), ("sgd", 0), ("adamw_8bit", 2)])
def test_optimisers_differ(base, training, optim, bytes_per_weight):
    training.optim = optim
    estimate = estimate_memory(ModelConfig(base), training, FP32, **STEP)
    assert estimate.optimizer == bytes_per_weight * estimate.weights / 4


def test_what_does_not_fit_is_told_the_nearest_change_that_does(base, training):
    args, checkpointed = ModelConfig(base), copy(training)
    checkpointed.gradient_checkpointing = True

    def total(options, rows):
        return estimate_memory(args, options, FP32, **STEP | {"rows": rows}).total

    def advice(capacity, rows):
        return nearest_fit(args, training, FP32, capacity=capacity, **STEP | {"rows": rows})

    with_checkpoints, with_fewer = total(checkpointed, 16), total(training, 4)
    assert with_fewer < with_checkpoints < total(training, 16)
    assert advice(with_checkpoints, 16) == "It would fit with gradient_checkpointing: true."
    assert advice(with_fewer, 16) == "It would fit with max_batch_tokens: 256."
    both = total(checkpointed, 1)
    assert advice(both, 2) == "It would fit with gradient_checkpointing: true and max_batch_tokens: 64."
    assert advice(0.1 * GIB, 1) is None
    fits = estimate_memory(args, training, FP32, capacity=16 * GIB, **STEP)
    assert fits.fits
    assert "16.0 GiB: it fits" in str(fits)


def test_a_recipe_is_estimated_by_its_largest_pass(base, training):
    training.per_device_train_batch_size = 64
    small, _ = estimate_recipe(ModelConfig(base), training, BatchConfig(max_row_tokens=512), FP32)
    assert (small.rows, small.length) == (64 * TOKENS_PER_PAIR // 512, 512)
    cut, _ = estimate_recipe(ModelConfig(base), training, BatchConfig(max_row_tokens=512, max_batch_tokens=1024), FP32)
    assert cut.rows == 2
    padded, _ = estimate_recipe(ModelConfig(base), training, BatchConfig(batching="padded"), FP32)
    assert (padded.rows, padded.length) == (64, training.max_length)


def test_a_config_that_is_not_there_is_said(training):
    with pytest.raises(UserError, match="model_name_or_path ./nowhere: cannot load its config"):
        estimate_recipe(ModelConfig("./nowhere"), training, BatchConfig(), FP32)


def test_a_view_of_a_weight_is_nothing_new():
    """Every linear layer transposes its weight: counted as new, the weights would be there twice."""
    weight = torch.zeros(8, 4)
    with _LiveBytes(there=[weight]) as live:
        assert weight.t()[1:].shape == (3, 8)
        assert live.now == 0
        made = torch.zeros(2, 8) @ weight
        assert live.now >= made.nbytes
