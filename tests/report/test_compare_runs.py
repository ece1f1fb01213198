import io
import json
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import wandb
import wandb_server
from own_wandb import own_wandb  # noqa: F401, a fixture
from past_runs import as_wandb_run, write_past_run
from rich.console import Console
from scipy.special import expit, logit
from scipy.stats import ttest_1samp

from nli_sft import UserError
from nli_sft.evaluation.comparison import compare
from nli_sft.report.compare import (
    RunRecord,
    compare_replicates,
    differing_keys,
    explain_separation,
    explain_unequal_pairs,
    fetch_runs,
    load_runs,
    paired_tests,
    rank,
)
from nli_sft.report.compare_page import as_dict, build_views, render_page
from nli_sft.report.tables import Table
from nli_sft.runs import read_run, run_config, run_cost

RESOURCES = {
    "seconds": 130.0,
    "phases": {"training": {"seconds": 90.0, "pairs": 900, "pairs_per_second": 10.0, "tokens_per_second": 500.0}},
    "processes": [
        {
            "peak_ram_bytes": 2 * 2**30,
            "device": {"name": "X100", "peak_allocated_bytes": 3 * 2**30},
        },
        {
            "peak_ram_bytes": 2 * 2**30,
            "device": {"name": "X100", "peak_allocated_bytes": 5 * 2**30},
        },
    ],
}


@pytest.fixture(scope="module")
def six(tmp_path_factory):
    """Two methods by three seeds; full is better."""
    folder = tmp_path_factory.mktemp("outputs")
    for seed, wobble in ((1, 0.0), (2, 0.01), (3, -0.01)):
        write_past_run(folder / f"full-seed{seed}", 0.80 + wobble, seed=seed, hypothesis_only=0.6)
        write_past_run(folder / f"lora-seed{seed}", 0.60 + wobble, seed=seed, use_peft=True, lora_r=8, seconds=40.0)
    return load_runs(sorted(folder.iterdir()))


def test_a_record_is_read_from_its_folder(tmp_path):
    run = RunRecord(write_past_run(tmp_path / "run", 0.7, lora_r=8, resources=RESOURCES))
    assert run.validation.value == 0.7
    assert run.validation.low == pytest.approx(0.658, abs=2e-3)  # Wilson, 350 of 500
    assert run.base_validation.value == 0.33
    assert run.curve == [(0, 0, 0.33), (10, 0.5, pytest.approx(0.515)), (20, 1.0, 0.7)]
    assert run.evaluations["snli-test"].accuracy().value == pytest.approx(0.7, abs=0.05)
    config = run.config
    assert config["label_words"] == ["entailment", "neutral", "contradiction"]
    assert {
        key: config[key] for key in ("model", "lora_r", "quantisation", "train_pairs", "gpu", "version_nli_sft")
    } == {
        "model": "hub/tiny",
        "lora_r": 8,
        "quantisation": "none",
        "train_pairs": 900,
        "gpu": "X100",
        "version_nli_sft": "0.1",
    }
    assert not [key for key in config if not key.isidentifier()], "flat, no periods"
    assert not [value for value in config.values() if isinstance(value, dict)]


def test_a_folder_that_is_not_a_finished_run(tmp_path):
    with pytest.raises(UserError, match="is not a run folder: it has no recipe.yaml"):
        load_runs([tmp_path])
    with pytest.raises(UserError, match="no runs to compare"):
        rank([])


def test_cost_is_what_was_measured(tmp_path):
    cost = RunRecord(write_past_run(tmp_path / "measured", 0.7, resources=RESOURCES)).cost
    assert cost == {
        "seconds": 105.0,
        "training_seconds": 90.0,
        "pairs_per_second": 10.0,
        "tokens_per_second": 500.0,
        "peak_ram_gib": 4.0,
        "peak_gpu_gib": 5.0,
    }
    assert run_cost({"seconds": 9.0, "train": {"train_runtime": 7.0}}) == {"seconds": 9.0, "training_seconds": 7.0}


