"""Fine-tune a causal language model for natural language inference, with LoRA, QLoRA or in full.

    accelerate launch -q --config_file accelerate_configs/single_gpu.yaml \\
        recipes/sft.py --config recipes/qwen3-0.6b/lora.yaml

Flags override the recipe: --learning_rate 1e-4 --max_train_samples 2000.
"""

import nli_sft.script  # isort: skip  # noqa: F401 (first, so that Ctrl-C leaves no traceback)

import copy
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import transformers
from accelerate import PartialState
from rich.console import Console
from trl import ModelConfig, SFTConfig

from nli_sft import UserError
from nli_sft.configs import (
    BatchConfig,
    MachineConfig,
    PromptConfig,
    TrackingConfig,
    TrainDataConfig,
    resolve_recipe,
    run_script,
)
from nli_sft.data.prompts import PromptEncoder, load_prompt
from nli_sft.data.sources import describe_source, fingerprint, load_train_and_validation, pair_hashes
from nli_sft.evaluation.comparison import accuracy_interval, choice_warning
from nli_sft.hub.decision import write_decision_files
from nli_sft.hub.push import move_token_to_env
from nli_sft.labels import LABELS
from nli_sft.models.bases import InputLimits, check_base, locate_model, skeleton, suit_base
from nli_sft.models.loading import (
    adapter_config,
    apply_template,
    check_adapter,
    count_parameters,
    load_model,
    load_tokenizer,
)
from nli_sft.models.precision import choose_precision
from nli_sft.runs import (
    HYPOTHESIS_ONLY,
    git_state,
    launch_command,
    rendered_prompt,
    run_config,
    versions,
    write_run,
    write_trained_pairs,
)
from nli_sft.tracking import open_run
from nli_sft.training.batches import TokenRows, class_weights
from nli_sft.training.checkpoints import AUTO, find_checkpoint, is_finished
from nli_sft.training.folders import check_folder, check_resumption, clear
from nli_sft.training.launchers import check_launch, launched_with
from nli_sft.training.memory import plan_memory
from nli_sft.training.resources import ResourceRecorder
from nli_sft.training.trainer import NLITrainer


class Args(NamedTuple):
    """The configs of a recipe, in the order of --help."""

    data: TrainDataConfig
    prompt: PromptConfig
    batch: BatchConfig
    machine: MachineConfig
    tracking: TrackingConfig
    model: ModelConfig
    training: SFTConfig


def main(*configs):
    args = Args(*configs)
    move_token_to_env(args.training)  # keeps it out of trackers and checkpoints
    if args.training.disable_tqdm:  # Trainer does not turn these bars off
        datasets.disable_progress_bars()
        transformers.logging.disable_progress_bar()
    if args.machine.estimate:
        print_memory_estimate(args)
        return
    run = args.training.output_dir
    prompt = train(args)
    if args.prompt.hypothesis_only_control:
        print_main("\nTraining the hypothesis-only baseline: the same run without premises.")
        train(without_premises(args, prompt))
    print_main(f"To evaluate the run:\n  {evaluation_command(run, args.training.trust_remote_code)}")


def train(args):
    """Train one model and write its run folder. Returns the prompt."""
    resources = ResourceRecorder()
    args, limits = suit_to_base(args)
    recipe = resolve_recipe(args)
    if args.training.resume_from_checkpoint == AUTO and is_finished(args.training.output_dir, recipe):
        print_main(f"{args.training.output_dir} is already finished.")
        return load_prompt(args.prompt.prompt, args.prompt.label_words, args.prompt.labels or LABELS)
    precision = choose_precision(args.machine.precision, args.training.device)
    args = args._replace(model=precision.suit(args.model))
    checkpoint = check_start(args, precision)

    with resources.phase("loading"):
        encoder = load_encoder(args, limits, checkpoint)
        pairs, data = load_data(args, encoder.prompt.labels)
        if checkpoint is not None:
            check_resumption(checkpoint, recipe, encoder.prompt, data)
        rows = encode(args, encoder, limits, pairs, data["dropped"])
        trainer, plan = build_trainer(args, encoder, rows, precision)
    if trainer.class_weights:
        data["class_weights"] = dict(zip(encoder.prompt.labels, trainer.class_weights, strict=True))
    facts = describe(args, encoder, data, trainer, precision, plan)
    trainer.made_from = recipe, encoder.prompt, facts
    print_start(args, encoder, pairs, rows, data, checkpoint)
    print_main(f"{count_parameters(trainer.model)}.\n")

    prepare_folder(args, trainer, pairs)
    tracker = open_run(
        args.training.output_dir,
        report_to=args.training.report_to,
        settings=args.tracking,
        config=run_config(recipe, encoder.prompt, facts),
        resumed=checkpoint is not None,
    )
    tracker.watch(trainer)
    with resources.phase("training") as phase:
        result = trainer.train(resume_from_checkpoint=checkpoint)
        resources.add_earlier("training", trainer.earlier_seconds)
        phase.count(pairs=round(len(rows["train"]) * trainer.state.epoch), tokens=trainer.trained_tokens)
    trainer.save_model()
    with resources.phase("validation"):
        final = trainer.evaluate()
    used = resources.summary(run=args.training.output_dir, model=locate_model(args.model.model_name_or_path))

    if trainer.is_world_process_zero():
        record = facts | outcome(trainer, result, final, used)
        write_run(args.training.output_dir, recipe=recipe, prompt=encoder.prompt, record=record)
        write_decision_files(args.training.output_dir, encoder)
        tracker.publish_training(record)
        tracker.finish()
        print_accuracy(args, trainer, final["eval_accuracy"], len(rows["validation"]))
        print_main(f"Saved in {args.training.output_dir}.")
    return encoder.prompt


