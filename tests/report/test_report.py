import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from tiny_run import make_base
from tiny_run import make_run as make_tiny_run

from nli_sft import UserError
from nli_sft.data.prompts import PROMPTS
from nli_sft.evaluation.metrics import compute
from nli_sft.labels import LABELS, TWO_WAY_LABELS
from nli_sft.report import pairs, write_report
from nli_sft.report.content import Evaluation, Report, Training, duration
from nli_sft.runs import read_run, write_json, write_run

HOSTILE = '<script>alert("x")</script> | *bold* `code` [link](http://example.org) & {{ 7 * 7 }}'

HISTORY = [
    {"loss": 1.2, "learning_rate": 5e-4, "epoch": 0.4, "step": 4},
    {"loss": 0.9, "learning_rate": 4e-4, "epoch": 0.8, "step": 8},
    {"loss": 0.6, "learning_rate": 3e-4, "epoch": 1.0, "step": 10},
    {"eval_loss": 0.8, "eval_accuracy": 0.70, "epoch": 1.0, "step": 10},
    {"loss": 0.5, "learning_rate": 1e-4, "epoch": 2.0, "step": 20},
    {"eval_loss": 0.9, "eval_accuracy": 0.65, "epoch": 2.0, "step": 20},
    {"train_runtime": 60.0, "train_loss": 0.7, "epoch": 2.0, "step": 20},
    {"eval_loss": 0.8, "eval_accuracy": 0.70, "epoch": 2.0, "step": 20},  # the best checkpoint, loaded at the end
]

RESOURCES = {
    "seconds": 2_522.0,
    "phases": {"training": {"seconds": 2_000.0, "pairs": 8_000, "pairs_per_second": 4.0}},
    "processes": [
        {
            "peak_ram_bytes": 3 * 2**30,
            "device": {
                "name": "Tesla T4",
                "memory_bytes": 15 * 2**30,
                "peak_allocated_bytes": 5 * 2**30,
                "peak_reserved_bytes": 6 * 2**30,
            },
        }
    ],
    "disk": {"run_bytes": 160 * 2**20, "model_bytes": 5 * 2**30},
    "hardware": {"cpu": "A CPU", "cores": 2, "ram_bytes": 12 * 2**30, "platform": "Linux"},
}


def predictions(golds, answers, premises=None, **columns):
    """A table as `evaluation.write_evaluation` makes it; `answers` {model: [(answer, probability of it)]}."""
    n = len(golds)
    table = {
        "uid": [f"pair-{k}" for k in range(n)],
        "premise": premises or [f"Scene {k // 3}." for k in range(n)],
        "hypothesis": [f"Hypothesis {k}." for k in range(n)],
        "label": golds,
        **columns,
    }
    for model, predicted in answers.items():
        table[f"{model}_prediction"] = [answer for answer, _ in predicted]
        for label in LABELS:
            p = np.array([p if label == answer else (1 - p) / 2 for answer, p in predicted])
            table[f"{model}_p_{label}"] = p.astype(np.float32)
            table[f"{model}_unconstrained_{label}"] = np.log(p * 0.5).astype(np.float32)  # a label mass of one half
    return pd.DataFrame(table)


def figures(table):
    """The figures in `metrics.json` for each model in a table of predictions."""
    names = TWO_WAY_LABELS if "non-entailment" in set(table["label"]) else LABELS
    gold = [names.index(label) for label in table["label"]]

    def columns(model, what):
        return table[[f"{model}_{what}_{label}" for label in LABELS]].to_numpy(np.float64)

    return {
        model: compute(
            gold,
            [LABELS.index(label) for label in table[f"{model}_prediction"]],
            columns(model, "p"),
            np.exp(columns(model, "unconstrained")).sum(axis=1),
            names,
            LABELS,
        )
        for model in (column.removesuffix("_prediction") for column in table if column.endswith("_prediction"))
    }


def many_predictions(n=240, **models):
    """`base` always predicts neutral; `tuned` is right on four of five."""
    rng = np.random.default_rng(0)
    golds = [LABELS[k % 3] for k in range(n)]
    answers = {"base": [("neutral", 0.5)] * n}
    for model, skill in {"tuned": 0.8, **models}.items():
        answers[model] = [
            (gold if rng.uniform() < skill else LABELS[rng.integers(3)], 0.5 + rng.uniform() / 2) for gold in golds
        ]
    return predictions(golds, answers)


