"""Judge a model on a split: predictions of the base and of the tuned model, pair by pair, and what they add up to."""

import time
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from accelerate import PartialState
from datasets import Dataset
from peft import PeftModel
from scipy.stats import binomtest
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support
from transformers import PreTrainedModel
from trl import ModelConfig

from . import trie
from .configs import BatchConfig
from .decoding import LabelScores, gather_scores, generate_freely, named_label, score_prompts
from .labels import LABELS, to_two_way
from .models import load_model, load_run
from .prompts import PromptEncoder
from .runs import write_json


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


def classification_metrics(gold: np.ndarray, scores: LabelScores, label_names: list[str]) -> dict[str, object]:
    """Accuracy with its 95 % Wilson interval, macro-F1, per label, confusion, and the mass on the label words.

    Args:
        gold: (n,) gold label ids.
        scores: three-way scores of the same pairs.
        label_names: names of the gold ids. For a two-way set, predictions are mapped by `labels.to_two_way`.
    """
    predicted = scores.choice.numpy()
    if len(label_names) != len(LABELS):
        predicted = np.array([to_two_way(label) for label in predicted])
    ids = list(range(len(label_names)))
    precision, recall, f1, support = precision_recall_fscore_support(gold, predicted, labels=ids, zero_division=0)
    right = int((gold == predicted).sum())
    interval = binomtest(right, len(gold)).proportion_ci(method="wilson")
    return {
        "accuracy": right / len(gold),
        "accuracy_interval": [interval.low, interval.high],
        "macro_f1": float(f1.mean()),
        "per_label": {
            name: {"precision": float(p), "recall": float(r), "f1": float(f), "n": int(n)}
            for name, p, r, f, n in zip(label_names, precision, recall, f1, support, strict=True)
        },
        "confusion": confusion_matrix(gold, predicted, labels=ids).tolist(),  # rows are gold
        "joint_accuracy": _joint_accuracy(gold, scores, label_names),
        "mass_on_labels": float(scores.mass.mean()),
    }


def _joint_accuracy(gold: np.ndarray, scores: LabelScores, label_names: list[str]) -> float:
    """Accuracy of the answer with the largest unrestricted probability: `acc` of lm-evaluation-harness."""
    predicted = scores.joint.argmax(dim=1).numpy()
    if len(label_names) != len(LABELS):
        predicted = np.array([to_two_way(label) for label in predicted])
    return float((gold == predicted).mean())


def free_generation(
    model: PreTrainedModel, encoder: PromptEncoder, pairs: Dataset, *, batch_size: int, max_new_tokens: int = 16
) -> dict[str, object]:
    """What the model says without constraints: the share of answers that name no label, and the accuracy.

    An answer counts for a label if its first line holds that label's word and no other's. One that names none, or
    several, is invalid, and is wrong. Runs on the main process's share only when called there: it is a sample.
    """
    said: list[str] = []
    prompts = encoder.encode(pairs["premise"], pairs["hypothesis"])
    for start in range(0, len(prompts), batch_size):
        said += generate_freely(model, encoder.tokenizer, prompts[start : start + batch_size], max_new_tokens)
    named = [named_label(text, encoder.prompt.label_words) for text in said]
    valid = [label is not None for label in named]
    if pairs.features["label"].num_classes != len(LABELS):
        named = [None if label is None else to_two_way(label) for label in named]
    right = sum(label == gold for label, gold in zip(named, pairs["label"], strict=True))
    return {
        "n": len(said),
        "invalid_share": 1 - sum(valid) / len(said),
        "accuracy": right / len(said),
        "accuracy_of_valid": right / sum(valid) if any(valid) else None,
        "examples": said[:5],
    }


def evaluate_base_and_tuned(
    run: str | Path,
    model_args: ModelConfig,
    encoder: PromptEncoder,
    pairs: Dataset,
    *,
    batch_size: int,
    batch_args: BatchConfig,
    free_samples: int,
    trust_remote_code: bool = False,
) -> tuple[dict[str, LabelScores], dict[str, dict[str, object]]]:
    """Scores and metrics of `base` and `tuned` on the same pairs with the same prompt.

    With an adapter one model serves both, the base being what is left when the adapter is switched off. A full model
    is judged first, then given up for its base, so that memory never holds two.

    Args:
        free_samples: how many pairs, evenly spaced, are also answered without constraints.
    """
    model = load_run(run, model_args, trust_remote_code)
    judge = partial(
        evaluate_model,
        encoder=encoder,
        pairs=pairs,
        batch_size=batch_size,
        batch_args=batch_args,
        free_samples=free_samples,
    )
    tuned = judge(model, name="tuned")
    if isinstance(model, PeftModel):
        with model.disable_adapter():
            base = judge(model, name="base")
    else:
        del model
        base = judge(load_model(model_args, trust_remote_code).to(PartialState().device).eval(), name="base")
    return {"base": base[0], "tuned": tuned[0]}, {"base": base[1], "tuned": tuned[1]}


def evaluate_model(
    model: PreTrainedModel,
    *,
    encoder: PromptEncoder,
    pairs: Dataset,
    name: str,
    batch_size: int,
    batch_args: BatchConfig,
    free_samples: int,
) -> tuple[LabelScores, dict[str, object]]:
    """Scores and metrics of one model, called `name` on the progress bar."""
    start = time.perf_counter()
    scores = predict(model, encoder, pairs, batch_size=batch_size, batch_args=batch_args, progress=f"Scoring {name}")
    seconds = time.perf_counter() - start
    metrics = classification_metrics(np.asarray(pairs["label"]), scores, pairs.features["label"].names)
    if free_samples and PartialState().is_main_process:
        sample = pairs.select(np.linspace(0, len(pairs) - 1, min(free_samples, len(pairs))).astype(int))
        metrics["free_generation"] = free_generation(model, encoder, sample, batch_size=batch_size)
    return scores, metrics | {"seconds": seconds, "pairs_per_second": len(pairs) / seconds}


def write_evaluation(folder: Path, pairs: Dataset, scores: dict[str, LabelScores], summary: dict[str, object]) -> None:
    """Write `predictions.parquet` (pairs; each model's choice, probabilities, joint scores) and `metrics.json`."""
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