def suit_to_base(args):
    """Check the base model and adapt the arguments to it. Returns the arguments and the limits of its inputs."""
    trust = args.training.trust_remote_code
    config = check_base(args.model, trust)
    limits = InputLimits.of(skeleton(config, trust))
    args.training.max_length = limits.fit_length(args.training.max_length)
    return args._replace(model=suit_base(args.model, config, trust)), limits


def check_start(args, precision):
    """Check launcher, adapter and output folder. Returns the checkpoint to resume from, or `None`."""
    check_launch(args.model, args.training, precision.name)
    check_adapter(args.model, args.training.trust_remote_code)
    checkpoint = find_checkpoint(args.training.resume_from_checkpoint, args.training.output_dir)
    check_folder(
        args.training.output_dir,
        base=args.model.model_name_or_path,
        checkpoint=checkpoint,
        overwrite=args.machine.overwrite_output_dir,
    )
    return checkpoint


def load_encoder(args, limits, checkpoint):
    """Bind the prompt to the tokenizer of the base. A checkpoint must have been trained with the same one."""
    base, trust = args.model, args.training.trust_remote_code
    tokenizer = load_tokenizer(base.model_name_or_path, base.model_revision, trust)
    limits.fit_padding(tokenizer)
    apply_template(tokenizer, args.training)
    prompt = load_prompt(args.prompt.prompt, args.prompt.label_words, args.prompt.labels or LABELS)
    encoder = PromptEncoder(prompt, tokenizer, train_on_end=args.prompt.train_on_end)
    if checkpoint is not None:
        encoder.check_rendered(rendered_prompt(checkpoint), checkpoint)
    return encoder


def load_data(args, labels):
    """The pairs of both splits, and the data section of run.json."""
    data = {"dropped": Counter(), "sources": {}}
    pairs = load_train_and_validation(
        args.data, labels=labels, seed=args.training.seed, dropped=data["dropped"], mixture=data["sources"]
    )
    repeated = np.isin(pair_hashes(pairs["validation"]), pair_hashes(pairs["train"]))
    data["train_validation_overlap"] = int(repeated.sum())
    for split in pairs:
        data[split] = {"pairs": len(pairs[split]), "fingerprint": fingerprint(pairs[split])}
    return pairs, data


def encode(args, encoder, limits, pairs, dropped):
    """Token ids of both splits."""
    with PartialState().main_process_first():
        rows = {
            split: encoder.encode_rows(
                pairs[split],
                max_length=args.training.max_length,
                drop_too_long=args.prompt.drop_too_long,
                dropped=dropped,
            )
            for split in pairs
        }
    for split in rows:
        limits.check(rows[split]["input_ids"], encoder.tokenizer)
    return rows


def build_trainer(args, encoder, rows, precision):
    """The trainer with its model, and the plan of its memory."""
    plan = plan_memory(
        args.model, args.training, args.batch, precision, encoder.prompt, encoder=encoder, rows=rows["train"]
    )
    print_main(f"{precision}\n{plan}")
    gold = TokenRows(rows["train"], encoder.answers).gold
    trainer = NLITrainer(
        encoder=encoder,
        batch_args=replace(args.batch, max_batch_tokens=plan.max_batch_tokens),
        model=load_model(args.model, args.training.trust_remote_code),
        args=args.training,
        train_dataset=rows["train"],
        eval_dataset=rows["validation"],  # only recipes/eval.py reads the test split
        peft_config=adapter_config(args.model),
        class_weights=class_weights(args.data.class_weights, gold, encoder.prompt.labels),
    )
    return trainer, plan


