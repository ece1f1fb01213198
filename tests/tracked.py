"""A small training in the order of recipes/sft.py, for tests of tracking.

As a script, it takes a folder to train in and the step at which it is killed.
"""

import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

from peft import LoraConfig
from tiny import chatml_tokenizer, few_pairs, tiny_llama
from transformers import TrainerCallback
from trl import SFTConfig

from nli_sft.configs import BatchConfig
from nli_sft.data.prompts import PROMPTS, PromptEncoder
from nli_sft.data.sources import fingerprint
from nli_sft.models.loading import count_parameters
from nli_sft.runs import git_state, run_config, versions, write_run
from nli_sft.tracking import open_run
from nli_sft.training.trainer import NLITrainer

SETTINGS = {"wandb_entity": None, "wandb_project": None, "wandb_group": None, "wandb_tags": ["smoke"]}
PROMPT = PROMPTS["plain"]


def settings(**given):
    return SimpleNamespace(**SETTINGS | {"wandb_notes": "what for"} | given)


class At(TrainerCallback):
    """Calls a function once, at the end of a step."""

    def __init__(self, step, function):
        self.step, self.function = step, function

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.function()


def train(folder, *, report_to, resume=False, steps=6, callbacks=(), **given):
    """Train, publish and finish."""
    encoder = PromptEncoder(PROMPT, chatml_tokenizer())
    pairs = {"train": few_pairs(4), "validation": few_pairs(1)}
    recipe = {
        "model_name_or_path": "somewhere/tiny",
        "dataset_name": "pairs",
        "use_peft": True,
        "lora_r": 4,
        "learning_rate": 1e-2,
        "report_to": report_to,
    }
    trainer = NLITrainer(
        encoder=encoder,
        batch_args=BatchConfig(max_row_tokens=128),
        model=tiny_llama(len(encoder.tokenizer)),
        args=SFTConfig(
            output_dir=str(folder),
            use_cpu=True,
            bf16=False,
            per_device_train_batch_size=8,
            max_steps=steps,
            learning_rate=recipe["learning_rate"],
            logging_steps=1,
            eval_on_start=True,
            eval_strategy="steps",
            eval_steps=2,
            save_strategy="steps",
            save_steps=2,
            report_to=report_to,
            disable_tqdm=True,
        ),
        train_dataset=encoder.encode_rows(pairs["train"], max_length=None),
        eval_dataset=encoder.encode_rows(pairs["validation"], max_length=None),
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=list(callbacks),
    )
    facts = {
        "model": "somewhere/tiny",
        "parameters": count_parameters(trainer.model).as_dict(),
        "prompt_fingerprint": PROMPT.fingerprint,
        "data": {
            "dropped": {"unlabelled": 1},
            **{split: {"pairs": len(pairs[split]), "fingerprint": fingerprint(pairs[split])} for split in pairs},
        },
        "world_size": 1,
        "versions": versions(),
        "git": git_state(),
    }
    tracker = open_run(
        folder,
        report_to=report_to,
        settings=settings(**given),
        config=run_config(recipe, PROMPT, facts),
        resumed=resume,
    )
    tracker.watch(trainer)
    result = trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    final = trainer.evaluate()
    record = facts | {
        "train": result.metrics,
        "validation": {key: value for key, value in final.items() if key in ("eval_loss", "eval_accuracy")},
        "history": trainer.state.log_history,
        "seconds": 1.5,
    }
    write_run(folder, recipe=recipe, prompt=PROMPT, record=record)
    tracker.publish_training(record)
    tracker.finish()


if __name__ == "__main__":
    kill = At(int(sys.argv[2]), lambda: os.kill(os.getpid(), signal.SIGKILL))
    train(Path(sys.argv[1]), report_to=["wandb"], callbacks=[kill])