def make_run(folder, own, *, record=None, **others):
    """A run folder as the recipes make it, evaluated on its own source and on `others` {name: table}."""
    recipe = {"model_name_or_path": "owner/model", "dataset_name": "owner/pairs", "use_peft": True, "lora_r": 64}
    recipe |= {"load_in_4bit": True, "seed": 7}
    full_record = {
        "model": "owner/model",
        "parameters": {"total": 2_821_626_880, "trainable": 41_943_040, "stored": 1_563_335_680},
        "data": {
            "dropped": {"too_long": 3, "unlabelled": 0},
            "sources": {"scenes": {"pairs": 2_000, "labels": {"entailment": 700}, "dropped": {"unlabelled": 5}}},
            "train": {"pairs": 8_000, "fingerprint": "feed" * 4},
        },
        "best_checkpoint_step": 10,
        "history": HISTORY,
        "seconds": 2_522.0,
        "versions": {"torch": "2.11.0"},
        "git": {"commit": "abc123", "dirty": True},
        "resources": RESOURCES,
    }
    write_run(folder, recipe=recipe, prompt=PROMPTS["plain"], record=full_record | (record or {}))
    for source, split, table in [("owner/pairs", "test", own), *((f"{k}.jsonl", "all", t) for k, t in others.items())]:
        evaluation = folder / "eval" / f"{source.removesuffix('.jsonl').split('/')[-1]}-{split}"
        evaluation.mkdir(parents=True)
        table.to_parquet(evaluation / "predictions.parquet")
        free = {"n": 200, "invalid_share": 0.6, "accuracy": 0.2, "accuracy_of_valid": 0.5, "examples": []}
        summary = {"source": source, "split": split, "pairs": len(table), "data_fingerprint": "beef" * 4}
        summary |= figures(table)
        for model in ("base", "tuned"):
            summary[model] |= {"seconds": 2.0, "pairs_per_second": 5.0, "unconstrained_generation": free}
        write_json(evaluation / "metrics.json", summary)
    return folder


# Nine pairs on three premises: three fixed, two regressed, two right both times, two wrong both times.
GOLDS = ["entailment", "neutral", "contradiction"] * 3
BASE = [(label, 0.6) for label in ["neutral"] * 3 + ["entailment", "entailment", "contradiction"] + ["neutral"] * 3]
TUNED = [
    ("entailment", 0.9),  # fixed
    ("neutral", 0.8),  # both right
    ("contradiction", 0.7),  # fixed
    ("neutral", 0.6),  # regressed
    ("neutral", 0.8),  # fixed
    ("entailment", 0.5),  # regressed
    ("contradiction", 0.95),  # both wrong
    ("neutral", 0.9),  # both right
    ("entailment", 0.97),  # both wrong
]


@pytest.fixture
def nine(tmp_path):
    return make_run(tmp_path / "run", predictions(GOLDS, {"base": BASE, "tuned": TUNED}))


class Page(HTMLParser):
    """Checks that tags close in order, and collects what the page would fetch, its images and its text."""

    VOID = frozenset(["meta", "link", "img", "br", "input", "hr"])

    def __init__(self, html):
        super().__init__()
        self.open, self.fetched, self.images, self.scripts, self.text = [], [], [], 0, []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag not in self.VOID:
            self.open.append(tag)
        self.scripts += tag == "script"
        if tag == "img":
            self.images.append(attributes)
        self.fetched += [attributes[name] for name in ("src", "srcset") if name in attributes]
        if tag == "link":
            self.fetched.append(attributes["href"])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("script", "style"):
            self.text.append(data)


def text_of(html):
    return " ".join(" ".join(Page(html).text).split())


def test_the_figures_match_a_count_by_hand(nine):
    text = text_of(write_report(Report(nine)).read_text(encoding="utf-8"))
    evaluation = Report(nine).own
    c = evaluation.comparison
    assert (c.fixed, c.regressed, c.both_right, c.both_wrong) == (3, 2, 2, 2)
    assert c.p_value == 1  # three of five changed pairs were fixed
    assert evaluation.metrics["base"]["confusion"] == [[1, 2, 0], [1, 2, 0], [0, 2, 1]]
    assert evaluation.metrics["tuned"]["label_mass"] == pytest.approx(0.5)
    assert "44.44% 55.56%" in text.replace("Accuracy ", "")
    assert "right before 2 2 regressed" in text
    assert "wrong before 3 corrected 2 not corrected" in text
    assert "Too few to claim a difference: accuracy went from 44.4% to 55.6% on 9 pairs test pairs" in text
    assert "no slice has 30 pairs" in text
    assert "Unconstrained, the base model gave no valid label in 120 of 200 answers" in text


