import json
import logging
import shutil
from typing import Any

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file
from tiny import chatml_tokenizer, few_pairs, tiny_llama
from tiny_bases import make_base
from tiny_run import make_run
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    BitsAndBytesConfig,
    LlamaModel,
)
from trl import ModelConfig

from nli_sft import UserError
from nli_sft.classifier import NLIClassifier
from nli_sft.configs import BatchConfig
from nli_sft.data.prompts import PROMPTS, PromptEncoder
from nli_sft.evaluation.evaluate import EvalTask, evaluate_model, unconstrained_generation
from nli_sft.models.bases import InputLimits, check_base, skeleton, suit_base
from nli_sft.models.loading import load_model, load_tokenizer


def model_args(folder, **fields: Any):
    return ModelConfig(model_name_or_path=str(folder), **{"dtype": "float32", **fields})


@pytest.fixture
def base(tmp_path):
    tokenizer = chatml_tokenizer()
    tokenizer.save_pretrained(tmp_path / "base")
    tiny_llama(len(tokenizer)).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


# Ways to damage a valid base, and the error of each.


def an_adapter(folder):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(target_modules="all-linear"))
    (folder / "model.safetensors").unlink()
    (folder / "config.json").unlink()
    model.save_pretrained(folder)


def an_adapter_beside_its_base(folder):
    get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig()).save_pretrained(folder)


def a_run(folder):
    an_adapter(folder)
    (folder / "recipe.yaml").write_text("use_peft: true\n")


def a_run_that_did_not_end(folder):
    (folder / "checkpoint-48").mkdir()
    for file in ("config.json", "model.safetensors"):
        (folder / file).rename(folder / "checkpoint-48" / file)


def gguf(folder):
    (folder / "model.safetensors").rename(folder / "model-Q4_K_M.gguf")


def pickles(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def half_a_download(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="100KB")
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def a_damaged_index(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text("{")


def cut_off(folder):
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])


def a_pointer(folder):
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")


def no_config(folder):
    (folder / "config.json").unlink()


def a_broken_config(folder):
    (folder / "config.json").write_text("{")


def an_unknown_kind(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "llama9"}))


def another_name(folder):
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")


def a_folder_of_the_cache(folder):
    (folder / "snapshots" / "abc").mkdir(parents=True)
    (folder / "config.json").rename(folder / "snapshots" / "abc" / "config.json")


def learned_prompts(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)).save_pretrained(folder)


def a_vision_model(folder):
    AutoConfig.for_model("vit").save_pretrained(folder)


def only_tokenizer_model(folder):
    for file in folder.iterdir():
        file.unlink()
    (folder / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (an_adapter, r"base is an adapter, not a whole model; merge it .*AutoPeftModelForCausalLM"),
        (an_adapter_beside_its_base, r"base is an adapter, not a whole model"),
        (a_run, r"is an adapter, .* give the result: python recipes/export\.py --run \S+base --output_dir \S+-merged"),
        (a_run_that_did_not_end, r"no config\.json.*; its newest checkpoint is \S+checkpoint-48"),
        (gguf, r"base is a GGUF file, for llama\.cpp; give the model that it was made from"),
        (pickles, r"has pickled weights, .*save_pretrained\(\.\.\.\) writes safetensors"),
        (no_weights, r"has no weights: it has no model\.safetensors"),
        (half_a_download, r"lacks 1 of the \d+ files .*, such as model-00002-of-\d+\.safetensors; download it again"),
        (a_damaged_index, r"model\.safetensors\.index\.json is damaged; download it again"),
        (cut_off, r"model\.safetensors cannot be read \(.+\); download it again"),
        (a_pointer, r"it is a Git LFS pointer; run git lfs pull in that folder"),
        (no_config, r"has no config\.json, so it is not a model folder"),
        (a_broken_config, r"config\.json cannot be read \(.+\); download it again"),
        (an_unknown_kind, r"cannot load its config \(.*llama9.*\)$"),
        (
            another_name,
            r"no model\.safetensors, only model\.fp16\.safetensors; save the model with transformers",
        ),
        (a_folder_of_the_cache, r"no config\.json.*; there is one in \S+snapshots\Sabc"),
        (learned_prompts, r"is a prompt-learning adapter, which cannot be merged; give its base"),
        (a_vision_model, r"is not a causal language model that transformers knows \(vit\)"),
        (only_tokenizer_model, r"has no config\.json"),
    ],
)
def test_folders_that_are_not_a_base_are_refused(base, spoil, message):
    check_base(model_args(base))
    spoil(base)
    with pytest.raises(UserError, match=f"^model_name_or_path .*{message}") as error:
        check_base(model_args(base))
    assert "\n" not in str(error.value)


