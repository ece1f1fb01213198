import subprocess
import sys
from dataclasses import dataclass, fields

import pytest
import yaml
from trl import ModelConfig, SFTConfig

from nli_sft.configs import (
    BatchConfig,
    EvalConfig,
    MachineConfig,
    PromptConfig,
    RecipeError,
    TrackingConfig,
    TrainDataConfig,
    from_recipe,
    parse_recipe,
    resolve_recipe,
)

TYPES = (TrainDataConfig, PromptConfig, BatchConfig, ModelConfig, SFTConfig)


@pytest.fixture
def recipe(tmp_path):
    def write(text):
        path = tmp_path / "recipe.yaml"
        path.write_text("dataset_name: snli\n" + text)
        return path

    return write


def test_flags_override_the_file(recipe, tmp_path):
    path = recipe(
        f"learning_rate: 2e-4\noutput_dir: {tmp_path}\nuse_peft: true\nlora_r: 8\n"
        "lora_target_modules: [q_proj, v_proj]\n"
    )
    for arguments in ([f"--config={path}"], ["--config", str(path)]):
        _, _, _, model, training = parse_recipe(TYPES, [*arguments, "--lora_r", "4", "--eval_strategy=epoch"])
        assert training.learning_rate == 2e-4
        assert training.eval_strategy.value == "epoch"
        assert (model.lora_r, model.lora_target_modules) == (4, ["q_proj", "v_proj"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lora_rank: 8", r"recipe.yaml: unknown key 'lora_rank'; did you mean 'lora_r'\?"),
        ("learning-rat: 1", r"unknown key 'learning-rat'; did you mean 'learning-rate'\?"),
        ("lora_r: 8\nlora_r: 9", "key 'lora_r' is on lines 2 and 3; keep one"),
        ("lora_r: 8.5", "lora_r is '8.5'; it must be a whole number"),
        ("learning_rate: fast", "learning_rate is 'fast'; it must be a number"),
        ("learning_rate: [1, 2]", "learning_rate takes one value, not a list"),
        ("lora_r:", "lora_r is empty; give a value or remove the line"),
        ("dtype: bfloat17", "dtype: invalid choice: 'bfloat17'"),
        ("batching: tree", "batching: invalid choice: 'tree'"),
        ("max_batch_tokens: most", "max_batch_tokens is 'most'; it must be a number of tokens or auto"),
        ("max_batch_tokens: 8e3", "max_batch_tokens is '8e3'; it must be a number of tokens or auto"),
        ("max_batch_tokens: 0", "max_batch_tokens is '0'; it must be a number of tokens or auto"),
        ("max_batch_tokens: true", "max_batch_tokens is 'True'; it must be a number of tokens or auto"),
        ("eval_strategy: no", 'YAML reads an unquoted no as false; write eval_strategy: "no"'),
        ("use_peft: perhaps", "use_peft is 'perhaps'; it must be true or false"),
        (
            "load_best_model_at_end: true\neval_strategy: epoch\nsave_strategy: steps",
            "--load_best_model_at_end requires",
        ),
        (
            "model:\n  model_name_or_path: m",
            "model has nested keys, but a recipe is flat; write them, such as mod",
        ),
        ("lora: {}", "lora has nested keys, but a recipe is flat; write them without lora above"),
        ("output_dir: {a: b}", "output_dir takes one value, not nested keys"),
        ("lora_target_modules: {a: b}", "lora_target_modules takes a list, not nested keys"),
        ("train_mix:\n- scenes: 0.25", "train_mix takes a list of words, not of mappings or lists"),
        ("label_words: [[a], b, c]", "label_words takes a list of words, not of mappings or lists"),
        ("- a list", "not YAML"),
        ("lora_r: [", "not YAML"),
    ],
)
def test_an_error_names_the_key(recipe, text, message):
    with pytest.raises(RecipeError, match=message):
        parse_recipe(TYPES, ["--config", str(recipe(text))])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset_name", "x", "--lora_al", "4"], "unknown key 'lora_al'; did you mean 'lora_alpha'"),
        (["--dataset_name", "x", "--lora_r", "many"], "lora_r is 'many'; it must be a whole number"),
        (["--dataset_name"], "dataset_name has no value; write it as --key value"),
        ([], "dataset_name is missing; give it in the recipe or as --dataset_name"),
        (["--config"], "--config takes one recipe file; give it once"),
        (["--config=a.yaml", "--config=b.yaml"], "--config takes one recipe file; give it once"),
        (["--config=nowhere.yaml"], "nowhere.yaml: No such file"),
        (["--dataset_name", "x", "stray"], "stray has no flag; write every argument as --key value"),
        (
            ["recipes/demo/lora.yaml"],
            "recipes/demo/lora.yaml has no flag; give a recipe as --config recipes/demo/lora",
        ),
        (["--use_peft", "true", "lora.yml"], "lora.yml has no flag; give a recipe as --config lora.yml"),
        (
            ["learning_rate=1e-4"],
            "learning_rate=1e-4 is not a flag; flags begin with two dashes: --learning_rate=1e-4",
        ),
        (["-lora_r", "4"], "-lora_r is not a flag; flags begin with two dashes: --lora_r"),
    ],
)
def test_wrong_command_lines(arguments, message):
    with pytest.raises(RecipeError, match=message):
        parse_recipe(TYPES, arguments)


def test_a_user_error_has_no_traceback(recipe):
    code = "from nli_sft.configs import *\nrun_script(print, (TrainDataConfig, PromptConfig))"
    shown = subprocess.run(
        [sys.executable, "-c", code, "--config", str(recipe("promt: plain"))], capture_output=True, text=True
    )
    assert shown.returncode == 1
    assert shown.stderr.strip().splitlines()[-1].endswith("unknown key 'promt'; did you mean 'prompt'?")
    assert "Traceback" not in shown.stderr


