"""Evaluate a run: score the base, the tuned model and the controls on each set, and compute their metrics."""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from accelerate import PartialState
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel
from trl import ModelConfig

from .. import UserError
from ..configs import BatchConfig
from ..data.prompts import PromptEncoder
from ..data.sources import subsample
from ..labels import LABELS, counts_as
from ..models.bases import InputLimits
from ..models.loading import load_encoder, load_model, load_tuned
from ..runs import HYPOTHESIS_ONLY, write_json
from . import metrics
from .calibration import apply_temperature, fit_temperature, reached_bound
from .robustness import label_orders, prompt_choices, sensitivity, set_figures
from .scoring import LabelScores, Scorer, gather_scores, generate_unconstrained, named_label
from .sets import EvaluationSet

logger = logging.getLogger(__name__)

Result = tuple[LabelScores, dict[str, Any]]  # scores and metrics of one model on one set


@dataclass(frozen=True)
class EvalTask:
    """Pairs to score with one prompt.

    Attributes:
        unconstrained_samples: how many of the pairs, evenly spaced, the model also answers without constraints.
    """

    name: str
    pairs: Dataset
    encoder: PromptEncoder
    unconstrained_samples: int = 0


@dataclass(frozen=True)
class Checks:
    """Checks of how much predictions depend on the prompt: on how many pairs of the first set, 0 to skip a check.

    Attributes:
        label_order_pairs: pairs to score with the labels listed in other orders.
        prompt_pairs: pairs to score with every built-in prompt.
    """

    label_order_pairs: int = 0
    prompt_pairs: int = 0


def predict(
    model: PreTrainedModel,
    tasks: Sequence[EvalTask],
    *,
    batch_size: int,
    batch_args: BatchConfig,
    progress: str | None = None,
) -> list[LabelScores]:
    """Score all pairs of all tasks in one pass, so that prefixes shared between tasks are computed once.

    The processes divide the pairs among them; each returns the scores of all pairs, in order.

    Raises:
        ValueError: if the encoders have different answer tokens.
    """
    state = PartialState()
    answers = tasks[0].encoder.answers
    if any(task.encoder.answers != answers for task in tasks):
        raise ValueError("all tasks of one pass must have the same answer tokens")
    prompts, total = [], 0
    for task in tasks:
        # This process takes every `num_processes`-th pair, counted over all tasks.
        share = range((state.process_index - total) % state.num_processes, len(task.pairs), state.num_processes)
        own_pairs = task.pairs.select(share)
        prompts += task.encoder.encode(own_pairs["premise"], own_pairs["hypothesis"])
        total += len(task.pairs)
    own_scores = Scorer(model, tasks[0].encoder, batch_args, batch_size)(
        prompts, progress=progress if state.is_local_main_process else None
    )
    scores = gather_scores(own_scores, total, state.process_index, state.num_processes)
    ends = np.cumsum([len(task.pairs) for task in tasks]).tolist()
    return [
        LabelScores(*(values[start:end] for values in vars(scores).values()))
        for start, end in zip([0, *ends], ends, strict=False)
    ]


def unconstrained_generation(
    model: PreTrainedModel, encoder: PromptEncoder, pairs: Dataset, *, batch_size: int, max_new_tokens: int = 16
) -> dict[str, Any]:
    """The share of invalid answers, the accuracy and examples of generation without constraints.

    An answer counts for a label if it begins with that label's tokens, or if its first line contains that label's
    word and no other's. All other answers are invalid and count as wrong.
    """
    prompts = encoder.encode(pairs["premise"], pairs["hypothesis"])
    positions = InputLimits.of(model).positions
    if positions is not None:  # the last generated token is never fed back
        max_new_tokens = min(max_new_tokens, positions + 1 - max(map(len, prompts)))
    generated: list[list[int]] = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        generated += generate_unconstrained(model, encoder.tokenizer, batch, max_new_tokens)
    texts: list[str] = encoder.tokenizer.batch_decode(generated, skip_special_tokens=True)

    predicted = [_parse_answer(ids, text, encoder) for ids, text in zip(generated, texts, strict=True)]
    valid = sum(label is not None for label in predicted)
    mapping = counts_as(encoder.prompt.labels, pairs.features["label"].names)
    predicted = [None if label is None else mapping[label] for label in predicted]
    correct = sum(label == gold for label, gold in zip(predicted, pairs["label"], strict=True))
    return {
        "n": len(generated),
        "invalid_share": 1 - valid / len(generated),
        "accuracy": correct / len(generated),
        "accuracy_of_valid": correct / valid if valid else None,
        "examples": texts[:5],
    }


