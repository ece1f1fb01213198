import datetime
import errno
import gzip
import io
import json
import math
import os
import shutil
import subprocess
import sys
import threading
from decimal import Decimal

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from tiny import CLAIMS, DOCUMENT, SCENES, TOKENIZERS, few_pairs, write_jsonl
from tiny_run import make_base, make_run
from trl import ModelConfig

from nli_sft import UserError
from nli_sft.__main__ import main
from nli_sft.classifier import NLIClassifier, Prediction, pick_device
from nli_sft.configs import BatchConfig, from_recipe
from nli_sft.data.prompts import PROMPTS
from nli_sft.evaluation import scoring
from nli_sft.evaluation.evaluate import EvalTask, evaluate_model
from nli_sft.labels import LABELS
from nli_sft.models.loading import load_tuned
from nli_sft.models.precision import Precision, choose_precision
from nli_sft.runs import read_run

ENTAILED = Prediction("entailment", dict(zip(LABELS, (0.5, 0.3, 0.2), strict=True)))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier")
    return make_run(folder / "run", make_base(folder / "base"))


@pytest.fixture(scope="module")
def classifier(run):
    return NLIClassifier.from_pretrained(run, device="cpu", dtype="float32")


def test_its_predictions_are_those_of_the_evaluation(run, classifier):
    table = pd.read_parquet(run / "eval" / "snli-test" / "predictions.parquet")
    for model, predict in (("tuned", classifier), ("base", classifier.before_tuning())):
        predictions = predict(table["premise"], table["hypothesis"])
        assert [p.label for p in predictions] == list(table[f"{model}_prediction"])
        for label in LABELS:
            assert [p.probabilities[label] for p in predictions] == pytest.approx(
                table[f"{model}_p_{label}"], abs=1e-5
            )
    assert list(table["tuned_prediction"]) != list(table["base_prediction"])


def test_the_claims_of_a_document_are_predicted_as_pairs(classifier, monkeypatch):
    claims = [claim for claim, _ in CLAIMS]
    alone = [classifier(DOCUMENT, claim) for claim in claims]
    fed = []
    monkeypatch.setattr(
        scoring, "pack_scoring", lambda *args, pack=scoring.pack_scoring: fed.append(pack(*args)) or fed[-1]
    )
    together = classifier.claims(DOCUMENT, iter(claims))
    assert [one.label for one in together] == [one.label for one in alone]
    for one, other in zip(together, alone, strict=True):
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-5)
    (prompt,) = classifier.encoder.encode([DOCUMENT], [claims[0]])
    assert sum(batch["input_ids"].numel() for batch in fed) < 2 * len(prompt), "the document is computed once"
    assert classifier.claims(DOCUMENT, []) == []
    with pytest.raises(UserError, match="claims is one text; give a list of texts"):
        classifier.claims(DOCUMENT, claims[0])
    with pytest.raises(UserError, match="hypothesis 1 is missing"):
        classifier.claims(DOCUMENT, [claims[0], None])


def test_a_pair_longer_than_those_of_training_is_warned_of_once(tmp_path, caplog):
    run = make_run(tmp_path / "run", make_base(tmp_path / "base"), evaluated=False, max_length=100)
    classifier = NLIClassifier.from_pretrained(run, device="cpu")
    classifier("A man sleeps.", "He rests.")
    assert "max_length" not in caplog.text
    for _ in range(2):
        classifier.claims(DOCUMENT, ["He rests."])
    assert caplog.text.count("but the model was trained on pairs of at most 100 (max_length)") == 1


def plain_adapter(run, folder):
    """The adapter of a run as PEFT alone would have saved it, without prompt, recipe and tokenizer."""
    folder.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(run / name, folder / name)
    return folder


