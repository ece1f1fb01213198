"""`NLIClassifier`: a tuned model as a function, from premise and hypothesis to label and probabilities.

    classifier = NLIClassifier.from_pretrained("outputs/qwen3-0.6b-lora")  # or the Hub id of a pushed run
    classifier("A man sleeps.", "A person is awake.").label

The prompt, the label words and the scoring are those of training and evaluation: nothing is asked in another way than
it was measured.
"""

import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from trl import ModelConfig, get_quantization_config

from . import UserError, hub, trie
from .configs import BatchConfig, from_recipe
from .decoding import deciding, score_prompts
from .evaluation import load_encoder
from .labels import LABELS
from .models import locate_model
from .prompts import PromptEncoder
from .runs import read_run


@dataclass(frozen=True)
class Judgement:
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
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        encoder: PromptEncoder,
        *,
        batch_args: BatchConfig | None = None,
        batch_size: int = 64,
    ):
        self.model = model.eval()
        self.encoder = encoder
        self.batch_size = batch_size
        self._batch_args = batch_args or BatchConfig()
        if self._batch_args.batching == "trie" and trie.unsupported_reason(model.config, longest=1):
            # Said once in training and evaluation; here it would be said at every call.
            self._batch_args = replace(self._batch_args, batching="padded")
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
            dtype: `float32`, `bfloat16`, `float16` or `auto`. By default that of the recipe on an accelerator
                (float16 for bfloat16 on a GPU that only emulates it), and float32 on a CPU.
            batch_size: as for the class.

        Raises:
            UserError: if there is no such folder or repository, or it lacks what is needed, naming it.
        """
        folder = find_run(name, revision)
        recipe, _, _ = read_run(folder)
        device = pick_device(device)
        model_args = replace(from_recipe(ModelConfig, recipe), dtype=dtype or pick_dtype(recipe.get("dtype"), device))
        encoder = load_encoder(folder)  # first: it sees whether the run is whole
        classifier = cls(
            load_tuned(folder, model_args, device),
            encoder,
            batch_args=from_recipe(BatchConfig, recipe),
            batch_size=batch_size,
        )
        if not is_adapter(folder):
            classifier._load_base = lambda: load_base(model_args, device)
        return classifier

    def __call__(self, premise: str | Iterable[str], hypothesis: str | Iterable[str]) -> Judgement | list[Judgement]:
        """Judge one pair, or any number of them.

        Args:
            premise, hypothesis: two texts, or two iterables of as many texts: lists, generators, columns of a
                `datasets.Dataset`, of a data frame.

        Returns:
            One `Judgement` for two texts, else a list in the order given.

        Raises:
            UserError: if the two are not as many, or hold something other than text, or a control token of the
                tokenizer, with which a text could dictate its own answer; or if the model's scores are no numbers.
        """
        if isinstance(premise, str) != isinstance(hypothesis, str):
            raise UserError("premise and hypothesis: give two texts, or two lists of as many texts")
        if isinstance(premise, str):
            return self._judge([premise], [hypothesis])[0]
        premises, hypotheses = list(premise), list(hypothesis)
        if len(premises) != len(hypotheses):
            raise UserError(f"{len(premises):,} premises but {len(hypotheses):,} hypotheses: give as many of both")
        for index, text in enumerate((*premises, *hypotheses)):
            if not isinstance(text, str):
                role, index = ("premise", index) if index < len(premises) else ("hypothesis", index - len(premises))
                raise UserError(f"{role} {index} is {text!r}; expected text")
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
        )
        twin._lock = self._lock
        if is_peft:
            twin._mode = self.model.disable_adapter
        return twin

    def _judge(self, premises: list[str], hypotheses: list[str]) -> list[Judgement]:
        with self._lock, self._mode():
            prompts = self.encoder.encode(premises, hypotheses)
            longest = max(map(len, prompts)) + max(map(len, self.encoder.answers))
            scores = score_prompts(
                self.model,
                prompts,
                deciding(self.encoder.answers),
                self.encoder.tokenizer.pad_token_id,
                batch_size=self.batch_size,
                max_row_tokens=trie.row_tokens(
                    self._batch_args.batching,
                    self._batch_args.max_row_tokens,
                    self.model.config,
                    longest,
                    self.encoder.instruction_tokens,
                ),
            )
        scores.check_numbers(self.model, "the classifier", "take another checkpoint")
        probabilities = scores.log_probs.double().exp().tolist()
        return [
            Judgement(LABELS[choice], dict(zip(LABELS, row, strict=True)))
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


def is_adapter(folder: Path) -> bool:
    """Whether a run folder holds an adapter rather than a full model."""
    return (folder / "adapter_config.json").is_file()


def load_tuned(
    folder: Path, model_args: ModelConfig, device: torch.device, dequantize: bool = False
) -> PreTrainedModel | PeftModel:
    """The model of a run folder: its adapter on its base, or the full model.

    Args:
        folder: the run folder.
        model_args: the base of the run, its quantisation, and the type to compute in.
        device: where to load it.
        dequantize: turn a quantised base back into plain weights, before the adapter is put on: the same values as
            the quantised ones, in `model_args.dtype`.

    Raises:
        UserError: if the weights, or those of the base, are not there as safetensors.
    """
    if is_adapter(folder):
        # PEFT would fall back on a pickle.
        if not (folder / "adapter_model.safetensors").is_file():
            raise UserError(f"{folder} has no adapter_model.safetensors; other formats can run code and are not read")
        base = load_base(model_args, device)
        if dequantize:
            base = base.dequantize(dtype=getattr(torch, model_args.dtype, None))  # no type is called auto
        return PeftModel.from_pretrained(base, folder)
    return _load(str(folder), None, model_args.dtype, device, model_args.attn_implementation)


def load_base(model_args: ModelConfig, device: torch.device) -> PreTrainedModel:
    """The model that a run started from, quantised if it was."""
    return _load(
        locate_model(model_args.model_name_or_path),
        model_args.model_revision,
        model_args.dtype,
        device,
        model_args.attn_implementation,
        get_quantization_config(model_args),
    )


def _load(
    name: str,
    revision: str | None,
    dtype: str,
    device: torch.device,
    attn_implementation: str | None,
    quantization_config: BitsAndBytesConfig | None = None,
) -> PreTrainedModel:
    try:
        return AutoModelForCausalLM.from_pretrained(
            name,
            revision=revision,
            dtype=dtype,
            attn_implementation=attn_implementation,
            quantization_config=quantization_config,
            device_map={"": device},
            use_safetensors=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: cannot load the model ({str(error).splitlines()[0]})") from error


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


def pick_dtype(wanted: str | None, device: torch.device) -> str:
    """The type to compute in: that of the recipe, where the device is made for it."""
    if device.type == "cpu" or wanted is None:
        return "float32"
    if wanted == "bfloat16" and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "float16"
    return wanted
