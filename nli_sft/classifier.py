"""`NLIClassifier`: a tuned model as a function, from premise and hypothesis to label and probabilities.

    classifier = NLIClassifier.from_pretrained("outputs/qwen3-0.6b-lora")  # or the Hub id of a pushed run
    classifier("A man sleeps.", "A person is awake.").label

The prompt, the label words and the scoring are those of training and evaluation: nothing is asked in another way than
it was measured.
"""

import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel
from trl import ModelConfig

from . import UserError
from .configs import BatchConfig, from_recipe
from .data.prompts import PromptEncoder
from .data.sources import check_text
from .evaluation.scoring import Scorer, distinguishing_prefixes
from .hub import push as hub
from .labels import LABELS
from .models.loading import is_adapter, load_encoder, load_model, load_tuned
from .models.precision import DTYPES, Precision, choose_precision
from .runs import read_run


@dataclass(frozen=True)
class Prediction:
    """What the model says of one pair.

    Attributes:
        label: the label that constrained greedy generation says, one of `labels.LABELS`.
        probabilities: {label: probability}, in the order of `LABELS`, adding up to 1.
    """

    label: str
    probabilities: dict[str, float]


class NLIClassifier:
    """Judges pairs with a model and the prompt it was trained on. Safe to call from several threads.

    Attributes:
        encoder: the prompt, bound to the tokenizer.
        model: the model, on its device.

    Args:
        model: a causal LM, or one with an adapter.
        encoder: the encoder it was trained with.
        batch_args: whether to score on tries, and how long their rows may be.
        batch_size: pairs a forward pass at first; halved by itself where they do not fit in memory.
        precision: what to compute in; that of the weights by default.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        encoder: PromptEncoder,
        *,
        batch_args: BatchConfig | None = None,
        batch_size: int = 64,
        precision: Precision | None = None,
    ):
        if not isinstance(batch_size, int) or batch_size < 1:
            raise UserError(f"batch_size is {batch_size!r}; give a number of pairs from 1")
        self.model = model.eval()
        self.precision = precision
        self.encoder = encoder
        self.batch_size = batch_size
        # No graphs: they would keep to the weights of the first call, and a user may change the model.
        self._batch_args = replace(batch_args or BatchConfig(), cuda_graph="false")
        self._scorer = Scorer(
            self.model, encoder, self._batch_args, batch_size, distinguishing_prefixes(encoder.answers)
        )
        # Scoring hooks into the model, and a tokenizer changes its own state: one thread at a time. An untuned twin
        # (`before_tuning`) shares model and lock.
        self._lock = threading.Lock()
        self._mode: Callable[[], AbstractContextManager] = nullcontext
        self._load_base: Callable[[], PreTrainedModel] | None = None

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        revision: str | None = None,
        device: str | torch.device | None = None,
        dtype: str | None = None,
        batch_size: int = 64,
    ) -> "NLIClassifier":
        """Load a run folder, an exported model, or either from the Hub.

        Only safetensors are read, and no code that comes with a model is run.

        Args:
            name: a folder, or a Hub id such as `me/qwen3-0.6b-snli`. What `recipes/sft.py`, `recipes/export.py` and
                `recipes/push.py` make can be loaded.
            revision: branch, tag or commit on the Hub.
            device: by default an accelerator where there is one.
            dtype: `float32`, `bfloat16`, `float16` or `auto`, of weights and products. By default weights and
                precision are those of an evaluation on this device (`precision.py`).
            batch_size: as for the class.

        Raises:
            UserError: if there is no such folder or repository, or it lacks what is needed, naming it.
        """
        folder = find_run(name, revision)
        recipe, _, _ = read_run(folder)
        device = pick_device(device)
        model_args, precision = from_recipe(ModelConfig, recipe), choose_precision("auto", device)
        if dtype is None:
            model_args = precision.suit(model_args)
        else:
            names = {str(of_name).removeprefix("torch."): name for name, of_name in DTYPES.items()}
            if dtype not in (*names, "auto"):
                raise UserError(f"dtype is {dtype!r}; give one of {', '.join(names)} or auto")
            model_args = replace(model_args, dtype=dtype)
            precision = Precision(names.get(dtype, precision.name), "as asked for")
        encoder = load_encoder(folder)  # first: it sees whether the run is whole
        classifier = cls(
            load_tuned(folder, model_args, device=device),
            encoder,
            batch_args=from_recipe(BatchConfig, recipe),
            batch_size=batch_size,
            precision=precision,
        )
        if not is_adapter(folder):
            classifier._load_base = lambda: load_model(model_args, device=device)
        return classifier

    def __call__(self, premise: str | Iterable[str], hypothesis: str | Iterable[str]) -> Prediction | list[Prediction]:
        """Judge one pair, or any number of them.

        Args:
            premise, hypothesis: two texts, or two iterables of as many texts: lists, generators, columns of a
                `datasets.Dataset`, of a data frame.

        Returns:
            One `Prediction` for two texts, else a list in the order given.

        Raises:
            UserError: if the two are not as many, or hold something other than text, or a control token of the
                tokenizer, with which a text could dictate its own answer; or if the model's scores are no numbers.
        """
        if isinstance(premise, str) and isinstance(hypothesis, str):
            check_text(premise, "premise"), check_text(hypothesis, "hypothesis")
            return self._judge([premise], [hypothesis])[0]
        if not all(isinstance(one, Iterable) and not isinstance(one, (str, Mapping)) for one in (premise, hypothesis)):
            raise UserError("premise and hypothesis: give two texts, or two lists of as many texts")
        premises, hypotheses = list(premise), list(hypothesis)
        if len(premises) != len(hypotheses):
            raise UserError(f"{len(premises):,} premises but {len(hypotheses):,} hypotheses: give as many of both")
        for role, texts in (("premise", premises), ("hypothesis", hypotheses)):
            for index, text in enumerate(texts):
                check_text(text, f"{role} {index}")
        return self._judge(premises, hypotheses) if premises else []

    def before_tuning(self) -> "NLIClassifier":
        """The same prompt on the model as it was before tuning.

        With an adapter it is the same model, the adapter being switched off while it is asked; a full model's base is
        loaded beside it.
        """
        is_peft = isinstance(self.model, PeftModel)
        if not is_peft and self._load_base is None:
            raise UserError("the base of this model is not known: it was not loaded with from_pretrained")
        twin = NLIClassifier(
            self.model if is_peft else self._load_base(),
            self.encoder,
            batch_args=self._batch_args,
            batch_size=self.batch_size,
            precision=self.precision,
        )
        twin._lock = self._lock
        if is_peft:
            twin._mode = self.model.disable_adapter
        return twin

    def _judge(self, premises: list[str], hypotheses: list[str]) -> list[Prediction]:
        autocast = self.precision.autocast(self.model.device) if self.precision else nullcontext()
        with self._lock, self._mode(), autocast:
            prompts = self.encoder.encode(premises, hypotheses)
            scores = self._scorer(prompts)
        scores.check_numbers(self.model, "the classifier", "take another checkpoint")
        probabilities = scores.log_probs.double().exp().tolist()
        return [
            Prediction(LABELS[choice], dict(zip(LABELS, row, strict=True)))
            for choice, row in zip(scores.choice.tolist(), probabilities, strict=True)
        ]


def find_run(name: str | Path, revision: str | None = None) -> Path:
    """The folder of a run: the one named, or what a repository of the Hub holds, downloaded.

    Raises:
        UserError: if there is neither.
    """
    if Path(name).expanduser().is_dir():
        return Path(name).expanduser()
    return hub.download_run(str(name), revision)


def pick_device(wanted: str | torch.device | None = None) -> torch.device:
    """The device that is asked for; by default an accelerator where there is one.

    Raises:
        UserError: if there is no such device.
    """
    if wanted is not None:
        try:
            return torch.empty(0, device=wanted).device
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise UserError(f"device: {wanted} is not there; give cpu, or one such as cuda:0") from error
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