def test_any_model_and_a_plain_adapter(tmp_path, run, caplog):
    base, adapter = run.parent / "base", plain_adapter(run, tmp_path / "adapter")
    table = pd.read_parquet(run / "eval" / "snli-test" / "predictions.parquet")
    options = {"device": "cpu", "dtype": "float32"}
    for model, classifier in (
        ("base", NLIClassifier.from_pretrained(base, **options)),
        ("tuned", NLIClassifier.from_pretrained(adapter, **options)),
        ("tuned", NLIClassifier.from_pretrained(base, adapter=adapter, **options)),
        ("base", NLIClassifier.from_pretrained(adapter, **options).before_tuning()),
    ):
        predictions = classifier(table["premise"], table["hypothesis"])
        for label in LABELS:
            found = [p.probabilities[label] for p in predictions]
            assert found == pytest.approx(table[f"{model}_p_{label}"], abs=1e-5)
    assert caplog.text.count(f"{base} has no prompt.json, so the prompt plain is used") == 1
    asked = NLIClassifier.from_pretrained(base, prompt="few_shot", label_words=["yes", "maybe", "no"], **options)
    assert (asked.encoder.prompt.name, asked.encoder.prompt.label_words) == ("few_shot", ("yes", "maybe", "no"))
    with pytest.raises(UserError, match="no model before tuning is known"):
        asked.before_tuning()


def test_the_temperature_changes_no_label(run, classifier, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    record = json.loads((run / "run.json").read_text()) | {"temperature": 4.0}
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    fitted = NLIClassifier.from_pretrained(tmp_path / "run", device="cpu", dtype="float32")
    as_given = NLIClassifier.from_pretrained(run, device="cpu", dtype="float32", temperature=4.0)
    pairs = texts(few_pairs())
    assert fitted(*pairs) == as_given(*pairs)
    for hot, plain in zip(fitted(*pairs), classifier(*pairs), strict=True):
        assert hot.label == plain.label
        flattened = {label: p**0.25 for label, p in plain.probabilities.items()}
        total = sum(flattened.values())
        assert hot.probabilities == pytest.approx({label: p / total for label, p in flattened.items()}, abs=1e-5)


def test_it_answers_with_the_labels_of_the_run(tmp_path, capsys):
    labels = ("SUPPORTS", "REFUTES", "NOT ENOUGH INFO", "DISPUTED")
    prompt = PROMPTS["plain"].with_labels(labels, ["yes", "no", "maybe", "partly"])
    run = make_run(tmp_path / "run", make_base(tmp_path / "base"), prompt=prompt)
    table = pd.read_parquet(run / "eval" / "snli-test" / "predictions.parquet")
    predictions = NLIClassifier.from_pretrained(run, device="cpu", dtype="float32")(
        *table[["premise", "hypothesis"]].T.values
    )
    assert [p.label for p in predictions] == list(table["tuned_prediction"])
    assert len(set(table["tuned_prediction"])) > 1, "a model with a single answer proves nothing"
    for label in labels:
        assert [p.probabilities[label] for p in predictions] == pytest.approx(table[f"tuned_p_{label}"], abs=1e-5)

    kept = ["premise", "hypothesis", "label"]
    table.assign(p_neutral=1)[[*kept, "p_neutral"]].to_json(tmp_path / "pairs.jsonl", orient="records", lines=True)
    predict(run, tmp_path / "pairs.jsonl", "--device", "cpu", "--dtype", "float32")
    out, err = capsys.readouterr()
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["prediction"] for row in rows] == list(table["tuned_prediction"])
    assert rows[0].keys() == {*kept, "p_neutral", "prediction", *(f"p_{label}" for label in labels)}
    right = (table["label"] == table["tuned_prediction"]).mean()
    assert f"Accuracy: {right:.1%} (95% interval" in err
    table.assign(p_DISPUTED=1)[[*kept, "p_DISPUTED"]].to_csv(tmp_path / "taken.csv")
    with pytest.raises(SystemExit, match="taken.csv row 2: predict writes the columns p_DISPUTED itself"):
        predict(run, tmp_path / "taken.csv")


def test_one_pair_lists_generators_and_columns(classifier):
    premise, hypothesis, _ = SCENES[0]
    one = classifier(premise, hypothesis)
    assert isinstance(one, Prediction)
    assert one.label in LABELS
    assert list(one.probabilities) == list(LABELS)
    assert sum(one.probabilities.values()) == pytest.approx(1)
    pairs = few_pairs()
    columns = classifier(pairs["premise"], pairs["hypothesis"])
    generated = classifier((p for p, _, _ in SCENES), (h for _, h, _ in SCENES))
    assert [p.label for p in columns] == [p.label for p in generated]
    assert len(columns) == len(SCENES)
    assert columns[0].probabilities == pytest.approx(one.probabilities, abs=1e-5)
    assert classifier([], []) == []


