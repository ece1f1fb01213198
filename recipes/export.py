"""Merge a run's adapter into its base, and check that the merged model gives the same predictions.

python recipes/export.py --run outputs/qwen3-0.6b-lora
python recipes/export.py --run outputs/phi-2-qlora --dequantize --pairs 2000

A 4-bit base is loaded without quantization, which changes predictions slightly, because the adapter was trained on the
quantized weights. --dequantize merges into the dequantized weights instead.

For llama.cpp, convert the folder that this writes, with the converter of a llama.cpp checkout:
python convert_hf_to_gguf.py outputs/qwen3-0.6b-lora-merged --outtype q8_0
A GGUF file does not carry the restriction to the label words: give it to llama.cpp as a grammar,
--grammar 'root ::= "entailment" | "neutral" | "contradiction"'
"""

import nli_sft.script  # isort: skip  # noqa: F401 (first: Ctrl-C ends quietly)

import shutil
from dataclasses import replace
from pathlib import Path

from trl import ModelConfig

from nli_sft import UserError
from nli_sft.classifier import NLIClassifier, pick_device
from nli_sft.configs import DataConfig, from_recipe, run_script
from nli_sft.data.sources import load_pairs, subsample
from nli_sft.hub.export import ExportConfig, Parity, write_merged
from nli_sft.runs import read_run, write_json


def main(args):
    output = Path(args.output_dir)
    if output.exists():
        raise UserError(f"output_dir {output} already exists; remove it or give another folder")
    recipe, prompt, _ = read_run(args.run)
    device = pick_device(args.device)
    model_args = from_recipe(ModelConfig, recipe)
    dtype = args.dtype or model_args.dtype
    data = from_recipe(DataConfig, recipe)
    pairs = load_pairs(
        data.dataset_name,
        args.split,
        labels=prompt.labels,
        config=data.dataset_config,
        revision=data.dataset_revision,
        columns=data.columns(),
        label_spellings=data.label_spellings,
    )
    pairs = subsample(pairs, min(args.pairs, len(pairs)), seed=0)
    texts = list(pairs["premise"]), list(pairs["hypothesis"])

    before = NLIClassifier.from_pretrained(args.run, device=device, dtype=dtype)(*texts)
    # The folder gets its final name after the check.
    unchecked = output.with_name(f"{output.name}.unchecked")
    try:
        write_merged(args.run, unchecked, replace(model_args, dtype=dtype), device, args.dequantize)
        after = NLIClassifier.from_pretrained(unchecked, device=device, dtype=dtype)(*texts)
    except BaseException:
        shutil.rmtree(unchecked, ignore_errors=True)
        raise
    parity = Parity.between(before, after)

    print(f"Merged against adapter: {parity}.")
    write_json(unchecked / "parity.json", parity.as_dict() | {"dequantized": args.dequantize, "dtype": dtype})
    if not parity.is_within(args.max_difference, args.max_flips):
        hint = "; try --dequantize" if recipe.get("load_in_4bit") and not args.dequantize else ""
        raise UserError(
            f"the merged model differs from the measured one: {parity}; the limits are max_difference "
            f"{args.max_difference} and max_flips {args.max_flips}{hint}. The model is in {unchecked}"
        )
    unchecked.rename(output)
    print(f"Written to {output}")


if __name__ == "__main__":
    run_script(main, (ExportConfig,))
