"""Compare runs: accuracy, cost, the settings that differ, and whether one run is better than another.

A run is read from its folder. Runs in W&B are first downloaded into folders of the same layout. wandb is imported for
that alone.
"""

import fnmatch
import itertools
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import expit, logit
from scipy.stats import t, ttest_ind

from .. import UserError
from ..evaluation.comparison import MIN_PREMISES, Comparison, accuracy_interval, compare, points
from ..evaluation.slices import LEVEL, holm
from ..runs import (
    BOOKKEEPING,
    COMPARED_FILES,
    DEFAULT,
    evaluation_folders,
    is_trained,
    label_sets,
    read_metrics,
    read_predictions,
    read_run,
    run_config,
    run_cost,
)
from .content import Training, in_own_labels

logger = logging.getLogger(__name__)

# Keys in which replicates may differ. The seed also draws the pairs if a recipe trains on a sample.
REPLICATE_KEYS = {"seed", "data_seed", "train_fingerprint", "git_commit", "git_dirty"}

# Further keys in which the points of a learning curve may differ: they follow from the number of training pairs.
SIZE_KEYS = re.compile(r"max_train_samples|train_pairs|pairs_of_\w+|dropped_\w+")

# With fewer seeds per method, no method is called better than another.
MIN_SEEDS = 3

# Only runs that agree on these keys are ranked together.
RANKED_BY = ("validation_fingerprint", "prompt_fingerprint")

# Columns that identify a pair.
PAIR_COLUMNS = ["uid", "premise", "hypothesis", "label"]


@dataclass(frozen=True)
class Estimate:
    """A share with its 95 % interval, over `n` pairs or `n` runs."""

    value: float
    low: float
    high: float
    n: int


class EvaluationRecord:
    """One evaluation of a run: `metrics.json` and `predictions.parquet` of a folder under `eval/`."""

    def __init__(self, folder: Path):
        self.key = folder.name
        self.summary = read_metrics(folder)
        self._predictions = folder / "predictions.parquet"

    @property
    def main(self) -> str:
        """The model that the run is about: `tuned`, or `base` if nothing was tuned."""
        return "tuned" if "tuned" in self.summary else "base"

    @property
    def models(self) -> list[str]:
        """The models evaluated: `base`, `tuned` and the controls."""
        return [name for name, figures in self.summary.items() if isinstance(figures, dict) and "accuracy" in figures]

    def accuracy(self, model: str | None = None) -> Estimate | None:
        """Accuracy of `base`, `tuned` or a control with Wilson's interval; `None` if it was not evaluated.

        Args:
            model: `main` by default.
        """
        figures = self.summary.get(model or self.main)
        if not figures:
            return None
        low, high = figures["accuracy_interval"]
        return Estimate(figures["accuracy"], low, high, self.summary["pairs"])

    @cached_property
    def table(self) -> pd.DataFrame | None:
        """uid, premise, hypothesis, label and predictions of each pair; `None` if no predictions were kept."""
        if not self._predictions.is_file():
            return None
        table = read_predictions(self._predictions.parent)
        columns = [name for name in table.columns if name.endswith("_prediction")]
        return in_own_labels(table.loc[:, [*PAIR_COLUMNS, *columns]], *label_sets(self.summary))


class RunRecord:
    """A finished run, read from its folder.

    Attributes:
        name: short, unique among the runs it is compared with.
        source: the folder, or `entity/project/id` in W&B.
        recipe, prompt, record: as `runs.read_run` returns them.
        evaluations: {key: evaluation}; a key is such as `snli-test`.

    Raises:
        UserError: if the folder does not hold a finished run.
    """

    def __init__(self, folder: str | Path, *, name: str | None = None, source: str | None = None):
        folder = Path(folder)
        self.recipe, self.prompt, self.record = read_run(folder)
        self.name = name or folder.resolve().name
        self.source = source or str(folder)
        self.evaluations = {path.name: EvaluationRecord(path) for path in evaluation_folders(folder)}

    @cached_property
    def config(self) -> dict[str, Any]:
        """The flat config that W&B shows (`runs.run_config`)."""
        return run_config(self.recipe, self.prompt, self.record)

    @property
    def is_trained(self) -> bool:
        """Whether the run was trained; else a model was evaluated as it is, and there is no validation."""
        return is_trained(self.record)

    @property
    def validation(self) -> Estimate:
        """Label accuracy of the kept checkpoint on the validation pairs, with Wilson's interval."""
        return self._on_validation(self.record["validation"]["eval_accuracy"])

    @property
    def base_validation(self) -> Estimate | None:
        """Validation accuracy of the base; `None` unless the recipe set `eval_on_start`."""
        return next((self._on_validation(a) for step, _, a in self.curve if step == 0), None)

    def _on_validation(self, accuracy: float) -> Estimate:
        pairs = self.config["validation_pairs"]
        return Estimate(accuracy, *accuracy_interval(accuracy, pairs), pairs)

    @property
    def curve(self) -> list[tuple[int, float, float]]:
        """(step, epoch, validation accuracy), one per step."""
        validations = Training(self.record).validations
        return [(e["step"], e["epoch"], e["eval_accuracy"]) for e in validations if "eval_accuracy" in e]

    @property
    def cost(self) -> dict[str, float]:
        """See `run_cost`; nothing for a run that was not trained."""
        return run_cost(self.record) if self.is_trained else {}

    @property
    def base(self) -> str:
        """The name of the base model, with its quantisation."""
        model = Path(str(self.config["model"])).name
        quantisation = self.config["quantisation"]
        return f"base {model}" if quantisation == "none" else f"base {model} in {quantisation}"