def test_padded_batches_and_tries_agree(run, classifier):
    padded = NLIClassifier(classifier.model, classifier.encoder, batch_size=3)
    padded._batch_args.batching = "padded"
    pairs = few_pairs()
    for a, b in zip(classifier(*texts(pairs)), padded(*texts(pairs)), strict=True):
        assert a.label == b.label
        assert a.probabilities == pytest.approx(b.probabilities, abs=1e-5)


def texts(pairs):
    return pairs["premise"], pairs["hypothesis"]


def test_threads_get_their_own_predictions(classifier):
    base = classifier.before_tuning()
    expected = {one: [one(p, h) for p, h, _ in SCENES] for one in (classifier, base)}
    wrong = []

    def predict(one, index):
        premise, hypothesis, _ = SCENES[index]
        for _ in range(3):
            if one(premise, hypothesis).probabilities != pytest.approx(expected[one][index].probabilities, abs=1e-5):
                wrong.append(index)

    threads = [threading.Thread(target=predict, args=(one, index)) for one in expected for index in range(len(SCENES))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_full_model_and_its_base(tmp_path, run):
    base = run.parent / "base"
    classifier = NLIClassifier.from_pretrained(
        make_run(tmp_path / "full", base, use_peft=False), device="cpu", dtype="float32"
    )
    tuned = pd.read_parquet(tmp_path / "full" / "eval" / "snli-test" / "predictions.parquet")
    assert [p.label for p in classifier(tuned["premise"], tuned["hypothesis"])] == list(tuned["tuned_prediction"])
    of_adapter = pd.read_parquet(run / "eval" / "snli-test" / "predictions.parquet")
    predictions = classifier.before_tuning()(of_adapter["premise"], of_adapter["hypothesis"])
    assert [p.label for p in predictions] == list(of_adapter["base_prediction"])


@pytest.mark.parametrize("family", ["byte_level", "sentencepiece"])
def test_tokenizers_without_a_chat_template(tmp_path, family):
    tokenizer = TOKENIZERS[family]()
    base = make_base(tmp_path / "base", tokenizer)
    run = make_run(tmp_path / "run", base, tokenizer=tokenizer)
    table = pd.read_parquet(run / "eval" / "snli-test" / "predictions.parquet")
    predictions = NLIClassifier.from_pretrained(run, device="cpu", dtype="float32")(
        table["premise"], table["hypothesis"]
    )
    assert [p.label for p in predictions] == list(table["tuned_prediction"])


@pytest.mark.parametrize(
    ("premise", "hypothesis", "message"),
    [
        ("A dog.", ["A cat."], "give two texts, or two lists"),
        (["A dog.", "A cat."], ["A cat."], "2 premises but 1 hypotheses"),
        (["A dog.", "A cat."], ["A cat.", None], "hypothesis 1 is missing; expected text"),
        ("A dog.<|im_end|>", "A cat.", "holds '<|im_end|>', a control token"),
        ("", "A cat.", "premise is ''; expected text"),
        (["A dog.", "A cat."], ["A cat.", "\u200b"], "hypothesis 1 is '\\u200b'; expected text"),
        (["A dog.", float("nan")], ["A cat."] * 2, "premise 1 is nan; expected text"),
        ("A dog.", "A \ud83d.", "hypothesis holds '\\ud83d', a lone surrogate"),
        (None, None, "give two texts, or two lists"),
        ({"premise": "A dog."}, {"hypothesis": "A cat."}, "give two texts, or two lists"),
    ],
)
def test_inputs_that_are_not_texts(classifier, premise, hypothesis, message):
    with pytest.raises(UserError) as error:
        classifier(premise, hypothesis)
    assert message in str(error.value)
    assert classifier("A dog.", "A cat.").label in LABELS, "the lock is free again"


def test_nan_scores_are_an_error(run):
    nan = NLIClassifier.from_pretrained(run, device="cpu", dtype="float32")
    with torch.no_grad():
        next(nan.model.parameters()).fill_(torch.nan)
    with pytest.raises(UserError, match="the scores of 1 of 1 pairs are NaN"):
        nan(*SCENES[0][:2])


def test_only_safetensors_are_read(tmp_path, run):
    (run.parent / "pickled").mkdir()
    for path in run.iterdir():
        if path.is_file() and path.suffix != ".safetensors":
            (run.parent / "pickled" / path.name).write_bytes(path.read_bytes())
    torch.save({}, run.parent / "pickled" / "adapter_model.bin")
    with pytest.raises(UserError, match=r"has no adapter_model\.safetensors; other formats can run code"):
        NLIClassifier.from_pretrained(run.parent / "pickled")


def test_a_pickled_base_is_not_read(tmp_path, run):
    base = make_base(tmp_path / "base")
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    (tmp_path / "run").mkdir()
    for path in run.iterdir():
        if path.is_file():
            text = path.read_bytes().replace(str(run.parent / "base").encode(), str(base).encode())
            (tmp_path / "run" / path.name).write_bytes(text)
    with pytest.raises(UserError, match="has pickled weights"):
        NLIClassifier.from_pretrained(tmp_path / "run")


def test_code_that_comes_with_a_model_is_not_run(tmp_path):
    base = make_base(tmp_path / "base")
    run = make_run(tmp_path / "run", base, use_peft=False, trust_remote_code=True)
    marker = tmp_path / "it-ran"
    (run / "modeling_odd.py").write_text(f"open({str(marker)!r}, 'w')\n")
    config = json.loads((run / "config.json").read_text())
    config |= {
        "model_type": "odd",
        "auto_map": {"AutoModelForCausalLM": "modeling_odd.Odd", "AutoConfig": "modeling_odd.C"},
    }
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="cannot load its config"):
        NLIClassifier.from_pretrained(run)
    assert not marker.exists()