def test_runs_are_ranked_by_validation_accuracy_with_the_keys_that_differ(six):
    (ranking,) = rank(six)
    assert [run.name for run in ranking.runs] == [f"{m}-seed{s}" for m in ("full", "lora") for s in (2, 1, 3)]
    assert ranking.differing == ["seed", "train_fingerprint", "use_peft", "lora_r"], "no output_dir, nothing equal"
    assert ranking.differences(ranking.runs[0])["lora_r"] == "default"
    assert ranking.differences(ranking.runs[-1])["lora_r"] == 8


def test_seeds_are_replicates_with_mean_and_interval(six):
    full, lora = rank(six)[0].replicates
    assert (full.name, lora.name) == ("full (3 seeds)", "lora (3 seeds)")
    half = ttest_1samp([0.80, 0.81, 0.79], 0).confidence_interval().high - 0.8
    expected = expit(logit(0.8) + np.array([-half, half]) / (0.8 * 0.2))
    assert full.validation.value == pytest.approx(0.8)
    assert (full.validation.low, full.validation.high) == pytest.approx(tuple(expected))
    values = [run.evaluations["snli-test"].accuracy().value for run in full.runs]
    assert full.accuracy("snli-test").value == pytest.approx(np.mean(values))
    (claim,) = compare_replicates(rank(six)[0])
    assert claim.startswith("full (3 seeds) is better than lora (3 seeds): 80.0% against 60.0% on validation, +20.0")


def test_replicates_that_overlap_make_no_claim(tmp_path):
    runs = [write_past_run(tmp_path / f"a-{s}", a, seed=s) for s, a in ((1, 0.70), (2, 0.60), (3, 0.65))]
    runs += [write_past_run(tmp_path / f"b-{s}", a, seed=s, lora_r=8) for s, a in ((1, 0.69), (2, 0.62), (3, 0.66))]
    (claim,) = compare_replicates(rank(load_runs(runs))[0])
    assert claim.startswith("b (3 seeds) and a (3 seeds) do not differ significantly: ")
    assert "better" not in claim


def test_two_seeds_per_method_are_too_few_for_a_claim(tmp_path):
    runs = [write_past_run(tmp_path / f"a-{s}", a, seed=s) for s, a in ((1, 0.900), (2, 0.901))]
    runs += [write_past_run(tmp_path / f"b-{s}", a, seed=s, lora_r=8) for s, a in ((1, 0.5), (2, 0.501), (3, 0.502))]
    (claim,) = compare_replicates(rank(load_runs(runs))[0])
    assert claim.startswith("Too few seeds to compare a (2 seeds) with b (3 seeds)")


def test_the_interval_over_seeds_stays_within_0_and_100_percent(tmp_path):
    runs = [write_past_run(tmp_path / f"a-{s}", a, seed=s) for s, a in ((1, 0.999), (2, 0.95), (3, 0.99))]
    (group,) = rank(load_runs(runs))[0].replicates
    assert 0 < group.validation.low < group.validation.value < group.validation.high < 1


@pytest.mark.slow
def test_of_six_equal_methods_a_winner_is_claimed_in_5_percent_at_most():
    rng = np.random.default_rng(0)
    claimed = 0
    for values in rng.normal(0.85, 0.01, (1_000, 6, 3)):
        groups = [
            SimpleNamespace(
                name=str(method), runs=[SimpleNamespace(validation=SimpleNamespace(value=v)) for v in seeds]
            )
            for method, seeds in enumerate(values)
        ]
        claimed += any("is better than" in claim for claim in compare_replicates(SimpleNamespace(replicates=groups)))
    assert claimed / 1_000 <= 0.05


