"""Pairs from the Hub or from files, checked row by row.

A source is named as users name data: a Hub id (`stanfordnlp/snli`), a folder with one file a split, a single file, the
URL of one, or `demo`, which is built in and needs no network. Whatever it is, `load_pairs` gives the same four
columns, and says which file and row is wrong when one is.
"""

import hashlib
import json
import logging
import math
import re
import reprlib
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    DownloadConfig,
    DownloadManager,
    Features,
    List,
    Value,
    concatenate_datasets,
    get_dataset_split_names,
    load_dataset,
    load_from_disk,
)
from huggingface_hub import hf_hub_download, metadata_load

from .. import UserError
from ..configs import DataConfig, TrainDataConfig
from ..labels import LABELS, TWO_WAY_LABELS, UNLABELLED, check_spellings, is_id, is_name, is_two_way_name, parse_label
from .demo import DEMO, PAIRS, is_demo
from .files import FORMATS, is_data_file, label_names, read_columns, read_rows

logger = logging.getLogger(__name__)

# Of what is drawn for validation, whatever the seed of a run: runs that differ in their seeds are judged on the same.
VALIDATION_SEED = 42

# The names under which the usual NLI sets keep our columns (SNLI, MNLI, ANLI, SICK, HANS, Breaking NLI, ChaosNLI, and
# the benchmarks made of them); the first one that a set has is taken. A dot stands before a column inside another.
COLUMN_NAMES = {
    "premise": ("premise", "sentence1", "context", "sentence_A", "example.premise"),
    "hypothesis": ("hypothesis", "sentence2", "sentence_B", "example.hypothesis"),
    "label": ("gold_label", "label", "majority_label", "entailment_label", "entailment_judgment"),
    "uid": ("uid", "pairID", "pair_ID", "id"),
}
ROLES = ("premise", "hypothesis", "label")
# Columns that name a slice of pairs are kept where a source has them, under any of these names.
SLICE_NAMES = {
    "hard": ("hard",),
    "subset": ("subset", "heuristic", "category"),
    "genre": ("genre",),
    "subcase": ("subcase",),
    "rule": ("rule",),
    "edit_of": ("edit_of",),
}
# What single annotators said: how many gave each label, in the order of LABELS, or the labels that they gave.
COUNT_NAMES = ("label_counts", "label_count")
# The name of a gold label, where the label itself is an id.
LABEL_TEXT_NAMES = ("label_text", "label_name", "gold_label", "label")
ANNOTATOR_NAMES = ("annotator_labels", "label0", "label1", "label2", "label3", "label4", "label5")

# All that a pair may carry beside uid, premise, hypothesis and label.
EXTRA_COLUMNS = {
    "hard": Value("bool"),
    **dict.fromkeys(("subset", "subcase", "genre", "rule"), Value("string")),
    "edit_of": Value("string"),  # uid of the pair of which this one is a minimal edit
    "label_counts": List(Value("int32")),  # (3,), annotators by label
    "agreement": Value("string"),  # how many of them gave the gold label
}

# What shows, and the Unicode categories of what does not.
WORD = re.compile(r"\w")
BLANK_CATEGORIES = ("Cc", "Cf", "Zs", "Zl", "Zp")

URL = re.compile(r"(https?|zip)://")
HUB_FILE = re.compile(r"https://huggingface\.co/datasets/([^/]+/[^/]+)/(?:resolve|blob|raw)/([^/]+)/([^?]+)")


# Of the sets that annotators gave no label in places, SNLI and MNLI lack 2 % at most. More for each labelled pair than
# this is worth a warning.
MANY_UNLABELLED = 0.1

# Single files that hold several splits name them in a column.
SPLIT_COLUMNS = ("SemEval_set",)

SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "dev", "val", "valid", "trial"),
    "test": ("test",),
}


class SourceMissing(UserError):
    """A source or split that is not there, on disk or on the Hub, or that has no label."""


