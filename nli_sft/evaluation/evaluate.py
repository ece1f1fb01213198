"""Judge a run: the predictions of base, tuned model and controls, pair by pair, and what they add up to."""

import logging
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
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
from ..labels import LABELS, to_two_way
from ..models.bases import InputLimits
from ..models.loading import load_encoder, load_model, load_tuned
from ..runs import HYPOTHESIS_ONLY, write_json
from . import metrics
from .calibration import apply_temperature, fit_temperature, reached_bound
from .robustness import label_orders, prompt_choices, sensitivity, set_figures
from .scoring import LabelScores, Scorer, gather_scores, generate_unconstrained, named_label
from .sets import EvaluationSet

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Asked:
    """Pairs that are put to a model with one prompt.

    Attributes:
        unconstrained_samples: how many of them, evenly spaced, are also answered without constraints.
    """

    name: str
    pairs: Dataset
    encoder: PromptEncoder
    unconstrained_samples: int = 0


@dataclass(frozen=True)
class Checks:
    """How far answers hang on the way of asking: on how many pairs of the first set that is looked at.

    Attributes:
        label_order_pairs: asked with the labels listed in all six orders.
        prompt_pairs: asked with every built-in prompt.
    """

    label_order_pairs: int = 0
    prompt_pairs: int = 0


def predict(
    model: PreTrainedModel,
    asked: Sequence[Asked],
    *,
    batch_size: int,
    batch_args: BatchConfig,
    progress: str | None = None,
) -> list[LabelScores]:
    """Score all pairs of all sets in one pass: what their prompts share is computed once.

    Each process takes its share; all processes return the scores of all pairs, in order.

    Raises:
        ValueError: if the encoders do not answer with the same tokens.
    """
    state = PartialState()
    answers = asked[0].encoder.answers
    if any(one.encoder.answers != answers for one in asked):
        raise ValueError("sets of one pass must have the same answers")
    prompts, total = [], 0
    for one in asked:
        # Of all pairs of all sets, a process takes every `num_processes`-th.
        share = range((state.process_index - total) % state.num_processes, len(one.pairs), state.num_processes)
        own = one.pairs.select(share)
        prompts += one.encoder.encode(own["premise"], own["hypothesis"])
        total += len(one.pairs)
    own = Scorer(model, asked[0].encoder, batch_args, batch_size)(
        prompts, progress=progress if state.is_local_main_process else None
    )
    scores = gather_scores(own, total, state.process_index, state.num_processes)
    ends = np.cumsum([len(one.pairs) for one in asked]).tolist()
    return [
        LabelScores(*(values[start:end] for values in vars(scores).values()))
        for start, end in zip([0, *ends], ends, strict=False)
    ]


def unconstrained_generation(
    model: PreTrainedModel, encoder: PromptEncoder, pairs: Dataset, *, batch_size: int, max_new_tokens: int = 16
) -> dict[str, object]:
    """What the model says without constraints: the share of answers that name no label, and the accuracy.

    An answer counts for a label if it begins with that label's tokens, or if its first line holds that label's word
    and no other's. One that names none, or several, is invalid, and is wrong.
    """
    said: list[list[int]] = []
    prompts = encoder.encode(pairs["premise"], pairs["hypothesis"])
    positions = InputLimits.of(model).positions
    if positions is not None:  # the last token that is said is not read
        max_new_tokens = min(max_new_tokens, positions + 1 - max(map(len, prompts)))
    for start in range(0, len(prompts), batch_size):
        said += generate_unconstrained(model, encoder.tokenizer, prompts[start : start + batch_size], max_new_tokens)
    texts = encoder.tokenizer.batch_decode(said, skip_special_tokens=True)
    label_of = {tuple(answer): label for label, answer in enumerate(encoder.answers)}

    def begun(ids: list[int]) -> int | None:
        # A model that was not trained to end its turn goes on after its answer without a space.
        return next((label for answer, label in label_of.items() if tuple(ids[: len(answer)]) == answer), None)

    named = [
        label if (label := begun(ids)) is not None else named_label(text, encoder.prompt.label_words)
        for ids, text in zip(said, texts, strict=True)
    ]
    valid = [label is not None for label in named]
    if pairs.features["label"].num_classes != len(LABELS):
        named = [None if label is None else to_two_way(label) for label in named]
    right = sum(label == gold for label, gold in zip(named, pairs["label"], strict=True))
    return {
        "n": len(said),
        "invalid_share": 1 - sum(valid) / len(said),
        "accuracy": right / len(said),
        "accuracy_of_valid": right / sum(valid) if any(valid) else None,
        "examples": texts[:5],
    }


