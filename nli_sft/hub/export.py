"""Merge a run's adapter into its base, and check that the merged model gives the same answers."""

import logging
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from peft import PeftModel
from transformers import GenerationConfig
from trl import ModelConfig

from .. import UserError
from ..classifier import Prediction
from ..models.bases import check_base, quantization_of
from ..models.loading import load_encoder, load_tuned
from ..runs import read_run, write_run
from .decision import write_decision_files

logger = logging.getLogger(__name__)


@dataclass
class ExportConfig:
    """The run to merge, where to write the model, and the differences to accept."""

    run: str = field(default="", metadata={"help": "The run folder, with an adapter."})
    output_dir: str | None = field(
        default=None, metadata={"help": "Folder for the merged model; <run>-merged by default."}
    )
    dtype: str | None = field(
        default=None,
        metadata={
            "help": "Type of the merged weights; by default the type in the recipe.",
            "choices": ["float32", "bfloat16", "float16"],
        },
    )
    dequantize: bool = field(
        default=False,
        metadata={
            "help": "Merge into the dequantised base instead of the base as published: closer to the model that was "
            "trained and measured."
        },
    )
    device: str | None = field(default=None, metadata={"help": "Such as cpu or cuda:1; by default an accelerator."})
    split: str = field(default="validation", metadata={"help": "Split of the run's source to compare answers on."})
    pairs: int = field(default=500, metadata={"help": "Number of pairs to compare on."})
    max_difference: float = field(
        default=0.05, metadata={"help": "Fail if the probability of any label of any pair changes by more."}
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
        pairs: number of pairs compared.
        flips: pairs whose predicted label differs.
        largest_difference: of any label's probability on any pair; mean_difference: over all labels and pairs.
    """

    pairs: int
    flips: int
    largest_difference: float
    mean_difference: float

    @classmethod
    def between(cls, before: list[Prediction], after: list[Prediction]) -> "Parity":
        p_before, p_after = (
            torch.tensor([list(one.probabilities.values()) for one in predictions], dtype=torch.float64)
            for predictions in (before, after)
        )
        difference = (p_before - p_after).abs()
        flips = sum(b.label != a.label for b, a in zip(before, after, strict=True))
        return cls(len(before), flips, difference.max().item(), difference.mean().item())

    def __str__(self) -> str:
        return (
            f"{self.flips} of {self.pairs:,} labels changed; probabilities changed by at most "
            f"{self.largest_difference:.4f}, {self.mean_difference:.5f} on average"
        )

    def is_within(self, max_difference: float, max_flips: float) -> bool:
        return self.largest_difference <= max_difference and self.flips <= max_flips * self.pairs

    def as_dict(self) -> dict[str, int | float]:
        return asdict(self)


def write_merged(
    run: str | Path, output: str | Path, model_args: ModelConfig, device: torch.device, dequantize: bool = False
) -> None:
    """Merge a run's adapter into its base and write a plain transformers model, which is also a run folder.

    It holds weights in safetensors, the tokenizer with its chat template, a `generation_config` (greedy, as long as
    the longest label), the prompt, recipe and record of the run, which `NLIClassifier` reads, and decision files.

    Args:
        model_args: the base of the run; the merged weights get its `dtype`.
        dequantize: merge into the dequantised base instead of the base as published.

    Raises:
        UserError: if the run has no adapter, or if `dequantize` is set and the base was not quantised.
    """
    run, output = Path(run), Path(output)
    recipe, prompt, record = read_run(run)
    encoder = load_encoder(run)
    published = quantization_of(check_base(model_args))
    if dequantize and not (published or model_args.load_in_4bit or model_args.load_in_8bit):
        raise UserError(f"dequantize is set, but the base of {run} was not quantised; leave the flag out")
    if published and not dequantize:
        logger.warning("The published base is quantised (%s); dequantising it to merge the adapter.", published)
        dequantize = True
    if not dequantize:
        model_args = replace(model_args, load_in_4bit=False, load_in_8bit=False)
    model = load_tuned(run, model_args, device=device, dequantize=dequantize)
    if not isinstance(model, PeftModel):
        raise UserError(f"{run} has no adapter to merge: it holds a full model")
    merged = model.merge_and_unload()
    merged.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max(map(len, encoder.answers)),
        bos_token_id=encoder.tokenizer.bos_token_id,
        eos_token_id=encoder.tokenizer.eos_token_id,
        pad_token_id=encoder.tokenizer.pad_token_id,
    )
    # transformers would try to convert the weights back to the original format, which a quantised base does not allow.
    merged.save_pretrained(output, save_original_format=published is None)
    encoder.tokenizer.save_pretrained(output)
    write_run(output, recipe=recipe | {"dtype": model_args.dtype}, prompt=prompt, record=record)
    write_decision_files(output, encoder, record.get("temperature", 1.0))
