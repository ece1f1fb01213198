"""Constrained prediction: the model may only answer with one of its label words.

- `generate_labels` runs `model.generate` with `prefix_allowed_tokens_fn`, as a deployed model does.
- `score_prompts` reads the log-probability of every token of every answer from forward passes. `LabelScores` derives
  the same prediction from them, the probability of each label, and the label mass without constraints.
- `generate_unconstrained` generates without constraints, to measure how many answers name no label.
"""

import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import UserError, graph, trie
from ..configs import BatchConfig
from ..data.prompts import PromptEncoder
from ..graph import prefetch
from ..models.bases import InputLimits

logger = logging.getLogger(__name__)

# Plain greedy decoding, whatever generation_config.json says: a repetition penalty would lower the probability of the
# label words that the prompt lists.
GREEDY = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}

Answers = list[list[int]]  # token ids of each label's answer, in label order; none is a prefix of another


@dataclass(frozen=True)
class LabelScores:
    """The scores of a model on n pairs.

    Attributes:
        choice: (n,) int64. The label from constrained greedy generation.
        log_probs: (n, labels) float32. Log-probability of each label under constrained generation: at every step only
            tokens that continue some answer are allowed, and a label's probability is the product over its steps.
        unconstrained: (n, labels) float32. Sum of the unconstrained log-probabilities of an answer's tokens, which
            is what lm-evaluation-harness compares for `acc`.
    """

    choice: torch.Tensor
    log_probs: torch.Tensor
    unconstrained: torch.Tensor

    @classmethod
    def from_token_log_probs(cls, token_log_probs: torch.Tensor, answers: Answers) -> "LabelScores":
        """From (n, labels, longest answer) log-probabilities, as `score_prompts` returns them.

        A softmax over the allowed tokens gives the constrained probabilities; the normalizer of the full vocabulary
        cancels, so no logits are needed.
        """
        constrained = torch.zeros_like(token_log_probs)
        alive = torch.ones(token_log_probs.shape[:2], dtype=torch.bool)  # answers that greedy decoding can still reach
        for step in range(token_log_probs.shape[2]):
            for options in _branches(answers, step).values():
                # One column for each distinct next token, from the first answer that has it.
                columns = [labels[0] for labels in options.values()]
                step_log_probs = torch.log_softmax(token_log_probs[:, columns, step], dim=1)
                best = step_log_probs.argmax(dim=1)
                for column, labels in enumerate(options.values()):
                    constrained[:, labels, step] = step_log_probs[:, [column]]
                    alive[:, labels] &= (best == column)[:, None]
        choice = alive.int().argmax(dim=1)  # exactly one answer is left
        return cls(choice, constrained.sum(dim=2), token_log_probs.sum(dim=2))

    @property
    def label_mass(self) -> torch.Tensor:
        """(n,) total probability of the label words without constraints."""
        return self.unconstrained.exp().sum(dim=1)

    def check_numbers(self, model: torch.nn.Module, what: str, fix: str) -> None:
        """Raise an error if scores are NaN or infinite, as every metric of them would be wrong.

        Args:
            model: the model that was scored; its weights are searched for the cause.
            what: model and set, for the error message.
            fix: what to do if weights are NaN or infinite.

        Raises:
            UserError: with the number of affected pairs.
        """
        affected = int((~self.unconstrained.isfinite().all(dim=1)).sum())
        if not affected:
            return
        weight = next((name for name, values in model.named_parameters() if not values.isfinite().all()), None)
        raise UserError(
            f"{what}: the scores of {affected:,} of {len(self.unconstrained):,} pairs are NaN or infinite, "
            + (
                "though the weights are not, so something overflows on the way: try precision: fp32"
                if weight is None
                else f"and so are weights of the model, such as {weight}: {fix}"
            )
        )


