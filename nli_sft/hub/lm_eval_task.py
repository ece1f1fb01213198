"""Tasks of EleutherAI's lm-evaluation-harness for a run: the same prompt, pairs and answers, judged by others' code.

Its `acc` takes the answer with the largest unconstrained log-probability, which is `LabelScores.unconstrained`.
Constrained greedy generation, which this package evaluates by, goes down the answers token by token and can choose
another one (see recipes/lm_eval_task/README.md).
"""

import json
import re
from pathlib import Path

import yaml
from datasets import Dataset

from ..data.prompts import PromptEncoder
from ..labels import LABELS, TWO_WAY_LABELS


def write_task(folder: str | Path, name: str, encoder: PromptEncoder, pairs: Dataset) -> Path:
    """Write `<name>.yaml` and the pairs it asks, `<name>.jsonl`, for `lm_eval --include_path <folder> --tasks <name>`.

    The task holds the prompt as the model reads it, chat template included, so it wants no `--apply_chat_template`,
    and `add_bos_token=False` among the `--model_args` where the prompt is a chat (`model_args`).

    Returns:
        The path of the .yaml file.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / f"{name}.jsonl"
    # To a two-way set, both of the labels that it does not tell apart are right.
    two_way = pairs.features["label"].num_classes == len(TWO_WAY_LABELS)
    gold = [[0], [1, 2]] if two_way else range(len(LABELS))
    with data.open("w", encoding="utf-8") as file:
        for pair in pairs:
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
    """What the harness must be told of a model, as `--model_args`, to read the same tokens as we do."""
    values = {"pretrained": pretrained, "peft": adapter, **options}
    if encoder.is_chat:  # a chat template writes its own beginning of the sequence, or none
        values["add_bos_token"] = "False"
    return ",".join(f"{key}={value}" for key, value in values.items() if value is not None)


def _as_template(frame: str) -> str:
    """A prompt with `{premise}` and `{hypothesis}` open as a Jinja template; all else is text, braces included."""
    texts = re.split(r"\{(premise|hypothesis)\}", frame)
    for index, text in enumerate(texts):
        if index % 2:
            texts[index] = f"{{{{ {text} }}}}"
        elif "{" in text or "}" in text:  # as a string in the template, since Jinja would read it
            texts[index] = "{{ " + json.dumps(text, ensure_ascii=False) + " }}"
    return "".join(texts)