def test_pairs_are_listed_with_the_most_confident_first(nine):
    fixed, not_corrected, regressed = Report(nine).own.pair_lists()
    assert [pair.uid for pair in fixed.pairs] == ["pair-0", "pair-4", "pair-2"]
    assert [pair.uid for pair in not_corrected.pairs] == ["pair-8", "pair-6"]
    assert [pair.uid for pair in regressed.pairs] == ["pair-3", "pair-5"]
    assert fixed.pairs[0].p_after == pytest.approx((0.9, 0.05, 0.05))
    assert fixed.pairs[0].p_before == pytest.approx((0.2, 0.6, 0.2))
    assert (fixed.pairs[0].gold, fixed.pairs[0].before, fixed.pairs[0].after) == (
        "entailment",
        "neutral",
        "entailment",
    )


def test_a_list_is_capped_and_the_total_is_given(tmp_path):
    fixed = Report(make_run(tmp_path / "run", many_predictions())).own.pair_lists()[0]
    assert len(fixed.pairs) == 6
    assert fixed.total > 100


def test_the_page_loads_no_other_file(nine):
    html = write_report(Report(nine)).read_text(encoding="utf-8")
    assert html.count("<caption>") == html.count('<div class="scroll"><table') > 0
    assert '"Predictions before and after tuning"' in html, "the caption that DataTables sets"
    page = Page(html)
    assert page.images
    assert all(source.startswith("data:") for source in page.fetched)
    assert all(len(image["alt"]) > 40 for image in page.images)


def test_markdown_links_to_the_figures(nine):
    write_report(Report(nine))
    markdown = (nine / "report.md").read_text(encoding="utf-8")
    shown = re.findall(r"^!\[.+\]\((figures/[^)]+)\)$", markdown, re.MULTILINE)
    assert (
        len(shown) == len(list((nine / "figures").glob("*.svg"))) == len(list((nine / "figures").glob("*.png"))) == 8
    )
    assert all((nine / path).is_file() for path in shown)


def test_text_from_data_is_escaped(tmp_path):
    table = predictions(GOLDS, {"base": BASE, "tuned": TUNED}, premises=[HOSTILE] * 9, subset=[HOSTILE] * 9)
    run = make_run(tmp_path / "run", table, record={"model": HOSTILE})
    clean = make_run(tmp_path / "clean", predictions(GOLDS, {"base": BASE, "tuned": TUNED}))
    html = write_report(Report(run)).read_text(encoding="utf-8")
    page = Page(html)
    assert "<script>alert" not in html
    assert page.scripts == Page(write_report(Report(clean)).read_text(encoding="utf-8")).scripts
    assert "".join(page.text).count(HOSTILE) > 7  # in the lists, in the table's preview, as the model's name
    markdown = (run / "report.md").read_text(encoding="utf-8")
    assert r"\<script\>alert" in markdown
    assert not re.search(r"(?<!\\)[<>]script", markdown)
    assert r"\| \*bold\* \`code\` \[link\](http://example.org) \&" in markdown
    rows = [line for line in markdown.splitlines() if "Hypothesis 0." in line]
    assert len(re.findall(r"(?<!\\)\|", rows[0])) == 6  # five cells


def test_both_parameter_counts_are_shown(nine):
    text = text_of(write_report(Report(nine)).read_text(encoding="utf-8"))
    assert "Trainable parameters 41,943,040 (1.49% of all)" in text
    assert "41,943,040 of 1,563,335,680 (2.68%)" in text
    assert "QLoRA r=64" in text


def test_resources_and_provenance_are_shown(nine):
    text = text_of(write_report(Report(nine)).read_text(encoding="utf-8"))
    for row in (
        "Training run: wall time in all 2,522 s (42 min)",
        "2,000 s (33 min), 4 pairs/s",
        "peak RAM 3.00 GiB",
        "5.00 GiB allocated, 6.00 GiB reserved, of 15.00 GiB on Tesla T4",
        "disk used by the run 160.0 MiB",
        "disk used by the base model 5.00 GiB",
        "Scoring pairs test, before tuning 2.0 s, 5 pairs/s",
        "Rows dropped before training 3 too long",
        "8,000, fingerprint feedfeedfeedfeed",
        "Train pairs of scenes 2,000 pairs (700 entailment); left out: 5 unlabelled",
        "9, fingerprint beefbeefbeefbeef",
        "abc123, with uncommitted changes",
        "Seed 7",
        "torch 2.11.0",
        PROMPTS["plain"].fingerprint,
        "Answer entailment, neutral or contradiction.",
        "python recipes/sft.py --config",
        "load_in_4bit: true",
    ):
        assert row in text, row


