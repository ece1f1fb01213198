"""Suites: sets that a run is evaluated on together, listed in a YAML file.

    sets:
      snli: {dataset_name: stanfordnlp/snli, split: test}
      mine: {dataset_name: data/mine.csv, premise_column: text, label_spellings: ["yes", "unknown", "no"]}
    label_order_pairs: 2000
    prompt_pairs: 2000

Reports list a set that cannot be loaded as missing, with the reason.
"""

import difflib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from difflib import SequenceMatcher
from functools import cache
from pathlib import Path
from typing import Any, cast

from datasets import Dataset
from huggingface_hub import constants, get_session

from .. import UserError
from ..configs import DataConfig, EvalConfig, read_yaml
from ..data.demo import is_demo
from ..data.files import SUFFIXES
from ..data.sources import URL, SourceMissing, fetch, has_split, load_pairs, pairs_dataset, subsample
from ..labels import LABELS, UnknownLabel
from ..runs import HYPOTHESIS_ONLY, evaluation_folder, is_trained, read_json, write_json
from .evaluate import Checks
from .sets import EvaluationSet

# Timeout of the check that the Hub can be reached.
HUB_SECONDS = 5


@dataclass
class SuiteSet(DataConfig):
    """One set of a suite. The inherited keys say, as in a recipe, where it is and how to read it."""

    name: str = ""
    dataset_name: str | None = field(default=None, metadata={"help": "Hub id, folder, file or URL of a file."})
    split: str | None = field(default=None, metadata={"help": "Split to evaluate on; of a single file, all of it."})
    part_of: str | None = field(
        default=None,
        metadata={"help": "Name of a set listed before this one, of which this set is a subset (see `where`)."},
    )
    where: str | None = field(
        default=None, metadata={"help": "Column of `part_of` that marks the subset, such as hard."}
    )
    originals: str | None = field(
        default=None,
        metadata={
            "help": "Source of the original pairs that this set edits minimally: given as dataset_name is, or in "
            "--suite_root as the name of this set with _originals appended."
        },
    )


@dataclass(frozen=True)
class Suite:
    """Sets to evaluate a run on, and the checks to run on the first of them."""

    name: str
    sets: list[SuiteSet]
    checks: Checks


def load_suite(name: str, folder: Path) -> Suite:
    """Read a suite: a .yaml file, or the name of one in `folder`.

    Raises:
        UserError: with the file and the key, if the suite is invalid.
    """
    path = Path(name) if Path(name).suffix in (".yaml", ".yml") else folder / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in folder.glob("*.yaml")))
        raise UserError(f"suite: {name!r} is neither an existing .yaml file nor one of: {known}")
    content: dict[str, Any] = read_yaml(path)
    texts: dict[str, Any] = read_yaml(path, as_written=True)
    checks = [f.name for f in fields(Checks)]
    if not isinstance(content.get("sets"), dict) or not content["sets"]:
        raise UserError(f"{path}: the key sets is missing or empty; list at least one set by name under it")
    _check_keys(path, content, ["sets", *checks])
    known = [f.name for f in fields(SuiteSet) if f.name != "name"]
    sets = []
    for (set_name, entry), entry_texts in zip(content["sets"].items(), texts["sets"].values(), strict=True):
        entry = entry or {}
        _check_keys(f"{path}, set {set_name}", entry, known)
        if entry.get("label_spellings"):  # as in recipes, yes and no are words, not booleans
            entry = entry | {"label_spellings": entry_texts["label_spellings"]}
        sets.append(SuiteSet(name=set_name, **entry))
        if sets[-1].part_of not in (None, *(one.name for one in sets[:-1])):
            raise UserError(
                f"{path}, set {set_name}: part_of {sets[-1].part_of!r} is not a set listed before this one"
            )
    return Suite(path.stem, sets, Checks(**{key: content[key] for key in checks if key in content}))


