"""Runs laid side by side: what differs, how good each is, what it cost, and whether one is better than another.

A run is read from its folder. What is in W&B is fetched into folders of the same kind first, so that one class and one
code serve both. wandb is imported only for that.
"""

import fnmatch
import itertools
import json
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.special import expit, logit
from scipy.stats import binomtest, t, ttest_ind

from .. import UserError
from ..evaluation.comparison import MIN_PREMISES, Comparison, compare, points
from ..evaluation.slices import LEVEL, holm
from ..labels import LABELS, TWO_WAY_LABELS, to_two_way
from ..runs import evaluation_folders, read_metrics, read_predictions, read_run, run_config

logger = logging.getLogger(__name__)

# Keys that say where a run was kept, what was printed and how batches were fed, not what was learned; and sizes, which
# follow from the rest.
BOOKKEEPING = re.compile(
    r"parameters_\w+|output_dir|run_name|report_to|resume_from_checkpoint|disable_tqdm|save_\w+|logging_\w+|log_level\w*|"
    r"wandb_\w+|trackio_\w+|project|hub_\w+|push_to_hub|hypothesis_only_control|"
    r"use_cpu|eval_on_start|per_device_eval_batch_size|dataloader_(num_workers|pin_memory|persistent_workers|prefetch_factor)"
)

# Keys in which repetitions of one run may differ. A seed also draws the pairs where a recipe asks for a part of them.
REPLICATED = {"seed", "data_seed", "train_fingerprint", "git_commit", "git_dirty"}

# Keys in which the points of one learning curve may differ besides: what follows from the number of training pairs.
SIZED = re.compile(r"max_train_samples|train_pairs|pairs_of_\w+|dropped_\w+")

# With fewer seeds a side, no method is called better than another.
FEWEST_SEEDS = 3

# Runs are ranked together only where these are the same.
JUDGED_ON = ("validation_fingerprint", "prompt_fingerprint")

# What `tracking` sends to W&B as files of a run, and `fetch_runs` makes a run folder of again.
RUN_FILES = ("run.json", "recipe.yaml", "prompt.json", "eval/*/metrics.json", "eval/*/predictions.parquet")

# What a run has for a key that its recipe leaves out.
DEFAULT = "default"


@dataclass(frozen=True)
class Estimate:
    """A share with its 95 % interval, over `n` pairs or `n` runs."""

    value: float
    low: float
    high: float
    n: int


class Judged:
    """One split of one source on which a run was judged: `metrics.json` and `predictions.parquet` of its folder."""

    def __init__(self, folder: Path):
        self.key = folder.name
        self.summary = read_metrics(folder)
        self._predictions = folder / "predictions.parquet"

    @property
    def models(self) -> list[str]:
        """Who was judged: `base`, `tuned` and the controls."""
        return [name for name, figures in self.summary.items() if isinstance(figures, dict) and "accuracy" in figures]

    def accuracy(self, model: str = "tuned") -> Estimate | None:
        """Accuracy of `base`, `tuned` or a control with Wilson's interval; `None` where it was not judged."""
        figures = self.summary.get(model)
        return figures and Estimate(figures["accuracy"], *figures["accuracy_interval"], self.summary["pairs"])

    @cached_property
    def table(self) -> pd.DataFrame | None:
        """Its pairs: uid, premise, hypothesis, label, and the predictions in the labels of the set.

        `None` where only the figures were kept.
        """
        if not self._predictions.is_file():
            return None
        table = read_predictions(self._predictions.parent)
        columns = [name for name in table if name.endswith("_prediction")]
        table = table[["uid", "premise", "hypothesis", "label", *columns]]
        if (table["label"] == TWO_WAY_LABELS[1]).any():
            names = {name: TWO_WAY_LABELS[to_two_way(i)] for i, name in enumerate(LABELS)}
            table = table.assign(**{name: table[name].map(names) for name in columns})
        return table


