import re
from dataclasses import fields

import pytest
import yaml
from trl import ModelConfig, SFTConfig

from nli_sft import UserError
from nli_sft.configs import (
    BatchConfig,
    EvalConfig,
    MachineConfig,
    PromptConfig,
    TrackingConfig,
    TrainDataConfig,
    parse_recipe,
    resolve_recipe,
)
from nli_sft.configs.keys import RANGE_OF, REFUSED
from nli_sft.hub.export import ExportConfig
from nli_sft.hub.push import PushConfig

OURS = (TrainDataConfig, PromptConfig, BatchConfig, MachineConfig, TrackingConfig)
TYPES = (*OURS, SFTConfig, ModelConfig)

# The supported keys of TRL. Some exist in newer or older versions only.
SUPPORTED = """
output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type lr_scheduler_kwargs
warmup_steps optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon optim_target_modules
gradient_accumulation_steps average_tokens_across_devices max_grad_norm label_smoothing_factor bf16 fp16 tf32
activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs
torch_compile torch_compile_backend torch_compile_mode neftune_noise_alpha torch_empty_cache_steps logging_strategy
logging_steps logging_first_step log_on_each_node log_level log_level_replica disable_tqdm report_to run_name
project trackio_space_id trackio_bucket_id trackio_static_space_id
eval_strategy eval_steps eval_delay per_device_eval_batch_size eval_on_start save_only_model
save_strategy save_steps save_on_each_node save_total_limit hub_token load_best_model_at_end metric_for_best_model
greater_is_better ignore_data_skip full_determinism seed data_seed use_cpu dataloader_drop_last dataloader_num_workers
dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor train_sampling_strategy
ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout debug
skip_memory_metrics do_eval resume_from_checkpoint local_rank trust_remote_code router_aux_loss_coef
chat_template_path eos_token max_length pad_to_multiple_of loss_type
model_name_or_path model_revision dtype attn_implementation use_peft lora_r lora_alpha lora_dropout
lora_target_modules lora_target_parameters lora_modules_to_save use_rslora use_dora load_in_8bit load_in_4bit
bnb_4bit_quant_type use_bnb_nested_quant bnb_4bit_quant_storage
""".split()  # noqa: SIM905


def parse(*arguments, types=TYPES):
    return parse_recipe(types, ["--dataset_name", "x", *map(str, arguments)])


def test_every_key_of_the_installed_trl_is_supported_or_refused():
    installed = {f.name for config in (SFTConfig, ModelConfig) for f in fields(config)}
    unknown = installed - set(SUPPORTED) - set(REFUSED)
    assert not unknown, "look up in TRL what these do, then add each to SUPPORTED or, with a reason, to keys.REFUSED"
    assert not set(SUPPORTED) & set(REFUSED)


def test_every_number_has_a_range():
    numbers = {
        f.name
        for config in (*TYPES, EvalConfig, ExportConfig)
        for f in fields(config)
        if re.search(r"\b(int|float)\b", str(f.type))
    }
    # local_rank belongs to the launcher; pad_to_multiple_of and max_batch_tokens also take a word.
    assert numbers - set(RANGE_OF) - set(REFUSED) <= {"local_rank", "pad_to_multiple_of", "max_batch_tokens"}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("packing", "true"),
        ("packing_strategy", "wrapped"),
        ("padding_free", "true"),
        ("eval_packing", "false"),
        ("assistant_only_loss", "true"),
        ("completion_only_loss", "false"),
        ("dataset_text_field", "sentence"),
        ("dataset_kwargs", '{"skip_prepare_dataset": false}'),
        ("dataset_num_proc", "4"),
        ("activation_offloading", "true"),
        ("pad_token", "<pad>"),
        ("shuffle_dataset", "true"),
        ("use_liger_kernel", "true"),
        ("include_num_input_tokens_seen", "true"),
        ("include_for_metrics", "inputs"),
        ("eval_accumulation_steps", "2"),
        ("auto_find_batch_size", "true"),
        ("do_predict", "true"),
        ("remove_unused_columns", "false"),
        ("label_names", "label"),
        ("batch_eval_metrics", "true"),
        ("eval_do_concat_batches", "false"),
        ("accelerator_config", '{"split_batches": true}'),
        ("deepspeed", "zero2.json"),
        ("truncation_mode", "keep_end"),
        ("model_init_kwargs", '{"dtype": "float16"}'),
        ("lora_task_type", "SEQ_CLS"),
        ("hub_model_id", "me/snli"),
    ],
)
def test_refused_keys(key, value):
    with pytest.raises(UserError) as error:
        parse(f"--{key}={value}")
    assert str(error.value) == f"remove {key}: {REFUSED[key]}"


