import json
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import CHATML, byte_level_tokenizer, chatml_tokenizer, tiny_llama
from tiny_run import make_base, make_run
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, CohereConfig, LlamaConfig
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from trl import ModelConfig, SFTConfig

from nli_sft import UserError
from nli_sft.data.prompts import PROMPTS, PromptEncoder
from nli_sft.models.bases import check_base
from nli_sft.models.loading import (
    adapter_config,
    apply_template,
    check_adapter,
    count_parameters,
    find_model,
    load_encoder,
    load_model,
    load_tokenizer,
    load_tuned,
)

PHI_LORA = LoraConfig(r=64, target_modules=["q_proj", "k_proj", "v_proj", "dense"], task_type="CAUSAL_LM")


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


def test_parameter_counts_of_quantised_phi_2():
    """PEFT reports 41,943,040 trainable of 1,563,335,680 (2.68 %): the stored elements, not the parameters."""
    plain = count_parameters(phi_2_on_meta(quantised=False))
    assert plain.total == plain.stored == 2_779_683_840
    model = phi_2_on_meta(quantised=True)
    with torch.device("meta"):
        tuned = count_parameters(get_peft_model(model, PHI_LORA, low_cpu_mem_usage=True))
    assert tuned.trainable == 41_943_040
    assert tuned.total == 2_821_626_880
    assert tuned.stored == 1_563_335_680
    assert str(tuned) == ("41,943,040 trainable of 2,821,626,880 parameters (1.49%), stored as 1,563,335,680 elements")


def test_counts_of_a_quantised_model_with_weights(tmp_path):
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


def test_loading_errors_are_one_line():
    with pytest.raises(
        ValueError,
        match=r"^model_name_or_path ./nowhere: cannot load the tokenizer \(.+\); check its tokenizer files",
    ):
        load_tokenizer("./nowhere")
    with pytest.raises(ValueError, match=r"^model_name_or_path ./nowhere does not exist; give a Hub id or a folder$"):
        load_model(ModelConfig(model_name_or_path="./nowhere"))


def test_pickled_weights_are_not_loaded(tmp_path):
    """A pickle can run code when it is loaded. PEFT and transformers would fall back on one."""
    base = tiny_llama(300)
    base.save_pretrained(tmp_path / "base")
    args = ModelConfig(model_name_or_path=str(tmp_path / "base"))
    get_peft_model(base, LoraConfig(r=2, target_modules="all-linear")).save_pretrained(tmp_path / "adapter")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    torch.save(load_file(weights), weights.with_name("adapter_model.bin"))
    weights.unlink()
    with pytest.raises(UserError, match="has no adapter_model.safetensors; other formats can run code"):
        load_tuned(tmp_path / "adapter", args)
    for folder in ("base", "full"):
        tiny_llama(300).save_pretrained(tmp_path / folder)
        torch.save(tiny_llama(300).state_dict(), tmp_path / folder / "pytorch_model.bin")
        (tmp_path / folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="base has pickled weights"):
        load_model(args)
    with pytest.raises(UserError, match="full has pickled weights"):
        load_tuned(tmp_path / "full", args)


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
open({marker!r}, "w").close()
class Config(LlamaConfig):
    model_type = "own"
class Model(LlamaForCausalLM):
    config_class = Config
