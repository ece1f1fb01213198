"""Judge a run: base against tuned, on any source and split, by constrained generation over the three labels.

accelerate launch recipes/eval.py --run outputs/qwen3-0.6b-lora
accelerate launch recipes/eval.py --run outputs/qwen3-0.6b-lora --sources hans.jsonl breaking_nli.jsonl
"""

import torch
from accelerate import PartialState
from rich import print
from rich.table import Table
from trl import ModelConfig

from nli_sft.configs import BatchConfig, DataConfig, EvalConfig, TrackingConfig, from_recipe, run_script
from nli_sft.evaluation import judge_run, write_evaluation
from nli_sft.ledger import run_config
from nli_sft.report import write_report
from nli_sft.report.content import Report
from nli_sft.resources import ResourceRecorder
from nli_sft.runs import evaluation_folder, read_run, versions
from nli_sft.sources import fingerprint, load_evaluation_sets
from nli_sft.tracking import open_run


def main(args):
    resources = ResourceRecorder()
    recipe, prompt, record = read_run(args.run)
    sets = load_evaluation_sets(args, trained_on=from_recipe(DataConfig, recipe))

    device = PartialState().device.type
    with resources.phase("evaluation") as phase, torch.autocast(device, torch.bfloat16, enabled=args.bf16):
        judgements = judge_run(
            args.run,
            from_recipe(ModelConfig, recipe),
            sets,
            batch_size=args.per_device_eval_batch_size,
            batch_args=from_recipe(BatchConfig, recipe | ({"batching": args.batching} if args.batching else {})),
            free_samples=args.free_samples,
            trust_remote_code=recipe.get("trust_remote_code", False),
        )
        phase.count(pairs=sum(len(one.pairs) * len(judged) for one, judged in zip(sets, judgements, strict=True)))
    used = resources.summary(run=args.run)

    if not PartialState().is_main_process:
        return
    for one, judged in zip(sets, judgements, strict=True):
        results = {model: result for model, (_, result) in judged.items()}
        summary = {
            "source": one.source,
            "split": one.split,
            "pairs": len(one.pairs),
            "unlabelled_pairs_dropped": one.unlabelled,
            "data_fingerprint": fingerprint(one.pairs),
            "prompt_fingerprint": prompt.fingerprint,
            **results,
            "resources": used,
            "versions": versions(),
        }
        scores = {model: score for model, (score, _) in judged.items()}
        write_evaluation(evaluation_folder(args.run, one.source, one.split), one.pairs, scores, summary)
        print(results_table(f"{one}, {len(one.pairs):,} pairs", results))
    print(f"The report: {write_report(args.run)}")
    tracker = open_run(
        args.run,
        report_to=recipe.get("report_to"),
        settings=from_recipe(TrackingConfig, recipe),
        config=run_config(recipe, prompt, record),
        job_type="eval",
        resumed=True,
    )
    tracker.publish_evaluation(Report(args.run))
    tracker.finish()


def results_table(title, results):
    table = Table(title=title)
    for heading in ("", "accuracy", "95 % interval", "macro-F1", "unconstrained", "names no label", "pairs/s"):
        table.add_column(heading, justify="right")
    for name in ("base", "tuned", "shuffled", "hypothesis_only"):
        if name not in results:
            continue
        result = results[name]
        low, high = result["accuracy_interval"]
        free = result.get("free_generation")
        table.add_row(
            name.replace("_", " "),
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