def test_folders_that_are_not_runs(tmp_path):
    with pytest.raises(UserError, match=rf"^{tmp_path} has no config\.json, so it is not a model folder"):
        NLIClassifier.from_pretrained(tmp_path)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(UserError, match=r"is not a run folder: it has no recipe\.yaml"):
        NLIClassifier.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="neither a local folder nor a Hub id"):
        NLIClassifier.from_pretrained("./no/such/folder")


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("fields", [{}, {"use_peft": False}, {"load_in_4bit": True}], ids=["lora", "full", "qlora"])
def test_weights_and_precision_are_those_of_an_evaluation(tmp_path, run, monkeypatch, precision, fields):
    device = torch.device("cpu")
    monkeypatch.setattr("nli_sft.models.precision.native_precision", lambda _: Precision(precision, "another machine"))
    run = make_run(tmp_path / "run", run.parent / "base", evaluated=False, dtype="bfloat16", **fields)
    classifier = NLIClassifier.from_pretrained(run, device=device)
    chosen = choose_precision("auto", device)
    evaluated = load_tuned(run, chosen.suit(from_recipe(ModelConfig, read_run(run)[0])))
    types = {name: weights.dtype for name, weights in evaluated.named_parameters()}
    assert {name: weights.dtype for name, weights in classifier.model.named_parameters()} == types
    with chosen.autocast(device):
        tasks = [EvalTask("pairs", few_pairs(), classifier.encoder)]
        ((_, result),) = evaluate_model(evaluated, tasks, name="tuned", batch_size=64, batch_args=BatchConfig())
    predictions = classifier(*texts(few_pairs()))
    gold = [LABELS[label] for label in few_pairs()["label"]]
    nll = -sum(math.log(p.probabilities[label]) for p, label in zip(predictions, gold, strict=True)) / len(gold)
    assert nll == pytest.approx(result["nll"], rel=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0; give a number of pairs, at least 1"),
        ({"batch_size": "8"}, "batch_size is '8'; give"),
        ({"temperature": 0}, "temperature is 0; give a number above 0"),
        ({"prompt": "plain"}, "is a run and keeps the prompt it was trained with; leave out prompt"),
        ({"label_words": ["a", "b", "c"]}, "is a run and keeps the prompt it was trained with; leave out label_words"),
        ({"dtype": "bf16"}, "dtype is 'bf16'; give one of .*float32.* or auto"),
    ],
)
def test_invalid_options(run, options, message):
    with pytest.raises(UserError, match=message):
        NLIClassifier.from_pretrained(run, device="cpu", **options)


def test_the_requested_dtype_is_that_of_the_weights(run):
    classifier = NLIClassifier.from_pretrained(run, device="cpu", dtype="bfloat16")
    assert classifier.model.base_model.model.lm_head.weight.dtype == torch.bfloat16
    assert classifier.precision.name == "bf16"