def load_pairs(
    source: str,
    split: str | None = None,
    *,
    config: str | None = None,
    revision: str | None = None,
    columns: dict[str, str] | None = None,
    label_spellings: list[str] | None = None,
    dropped: Counter | None = None,
) -> Dataset:
    """Load the labelled pairs of one split.

    Args:
        source: Hub id, folder, file, URL of a file (see `fetch`), or `demo`. A folder has one file a split (or
            shards of one), the split's name being a word of the file's name, as in `snli_1.0_dev.jsonl`.
        split: `train`, `validation` (also `dev`), `test`, or another split that the source names. `None` takes the
            whole of a single file.
        config, revision: Hub configuration and commit, as in `datasets.load_dataset`.
        columns: where a set has unusual column names, `{"premise": its name, ...}` for any of premise, hypothesis,
            label and uid.
        label_spellings: how the set writes its labels, in the order of `labels.LABELS`; needed only where they are
            neither names, first letters nor SNLI's ids.
        dropped: a counter whose `unlabelled` is raised by the number of pairs left out because annotators did not
            agree on a label.

    Returns:
        `Dataset[uid, premise, hypothesis, label]` in the order of the source, `label` a `ClassLabel` over `LABELS`
        (over `TWO_WAY_LABELS` for a set such as HANS), with the columns of `EXTRA_COLUMNS` that the source has.

    Raises:
        SourceMissing: naming what was looked for, where the source or its split is not there, or has no label.
        UserError: naming file (or Hub id), row and column, for a row that cannot be used; or the columns that were
            looked for.
    """
    check_spellings(label_spellings)
    path = fetch(source)
    table = _open_table(source, path, config, split, revision)
    files = [] if table is not None else _split_files(path, split)
    there = read_columns(files[0]) if table is None else table.column_names
    in_folder = f"/{files[0].name}" if files and path.is_dir() else ""
    found = find_columns(f"{source}{in_folder}", there, columns)
    extras = _find_extras(there)
    wanted = _wanted(found, extras, there)
    if table is None:
        names = label_names(files[0], found["label"])
    else:
        feature = table.features.get(found["label"])
        names = feature.names if isinstance(feature, ClassLabel) else None
    split_column = next((name for name in SPLIT_COLUMNS if name in there), None)

    def read(spellings: list[str] | None) -> tuple[dict[str, list], int]:
        if table is not None:
            rows = _name_labels(
                _table_rows(source, table.select_columns(wanted)), found["label"], names, label_spellings
            )
        else:
            rows = _file_rows(files, found, wanted, label_spellings)
            if split_column is not None and split is not None:
                rows = _rows_of_split(rows, path, split_column, split)
        two_way = any(map(is_two_way_name, names or ()))
        return _check_rows(source, rows, found, extras, spellings, two_way, f"{path.stem}-{split or 'all'}")

    try:
        pairs, unlabelled = read(label_spellings)
    except _IdsExplained as ids:
        pairs, unlabelled = read(ids.spellings)
    if not pairs["uid"]:
        raise SourceMissing(
            f"{source}, split {split}: no labelled pair in it ({unlabelled:,} rows have no label); "
            f"labels are read from the column {found['label']}"
        )
    if unlabelled:
        level = logging.WARNING if unlabelled > len(pairs["uid"]) * MANY_UNLABELLED else logging.INFO
        logger.log(level, "%s %s: %s rows have no gold label and are left out", source, split or "", f"{unlabelled:,}")
    if dropped is not None:
        dropped["unlabelled"] += unlabelled
    return pairs_dataset(pairs)


@cache
def fetch(source: str) -> Path:
    """The path that a source names, on disk or not; the file of a URL is downloaded first, and kept.

    What was downloaded once is not asked for again, so that it is there without a network too: give URLs whose file
    does not change, such as one that holds a commit.

    Args:
        source: any source. A URL begins with `https://`; one of a file in a repository of the Hub goes the way of
            other Hub files. For a file in a zip archive it is fsspec's `zip://folder/file.txt::https://host/archive.zip`.

    Raises:
        SourceMissing: where a URL cannot be had.
    """
    if is_demo(source):
        return PAIRS
    if not URL.match(source):
        return Path(source).expanduser()
    inside, _, url = source.rpartition("::")
    try:
        if on_hub := HUB_FILE.fullmatch(source):
            repo, revision, name = on_hub.groups()
            return Path(hf_hub_download(repo, name, repo_type="dataset", revision=revision))
        downloads = DownloadManager(download_config=DownloadConfig(use_etag=False))
        if inside:
            file = Path(downloads.download_and_extract(url)) / inside.removeprefix("zip://")
            if not file.is_file():
                raise FileNotFoundError("no zip archive with that file in it")
            return file
        downloaded = Path(downloads.download(url))
    except Exception as error:  # of HTTP clients, of the Hub's, of the file system
        reason = str(error).partition("\n")[0].replace(url, "it")
        reason = type(error).__name__ if reason == "it" else f"{type(error).__name__}: {reason}"
        raise SourceMissing(f"{source} cannot be downloaded ({reason})") from error
    # The cache names files by the hash of their URL; formats and splits are told by their own names.
    named = Path(f"{downloaded}.named") / PurePosixPath(urlsplit(url).path).name
    named.parent.mkdir(exist_ok=True)
    with suppress(FileExistsError):  # another process was here first, or an earlier run
        named.symlink_to(downloaded)
    return named


def pairs_dataset(pairs: dict[str, list]) -> Dataset:
    """A `Dataset` with our column types from lists of uid, premise, hypothesis, label name, and any extra columns."""
    two_way = any(label == TWO_WAY_LABELS[1] for label in pairs["label"])
    features = {"uid": Value("string"), "premise": Value("string"), "hypothesis": Value("string")}
    features["label"] = ClassLabel(names=list(TWO_WAY_LABELS if two_way else LABELS))
    features |= {name: feature for name, feature in EXTRA_COLUMNS.items() if name in pairs}
    ids = {label: id for id, label in enumerate(features["label"].names)}
    columns = {name: pairs[name] for name in features} | {"label": [ids[label] for label in pairs["label"]]}
    # `Dataset.from_dict` would encode every text by itself.
    return Dataset(pa.table(columns, schema=Features(features).arrow_schema))


def has_split(source: str, split: str, config: str | None = None, revision: str | None = None) -> bool:
    """Whether `source` names a split of that kind. A single file is one split, unless a column names several."""
    path = fetch(source)
    if path.is_file():
        return any(name in SPLIT_COLUMNS for name in read_columns(path))
    if path.is_dir() and not _is_table_folder(path):
        return any(_is_split_file(file, split) for file in _data_files(path))
    return any(name in _table_splits(source, path, config, revision) for name in _names_of(split))


