"""Fine-tune a causal LM to judge premise-hypothesis pairs, with LoRA, QLoRA or in full.

    accelerate launch -q --config_file accelerate_configs/single_gpu.yaml \
        recipes/sft.py --config recipes/qwen3-0.6b/lora.yaml

Any key of the recipe can be given as a flag too: --learning_rate 1e-4 --max_train_samples 2000.
"""

import nli_sft.script  # isort: skip  # noqa: F401 (first: Ctrl-C, and a warning of bitsandbytes, end quietly)

import os
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import transformers
from accelerate import PartialState
from rich.console import Console
from trl import ModelConfig, SFTConfig

from nli_sft import UserError
from nli_sft.bases import InputLimits, check_base, locate_model, skeleton, suit_base
from nli_sft.checkpoints import AUTO, find_checkpoint, is_finished
from nli_sft.comparison import accuracy_interval, choice_warning
from nli_sft.configs import (
    BatchConfig,
    MachineConfig,
    PromptConfig,
    TrackingConfig,
    TrainDataConfig,
    resolve_recipe,
    run_script,
)
from nli_sft.estimate import plan_memory
from nli_sft.folders import check_folder, check_resumption, clear
from nli_sft.hub import put_token_away
from nli_sft.launchers import check_launch, launched_with
from nli_sft.ledger import run_config
from nli_sft.models import (
    adapter_config,
    apply_template,
    check_adapter,
    count_parameters,
    load_model,
    load_tokenizer,
)
from nli_sft.precision import choose_precision
from nli_sft.prompts import PromptEncoder, load_prompt
from nli_sft.resources import ResourceRecorder
from nli_sft.runs import (
    HYPOTHESIS_ONLY,
    git_state,
    launch_command,
    rendered_prompt,
    versions,
    write_run,
    write_trained_pairs,
)
from nli_sft.sources import describe_source, fingerprint, load_train_and_validation, text_keys
from nli_sft.tracking import open_run
from nli_sft.trainer import NLITrainer


def main(data_args, prompt_args, batch_args, machine_args, tracking_args, training_args, model_args):
    put_token_away(training_args)  # or trackers and checkpoints would keep it
    if training_args.disable_tqdm:  # Trainer leaves the bars of tokenising, loading and writing
        datasets.disable_progress_bars()
        transformers.logging.disable_progress_bar()
    if machine_args.estimate:
        tell_estimate(prompt_args, batch_args, machine_args, training_args, model_args)
        return
    run = training_args.output_dir
    prompt = train(data_args, prompt_args, batch_args, machine_args, tracking_args, training_args, model_args)
    if prompt_args.hypothesis_only_control:
        prompt_args = replace(
            prompt_args, prompt=HYPOTHESIS_ONLY, label_words=list(prompt.label_words), hypothesis_only_control=False
        )
        training_args.output_dir = str(Path(run) / HYPOTHESIS_ONLY)
        training_args.resume_from_checkpoint = AUTO if training_args.resume_from_checkpoint else None
        training_args.report_to = []  # the control is part of the run
        say("\nNow the hypothesis-only baseline: the same training without the premises.")
        train(data_args, prompt_args, batch_args, machine_args, tracking_args, training_args, model_args)
    say(f"To evaluate it:\n  {evaluation_command(run, training_args.trust_remote_code)}")


def say(*what):
    """Print, once for all processes."""
    if PartialState().is_main_process:
        print(*what)


def evaluation_command(run, trust_remote_code):
    """What to type where this script was started."""
    script = os.path.relpath(Path(__file__).with_name("eval.py"))
    return launch_command(script, "--run", run, *["--trust_remote_code", "true"] * trust_remote_code)


def tell_estimate(prompt_args, batch_args, machine_args, training_args, model_args):
    """Say what memory the training would take, from the model's config alone."""
    config = check_base(model_args, training_args.trust_remote_code, weights=False)
    model_args = suit_base(model_args, config, training_args.trust_remote_code)
    precision = choose_precision(machine_args.precision, training_args.device)
    check_adapter(model_args, training_args.trust_remote_code)
    prompt = load_prompt(prompt_args.prompt, prompt_args.label_words)
    plan = plan_memory(precision.suit(model_args), training_args, batch_args, precision, prompt)
    if plan.estimate is None:
        raise UserError(str(plan))
    say(f"{precision}\n{plan}")


