"""Suites: the sets that a run is judged on together, listed in a YAML file.

    sets:
      snli: {dataset_name: stanfordnlp/snli, split: test}
      mine: {dataset_name: data/mine.csv, premise_column: text, label_spellings: ["yes", "unknown", "no"]}
    label_order_pairs: 2000
    prompt_pairs: 2000

A set that cannot be had is told as missing, with the reason, wherever the others are told.
"""

import difflib
from collections import Counter
from dataclasses import dataclass, field, fields
from difflib import SequenceMatcher
from functools import cache
from pathlib import Path

from datasets import Dataset
from huggingface_hub import constants, get_session

from .. import UserError
from ..configs import DataConfig, EvalConfig, read_yaml
from ..data.demo import is_demo
from ..data.files import SUFFIXES
from ..data.sources import URL, SourceMissing, fetch, has_split, load_pairs, pairs_dataset, subsample
from ..labels import LABELS
from ..runs import HYPOTHESIS_ONLY, evaluation_folder, write_json
from .evaluate import Checks
from .sets import EvaluationSet

# How long the Hub may take to answer.
HUB_SECONDS = 5


@dataclass
class SuiteSet(DataConfig):
    """One set of a suite: where it is on the Hub or on disk, as in a recipe, and what is special about it."""

    name: str = ""
    dataset_name: str | None = field(default=None, metadata={"help": "Hub id, folder, file or URL of a file."})
    split: str | None = field(default=None, metadata={"help": "Split to evaluate on; of a single file, all of it."})
    part_of: str | None = field(
        default=None, metadata={"help": "A set listed before, of which this is the part that `where` marks."}
    )
    where: str | None = field(default=None, metadata={"help": "The column of `part_of` that marks it, such as hard."})
    originals: str | None = field(
        default=None,
        metadata={
            "help": "Where the pairs are of which those of this set are minimal edits: as dataset_name, or under the "
            "name of the set and _originals in --suite_root."
        },
    )


@dataclass(frozen=True)
class Suite:
    """Sets to judge a run on, and what to check on the first of them."""

    name: str
    sets: list[SuiteSet]
    checks: Checks


def load_suite(name: str, folder: Path) -> Suite:
    """Read a suite: a .yaml file, or the name of one in `folder`.

    Raises:
        UserError: naming the file and the key, for a suite that cannot be meant.
    """
    path = Path(name) if Path(name).suffix in (".yaml", ".yml") else folder / f"{name}.yaml"
    if not path.is_file():
        there = ", ".join(sorted(file.stem for file in folder.glob("*.yaml")))
        raise UserError(f"suite: {name!r} is neither a .yaml file that is there nor one of {there}")
    content, written = read_yaml(path), read_yaml(path, as_written=True)
    checks = [f.name for f in fields(Checks)]
    if not isinstance(content.get("sets"), dict) or not content["sets"]:
        raise UserError(f"{path}: a suite has the key sets, with one or more sets by name, and may have {checks}")
    _check_keys(path, content, ["sets", *checks])
    known = [f.name for f in fields(SuiteSet) if f.name != "name"]
    sets = []
    for (set_name, entry), as_written in zip(content["sets"].items(), written["sets"].values(), strict=True):
        entry = entry or {}
        _check_keys(f"{path}, set {set_name}", entry, known)
        if entry.get("label_spellings"):  # yes and no are words here, as in recipes
            entry = entry | {"label_spellings": as_written["label_spellings"]}
        sets.append(SuiteSet(name=set_name, **entry))
        if sets[-1].part_of not in (None, *(one.name for one in sets[:-1])):
            raise UserError(f"{path}, set {set_name}: part_of {sets[-1].part_of!r} is not a set listed before it")
    return Suite(path.stem, sets, Checks(**{key: content[key] for key in checks if key in content}))


def load_suite_sets(suite: Suite, args: EvalConfig) -> tuple[list[EvaluationSet], dict[str, str]]:
    """The sets of a suite that can be had, and why the others cannot: {name: reason}.

    A set is taken from `args.suite_root` if it is there under its name, as a file or as a folder with one file a
    split; else from where the suite says that it is.

    Raises:
        UserError: if none can be had, or one that is there cannot be read.
    """
    if args.suite_root is not None and not Path(args.suite_root).expanduser().is_dir():
        raise UserError(f"suite_root {args.suite_root} is not a folder")
    sets: dict[str, EvaluationSet] = {}
    missing: dict[str, str] = {}
    for one in suite.sets:
        try:
            sets[one.name] = _load_set(one, sets, args)
        except SourceMissing as error:
            missing[one.name] = str(error)
    if not sets:
        raise UserError(f"suite {suite.name}: none of its sets can be had; {missing[suite.sets[0].name]}")
    return list(sets.values()), missing