def _branches(answers: Answers, step: int) -> dict[tuple[int, ...], dict[int, list[int]]]:
    """{prefix of `step` tokens: {next token: labels whose answers continue with it}}."""
    branches: dict[tuple[int, ...], dict[int, list[int]]] = {}
    for label, answer in enumerate(answers):
        if step < len(answer):
            branches.setdefault(tuple(answer[:step]), {}).setdefault(answer[step], []).append(label)
    return branches


def distinguishing_prefixes(answers: Answers) -> Answers:
    """The shortest prefix of each answer that distinguishes it from the others.

    Constrained decoding has no choice after these. So scoring them alone gives the `choice` and the `log_probs` of the
    whole answers in less time; `unconstrained` and `label_mass` are those of the prefixes.
    """

    def shortest(answer: list[int]) -> list[int]:
        prefixes = (answer[: step + 1] for step in range(len(answer)))
        return next(prefix for prefix in prefixes if sum(a[: len(prefix)] == prefix for a in answers) == 1)

    return [shortest(answer) for answer in answers]


def allowed_tokens(
    answers: Answers, prompt_length: int, end_token_id: int
) -> Callable[[int, torch.Tensor], list[int]]:
    """A `prefix_allowed_tokens_fn` for `generate` that allows the answers only, then the end token.

    Args:
        answers: token ids of each label's answer.
        prompt_length: tokens before the answer, including the padding (on the left).
        end_token_id: allowed once an answer is complete.
    """

    def allowed(_batch_index: int, ids: torch.Tensor) -> list[int]:
        generated = tuple(ids[prompt_length:].tolist())
        return list(_branches(answers, len(generated)).get(generated, {end_token_id: []}))

    return allowed


@torch.no_grad()
def generate_labels(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], answers: Answers
) -> list[int]:
    """Constrained greedy generation: the label id for each prompt."""
    pad = pad_token_id(tokenizer)
    input_ids, attention_mask = pad_left(prompts, pad)
    end = tokenizer.eos_token_id if isinstance(tokenizer.eos_token_id, int) else pad
    with trie.exact_logits(model):
        output = model.generate(  # pyright: ignore[reportCallIssue] (torch's stubs take it for a tensor)
            input_ids=input_ids.to(model.device),
            attention_mask=attention_mask.to(model.device),
            prefix_allowed_tokens_fn=allowed_tokens(answers, input_ids.shape[1], end),
            max_new_tokens=max(map(len, answers)),
            pad_token_id=pad,
            **GREEDY,
        )
    generated = output[:, input_ids.shape[1] :].tolist()
    return [next(label for label, answer in enumerate(answers) if row[: len(answer)] == answer) for row in generated]


def score_prompts(
    model: PreTrainedModel,
    prompts: list[list[int]],
    answers: Answers,
    pad_token_id: int,
    *,
    batch_size: int,
    max_row_tokens: int | None,
    progress: str | None = None,
    gold: list[int] | None = None,
    graphs: graph.ScoringGraphs | None = None,
) -> LabelScores:
    """Score any number of prompts and return the scores in the order given.

    If a batch does not fit in memory, the batch size is halved for the remaining pairs.

    Args:
        batch_size: prompts per forward pass, at first.
        max_row_tokens: the longest row of a trie, or `None` for padded batches.
        progress: description of a progress bar, or `None` for no bar.
        gold: gold label ids, to show the accuracy so far on the bar.
        graphs: from `scoring_graphs`; the caller can use them again as long as the model does not change.
    """
    if max_row_tokens is None:
        order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    else:  # brings prompts that share a premise together
        sort_keys = [np.asarray(prompt, np.int32).tobytes() for prompt in prompts]
        order = sorted(range(len(prompts)), key=sort_keys.__getitem__)
    scored: list[torch.Tensor] = []  # left on the device, because copying them would wait for it
    done = 0
    # leave=None: a nested bar disappears when it is complete.
    with tqdm(total=len(prompts), desc=progress, unit="pair", disable=progress is None, leave=None) as bar:
        accuracy = _AccuracySoFar(bar, answers, None if gold is None else [gold[index] for index in order])
        while done < len(order):
            size = min(batch_size, len(order) - done)
            batches = [order[start : start + size] for start in range(done, len(order), size)]
            try:
                for batch, scores in _score_batches(
                    model, prompts, batches, answers, pad_token_id, max_row_tokens, graphs
                ):
                    scored.append(scores)
                    done += len(batch)
                    bar.update(len(batch))
                    accuracy.show(scored)
            except RuntimeError as error:
                if size == 1 or not should_reduce_batch_size(error):
                    raise
                batch_size, graphs = size // 2, None
                logger.info("out of memory: scoring continues with %d prompts per batch", batch_size)
            if (
                batch_size < size
            ):  # not in the except clause: there the traceback holds on to what the pass had computed
                clear_device_cache(garbage_collection=True)
    log_probs = torch.zeros(len(prompts), len(answers), max(map(len, answers)))
    if scored:
        log_probs[order] = torch.cat(scored).cpu()
    return LabelScores.from_token_log_probs(log_probs, answers)


