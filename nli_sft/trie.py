"""Token tries: compute prefixes that prompts share once, instead of once a pair.

Prompts of one task repeat themselves: all share the instruction, and SNLI has about three hypotheses to a premise. A
trie holds each distinct prefix once. Its nodes in depth-first order are a row that a causal LM reads like text:

    pairs                   trie                                   index     0   1    2     3   4   5
    A man sleeps . no       A ─ man ┬ sleeps ─ . → no              token     A  man sleeps  .  eats .
    A man eats . yes                └ eats ─── . → yes             position  0   1    2     3   2   3
                                                                   exit      6   6    4     4   6   6

A node's position is its depth, and it attends to its ancestors only. In depth-first order the subtree of node j is
the interval [j, exit[j]), so j is an ancestor of i, or i itself, exactly when j <= i < exit[j]: a causal mask with one
more condition, built from `exit` on the model's device (`attention_mask`). Logits, loss and gradients are those of
the separate sequences.

A node predicts one token. In training each pair therefore has a node of its own for its last prompt token and the
answer below it, so that equal pairs count twice and a prompt with two labels learns both; all earlier tokens are
shared. In scoring every answer follows the whole prompt, and all tokens are shared. The last token of an answer
predicts nothing and is left out.
"""

import logging
from bisect import bisect_left
from contextlib import contextmanager
from itertools import chain

import numpy as np
import torch
from torch.nn.attention.flex_attention import BlockMask

logger = logging.getLogger(__name__)

IGNORE_INDEX = -100
FLEX_BLOCK = 128


def pack_training(prompts, answers, max_row_tokens, pad_to_multiple_of=16, share=True, weights=None):
    """Pack pairs into rows to train on, loss on the answers only.

    Args:
        prompts: the token ids of each pair's prompt, one sequence of at least one token a pair.
        answers: the token ids of each pair's answer, likewise.
        max_row_tokens: the most nodes in a row. Pairs fill as few rows as this allows, evenly.
        pad_to_multiple_of: rows are padded to a common length, a multiple of this. With 16 (see `attention_mask`) and
            a `max_row_tokens` that is a multiple too, no row is longer than `max_row_tokens`; but where that is 64
            more than a multiple of 128, rows may be one step longer (see `_pack`).
        share: without it sequences stand one after the other, whole, as packing has them: to measure against.
        weights: the weight of each pair in the loss; 1 by default.

    Returns:
        A dict of int64 tensors of shape (rows, length), all indices relative to the row:
            input_ids: the token at each node; 0 where padded.
            position_ids: the depth of each node; 0 where padded.
            exit: the end of each node's subtree; its own index + 1 where padded.
            shift_labels: the token to predict at each node; -100 where there is none.
        of the same shape, in float32, `shift_weights`: the weight of each token to predict;
        and of ints, for the logs: `pairs`, `sequence_tokens` (what separate sequences would feed, unpadded) and
        `trie_tokens` (the nodes); `trie_tokens / input_ids.numel()` is the fill rate.

    Raises:
        ValueError: no pairs, an empty prompt or answer, or a pair longer than a row.
    """
    _check(prompts, answers)
    if len(prompts) != len(answers):
        raise ValueError(f"{len(prompts)} prompts but {len(answers)} answers: each pair needs one of both.")
    prompt_tokens, prompt_lengths = _pad(prompts)
    targets, answer_lengths = _pad(answers)
    lengths = prompt_lengths + answer_lengths - 1
    _check_fit(lengths, max_row_tokens)
    tokens = np.full((len(prompts), lengths.max()), -1, dtype=np.int32)
    tokens[:, : prompt_tokens.shape[1]] = prompt_tokens[:, : tokens.shape[1]]
    for step in range(targets.shape[1] - 1):  # an answer is fed but for its last token
        fed = np.flatnonzero(answer_lengths - 1 > step)
        tokens[fed, prompt_lengths[fed] + step] = targets[fed, step]
    # What a pair owns must not match its neighbour's: it is blanked for the comparison.
    shared = np.where(share & (np.arange(tokens.shape[1]) < (prompt_lengths - 1)[:, None]), tokens, -1)
    batch, nodes = _pack(tokens, lengths, shared, prompt_lengths - 1, max_row_tokens, pad_to_multiple_of)

    shift_labels = torch.full_like(batch["input_ids"], IGNORE_INDEX)
    labelled = targets >= 0
    shift_labels.view(-1)[nodes[torch.from_numpy(labelled)]] = torch.from_numpy(targets[labelled]).long()
    batch["shift_labels"] = shift_labels
    of_pairs = np.ones(len(prompts)) if weights is None else np.asarray(weights)
    shift_weights = torch.zeros_like(batch["input_ids"], dtype=torch.float32)
    repeated = np.broadcast_to(of_pairs[:, None], targets.shape)[labelled]
    shift_weights.view(-1)[nodes[torch.from_numpy(labelled)]] = torch.from_numpy(repeated).float()
    batch["shift_weights"] = shift_weights
    return {**batch, "pairs": len(prompts), "sequence_tokens": int(lengths.sum())}