def judge(
    model: PreTrainedModel,
    encoder: PromptEncoder,
    pairs: Dataset,
    *,
    name: str,
    batch_size: int,
    batch_args: BatchConfig,
    unconstrained_samples: int = 0,
) -> tuple[LabelScores, dict[str, object]]:
    """Scores and metrics of one model, called `name` on the progress bar, on one set."""
    asked = [Asked(name, pairs, encoder, unconstrained_samples)]
    return evaluate_sets(model, asked, name=name, batch_size=batch_size, batch_args=batch_args)[0]


def evaluate_sets(
    model: PreTrainedModel, asked: Sequence[Asked], *, name: str, batch_size: int, batch_args: BatchConfig
) -> list[tuple[LabelScores, dict[str, object]]]:
    """Scores and metrics of one model on each set, from one pass over all of them.

    `pairs_per_second` is that of the pass, and `seconds` are divided among the sets accordingly.

    Raises:
        UserError: naming model and set, if scores are not numbers.
    """
    start = time.perf_counter()
    scored = predict(model, asked, batch_size=batch_size, batch_args=batch_args, progress=f"Scoring {name}")
    speed = sum(len(one.pairs) for one in asked) / (time.perf_counter() - start)
    judged = []
    for one, scores in zip(asked, scored, strict=True):
        scores.check_numbers(
            model, f"{name} on {one.name}", "take an earlier checkpoint, or train with a lower learning_rate"
        )
        names = one.pairs.features["label"].names
        gold, predicted = np.array(one.pairs["label"]), scores.choice.numpy()
        probabilities = scores.log_probs.exp().numpy()
        result = metrics.compute(gold, predicted, probabilities, scores.label_mass.numpy(), names)
        right = np.array([to_two_way(label) for label in predicted]) == gold if len(names) == 2 else predicted == gold
        pairs = one.pairs.to_pandas()
        pairs["label"] = [names[label] for label in gold]
        result |= set_figures(pairs, right, probabilities)
        if one.unconstrained_samples and PartialState().is_main_process:
            spaced = np.linspace(0, len(pairs) - 1, min(one.unconstrained_samples, len(pairs))).astype(int)
            sample = one.pairs.select(spaced)
            result["unconstrained_generation"] = unconstrained_generation(
                model, one.encoder, sample, batch_size=batch_size
            )
        judged.append((scores, result | {"seconds": len(pairs) / speed, "pairs_per_second": speed}))
    return judged


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
) -> list[dict[str, tuple[LabelScores, dict[str, object]]]]:
    """Judge everything that tells whether a run worked, on each set: scores and metrics by model.

    - `base` and `tuned`, with the same prompt. With an adapter one model serves both, the base being what is left when
      the adapter is switched off. A full model is judged first, then given up for its base: memory never holds two.
    - `hypothesis_only`, the control run in the folder of that name, where there is one, and on the first set
      `shuffled`, the tuned model with every premise exchanged for another: neither can know the answer.

    Each model passes over all sets at once. On the first set the results of `base` and `tuned` also hold what `checks`
    ask for, `label_orders` and `prompts` (see `robustness.sensitivity`).

    Args:
        calibration_pairs: three-way pairs that no set holds. From them each model's temperature is fitted, and its
            results hold `calibrated`, the figures of calibration with that `temperature`. One at a bound of the search
            is none: then `temperature` is `None`, `bound` is there, and the figures are not.
    """
    results = [{} for _ in sets]
    options = {"batch_size": batch_size, "batch_args": batch_args}

    def ask(
        model: PreTrainedModel, encoder: PromptEncoder, name: str, unconstrained_samples: int, checks: Checks | None
    ):
        first = sets[0].pairs
        asked = [Asked(str(one), one.pairs, encoder, unconstrained_samples) for one in sets]
        beside = {}
        if calibration_pairs is not None:
            beside["calibration"] = Asked("calibration", calibration_pairs, encoder)
        if name == "tuned" and encoder.prompt.reads_premise:
            beside["shuffled"] = Asked("shuffled premises", shuffle_premises(first), encoder)
        variants, refused = _variants(encoder, first, checks) if checks is not None else ({}, {})
        judged = evaluate_sets(model, [*asked, *beside.values(), *variants.values()], name=name, **options)
        for result, one in zip(results, judged, strict=False):
            result[name] = one
        judged_beside = dict(zip([*beside, *variants], judged[len(asked) :], strict=True))
        if "shuffled" in beside:
            results[0]["shuffled"] = judged_beside["shuffled"]
        if calibration_pairs is not None:
            gold = np.array(calibration_pairs["label"])
            temperature = fit_temperature(judged_beside["calibration"][0].log_probs.double().numpy(), gold)
            if (bound := reached_bound(temperature)) is not None and PartialState().is_main_process:
                logger.warning(
                    "%s: no temperature fits the %s validation pairs: the search ended at its bound of %g, so no "
                    "calibrated figures are reported", name, f"{len(gold):,}", bound,
                )  # fmt: skip
            for one, result in zip(sets, results, strict=True):
                result[name][1]["calibrated"] = _calibrated(result[name][0], one.pairs, temperature, len(gold))
        for check in ("label_orders", "prompts"):
            ways = {way: judged_beside[check_, way] for check_, way in variants if check_ == check}
            if ways:
                told = sensitivity(
                    {way: result["accuracy"] for way, (_, result) in ways.items()},
                    [scores.choice.numpy() for scores, _ in ways.values()],
                )
                results[0][name][1][check] = told | {"refused": refused.get(check, {})}

    encoder = load_encoder(run, trust_remote_code)  # first: it sees whether the run is whole
    model = load_tuned(run, model_args, trust_remote_code)
    control = Path(run) / HYPOTHESIS_ONLY
    control_encoder = load_encoder(control, trust_remote_code) if control.is_dir() else None
    if not encoder.prompt.reads_premise:
        checks = None  # other prompts would show the model what it never saw
    ask(model, encoder, "tuned", unconstrained_samples, checks)

    if isinstance(model, PeftModel):
        base_is_on = model.disable_adapter()
    else:
        model, base_is_on = (
            load_model(model_args, trust_remote_code, device=PartialState().device).eval(),
            nullcontext(),
        )
    with base_is_on:
        ask(model, encoder, "base", unconstrained_samples, checks)

    if control_encoder is not None:
        ask(load_tuned(control, model_args, trust_remote_code), control_encoder, HYPOTHESIS_ONLY, 0, None)
    return results