class _AccuracySoFar:
    """Shows the accuracy on a progress bar. At most once a second, as it has to wait for the device."""

    def __init__(self, bar: tqdm, answers: Answers, gold: list[int] | None):
        self.bar, self.answers, self.gold = bar, answers, gold
        self.counted = self.done = self.right = 0
        self.shown = time.monotonic()

    def show(self, scored: list[torch.Tensor]) -> None:
        if self.gold is None or self.bar.disable or time.monotonic() < self.shown + 1:
            return
        log_probs = torch.cat([scores.cpu() for scores in scored[self.counted :]])
        predicted = LabelScores.from_token_log_probs(log_probs, self.answers).choice.tolist()
        self.right += sum(map(int.__eq__, predicted, self.gold[self.done :]))
        self.counted, self.done = len(scored), self.done + len(predicted)
        self.bar.set_postfix(accuracy=f"{self.right / self.done:.1%}", refresh=False)
        self.shown = time.monotonic()


def _score_batches(model, prompts, batches, answers, pad_token_id, max_row_tokens, graphs):
    """Yield each batch of indices with its scores. On CUDA, a thread packs tries ahead."""
    if max_row_tokens is None:
        for batch in batches:
            yield batch, score_padded(model, [prompts[index] for index in batch], answers, pad_token_id)
        return
    on_cuda = model.device.type == "cuda"

    def pack() -> Iterator[tuple[list[int], dict[str, torch.Tensor]]]:
        for batch in batches:
            packed = pack_scoring([prompts[index] for index in batch], answers, max_row_tokens)
            packed = packed if graphs is None else graphs.pad(packed)
            # A copy from memory that is not pinned waits for all earlier work.
            yield batch, {name: values.pin_memory() if on_cuda else values for name, values in packed.items()}

    for batch, packed in prefetch(pack()) if on_cuda else pack():
        if graphs is None:
            yield batch, score_packed(model, {n: v.to(model.device, non_blocking=True) for n, v in packed.items()})
        else:
            yield batch, graphs(packed)[: len(batch)]


def scoring_graphs(
    model: PreTrainedModel, pairs: int, max_row_tokens: int | None, compiled: bool = False
) -> graph.ScoringGraphs | None:
    """CUDA graphs for `score_prompts` with batches of `pairs` prompts, or `None` if they are not possible.

    They need a single process, because sharded models synchronize in every pass, and an attention other than
    FlexAttention, which compiles for each mask.

    Args:
        compiled: use the compiled layers. Compiling them for scoring takes seconds, which pays off from some hundred
            thousand pairs.
    """
    alone = PartialState().num_processes == 1 and model.device.type == "cuda"
    if not alone or max_row_tokens is None or model.config._attn_implementation == "flex_attention":
        return None
    return graph.ScoringGraphs(partial(score_packed, model), pairs, max_row_tokens, compiled)