"""


def test_code_of_a_model_runs_only_with_trust_remote_code(tmp_path):
    folder, marker = tmp_path / "own", tmp_path / "ran"
    tiny_llama(300).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(CODE.format(marker=str(marker)))
    args = ModelConfig(model_name_or_path=str(folder))
    for load in (lambda: load_model(args), lambda: load_tuned(folder, args)):
        with pytest.raises(UserError, match="own: cannot load its config"):
            load()
    assert not marker.exists()
    assert load_tuned(folder, args, trust_remote_code=True).config.model_type == "own"
    assert marker.exists()


def test_a_run_folder_gives_its_adapter_or_its_full_model(tmp_path):
    base = tiny_llama(300)
    base.save_pretrained(tmp_path / "base")
    args = ModelConfig(model_name_or_path=str(tmp_path / "base"))
    ids = torch.arange(5)[None]
    expected = base(ids).logits

    tiny_llama(300, seed=7).save_pretrained(tmp_path / "full")
    assert not torch.equal(load_tuned(tmp_path / "full", args)(ids).logits, expected)

    tuned = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    tuned.save_pretrained(tmp_path / "adapter")
    loaded: Any = load_tuned(tmp_path / "adapter", args)
    assert not torch.allclose(loaded(ids).logits, expected)
    with loaded.disable_adapter():
        torch.testing.assert_close(loaded(ids).logits, expected)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    for name, tied in (("untied", False), ("tied", True)):
        LlamaConfig(
            vocab_size=64,
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            tie_word_embeddings=tied,
        ).save_pretrained(folder / name)
    return folder


def adapted(base, **options):
    return ModelConfig(model_name_or_path=str(base), use_peft=True, **options)


@pytest.mark.parametrize(
    ("base", "options", "message"),
    [
        (
            "untied",
            {"lora_target_modules": ["query"]},
            "the model has no 'query'; it has down_proj, ",
        ),
        ("untied", {"lora_target_modules": ["q_prj"]}, r"no 'q_prj'; did you mean q_proj\?"),
        ("untied", {"lora_target_modules": ["q_proj", "w_proj"]}, r"'w_proj'; did you mean \w_proj\?"),
        ("untied", {"lora_target_modules": ["mlp.up_prj"]}, r"'mlp.up_prj'; did you mean up_proj\?"),
        (
            "untied",
            {"lora_target_modules": "(q|v)_proj"},
            r"the pattern \(q\|v\)_proj matches no module's full name",
        ),
        (
            "untied",
            {"lora_target_modules": ["norm"]},
            "lora_target_modules: Target module LlamaRMSNorm.* not supported",
        ),
        ("untied", {"lora_target_modules": ["q_proj", "lm_head"]}, "lm_head cannot have an adapter, because TRL comp"),
        ("untied", {"lora_target_modules": ".*head"}, "lm_head cannot have an adapter, because TRL computes"),
        ("untied", {"lora_modules_to_save": ["lm_haed"]}, r"modules_to_save: .*'lm_haed'; did you mean lm_head\?"),
        ("untied", {"lora_target_parameters": ["up.weigth"]}, r"target_parameters: .*; did you mean weight\?"),
        (
            "tied",
            {"lora_modules_to_save": ["lm_head"]},
            r"lm_head shares its weights with the embedding \(tie_word_emb",
        ),
    ],
)
def test_an_adapter_that_does_not_fit_the_base_is_refused(bases, base, options, message):
    with pytest.raises(UserError, match=message):
        check_adapter(adapted(bases / base, **options))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lora_target_modules": ["all-linear"]},
        {"lora_target_modules": ["q_proj", "mlp.up_proj"]},
        {"lora_target_modules": r".*\.(q|v)_proj"},
        {"lora_modules_to_save": ["lm_head", "embed_tokens"]},
    ],
)
def test_an_adapter_that_fits_passes_without_weights(bases, options):
    check_adapter(adapted(bases / "untied", **options))


def test_a_single_module_is_a_name_and_not_a_pattern(bases):
    args = adapted(bases / "untied", lora_target_modules=["q_proj"])
    assert args.lora_target_modules == "q_proj", "TRL turns a list of one into a string"
    check_adapter(args)
    base = AutoModelForCausalLM.from_config(LlamaConfig.from_pretrained(bases / "untied"))
    peft_config = adapter_config(args)
    assert peft_config is not None
    model = get_peft_model(base, peft_config)
    assert any("q_proj.lora_A" in name for name, _ in model.named_parameters())


def test_a_base_without_default_targets_in_peft(bases):
    (bases / "unknown").mkdir()
    CohereConfig(vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=4).save_pretrained(
        bases / "unknown"
    )
    with pytest.raises(UserError, match="lora_target_modules: .*target_modules"):
        check_adapter(adapted(bases / "unknown"))
    check_adapter(adapted(bases / "unknown", lora_target_modules="all-linear"))


def test_a_recipe_without_a_model_is_refused():
    with pytest.raises(UserError, match="model_name_or_path is missing; give it in the recipe or as --model_name"):
        load_model(ModelConfig())


def test_a_template_is_applied_before_prompts_are_encoded(tmp_path):
    """TRL applies it only after prompts are encoded, so that training and evaluation would use different prompts."""
    file = tmp_path / "other.jinja"
    file.write_text("Hello, {{ strftime_now('%Y') }}.\n" + CHATML)
    tokenizer = chatml_tokenizer()
    apply_template(tokenizer, SFTConfig(chat_template_path=str(file), bf16=False))
    assert PromptEncoder(PROMPTS["plain"], tokenizer).template.startswith("Hello, 2024.\n<|im_start|>user")

    other = chatml_tokenizer()
    other.chat_template, other.eos_token = "Hi.\n" + CHATML, "<|endoftext|>"
    other.save_pretrained(tmp_path / "other")
    tokenizer = chatml_tokenizer()
    apply_template(tokenizer, SFTConfig(chat_template_path=str(tmp_path / "other"), bf16=False))
    assert (tokenizer.chat_template, tokenizer.eos_token) == (other.chat_template, "<|endoftext|>")
    apply_template(tokenizer, SFTConfig(eos_token="<|im_end|>", bf16=False))
    assert tokenizer.eos_token == "<|im_end|>"


def test_a_template_that_cannot_be_applied(tmp_path):
    def refused(**args):
        with pytest.raises(UserError) as error:
            apply_template(chatml_tokenizer(), SFTConfig(bf16=False, **args))
        return str(error.value)

    assert refused(chat_template_path="none.jinja") == "chat_template_path none.jinja: No such file or directory"
    (tmp_path / "latin.jinja").write_text("é", encoding="latin-1")
    assert "latin.jinja: not UTF-8 text" in refused(chat_template_path=str(tmp_path / "latin.jinja"))
    assert "chat_template_path ./nowhere: cannot load" in refused(chat_template_path="./nowhere")
    assert refused(eos_token="<none>").startswith("eos_token '<none>' is not a token of this model")
    other = chatml_tokenizer()
    other.chat_template = None
    other.save_pretrained(tmp_path)
    assert "its tokenizer has no chat template; give one that has" in refused(chat_template_path=str(tmp_path))
    other.add_tokens(["<|turn|>"])
    other.chat_template = CHATML.replace("<|im_end|>", "<|turn|>")
    other.save_pretrained(tmp_path)
    assert "its template uses <|turn|>, which the base does not have" in refused(chat_template_path=str(tmp_path))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    base = make_base(folder / "base")
    return {
        "base": base,
        "adapter": make_run(folder / "adapter", base, evaluated=False),
        "full": make_run(folder / "full", base, use_peft=False, evaluated=False),
    }


def half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def random_bytes(path):
    path.write_bytes(b"\xd3\x91" * 500)


def a_list(path):
    path.write_text("[]")


def an_empty_object(path):
    path.write_text("{}")


def one_tensor_fewer(path):
    tensors = load_file(path)
    del tensors[max(tensors)]
    save_file(tensors, path, {"format": "pt"})


def another_shape(path):
    save_file({name: torch.zeros(3, 5) for name in load_file(path)}, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("run", "name", "harms"),
    [
        ("adapter", "adapter_model.safetensors", [half, random_bytes, Path.unlink, one_tensor_fewer, another_shape]),
        ("adapter", "adapter_config.json", [half, random_bytes, a_list, an_empty_object, Path.unlink]),
        ("adapter", "tokenizer.json", [half, random_bytes, a_list, an_empty_object]),
        ("adapter", "tokenizer_config.json", [half, random_bytes, a_list, an_empty_object, Path.unlink]),
        ("full", "model.safetensors", [half, random_bytes, Path.unlink]),
        ("full", "config.json", [half, random_bytes, a_list, an_empty_object, Path.unlink]),
        ("full", "generation_config.json", [half, random_bytes, a_list]),
        ("full", "tokenizer.json", [half, random_bytes, a_list, an_empty_object]),
        ("base", "tokenizer.json", [half, random_bytes, a_list]),
        ("base", "config.json", [half, random_bytes, a_list, an_empty_object, Path.unlink]),
        ("base", "generation_config.json", [half, random_bytes, a_list]),
    ],
)
def test_a_damaged_file_of_a_model_is_named(runs, tmp_path, run, name, harms):
    def load(folder):
        if run == "base":
            check_base(ModelConfig(str(folder)))
        else:
            load_encoder(folder)
            load_tuned(folder, ModelConfig(str(runs["base"]), dtype="float32"), device=torch.device("cpu"))

    for harm in harms:
        folder = shutil.copytree(runs[run], tmp_path / harm.__name__)
        harm(folder / name)
        with pytest.raises(UserError, match=re.escape(name)):
            load(folder)


def test_loading_a_tuned_model_shows_no_warning(tmp_path):
    run = make_run(tmp_path / "run", make_base(tmp_path / "base"), evaluated=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_tuned(run, ModelConfig(model_name_or_path=str(tmp_path / "base")), device=torch.device("cpu"))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """A base; an adapter made by PEFT alone; one without its base; a prompt-learning one; a classifier; a run."""
    folder = tmp_path_factory.mktemp("found")
    base = make_base(folder / "base")
    lora = {"r": 4, "target_modules": ["q_proj"]}
    for name, base_name, config in (
        ("adapter", str(base), LoraConfig(**lora, task_type="CAUSAL_LM")),
        ("prompt-learning", str(base), PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")),
        ("of-a-class", str(base), LoraConfig(**lora, task_type="SEQ_CLS")),
        ("without-base", None, LoraConfig(**lora)),
        ("moved", "/no/such/base", LoraConfig(**lora)),
    ):
        get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**lora)).save_pretrained(folder / name)
        config.base_model_name_or_path = base_name
        config.save_pretrained(folder / name)
    make_run(folder / "run", base, evaluated=False, train_on_end=True)
    return folder


def test_an_adapter_finds_its_base_its_tokenizer_and_its_prompt(found, tmp_path):
    source = find_model(found / "adapter", label_words=["yes", "maybe", "no"])
    assert source.model_args.model_name_or_path == str(found / "base")
    encoder = source.load_encoder()
    assert encoder.prompt.name == "plain"
    assert encoder.tokenizer.name_or_path == str(found / "base")
    shutil.copytree(found / "adapter", tmp_path / "adapter")
    for file in found.glob("run/*token*"):
        shutil.copy(file, tmp_path / "adapter")
    few_shot = PROMPTS["few_shot"]
    words = {"name": "mine", "user": few_shot.user, "label_words": ["yes", "maybe", "no"]}
    (tmp_path / "adapter" / "prompt.json").write_text(json.dumps(words))
    source = find_model(tmp_path / "adapter")
    assert source.prompt.name == "mine"
    assert source.load_encoder().tokenizer.name_or_path == str(tmp_path / "adapter")
    assert find_model(tmp_path / "adapter", prompt="definitions").prompt.name == "definitions"


def test_a_run_on_a_base_that_moved(found, tmp_path, caplog):
    shutil.copytree(found / "base", tmp_path / "elsewhere")
    source = find_model(tmp_path / "elsewhere", adapter=found / "run")
    assert source.model_args.model_name_or_path == str(tmp_path / "elsewhere")
    assert source.load_encoder().train_on_end, "a run keeps the prompt it was trained with"
    find_model(tmp_path / "elsewhere", adapter=found / "moved", prompt="plain")
    assert "was trained on /no/such/base, but is put on" in caplog.text


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("base", {"adapter": "base"}, "has no adapter_config.json, so it is not an adapter"),
        ("adapter", {"adapter": "adapter"}, "is an adapter itself; leave out adapter"),
        ("run", {"adapter": "adapter"}, "is a run itself; leave out adapter"),
        (
            "base",
            {"adapter": "run", "prompt": "plain"},
            "is a run and keeps the prompt it was trained with; leave out prompt",
        ),
        ("prompt-learning", {}, "is a prompt-learning adapter, which is not supported"),
        ("of-a-class", {}, "is an adapter for SEQ_CLS; give one for a causal language model"),
        ("without-base", {}, "adapter_config.json names no base; give the base as the model"),
        ("moved", {}, "its base /no/such/base does not exist here; give the base as the model"),
        ("base", {"prompt": "nowhere"}, "prompt: 'nowhere' is neither built in"),
    ],
)
def test_models_that_cannot_be_asked(found, name, options, message):
    options = {key: found / value if key == "adapter" else value for key, value in options.items()}
    with pytest.raises(UserError, match=re.escape(message)):
        find_model(found / name, **options)


def test_an_adapter_without_weights_in_safetensors(found, tmp_path):
    shutil.copytree(found / "adapter", tmp_path / "adapter", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save({}, tmp_path / "adapter" / "adapter_model.bin")
    with pytest.raises(UserError, match=r"it has no adapter_model\.safetensors; other formats can run code"):
        find_model(tmp_path / "adapter", prompt="plain").load_encoder()
