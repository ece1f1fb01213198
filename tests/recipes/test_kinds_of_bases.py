"""Trainings that start from bases of other shapes and kinds, and what becomes of them: evaluation, predict, export."""

import json
import runpy
import sys

import pytest
from launching import ROOT
from tiny import chatml_tokenizer, few_pairs, tiny_llama
from tiny_bases import make_base
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from nli_sft.classifier import NLIClassifier
from nli_sft.data.prompts import PROMPTS, PromptEncoder


@pytest.fixture
def script(monkeypatch, capsys, tmp_path, caplog):
    """Run a recipe script in this process; returns all that was said."""

    def run(name, *arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        caplog.clear()
        try:
            runpy.run_path(str(ROOT / "recipes" / name), run_name="__main__")
        except SystemExit as ended:
            return str(ended)
        return " ".join(f"{caplog.text} {capsys.readouterr().out}".split())

    return run


@pytest.fixture
def train(script, workspace, tmp_path):
    """Three steps on a base."""

    def run(base, *arguments):
        flags = ["--max_train_samples=24", "--per_device_train_batch_size=8", "--num_train_epochs=1"]
        flags += ["--learning_rate=1e-2", "--bf16=false", "--report_to=none", "--disable_tqdm=true", "--use_cpu=true"]
        where = ["--model_name_or_path", base, "--dataset_name", workspace / "data"]
        return script("sft.py", *where, "--output_dir", tmp_path / "run", *flags, *arguments)

    return run


def encode_prompt(pair):
    encoder = PromptEncoder(PROMPTS["plain"], chatml_tokenizer())
    return {"input_ids": encoder.encode([pair["premise"]], [pair["hypothesis"]])[0]}


LORA = ("--use_peft=true", "--lora_target_modules=all-linear")


def test_positions_that_run_out(train, script, tmp_path):
    lengths = [len(row) for row in few_pairs().map(encode_prompt)["input_ids"]]
    positions = sorted(lengths)[len(lengths) // 2] + 3
    base = make_base(tmp_path / "base", "gpt2", positions=positions)
    said = train(base)
    assert f"longer than max_length {positions}" in said
    said = train(base, "--drop_too_long=true")
    assert f"max_length is {positions}: the base has no more positions." in said
    assert "Saved in" in said
    said = script("eval.py", "--run", tmp_path / "run", "--unconstrained_samples=4")
    assert "the longest pair has" in said
    assert f"but the model has {positions} positions" in said


def test_experts(train, script, tmp_path):
    base = make_base(tmp_path / "base", "qwen3_moe")
    said = train(base, *LORA, "--lora_target_parameters=mlp.experts.gate_up_proj")
    assert "lora_dropout is 0, not 0.05" in said
    assert "router_aux_loss_coef is 0: tries do not support the router's loss" in said
    assert "Saved in" in said
    assert "error" not in script("eval.py", "--run", tmp_path / "run", "--unconstrained_samples=0")
    assert list((tmp_path / "run" / "eval").glob("*/metrics.json"))
    pairs = few_pairs()
    assert len(NLIClassifier.from_pretrained(tmp_path / "run")(pairs["premise"], pairs["hypothesis"])) == len(pairs)


def test_the_loss_of_a_router_is_trained_on_padded_batches(train, script, tmp_path):
    base = make_base(tmp_path / "base", "mixtral", output_router_logits=True)
    said = train(base, "--router_aux_loss_coef=0.01", "--logging_steps=1", *LORA)
    assert "Padded batches instead of tries: router_aux_loss_coef is set, and tries do not support it." in said
    history = json.loads((tmp_path / "run" / "run.json").read_text())["history"]
    assert any("aux_loss" in entry for entry in history)
    assert "error" not in script("eval.py", "--run", tmp_path / "run", "--unconstrained_samples=0")
    assert list((tmp_path / "run" / "eval").glob("*/metrics.json"))


@pytest.mark.parametrize("bits", [4, 8])
def test_a_base_that_is_quantised_already(train, script, tmp_path, bits):
    tokenizer = chatml_tokenizer()
    tiny_llama(len(tokenizer)).save_pretrained(tmp_path / "plain")
    config = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=config, device_map="cpu", dtype="float32"
    )
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")

    assert f"is quantised (bitsandbytes {bits}-bit)" in train(tmp_path / "base")
    assert "Saved in" in train(tmp_path / "base", *LORA)
    assert "error" not in script("eval.py", "--run", tmp_path / "run", "--unconstrained_samples=0")
    assert list((tmp_path / "run" / "eval").glob("*/metrics.json"))

    anything = ["--device=cpu", "--max_difference=1", "--max_flips=1"]
    said = script("export.py", "--run", tmp_path / "run", *anything)
    assert "it is dequantised to merge the adapter" in said
    script("export.py", "--run", tmp_path / "run", "--dequantize", "--output_dir", tmp_path / "b", *anything)
    for folder in (tmp_path / "run-merged", tmp_path / "b"):
        assert "quantization_config" not in json.loads((folder / "config.json").read_text())
        assert json.loads((folder / "parity.json").read_text())["mean_difference"] < 0.02


def test_a_padding_token_beyond_the_embedding(train, tmp_path):
    tokenizer = chatml_tokenizer()
    tiny_llama(len(tokenizer)).save_pretrained(tmp_path / "base")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(tmp_path / "base")
    said = train(tmp_path / "base", "--batching=padded")
    assert "'[PAD]' (id 400) is beyond the 400 rows of the embedding; padding with '<|im_end|>'" in said
    assert "Saved in" in said


def test_tokens_beyond_the_embedding(train, tmp_path):
    tokenizer = chatml_tokenizer()
    tiny_llama(len(tokenizer)).save_pretrained(tmp_path / "base")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_start|>", "<|turn|>")
    tokenizer.save_pretrained(tmp_path / "base")
    said = train(tmp_path / "base")
    assert "encodes '<|turn|>' as token 400, but the model's embedding has 400 rows" in said


def test_an_adapter_as_base_names_the_command_that_merges_it(train, script, tmp_path, workspace):
    train(workspace / "base", *LORA)
    (tmp_path / "run").rename(tmp_path / "first")
    said = train(tmp_path / "first", *LORA)
    assert f"{tmp_path / 'first'} is an adapter, not a whole model" in said
    assert not (tmp_path / "run").exists()
    command = said.partition("python recipes/")[2].split()
    script(*command, "--device=cpu")
    assert "Saved in" in train(tmp_path / "first-merged", *LORA)


def test_a_full_run_as_base(train, tmp_path, workspace):
    train(workspace / "base")
    (tmp_path / "run").rename(tmp_path / "first")
    assert "Saved in" in train(tmp_path / "first", *LORA)
