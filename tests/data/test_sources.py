import csv
import gzip
import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from loopback_hub import LoopbackHub
from published_sets import card, three_pairs
from tiny import few_pairs, write_jsonl

from nli_sft import UserError
from nli_sft.configs import EvalConfig, TrainDataConfig
from nli_sft.data import files, sources
from nli_sft.data.sources import (
    VALIDATION_SEED,
    fingerprint,
    has_split,
    hold_out,
    load_pairs,
    load_train_and_validation,
    subsample,
)
from nli_sft.evaluation.sets import EvaluationSet, load_calibration_pairs, load_evaluation_sets
from nli_sft.labels import LABELS

ROWS = [
    {"uid": "a", "premise": "A man sleeps.", "hypothesis": "A person rests.", "label": "entailment"},
    {"uid": "b", "premise": "A man sleeps.", "hypothesis": 'He said "no".', "label": "Neutral"},
    {"uid": "c", "premise": "A man sleeps.", "hypothesis": "A man runs, fast.", "label": 2},
    {"uid": "d", "premise": "A man sleeps.", "hypothesis": "A man snores.", "label": "-"},
]


def write(folder, suffix, rows=ROWS, name="train"):
    path = folder / f"{name}{suffix}"
    if suffix.endswith(".gz"):
        plain = write(folder, suffix.removesuffix(".gz"), rows, name)
        path.write_bytes(gzip.compress(plain.read_bytes()))
        plain.unlink()
    elif suffix == ".jsonl":
        write_jsonl(path, rows)
    elif suffix == ".json":
        path.write_text(json.dumps(rows, indent=2))
    elif suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist([{**row, "label": str(row["label"])} for row in rows]), path)
    elif suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("\n".join("\t".join(map(str, row)) for row in [rows[0].keys(), *(r.values() for r in rows)]))
    return path


@pytest.mark.parametrize("suffix", files.SUFFIXES)
@pytest.mark.parametrize("as_folder", [True, False])
def test_every_file_format_gives_the_same_pairs(tmp_path, suffix, as_folder):
    path = write(tmp_path, suffix)
    dropped = Counter()
    pairs = load_pairs(str(tmp_path if as_folder else path), "train", dropped=dropped)
    assert pairs.column_names == ["uid", "premise", "hypothesis", "label"]
    assert pairs.features["label"].names == list(LABELS)
    assert list(pairs["uid"]) == ["a", "b", "c"]
    assert list(pairs["label"]) == [0, 1, 2]
    assert pairs["hypothesis"][1] == 'He said "no".'
    assert dropped == {"unlabelled": 1}


def test_official_snli_distribution(tmp_path):
    row = {
        "gold_label": "contradiction",
        "sentence1": "A man.",
        "sentence2": "A cat.",
        "pairID": "1#0r1c",
        "captionID": "1",
    }
    write_jsonl(tmp_path / "snli_1.0_dev.jsonl", [row, {**row, "gold_label": "-"}])
    write_jsonl(tmp_path / "snli_1.0_train.jsonl", [row])
    pairs = load_pairs(str(tmp_path), "validation")
    assert pairs.to_list() == [{"uid": "1#0r1c", "premise": "A man.", "hypothesis": "A cat.", "label": 2}]


def test_slices_and_two_way_sets(tmp_path):
    rows = [{**ROWS[0], "subset": "overlap", "hard": True}, {**ROWS[1], "label": "non-entailment", "hard": False}]
    pairs = load_pairs(str(write_jsonl(tmp_path / "hans.jsonl", rows)))
    assert pairs.features["label"].names == ["entailment", "non-entailment"]
    assert list(pairs["hard"]) == [True, False]
    assert list(pairs["subset"]) == ["overlap", None]


SICK_HEADING = (
    "pair_ID\tsentence_A\tsentence_B\tentailment_label\trelatedness_score\tentailment_AB\tentailment_BA\t"
    "sentence_A_original\tsentence_B_original\tsentence_A_dataset\tsentence_B_dataset\tSemEval_set\n"
)


def test_sick_is_one_file_with_splits_in_a_column(tmp_path):
    path = tmp_path / "SICK.txt"
    rows = [
        ("7", "A man plays a guitar", 'There is no "man" here', "CONTRADICTION", "TEST"),
        ("8", "A man plays a guitar", "A man makes music", "ENTAILMENT", "TRIAL"),
        ("9", "Two dogs fight", "Two dogs wrestle", "NEUTRAL", "TEST"),
    ]
    path.write_text(
        SICK_HEADING
        + "".join(f"{i}\t{a}\t{b}\t{label}\t3.3\tx\tx\t{a}\t{b}\tFLICKR\tFLICKR\t{s}\n" for i, a, b, label, s in rows)
    )
    pairs = load_pairs(str(path), "test")
    assert list(pairs["uid"]) == ["7", "9"]
    assert list(pairs["label"]) == [2, 1]
    assert pairs["hypothesis"][0] == 'There is no "man" here'
    assert list(load_pairs(str(path), "validation")["uid"]) == ["8"]
    assert len(load_pairs(str(path))) == 3
    with pytest.raises(sources.SourceMissing, match="no row of split train: its column SemEval_set has TEST, TRIAL"):
        load_pairs(str(path), "train")


def test_quotes_in_tsv_files_are_text_unless_inner_ones_are_doubled(tmp_path):
    fields = ['"Stop!" he said', '"A man."', '"He says ""no""."', 'He says ""no"".', '""', '"""Stop!"" he said"']
    path = tmp_path / "quotes.tsv"
    path.write_text("premise\thypothesis\tlabel\n" + "".join(f"{field}\tA.\tneutral\n" for field in fields))
    read = ['"Stop!" he said', '"A man."', 'He says "no".', 'He says ""no"".', '""', '"Stop!" he said']
    assert list(load_pairs(str(path))["premise"]) == read


def test_hans_is_text_with_heuristic_and_template(tmp_path):
    path = tmp_path / "heuristics_evaluation_set.txt"
    path.write_text(
        "gold_label\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\tsentence2_parse\tsentence1\t"
        "sentence2\tpairID\theuristic\tsubcase\ttemplate\n"
        "non-entailment\t( )\t( )\t(S)\t(S)\tThe doctor saw the actor .\tThe actor saw the doctor .\tex0\t"
        "lexical_overlap\tln_subject/object_swap\ttemp1\n"
        "entailment\t( )\t( )\t(S)\t(S)\tThe actor slept and ran .\tThe actor slept .\tex1\tconstituent\tce_x\ttemp2\n"
    )
    pairs = load_pairs(str(path))
    assert pairs.features["label"].names == ["entailment", "non-entailment"]
    assert pairs.to_list()[0] == {
        "uid": "ex0",
        "premise": "The doctor saw the actor .",
        "hypothesis": "The actor saw the doctor .",
        "label": 1,
        "subset": "lexical_overlap",
        "subcase": "ln_subject/object_swap",
    }