def pack_scoring(prompts, answers, max_row_tokens, pad_to_multiple_of=16):
    """Pack pairs into rows that give the log-probability of every answer of every pair in one forward pass.

    Args:
        prompts: the token ids of each pair's prompt, one sequence of at least one token a pair.
        answers: the token ids of each of the K answers, the same for all pairs.
        max_row_tokens, pad_to_multiple_of: as in `pack_training`.

    Returns:
        The dict of `pack_training` without `shift_labels`, and the int64 tensors
            predict: (P,), the nodes that predict an answer token, ascending, as indices into the flattened
                (rows * length): the only ones that need logits.
            answer_nodes: (pairs, K, A), for each token of each answer of each pair the index into `predict` of the
                node that predicts it; A is the length of the longest answer, and 0 stands past the end of others.
            answer_ids: (K, A), the tokens of the answers; -100 past the end.

    Raises:
        ValueError: as in `pack_training`.
    """
    _check(prompts, answers)
    prompt_tokens, prompt_lengths = _pad(prompts)
    answer_tokens, answer_lengths = _pad(answers)
    _check_fit(prompt_lengths + answer_lengths.max() - 1, max_row_tokens)
    pairs, choices, steps = len(prompts), *answer_tokens.shape

    # Each answer but its last token, written after the prompt.
    fed = np.where(np.arange(steps) < (answer_lengths - 1)[:, None], answer_tokens, -1)
    tokens = np.full((pairs, choices, prompt_tokens.shape[1] + steps), -1, dtype=np.int32)
    tokens[:, :, : prompt_tokens.shape[1]] = prompt_tokens[:, None]
    np.put_along_axis(tokens, prompt_lengths[:, None, None] + np.arange(steps), fed[None], axis=2)
    tokens = tokens.reshape(pairs * choices, -1)
    lengths = (prompt_lengths[:, None] + answer_lengths - 1).reshape(-1)
    ends = np.repeat(prompt_lengths - 1, choices)
    batch, nodes = _pack(tokens, lengths, tokens, ends, max_row_tokens, pad_to_multiple_of)

    real = torch.from_numpy(answer_tokens >= 0)
    nodes = nodes.view(pairs, choices, steps)
    predict, answer_nodes = nodes[real.expand_as(nodes)].unique(return_inverse=True)
    batch["predict"] = predict
    batch["answer_nodes"] = torch.zeros_like(nodes).masked_scatter_(real, answer_nodes)
    batch["answer_ids"] = torch.from_numpy(answer_tokens).long().masked_fill_(~real, IGNORE_INDEX)
    return {**batch, "pairs": pairs, "sequence_tokens": int(lengths.sum())}


def attention_mask(exit, implementation, dtype):
    """Build the mask that lets each node see its ancestors and itself, on the device of `exit`.

    Give it to the model as `attention_mask`: transformers passes a 4-D mask on to every layer as it is, sliding-window
    layers included (see `unsupported_reason`).

    On CUDA, PyTorch's flash kernel takes no mask at all. The memory-efficient kernel broadcasts one over the heads,
    without a copy where the length is a multiple of 16. SDPA turns a boolean mask into an additive one anew in every
    layer and keeps each for the backward pass; an additive mask of the type that attention computes in is kept once.

    Args:
        exit: (rows, length), from `pack_training` or `pack_scoring`.
        implementation: the model's `config._attn_implementation`: "sdpa", "eager" or "flex_attention".
        dtype: `torch.bool` (SDPA only), or the floating type that attention computes in. Ignored by flex attention.

    Returns:
        (rows, 1, length, length): true or 0 where the query (second to last axis) sees the key, false or the least
        number of the type elsewhere; for flex attention a `BlockMask` of that shape.

    Raises:
        ValueError: another implementation, or a boolean mask for eager attention, which would add it to the scores.
    """
    if implementation == "flex_attention":
        return _block_mask(exit)
    if implementation not in ("sdpa", "eager"):
        raise ValueError(f"Attention implementation {implementation!r} takes no trie mask.")
    rows, length = exit.shape
    index = torch.arange(length, device=exit.device)
    batch = torch.arange(rows, device=exit.device)[:, None, None]
    visible = mask_mod(exit)(batch, 0, index[:, None], index)[:, None]
    if dtype == torch.bool:
        if implementation == "eager":
            raise ValueError("Eager attention adds its mask to the scores: ask for a floating type, not torch.bool.")
        return visible
    return torch.zeros(visible.shape, dtype=dtype, device=exit.device).masked_fill_(~visible, torch.finfo(dtype).min)