def test_epochs_have_the_mean_training_loss_and_their_own_validation():
    training = Training({"history": HISTORY, "best_checkpoint_step": 10})
    first, second = training.epochs()
    assert first.training_loss == pytest.approx((4 * 1.2 + 4 * 0.9 + 2 * 0.6) / 10)
    assert (first.validation_loss, first.validation_accuracy, first.is_best) == (0.8, 0.70, True)
    assert second.training_loss == pytest.approx(0.5)
    assert (second.validation_loss, second.validation_accuracy, second.is_best) == (0.9, 0.65, False)
    assert Training({}).epochs() == []


def test_an_epoch_that_ends_slightly_early_counts_as_that_epoch():
    history = [{"loss": 1.0, "epoch": 0.999, "step": 9}, {"eval_loss": 0.5, "epoch": 1.0000000001, "step": 10}]
    assert len(Training({"history": history}).epochs()) == 1


def test_without_controls_the_report_says_how_to_run_them(nine):
    text = text_of(write_report(Report(nine)).read_text(encoding="utf-8"))
    assert "it is not known how much" in text
    assert "--prompt hypothesis_only" in text
    assert "hypothesis-only baseline – not run" in text


def test_a_run_without_premises_is_called_a_baseline(nine):
    recipe, _, record = read_run(nine)
    write_run(nine, recipe=recipe, prompt=PROMPTS["hypothesis_only"], record=record)
    write_report(Report(nine))
    for name in ("report.html", "report.md"):
        text = (nine / name).read_text(encoding="utf-8")
        assert "it is itself a hypothesis-only baseline" in text
        assert "it is not known how much" not in text


def test_accuracy_by_unconstrained_probability_may_differ(tmp_path):
    table = predictions(GOLDS, {"base": BASE, "tuned": TUNED})
    table["tuned_unconstrained_entailment"] = 0.0  # as likely as can be, for every pair
    rows = {name: values for name, *values in Report(make_run(tmp_path / "run", table)).own.figures()}
    assert rows["Accuracy by unconstrained probability"] == ["44.44%", "33.33%"]
    assert rows["Accuracy"] == ["44.44%", "55.56%"]


def test_resources_of_one_evaluation_are_listed_once(tmp_path):
    run = make_run(tmp_path / "run", many_predictions(90), other=many_predictions(90))
    for path in run.glob("eval/*/metrics.json"):
        write_json(path, json.loads(path.read_text()) | {"resources": RESOURCES})
    names = [name for name, _ in Report(run).resources()]
    assert names.count("Evaluation: peak RAM") == 1
    assert "Scoring other, after tuning" in names
    assert len(set(names)) == len(names)


def test_controls_are_interpreted(tmp_path):
    reads = make_run(tmp_path / "reads", many_predictions(shuffled=0.3, hypothesis_only=0.4))
    text = text_of(write_report(Report(reads)).read_text(encoding="utf-8"))
    assert ": it uses the premise." in text
    assert "cannot come from the hypotheses alone" in text
    assert "--prompt hypothesis_only" not in text
    table = many_predictions()
    for control in ("shuffled", "hypothesis_only"):  # as good as the tuned model
        for column in [c for c in table if c.startswith("tuned_")]:
            table[column.replace("tuned", control)] = table[column]
    sentences = " ".join(Report(make_run(tmp_path / "does not", table)).own.controls())
    assert "nothing shows that it uses the premise" in sentences
    assert "could come from the hypotheses alone" in sentences