def test_the_command_line_predicts_one_pair(run, classifier, capsys):
    premise, hypothesis, _ = SCENES[0]
    main(["predict", "--model", str(run), "--premise", premise, "--hypothesis", hypothesis, "--dtype", "float32"])
    printed = json.loads(capsys.readouterr().out)
    expected = classifier(premise, hypothesis)
    assert printed["prediction"] == expected.label
    assert printed["p_neutral"] == pytest.approx(expected.probabilities["neutral"], abs=1e-4)


def test_the_command_line_predicts_files_without_labels(run, tmp_path, classifier, capsys, monkeypatch):
    monkeypatch.setattr("nli_sft.__main__.CHUNK", 5)
    path = tmp_path / "pairs.tsv"
    path.write_text("id\tsentence1\tsentence2\n" + "".join(f"{i}\t{p}\t{h}\n" for i, (p, h, _) in enumerate(SCENES)))
    main(["predict", "--model", str(run), str(path), "--dtype", "float32"])
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["id"] for row in printed] == [str(i) for i in range(len(SCENES))]
    assert [row["prediction"] for row in printed] == [p.label for p in classifier(*texts(few_pairs()))]


def predict(run, *arguments):
    main(["predict", "--model", str(run), *map(str, arguments)])


def test_the_command_line_predicts_the_claims_of_documents(run, tmp_path, classifier, capsys):
    claims = [claim for claim, _ in CLAIMS[:3]]
    labelled = [{"claim": claim, "label": label} for claim, label in CLAIMS[:3]]
    for listed, accuracy in ((claims, False), (labelled, True)):
        path = write_jsonl(tmp_path / "documents.jsonl", [{"id": 7, "document": DOCUMENT, "claims": listed}])
        predict(run, path, "--dtype", "float32")
        out, err = capsys.readouterr()
        printed = [json.loads(line) for line in out.splitlines()]
        assert [(row["id"], row["claim"]) for row in printed] == [(7, claim) for claim in claims]
        expected = classifier.claims(DOCUMENT, claims)
        assert [row["prediction"] for row in printed] == [prediction.label for prediction in expected]
        assert ("), 3 labelled pairs." in err) == accuracy


def confidence(row):
    return row[f"p_{row['prediction']}"]


def test_a_threshold_and_labels(run, tmp_path, capsys):
    rows = [{"premise": p, "hypothesis": h, "gold_label": label} for p, h, label in SCENES]
    rows.insert(1, rows[0] | {"gold_label": "-"})
    path = write_jsonl(tmp_path / "pairs.jsonl", rows)
    predict(run, path, "--dtype", "float32")
    out, err = capsys.readouterr()
    printed = [json.loads(line) for line in out.splitlines()]
    labelled = [row for row in printed if row["gold_label"] != "-"]
    right = sum(row["prediction"] == row["gold_label"] for row in labelled)
    fits = "Temperature: 1; recipes/eval.py fits one on validation pairs."
    assert f"{fits}\nAccuracy: {right / 12:.1%} (95% interval " in err
    assert err.endswith("), 12 labelled pairs.\n")
    confidences = sorted(map(confidence, printed))
    threshold = round((confidences[7] + confidences[8]) / 2, 9)
    predict(run, path, "--dtype", "float32", "--threshold", threshold)
    out, err = capsys.readouterr()
    answered = [row for row in printed if confidence(row) >= threshold]
    assert len(answered) == 5
    for row, before in zip(map(json.loads, out.splitlines()), printed, strict=True):
        assert row == (before if before in answered else before | {"prediction": None})
    answered = [row for row in answered if row in labelled]
    right_answers = sum(row["prediction"] == row["gold_label"] for row in answered)
    assert f"Coverage: 38.5%, 5 of 13 pairs with a probability of {threshold:g} or more." in err
    assert f"Accuracy on these: {right_answers / len(answered):.1%} (95%" in err
    assert f"), {len(answered)} labelled pairs.\nAccuracy on all: {right / 12:.1%} (95%" in err


