"""Evaluate a run, or any causal language model, on any source and split, by constrained generation over the labels.

python recipes/eval.py --run outputs/qwen3-0.6b-lora
python recipes/eval.py --run outputs/qwen3-0.6b-lora --sources hans.jsonl breaking_nli.jsonl
python recipes/eval.py --run outputs/qwen3-0.6b-lora --suite stress
python recipes/eval.py --model Qwen/Qwen3-0.6B --prompt plain few_shot --dataset_name stanfordnlp/snli
"""

import nli_sft.script  # isort: skip  # noqa: F401 (first: Ctrl-C, and a warning of bitsandbytes, end quietly)

from pathlib import Path

import datasets
from accelerate import PartialState
from rich.console import Console
from transformers import TrainingArguments

from nli_sft import UserError
from nli_sft.configs import (
    BatchConfig,
    EvalConfig,
    TrackingConfig,
    TrainDataConfig,
    from_recipe,
    refuse_with_run,
    run_script,
)
from nli_sft.data.sources import fingerprint, pair_hashes
from nli_sft.evaluation.evaluate import evaluate_prompts, evaluate_run, write_evaluation
from nli_sft.evaluation.models import EvalTarget, find_targets
from nli_sft.evaluation.sets import load_calibration_pairs, load_evaluation_sets
from nli_sft.evaluation.suites import load_suite, load_suite_sets, write_suite
from nli_sft.hub.decision import write_decision_files
from nli_sft.models.loading import count_parameters, run_source
from nli_sft.models.precision import choose_precision, default_device
from nli_sft.report import write_report
from nli_sft.report.content import Report
from nli_sft.report.outcome import outcome_table, prompt_table
from nli_sft.report.suite import suite_tables
from nli_sft.runs import (
    evaluation_folder,
    fingerprints,
    is_trained,
    keep_temperature,
    launch_command,
    run_config,
    trained_on,
    versions,
    weight_files,
)
from nli_sft.tracking import open_run
from nli_sft.training.resources import ResourceRecorder


def main(args, tracking):
    datasets.disable_progress_bars()  # only the bars of the evaluation are of interest
    PartialState(cpu=default_device().type == "cpu")  # accelerate needs cpu=True to join processes on a CPU
    resources = ResourceRecorder()
    targets = find_run(args, tracking) if args.run else find_targets(args, tracking)
    recipe, labels = targets[0].recipe, targets[0].source.prompt.labels
    train_data = find_train_data(args, recipe)
    if args.suite is None:
        suite, sets, missing = None, load_evaluation_sets(args, trained_on=train_data, labels=labels), {}
    else:
        suite = load_suite(args.suite, Path(__file__).parent / "suites")
        sets, missing = load_suite_sets(suite, args, labels)
    calibration_pairs = load_calibration_pairs(
        args,
        trained_on=train_data,
        labels=labels,
        seed=recipe.get("seed", TrainingArguments.seed),
        sets=sets,
    )

    device = PartialState().device
    assert device is not None  # set by PartialState above
    precision = choose_precision(args.precision, device)
    if PartialState().is_main_process:
        print(f"{precision}.")
    evaluate = evaluate_trained if args.run and is_trained(targets[0].source.record) else evaluate_any
    with resources.phase("evaluation") as phase, precision.autocast(device):
        results = evaluate(
            targets,
            args,
            precision.suit(targets[0].source.model_args),
            sets,
            batch_size=args.per_device_eval_batch_size,
            batch_args=from_recipe(BatchConfig, recipe | ({"batching": args.batching} if args.batching else {})),
            unconstrained_samples=args.unconstrained_samples,
            calibration_pairs=calibration_pairs,
            checks=suite.checks if suite else None,
        )
        passes = [len(one.pairs) * len(m) for with_prompt in results for one, m in zip(sets, with_prompt, strict=True)]
        phase.count(pairs=sum(passes))
    used = resources.summary(run=targets[0].folder)

    if not PartialState().is_main_process:
        return
    reports = []
    for target, with_prompt in zip(targets, results, strict=True):
        evaluated = write_results(target, sets, with_prompt, used)
        if suite is not None:
            write_suite(target.folder, suite, sets, missing)
        reports.append(Report(target.folder))
        publish(reports[-1], evaluated, suite, is_alone=len(targets) == 1)
    if len(targets) > 1:
        for of_set in zip(*(evaluations_of(report, sets) for report in reports), strict=True):
            show(prompt_table([report.prompt.name for report in reports], of_set))
        print(f"To compare them: {launch_command('recipes/compare.py', *(target.folder for target in targets))}")