@pytest.mark.parametrize("labels", [("entailment", "not_entailment"), ("1", "2", "3", "4", "5")])
def test_a_run_with_other_labels(tmp_path, labels):
    prompt = PROMPTS["plain"].with_labels(labels)
    run = make_tiny_run(tmp_path / "run", make_base(tmp_path / "base"), prompt=prompt)
    summary = json.loads((run / "eval" / "snli-test" / "metrics.json").read_text())
    write_json(run / "eval" / "snli-test" / "metrics.json", summary | {"data_fingerprint": "beef" * 4})
    report = Report(run)
    assert (report.own.labels, report.own.label_names, report.own.is_two_way) == (labels, labels, False)
    assert report.own.probabilities("tuned").shape == (24, len(labels))
    page = text_of(write_report(report).read_text(encoding="utf-8"))
    assert f"one of its {len(labels)} labels, so chance is 1 in {len(labels)}" in page
    assert all(re.search(rf"{label} \d+%", page) for label in labels)
    markdown = (run / "report.md").read_text(encoding="utf-8").replace("\\_", "_")
    assert f"Probabilities of {' / '.join(labels)} in percent." in markdown
    assert not re.search("neutral|contradiction", page.replace("negation for contradiction", "") + markdown)
    (run / "eval" / "snli-test" / "predictions.parquet").rename(tmp_path / "old.parquet")
    table = pd.read_parquet(tmp_path / "old.parquet").drop(columns=f"tuned_p_{labels[-1]}")
    table.to_parquet(run / "eval" / "snli-test" / "predictions.parquet")
    with pytest.raises(UserError, match=f"predictions.parquet has no column 'tuned_p_{labels[-1]}'"):
        Report(run)


def test_a_two_way_set_is_mapped_and_explained(tmp_path):
    golds = ["entailment", "non-entailment"] * 30
    answers = {
        "base": [("entailment", 0.9)] * 60,
        "tuned": [(("entailment", "neutral", "entailment", "contradiction")[k % 4], 0.4) for k in range(60)],
    }
    hans = predictions(golds, answers, subset=["lexical_overlap"] * 60)
    run = make_run(tmp_path / "run", many_predictions(), hans=hans)
    text = text_of(write_report(Report(run)).read_text(encoding="utf-8"))
    report = Report(run)
    assert [evaluation.name for evaluation in report.evaluations] == ["pairs test", "hans"]  # its own first
    evaluation = report.evaluations[1]
    assert evaluation.metrics["tuned"]["confusion"] == [[30, 0], [0, 30]]
    assert (evaluation.comparison.before, evaluation.comparison.after) == (0.5, 1)
    assert evaluation.p_gold("tuned") == pytest.approx([0.4, 0.7] * 30)
    assert "neutral and contradiction count as non-entailment" in text
    assert "Tuning raised accuracy from 50.0% to 100.0% on 60 hans pairs" in text


def test_a_large_set_is_sampled_with_its_label_shares(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", many_predictions(90), other=many_predictions(600), more=many_predictions(300))
    monkeypatch.setattr(pairs, "MAX_ROWS", 210)
    _, note = pairs.pairs_table(Report(run).evaluations)
    assert note.startswith("210 of 990 pairs, of which 90 are from pairs test")
    rows = pairs._rows(Evaluation(run / "eval" / "other-all"))
    part = pairs._stratified(rows, 120)
    assert len(part) == 120
    assert len(set(part["uid"])) == 120
    for column in ("gold", "change"):
        whole = rows[column].value_counts(normalize=True)
        assert part[column].value_counts(normalize=True)[whole.index].to_numpy() == pytest.approx(whole, abs=0.03)
    assert pairs.pairs_table(Report(run).evaluations[:1])[1] == "All 90 pairs."


def test_a_run_with_minimal_records_has_a_report(tmp_path):
    record = {"history": [], "best_checkpoint_step": None, "git": None, "resources": {}, "data": {}, "versions": {}}
    one = predictions(["neutral"], {"base": [("entailment", 0.5)], "tuned": [("entailment", 0.99)]})
    run = make_run(tmp_path / "run", one, record=record)
    text = text_of(write_report(Report(run)).read_text(encoding="utf-8"))
    assert "keeps no log of its training" in text
    assert "wall time in all 2,522 s" in text
    assert "changed nothing" in text
    assert "nan" not in (run / "report.md").read_text(encoding="utf-8").lower().split()


def test_files_are_reproducible(nine):
    def files():
        return {p.name: p.read_bytes() for p in [*nine.glob("report.*"), *nine.glob("figures/*")]}

    write_report(Report(nine))
    first = files()
    write_report(Report(nine))
    assert files() == first


def test_a_folder_without_an_evaluation_is_refused(nine):
    shutil.rmtree(nine / "eval")
    with pytest.raises(UserError, match="has not been evaluated; run recipes/eval.py"):
        write_report(Report(nine))
    with pytest.raises(UserError, match="not a run folder"):
        write_report(Report(nine / "figures"))


def test_durations_are_readable():
    assert [duration(s) for s in (0.5, 59.6, 2_522, 10_000)] == [
        "0.5 s",
        "60 s",
        "2,522 s (42 min)",
        "10,000 s (2.8 h)",
    ]


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium")
def test_a_browser_builds_the_table(tmp_path):
    run = make_run(tmp_path / "run", many_predictions(240))
    page = write_report(Report(run))
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=10000", "--dump-dom"]
    dom = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120).stdout
    assert "Showing 1 to 10 of 240 entries" in dom


