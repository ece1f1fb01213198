"""Fixtures, and an environment without a network."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Tiny models are slower with several threads, and much slower on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from tiny import TOKENIZERS, chatml_tokenizer, few_pairs, tiny_llama, write_jsonl

from nli_sft.labels import LABELS


def pytest_collection_modifyitems(items):
    """Run the files that launch scripts first: they take longest, so workers would wait for them at the end."""
    items.sort(key=lambda item: "recipes" not in item.path.parts)


@pytest.fixture(scope="session", params=TOKENIZERS)
def any_tokenizer(request):
    return TOKENIZERS[request.param]()


@pytest.fixture(scope="session")
def chatml():
    return chatml_tokenizer()


@pytest.fixture(scope="session")
def workspace(tmp_path_factory):
    """A folder with a tiny base model and a small data set, for tests that launch the scripts."""
    folder = tmp_path_factory.mktemp("workspace")
    tokenizer = chatml_tokenizer()
    tokenizer.save_pretrained(folder / "base")
    tiny_llama(len(tokenizer)).save_pretrained(folder / "base")
    (folder / "data").mkdir()
    for split, copies in (("train", 8), ("dev", 2), ("test", 3)):
        rows = [
            {
                "uid": f"{split}-{row['uid']}",
                **{k: row[k] for k in ("premise", "hypothesis")},
                "label": LABELS[row["label"]],
            }
            for row in few_pairs(copies)
        ]
        if split == "train":
            rows.append({"uid": "unlabelled", "premise": "A dog.", "hypothesis": "A cat.", "label": "-"})
        write_jsonl(folder / "data" / f"{split}.jsonl", rows)
    return folder
