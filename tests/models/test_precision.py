import pytest
import torch
from trl import ModelConfig, SFTConfig, get_quantization_config

from nli_sft import UserError
from nli_sft.configs import BatchConfig, EvalConfig, MachineConfig, RecipeError, parse_recipe, resolve_recipe
from nli_sft.models import precision
from nli_sft.models.precision import Precision, choose_precision, default_device, native_precision

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


def cards(monkeypatch, **capability_of):
    """Pretend that the machine has these GPUs."""
    names, capabilities = list(capability_of), list(capability_of.values())
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
    monkeypatch.setattr(torch.cuda, "get_device_name", names.__getitem__)
    monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.__getitem__)
    # True on a T4 as well, which emulates bf16.
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)


@pytest.mark.parametrize(
    ("card", "capability", "name", "line"),
    [
        ("T4", (7, 5), "fp16", "Precision: fp16 (T4, compute capability 7.5, no native bf16; with loss scaling)"),
        (
            "V100",
            (7, 0),
            "fp16",
            "Precision: fp16 (V100, compute capability 7.0, no native bf16; with loss scaling)",
        ),
        (
            "P100",
            (6, 0),
            "fp32",
            "Precision: fp32 (P100, compute capability 6.0, no fast 16-bit arithmetic)",
        ),
        ("A100", (8, 0), "bf16", "Precision: bf16 (A100, compute capability 8.0, native bf16)"),
        ("H200", (9, 0), "bf16", "Precision: bf16 (H200, compute capability 9.0, native bf16)"),
    ],
)
def test_auto_is_the_native_precision_of_each_gpu_generation(monkeypatch, card, capability, name, line):
    cards(monkeypatch, **{card: capability})
    chosen = choose_precision("auto", CUDA)
    assert chosen.name == name
    assert str(chosen) == line


def test_the_oldest_gpu_decides_for_all_processes(monkeypatch):
    cards(monkeypatch, A100=(8, 0), T4=(7, 5))
    assert native_precision(CUDA).name == "bf16", "one process uses the first GPU only"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert native_precision(CUDA).name == "fp16"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert native_precision(CUDA).name == "fp16", "more processes than GPUs"
    assert native_precision(torch.device("cuda", 0)).name == "bf16"


@pytest.mark.parametrize(("feature", "name"), [("amx_bf16", "bf16"), ("avx512_bf16", "bf16"), ("avx2", "fp32")])
def test_a_cpu_computes_in_fp32_unless_it_has_bf16_instructions(monkeypatch, feature, name):
    monkeypatch.setattr(
        torch.cpu, "get_capabilities", lambda: {"amx_bf16": False, "avx512_bf16": False, feature: True}
    )
    assert native_precision(CPU).name == name


def test_a_recipe_may_set_another_precision(monkeypatch):
    cards(monkeypatch, A100=(8, 0))
    assert str(choose_precision("fp16", CUDA)).startswith(
        "Precision: fp16 (set in the recipe; auto would be bf16: A100"
    )
    assert str(choose_precision("bf16", CUDA)) == str(choose_precision("auto", CUDA))
    with pytest.raises(UserError, match="precision: fp16 needs a GPU"):
        choose_precision("fp16", CPU)


def test_accelerate_can_force_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: CUDA)
    assert default_device() == CUDA
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert default_device() == CPU


QLORA = {"load_in_4bit": True, "use_peft": True}
LORA = {"use_peft": True}


@pytest.mark.parametrize(
    ("model", "dtype", "under_bf16", "under_fp16", "under_fp32"),
    [
        (QLORA, "bfloat16", "bfloat16", "float16", "float32"),
        (QLORA, "float32", "bfloat16", "float16", "float32"),  # TRL's default
        (LORA, "bfloat16", "bfloat16", "float16", "float32"),
        (LORA, "float32", "float32", "float32", "float32"),
        (LORA, "auto", "auto", "float16", "float32"),
        ({}, "bfloat16", "bfloat16", "float32", "float32"),
        ({}, "float32", "float32", "float32", "float32"),
    ],
)
def test_the_dtype_of_weights_follows_the_precision(model, dtype, under_bf16, under_fp16, under_fp32):
    args = ModelConfig(dtype=dtype, **model)
    for name, expected in (("bf16", under_bf16), ("fp16", under_fp16), ("fp32", under_fp32)):
        suited = Precision(name, "").suit(args)
        assert suited.dtype == expected, name
        if model is QLORA:
            quantization_config = get_quantization_config(suited)
            assert quantization_config is not None
            assert quantization_config.bnb_4bit_compute_dtype == getattr(torch, expected)
    assert args.dtype == dtype, "the recipe is unchanged"


def test_autocast_computes_in_the_precision():
    a = torch.ones(4, 4)
    with Precision("bf16", "").autocast(CPU):
        assert (a @ a).dtype == torch.bfloat16
    with Precision("fp32", "").autocast(CPU):
        assert (a @ a).dtype == torch.float32


TYPES = (BatchConfig, MachineConfig, SFTConfig, ModelConfig)


def parse(tmp_path, *arguments):
    return parse_recipe(TYPES, ["--output_dir", str(tmp_path), *arguments])


@pytest.mark.parametrize(("native", "bf16"), [("bf16", True), ("fp32", False)])
def test_auto_is_resolved_to_the_native_precision(monkeypatch, tmp_path, native, bf16):
    monkeypatch.setattr(precision, "native_precision", lambda device: Precision(native, "pretended"))
    configs = parse(tmp_path, "--use_cpu")
    _, machine, training, _ = configs
    assert (machine.precision, training.bf16, training.fp16) == (native, bf16, False)
    resolved = resolve_recipe(configs)
    assert resolved["precision"] == native, "so that a run's recipe repeats it on other hardware"
    assert "bf16" not in resolved


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (["--bf16=true"], "bf16"),
        (["--bf16=false"], "fp32"),
        (["--precision=fp32"], "fp32"),
        (["--precision=bf16"], "bf16"),
    ],
)
def test_trls_own_flags_set_the_precision(tmp_path, flags, name):
    _, machine, training, _ = parse(tmp_path, "--use_cpu", *flags)
    assert (machine.precision, training.bf16) == (name, name == "bf16")


def test_contradictory_flags_are_refused(tmp_path):
    with pytest.raises(RecipeError, match="precision is bf16, but bf16 and fp16 mean fp32; remove bf16 and fp16"):
        parse(tmp_path, "--precision=bf16", "--bf16=false")
    with pytest.raises(UserError, match="precision: fp16 needs a GPU"):
        parse(tmp_path, "--use_cpu", "--fp16=true")
    with pytest.raises(RecipeError, match="precision: invalid choice: 'half'"):
        parse(tmp_path, "--precision=half")
    assert parse_recipe((EvalConfig,), ["--run", "x"])[0].precision == "auto"
