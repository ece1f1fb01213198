from collections import Counter
from pathlib import Path

import pytest
from tiny import write_jsonl

from nli_sft import UserError
from nli_sft.configs import EvalConfig
from nli_sft.sources import pairs_dataset
from nli_sft.suites import link_edits, load_suite, load_suite_sets

ROOT_SUITES = Path(__file__).parents[1] / "recipes" / "suites"


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


def test_a_suite_takes_files_by_name_of_the_set_and_tells_what_is_missing(tmp_path):
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
    assert "not on the Hub, or the Hub is out of reach" in missing["fourth"]
    assert missing["fifth"] == f"there is no fifth in suite_root {root}"
    (root / "fifth").mkdir()
    _, missing = load_suite_sets(suite, EvalConfig(run="run", suite="own", suite_root=str(root)))
    assert missing["fifth"] == f"{root / 'fifth'} has no file for a test or validation split"


def test_a_set_that_is_there_and_broken_is_an_error_and_not_missing(tmp_path):
    write_jsonl(tmp_path / "first.jsonl", [{"premise": "A.", "hypothesis": "B.", "label": "so"}])
    suite = suite_file(tmp_path, "sets: {first: }")
    with pytest.raises(UserError, match="first.jsonl row 1, column label: unknown label 'so'"):
        load_suite_sets(suite, EvalConfig(run="run", suite="own", suite_root=str(tmp_path)))


def test_edits_are_linked_to_the_pair_that_they_were_made_of(tmp_path):
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
    for name, pairs in (("originals", originals), ("counterfactual", edited)):
        (tmp_path / name).mkdir()
        lines = [f"{p['premise']}\t{p['hypothesis']}\t{pairs.features['label'].names[p['label']]}\n" for p in pairs]
        (tmp_path / name / "test.tsv").write_text(header + "".join(lines))
    suite = suite_file(tmp_path, "sets: {counterfactual: {originals: originals}}")
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
        ("a: b", "a suite has the key sets"),
        ("sets: {a: {part_of: b}}", "set a: part_of 'b' is not a set listed before it"),
        ("sets: [", "not YAML"),
        ("sets: {a: {split: x}, a: }", "key 'a' stands on lines 1 and 1; keep one"),
    ],
)
def test_a_suite_that_cannot_be_meant(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        suite_file(tmp_path, text)


def test_without_any_set_there_is_nothing_to_judge(tmp_path):
    suite = suite_file(tmp_path, "sets: {a: }")
    with pytest.raises(UserError, match="none of its sets can be had; there is no a in suite_root"):
        load_suite_sets(suite, EvalConfig(run="run", suite="own"))
    with pytest.raises(UserError, match="suite_root nowhere is not a folder"):
        load_suite_sets(suite, EvalConfig(run="run", suite="own", suite_root="nowhere"))
    with pytest.raises(UserError, match="'stres' is neither a .yaml file that is there nor one of stress"):
        load_suite("stres", ROOT_SUITES)


def test_the_stress_suite_holds_what_it_promises():
    suite = load_suite("stress", ROOT_SUITES)
    names = "snli snli_hard mnli_matched mnli_mismatched anli_r1 anli_r2 anli_r3 hans breaking_nli sick"
    assert [one.name for one in suite.sets] == [*names.split(), "chaosnli_snli", "chaosnli_mnli", "counterfactual"]
    assert suite.checks.label_order_pairs
    assert suite.checks.prompt_pairs
    pinned = [one.dataset_revision for one in suite.sets if one.dataset_revision is not None]
    assert all(len(revision) == 40 for revision in pinned)


def test_a_suite_is_not_mixed_with_other_sources():
    with pytest.raises(UserError, match="suite lists its own sets"):
        EvalConfig(run="run", suite="stress", sources=["a.jsonl"])
    with pytest.raises(UserError, match="name one with --suite"):
        EvalConfig(run="run", suite_root="folder")
