"""Tasks for EleutherAI's lm-evaluation-harness: the prompt, pairs and answers of a run, evaluated by other code.

Its `acc` chooses the answer with the highest unconstrained log-probability (`LabelScores.unconstrained`). Constrained
greedy generation, with which this package evaluates, decides token by token and can choose another answer (see
recipes/lm_eval_task/README.md).
"""

import json
import re
from pathlib import Path

import yaml
from datasets import Dataset

from ..data.prompts import PromptEncoder
from ..labels import counts_as


def write_task(folder: str | Path, name: str, encoder: PromptEncoder, pairs: Dataset) -> Path:
    """Write the task `<name>.yaml` and its pairs `<name>.jsonl`, for `lm_eval --include_path <folder> --tasks <name>`.

    The task holds the rendered prompt, chat template included. Do not pass `--apply_chat_template`, and take the
    `--model_args` from `model_args`.

    Returns:
        The path of the .yaml file.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / f"{name}.jsonl"
    # In a two-way set, neutral and contradiction are both right for non-entailment.
    names = pairs.features["label"].names
    mapping = counts_as(encoder.prompt.labels, names)
    right = [[label for label, gold in enumerate(mapping) if gold == name] for name in range(len(names))]
    gold = right if len(mapping) > len(names) else range(len(names))
    with data.open("w", encoding="utf-8") as file:
        for pair in pairs.to_list():
            row = {key: pair[key] for key in ("uid", "premise", "hypothesis")} | {"gold": gold[pair["label"]]}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data.resolve())}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": _as_template(encoder.template),
        "doc_to_choice": list(encoder.answer_texts),
        "doc_to_target": "gold",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0, "prompt_fingerprint": encoder.prompt.fingerprint},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(task, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return path


def model_args(encoder: PromptEncoder, pretrained: str, adapter: str | None = None, **options: str) -> str:
    """The `--model_args` with which the harness feeds the model the same tokens as this package."""
    values = {"pretrained": pretrained, "peft": adapter, **options}
    if encoder.is_chat:  # the chat template adds a beginning-of-sequence token itself, if any
        values["add_bos_token"] = "False"
    return ",".join(f"{key}={value}" for key, value in values.items() if value is not None)


def _as_template(prompt: str) -> str:
    """A prompt with the fields `{premise}` and `{hypothesis}` as a Jinja template; other braces are text."""
    texts = re.split(r"\{(premise|hypothesis)\}", prompt)
    for index, text in enumerate(texts):
        if index % 2:
            texts[index] = f"{{{{ {text} }}}}"
        elif "{" in text or "}" in text:  # quoted, because Jinja would interpret it
            texts[index] = "{{ " + json.dumps(text, ensure_ascii=False) + " }}"
    return "".join(texts)
