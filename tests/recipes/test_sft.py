import json
import re
import shlex
import shutil
import sys

import yaml
from launching import launch, read_wandb
from safetensors.torch import load_file
from tiny import write_jsonl

from nli_sft.labels import LABELS


def test_a_run_folder_is_complete(lora_run, workspace):
    folder, output = lora_run
    for name in ("adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "prompt.json", "recipe.yaml",
                 "decision.json", "decision_template.jinja"):  # fmt: skip
        assert (folder / name).is_file(), name
    assert any(
        "lora_B" in name and tensor.any() for name, tensor in load_file(folder / "adapter_model.safetensors").items()
    )
    record = json.loads((folder / "run.json").read_text())
    assert record["data"]["train"]["pairs"] == 96
    assert record["data"]["dropped"] == {"unlabelled": 1, "too_long": 0}
    assert record["data"]["sources"] == {
        str(workspace / "data"): {"pairs": 96, "labels": dict.fromkeys(LABELS, 32), "dropped": {"unlabelled": 1}}
    }
    assert record["parameters"]["trainable"] < record["parameters"]["total"]
    evaluations = [entry for entry in record["history"] if "eval_accuracy" in entry]
    assert [entry["epoch"] for entry in evaluations][:3] == [0, 1.0, 2.0], "the base model first, then every epoch"
    assert record["validation"]["eval_accuracy"] == max(entry["eval_accuracy"] for entry in evaluations[1:])
    assert record["versions"]["trl"]
    assert yaml.safe_load((folder / "recipe.yaml").read_text())["lora_r"] == 4
    assert output.count("Warning: 24 validation pairs are too few to choose a checkpoint reliably") == 2, (
        "before and at the end"
    )
    assert re.search(r"Label accuracy on validation: [\d.]+% \(95% interval [\d.]+% to [\d.]+%; the best", output)
    # The trained share of the parameters is printed.
    assert "[" in output
    assert "with the loss on the marked tokens only" in output
    assert "96 training pairs, 24 validation pairs" in output
    assert "trainable of" in output


def test_wandb_offline_holds_loss_and_label_accuracy(lora_run, workspace):
    logged = [
        {item.nested_key[0] if item.nested_key else item.key: item.value_json for item in record.history.item}
        for record in read_wandb(workspace)
        if record.HasField("history")
    ]
    assert [entry for entry in logged if "train/loss" in entry]
    accuracies = [json.loads(entry["eval/accuracy"]) for entry in logged if "eval/accuracy" in entry]
    assert len(accuracies) >= 3
    assert all(0 <= accuracy <= 1 for accuracy in accuracies)


def test_the_resolved_recipe_repeats_the_run(lora_run, workspace):
    folder, _ = lora_run
    again = workspace / "outputs" / "again"
    result = launch(
        "sft.py", f"--config={folder / 'recipe.yaml'}", "--output_dir", again, "--report_to=none", cwd=workspace
    )
    assert result.returncode == 0, result.output
    first, second = (load_file(path / "adapter_model.safetensors") for path in (folder, again))
    assert all(first[name].equal(second[name]) for name in first)


def test_bad_input_ends_without_a_traceback(recipe, workspace):
    def wrong(arguments):
        return launch("sft.py", "--config", recipe, "--output_dir", workspace / "bad", *arguments, cwd=workspace)

    messages = {
        ("--max_lenght", "10"): "unknown key 'max_lenght'; did you mean 'max_length'?",
        ("--max_length", "10"): "96 of 96 rows are longer than max_length 10",
        ("--max_length", "10", "--drop_too_long", "true"): "max_length 10 leaves no pair; the shortest has",
        ("--lora_target_modules", "q_prj"): "the model has no 'q_prj'; did you mean q_proj?",
        ("--dataset_name", "./nowhere"): "./nowhere does not exist; give a Hub id, a folder, or a file",
        ("--prompt", "plane"): "prompt: 'plane' is neither built in",
        (
            "--model_name_or_path",
            "./nowhere",
        ): "model_name_or_path ./nowhere does not exist; give a Hub id or a folder",
        ("--model_name_or_path", "./nowhere", "--estimate", "true"): "model_name_or_path ./nowhere does not exist",
    }
    for arguments, message in messages.items():
        result = wrong(arguments)
        assert result.returncode != 0, message
        assert message in " ".join(result.output.split())
        assert 'recipes/sft.py", line' not in result.output, "a traceback"