def train(data_args, prompt_args, batch_args, machine_args, tracking_args, training_args, model_args):
    resources = ResourceRecorder()
    config = check_base(model_args, training_args.trust_remote_code)
    model_args = suit_base(model_args, config, training_args.trust_remote_code)
    limits = InputLimits.of(skeleton(config, training_args.trust_remote_code))
    training_args.max_length = limits.fit_length(training_args.max_length)
    recipe = resolve_recipe(
        (data_args, prompt_args, batch_args, machine_args, tracking_args, training_args, model_args)
    )
    if training_args.resume_from_checkpoint == AUTO and is_finished(training_args.output_dir, recipe):
        say(f"{training_args.output_dir} is finished.")
        return load_prompt(prompt_args.prompt, prompt_args.label_words)
    precision = choose_precision(machine_args.precision, training_args.device)
    model_args = precision.suit(model_args)
    check_launch(model_args, training_args, precision.name)
    check_adapter(model_args, training_args.trust_remote_code)
    checkpoint = find_checkpoint(training_args.resume_from_checkpoint, training_args.output_dir)
    check_folder(
        training_args.output_dir,
        base=model_args.model_name_or_path,
        checkpoint=checkpoint,
        overwrite=machine_args.overwrite_output_dir,
    )

    with resources.phase("loading"):
        tokenizer = load_tokenizer(
            model_args.model_name_or_path, model_args.model_revision, training_args.trust_remote_code
        )
        limits.fit_padding(tokenizer)
        prompt = load_prompt(prompt_args.prompt, prompt_args.label_words)
        apply_template(tokenizer, training_args)
        encoder = PromptEncoder(prompt, tokenizer, train_on_end=prompt_args.train_on_end)
        if checkpoint is not None:
            encoder.check_rendered(rendered_prompt(checkpoint), checkpoint)
        dropped, drawn = Counter(), {}
        pairs = load_train_and_validation(data_args, seed=training_args.seed, dropped=dropped, drawn=drawn)
        data = {split: {"pairs": len(pairs[split]), "fingerprint": fingerprint(pairs[split])} for split in pairs}
        if checkpoint:
            check_resumption(checkpoint, recipe, prompt, data)
        trained = text_keys(pairs["train"])
        repeated = int(np.isin(text_keys(pairs["validation"]), trained).sum())
        encode = partial(
            encoder.encode_rows,
            max_length=training_args.max_length,
            drop_too_long=prompt_args.drop_too_long,
            dropped=dropped,
        )
        with PartialState().main_process_first():
            rows = {split: encode(pairs[split]) for split in pairs}
        for split in rows:
            limits.check(rows[split]["input_ids"], tokenizer)
        plan = plan_memory(
            model_args, training_args, batch_args, precision, prompt, encoder=encoder, rows=rows["train"]
        )
        say(f"{precision}\n{plan}")
        trainer = NLITrainer(
            encoder=encoder,
            batch_args=replace(batch_args, max_batch_tokens=plan.max_batch_tokens),
            model=load_model(model_args, training_args.trust_remote_code),
            args=training_args,
            train_dataset=rows["train"],
            eval_dataset=rows["validation"],  # the test split is read by recipes/eval.py alone
            peft_config=adapter_config(model_args),
        )
    parameters = count_parameters(trainer.model)
    facts = {
        "model": model_args.model_name_or_path,
        "parameters": parameters.as_dict(),
        "prompt_fingerprint": prompt.fingerprint,
        "rendered": encoder.rendered,
        "data": {
            "dropped": dict(dropped),
            "sources": drawn,
            "validation_pairs_trained_on": repeated,
            **data,
        },
        "world_size": training_args.world_size,
        "launcher": launched_with(training_args),
        "precision": precision.as_dict(),
        "max_batch_tokens": plan.max_batch_tokens,
        "memory_estimate": plan.estimate and plan.estimate.as_dict(),
        "versions": versions(),
        "git": git_state(),
    }
    trainer.made_from = recipe, prompt, facts
    say("\nOne training example; the loss is on the marked tokens alone:\n")
    if PartialState().is_main_process:
        Console(soft_wrap=True).print(encoder.marked_example(pairs["train"][0]))
    say(f"\n{len(rows['train']):,} training pairs, {len(rows['validation']):,} validation pairs.")
    for source, told in drawn.items():
        say(f"  {source}: {describe_source(told)}")
    if repeated:
        say(f"Warning: {repeated:,} validation pairs are also training pairs, so validation is too optimistic.")
    few = choice_warning(len(rows["validation"])) if training_args.load_best_model_at_end else None
    if few:
        say(few)
    say(f"{parameters}.\n")
    if training_args.resume_from_checkpoint:
        say(f"Resuming from {checkpoint}." if checkpoint else "No checkpoint yet: starting from the beginning.")

    if trainer.is_world_process_zero():
        if machine_args.overwrite_output_dir:
            clear(training_args.output_dir)
        write_trained_pairs(training_args.output_dir, trained)
    tracker = open_run(
        training_args.output_dir,
        report_to=training_args.report_to,
        settings=tracking_args,
        config=run_config(recipe, prompt, facts),
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
    used = resources.summary(run=training_args.output_dir, model=locate_model(model_args.model_name_or_path))

    if trainer.is_world_process_zero():
        record = facts | {
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
        write_run(training_args.output_dir, recipe=recipe, prompt=prompt, record=record)
        tracker.publish_training(record)
        tracker.finish()
        best = trainer.state.best_global_step
        of = f"the best checkpoint, of step {best}" if best else f"the last step, {trainer.state.global_step}"
        accuracy = final["eval_accuracy"]
        low, high = accuracy_interval(accuracy, len(rows["validation"]))
        say(f"\nLabel accuracy on validation: {accuracy:.2%} (95% interval {low:.1%} to {high:.1%}; {of}).")
        if few:
            say(few)
        say(f"Saved in {training_args.output_dir}.")
    return prompt


if __name__ == "__main__":
    run_script(
        main, (TrainDataConfig, PromptConfig, BatchConfig, MachineConfig, TrackingConfig, SFTConfig, ModelConfig)
    )
