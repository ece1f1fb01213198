import pytest
from launching import accelerate_command, launch


@pytest.fixture(scope="session")
def recipe(workspace):
    path = workspace / "recipe.yaml"
    path.write_text(
        f"model_name_or_path: {workspace / 'base'}\n"
        f"dataset_name: {workspace / 'data'}\n"
        "use_peft: true\nlora_r: 4\nlora_target_modules: all-linear\n"
        "max_length: 256\nlearning_rate: 1.0e-2\nnum_train_epochs: 2\nper_device_train_batch_size: 16\n"
        "eval_on_start: true\neval_strategy: epoch\nsave_strategy: epoch\n"
        "load_best_model_at_end: true\nmetric_for_best_model: eval_accuracy\nlogging_steps: 1\n"
        "report_to: none\nbf16: false\n"
    )
    return path


@pytest.fixture(scope="session")
def lora_run(workspace, recipe):
    """A run trained with LoRA and W&B offline, shared by all tests."""
    output = workspace / "outputs" / "lora"
    arguments = ["--config", recipe, "--output_dir", output, "--report_to", "wandb"]
    result = launch("sft.py", *arguments, cwd=workspace, command=accelerate_command)
    assert result.returncode == 0, result.output
    return output, result.output
