"""The files with which transformers' own `pipeline("decision")` and `transformers serve` run a tuned model.

    decide = pipeline("decision", model="outputs/smollm2-135m-full", dtype="float32")
    label = {"type": "choice", "criteria": {"entailment": None, "neutral": None, "contradiction": None}}
    decide({"state": {"premise": "A man sleeps.", "hypothesis": "A man is awake."}, "questions": {"label": label}})

`decision.json` holds the label tokens and the fitted temperature, `decision_template.jinja` the prompt. transformers
5.23 reads both as its `DecisionConfig`; older versions ignore them. The pipeline reads one token for each label: where
the first tokens of the answers differ, its probabilities are those of `NLIClassifier`.
"""

import json
import re
from pathlib import Path

from ..data.prompts import SLOTS, PromptEncoder

CONFIG, TEMPLATE = "decision.json", "decision_template.jinja"


def write_decision_files(folder: str | Path, encoder: PromptEncoder, temperature: float = 1.0) -> list[str]:
    """Write `decision.json` and `decision_template.jinja`, or delete them if `label_tokens` finds no tokens.

    Args:
        folder: of the model.
        encoder: the encoder that it was trained with.
        temperature: divides the logits.

    Returns:
        The names of the files.
    """
    folder, labels = Path(folder), label_tokens(encoder)
    if labels is None:
        (folder / CONFIG).unlink(missing_ok=True)
        (folder / TEMPLATE).unlink(missing_ok=True)
        return []
    config = {"labels": {"choice": labels}, "temperature": {"choice": temperature}}
    (folder / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / TEMPLATE).write_text(decision_template(encoder), encoding="utf-8")
    return [CONFIG, TEMPLATE]


def label_tokens(encoder: PromptEncoder) -> list[str] | None:
    """The first token of each label's answer as text, or `None` if the pipeline cannot tell the labels by them.

    The tokens must differ, and the tokenizer must read each text, which stands alone in the pipeline, as that token.
    """
    tokenizer, first = encoder.tokenizer, [answer[0] for answer in encoder.answers]
    texts = [str(tokenizer.decode([token])) for token in first]
    alone = tokenizer(texts, add_special_tokens=False)["input_ids"]
    prompt = tokenizer(prompt_prefix(encoder) + encoder.text("a", "b"), add_special_tokens=False)["input_ids"]
    is_same = alone == [[token] for token in first] and prompt == encoder.encode(["a"], ["b"])[0]
    return texts if is_same and len(set(first)) == len(first) else None


def decision_template(encoder: PromptEncoder) -> str:
    """The prompt as a Jinja template of `state`, with the slots as its keys.

    All text is in string literals: Jinja drops a line break at the end of a template, and would render braces.
    """
    parts = re.split(f"{{({'|'.join(SLOTS)})}}", prompt_prefix(encoder) + encoder.template)
    slots = [slot for slot in SLOTS if slot in parts[1::2]]
    labels = list(encoder.prompt.labels)
    rendered = (f"state.{part} | trim" if n % 2 else _literal(part) for n, part in enumerate(parts) if part)
    lines = [
        _refuse_if(" or ".join(f"state.{slot} is not string" for slot in slots), f"state needs texts: {slots}"),
        _refuse_if(f"question.options != {_literal(labels)}", f"criteria need to be, in this order: {labels}"),
        *(f"{{{{- {expression} -}}}}" for expression in rendered),
    ]
    return "\n".join(lines) + "\n"


def prompt_prefix(encoder: PromptEncoder) -> str:
    """The text that the tokenizer puts before a plain prompt: the beginning-of-sequence token, or nothing."""
    ids = encoder.encode([""], [""])[0]
    own = encoder.tokenizer(encoder.text("", ""), add_special_tokens=False)["input_ids"]
    return str(encoder.tokenizer.decode(ids[: len(ids) - len(own)]))


def _refuse_if(condition: str, reason: str) -> str:
    return f"{{%- if {condition} -%}}{{{{ raise_exception({_literal(reason)}) }}}}{{%- endif -%}}"


def _literal(value: object) -> str:
    """A text or a list of texts in Jinja, whose strings have the escapes of JSON."""
    return json.dumps(value, ensure_ascii=False)
