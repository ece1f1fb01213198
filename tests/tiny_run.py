"""Run folders without a training: the files of recipes/sft.py and recipes/eval.py with random weights."""

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tiny import chatml_tokenizer, few_pairs, tiny_llama
from transformers import AutoModelForCausalLM

from nli_sft.configs import BatchConfig
from nli_sft.data.prompts import PROMPTS, Prompt, PromptEncoder
from nli_sft.evaluation.evaluate import EvalTask, evaluate_model, write_evaluation
from nli_sft.models.loading import count_parameters
from nli_sft.runs import versions, write_run

RECORD = {
    "data": {
        "train": {"pairs": 96, "fingerprint": "0123456789abcdef"},
        "validation": {"pairs": 24, "fingerprint": "fedcba9876543210"},
    },
    "validation": {"eval_loss": 0.9, "eval_accuracy": 0.5},
    "history": [{"epoch": 0, "step": 0, "eval_accuracy": 0.25}, {"epoch": 1.0, "step": 6, "eval_accuracy": 0.5}],
    "versions": versions(),
}


def make_base(folder: Path, tokenizer=None) -> Path:
    tokenizer = tokenizer or chatml_tokenizer()
    tokenizer.save_pretrained(folder)
    tiny_llama(len(tokenizer)).save_pretrained(folder)
    return folder


def make_run(
    folder: Path,
    base: Path,
    *,
    tokenizer=None,
    prompt: Prompt = PROMPTS["plain"],
    evaluated=True,
    dora=False,
    **recipe,
) -> Path:
    """A run with an adapter of random weights, or with the full model if `use_peft` is false.

    Args:
        base: the folder of the base; `model_name_or_path` in `recipe` may give it another name.
        evaluated: whether base and tuned model have been evaluated on a few pairs called `stanfordnlp/snli`.
    """
    recipe = {
        "model_name_or_path": str(base),
        "dataset_name": "stanfordnlp/snli",
        "use_peft": True,
        "lora_r": 8,
        "output_dir": str(folder),
    } | recipe
    tokenizer = tokenizer or chatml_tokenizer()
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(1)
    if recipe["use_peft"]:
        # init_lora_weights=False: an adapter that changes answers, as a trained one does
        config = LoraConfig(
            r=8, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False, use_dora=dora
        )
        model = get_peft_model(model, config)
        model.peft_config["default"].base_model_name_or_path = recipe["model_name_or_path"]
    else:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    record = RECORD | {"model": recipe["model_name_or_path"], "parameters": count_parameters(model).as_dict()}
    write_run(folder, recipe=recipe, prompt=prompt, record=record)
    if evaluated:
        evaluate(folder, model.eval(), PromptEncoder(prompt, tokenizer))
    return folder


def evaluate(folder: Path, model, encoder: PromptEncoder) -> None:
    pairs = few_pairs(2, encoder.prompt.labels)
    tasks, options = [EvalTask("test", pairs, encoder)], {"batch_size": 8, "batch_args": BatchConfig()}
    results = {"tuned": evaluate_model(model, tasks, name="tuned", **options)[0]}
    if hasattr(model, "disable_adapter"):
        with model.disable_adapter():
            results["base"] = evaluate_model(model, tasks, name="base", **options)[0]
    metrics = {name: result for name, (_, result) in results.items()}
    summary = {"source": "stanfordnlp/snli", "split": "test", "pairs": len(pairs), **metrics}
    scores = {name: score for name, (score, _) in results.items()}
    write_evaluation(folder / "eval" / "snli-test", pairs, scores, summary, labels=encoder.prompt.labels)
