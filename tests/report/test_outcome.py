import io

import pytest
from rich.console import Console
from tiny_run import make_base, make_run

from nli_sft.report.content import Report
from nli_sft.report.outcome import outcome_table
from nli_sft.report.suite import suite_tables

RESOURCES = {"seconds": 90.0, "processes": [{"peak_ram_bytes": 2**30, "device": None}] * 2}


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
    folder = tmp_path_factory.mktemp("outcome")
    return Report(make_run(folder / "run", make_base(folder / "base"))).evaluations[0]


def rows_of(evaluation, trained=RESOURCES):
    return {row[0]: row[1:] for row in outcome_table(evaluation, trained).rows}


def test_every_part_of_the_source_has_its_own_accuracy(evaluation):
    n = len(evaluation.table)
    evaluation.table["hard"] = [index < 6 for index in range(n)]
    evaluation.table["rule"] = ["colour" if index % 2 else "count" for index in range(n)]
    rows = rows_of(evaluation)
    assert rows["all pairs"][0] == str(n)
    right = (evaluation.table["tuned_prediction"] == evaluation.table["label"]).to_numpy()
    for name, part in (("all pairs", right), ("hard", right[:6]), ("easy", right[6:]), ("rule: colour", right[1::2])):
        assert rows[name] == [str(len(part)), rows[name][1], f"{part.mean():.1%}"], name


def test_cost_is_shown_if_it_was_measured(evaluation):
    assert outcome_table(evaluation, RESOURCES).note == "Training: 90 s, 2.00 GiB of RAM"
    assert outcome_table(evaluation, {}).note == ""


def test_the_table_fits_a_narrow_terminal(evaluation):
    for model in ("shuffled", "hypothesis_only"):
        evaluation.models.append(model)
        evaluation.metrics[model] = evaluation.metrics["tuned"]
        evaluation.table[f"{model}_prediction"] = evaluation.table["tuned_prediction"]
    evaluation.table["subset"] = "lexical"
    console = Console(width=80, record=True, file=io.StringIO())
    table = outcome_table(evaluation, RESOURCES)
    console.print(table.rich())
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    for row in table.rows:
        assert all(cell in text for cell in row)
    for word in ("premises", "shuffled", "hypothesis-", "lexical"):
        assert word in text


def test_unconstrained_generation_is_explained(evaluation):
    for model in ("base", "tuned"):
        evaluation.summary[model]["unconstrained_generation"] = {"n": 6, "accuracy": 0.5, "invalid_share": 0.25}
    rows = rows_of(evaluation)
    assert rows["unconstrained"][:3] == ["6", "50.0%", "50.0%"]
    assert rows["invalid answers"][:3] == ["6", "25.0%", "25.0%"]
    note = outcome_table(evaluation, RESOURCES).note
    assert note.startswith("Unconstrained: an answer without exactly one label is invalid")
    assert note.endswith("Training: 90 s, 2.00 GiB of RAM")


def test_a_suite_keeps_the_names_of_its_sets_on_a_narrow_terminal(evaluation):
    evaluation.metrics["hypothesis_only"] = evaluation.metrics["tuned"]
    part = "lexical_overlap, non-entailment"
    for model in ("base", "tuned"):
        evaluation.summary[model]["by_subset"] = {part: {"n": 6, "accuracy": 0.5}}
    suite = {
        "suite": "stress",
        "order": ["snli", "gone"],
        "evaluated": {"snli": evaluation.key},
        "missing": {"gone": "?"},
    }
    table = suite_tables(suite, [evaluation])[0]
    console = Console(width=80, record=True, file=io.StringIO())
    for one in table.split(80):
        console.print(one.rich())
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    for row in table.rows:
        assert text.count(f" {row[0]} ") >= len(table.split(80)), row[0]
        assert all(cell in text for cell in row)