def test_a_file_is_refused(base):
    gguf(base)
    with pytest.raises(UserError, match=r"Q4_K_M\.gguf is a GGUF file"):
        check_base(model_args(base / "model-Q4_K_M.gguf"))
    with pytest.raises(UserError, match=r"config\.json is a file; give its folder"):
        check_base(model_args(base / "config.json"))


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "a/b/c", "two words"])
def test_a_folder_that_does_not_exist(name):
    with pytest.raises(UserError, match=f"^model_name_or_path {name} does not exist; give a Hub id or a folder$"):
        check_base(model_args(name))


SMALL = {"d_model": 32, "num_layers": 2, "num_heads": 2, "d_kv": 16, "d_ff": 32, "vocab_size": 400}
ENCODER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.mark.parametrize(
    ("auto_class", "kind", "fields", "message"),
    [
        (AutoModelForMaskedLM, "bert", ENCODER, "is an encoder with bidirectional attention (bert)"),
        (AutoModelForMaskedLM, "distilbert", {"dim": 32, "n_layers": 2, "n_heads": 2}, "(distilbert)"),
        (AutoModelForSeq2SeqLM, "t5", SMALL, "is an encoder-decoder model (t5)"),
        (
            AutoModelForSeq2SeqLM,
            "bart",
            {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 64},
            "is an encoder-decoder model (bart)",
        ),
    ],
)
def test_other_kinds_of_models_are_refused(tmp_path, auto_class, kind, fields, message):
    auto_class.from_config(AutoConfig.for_model(kind, **fields)).save_pretrained(tmp_path)
    chatml_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError) as error:
        check_base(model_args(tmp_path))
    assert message in str(error.value)
    assert "give a causal language model" in str(error.value)


def test_missing_weights_are_refused(base):
    LlamaModel.from_pretrained(base).save_pretrained(base)
    with pytest.raises(UserError, match=r"lacks 1 weights, such as lm_head\.weight, which would be init"):
        load_model(model_args(base))


def test_weights_of_other_shapes_are_refused(base):
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"hidden_size": 128}))
    with pytest.raises(UserError, match=r"the shapes of its weights differ from config\.json; download both again"):
        load_model(model_args(base))


@pytest.mark.parametrize("attention", ["flash", "kernels-community/none"])
def test_an_unknown_attention_is_refused_before_the_weights_load(base, attention):
    config = check_base(model_args(base, attn_implementation=attention))
    with pytest.raises(UserError, match=f"^attn_implementation {attention}: the base cannot be built"):
        skeleton(config)


def test_a_config_with_a_storage_only_dtype(base):
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"dtype": "float8_e4m3fn"}))
    assert skeleton(check_base(model_args(base))).dtype == torch.float32


def test_positions_of_images_are_not_a_limit(tmp_path):
    text = {"vocab_size": 400, "head_dim": 16, "num_key_value_heads": 2} | ENCODER
    config = AutoConfig.for_model(
        "gemma3", text_config=text, vision_config=ENCODER | {"image_size": 32, "patch_size": 16}
    )
    assert InputLimits.of(skeleton(config)).positions is None


def test_a_folder_without_a_tokenizer(base):
    for file in base.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(UserError, match=r"base has no tokenizer; copy the tokenizer files of the model"):
        load_tokenizer(str(base))


