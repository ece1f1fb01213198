"""Batches: which pairs stand in one, and how it is packed into tries."""

from itertools import chain, repeat

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import BatchSampler, DataLoader, Sampler

from .. import graph, trie
from ..graph import prefetch


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
    """The share that one process has in each batch of all of them.

    Args:
        sampler: the order of the pairs, the same on all processes.
        batch_size: pairs in a batch of all processes together.
        process_index, num_processes: whose share.
        drop_last: leave out the last batch of an epoch if it is smaller.

    Yields:
        Lists of indices. Where there are fewer pairs than processes, in the last batch of an epoch, some get a pair
        that another has too: each must take part in every step.
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
            # Neighbours stay together: they may share a premise.
            start = len(batch) * self.process_index // self.num_processes
            end = len(batch) * (self.process_index + 1) // self.num_processes
            yield batch[start:end] or batch[start : start + 1]

    def __len__(self):
        return len(self.batches)


class EpochLoader(DataLoader):
    """Passes the number of the epoch on to its batches, as the loaders do that accelerate makes for the Trainer."""

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)

    def __iter__(self):
        batches = super().__iter__()  # workers are ahead by themselves
        return prefetch(batches) if self.pin_memory and self.num_workers == 0 else batches


class TrieCollator:
    """Packs a batch of `TokenRows` into a trie. Runs in the loader's workers.

    Args:
        answers: the token ids of the answers.
        max_row_tokens: the longest row of a trie; a longer pair makes the rows of its batch as long as itself.
        max_batch_tokens: the most tokens of a forward pass, padding included; a single row may hold more.

    Attributes:
        usual: set to pad micro-batches to the few shapes of `graph.pass_shape`.

    Returns:
        A dict of `labels` and `shift_labels`, both (1, P), the tokens to predict: the Trainer asks for the first, then
        counts the items of a batch in the second. And of `micro_batches`, one dict a forward pass: `input_ids`,
        `position_ids` and `exit` of some rows of `trie.pack_training`; `predict`, the nodes that have a label, as
        indices into the flattened (rows * length); `shift_labels`, (1, p), their labels; and `tokens`, what separate
        sequences would have fed (for the whole batch, in its first micro-batch).
    """

    def __init__(self, answers: list[list[int]], max_row_tokens: int, max_batch_tokens: int):
        self.answers = answers
        self.max_row_tokens = max_row_tokens
        self.max_batch_tokens = max_batch_tokens
        self.usual: tuple[int, int] | None = None

    def __call__(self, rows: list[tuple[np.ndarray, int]]) -> dict[str, torch.Tensor | list]:
        prompts, gold = zip(*rows, strict=True)
        answers = [self.answers[label] for label in gold]
        longest = max(map(len, prompts)) + max(map(len, answers))
        batch = trie.pack_training(prompts, answers, max(self.max_row_tokens, longest))
        n_rows, length = batch["input_ids"].shape
        count = -(-n_rows // max(1, self.max_batch_tokens // length))
        tokens = chain([batch["sequence_tokens"]], repeat(0))
        micro_batches = [
            self._part(*tensors)
            for tensors in zip(
                *(batch[name].tensor_split(count) for name in ("input_ids", "position_ids", "exit", "shift_labels")),
                tokens,
                strict=False,
            )
        ]
        labels = torch.cat([part["shift_labels"] for part in micro_batches], dim=1)
        if self.usual is not None:
            micro_batches = [part | graph.pad_pass(part, graph.pass_shape(part, self.usual)) for part in micro_batches]
        # Of a batch without `labels` the Trainer counts no items, and each part would be a mean of its own.
        return {"micro_batches": micro_batches, "labels": labels, "shift_labels": labels}

    @staticmethod
    def _part(input_ids, position_ids, exit, shift_labels, tokens):
        predict = (shift_labels.flatten() != trie.IGNORE_INDEX).nonzero().flatten()
        return {
            "input_ids": input_ids,
            "position_ids": position_ids,
            "exit": exit,
            "predict": predict,
            "shift_labels": shift_labels.flatten()[predict][None],
            "tokens": tokens,
        }


def without_labels(part: dict) -> dict:
    """A pass that computes and changes nothing."""
    return part | {"shift_labels": torch.full_like(part["shift_labels"], trie.IGNORE_INDEX), "tokens": 0}


def split_micro_batch(part: dict, most_tokens: int) -> list[dict]:
    """Split a part of a batch into parts of at most `most_tokens` tokens, but of at least one row."""
    rows, length = part["input_ids"].shape
    pieces = -(-rows // max(1, most_tokens // length))
    if pieces == 1:
        return [part]
    if "exit" not in part:
        return [
            dict(zip(part, tensors, strict=True))
            for tensors in zip(*(tensor.tensor_split(pieces) for tensor in part.values()), strict=True)
        ]
    found, start, tokens = [], 0, part["tokens"]
    names = ("input_ids", "position_ids", "exit")
    for tensors in zip(*(part[name].tensor_split(pieces) for name in names), strict=True):
        piece = dict(zip(names, tensors, strict=True))
        end = start + piece["input_ids"].numel()
        inside = (start <= part["predict"]) & (part["predict"] < end)
        piece |= {"predict": part["predict"][inside] - start, "shift_labels": part["shift_labels"][:, inside]}
        found.append(piece | {"tokens": tokens})
        start, tokens = end, 0
    return found


class TokenRows(torch.utils.data.Dataset):
    """Rows of `PromptEncoder.encode_rows` in flat arrays, from which a row is taken in a microsecond.

    Args:
        rows: with `input_ids` and `labels`, which are -100 on the prompt and the ids of an answer after it.
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

    def prompt(self, index: int) -> np.ndarray:
        """The token ids up to where the answer starts."""
        return self.tokens[self.offsets[index] : self.prompt_ends[index]]

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.prompt(index), int(self.gold[index])