def test_pushing_has_its_own_keys():
    (args,) = parse_recipe((PushConfig,), ["--run", "outputs/x", "--hub_model_id", "me/x", "--hub_private_repo=true"])
    assert (args.hub_model_id, args.hub_private_repo) == ("me/x", True)


def test_refused_keys_may_hold_their_defaults(tmp_path):
    parse("--packing=false", "--completion_only_loss=true", "--hub_strategy=every_save", "--pad_to_multiple_of=auto")
    path = tmp_path / "recipe.yaml"
    path.write_text("packing: true\n")
    with pytest.raises(UserError, match=r"recipe\.yaml: remove packing: "):
        parse("--config", path)


def test_class_weights_do_not_go_with_label_smoothing():
    smoothed = "--batching=padded", "--label_smoothing_factor=0.1"
    with pytest.raises(UserError, match="label_smoothing_factor would have no effect with class_weights; remove one"):
        parse(*smoothed, "--class_weights", "balanced")
    parse(*smoothed)


@pytest.mark.parametrize(("key", "value"), [("pad_to_multiple_of", 8), ("label_smoothing_factor", 0.1)])
def test_keys_for_padded_batches_only(key, value):
    with pytest.raises(UserError, match=rf"{key}: .*; set batching: padded, or remove {key}"):
        parse(f"--{key}={value}")
    parse(f"--{key}={value}", "--batching=padded")


WRONG_NUMBERS = {
    "max_train_samples": (0, -3),
    "max_eval_samples": (0, -1),
    "max_length": (0,),
    "max_row_tokens": (0, -8),
    "per_device_train_batch_size": (0, -1),
    "per_device_eval_batch_size": (0,),
    "gradient_accumulation_steps": (0, -2),
    "save_total_limit": (0,),
    "num_train_epochs": (0, -1, "nan", "inf"),
    "max_steps": (0, -2),
    "learning_rate": (0, -1e-4, "nan", "inf"),
    "weight_decay": (-0.1, "nan"),
    "warmup_steps": (-1, 1.5, "inf"),
    "max_grad_norm": (-1, "inf"),
    "validation_fraction": (0, 1, 1.5, -0.1, "nan"),
    "label_smoothing_factor": (1, -0.1),
    "adam_beta1": (1, -0.1),
    "adam_beta2": (1,),
    "adam_epsilon": (0,),
    "neftune_noise_alpha": (0, -5),
    "logging_steps": (0, -1, 1.5),
    "save_steps": (0, -1, "nan"),
    "dataloader_num_workers": (-1,),
    "router_aux_loss_coef": (-1,),
    "seed": (-1, 2**32),
    "data_seed": (-1,),
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in WRONG_NUMBERS.items() for value in values])
def test_numbers_out_of_range(key, value):
    batching = ["--batching=padded"] if key == "label_smoothing_factor" else []
    with pytest.raises(UserError, match=rf"^{key} is .*; it must be "):
        parse(f"--{key}={value}", *batching)


def test_quantized_storage_type():
    with pytest.raises(UserError, match="bnb_4bit_quant_storage is bf16; it must be one of uint8, bfloat16"):
        parse("--use_peft", "--load_in_4bit", "--bnb_4bit_quant_storage=bf16")


@pytest.mark.parametrize(("key", "value"), [("lora_r", 0), ("lora_alpha", -1), ("lora_dropout", 1), ("lora_r", -8)])
def test_numbers_of_an_adapter(key, value):
    with pytest.raises(UserError, match=rf"^{key} is {value}.*; it must be "):
        parse("--use_peft", f"--{key}={value}")