def load_suite_sets(
    suite: Suite, args: EvalConfig, labels: Sequence[str] = LABELS
) -> tuple[list[EvaluationSet], dict[str, str]]:
    """Load the sets of a suite; return also {name: reason} for those that are missing.

    A run with labels other than SNLI's misses the sets that have others.

    A set is read from `args.suite_root` if there is a file, or a folder with one file per split, with its name; else
    from the source that the suite gives.

    Raises:
        UserError: if all sets are missing, or one exists but cannot be read.
    """
    if args.suite_root is not None and not Path(args.suite_root).expanduser().is_dir():
        raise UserError(f"suite_root {args.suite_root} is not a folder")
    sets: dict[str, EvaluationSet] = {}
    missing: dict[str, str] = {}
    for one in suite.sets:
        try:
            sets[one.name] = _load_set(one, sets, args, labels)
        except SourceMissing as error:
            missing[one.name] = str(error)
        except UnknownLabel as error:
            if tuple(labels) == LABELS:
                raise
            missing[one.name] = str(error)
    if not sets:
        raise UserError(f"suite {suite.name}: none of its sets can be loaded; {missing[suite.sets[0].name]}")
    return list(sets.values()), missing


def _load_set(
    one: SuiteSet, before: dict[str, EvaluationSet], args: EvalConfig, labels: Sequence[str]
) -> EvaluationSet:
    dropped: Counter = Counter()
    source, split, pairs = _find(one, before, args, labels, dropped)
    if one.originals is not None:
        _, _, originals = _load(f"{one.name}_originals", one.originals, one, args, labels, dropped)
        pairs = link_edits(originals, pairs, dropped)
    if args.max_samples is not None:
        pairs = _subsample(pairs, args.max_samples, args.seed)
    left_out = {"unlabelled": dropped["unlabelled"], "unlinked": dropped["unlinked"]}
    return EvaluationSet(source, split or "all", pairs, name=one.name, **left_out)


def _find(
    one: SuiteSet, before: dict[str, EvaluationSet], args: EvalConfig, labels: Sequence[str], dropped: Counter
) -> tuple[str, str | None, Dataset]:
    """(source, split, pairs) of a set, or of the subset of a set listed before."""
    whole = before.get(one.part_of) if one.part_of is not None else None
    if _in_root(one.name, args) is None and whole is not None and one.where in whole.pairs.column_names:
        marks = whole.pairs[one.where]
        return whole.source, whole.split, whole.pairs.select([index for index, mark in enumerate(marks) if mark])
    return _load(one.name, one.dataset_name, one, args, labels, dropped)


def _load(
    name: str, elsewhere: str | None, one: SuiteSet, args: EvalConfig, labels: Sequence[str], dropped: Counter
) -> tuple[str, str | None, Dataset]:
    local = _in_root(name, args)
    if local is not None:
        # The columns and the split in the suite are those of the Hub set, not of a local copy.
        split = next((split for split in ("test", "validation") if has_split(local, split)), None)
        if split is None and Path(local).is_dir():
            raise SourceMissing(f"{local} has no file for a test or validation split")
        return local, split, load_pairs(local, split, labels=labels, dropped=dropped)
    if elsewhere is None:
        where = "" if args.suite_root is None else f" {args.suite_root}"
        raise SourceMissing(f"there is no {name} in suite_root{where}")
    if not (URL.match(elsewhere) or is_demo(elsewhere) or fetch(elsewhere).exists() or hub_answers()):
        raise SourceMissing(
            f"{elsewhere}: the Hub cannot be reached and there is no such path; set HF_HUB_OFFLINE=1 to read the cache"
        )
    split = one.split
    if fetch(elsewhere).is_file() and not has_split(elsewhere, split or "test"):
        split = None
    elif split is None:
        split = "test"
    pairs = load_pairs(
        elsewhere,
        split,
        labels=labels,
        config=one.dataset_config,
        revision=one.dataset_revision,
        columns=one.columns(),
        label_spellings=one.label_spellings,
        dropped=dropped,
    )
    return elsewhere, split, pairs