class RunRecord:
    """One training and all that is known of it, from its run folder.

    Attributes:
        name: short, unique among those compared with it.
        source: the folder, or `entity/project/id` in W&B.
        recipe, prompt, record: what `runs.read_run` gives.
        judged: {name of the evaluation: what it holds}, such as `snli-test`.

    Raises:
        UserError: if the folder is not that of a finished run.
    """

    def __init__(self, folder: str | Path, *, name: str | None = None, source: str | None = None):
        folder = Path(folder)
        self.recipe, self.prompt, self.record = read_run(folder)
        self.name = name or folder.resolve().name
        self.source = source or str(folder)
        self.judged = {path.name: Judged(path) for path in evaluation_folders(folder)}

    @cached_property
    def config(self) -> dict[str, object]:
        """What `run_config` makes of it: the config that W&B shows."""
        return run_config(self.recipe, self.prompt, self.record)

    @property
    def validation(self) -> Estimate:
        """Label accuracy of the checkpoint that was kept on the validation pairs, with Wilson's interval."""
        return self._on_validation(self.record["validation"]["eval_accuracy"])

    @property
    def base_validation(self) -> Estimate | None:
        """The same of the base, where the recipe asked for it with `eval_on_start`."""
        return next((self._on_validation(a) for step, _, a in self.curve if step == 0), None)

    def _on_validation(self, accuracy: float) -> Estimate:
        pairs = self.config["validation_pairs"]
        interval = binomtest(round(accuracy * pairs), pairs).proportion_ci(method="wilson")
        return Estimate(accuracy, interval.low, interval.high, pairs)

    @property
    def curve(self) -> list[tuple[int, float, float]]:
        """(step, epoch, validation accuracy), one a step."""
        by_step = {}
        for entry in self.record["history"]:
            if "eval_accuracy" in entry:
                # The checkpoint that was kept is judged once more at the end, at the last step: the first stands.
                by_step.setdefault(entry["step"], (entry["step"], entry["epoch"], entry["eval_accuracy"]))
        return [by_step[step] for step in sorted(by_step)]

    @property
    def cost(self) -> dict[str, float]:
        """What `run_cost` finds."""
        return run_cost(self.record)

    @property
    def base(self) -> str:
        """The base model, with what makes its predictions differ."""
        model = Path(str(self.config["model"])).name
        quantisation = self.config["quantisation"]
        return f"base {model}" if quantisation == "none" else f"base {model} in {quantisation}"


def run_cost(record: Mapping) -> dict[str, float]:
    """What a training took, of what was measured: seconds in all and of training, pairs a second, GiB."""
    resources = record.get("resources", {})
    training = resources.get("phases", {}).get("training", {})
    processes = resources.get("processes", [])
    devices = [process["device"] for process in processes if process["device"]]
    cost = {
        "seconds": record["seconds"],
        "training_seconds": training.get("seconds", record["train"]["train_runtime"]),
        "pairs_per_second": training.get("pairs_per_second"),
        "tokens_per_second": training.get("tokens_per_second"),
        "peak_ram_gib": sum(process["peak_ram_bytes"] for process in processes) / 2**30 or None,
        "peak_gpu_gib": max((device["peak_allocated_bytes"] for device in devices), default=0) / 2**30 or None,
    }
    return {name: figure for name, figure in cost.items() if figure is not None}


@dataclass(frozen=True)
class Replicates:
    """Runs that differ in nothing but their seeds: the mean of their accuracies, with Student's interval.

    Of one run it is the run's own accuracy, with Wilson's.
    """

    name: str
    runs: list[RunRecord]

    @property
    def validation(self) -> Estimate:
        return _mean([run.validation for run in self.runs])

    def accuracy(self, key: str, model: str = "tuned") -> Estimate | None:
        """The mean on one evaluation, where all runs were judged on the same pairs of it."""
        if not all(key in run.judged for run in self.runs):
            return None
        if len({run.judged[key].summary["data_fingerprint"] for run in self.runs}) > 1:
            return None
        estimates = [run.judged[key].accuracy(model) for run in self.runs]
        return None if None in estimates else _mean(estimates)


@dataclass(frozen=True)
class LearningCurve:
    """Runs that differ in nothing but the number of their training pairs, and their seeds.

    Attributes:
        points: {number of training pairs: the runs trained on so many}, in ascending order.
    """

    name: str
    points: dict[int, Replicates]


def _mean(estimates: Sequence[Estimate]) -> Estimate:
    if len(estimates) == 1:
        return estimates[0]
    values = [estimate.value for estimate in estimates]
    n, mean = len(values), float(np.mean(values))
    half = float(t.ppf(0.975, n - 1) * np.std(values, ddof=1) / np.sqrt(n))
    if half == 0 or not 0 < mean < 1:
        return Estimate(mean, mean, mean, n)
    # On the logit scale, where no interval reaches 0 or 1 (delta method).
    low, high = expit(logit(mean) + np.array([-half, half]) / (mean * (1 - mean)))
    return Estimate(mean, float(low), float(high), n)


