"""Batches: which pairs each holds, and how they are packed into tries."""

import math
from collections.abc import Sequence
from contextlib import suppress
from itertools import chain, repeat
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import BatchSampler, DataLoader, Sampler

from .. import UserError, graph, trie
from ..graph import prefetch

# Tensors of `trie.pack_training` with one entry for each node.
ROW_TENSORS = ("input_ids", "position_ids", "exit", "shift_labels", "shift_weights")


def class_weights(wanted: Sequence[str] | None, gold: np.ndarray, labels: Sequence[str]) -> list[float] | None:
    """The weight of each label in the loss of training, in the order of `labels`.

    The loss of a step is the sum over its pairs of weight times negative log-likelihood of the answer's tokens,
    divided by the number of these tokens. Weights are scaled so that their mean over the n training pairs is 1: the
    size of the loss, and with it the learning rate, stay as they are. No weight depends on a batch, so the gradient
    is the same however a step is divided. The losses of evaluations are not weighted.

    Args:
        wanted: `["balanced"]`, scikit-learn's n / (K * n_label) for the K labels that occur; or a number per label.
        gold: (n,) label ids of the training pairs.

    Returns:
        `None` if nothing is wanted.

    Raises:
        UserError: unless `wanted` is one of the two, with numbers above 0.
    """
    if not wanted:
        return None
    counts = np.bincount(gold, minlength=len(labels))
    if list(wanted) == ["balanced"]:
        given = 1 / np.maximum(counts, 1)
    else:
        given = np.array([_weight(text) for text in wanted])
        if len(given) != len(labels):
            raise UserError(
                f"class_weights has {len(given)} entries; give balanced, or one each for {', '.join(labels)}"
            )
    return (given * counts.sum() / (given @ counts)).tolist()


def _weight(text: str) -> float:
    with suppress(ValueError):
        if 0 < (weight := float(text)) < math.inf:
            return weight
    raise UserError(f"class_weights: {text!r} is not a number above 0; give balanced, or a number for each label")


def row_weights(labels: torch.Tensor, answers: list[list[int]], weights: Sequence[float]) -> torch.Tensor:
    """(rows,) the weight of each row of a padded batch, whose `labels` of (rows, length) hold its answer's tokens."""
    label_of = {tuple(answer): label for label, answer in enumerate(answers)}
    gold = [label_of[tuple(row[row != trie.IGNORE_INDEX].tolist())] for row in labels]
    return torch.tensor([weights[label] for label in gold], device=labels.device)


class GroupShuffleSampler(Sampler):
    """Every pair once an epoch, in an order that depends on seed and epoch alone, not on the number of processes.

    Args:
        groups: for each pair the group it belongs to, such as its premise. Groups come in random order, and the pairs
            of one stand together.
        seed: of the order.
    """

    def __init__(self, groups, seed: int):
        _, self.group = np.unique(np.asarray(groups), return_inverse=True)
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self):
        random = np.random.default_rng((self.seed, self.epoch))
        place = random.permutation(self.group.max() + 1)[self.group]
        return iter(np.lexsort((random.permutation(len(place)), place)).tolist())

    def __len__(self):
        return len(self.group)


class ShardedBatchSampler(Sampler):
    """The share of one process in each global batch.

    Args:
        sampler: the order of the pairs, the same on all processes.
        batch_size: pairs in a batch of all processes together.
        process_index, num_processes: whose share.
        drop_last: leave out the last batch of an epoch if it is smaller.

    Yields:
        Lists of indices. If the last batch of an epoch has fewer pairs than there are processes, some processes repeat
        a pair of another: each must take part in every step.
    """

    def __init__(self, sampler: Sampler, batch_size: int, process_index: int, num_processes: int, drop_last: bool):
        self.sampler = sampler
        self.batches = BatchSampler(sampler, batch_size, drop_last)
        self.process_index = process_index
        self.num_processes = num_processes

    def set_epoch(self, epoch: int) -> None:
        if isinstance(self.sampler, GroupShuffleSampler):
            self.sampler.set_epoch(epoch)

    def __iter__(self):
        for batch in self.batches:
            # Neighbours stay together because they may share a premise.
            start = len(batch) * self.process_index // self.num_processes
            end = len(batch) * (self.process_index + 1) // self.num_processes
            yield batch[start:end] or batch[start : start + 1]

    def __len__(self):
        return len(self.batches)


class EpochLoader(DataLoader):
    """Passes the epoch on to its batch sampler, as accelerate's loaders do."""

    batch_sampler: ShardedBatchSampler  # pyright: ignore[reportIncompatibleVariableOverride]

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)

    def __iter__(self):
        batches = super().__iter__()  # with workers, PyTorch prefetches
        return prefetch(batches) if self.pin_memory and self.num_workers == 0 else batches


