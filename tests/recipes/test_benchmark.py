import json
import runpy
from importlib.util import find_spec

from launching import ROOT, launch


def test_all_default_methods_are_measured(workspace):
    arguments = ["--model_name_or_path", workspace / "base", "--random_weights", "--pairs=48"]
    arguments += ["--dataset_name", workspace / "data", "--per_device_train_batch_size=8", "--bf16=false"]
    arguments += ["--json", workspace / "figures.json", "--svg", "speed.svg"]
    result = launch("benchmark.py", *arguments, cwd=workspace)
    assert result.returncode == 0, result.output
    figure = (workspace / "speed.svg").read_text()
    assert all(f">{method}<" in figure for method in ("trl_padded", "tries_by_premise", "generate", "tries_choice"))
    figures = json.loads((workspace / "figures.json").read_text())
    train, score = figures["train"], figures["score"]
    assert list(train["methods"]) == ["trl_defaults", "trl_padded", "trl_grouped", "tries", "tries_by_premise"]
    rates = {name: method["pairs_per_second"] for name, method in train["methods"].items()}
    assert train["speedup"] == max(rates["tries"], rates["tries_by_premise"]) / max(
        rates["trl_padded"], rates["trl_grouped"]
    )
    # Rates depend on the machine, but losses and predictions of all methods must agree.
    assert train["loss_difference"] < 1e-3
    assert score["agreement"] == 1
    assert score["methods"]["tries_choice"]["agreement"] == 1
    for method in ("tries", "tries_choice", *(["pipeline"] if find_spec("transformers.decision") else [])):
        assert score["methods"][method]["largest_difference"] < 1e-5, method
    tokens = {name: method["computed_tokens_per_pair"] for name, method in train["methods"].items()}
    assert tokens["tries_by_premise"] <= tokens["tries"] < tokens["trl_padded"]


def test_claims_of_long_documents(workspace):
    arguments = ["--model_name_or_path", workspace / "base", "--dataset_name", workspace / "data", "--pairs=48"]
    arguments += ["--claims=6", "--document_tokens=200", "--per_device_train_batch_size=6", "--bf16=false"]
    arguments += ["--train", "trl_padded", "tries_by_premise", "--score", "padded", "tries"]
    result = launch("benchmark.py", *arguments, "--json", workspace / "claims.json", cwd=workspace)
    assert result.returncode == 0, result.output
    figures = json.loads((workspace / "claims.json").read_text())
    assert figures["pairs"] == 48
    tokens = {name: method["computed_tokens_per_pair"] for name, method in figures["train"]["methods"].items()}
    assert tokens["trl_padded"] > 200
    assert tokens["tries_by_premise"] < tokens["trl_padded"] / 3, "each document is computed once"
    assert figures["score"]["methods"]["tries"]["largest_difference"] < 1e-3


def test_an_unknown_method_is_an_error(workspace):
    arguments = ["--model_name_or_path", workspace / "base", "--dataset_name", workspace / "data", "--train=trlpadded"]
    result = launch("benchmark.py", *arguments, cwd=workspace)
    assert result.returncode == 1
    assert "error: train: unknown method trlpadded; choose from trl_defaults, trl_padded" in result.output


def test_the_summary_includes_compiled_methods():
    benchmark = runpy.run_path(str(ROOT / "recipes" / "benchmark.py"))
    rates = {"lm_eval": 10, "generate": 20, "pipeline": 40, "tries_compiled": 60, "tries_choice_compiled": 80}
    methods = {name: {"pairs_per_second": rate} for name, rate in rates.items()}
    methods["tries_choice_compiled"]["agreement"] = 0.9
    expected = {"speedup_generate": 4, "speedup_lm_eval": 6, "speedup_pipeline": 2, "agreement": 0.9}
    assert benchmark["score_summary"](methods) == expected

    rates = {"trl_padded": 10, "trl_compiled": 20, "tries_compiled": 60}
    methods = {name: {"pairs_per_second": rate, "peak_bytes": rate, "loss": 1.0} for name, rate in rates.items()}
    summary = benchmark["train_summary"](methods)
    assert (summary["speedup"], summary["memory_ratio"]) == (3, 3), "against TRL's fastest"