def test_mnli_is_json_lines_and_text_with_genre_and_annotators(tmp_path):
    row = {
        "annotator_labels": ["neutral", "neutral", "entailment", "neutral", "contradiction"],
        "genre": "slate",
        "gold_label": "neutral",
        "pairID": "63735n",
        "promptID": "63735",
        "sentence1": "The new rights are nice enough",
        "sentence1_parse": "(ROOT)",
        "sentence2": "Everyone really likes the newest benefits ",
    }
    write_jsonl(tmp_path / "multinli_1.0_dev_matched.jsonl", [row])
    write_jsonl(tmp_path / "multinli_1.0_dev_mismatched.jsonl", [row, row])
    text = {key: value for key, value in row.items() if key != "annotator_labels"}
    text |= {f"label{k}": label for k, label in enumerate([*row["annotator_labels"][:3], "", ""], start=1)}
    for name in ("multinli_1.0_dev_matched", "alone"):
        lines = ["\t".join(text), "\t".join(text.values())]
        (tmp_path / f"{name}.txt").write_text("\n".join(lines) + "\n")
    pair = {
        "uid": "63735n",
        "premise": "The new rights are nice enough",
        "hypothesis": "Everyone really likes the newest benefits",
        "label": 1,
        "genre": "slate",
        "label_counts": [1, 3, 1],
        "agreement": "60 to 79 %",
    }
    assert load_pairs(str(tmp_path), "dev_matched").to_list() == [pair]
    assert len(load_pairs(str(tmp_path), "dev_mismatched")) == 2
    assert load_pairs(str(tmp_path / "alone.txt")).to_list() == [pair | {"label_counts": [1, 2, 0]}]


def test_anli_is_one_folder_per_round(tmp_path):
    row = {
        "uid": "8a91e1a2-1",
        "context": "Ernest Jones is a British jeweller.",
        "hypothesis": "The first Ernest Jones store was opened in Europe.",
        "label": "e",
        "model_label": "n",
        "emturk": True,
        "genre": "wikipedia",
        "reason": "London is in Europe.",
        "tag": "x",
    }
    (tmp_path / "R1").mkdir()
    write_jsonl(tmp_path / "R1" / "test.jsonl", [row, row | {"uid": "8a91e1a2-2", "label": "c"}])
    pairs = load_pairs(str(tmp_path / "R1"), "test")
    assert list(pairs["label"]) == [0, 2]
    assert pairs["premise"][0] == row["context"]
    write_jsonl(tmp_path / "R1" / "dev.jsonl", [row | {"label": "maybe"}])
    with pytest.raises(ValueError, match="dev.jsonl row 1, column label: unknown label 'maybe'"):
        load_pairs(str(tmp_path / "R1"), "validation")


def test_chaosnli_has_the_counts_of_100_annotators(tmp_path):
    row = {
        "uid": "46359n",
        "label_counter": {"e": 76, "n": 20, "c": 4},
        "majority_label": "e",
        "label_dist": [0.76, 0.2, 0.04],
        "label_count": [76, 20, 4],
        "entropy": 0.951,
        "example": {"uid": "46359n", "premise": "A p.", "hypothesis": "A h.", "source": "mnli_agree_3"},
        "old_label": "n",
        "old_labels": ["neutral", "entailment", "neutral", "neutral", "contradiction"],
    }
    pairs = load_pairs(str(write_jsonl(tmp_path / "chaosNLI_mnli_m.jsonl", [row])))
    assert pairs.to_list() == [
        {
            "uid": "46359n",
            "premise": "A p.",
            "hypothesis": "A h.",
            "label": 0,
            "label_counts": [76, 20, 4],
            "agreement": "60 to 79 %",
        }
    ]
    broken = write_jsonl(tmp_path / "broken.jsonl", [row | {"example": {"premise": "A p."}}])
    with pytest.raises(ValueError, match="row 1, column example.hypothesis: the hypothesis is missing"):
        load_pairs(str(broken))


def test_breaking_nli_has_categories(tmp_path):
    row = {
        "sentence1": "A man holds a red cup.",
        "sentence2": "A man holds a blue cup.",
        "category": "colors",
        "gold_label": "contradiction",
        "annotator_labels": ["contradiction"] * 3,
        "pairID": 7,
    }
    pairs = load_pairs(str(write_jsonl(tmp_path / "dataset.jsonl", [row])))
    assert pairs.to_list()[0] | {"premise": "", "hypothesis": ""} == {
        "uid": "7",
        "premise": "",
        "hypothesis": "",
        "label": 2,
        "subset": "colors",
        "label_counts": [0, 0, 3],
        "agreement": "all",
    }


def test_one_annotator_gives_no_agreement(tmp_path):
    rows = [
        {**ROWS[0], "annotator_labels": ["entailment"]},
        {**ROWS[1], "annotator_labels": ["neutral"] * 4 + ["entailment"]},
        {**ROWS[2], "annotator_labels": ["contradiction", "contradiction", "neutral", "neutral", ""]},
    ]
    pairs = load_pairs(str(write_jsonl(tmp_path / "train.jsonl", rows)))
    assert list(pairs["label_counts"]) == [None, [1, 4, 0], [0, 2, 2]]
    assert list(pairs["agreement"]) == [None, "80 to 99 %", "under 60 %"]


def test_named_columns_and_spellings(tmp_path):
    path = tmp_path / "own.csv"
    path.write_text("text,claim,verdict\nA man.,A person.,yes\nA man.,A cat.,no\nA man.,A father.,?\n")
    columns = {"premise": "text", "hypothesis": "claim", "label": "verdict"}
    pairs = load_pairs(str(path), columns=columns, label_spellings=["yes", "?", "no"])
    assert list(pairs["label"]) == [0, 2, 1]


def labelled(path, labels, **columns):
    rows = [{"premise": f"Premise {k}.", "hypothesis": "A.", "label": label} for k, label in enumerate(labels)]
    return str(
        write_jsonl(path, [row | {name: values[k] for name, values in columns.items()} for k, row in enumerate(rows)])
    )


@pytest.mark.parametrize("labels", [[0, 1], ["1", "0", "1"], [0.0, 1.0, -1], ["2.0", "0.0"], [1, 1]])
def test_ids_other_than_all_three_of_snli_need_spellings(tmp_path, labels):
    path = labelled(tmp_path / "paws.jsonl", labels)
    with pytest.raises(ValueError, match=r"paws.jsonl: the only labels are .* unknown; set label_spellings"):
        load_pairs(path)
    assert load_pairs(path, label_spellings=["0", "1", "2"]).features["label"].names == list(LABELS)


def test_two_spellings_make_a_two_way_set(tmp_path):
    pairs = load_pairs(labelled(tmp_path / "paws.jsonl", [0, 1.0, "0"]), label_spellings=["1", "0"])
    assert pairs.features["label"].names == ["entailment", "non-entailment"]
    assert list(pairs["label"]) == [1, 0, 1]


@pytest.mark.parametrize(
    ("labels", "beside"),
    [
        ([2, 1, 0], {"label_text": ["entailment", "neutral", "contradiction"]}),
        ([2, 1.0, "0"], {"label_name": ["Entailment", "Neutral", "contradictory"]}),
        ([0, 2, 1], {"gold": [0, 2, 1], "annotator_labels": [["entailment"] * 4 + ["neutral"], "n", ["c", "c", "e"]]}),
    ],
)
def test_names_beside_ids_define_them(tmp_path, caplog, labels, beside):
    pairs = load_pairs(labelled(tmp_path / "ids.jsonl", labels * 3, **{k: v * 3 for k, v in beside.items()}))
    assert list(pairs["label"]) == [0, 1, 2] * 3
    assert "label ids are read by the names beside them: " in caplog.text
    assert "agreement" not in pairs.column_names or set(pairs["agreement"]) == {"80 to 99 %", "60 to 79 %", None}