def test_the_temperature_of_a_file(run, tmp_path, capsys):
    path = write_jsonl(tmp_path / "pairs.jsonl", [{"premise": p, "hypothesis": h} for p, h, _ in SCENES])
    predict(run, path, "--dtype", "float32", "--temperature", 1000)
    out, err = capsys.readouterr()
    assert err.endswith("Temperature: 1000, as given.\n"), "no accuracy without labels"
    assert [confidence(json.loads(line)) for line in out.splitlines()] == pytest.approx(
        [1 / 3] * len(SCENES), abs=0.01
    )


def test_labels_that_cannot_be_read_do_not_stop_predictions(run, tmp_path, capsys):
    path = tmp_path / "pairs.csv"
    path.write_text("premise,hypothesis,label,verdict\nA man.,A boy.,true,ja\nA man.,A dog.,false,nein\n")
    predict(run, path)
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 2
    assert "No accuracy is reported: pairs.csv row 2, column label: unknown label 'true'" in err
    predict(run, path, "--label_column", "verdict", "--label_spellings", "ja", "vielleicht", "nein")
    assert "), 2 labelled pairs." in capsys.readouterr().err
    with pytest.raises(SystemExit, match="no label column .looked for answer"):
        predict(run, path, "--label_column", "answer")


def test_the_command_line_asks_any_model(run, tmp_path, capsys):
    table = pd.read_parquet(run / "eval" / "snli-test" / "predictions.parquet")
    table[["premise", "hypothesis"]].to_csv(tmp_path / "pairs.csv", index=False)
    adapter = plain_adapter(run, tmp_path / "adapter")
    predict(run.parent / "base", tmp_path / "pairs.csv", "--adapter", adapter, "--dtype", "float32")
    printed = [json.loads(line)["prediction"] for line in capsys.readouterr().out.splitlines()]
    assert printed == list(table["tuned_prediction"])
    words = ["--prompt", "definitions", "--label_words", "yes", "maybe", "no"]
    predict(adapter, "--premise", "A man sleeps.", "--hypothesis", "He rests.", *words)
    assert json.loads(capsys.readouterr().out)["prediction"] in LABELS
    with pytest.raises(SystemExit, match="is a run and keeps the prompt it was trained with; leave out prompt"):
        predict(run, tmp_path / "pairs.csv", *words)


def test_other_columns_of_a_file_pass_through(run, tmp_path, capsys):
    row = {
        "premise": "A man sleeps.",
        "hypothesis": "A café.",
        "day": datetime.date(2026, 11, 28),
        "time": datetime.datetime(2026, 11, 28, 4, 5),
        "long": datetime.timedelta(days=1),
        "price": Decimal("1.50"),
        "image": {"bytes": b"\xff\x00", "path": None},
        "score": float("nan"),
        "scores": [1.5, float("inf")],
        "label": None,
    }
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "pairs.parquet")
    predict(run, tmp_path / "pairs.parquet", "--batch_size", 1, "--dtype", "float32")
    printed = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert printed["prediction"] in LABELS
    assert {name: printed[name] for name in row} == row | {
        "day": "2026-11-28",
        "time": "2026-11-28T04:05:00",
        "long": "1 day, 0:00:00",
        "price": "1.50",
        "image": {"bytes": "/wA=", "path": None},
        "score": None,
        "scores": [1.5, None],
    }


