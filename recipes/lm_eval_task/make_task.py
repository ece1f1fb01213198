"""Write a task for lm-evaluation-harness with the prompt and the pairs of a run, and print the command to run it.

python recipes/lm_eval_task/make_task.py --run outputs/qwen3-0.6b-lora
python recipes/lm_eval_task/make_task.py --run outputs/qwen3-0.6b-lora --dataset_name hans.jsonl --max_samples 1000

The task uses the prompt of the run. README.md in this folder explains how its `acc` relates to our accuracy.
"""

import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

from nli_sft.configs import DataConfig, EvalConfig, TrainDataConfig, from_recipe, run_script
from nli_sft.evaluation.sets import load_evaluation_sets
from nli_sft.hub.lm_eval_task import model_args, write_task
from nli_sft.models.loading import load_encoder, locate_model
from nli_sft.runs import read_run


@dataclass
class TaskConfig(DataConfig):
    """The run, its pairs and the output folder."""

    run: str = field(default="", metadata={"help": "Run folder made by recipes/sft.py."})
    dataset_name: str | None = field(
        default=None, metadata={"help": "Hub id, folder or file of pairs. The run's own by default."}
    )
    split: str | None = field(
        default=None, metadata={"help": "Split to use. test by default; a single file is used as a whole."}
    )
    max_samples: int | None = field(
        default=None,
        metadata={"help": "Use at most this many pairs, sampled by premise with the same label shares."},
    )
    output_dir: str | None = field(default=None, metadata={"help": "Output folder. <run>/lm_eval by default."})


def main(args):
    recipe, prompt, _ = read_run(args.run)
    (pairs,) = load_evaluation_sets(
        from_recipe(EvalConfig, vars(args)), trained_on=from_recipe(TrainDataConfig, recipe), labels=prompt.labels
    )
    encoder = load_encoder(args.run, recipe.get("trust_remote_code", False))
    name = re.sub(r"\W+", "_", f"{Path(args.run).resolve().name}_{pairs}")
    task = write_task(args.output_dir or Path(args.run) / "lm_eval", name, encoder, pairs.pairs)

    is_adapter = (Path(args.run) / "adapter_config.json").is_file()
    base = locate_model(recipe["model_name_or_path"]) if is_adapter else args.run
    arguments = shlex.quote(model_args(encoder, base, args.run if is_adapter else None))
    folder = shlex.quote(str(task.parent))
    print(f"{len(pairs.pairs):,} pairs in {task}. To evaluate the run on them:\n")
    print(f"lm_eval --model hf --model_args {arguments} \\")
    print(f"    --include_path {folder} --tasks {name} --batch_size 16 --log_samples --output_path {folder}")


if __name__ == "__main__":
    run_script(main, (TaskConfig,))