def test_names_beside_two_ids_make_a_two_way_set(tmp_path):
    path = labelled(tmp_path / "rte.jsonl", [1, 0], label_text=["entailment", "not entailment"])
    pairs = load_pairs(path)
    assert [pairs.features["label"].names[label] for label in pairs["label"]] == ["entailment", "non-entailment"]


@pytest.mark.parametrize("names", [["entailment"] * 3, ["sports", "news", "fiction"], ["neutral", "entailment", None]])
def test_ambiguous_names_beside_ids_are_ignored(tmp_path, caplog, names):
    assert list(load_pairs(labelled(tmp_path / "ids.jsonl", [0, 1, 2], label_text=names))["label"]) == [0, 1, 2]
    assert "read as SNLI's ids: 0 is entailment" in caplog.text


@pytest.mark.parametrize("labels", [[0, 1, 2, -1], ["2.0", "1.0", "0.0"], ["entailment", 1, 1]])
def test_the_reading_of_ids_is_logged(tmp_path, caplog, labels):
    load_pairs(labelled(tmp_path / "ids.jsonl", labels))
    assert "read as SNLI's ids: 0 is entailment, 1 is neutral, 2 is contradiction; if they mean" in caplog.text


@pytest.mark.parametrize(
    ("spellings", "message"),
    [
        (["0", "0", "2"], "label_spellings has '0' more than once"),
        ([0, 0.0, 2], "label_spellings has '0' more than once"),
        (["yes", "Yes ", "no"], "label_spellings has 'yes' more than once"),
        (
            ["a", "b", "c", "d"],
            "label_spellings has 4 entries; give one each for entailment, neutral, contradiction",
        ),
        (["yes"], "label_spellings has 1 entries"),
        (["yes", "maybe", "no"], "row 1, column label: unknown label 'entailment'; expected one of yes, maybe, no"),
    ],
)
def test_invalid_spellings(tmp_path, spellings, message):
    with pytest.raises(ValueError, match=message):
        load_pairs(labelled(tmp_path / "one.jsonl", ["entailment"]), label_spellings=spellings)


def test_bools_are_labels_only_if_spelled_out(tmp_path):
    path = labelled(tmp_path / "bools.jsonl", [1, True, False])
    with pytest.raises(ValueError, match="row 2, column label: unknown label True"):
        load_pairs(path)
    spelled = labelled(tmp_path / "spelled.jsonl", [True, False])
    assert list(load_pairs(spelled, label_spellings=["true", "false"])["label"]) == [0, 1]


def test_ids_of_parquet_files_follow_the_names_in_each(tmp_path):
    hub_set(["entailment", "contradiction", "neutral"], [0, 1, 2, -1]).to_parquet(
        tmp_path / "train-00000-of-00002.parquet"
    )
    hub_set(["neutral", "entailment", "contradiction"], [0, 1, 2]).to_parquet(
        tmp_path / "train-00001-of-00002.parquet"
    )
    assert list(load_pairs(str(tmp_path), "train")["label"]) == [0, 2, 1, 1, 0, 2]
    one = str(tmp_path / "train-00000-of-00002.parquet")
    assert list(load_pairs(one, label_spellings=["0", "2", "1"])["label"]) == [0, 2, 1], "spelled as ids"
    assert list(load_pairs(one, label_spellings=["contradiction", "neutral", "entailment"])["label"]) == [2, 0, 1]


def test_a_single_label_is_refused_and_a_missing_one_is_logged(tmp_path, caplog):
    write_jsonl(tmp_path / "dev.jsonl", numbered(3, text="Held"))
    write_jsonl(tmp_path / "train.jsonl", numbered(30))
    args = TrainDataConfig(dataset_name=str(tmp_path))
    with pytest.raises(ValueError, match="all 30 training pairs have the label neutral; check label_column"):
        load_train_and_validation(args, seed=0)
    write_jsonl(tmp_path / "train.jsonl", numbered(30) + numbered(30, "entailment"))
    load_train_and_validation(args, seed=0)
    assert "none of the training pairs has the label contradiction" in caplog.text
    assert "none of the validation pairs has the label entailment or contradiction" in caplog.text
    with pytest.raises(ValueError, match="balance: no training pair has the label contradiction"):
        load_train_and_validation(replace(args, balance="label"), seed=0)


def test_headings_with_capitals_and_spaces(tmp_path):
    path = tmp_path / "own.csv"
    path.write_text("Pair ID, Sentence 1 ,SENTENCE2,Gold Label,Genre\n0,A.,B.,neutral,slate\n")
    pair = {"uid": "0", "premise": "A.", "hypothesis": "B.", "label": 1, "genre": "slate"}
    assert load_pairs(str(path)).to_list() == [pair]
    assert load_pairs(str(path), columns={"premise": "sentence2", "hypothesis": "sentence_1"})["premise"][0] == "B."


def test_all_missing_columns_are_reported_together(tmp_path):
    (tmp_path / "own.csv").write_text("text,sentence,verdict\nA.,B.,neutral\n")
    message = (
        r"no premise column \(looked for premise, .*\), no hypothesis column \(.*\), no label column \(looked for "
        r"lab\); it has text, sentence, verdict; name them with premise_column and hypothesis_column and label_column$"
    )
    with pytest.raises(ValueError, match=message):
        load_pairs(str(tmp_path / "own.csv"), columns={"label": "lab"})
    named = {"premise": "text", "hypothesis": "sentence", "label": "verdict", "uid": "nr"}
    with pytest.raises(ValueError, match=r"own.csv: no uid column \(looked for nr\)"):
        load_pairs(str(tmp_path / "own.csv"), columns=named)


def test_a_document_with_claims_becomes_pairs(tmp_path):
    documents = [
        {"id": "d1", "document": "Two dogs run. A man sleeps.", "claims": [
            {"claim": "Animals run.", "label": "entailment"},
            {"claim": "The man is old.", "label": "neutral"},
            {"claim": "Nobody is asleep.", "label": "-"},
        ]},
        {"id": "d2", "document": "It rains.", "claims": [{"id": "own", "claim": "It is dry.", "label": "c"}]},
    ]  # fmt: skip
    path = write_jsonl(tmp_path / "documents.jsonl", documents)
    dropped = Counter()
    assert load_pairs(str(path), dropped=dropped).to_list() == [
        {"uid": "d1", "premise": "Two dogs run. A man sleeps.", "hypothesis": "Animals run.", "label": 0},
        {"uid": "d1#2", "premise": "Two dogs run. A man sleeps.", "hypothesis": "The man is old.", "label": 1},
        {"uid": "own", "premise": "It rains.", "hypothesis": "It is dry.", "label": 2},
    ]
    assert dropped["unlabelled"] == 1