def _parse_answer(ids: list[int], text: str, encoder: PromptEncoder) -> int | None:
    """The label id of a generated answer, or `None` if it is invalid."""
    # Tokens first: a model that was not trained to end its turn may continue without a space.
    for label, answer in enumerate(encoder.answers):
        if ids[: len(answer)] == answer:
            return label
    return named_label(text, encoder.prompt.label_words)


def evaluate_model(
    model: PreTrainedModel, tasks: Sequence[EvalTask], *, name: str, batch_size: int, batch_args: BatchConfig
) -> list[Result]:
    """Score one model on all tasks in one pass, and compute its metrics on each.

    `pairs_per_second` is the speed of the pass; `seconds` is each task's share of its duration.

    Args:
        name: of the model, for the progress bar and error messages.

    Raises:
        UserError: with the model and the task, if scores are NaN or infinite.
    """
    start = time.perf_counter()
    task_scores = predict(model, tasks, batch_size=batch_size, batch_args=batch_args, progress=f"Scoring {name}")
    speed = sum(len(task.pairs) for task in tasks) / (time.perf_counter() - start)
    results = []
    for task, scores in zip(tasks, task_scores, strict=True):
        scores.check_numbers(
            model, f"{name} on {task.name}", "take an earlier checkpoint, or train with a lower learning_rate"
        )
        result = _metrics(task.pairs, scores, task.encoder.prompt.labels)
        if task.unconstrained_samples and PartialState().is_main_process:
            n = len(task.pairs)
            spaced = np.linspace(0, n - 1, min(task.unconstrained_samples, n)).astype(int)
            result["unconstrained_generation"] = unconstrained_generation(
                model, task.encoder, task.pairs.select(spaced), batch_size=batch_size
            )
        results.append((scores, result | {"seconds": len(task.pairs) / speed, "pairs_per_second": speed}))
    return results


def _metrics(pairs: Dataset, scores: LabelScores, labels: Sequence[str]) -> dict[str, Any]:
    names = pairs.features["label"].names
    gold, predicted = np.array(pairs["label"][:]), scores.choice.numpy()
    probabilities = scores.log_probs.exp().numpy()
    result = metrics.compute(gold, predicted, probabilities, scores.label_mass.numpy(), names, labels)
    right = np.array(counts_as(labels, names))[predicted] == gold
    return result | set_figures(_table(pairs), right, probabilities, names)


def evaluate_run(
    run: str | Path,
    model_args: ModelConfig,
    sets: list[EvaluationSet],
    *,
    batch_size: int,
    batch_args: BatchConfig,
    unconstrained_samples: int,
    calibration_pairs: Dataset | None = None,
    checks: Checks | None = None,
    trust_remote_code: bool = False,
) -> list[dict[str, Result]]:
    """Evaluate a run, its base and its controls: for each set, scores and metrics by model.

    - `base` and `tuned`, with the same prompt. With an adapter, one model serves both: the base is the model with the
      adapter disabled. A full model is evaluated first and freed before its base is loaded.
    - `hypothesis_only`, if the run has this baseline; and on the first set `shuffled`, the tuned model with shuffled
      premises. Neither has the information to predict the gold label.

    Each model makes one pass over all sets. On the first set, the metrics of `base` and `tuned` also contain
    `unconstrained_generation`, and the `label_orders` and `prompts` of `checks` (see `robustness.sensitivity`).

    Args:
        calibration_pairs: pairs with the labels of the run that are in no set. Each model's temperature is fitted on
            them, and its metrics contain `calibrated`: the calibration metrics with that `temperature`. If the search
            ends at a bound, `temperature` is `None`, and `bound` replaces the metrics.
    """
    encoder = load_encoder(run, trust_remote_code)  # before the weights: it checks that the folder is complete
    model = load_tuned(run, model_args, trust_remote_code)
    baseline = Path(run) / HYPOTHESIS_ONLY
    baseline_encoder = load_encoder(baseline, trust_remote_code) if baseline.is_dir() else None
    if not encoder.prompt.reads_premise:
        checks = None  # other prompts show premises, which this model was trained without

    evaluation = _RunEvaluation(sets, calibration_pairs, batch_size, batch_args)
    evaluation.add("tuned", model, encoder, unconstrained_samples, checks, with_shuffled=True)
    if isinstance(model, PeftModel):
        with model.disable_adapter():
            evaluation.add("base", model, encoder, unconstrained_samples, checks)
    else:
        del model  # before its base is loaded
        model = load_model(model_args, trust_remote_code, device=PartialState().device).eval()
        evaluation.add("base", model, encoder, unconstrained_samples, checks)
    if baseline_encoder is not None:
        del model
        model = load_tuned(baseline, model_args, trust_remote_code)
        evaluation.add(HYPOTHESIS_ONLY, model, baseline_encoder)
    return evaluation.results


