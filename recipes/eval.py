"""Judge a run: base against tuned, on any source and split, by constrained generation over the three labels.

accelerate launch recipes/eval.py --run outputs/qwen3-0.6b-lora
accelerate launch recipes/eval.py --run outputs/qwen3-0.6b-lora --dataset_name hans.jsonl
"""

from pathlib import Path

from accelerate import PartialState
from rich import print
from rich.table import Table
from trl import ModelConfig

from nli_sft.configs import BatchConfig, DataConfig, EvalConfig, PromptConfig, from_recipe, run_script
from nli_sft.evaluation import evaluate_base_and_tuned, write_evaluation
from nli_sft.models import load_tokenizer
from nli_sft.prompts import PromptEncoder
from nli_sft.runs import evaluation_folder, read_run, versions
from nli_sft.sources import fingerprint, load_evaluation_pairs


def main(args):
    recipe, prompt, _ = read_run(args.run)
    model_args = from_recipe(ModelConfig, recipe)
    trust_remote_code = recipe.get("trust_remote_code", False)
    encoder = PromptEncoder(
        prompt,
        load_tokenizer(args.run, trust_remote_code=trust_remote_code),
        train_on_end=from_recipe(PromptConfig, recipe).train_on_end,
    )
    batch_args = from_recipe(BatchConfig, recipe | ({"batching": args.batching} if args.batching else {}))
    pairs, source, split, dropped = load_evaluation_pairs(args, trained_on=from_recipe(DataConfig, recipe))

    scores, results = evaluate_base_and_tuned(
        args.run,
        model_args,
        encoder,
        pairs,
        batch_args=batch_args,
        batch_size=args.per_device_eval_batch_size,
        free_samples=args.free_samples,
        trust_remote_code=trust_remote_code,
    )
    if not PartialState().is_main_process:
        return
    folder = evaluation_folder(args.run, source, split)
    summary = {
        "source": source,
        "split": split,
        "pairs": len(pairs),
        "unlabelled_pairs_dropped": dropped["unlabelled"],
        "data_fingerprint": fingerprint(pairs),
        "prompt_fingerprint": prompt.fingerprint,
        **results,
        "versions": versions(),
    }
    write_evaluation(folder, pairs, scores, summary)
    print(results_table(f"{Path(source).name} {split}, {len(pairs):,} pairs", results))
    print(f"Written to {folder}")


def results_table(title, results):
    table = Table(title=title)
    for heading in ("", "accuracy", "95 % interval", "macro-F1", "free generation", "names no label", "pairs/s"):
        table.add_column(heading, justify="right")
    for name, result in results.items():
        low, high = result["accuracy_interval"]
        free = result.get("free_generation")
        table.add_row(
            name,
            f"{result['accuracy']:.2%}",
            f"{low:.2%} – {high:.2%}",
            f"{result['macro_f1']:.3f}",
            f"{free['accuracy']:.1%} of {free['n']}" if free else "–",
            f"{free['invalid_share']:.1%}" if free else "–",
            f"{result['pairs_per_second']:,.0f}",
        )
    return table


if __name__ == "__main__":
    run_script(main, (EvalConfig,))