@pytest.mark.parametrize(
    ("claims", "message"),
    [
        ("It is dry.", r"documents.jsonl row 2: claims is 'It is dry.'; expected a list of {\"claim\": text, "),
        ([], r"row 2: claims is \[\]; expected a list"),
        ([{"claim": "It is dry.", "label": "neutral"}, 3], r"row 2, claim 2: expected a JSON object, found int"),
        ([{"claim": None, "label": "neutral"}], r"row 2, claim 1, column claim: the hypothesis is missing"),
        ([{"claim": "It is dry.", "label": "maybe"}], r"row 2, claim 1, column label: unknown label 'maybe'"),
        (["It is dry."], r"row 2, claim 1 has no label, only document, claim"),
    ],
)
def test_a_bad_claim_is_named(tmp_path, claims, message):
    good = {"document": "It rains.", "claims": [{"claim": "It is wet.", "label": "entailment"}]}
    path = write_jsonl(tmp_path / "documents.jsonl", [good, good | {"claims": claims}])
    with pytest.raises(UserError, match=message):
        load_pairs(str(path))


def test_a_split_with_other_columns_is_named(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [ROWS[0]])
    (tmp_path / "dev.csv").write_text("text,other,label\nA.,B.,neutral\n")
    with pytest.raises(ValueError, match=r"/dev.csv: no premise column .* it has text, other, label; name them with"):
        load_train_and_validation(TrainDataConfig(dataset_name=str(tmp_path)), seed=0)


def test_unused_columns_may_be_repeated(tmp_path):
    (tmp_path / "own.csv").write_text("premise,hypothesis,label,note,note\nA.,B.,neutral,x,y\n")
    assert len(load_pairs(str(tmp_path / "own.csv"))) == 1
    (tmp_path / "own.csv").write_text("premise,hypothesis,label,label\nA.,B.,neutral,x\n")
    with pytest.raises(ValueError, match="own.csv: the heading has label 2 times"):
        load_pairs(str(tmp_path / "own.csv"))


def test_invalid_values_of_optional_columns_are_ignored(tmp_path, caplog):
    rows = [
        {"label1": "entailment", "label2": "unknown", "label3": "neutral", "label4": ["x"], "label_count": 5},
        {"annotator_labels": ["yes", "no", "neutral", "unrelated"], "subset": {"a": 1}, "genre": float("nan")},
        {"label_counts": [3, 0, 0], "label1": "sports", "rule": "half \ud83d"},
        {"label1": 0, "label2": 1, "label_count": [1, 2]},
        {"label_count": [True, 1, 5]},
    ]
    path = labelled(
        tmp_path / "own.jsonl", ["yes"] * 5, **{k: [row.get(k) for row in rows] for row in rows for k in row}
    )
    pairs = load_pairs(path, label_spellings=["yes", "maybe", "no"])
    assert list(pairs["label_counts"]) == [[1, 1, 0], [1, 1, 1], [3, 0, 0], None, None]
    assert list(pairs["rule"]) == [None, None, "half \\ud83d", None, None]
    assert "genre" not in pairs.column_names
    (warning,) = caplog.messages
    assert "3 in label_count (such as 5), 2 in label2 (such as 'unknown')" in warning
    assert "1 in annotator_labels (such as 'unrelated')" in warning


def test_an_id_of_0_is_kept(tmp_path):
    path = labelled(tmp_path / "own.jsonl", ["neutral"] * 3, id=[0, None, "half \ud83d"])
    assert list(load_pairs(path)["uid"]) == ["0", "own-all-2", "half \\ud83d"]


@pytest.fixture
def datasets_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def test_folders_that_were_saved_to_disk(tmp_path):
    splits = {"train": hub_set(["c", "n", "e"], [0, 1, 2]), "validation_m": hub_set(["c", "n", "e"], [2])}
    DatasetDict(splits).save_to_disk(tmp_path / "both")
    splits["train"].save_to_disk(tmp_path / "one")
    for folder in ("both", "one"):
        assert list(load_pairs(str(tmp_path / folder), "train")["label"]) == [2, 1, 0]
        assert not has_split(str(tmp_path / folder), "validation")
    args = TrainDataConfig(dataset_name=str(tmp_path / "both"), validation_split="validation_m")
    assert len(load_train_and_validation(args, seed=0)["validation"]) == 1
    with pytest.raises(sources.SourceMissing, match="both has no split test; it has train, validation_m"):
        load_pairs(str(tmp_path / "both"), "test")
    with pytest.raises(sources.SourceMissing, match="one has no split test; it has one table, without splits"):
        load_pairs(str(tmp_path / "one"), "test")
    evaluation = EvalConfig(run="run", dataset_name=str(tmp_path / "one"))
    assert len(load_evaluation_sets(evaluation, trained_on=args)[0].pairs) == 3


@pytest.mark.parametrize("has_card", [True, False])
def test_folders_of_hf_download(tmp_path, datasets_cache, has_card):
    folder = tmp_path / "set"
    (folder / "data").mkdir(parents=True)
    hub_set(["c", "n", "e"], [0, 1, 2]).to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    hub_set(["c", "n", "e"], [2]).to_parquet(folder / "data" / "validation-00000-of-00001.parquet")
    names = ("train", "validation")
    if has_card:
        names = ("train_r1", "dev_r1")
        (folder / "README.md").write_text(
            "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train_r1\n    path: data/train-*\n"
            "  - split: dev_r1\n    path: data/validation-*\n---\n"
        )
        with pytest.raises(
            sources.SourceMissing, match="has no split train; it has train_r1, dev_r1 .set train_split and"
        ):
            load_train_and_validation(TrainDataConfig(dataset_name=str(folder)), seed=0)
    args = TrainDataConfig(dataset_name=str(folder), train_split=names[0], validation_split=names[1])
    pairs = load_train_and_validation(args, seed=0)
    assert list(pairs["train"]["label"]) == [2, 1, 0]
    assert list(pairs["validation"]["label"]) == [0]


def test_a_folder_of_folders_says_which_have_files(tmp_path):
    for name in ("R1", "R2"):
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / "train.jsonl", ROWS)
    with pytest.raises(sources.SourceMissing, match="no file for split train; .* its folders R1, R2 have some"):
        load_pairs(str(tmp_path), "train")


def test_splits_of_other_names_on_the_hub(tmp_path):
    script = (
        "from nli_sft.configs import TrainDataConfig as C\n"
        "from nli_sft.data.sources import load_train_and_validation as load\n"
        "try: load(C(dataset_name='me/rounds'), seed=0)\nexcept ValueError as error: print(error)\n"
        "pairs = load(C(dataset_name='me/rounds', train_split='train_r1', validation_split='dev_r1'), seed=0)\n"
        "print(list(pairs['train']['label']), list(pairs['validation']['label']))"
    )
    files = {f"data/{split}-00000-of-00001.parquet": three_pairs() for split in ("train_r1", "dev_r1")}
    with LoopbackHub() as hub:
        hub.add("me/rounds", {"README.md": card("default", "data", ["train_r1", "dev_r1"]), **files}, "dataset")
        environment = os.environ | hub.environment(tmp_path, token=None)
        result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    message, labels = result.stdout.splitlines()
    assert message.startswith("me/rounds has no split train; it has train_r1, dev_r1 (set train_split and")
    assert labels == "[0, 1, 2] [0, 1, 2]"