@dataclass(frozen=True)
class Ranking:
    """Runs that may be ranked together: judged on the same validation pairs with the same prompt.

    Attributes:
        runs: by validation accuracy, the best first.
        differing: the config keys in which they differ.
        replicates: sets of two or more of them that differ in their seeds alone, by mean validation accuracy.
        learning_curves: sets of them that differ in the number of training pairs, and in their seeds, alone.
    """

    runs: list[RunRecord]
    differing: list[str]
    replicates: list[Replicates]
    learning_curves: list[LearningCurve]

    @property
    def methods(self) -> list[Replicates]:
        """The replicates, and each other run by itself, by validation accuracy."""
        repeated = {run.name for group in self.replicates for run in group.runs}
        single = [Replicates(run.name, [run]) for run in self.runs if run.name not in repeated]
        return sorted([*self.replicates, *single], key=lambda method: -method.validation.value)

    @property
    def bases(self) -> list[str]:
        """The names of the bases that the runs were made from."""
        return list(dict.fromkeys(run.base for run in self.runs))

    def base_validation(self, base: str) -> Estimate | None:
        """A base's accuracy on validation, where any of its runs asked for it."""
        return next((run.base_validation for run in self.runs if run.base == base and run.base_validation), None)

    def base_results(self, base: str, key: str) -> Judged | None:
        """An evaluation that holds a base's predictions, where any of its runs went through it."""
        return next((run.judged[key] for run in self.runs if run.base == base and key in run.judged), None)

    @property
    def judged(self) -> list[str]:
        """The evaluations that any of the runs went through."""
        return sorted({key for run in self.runs for key in run.judged})

    def differences(self, run: RunRecord) -> dict[str, object]:
        """What a run has for each of the keys that differ."""
        return {key: run.config.get(key, DEFAULT) for key in self.differing}


@dataclass(frozen=True)
class PairedTest:
    """Two sets of predictions on the pairs that both judged.

    Attributes:
        evaluation: such as `snli-test`.
        first, second: names of two runs, or of a base.
        comparison: of `first`, as before, with `second`, as after.
        p_value: that of the comparison, corrected with those of all pairs of runs on this evaluation (Holm, 1979).
        tests: how many those are.
    """

    evaluation: str
    first: str
    second: str
    comparison: Comparison
    p_value: float
    tests: int

    @property
    def better(self) -> str | None:
        """The name of the better one; `None` unless both the interval and the corrected test allow the claim."""
        low, high = self.comparison.interval
        if self.comparison.premises < MIN_PREMISES or low <= 0 <= high or self.p_value >= LEVEL:
            return None
        return self.second if low > 0 else self.first

    def __str__(self) -> str:
        c = self.comparison
        p = "p < 0.001" if self.p_value < 0.001 else f"p = {self.p_value:.3f}"
        figures = (
            f"{c.after:.1%} against {c.before:.1%} on the {c.pairs:,} shared {self.evaluation} pairs, "
            f"{points(c.difference)} points (95% interval {points(c.interval[0])} to {points(c.interval[1])}; "
            f"{p}{f', corrected for {self.tests} tests' if self.tests > 1 else ''})"
        )
        if self.better is None:
            return f"No difference between {self.second} and {self.first} can be claimed: {figures}."
        if self.better == self.second:
            return f"{self.second} is better than {self.first}: {figures}."
        return f"{self.second} is worse than {self.first}: {figures}."


def load_runs(sources: Iterable[str | Path | RunRecord]) -> list[RunRecord]:
    """Read run folders; those already read are taken as they are. Names become unique.

    Raises:
        UserError: naming the first folder that does not hold a finished run.
    """
    runs = [source if isinstance(source, RunRecord) else RunRecord(source) for source in sources]
    for name, same in itertools.groupby(sorted(runs, key=lambda run: run.name), key=lambda run: run.name):
        same = list(same)
        if len(same) > 1:
            for run in same:
                parent = Path(run.source).parent.name
                run.name = f"{parent}/{name}" if len({Path(r.source).parent.name for r in same}) > 1 else run.source
    return runs


