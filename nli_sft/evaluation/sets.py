"""Load the sets that a run is evaluated on, and the pairs that its temperature is fitted on."""

import logging
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from datasets import Dataset

from .. import UserError
from ..configs import DataConfig, EvalConfig, TrainDataConfig
from ..data.sources import (
    SPLIT_NAMES,
    SourceMissing,
    fetch,
    is_whole,
    load_pairs,
    load_validation,
    reading_options,
    subsample,
)
from ..labels import LABELS

logger = logging.getLogger(__name__)

# Recipe keys for reading the rows of a source.
READING_KEYS = ("premise_column", "hypothesis_column", "label_column", "uid_column", "label_spellings")

# A temperature fitted on fewer pairs is too noisy.
MIN_PAIRS_TO_CALIBRATE = 100


def load_calibration_pairs(
    args: EvalConfig,
    *,
    trained_on: TrainDataConfig | None,
    labels: Sequence[str] = LABELS,
    seed: int,
    sets: Iterable["EvaluationSet"],
) -> Dataset | None:
    """Validation pairs of the run's own source to fit a temperature on, or `None`, with the reason logged.

    Pairs whose premise is in one of `sets` are left out: ChaosNLI, for one, consists of SNLI validation pairs.

    Args:
        trained_on: that source, or the one that a model is evaluated on; `None` for a model on a suite.
        labels: the label set of the run.
        seed: for the sample.
    """
    if not args.calibration_pairs:
        return None
    if trained_on is None:
        logger.warning("no temperature is fitted: a suite has no validation pairs; give a dataset_name instead")
        return None
    try:
        validation = load_validation(trained_on, labels)
    except SourceMissing as error:
        logger.warning("no temperature is fitted: the validation pairs cannot be loaded (%s)", error)
        return None
    evaluated = set().union(*(one.pairs["premise"][:] for one in sets))
    premises = validation["premise"][:]
    pairs = validation.select([index for index, premise in enumerate(premises) if premise not in evaluated])
    if len(pairs) < MIN_PAIRS_TO_CALIBRATE:
        logger.warning(
            "no temperature is fitted: only %d validation pairs have a premise outside the evaluation sets; "
            "at least %d are needed",
            len(pairs),
            MIN_PAIRS_TO_CALIBRATE,
        )
        return None
    return subsample(pairs, args.calibration_pairs, seed)


@dataclass(frozen=True)
class EvaluationSet:
    """The pairs of one split to evaluate a run on."""

    source: str
    split: str
    pairs: Dataset
    unlabelled: int  # pairs left out: annotators did not agree on a label
    name: str | None = None  # in a suite
    unlinked: int = 0  # edits left out: their original is missing

    def __str__(self) -> str:
        return self.name or f"{Path(self.source).name} {self.split}"


def load_evaluation_sets(
    args: EvalConfig, *, trained_on: TrainDataConfig, labels: Sequence[str] = LABELS
) -> list[EvaluationSet]:
    """Load the sets to evaluate a run on: by default the test split of its own source, then any further `sources`.

    If its own source has no labelled test split (a single file, for example), its validation pairs are used. Other
    sources are read with the columns and label spellings of the run if these fit and `args` sets no others.

    A further source is a name, with an optional split after a colon: `hans.jsonl`, `demo:test`. The colon of a URL is
    followed by a slash and starts no split.

    Args:
        labels: the label set of the run.

    Raises:
        UserError: for a set with other labels, before any weights are loaded.
    """
    if args.dataset_name is None:
        sets = [_load_own_set(trained_on, labels, args.split)]
    else:
        sets = [_load_other_set(args, labels, args.split, trained_on)]
    for source in args.sources or ():
        match = re.fullmatch(r"(.+?)(?::([^:/]+))?", source)
        assert match is not None, "sources are not empty"
        name, split = match.groups()
        sets.append(_load_other_set(DataConfig(dataset_name=name), labels, split, trained_on))
    if args.max_samples is None:
        return sets
    return [replace(one, pairs=subsample(one.pairs, args.max_samples, args.seed)) for one in sets]


def _load_own_set(data: TrainDataConfig, labels: Sequence[str], split: str | None) -> EvaluationSet:
    """A split of the source that a run was trained on; train and validation are split as for the run."""
    dropped: Counter = Counter()
    try:
        if split in SPLIT_NAMES["validation"]:
            pairs = load_validation(data, labels, dropped)
        else:
            name = data.train_split if split == "train" and data.train_split else split or "test"
            pairs = load_pairs(data.dataset_name, name, dropped=dropped, **reading_options(data, labels))
    except SourceMissing:
        if split is not None:
            raise
        own = _load_own_set(data, labels, "validation")
        logger.warning(
            "%s has no labelled test split. The run is evaluated on its %s validation pairs, which may also have "
            "selected its checkpoint; set dataset_name or split to use other pairs",
            data.dataset_name,
            f"{len(own.pairs):,}",
        )
        return own
    return EvaluationSet(data.dataset_name, split or "test", pairs, dropped["unlabelled"])


def _load_other_set(
    data: DataConfig, labels: Sequence[str], split: str | None, trained_on: DataConfig
) -> EvaluationSet:
    """A split of another source, or all of a file, read with the columns and spellings of the run if these fit."""
    split = split or (None if is_whole(fetch(data.dataset_name)) else "test")
    keys = [key for key in READING_KEYS if getattr(data, key) is None and getattr(trained_on, key) is not None]

    def load(data: DataConfig) -> EvaluationSet:
        dropped: Counter = Counter()
        pairs = load_pairs(data.dataset_name, split, dropped=dropped, **reading_options(data, labels))
        return EvaluationSet(data.dataset_name, split or "all", pairs, dropped["unlabelled"])

    if not keys:
        return load(data)
    try:
        found = load(replace(data, **{key: getattr(trained_on, key) for key in keys}))
    except SourceMissing:
        raise
    except UserError as error:
        try:
            return load(data)
        except UserError:
            raise error from None
    logger.warning("%s is read with %s of the run's own source", data.dataset_name, ", ".join(keys))
    return found