def test_seeds_on_other_machines_are_replicates_too(tmp_path):
    runs = [write_past_run(tmp_path / "gpu", 0.7, seed=1, per_device_eval_batch_size=512, dataloader_num_workers=8)]
    runs.append(write_past_run(tmp_path / "cpu", 0.6, seed=2, use_cpu=True, eval_on_start=False))
    (group,) = rank(load_runs(runs))[0].replicates
    assert len(group.runs) == 2
    runs.append(write_past_run(tmp_path / "other", 0.6, seed=3, dataloader_drop_last=True))
    assert len(rank(load_runs(runs))[0].replicates[0].runs) == 2, "this one skips pairs"


def test_the_same_seed_twice_is_no_replicate(tmp_path):
    runs = [write_past_run(tmp_path / name, 0.7, seed=1) for name in ("a", "b")]
    assert rank(load_runs(runs))[0].replicates == []


@pytest.mark.parametrize(
    ("other", "key"),
    [
        ({"validation": "v2"}, "validation_fingerprint (v1 and v2)"),
        ({"prompt": "hypothesis_only"}, "prompt_fingerprint ("),
    ],
)
def test_runs_with_other_data_or_prompts_are_ranked_separately_by_name_of_the_key(tmp_path, other, key):
    runs = [write_past_run(tmp_path / name, 0.7) for name in ("a", "b")]
    runs.append(write_past_run(tmp_path / "c", 0.9, **other))
    first, second = rank(load_runs(runs))
    assert [run.name for run in second.runs] == ["c"]
    sentence = explain_separation(first, second)
    assert sentence.startswith("Not ranked with a: c. They differ in ")
    assert key in sentence


def test_every_two_are_tested_on_their_shared_pairs(tmp_path):
    a = write_past_run(tmp_path / "a", 0.80)
    b = write_past_run(tmp_path / "b", 0.60, seed=2, pairs=300, test_data="t2")
    (ranking,) = rank(load_runs([a, b]))
    tests = {(test.first, test.second): test for test in paired_tests(ranking)}
    assert set(tests) == {("base tiny", "a"), ("base tiny", "b"), ("b", "a")}
    test = tests["b", "a"]
    one, other = (run.evaluations["snli-test"].table for run in ranking.runs)
    one = one.iloc[:300]
    assert test.comparison == compare(one["label"], other["tuned_prediction"], one["tuned_prediction"], one["premise"])
    assert test.comparison.pairs == 300
    assert test.better == "a"
    assert str(test).startswith("a is better than b: ")
    assert "on the 300 shared snli-test pairs" in str(test)
    # A sentence explains that accuracies in the table are from different pairs.
    (sentence,) = explain_unequal_pairs(ranking)
    assert sentence.startswith("Accuracies on snli-test are not from the same pairs (data_fingerprint): a; b.")


def test_runs_without_predictions_are_left_out_of_the_tests_with_a_warning(tmp_path, caplog):
    runs = [write_past_run(tmp_path / name, accuracy) for name, accuracy in (("a", 0.8), ("b", 0.7), ("c", 0.6))]
    (tmp_path / "c" / "eval" / "snli-test" / "predictions.parquet").unlink()
    (ranking,) = rank(load_runs(runs))
    tested = {frozenset((test.first, test.second)) for test in paired_tests(ranking)}
    assert {"a", "b"} in tested
    assert not any("c" in pair for pair in tested)
    assert "Not in the paired tests, for lack of predictions.parquet: c" in caplog.text


def test_better_needs_an_interval_without_zero(tmp_path):
    runs = [write_past_run(tmp_path / name, a, seed=s) for name, a, s in (("a", 0.70, 1), ("b", 0.69, 2))]
    test = paired_tests(rank(load_runs(runs))[0])[-1]
    assert test.comparison.interval[0] < 0 < test.comparison.interval[1]
    assert test.better is None
    assert str(test).startswith("a and b do not differ significantly: ")
    assert "better" not in str(test)


