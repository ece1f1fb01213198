"""`NLITrainer`: TRL's `SFTTrainer` on token tries, and with the number that its users want, label accuracy."""

import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import PreTrainedModel
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTConfig, SFTTrainer

from . import metrics, trie
from .configs import BatchConfig
from .decoding import gather_scores, score_prompts
from .prompts import PromptEncoder


class NLITrainer(SFTTrainer):
    """Trains on rows of `PromptEncoder.encode_rows` and evaluates by constrained scoring.

    A batch of pairs is packed into the rows of a trie by the data loader's workers (`trie.py`). Batches, steps and the
    loss are those of padded batches; only what is computed twice there is computed once.

    Every evaluation reports `eval_loss` (mean negative log-likelihood of a gold answer's token, as in training) and
    `eval_accuracy` (the share of pairs whose gold label constrained generation would say), both from one forward pass
    a pair. TRL's `eval_mean_token_accuracy` would not do: it counts tokens, most of which are certain once the first
    one is known. `compute_metrics` would not do either: TRL is giving it up, and it holds the logits of every token.

    Args:
        encoder: the encoder that made the rows.
        batch_args: whether to pack tries, and how long their rows may be.
        **kwargs: as for `SFTTrainer`.
    """

    def __init__(
        self,
        *,
        model: PreTrainedModel,
        args: SFTConfig,
        encoder: PromptEncoder,
        batch_args: BatchConfig,
        train_dataset: Dataset,
        **kwargs,
    ):
        self.encoder = encoder
        longest = max(map(len, train_dataset["input_ids"]))
        self.max_row_tokens = trie.row_tokens(batch_args.batching, batch_args.max_row_tokens, model.config, longest)
        if self.max_row_tokens is not None:
            kwargs["data_collator"] = TrieCollator(encoder.answers, self.max_row_tokens)
        # The rows are ready, and TRL's preparation would cut those longer than max_length, label and all.
        args.dataset_kwargs = {"skip_prepare_dataset": True}
        super().__init__(
            model=model, args=args, train_dataset=train_dataset, processing_class=encoder.tokenizer, **kwargs
        )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """TRL's loss, on a trie where the batch is one."""
        if "exit" not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        tokens_before = self._total_train_tokens
        tokens = self.accelerator.gather(inputs["tokens"]).sum().item()
        labels = inputs["shift_labels"].flatten()[inputs["predict"]][None]
        with trie.hidden_states_at(self.model, inputs["predict"]):
            inputs = trie.model_inputs(self.model, inputs) | {"shift_labels": labels}
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        # TRL has counted tokens from a mask of another shape. The logs count what separate sequences would feed.
        self._total_train_tokens = tokens_before + tokens
        self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        return loss

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Score the whole data set of `dataloader`, each process its share; its batches are not used."""
        prompts, gold = split_rows(dataloader.dataset, self.encoder.answers)
        shares = self.accelerator
        self.model.eval()
        with self.compute_loss_context_manager(), shares.autocast():
            own = score_prompts(
                self.model,
                prompts[shares.process_index :: shares.num_processes],
                self.encoder.answers,
                self.processing_class.pad_token_id,
                batch_size=self.args.per_device_eval_batch_size,
                max_row_tokens=self.max_row_tokens,
                progress=None if self.args.disable_tqdm or not shares.is_local_main_process else description,
            )
        scores = gather_scores(own, len(prompts), shares.process_index, shares.num_processes)
        gold = torch.tensor(gold)
        gold_tokens = sum(len(self.encoder.answers[label]) for label in gold.tolist())
        figures = metrics.compute(gold.numpy(), scores.choice.numpy(), scores.log_probs.exp().numpy())
        values = {
            "loss": -scores.joint[torch.arange(len(gold)), gold].sum().item() / gold_tokens,
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
        """Tokens that separate sequences would have fed so far, on all processes."""
        return int(self._total_train_tokens)

    def create_model_card(self, *args, **kwargs) -> None:
        """Not TRL's card, which says nothing of what was measured."""


class TrieCollator:
    """Packs a batch of rows into a trie. Runs in the loader's workers.

    Returns:
        A dict of tensors: `input_ids`, `position_ids`, `exit` and `shift_labels` of `trie.pack_training`; `predict`,
        the nodes that have a label, as indices into the flattened (rows * length); `labels`, the same as
        `shift_labels`, from which the Trainer counts the items of a batch; and `tokens`, (1,), what separate sequences
        would have fed.
    """

    def __init__(self, answers: list[list[int]], max_row_tokens: int):
        self.answers = answers
        self.max_row_tokens = max_row_tokens

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        prompts, gold = split_rows(rows, self.answers)
        batch = trie.pack_training(prompts, [self.answers[label] for label in gold], self.max_row_tokens)
        tensors = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
        return tensors | {
            "predict": (batch["shift_labels"].flatten() != trie.IGNORE_INDEX).nonzero().flatten(),
            "labels": batch["shift_labels"],
            "tokens": torch.tensor([batch["sequence_tokens"]]),
        }


def split_rows(rows: Dataset | list[dict], answers: list[list[int]]) -> tuple[list[list[int]], list[int]]:
    """Take rows of `encode_rows` apart again: (token ids of the prompts, gold label ids)."""
    label_of = {tuple(answer): label for label, answer in enumerate(answers)}
    prompts, gold = [], []
    for row in rows:
        answer = tuple(token for token in row["labels"] if token != -100)
        prompts.append(row["input_ids"][: -len(answer)])
        gold.append(label_of[answer])
    return prompts, gold
