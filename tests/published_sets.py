"""The sets of recipes/suites/stress.yaml in their published layout: repositories, files, columns. Rows are invented.

The layout at the commits that the suite names was taken from the pages of the repositories and code that reads them.
"""

import io
import json
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from datasets import ClassLabel, Dataset, Features, Value
from loopback_hub import LoopbackHub

from nli_sft.evaluation.suites import Suite
from nli_sft.labels import LABELS

PREMISE, HYPOTHESES = "A man sleeps.", ("A man rests.", "A man dreams.", "A man runs.")
LABEL = ClassLabel(names=list(LABELS))

HANS = (
    "gold_label\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\tsentence2_parse\tsentence1\t"
    "sentence2\tpairID\theuristic\tsubcase\ttemplate\n"
    "non-entailment\t( )\t( )\t(S)\t(S)\tThe doctor saw the actor .\tThe actor saw the doctor .\tex0\t"
    "lexical_overlap\tln_subject/object_swap\ttemp1\n"
    "entailment\t( )\t( )\t(S)\t(S)\tThe actor slept and ran .\tThe actor slept .\tex1\tconstituent\tce_x\ttemp2\n"
)
SICK = (
    "pair_ID\tsentence_A\tsentence_B\tentailment_label\trelatedness_score\tentailment_AB\tentailment_BA\t"
    "sentence_A_original\tsentence_B_original\tsentence_A_dataset\tsentence_B_dataset\tSemEval_set\n"
    "1\tTwo dogs run\tTwo dogs play\tNEUTRAL\t4.5\tA_neutral_B\tB_neutral_A\ta\tb\tFLICKR\tFLICKR\tTRAIN\n"
    "2\tTwo dogs run\tNo dog runs\tCONTRADICTION\t3.1\tA_contradicts_B\tB_contradicts_A\ta\tb\tFLICKR\tFLICKR\tTEST\n"
)
# A CSV writer has quoted texts that contain quotes.
ORIGINALS = (
    'sentence1\tsentence2\tgold_label\nA man in red sleeps.\tThe man rests.\tentailment\n"A man says ""no"" loudly."\t'
    "A man talks.\tentailment\n"
)
EDITS = (
    "sentence1\tsentence2\tgold_label\nA man in red sleeps.\tThe man runs.\tcontradiction\n"
    '"A man says ""no"" loudly."\tA man is silent.\tcontradiction\n'
)


def parquet(columns: dict[str, list], features: dict) -> bytes:
    file = io.BytesIO()
    Dataset.from_dict(columns, Features(features)).to_parquet(file)
    return file.getvalue()


def three_pairs(**extra: tuple[object, list]) -> bytes:
    """One pair of each label and one without a label, with extra columns {name: (feature, values)}."""
    columns = {"premise": [PREMISE] * 4, "hypothesis": [*HYPOTHESES, "A man."], "label": [0, 1, 2, -1]}
    features = {"premise": Value("string"), "hypothesis": Value("string"), "label": LABEL}
    return parquet(
        columns | {name: values for name, (_, values) in extra.items()},
        features | {name: feature for name, (feature, _) in extra.items()},
    )


def card(config: str, folder: str, splits: list[str]) -> bytes:
    files = [{"split": split, "path": f"{folder}/{split}-*"} for split in splits]
    about = {"license": "unknown", "configs": [{"config_name": config, "data_files": files}]}
    return f"---\n{yaml.safe_dump(about)}---\n# A set\n".encode()


def breaking_nli() -> bytes:
    table = pa.table(
        {
            "sentence1": [PREMISE] * 2,
            "category": ["cardinals", "colors"],
            "gold_label": ["contradiction", "entailment"],
            "annotator_labels": [["contradiction"] * 3, ["entailment", "entailment", "neutral"]],
            "pairID": pa.array([0, 1], pa.int32()),
            "sentence2": HYPOTHESES[:2],
            "label": [2, 0],
        }
    )
    file = io.BytesIO()
    pq.write_table(table, file)
    return file.getvalue()


