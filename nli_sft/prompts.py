"""From a pair to token ids: the prompt, the words for the labels, and the one encoder that every part uses.

Training, scoring, generation, the model card and exports all go through `PromptEncoder`, so a model is never judged on
another text than it was trained on. What an encoder guarantees, and checks on every row:

- prompt and answer are tokenised together as they are apart: no token spans the boundary between them;
- the answer to a label is the same token ids for every pair, and no answer is the beginning of another;
- nothing is cut off: a row longer than `max_length` is an error, or is dropped and counted if that was asked for.
"""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import yaml
from datasets import Dataset
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from . import UserError
from .labels import LABELS

# What chat templates would otherwise decide by themselves, each making train and test prompts differ:
TEMPLATE_ARGUMENTS = {
    "enable_thinking": False,  # Qwen3 and kin: the label is the whole answer, with no reasoning before it
    "date_string": "26 Jul 2024",  # Llama 3 writes today's date into the system turn
}


@dataclass(frozen=True)
class Prompt:
    """The text that turns a pair into a question, and the words that answer it.

    `user` holds the slots `{premise}` and `{hypothesis}`, and may hold `{labels}` (all label words as a list) and
    `{entailment}`, `{neutral}`, `{contradiction}` (the word for one label).
    """

    name: str
    user: str
    label_words: tuple[str, str, str] = LABELS
    system: str | None = None
    examples: tuple[tuple[str, str, str], ...] = ()  # (premise, hypothesis, label name), shown before the pair

    def __post_init__(self):
        if "{hypothesis}" not in self.user:
            raise UserError(f"prompt {self.name}: the user text has no {{hypothesis}} slot")
        words = self.label_words
        if len(words) != len(LABELS) or len({word.lower() for word in words}) != len(LABELS) or not all(words):
            raise UserError(f"prompt {self.name}: label_words must be three different words, for {', '.join(LABELS)}")
        for *_, label in self.examples:
            if label not in LABELS:
                raise UserError(f"prompt {self.name}: example label {label!r} is not one of {', '.join(LABELS)}")

    @property
    def reads_premise(self) -> bool:
        return "{premise}" in self.user

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change when anything but the name does. It does not depend on the model."""
        content = {key: value for key, value in asdict(self).items() if key != "name"}
        return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]

    def turns(self) -> list[dict[str, str]]:
        """Chat messages with the slots `{premise}` and `{hypothesis}` still open in the last one."""
        first, second, third = self.label_words
        words = dict(zip(LABELS, self.label_words, strict=True), labels=f"{first}, {second} or {third}")
        user = _fill(self.user, words)
        turns = [{"role": "system", "content": self.system}] if self.system else []
        for premise, hypothesis, label in self.examples:
            turns.append({"role": "user", "content": _fill(user, {"premise": premise, "hypothesis": hypothesis})})
            turns.append({"role": "assistant", "content": words[label]})
        return [*turns, {"role": "user", "content": user}]


_QUESTION = "Does the premise entail the hypothesis? Answer {labels}.\n"

# What all prompts share stands first and the hypothesis last: on a trie (trie.py) a pair then costs little more than
# its hypothesis. With the question after the pair, SNLI prompts take more than twice the tokens.
PROMPTS = {
    prompt.name: prompt
    for prompt in (
        Prompt(name="plain", user=_QUESTION + "Premise: {premise}\nHypothesis: {hypothesis}"),
        Prompt(
            name="definitions",
            user="Read a premise, which describes a scene, and a hypothesis about the same scene. Answer with one "
            "word: {entailment} if the hypothesis must be true, {contradiction} if it cannot be true, and {neutral} "
            "if it may or may not be.\nPremise: {premise}\nHypothesis: {hypothesis}",
        ),
        Prompt(
            name="few_shot",
            user=_QUESTION + "Premise: {premise}\nHypothesis: {hypothesis}",
            examples=(
                ("Two women carry paper bags out of a shop.", "Some people have bags.", "entailment"),
                ("Two women carry paper bags out of a shop.", "The women have bought shoes.", "neutral"),
                ("Two women carry paper bags out of a shop.", "The women are asleep at home.", "contradiction"),
            ),
        ),
        # The control: a model that scores well here has learned how hypotheses were written, not what follows from
        # what.
        Prompt(name="hypothesis_only", user=_QUESTION + "Hypothesis: {hypothesis}"),
    )
}


def load_prompt(name: str, label_words: Sequence[str] | None = None) -> Prompt:
    """A built-in prompt by name, or the user's own from a .yaml or .json file with the fields of `Prompt`."""
    if name in PROMPTS:
        prompt = PROMPTS[name]
    elif Path(name).suffix in (".yaml", ".yml", ".json"):
        prompt = _read_prompt(Path(name))
    else:
        raise UserError(f"prompt: {name!r} is neither built in ({', '.join(PROMPTS)}) nor a .yaml or .json file")
    return replace(prompt, label_words=tuple(label_words)) if label_words else prompt