def fetch_runs(path: str, into: str | Path, filters: Mapping[str, object] | None = None) -> list[RunRecord]:
    """Fetch the finished runs of a W&B project into run folders, without their weights, and read them.

    Of the linked parts of an offline run the last one is taken: it holds what the others do.

    Args:
        path: `entity/project`.
        into: the folder in which to put them.
        filters: as W&B's `Api.runs` takes them, such as `{"config.lora_r": 64, "group": "qwen3-0.6b-snli"}`.

    Raises:
        UserError: if the project cannot be read, or has no finished run of this package.
    """
    import wandb

    found: dict[str, RunRecord] = {}
    try:
        for run in wandb.Api().runs(path, filters=dict(filters or {}), order="+created_at", lazy=False):
            folder = Path(into) / path / run.id
            for file in run.files(per_page=100):
                if any(fnmatch.fnmatchcase(file.name, pattern) for pattern in RUN_FILES):
                    file.download(root=str(folder), replace=True)
            if (folder / "run.json").is_file():
                origin = run.config.get("origin", run.id)
                found[origin] = RunRecord(folder, name=run.name, source=f"{path}/{run.id}")
    except UserError:
        raise
    except (wandb.errors.Error, ValueError, OSError) as error:
        raise UserError(f"{path}: cannot be read from W&B ({' '.join(str(error).split())})") from error
    if not found:
        raise UserError(f"{path} has no finished run of recipes/sft.py that matches; look at the filters")
    return list(found.values())


def rank(runs: Sequence[RunRecord]) -> list[Ranking]:
    """Rank runs by validation accuracy, those that may not be ranked together apart; the largest ranking first."""
    if not runs:
        raise UserError("no runs to compare; give run folders, such as outputs/*, or entity/project of W&B")
    groups: dict[tuple, list[RunRecord]] = {}
    for run in runs:
        groups.setdefault(tuple(run.config[key] for key in JUDGED_ON), []).append(run)
    rankings = []
    for group in groups.values():
        group.sort(key=lambda run: -run.validation.value)
        rankings.append(Ranking(group, differing_keys(group), _replicates(group), _learning_curves(group)))
    return sorted(rankings, key=lambda ranking: -len(ranking.runs))


def why_apart(first: Ranking, second: Ranking) -> str:
    """A sentence that names the keys which forbid ranking two sets of runs together."""
    one, other = first.runs[0].config, second.runs[0].config
    keys = [f"{key} ({one[key]} and {other[key]})" for key in JUDGED_ON if one[key] != other[key]]
    names = ", ".join(run.name for run in second.runs)
    return f"Not ranked with {first.runs[0].name}: {names}. What differs is {' and '.join(keys)}."


def judged_apart(ranking: Ranking) -> list[str]:
    """Sentences on evaluations of one name in which the runs of a ranking were not given the same pairs."""
    sentences = []
    for key in ranking.judged:
        by_data: dict[tuple, list[str]] = {}
        for run in ranking.runs:
            if key in run.judged:
                summary = run.judged[key].summary
                identity = tuple((name, summary[name]) for name in ("data_fingerprint", "split"))
                by_data.setdefault(identity, []).append(run.name)
        if len(by_data) > 1:
            names = {name for one, other in itertools.combinations(by_data, 2) for name, _ in set(one) ^ set(other)}
            groups = "; ".join(", ".join(names) for names in by_data.values())
            sentences.append(
                f"Accuracies on {key} are not of the same pairs: {' and '.join(sorted(names))} differs between "
                f"{groups}. Only the paired tests, on shared pairs, compare them."
            )
    return sentences


def differing_keys(runs: Sequence[RunRecord]) -> list[str]:
    """The config keys in which runs differ, bookkeeping aside, in the order of the config."""
    keys = dict.fromkeys(key for run in runs for key in run.config if not BOOKKEEPING.fullmatch(key))
    return [key for key in keys if len({_comparable(run.config.get(key, DEFAULT)) for run in runs}) > 1]


def _comparable(value: object) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _replicates(runs: Sequence[RunRecord]) -> list[Replicates]:
    repeated = [
        group for group in _alike(runs, REPLICATED) if len({run.config["seed"] for run in group}) == len(group) > 1
    ]
    found = [Replicates(f"{_common_name(group)} ({len(group)} seeds)", group) for group in repeated]
    return sorted(found, key=lambda replicates: -replicates.validation.value)


def _learning_curves(runs: Sequence[RunRecord]) -> list[LearningCurve]:
    found = []
    for group in _alike(runs, REPLICATED | {key for run in runs for key in run.config if SIZED.fullmatch(key)}):
        by_pairs: dict[int, list[RunRecord]] = {}
        for run in sorted(group, key=lambda run: run.config["train_pairs"]):
            by_pairs.setdefault(run.config["train_pairs"], []).append(run)
        if len(by_pairs) > 1:
            points = {pairs: Replicates(_common_name(same), same) for pairs, same in by_pairs.items()}
            found.append(LearningCurve(_common_name(group), points))
    return found


def _alike(runs: Sequence[RunRecord], but: set[str]) -> list[list[RunRecord]]:
    """Sets of runs with the same config, but for some keys and for bookkeeping."""
    groups: dict[str, list[RunRecord]] = {}
    for run in runs:
        kept = {k: v for k, v in run.config.items() if k not in but and not BOOKKEEPING.fullmatch(k)}
        groups.setdefault(_comparable(kept), []).append(run)
    return list(groups.values())