def test_the_error_of_a_tokenizer_is_quoted_in_full(base):
    for file in base.glob("tokenizer*"):
        file.unlink()
    (base / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(UserError, match=r"cannot load the tokenizer \(.+\); check its tokenizer files") as error:
        load_tokenizer(str(base))
    assert "\n" not in str(error.value)


# Quantised checkpoints


@pytest.fixture(scope="module", params=[4, 8])
def quantized(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantized")
    tokenizer = chatml_tokenizer()
    tiny_llama(len(tokenizer)).save_pretrained(folder / "plain")
    config = BitsAndBytesConfig(
        load_in_4bit=request.param == 4, load_in_8bit=request.param == 8, bnb_4bit_quant_type="nf4"
    )
    model = AutoModelForCausalLM.from_pretrained(folder / "plain", quantization_config=config, device_map="cpu")
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    return folder / "base", request.param


def test_a_quantised_base_keeps_its_quantisation(quantized):
    folder, bits = quantized
    args = model_args(folder, use_peft=True)
    suited = suit_base(args, check_base(args))
    assert (suited.load_in_4bit, suited.load_in_8bit) == (bits == 4, bits == 8)
    model = load_model(suited)
    assert model.is_quantized
    assert type(model.model.layers[0].mlp.up_proj).__name__ == {4: "Linear4bit", 8: "Linear8bitLt"}[bits]
    if bits == 4:
        assert model.model.layers[0].mlp.up_proj.compute_dtype == torch.float32
    plain = load_model(suited, dequantize=True)
    assert type(plain.model.layers[0].mlp.up_proj) is torch.nn.Linear


def test_unsupported_uses_of_quantised_weights_are_refused(quantized):
    folder, bits = quantized
    with pytest.raises(UserError, match=rf"is quantised \(bitsandbytes {bits}-bit\), and .* set use_peft: true"):
        suit_base(model_args(folder), check_base(model_args(folder)))
    other = {"load_in_8bit": True} if bits == 4 else {"load_in_4bit": True}
    with pytest.raises(UserError, match=rf"is already quantised \(bitsandbytes {bits}-bit\); remove load_in_\dbit"):
        check_base(model_args(folder, use_peft=True, **other))
    check_base(model_args(folder, use_peft=True, **{f"load_in_{bits}bit": True}))


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "compressed-tensors"])
def test_other_quantisations_are_read_from_the_config(base, method):
    with_quantization(base, {"quant_method": method, "bits": 4})
    with pytest.raises(UserError, match=rf"is quantised \({method}\), .* cannot be fine-tuned in full"):
        suit_base(model_args(base), check_base(model_args(base), weights=False))
    with pytest.raises(UserError, match=rf"is already quantised \({method}\); remove load_in_4bit"):
        check_base(model_args(base, use_peft=True, load_in_4bit=True), weights=False)
    args = model_args(base, use_peft=True)
    assert suit_base(args, check_base(args, weights=False)).dtype == "bfloat16"


@pytest.mark.parametrize(
    ("method", "package"),
    [
        ("gptq", "optimum"),
        ("awq", "gptqmodel"),
        ("aqlm", "AQLM"),
        ("hqq", "HQQ"),
        ("compressed-tensors", "compressed-t"),
    ],
)
def test_a_missing_package_is_reported_before_the_weights_load(base, method, package):
    with_quantization(base, {"quant_method": method, "bits": 4, "group_size": 64})
    with pytest.raises(
        UserError, match=rf"^model_name_or_path .*: its quantisation needs a missing package \(.*{package}"
    ):
        check_base(model_args(base, use_peft=True))
    check_base(model_args(base, use_peft=True), weights=False)  # enough for an estimate


def test_a_quantisation_by_mlx_is_refused(base):
    with_quantization(base, {"bits": 4, "group_size": 64})
    with pytest.raises(
        UserError, match="without a quant_method, as MLX writes it; give the model that it was made from"
    ):
        check_base(model_args(base, use_peft=True))


def test_the_quantisation_of_a_config_is_not_overridden(base, monkeypatch):
    with_quantization(base, {"quant_method": "gptq", "bits": 4})
    monkeypatch.setattr("nli_sft.models.bases._check_packages", lambda *_: None)
    passed = {}
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda _, **given: passed.update(given) or 1 / 0)
    with pytest.raises(UserError):
        load_model(model_args(base, use_peft=True))
    assert "quantization_config" not in passed
    assert passed["config"].quantization_config["quant_method"] == "gptq"


def with_quantization(base, quantization):
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))


# Limits of a model's input


@pytest.mark.parametrize(
    ("kind", "positions"),
    [
        ("gpt2", 64),
        ("opt", 64),
        ("gpt_neo", 64),
        ("gptj", 64),
        ("codegen", 64),
        ("gpt_bigcode", 64),
        ("biogpt", 64),
        ("ctrl", 64),
        ("bert", 64),
        ("llama", None),
        ("mixtral", None),
    ],
)
def test_positions_are_counted_without_weights(tmp_path, kind, positions):
    make_base(tmp_path, kind, positions=64)
    limits = InputLimits.of(skeleton(check_base(model_args(tmp_path))))
    assert limits.positions == positions
    if positions is not None:  # one more fails
        model = load_model(model_args(tmp_path)).eval()
        ids = torch.zeros(1, positions + 1, dtype=torch.long)
        model(ids[:, :-1])
        with pytest.raises((IndexError, RuntimeError)):
            model(ids, position_ids=torch.arange(positions + 1)[None])


def test_positions_counted_from_a_padding_token_are_refused(tmp_path):
    make_base(tmp_path, "roberta", positions=64, is_decoder=True)
    with pytest.raises(UserError, match="as RoBERTa does"):
        InputLimits.of(skeleton(check_base(model_args(tmp_path))))


