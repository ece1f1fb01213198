import json
import re
import shutil

import pandas as pd
import pytest
import yaml
from launching import launch
from safetensors.torch import load_file, save_file
from tiny import write_jsonl

from nli_sft.labels import LABELS
from nli_sft.report.compare import load_runs, rank
from nli_sft.report.compare_page import build_views


@pytest.fixture(scope="module")
def evaluated(lora_run, workspace):
    folder, _ = lora_run
    result = launch("eval.py", "--run", folder, "--unconstrained_samples", "6", cwd=workspace)
    assert result.returncode == 0, result.output
    return folder / "eval" / "data-test", result.output


def test_metrics_and_predictions_agree(evaluated):
    folder, output = evaluated
    metrics = json.loads((folder / "metrics.json").read_text())
    table = pd.read_parquet(folder / "predictions.parquet")
    assert metrics["pairs"] == len(table) == 36
    for model in ("base", "tuned"):
        right = (table["label"] == table[f"{model}_prediction"]).mean()
        assert metrics[model]["accuracy"] == pytest.approx(right)
        low, high = metrics[model]["accuracy_interval"]
        assert low <= right <= high
        probabilities = table[[f"{model}_p_{label}" for label in LABELS]]
        assert probabilities.sum(axis=1).to_numpy() == pytest.approx(1, abs=1e-5)
        assert sum(map(sum, metrics[model]["confusion"])) == 36
        free = metrics[model]["unconstrained_generation"]
        assert free["n"] == 6
        assert free["accuracy"] <= 1 - free["invalid_share"]
    assert not (table["base_p_entailment"] == table["tuned_p_entailment"]).all(), (
        "the adapter was switched off for the base"
    )
    assert "base" in output
    assert "tuned" in output


def test_train_test_overlap_is_reported(lora_run, workspace):
    rows = [json.loads(line) for line in (workspace / "data" / "train.jsonl").read_text().splitlines()][:9]
    new = [{**row, "premise": row["premise"] + " It is late."} for row in rows[:3]]
    data = write_jsonl(workspace / "known.jsonl", rows + new)
    arguments = ["--run", lora_run[0], "--dataset_name", data, "--unconstrained_samples=0"]
    result = launch("eval.py", *arguments, cwd=workspace)
    assert result.returncode == 0, result.output
    output = " ".join(result.output.split())
    assert output.count("Warning: train-test overlap") == 1
    assert (
        "9 of the 12 pairs of known are in the training data; accuracy on them says nothing about new pairs." in output
    )
    folder = lora_run[0] / "eval" / "known-all"
    assert json.loads((folder / "metrics.json").read_text())["train_test_overlap"] == 9
    table = pd.read_parquet(folder / "predictions.parquet")
    assert table["trained_on"].tolist() == [True] * 9 + [False] * 3
    assert re.search(r"training: unseen +3 ", result.output)
    assert "train-test overlap: 9 pairs" in (lora_run[0] / "report.md").read_text()


def test_two_way_sets_are_mapped(lora_run, workspace):
    rows = [
        {"premise": "The doctor saw the actor.", "hypothesis": "The actor saw the doctor.", "label": "non-entailment"},
        {"premise": "The doctor saw the actor.", "hypothesis": "The doctor saw the actor.", "label": "entailment"},
    ]
    path = write_jsonl(workspace / "hans.jsonl", rows)
    result = launch(
        "eval.py", "--run", lora_run[0], "--dataset_name", path, "--unconstrained_samples=2", cwd=workspace
    )
    assert result.returncode == 0, result.output
    metrics = json.loads((lora_run[0] / "eval" / "hans-all" / "metrics.json").read_text())
    assert list(metrics["tuned"]["per_label"]) == ["entailment", "non-entailment"]