class Scorer:
    """Scores prompts with one model, in training, evaluation and `NLIClassifier`.

    Args:
        model: a causal LM, or one with an adapter, on its device.
        encoder: the encoder of the prompts.
        batch_args: tries or padded batches, how long their rows may be, and whether to use CUDA graphs. Graphs are
            kept, and read the weight tensors that the model had when they were recorded.
        batch_size: prompts per forward pass, at first; halved if they do not fit in memory.
        answers: token ids of each label's answer; those of the encoder by default.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        encoder: PromptEncoder,
        batch_args: BatchConfig,
        batch_size: int,
        answers: Answers | None = None,
    ):
        self.model = model
        self.encoder = encoder
        self.batch_args = batch_args
        self.batch_size = batch_size
        self.answers = encoder.answers if answers is None else answers
        self._limits = InputLimits.of(model)
        self._graphs: tuple[int, graph.ScoringGraphs | None] | None = None  # and the length of their rows

    def __call__(
        self, prompts: list[list[int]], *, progress: str | None = None, gold: list[int] | None = None
    ) -> LabelScores:
        """Score any number of prompts in this process; `progress` and `gold` as for `score_prompts`.

        Raises:
            UserError: if a prompt has a token or a length that the model cannot read.
        """
        # Not the longest of `self.answers`: the limit is the same everywhere.
        longest_answer = max(map(len, self.encoder.answers))
        self._limits.check(prompts, self.encoder.tokenizer, longest_answer - 1)
        row_tokens = self._row_tokens(max(map(len, prompts), default=0) + longest_answer)
        return score_prompts(
            self.model,
            prompts,
            self.answers,
            pad_token_id(self.encoder.tokenizer),
            batch_size=self.batch_size,
            max_row_tokens=row_tokens,
            progress=progress,
            gold=gold,
            # Recording a graph takes as long as a few passes without it.
            graphs=self._kept_graphs(row_tokens) if len(prompts) > self.batch_size else None,
        )

    def _row_tokens(self, longest: int) -> int | None:
        args = self.batch_args
        row_tokens = trie.row_tokens(
            args.batching, args.max_row_tokens, self.model.config, longest, self.encoder.instruction_tokens
        )
        if row_tokens is None:
            self.batch_args = replace(args, batching="padded")  # so that the reason is logged once
        return row_tokens

    def _kept_graphs(self, row_tokens: int | None) -> graph.ScoringGraphs | None:
        if row_tokens is None or self.batch_args.cuda_graph == "false":
            return None
        if self._graphs is None or self._graphs[0] != row_tokens:
            self._graphs = row_tokens, scoring_graphs(self.model, self.batch_size, row_tokens)
        return self._graphs[1]


def pack_scoring(prompts: list[list[int]], answers: Answers, max_row_tokens: int) -> dict[str, torch.Tensor]:
    """The tensors of `trie.pack_scoring`, with longer rows for long pairs."""
    longest = max(map(len, prompts)) + max(map(len, answers))
    batch = trie.pack_scoring(prompts, answers, trie.fit_row(max_row_tokens, longest))
    return {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}


@torch.no_grad()  # not inference mode: FSDP2 and ZeRO-3 keep tensors created here and train with them
def score_packed(model: PreTrainedModel, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """As `score_padded`, in one pass over a trie of prompts and answers; the result stays on the device."""
    with trie.exact_logits(model, batch["predict"]):
        logits = model(**trie.model_inputs(model, batch), use_cache=False).logits[0]
    return trie.answer_log_probs(logits, batch["answer_nodes"], batch["answer_ids"])


@torch.no_grad()
def score_padded(
    model: PreTrainedModel, prompts: list[list[int]], answers: Answers, pad_token_id: int
) -> torch.Tensor:
    """Log-probability of every token of every answer after every prompt, by padded forward passes.

    The last token of an answer is predicted but never fed, so answers of one token need a single pass per prompt.

    Returns:
        (prompts, labels, longest answer) float32 on the CPU, 0 after the end of an answer.
    """
    fed = [answer[:-1] for answer in answers]
    # If an answer's fed tokens are a prefix of another's, its scores are read from the other's row.
    paths = [path for i, path in enumerate(fed) if not any(_begins(path, other, i, j) for j, other in enumerate(fed))]
    rows = [[*prompt, *path] for prompt in prompts for path in paths]
    input_ids, attention_mask = pad_left(rows, pad_token_id)
    width = input_ids.shape[1]
    flat, targets, where = [], [], []
    for index in range(len(prompts)):
        for label, answer in enumerate(answers):
            path = next(i for i, path in enumerate(paths) if path[: len(answer) - 1] == answer[:-1])
            row = index * len(paths) + path
            for step, token in enumerate(answer):
                flat.append(row * width + width - 1 - len(paths[path]) + step)
                targets.append(token)
                where.append((index, label, step))
    with trie.exact_logits(model, torch.tensor(flat, device=model.device)):
        logits = model(
            input_ids=input_ids.to(model.device),
            attention_mask=attention_mask.to(model.device),
            position_ids=(attention_mask.cumsum(dim=1) - 1).clamp(min=0).to(model.device),
            use_cache=False,
        ).logits[0]
    log_probs = torch.zeros(len(prompts), len(answers), max(map(len, answers)))
    log_probs[tuple(torch.tensor(where).T)] = token_log_probs(
        logits, torch.tensor(targets, device=logits.device)
    ).cpu()
    return log_probs


def _begins(path: list[int], other: list[int], i: int, j: int) -> bool:
    """Whether `other` covers `path`: it starts with it, or equals it and comes first."""
    return i != j and other[: len(path)] == path and (len(path) < len(other) or j < i)


def gather_scores(own: LabelScores, total: int, process_index: int, num_processes: int) -> LabelScores:
    """Join the scores of all processes, each of which scored every `num_processes`-th pair."""
    if num_processes == 1:
        return own
    gathered = gather_object([(process_index, own)])
    whole = LabelScores(*(torch.empty(total, *part.shape[1:], dtype=part.dtype) for part in vars(own).values()))
    for index, part in gathered:
        for name, values in vars(part).items():
            getattr(whole, name)[index::num_processes] = values
    return whole


def token_log_probs(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Log-probability in float32 of one token per row: (n, vocabulary), (n,) -> (n,)."""
    logits = logits.float()
    return logits.gather(1, tokens[:, None]).squeeze(1) - logits.logsumexp(dim=1)


