import pytest
import torch
from peft import LoraConfig
from tiny import few_pairs, tiny_llama
from transformers import MambaConfig, MambaForCausalLM
from trl import SFTConfig

from nli_sft.configs import BatchConfig
from nli_sft.decoding import generate_labels
from nli_sft.prompts import PROMPTS, PromptEncoder
from nli_sft.trainer import NLITrainer, split_rows

LORA = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")


def trainer(chatml, tmp_path, *, model=None, batching="trie", peft_config=None, **options):
    encoder = PromptEncoder(PROMPTS["plain"], chatml)
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
        batch_args=BatchConfig(batching=batching, max_row_tokens=128),
        model=model or tiny_llama(len(chatml)),
        args=SFTConfig(**options),
        train_dataset=encoder.encode_rows(few_pairs(3), max_length=None),
        eval_dataset=encoder.encode_rows(few_pairs(), max_length=None),
        peft_config=peft_config,
    )


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}, {"gradient_checkpointing": False}],
    ids=["plain", "accumulated", "no checkpointing"],
)
def test_tries_train_as_padded_batches_do(chatml, tmp_path, peft_config, options):
    """Same losses, gradient norms and token counts at every step, and so the same weights at the end."""
    both = {}
    for batching in ("trie", "padded"):
        both[batching] = trainer(chatml, tmp_path, batching=batching, peft_config=peft_config, **options)
        both[batching].train()
    for key in ("loss", "grad_norm", "mean_token_accuracy"):
        assert logged(both["trie"], key) == pytest.approx(logged(both["padded"], key), rel=2e-3), key
    # The last token of an answer is not fed to a trie.
    fewer = [
        padded - trie
        for trie, padded in zip(*(logged(both[b], "num_tokens") for b in ("trie", "padded")), strict=True)
    ]
    assert fewer == [8, 16, 24]
    for name, parameter in both["trie"].model.named_parameters():
        torch.testing.assert_close(parameter, both["padded"].model.get_parameter(name), rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("dora", [False, True])
def test_only_the_adapter_moves(chatml, tmp_path, dora):
    config = LoraConfig(r=4, target_modules="all-linear", use_dora=dora, use_rslora=dora, task_type="CAUSAL_LM")
    run = trainer(chatml, tmp_path, peft_config=config)
    before = {name: parameter.clone() for name, parameter in run.model.named_parameters()}
    run.train()
    moved = {name for name, parameter in run.model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {name for name in before if "lora_" in name}


def test_full_fine_tuning_moves_everything(chatml, tmp_path):
    run = trainer(chatml, tmp_path)
    before = {name: parameter.clone() for name, parameter in run.model.named_parameters()}
    run.train()
    assert not [name for name, parameter in run.model.named_parameters() if torch.equal(parameter, before[name])]


@pytest.mark.parametrize("batching", ["trie", "padded"])
def test_evaluation_is_label_accuracy_and_the_loss_of_training(chatml, tmp_path, batching):
    run = trainer(chatml, tmp_path, batching=batching)
    metrics = run.evaluate()
    prompts, gold = split_rows(run.eval_dataset, run.encoder.answers)
    said = generate_labels(run.model, chatml, prompts, run.encoder.answers)
    assert metrics["eval_accuracy"] == pytest.approx(sum(map(int.__eq__, said, gold)) / len(gold))
    rows = [prompt + run.encoder.answers[label] for prompt, label in zip(prompts, gold, strict=True)]
    losses = []
    for row, prompt in zip(rows, prompts, strict=True):
        with torch.no_grad():
            log_probs = run.model(torch.tensor([row])).logits[0].log_softmax(-1)
        losses += [-log_probs[step, row[step + 1]].item() for step in range(len(prompt) - 1, len(row) - 1)]
    assert metrics["eval_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_the_best_checkpoint_is_chosen_by_label_accuracy(chatml, tmp_path):
    run = trainer(
        chatml,
        tmp_path,
        max_steps=6,
        eval_on_start=True,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=2,
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_accuracy",
    )
    run.train()
    history = {entry["step"]: entry["eval_accuracy"] for entry in run.state.log_history if "eval_accuracy" in entry}
    assert list(history) == [0, 2, 4, 6], "the base at step 0, then every evaluation"
    best = max((2, 4, 6), key=lambda step: history[step])
    assert run.state.best_global_step == best
    assert run.evaluate()["eval_accuracy"] == pytest.approx(history[best])


def test_models_that_cannot_use_tries_get_padded_batches_and_a_line(chatml, tmp_path, caplog):
    config = MambaConfig(vocab_size=len(chatml), hidden_size=16, num_hidden_layers=1, state_size=4, pad_token_id=0)
    run = trainer(chatml, tmp_path, model=MambaForCausalLM(config), max_steps=1, gradient_checkpointing=False)
    assert "Padded batches instead of tries: mamba has linear_attention layers" in caplog.text
    run.train()
    assert 0 <= run.evaluate()["eval_accuracy"] <= 1


def test_trls_card_is_not_written(chatml, tmp_path):
    run = trainer(chatml, tmp_path, save_strategy="steps", save_steps=3, peft_config=None)
    run.train()
    assert (tmp_path / "checkpoint-3" / "model.safetensors").is_file()
    assert not (tmp_path / "README.md").exists()
