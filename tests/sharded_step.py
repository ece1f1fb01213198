"""One step on a trie with weights spread over two processes by FSDP2, against the same step in one piece.

torchrun --nproc_per_node 2 tests/sharded_step.py
"""

import copy
import tempfile

import torch
from peft import LoraConfig
from tiny import chatml_tokenizer, few_pairs, tiny_llama
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from trl import SFTConfig

from nli_sft.configs import BatchConfig
from nli_sft.prompts import PROMPTS, PromptEncoder
from nli_sft.trainer import NLITrainer

LORA = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")


def gradients(trainer, batch, answers):
    trainer.model.train()
    for part in batch["parts"]:
        trainer.compute_loss(trainer.model, trainer._prepare_inputs(part), num_items_in_batch=answers).backward()
    found = {}
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            found[name] = parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
    return found


def main():
    encoder = PromptEncoder(PROMPTS["plain"], chatml_tokenizer())
    rows = encoder.encode_rows(few_pairs(), max_length=None)
    for peft_config in (None, LORA):
        trainer = NLITrainer(
            encoder=encoder,
            batch_args=BatchConfig(max_row_tokens=128),
            model=tiny_llama(len(encoder.tokenizer)),
            args=SFTConfig(
                tempfile.mkdtemp(), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none"
            ),
            train_dataset=rows,
            peft_config=peft_config,
        )
        rank, processes = trainer.args.process_index, trainer.args.world_size
        answers = sum(label != -100 for row in rows for label in row["labels"])
        sharded, trainer.model = trainer.model, copy.deepcopy(trainer.model)
        whole = gradients(trainer, trainer.data_collator(list(rows)), answers)
        trainer.model = sharded
        assert all(gradient.any() for gradient in whole.values())
        mesh = init_device_mesh("cpu", (processes,))
        layers = (sharded.get_base_model() if peft_config else sharded).model.layers
        for module in (*layers, sharded):
            fully_shard(module, mesh=mesh)
        share = gradients(trainer, trainer.data_collator(list(rows)[rank::processes]), answers)
        assert share.keys() == whole.keys()
        for name, gradient in share.items():
            # The loss is scaled for processes whose gradients are averaged, as FSDP does; the whole was not averaged.
            torch.testing.assert_close(gradient, whole[name] / processes, rtol=1e-3, atol=1e-5)


if __name__ == "__main__":
    main()