def load_train_and_validation(
    args: TrainDataConfig, *, seed: int, dropped: Counter | None = None, mixture: dict[str, dict] | None = None
) -> dict[str, Dataset]:
    """The `train` and `validation` pairs of a recipe. Checkpoints are chosen on validation, never on test.

    Where the source has no validation split, `args.validation_fraction` of the training premises is held out. Other
    sources are mixed into the training pairs, and these are balanced, as the recipe says; validation stays as it is.

    Args:
        seed: of the training pairs that are drawn; those of validation are the same for every seed.
        dropped: a counter of what was left out, by reason.
        mixture: filled with what each source contributes to the training pairs: {source: {"pairs": n, "labels":
            {label: n}, "dropped": {reason: n}}}.
    """
    dropped = Counter() if dropped is None else dropped
    left_out: dict[str, Counter] = defaultdict(Counter)
    options = reading_options(args)
    train = load_pairs(args.dataset_name, args.train_split or "train", dropped=left_out[args.dataset_name], **options)
    if args.validation_split or has_split(args.dataset_name, "validation", args.dataset_config, args.dataset_revision):
        validation = load_pairs(args.dataset_name, args.validation_split or "validation", dropped=dropped, **options)
    else:
        train, validation = hold_out(train, args.validation_fraction, VALIDATION_SEED)
        logger.warning(
            "%s has no validation split: %s pairs are held out from training, by premise; validation_split names a "
            "split that is called otherwise",
            args.dataset_name,
            f"{len(validation):,}",
        )
    if args.max_train_samples is not None:
        train = subsample(train, args.max_train_samples, seed)
    train = _with_source(train, args.dataset_name)
    if args.train_mix:
        train = mix(train, args.train_mix, seed=seed, held_out=set(validation["premise"][:]), dropped=left_out)
    for reasons in left_out.values():
        dropped.update(reasons)
    if args.balance is not None:
        before = len(train)
        train = balance_labels(train, seed) if args.balance == "label" else balance_premises(train, seed)
        logger.info("balance: %s leaves out %s of %s training pairs", args.balance, before - len(train), before)
        dropped["left_out_for_balance"] += before - len(train)
    if mixture is not None:
        for source, reasons in left_out.items():
            labels = np.asarray(train["label"][:])[np.asarray(train["source"][:]) == source]
            counts = np.bincount(labels, minlength=len(LABELS)).tolist()
            by_label = dict(zip(train.features["label"].names, counts, strict=False))
            mixture[source] = {"pairs": len(labels), "labels": by_label, "dropped": dict(+reasons)}
    if args.max_eval_samples is not None:
        validation = subsample(validation, args.max_eval_samples, VALIDATION_SEED)
    _check_labels(args.dataset_name, train, validation)
    return {"train": train.remove_columns("source"), "validation": validation}


def _check_labels(source: str, train: Dataset, validation: Dataset) -> None:
    """Refuse to train on one label; warn of labels that neither training nor validation pairs have."""
    names = train.features["label"].names
    there = {names[label] for label in set(train["label"][:])}
    if len(there) == 1:
        raise UserError(
            f"{source}: all {len(train):,} training pairs have the label {there.pop()}, so there is nothing to learn; "
            f"are label_column and label_spellings right?"
        )
    for what, pairs in (("training", train), ("validation", validation)):
        missing = [name for index, name in enumerate(names) if index not in set(pairs["label"][:])]
        if missing:
            logger.warning("%s: none of the %s pairs has the label %s", source, what, " or ".join(missing))


def _with_source(pairs: Dataset, source: str) -> Dataset:
    return _with_column(pairs, "source", [source] * len(pairs))


def _with_column(pairs: Dataset, name: str, values: list[str]) -> Dataset:
    """`pairs` with a column added or replaced; `Dataset.add_column` would show a bar, "Flattening the indices"."""
    table = pairs.with_format("arrow")[:]
    features = Features({**pairs.features, name: Value("string")})
    columns = {column: table[column] for column in table.column_names} | {name: pa.array(values, pa.string())}
    return Dataset(pa.table(columns).cast(features.arrow_schema))


def describe_source(counts: Mapping[str, Any]) -> str:
    """One source of the `mixture` of `load_train_and_validation`, in words."""
    labels = ", ".join(f"{n:,} {label}" for label, n in counts["labels"].items())
    dropped = ", ".join(f"{n:,} {reason.replace('_', ' ')}" for reason, n in counts["dropped"].items())
    return f"{counts['pairs']:,} pairs ({labels})" + (f"; left out: {dropped}" if dropped else "")


def load_validation(args: TrainDataConfig, dropped: Counter | None = None) -> Dataset:
    """The validation pairs of a recipe, all of them, without the training pairs where the source has both."""
    options = reading_options(args) | {"dropped": dropped}
    try:
        return load_pairs(args.dataset_name, args.validation_split or "validation", **options)
    except SourceMissing:
        train = load_pairs(args.dataset_name, args.train_split or "train", **options)
        return hold_out(train, args.validation_fraction, VALIDATION_SEED)[1]


def reading_options(args: DataConfig) -> dict[str, object]:
    """What `load_pairs` wants to know of a source beside its name and split."""
    return {
        "config": args.dataset_config,
        "revision": args.dataset_revision,
        "columns": args.columns(),
        "label_spellings": args.label_spellings,
    }