def _common_name(runs: Sequence[RunRecord]) -> str:
    """What the names of runs begin with: `lora-r8` of `lora-r8-seed1` and `lora-r8-seed2`."""
    names = [run.name for run in runs]
    common = os.path.commonprefix(names)
    if any(name[len(common) : len(common) + 1].isdigit() for name in names):  # between the digits of a number
        common = common.rstrip("0123456789")
    return re.sub(r"[\W_]*(seed|s)?[\W_]*$", "", common) or names[0]


def between_replicates(ranking: Ranking) -> list[str]:
    """A sentence for the best set of replicates against each other one, from Welch's tests of their means.

    It takes the runs as the sample: what it claims is about the method, not about one checkpoint of it. The best is
    known only afterwards, so each test is corrected for all pairs of sets (Holm, 1979), not only for those told.
    """
    methods = [
        (group.name, [run.validation.value for run in group.runs])
        for group in sorted(
            ranking.replicates, key=lambda group: -np.mean([run.validation.value for run in group.runs])
        )
    ]
    pairs = list(itertools.combinations(methods, 2))
    p_values = holm(np.array([_welch(one, other) for (_, one), (_, other) in pairs])) if pairs else []
    # `combinations` pairs the first, which is the best, with each other one before all else.
    told = zip(pairs[: len(methods) - 1], p_values, strict=False)
    return [_between(*one, *other, float(p)) for (one, other), p in told]


def _welch(one: Sequence[float], other: Sequence[float]) -> float:
    """Welch's p-value; 1 where there are too few seeds, or no spread, to test by."""
    if min(len(one), len(other)) < FEWEST_SEEDS or np.ptp(one) == np.ptp(other) == 0:
        return 1.0
    return float(ttest_ind(one, other, equal_var=False).pvalue)


def _between(first: str, one: Sequence[float], second: str, other: Sequence[float], p_value: float) -> str:
    difference = float(np.mean(one) - np.mean(other))
    figures = f"{np.mean(one):.1%} against {np.mean(other):.1%} on validation, {points(difference)} points"
    if min(len(one), len(other)) < FEWEST_SEEDS:
        seeds = f"{len(one)} and {len(other)} seeds"
        return (
            f"Too few seeds to compare {first} with {second}: {figures}, from {seeds}; it takes {FEWEST_SEEDS} each."
        )
    if np.ptp(one) == np.ptp(other) == 0:
        return f"No difference between {first} and {second} can be claimed: {figures}, and the seeds show no spread."
    tested = f"p = {p_value:.3f} over seeds, corrected for all pairs of methods"
    if p_value < LEVEL:
        return f"{first} is better than {second}: {figures} ({tested})."
    return f"No difference between {first} and {second} can be claimed: {figures} ({tested})."


def paired_tests(ranking: Ranking) -> list[PairedTest]:
    """Test any two of a ranking's bases and runs on the pairs that both judged, evaluation by evaluation."""
    tests, without = [], set()
    for key in ranking.judged:
        judged = [(base, ranking.base_results(base, key), "base") for base in ranking.bases]
        judged = [one for one in judged if one[1] is not None]
        judged += [(run.name, run.judged[key], "tuned") for run in reversed(ranking.runs) if key in run.judged]
        without |= {name for name, one, _ in judged if one.table is None}
        judged = [one for one in judged if one[1].table is not None]
        found = []
        for (first, a, a_model), (second, b, b_model) in itertools.combinations(judged, 2):
            comparison = _compare_shared(a.table, f"{a_model}_prediction", b.table, f"{b_model}_prediction")
            if comparison is not None:
                found.append((first, second, comparison))
        corrected = holm(np.array([comparison.p_value for *_, comparison in found])) if found else []
        tests += [
            PairedTest(key, first, second, comparison, float(p), len(found))
            for (first, second, comparison), p in zip(found, corrected, strict=True)
        ]
    if without:
        logger.warning("no predictions.parquet, so not tested pair by pair: %s", ", ".join(sorted(without)))
    return tests


def _compare_shared(a: pd.DataFrame, a_column: str, b: pd.DataFrame, b_column: str) -> Comparison | None:
    identity = ["uid", "premise", "hypothesis", "label"]
    both = a[identity].assign(before=a[a_column]).merge(b[identity].assign(after=b[b_column]), on=identity)
    return compare(both["label"], both["before"], both["after"], both["premise"]) if len(both) else None