@torch.no_grad()
def generate_unconstrained(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], max_new_tokens: int
) -> list[list[int]]:
    """Greedy generation without constraints: the generated token ids of each prompt."""
    pad = pad_token_id(tokenizer)
    input_ids, attention_mask = pad_left(prompts, pad)
    output = model.generate(  # pyright: ignore[reportCallIssue] (torch's stubs take it for a tensor)
        input_ids=input_ids.to(model.device),
        attention_mask=attention_mask.to(model.device),
        max_new_tokens=max_new_tokens,
        pad_token_id=pad,
        **GREEDY,
    )
    return output[:, input_ids.shape[1] :].tolist()


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of the padding token, which every tokenizer of `load_tokenizer` has."""
    assert isinstance(tokenizer.pad_token_id, int)
    return tokenizer.pad_token_id


def named_label(text: str, label_words: tuple[str, ...]) -> int | None:
    """The label whose word is in the first line of `text`; `None` for no label, or several."""
    first_line = text.strip().partition("\n")[0]
    named = [
        label
        for label, word in enumerate(label_words)
        if re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", first_line, re.IGNORECASE)
    ]
    return named[0] if len(named) == 1 else None


def pad_left(rows: list[list[int]], pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, attention mask), both (rows, longest); always on the left, to align answers."""
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), pad_token_id)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, longest - len(row) :] = torch.tensor(row)
        mask[index, longest - len(row) :] = 1
    return ids, mask
