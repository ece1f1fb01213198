"""`NLIClassifier`: predict label and probabilities of a premise and a hypothesis with a tuned model.

    classifier = NLIClassifier.from_pretrained("outputs/qwen3-0.6b-lora")  # or the Hub id of a pushed run
    classifier("A man sleeps.", "A person is awake.").label

It uses the prompt, the label words and the scoring of training and evaluation, so its accuracy is the one measured.
"""

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import cast, overload

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from . import UserError
from .configs import BatchConfig, from_recipe
from .data.prompts import PromptEncoder
from .data.sources import check_text
from .evaluation.scoring import Scorer, distinguishing_prefixes
from .models.loading import ModelSource, find_model, is_adapter, load_model
from .models.precision import DTYPES, Precision, choose_precision


@dataclass(frozen=True)
class Prediction:
    """The prediction for one pair.

    Attributes:
        label: the label from constrained greedy generation, one of `Prompt.labels`.
        probabilities: {label: probability}, in the order of `Prompt.labels`; they sum to 1.
    """

    label: str
    probabilities: dict[str, float]


class NLIClassifier:
    """Predicts labels with a model and the prompt it was trained with. Thread-safe.

    Attributes:
        encoder: the prompt, bound to the tokenizer.
        model: the model, on its device.

    Args:
        model: a causal LM, or one with an adapter.
        encoder: the encoder it was trained with.
        batch_args: whether to score on tries, and how long their rows may be.
        batch_size: pairs per forward pass at first; halved automatically if they do not fit in memory.
        precision: of the computation; by default that of the weights.
        temperature: divides the log-probabilities of the labels. It changes no label, only how certain it is.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        encoder: PromptEncoder,
        *,
        batch_args: BatchConfig | None = None,
        batch_size: int = 64,
        precision: Precision | None = None,
        temperature: float = 1.0,
    ):
        if not isinstance(batch_size, int) or batch_size < 1:
            raise UserError(f"batch_size is {batch_size!r}; give a number of pairs, at least 1")
        if not 0 < temperature < float("inf"):
            raise UserError(f"temperature is {temperature}; give a number above 0")
        self.model = model.eval()
        self.precision = precision
        self.temperature = temperature
        self.encoder = encoder
        self.batch_size = batch_size
        # No CUDA graphs: they read the weights of the first call, but a user may change the model.
        self._batch_args = replace(batch_args or BatchConfig(), cuda_graph="false")
        self._scorer = Scorer(
            cast(PreTrainedModel, self.model),  # a PeftModel has the same interface
            encoder,
            self._batch_args,
            batch_size,
            distinguishing_prefixes(encoder.answers),
        )
        # One thread at a time, because scoring hooks into the model and tokenizers have state. The classifier of
        # `before_tuning` shares model and lock.
        self._lock = threading.Lock()
        self._mode: Callable[[], AbstractContextManager] = nullcontext
        self._load_base: Callable[[], PreTrainedModel] | None = None

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        revision: str | None = None,
        adapter: str | Path | None = None,
        prompt: str | None = None,
        label_words: Sequence[str] | None = None,
        labels: Sequence[str] | None = None,
        temperature: float | None = None,
        device: str | torch.device | None = None,
        dtype: str | None = None,
        batch_size: int = 64,
    ) -> "NLIClassifier":
        """Load a run, an exported model, an adapter, or any causal language model, from a folder or from the Hub.

        Only safetensors are read, and code that comes with a model is never run.

        Args:
            name: a folder, or a Hub id such as `me/qwen3-0.6b-snli`. It can be the output of `recipes/sft.py`,
                `recipes/export.py` or `recipes/push.py`, or any model or adapter that transformers or PEFT has saved.
            revision: branch, tag or commit on the Hub.
            adapter: folder or Hub id of an adapter to put on the model.
            prompt: for models that are no run, a built-in prompt such as `plain` or `few_shot`, or a .yaml or .json
                file. By default their prompt.json if they have one, else `plain`.
            label_words, labels: for models that are no run, the words that answer for the labels, and the labels, by
                default SNLI's.
            temperature: as for the class; by default the one that an evaluation of the run has fitted, else 1.
            device: by default an accelerator if there is one.
            dtype: of weights and computation: `float32`, `bfloat16`, `float16` or `auto`. By default as in an
                evaluation on this device (`precision.py`).
            batch_size: as for the class.

        Raises:
            UserError: if there is no such folder or repository, a file is missing, or a run is given a prompt, label
                words or an adapter.
        """
        source = find_model(
            name, revision=revision, adapter=adapter, prompt=prompt, label_words=label_words, labels=labels
        )
        return cls.from_source(source, temperature=temperature, device=device, dtype=dtype, batch_size=batch_size)

    @classmethod
    def from_source(
        cls,
        source: ModelSource,
        *,
        temperature: float | None = None,
        device: str | torch.device | None = None,
        dtype: str | None = None,
        batch_size: int = 64,
    ) -> "NLIClassifier":
        """Load what `find_model` has found. The arguments are those of `from_pretrained`."""
        device = pick_device(device)
        model_args, precision = source.model_args, choose_precision("auto", device)
        if dtype is None:
            model_args = precision.suit(model_args)
        else:
            names = {str(of_name).removeprefix("torch."): name for name, of_name in DTYPES.items()}
            if dtype not in (*names, "auto"):
                raise UserError(f"dtype is {dtype!r}; give one of {', '.join(names)} or auto")
            model_args = replace(model_args, dtype=dtype)
            precision = Precision(names.get(dtype, precision.name), "as requested")
        encoder = source.load_encoder()  # before the weights: it checks that the folder is complete
        classifier = cls(
            source.load_model(model_args, device=device),
            encoder,
            batch_args=from_recipe(BatchConfig, source.recipe),
            batch_size=batch_size,
            precision=precision,
            temperature=source.record.get("temperature", 1.0) if temperature is None else temperature,
        )
        if source.tuned is not None and not is_adapter(source.tuned):
            classifier._load_base = lambda: load_model(model_args, device=device)
        return classifier

    @overload
    def __call__(self, premise: str, hypothesis: str) -> Prediction: ...

    @overload
    def __call__(self, premise: Iterable[str], hypothesis: Iterable[str]) -> list[Prediction]: ...

    def __call__(self, premise: str | Iterable[str], hypothesis: str | Iterable[str]) -> Prediction | list[Prediction]:
        """Predict the label of one pair, or of several.

        Args:
            premise, hypothesis: two texts, or two iterables of texts of equal length, such as lists, generators, or
                columns of a `datasets.Dataset` or a data frame.

        Returns:
            One `Prediction` for two texts, else a list in the same order.

        Raises:
            UserError: if the lengths differ; if a value is not a text, or contains a control token of the tokenizer,
                with which it could dictate its own answer; or if scores are NaN or infinite.
        """
        if isinstance(premise, str) and isinstance(hypothesis, str):
            check_text(premise, "premise")
            check_text(hypothesis, "hypothesis")
            return self._predict([premise], [hypothesis])[0]
        if not all(isinstance(one, Iterable) and not isinstance(one, (str, Mapping)) for one in (premise, hypothesis)):
            raise UserError("premise and hypothesis: give two texts, or two lists of texts")
        premises, hypotheses = list(premise), list(hypothesis)
        if len(premises) != len(hypotheses):
            raise UserError(f"{len(premises):,} premises but {len(hypotheses):,} hypotheses; give equally many")
        for role, texts in (("premise", premises), ("hypothesis", hypotheses)):
            for index, text in enumerate(texts):
                check_text(text, f"{role} {index}")
        return self._predict(premises, hypotheses) if premises else []

    def claims(self, document: str, claims: Iterable[str]) -> list[Prediction]:
        """Predict for each claim whether the document entails it. On tries, the document is computed once.

        Args:
            document: the premise of all claims.
            claims: the hypotheses.

        Returns:
            A `Prediction` for each claim, in the same order.

        Raises:
            UserError: as for a call.
        """
        if isinstance(claims, str):
            raise UserError("claims is one text; give a list of texts")
        claims = list(claims)
        return self([document] * len(claims), claims)

    def before_tuning(self) -> "NLIClassifier":
        """A classifier with the same prompt and the model before tuning.

        With an adapter, it shares this model and disables the adapter for each call. For a full model, it loads the
        base as a second model.
        """
        if isinstance(self.model, PeftModel):
            base = self.model
        elif self._load_base is not None:
            base = self._load_base()
        else:
            raise UserError("no model before tuning is known; load a run or an adapter with from_pretrained")
        untuned = NLIClassifier(
            base,
            self.encoder,
            batch_args=self._batch_args,
            batch_size=self.batch_size,
            precision=self.precision,
        )
        untuned._lock = self._lock
        if isinstance(base, PeftModel):
            untuned._mode = partial(PeftModel.disable_adapter, base)
        return untuned

    def _predict(self, premises: list[str], hypotheses: list[str]) -> list[Prediction]:
        autocast = self.precision.autocast(self.model.device) if self.precision else nullcontext()
        with self._lock, self._mode(), autocast:
            prompts = self.encoder.encode(premises, hypotheses)
            scores = self._scorer(prompts)
        scores.check_numbers(self.model, "the classifier", "take another checkpoint")
        probabilities = torch.softmax(scores.log_probs.double() / self.temperature, dim=1).tolist()
        labels = self.encoder.prompt.labels
        return [
            Prediction(labels[choice], dict(zip(labels, row, strict=True)))
            for choice, row in zip(scores.choice.tolist(), probabilities, strict=True)
        ]


def pick_device(wanted: str | torch.device | None = None) -> torch.device:
    """The requested device; by default an accelerator if there is one, else the CPU.

    Raises:
        UserError: if the device is not available.
    """
    if wanted is not None:
        try:
            return torch.empty(0, device=wanted).device
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise UserError(f"device: {wanted} is not available; give cpu, or one such as cuda:0") from error
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