def _variants(
    encoder: PromptEncoder, pairs: Dataset, checks: Checks
) -> tuple[dict[tuple[str, str], Asked], dict[str, dict[str, str]]]:
    """The ways of asking that are compared, {(check, way): asked}, and those that cannot be, {check: {way: why}}."""
    variants, refused = {}, {}
    for check, n, prompts in (
        ("label_orders", checks.label_order_pairs, label_orders(encoder.prompt)),
        ("prompts", checks.prompt_pairs, prompt_choices(encoder.prompt)),
    ):
        sample = subsample(pairs, n, seed=0) if n else None
        for way, prompt in prompts.items() if n else ():
            try:
                other = PromptEncoder(prompt, encoder.tokenizer, train_on_end=encoder.train_on_end)
                if other.answers != encoder.answers:
                    raise UserError("its answers are other tokens")
            except UserError as error:  # chat templates refuse some prompts
                refused.setdefault(check, {})[way] = str(error)
                continue
            variants[check, way] = Asked(f"{check}: {way}", sample, other)
    return variants, refused


def _calibrated(scores: LabelScores, pairs: Dataset, temperature: float, fitted_on: int) -> dict[str, object]:
    if (bound := reached_bound(temperature)) is not None:
        return {"temperature": None, "bound": bound, "fitted_on_pairs": fitted_on}
    probabilities = apply_temperature(scores.log_probs.numpy(), temperature)
    names = pairs.features["label"].names
    figures = metrics.compute(np.array(pairs["label"]), scores.choice.numpy(), probabilities, label_names=names)
    kept = ("nll", "brier", "ece", "mean_confidence", "reliability")
    return {"temperature": temperature, "fitted_on_pairs": fitted_on} | {key: figures[key] for key in kept}


def shuffle_premises(pairs: Dataset, seed: int = 0) -> Dataset:
    """The same pairs, each premise exchanged for another one, the same for all pairs that share it."""
    premises = np.random.default_rng(seed).permutation(sorted(set(pairs["premise"])))
    successor = dict(zip(premises.tolist(), np.roll(premises, 1).tolist(), strict=True))
    return pairs.map(lambda pair: {"premise": successor[pair["premise"]]}, desc="Shuffling premises")


def write_evaluation(
    folder: Path,
    pairs: Dataset,
    scores: dict[str, LabelScores],
    summary: dict[str, object],
    seen: np.ndarray | None = None,
) -> None:
    """Write `predictions.parquet` (pairs; each model's prediction and scores) and `metrics.json`.

    Scores of a two-way set are three-way still; its gold labels are those of the set. A column `trained_on` is there
    if any pair was trained on.

    Args:
        seen: (n,) booleans: the pairs that the run was trained on; `None` if that is not known.
    """
    names = pairs.features["label"].names
    table = pairs.to_pandas()
    if seen is not None and seen.any():
        table["trained_on"] = seen
    table["label"] = [names[label] for label in pairs["label"]]
    for model, score in scores.items():
        table[f"{model}_prediction"] = [LABELS[label] for label in score.choice]
        for label, word in enumerate(LABELS):
            table[f"{model}_p_{word}"] = score.log_probs[:, label].exp().numpy()
            table[f"{model}_unconstrained_{word}"] = score.unconstrained[:, label].numpy()
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pandas(table, preserve_index=False), folder / "predictions.parquet")
    write_json(folder / "metrics.json", summary)