def test_few_premises_make_no_claim(tmp_path):
    runs = [write_past_run(tmp_path / name, a, seed=s, pairs=45) for name, a, s in (("a", 0.99, 1), ("b", 0.1, 2))]
    test = paired_tests(rank(load_runs(runs))[0])[-1]
    assert test.comparison.interval[0] > 0
    assert test.better is None


def test_p_values_are_corrected_for_all_pairs_of_runs(six):
    tests = paired_tests(rank(six)[0])
    assert len(tests) == 7 * 6 / 2
    assert all(test.p_value >= test.comparison.p_value for test in tests)
    assert min(test.p_value for test in tests) == pytest.approx(min(t.comparison.p_value for t in tests) * len(tests))


def test_two_way_sets_are_compared_in_their_own_labels(tmp_path):
    folder = write_past_run(tmp_path / "a", 0.7)
    path = folder / "eval" / "snli-test" / "predictions.parquet"
    table = pd.read_parquet(path)
    names = {"neutral": "non-entailment", "contradiction": "non-entailment"}
    table["label"] = table["label"].replace(names)
    table.to_parquet(path)
    summary = json.loads((path.parent / "metrics.json").read_text())
    for model in ("base", "tuned"):
        two_way = {"labels": ["entailment", "non-entailment"], "label_mapping": {"entailment": "entailment"} | names}
        summary[model] |= two_way
    (path.parent / "metrics.json").write_text(json.dumps(summary))
    table = RunRecord(folder).evaluations["snli-test"].table
    assert set(table["tuned_prediction"]) == {"entailment", "non-entailment"}


def test_runs_of_one_name_get_unique_names(tmp_path):
    runs = load_runs([write_past_run(tmp_path / study / "lora", 0.7) for study in ("monday", "tuesday")])
    assert sorted(run.name for run in runs) == ["monday/lora", "tuesday/lora"]


def test_nested_values_are_compared_as_one(tmp_path):
    runs = [
        write_past_run(tmp_path / "a", 0.7, lora_target_modules=["q_proj"]),
        write_past_run(tmp_path / "b", 0.7, lora_target_modules=["q_proj", "v_proj"]),
        write_past_run(tmp_path / "c", 0.7, lora_target_modules="all-linear"),
    ]
    assert differing_keys(load_runs(runs)) == ["lora_target_modules"]


def test_json_tables_and_page_agree(six, tmp_path):
    odd = write_past_run(tmp_path / "other <prompt> | x", 0.9, prompt="hypothesis_only", evaluations=())
    views = build_views(rank([*six, *load_runs([odd])]))
    figures = json.loads(json.dumps(as_dict(views), allow_nan=False))
    first, second = figures["rankings"]
    assert second["not_ranked_with_the_first"].startswith("Not ranked with full-seed2: other <prompt> | x.")
    assert [run["name"] for run in first["runs"]] == [run.name for run in views[0].ranking.runs]
    assert first["runs"][0]["evaluations"]["snli-test"]["hypothesis_only"]["value"] == 0.6
    assert len(first["tests"]) == 21
    assert {test["better"] for test in first["tests"]} > {None, "full-seed1"}

    accuracies = views[0].tables[0]
    assert [row[0] for row in accuracies.rows][:2] == ["base tiny", "full-seed2"]
    assert accuracies.rows[1][1] == "81.0%\n(77.3–84.2)"
    assert len({len(row) for row in [accuracies.columns, *accuracies.rows]}) == 1
    html = render_page(views)
    assert html.count("<caption>") == html.count('<div class="scroll"><table>') > 0
    assert "other &lt;prompt&gt; | x" in html
    assert html.count("data:image/svg+xml;base64,") == 5
    assert "http://" not in html.replace("http://www.w3.org", "")
    assert "https://" not in html


def test_replicates_share_a_style_and_one_legend_entry(six):
    plots = {plot.name: plot.svg for plot in build_views(rank(six))[0].plots}
    for name in ("cost", "epochs"):
        assert plots[name].count(">full (3 seeds)<") == plots[name].count(">lora (3 seeds)<") == 1
        assert ">full-seed2<" not in plots[name]