def evaluate_prompts(
    model: PreTrainedModel | PeftModel,
    encoders: Sequence[PromptEncoder],
    sets: list[EvaluationSet],
    *,
    batch_size: int,
    batch_args: BatchConfig,
    unconstrained_samples: int,
    calibration_pairs: Dataset | None = None,
    checks: Checks | None = None,
) -> list[list[dict[str, Result]]]:
    """Evaluate a model that is no run with each prompt: for each prompt and set, scores and metrics by model.

    A model with an adapter is `tuned`, and its base is evaluated too; a model without one is `base`. On the first set,
    `shuffled` is the same model with shuffled premises.

    Args:
        encoders: one for each prompt. The other arguments are those of `evaluate_run`.
    """
    evaluations = [_RunEvaluation(sets, calibration_pairs, batch_size, batch_args) for _ in encoders]

    def add(name: str, is_main: bool = False) -> None:
        for evaluation, encoder in zip(evaluations, encoders, strict=True):
            own_checks = checks if encoder.prompt.reads_premise else None
            evaluation.add(name, model, encoder, unconstrained_samples, own_checks, with_shuffled=is_main)

    if isinstance(model, PeftModel):
        add("tuned", is_main=True)
        with model.disable_adapter():
            add("base")
    else:
        add("base", is_main=True)
    return [evaluation.results for evaluation in evaluations]


class _RunEvaluation:
    """The results of the models of a run on each set: `results[i][model]`."""

    def __init__(
        self,
        sets: list[EvaluationSet],
        calibration_pairs: Dataset | None,
        batch_size: int,
        batch_args: BatchConfig,
    ):
        self.sets = sets
        self.calibration_pairs = calibration_pairs
        self.batch_size = batch_size
        self.batch_args = batch_args
        self.results: list[dict[str, Result]] = [{} for _ in sets]

    def add(
        self,
        name: str,
        model: PreTrainedModel | PeftModel,
        encoder: PromptEncoder,
        unconstrained_samples: int = 0,
        checks: Checks | None = None,
        with_shuffled: bool = False,
    ) -> None:
        """Evaluate one model on all sets, with what else its metrics need, in one pass."""
        first = self.sets[0].pairs
        tasks = [EvalTask(str(one), one.pairs, encoder) for one in self.sets]
        tasks[0] = replace(tasks[0], unconstrained_samples=unconstrained_samples)
        extra: dict[str | tuple[str, str], EvalTask] = {}
        if self.calibration_pairs is not None:
            extra["calibration"] = EvalTask("calibration", self.calibration_pairs, encoder)
        if with_shuffled and encoder.prompt.reads_premise:
            extra["shuffled"] = EvalTask("shuffled premises", shuffle_premises(first), encoder)
        variants, refused = _prompt_variants(encoder, first, checks or Checks())
        extra |= variants

        results = evaluate_model(
            cast(PreTrainedModel, model),  # a PeftModel has the same interface
            [*tasks, *extra.values()],
            name=name,
            batch_size=self.batch_size,
            batch_args=self.batch_args,
        )
        for by_model, result in zip(self.results, results, strict=False):
            by_model[name] = result
        extra_results = dict(zip(extra, results[len(tasks) :], strict=True))
        if "shuffled" in extra_results:
            self.results[0]["shuffled"] = extra_results["shuffled"]
        if "calibration" in extra_results:
            self._calibrate(name, extra_results["calibration"][0], encoder.prompt.labels)
        self.results[0][name][1].update(_sensitivities({key: extra_results[key] for key in variants}, refused))

    def _calibrate(self, name: str, scores: LabelScores, labels: Sequence[str]) -> None:
        """Fit a model's temperature to its scores of the calibration pairs; add `calibrated` to its metrics."""
        assert self.calibration_pairs is not None
        gold = np.array(self.calibration_pairs["label"][:])
        temperature = fit_temperature(scores.log_probs.double().numpy(), gold)
        if (bound := reached_bound(temperature)) is not None and PartialState().is_main_process:
            logger.warning(
                "%s: no calibrated metrics: the temperature fitted on %s validation pairs is at the bound of the "
                "search, %g",
                name,
                f"{len(gold):,}",
                bound,
            )
        for one, by_model in zip(self.sets, self.results, strict=True):
            scores, result = by_model[name]
            result["calibrated"] = _calibrated_metrics(scores, labels, one.pairs, temperature, len(gold))