@pytest.mark.parametrize(
    ("ids", "uids"),
    [
        (["a", "a"], ["a", "a#2"]),
        (["a", "a", "a#2", "a"], ["a", "a#2", "a#2#2", "a#3"]),
        (["a", "a#2", "a"], ["a", "a#2", "a#3"]),
        (["own-all-2", "", float("nan")], ["own-all-2", "own-all-2#2", "own-all-3"]),
    ],
)
def test_repeated_uids_are_made_unique(tmp_path, ids, uids):
    pairs = load_pairs(labelled(tmp_path / "own.jsonl", ["neutral"] * len(ids), id=ids))
    assert list(pairs["uid"]) == uids


def test_a_row_without_the_label_column_is_not_unlabelled(tmp_path):
    renamed = {"sentence1": "A.", "sentence2": "B.", "gold_label": "neutral"}
    for row in (renamed, {"premise": "A.", "hypothesis": "B."}):
        path = write_jsonl(tmp_path / "joined.jsonl", [ROWS[0], row])
        with pytest.raises(
            ValueError, match=r"joined.jsonl row 2 has no label, only .*; if the pair has no label, write null"
        ):
            load_pairs(str(path))


def test_many_unlabelled_pairs_raise_a_warning(tmp_path, caplog):
    load_pairs(labelled(tmp_path / "some.jsonl", ["neutral"] * 20 + ["-"]))
    assert not caplog.messages
    load_pairs(labelled(tmp_path / "some.jsonl", ["neutral"] * 20 + ["-", None, -1.0, "null", "<NA>"]))
    assert "5 rows without a gold label left out" in caplog.text


def test_ambiguous_columns(tmp_path):
    path = tmp_path / "own.csv"
    path.write_text("Premise,PREMISE,hypothesis,label\nA.,B.,C.,neutral\n")
    with pytest.raises(ValueError, match="Premise and PREMISE could each be the premise; rename one"):
        load_pairs(str(path))
    assert load_pairs(str(path), columns={"premise": "PREMISE"})["premise"][0] == "B."
    with pytest.raises(ValueError, match="premise_column and hypothesis_column are both hypothesis"):
        load_pairs(str(path), columns={"premise": "hypothesis"})
    path.write_text("A man sleeps.,He rests.,entailment\nA dog.,A cat.,neutral\n")
    with pytest.raises(ValueError, match=r"label_column; is the first line the heading\?$"):
        load_pairs(str(path))


@pytest.mark.parametrize("blank", ["\u200b", "\ufeff", "\xa0\u3000", "\x01\x02", "\u202e\u202c"])
def test_texts_without_visible_characters_are_refused(tmp_path, blank):
    with pytest.raises(ValueError, match="blank.jsonl row 1, column premise: the premise is .*; expected text"):
        load_pairs(str(write_jsonl(tmp_path / "blank.jsonl", [{**ROWS[0], "premise": blank}])))


def test_any_visible_character_is_text(tmp_path):
    texts = [
        "\u0301",
        "...",
        "\N{ROCKET}",
        "\u05e9\u05dc\u05d5\u05dd",
        "e\u0301",
        "\u00e9",
        "\u202eabc",
        "x" * 300_000,
    ]
    path = write_jsonl(tmp_path / "seen.jsonl", [{**ROWS[0], "uid": text, "premise": text} for text in texts])
    assert list(load_pairs(str(path))["premise"]) == texts


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": "maybe"}, r"train.jsonl row 2, column label: unknown label 'maybe'; expected one of entailment"),
        ({"label": 7}, r"train.jsonl row 2, column label: unknown label 7"),
        ({"premise": "  "}, r"train.jsonl row 2, column premise: the premise is '  '; expected text"),
        ({"hypothesis": None}, r"train.jsonl row 2, column hypothesis: the hypothesis is missing"),
        ({"hypothesis": 5}, r"train.jsonl row 2, column hypothesis: the hypothesis is 5; expected text"),
        ({"premise": "A \ud83d."}, r"row 2, column premise: the premise holds '\\ud83d', a lone surrogate"),
    ],
)
def test_a_bad_row_is_named(tmp_path, change, message):
    write_jsonl(tmp_path / "train.jsonl", [ROWS[0], {**ROWS[1], **change}])
    with pytest.raises(ValueError, match=message):
        load_pairs(str(tmp_path), "train")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("train.jsonl", '{"premise": "A"}\n{"premise": \n', r"no hypothesis column .*it has premise; name them with"),
        ("train.jsonl", json.dumps(ROWS[0]) + '\n{"premise": \n', r"train.jsonl row 2: not JSON"),
        ("train.jsonl", json.dumps(ROWS[0]) + "\n[1]\n", r"train.jsonl row 2: expected a JSON object, found list"),
        ("train.csv", "premise,hypothesis,label\nA,B\n", r"train.csv row 2: .* is a separator or quote missing"),
        ("train.csv", "premise,hypothesis,label\nA,B,0,9\n", r"train.csv row 2"),
        ("train.jsonl", json.dumps(ROWS[3]), r"no row has a label \(1 without one\)"),
    ],
)
def test_broken_files(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        load_pairs(str(tmp_path), "train")


def test_broken_encodings(tmp_path):
    (tmp_path / "train.jsonl.gz").write_bytes(b"not gzip")
    with pytest.raises(ValueError, match="train.jsonl.gz is not a complete gzip file"):
        load_pairs(str(tmp_path), "train")
    (tmp_path / "latin.csv").write_bytes("premise,hypothesis,label\nCafé,B,0\n".encode("latin-1"))
    with pytest.raises(ValueError, match="latin.csv is not UTF-8"):
        load_pairs(str(tmp_path / "latin.csv"))


def test_missing_sources(tmp_path):
    with pytest.raises(ValueError, match="Hub id, a folder, or a file"):
        load_pairs("./nowhere", "train")
    write(tmp_path, ".jsonl")
    with pytest.raises(ValueError, match=r"no file for split test; it has train.jsonl"):
        load_pairs(str(tmp_path), "test")
    with pytest.raises(ValueError, match=r"single file, so it has no test split"):
        load_pairs(str(tmp_path / "train.jsonl"), "test")
    write(tmp_path, ".csv")
    with pytest.raises(ValueError, match=r"train.csv and train.jsonl could each be split train"):
        load_pairs(str(tmp_path), "train")
    with pytest.raises(ValueError, match="not on the Hub or the Hub is unreachable"):
        load_pairs("nobody/nothing", "train")


RTE = ("entailment", "not_entailment")
FEVER = ("SUPPORTS", "REFUTES", "NOT ENOUGH INFO")
STEPS = ("1", "2", "3", "4", "5")


@pytest.mark.parametrize(
    ("labels", "written", "ids"),
    [
        (RTE, ["entailment", "not_entailment", "non-entailment"], [0, 1, 1]),  # GLUE's, and as HANS writes it
        (("entails", "neutral"), ["neutral", "entails"], [1, 0]),  # SciTail
        (("Entailment", "Contradiction", "NotMentioned"), ["NotMentioned", "Entailment"], [2, 0]),  # ContractNLI
        (FEVER, ["REFUTES", "NOT ENOUGH INFO", "Not_enough_info", "supports"], [1, 2, 2, 0]),
        (STEPS, [5, "1", 3.0, "5.0"], [4, 0, 2, 4]),
        (("favor", "against", "none"), ["none", None, "-", "AGAINST"], [2, 1]),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_labels_of_another_label_set(tmp_path, labels, written, ids, suffix):
    rows = [{"premise": "A.", "hypothesis": f"B {n}.", "label": label} for n, label in enumerate(written)]
    pairs = load_pairs(str(write(tmp_path, suffix, rows)), labels=labels)
    assert pairs.features["label"].names == list(labels)
    assert list(pairs["label"]) == ids


@pytest.mark.parametrize("names", [["not_entailment", "entailment"], ["entailment", "not_entailment"]])
def test_names_of_a_parquet_file_and_of_a_hub_set_are_those_of_the_label_set(tmp_path, names):
    table = hub_set(names, [0, 1, 1])
    table.to_parquet(tmp_path / "rte.parquet")
    DatasetDict({"train": table}).save_to_disk(tmp_path / "set")
    for source in ("rte.parquet", "set"):
        pairs = load_pairs(str(tmp_path / source), "train", labels=RTE)
        assert [RTE[label] for label in pairs["label"]] == [names[0], names[1], names[1]]


@pytest.mark.parametrize("written", [[0, 1, 1], ["1", "0"], ["supported", 1], [7, 9]])
def test_ids_without_names_are_refused_unless_spelled_out(tmp_path, written):
    labels = ("supported", "not_supported")
    path = labelled(tmp_path / "claims.jsonl", written)
    with pytest.raises(
        UserError,
        match=r"claims.jsonl: (some labels are|the only labels are) .*, whose meaning is "
        r"unknown; set label_spellings to the labels for supported, not_supported, in that order, such",
    ):
        load_pairs(path, labels=labels)
    if "supported" not in written:
        spelled = load_pairs(path, labels=labels, label_spellings=sorted({str(one) for one in written}, reverse=True))
        assert spelled.features["label"].names == list(labels)
        assert spelled["label"][0] == (str(written[0]) != max(map(str, written)))


def test_names_beside_the_ids_of_another_label_set(tmp_path, caplog):
    beside = {"label_text": ["not supported", "Supported", None, "supported"]}
    path = labelled(tmp_path / "claims.jsonl", [1, 0, 0, 0], **beside)
    assert list(load_pairs(path, labels=("supported", "not_supported"))["label"]) == [1, 0, 0, 0]
    assert "read by the names beside them: 0 is supported, 1 is not_supported" in caplog.text


def test_a_set_with_other_labels_is_refused_with_both_label_sets(tmp_path):
    hans = labelled(tmp_path / "hans.jsonl", ["non-entailment", "entailment", "non-entailment"])
    with pytest.raises(
        UserError,
        match=r"hans.jsonl row 1, column label: unknown label 'non-entailment'; expected one "
        r"of SUPPORTS, REFUTES, NOT ENOUGH INFO, .* \(the column has non-entailment, entailment\)",
    ):
        load_pairs(hans, labels=FEVER)
    with pytest.raises(
        UserError, match="label_spellings has 3 entries; give one each for entailment, not_entailment, in"
    ):
        load_pairs(hans, labels=RTE, label_spellings=["a", "b", "c"])


def test_annotators_of_another_label_set_are_counted(tmp_path):
    beside = {"annotator_labels": [["supports", "SUPPORTS", "refutes"], ["REFUTES", "sports"]]}
    pairs = load_pairs(labelled(tmp_path / "fever.jsonl", ["SUPPORTS", "REFUTES"], **beside), labels=FEVER)
    assert list(pairs["label_counts"]) == [[2, 1, 0], None]
    counts = {"label_counts": [[4, 1, 0, 0, 0], [1, 2, 2]]}
    pairs = load_pairs(labelled(tmp_path / "steps.jsonl", [1, 2], **counts), labels=STEPS)
    assert list(pairs["label_counts"]) == [[4, 1, 0, 0, 0], None], "as many counts as labels"


def test_a_recipe_reads_all_its_sources_in_its_labels(tmp_path):
    rows = [{**ROWS[0], "uid": n, "premise": f"Man {n}.", "label": RTE[n % 2]} for n in range(40)]
    own, more = (str(write(tmp_path, ".jsonl", rows, name)) for name in ("own", "more"))
    recipe = TrainDataConfig(dataset_name=own, train_mix=[f"{more}=0.5"], balance="label", max_train_samples=30)
    mixture = {}
    pairs = load_train_and_validation(recipe, labels=RTE, seed=0, mixture=mixture)
    assert {split: pairs[split].features["label"].names for split in pairs} == dict.fromkeys(pairs, list(RTE))
    assert mixture[own]["labels"].keys() == set(RTE)
    (test,) = load_evaluation_sets(EvalConfig(run="run"), trained_on=recipe, labels=RTE)
    assert test.pairs["uid"] == pairs["validation"]["uid"]
    with pytest.raises(UserError, match="unknown label 'entailment'; expected one of yes, no"):
        load_evaluation_sets(EvalConfig(run="run", dataset_name=own), trained_on=recipe, labels=("yes", "no"))


def unusual(folder, name, spellings, premises=6):
    """A file whose columns and labels must be named in the recipe."""
    rows = [{"text": f"Man {n} sleeps.", "claim": "He rests.", "judgement": spellings[n % 3]} for n in range(premises)]
    return str(write(folder, ".csv", rows, name))


def test_other_files_are_read_like_the_source_of_the_run_if_that_fits(tmp_path, caplog):
    columns = {"premise_column": "text", "hypothesis_column": "claim", "label_column": "judgement"}
    run = TrainDataConfig(
        dataset_name=unusual(tmp_path, "own", ["ja", "offen", "nein"]),
        label_spellings=["ja", "offen", "nein"],
        **columns,
    )
    new, usual = unusual(tmp_path, "new", ["ja", "offen", "nein"]), str(write(tmp_path, ".jsonl", name="usual"))
    args = EvalConfig(run="run", dataset_name=new, sources=[usual])
    same, others = load_evaluation_sets(args, trained_on=run)
    assert list(same.pairs["label"]) == [0, 1, 2] * 2
    assert list(others.pairs["label"]) == [0, 1, 2], "which has other columns and labels"
    assert caplog.text.count("is read with premise_column, hypothesis_column") == 1
    args.label_spellings, args.dataset_name = ["y", "m", "n"], unusual(tmp_path, "english", ["y", "m", "n"])
    assert list(load_evaluation_sets(args, trained_on=run)[0].pairs["label"]) == [0, 1, 2] * 2
    args.label_spellings = None
    with pytest.raises(UserError, match="no premise column"):
        load_evaluation_sets(args, trained_on=TrainDataConfig(dataset_name=new))
    with pytest.raises(UserError, match="english.csv row 2, column judgement"):
        load_evaluation_sets(args, trained_on=run)


def test_a_run_without_a_labelled_test_split_is_evaluated_on_validation(tmp_path, caplog):
    columns = {"premise_column": "text", "hypothesis_column": "claim", "label_column": "judgement"}
    file = unusual(tmp_path, "own", ["e", "n", "c"], premises=30)
    run = TrainDataConfig(dataset_name=file, validation_fraction=0.2, **columns)
    held_out = load_train_and_validation(run, seed=0)["validation"]
    for split in (None, "validation", "dev"):
        (found,) = load_evaluation_sets(EvalConfig(run="run", split=split), trained_on=run)
        assert found.pairs["uid"] == held_out["uid"]
    assert caplog.text.count("has no labelled test split. The run is evaluated on its 6 validation pairs") == 1
    with pytest.raises(sources.SourceMissing, match="single file, so it has no test split"):
        load_evaluation_sets(EvalConfig(run="run", split="test"), trained_on=run)

    splits = {"train_r1": [0, 1, 2], "dev_r1": [2, 2], "test": [-1, -1]}
    hub = {name: hub_set(["e", "n", "c"], labels) for name, labels in splits.items()}
    DatasetDict(hub).save_to_disk(tmp_path / "set")
    run = TrainDataConfig(dataset_name=str(tmp_path / "set"), train_split="train_r1", validation_split="dev_r1")
    for split, pairs in ((None, 2), ("validation", 2), ("train", 3), ("dev_r1", 2)):
        (found,) = load_evaluation_sets(EvalConfig(run="run", split=split), trained_on=run)
        assert len(found.pairs) == pairs, split


def test_a_url_is_no_source_with_a_split():
    url = "https://host.invalid/folder/hans.txt"
    for source in (url, f"{url}:test"):
        with pytest.raises(sources.SourceMissing, match=f"^{url} cannot be downloaded"):
            load_evaluation_sets(
                EvalConfig(run="run", dataset_name="demo", max_samples=3, sources=[source]),
                trained_on=TrainDataConfig(dataset_name="demo"),
            )


def hub_set(names, labels):
    features = Features({"premise": Value("string"), "hypothesis": Value("string"), "label": ClassLabel(names=names)})
    return Dataset.from_dict(
        {"premise": ["A."] * len(labels), "hypothesis": ["B."] * len(labels), "label": labels}, features
    )


def test_hub_labels_follow_their_names_not_their_ids(monkeypatch):
    # Sets number their labels in different orders, and -1 must not become the last name.
    hub = hub_set(["contradiction", "entailment", "neutral"], [0, 1, 2, -1])
    monkeypatch.setattr(sources, "get_dataset_split_names", lambda *_, **__: ["train", "validation"])
    monkeypatch.setattr(sources, "load_dataset", lambda *_, **__: hub)
    dropped = Counter()
    pairs = load_pairs("owner/set", "dev", revision="abc", dropped=dropped)
    assert list(pairs["label"]) == [2, 0, 1]
    assert dropped["unlabelled"] == 1
    with pytest.raises(ValueError, match="owner/set has no split test; it has train, validation"):
        load_pairs("owner/set", "test")


def test_hub_revision_and_split_are_passed_on(monkeypatch):
    asked = {}
    monkeypatch.setattr(sources, "get_dataset_split_names", lambda *_, **__: ["validation"])
    monkeypatch.setattr(
        sources,
        "load_dataset",
        lambda *args, **kwargs: asked.update(args=args, **kwargs) or hub_set(list(LABELS), [0]),
    )
    load_pairs("owner/set", "dev", config="plain", revision="abc")
    assert asked == {"args": ("owner/set", "plain"), "split": "validation", "revision": "abc"}


def skewed():
    """300 pairs on 100 premises, half of them neutral."""
    labels = ["neutral", "entailment", "neutral"]
    rows = {"uid": [], "premise": [], "hypothesis": [], "label": []}
    for index in range(300):
        rows["uid"].append(str(index))
        rows["premise"].append(f"Premise {index // 3}.")
        rows["hypothesis"].append(f"Hypothesis {index}.")
        rows["label"].append("contradiction" if index % 6 == 0 else labels[index % 3])
    return sources.pairs_dataset(rows)


def test_subsample_is_exact_stratified_seeded_and_by_premise():
    pairs = skewed()
    whole = np.bincount(pairs["label"], minlength=3) / len(pairs)
    part = subsample(pairs, 60, seed=1)
    assert len(part) == 60
    assert np.abs(np.bincount(part["label"], minlength=3) / 60 - whole).max() < 1 / 60
    # By premise: a sample of 60 random pairs would touch about 47 premises.
    assert len(set(part["premise"])) < 30
    assert list(part["uid"]) == list(subsample(pairs, 60, seed=1)["uid"])
    assert list(part["uid"]) != list(subsample(pairs, 60, seed=2)["uid"])
    assert subsample(pairs, 1000, seed=1) is pairs


def test_hold_out_shares_no_premise():
    kept, held = hold_out(skewed(), 0.1, seed=0)
    assert len(kept) + len(held) == 300
    assert 25 <= len(held) <= 35
    assert not set(kept["premise"]) & set(held["premise"])
    with pytest.raises(ValueError, match="too few premises"):
        hold_out(few_pairs().select(range(3)), 0.5, seed=0)


def test_fingerprint_changes_with_content_and_order_only():
    pairs = few_pairs()
    assert fingerprint(pairs) == fingerprint(few_pairs())
    assert fingerprint(pairs) != fingerprint(pairs.select(range(11, -1, -1)))
    assert fingerprint(pairs) != fingerprint(pairs.select(range(11)))


def test_has_split(tmp_path):
    path = write(tmp_path, ".jsonl")
    assert has_split(str(tmp_path), "train")
    assert not has_split(str(tmp_path), "validation")
    assert not has_split(str(path), "validation")


def test_the_demo_is_a_source_like_any_other():
    test = load_pairs("demo", "test")
    assert test.column_names == ["uid", "premise", "hypothesis", "label", "hard", "rule"]
    assert test.features["label"].names == list(LABELS)
    assert len(set(test["uid"])) == len(test)
    assert not set(test["premise"]) & set(load_pairs("demo", "dev")["premise"])
    assert has_split("demo", "validation")
    assert load_pairs("scenes", "test")["uid"] == test["uid"], "the name in recipes of version 0.1"
    with pytest.raises(ValueError, match="no file for split dev_matched; it has test.parquet, train.parquet"):
        load_pairs("demo", "dev_matched")


def test_the_temperature_is_fitted_on_premises_not_evaluated(tmp_path, caplog):
    rows = [
        {"premise": f"Premise {k // 3}.", "hypothesis": f"Hypothesis {k}.", "label": LABELS[k % 3]} for k in range(450)
    ]
    write_jsonl(tmp_path / "dev.jsonl", rows)
    write_jsonl(tmp_path / "train.jsonl", rows)
    evaluated = load_pairs(str(tmp_path), "dev").select(range(30))
    sets = [EvaluationSet("some", "test", evaluated, 0)]
    trained_on = TrainDataConfig(dataset_name=str(tmp_path))
    pairs = load_calibration_pairs(EvalConfig(run="run"), trained_on=trained_on, seed=0, sets=sets)
    assert len(pairs) == 420
    assert not set(pairs["premise"]) & set(evaluated["premise"])
    few = load_calibration_pairs(
        EvalConfig(run="run", calibration_pairs=120), trained_on=trained_on, seed=0, sets=sets
    )
    assert len(few) == 120
    assert (
        load_calibration_pairs(EvalConfig(run="run", calibration_pairs=0), trained_on=trained_on, seed=0, sets=[])
        is None
    )

    (tmp_path / "dev.jsonl").unlink()  # the pairs held out from training are used
    held = load_calibration_pairs(
        EvalConfig(run="run"), trained_on=replace(trained_on, validation_fraction=0.5), seed=3, sets=sets
    )
    assert set(held["uid"]) <= set(hold_out(load_pairs(str(tmp_path), "train"), 0.5, VALIDATION_SEED)[1]["uid"])

    for name, evaluation_sets, why in [
        ("nobody/nothing", sets, "cannot be loaded"),
        (str(tmp_path), [EvaluationSet("all", "dev", load_pairs(str(tmp_path), "train"), 0)], "0 validation pairs"),
    ]:
        caplog.clear()
        assert (
            load_calibration_pairs(
                EvalConfig(run="run"), trained_on=TrainDataConfig(dataset_name=name), seed=0, sets=evaluation_sets
            )
            is None
        )
        assert why in caplog.text


def numbered(n, label="neutral", per_premise=3, text="Premise"):
    """Pairs of one label, with this many per premise."""
    return [
        {"uid": str(k), "premise": f"{text} {k // per_premise}.", "hypothesis": f"{text} {label} {k}.", "label": label}
        for k in range(n)
    ]


def test_runs_with_different_seeds_are_validated_on_the_same_pairs(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [row for label in LABELS for row in numbered(60, label, text=label)])
    args = TrainDataConfig(dataset_name=str(tmp_path), max_train_samples=30, max_eval_samples=9)

    def of_seeds():
        return [load_train_and_validation(args, seed=seed) for seed in (1, 2)]

    one, other = of_seeds()
    assert fingerprint(one["validation"]) == fingerprint(other["validation"]), "a sample of held-out pairs"
    assert fingerprint(one["train"]) != fingerprint(other["train"])
    write_jsonl(tmp_path / "dev.jsonl", [row for label in LABELS for row in numbered(60, label, text=f"Dev {label}")])
    one, other = of_seeds()
    assert fingerprint(one["validation"]) == fingerprint(other["validation"]), "a sample of a split"


def test_sources_are_mixed_by_weight_without_premises_of_validation(tmp_path):
    folder = tmp_path / "own"
    folder.mkdir()
    own = [row for label in LABELS for row in numbered(20, label)]
    write_jsonl(folder / "train.jsonl", [{**row, "uid": f"{row['label']}-{row['uid']}"} for row in own])
    write_jsonl(folder / "dev.jsonl", numbered(30, text="Other"))
    other = [row for label in LABELS for row in numbered(60, label, text="Other")]
    unlabelled = [{**other[0], "label": "-"}] * 2
    write_jsonl(tmp_path / "other.jsonl", [{**row, "subset": "x"} for row in other + unlabelled])
    args = TrainDataConfig(dataset_name=str(folder), train_mix=[f"{tmp_path / 'other.jsonl'}=0.5", "demo=0.25"])
    dropped, mixture = Counter(), {}
    train = load_train_and_validation(args, seed=0, dropped=dropped, mixture=mixture)["train"]
    assert train.column_names == ["uid", "premise", "hypothesis", "label"]
    by_source = Counter(
        "other" if uid.startswith("other.jsonl/") else uid.partition("/")[0] == "demo" for uid in train["uid"]
    )
    assert by_source == {False: 60, "other": 30, True: 15}
    assert len(set(train["uid"])) == 105
    held_out = {f"Other {k}." for k in range(10)}
    assert not held_out & set(train["premise"])
    assert dropped == {"mixed_premise_in_validation": 90, "unlabelled": 2}
    assert mixture == {
        str(folder): {"pairs": 60, "labels": dict.fromkeys(LABELS, 20), "dropped": {}},
        str(tmp_path / "other.jsonl"): {
            "pairs": 30,
            "labels": dict.fromkeys(LABELS, 10),
            "dropped": {"unlabelled": 2, "mixed_premise_in_validation": 90},
        },
        "demo": {"pairs": 15, "labels": dict.fromkeys(LABELS, 5), "dropped": {}},
    }
    assert np.bincount(train["label"]).tolist() == [35, 35, 35]
    again = load_train_and_validation(args, seed=0)["train"]
    assert fingerprint(again) == fingerprint(train)
    assert fingerprint(load_train_and_validation(args, seed=1)["train"]) != fingerprint(train)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("demo", "'demo' is not source=weight"),
        ("demo=much", "'demo=much' is not source=weight"),
        ("demo=0", "not source=weight with a weight above 0"),
        ("{other}=2", "needs 60 pairs, but .*other.jsonl has 12; lower its weight to 0.4"),
        ("{hans}=0.1", "hans.jsonl has two labels"),
        ("nobody/nothing=1", "not on the Hub"),
    ],
)
def test_invalid_mixtures(tmp_path, entry, message):
    (tmp_path / "own").mkdir()
    write_jsonl(tmp_path / "own" / "train.jsonl", numbered(30))
    write_jsonl(tmp_path / "own" / "dev.jsonl", numbered(3, text="Held"))
    other = write_jsonl(tmp_path / "other.jsonl", numbered(12, text="Other"))
    hans = write_jsonl(
        tmp_path / "hans.jsonl", [{**ROWS[0], "label": label} for label in ("entailment", "non-entailment")]
    )
    args = TrainDataConfig(dataset_name=str(tmp_path / "own"), train_mix=[entry.format(other=other, hans=hans)])
    with pytest.raises(ValueError, match=message):
        load_train_and_validation(args, seed=0)


def test_training_pairs_are_balanced_by_label_or_by_premise(tmp_path):
    rows = numbered(12, "entailment") + numbered(30, "neutral") + numbered(6, "contradiction", per_premise=1)
    write_jsonl(tmp_path / "train.jsonl", [{**row, "uid": f"{row['label']}-{row['uid']}"} for row in rows])
    write_jsonl(tmp_path / "dev.jsonl", numbered(9, text="Held"))
    dropped, mixture = Counter(), {}
    args = TrainDataConfig(dataset_name=str(tmp_path), balance="label")
    both = load_train_and_validation(args, seed=0, dropped=dropped, mixture=mixture)
    assert mixture[str(tmp_path)]["labels"] == dict.fromkeys(LABELS, 6), "the labels after balancing"
    assert np.bincount(both["train"]["label"]).tolist() == [6, 6, 6]
    assert dropped["left_out_for_balance"] == 30
    assert len(both["validation"]) == 9
    by_premise = load_train_and_validation(replace(args, balance="premise"), seed=0)["train"]
    assert Counter(zip(by_premise["premise"], by_premise["label"], strict=True)).most_common(1)[0][1] == 1
    assert np.bincount(by_premise["label"]).tolist() == [4, 10, 6], (
        "one pair of each label on each premise that has it"
    )
    other = load_train_and_validation(replace(args, balance="premise"), seed=1)["train"]
    assert set(other["uid"]) != set(by_premise["uid"]), "which pair stands for its premise is drawn"


def test_pairs_are_recognised_in_any_case_and_white_space():
    def keys(*texts):
        return sources.pair_hashes(Dataset.from_list([{"premise": p, "hypothesis": h} for p, h in texts])).tolist()

    asked = [("A dog.", "An animal."), (" a  DOG.", "an animal.\n"), ("A dog. An", "animal."), ("A dog.", "A cat.")]
    first, *others = keys(*asked)
    assert [other == first for other in others] == [True, False, False]
