"""Merge a run's adapter into its base, and prove that the merged model answers as the two did."""

import logging
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from peft import PeftModel
from transformers import GenerationConfig
from trl import ModelConfig

from .. import UserError
from ..classifier import Prediction
from ..labels import LABELS
from ..models.bases import check_base, quantization_of
from ..models.loading import load_encoder, load_tuned
from ..runs import read_run, write_run

logger = logging.getLogger(__name__)


@dataclass
class ExportConfig:
    """What to merge, where to write it, and how far it may be off."""

    run: str = field(default="", metadata={"help": "The run folder, with an adapter."})
    output_dir: str | None = field(
        default=None, metadata={"help": "Where to write the model; <run>-merged by default."}
    )
    dtype: str | None = field(
        default=None,
        metadata={
            "help": "Type of the merged weights; that of the recipe by default.",
            "choices": ["float32", "bfloat16", "float16"],
        },
    )
    dequantize: bool = field(
        default=False,
        metadata={
            "help": "Merge into the quantised base turned back into plain weights, instead of the base as published: "
            "nearer to what was trained and measured."
        },
    )
    device: str | None = field(default=None, metadata={"help": "Such as cpu or cuda:1; an accelerator by default."})
    split: str = field(default="validation", metadata={"help": "Split of the run's source to compare answers on."})
    pairs: int = field(default=500, metadata={"help": "Compare on so many pairs."})
    max_difference: float = field(
        default=0.05, metadata={"help": "Fail if the probability of any label of any pair moves by more."}
    )
    max_flips: float = field(default=0.01, metadata={"help": "Fail if more than this share of labels change."})

    def __post_init__(self):
        if not self.run:
            raise UserError("run is missing; give the run folder as --run outputs/<model>-<method>")
        if self.output_dir is None:
            self.output_dir = f"{self.run.rstrip('/')}-merged"


@dataclass(frozen=True)
class Parity:
    """How far two models agree on the same pairs.

    Attributes:
        pairs: how many were compared.
        flips: pairs with another label.
        largest_difference: of any label's probability, on any pair; mean_difference: over all labels and pairs.
    """

    pairs: int
    flips: int
    largest_difference: float
    mean_difference: float

    @classmethod
    def between(cls, before: list[Prediction], after: list[Prediction]) -> "Parity":
        p_before, p_after = (
            torch.tensor([[j.probabilities[label] for label in LABELS] for j in side], dtype=torch.float64)
            for side in (before, after)
        )
        difference = (p_before - p_after).abs()
        flips = sum(b.label != a.label for b, a in zip(before, after, strict=True))
        return cls(len(before), flips, difference.max().item(), difference.mean().item())

    def __str__(self) -> str:
        return (
            f"{self.flips} of {self.pairs:,} labels changed; probabilities moved by {self.largest_difference:.4f} at "
            f"most, {self.mean_difference:.5f} on average"
        )

    def is_within(self, max_difference: float, max_flips: float) -> bool:
        return self.largest_difference <= max_difference and self.flips <= max_flips * self.pairs

    def as_dict(self) -> dict[str, int | float]:
        return asdict(self)


def write_merged(
    run: str | Path, output: str | Path, model_args: ModelConfig, device: torch.device, dequantize: bool = False
) -> None:
    """Write a run's model with its adapter merged in: a plain transformers folder that is a run folder as well.

    It holds weights in safetensors, the tokenizer with its chat template, a `generation_config` (greedy, as long as
    the longest label), and the prompt, recipe and record of the run, from which `NLIClassifier` reads.

    Args:
        model_args: the base of the run; its `dtype` is that of the merged weights.
        dequantize: merge into the quantised base, turned back into plain weights, instead of the base as published.

    Raises:
        UserError: if the run has no adapter, or `dequantize` is asked of a base that was not quantised.
    """
    run, output = Path(run), Path(output)
    recipe, prompt, record = read_run(run)
    encoder = load_encoder(run)
    published = quantization_of(check_base(model_args))
    if dequantize and not (published or model_args.load_in_4bit or model_args.load_in_8bit):
        raise UserError(f"dequantize: the base of {run} was not quantised; leave it out")
    if published and not dequantize:
        logger.warning("The base was published quantised (%s): it is dequantised to merge the adapter.", published)
        dequantize = True
    if not dequantize:
        model_args = replace(model_args, load_in_4bit=False, load_in_8bit=False)
    model = load_tuned(run, model_args, device=device, dequantize=dequantize)
    if not isinstance(model, PeftModel):
        raise UserError(f"{run} has no adapter to merge: its model is whole already")
    merged = model.merge_and_unload()
    merged.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max(map(len, encoder.answers)),
        bos_token_id=encoder.tokenizer.bos_token_id,
        eos_token_id=encoder.tokenizer.eos_token_id,
        pad_token_id=encoder.tokenizer.pad_token_id,
    )
    # What reading a quantised checkpoint did to its weights has no way back, and transformers would look for one.
    merged.save_pretrained(output, save_original_format=published is None)
    encoder.tokenizer.save_pretrained(output)
    write_run(output, recipe=recipe | {"dtype": model_args.dtype}, prompt=prompt, record=record)
