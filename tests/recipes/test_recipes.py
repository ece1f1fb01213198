"""Every YAML under recipes/ is parsed as its script parses it, and its model is built without weights."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM
from trl import ModelConfig, SFTConfig, get_peft_config, get_quantization_config

from nli_sft.configs import BatchConfig, PromptConfig, TrackingConfig, TrainDataConfig, parse_recipe
from nli_sft.data.demo import BASE_MODEL, DEMO
from nli_sft.data.prompts import load_prompt
from nli_sft.models.loading import count_parameters

ROOT = Path(__file__).parents[2]
RECIPES = sorted(path for path in ROOT.glob("recipes/*/*.yaml") if path.parent.name != "suites")
TYPES = (TrainDataConfig, PromptConfig, BatchConfig, TrackingConfig, SFTConfig, ModelConfig)

# The shapes in the published config.json of each base, and its number of parameters.
SMOLLM2 = {"model_type": "llama", "vocab_size": 49152, "tie_word_embeddings": True}
QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "head_dim": 128,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
}
ARCHITECTURES = {
    DEMO: (AutoConfig.from_pretrained(BASE_MODEL).to_dict(), 2_853_312),
    "microsoft/phi-2": (
        {
            "model_type": "phi",
            "vocab_size": 51200,
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
        },
        2_779_683_840,
    ),
    "HuggingFaceTB/SmolLM2-135M-Instruct": (
        SMOLLM2
        | {
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
        },
        134_515_008,
    ),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": (
        SMOLLM2
        | {
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 24,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
        },
        1_711_376_384,
    ),
    "Qwen/Qwen3-0.6B": (
        QWEN3 | {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16},
        596_049_920,
    ),
    "Qwen/Qwen3-4B": (
        QWEN3 | {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32},
        4_022_468_096,
    ),
    "meta-llama/Llama-3.2-1B-Instruct": (
        {
            "model_type": "llama",
            "vocab_size": 128256,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "tie_word_embeddings": True,
        },
        1_235_814_400,
    ),
}


def parse(path):
    # GPU recipes set a precision that a machine without a GPU refuses; everything else is checked.
    return parse_recipe(TYPES, [f"--config={path}", "--bf16=false"])


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_recipe_builds_its_model(path):
    data, prompt, _, _, training, model = parse(path)
    name = f"{path.parent.name}-{path.stem}"
    assert training.output_dir == f"outputs/{name}"
    assert training.run_name == name
    if path.parent.name == "demo":
        assert data.dataset_name == model.model_name_or_path == DEMO
    else:
        assert data.dataset_name == "stanfordnlp/snli"
        for revision in (data.dataset_revision, model.model_revision):
            assert re.fullmatch(r"[0-9a-f]{40}", revision), "pin revisions to commits"
    assert training.eval_on_start
    assert training.metric_for_best_model == "eval_accuracy"
    load_prompt(prompt.prompt, prompt.label_words)
    if model.load_in_4bit:
        assert model.dtype == "bfloat16", "TRL's default would compute in float32"
        assert get_quantization_config(model).bnb_4bit_use_double_quant

    architecture, parameters = ARCHITECTURES[model.model_name_or_path]
    architecture = dict(architecture)
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture.pop("model_type"), **architecture))
        assert count_parameters(built).total == parameters
        assert model.use_peft == (path.stem != "full")
        if model.use_peft:
            counts = count_parameters(get_peft_model(built, get_peft_config(model), low_cpu_mem_usage=True))
            assert 0 < counts.trainable_share < (0.2 if parameters < 10**7 else 0.05)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_recipe_opens_with_its_launch_command(path):
    text = path.read_text()
    command = re.search(r"^# (accelerate launch|python) .*$", text, re.MULTILINE)[0]
    for argument in command.split():
        if "/" in argument:
            assert (ROOT / argument).is_file(), argument
    assert command.endswith(str(path.relative_to(ROOT)))


def test_recipes_do_not_repeat_defaults():
    plain = {f.name: f.default for config in TYPES for f in config.__dataclass_fields__.values()}
    for path in RECIPES:
        for key, value in yaml.safe_load(path.read_text()).items():
            assert value != plain[key], f"{path}: {key}"