def find_run(args, tracking):
    """The run to evaluate, in a list."""
    refuse_with_run(vars(tracking))
    source = run_source(Path(args.run))
    if source.recipe.get("trust_remote_code") and not args.trust_remote_code:
        raise UserError(
            f"{args.run} was trained with code that came with its base; --trust_remote_code true runs it here"
        )
    target = EvalTarget(source, Path(args.run), source.recipe)
    if not is_trained(source.record):
        target.check_folder()
    return [target]


def find_train_data(args, recipe):
    """The source of a run, or of the pairs that a model is evaluated on; `None` for a model on a suite."""
    if args.run:
        return from_recipe(TrainDataConfig, recipe)
    return None if args.dataset_name is None else from_recipe(TrainDataConfig, vars(args))


def evaluate_trained(targets, args, model_args, sets, **options):
    """Evaluate a run beside its base and its baseline."""
    (target,) = targets
    return [evaluate_run(target.folder, model_args, sets, trust_remote_code=args.trust_remote_code, **options)]


def evaluate_any(targets, args, model_args, sets, **options):
    """Evaluate a model that is no run with each prompt."""
    encoders = [target.source.load_encoder(args.trust_remote_code) for target in targets]  # before the weights
    model = targets[0].source.load_model(model_args, args.trust_remote_code)
    results = evaluate_prompts(model, encoders, sets, **options)
    if PartialState().is_main_process:
        for target, encoder in zip(targets, encoders, strict=True):
            target.write(encoder, count_parameters(model))
    return results


def write_results(target, sets, results, used):
    """Write metrics and predictions of each set. Returns the names of the folders."""
    folder = target.folder
    evaluated = set()
    for one, by_model in zip(sets, results, strict=True):
        metrics = {model: result for model, (_, result) in by_model.items()}
        overlap = trained_on(folder, pair_hashes(one.pairs))
        summary = {
            "name": one.name,
            "source": one.source,
            "split": one.split,
            "pairs": len(one.pairs),
            "unlabelled_pairs_dropped": one.unlabelled,
            "unlinked_edits_dropped": one.unlinked,
            "train_test_overlap": None if overlap is None else int(overlap.sum()),
            "data_fingerprint": fingerprint(one.pairs),
            "prompt_fingerprint": target.source.prompt.fingerprint,
            "weights": fingerprints(folder),
            **metrics,
            "resources": used,
            "versions": versions(),
        }
        scores = {model: score for model, (score, _) in by_model.items()}
        path = evaluation_folder(folder, one.name or one.source, one.split)
        write_evaluation(path, one.pairs, scores, summary, overlap, target.source.prompt.labels)
        evaluated.add(path.name)
    main_model = "tuned" if "tuned" in results[0] else "base"
    if calibrated := results[0][main_model][1].get("calibrated"):
        temperature = calibrated["temperature"] or 1.0  # None if the search ended at a bound
        keep_temperature(folder, temperature)
        if weight_files(folder):
            write_decision_files(folder, target.source.load_encoder(), temperature)
    return evaluated


def publish(report, evaluated, suite, is_alone):
    """Show the outcome, write the report and log both to W&B."""
    for evaluation in report.evaluations:
        if evaluation.folder.name not in evaluated:
            continue
        if seen := evaluation.summary["train_test_overlap"]:
            print(
                f"Warning: train-test overlap: {seen:,} of the {evaluation.summary['pairs']:,} pairs of "
                f"{evaluation.name} are in the training data; accuracy on them says nothing about new pairs."
            )
        if suite is None and is_alone:  # the sets of a suite, and prompts, share a table
            show(outcome_table(evaluation, report.record.get("resources", {})))
    path = write_report(report)
    if suite is not None:
        for table in suite_tables(report.suite(suite.name), report.evaluations):
            show(table)
    print(f"Report: {path}")
    tracker = open_run(
        report.folder,
        report_to=report.recipe.get("report_to"),
        settings=from_recipe(TrackingConfig, report.recipe),
        config=run_config(report.recipe, report.prompt, report.record),
        job_type="eval",
        resumed=True,
    )
    tracker.publish_evaluation(report)
    tracker.finish()


def evaluations_of(report, sets):
    """The evaluations of a report on these sets."""
    by_folder = {evaluation.folder.name: evaluation for evaluation in report.evaluations}
    return [by_folder[evaluation_folder(report.folder, s.name or s.source, s.split).name] for s in sets]


def show(table):
    for part in table.split(Console().width):
        Console().print(part.rich())


if __name__ == "__main__":
    run_script(main, (EvalConfig, TrackingConfig))