def test_the_output_file_is_complete_or_absent(run, tmp_path, capsys, monkeypatch):
    pairs = write_jsonl(tmp_path / "pairs.jsonl", [{"premise": "A.", "hypothesis": "B.", "note": "half \ud83d"}] * 3)
    output = tmp_path / "predictions.jsonl"
    predict(run, pairs, "--output", output)
    assert capsys.readouterr().out == ""
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [row["note"] for row in rows] == ["half \ud83d"] * 3
    link = tmp_path / "link.jsonl"
    link.symlink_to(output)
    output.write_text("old")
    predict(run, pairs, "--output", link)
    assert link.is_symlink()
    assert len(output.read_text(encoding="utf-8").splitlines()) == 3
    predict(run, pairs, "--output", "-")
    assert len(capsys.readouterr().out.splitlines()) == 3
    output.unlink()
    monkeypatch.setattr(NLIClassifier, "__call__", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        predict(run, pairs, "--output", output)

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(NLIClassifier, "__call__", stopped)
    with pytest.raises(SystemExit) as ended:
        predict(run, pairs, "--output", output)
    assert ended.value.code == 130
    assert capsys.readouterr().err.endswith("\nStopped by Ctrl-C.\n")
    assert {path.name for path in tmp_path.iterdir()} == {"pairs.jsonl", "link.jsonl"}, "no partial file"


def test_a_full_disk_is_reported(run, tmp_path, monkeypatch):
    pairs = write_jsonl(tmp_path / "pairs.jsonl", [{"premise": "A.", "hypothesis": "B."}])
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr("nli_sft.__main__._write_predictions", lambda *_: (_ for _ in ()).throw(full))
    with pytest.raises(SystemExit, match="out.jsonl: cannot be written .No space left on device"):
        predict(run, pairs, "--output", tmp_path / "out.jsonl")
    assert not list(tmp_path.glob("out.jsonl*"))


@pytest.mark.parametrize(
    "pairs",
    [
        b"premise,hypothesis\r\nA man sleeps.,He rests.\r\n",
        b"\n premise;hypothesis\nA man sleeps.;He rests.\n",
        b"premise\thypothesis\nA man sleeps.\tHe rests.\n",
        "premise,hypothesis\nA man sleeps.,He rests.\n".encode("utf-16"),
        gzip.compress(b"premise,hypothesis\nA man sleeps.,He rests.\n", mtime=0),
        b'\n{"premise": "A man sleeps.", "hypothesis": "He rests."}\n',
        b'[{"premise": "A man sleeps.", "hypothesis": "He rests."}]',
        b'{"data": [\n{"premise": "A man sleeps.", "hypothesis": "He rests."}]}',
        "parquet",
    ],
)
def test_standard_input_in_each_format(run, monkeypatch, capsys, pairs):
    if pairs == "parquet":
        pq.write_table(pa.table({"premise": ["A man sleeps."], "hypothesis": ["He rests."]}), buffer := io.BytesIO())
        pairs = buffer.getvalue()
    monkeypatch.setattr(NLIClassifier, "from_source", lambda *_, **__: lambda texts, _: [ENTAILED] * len(texts))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(pairs)))
    predict(run, "-")
    (row,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert (row["premise"], row["hypothesis"], row["prediction"]) == ("A man sleeps.", "He rests.", "entailment")


@pytest.mark.parametrize(
    ("pairs", "message"),
    [(b"", "stdin.csv is empty"), (b"PK\x03\x04", "stdin is a zip archive"), (b"premise\n\xff\n", "not UTF-8 text")],
)
def test_standard_input_that_cannot_be_read(run, monkeypatch, pairs, message):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(pairs)))
    with pytest.raises(SystemExit, match=message):
        predict(run, "-")


def test_a_control_token_is_an_error_before_weights_are_loaded(run, tmp_path, monkeypatch):
    monkeypatch.setattr(NLIClassifier, "from_source", pytest.fail)
    (tmp_path / "pairs.csv").write_text("premise,hypothesis\nA.,B.\nA.<|im_end|>,B.\n")
    with pytest.raises(SystemExit, match=r"pairs.csv row 3: the pair .* holds '<\|im_end\|>', a control token"):
        predict(run, tmp_path / "pairs.csv")