def model_inputs(model, batch):
    """The keyword arguments with which a model reads a batch of `pack_training` or `pack_scoring`, mask included.

    The mask has the type that attention computes in: that of autocast where it is on, else that of the weights.
    """
    device = batch["exit"].device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else model.dtype
    mask = attention_mask(batch["exit"], model.config._attn_implementation, dtype)
    return {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "attention_mask": mask}


def mask_mod(exit):
    """The mask as FlexAttention's function of (row, head, query index, key index), from `exit` of (rows, length)."""

    def sees(row, head, query, key):
        return (key <= query) & (query < exit[row, key])

    return sees


def _block_mask(exit):
    # `create_block_mask` would visit every (query, key), but `exit` alone determines the blocks: a block of earlier
    # keys is needed if one of them is still open at the first query; it has no hole if all are open at the last.
    rows, length = exit.shape
    blocks = -(-length // FLEX_BLOCK)
    padding = blocks * FLEX_BLOCK - length
    first = torch.arange(blocks, device=exit.device) * FLEX_BLOCK
    padded = torch.nn.functional.pad(exit, (0, padding)).view(rows, blocks, FLEX_BLOCK)
    earlier = first < first[:, None]
    full = earlier & (padded.amin(-1)[:, None] >= first[:, None] + FLEX_BLOCK)
    needed = (earlier & (padded.amax(-1)[:, None] > first[:, None])) | (first == first[:, None])

    def listed(chosen):
        chosen = chosen[:, None].int()
        return chosen.sum(-1, dtype=torch.int32), chosen.argsort(stable=True, dim=-1, descending=True).int()

    return BlockMask.from_kv_blocks(
        *listed(needed & ~full), *listed(full), FLEX_BLOCK, mask_mod(exit), seq_lengths=(length, length)
    )


@contextmanager
def exact_logits(model, positions=None):
    """A context in which a causal LM returns float32 logits, whatever it computes in.

    A logit in bf16 has 8 significant bits: between 8 and 16 it moves in steps of 1/16, and the first two labels of one
    pair in fifty tie (docs/results.md). The product itself is summed in float32 anyway; here it is not rounded.

    Args:
        model: a causal LM, or one wrapped by PEFT. Its head stays as it is where it is no plain linear layer.
        positions: (P,), indices into the flattened (rows * length), such as `predict` of `pack_scoring`: the logits
            are of these nodes only, (1, P, vocabulary). `logits_to_keep` keeps the same columns of every row; this
            keeps single nodes. What the model does to its logits afterwards (soft-capping, scaling) still happens.
    """
    head = model.get_output_embeddings()
    plain, forward, replaced = type(head) is torch.nn.Linear, head.forward, head.__dict__.get("forward")

    def project(hidden):
        if positions is not None:
            hidden = hidden.flatten(0, -2)[positions][None]
        if not plain or torch.is_grad_enabled():
            return forward(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            if hidden.is_cuda and hidden.dtype == head.weight.dtype != torch.float32:
                logits = torch.mm(hidden.flatten(0, -2), head.weight.T, out_dtype=torch.float32)
                logits = logits.unflatten(0, hidden.shape[:-1])
                return logits if head.bias is None else logits + head.bias.float()
            return torch.nn.functional.linear(
                hidden.float(), head.weight.float(), None if head.bias is None else head.bias.float()
            )

    head.forward = project
    try:
        yield
    finally:
        del head.forward
        if replaced is not None:  # accelerate puts a forward of its own on modules that it moves
            head.forward = replaced


def answer_log_probs(logits, answer_nodes, answer_ids):
    """The log-probability of each token of each answer, given its prompt and the tokens before.

    Args:
        logits: (P, vocabulary), the logits at `predict` of `pack_scoring`.
        answer_nodes, answer_ids: (pairs, K, A) and (K, A), from `pack_scoring`.

    Returns:
        (pairs, K, A) float32, natural logarithms, 0 past the end of an answer: the sum over the last axis is the
        log-probability of the whole answer.
    """
    normalizer = logits.float().logsumexp(-1)
    chosen = logits[answer_nodes, answer_ids.clamp(min=0)].float() - normalizer[answer_nodes]
    return chosen.masked_fill(answer_ids == IGNORE_INDEX, 0.0)


def row_tokens(batching, max_row_tokens, config, longest, instruction):
    """How long rows may be for a model, or None for padded batches, with a warning if they were not requested.

    Every row begins with the instruction that all prompts share, so rows grow with it to keep its share small.

    Args:
        batching: "trie" or "padded".
        max_row_tokens: the longest row wanted where the instruction is short.
        config, longest: as for `unsupported_reason`.
        instruction: the tokens with which all prompts begin.
    """
    if batching == "padded":
        return None
    reason = unsupported_reason(config, longest)
    if reason is not None:
        logger.warning("Padded batches instead of tries: %s", reason)
        return None
    # SDPA also computes what is masked, so its cost grows with the row; flex attention skips masked blocks.
    times = 8 if config._attn_implementation == "flex_attention" else 4
    row = max(max_row_tokens, times * instruction)
    if config.model_type == "gpt_neo":  # its own mask is as long as its positions (see `_pack` for the margin)
        return min(row, max(config.max_position_embeddings // 16 - 1, 1) * 16)
    return row


def fit_row(max_row_tokens, longest):
    """How long the rows of a batch may be.

    At least twice its longest pair: pairs on one long document then share a row, which begins with that document, and
    their own tokens fill as much again.

    Args:
        max_row_tokens: from `row_tokens`.
        longest: the tokens of the longest pair of the batch, prompt and answer together.
    """
    return max(max_row_tokens, 2 * longest)


def unsupported_reason(config, longest):
    """Why a model cannot run on tries.

    Args:
        config: the configuration of a transformers model.
        longest: the tokens of the longest sequence, prompt and answer together.

    Returns:
        One sentence with the cause and the fix, or None if tries give the model's own results.
    """
    if config.is_encoder_decoder:
        return f"{config.model_type} is an encoder-decoder model and tries are for decoders: set batching: padded."
    config = config.get_text_config()
    name = config.model_type
    layers = set(getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or [])
    other = sorted(layers - {"attention", "full_attention", "sliding_attention", "chunked_attention"})
    if other:
        return f"{name} has {', '.join(other)} layers, which do not follow an attention mask: set batching: padded."
    if not hasattr(config, "num_attention_heads"):
        return f"{name} is recurrent, and a recurrence follows the row, not the trie: set batching: padded."
    alibi = getattr(config, "alibi", False) or getattr(getattr(config, "attn_config", None), "alibi", False)
    if alibi or name == "bloom":
        return f"{name} takes distances from the order of the row (ALiBi), not from positions: set batching: padded."
    if name in ("cpmant", "openai-gpt", "xlm", "xlnet"):
        return f"{name} builds its mask itself and takes none of (rows, 1, length, length): set batching: padded."

    windows = [getattr(config, "attention_chunk_size", None)]
    if not layers or "sliding_attention" in layers:
        windows.append(getattr(config, "sliding_window", None))
    if "local" in getattr(config, "attention_layers", []):
        windows.append(config.window_size)
    if name == "gpt_neo" and fit_row(0, longest) > config.max_position_embeddings - 32:
        return f"{name} has {config.max_position_embeddings} positions for a whole row: set batching: padded."
    window = min((size for size in windows if size), default=longest)
    if window < longest:
        return (
            f"{name} attends within windows of {window} tokens and the longest pair has {longest}: "
            "set batching: padded, or drop pairs longer than the window."
        )
    if config._attn_implementation not in (None, "sdpa", "eager", "flex_attention"):
        return (
            f"The attention implementation {config._attn_implementation} takes no arbitrary mask: "
            'load the model with attn_implementation="sdpa" or "flex_attention".'
        )
    return None


def _check(prompts, answers):
    if not len(prompts) or not len(answers):
        raise ValueError("There are no pairs to pack.")
    for name, sequences in (("prompt", prompts), ("answer", answers)):
        empty = next((i for i, sequence in enumerate(sequences) if not len(sequence)), None)
        if empty is not None:
            raise ValueError(f"The {name} {empty} has no tokens.")


def _check_fit(lengths, max_row_tokens):
    longest = int(lengths.argmax())
    if lengths[longest] > max_row_tokens:
        raise ValueError(
            f"Pair {longest} feeds {lengths[longest]} tokens but a row holds {max_row_tokens}: "
            "raise max_row_tokens, or drop long pairs."
        )


def _pad(sequences):
    """The sequences as one matrix, -1 past their ends, and their lengths."""
    lengths = np.fromiter(map(len, sequences), np.int32, len(sequences))
    tokens = np.full((len(sequences), lengths.max()), -1, dtype=np.int32)
    flat = (
        np.concatenate(sequences)
        if isinstance(sequences[0], np.ndarray)
        else np.fromiter(chain.from_iterable(sequences), np.int32)
    )
    tokens[np.arange(tokens.shape[1]) < lengths[:, None]] = flat
    return tokens, lengths


def _pack(tokens, lengths, shared, predict_from, max_row_tokens, pad_to_multiple_of):
    """Pack sequences into rows.

    Args:
        tokens, lengths: n sequences, as from `_pad`.
        shared: `tokens`, with -1 also for those that a sequence shares with no other.
        predict_from: (n,), the depth from which on each sequence predicts.
        max_row_tokens, pad_to_multiple_of: as in `pack_training`.

    Returns:
        The tensors and `trie_tokens` of a batch, and the nodes (n, steps) at which each sequence predicts, as indices
        into the flattened (rows * length); shorter ones repeat their last node.
    """
    # Sorted as raw memory, which is quick and lexicographic, sequences with common prefixes are neighbours.
    order = np.argsort(shared.view(f"V{shared.itemsize * shared.shape[1]}").reshape(-1), kind="stable")
    tokens, lengths, shared = tokens[order], lengths[order], shared[order]
    depth = np.arange(tokens.shape[1], dtype=np.int32)

    # The longest common prefix of each sequence with the one before. The extra column ends every comparison.
    parts = np.ones((len(tokens), len(depth) + 1), dtype=bool)
    parts[1:, :-1] = (shared[1:] != shared[:-1]) | (shared[1:] < 0)
    prefix = parts.argmax(axis=1).astype(np.int32)
    prefix[0] = 0
    first = _fill_rows(lengths, prefix, max_row_tokens)
    prefix[first] = 0

    # Sequence i adds its nodes below depth prefix[i], and they are numbers start[i] and on of all nodes.
    start = np.concatenate(([0], np.cumsum(lengths - prefix))).astype(np.int32)
    leaves = prefix[:, None] <= depth
    new = leaves & (depth < lengths[:, None])
    # Its node at depth t is the newest there, whose subtree ends where the next sequence leaves at t or above.
    node = np.maximum.accumulate(np.where(new, (start[:-1] - prefix)[:, None] + depth, 0), axis=0)
    end = np.full((len(tokens), len(depth)), start[-1])
    end[:-1] = np.minimum.accumulate(np.where(leaves, start[:-1, None], start[-1])[:0:-1], axis=0)[::-1]

    row_start = start[first]
    used = np.diff(np.append(row_start, start[-1]))
    length = int(-(-used.max() // pad_to_multiple_of) * pad_to_multiple_of)
    if length % 128 == 64:
        # cuDNN's attention, PyTorch's first choice on an H100, can return NaN gradients under a mask at these lengths:
        # https://github.com/pytorch/pytorch/issues/196678 (torch 2.11 to 2.13). At all others it does not.
        length += pad_to_multiple_of
    row = np.repeat(np.arange(len(first)), used)
    column = np.arange(start[-1]) - row_start[row]

    def padded(values, padding):
        rows = np.empty((len(first), length), dtype=np.int64)
        rows[:] = padding
        rows[row, column] = values
        return torch.from_numpy(rows)

    batch = {
        "input_ids": padded(tokens[new], 0),
        "position_ids": padded(np.broadcast_to(depth, new.shape)[new], 0),
        "exit": padded(end[new] - row_start[row], np.arange(length) + 1),
        "trie_tokens": int(start[-1]),
    }
    steps = np.arange((lengths - predict_from[order]).max())
    depths = np.minimum(predict_from[order, None] + steps, lengths[:, None] - 1)
    nodes = np.empty(depths.shape, dtype=np.int64)
    nodes[order] = (row * length + column)[np.take_along_axis(node, depths, axis=1)]
    return batch, torch.from_numpy(nodes)


def _fill_rows(lengths, prefix, max_row_tokens):
    """The first sequence of each row: as few rows as `max_row_tokens` allows, and then the shortest."""
    nodes = np.concatenate(([0], np.cumsum(lengths - prefix)))

    def fill(budget):
        first, following = [], 0
        while following < len(lengths):
            first.append(following)
            # The first of a row shares nothing, so it costs its prefix again.
            following = np.searchsorted(nodes, nodes[following] + budget - prefix[following], side="right") - 1
        return first

    rows = len(fill(max_row_tokens))
    least = int(lengths.max())
    return fill(least + bisect_left(range(least, max_row_tokens), True, key=lambda budget: len(fill(budget)) <= rows))
