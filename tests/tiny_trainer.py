"""A trainer of a tiny model on a few pairs."""

import copy

from peft import LoraConfig
from tiny import few_pairs, tiny_llama
from trl import SFTConfig

from nli_sft.configs import BatchConfig
from nli_sft.data.prompts import PROMPTS, PromptEncoder
from nli_sft.training.trainer import NLITrainer

LORA = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")


def trainer(
    chatml,
    tmp_path,
    *,
    model=None,
    batching="trie",
    peft_config=None,
    batch_options=None,
    class_weights=None,
    prompt=PROMPTS["plain"],
    **options,
):
    encoder = PromptEncoder(prompt, chatml)
    options = {
        "output_dir": str(tmp_path),
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": 8,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **options,
    }
    return NLITrainer(
        encoder=encoder,
        batch_args=BatchConfig(batching=batching, max_row_tokens=128, **batch_options or {}),
        model=model or tiny_llama(len(chatml)),
        args=SFTConfig(**options),
        train_dataset=encoder.encode_rows(few_pairs(3), max_length=None),
        eval_dataset=encoder.encode_rows(few_pairs(), max_length=None),
        peft_config=copy.deepcopy(peft_config),  # PEFT changes it
        class_weights=class_weights,
    )


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]