def test_the_best_run_is_compared_with_another_method_not_with_its_own_seeds(six):
    claims = build_views(rank(six))[0].claims
    assert any(claim.startswith("full-seed2 is better than lora-seed2: ") for claim in claims)
    assert not any("full-seed1" in claim for claim in claims)


def test_no_claims_are_made_for_methods_that_do_not_differ(tmp_path):
    runs = load_runs([write_past_run(tmp_path / f"r{s}", 0.7, seed=s, lora_r=s) for s in (1, 2)])
    view = build_views(rank(runs))[0]
    assert all("better" not in claim for claim in view.claims if "base" not in claim)
    cells = [cell for row in view.tables[-1].rows for cell in row[1:]]
    assert any(cell.startswith("(") for cell in cells)


def test_ties_in_the_matrix_are_antisymmetric(six):
    view = build_views(rank(six))[0]
    matrix = view.tables[-1]
    cells = {
        (row[0], column): cell for row in matrix.rows for column, cell in zip(matrix.columns[1:], row[1:], strict=True)
    }
    for one, other in pairwise(matrix.columns[1:]):
        there, back = cells[one, other].strip("()"), cells[other, one].strip("()")
        assert {there, back} in ({"0.0"}, {there, there.translate(str.maketrans("+−", "−+"))})


def test_runs_of_several_sizes_make_a_learning_curve_for_each_method(tmp_path):
    for pairs, accuracy in ((500, 0.5), (1000, 0.6), (1500, 0.7)):
        for seed in (9, 10):
            for method, keys in (("lora", {"lora_r": 8}), ("full", {})):
                folder = tmp_path / f"{method}-{pairs}-seed{seed}"
                write_past_run(folder, accuracy, seed=seed, train_pairs=pairs, max_train_samples=pairs, **keys)
    (tmp_path / "full-1500-seed10" / "eval" / "snli-test" / "metrics.json").unlink()
    (ranking,) = rank(load_runs(sorted(tmp_path.iterdir())))
    assert [curve.name for curve in ranking.learning_curves] == ["full", "lora"]
    points = ranking.learning_curves[1].points
    assert [(pairs, runs.validation.value, len(runs.runs)) for pairs, runs in points.items()] == [
        (500, 0.5, 2),
        (1000, 0.6, 2),
        (1500, 0.7, 2),
    ]
    assert {group.name for group in ranking.replicates} == {
        f"{m}-{n} (2 seeds)" for m in ("full", "lora") for n in (500, 1000, 1500)
    }
    by_pairs = next(plot for plot in build_views([ranking])[0].plots if plot.name == "snli-test-by-pairs")
    assert "lora: 500 " in by_pairs.description
    full, lora = by_pairs.description.split("; ")
    assert "1,500 " in lora
    assert "1,500 " not in full, "one of the two seeds was not evaluated"
    again = next(plot for plot in build_views([ranking])[0].plots if plot.name == "snli-test-by-pairs")
    assert again.svg == by_pairs.svg


def test_one_size_is_no_learning_curve(six):
    (ranking,) = rank(six)
    assert not ranking.learning_curves
    assert [plot.name for plot in build_views([ranking])[0].plots] == ["snli-test", "cost", "epochs"]


@pytest.fixture
def wandb_project(own_wandb, tmp_path, monkeypatch):  # noqa: F811
    """A W&B server with four runs: one finished, one finished in two parts, one killed."""
    finished = [write_past_run(tmp_path / name, a) for name, a in (("one", 0.7), ("two", 0.8))]
    part = write_past_run(tmp_path / "two-evaluated", 0.8, evaluations=("snli-test", "hans-all"))
    (tmp_path / "killed").mkdir()
    runs = [as_wandb_run(folder, number) for number, folder in enumerate([*finished, tmp_path / "killed"])]
    runs.append(as_wandb_run(part, 3, origin="id1", resumed_from="id1"))
    with wandb_server.serving(runs) as server:
        monkeypatch.delenv("WANDB_MODE")
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
        wandb.teardown()
        yield server


