import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from loopback_hub import LoopbackHub
from published_sets import publish, three_pairs
from tiny import write_jsonl

from nli_sft import UserError
from nli_sft.configs import EvalConfig
from nli_sft.data import sources
from nli_sft.data.sources import pairs_dataset
from nli_sft.evaluation import suites
from nli_sft.evaluation.suites import link_edits, load_suite, load_suite_sets
from nli_sft.labels import LABELS

ROOT_SUITES = Path(__file__).parents[2] / "recipes" / "suites"


def rows(n=6, **columns):
    return [
        {"premise": f"Premise {k // 2}.", "hypothesis": f"Hypothesis {k}.", "label": k % 3}
        | {c: v[k] for c, v in columns.items()}
        for k in range(n)
    ]


def suite_file(folder, text):
    path = folder / "own.yaml"
    path.write_text(text)
    return load_suite(str(path), ROOT_SUITES)


def test_a_suite_reads_files_by_set_name_and_lists_missing_sets(tmp_path):
    root = tmp_path / "root"
    (root / "first").mkdir(parents=True)
    write_jsonl(root / "first" / "train.jsonl", rows(2))
    write_jsonl(root / "first" / "test.jsonl", rows(hard=[True, False] * 3))
    write_jsonl(root / "second.jsonl", rows(4))
    (tmp_path / "third.csv").write_text("text,claim,verdict\nA man.,A person.,yes\nA man.,A cat.,no\n")
    suite = suite_file(
        tmp_path,
        f"""
        sets:
          first: {{dataset_name: nobody/first, split: validation_x}}
          part: {{part_of: first, where: hard}}
          second:
          third:
            dataset_name: {tmp_path / "third.csv"}
            premise_column: text
            hypothesis_column: claim
            label_column: verdict
            label_spellings: ["yes", "unknown", "no"]
          fourth: {{dataset_name: nobody/fourth}}
          fifth:
        label_order_pairs: 10
        """,
    )
    assert suite.name == "own"
    assert suite.checks.label_order_pairs == 10
    sets, missing = load_suite_sets(suite, EvalConfig(run="run", suite="own", suite_root=str(root)))
    assert {one.name: len(one.pairs) for one in sets} == {"first": 6, "part": 3, "second": 4, "third": 2}
    assert sets[0].split == "test", "the split that a suite names is that of its Hub set"
    assert list(sets[1].pairs["hypothesis"]) == ["Hypothesis 0.", "Hypothesis 2.", "Hypothesis 4."]
    assert set(missing) == {"fourth", "fifth"}
    assert "not on the Hub" in missing["fourth"]
    assert missing["fifth"] == f"there is no fifth in suite_root {root}"
    (root / "fifth").mkdir()
    _, missing = load_suite_sets(suite, EvalConfig(run="run", suite="own", suite_root=str(root)))
    assert missing["fifth"] == f"{root / 'fifth'} has no file for a test or validation split"


def test_a_set_that_cannot_be_read_is_an_error_and_not_missing(tmp_path):
    write_jsonl(tmp_path / "first.jsonl", [{"premise": "A.", "hypothesis": "B.", "label": "so"}])
    suite = suite_file(tmp_path, "sets: {first: }")
    with pytest.raises(UserError, match="first.jsonl row 1, column label: unknown label 'so'"):
        load_suite_sets(suite, EvalConfig(run="run", suite="own", suite_root=str(tmp_path)))


