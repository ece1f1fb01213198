"""Evaluate a run: base against tuned, on any source and split, by constrained generation over the labels.

python recipes/eval.py --run outputs/qwen3-0.6b-lora
python recipes/eval.py --run outputs/qwen3-0.6b-lora --sources hans.jsonl breaking_nli.jsonl
python recipes/eval.py --run outputs/qwen3-0.6b-lora --suite stress
"""

import nli_sft.script  # isort: skip  # noqa: F401 (first: Ctrl-C, and a warning of bitsandbytes, end quietly)

from pathlib import Path

import datasets
from accelerate import PartialState
from rich.console import Console
from transformers import TrainingArguments
from trl import ModelConfig

from nli_sft import UserError
from nli_sft.configs import BatchConfig, EvalConfig, TrackingConfig, TrainDataConfig, from_recipe, run_script
from nli_sft.data.sources import fingerprint, pair_hashes
from nli_sft.evaluation.evaluate import evaluate_run, write_evaluation
from nli_sft.evaluation.sets import load_calibration_pairs, load_evaluation_sets
from nli_sft.evaluation.suites import load_suite, load_suite_sets, write_suite
from nli_sft.hub.decision import write_decision_files
from nli_sft.models.loading import load_encoder
from nli_sft.models.precision import choose_precision, default_device
from nli_sft.report import write_report
from nli_sft.report.content import Report
from nli_sft.report.outcome import outcome_table
from nli_sft.report.suite import suite_tables
from nli_sft.runs import evaluation_folder, fingerprints, keep_temperature, read_run, run_config, trained_on, versions
from nli_sft.tracking import open_run
from nli_sft.training.resources import ResourceRecorder


def main(args):
    datasets.disable_progress_bars()  # only the bars of the evaluation are of interest
    PartialState(cpu=default_device().type == "cpu")  # accelerate needs cpu=True to join processes on a CPU
    resources = ResourceRecorder()
    recipe, prompt, record = read_run(args.run)
    if recipe.get("trust_remote_code") and not args.trust_remote_code:
        raise UserError(
            f"{args.run} was trained with code that came with its base; --trust_remote_code true runs it here"
        )
    train_data = from_recipe(TrainDataConfig, recipe)
    if args.suite is None:
        suite, sets, missing = None, load_evaluation_sets(args, trained_on=train_data, labels=prompt.labels), {}
    else:
        suite = load_suite(args.suite, Path(__file__).parent / "suites")
        sets, missing = load_suite_sets(suite, args, prompt.labels)
    calibration_pairs = load_calibration_pairs(
        args,
        trained_on=train_data,
        labels=prompt.labels,
        seed=recipe.get("seed", TrainingArguments.seed),
        sets=sets,
    )

    device = PartialState().device
    assert device is not None  # set by PartialState above
    precision = choose_precision(args.precision, device)
    if PartialState().is_main_process:
        print(f"{precision}.")
    weights = fingerprints(args.run)
    with resources.phase("evaluation") as phase, precision.autocast(device):
        results = evaluate_run(
            args.run,
            precision.suit(from_recipe(ModelConfig, recipe)),
            sets,
            batch_size=args.per_device_eval_batch_size,
            batch_args=from_recipe(BatchConfig, recipe | ({"batching": args.batching} if args.batching else {})),
            unconstrained_samples=args.unconstrained_samples,
            calibration_pairs=calibration_pairs,
            checks=suite.checks if suite else None,
            trust_remote_code=args.trust_remote_code,
        )
        phase.count(pairs=sum(len(one.pairs) * len(by_model) for one, by_model in zip(sets, results, strict=True)))
    used = resources.summary(run=args.run)

    if not PartialState().is_main_process:
        return
    evaluated = set()
    for one, by_model in zip(sets, results, strict=True):
        metrics = {model: result for model, (_, result) in by_model.items()}
        overlap = trained_on(args.run, pair_hashes(one.pairs))
        summary = {
            "name": one.name,
            "source": one.source,
            "split": one.split,
            "pairs": len(one.pairs),
            "unlabelled_pairs_dropped": one.unlabelled,
            "unlinked_edits_dropped": one.unlinked,
            "train_test_overlap": None if overlap is None else int(overlap.sum()),
            "data_fingerprint": fingerprint(one.pairs),
            "prompt_fingerprint": prompt.fingerprint,
            "weights": weights,
            **metrics,
            "resources": used,
            "versions": versions(),
        }
        scores = {model: score for model, (score, _) in by_model.items()}
        folder = evaluation_folder(args.run, one.name or one.source, one.split)
        write_evaluation(folder, one.pairs, scores, summary, overlap, prompt.labels)
        evaluated.add(folder.name)
    if calibrated := results[0]["tuned"][1].get("calibrated"):
        temperature = calibrated["temperature"] or 1.0  # None if the search ended at a bound
        keep_temperature(args.run, temperature)
        write_decision_files(args.run, load_encoder(args.run, args.trust_remote_code), temperature)
    if suite is not None:
        write_suite(args.run, suite, sets, missing)
    report = Report(args.run)
    for evaluation in report.evaluations:
        if evaluation.folder.name not in evaluated:
            continue
        if seen := evaluation.summary["train_test_overlap"]:
            print(
                f"Warning: train-test overlap: {seen:,} of the {evaluation.summary['pairs']:,} pairs of "
                f"{evaluation.name} are in the training data; accuracy on them says nothing about new pairs."
            )
        if suite is None:  # the sets of a suite share a table, below
            for part in outcome_table(evaluation, record.get("resources", {})).split(Console().width):
                Console().print(part.rich())
    path = write_report(report)
    if suite is not None:
        for table in suite_tables(report.suite(suite.name), report.evaluations):
            for part in table.split(Console().width):
                Console().print(part.rich())
    print(f"Report: {path}")
    tracker = open_run(
        args.run,
        report_to=recipe.get("report_to"),
        settings=from_recipe(TrackingConfig, recipe),
        config=run_config(recipe, prompt, record),
        job_type="eval",
        resumed=True,
    )
    tracker.publish_evaluation(report)
    tracker.finish()


if __name__ == "__main__":
    run_script(main, (EvalConfig,))