def test_lengths_and_tokens_beyond_a_model_are_refused(caplog, chatml):
    limits = InputLimits(tokens=300, positions=8)
    assert limits.fit_length(6) == 6
    with caplog.at_level(logging.WARNING):
        assert limits.fit_length(None) == limits.fit_length(1024) == 8
    assert "max_length is 8: the base has no more positions." in caplog.text
    assert InputLimits(300, None).fit_length(1024) == 1024
    limits.check([[1, 2], [299] * 7], chatml, fed_after=1)
    with pytest.raises(UserError, match="the longest pair has 9 tokens with its prompt, but the model has 8"):
        limits.check([[1] * 8], chatml, fed_after=1)
    with pytest.raises(UserError, match=r"as token 300, but the model's embedding has 300 rows"):
        limits.check([[1, 300]], chatml)


def test_a_padding_token_beyond_the_embedding_is_replaced(caplog):
    tokenizer = chatml_tokenizer()
    tokens = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    limits = InputLimits(tokens, None)
    with caplog.at_level(logging.WARNING):
        limits.fit_padding(tokenizer)
    assert tokenizer.pad_token == tokenizer.eos_token
    assert f"'[PAD]' (id {tokens}) is beyond the {tokens} rows of the embedding" in caplog.text
    with pytest.raises(UserError, match="is beyond the 1 rows"):
        InputLimits(1, None).fit_padding(tokenizer)


def test_a_config_with_a_padding_token_beyond_the_embedding_is_loaded(base):
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"pad_token_id": config["vocab_size"]}))
    assert load_model(model_args(base)).config.pad_token_id is None
    skeleton(check_base(model_args(base)))


@pytest.mark.parametrize("batching", ["trie", "padded"])
@pytest.mark.parametrize("kind", ["gpt2", "opt", "gpt_neo"])
def test_evaluation_and_predict_work_up_to_the_last_position(tmp_path, kind, batching, chatml):
    encoder = PromptEncoder(PROMPTS["plain"], chatml)
    pairs = few_pairs()
    answers = max(map(len, encoder.answers)) - 1
    longest = max(map(len, encoder.encode(pairs["premise"], pairs["hypothesis"]))) + answers
    fits, short = (make_base(tmp_path / str(n), kind, n, chatml) for n in (longest, longest - 1))
    options = {"name": "tuned", "batch_size": 5, "batch_args": BatchConfig(batching=batching)}
    tasks = [EvalTask("pairs", pairs, encoder)]
    model = load_model(model_args(fits)).eval()
    ((_, result),) = evaluate_model(model, tasks, **options)
    assert result["n"] == len(pairs)
    assert unconstrained_generation(model, encoder, pairs, batch_size=5)["n"] == len(pairs)
    run = make_run(tmp_path / "run", fits, use_peft=False, evaluated=False, batching=batching, tokenizer=chatml)
    predictions = NLIClassifier.from_pretrained(run, device="cpu")(pairs["premise"], pairs["hypothesis"])
    assert isinstance(predictions, list)
    assert len(predictions) == len(pairs)
    message = f"the longest pair has {longest} tokens with its prompt, but the model has {longest - 1} positions"
    with pytest.raises(UserError, match=message):
        evaluate_model(load_model(model_args(short)).eval(), tasks, **options)
    run = make_run(tmp_path / "short_run", short, use_peft=False, evaluated=False, batching=batching, tokenizer=chatml)
    with pytest.raises(UserError, match=message):
        NLIClassifier.from_pretrained(run, device="cpu")(pairs["premise"], pairs["hypothesis"])


# Experts


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_adapters_on_experts_have_no_dropout(tmp_path, caplog, kind):
    make_base(tmp_path, kind)
    config = check_base(model_args(tmp_path))
    with caplog.at_level(logging.WARNING):
        assert suit_base(model_args(tmp_path), config).lora_dropout == 0.05, "no adapter"
        attention = model_args(tmp_path, use_peft=True, lora_target_modules=["q_proj", "v_proj"])
        assert suit_base(attention, config).lora_dropout == 0.05
        assert caplog.text == ""
        everything = model_args(tmp_path, use_peft=True, lora_target_modules=["all-linear"])
        experts = model_args(tmp_path, use_peft=True, lora_target_parameters=["mlp.experts.gate_up_proj"])
        for args in (everything, experts):
            caplog.clear()
            suited = suit_base(args, config)
            assert (suited.lora_dropout == 0) == ("lora_dropout is 0, not 0.05" in caplog.text)
    assert suited.lora_dropout == 0


def test_a_valid_base_passes_all_checks(base):
    shutil.copytree(base, base.with_name("copy"))
    args = model_args(base.with_name("copy"))
    assert suit_base(args, check_base(args)) == args
    assert load_model(args).num_parameters() == tiny_llama(len(chatml_tokenizer())).num_parameters()