@pytest.mark.parametrize(
    ("key", "value"),
    [("max_samples", -5), ("calibration_pairs", -1), ("unconstrained_samples", -1), ("per_device_eval_batch_size", 0)],
)
def test_numbers_of_an_evaluation(key, value):
    with pytest.raises(UserError, match=rf"^{key} is {value}; it must be "):
        parse_recipe((EvalConfig,), ["--run", "outputs/x", f"--{key}={value}"])


@pytest.mark.parametrize(("key", "value"), [("pairs", 0), ("max_difference", "nan"), ("max_flips", 2)])
def test_numbers_of_an_export(key, value):
    with pytest.raises(UserError, match=rf"^{key} is .*; it must be "):
        parse_recipe((ExportConfig,), ["--run", "outputs/x", f"--{key}={value}"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lora_r=8"], "lora_r has no effect with use_peft: false; set use_peft: true, or remove lora_r"),
        (["--use_bnb_nested_quant"], "use_bnb_nested_quant has no effect with load_in_4bit: false; set"),
        (["--eval_steps=5", "--eval_strategy=epoch"], "eval_steps has no effect with eval_strategy: epoch; set"),
        (["--save_steps=5", "--save_strategy=epoch"], "save_steps has no effect with save_strategy: epoch; set"),
        (["--load_best_model_at_end"], "load_best_model_at_end has no effect with eval_strategy: no; set"),
        (["--do_eval"], "do_eval has no effect with eval_strategy: no; set eval_strategy: steps or epoch"),
        (
            ["--dataloader_prefetch_factor=2"],
            "dataloader_prefetch_factor has no effect with dataloader_num_workers: 0",
        ),
        (["--max_row_tokens=128", "--batching=padded"], "max_row_tokens has no effect with batching: padded; set"),
        (
            ["--group_by_premise", "--train_sampling_strategy=group_by_length"],
            "group_by_premise has no effect with train_sampling_strategy: group_by_length; set",
        ),
        (
            ["--max_steps=5", "--num_train_epochs=2"],
            "num_train_epochs has no effect with max_steps: 5; set max_steps: -1",
        ),
        (
            ["--lr_scheduler_type=constant", "--warmup_steps=5"],
            "warmup_steps has no effect with lr_scheduler_type: constant; set",
        ),
        (["--optim=sgd", "--adam_beta2=0.95"], "adam_beta2 has no effect with optim: sgd; set"),
        (["--optim_target_modules=q_proj"], "optim_target_modules has no effect with optim: adamw_torch_fused; set"),
    ],
)
def test_idle_keys_are_refused(arguments, message):
    with pytest.raises(UserError, match=re.escape(message)):
        parse(*arguments)