def test_edits_are_linked_to_their_originals(tmp_path):
    originals = pairs_dataset(
        {
            "uid": ["1", "2"],
            "premise": ["A man in red sleeps.", "A man in red sleeps."],
            "hypothesis": ["The man is awake.", "The man dreams of his dog."],
            "label": ["contradiction", "neutral"],
        }
    )
    edited = pairs_dataset(
        {
            "uid": ["1", "2", "3", "4"],
            "premise": ["A man in red sleeps.", "A man in red walks.", "A man in red sleeps.", "Two dogs."],
            "hypothesis": ["The man is asleep.", "The man is awake.", "The man does not dream of his dog.", "A cat."],
            "label": ["entailment", "entailment", "contradiction", "neutral"],
        }
    )
    dropped = Counter()
    linked = link_edits(originals, edited, dropped)
    assert dict(zip(linked["uid"], linked["edit_of"], strict=True)) == {
        "1": None,
        "2": None,
        "edit-1": "1",
        "edit-2": "1",
        "edit-3": "2",
    }
    assert dropped == {"unlinked": 1}

    header = "sentence1\tsentence2\tgold_label\n"
    for name, pairs in (("counterfactual_originals", originals), ("counterfactual", edited)):
        (tmp_path / name).mkdir()
        lines = [f"{p['premise']}\t{p['hypothesis']}\t{pairs.features['label'].names[p['label']]}\n" for p in pairs]
        (tmp_path / name / "test.tsv").write_text(header + "".join(lines))
    suite = suite_file(tmp_path, "sets: {counterfactual: {originals: nobody/originals}}")
    args = EvalConfig(run="run", suite="own", suite_root=str(tmp_path))
    (one,), missing = load_suite_sets(suite, args)
    assert len(one.pairs) == 5
    assert one.unlinked == 1
    assert not missing
    (one,), _ = load_suite_sets(suite, EvalConfig(run="run", suite="own", suite_root=str(tmp_path), max_samples=4))
    assert set(one.pairs["edit_of"]) - {None} <= set(one.pairs["uid"]), "an edit stays with its original"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sets: {a: {datset_name: x}}", "set a: unknown key 'datset_name'; did you mean 'dataset_name'"),
        ("sets: {a: }\nlabel_order: 3", "unknown key 'label_order'; did you mean 'label_order_pairs'"),
        ("a: b", "the key sets is missing or empty"),
        ("sets: {a: {part_of: b}}", "set a: part_of 'b' is not a set listed before this one"),
        ("sets: [", "not YAML"),
        ("sets: {a: {split: x}, a: }", "key 'a' is on lines 1 and 1; keep one"),
    ],
)
def test_an_invalid_suite(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        suite_file(tmp_path, text)


def test_a_suite_without_any_set_is_an_error(tmp_path):
    suite = suite_file(tmp_path, "sets: {a: }")
    with pytest.raises(UserError, match="none of its sets can be loaded; there is no a in suite_root"):
        load_suite_sets(suite, EvalConfig(run="run", suite="own"))
    with pytest.raises(UserError, match="suite_root nowhere is not a folder"):
        load_suite_sets(suite, EvalConfig(run="run", suite="own", suite_root="nowhere"))
    with pytest.raises(UserError, match="'stres' is neither an existing .yaml file nor one of: stress"):
        load_suite("stres", ROOT_SUITES)


def test_the_stress_suite_lists_its_sets():
    suite = load_suite("stress", ROOT_SUITES)
    names = "snli snli_hard mnli_matched mnli_mismatched anli_r1 anli_r2 anli_r3 hans breaking_nli sick"
    assert [one.name for one in suite.sets] == [*names.split(), "chaosnli_snli", "chaosnli_mnli", "counterfactual"]
    assert suite.checks.label_order_pairs
    assert suite.checks.prompt_pairs
    pinned = [one.dataset_revision for one in suite.sets if one.dataset_revision is not None]
    assert all(len(revision) == 40 for revision in pinned)


def test_a_suite_excludes_other_sources():
    with pytest.raises(UserError, match="suite lists its own sets"):
        EvalConfig(run="run", suite="stress", sources=["a.jsonl"])
    with pytest.raises(UserError, match="name one with --suite"):
        EvalConfig(run="run", suite_root="folder")


def test_the_hub_is_contacted_once(tmp_path, monkeypatch):
    requests = []

    class Unreachable:
        def head(self, url, timeout):
            requests.append((url, timeout))
            raise OSError("no route to host")

    def load(source, *_, **__):
        raise AssertionError(f"{source} was loaded")

    write_jsonl(tmp_path / "here.jsonl", rows())
    text = f"sets: {{here: {{dataset_name: {tmp_path / 'here.jsonl'}}}, "
    suite = suite_file(tmp_path, text + "one: {dataset_name: nobody/one}, two: {dataset_name: nobody/two}}")
    monkeypatch.setattr(suites, "get_session", Unreachable)
    monkeypatch.setattr(suites.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(sources, "get_dataset_split_names", load)
    suites.hub_answers.cache_clear()
    sets, missing = load_suite_sets(suite, EvalConfig(run="run", suite="own"))
    suites.hub_answers.cache_clear()
    assert [one.name for one in sets] == ["here"]
    assert set(missing) == {"one", "two"}
    assert missing["two"].startswith("nobody/two: the Hub cannot be reached and there is no such path")
    assert requests == [(suites.constants.ENDPOINT, suites.HUB_SECONDS)]


# Loads a suite as recipes/eval.py does, in a new process: the address of the Hub is read on import.
LOAD = """
import json, sys
from pathlib import Path
from nli_sft.configs import EvalConfig
from nli_sft.evaluation.suites import load_suite, load_suite_sets
sets, missing = load_suite_sets(load_suite(sys.argv[1], Path()), EvalConfig(run="run", suite="stress"))
loaded = {one.name: {"split": one.split, "unlabelled": one.unlabelled, "rows": one.pairs.to_list(),
    "labels": one.pairs.features["label"].names} for one in sets}
print(json.dumps([loaded, missing]))
"""


def load_in_new_process(suite, hub, cache, **environment):
    result = subprocess.run(
        [sys.executable, "-c", LOAD, str(suite)],
        capture_output=True,
        text=True,
        env=os.environ | hub.environment(cache, token=None) | {"HF_HUB_DOWNLOAD_TIMEOUT": "2"} | environment,
        cwd=suite.parent,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_the_stress_suite_loads_its_sets_as_published(tmp_path):
    """All sets in their published layouts; after the first download also without a network."""
    suite = load_suite("stress", ROOT_SUITES)
    with LoopbackHub() as hub:
        publish(hub, suite)
        text = (ROOT_SUITES / "stress.yaml").read_text()
        for host in ("nlp.stanford.edu", "raw.githubusercontent.com", "zenodo.org"):
            assert f"https://{host}/" in text
            text = text.replace(f"https://{host}/", f"{hub.url}/elsewhere/{host}/")
        (tmp_path / "stress.yaml").write_text(text)
        sets, missing = load_in_new_process(tmp_path / "stress.yaml", hub, tmp_path / "cache")
    again = load_in_new_process(tmp_path / "stress.yaml", hub, tmp_path / "cache", HF_HUB_OFFLINE="1")

    assert missing == {}
    assert list(sets) == [one.name for one in suite.sets]
    assert again == [sets, missing], "downloaded sets load without a network"
    for name in ("snli", "mnli_matched", "mnli_mismatched", "anli_r1", "anli_r2", "anli_r3"):
        assert [row["label"] for row in sets[name]["rows"]] == [0, 1, 2], name
        assert sets[name]["labels"] == list(LABELS)
        assert sets[name]["unlabelled"] == 1
    assert sets["mnli_matched"]["split"] == "validation_matched"
    assert [row["genre"] for row in sets["mnli_matched"]["rows"]] == ["fiction", "travel", "travel"]
    assert [row["uid"] for row in sets["anli_r3"]["rows"]] == ["pair-0", "pair-1", "pair-2"]
    assert [row["label"] for row in sets["snli_hard"]["rows"]] == [1]
    assert sets["hans"]["labels"] == ["entailment", "non-entailment"]
    assert [(row["label"], row["subset"]) for row in sets["hans"]["rows"]] == [
        (1, "lexical_overlap"),
        (0, "constituent"),
    ]
    breaking = [(row["label"], row["subset"], row["label_counts"]) for row in sets["breaking_nli"]["rows"]]
    assert breaking == [(2, "cardinals", [0, 0, 3]), (0, "colors", [2, 1, 0])]
    assert [(row["uid"], row["label"]) for row in sets["sick"]["rows"]] == [("2", 2)], "only its test split"
    for name in ("chaosnli_snli", "chaosnli_mnli"):
        (row,) = sets[name]["rows"]
        assert (row["label"], row["label_counts"], row["premise"]) == (1, [30, 70, 0], "A man sleeps.")
    counterfactual = sets["counterfactual"]["rows"]
    assert [row["edit_of"] for row in counterfactual] == [
        None,
        None,
        counterfactual[0]["uid"],
        counterfactual[1]["uid"],
    ]
    assert counterfactual[3]["premise"] == 'A man says "no" loudly.', (
        "quotes of the file format are not part of the text"
    )


def test_an_unreachable_url_is_listed_as_missing(tmp_path):
    with LoopbackHub() as hub:
        hub.elsewhere["host/page.zip"] = b"<!doctype html>File deleted"
        hub.elsewhere["host/own.csv"] = b"premise,hypothesis,label\nA man.,A person.,entailment\n"
        own = tmp_path / "own.yaml"
        own.write_text(
            f"sets:\n  there: {{dataset_name: '{hub.url}/elsewhere/host/own.csv?x=1'}}\n"
            f"  gone: {{dataset_name: '{hub.url}/elsewhere/host/gone.csv'}}\n"
            f"  page: {{dataset_name: 'zip://a/b.txt::{hub.url}/elsewhere/host/page.zip'}}\n"
        )
        sets, missing = load_in_new_process(own, hub, tmp_path / "cache")
    assert [row["uid"] for row in sets["there"]["rows"]] == ["own-all-1"]
    assert "gone.csv cannot be downloaded (FileNotFoundError" in missing["gone"]
    assert "page.zip cannot be downloaded" in missing["page"]


def test_a_loading_script_is_missing_with_a_hint_where_its_tables_are(tmp_path):
    with LoopbackHub() as hub:
        repository = hub.add("owner/script", {"script.py": b"raise SystemExit", "README.md": b""}, "dataset")
        repository.commit({"plain_text/validation/0000.parquet": three_pairs()}, "refs/convert/parquet")
        own = tmp_path / "own.yaml"
        own.write_text(
            "sets:\n  script: {dataset_name: owner/script, split: validation}\n"
            "  tables: {dataset_name: owner/script, split: validation, dataset_revision: refs/convert/parquet}\n"
        )
        sets, missing = load_in_new_process(own, hub, tmp_path / "cache")
    assert missing["script"].startswith("owner/script is a loading script, which the datasets library no longer runs")
    assert [row["label"] for row in sets["tables"]["rows"]] == [0, 1, 2]


def test_label_spellings_stay_words(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("sets:\n  mine: {dataset_name: mine.csv, label_spellings: [yes, maybe, no]}\n")
    assert load_suite(str(path), tmp_path).sets[0].label_spellings == ["yes", "maybe", "no"]
