"""Judge a run: the predictions of base, tuned model and controls, pair by pair, and what they add up to."""

import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from accelerate import PartialState
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel
from trl import ModelConfig

from . import metrics, trie
from .configs import BatchConfig
from .decoding import LabelScores, gather_scores, generate_freely, named_label, score_prompts
from .labels import LABELS, to_two_way
from .models import load_model, load_run, load_tokenizer
from .prompts import PromptEncoder
from .runs import HYPOTHESIS_ONLY, read_run, write_json
from .sources import EvaluationSet


def predict(
    model: PreTrainedModel,
    encoder: PromptEncoder,
    pairs: Dataset,
    *,
    batch_size: int,
    batch_args: BatchConfig,
    progress: str | None = None,
) -> LabelScores:
    """Score every pair, each process its share; all processes return the scores of all pairs, in order."""
    state = PartialState()
    share = pairs.select(range(state.process_index, len(pairs), state.num_processes))
    prompts = encoder.encode(share["premise"], share["hypothesis"])
    longest = max(map(len, prompts), default=0) + max(map(len, encoder.answers))
    own = score_prompts(
        model,
        prompts,
        encoder.answers,
        encoder.tokenizer.pad_token_id,
        batch_size=batch_size,
        max_row_tokens=trie.row_tokens(batch_args.batching, batch_args.max_row_tokens, model.config, longest),
        progress=progress if state.is_local_main_process else None,
    )
    return gather_scores(own, len(pairs), state.process_index, state.num_processes)


def free_generation(
    model: PreTrainedModel, encoder: PromptEncoder, pairs: Dataset, *, batch_size: int, max_new_tokens: int = 16
) -> dict[str, object]:
    """What the model says without constraints: the share of answers that name no label, and the accuracy.

    An answer counts for a label if it begins with that label's tokens, or if its first line holds that label's word
    and no other's. One that names none, or several, is invalid, and is wrong.
    """
    said: list[list[int]] = []
    prompts = encoder.encode(pairs["premise"], pairs["hypothesis"])
    for start in range(0, len(prompts), batch_size):
        said += generate_freely(model, encoder.tokenizer, prompts[start : start + batch_size], max_new_tokens)
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
    free_samples: int = 0,
) -> tuple[LabelScores, dict[str, object]]:
    """Scores and metrics of one model, called `name` on the progress bar.

    Args:
        free_samples: how many pairs, evenly spaced, are also answered without constraints.
    """
    start = time.perf_counter()
    scores = predict(model, encoder, pairs, batch_size=batch_size, batch_args=batch_args, progress=f"Scoring {name}")
    seconds = time.perf_counter() - start
    result = metrics.compute(
        gold=pairs["label"],
        predicted=scores.choice.numpy(),
        probabilities=scores.log_probs.exp().numpy(),
        mass=scores.mass.numpy(),
        label_names=pairs.features["label"].names,
    )
    if free_samples and PartialState().is_main_process:
        sample = pairs.select(np.linspace(0, len(pairs) - 1, min(free_samples, len(pairs))).astype(int))
        result["free_generation"] = free_generation(model, encoder, sample, batch_size=batch_size)
    return scores, result | {"seconds": seconds, "pairs_per_second": len(pairs) / seconds}


def judge_run(
    run: str | Path,
    model_args: ModelConfig,
    sets: list[EvaluationSet],
    *,
    batch_size: int,
    batch_args: BatchConfig,
    free_samples: int,
    trust_remote_code: bool = False,
) -> list[dict[str, tuple[LabelScores, dict[str, object]]]]:
    """Judge everything that tells whether a run worked, on each set: scores and metrics by model.

    - `base` and `tuned`, with the same prompt. With an adapter one model serves both, the base being what is left when
      the adapter is switched off. A full model is judged first, then given up for its base: memory never holds two.
    - On the first set also `shuffled`, the tuned model with every premise exchanged for another, and
      `hypothesis_only`, the control run in the folder of that name, where there is one: neither can know the answer.
    """
    first, results = sets[0], [{} for _ in sets]
    options = {"batch_size": batch_size, "batch_args": batch_args}

    model, encoder = load_run(run, model_args, trust_remote_code), load_encoder(run, trust_remote_code)
    for index, one in enumerate(sets):
        results[index]["tuned"] = judge(
            model, encoder, one.pairs, name=f"tuned, {one}", free_samples=free_samples, **options
        )
    if encoder.prompt.reads_premise:
        shuffled = exchange_premises(first.pairs)
        results[0]["shuffled"] = judge(model, encoder, shuffled, name=f"tuned, premises exchanged, {first}", **options)

    if isinstance(model, PeftModel):
        base_is_on = model.disable_adapter()
    else:
        model, base_is_on = load_model(model_args, trust_remote_code).to(PartialState().device).eval(), nullcontext()
    with base_is_on:
        for index, one in enumerate(sets):
            results[index]["base"] = judge(
                model, encoder, one.pairs, name=f"base, {one}", free_samples=free_samples, **options
            )

    control = Path(run) / HYPOTHESIS_ONLY
    if control.is_dir():
        model, encoder = load_run(control, model_args, trust_remote_code), load_encoder(control, trust_remote_code)
        results[0][HYPOTHESIS_ONLY] = judge(model, encoder, first.pairs, name=f"hypothesis only, {first}", **options)
    return results


def load_encoder(run: str | Path, trust_remote_code: bool = False) -> PromptEncoder:
    """The encoder with which a run was trained."""
    recipe, prompt, _ = read_run(run)
    tokenizer = load_tokenizer(str(run), trust_remote_code=trust_remote_code)
    return PromptEncoder(prompt, tokenizer, train_on_end=recipe.get("train_on_end", False))


def exchange_premises(pairs: Dataset, seed: int = 0) -> Dataset:
    """The same pairs, each premise exchanged for another one, the same for all pairs that share it."""
    premises = np.random.default_rng(seed).permutation(sorted(set(pairs["premise"])))
    successor = dict(zip(premises.tolist(), np.roll(premises, 1).tolist(), strict=True))
    return pairs.map(lambda pair: {"premise": successor[pair["premise"]]}, desc="Exchanging premises")


def write_evaluation(folder: Path, pairs: Dataset, scores: dict[str, LabelScores], summary: dict[str, object]) -> None:
    """Write `predictions.parquet` (pairs; each model's choice, probabilities, joint scores) and `metrics.json`.

    Scores of a two-way set are three-way still; its gold labels are those of the set.
    """
    names = pairs.features["label"].names
    table = pairs.to_pandas()
    table["label"] = [names[label] for label in pairs["label"]]
    for model, score in scores.items():
        table[f"{model}_prediction"] = [LABELS[label] for label in score.choice]
        for label, word in enumerate(LABELS):
            table[f"{model}_p_{word}"] = score.log_probs[:, label].exp().numpy()
            table[f"{model}_joint_{word}"] = score.joint[:, label].numpy()
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pandas(table, preserve_index=False), folder / "predictions.parquet")
    write_json(folder / "metrics.json", summary)