class TrieCollator:
    """Packs a batch of `TokenRows` into a trie. Runs in the loader's workers.

    Args:
        answers: the token ids of the answers.
        max_row_tokens: the longest row of a trie, but for batches with long pairs (`trie.fit_row`).
        max_batch_tokens: the most tokens of a forward pass, padding included; a single row may hold more.
        weights: the weight of each label in the loss, from `class_weights`.

    Attributes:
        usual: set to pad micro-batches to the few shapes of `graph.pass_shape`.

    Returns:
        A dict with
        - `labels` and `shift_labels`, both (1, P): the tokens to predict. The Trainer requires the first and counts
          the items of a batch in the second;
        - `micro_batches`, one dict for each forward pass: `input_ids`, `position_ids` and `exit` of some rows of
          `trie.pack_training`; `predict`, (p,), the nodes that have a label, as indices into the flattened
          (rows * length); `shift_labels` and `shift_weights`, (1, p), their labels and weights; and `tokens`, the
          number of tokens in separate sequences (of the whole batch, in its first micro-batch; 0 in the others).
    """

    def __init__(
        self,
        answers: list[list[int]],
        max_row_tokens: int,
        max_batch_tokens: int,
        weights: Sequence[float] | None = None,
    ):
        self.answers = answers
        self.weights = [1.0] * len(answers) if weights is None else weights
        self.max_row_tokens = max_row_tokens
        self.max_batch_tokens = max_batch_tokens
        self.usual: tuple[int, int] | None = None

    def __call__(self, rows: list[tuple[np.ndarray, int]]) -> dict[str, Any]:
        prompts, gold = zip(*rows, strict=True)
        answers = [self.answers[label] for label in gold]
        longest = max(map(len, prompts)) + max(map(len, answers))
        weights = [self.weights[label] for label in gold]
        batch = trie.pack_training(prompts, answers, trie.fit_row(self.max_row_tokens, longest), weights=weights)
        n_rows, length = batch["input_ids"].shape
        count = -(-n_rows // max(1, self.max_batch_tokens // length))
        tokens = chain([batch["sequence_tokens"]], repeat(0))
        micro_batches = [
            self._micro_batch(*tensors)
            for tensors in zip(
                *(batch[name].tensor_split(count) for name in ROW_TENSORS),
                tokens,
                strict=False,
            )
        ]
        labels = torch.cat([micro_batch["shift_labels"] for micro_batch in micro_batches], dim=1)
        if self.usual is not None:
            micro_batches = [
                micro_batch | graph.pad_pass(micro_batch, graph.pass_shape(micro_batch, self.usual))
                for micro_batch in micro_batches
            ]
        # Without `labels` the Trainer counts no items, and the loss of each micro-batch would be its own mean.
        return {"micro_batches": micro_batches, "labels": labels, "shift_labels": labels}

    @staticmethod
    def _micro_batch(input_ids, position_ids, exit, shift_labels, shift_weights, tokens):
        predict = (shift_labels.flatten() != trie.IGNORE_INDEX).nonzero().flatten()
        return {
            "input_ids": input_ids,
            "position_ids": position_ids,
            "exit": exit,
            "predict": predict,
            "shift_labels": shift_labels.flatten()[predict][None],
            "shift_weights": shift_weights.flatten()[predict][None],
            "tokens": tokens,
        }


def without_labels(micro_batch: dict) -> dict:
    """The same micro-batch without labels: its loss and gradients are 0."""
    shift_labels = torch.full_like(micro_batch["shift_labels"], trie.IGNORE_INDEX)
    return micro_batch | {"shift_labels": shift_labels, "tokens": 0}


def split_micro_batch(micro_batch: dict, most_tokens: int) -> list[dict]:
    """Split a micro-batch into smaller ones of at most `most_tokens` tokens, but at least one row."""
    rows, length = micro_batch["input_ids"].shape
    count = -(-rows // max(1, most_tokens // length))
    if count == 1:
        return [micro_batch]
    names: tuple[str, ...] = ("input_ids", "position_ids", "exit") if "exit" in micro_batch else tuple(micro_batch)
    pieces = [
        dict(zip(names, tensors, strict=True))
        for tensors in zip(*(micro_batch[name].tensor_split(count) for name in names), strict=True)
    ]
    if "exit" not in micro_batch:
        return pieces
    start, tokens, predict = 0, micro_batch["tokens"], micro_batch["predict"]
    for piece in pieces:
        end = start + piece["input_ids"].numel()
        inside = (start <= predict) & (predict < end)
        piece["predict"] = predict[inside] - start
        for name in ("shift_labels", "shift_weights"):
            piece[name] = micro_batch[name][:, inside]
        piece["tokens"] = tokens
        start, tokens = end, 0
    return pieces


class TokenRows(torch.utils.data.Dataset):
    """Rows of `PromptEncoder.encode_rows` in flat arrays, for fast access to single rows.

    Args:
        rows: with `input_ids` and `labels`, which are -100 on the prompt and the answer's ids after it.
        answers: the token ids of the answers.

    Attributes:
        gold: (n,) the label of each row.
    """

    def __init__(self, rows: Dataset, answers: list[list[int]]):
        table = rows.with_format("arrow")[:]
        tokens = table["input_ids"].combine_chunks()
        self.offsets = tokens.offsets.to_numpy()
        self.tokens = tokens.flatten().to_numpy()
        given = table["labels"].combine_chunks().flatten().to_numpy() != trie.IGNORE_INDEX
        starts = self.offsets[:-1] - self.offsets[0]
        lengths = np.add.reduceat(given.astype(np.int64), starts) if len(rows) else np.zeros(0, np.int64)
        self.offsets = self.offsets - self.offsets[0]
        self.prompt_ends = self.offsets[1:] - lengths
        self.gold = np.full(len(lengths), -1)
        for label, answer in enumerate(answers):
            candidates = np.flatnonzero(lengths == len(answer))
            ids = self.tokens[self.prompt_ends[candidates, None] + np.arange(len(answer))]
            self.gold[candidates[(ids == answer).all(axis=1)]] = label

    def __len__(self) -> int:
        return len(self.gold)

    def __iter__(self):
        return map(self.__getitem__, range(len(self)))

    def prompt(self, index: int) -> np.ndarray:
        """The token ids before the answer."""
        return self.tokens[self.offsets[index] : self.prompt_ends[index]]

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.prompt(index), int(self.gold[index])
