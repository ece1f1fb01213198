import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny import byte_level_tokenizer, tiny_llama
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from trl import ModelConfig

from nli_sft import UserError
from nli_sft.models import count_parameters, load_model, load_run, load_tokenizer

STUDY_LORA = LoraConfig(r=64, target_modules=["q_proj", "k_proj", "v_proj", "dense"], task_type="CAUSAL_LM")


def phi_2_on_meta(quantised):
    config = AutoConfig.for_model(
        "phi",
        vocab_size=51200,
        hidden_size=2560,
        intermediate_size=10240,
        num_hidden_layers=32,
        num_attention_heads=32,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        if quantised:
            nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
            model = replace_with_bnb_linear(model, modules_to_not_convert=["lm_head"], quantization_config=nf4)
    return model


def test_the_counts_of_the_study_that_we_replace():
    """It reported 41,943,040 trainable of 1,563,335,680 (2.68 %): the stored elements, not the parameters."""
    plain = count_parameters(phi_2_on_meta(quantised=False))
    assert plain.total == plain.stored == 2_779_683_840
    model = phi_2_on_meta(quantised=True)
    with torch.device("meta"):
        tuned = count_parameters(get_peft_model(model, STUDY_LORA, low_cpu_mem_usage=True))
    assert tuned.trainable == 41_943_040
    assert tuned.total == 2_821_626_880
    assert tuned.stored == 1_563_335_680
    assert str(tuned) == ("41,943,040 trainable of 2,821,626,880 parameters (1.49%), stored as 1,563,335,680 elements")


def test_counts_of_a_really_quantised_model(tmp_path):
    model = tiny_llama(300)
    model.save_pretrained(tmp_path)
    full = count_parameters(model)
    assert full.total == full.trainable == full.stored == sum(p.numel() for p in model.parameters())
    args = ModelConfig(model_name_or_path=str(tmp_path), dtype="float32", load_in_4bit=True, use_peft=True)
    quantised = load_model(args)
    counts = count_parameters(quantised)
    assert counts.total == full.total
    assert counts.stored == sum(p.numel() for p in quantised.parameters())
    in_four_bits = sum(
        m.in_features * m.out_features for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"
    )
    assert counts.stored == full.total - in_four_bits // 2


def test_tied_weights_count_once():
    layer, other = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    other.weight = layer.weight
    assert count_parameters(nn.ModuleList([layer, other])).total == 16


def test_a_tokenizer_without_padding_pads_with_its_end_token(tmp_path):
    tokenizer = byte_level_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).pad_token == tokenizer.eos_token


def test_what_cannot_be_loaded_is_said_in_one_line():
    with pytest.raises(ValueError, match=r"^model_name_or_path ./nowhere: cannot load the tokenizer \(.+\)$"):
        load_tokenizer("./nowhere")
    with pytest.raises(ValueError, match=r"^model_name_or_path ./nowhere: cannot load the model \(.+\)$"):
        load_model(ModelConfig(model_name_or_path="./nowhere"))


def test_pickled_weights_are_not_read(tmp_path):
    """A pickle runs code when it is loaded; PEFT would fall back on one, and so would transformers."""
    base = tiny_llama(300)
    base.save_pretrained(tmp_path / "base")
    args = ModelConfig(model_name_or_path=str(tmp_path / "base"))
    get_peft_model(base, LoraConfig(r=2, target_modules="all-linear")).save_pretrained(tmp_path / "adapter")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    torch.save(load_file(weights), weights.with_name("adapter_model.bin"))
    weights.unlink()
    with pytest.raises(UserError, match="has no adapter_model.safetensors; other formats can run code"):
        load_run(tmp_path / "adapter", args)
    for folder in ("base", "full"):
        tiny_llama(300).save_pretrained(tmp_path / folder)
        torch.save(tiny_llama(300).state_dict(), tmp_path / folder / "pytorch_model.bin")
        (tmp_path / folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="base: cannot load the model"):
        load_model(args)
    with pytest.raises(UserError, match="full: cannot load the model"):
        load_run(tmp_path / "full", args)


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
open({marker!r}, "w").close()
class Config(LlamaConfig):
    model_type = "own"
class Model(LlamaForCausalLM):
    config_class = Config
"""


def test_code_of_a_model_runs_only_if_it_is_said(tmp_path):
    folder, marker = tmp_path / "own", tmp_path / "ran"
    tiny_llama(300).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(CODE.format(marker=str(marker)))
    args = ModelConfig(model_name_or_path=str(folder))
    for load in (lambda: load_model(args), lambda: load_run(folder, args)):
        with pytest.raises(UserError, match="own: cannot load the model"):
            load()
    assert not marker.exists()
    assert load_run(folder, args, trust_remote_code=True).config.model_type == "own"
    assert marker.exists()


def test_a_run_folder_gives_its_adapter_or_its_full_model(tmp_path):
    base = tiny_llama(300)
    base.save_pretrained(tmp_path / "base")
    args = ModelConfig(model_name_or_path=str(tmp_path / "base"))
    ids = torch.arange(5)[None]
    expected = base(ids).logits

    tiny_llama(300, seed=7).save_pretrained(tmp_path / "full")
    assert not torch.equal(load_run(tmp_path / "full", args)(ids).logits, expected)

    tuned = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    tuned.save_pretrained(tmp_path / "adapter")
    loaded = load_run(tmp_path / "adapter", args)
    assert not torch.allclose(loaded(ids).logits, expected)
    with loaded.disable_adapter():
        torch.testing.assert_close(loaded(ids).logits, expected)