def test_power_and_calibration_are_shown(tmp_path):
    run = make_run(tmp_path / "run", many_predictions(n=3_000))
    path = run / "eval" / "pairs-test" / "metrics.json"
    summary = json.loads(path.read_text())
    for model, temperature in (("base", 3.0), ("tuned", 1.25)):
        summary[model]["calibrated"] = {"temperature": temperature, "nll": 0.4321, "ece": 0.0123}
    write_json(path, summary)
    text = text_of(write_report(Report(run)).read_text(encoding="utf-8"))
    assert "Temperature fitted on validation 3.00 1.25" in text
    assert "Calibration error at that temperature 0.012 0.012" in text
    summary["base"]["calibrated"] = {"temperature": None, "bound": 50.0}
    write_json(path, summary)
    text = text_of(write_report(Report(run)).read_text(encoding="utf-8"))
    assert "Temperature fitted on validation none (bound 50) 1.25" in text
    assert "Calibration error at that temperature – 0.012" in text
    evaluation = Report(run).own
    c = evaluation.comparison
    power = re.search(r"Power: ([\d,]+) of 3,000 pairs turned .*? a true difference of (\d\.\d) points", text)
    assert int(power[1].replace(",", "")) == c.fixed + c.regressed
    assert 1 < float(power[2]) < 6
    coverage, accuracy = evaluation.abstention("tuned")
    assert coverage[-1] == 1
    assert accuracy[-1] == pytest.approx(evaluation.metrics["tuned"]["accuracy"])
    few = Report(make_run(tmp_path / "few", predictions(GOLDS, {"base": BASE, "tuned": TUNED}))).own
    assert "Power: 5 of 9 pairs turned right or wrong, too few for the test by premise" in few.power


def test_a_report_repeats_no_sentence(tmp_path):
    folder = make_run(tmp_path / "run", many_predictions(shuffled=0.1, hypothesis_only=0.4))
    write_report(Report(folder))
    own = Report(folder).own
    page = " ".join(" ".join(Page((folder / "report.html").read_text()).text).split())
    notes = " ".join((folder / "report.md").read_text().replace("\\", "").split())
    sentences = [own.headline, *own.controls(), *own.explanation, own.unconstrained_generation(), own.power]
    assert len(sentences) >= 6
    for sentence in sentences:
        assert page.count(sentence) == notes.count(sentence) == 1, sentence


def test_a_suite_has_one_table_with_missing_sets_by_reason(tmp_path):
    own = many_predictions()
    folder = make_run(tmp_path / "run", own, hans=many_predictions(n=120), beside=many_predictions(n=60))
    suite = {
        "suite": "few",
        "order": ["pairs", "hans", "anli_r1", "anli_r2", "sick"],
        "evaluated": {"pairs": "pairs-test", "hans": "hans-all"},
        "missing": {"anli_r1": "out of reach", "anli_r2": "out of reach", "sick": "not there"},
    }
    write_json(folder / "eval" / "few.json", suite)
    write_report(Report(folder))
    notes = (folder / "report.md").read_text().replace("\\", "")
    assert "| anli_r1, anli_r2 | out of reach |" in notes
    (row,) = re.findall(r"^\| pairs \| 240 \| .*$", notes, flags=re.MULTILINE)
    assert row.endswith("| 33.3% |"), "accuracy of the majority baseline"
    assert "hypothesis-only |" not in notes, "no column for a baseline that was not run"
    overview = notes[: notes.index("## Suites")]
    assert "| beside | 60 |" in overview
    assert "| hans | 120 |" not in overview
    page = " ".join(Page((folder / "report.html").read_text()).text)
    assert "Other sets" in page
