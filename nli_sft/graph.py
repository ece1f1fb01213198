"""The training step as CUDA graphs: recorded once for each shape of a pass, then replayed by a single call.

A step of a small model consists of thousands of kernels that run for a few microseconds each. Launching them from
Python takes longer than running them, so the device waits. A CUDA graph records the launches, and replaying it is one
launch (https://pytorch.org/blog/accelerating-pytorch-with-cuda-graphs/). Two kinds are recorded here:

    a pass        forward and backward of some rows of a trie; adds to the gradients. One graph for each shape.
    the update    clipping, the optimizer's step, and zeroing the gradients. One graph.

A step is one or more passes and an update, so gradient accumulation and micro-batches need nothing more. A graph reads
and writes fixed addresses: rows are padded to one of a few shapes and copied to the graph's inputs, and values that
change from step to step (learning rate, number of labelled tokens) are tensors. The first passes of a shape and the
first update run without a graph: they compile, choose kernels and make the optimizer's state. The next is recorded.
All graphs share one memory pool, since they never run at the same time.
"""

import logging
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor

from .trie import IGNORE_INDEX

# A shape of a pass: rows, their length, and the labelled nodes among them.
Shape = tuple[int, int, int]


logger = logging.getLogger(__name__)

Item = TypeVar("Item")

_END = object()  # follows the last item of `prefetch`

PASS_TENSORS = ("input_ids", "position_ids", "exit", "predict", "shift_labels", "shift_weights")