def test_a_full_model_is_evaluated_beside_its_base(recipe, workspace):
    folder = workspace / "outputs" / "full"
    arguments = [
        "--use_peft=false",
        "--learning_rate=1e-3",
        "--output_dir",
        folder,
        "--train_on_end",
        "--max_length=512",
        "--hypothesis_only_control",
        "--prompt=few_shot",
    ]
    result = launch("sft.py", "--config", recipe, *arguments, cwd=workspace)
    assert result.returncode == 0, result.output
    assert "(100.00%)" in result.output
    result = launch(
        "eval.py", "--run", folder, "--unconstrained_samples=0", "--max_samples=12", "--batching=padded", cwd=workspace
    )
    assert result.returncode == 0, result.output
    table = pd.read_parquet(folder / "eval" / "data-test" / "predictions.parquet")
    assert len(table) == 12
    assert not (table["base_p_entailment"] == table["tuned_p_entailment"]).all()
    # Both baselines differ from the tuned model.
    assert not (table["shuffled_p_entailment"] == table["tuned_p_entailment"]).all()
    of_one_hypothesis = table.groupby("hypothesis")["hypothesis_only_p_entailment"].nunique()
    assert (of_one_hypothesis == 1).all(), "the baseline has read more than the hypothesis"
    recipe = yaml.safe_load((folder / "hypothesis_only" / "recipe.yaml").read_text())
    assert recipe["prompt"] == "hypothesis_only"
    assert "hypothesis_only_control" not in recipe


def test_qlora_on_the_cpu(recipe, workspace):
    folder = workspace / "outputs" / "qlora"
    arguments = ["--load_in_4bit", "--use_bnb_nested_quant", "--num_train_epochs=1", "--output_dir", folder]
    result = launch("sft.py", "--config", recipe, *arguments, cwd=workspace)
    assert result.returncode == 0, result.output
    parameters = json.loads((folder / "run.json").read_text())["parameters"]
    assert parameters["stored"] < parameters["total"]
    result = launch("eval.py", "--run", folder, "--unconstrained_samples=0", cwd=workspace)
    assert result.returncode == 0, result.output


def test_a_folder_that_is_not_a_run_is_refused(workspace):
    result = launch("eval.py", "--run", workspace / "data", cwd=workspace)
    assert result.returncode != 0
    assert "is not a run folder: it has no recipe.yaml" in " ".join(result.output.split())