def test_the_command_line_may_make_keys_of_a_recipe_idle(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("use_peft: true\nlora_r: 8\neval_strategy: steps\neval_steps: 5\n")
    configs = parse("--config", recipe, "--use_peft=false", "--eval_strategy=epoch")
    resolved = resolve_recipe(configs)
    assert not {"lora_r", "eval_steps"} & set(resolved), "the resolved recipe must be valid"
    recipe.write_text(yaml.safe_dump(resolved))
    assert resolve_recipe(parse_recipe(TYPES, ["--config", str(recipe)])) == resolved
    recipe.write_text("use_peft: false\nlora_r: 8\n")
    with pytest.raises(UserError, match="lora_r has no effect"):
        parse("--config", recipe)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--metric_for_best_model=eval_acc"], "'eval_acc' is not a metric; choose one of eval_accuracy, eval_"),
        (["--metric_for_best_model=eval_f1"], "'eval_f1' is not a metric; choose one of .*eval_f1_neutral"),
        (["--metric_for_best_model=eval_nll"], "lower nll is better; set greater_is_better: false"),
        (
            ["--metric_for_best_model=accuracy", "--greater_is_better=false"],
            "higher accuracy is better; set greater_is_better: true",
        ),
        (["--save_strategy=best"], "save_strategy: best needs an evaluation metric; .* metric_for_best_model"),
        (["--report_to=wandbb"], r"report_to: unknown tracker 'wandbb'; did you mean wandb\?"),
        (["--report_to", "wandb", "tensorbord"], r"unknown tracker 'tensorbord'; did you mean tensorboard\?"),
        (["--report_to", "wandb", "none"], "report_to: none cannot be combined with other trackers"),
        (["--report_to=neptune"], "report_to names neptune, which is not installed; install it, or set report_to"),
        (["--lr_scheduler_kwargs={'foo': 1}"], "lr_scheduler_kwargs is {'foo': 1}; write it as nested keys in a"),
        (["--gradient_checkpointing_kwargs=fast"], "gradient_checkpointing_kwargs is fast; write it as nested keys"),
        (['--lr_scheduler_kwargs={"foo": 1}'], "do not fit lr_scheduler_type: linear .*'foo'"),
        (["--lr_scheduler_type=cosine_with_min_lr"], "do not fit lr_scheduler_type: cosine_with_min_lr"),
        (["--optim=galore_adamw"], "optim: galore_adamw is not installed"),
        (["--optim_args=momentum=0.9"], "optim_args has no effect with optim: adamw_torch_fused; remove optim_args"),
        (["--ddp_backend=gloo"], "ddp_backend needs several processes; use accelerate launch, or remove ddp_backend"),
        (["--torch_compile_backend=fast"], "torch_compile_backend is fast; it must be one of .*inductor"),
        (["--torch_compile_mode=fast"], "torch_compile_mode is fast; it must be one of default, reduce-overhead"),
        (
            ["--gradient_checkpointing", '--gradient_checkpointing_kwargs={"use_rentrant": true}'],
            "gradient_checkpointing_kwargs has no key 'use_rentrant'; valid keys are use_reentrant",
        ),
        (["--report_to=wandb,tensorboard"], r"give several trackers as a list: \[wandb,tensorboard\]"),
        (
            ["--warmup_ratio=0.1"],
            "unknown key 'warmup_ratio'; here it is warmup_steps, which below 1 is a share of all",
        ),
        (["--torch_dtype=bfloat16"], "unknown key 'torch_dtype'; here it is dtype"),
        (["--bf16=off"], "bf16 is 'off'; it must be true or false"),
        (["--max_steps=1e3"], "max_steps is '1e3'; it must be a whole number"),
        (["--optim_args=fast"], "optim_args is 'fast'; write it as name=value,name=value"),
        (["--bf16=true", "--fp16=true"], "bf16 and fp16 are both true; keep one of them"),
    ],
)
def test_what_would_fail_after_loading_the_model(arguments, message):
    with pytest.raises(UserError, match=message):
        parse("--eval_strategy=epoch", *arguments)


def test_several_trackers(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("report_to: [wandb, none]\n")
    with pytest.raises(UserError, match="report_to: none cannot be combined with other trackers"):
        parse("--config", recipe)
    assert parse("--report_to", "wandb")[-2].report_to == ["wandb"]


def test_output_paths_must_be_writable(tmp_path):
    (tmp_path / "file").write_text("mine")
    for name, message in (
        ("file", "output_dir .*file: this is a file; name a folder"),
        ("file/run", "output_dir .*file/run: .*file is a file, not a folder"),
        ("x" * 300, r"output_dir .*: cannot write there \(File name too long\)"),
    ):
        with pytest.raises(UserError, match=message):
            parse("--output_dir", tmp_path / name)
    with pytest.raises(UserError, match="output_dir is empty; name a folder"):
        parse("--output_dir=")
    parse("--output_dir", tmp_path / "new" / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["file"], "nothing is created yet"


@pytest.mark.parametrize(
    ("line", "key", "value"),
    [
        ("learning_rate: 1e-4", "learning_rate", 1e-4),  # which YAML reads as text
        ("seed: 042", "seed", 42),  # which YAML reads as octal 34
        ("max_steps: 1_000", "max_steps", 1000),
        (
            "lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr: 1e-5}",
            "lr_scheduler_kwargs",
            {"min_lr": 1e-5},
        ),
    ],
)
def test_notations_of_numbers(tmp_path, line, key, value):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(line)
    assert getattr(parse("--config", recipe)[-2], key) == value


@pytest.mark.parametrize("line", ["num_train_epochs: 1:30", "max_steps: 0x10", "max_steps: 2024-01-01"])
def test_notations_that_only_yaml_reads_as_numbers_are_refused(tmp_path, line):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(line)
    with pytest.raises(UserError, match="it must be a (whole )?number"):
        parse("--config", recipe)
