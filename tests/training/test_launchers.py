"""accelerate_configs/ as accelerate and DeepSpeed read them, and recipes that cannot work under them."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from trl import ModelConfig, SFTConfig

from nli_sft import UserError
from nli_sft.training.launchers import check_launch, launched_with

ROOT = Path(__file__).parents[2]
CONFIGS = {path.stem: path for path in ROOT.glob("accelerate_configs/*.yaml")}
NODES = ["--num_processes", "16", "--num_machines", "2", "--machine_rank", "1", "--main_process_ip", "first"]
NODES += ["--main_process_port", "29500"]


def launch_arguments(name, *flags):
    arguments = launch_command_parser().parse_args(["--config_file", str(CONFIGS[name]), *flags, "recipes/sft.py"])
    arguments, _, _ = _validate_launch_command(arguments)
    arguments.deepspeed_fields_from_accelerate_config = ""  # which the command sets in between
    return arguments


def test_all_are_here_and_short():
    assert set(CONFIGS) == {"cpu", "single_gpu", "ddp", "fsdp2", "deepspeed_zero2", "deepspeed_zero3"}
    for path in CONFIGS.values():
        lines = path.read_text().splitlines()
        assert lines[0].startswith("# "), "what it is for"
        assert len(lines) <= 10
        assert "mixed_precision" not in yaml.safe_load(path.read_text()), "that is the recipe's"


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_accelerate_takes_it_for_any_number_of_processes_and_nodes(monkeypatch, name):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    arguments = launch_arguments(name, *NODES)
    environment = prepare_multi_gpu_env(arguments)
    assert (arguments.nnodes, arguments.nproc_per_node) == ("2", "8")
    assert (arguments.rdzv_endpoint, arguments.node_rank) == ("first:29500", 1)
    if name == "fsdp2":
        assert environment["ACCELERATE_USE_FSDP"] == "true"
        assert environment["FSDP_VERSION"] == "2"
        assert environment["FSDP_STATE_DICT_TYPE"] == "FULL_STATE_DICT"


@pytest.mark.parametrize("stage", [2, 3])
def test_accelerate_takes_deepspeed_for_any_number_of_processes_and_nodes(stage):
    arguments = launch_arguments(f"deepspeed_zero{stage}", "--deepspeed_multinode_launcher", "standard", *NODES)
    _, environment = prepare_deepspeed_cmd_env(arguments)
    assert environment["ACCELERATE_USE_DEEPSPEED"] == "true"
    assert environment["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == str(stage)
    assert str(arguments.nproc_per_node) == "8"


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_takes_what_the_trainer_makes_of_it(monkeypatch, tmp_path, stage):
    """Parsed by DeepSpeed itself, where it is installed; not run."""
    config = pytest.importorskip("deepspeed.runtime.config")
    from accelerate.utils import DeepSpeedPlugin
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    _, environment = prepare_deepspeed_cmd_env(launch_arguments(f"deepspeed_zero{stage}", "--num_processes", "1"))
    for name, value in environment.items():
        if name.startswith("ACCELERATE_"):
            monkeypatch.setenv(name, value)
    plugin = DeepSpeedPlugin(zero3_init_flag=False)
    filled = HfTrainerDeepSpeedConfig(plugin.hf_ds_config.config)
    training_args = SFTConfig(str(tmp_path), use_cpu=True, bf16=True, per_device_train_batch_size=4)
    filled.trainer_config_process(training_args, auto_find_batch_size=False)
    filled.config["train_batch_size"] = filled.config["train_micro_batch_size_per_gpu"] = 4
    parsed = config.DeepSpeedConfig(filled.config)
    assert parsed.zero_config.stage == stage
    assert parsed.zero_config.gather_16bit_weights_on_model_save == (stage == 3)


@pytest.fixture
def launched(tmp_path, monkeypatch):
    def launch(name):
        if name == "fsdp":
            monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        training_args = SFTConfig(str(tmp_path), use_cpu=True, bf16=False)
        if name.startswith("zero"):
            plugin = SimpleNamespace(zero_stage=int(name[-1]))
            training_args.deepspeed_plugin = plugin  # pyright: ignore[reportAttributeAccessIssue] (enough of one)
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
