"""Training, prediction and export with other kinds of bases."""

import json
import runpy
import sys

import pytest
from launching import ROOT
from tiny import chatml_tokenizer, few_pairs, tiny_llama
from tiny_bases import make_base
from tiny_run import make_run
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from nli_sft.classifier import NLIClassifier
from nli_sft.data.prompts import PROMPTS, PromptEncoder


@pytest.fixture
def script(monkeypatch, capsys, tmp_path, caplog):
    """Run a recipe script in this process; returns its output and log on one line."""

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
    """Train three steps on a base."""

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


def test_learned_positions_limit_the_length(train, tmp_path):
    lengths = [len(row) for row in few_pairs().map(encode_prompt)["input_ids"]]
    positions = sorted(lengths)[len(lengths) // 2] + 3
    base = make_base(tmp_path / "base", "gpt2", positions=positions)
    output = train(base, "--drop_too_long=true")
    assert f"max_length is {positions}: the base has no more positions." in output
    assert "Saved in" in output


def test_experts(train, tmp_path):
    base = make_base(tmp_path / "base", "qwen3_moe")
    output = train(base, *LORA, "--lora_target_parameters=mlp.experts.gate_up_proj")
    assert "lora_dropout is 0, not 0.05" in output
    assert "router_aux_loss_coef is 0: tries do not support the router's loss" in output
    assert "Saved in" in output
    pairs = few_pairs()
    predictions = NLIClassifier.from_pretrained(tmp_path / "run")(pairs["premise"], pairs["hypothesis"])
    assert isinstance(predictions, list)
    assert len(predictions) == len(pairs)


def test_a_routers_loss_is_trained_on_padded_batches(train, tmp_path):
    base = make_base(tmp_path / "base", "mixtral", output_router_logits=True)
    output = train(base, "--router_aux_loss_coef=0.01", "--logging_steps=1", *LORA)
    assert "Padded batches instead of tries: router_aux_loss_coef is set, and tries do not support it." in output
    history = json.loads((tmp_path / "run" / "run.json").read_text())["history"]
    assert any("aux_loss" in entry for entry in history)


@pytest.mark.parametrize(("bits", "flags"), [(4, []), (8, ["--dequantize"])])
def test_a_quantised_base_is_trained_and_exported(train, script, tmp_path, bits, flags):
    tokenizer = chatml_tokenizer()
    tiny_llama(len(tokenizer)).save_pretrained(tmp_path / "plain")
    config = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=config, device_map="cpu", dtype="float32"
    )
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")

    assert "Saved in" in train(tmp_path / "base", *LORA)
    any_difference = ["--device=cpu", "--max_difference=1", "--max_flips=1"]
    output = script("export.py", "--run", tmp_path / "run", *any_difference, *flags)
    assert flags or "dequantising it to merge the adapter" in output
    merged = tmp_path / "run-merged"
    assert "quantization_config" not in json.loads((merged / "config.json").read_text())
    assert json.loads((merged / "parity.json").read_text())["mean_difference"] < 0.02


def test_a_padding_token_beyond_the_embedding(train, tmp_path):
    tokenizer = chatml_tokenizer()
    tiny_llama(len(tokenizer)).save_pretrained(tmp_path / "base")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(tmp_path / "base")
    output = train(tmp_path / "base", "--batching=padded")
    assert "'[PAD]' (id 400) is beyond the 400 rows of the embedding; padding with '<|im_end|>'" in output
    assert "Saved in" in output


def test_tokens_beyond_the_embedding(train, tmp_path):
    tokenizer = chatml_tokenizer()
    tiny_llama(len(tokenizer)).save_pretrained(tmp_path / "base")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    tokenizer.chat_template = str(tokenizer.chat_template).replace("<|im_start|>", "<|turn|>")
    tokenizer.save_pretrained(tmp_path / "base")
    output = train(tmp_path / "base")
    assert "encodes '<|turn|>' as token 400, but the model's embedding has 400 rows" in output


def test_an_adapter_as_base_names_the_command_that_merges_it(train, script, tmp_path, workspace):
    data = str(workspace / "data")
    first = make_run(tmp_path / "first", workspace / "base", evaluated=False, dataset_name=data)
    output = train(first, *LORA)
    assert f"{first} is an adapter, not a whole model" in output
    assert not (tmp_path / "run").exists()
    command = output.partition("python recipes/")[2].split()
    script(*command, "--device=cpu")
    assert "Saved in" in train(tmp_path / "first-merged", *LORA)


def test_a_full_run_as_base(train, tmp_path, workspace):
    first = make_run(tmp_path / "first", workspace / "base", use_peft=False, evaluated=False)
    assert "Saved in" in train(first, *LORA)