def test_a_model_with_nan_weights_is_refused(lora_run, workspace, tmp_path):
    shutil.copytree(lora_run[0], tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-*", "eval"))
    file = tmp_path / "run" / "adapter_model.safetensors"
    weights = load_file(file)
    next(iter(weights.values())).fill_(float("nan"))
    save_file(weights, file)
    result = launch("eval.py", "--run", tmp_path / "run", "--unconstrained_samples=0", cwd=workspace)
    assert result.returncode != 0
    output = " ".join(result.output.split())
    assert "error: tuned on data test: the scores of 36 of 36 pairs are NaN or infinite, and so are weights" in output
    assert 'recipes/eval.py", line' not in result.output, "a traceback"


def test_a_suite_is_evaluated_and_lists_missing_sets(lora_run, workspace, tmp_path):
    shutil.copytree(lora_run[0], tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-*", "eval", "figures"))
    chaos = {
        "label_count": [76, 20, 4],
        "majority_label": "e",
        "example": {"premise": "A man.", "hypothesis": "A boy."},
    }
    write_jsonl(
        tmp_path / "chaosnli_snli.jsonl", [chaos | {"uid": "1"}, chaos | {"uid": "2", "label_count": [50, 50, 0]}]
    )
    hans = {"gold_label": "non-entailment", "sentence1": "The cat saw a dog.", "sentence2": "A dog saw the cat."}
    rows = [hans | {"heuristic": name} for name in ("lexical_overlap", "subsequence")]
    write_jsonl(tmp_path / "hans.jsonl", [*rows, rows[0] | {"gold_label": "entailment"}])
    (tmp_path / "snli").symlink_to(workspace / "data")
    sets = "sets: {snli: , hans: , chaosnli_snli: , sick: }\nlabel_order_pairs: 6\nprompt_pairs: 6\n"
    (tmp_path / "few.yaml").write_text(sets)
    arguments = ["--suite", tmp_path / "few.yaml", "--suite_root", tmp_path, "--unconstrained_samples=2"]
    result = launch("eval.py", "--run", tmp_path / "run", *arguments, cwd=workspace, COLUMNS="200")
    assert result.returncode == 0, result.output
    suite = json.loads((tmp_path / "run" / "eval" / "few.json").read_text())
    assert suite["evaluated"] == {"snli": "snli-test", "hans": "hans-all", "chaosnli_snli": "chaosnli_snli-all"}
    assert set(suite["missing"]) == {"sick", "hypothesis_only"}
    metrics = {
        name: json.loads((tmp_path / "run" / "eval" / key / "metrics.json").read_text())["tuned"]
        for name, key in suite["evaluated"].items()
    }
    assert len(metrics["snli"]["label_orders"]["accuracy"]) == 6
    assert len(metrics["snli"]["prompts"]["accuracy"]) == 3
    assert set(metrics["hans"]["by_subset"]) == {
        "lexical_overlap, entailment",
        "lexical_overlap, non-entailment",
        "subsequence, non-entailment",
    }
    assert metrics["chaosnli_snli"]["annotators"]["annotators_per_pair"] == 100
    assert ["unconstrained_generation" in one for one in metrics.values()] == [True, False, False]
    drawn = {path.name for path in (tmp_path / "run" / "figures").iterdir()}
    assert {"snli-test-reliability.svg", "hans-all-reliability.svg", "training-loss.png"} <= drawn
    assert not any("-reliability.png" in name for name in drawn), "plots of a suite are drawn for the page only"
    page = (tmp_path / "run" / "report.html").read_text()
    for text in (result.output, (tmp_path / "run" / "report.md").read_text().replace("\\", ""), page):
        assert "sick" in text
        assert "missing" in text
        assert "lexical_overlap, non-entailment" in text
        assert "Compared with all annotators" in text
        assert "pairs with different answers" in text
        assert "the run has no hypothesis-only baseline" in text

    model = ["--model", workspace / "base", "--output_dir", tmp_path / "model"]
    result = launch("eval.py", *model, *arguments, cwd=workspace, COLUMNS="200")
    assert result.returncode == 0, result.output
    assert "the model" in result.output
    for of_a_run in ("tuning", "before", "hypothesis-only"):
        assert of_a_run not in result.output.partition("Suite few")[2].partition("Calibration")[0], of_a_run


def test_a_model_that_is_no_run_is_evaluated_with_two_prompts(evaluated, lora_run, workspace):
    arguments = ["--model", workspace / "base", "--prompt", "plain", "few_shot", "--dataset_name", workspace / "data"]
    arguments += ["--unconstrained_samples", "4", "--report_to", "wandb", "--output_dir", workspace / "asked"]
    result = launch("eval.py", *arguments, cwd=workspace, COLUMNS="200")
    assert result.returncode == 0, result.output
    said = " ".join(result.output.split())
    assert "data test: prompts" in said
    assert "The best prompt is chosen on these pairs, so its accuracy on them is too high by chance" in said
    assert f"recipes/compare.py {workspace}/asked/plain {workspace}/asked/few_shot" in said
    tuned = pd.read_parquet(evaluated[0] / "predictions.parquet")
    table = pd.read_parquet(workspace / "asked" / "plain" / "eval" / "data-test" / "predictions.parquet")
    assert table["base_p_neutral"].to_numpy() == pytest.approx(tuned["base_p_neutral"].to_numpy(), abs=1e-5)
    assert "tuned_prediction" not in table
    metrics = json.loads((workspace / "asked" / "few_shot" / "eval" / "data-test" / "metrics.json").read_text())
    assert metrics["train_test_overlap"] is None
    assert metrics["base"]["unconstrained_generation"]["n"] == 4
    assert metrics["shuffled"]["n"] == 36
    for page in ("report.md", "report.html"):
        text = (workspace / "asked" / "few_shot" / page).read_text()
        assert "data test pairs are right (95% interval" in text
        assert "With shuffled premises, the model is right on" in text
    runs = load_runs([workspace / "asked" / "plain", workspace / "asked" / "few_shot", lora_run[0]])
    (ranking,) = rank(runs)
    assert [run.name for run in ranking.runs] == ["lora"]
    assert {run.name for run in ranking.baselines} == {"plain", "few_shot"}
    (view,) = build_views([ranking])
    assert {row[0] for row in view.tables[0].rows} == {"base base", "plain", "few_shot", "lora"}
    assert len([test for test in view.tests if test.evaluation == "data-test"]) == 6
    (alone,) = build_views(rank(runs[:2]))
    assert [row[0] for row in alone.tables[0].rows] == [run.name for run in alone.ranking.runs]
    again = launch("eval.py", "--run", workspace / "asked" / "plain", "--max_samples=9", cwd=workspace)
    assert again.returncode == 0, again.output
    metrics = json.loads((workspace / "asked" / "plain" / "eval" / "data-test" / "metrics.json").read_text())
    assert metrics["pairs"] == 9