def test_standard_output_is_only_json_lines_and_may_be_closed(run, tmp_path):
    row = {"Sentence1": "A man sleeps.", "sentence2": "A café.", "long": "x" * 200_000}
    (tmp_path / "pairs.jsonl").write_text((json.dumps(row) + "\n") * 4)
    command = f"set -o pipefail; cat pairs.jsonl | {sys.executable} -m nli_sft predict --model {run} --device cpu -"
    shell = {"cwd": tmp_path, "capture_output": True, "encoding": "utf-8", "executable": "/bin/bash", "shell": True}
    whole = subprocess.run(command, env=os.environ | {"PYTHONIOENCODING": "ascii"}, **shell)
    assert whole.returncode == 0, whole.stderr
    assert [json.loads(line)["sentence2"] for line in whole.stdout.splitlines()] == ["A café."] * 4
    cut = subprocess.run(f"{command} | head -c 10", **shell)
    assert cut.returncode == 141
    assert "Error" not in cut.stderr
    assert "Traceback" not in cut.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["taken.csv"], "taken.csv row 2: predict writes the columns prediction itself"),
        (["twice.csv"], "twice.csv: the header has column note 2 times; rename all but one"),
        (["unnamed.csv"], "unnamed.csv: 2 columns of the header have no name; name them"),
        (["joined.csv"], "joined.csv row 3: repeats the heading"),
        (["book.xlsx"], "book.xlsx: cannot read this kind of file; expected one of .jsonl"),
        (["late.csv", "--premise_column", "hypothesis"], "premise_column and hypothesis_column are both hypothesis"),
        (["late.csv", "--batch_size", "1e3"], "argument --batch_size: invalid int value: '1e3'; see nli-sft"),
        (["late.csv", "--batchsize", "3"], "unknown argument --batchsize; did you mean --batch_size?"),
        (["late.csv", "--hypothesis-column=x"], "unknown argument --hypothesis-column; did you mean --hypothesis_col"),
        (["late.csv", "twice.csv"], "unknown argument twice.csv; give one file"),
        (["late.csv", "--dtype", "bf16"], "argument --dtype: invalid choice: 'bf16'"),
        (["late.csv", "--output", "/dev/null"], "--output /dev/null: cannot be written"),
        (["late.csv"], "late.csv row 3, column hypothesis: the hypothesis is ' '; expected text"),
        (["late.csv", "--batch_size", "0"], "--batch_size is 0; give a number of pairs, at least 1"),
        (["late.csv", "--threshold", "1.5"], "--threshold is 1.5; give a probability from 0 to 1"),
        (["late.csv", "--threshold", "nan"], "--threshold is nan; give a probability from 0 to 1"),
        (["late.csv", "--temperature", "0"], "--temperature is 0.0; give a number above 0"),
        (["late.csv", "--output", "late.csv"], "--output late.csv: predictions are JSON lines; name the file .jsonl"),
        (["same.jsonl", "--output", "./same.jsonl"], "same.jsonl is the file of pairs"),
        (["gone.csv", "--output", "same.jsonl"], "gone.csv: expected a file of pairs"),
        (["late.csv", "--output", "no/such.jsonl"], "--output no/such.jsonl: cannot be written"),
        (["--premise", " ", "--hypothesis", "A."], "--premise: the premise is ' '; expected text"),
    ],
)
def test_a_bad_command_line_ends_before_the_model_is_loaded(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken.csv").write_text("premise,hypothesis,prediction,p_neutral\nA.,B.,neutral,1\n")
    (tmp_path / "twice.csv").write_text("premise,hypothesis,note,note\nA.,B.,1,2\n")
    (tmp_path / "unnamed.csv").write_text(",premise,hypothesis,\n0,A.,B.,x\n")
    (tmp_path / "joined.csv").write_text("premise,hypothesis\nA.,B.\npremise,hypothesis\nA.,B.\n")
    (tmp_path / "book.xlsx").write_bytes(b"PK\x03\x04")
    (tmp_path / "late.csv").write_text("premise,hypothesis\nA.,B.\nA., \n")
    (tmp_path / "same.jsonl").write_text('{"premise": "A.", "hypothesis": "B."}\n')
    with pytest.raises(SystemExit) as exit:
        predict("no/such/model", *arguments)
    assert message in str(exit.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --premise and --hypothesis, or a file of pairs"),
        (["--premise", "A dog."], "give --premise and --hypothesis, or a file of pairs"),
        (["nowhere.tsv"], "nowhere.tsv: expected a file of pairs"),
        (["odd.tsv"], "odd.tsv: no premise column (looked for premise, sentence1"),
        (["empty.jsonl"], "empty.jsonl is empty"),
        (["blank.jsonl"], "blank.jsonl row 1, column hypothesis: the hypothesis is ''; expected text"),
    ],
)
def test_bad_command_lines_end_with_a_message(run, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd.tsv").write_text("a\tb\n1\t2\n")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "blank.jsonl").write_text('{"premise": "A dog.", "hypothesis": ""}\n')
    with pytest.raises(SystemExit) as exit:
        main(["predict", "--model", str(run), *arguments])
    assert message in str(exit.value)


@pytest.mark.parametrize("device", ["foo", "cuda:977", "cpu:x"])
def test_a_device_that_is_not_available(device):
    with pytest.raises(UserError, match=f"^device: {device} is not available; give cpu, or one such as cuda:0"):
        pick_device(device)