def mix(
    pairs: Dataset, others: list[str], *, seed: int, held_out: set[str], dropped: Mapping[str, Counter]
) -> Dataset:
    """Add pairs of other sources to train on.

    Args:
        pairs: three-way pairs, with a column `source`.
        others: `source=weight`: so many pairs of that source's training split (or file) for each of `pairs`, taken by
            `subsample`.
        held_out: premises to leave out, those of validation.
        dropped: a counter for each source, of its `unlabelled` rows and of `mixed_premise_in_validation`.

    Returns:
        uid, premise, hypothesis, label and source of all; the uids of others with their source before them.

    Raises:
        UserError: for an entry of another form, a two-way source, or one with too few pairs.
    """
    columns = ["uid", "premise", "hypothesis", "label", "source"]
    parts = [pairs.select_columns(columns)]
    for entry in others:
        source, _, weight = entry.rpartition("=")
        try:
            n = round(float(weight) * len(pairs))
        except ValueError:
            n = 0
        if not source or n < 1:
            raise UserError(f"train_mix: {entry!r} is not source=weight with a weight above 0, such as {DEMO}=0.25")
        other = load_pairs(source, "train", dropped=dropped[source])
        if other.features["label"].num_classes != len(LABELS):
            raise UserError(f"train_mix: {source} has two labels, and training needs {', '.join(LABELS)}")
        premises = other["premise"][:]
        fresh = other.select([index for index, premise in enumerate(premises) if premise not in held_out])
        if len(fresh) < len(other):
            dropped[source]["mixed_premise_in_validation"] += len(other) - len(fresh)
        if n > len(fresh):
            raise UserError(
                f"train_mix: {entry} asks for {n:,} pairs, and {source} has {len(fresh):,}; with {len(pairs):,} pairs "
                f"of the run's own it can have a weight of {math.floor(1000 * len(fresh) / len(pairs)) / 1000}"
            )
        fresh = _with_source(subsample(fresh, n, seed), source)
        parts.append(
            _with_column(fresh, "uid", [f"{Path(source).name}/{uid}" for uid in fresh["uid"]]).select_columns(columns)
        )
    return concatenate_datasets(parts)


def balance_labels(pairs: Dataset, seed: int) -> Dataset:
    """As many pairs of each label as the rarest has, taken premise by premise in seeded order."""
    counts = np.bincount(pairs["label"][:], minlength=pairs.features["label"].num_classes)
    if counts.min() == 0:
        missing = pairs.features["label"].names[counts.argmin()]
        raise UserError(f"balance: no training pair has the label {missing}, so balancing by label leaves none at all")
    return _take(pairs, np.full_like(counts, counts.min()), seed)


def balance_premises(pairs: Dataset, seed: int) -> Dataset:
    """At most one pair of each label on each premise, so that no scene is told more often than others."""
    kept: dict[tuple[str, int], int] = {}
    premises, labels = pairs["premise"][:], pairs["label"][:]
    for index in np.random.default_rng(seed).permutation(len(pairs)).tolist():
        kept.setdefault((premises[index], labels[index]), index)
    return pairs.select(np.sort(list(kept.values())))


def subsample(pairs: Dataset, n: int, seed: int) -> Dataset:
    """Take `n` pairs, premise by premise in seeded order, with the label shares of the whole.

    Pairs of one premise stay together (the last premises taken may lose some), because they are not independent: a
    sample by pair would tell the same premises in training and, after a split, in validation.
    """
    if n >= len(pairs):
        return pairs
    labels = np.asarray(pairs["label"][:])
    counts = np.bincount(labels, minlength=pairs.features["label"].num_classes)
    # Largest remainders: the quotas add up to n exactly.
    exact = n * counts / counts.sum()
    quotas = np.floor(exact).astype(int)
    quotas[np.argsort(quotas - exact, kind="stable")[: n - quotas.sum()]] += 1
    return _take(pairs, quotas, seed)


def _take(pairs: Dataset, quotas: np.ndarray, seed: int) -> Dataset:
    """So many pairs of each label, premise by premise in seeded order."""
    labels, quotas, chosen = pairs["label"][:], quotas.tolist(), []
    for index in _premise_order(pairs, seed):
        if quotas[labels[index]]:
            quotas[labels[index]] -= 1
            chosen.append(index)
    return pairs.select(np.sort(chosen))  # of an array: datasets hashes a list number by number


def hold_out(pairs: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """Split into (kept, held out) such that no premise is in both; for sources that bring no validation split."""
    order = _premise_order(pairs, seed)
    premises = pairs["premise"][:]
    cut = max(1, round(len(order) * fraction))
    while cut < len(order) and premises[order[cut]] == premises[order[cut - 1]]:
        cut += 1
    if cut >= len(order):
        raise UserError(
            f"{len(pairs)} pairs on too few premises to hold some out for validation; give a validation split"
        )
    return pairs.select(np.sort(order[cut:])), pairs.select(np.sort(order[:cut]))


def fingerprint(pairs: Dataset) -> str:
    """16 hexadecimal digits that change when any uid, text, label or the order of the pairs does."""
    digest = hashlib.sha256()
    for batch in pairs.select_columns(["uid", "premise", "hypothesis", "label"]).iter(batch_size=10_000):
        digest.update(json.dumps(batch, ensure_ascii=False).encode())
    return digest.hexdigest()[:16]


def pair_hashes(pairs: Dataset) -> np.ndarray:
    """(n,) unsigned 64-bit numbers, the same for pairs whose texts differ in case and white space at most."""
    texts = zip(pairs["premise"][:], pairs["hypothesis"][:], strict=True)
    keys = ["\n".join(" ".join(text.casefold().split()) for text in pair) for pair in texts]
    digests = b"".join(hashlib.blake2b(key.encode(), digest_size=8).digest() for key in keys)
    return np.frombuffer(digests, dtype=np.uint64)


def _premise_order(pairs: Dataset, seed: int) -> list[int]:
    """Row numbers with the rows of a premise together and the premises in seeded order."""
    premises = pairs.with_format("arrow")[:]["premise"].dictionary_encode().unify_dictionaries().combine_chunks()
    place = np.empty(len(premises.dictionary), dtype=np.int64)  # of each premise among the sorted ones
    place[pc.array_sort_indices(premises.dictionary)] = np.arange(len(place))
    shuffled = np.random.default_rng(seed).permutation(len(place))
    return np.argsort(shuffled[place[premises.indices.to_numpy()]], kind="stable").tolist()


def _looks_like_path(source: str) -> bool:
    # A Hub id is "name" or "owner/name", and never starts with a dot, a tilde or a slash.
    return is_data_file(Path(source)) or source.startswith((".", "/", "~")) or source.count("/") > 1


def _names_of(split: str | None) -> tuple[str | None, ...]:
    """The names under which sources have a split."""
    return next((names for names in SPLIT_NAMES.values() if split in names), (split,))


def is_whole(path: Path) -> bool:
    """Whether a path is one table, without splits: a file, or the folder of a `Dataset` that was saved to disk."""
    return path.is_file() or (path / "state.json").is_file()


def _is_table_folder(path: Path) -> bool:
    """Whether a folder is for the datasets library to read: saved to disk by it, or as `hf download` leaves it."""
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return True
    card = path / "README.md"
    if card.is_file() and (metadata_load(card) or {}).get("configs"):
        return True
    nested = card.is_file() or (path / "data").is_dir()
    return nested and not _data_files(path) and any(map(is_data_file, path.glob("*/*")))


def _data_files(folder: Path) -> list[Path]:
    files = sorted(file for file in folder.iterdir() if is_data_file(file))
    # SNLI and MNLI come with every split twice, as JSON lines and as text.
    stems = {file.name.partition(".jsonl")[0] for file in files if ".jsonl" in file.name}
    return [file for file in files if not (file.suffix == ".txt" and file.stem in stems)]


def _is_split_file(file: Path, split: str) -> bool:
    names = _names_of(split)
    stem = file.name.lower()
    return any(re.search(rf"(^|[^a-z]){re.escape(name.lower())}([^a-z]|$)", stem) for name in names)


def _split_files(path: Path, split: str | None) -> list[Path]:
    if path.is_file():
        in_column = any(name in SPLIT_COLUMNS for name in read_columns(path))
        if split not in (None, "train") and not in_column and not _is_split_file(path, split):
            raise SourceMissing(
                f"{path} is a single file, so it has no {split} split; name another file for it, or a folder with "
                f"train, validation and test files"
            )
        return [path]
    files = _data_files(path)
    if split is None:
        raise UserError(f"{path} is a folder: say which split to take")
    chosen = [file for file in files if _is_split_file(file, split)]
    if not chosen:
        there = ", ".join(file.name for file in files) or f"no file of {FORMATS}"
        folders = [folder.name for folder in sorted(path.iterdir()) if any(map(is_data_file, folder.glob("*")))]
        inside = f"; its folders {', '.join(folders)} have some: give one of them" if folders else ""
        raise SourceMissing(f"{path} has no file for split {split}; it has {there}{inside}")
    if len(chosen) > 1 and not all(re.search(r"-\d+-of-\d+\.", file.name) for file in chosen):
        raise UserError(
            f"{path}: {' and '.join(f.name for f in chosen)} could each be split {split}; keep one, or name a file"
        )
    return chosen


def _rows_of_split(
    rows: Iterator[tuple[str, dict]], path: Path, column: str, split: str
) -> Iterator[tuple[str, dict]]:
    names = _names_of(split)
    there = set()
    found = False
    for where, row in rows:
        there.add(row[column])
        if str(row[column]).lower() in names:
            found = True
            yield where, row
    if not found:
        raise SourceMissing(f"{path} has no row of split {split}: its column {column} has {', '.join(sorted(there))}")


def _open_table(
    source: str, path: Path, config: str | None, split: str | None, revision: str | None
) -> Dataset | None:
    """The split of a Hub set or of a folder that the datasets library reads; `None` where a path holds plain files."""
    if path.exists() and not (path.is_dir() and _is_table_folder(path)):
        return None
    if not path.exists() and _looks_like_path(source):
        raise SourceMissing(
            f"{source} is not there; dataset_name takes a Hub id, a folder or a file ({FORMATS}), also by its URL"
        )
    there = _table_splits(source, path, config, revision)
    if is_whole(path) and split in (None, "train"):
        return load_from_disk(str(path))
    chosen = next((name for name in _names_of(split) if name in there), None)
    if chosen is None:
        has = ", ".join(there) or "one table, without splits"
        raise SourceMissing(
            f"{source} has no split {split}; it has {has} (train_split and validation_split name those of a training, "
            f"split that of an evaluation)"
        )
    if path.exists() and not _is_hub_folder(path):
        return load_from_disk(str(path))[chosen]
    try:
        return load_dataset(str(path) if path.exists() else source, config, split=chosen, revision=revision)
    except Exception as error:  # of the Hub's client, of the file system, of the readers of each format
        raise UserError(
            f"{source}, split {split}: cannot be loaded ({_one_line(error.__cause__ or error)})"
        ) from error


def _table_splits(source: str, path: Path, config: str | None, revision: str | None) -> list[str]:
    """The splits of a Hub set, or of a folder that the datasets library reads."""
    try:
        if path.exists() and not _is_hub_folder(path):
            saved = load_from_disk(str(path))
            return list(saved) if isinstance(saved, DatasetDict) else []
        return get_dataset_split_names(str(path) if path.exists() else source, config, revision=revision)
    except Exception as error:  # the Hub's client raises its own, requests' and the file system's errors here
        if "scripts are no longer supported" in str(error):
            raise SourceMissing(
                f"{source} is a loading script, which the datasets library no longer runs; try dataset_revision: "
                f"refs/convert/parquet, where the Hub keeps tables of some such sets, or give the files themselves"
            ) from error
        if "Config name is missing" in str(error) or "BuilderConfig" in str(error):
            raise UserError(f"{source}: choose a configuration with dataset_config ({_one_line(error)})") from error
        if path.exists():
            raise UserError(
                f"{source}: not a folder that the datasets library can read ({_one_line(error)})"
            ) from error
        raise SourceMissing(
            f"{source}: not on the Hub, or the Hub is out of reach, and no such path is here "
            f"({type(error).__name__}: {_one_line(error)})"
        ) from error


def _is_hub_folder(path: Path) -> bool:
    """Whether a folder that the datasets library reads is a repository, rather than saved to disk."""
    return not ((path / "state.json").is_file() or (path / "dataset_dict.json").is_file())


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _file_rows(
    files: list[Path], found: dict[str, str], wanted: Sequence[str], spellings: list[str] | None
) -> Iterator[tuple[str, dict]]:
    for file in files:
        name = file.name
        rows = ((f"{name} row {number}", row) for number, row in read_rows(file, wanted))
        yield from _name_labels(rows, found["label"], label_names(file, found["label"]), spellings)


def _table_rows(source: str, table: Dataset) -> Iterator[tuple[str, dict]]:
    rows = (row for batch in table.with_format("arrow").iter(1000) for row in batch.to_pylist())
    for number, row in enumerate(rows, start=1):
        yield f"{source} row {number}", row


def _name_labels(
    rows: Iterator[tuple[str, dict]], column: str, names: list[str] | None, spellings: list[str] | None
) -> Iterator[tuple[str, dict]]:
    """Rows with the names of their label ids: sets number their labels in different orders.

    Spellings that are none of the names are those of the ids.
    """
    if names is None or (spellings and not {*map(str.lower, names)} & {str(one).lower() for one in spellings}):
        yield from rows
        return
    for where, row in rows:
        label = row[column]
        yield where, row | {column: names[label]} if isinstance(label, int) and 0 <= label < len(names) else row


def find_columns(
    source: object, there: Sequence[str], named: Mapping[str, str] | None = None, roles: Sequence[str] = ROLES
) -> dict[str, str]:
    """Where the columns are: {role: column}, for those of `roles` and the uid that a set has.

    Args:
        source: what a message calls the set.
        there: its columns, a repeated name as often as it is there.
        named: what the user calls the columns of roles.
        roles: what must be there.

    Raises:
        UserError: naming every column that is missing, with what was looked for and what is there; or a repeated one.
    """
    found, missing = {}, {}
    for role in (*roles, "uid"):
        looked_for = (named[role],) if role in (named or {}) else COLUMN_NAMES[role]
        column = next(filter(None, (_match(name, there) for name in looked_for)), None)
        if column is not None:
            found[role] = column
        elif role != "uid" or role in (named or {}):
            missing[role] = looked_for
    if missing:
        raise UserError(
            f"{source}: "
            + ", ".join(f"no {role} column (looked for {', '.join(names)})" for role, names in missing.items())
            + f"; it has {', '.join(map(str, there))}; name "
            + ("it" if len(missing) == 1 else "them")
            + f" with {' and '.join(f'{role}_column' for role in missing)}"
            + ("; is the first line the heading?" if any(map(is_name, there)) else "")
        )
    roles_of: dict[str, str] = {}
    for role, column in found.items():
        if column in roles_of:
            raise UserError(
                f"{source}: the column {column} is named for {roles_of[column]} and {role}; give each its own with "
                f"{roles_of[column]}_column and {role}_column"
            )
        roles_of[column] = role
        alike = [name for name in there if name != column and _plain(name) == _plain(column)]
        if alike and column not in ((named or {}).get(role), *COLUMN_NAMES[role]):
            raise UserError(
                f"{source}: {column} and {alike[0]} could each be the {role}; rename one, or give {role}_column"
            )
        if there.count(column) > 1:
            raise UserError(
                f"{source}: the heading has {column} {there.count(column)} times; rename those that are not the {role}"
            )
    return found


def _match(name: str, there: Sequence[str]) -> str | None:
    """The column called `name`, as it is written there: capitals, spaces and underscores make no other name.

    Of a column inside another, `example.premise`, only the outer one is told by the heading; rows are checked for the
    inner one.
    """
    if name in there:
        return name
    outer, dot, inner = name.partition(".")
    if dot and outer in there:
        return name
    return next((column for column in there if _plain(column) == _plain(name)), None)


def _plain(column: str) -> str:
    return re.sub(r"[\W_]", "", unicodedata.normalize("NFKC", column).casefold())


def _find_extras(there: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """For each optional column, the names under which it may be in a row, as they are written there."""
    usual = SLICE_NAMES | {"label_counts": COUNT_NAMES, "annotators": ANNOTATOR_NAMES, "label_text": LABEL_TEXT_NAMES}
    return {role: tuple(_match(name, there) or name for name in names) for role, names in usual.items()}


def _wanted(found: Mapping[str, str], extras: Mapping[str, Sequence[str]], there: Sequence[str]) -> list[str]:
    """The columns to read."""
    wanted = {name.partition(".")[0] if name not in there else name for name in found.values()}
    wanted.update(name for names in extras.values() for name in names)
    return [name for name in there if name in wanted or name in SPLIT_COLUMNS]


def column_value(row: dict, column: str | None) -> object:
    """The value of a column, or of one inside another, `example.premise`; `None` where a row has none."""
    if column in row:
        return row[column]
    outer, _, inner = (column or "").partition(".")
    return row[outer].get(inner) if inner and isinstance(row.get(outer), dict) else None


class _IdsExplained(Exception):
    """Ids that names beside them explain: `spellings` has them in the order of the labels."""

    def __init__(self, spellings: list[str]):
        super().__init__(spellings)
        self.spellings = spellings


class _Labels:
    """Reads the labels of a set, and remembers what a mistake shows in.

    Attributes:
        two_way: whether the set has two labels; known from its first label that only such sets have.
        ids: those of SNLI's ids that were read as such. has_names: whether names were read too.
        named: how often an id stood beside a name: of the gold label, or of one that an annotator gave.
    """

    def __init__(self, spellings: list[str] | None, two_way: bool):
        self.spellings = spellings
        self.two_way = len(spellings) == len(TWO_WAY_LABELS) if spellings else two_way
        self.ids: set[int] = set()
        self.has_names = False
        self.named: Counter[tuple[int, str]] = Counter()
        self._read: dict[tuple[type, object], int] = {}

    def read(self, value: object) -> int:
        key = (type(value), value if isinstance(value, (str, int)) else repr(value))
        if key not in self._read:
            if not self.two_way and not self.spellings and is_two_way_name(value):
                self.two_way = True
                self._read.clear()
            label = self._read[key] = parse_label(value, self.spellings, self.two_way)
            if self.spellings is None and label != UNLABELLED:
                if is_id(value):
                    self.ids.add(label)
                else:
                    self.has_names = True
        return self._read[key]

    def read_annotator(self, value: object) -> int | None:
        """A label as the gold labels are written, or as a name; `None` where it is neither."""
        with suppress(UserError):
            return parse_label(value, self.spellings, self.two_way)
        with suppress(UserError):
            return None if is_id(value) else parse_label(value)
        return None

    def note_names(self, value: object, row: dict, columns: Mapping[str, Sequence[str]]) -> None:
        """Count the names that stand beside a label that is an id."""
        if not self.ids or not is_id(value):
            return
        for column in (*columns["label_text"], *columns["annotators"]):
            given = row.get(column)
            for name in given if isinstance(given, list) else (given,):
                if isinstance(name, str) and is_name(name):
                    self.named[int(float(value)), name] += 1

    def _explained(self) -> list[str] | None:
        """The ids in the order of the labels that they mostly stand beside; `None` where that is not one for each."""
        names = TWO_WAY_LABELS if any(is_two_way_name(name) for _, name in self.named) else LABELS
        votes = np.zeros((len(LABELS), len(names)), dtype=int)
        for (id, name), count in self.named.items():
            votes[id, parse_label(name, two_way=len(names) == 2)] += count
        ids = sorted(self.ids)
        most = votes[ids].argmax(1).tolist()
        if sorted(most) != list(range(len(names))) or (2 * votes[ids].max(1) <= votes[ids].sum(1)).any():
            return None
        return [str(ids[most.index(label)]) for label in range(len(names))]

    def check_ids(self, source: str) -> None:
        """Say how ids without names are read, where that is SNLI's way; stop where it cannot be known.

        Raises:
            _IdsExplained: where names beside the ids say what these mean.
            UserError: for a set with other ids than all of SNLI's.
        """
        if not self.ids:
            return
        explained = None if self.has_names else self._explained()
        if explained == list(map(str, range(len(LABELS)))):
            return
        if explained is not None:
            names = LABELS if len(explained) == len(LABELS) else TWO_WAY_LABELS
            said = ", ".join(f"{id} is {name}" for id, name in zip(explained, names, strict=True))
            logger.warning("%s: the names beside the labels say what these mean: %s", source, said)
            raise _IdsExplained(explained)
        if not self.has_names and len(self.ids) < len(LABELS):
            raise UserError(
                f"{source}: the labels are {' and '.join(map(str, sorted(self.ids)))} alone, and what they mean "
                f"is not known: give label_spellings, what stands for {', '.join(LABELS)}, in that order, such as "
                f"0 1 2 for SNLI's ids, or what stands for {' and '.join(TWO_WAY_LABELS)}, such as 1 0"
            )
        logger.warning(
            "%s: the labels are read as SNLI's ids: %s; if they mean something else, label_spellings says what stands "
            "for %s, in that order",
            source,
            ", ".join(f"{index} is {name}" for index, name in enumerate(LABELS)),
            ", ".join(LABELS),
        )


class _Uids:
    """Makes every uid another one: predictions of two models are joined by uid."""

    def __init__(self):
        self._taken: set[str] = set()
        self._count: Counter = Counter()

    def take(self, uid: str) -> str:
        """`uid`, or where it is taken, `uid#2` and so on."""
        free = uid
        while free in self._taken:
            self._count[uid] += 1
            free = f"{uid}#{self._count[uid] + 1}"
        self._taken.add(free)
        return free


def _check_rows(
    source: str,
    rows: Iterator[tuple[str, dict]],
    columns: dict[str, str],
    extra_columns: dict[str, tuple[str, ...]],
    spellings: list[str] | None,
    two_way: bool,
    uid_prefix: str,
) -> tuple[dict[str, list], int]:
    """Check every row; return lists by column (label as a name) and the number of rows without a label."""
    pairs: dict[str, list] = {"uid": [], "premise": [], "hypothesis": [], "label": []}
    extras: dict[str, list] = {}
    extras_of: dict[tuple[str, ...], dict[str, list[str]]] = {}  # the optional columns of rows with such keys
    labels = _Labels(spellings, two_way)
    unfit: dict[str, list] = defaultdict(list)
    uids = _Uids()
    unlabelled = 0
    for index, (where, row) in enumerate(rows):
        value = column_value(row, columns["label"])
        if value is None and columns["label"].partition(".")[0] not in row:
            raise UserError(
                f"{where} has no {columns['label']}, only {', '.join(map(str, row))}; a pair without a label has null "
                f"or - there"
            )
        try:
            label = labels.read(value)
        except UserError as error:
            raise UserError(f"{where}, column {columns['label']}: {error}") from None
        if label == UNLABELLED:
            unlabelled += 1
            continue
        for role in ("premise", "hypothesis"):
            try:
                pairs[role].append(check_text(column_value(row, columns[role]), role))
            except UserError as error:
                raise UserError(f"{where}, column {columns[role]}: the {error}") from None
        uid = column_value(row, columns.get("uid"))
        is_named = uid not in (None, "") and uid == uid  # which NaN is not
        pairs["uid"].append(uids.take(_encodable(uid) if is_named else f"{uid_prefix}-{index + 1}"))
        pairs["label"].append((TWO_WAY_LABELS if labels.two_way else LABELS)[label])
        keys = tuple(row)
        if keys not in extras_of:
            extras_of[keys] = {name: [one for one in names if one in row] for name, names in extra_columns.items()}
        columns_of_extras = extras_of[keys]
        extra = _slice_values(row, columns_of_extras)
        labels.note_names(value, row, columns_of_extras)
        if not labels.two_way:
            extra |= _annotators(row, columns_of_extras, labels, label, unfit)
        for name in extra:
            extras.setdefault(name, [None] * (len(pairs["uid"]) - 1))
        for name, values in extras.items():
            values.append(extra.get(name))
    if labels.two_way and not set(pairs["label"]) <= set(TWO_WAY_LABELS):
        raise UserError(f"the labels mix two-way and three-way names: {', '.join(sorted(set(pairs['label'])))}")
    labels.check_ids(source)
    if unfit:
        what = ", ".join(f"{len(values):,} in {name} (such as {values[0]!r:.60})" for name, values in unfit.items())
        logger.warning("%s: not counted, as they are no annotators' labels: %s", source, what)
    return pairs | extras, unlabelled


def check_text(text: object, what: str) -> str:
    """A premise or hypothesis without the white space around it.

    Raises:
        UserError: beginning with `what`, if it is no text, has nothing in it, or has half a character in it.
    """
    if not isinstance(text, str) or _is_blank(text):
        raise UserError(f"{what} is {'missing' if text is None else reprlib.repr(text)}; expected text")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"{what} holds {text[error.start : error.end]!a}, half of a character (a lone surrogate), which "
                f"cannot be encoded; remove it"
            ) from None
    return text.strip()


def _is_blank(text: str) -> bool:
    """Whether nothing in a text can be seen: white space, control characters, marks without a width."""
    return not WORD.search(text) and all(unicodedata.category(one) in BLANK_CATEGORIES for one in text)


def _encodable(value: object) -> str:
    return str(value).encode("utf-8", "backslashreplace").decode()


def _slice_values(row: dict, columns: dict[str, tuple[str, ...]]) -> dict[str, str | bool]:
    values = {name: _first_given(row, columns[name]) for name in SLICE_NAMES if columns[name]}
    return {
        name: str(value).strip().lower() in ("1", "1.0", "true", "yes") if name == "hard" else _encodable(value)
        for name, value in values.items()
        if value not in (None, "") and value == value  # which NaN is not
    }


def _first_given(row: dict, names: Iterable[str]) -> object:
    return next((row[name] for name in names if row[name] is not None), None)


def _annotators(
    row: dict, columns: dict[str, tuple[str, ...]], labels: _Labels, label: int, unfit: dict[str, list]
) -> dict[str, object]:
    """`label_counts` and `agreement` of a row on which more than one annotator gave a label; nothing of others.

    Args:
        unfit: {column: values}, to which goes what is neither counts nor labels.
    """
    if not columns["label_counts"] and not columns["annotators"]:
        return {}
    counts = None
    for name in columns["label_counts"]:
        if row.get(name) not in (None, ""):
            if _is_counts(row[name]):
                counts = counts or list(row[name])
            else:
                unfit[name].append(row[name])
    if counts is None:
        counts = [0] * len(LABELS)
        for name in columns["annotators"]:
            given = row.get(name)
            for value in given if isinstance(given, (list, tuple)) else () if given is None else (given,):
                said = labels.read_annotator(value)
                if said is None:
                    unfit[name].append(value)
                elif said != UNLABELLED:
                    counts[said] += 1
    if sum(counts) < 2:
        return {}
    return {"label_counts": counts, "agreement": agreement(counts[label] / sum(counts))}


def _is_counts(value: object) -> bool:
    is_list = isinstance(value, list) and len(value) == len(LABELS)
    return is_list and all(type(count) is int and 0 <= count < 2**31 for count in value)


def agreement(share: float) -> str:
    """The name of a slice by the share of annotators who gave the gold label, alike for 5 annotators and for 100."""
    if share == 1:
        return "all"
    return "80 to 99 %" if share >= 0.8 else "60 to 79 %" if share >= 0.6 else "under 60 %"