# As an old version of datasets wrote them, with a configuration named after the repository.
BREAKING_INFOS = {
    "pietrolesci--breaking_nli": {
        "description": "",
        "citation": "",
        "homepage": "",
        "license": "",
        "features": {
            **{name: {"dtype": "string", "id": None, "_type": "Value"} for name in ("sentence1", "category")},
            "gold_label": {"dtype": "string", "id": None, "_type": "Value"},
            "annotator_labels": {
                "feature": {"dtype": "string", "id": None, "_type": "Value"},
                "length": 3,
                "id": None,
                "_type": "Sequence",
            },
            "pairID": {"dtype": "int32", "id": None, "_type": "Value"},
            "sentence2": {"dtype": "string", "id": None, "_type": "Value"},
            "label": {"num_classes": 3, "names": list(LABELS), "names_file": None, "id": None, "_type": "ClassLabel"},
        },
        "post_processed": None,
        "supervised_keys": None,
        "task_templates": None,
        "builder_name": None,
        "config_name": None,
        "version": None,
        "splits": {"full": {"name": "full", "num_bytes": 100, "num_examples": 2, "dataset_name": "breaking_nli"}},
        "download_checksums": None,
        "download_size": 100,
        "post_processing_size": None,
        "dataset_size": 100,
        "size_in_bytes": 200,
    }
}


def chaos(source: str) -> bytes:
    row = {
        "uid": f"{source}-1",
        "label_counter": {"e": 30, "n": 70},
        "majority_label": "n",
        "label_dist": [0.3, 0.7, 0.0],
        "label_count": [30, 70, 0],
        "entropy": 0.88,
        "example": {"uid": f"{source}-1", "premise": PREMISE, "hypothesis": HYPOTHESES[1], "source": source},
        "old_label": "n",
        "old_labels": ["neutral", "neutral", "entailment", "neutral", "neutral"],
    }
    return json.dumps(row).encode() + b"\n"


def publish(hub: LoopbackHub, suite: Suite) -> None:
    """Put the sets on `hub`, each at the commit or URL that the suite names."""
    text = Value("string")
    uids = (text, [f"pair-{n}" for n in range(4)])
    rounds = [f"{split}_r{n}" for n in (1, 2, 3) for split in ("train", "dev", "test")]
    mnli = {"genre": (text, ["fiction", "travel", "travel", "fiction"]), "pairID": uids, "premise_parse": uids}
    matched = ["train", "validation_matched", "validation_mismatched"]
    layouts = {
        "stanfordnlp/snli": {
            "README.md": card("plain_text", "plain_text", ["test", "validation", "train"]),
            **{
                f"plain_text/{split}-00000-of-00001.parquet": three_pairs()
                for split in ("test", "train", "validation")
            },
        },
        "nyu-mll/multi_nli": {
            "README.md": card("default", "data", matched),
            **{f"data/{split}-00000-of-00001.parquet": three_pairs(**mnli) for split in matched},
        },
        "facebook/anli": {
            "README.md": card("plain_text", "plain_text", rounds),
            **{
                f"plain_text/{split}-00000-of-00001.parquet": three_pairs(uid=uids, reason=(text, [""] * 4))
                for split in rounds
            },
        },
        "pietrolesci/breaking_nli": {
            ".gitattributes": b"",
            "dataset_infos.json": json.dumps(BREAKING_INFOS).encode(),
            "data/full-00000-of-00001.parquet": breaking_nli(),
        },
    }
    for one in suite.sets:
        if one.dataset_name in layouts:
            if ("dataset", one.dataset_name) not in hub.repositories:
                # A later commit, which the suite must not read.
                hub.add(one.dataset_name, {"README.md": b"emptied"}, "dataset")
            hub.repositories["dataset", one.dataset_name].commits[one.dataset_revision] = layouts[one.dataset_name]
    named = {one.name: one for one in suite.sets}
    on_hub = named["chaosnli_snli"].dataset_name.removeprefix("https://huggingface.co/datasets/").split("/")
    repository = hub.add("/".join(on_hub[:2]), {"README.md": b""}, "dataset")
    repository.commits[on_hub[3]] = {f"raw/chaosNLI_{source}.jsonl": chaos(source) for source in ("snli", "mnli_m")}

    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as files:
        files.writestr("SICK.txt", SICK)
        files.writestr("readme.txt", "About the set")
    hard = {"gold_label": "neutral", "sentence1": PREMISE, "sentence2": HYPOTHESES[1], "pairID": "1#0r1n"}
    published = {
        named["snli_hard"].dataset_name: json.dumps(hard).encode() + b"\n",
        named["hans"].dataset_name: HANS.encode(),
        named["sick"].dataset_name.partition("::")[2].partition("?")[0]: archive.getvalue(),
        named["counterfactual"].dataset_name: EDITS.encode(),
        named["counterfactual"].originals: ORIGINALS.encode(),
    }
    hub.elsewhere |= {url.removeprefix("https://"): data for url, data in published.items()}
