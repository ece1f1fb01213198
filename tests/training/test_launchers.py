"""The files in accelerate_configs/, and recipes that cannot work with them."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from trl import ModelConfig, SFTConfig

from nli_sft import UserError
from nli_sft.training.launchers import check_launch, launched_with

ROOT = Path(__file__).parents[2]
CONFIGS = {path.stem: path for path in ROOT.glob("accelerate_configs/*.yaml")}


@pytest.mark.parametrize("path", CONFIGS.values(), ids=CONFIGS)
def test_the_precision_is_left_to_the_recipe(path):
    assert "mixed_precision" not in yaml.safe_load(path.read_text())


@pytest.fixture
def launched(tmp_path, monkeypatch):
    def launch(name):
        if name == "fsdp":
            monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        training_args = SFTConfig(str(tmp_path), use_cpu=True, bf16=False)
        if name.startswith("zero"):
            plugin = SimpleNamespace(zero_stage=int(name[-1]))
            training_args.deepspeed_plugin = plugin  # pyright: ignore[reportAttributeAccessIssue] (a minimal plugin)
        return training_args

    return launch


QLORA = {"use_peft": True, "load_in_4bit": True}


@pytest.mark.parametrize("launcher", ["one process", "fsdp", "zero2", "zero3"])
def test_launched_with_recognises_each_launcher(launched, launcher):
    assert launched_with(launched(launcher)) == launcher


@pytest.mark.parametrize(
    ("launcher", "model", "precision", "message"),
    [
        ("zero3", QLORA, "bf16", "load_in_4bit does not work with ZeRO-3, .* use fsdp2, ddp or deepspeed_zero2"),
        ("zero3", {"use_peft": True, "load_in_8bit": True}, "bf16", "load_in_8bit does not work with zero3"),
        ("fsdp", {"use_peft": True, "load_in_8bit": True}, "bf16", "load_in_8bit does not work with fsdp"),
        ("fsdp", QLORA, "bf16", "needs bnb_4bit_quant_storage: bfloat16"),
        ("fsdp", QLORA | {"bnb_4bit_quant_storage": "bfloat16"}, "fp16", "needs precision bf16, .* not fp16: use ddp"),
        ("one process", {"load_in_4bit": True}, "bf16", "need use_peft: true: quantised weights cannot be trained"),
    ],
)
def test_unsupported_combinations_are_refused(launched, launcher, model, precision, message):
    with pytest.raises(UserError, match=message):
        check_launch(ModelConfig(**model), launched(launcher), precision)


@pytest.mark.parametrize("launcher", ["one process", "fsdp", "zero2", "zero3"])
@pytest.mark.parametrize("model", [{}, {"use_peft": True}, QLORA | {"bnb_4bit_quant_storage": "bfloat16"}])
def test_supported_combinations_pass(launched, launcher, model):
    if not (launcher == "zero3" and model.get("load_in_4bit")):
        check_launch(ModelConfig(**model), launched(launcher), "bf16")


def test_one_process_uses_one_gpu(launched, caplog):
    args = launched("one process")
    args._n_gpu = 4
    check_launch(ModelConfig(), args, "bf16")
    assert args.n_gpu == 1
    assert "Using 1 of 4 GPUs" in caplog.text
    assert "accelerate_configs/ddp.yaml --num_processes 4" in caplog.text


def test_the_documentation_names_every_launcher():
    pages = "".join(page.read_text() for page in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))))
    assert set(re.findall(r"accelerate_configs/(\w+)\.yaml", pages)) <= set(CONFIGS)
    assert set(re.findall(r"\b(\w+)\.yaml`", pages)) >= set(CONFIGS)