def test_a_resolved_recipe_gives_the_same_configs(recipe, tmp_path):
    text = (
        f"prompt: few_shot\nlabel_words: [a, b, c]\nmodel_name_or_path: m\nuse_peft: true\n"
        f"lora_target_modules: all-linear\n"
        f"learning_rate: 3.0e-4\neval_strategy: epoch\nlr_scheduler_type: cosine\noutput_dir: {tmp_path}\n"
        f"hub_token: hf_secret\nmax_train_samples: 10\nreport_to: wandb\n"
    )
    configs = parse_recipe(TYPES, ["--config", str(recipe(text))])
    resolved = resolve_recipe(configs)
    assert "hf_secret" not in str(resolved)
    assert resolved["learning_rate"] == 3e-4
    assert "weight_decay" not in resolved, "only what differs from the defaults"
    again = parse_recipe(
        TYPES, ["--config", str(recipe(yaml.safe_dump({k: v for k, v in resolved.items() if k != "dataset_name"})))]
    )
    assert resolve_recipe(again) == resolved
    assert from_recipe(ModelConfig, resolved) == configs[3]


def test_a_resolved_recipe_works_with_any_transformers(recipe):
    """5.23 has two names for gradient checkpointing, 5.17 has one."""
    resolved = resolve_recipe(parse_recipe(TYPES, ["--config", str(recipe("gradient_checkpointing: false"))]))
    assert {key: value for key, value in resolved.items() if "checkpointing" in key} == {
        "gradient_checkpointing": False
    }


@pytest.mark.parametrize(("text", "value"), [("4096", 4096), ("auto", "auto"), ("8192", 8192)])
def test_max_batch_tokens_is_a_number_or_auto(recipe, text, value):
    configs = parse_recipe(TYPES, ["--config", str(recipe(f"max_batch_tokens: {text}"))])
    assert configs[2].max_batch_tokens == value
    assert parse_recipe(TYPES, ["--dataset_name", "x", f"--max_batch_tokens={text}"])[2] == configs[2]
    resolved = resolve_recipe(configs)
    assert resolved.get("max_batch_tokens", 8192) == value
    assert ("max_batch_tokens" in resolved) == (value != 8192), "only what differs from the defaults"
    assert from_recipe(BatchConfig, resolved) == configs[2]


def test_arguments_without_a_flag_go_to_the_positional_key():
    @dataclass
    class Compare:
        runs: list[str]
        html: str | None = None
        verbose: bool = False

    for arguments in (
        ["a", "b", "--html", "page.html"],
        ["--html", "page.html", "a", "b"],
        ["--html=page.html", "a", "b"],
        ["a", "--html", "page.html", "b"],
        ["--html", "page.html", "--runs", "a", "b"],
    ):
        (args,) = parse_recipe((Compare,), arguments, positional="runs")
        assert (args.runs, args.html) == (["a", "b"], "page.html"), arguments
    with pytest.raises(RecipeError, match="runs is missing"):
        parse_recipe((Compare,), ["--html", "page.html"], positional="runs")
    with pytest.raises(RecipeError, match="outputs/x has no flag; give a run folder as --run outputs/x"):
        parse_recipe((EvalConfig,), ["outputs/x"])


def test_an_evaluation_needs_a_run():
    with pytest.raises(RecipeError, match="run is missing; give the run folder as --run"):
        parse_recipe((EvalConfig,), [])
    (args,) = parse_recipe((EvalConfig,), ["--run", "outputs/x"])
    assert args.dataset_name is None


def test_every_key_has_a_help_text():
    for config in (TrainDataConfig, PromptConfig, BatchConfig, MachineConfig, TrackingConfig, EvalConfig):
        assert all(f.metadata.get("help") for f in fields(config)), config


def test_help_lists_each_key_once_without_refused_ones(capsys):
    with pytest.raises(SystemExit):
        parse_recipe(TYPES, ["--help"])
    shown = capsys.readouterr().out
    assert shown.index("Training data:") < shown.index("Model and adapter") < shown.index("--learning_rate VALUE")
    assert "--use_peft [true|false]" in shown
    for hidden in ("--use-peft", "--packing", "--no_", "(default: None)"):
        assert hidden not in shown


def test_words_of_a_list_are_not_converted(recipe):
    """YAML converts these words to other types. The first three are in the README."""
    for words in ("yes, maybe, no", "on, ~, off", "null, 1, 1.0", "2024-01-01, 0x1F, 010"):
        data, prompt, *_ = parse_recipe(
            (TrainDataConfig, PromptConfig),
            [
                "--config",
                str(recipe(f"label_words: [{words}]\nlabel_spellings:\n  - {words.replace(', ', chr(10) + '  - ')}")),
            ],
        )
        assert prompt.label_words == data.label_spellings == words.split(", ")


def test_a_commit_of_digits_is_not_converted(recipe):
    configs = parse_recipe(
        TYPES, ["--config", str(recipe("model_revision: 0123456\nuse_peft: true\nlora_target_modules: off"))]
    )
    assert (configs[3].model_revision, configs[3].lora_target_modules) == ("0123456", "off")


def test_a_recipe_in_another_encoding(recipe, tmp_path):
    path = recipe("prompt: é")
    path.write_text("prompt: é", encoding="latin-1")
    with pytest.raises(RecipeError, match="recipe.yaml: not UTF-8 text; save it as UTF-8"):
        parse_recipe(TYPES, ["--config", str(path)])
    path.write_text("? [a]\n: b")
    with pytest.raises(RecipeError, match="recipe.yaml: line 1: .* cannot be a key"):
        parse_recipe(TYPES, ["--config", str(path)])