def _read_prompt(path: Path) -> Prompt:
    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"prompt: {path} is not there") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not YAML ({str(error).splitlines()[0]})") from error
    known = {"name", "user", "label_words", "system", "examples"}
    if not isinstance(fields, dict) or "user" not in fields or not set(fields) <= known:
        raise UserError(f"{path}: a prompt has the keys user and, if wanted, {', '.join(sorted(known - {'user'}))}")
    fields = {"name": path.stem} | fields
    fields["label_words"] = tuple(fields.get("label_words", LABELS))
    fields["examples"] = tuple(tuple(example) for example in fields.get("examples", ()))
    return Prompt(**fields)


def _fill(text: str, values: dict[str, str]) -> str:
    """Fill `{slots}` in one pass, so that braces inside the values are left alone."""
    return re.sub(r"\{(\w+)\}", lambda slot: values.get(slot[1], slot[0]), text)


class PromptEncoder:
    """A prompt bound to a tokenizer: pairs in, token ids out.

    Attributes:
        frame (`str`): the whole prompt as text, special tokens included, with `{premise}` and `{hypothesis}` open.
        answers (`list[list[int]]`): the token ids that answer with each label, in the order of `LABELS`.
        answer_texts (`list[str]`): the same as text, what stands before and after the label word included.
        is_chat (`bool`): whether the tokenizer's chat template was used, rather than `Instruct: … Output:` (the form
            that Phi-2 was trained on, and a fair one for any base model without a template).

    Args:
        prompt: the prompt.
        tokenizer: a tokenizer with or without a chat template, padding on either side.
        train_on_end: whether the end of the turn is part of every answer. Needed where one label word begins another,
            and by users who will generate without constraints.

    Raises:
        UserError: if the template puts something between prompt and answer, if a token would span that boundary, or
            if one answer begins another.
    """

    def __init__(self, prompt: Prompt, tokenizer: PreTrainedTokenizerBase, *, train_on_end: bool = False):
        self.prompt = prompt
        self.tokenizer = tokenizer
        self.train_on_end = train_on_end
        self.is_chat = tokenizer.chat_template is not None
        self.frame, answers, end = _chat_frame(prompt, tokenizer) if self.is_chat else _plain_frame(prompt, tokenizer)
        if train_on_end and not end:
            raise UserError("train_on_end: this tokenizer has no end-of-sequence token to train on")
        self.answer_texts = [answer + end if train_on_end else answer for answer in answers]
        # A template writes its own beginning-of-sequence token; plain text leaves it to the tokenizer.
        self._prefix = [] if self.is_chat else _beginning(tokenizer)
        self._data_must_not_hold = re.compile("|".join(map(re.escape, tokenizer.all_special_tokens)) or r"(?!)")
        self.answers = self._encode_answers()

    def text(self, premise: str, hypothesis: str) -> str:
        """The prompt of one pair as the model reads it, up to where the answer starts."""
        return _fill(self.frame, {"premise": premise, "hypothesis": hypothesis})

    def encode(self, premises: Sequence[str], hypotheses: Sequence[str]) -> list[list[int]]:
        """Token ids of each pair's prompt, up to where the answer starts."""
        return self._tokenize(self._texts(premises, hypotheses))

    def encode_rows(
        self, pairs: Dataset, *, max_length: int | None, drop_too_long: bool = False, dropped: Counter | None = None
    ) -> Dataset:
        """Rows for TRL: `input_ids` = prompt + answer, `labels` = -100 on the prompt and the ids of the answer.

        The premise stays with them, for samplers that group by it.

        Args:
            pairs: three-way pairs as `sources.load_pairs` gives them.
            max_length: the longest row allowed, in tokens.
            drop_too_long: drop longer rows and count them in `dropped["too_long"]`, instead of raising.

        Raises:
            UserError: for a row that is too long, or whose tokens do not split between prompt and answer.
        """
        if pairs.features["label"].names != list(LABELS):
            raise UserError(f"training needs the three labels {', '.join(LABELS)}; this set has two")
        unused = [name for name in pairs.column_names if name != "premise"]
        rows = pairs.map(self._encode_batch, batched=True, remove_columns=unused, desc="Tokenizing")
        if max_length is None:
            return rows
        too_long = [index for index, ids in enumerate(rows["input_ids"]) if len(ids) > max_length]
        if too_long and not drop_too_long:
            worst = max(too_long, key=lambda index: len(rows[index]["input_ids"]))
            raise UserError(
                f"{len(too_long):,} of {len(rows):,} rows are longer than max_length {max_length} (the longest, "
                f"{pairs[worst]['uid']}, has {len(rows[worst]['input_ids'])} tokens); raise max_length or set "
                f"drop_too_long: true"
            )
        if dropped is not None:
            dropped["too_long"] += len(too_long)
        return rows.select(sorted(set(range(len(rows))) - set(too_long))) if too_long else rows

    @cached_property
    def instruction_tokens(self) -> int:
        """How many tokens all prompts begin with, whatever the pair."""
        return len(
            os.path.commonprefix(self.encode(["A dog runs.", "2 men sing"], ["Animals move.", "nobody's here"]))
        )

    def marked_example(self, pair: dict) -> Text:
        """One training row as text, the supervised tokens marked: what the loss sees, at a glance."""
        prompt_ids = self.encode([pair["premise"]], [pair["hypothesis"]])[0]
        marked = Text(self.tokenizer.decode(prompt_ids), style="dim")
        for token in self.answers[pair["label"]]:
            marked.append(f"[{self.tokenizer.decode([token])}]", style="bold reverse")
        return marked

    def _texts(self, premises: Sequence[str], hypotheses: Sequence[str]) -> list[str]:
        for premise, hypothesis in zip(premises, hypotheses, strict=True):
            found = self._data_must_not_hold.search(f"{premise}\n{hypothesis}")
            if found:  # it would end the turn, or begin one: whoever wrote the data could dictate the answer
                raise UserError(
                    f"the pair {premise!r} / {hypothesis!r} holds {found[0]!r}, a special token of this tokenizer; "
                    f"remove it"
                )
        return [self.text(*pair) for pair in zip(premises, hypotheses, strict=True)]

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        ids = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
        return [self._prefix + row for row in ids]

    def _encode_answers(self) -> list[list[int]]:
        # Two probes of different shapes; encode_rows repeats the check on every row that it makes.
        probes = [self.text("A dog runs.", "An animal moves."), self.text("2 men (in red) sing", "nobody's here!")]
        answers = []
        for word, text in zip(self.prompt.label_words, self.answer_texts, strict=True):
            prompt, other_prompt, full, other_full = self._tokenize([*probes, *(probe + text for probe in probes)])
            answer, other = full[len(prompt) :], other_full[len(other_prompt) :]
            if full[: len(prompt)] != prompt or answer != other or not answer:
                raise UserError(
                    f"prompt {self.prompt.name}: the tokens of the prompt are not a prefix of those of the prompt and "
                    f"{word!r}, so a token spans the boundary; end the user text with a line break or another sign"
                )
            answers.append(answer)
        for i, j in ((i, j) for i in range(len(answers)) for j in range(len(answers)) if i != j):
            if answers[i] == answers[j][: len(answers[i])]:
                raise UserError(
                    f"prompt {self.prompt.name}: the tokens of {self.prompt.label_words[i]!r} begin those of "
                    f"{self.prompt.label_words[j]!r}; choose other label_words, or set train_on_end: true"
                )
        return answers

    def _encode_batch(self, batch: dict[str, list]) -> dict[str, list]:
        texts = self._texts(batch["premise"], batch["hypothesis"])
        prompts = self._tokenize(texts)
        full = self._tokenize(
            [text + self.answer_texts[label] for text, label in zip(texts, batch["label"], strict=True)]
        )
        for uid, label, prompt, row in zip(batch["uid"], batch["label"], prompts, full, strict=True):
            if row != prompt + self.answers[label]:
                raise UserError(f"pair {uid}: a token spans the boundary between the prompt and its answer")
        labels = [
            [-100] * len(prompt) + self.answers[label] for prompt, label in zip(prompts, batch["label"], strict=True)
        ]
        return {"input_ids": full, "labels": labels}