def test_train_validation_overlap_is_reported(recipe, workspace, tmp_path):
    data = shutil.copytree(workspace / "data", tmp_path / "data")
    train, new = (data / "train.jsonl").read_text(), (data / "dev.jsonl").read_text().replace("A man", "An old man")
    new = [line for line in new.splitlines() if "An old man" in line]
    (data / "dev.jsonl").write_text("\n".join([*new, *train.splitlines()[:5]]))
    arguments = ["--config", recipe, "--dataset_name", data, "--output_dir", tmp_path / "run", "--max_steps", "1"]
    result = launch("sft.py", *arguments, cwd=workspace)
    assert result.returncode == 0, result.output
    assert "Warning: 5 validation pairs are also training pairs" in " ".join(result.output.split())
    assert json.loads((tmp_path / "run" / "run.json").read_text())["data"]["train_validation_overlap"] == 5


def test_a_mixture_is_reported_by_source(recipe, workspace, tmp_path):
    arguments = ["--config", recipe, "--output_dir", tmp_path / "run", "--train_mix", "demo=0.25", "--max_steps=2"]
    result = launch("sft.py", *arguments, "--disable_tqdm=true", cwd=workspace, COLUMNS="200")
    assert result.returncode == 0, result.output
    assert "%|" not in result.output, "a progress bar despite disable_tqdm"
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["data"]["train"]["pairs"] == 120
    assert record["data"]["sources"]["demo"] == {"pairs": 24, "labels": dict.fromkeys(LABELS, 8), "dropped": {}}
    assert "120 training pairs, 24 validation pairs" in result.output
    assert "demo: 24 pairs (8 entailment, 8 neutral, 8 contradiction)" in result.output
    own = f"{workspace / 'data'}: 96 pairs (32 entailment, 32 neutral, 32 contradiction); left out: 1 unlabelled"
    assert own in result.output


def test_the_printed_evaluation_command_works_for_a_single_file(recipe, workspace, tmp_path):
    source = [json.loads(line) for line in (workspace / "data" / "train.jsonl").read_text().splitlines()]
    rows = [{"text": row["premise"], "claim": row["hypothesis"], "gold": row["label"][0] * 2} for row in source[:96]]
    data = write_jsonl(tmp_path / "my pairs.jsonl", [row for row in rows if row["gold"] != "--"])
    arguments = ["--dataset_name", data, "--premise_column=text", "--hypothesis_column=claim", "--max_steps=2"]
    arguments += ["--label_column=gold", "--label_spellings", "ee", "nn", "cc", "--output_dir", tmp_path / "my run"]
    result = launch("sft.py", "--config", recipe, *arguments, "--eval_strategy=no", "--save_strategy=no",
                    "--load_best_model_at_end=false", cwd=workspace)  # fmt: skip
    assert result.returncode == 0, result.output
    command = shlex.split(result.stdout.partition("To evaluate the run:\n")[2].splitlines()[0])
    assert command[0] == "python"
    result = launch(
        sys.executable, *command[1:], "--unconstrained_samples=0", cwd=workspace, command=lambda *words: words
    )
    assert result.returncode == 0, result.output
    assert "has no labelled test split. The run is evaluated on its" in result.output
    assert (
        json.loads((tmp_path / "my run/eval/my-pairs-validation/metrics.json").read_text())["train_test_overlap"] == 0
    )