def prepare_folder(args, trainer, pairs):
    """Delete an earlier run if requested, and record the training pairs."""
    if trainer.is_world_process_zero():
        if args.machine.overwrite_output_dir:
            clear(args.training.output_dir)
        write_trained_pairs(args.training.output_dir, pair_hashes(pairs["train"]))


def describe(args, encoder, data, trainer, precision, plan):
    """The entries of run.json known before training."""
    return {
        "model": args.model.model_name_or_path,
        "parameters": count_parameters(trainer.model).as_dict(),
        "prompt_fingerprint": encoder.prompt.fingerprint,
        "rendered": encoder.rendered,
        "data": data | {"dropped": dict(data["dropped"])},
        "world_size": args.training.world_size,
        "launcher": launched_with(args.training),
        "precision": precision.as_dict(),
        "max_batch_tokens": plan.max_batch_tokens,
        "memory_estimate": plan.estimate and plan.estimate.as_dict(),
        "versions": versions(),
        "git": git_state(),
    }


def outcome(trainer, result, final, used):
    """The entries of run.json known after training."""
    return {
        "train": result.metrics,
        "validation": {
            key: value
            for key, value in final.items()
            if key.startswith("eval_") and not key.endswith(("runtime", "per_second"))
        },
        "best_checkpoint_step": trainer.state.best_global_step,
        "history": trainer.state.log_history,
        "resources": used,
        "seconds": used["seconds"],
    }


def without_premises(args, prompt):
    """The arguments of the hypothesis-only baseline. Its folder is inside that of the run."""
    training = copy.copy(args.training)
    training.output_dir = str(Path(training.output_dir) / HYPOTHESIS_ONLY)
    training.resume_from_checkpoint = AUTO if training.resume_from_checkpoint else None
    training.report_to = []
    return args._replace(
        prompt=replace(
            args.prompt,
            prompt=HYPOTHESIS_ONLY,
            labels=list(prompt.labels),
            label_words=list(prompt.label_words),
            hypothesis_only_control=False,
        ),
        training=training,
    )


def print_main(*what):
    """Print on the main process only."""
    if PartialState().is_main_process:
        print(*what)


def print_start(args, encoder, pairs, rows, data, checkpoint):
    """Print an encoded example, the size of the data, and where training starts."""
    print_main("\nOne training example, with the loss on the marked tokens only:\n")
    if PartialState().is_main_process:
        Console(soft_wrap=True).print(encoder.marked_example(pairs["train"][0]))
    print_main(f"\n{len(rows['train']):,} training pairs, {len(rows['validation']):,} validation pairs.")
    for source, counts in data["sources"].items():
        print_main(f"  {source}: {describe_source(counts)}")
    if weights := data.get("class_weights"):
        print_main(f"  class weights: {', '.join(f'{label} {weight:.3g}' for label, weight in weights.items())}")
    if repeated := data["train_validation_overlap"]:
        print_main(
            f"Warning: {repeated:,} validation pairs are also training pairs; validation accuracy is too optimistic."
        )
    if few := few_pairs_warning(args, len(rows["validation"])):
        print_main(few)
    if args.training.resume_from_checkpoint:
        print_main(f"Resuming from {checkpoint}." if checkpoint else "No checkpoint yet; starting from scratch.")


def print_accuracy(args, trainer, accuracy, pairs):
    """Print the validation accuracy with its interval and step."""
    best = trainer.state.best_global_step
    step = f"the best checkpoint, step {best}" if best else f"the last step, {trainer.state.global_step}"
    low, high = accuracy_interval(accuracy, pairs)
    print_main(f"\nLabel accuracy on validation: {accuracy:.2%} (95% interval {low:.1%} to {high:.1%}; {step}).")
    if few := few_pairs_warning(args, pairs):
        print_main(few)


def few_pairs_warning(args, pairs):
    return choice_warning(pairs) if args.training.load_best_model_at_end else None


def evaluation_command(run, trust_remote_code):
    """The command that evaluates the run, for the current folder."""
    script = os.path.relpath(Path(__file__).with_name("eval.py"))
    return launch_command(script, "--run", run, *["--trust_remote_code", "true"] * trust_remote_code)


def print_memory_estimate(args):
    """Print the memory that training would need, computed from the model's config."""
    trust = args.training.trust_remote_code
    model_args = suit_base(args.model, check_base(args.model, trust, weights=False), trust)
    precision = choose_precision(args.machine.precision, args.training.device)
    check_adapter(model_args, trust)
    prompt = load_prompt(args.prompt.prompt, args.prompt.label_words, args.prompt.labels or LABELS)
    plan = plan_memory(precision.suit(model_args), args.training, args.batch, precision, prompt)
    if plan.estimate is None:
        raise UserError(str(plan))
    print_main(f"{precision}\n{plan}")


if __name__ == "__main__":
    run_script(main, [*Args.__annotations__.values()])