def _load_set(one: SuiteSet, before: dict[str, EvaluationSet], args: EvalConfig) -> EvaluationSet:
    dropped: Counter = Counter()
    source, split, pairs = _find(one, before, args, dropped)
    if one.originals is not None:
        _, _, originals = _load(f"{one.name}_originals", one.originals, one, args, dropped)
        pairs = link_edits(originals, pairs, dropped)
    if args.max_samples is not None:
        pairs = _subsample(pairs, args.max_samples, args.seed)
    left_out = {"unlabelled": dropped["unlabelled"], "unlinked": dropped["unlinked"]}
    return EvaluationSet(source, split or "all", pairs, name=one.name, **left_out)


def _find(
    one: SuiteSet, before: dict[str, EvaluationSet], args: EvalConfig, dropped: Counter
) -> tuple[str, str | None, Dataset]:
    """(source, split, pairs) of a set, or of the part of a set before that it is."""
    whole = before.get(one.part_of)
    if _in_root(one.name, args) is None and whole is not None and one.where in whole.pairs.column_names:
        marks = whole.pairs[one.where]
        return whole.source, whole.split, whole.pairs.select([index for index, mark in enumerate(marks) if mark])
    return _load(one.name, one.dataset_name, one, args, dropped)


def _load(
    name: str, elsewhere: str | None, one: SuiteSet, args: EvalConfig, dropped: Counter
) -> tuple[str, str | None, Dataset]:
    local = _in_root(name, args)
    if local is not None:
        # As published, or as ours: the columns and the split that a suite names are those of its Hub set.
        split = next((split for split in ("test", "validation") if has_split(local, split)), None)
        if split is None and Path(local).is_dir():
            raise SourceMissing(f"{local} has no file for a test or validation split")
        return local, split, load_pairs(local, split, dropped=dropped)
    if elsewhere is None:
        where = "" if args.suite_root is None else f" {args.suite_root}"
        raise SourceMissing(f"there is no {name} in suite_root{where}")
    if not (URL.match(elsewhere) or is_demo(elsewhere) or fetch(elsewhere).exists() or hub_answers()):
        raise SourceMissing(
            f"{elsewhere}: the Hub is out of reach, and no such path is here; HF_HUB_OFFLINE=1 takes what was fetched "
            f"before"
        )
    split = one.split
    if fetch(elsewhere).is_file() and not has_split(elsewhere, split or "test"):
        split = None
    elif split is None:
        split = "test"
    pairs = load_pairs(
        elsewhere,
        split,
        config=one.dataset_config,
        revision=one.dataset_revision,
        columns=one.columns(),
        label_spellings=one.label_spellings,
        dropped=dropped,
    )
    return elsewhere, split, pairs


@cache
def hub_answers() -> bool:
    """Whether the Hub can be reached, asked once: the datasets library would try half a minute for each set."""
    if constants.HF_HUB_OFFLINE:
        return True  # then nothing is asked for, and what was fetched before is taken
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS)
    except Exception:  # of the HTTP client, of proxies, of the operating system
        return False
    return True


def _in_root(name: str, args: EvalConfig) -> str | None:
    if args.suite_root is None:
        return None
    path = Path(args.suite_root).expanduser() / name
    candidates = [path, *(path.with_name(path.name + suffix) for suffix in SUFFIXES)]
    return next((str(candidate) for candidate in candidates if candidate.exists()), None)


def link_edits(originals: Dataset, edited: Dataset, dropped: Counter) -> Dataset:
    """Originals and their edits in one set, the edits with the uid of their original as `edit_of`.

    An edit keeps one text of its original and changes the other, and with it the label; where several originals
    qualify, it is the one with the most alike other text. Edits of none are left out and counted as `unlinked`.
    """
    rows = {column: [] for column in ("uid", "premise", "hypothesis", "label", "edit_of")}

    def add(row: dict, uid: str, edit_of: str | None) -> None:
        values = uid, row["premise"], row["hypothesis"], LABELS[row["label"]], edit_of
        for column, value in zip(rows, values, strict=True):
            rows[column].append(value)

    by_text: dict[tuple[str, str], list[dict]] = {}
    for row in originals:
        add(row, row["uid"], None)
        for kept, changed in (("premise", "hypothesis"), ("hypothesis", "premise")):
            by_text.setdefault((kept, row[kept]), []).append(row | {"changed": row[changed]})
    for row in edited:
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
    return pairs_dataset(rows)


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
    """Write `eval/<suite>.json`: which evaluations of the run are those of the suite, and why others are missing."""
    order = [one.name for one in suite.sets]
    if not (Path(run) / HYPOTHESIS_ONLY).is_dir():
        order.append(HYPOTHESIS_ONLY)
        reason = "the run has no hypothesis-only baseline; hypothesis_only_control: true trains one"
        missing = missing | {HYPOTHESIS_ONLY: reason}
    keys = {one.name: evaluation_folder(run, one.name, one.split).name for one in sets}
    content = {"suite": suite.name, "order": order, "evaluated": keys, "missing": missing}
    write_json(Path(run) / "eval" / f"{suite.name}.json", content)
