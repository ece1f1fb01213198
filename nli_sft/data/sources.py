"""Load premise-hypothesis pairs from the Hub or from files, and check every row.

A source is a Hub id (`stanfordnlp/snli`), a folder with one file per split, a single file, the URL of a file, or
`demo`, which is built in. `load_pairs` returns the same four columns for all of them. Its errors name file and row.
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
from itertools import chain, islice
from pathlib import Path, PurePosixPath
from typing import Any, cast
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
from ..labels import (
    LABELS,
    TWO_WAY_LABELS,
    UNLABELLED,
    UnknownLabel,
    check_spellings,
    is_id,
    is_name,
    is_two_way_name,
    parse_label,
)
from .demo import DEMO, PAIRS, is_demo
from .files import FORMATS, is_data_file, label_names, read_columns, read_rows

logger = logging.getLogger(__name__)

# Seed of validation samples. It does not depend on the run, so that runs with different seeds are comparable.
VALIDATION_SEED = 42

# Column names in common NLI sets (SNLI, MNLI, ANLI, SICK, HANS, Breaking NLI, ChaosNLI and their derivatives). The
# first one found is used. A dot separates a column from the one that contains it.
COLUMN_NAMES = {
    "premise": ("premise", "sentence1", "context", "sentence_A", "example.premise", "document"),
    "hypothesis": ("hypothesis", "sentence2", "sentence_B", "example.hypothesis", "claim"),
    "label": ("gold_label", "label", "majority_label", "entailment_label", "entailment_judgment"),
    "uid": ("uid", "pairID", "pair_ID", "id"),
}
ROLES = ("premise", "hypothesis", "label")
# Columns that define slices. They are kept if a source has them under any of these names.
SLICE_NAMES = {
    "hard": ("hard",),
    "subset": ("subset", "heuristic", "category"),
    "genre": ("genre",),
    "subcase": ("subcase",),
    "rule": ("rule",),
    "edit_of": ("edit_of",),
}
# Annotators' labels: the number of annotators per label, in the order of the label set.
COUNT_NAMES = ("label_counts", "label_count")
# The name of the gold label, if the label itself is an id.
LABEL_TEXT_NAMES = ("label_text", "label_name", "gold_label", "label")
# The labels that annotators gave.
ANNOTATOR_NAMES = ("annotator_labels", "label0", "label1", "label2", "label3", "label4", "label5")

# Optional columns beside uid, premise, hypothesis and label.
EXTRA_COLUMNS: dict[str, Any] = {
    "hard": Value("bool"),
    **dict.fromkeys(("subset", "subcase", "genre", "rule"), Value("string")),
    "edit_of": Value("string"),  # uid of the pair that this one minimally edits
    "label_counts": List(Value("int32")),  # (labels,), annotators per label
    "agreement": Value("string"),  # share of them that gave the gold label, binned
}

# A visible text has a word character, or one outside these Unicode categories.
WORD = re.compile(r"\w")
BLANK_CATEGORIES = ("Cc", "Cf", "Zs", "Zl", "Zp")

URL = re.compile(r"(https?|zip)://")
HUB_FILE = re.compile(r"https://huggingface\.co/datasets/([^/]+/[^/]+)/(?:resolve|blob|raw)/([^/]+)/([^?]+)")


# Warn if there are more unlabelled rows per labelled pair than this. SNLI and MNLI have 0.02 at most.
MANY_UNLABELLED = 0.1

# Columns that name the split of a row, in files that hold several splits.
SPLIT_COLUMNS = ("SemEval_set",)

# To show which labels a column has.
SHOWN_ROWS, SHOWN_LABELS = 1000, 6

SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "dev", "val", "valid", "trial"),
    "test": ("test",),
}


class SourceMissing(UserError):
    """A source or split that does not exist, on disk or on the Hub, or that has no labels."""


def load_pairs(
    source: str,
    split: str | None = None,
    *,
    labels: Sequence[str] = LABELS,
    config: str | None = None,
    revision: str | None = None,
    columns: dict[str, str] | None = None,
    label_spellings: list[str] | None = None,
    dropped: Counter | None = None,
) -> Dataset:
    """Load the labelled pairs of one split.

    Args:
        source: Hub id, folder, file, URL of a file (see `fetch`), or `demo`. A folder has one file per split (or
            its shards), whose name contains that of the split, as in `snli_1.0_dev.jsonl`.
        split: `train`, `validation` (also `dev`), `test`, or another split of the source. `None` takes a single file
            whole.
        labels: the label set.
        config, revision: Hub configuration and revision, as in `datasets.load_dataset`.
        columns: unusual column names, as `{"premise": name, ...}` for any of premise, hypothesis, label and uid.
        label_spellings: how the set spells its labels, in the order of `labels`. Needed only if they are not names
            (or first letters or ids of SNLI's labels).
        dropped: a counter whose `unlabelled` is raised by the number of pairs without a gold label.

    Returns:
        `Dataset[uid, premise, hypothesis, label]` in the order of the source, with the columns of `EXTRA_COLUMNS`
        that the source has. `label` is a `ClassLabel` over `labels`; where these are SNLI's, over `TWO_WAY_LABELS`
        for sets such as HANS.

    Raises:
        SourceMissing: if the source or its split does not exist, or has no labels.
        UserError: for a missing column, or an invalid row, with file (or Hub id), row and column.
    """
    labels = tuple(labels)
    check_spellings(label_spellings, labels)
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
        known = _Labels(labels, spellings)
        if labels == LABELS and not spellings and any(map(is_two_way_name, names or ())):
            known.use_two_way()
        return _check_rows(source, rows, found, extras, known, f"{path.stem}-{split or 'all'}")

    try:
        pairs, unlabelled = read(label_spellings)
    except _IdsExplained as ids:
        pairs, unlabelled = read(ids.spellings)
    if not pairs["uid"]:
        raise SourceMissing(
            f"{source}, split {split}: no row has a label ({unlabelled:,} without one); labels are read from the "
            f"column {found['label']}: if that is wrong, set label_column"
        )
    if unlabelled:
        level = logging.WARNING if unlabelled > len(pairs["uid"]) * MANY_UNLABELLED else logging.INFO
        where, rows = f"{source} {split}" if split else source, "1 row" if unlabelled == 1 else f"{unlabelled:,} rows"
        logger.log(level, "%s: %s without a gold label left out", where, rows)
    if dropped is not None:
        dropped["unlabelled"] += unlabelled
    return pairs_dataset(pairs, labels)


@cache
def fetch(source: str) -> Path:
    """The path of a source, which need not exist. The file of a URL is downloaded and cached.

    A cached file is never refreshed, so that it works offline. Use URLs whose file does not change, such as those with
    a commit.

    Args:
        source: any source. URLs begin with `https://`; those of Hub files use the Hub's cache. A file in a zip archive
            is written as for fsspec: `zip://folder/file.txt::https://host/archive.zip`.

    Raises:
        SourceMissing: if a URL cannot be downloaded.
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
            file = Path(str(downloads.download_and_extract(url))) / inside.removeprefix("zip://")
            if not file.is_file():
                raise FileNotFoundError("the archive has no such file")
            return file
        downloaded = Path(str(downloads.download(url)))
    except Exception as error:  # from HTTP clients, the Hub's client or the file system
        reason = str(error).partition("\n")[0].replace(url, "it")
        reason = type(error).__name__ if reason == "it" else f"{type(error).__name__}: {reason}"
        raise SourceMissing(f"{source} cannot be downloaded ({reason})") from error
    # The cache names files by a hash, but formats and splits are recognized by the original name.
    named = Path(f"{downloaded}.named") / PurePosixPath(urlsplit(url).path).name
    named.parent.mkdir(exist_ok=True)
    with suppress(FileExistsError):  # by another process or an earlier run
        named.symlink_to(downloaded)
    return named


def pairs_dataset(pairs: dict[str, list], labels: Sequence[str] = LABELS) -> Dataset:
    """Build a `Dataset` from lists of uid, premise, hypothesis, label name and any of `EXTRA_COLUMNS`.

    Its labels are `labels`; where these are SNLI's, `TWO_WAY_LABELS` if any label is non-entailment.
    """
    two_way = tuple(labels) == LABELS and any(label == TWO_WAY_LABELS[1] for label in pairs["label"])
    features: dict[str, Any] = {"uid": Value("string"), "premise": Value("string"), "hypothesis": Value("string")}
    features["label"] = ClassLabel(names=list(TWO_WAY_LABELS if two_way else labels))
    features |= {name: feature for name, feature in EXTRA_COLUMNS.items() if name in pairs}
    ids = {label: id for id, label in enumerate(features["label"].names)}
    columns = {name: pairs[name] for name in features} | {"label": [ids[label] for label in pairs["label"]]}
    # Faster than `Dataset.from_dict`, which encodes every text separately.
    return Dataset(pa.table(columns, schema=Features(features).arrow_schema))


def has_split(source: str, split: str, config: str | None = None, revision: str | None = None) -> bool:
    """Whether `source` has such a split. A single file has one split, unless a column names several."""
    path = fetch(source)
    if path.is_file():
        return any(name in SPLIT_COLUMNS for name in read_columns(path))
    if path.is_dir() and not _is_table_folder(path):
        return any(_is_split_file(file, split) for file in _data_files(path))
    return any(name in _table_splits(source, path, config, revision) for name in _names_of(split))


def load_train_and_validation(
    args: TrainDataConfig,
    *,
    labels: Sequence[str] = LABELS,
    seed: int,
    dropped: Counter | None = None,
    mixture: dict[str, dict] | None = None,
) -> dict[str, Dataset]:
    """The `train` and `validation` pairs of a recipe. Checkpoints are chosen on validation, never on test.

    If the source has no validation split, `args.validation_fraction` of the training premises is held out. `train_mix`
    and `balance` apply to the training pairs only.

    Args:
        labels: the label set.
        seed: seed of training samples. Validation samples do not depend on it.
        dropped: a counter of pairs left out, by reason.
        mixture: filled with what each source contributes to the training pairs: {source: {"pairs": n, "labels":
            {label: n}, "dropped": {reason: n}}}.
    """
    dropped = Counter() if dropped is None else dropped
    left_out: dict[str, Counter] = defaultdict(Counter)
    options = reading_options(args, labels)
    train = load_pairs(args.dataset_name, args.train_split or "train", dropped=left_out[args.dataset_name], **options)
    if args.validation_split or has_split(args.dataset_name, "validation", args.dataset_config, args.dataset_revision):
        validation = load_pairs(args.dataset_name, args.validation_split or "validation", dropped=dropped, **options)
    else:
        train, validation = hold_out(train, args.validation_fraction, VALIDATION_SEED)
        logger.warning(
            "%s has no validation split: %s pairs are held out from training, by premise; set validation_split if it "
            "has another name",
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
            gold = np.asarray(train["label"][:])[np.asarray(train["source"][:]) == source]
            counts = np.bincount(gold, minlength=train.features["label"].num_classes).tolist()
            by_label = dict(zip(train.features["label"].names, counts, strict=True))
            mixture[source] = {"pairs": len(gold), "labels": by_label, "dropped": dict(+reasons)}
    if args.max_eval_samples is not None:
        validation = subsample(validation, args.max_eval_samples, VALIDATION_SEED)
    _check_labels(args.dataset_name, train, validation)
    return {"train": train.remove_columns("source"), "validation": validation}


def _check_labels(source: str, train: Dataset, validation: Dataset) -> None:
    """Refuse to train on a single label. Warn of labels missing from training or validation pairs."""
    names = train.features["label"].names
    there = {names[label] for label in set(train["label"][:])}
    if len(there) == 1:
        raise UserError(
            f"{source}: all {len(train):,} training pairs have the label {there.pop()}; check label_column and "
            f"label_spellings"
        )
    for what, pairs in (("training", train), ("validation", validation)):
        missing = [name for index, name in enumerate(names) if index not in set(pairs["label"][:])]
        if missing:
            logger.warning("%s: none of the %s pairs has the label %s", source, what, " or ".join(missing))


def _with_source(pairs: Dataset, source: str) -> Dataset:
    return _with_column(pairs, "source", [source] * len(pairs))


def _with_column(pairs: Dataset, name: str, values: list[str]) -> Dataset:
    """Add or replace a column, without the progress bar of `Dataset.add_column`."""
    table: Any = pairs.with_format("arrow")[:]
    features = Features({**pairs.features, name: Value("string")})
    columns = {column: table[column] for column in table.column_names} | {name: pa.array(values, pa.string())}
    return Dataset(pa.table(columns).cast(features.arrow_schema))


def describe_source(counts: Mapping[str, Any]) -> str:
    """One source of the `mixture` of `load_train_and_validation`, in words."""
    labels = ", ".join(f"{n:,} {label}" for label, n in counts["labels"].items())
    dropped = ", ".join(f"{n:,} {reason.replace('_', ' ')}" for reason, n in counts["dropped"].items())
    return f"{counts['pairs']:,} pairs ({labels})" + (f"; left out: {dropped}" if dropped else "")


def load_validation(args: TrainDataConfig, labels: Sequence[str] = LABELS, dropped: Counter | None = None) -> Dataset:
    """All validation pairs of a recipe. Training pairs are read only if the source has no validation split."""
    options = reading_options(args, labels)
    options["dropped"] = dropped
    try:
        return load_pairs(args.dataset_name, args.validation_split or "validation", **options)
    except SourceMissing:
        train = load_pairs(args.dataset_name, args.train_split or "train", **options)
        return hold_out(train, args.validation_fraction, VALIDATION_SEED)[1]


def reading_options(args: DataConfig, labels: Sequence[str] = LABELS) -> dict[str, Any]:
    """The keyword arguments of `load_pairs` for a source."""
    return {
        "labels": labels,
        "config": args.dataset_config,
        "revision": args.dataset_revision,
        "columns": args.columns(),
        "label_spellings": args.label_spellings,
    }


def mix(
    pairs: Dataset, others: list[str], *, seed: int, held_out: set[str], dropped: Mapping[str, Counter]
) -> Dataset:
    """Add training pairs of other sources.

    Args:
        pairs: with a column `source`.
        others: entries `source=weight`. `weight` pairs of that source's training split (or file) are added per pair
            of `pairs`, sampled by `subsample`.
        held_out: premises to leave out, those of validation.
        dropped: a counter per source, of `unlabelled` and `mixed_premise_in_validation`.

    Returns:
        Columns uid, premise, hypothesis, label and source. Uids of other sources are prefixed with the source.

    Raises:
        UserError: for a malformed entry, a source with other labels, or one with too few pairs.
    """
    columns = ["uid", "premise", "hypothesis", "label", "source"]
    parts, labels = [pairs.select_columns(columns)], pairs.features["label"].names
    for entry in others:
        source, _, weight = entry.rpartition("=")
        try:
            n = round(float(weight) * len(pairs))
        except ValueError:
            n = 0
        if not source or n < 1:
            raise UserError(f"train_mix: {entry!r} is not source=weight with a weight above 0, such as {DEMO}=0.25")
        other = load_pairs(source, "train", labels=labels, dropped=dropped[source])
        if other.features["label"].names != labels:
            raise UserError(f"train_mix: {source} has two labels; training needs {', '.join(labels)}")
        premises = other["premise"][:]
        fresh = other.select([index for index, premise in enumerate(premises) if premise not in held_out])
        if len(fresh) < len(other):
            dropped[source]["mixed_premise_in_validation"] += len(other) - len(fresh)
        if n > len(fresh):
            raise UserError(
                f"train_mix: {entry} needs {n:,} pairs, but {source} has {len(fresh):,}; lower its weight to "
                f"{math.floor(1000 * len(fresh) / len(pairs)) / 1000}"
            )
        fresh = _with_source(subsample(fresh, n, seed), source)
        parts.append(
            _with_column(fresh, "uid", [f"{Path(source).name}/{uid}" for uid in fresh["uid"]]).select_columns(columns)
        )
    return concatenate_datasets(parts)


def balance_labels(pairs: Dataset, seed: int) -> Dataset:
    """Keep as many pairs of each label as the rarest has, sampled by premise."""
    counts = np.bincount(pairs["label"][:], minlength=pairs.features["label"].num_classes)
    if counts.min() == 0:
        missing = pairs.features["label"].names[counts.argmin()]
        raise UserError(f"balance: no training pair has the label {missing}, so none would be left; remove balance")
    return _take(pairs, np.full_like(counts, counts.min()), seed)


def balance_premises(pairs: Dataset, seed: int) -> Dataset:
    """Keep at most one pair of each label per premise."""
    kept: dict[tuple[str, int], int] = {}
    premises, labels = pairs["premise"][:], pairs["label"][:]
    for index in np.random.default_rng(seed).permutation(len(pairs)).tolist():
        kept.setdefault((premises[index], labels[index]), index)
    return pairs.select(np.sort(list(kept.values())))


def subsample(pairs: Dataset, n: int, seed: int) -> Dataset:
    """Sample `n` pairs by premise, with the label proportions of the whole.

    Pairs of a premise stay together (the last premises may lose some) because they are not independent: sampling by
    pair would put the same premises into training and validation.
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
    """Take `quotas[label]` pairs of each label, premise by premise in seeded order."""
    labels, left, chosen = pairs["label"][:], quotas.tolist(), []
    for index in _premise_order(pairs, seed):
        if left[labels[index]]:
            left[labels[index]] -= 1
            chosen.append(index)
    return pairs.select(np.sort(chosen))  # an array, because datasets hashes a list slowly


def hold_out(pairs: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """Split into (kept, held out), with no premise in both."""
    order = _premise_order(pairs, seed)
    premises = pairs["premise"][:]
    cut = max(1, round(len(order) * fraction))
    while cut < len(order) and premises[order[cut]] == premises[order[cut - 1]]:
        cut += 1
    if cut >= len(order):
        raise UserError(
            f"{len(pairs)} pairs have too few premises to hold some out for validation; set validation_split"
        )
    return pairs.select(np.sort(order[cut:])), pairs.select(np.sort(order[:cut]))


def fingerprint(pairs: Dataset) -> str:
    """A hash (16 hexadecimal digits) of the uids, texts, labels and order of the pairs."""
    digest = hashlib.sha256()
    for batch in pairs.select_columns(["uid", "premise", "hypothesis", "label"]).iter(batch_size=10_000):
        digest.update(json.dumps(batch, ensure_ascii=False).encode())
    return digest.hexdigest()[:16]


def pair_hashes(pairs: Dataset) -> np.ndarray:
    """(n,) uint64 hashes of the pairs, ignoring case and white space."""
    texts = zip(pairs["premise"][:], pairs["hypothesis"][:], strict=True)
    keys = ["\n".join(" ".join(text.casefold().split()) for text in pair) for pair in texts]
    digests = b"".join(hashlib.blake2b(key.encode(), digest_size=8).digest() for key in keys)
    return np.frombuffer(digests, dtype=np.uint64)


def _premise_order(pairs: Dataset, seed: int) -> list[int]:
    """Row numbers with the rows of a premise together and the premises in seeded order."""
    table: pa.Table = pairs.with_format("arrow")[:]
    premises: Any = table["premise"].dictionary_encode().unify_dictionaries().combine_chunks()
    place = np.empty(len(premises.dictionary), dtype=np.int64)  # of each premise among the sorted ones
    order = pc.array_sort_indices(premises.dictionary)  # pyright: ignore[reportAttributeAccessIssue] (generated)
    place[order] = np.arange(len(place))
    shuffled = np.random.default_rng(seed).permutation(len(place))
    return np.argsort(shuffled[place[premises.indices.to_numpy()]], kind="stable").tolist()


def _looks_like_path(source: str) -> bool:
    # A Hub id is "name" or "owner/name", and never starts with a dot, a tilde or a slash.
    return is_data_file(Path(source)) or source.startswith((".", "/", "~")) or source.count("/") > 1


def _names_of(split: str) -> tuple[str, ...]:
    """The names that sources use for a split."""
    return next((names for names in SPLIT_NAMES.values() if split in names), (split,))


def is_whole(path: Path) -> bool:
    """Whether a path is a single table without splits: a file, or a `Dataset` saved to disk."""
    return path.is_file() or (path / "state.json").is_file()


def _is_table_folder(path: Path) -> bool:
    """Whether the datasets library reads a folder: saved to disk by it, or made by `hf download`."""
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return True
    card = path / "README.md"
    if card.is_file() and (metadata_load(card) or {}).get("configs"):
        return True
    nested = card.is_file() or (path / "data").is_dir()
    return nested and not _data_files(path) and any(map(is_data_file, path.glob("*/*")))


def _data_files(folder: Path) -> list[Path]:
    files = sorted(file for file in folder.iterdir() if is_data_file(file))
    # SNLI and MNLI have every split twice, as JSON lines and as text.
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
        raise UserError(f"{path} is a folder; name the split to read")
    chosen = [file for file in files if _is_split_file(file, split)]
    if not chosen:
        there = ", ".join(file.name for file in files) or f"no file of {FORMATS}"
        folders = [folder.name for folder in sorted(path.iterdir()) if any(map(is_data_file, folder.glob("*")))]
        inside = f"; its folders {', '.join(folders)} have some: name one of them" if folders else ""
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
    """The split of a Hub set or of a folder that the datasets library reads. `None` for plain files."""
    if path.exists() and not (path.is_dir() and _is_table_folder(path)):
        return None
    if not path.exists() and _looks_like_path(source):
        raise SourceMissing(f"{source} does not exist; give a Hub id, a folder, or a file ({FORMATS}) or its URL")
    there = _table_splits(source, path, config, revision)
    if is_whole(path) and split in (None, "train"):
        return cast(Dataset, load_from_disk(str(path)))
    chosen = next((name for name in (_names_of(split) if split is not None else ()) if name in there), None)
    if chosen is None:
        has = ", ".join(there) or "one table, without splits"
        raise SourceMissing(
            f"{source} has no split {split}; it has {has} (set train_split and validation_split for training, "
            f"split for evaluation)"
        )
    if path.exists() and not _is_hub_folder(path):
        return cast(DatasetDict, load_from_disk(str(path)))[chosen]
    try:
        return load_dataset(str(path) if path.exists() else source, config, split=chosen, revision=revision)
    except Exception as error:  # from the Hub's client, the file system or a reader
        raise UserError(
            f"{source}, split {split}: cannot be loaded ({_one_line(error.__cause__ or error)})"
        ) from error


def _table_splits(source: str, path: Path, config: str | None, revision: str | None) -> list[str]:
    """The splits of a Hub set or of a folder that the datasets library reads."""
    try:
        if path.exists() and not _is_hub_folder(path):
            saved = load_from_disk(str(path))
            return list(map(str, saved)) if isinstance(saved, DatasetDict) else []
        return get_dataset_split_names(str(path) if path.exists() else source, config, revision=revision)
    except Exception as error:  # from the Hub's client, requests or the file system
        if "scripts are no longer supported" in str(error):
            raise SourceMissing(
                f"{source} is a loading script, which the datasets library no longer runs; try dataset_revision: "
                f"refs/convert/parquet, where the Hub may have converted it, or use the files themselves"
            ) from error
        if "Config name is missing" in str(error) or "BuilderConfig" in str(error):
            raise UserError(f"{source}: set dataset_config ({_one_line(error)})") from error
        if path.exists():
            raise UserError(f"{source}: the datasets library cannot read this folder ({_one_line(error)})") from error
        raise SourceMissing(
            f"{source}: not found on disk, and not on the Hub or the Hub is unreachable "
            f"({type(error).__name__}: {_one_line(error)})"
        ) from error


def _is_hub_folder(path: Path) -> bool:
    """Whether a folder that the datasets library reads is a Hub repository, not a data set saved to disk."""
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
    batches = cast("Iterator[pa.Table]", table.with_format("arrow").iter(1000))
    rows = (row for batch in batches for row in batch.to_pylist())
    for number, row in enumerate(rows, start=1):
        yield f"{source} row {number}", row


def _name_labels(
    rows: Iterator[tuple[str, dict]], column: str, names: list[str] | None, spellings: list[str] | None
) -> Iterator[tuple[str, dict]]:
    """Replace label ids by their names: sets number their labels in different orders.

    If no spelling is one of the names, the spellings are those of the ids, which stay.
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
    """Find the columns of `roles`, and of the uid if there is one: {role: column}.

    Args:
        source: name of the set in error messages.
        there: its columns, with repetitions.
        named: columns named by the user, by role.
        roles: required roles.

    Raises:
        UserError: for missing, ambiguous or repeated columns.
    """
    named = named or {}
    found, missing = {}, {}
    for role in (*roles, "uid"):
        looked_for = (named[role],) if role in named else COLUMN_NAMES[role]
        column = next(filter(None, (_match(name, there) for name in looked_for)), None)
        if column is not None:
            found[role] = column
        elif role != "uid" or role in named:
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
                f"{source}: {roles_of[column]}_column and {role}_column are both {column}; "
                f"name a different column for each"
            )
        roles_of[column] = role
        alike = [name for name in there if name != column and _plain(name) == _plain(column)]
        if alike and column not in (named.get(role), *COLUMN_NAMES[role]):
            raise UserError(
                f"{source}: {column} and {alike[0]} could each be the {role}; rename one, or set {role}_column"
            )
        if there.count(column) > 1:
            raise UserError(
                f"{source}: the heading has {column} {there.count(column)} times; rename those that are not the {role}"
            )
    return found


def _match(name: str, there: Sequence[str]) -> str | None:
    """The column called `name`, ignoring case, spaces and underscores.

    Of a nested column such as `example.premise`, only the outer name is checked; the header does not list the inner.
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
    """For each optional column, its possible names in a row, spelled as in `there`."""
    usual = SLICE_NAMES | {"label_counts": COUNT_NAMES, "annotators": ANNOTATOR_NAMES, "label_text": LABEL_TEXT_NAMES}
    return {role: tuple(_match(name, there) or name for name in names) for role, names in usual.items()}


def _wanted(found: Mapping[str, str], extras: Mapping[str, Sequence[str]], there: Sequence[str]) -> list[str]:
    """The columns to read."""
    wanted = {name.partition(".")[0] if name not in there else name for name in found.values()}
    wanted.update(name for names in extras.values() for name in names)
    return [name for name in there if name in wanted or name in SPLIT_COLUMNS]


def column_value(row: dict, column: str | None) -> object:
    """The value of a column, or of a nested one such as `example.premise`. `None` if the row has none."""
    if column in row:
        return row[column]
    outer, _, inner = (column or "").partition(".")
    return row[outer].get(inner) if inner and isinstance(row.get(outer), dict) else None


class _IdsExplained(Exception):
    """Raised if names beside the ids say what these mean. `spellings` has the ids in the order of the labels."""

    def __init__(self, spellings: list[str]):
        super().__init__(spellings)
        self.spellings = spellings


class _Labels:
    """Parses the labels of a set, and collects evidence of misread ones.

    Attributes:
        labels: the label set. `TWO_WAY_LABELS` replace SNLI's at the first label that only two-way sets have;
            `two_way` says so.
        ids: the ids among the labels.
        has_names: whether any label was a name.
        named: {id: counts of the labels named beside it}
    """

    def __init__(self, labels: Sequence[str], spellings: list[str] | None):
        self.labels, self.two_way = tuple(labels), False
        self.spellings = spellings
        if self.labels == LABELS and len(spellings or ()) == len(TWO_WAY_LABELS):
            self.use_two_way()
        self.ids: set[int] = set()
        self.has_names = False
        self.named: dict[int, Counter[str]] = defaultdict(Counter)
        self._read: dict[tuple[type, object], int] = {}

    def use_two_way(self) -> None:
        self.labels, self.two_way = TWO_WAY_LABELS, True

    def read(self, value: object) -> int:
        key = (type(value), value if isinstance(value, (str, int)) else repr(value))
        if key not in self._read:
            if self.labels == LABELS and not self.spellings and is_two_way_name(value):
                self.use_two_way()
                self._read.clear()
            self._read[key] = self._parse(value)
        return self._read[key]

    def _parse(self, value: object) -> int:
        if self.spellings is not None:
            return parse_label(value, self.labels, self.spellings)
        if self.labels != LABELS and is_id(value) and not is_name(value, self.labels):
            self.ids.add(_id(value))
            return 0  # whatever it means, `check_ids` raises
        label = parse_label(value, self.labels)
        if label != UNLABELLED:
            if is_id(value) and self.labels == LABELS:
                self.ids.add(label)
            else:
                self.has_names = True
        return label

    def read_annotator(self, value: object) -> int | None:
        """A label spelled like the gold labels, or a name. `None` if it is neither."""
        with suppress(UserError):
            return parse_label(value, self.labels, self.spellings)
        with suppress(UserError):
            return None if is_id(value) else parse_label(value, self.labels)
        return None

    def note_names(self, value: Any, row: dict, columns: Mapping[str, Sequence[str]]) -> None:
        """Count the names beside a label that is an id."""
        if not self.ids or not is_id(value):
            return
        for column in (*columns["label_text"], *columns["annotators"]):
            given = row.get(column)
            for name in given if isinstance(given, list) else (given,):
                if isinstance(name, str) and is_name(name, self.labels):
                    self.named[_id(value)][name] += 1

    def _explained(self) -> tuple[tuple[str, ...], list[str]] | None:
        """The labels, and their ids by majority of the names beside them. `None` if ambiguous."""
        names = {name for counts in self.named.values() for name in counts}
        labels = TWO_WAY_LABELS if self.labels == LABELS and any(map(is_two_way_name, names)) else self.labels
        ids: dict[int, int] = {}  # by label
        for id in self.ids:
            votes: Counter[int] = Counter()
            for name, count in self.named[id].items():
                votes[parse_label(name, labels)] += count
            label, most = votes.most_common(1)[0] if votes else (UNLABELLED, 0)
            if label in ids or 2 * most <= votes.total():
                return None
            ids[label] = id
        return (labels, [str(ids[label]) for label in range(len(labels))]) if len(ids) == len(labels) else None

    def check_ids(self, source: str) -> None:
        """Warn that ids are read as SNLI's, unless names beside them confirm it.

        Raises:
            _IdsExplained: if names beside the ids say that they mean something else.
            UserError: if their meaning is unknown: the labels are not SNLI's, or some of its ids are not used.
        """
        if not self.ids:
            return
        labels, explained = (None if self.has_names else self._explained()) or (self.labels, None)
        if labels == LABELS and explained == list(map(str, range(len(LABELS)))):
            return
        if explained is not None:
            meaning = ", ".join(f"{id} is {name}" for id, name in zip(explained, labels, strict=True))
            logger.warning("%s: label ids are read by the names beside them: %s", source, meaning)
            raise _IdsExplained(explained)
        if labels != LABELS or (not self.has_names and len(self.ids) < len(LABELS)):
            raise UserError(f"{source}: {self._unknown_ids()}")
        logger.warning(
            "%s: the labels are read as SNLI's ids: %s; if they mean something else, set label_spellings to the "
            "labels for %s, in that order",
            source,
            ", ".join(f"{index} is {name}" for index, name in enumerate(LABELS)),
            ", ".join(LABELS),
        )

    def _unknown_ids(self) -> str:
        ids = " and ".join(map(str, sorted(self.ids)))
        fix = f"set label_spellings to the labels for {', '.join(self.labels)}, in that order, such as "
        if self.labels == LABELS:
            fix += f"0 1 2 for SNLI's ids, or to those for {' and '.join(TWO_WAY_LABELS)}, such as 1 0"
        else:
            fix += " ".join(map(str, range(len(self.labels))))
        only = "some labels are" if self.has_names else "the only labels are"
        return f"{only} {ids}, whose meaning is unknown; {fix}"


def _id(value: Any) -> int:
    return int(float(value))


class _Uids:
    """Makes uids unique: predictions of two models are joined by uid."""

    def __init__(self):
        self._taken: set[str] = set()
        self._count: Counter = Counter()

    def take(self, uid: str) -> str:
        """`uid`, or if it is taken, `uid#2` and so on."""
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
    labels: _Labels,
    uid_prefix: str,
) -> tuple[dict[str, list], int]:
    """Check every row. Returns lists by column (labels as names), and the number of unlabelled rows."""
    pairs: dict[str, list] = {"uid": [], "premise": [], "hypothesis": [], "label": []}
    extras: dict[str, list] = {}
    extras_of: dict[tuple[str, ...], dict[str, list[str]]] = {}  # optional columns, by the keys of a row
    unfit: dict[str, list] = defaultdict(list)
    uids = _Uids()
    unlabelled = 0
    for index, (where, row) in enumerate(rows):
        value = column_value(row, columns["label"])
        if value is None and columns["label"].partition(".")[0] not in row:
            raise UserError(
                f"{where} has no {columns['label']}, only {', '.join(map(str, row))}; if the pair has no label, "
                f"write null or -"
            )
        try:
            label = labels.read(value)
        except UnknownLabel as error:
            there = _first_labels(chain([(where, row)], rows), columns["label"])
            raise UnknownLabel(f"{where}, column {columns['label']}: {error} (the column has {there})") from None
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
        is_named = uid not in (None, "") and uid == uid  # false for NaN
        pairs["uid"].append(uids.take(_encodable(uid) if is_named else f"{uid_prefix}-{index + 1}"))
        pairs["label"].append(labels.labels[label])
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
    if not set(pairs["label"]) <= set(labels.labels):
        raise UserError(
            f"{source}: the labels mix two-way and three-way names: {', '.join(sorted(set(pairs['label'])))}"
        )
    labels.check_ids(source)
    if unfit:
        what = ", ".join(f"{len(values):,} in {name} (such as {values[0]!r:.60})" for name, values in unfit.items())
        logger.warning("%s: ignored as annotator labels: %s", source, what)
    return pairs | extras, unlabelled


def _first_labels(rows: Iterator[tuple[str, dict]], column: str) -> str:
    """The first different labels in a column, for error messages."""
    there: list[object] = []
    with suppress(UserError):  # of a row further down
        for _, row in islice(rows, SHOWN_ROWS):
            if (value := column_value(row, column)) not in there:
                there.append(value)
    return ", ".join(f"{value!s:.40}" for value in there[:SHOWN_LABELS]) + (", …" if len(there) > SHOWN_LABELS else "")


def check_text(text: object, what: str) -> str:
    """A premise or hypothesis, stripped.

    Args:
        what: the beginning of error messages.

    Raises:
        UserError: if it is not a text, is blank, or holds a lone surrogate.
    """
    if not isinstance(text, str) or _is_blank(text):
        raise UserError(f"{what} is {'missing' if text is None else reprlib.repr(text)}; expected text")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"{what} holds {text[error.start : error.end]!a}, a lone surrogate, which cannot be encoded; remove it"
            ) from None
    return text.strip()


def _is_blank(text: str) -> bool:
    """Whether a text has only white space, control characters and zero-width marks."""
    return not WORD.search(text) and all(unicodedata.category(one) in BLANK_CATEGORIES for one in text)


def _encodable(value: object) -> str:
    return str(value).encode("utf-8", "backslashreplace").decode()


def _slice_values(row: dict, columns: Mapping[str, Sequence[str]]) -> dict[str, str | bool]:
    values = {name: _first_given(row, columns[name]) for name in SLICE_NAMES if columns[name]}
    return {
        name: str(value).strip().lower() in ("1", "1.0", "true", "yes") if name == "hard" else _encodable(value)
        for name, value in values.items()
        if value not in (None, "") and value == value  # false for NaN
    }


def _first_given(row: dict, names: Iterable[str]) -> object:
    return next((row[name] for name in names if row[name] is not None), None)


def _annotators(
    row: dict, columns: Mapping[str, Sequence[str]], labels: _Labels, label: int, unfit: dict[str, list]
) -> dict[str, object]:
    """`label_counts` and `agreement` of a row that at least two annotators labelled.

    Args:
        unfit: {column: values}, to which values are added that are neither counts nor labels.
    """
    if not columns["label_counts"] and not columns["annotators"]:
        return {}
    counts = None
    for name in columns["label_counts"]:
        if row.get(name) not in (None, ""):
            if _is_counts(row[name], len(labels.labels)):
                counts = counts or list(row[name])
            else:
                unfit[name].append(row[name])
    if counts is None:
        counts = [0] * len(labels.labels)
        for name in columns["annotators"]:
            given = row.get(name)
            for value in given if isinstance(given, (list, tuple)) else () if given is None else (given,):
                given_label = labels.read_annotator(value)
                if given_label is None:
                    unfit[name].append(value)
                elif given_label != UNLABELLED:
                    counts[given_label] += 1
    if sum(counts) < 2:
        return {}
    return {"label_counts": counts, "agreement": agreement(counts[label] / sum(counts))}


def _is_counts(value: object, labels: int) -> bool:
    if not isinstance(value, list) or len(value) != labels:
        return False
    return all(type(count) is int and 0 <= count < 2**31 for count in value)


def agreement(share: float) -> str:
    """The slice of a pair, by the share of annotators who gave the gold label."""
    if share == 1:
        return "all"
    return "80 to 99 %" if share >= 0.8 else "60 to 79 %" if share >= 0.6 else "under 60 %"
