"""`NLITrainer`: TRL's `SFTTrainer` on token tries, with label accuracy as a metric."""

import copy
import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from accelerate import DistributedType
from accelerate.utils import DynamoBackend, gather_object
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from datasets import Dataset
from torch.utils.data import BatchSampler, DataLoader
from transformers import PreTrainedModel, ProgressCallback
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTConfig

from .. import UserError, graph, trie
from ..configs import AUTO, BatchConfig
from ..configs.keys import field_values, refuse_keys
from ..data.prompts import PromptEncoder, row_lengths
from ..evaluation import metrics
from ..evaluation.scoring import LabelScores, Scorer, gather_scores
from ..models.bases import batching_beside_router
from .batches import (
    EpochLoader,
    GroupShuffleSampler,
    ShardedBatchSampler,
    TokenRows,
    TrieCollator,
    row_weights,
    split_micro_batch,
    without_labels,
)
from .checkpoints import ResumableTrainer, ignore_sigterm
from .progress import TrainingBar

logger = logging.getLogger(__name__)


class NLITrainer(ResumableTrainer):
    """Trains on rows of `PromptEncoder.encode_rows` and evaluates by constrained scoring.

    The data loader's workers pack each batch into the rows of a trie (`trie.py`), which computes shared prefixes once.
    Batches, steps and the loss are those of padded batches. A batch of more than `max_batch_tokens` tokens is split
    into micro-batches with the same gradient, so that memory does not grow with it.

    Every evaluation reports `eval_loss` (mean negative log-likelihood of the gold answers' tokens, as in training) and
    `eval_accuracy` (the share of pairs for which constrained generation gives the gold label), both from one forward
    pass a pair. TRL's `eval_mean_token_accuracy` counts tokens, most of which are certain once the first is known, and
    `compute_metrics`, which TRL deprecates, keeps the logits of every token.

    Args:
        encoder: the encoder that made the rows.
        batch_args: whether to pack tries, how long their rows may be, and how pairs are grouped into batches.
        class_weights: the weight of each label in the loss, from `batches.class_weights`.
        **kwargs: as for `SFTTrainer`.
    """

    # SFTTrainer declares unions of everything that a Trainer may have.
    model: Any
    args: SFTConfig
    data_collator: Any
    train_dataset: Any
    optimizer: Any

    def __init__(
        self,
        *,
        model: PreTrainedModel,
        args: SFTConfig,
        encoder: PromptEncoder,
        batch_args: BatchConfig,
        train_dataset: Dataset,
        class_weights: Sequence[float] | None = None,
        **kwargs,
    ):
        refuse_keys(*field_values((args, batch_args)))
        if args.device.type == "cpu" and model.config._attn_implementation == "flex_attention":
            raise UserError("attn_implementation: flex_attention cannot be trained on a CPU; use sdpa")
        if batch_args.max_batch_tokens == AUTO:
            raise UserError(f"max_batch_tokens: {AUTO} must be resolved first; set what memory.plan_memory chose")
        self.encoder = encoder
        lengths = row_lengths(train_dataset)
        longest, self._mean_length = int(lengths.max()), float(lengths.mean())
        batching = batching_beside_router(batch_args.batching, args, model.config)
        self.max_row_tokens = trie.row_tokens(
            batching, batch_args.max_row_tokens, model.config, longest, encoder.instruction_tokens
        )
        if self.max_row_tokens is not None:
            most_tokens = int(batch_args.max_batch_tokens)
            kwargs["data_collator"] = TrieCollator(encoder.answers, self.max_row_tokens, most_tokens, class_weights)
        self.class_weights = class_weights
        self.group_by_premise = batch_args.group_by_premise
        self.most_tokens: int | None = None  # of a pass, after a larger one ran out of memory
        self._step_ended = True
        self._graphs: graph.StepGraphs | None = None
        self._scorer: Scorer | None = None
        # The rows are ready. TRL's preparation would truncate those longer than max_length, and so cut their labels.
        args.dataset_kwargs = {"skip_prepare_dataset": True}
        # The encoder's tokenizer already has its template and end-of-sequence token. TRL would set the template again,
        # without the fixed date, or resize the model for it; but it must pass the token to the model.
        if args.chat_template_path is not None:
            args = copy.copy(args)
            args.chat_template_path, args.eos_token = None, str(encoder.tokenizer.eos_token)
        if args.ddp_find_unused_parameters is None:
            # Only experts can lack a gradient in a step, and to look for others, DDP walks the graph in every pass.
            args.ddp_find_unused_parameters = any("expert" in name for name, _ in model.named_parameters())
        super().__init__(
            model=model, args=args, train_dataset=train_dataset, processing_class=encoder.tokenizer, **kwargs
        )
        if class_weights is not None and self.max_row_tokens is None and self.aux_loss_enabled:
            raise UserError(
                "class_weights would leave the router's loss out; set router_aux_loss_coef: 0 to do without"
            )
        if args.tf32 is False:  # accelerate turns it on for torch_compile in fp32, whatever is asked for
            torch.backends.cuda.matmul.allow_tf32 = False
        self.has_own_loss = self.max_row_tokens is not None or class_weights is not None
        if self.has_own_loss:
            self.model_accepts_loss_kwargs = True  # `compute_loss` divides by the labelled tokens of the whole step
        # Sums over the labelled tokens since the last log: see `graph.label_loss`.
        self._figures = torch.zeros(3, dtype=torch.float64, device=args.device)
        self._tokens = 0  # of this process since then, as separate sequences
        self.cuda_graph = batch_args.cuda_graph
        self._use_graphs = self._choose_graphs(batch_args.cuda_graph)
        self._scoring_args = replace(
            batch_args,
            batching="padded" if self.max_row_tokens is None else "trie",
            cuda_graph=AUTO if self._use_graphs else "false",
        )
        if not args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(TrainingBar)
        if args.torch_compile and self.max_row_tokens is not None:
            # Layer by layer, instead of as a whole by the Trainer: a compiled model ignores the hooks of a trie, and
            # equal layers are compiled once. Tries have many shapes, hence `dynamic`, unless graphs pad them to few.
            plugin: Any = self.accelerator.state.dynamo_plugin
            plugin.backend = DynamoBackend.NO
            for layer in self.model.modules():
                if isinstance(layer, GradientCheckpointingLayer):
                    layer.compile(
                        dynamic=not self._use_graphs,
                        backend=args.torch_compile_backend,
                        mode=args.torch_compile_mode,
                    )
        if not args.bf16 and not self.is_deepspeed_enabled:
            # TRL casts the adapter on a quantised base to bf16, whatever the precision. Loss scaling cannot unscale
            # 16-bit gradients, and fp32 should stay exact.
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()

    def _choose_graphs(self, wanted: str) -> bool:
        """Whether to run the step by CUDA graph; logs why not on a GPU.

        Raises:
            UserError: if the recipe requires it and it is not possible.
        """
        if wanted == "false":
            return False
        reason = self._why_no_graphs()
        if reason is None:
            self.data_collator.usual = self._usual_shape()
            self.args.logging_nan_inf_filter = False  # it waits for the device at every step
            self._checkpoint_without_random_state()
        elif wanted == "true":
            raise UserError(f"cuda_graph: true is not possible: {reason}")
        elif self.args.device.type == "cuda":
            logger.warning("Training without CUDA graphs: %s", reason)
        return reason is None

    def _why_no_graphs(self) -> str | None:
        args = self.args
        if args.device.type != "cuda":
            return f"the device is {args.device.type}, not a CUDA GPU"
        if self.max_row_tokens is None:
            return "batches are padded; they need batching: trie"
        if args.world_size > 1 or self.accelerator.distributed_type != DistributedType.NO:
            return "several processes exchange gradients in the middle of a step"
        if args.fp16:
            return "the loss scaling of fp16 decides on the CPU whether to skip a step"
        if args.gradient_checkpointing and self._has_dropout():
            return (
                "gradient checkpointing has to restore the state of random numbers for dropout; set lora_dropout: 0 "
                "or gradient_checkpointing: false"
            )
        if args.activation_offloading:
            return "activation_offloading waits for copies within a step"
        return None

    def _usual_shape(self) -> tuple[int, int]:
        """The rows of most passes and their length, the same in a resumed training: see `graph.pass_shape`."""
        assert self.max_row_tokens is not None
        rows = TokenRows(self.train_dataset, self.encoder.answers)
        batches = BatchSampler(self._get_train_sampler(), self.args.train_batch_size, drop_last=False)
        micro_batches = [
            micro_batch
            for batch in islice(batches, 32)
            for micro_batch in self.data_collator([rows[index] for index in batch])["micro_batches"]
        ]
        return max(len(micro_batch["input_ids"]) for micro_batch in micro_batches), self.max_row_tokens

    def _has_dropout(self) -> bool:
        modules = any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in self.model.modules())
        return modules or (getattr(self.model.config, "attention_dropout", 0.0) or 0.0) > 0

    def _checkpoint_without_random_state(self) -> None:
        # Without dropout nothing is random, and reading the random state cannot be recorded.
        for name in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):
            if self.args.gradient_checkpointing and hasattr(self.args, name):
                setattr(
                    self.args,
                    name,
                    (getattr(self.args, name) or {"use_reentrant": False}) | {"preserve_rng_state": False},
                )

    def train(self, *args, **kwargs):
        try:
            return super().train(*args, **kwargs)
        finally:
            self._close_graphs()

    def _close_graphs(self) -> None:
        self._scorer = None
        if self._graphs is not None:
            self._graphs.close()
            self._graphs = None
            del self.model.zero_grad

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        # The number of labelled tokens stays on the CPU: copying it would wait for the device.
        device = torch.device("cpu") if self._use_graphs else device
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def get_train_dataloader(self) -> DataLoader:
        """Batches whose pairs are the same for any number of processes; see `ShardedBatchSampler`.

        accelerate distributes whole batches and repeats pairs to even them out, so that the last step of an epoch
        depends on the number of processes.
        """
        if self.args.train_sampling_strategy not in ("random", "sequential"):
            return super().get_train_dataloader()
        args = self.args
        rows: Any = (
            self._remove_unused_columns(self.train_dataset, description="Training")
            if self.max_row_tokens is None
            else TokenRows(self.train_dataset, self.encoder.answers)
        )
        return EpochLoader(
            rows,
            batch_sampler=ShardedBatchSampler(
                self._get_train_sampler(),
                args.train_batch_size * args.world_size,
                args.process_index,
                args.world_size,
                args.dataloader_drop_last,
            ),
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            worker_init_fn=ignore_sigterm,
        )

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.args.train_sampling_strategy != "random":
            return super()._get_train_sampler(train_dataset)
        # Not `train_dataset`, which has lost the column of premises.
        rows = self.train_dataset
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return GroupShuffleSampler(rows["premise"][:] if self.group_by_premise else range(len(rows)), seed)

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Forward and backward. If that runs out of memory, the step is repeated in smaller micro-batches.

        Raises:
            UserError: if a single row does not fit, or other processes wait for this one in every pass.
        """
        if self._step_ended:
            counts = {name: len(kept) for name, kept in self._metrics["train"].items()}
            self._step_inputs = []
            self._before_step = (self._tokens, self._figures.clone(), self._total_train_tokens, counts)
        self._step_inputs.append(inputs)
        self._step_ended = self.accelerator.sync_gradients
        todo = [inputs]
        while True:
            try:
                for batch in todo:
                    loss = self._run_batch(model, batch, num_items_in_batch)
                return loss
            except graph.CaptureError as error:
                self._give_up_graphs(error)
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
                self._use_smaller_micro_batches(error)
            # Not in the except clause, where the traceback keeps the tensors of the failed pass.
            if self._graphs is None:
                model.zero_grad()
            else:
                self._graphs.forget()
                self._scorer = None
            clear_device_cache(garbage_collection=True)
            self._tokens, figures, self._total_train_tokens, counts = self._before_step
            self._figures.copy_(figures)
            for name, kept in self._metrics["train"].items():
                del kept[counts.get(name, 0) :]
            todo = self._step_inputs

    def _run_batch(self, model, inputs, num_items_in_batch):
        if not self._use_graphs:
            return self._pass_micro_batches(model, inputs, num_items_in_batch)
        if self._graphs is None:
            self._graphs = graph.StepGraphs(
                self._loss_of_pass,
                self._figures,
                list(self.model.parameters()),
                getattr(self.optimizer, "optimizer", self.optimizer),
                self.args.max_grad_norm,
                self.args.torch_compile,
            )
            # There are no gradients to zero, and searching for them takes longer than the rest of the step.
            self.model.zero_grad = lambda set_to_none=True: None
            self.model.train()  # an adapter is in training mode from the start, and its base is not
        elif not self.model.training:  # after an evaluation
            self.model.train()
        self._graphs.start_batch(num_items_in_batch)
        for micro_batch in self._micro_batches(inputs):
            self._tokens += micro_batch["tokens"]
            tensors = {name: micro_batch[name] for name in graph.PASS_TENSORS}
            shape = graph.pass_shape(tensors, self.data_collator.usual)
            self._graphs.run_pass(graph.pad_pass(tensors, shape), shape)
        return self._graphs.loss

    def _loss_of_pass(self, micro_batch, labelled):
        # A cached cast would outlive the recording of a graph.
        with self.autocast_smart_context_manager(cache_enabled=False):
            return self._trie_loss(self.model, micro_batch, labelled)

    def _give_up_graphs(self, error: graph.CaptureError) -> None:
        if self.cuda_graph == "true":
            raise UserError(f"cuda_graph: true is not possible: {error}") from error
        logger.warning("Training without CUDA graphs: the step cannot be recorded (%s)", error)
        self._close_graphs()
        self._use_graphs = False

    def _clip_grad_norm(self, model):
        return super()._clip_grad_norm(model) if self._graphs is None else self._graphs.grad_norm

    def _get_grad_norm(self, model, grad_norm=None):
        return super()._get_grad_norm(model, grad_norm) if self._graphs is None else self._graphs.grad_norm

    def first_bad_step(self) -> int | None:
        if self._graphs is None:
            return super().first_bad_step()
        return self._graphs.first_bad_step(self.state.global_step)

    def _use_smaller_micro_batches(self, error: RuntimeError) -> None:
        shapes = [
            micro_batch["input_ids"].shape for batch in self._step_inputs for micro_batch in self._micro_batches(batch)
        ]
        rows, length = max(shapes, key=math.prod)
        if rows == 1 or self.accelerator.distributed_type != DistributedType.NO:
            smaller = "max_row_tokens" if rows == 1 else "max_batch_tokens"
            raise UserError(
                f"out of memory at step {self.state.global_step + 1}, with {rows} x {length} tokens in a pass: resume "
                f"with resume_from_checkpoint: auto and a smaller {smaller} or per_device_train_batch_size"
            ) from error
        self.most_tokens = rows * length // 2
        logger.warning(
            "Out of memory at step %d: repeating it, with at most %d tokens a pass from now on.",
            self.state.global_step + 1,
            self.most_tokens,
        )

    def _micro_batches(self, inputs: dict) -> list[dict]:
        micro_batches = inputs.get("micro_batches", [inputs])
        if self.most_tokens is None:
            return micro_batches
        return [piece for micro_batch in micro_batches for piece in split_micro_batch(micro_batch, self.most_tokens)]

    def _pass_micro_batches(self, model, inputs, num_items_in_batch):
        """Run the micro-batches of a batch, whose losses add up to that of the batch."""
        micro_batches = self._micro_batches(inputs)
        if self.accelerator.num_processes > 1:
            # Sharded models synchronise in every pass, so all processes must have equally many.
            most = max(gather_object([len(micro_batches)]))
            micro_batches = micro_batches + [without_labels(micro_batches[0])] * (most - len(micro_batches))
        loss = 0.0
        for number, micro_batch in enumerate(micro_batches, start=1):
            with nullcontext() if number == len(micro_batches) else self.accelerator.no_sync(model):
                loss += super().training_step(model, micro_batch, num_items_in_batch)
        return loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """TRL's loss, or that of a trie's micro-batch or of a weighted batch."""
        if not self.has_own_loss:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if "exit" in inputs:
            self._tokens += inputs["tokens"]
            loss, figures = self._trie_loss(model, inputs, num_items_in_batch)
        else:
            self._tokens += int(inputs["attention_mask"].sum())
            loss, figures = self._padded_loss(model, inputs, num_items_in_batch)
        self._figures += figures
        if self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # DDP averages the gradients
        return loss

    def _trie_loss(self, model, micro_batch, labelled):
        """See `graph.label_loss`."""
        self._scale_noise(micro_batch["input_ids"].shape[1])
        with trie.exact_logits(self.model, micro_batch["predict"]):
            logits = model(**trie.model_inputs(self.model, micro_batch), use_cache=False).logits[0]
        labels, weights = micro_batch["shift_labels"][0], micro_batch["shift_weights"][0]
        return graph.label_loss(logits, labels, labelled, self.args.loss_type, weights)

    def _padded_loss(self, model, batch, labelled):
        """As `_trie_loss`, of a padded batch with class weights, which TRL's loss does not have."""
        assert self.class_weights is not None  # see `has_own_loss`
        logits = model(**{name: values for name, values in batch.items() if name != "labels"}, use_cache=False).logits
        targets = batch["labels"][:, 1:]
        known = targets != trie.IGNORE_INDEX
        weights = row_weights(batch["labels"], self.encoder.answers, self.class_weights)
        of_tokens = weights[:, None].expand_as(targets)[known]
        return graph.label_loss(logits[:, :-1][known], targets[known], labelled, self.args.loss_type, of_tokens)

    def _scale_noise(self, row_length: int) -> None:
        """Scale NEFTune's noise by the mean length of a pair, where transformers scales it by that of a row."""
        alpha = self.args.neftune_noise_alpha
        if alpha is not None:
            scale = math.sqrt(row_length / self._mean_length)
            self.model.get_input_embeddings().neftune_noise_alpha = alpha * scale

    def _summed_figures(self) -> list[float]:
        """The sums of all processes since the last log: those of `graph.label_loss`, and the tokens."""
        counts = torch.cat([self._figures, self._figures.new_tensor([self._tokens])])
        return self._reduce(counts, "sum").tolist()

    def _collect_figures(self) -> None:
        """Add the figures of tries to TRL's metrics. Every process must take part."""
        if not self.has_own_loss:
            return
        entropy, right, labelled, tokens = self._summed_figures()
        self._figures.zero_()
        self._tokens = 0
        self._total_train_tokens += int(tokens)
        if labelled:
            kept = self._metrics["train"]
            kept["entropy"].append(entropy / labelled)
            kept["mean_token_accuracy"].append(right / labelled)
            kept["num_tokens"] = [self._total_train_tokens]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self._collect_figures()
        super().log(logs, start_time)

    def _progress(self) -> dict[str, Any]:
        return super()._progress() | {"figures": self._summed_figures()}

    def _restore_progress(self, progress: Mapping[str, Any]) -> None:
        super()._restore_progress(progress)
        if self.accelerator.is_main_process:  # the sums are those of all processes
            *figures, tokens = progress["figures"]
            self._figures.copy_(self._figures.new_tensor(figures))
            self._tokens = int(tokens)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Score the data set of `dataloader`, each process its share. The loader's batches are not used."""
        dataset: Any = dataloader.dataset
        rows = TokenRows(dataset, self.encoder.answers)
        prompts: list[Any] = [rows.prompt(index) for index in range(len(rows))]
        gold = rows.gold.tolist()
        shares = self.accelerator
        share = range(shares.process_index, len(prompts), shares.num_processes)
        # Sharded models synchronise in every pass, so all processes must have equally many: a smaller share gets one
        # more prompt, whose scores are dropped again.
        even = share if len(share) * shares.num_processes >= len(prompts) else [*share, 0]
        self.model.eval()
        if self._scorer is None:
            batch_size = self.args.per_device_eval_batch_size
            self._scorer = Scorer(self.model, self.encoder, self._scoring_args, batch_size)
        with self.compute_loss_context_manager(), shares.autocast():
            own = self._scorer(
                [prompts[pair] for pair in even],
                progress=None if self.args.disable_tqdm or not shares.is_local_main_process else description,
                gold=[gold[pair] for pair in even],
            )
        own = LabelScores(*(values[: len(share)] for values in vars(own).values()))
        scores = gather_scores(own, len(prompts), shares.process_index, shares.num_processes)
        step = self.state.global_step
        fix = "resume from an earlier checkpoint with a lower learning_rate" if step else "take another base"
        scores.check_numbers(self.model, f"the evaluation after step {step}", fix)
        gold = torch.tensor(gold)
        gold_tokens = sum(len(self.encoder.answers[label]) for label in gold.tolist())
        labels = self.encoder.prompt.labels
        figures: Any = metrics.compute(
            gold.numpy(), scores.choice.numpy(), scores.log_probs.exp().numpy(), label_names=labels
        )
        values = {
            "loss": -scores.unconstrained[torch.arange(len(gold)), gold].sum().item() / gold_tokens,
            **{name: figures[name] for name in ("accuracy", "macro_f1", "nll", "ece")},
            **{f"f1_{label}": of_label["f1"] for label, of_label in figures["per_label"].items()},
        }
        return EvalLoopOutput(
            predictions=scores.log_probs.numpy(),
            label_ids=gold.numpy(),
            metrics={f"{metric_key_prefix}_{name}": value for name, value in values.items()},
            num_samples=len(prompts),
        )

    @property
    def trained_tokens(self) -> int:
        """Tokens so far, as separate sequences, of all processes."""
        return int(self._total_train_tokens)

    def create_model_card(self, *args, **kwargs) -> None:
        """Write none: TRL's card has no results, and recipes/push.py writes one."""