@dataclass(frozen=True)
class Replicates:
    """Runs that differ only in their seeds: mean accuracy with Student's interval.

    For a single run: its own accuracy with Wilson's interval.
    """

    name: str
    runs: list[RunRecord]

    @property
    def validation(self) -> Estimate:
        return _mean([run.validation for run in self.runs])

    def accuracy(self, key: str, model: str | None = None) -> Estimate | None:
        """The mean on one evaluation; `None` unless all runs were evaluated on the same pairs."""
        if not all(key in run.evaluations for run in self.runs):
            return None
        evaluations = [run.evaluations[key] for run in self.runs]
        if len({evaluation.summary["data_fingerprint"] for evaluation in evaluations}) > 1:
            return None
        estimates = [one for evaluation in evaluations if (one := evaluation.accuracy(model)) is not None]
        return _mean(estimates) if len(estimates) == len(evaluations) else None


@dataclass(frozen=True)
class LearningCurve:
    """Runs that differ only in the number of training pairs and in their seeds.

    Attributes:
        points: {number of training pairs: the runs trained on that many}, in ascending order.
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
    # On the logit scale (delta method), the interval stays within 0 and 1.
    low, high = expit(logit(mean) + np.array([-half, half]) / (mean * (1 - mean)))
    return Estimate(mean, float(low), float(high), n)


@dataclass(frozen=True)
class Ranking:
    """Runs that can be ranked together: same validation pairs, same prompt; or models that were not trained.

    Attributes:
        runs: by validation accuracy, the best first; without training by accuracy on the first evaluation.
        differing: the config keys in which they differ.
        replicates: groups of two or more runs that differ only in their seeds, by mean validation accuracy.
        learning_curves: groups of runs that differ only in the number of training pairs and in their seeds.
        baselines: models that were not trained, on evaluations of these runs, the best first.
    """

    runs: list[RunRecord]
    differing: list[str]
    replicates: list[Replicates]
    learning_curves: list[LearningCurve]
    baselines: list[RunRecord] = field(default_factory=list)

    @property
    def is_trained(self) -> bool:
        """Whether these runs were trained."""
        return self.runs[0].is_trained

    @property
    def methods(self) -> list[Replicates]:
        """Groups of replicates and single runs, by validation accuracy."""
        if not self.is_trained:
            return [Replicates(run.name, [run]) for run in self.runs]
        repeated = {run.name for group in self.replicates for run in group.runs}
        single = [Replicates(run.name, [run]) for run in self.runs if run.name not in repeated]
        return sorted([*self.replicates, *single], key=lambda method: -method.validation.value)

    @property
    def bases(self) -> list[str]:
        """The names of the base models of trained runs."""
        if not self.is_trained:
            return []
        return list(dict.fromkeys(run.base for run in self.runs))

    def base_validation(self, base: str) -> Estimate | None:
        """Validation accuracy of a base; `None` if no run measured it."""
        return next((run.base_validation for run in self.runs if run.base == base and run.base_validation), None)

    def base_evaluation(self, base: str, key: str) -> EvaluationRecord | None:
        """An evaluation with the predictions of a base; `None` if no run has one."""
        return next((run.evaluations[key] for run in self.runs if run.base == base and key in run.evaluations), None)

    @property
    def evaluation_keys(self) -> list[str]:
        """The keys of the evaluations of any run."""
        return sorted({key for run in self.runs for key in run.evaluations})

    def differences(self, run: RunRecord) -> dict[str, object]:
        """The values of a run for the keys that differ."""
        return {key: run.config.get(key, DEFAULT) for key in self.differing}


@dataclass(frozen=True)
class PairedTest:
    """A test of two sets of predictions on the pairs that both contain.

    Attributes:
        evaluation: a key such as `snli-test`.
        first, second: names of runs, or of a base and a run.
        comparison: `first` is before, `second` is after.
        p_value: of the comparison, corrected for all tests on this evaluation (Holm, 1979).
        tests: the number of these tests.
    """

    evaluation: str
    first: str
    second: str
    comparison: Comparison
    p_value: float
    tests: int

    @property
    def better(self) -> str | None:
        """The name of the better one; `None` unless both the interval and the corrected p-value support it."""
        low, high = self.comparison.interval
        if self.comparison.premises < MIN_PREMISES or low <= 0 <= high or self.p_value >= LEVEL:
            return None
        return self.second if low > 0 else self.first

    def __str__(self) -> str:
        c = self.comparison
        figures = (
            f"{c.after:.1%} against {c.before:.1%} on the {c.pairs:,} shared {self.evaluation} pairs, "
            f"{points(c.difference)} points (95% interval {points(c.interval[0])} to {points(c.interval[1])}; "
            f"{p_value_text(self.p_value)}{f', corrected for {self.tests} tests' if self.tests > 1 else ''})"
        )
        if self.better is None:
            return f"{self.second} and {self.first} do not differ significantly: {figures}."
        if self.better == self.second:
            return f"{self.second} is better than {self.first}: {figures}."
        return f"{self.second} is worse than {self.first}: {figures}."


def load_runs(sources: Iterable[str | Path | RunRecord]) -> list[RunRecord]:
    """Read run folders, and make the names of all runs unique. A `RunRecord` is used as it is.

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
    """Download the finished runs of a W&B project into run folders, without weights, and read them.

    A run that was resumed offline has several parts in W&B; only the last, which is complete, is read.

    Args:
        path: `entity/project`.
        into: the folder for the run folders.
        filters: for W&B's `Api.runs`, such as `{"config.lora_r": 64, "group": "qwen3-0.6b-snli"}`.

    Raises:
        UserError: if the project cannot be read, or has no finished run of this package.
    """
    import wandb
    from wandb.errors import Error as WandbError

    found: dict[str, RunRecord] = {}
    try:
        for run in wandb.Api().runs(path, filters=dict(filters or {}), order="+created_at", lazy=False):
            folder = Path(into) / path / run.id
            for file in run.files(per_page=100):
                if any(fnmatch.fnmatchcase(file.name, pattern) for pattern in COMPARED_FILES):
                    file.download(root=str(folder), replace=True)
            if (folder / "run.json").is_file():
                origin = run.config.get("origin", run.id)
                found[origin] = RunRecord(folder, name=run.name, source=f"{path}/{run.id}")
    except UserError:
        raise
    except (WandbError, ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read from W&B ({' '.join(str(error).split())})") from error
    if not found:
        raise UserError(f"{path} has no finished run of recipes/sft.py that matches; check --filters")
    return list(found.values())


def rank(runs: Sequence[RunRecord]) -> list[Ranking]:
    """Rank runs by validation accuracy. Runs that cannot be compared get separate rankings, the largest first."""
    if not runs:
        raise UserError("no runs to compare; give run folders such as outputs/*, or a W&B project as entity/project")
    groups: dict[tuple, list[RunRecord]] = {}
    untrained = _by_accuracy([run for run in runs if not run.is_trained])
    for run in (run for run in runs if run.is_trained):
        groups.setdefault(tuple(run.config[key] for key in RANKED_BY), []).append(run)
    rankings = []
    for group in groups.values():
        group.sort(key=lambda run: -run.validation.value)
        keys = {key for run in group for key in run.evaluations}
        baselines = [run for run in untrained if keys & run.evaluations.keys()]
        rankings.append(Ranking(group, differing_keys(group), _replicates(group), _learning_curves(group), baselines))
    rankings.sort(key=lambda ranking: -len(ranking.runs))
    placed = {run.name for ranking in rankings for run in ranking.baselines}
    if alone := [run for run in untrained if run.name not in placed]:
        rankings.append(Ranking(alone, differing_keys(alone), [], []))
    return rankings


def _by_accuracy(runs: Sequence[RunRecord]) -> list[RunRecord]:
    """Runs by accuracy on the evaluation that most of them have, the best first."""
    counts = Counter(key for run in runs for key in run.evaluations)
    key = max(sorted(counts), key=counts.__getitem__, default="")
    found = {run.name: run.evaluations[key].accuracy() for run in runs if key in run.evaluations}
    return sorted(runs, key=lambda run: -estimate.value if (estimate := found.get(run.name)) else 0.0)


def explain_separation(first: Ranking, second: Ranking) -> str:
    """A sentence that names the keys because of which two groups of runs are not ranked together."""
    names = ", ".join(run.name for run in second.runs)
    if not second.is_trained:
        return (
            f"Not ranked with {first.runs[0].name}: {names}. They were not trained, and share no evaluation with it."
        )
    one, other = first.runs[0].config, second.runs[0].config
    keys = [f"{key} ({one[key]} and {other[key]})" for key in RANKED_BY if one[key] != other[key]]
    return f"Not ranked with {first.runs[0].name}: {names}. They differ in {' and '.join(keys)}."


def explain_unequal_pairs(ranking: Ranking) -> list[str]:
    """A sentence for each evaluation on which the runs of a ranking were evaluated on different pairs."""
    sentences = []
    for key in ranking.evaluation_keys:
        by_data: dict[tuple[str, str], list[str]] = {}
        for run in ranking.runs:
            if key in run.evaluations:
                summary = run.evaluations[key].summary
                by_data.setdefault((summary["data_fingerprint"], summary["split"]), []).append(run.name)
        if len(by_data) > 1:
            fields = zip(("data_fingerprint", "split"), zip(*by_data, strict=True), strict=True)
            differing = [name for name, values in fields if len(set(values)) > 1]
            groups = "; ".join(", ".join(names) for names in by_data.values())
            sentences.append(
                f"Accuracies on {key} are not from the same pairs ({' and '.join(differing)}): {groups}. Only the "
                f"paired tests, which use shared pairs, compare them."
            )
    return sentences


def differing_keys(runs: Sequence[RunRecord]) -> list[str]:
    """The config keys in which runs differ, without bookkeeping, in the order of the config."""
    keys = dict.fromkeys(key for run in runs for key in run.config if not BOOKKEEPING.fullmatch(key))
    return [key for key in keys if len({_comparable(run.config.get(key, DEFAULT)) for run in runs}) > 1]


def _comparable(value: object) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _replicates(runs: Sequence[RunRecord]) -> list[Replicates]:
    repeated = [
        group
        for group in _group_alike(runs, REPLICATE_KEYS)
        if len({run.config["seed"] for run in group}) == len(group) > 1
    ]
    found = [Replicates(f"{_common_name(group)} ({len(group)} seeds)", group) for group in repeated]
    return sorted(found, key=lambda replicates: -replicates.validation.value)


def _learning_curves(runs: Sequence[RunRecord]) -> list[LearningCurve]:
    found = []
    for group in _group_alike(
        runs, REPLICATE_KEYS | {key for run in runs for key in run.config if SIZE_KEYS.fullmatch(key)}
    ):
        by_pairs: dict[int, list[RunRecord]] = {}
        for run in sorted(group, key=lambda run: run.config["train_pairs"]):
            by_pairs.setdefault(run.config["train_pairs"], []).append(run)
        if len(by_pairs) > 1:
            points = {pairs: Replicates(_common_name(same), same) for pairs, same in by_pairs.items()}
            found.append(LearningCurve(_common_name(group), points))
    return found


def _group_alike(runs: Sequence[RunRecord], ignored: set[str]) -> list[list[RunRecord]]:
    """Group runs that have the same config, without bookkeeping and the ignored keys."""
    groups: dict[str, list[RunRecord]] = {}
    for run in runs:
        kept = {k: v for k, v in run.config.items() if k not in ignored and not BOOKKEEPING.fullmatch(k)}
        groups.setdefault(_comparable(kept), []).append(run)
    return list(groups.values())


def _common_name(runs: Sequence[RunRecord]) -> str:
    """The common prefix of names: `lora-r8` for `lora-r8-seed1` and `lora-r8-seed2`."""
    names = [run.name for run in runs]
    common = os.path.commonprefix(names)
    if any(name[len(common) : len(common) + 1].isdigit() for name in names):  # not in the middle of a number
        common = common.rstrip("0123456789")
    return re.sub(r"[\W_]*(seed|s)?[\W_]*$", "", common) or names[0]


def compare_replicates(ranking: Ranking) -> list[str]:
    """One sentence per group of replicates: the best group against it, by Welch's test of the means.

    The runs are the sample, so a claim is about the method, not about one checkpoint. The best group is only known
    afterwards, so each test is corrected for all pairs of groups (Holm, 1979), including those not reported.
    """
    accuracies = [(group.name, [run.validation.value for run in group.runs]) for group in ranking.replicates]
    accuracies.sort(key=lambda method: -np.mean(method[1]))
    pairs = list(itertools.combinations(accuracies, 2))
    p_values = holm(np.array([_welch(one, other) for (_, one), (_, other) in pairs])) if pairs else []
    # `combinations` yields the pairs with the first group, which is the best, before all others.
    reported = zip(pairs[: len(accuracies) - 1], p_values, strict=False)
    return [_describe_difference(*one, *other, float(p)) for (one, other), p in reported]


def _welch(one: Sequence[float], other: Sequence[float]) -> float:
    """Welch's p-value; 1 with too few seeds, or without any spread."""
    if min(len(one), len(other)) < MIN_SEEDS or np.ptp(one) == np.ptp(other) == 0:
        return 1.0
    return float(ttest_ind(one, other, equal_var=False).pvalue)  # pyright: ignore[reportAttributeAccessIssue] (scipy has no stubs)


def _describe_difference(first: str, one: Sequence[float], second: str, other: Sequence[float], p_value: float) -> str:
    difference = float(np.mean(one) - np.mean(other))
    figures = f"{np.mean(one):.1%} against {np.mean(other):.1%} on validation, {points(difference)} points"
    if min(len(one), len(other)) < MIN_SEEDS:
        seeds = f"{len(one)} and {len(other)} seeds; {MIN_SEEDS} each are needed"
        return f"Too few seeds to compare {first} with {second}: {figures}, from {seeds}."
    if np.ptp(one) == np.ptp(other) == 0:
        return f"{first} and {second} do not differ significantly: {figures}; all seeds gave the same accuracy."
    tested = f"{p_value_text(p_value)} over seeds, corrected for all pairs of methods"
    if p_value < LEVEL:
        return f"{first} is better than {second}: {figures} ({tested})."
    return f"{first} and {second} do not differ significantly: {figures} ({tested})."


def p_value_text(p_value: float) -> str:
    """`p = 0.021`, or `p < 0.001`."""
    return "p < 0.001" if p_value < 0.001 else f"p = {p_value:.3f}"


def paired_tests(ranking: Ranking) -> list[PairedTest]:
    """Test every two of a ranking's bases and runs on their shared pairs, for each evaluation."""
    tests: list[PairedTest] = []
    untested: set[str] = set()
    for key in ranking.evaluation_keys:
        predictions: list[tuple[str, pd.DataFrame]] = []
        for name, evaluation, model in _predictors(ranking, key):
            if evaluation.table is None:
                untested.add(name)
            else:
                predictions.append((name, _predictions_of(evaluation.table, model)))
        found = [
            (first, second, comparison)
            for (first, before), (second, after) in itertools.combinations(predictions, 2)
            if (comparison := _compare_shared(before, after)) is not None
        ]
        corrected = holm(np.array([comparison.p_value for *_, comparison in found])) if found else []
        tests += [
            PairedTest(key, first, second, comparison, float(p), len(found))
            for (first, second, comparison), p in zip(found, corrected, strict=True)
        ]
    if untested:
        logger.warning("Not in the paired tests, for lack of predictions.parquet: %s", ", ".join(sorted(untested)))
    return tests


def _predictors(ranking: Ranking, key: str) -> list[tuple[str, EvaluationRecord, str]]:
    """(name, evaluation, model) of the bases, then of baselines and runs, the worst first."""
    bases = [(base, found, "base") for base in ranking.bases if (found := ranking.base_evaluation(base, key))]
    runs = [*reversed(ranking.baselines), *reversed(ranking.runs)]
    return [*bases, *((run.name, found, found.main) for run in runs if (found := run.evaluations.get(key)))]


def _predictions_of(table: pd.DataFrame, model: str) -> pd.DataFrame:
    return table.loc[:, PAIR_COLUMNS].assign(prediction=table[f"{model}_prediction"])


def _compare_shared(before: pd.DataFrame, after: pd.DataFrame) -> Comparison | None:
    both = before.merge(after, on=PAIR_COLUMNS, suffixes=("_before", "_after"))
    if both.empty:
        return None
    columns = ("label", "prediction_before", "prediction_after", "premise")
    return compare(*(both[name].to_numpy() for name in columns))