def round_up(count: int) -> int:
    """Round up to one of few numbers: all up to 8, then eight steps between one power of two and the next."""
    step = 1 << max(0, (count - 1).bit_length() - 4)
    return -(-count // step) * step


def pass_shape(part: Mapping[str, Tensor], usual: tuple[int, int]) -> Shape:
    """The shape to which a pass is padded.

    Args:
        part: `input_ids` of (rows, length) and `predict` of (P,).
        usual: the rows of most passes, to which somewhat smaller ones are padded too, and their length. Longer rows
            are padded to a multiple of 128 of their own.
    """
    rows, length = part["input_ids"].shape
    usual_rows, usual_length = usual
    rows = usual_rows if usual_rows * 5 <= rows * 8 <= usual_rows * 8 else round_up(rows)
    labelled = 1 << (len(part["predict"]) - 1).bit_length()
    if len(part["predict"]) <= labelled * 3 // 4:
        labelled = labelled * 3 // 4
    return rows, usual_length if length <= usual_length else -(-length // 128) * 128, max(64, labelled)


def pad_pass(part: Mapping[str, Tensor], shape: Shape) -> dict[str, Tensor]:
    """Pad a pass with nodes that see only themselves and labelled nodes that carry no label.

    Args:
        part: `input_ids`, `position_ids` and `exit` of (rows, length), `predict` of (P,), and `shift_labels` and
            `shift_weights` of (1, P), as `batches.TrieCollator` makes them.
        shape: at least as large in every dimension.

    Returns:
        The same tensors in that shape, on the device of `part`. The loss and its gradients are those of `part`.
    """
    rows, length, labelled = shape
    own_rows, own_length = part["input_ids"].shape
    if (own_rows, own_length, len(part["predict"])) == shape:
        return {name: part[name] for name in PASS_TENSORS}
    padded = {
        "input_ids": torch.zeros(rows, length, dtype=torch.int64),
        "position_ids": torch.zeros(rows, length, dtype=torch.int64),
        "exit": torch.arange(1, length + 1).repeat(rows, 1),
    }
    for name, values in padded.items():
        values[:own_rows, :own_length] = part[name]
    predict = torch.zeros(labelled, dtype=torch.int64)
    own = part["predict"]
    predict[: len(own)] = own // own_length * length + own % own_length
    labels = torch.full((1, labelled), IGNORE_INDEX)
    labels[:, : len(own)] = part["shift_labels"]
    weights = torch.zeros(1, labelled)
    weights[:, : len(own)] = part["shift_weights"]
    return {**padded, "predict": predict, "shift_labels": labels, "shift_weights": weights}


def record(function: Callable[[], None], pool: Any) -> Callable[[], None]:
    """Record what a function launches on the current CUDA device, and return the call that replays it.

    Args:
        function: reads and writes tensors that outlive the graph, and never waits for the device.
        pool: from `torch.cuda.graph_pool_handle()`.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        function()
    return graph.replay


class CaptureError(Exception):
    """Raised for a step that cannot be recorded; the message says why."""


class StepGraphs:
    """Runs the passes and updates of a training, by graph once recorded.

    Args:
        loss_and_figures: from the tensors of a pass and the number of labelled tokens in the step, a loss to be
            differentiated and a 1-D tensor of figures to be summed over passes. It must not wait for the device.
        figures: a float64 tensor to which those figures are added.
        parameters: those to be trained.
        optimizer: its `step` is replaced until `close`, and also clips and zeroes the gradients. It is recorded if it
            is fused (`torch.optim.AdamW(fused=True)`), and otherwise called as it is.
        max_grad_norm: gradients are clipped to this norm; not at all by 0 or less.
        compiled: whether parts of the model are compiled. Many shapes occur only once, such as that of an epoch's last
            batch, so the first pass of a shape runs uncompiled.

    Attributes:
        loss: (), the sum of the losses of the passes since `start_batch`.
        grad_norm: (), the norm of the last update's gradients before clipping.
        first_bad_update: (), the number of the first update whose loss or gradient was not finite, from 0; -1 if
            there was none. Neither it nor any after it has changed a parameter.
    """

    def __init__(
        self,
        loss_and_figures: Callable[[Mapping[str, Tensor], Tensor], tuple[Tensor, Tensor]],
        figures: Tensor,
        parameters: list[torch.nn.Parameter],
        optimizer: torch.optim.Optimizer,
        max_grad_norm: float,
        compiled: bool = False,
    ):
        self.loss_and_figures = loss_and_figures
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self.gradients = [torch.zeros_like(parameter) for parameter in self.parameters]
        self.optimizer: Any = optimizer  # gets attributes of its own below
        self.max_grad_norm = max_grad_norm
        self._compiled = compiled
        self._seen: dict[Shape, int] = {}
        device = self.parameters[0].device
        self.pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self.loss = torch.zeros((), device=device)
        self.figures = figures
        self.labelled = torch.ones((), device=device)
        self.grad_norm = torch.zeros((), device=device)
        self.first_bad_update = torch.full((), -1, dtype=torch.int64, device=device)
        self._updates = torch.zeros((), dtype=torch.int64, device=device)
        self._skip = torch.zeros((), device=device)
        self._rates = [torch.zeros((), device=device) for _ in optimizer.param_groups]
        self._inputs: dict[Shape, dict[str, Tensor]] = {}
        self._passes: dict[Shape, Callable[[], None]] = {}
        self._recorded_update: Callable[[], None] | None = None
        self._step = optimizer.step
        self._fused = self._may_record_update = bool(optimizer.defaults.get("fused"))
        self._updated = False
        if self._fused:
            self.optimizer.found_inf = self._skip  # as GradScaler makes a fused optimizer skip a step
        self.optimizer.step = self.update

    def start_batch(self, labelled: int | Tensor) -> None:
        """Begin a batch, of which a step has one or, with gradient accumulation, several: set `loss` to 0.

        Args:
            labelled: the number of labelled tokens in the step, on the CPU.
        """
        self.loss.zero_()
        self.labelled.fill_(max(1.0, float(labelled)))

    def run_pass(self, part: Mapping[str, Tensor], shape: Shape) -> None:
        """Add the gradients, loss and figures of a pass.

        Args:
            part: from `pad_pass`, best in pinned memory.
            shape: the one it was padded to.

        Raises:
            CaptureError: if the pass cannot be recorded. Nothing has been added then.
        """
        inputs = self._inputs.get(shape)
        if inputs is None:
            inputs = {name: torch.empty_like(values, device=self.loss.device) for name, values in part.items()}
        for name, values in part.items():
            inputs[name].copy_(values, non_blocking=True)
        seen = self._seen.setdefault(shape, 0)
        if seen < 1 + self._compiled:
            with torch.compiler.set_stance("force_eager") if self._compiled and seen == 0 else nullcontext():
                self._with_gradients(lambda: self._pass(inputs))
            self._inputs[shape] = inputs
            self._seen[shape] += 1
            return
        if shape not in self._passes:
            self._passes[shape] = self._record(lambda: self._pass(inputs))
        self._passes[shape]()

    def update(self, closure: None = None) -> None:
        """Clip the gradients, change the parameters, and zero the gradients. Stands in for the optimizer's `step`."""
        if not (self._may_record_update and self._updated):
            self._with_gradients(self._update)
            self._updated = True
            return
        groups = self.optimizer.param_groups
        for rate, group in zip(self._rates, groups, strict=True):
            rate.fill_(group["lr"])
        if self._recorded_update is None:
            before = [(group["lr"], group["capturable"]) for group in groups]
            for rate, group in zip(self._rates, groups, strict=True):
                group.update(lr=rate, capturable=True)  # read by the graph, whatever the scheduler sets later
            try:
                self._recorded_update = self._record(self._update)
            except CaptureError as error:
                logger.warning("The optimizer runs without a CUDA graph: it cannot be recorded (%s)", error)
                self._may_record_update = False
                self._recorded_update = lambda: self._with_gradients(self._update)
            finally:
                for group, (lr, capturable) in zip(groups, before, strict=True):
                    group.update(lr=lr, capturable=capturable)
        self._recorded_update()

    def first_bad_step(self, steps_done: int) -> int | None:
        """The number of the first step whose loss or gradient was not finite, or `None`. Waits for the device.

        Args:
            steps_done: the number of the last step, from 1.
        """
        bad, updates = int(self.first_bad_update), int(self._updates)
        return None if bad < 0 else steps_done - updates + bad + 1

    def forget(self) -> None:
        """Drop the graphs with their memory, and the gradients of a step that is to be done again."""
        self._inputs.clear()
        self._seen.clear()
        self._passes.clear()
        self._recorded_update = None
        torch._foreach_zero_(self.gradients)
        self.loss.zero_()

    def close(self) -> None:
        """Drop the graphs and give the optimizer its own `step` back."""
        self.forget()
        self.optimizer.step = self._step
        if self._fused:
            del self.optimizer.found_inf

    def _pass(self, inputs: Mapping[str, Tensor]) -> None:
        loss, figures = self.loss_and_figures(inputs, self.labelled)
        loss.backward()
        self.loss += loss.detach()
        self.figures += figures

    @torch.no_grad()
    def _update(self) -> None:
        norm = torch.nn.utils.get_total_norm(self.gradients, foreach=True)
        self.grad_norm.copy_(norm)
        if self.max_grad_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.max_grad_norm, norm, foreach=True)
        bad = ~(norm.isfinite() & self.loss.isfinite()) & (self.first_bad_update < 0)
        self.first_bad_update.copy_(torch.where(bad, self._updates, self.first_bad_update))
        self._skip.copy_(self.first_bad_update >= 0)
        self._updates += 1
        if not self._fused and self._skip.item():
            return
        self._step()
        torch._foreach_zero_(self.gradients)

    def _with_gradients(self, function: Callable[[], None]) -> None:
        # Elsewhere parameters have no gradient, for the Trainer to find nothing to clip or to zero.
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient
        try:
            function()
        finally:
            for parameter in self.parameters:
                parameter.grad = None

    def _record(self, function: Callable[[], None]) -> Callable[[], None]:
        try:
            return record(lambda: self._with_gradients(function), self.pool)
        except RuntimeError as error:
            if should_reduce_batch_size(error):
                raise
            raise CaptureError(str(error).strip().splitlines()[0]) from error


class ScoringGraphs:
    """Runs the passes of `trie.pack_scoring`, by graph once their shape is recorded.

    The parameters may change between calls; the way the model runs (its adapter on or off, its precision) must not.

    Args:
        score: from the tensors of a pass, log-probabilities of (pairs, labels, longest answer).
        pairs: every pass is padded to this number of pairs.
        row_length: of most rows.
        compiled: whether to run compiled parts of the model as such. The first pass of a shape runs uncompiled, as in
            `StepGraphs`.
    """

    def __init__(
        self, score: Callable[[Mapping[str, Tensor]], Tensor], pairs: int, row_length: int, compiled: bool = False
    ):
        self.score = score
        self.pairs = pairs
        self.usual = (1, row_length)
        self.pool = torch.cuda.graph_pool_handle()
        self._compiled = compiled
        self._seen: dict[Shape, int] = {}
        self._inputs: dict[Shape, dict[str, Tensor]] = {}
        self._passes: dict[Shape, tuple[Callable[[], None], Tensor]] = {}
        self._gave_up = False

    def pad(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Pad the tensors of `trie.pack_scoring` to one of a few shapes."""
        labels = torch.full((1, len(batch["predict"])), IGNORE_INDEX)
        part = {**batch, "shift_labels": labels, "shift_weights": torch.zeros(labels.shape)}
        padded = pad_pass(part, pass_shape(part, self.usual))
        nodes = batch["answer_nodes"]
        padded["answer_nodes"] = torch.cat([nodes, nodes.new_zeros(self.pairs - len(nodes), *nodes.shape[1:])])
        padded["answer_ids"] = batch["answer_ids"]
        return padded

    def __call__(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Score a batch from `pad`: (`pairs`, labels, longest answer), a new tensor on the device."""
        shape = pass_shape(batch, self.usual)
        if shape not in self._inputs:
            self._inputs[shape] = {name: torch.empty_like(values, device="cuda") for name, values in batch.items()}
        inputs = self._inputs[shape]
        for name, values in batch.items():
            inputs[name].copy_(values, non_blocking=True)
        seen = self._seen[shape] = self._seen.get(shape, 0) + 1
        with nullcontext() if self._compiled and seen > 1 else torch.compiler.set_stance("force_eager"):
            if seen <= 1 + self._compiled or self._gave_up:
                return self.score(inputs)
            if shape not in self._passes and not self._record(shape, inputs):
                return self.score(inputs)
        replay, scores = self._passes[shape]
        replay()
        return scores.clone()

    def _record(self, shape: Shape, inputs: dict[str, Tensor]) -> bool:
        results: list[Tensor] = []
        # A cast cached before would keep the current weights, and one cached here has no content until a replay.
        torch.clear_autocast_cache()
        try:
            replay = record(lambda: results.append(self.score(inputs)), self.pool)
        except RuntimeError as error:
            if should_reduce_batch_size(error):
                raise
            logger.warning("Scoring without CUDA graphs: a pass cannot be recorded (%s)", str(error).splitlines()[0])
            self._gave_up = True
            return False
        finally:
            torch.clear_autocast_cache()
        self._passes[shape] = replay, results[0]
        return True


def label_loss(
    logits: Tensor, labels: Tensor, labelled: Tensor | float, loss_type: str = "nll", weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The loss of TRL's `SFTTrainer` on the logits of labelled nodes, without waiting for the device.

    Args:
        logits: (P, vocabulary).
        labels: (P,), -100 where there is none.
        labelled: the number of labelled tokens in the step, by which the sum is divided.
        loss_type: `nll`, or `dft` (https://arxiv.org/abs/2508.05629), as in `SFTConfig`.
        weights: (P,), by which each label's loss is multiplied (`batches.class_weights`).

    Returns:
        The loss, and (3,) float64 sums over the labelled nodes: entropy in nats, how often the label has the largest
        logit, and how many there are.
    """
    known = labels != IGNORE_INDEX
    log_probs = logits.float().log_softmax(-1)
    chosen = log_probs.gather(1, labels.clamp(min=0)[:, None]).squeeze(1).masked_fill(~known, 0.0)
    weighted = chosen * chosen.detach().exp() if loss_type == "dft" else chosen
    if weights is not None:
        weighted = weighted * weights
    with torch.no_grad():
        entropy = torch.special.entr(log_probs.exp()).sum(-1)
        right = log_probs.argmax(-1) == labels
        figures = torch.stack(
            [entropy.masked_fill(~known, 0.0).sum().double(), right.sum().double(), known.sum().double()]
        )
    return -weighted.sum() / labelled, figures


def prefetch(items: Iterable[Item], ahead: int = 4) -> Iterator[Item]:
    """Iterate over `items`, which a thread makes up to `ahead` in advance.

    An error in the thread is raised in place of its item. A consumer that stops early ends the thread.
    """
    ready: queue.Queue = queue.Queue(maxsize=ahead)
    stopped = threading.Event()

    def put(item: object) -> None:
        while not stopped.is_set():
            try:
                ready.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def produce() -> None:
        try:
            for item in items:
                put((item, None))
                if stopped.is_set():
                    return
            put((_END, None))
        except BaseException as error:
            put((_END, error))

    thread = threading.Thread(target=produce, daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            if item is _END:
                return
            yield item
    finally:
        stopped.set()
        thread.join()