def _prompt_variants(
    encoder: PromptEncoder, pairs: Dataset, checks: Checks
) -> tuple[dict[tuple[str, str], EvalTask], dict[str, dict[str, str]]]:
    """Tasks by (check, prompt variant), and the reasons for variants that do not work, {check: {variant: reason}}."""
    variants, refused = {}, {}
    for check, n, prompts in (
        ("label_orders", checks.label_order_pairs, label_orders(encoder.prompt)),
        ("prompts", checks.prompt_pairs, prompt_choices(encoder.prompt)),
    ):
        if not n:
            continue
        sample = subsample(pairs, n, seed=0)
        for variant, prompt in prompts.items():
            try:
                other = PromptEncoder(prompt, encoder.tokenizer, train_on_end=encoder.train_on_end)
                if other.answers != encoder.answers:
                    raise UserError("the tokens of its answers differ")
            except UserError as error:  # chat templates refuse some prompts
                refused.setdefault(check, {})[variant] = str(error)
                continue
            variants[check, variant] = EvalTask(f"{check}: {variant}", sample, other)
    return variants, refused


def _sensitivities(
    results: Mapping[tuple[str, str], Result], refused: Mapping[str, dict[str, str]]
) -> dict[str, dict[str, Any]]:
    """{check: `robustness.sensitivity` over its prompt variants, and those `refused`}."""
    by_check: dict[str, dict[str, Result]] = {}
    for (check, variant), result in results.items():
        by_check.setdefault(check, {})[variant] = result
    return {
        check: sensitivity(
            {variant: result["accuracy"] for variant, (_, result) in by_variant.items()},
            [scores.choice.numpy() for scores, _ in by_variant.values()],
        )
        | {"refused": refused.get(check, {})}
        for check, by_variant in by_check.items()
    }


def _calibrated_metrics(
    scores: LabelScores, labels: Sequence[str], pairs: Dataset, temperature: float, fitted_on_pairs: int
) -> dict[str, Any]:
    if (bound := reached_bound(temperature)) is not None:
        return {"temperature": None, "bound": bound, "fitted_on_pairs": fitted_on_pairs}
    probabilities = apply_temperature(scores.log_probs.numpy(), temperature)
    names = pairs.features["label"].names
    gold, predicted = np.array(pairs["label"][:]), scores.choice.numpy()
    result = metrics.compute(gold, predicted, probabilities, label_names=names, labels=labels)
    kept = ("nll", "brier", "ece", "mean_confidence", "reliability")
    return {"temperature": temperature, "fitted_on_pairs": fitted_on_pairs} | {key: result[key] for key in kept}


def shuffle_premises(pairs: Dataset, seed: int = 0) -> Dataset:
    """Replace each premise by another one of the set; pairs that shared a premise still share one."""
    premises = np.random.default_rng(seed).permutation(sorted(set(pairs["premise"][:])))
    successor = dict(zip(premises.tolist(), np.roll(premises, 1).tolist(), strict=True))
    return pairs.map(lambda pair: {"premise": successor[pair["premise"]]}, desc="Shuffling premises")


def write_evaluation(
    folder: Path,
    pairs: Dataset,
    scores: dict[str, LabelScores],
    summary: dict[str, Any],
    trained_on: np.ndarray | None = None,
    labels: Sequence[str] = LABELS,
) -> None:
    """Write `predictions.parquet` (pairs; each model's prediction and scores) and `metrics.json`.

    Predictions and scores are of the labels of the model, gold labels of those of the set.

    Args:
        trained_on: (n,) booleans, whether the run was trained on the pair; `None` if unknown. Becomes a column if any
            is true.
        labels: the label set of the models.
    """
    table = _table(pairs)
    if trained_on is not None and trained_on.any():
        table["trained_on"] = trained_on
    for model, score in scores.items():
        table[f"{model}_prediction"] = [labels[label] for label in score.choice.tolist()]
        for index, label in enumerate(labels):
            table[f"{model}_p_{label}"] = score.log_probs[:, index].exp().numpy()
            table[f"{model}_unconstrained_{label}"] = score.unconstrained[:, index].numpy()
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pandas(table, preserve_index=False), folder / "predictions.parquet")
    write_json(folder / "metrics.json", summary)


def _table(pairs: Dataset) -> pd.DataFrame:
    """The pairs as a data frame, with label names in place of ids."""
    table = cast(pd.DataFrame, pairs.to_pandas())  # an iterator only if batched
    names = pairs.features["label"].names
    return table.assign(label=[names[label] for label in pairs["label"][:]])