@cache
def hub_answers() -> bool:
    """Whether the Hub can be reached. Checked once, because datasets would retry for half a minute for each set."""
    if constants.HF_HUB_OFFLINE:
        return True  # datasets then reads its cache only
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS)
    except Exception:  # from the HTTP client, a proxy or the operating system
        return False
    return True


def _in_root(name: str, args: EvalConfig) -> str | None:
    if args.suite_root is None:
        return None
    path = Path(args.suite_root).expanduser() / name
    candidates = [path, *(path.with_name(path.name + suffix) for suffix in SUFFIXES)]
    return next((str(candidate) for candidate in candidates if candidate.exists()), None)


def link_edits(originals: Dataset, edited: Dataset, dropped: Counter) -> Dataset:
    """Join originals and their edits into one set, where an edit has the uid of its original as `edit_of`.

    An edit keeps one text of its original and changes the other text and the label. If several originals qualify,
    the one with the most similar changed text is used. Edits without an original are left out and counted as
    `unlinked`.
    """
    rows = {column: [] for column in ("uid", "premise", "hypothesis", "label", "edit_of")}
    labels = originals.features["label"].names

    def add(row: dict[str, Any], uid: str, edit_of: str | None) -> None:
        values = uid, row["premise"], row["hypothesis"], labels[row["label"]], edit_of
        for column, value in zip(rows, values, strict=True):
            rows[column].append(value)

    by_text: dict[tuple[str, str], list[dict]] = {}
    for row in cast(Iterable[dict[str, Any]], originals):
        add(row, row["uid"], None)
        for kept, changed in (("premise", "hypothesis"), ("hypothesis", "premise")):
            by_text.setdefault((kept, row[kept]), []).append(row | {"changed": row[changed]})
    for row in cast(Iterable[dict[str, Any]], edited):
        found = [
            (SequenceMatcher(None, row[changed], original["changed"]).ratio(), original["uid"])
            for kept, changed in (("premise", "hypothesis"), ("hypothesis", "premise"))
            for original in by_text.get((kept, row[kept]), ())
            if original["label"] != row["label"]
        ]
        if found:
            add(row, f"edit-{row['uid']}", max(found)[1])
        else:
            dropped["unlinked"] += 1
    return pairs_dataset(rows, labels)


def _subsample(pairs: Dataset, n: int, seed: int) -> Dataset:
    if "edit_of" not in pairs.column_names or n >= len(pairs):
        return subsample(pairs, n, seed)
    edit_of = pairs["edit_of"]
    originals = pairs.select([index for index, uid in enumerate(edit_of) if uid is None])
    kept = set(subsample(originals, max(1, n * len(originals) // len(pairs)), seed)["uid"])
    of = zip(edit_of, pairs["uid"], strict=True)
    return pairs.select([index for index, (original, uid) in enumerate(of) if (original or uid) in kept])


def _check_keys(where: object, content: dict, known: list[str]) -> None:
    for key in content:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            raise UserError(f"{where}: unknown key {key!r}{f'; did you mean {near[0]!r}?' if near else ''}")


def write_suite(run: str | Path, suite: Suite, sets: list[EvaluationSet], missing: dict[str, str]) -> None:
    """Write `eval/<suite>.json`: the evaluations of the run that belong to the suite, and why others are missing."""
    order = [one.name for one in suite.sets]
    record = read_json(Path(run) / "run.json")
    if is_trained(record) and not (Path(run) / HYPOTHESIS_ONLY).is_dir():
        order.append(HYPOTHESIS_ONLY)
        reason = "the run has no hypothesis-only baseline; hypothesis_only_control: true trains one"
        missing = missing | {HYPOTHESIS_ONLY: reason}
    keys = {one.name: evaluation_folder(run, one.name or one.source, one.split).name for one in sets}
    content = {"suite": suite.name, "order": order, "evaluated": keys, "missing": missing}
    write_json(Path(run) / "eval" / f"{suite.name}.json", content)