def test_runs_of_a_project_are_the_same_records(wandb_project, tmp_path):
    runs = fetch_runs("team/snli", tmp_path / "fetched")
    assert [(run.name, run.source) for run in runs] == [("one", "team/snli/id0"), ("two-evaluated", "team/snli/id3")]
    local = RunRecord(tmp_path / "one")
    assert (runs[0].config, runs[0].curve, runs[0].cost) == (local.config, local.curve, local.cost)
    pd.testing.assert_frame_equal(runs[0].evaluations["snli-test"].table, local.evaluations["snli-test"].table)
    assert list(runs[1].evaluations) == ["hans-all", "snli-test"], "the last part of a run is read"
    operations = [operation for operation, _ in wandb_project.asked]
    assert operations.count("Runs") == 2, "both pages"
    assert set(operations) == {"Viewer", "GetDefaultEntity", "Runs", "RunFiles"}


def test_filters_are_passed_on(wandb_project, tmp_path):
    runs = fetch_runs("team/snli", tmp_path / "fetched", {"group": "tiny-snli", "config.lora_r": 0})
    assert [run.name for run in runs] == ["one"]
    with pytest.raises(UserError, match="team/snli has no finished run"):
        fetch_runs("team/snli", tmp_path / "fetched", {"config.lora_r": 2})


def test_a_missing_project(wandb_project, tmp_path):
    with pytest.raises(UserError, match="team/nothing cannot be read from W&B"):
        fetch_runs("team/nothing", tmp_path / "fetched")


def test_a_missing_login_is_a_clear_error(own_wandb, monkeypatch, tmp_path):  # noqa: F811
    monkeypatch.delenv("WANDB_MODE")
    wandb.teardown()
    with pytest.raises(UserError, match="cannot be read from W&B .*wandb login"):
        fetch_runs("team/snli", tmp_path / "fetched")


def test_a_wide_table_is_split_for_a_narrow_terminal():
    columns = ["run", *(f"evaluation-{number}, tuned" for number in range(9))]
    rows = [[name, *(f"{number}1.0%\n(10.0–12.0)" for number in range(9))] for name in ("base tiny", "lora-seed1")]
    parts = Table("Accuracy", columns, rows, "A note.").split(80)
    assert [column for part in parts for column in part.columns[1:]] == columns[1:]
    assert [part.note for part in parts] == [*[""] * (len(parts) - 1), "A note."]
    for part in parts:
        console = Console(width=80, file=io.StringIO())
        console.print(part.rich())
        shown = console.file.getvalue()
        assert all(row[0] in shown and all(text.split("\n")[0] in shown for text in row) for row in part.rows)
        assert shown.count("(10.0–12.0)") == 2 * (len(part.columns) - 1)
        assert "…" not in shown
    assert len(Table("Accuracy", columns, rows).split(200)) == 1


def test_a_mixture_differs_by_its_sources(tmp_path):
    folder = write_past_run(tmp_path / "mixed", 0.8, train_mix=["a/b.jsonl=0.5"])
    recipe, prompt, record = read_run(folder)
    own, other = ({"pairs": n, "labels": {}, "dropped": {}} for n in (100, 50))
    record["data"]["sources"] = {"snli": own}
    assert not [key for key in run_config(recipe, prompt, record) if key.startswith("pairs_of")], "it is train_pairs"
    record["data"]["sources"]["a/b.jsonl"] = other
    config = run_config(recipe, prompt, record)
    assert {key: config[key] for key in config if key.startswith("pairs_of")} == {
        "pairs_of_snli": 100,
        "pairs_of_a_b_jsonl": 50,
    }