def _chat_frame(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[str], str]:
    """(prompt text with open slots, answer texts, text that ends the answer's turn) through the chat template."""

    def render(messages: list[dict[str, str]], **arguments) -> str:
        return tokenizer.apply_chat_template(messages, tokenize=False, **TEMPLATE_ARGUMENTS, **arguments)

    turns = prompt.turns()
    try:
        frame = render(turns, add_generation_prompt=True)
    except Exception as error:  # jinja2's errors, and those that templates raise on roles they do not know
        raise UserError(f"prompt {prompt.name}: the chat template of the tokenizer refuses it ({error})") from error
    answers = []
    for word in prompt.label_words:
        full = render([*turns, {"role": "assistant", "content": word}])
        answer, found, end = full.removeprefix(frame).partition(word)
        if not full.startswith(frame) or not found or answer.strip():
            raise UserError(
                f"prompt {prompt.name}: the chat template does not continue its own generation prompt with {word!r} "
                f"but with {full[len(frame) :]!r}; the model would be trained on another text than it is asked"
            )
        answers.append(answer + word)
    end_tokens = [token for token in tokenizer.all_special_tokens if token in end]
    end = end[: min(end.index(token) + len(token) for token in end_tokens)] if end_tokens else ""
    return frame, answers, end


def _plain_frame(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[str], str]:
    """The same for a tokenizer without a chat template."""
    *before, last = prompt.turns()
    text = ""
    for turn in before:
        text += {"system": "{}\n\n", "user": "Instruct: {}\nOutput:", "assistant": " {}\n\n"}[turn["role"]].replace(
            "{}", turn["content"]
        )
    frame = f"{text}Instruct: {last['content']}\nOutput:"
    return frame, [f" {word}" for word in prompt.label_words], tokenizer.eos_token or ""


def _beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The beginning-of-sequence token, for tokenizers that start plain text with one."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []
