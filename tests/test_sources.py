import csv
import gzip
import json
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from tiny import few_pairs, write_jsonl

from nli_sft import sources
from nli_sft.labels import LABELS
from nli_sft.sources import fingerprint, has_split, hold_out, load_pairs, subsample

ROWS = [
    {"uid": "a", "premise": "A man sleeps.", "hypothesis": "A person rests.", "label": "entailment"},
    {"uid": "b", "premise": "A man sleeps.", "hypothesis": 'He said "no".', "label": "Neutral"},
    {"uid": "c", "premise": "A man sleeps.", "hypothesis": "A man runs, fast.", "label": 2},
    {"uid": "d", "premise": "A man sleeps.", "hypothesis": "A man snores.", "label": "-"},
]


def write(folder, suffix, rows=ROWS, name="train"):
    path = folder / f"{name}{suffix}"
    if suffix == ".jsonl":
        return write_jsonl(path, rows)
    if suffix == ".jsonl.gz":
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
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


@pytest.mark.parametrize("suffix", sources.SUFFIXES)
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


def test_named_columns_and_spellings(tmp_path):
    path = tmp_path / "own.csv"
    path.write_text("text,claim,verdict\nA man.,A person.,yes\nA man.,A cat.,no\nA man.,A father.,?\n")
    columns = {"premise": "text", "hypothesis": "claim", "label": "verdict"}
    pairs = load_pairs(str(path), columns=columns, label_spellings=["yes", "?", "no"])
    assert list(pairs["label"]) == [0, 2, 1]


def test_repeated_uids_are_told_apart(tmp_path):
    pairs = load_pairs(str(write_jsonl(tmp_path / "train.jsonl", [ROWS[0], ROWS[0]])))
    assert list(pairs["uid"]) == ["a", "a#2"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": "maybe"}, r"train.jsonl row 2: unknown label 'maybe'; expected one of entailment"),
        ({"label": 7}, r"train.jsonl row 2: unknown label 7"),
        ({"premise": "  "}, r"train.jsonl row 2: the premise is '  '; expected text"),
        ({"hypothesis": None}, r"train.jsonl row 2: the hypothesis is missing"),
    ],
)
def test_a_bad_row_is_named(tmp_path, change, message):
    write_jsonl(tmp_path / "train.jsonl", [ROWS[0], {**ROWS[1], **change}])
    with pytest.raises(ValueError, match=message):
        load_pairs(str(tmp_path), "train")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("train.jsonl", '{"premise": "A"}\n{"premise": \n', r"no hypothesis column .*it has premise; name it with"),
        ("train.jsonl", json.dumps(ROWS[0]) + '\n{"premise": \n', r"train.jsonl row 2: not JSON"),
        ("train.jsonl", json.dumps(ROWS[0]) + "\n[1]\n", r"train.jsonl row 2: expected a JSON object, found list"),
        ("train.csv", "premise,hypothesis,label\nA,B\n", r"train.csv row 2: .* is a separator or quote missing"),
        ("train.csv", "premise,hypothesis,label\nA,B,0,9\n", r"train.csv row 2"),
        ("train.jsonl", json.dumps(ROWS[3]), r"no labelled pair in it \(1 rows have no label\)"),
    ],
)
def test_broken_files(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        load_pairs(str(tmp_path), "train")


def test_broken_encodings(tmp_path):
    (tmp_path / "train.jsonl.gz").write_bytes(b"not gzip")
    with pytest.raises(ValueError, match="train.jsonl.gz is not a whole gzip file"):
        load_pairs(str(tmp_path), "train")
    (tmp_path / "latin.csv").write_bytes("premise,hypothesis,label\nCafé,B,0\n".encode("latin-1"))
    with pytest.raises(ValueError, match="latin.csv is not UTF-8"):
        load_pairs(str(tmp_path / "latin.csv"))


def test_what_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="Hub id, a folder or a file"):
        load_pairs("./nowhere", "train")
    write(tmp_path, ".jsonl")
    with pytest.raises(ValueError, match=r"no file for split test; it has train.jsonl"):
        load_pairs(str(tmp_path), "test")
    with pytest.raises(ValueError, match=r"single file, so it has no test split"):
        load_pairs(str(tmp_path / "train.jsonl"), "test")
    write(tmp_path, ".csv")
    with pytest.raises(ValueError, match=r"train.csv and train.jsonl could each be split train"):
        load_pairs(str(tmp_path), "train")
    with pytest.raises(ValueError, match="not on the Hub, or the Hub is out of reach"):
        load_pairs("nobody/nothing", "train")


def hub_set(names, labels):
    features = Features({"premise": Value("string"), "hypothesis": Value("string"), "label": ClassLabel(names=names)})
    return Dataset.from_dict(
        {"premise": ["A."] * len(labels), "hypothesis": ["B."] * len(labels), "label": labels}, features
    )


def test_hub_labels_go_by_their_names_not_their_ids(monkeypatch):
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


def test_scenes_are_a_source_like_any_other():
    test = load_pairs("scenes", "test")
    assert test.column_names == ["uid", "premise", "hypothesis", "label", "hard", "rule"]
    assert test.features["label"].names == list(LABELS)
    assert len(set(test["uid"])) == len(test)
    assert not set(test["premise"]) & set(load_pairs("scenes", "dev")["premise"])
    assert has_split("scenes", "validation")
    with pytest.raises(ValueError, match="scenes has no split dev_matched; it has train, validation, test"):
        load_pairs("scenes", "dev_matched")
