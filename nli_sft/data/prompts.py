"""Prompts, label words, and the encoder that turns pairs into token ids.

Training, scoring, generation, the model card and exports all use `PromptEncoder`, so that a model is evaluated on the
same text as it was trained on. An encoder guarantees, and checks on every row:

- a chat template renders its input once and unchanged, with a fixed date;
- no token spans the boundary between prompt and answer;
- each label has the same answer tokens for every pair, and no answer is a prefix of another;
- nothing is truncated: a row longer than `max_length` is an error, or is dropped and counted if requested.
"""

import difflib
import hashlib
import json
import logging
import os
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from rich.text import Text
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from .. import UserError
from ..configs import read_yaml
from ..labels import LABELS, check_labels, placeholder
from .segments import Segments, Texts, probes, split_template

logger = logging.getLogger(__name__)

# Defaults of chat templates that could make training and test prompts differ.
TEMPLATE_ARGUMENTS = {
    "enable_thinking": False,  # Qwen3 and others: answer with the label, without reasoning
    "date_string": "26 Jul 2024",  # Llama 3 puts today's date into the system turn
}
# The same date for templates that call `strftime_now`, a global of transformers. A macro overrides it in every
# renderer and is saved with the tokenizer.
TEMPLATE_DATE = "2024-07-26"
_DATE = {"Y": "2024", "y": "24", "m": "07", "-m": "7", "b": "Jul", "B": "July", "d": "26", "-d": "26", "e": "26"}
_DATE |= {"a": "Fri", "A": "Friday", "j": "208", "F": TEMPLATE_DATE, "D": "07/26/24", "p": "AM", "T": "00:00:00"}
_DATE |= {"H": "00", "-H": "0", "I": "12", "-I": "12", "M": "00", "-M": "0", "S": "00", "-S": "0", "f": "000000"}
_DATE |= {"c": "Fri Jul 26 00:00:00 2024", "x": "07/26/24", "X": "00:00:00", "r": "12:00:00 AM", "R": "00:00"}
_DATE |= {"h": "Jul", "C": "20", "G": "2024", "g": "24", "u": "5", "w": "5", "U": "29", "V": "30", "W": "30"}
_DATE |= {"-j": "208", "k": " 0", "l": "12", "P": "am", "Z": "", "z": "", "n": "\\n", "t": "\\t", "%": "%"}
_CLOCK = "{% macro strftime_now(format) %}{{ format"
_FIXED_CLOCK = (
    _CLOCK + "".join(f".replace('%{sign}', '{value}')" for sign, value in _DATE.items()) + " }}{% endmacro +%}"
)

ROW_SCHEMA = pa.schema({"input_ids": pa.list_(pa.int32()), "labels": pa.list_(pa.int64())})
ENCODED_AT_ONCE = 1000  # pairs
MIN_SEGMENTED = 100  # for fewer prompts, finding segments takes longer than tokenizing

HYPOTHESIS_ONLY = "hypothesis_only"
SLOTS = ("premise", "hypothesis")
# Placeholders, including the syntax of other template languages.
_PLACEHOLDER = re.compile(r"\$\{\w+\}|\{\{\s*[\w.-]+\s*\}\}|\{\s*[\w-]*(?:[.:!]\w*|\[\w*\])?\s*\}")

# Texts that a template might escape, shorten or rewrite.
_PROBES = (
    ("A dog's \"bone\" <b>costs</b> 5 & 10 €;  {x}\nC:\\new  'It's", "nobody's HERE!\n\n50% of 'em; <2 \"men\" & É"),
    ("2 men (in red) sing", "<i>A</i> dog &amp; a cat"),
    (f"{string.printable.strip()} a\tb", "a\u00a0b\u2009c « – — ‘ ’ “ ” … ¿ ß ñ e\u0301 \u200b 日本語。！ عربي अब 😀"),
    ("The men walk. They talk... " * 1000, "http://a.b/?c=1#d " * 1000 + "end"),  # long enough to be truncated
    *((f"It ends{end}", f"So does this{end}") for end in (".", "?", "!", ",", ":", '"', ")", "*", "`", "-")),
)
_ANOTHER_TEMPLATE = "name another template with chat_template_path: a .jinja file, or a model that has one"
_MOVE_SYSTEM = ", or move the system text to the user text"


@dataclass(frozen=True)
class Prompt:
    """The prompt template, and the words that answer it.

    `user` holds the slots `{premise}` and `{hypothesis}`, and may hold `{labels}` (all label words as a list) and a
    placeholder for the word of one label, such as `{entailment}` (see `labels.placeholder`).
    """

    name: str
    user: str
    labels: tuple[str, ...] = LABELS
    label_words: tuple[str, ...] = ()  # in the order of `labels`, which they are by default
    system: str | None = None
    examples: tuple[tuple[str, str, str], ...] = ()  # (premise, hypothesis, label name), shown before the pair

    def __post_init__(self):
        if not self.name:
            raise UserError("a prompt needs a name; its own is empty")
        object.__setattr__(self, "labels", check_labels(self.labels))
        object.__setattr__(self, "label_words", tuple(self.label_words) or self.labels)
        texts = (
            self.user,
            self.system or "",
            *self.label_words,
            *(text for example in self.examples for text in example),
        )
        if re.search(r"[\ud800-\udfff]", "".join(texts)):
            raise UserError(f"prompt {self.name}: it holds a lone surrogate; remove it")
        _check_placeholders(self.name, "user", self.user, (*SLOTS, "labels", *self._placeholders))
        _check_placeholders(self.name, "system", self.system or "", ("labels", *self._placeholders))
        self._check_slots()
        words, n = self.label_words, len(self.labels)
        if len(words) != n or len({word.lower() for word in words}) != n or not all(words):
            raise UserError(
                f"prompt {self.name}: label_words must be {n} different words, for {', '.join(self.labels)}"
            )
        for word in words:
            if word != word.strip():
                raise UserError(f"prompt {self.name}: the label word {word!r} begins or ends with a space; remove it")
        for *_, label in self.examples:
            if label not in self.labels:
                raise UserError(f"prompt {self.name}: example label {label!r} is not one of {', '.join(self.labels)}")

    def _check_slots(self) -> None:
        if "{hypothesis}" not in self.user:
            raise UserError(f"prompt {self.name}: the user text has no {{hypothesis}} slot")
        if not self.reads_premise and self.name != HYPOTHESIS_ONLY:
            raise UserError(
                f"prompt {self.name}: the user text has no {{premise}} slot, so the model would not see the premise; "
                f"add it, or name the prompt {HYPOTHESIS_ONLY} for a hypothesis-only baseline"
            )
        if self.reads_premise and self.name == HYPOTHESIS_ONLY:
            raise UserError(f"prompt {self.name}: it reads the premise; give it another name, or remove {{premise}}")
        for text in (*self.label_words, *(text for example in self.examples for text in example)):
            if "{premise}" in text or "{hypothesis}" in text:
                raise UserError(
                    f"prompt {self.name}: {text!r} holds a slot, which every pair would fill; "
                    f"slots stand in the user text alone"
                )

    @property
    def reads_premise(self) -> bool:
        return "{premise}" in self.user

    @property
    def _placeholders(self) -> list[str]:
        return [placeholder(label) for label in self.labels]

    @property
    def fits_any_labels(self) -> bool:
        """Whether it names no label, other than all of them as `{labels}`."""
        return not self.examples and not any(
            f"{{{one}}}" in self.user + (self.system or "") for one in self._placeholders
        )

    def with_labels(self, labels: Sequence[str], label_words: Sequence[str] | None = None) -> "Prompt":
        """The same prompt for other labels; the words are the labels by default."""
        return replace(self, labels=tuple(labels), label_words=tuple(label_words or ()))

    @property
    def fingerprint(self) -> str:
        """A hash (16 hexadecimal digits) of everything but the name. It does not depend on the model."""
        content = {key: value for key, value in asdict(self).items() if key != "name"}
        if self.labels == LABELS:
            del content["labels"]  # as in runs from before there were others
        return _digest(content)

    def turns(self) -> list[dict[str, str]]:
        """Chat messages, with the slots `{premise}` and `{hypothesis}` unfilled in the last one."""
        words = dict(zip(self._placeholders, self.label_words, strict=True), labels=listed(self.label_words))
        user = _fill(self.user, words)
        turns = [{"role": "system", "content": _fill(self.system, words)}] if self.system else []
        for premise, hypothesis, label in self.examples:
            turns.append({"role": "user", "content": _fill(user, {"premise": premise, "hypothesis": hypothesis})})
            turns.append({"role": "assistant", "content": words[placeholder(label)]})
        return [*turns, {"role": "user", "content": user}]


def listed(words: Sequence[str]) -> str:
    """`yes, maybe or no`"""
    return f"{', '.join(words[:-1])} or {words[-1]}"


def _check_placeholders(prompt: str, key: str, text: str, known: Sequence[str]) -> None:
    """Refuse placeholders that nothing would fill."""
    for found in _PLACEHOLDER.findall(text):
        if found[1:-1] not in known:
            near = difflib.get_close_matches(re.sub(r"[${}\s]", "", found).lower(), known, n=1)
            hint = (
                f"did you mean {{{near[0]}}}?" if near else f"there are {', '.join(f'{{{name}}}' for name in known)}"
            )
            raise UserError(f"prompt {prompt}: {key} holds {found}, which nothing fills; {hint}")


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]


_QUESTION = "Does the premise entail the hypothesis? Answer {labels}.\n"

# Shared text comes first and the hypothesis last, so that on a trie (trie.py) a pair costs little more than its
# hypothesis. With the question after the pair, SNLI prompts take more than twice the tokens.
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
        # The hypothesis-only baseline: its accuracy shows how much hypotheses alone reveal about the label.
        Prompt(name=HYPOTHESIS_ONLY, user=_QUESTION + "Hypothesis: {hypothesis}"),
    )
}


def load_prompt(name: str, label_words: Sequence[str] | None = None, labels: Sequence[str] | None = None) -> Prompt:
    """A built-in prompt by name, or the user's own from a .yaml or .json file with the fields of `Prompt`.

    Args:
        label_words: instead of those of the file, or the labels.
        labels: the label set; by default that of the file, or SNLI's.

    Raises:
        UserError: if there is no such prompt, it is invalid, or it is for other labels.
    """
    if name in PROMPTS:
        prompt = _built_in(name, LABELS if labels is None else check_labels(labels))
    elif Path(name).suffix.lower() in (".yaml", ".yml", ".json"):
        prompt = _read_prompt(Path(name).expanduser(), None if labels is None else check_labels(labels))
    else:
        raise UserError(f"prompt: {name!r} is neither built in ({', '.join(PROMPTS)}) nor a .yaml or .json file")
    return replace(prompt, label_words=tuple(label_words)) if label_words else prompt


def _built_in(name: str, labels: tuple[str, ...]) -> Prompt:
    if labels == LABELS:
        return PROMPTS[name]
    if not PROMPTS[name].fits_any_labels:
        fitting = [other for other, prompt in PROMPTS.items() if prompt.fits_any_labels and prompt.reads_premise]
        raise UserError(
            f"prompt {name} is written for the labels {', '.join(LABELS)}; for {', '.join(labels)} take "
            f"{' or '.join(fitting)}, or your own in a .yaml file that says {{labels}}"
        )
    return PROMPTS[name].with_labels(labels)


def _read_prompt(path: Path, labels: tuple[str, ...] | None) -> Prompt:
    # Read as values and as text: YAML converts yes, no and 1.0, which are words here.
    fields: dict[str, Any]
    written: dict[str, Any]
    fields, written = _read_json(path) if path.suffix.lower() == ".json" else (read_yaml(path), read_yaml(path, True))
    known = {"name", "user", "labels", "label_words", "system", "examples"}
    unknown = [key for key in fields if key not in known]
    if "user" not in fields or unknown:
        wrong = f"unknown key {unknown[0]!r}" if unknown else "the key user is missing"
        raise UserError(f"{path}: {wrong}; a prompt has user and, if wanted, {', '.join(sorted(known - {'user'}))}")
    for key in fields.keys() & {"name", "user", "system"}:
        if not isinstance(fields[key], str) and not (key == "system" and fields[key] is None):
            raise UserError(f"{path}: {key} is {fields[key]!r}; expected text, in quotes")
    texts: dict[str, Any] = {"name": path.stem} | {
        key: fields[key] for key in fields.keys() & {"name", "user", "system"}
    }
    for key in fields.keys() & {"labels", "label_words"}:
        texts[key] = _texts(fields[key], written.get(key), f"{path}: {key}")
    if labels is not None and texts.setdefault("labels", labels) != labels:
        raise UserError(
            f"{path} is for the labels {', '.join(texts['labels'])}, not {', '.join(labels)}; set labels to these, or "
            f"take another prompt"
        )
    if "examples" in fields:
        examples = fields["examples"]
        if not isinstance(examples, list):
            raise UserError(f"{path}: examples is {examples!r}; expected a list of [premise, hypothesis, label]")
        texts["examples"] = tuple(
            _texts(example, words, f"{path}: example {number}", length=3)
            for number, (example, words) in enumerate(zip(examples, written.get("examples", examples), strict=True), 1)
        )
    return Prompt(**texts)


def _texts(value: Any, written: Any, where: str, length: int | None = None) -> tuple[str, ...]:
    """A list of texts, as written in the file."""
    words = written or value
    is_list = isinstance(value, list) and len(value) == (length or len(value))
    if not is_list or not all(isinstance(word, str) for word in words):
        raise UserError(f"{where} is {value!r}; expected a list of {f'{length} ' if length else ''}texts")
    return tuple(words)


def _read_json(path: Path) -> tuple[dict, dict]:
    """The keys of a JSON file, with parsed values and with values as text."""

    def once(items: list[tuple[str, object]]) -> dict:
        repeated = [key for key, count in Counter(key for key, _ in items).items() if count > 1]
        if repeated:
            raise UserError(f"{path}: key {repeated[0]!r} is there more than once; keep one")
        return dict(items)

    def as_written(value: object) -> object:
        if isinstance(value, list):
            return [as_written(item) for item in value]
        return value if isinstance(value, (str, dict)) else json.dumps(value)

    try:
        fields = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=once)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text; save it as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error})") from error
    if not isinstance(fields, dict):
        raise UserError(f"{path}: expected an object with the key user")
    return fields, {key: as_written(value) for key, value in fields.items()}


def _fill(text: str, values: Mapping[str, str]) -> str:
    """Fill `{slots}` in one pass, so that braces inside the values are left alone."""
    return re.sub(r"\{(\w+)\}", lambda slot: values.get(slot[1], slot[0]), text)


class PromptEncoder:
    """Encodes pairs as token ids, with one prompt and one tokenizer.

    Attributes:
        template (`str`): the prompt template as text, special tokens included, with `{premise}` and `{hypothesis}`.
        answers (`list[list[int]]`): the token ids that answer with each label, in the order of the prompt's labels.
        answer_texts (`list[str]`): the same as text, including what comes before and after the label word.
        is_chat (`bool`): whether the tokenizer's chat template was used, rather than `Instruct: … Output:` (the form
            that Phi-2 was trained on, and a fair one for any base model without a template).

    Args:
        prompt: the prompt.
        tokenizer: a tokenizer with or without a chat template, padding on either side. A template that reads the clock
            is given a fixed date, in the tokenizer itself, so that what is saved and served asks the same.
        train_on_end: whether the end of the turn is part of every answer. Needed where one label word begins another,
            and by users who will generate without constraints.
        max_length: tokens of the longest pair that the model was trained on; `encode` warns of the first longer one.

    Raises:
        UserError: if the template refuses the prompt, leaves out, repeats or changes any of it, or puts something
            between prompt and answer; if a token would span that boundary, or if one answer begins another.
    """

    def __init__(
        self,
        prompt: Prompt,
        tokenizer: PreTrainedTokenizerBase,
        *,
        train_on_end: bool = False,
        max_length: int | None = None,
    ):
        self.prompt = prompt
        self.tokenizer = tokenizer
        self.train_on_end = train_on_end
        self.max_length = None  # the prompts below are no pairs
        self.is_chat = tokenizer.chat_template is not None
        if self.is_chat:
            _fix_date(tokenizer)
        self.template, answers, end = (
            _chat_template(prompt, tokenizer) if self.is_chat else _plain_template(prompt, tokenizer)
        )
        if train_on_end and not end:
            lacks = (
                "chat template ends an answer with no token" if self.is_chat else "tokenizer has no end-of-sequence"
            )
            raise UserError(f"train_on_end: the {lacks}{'' if self.is_chat else ' token'} to train on; leave it out")
        self.answer_texts = [answer + end if train_on_end else answer for answer in answers]
        # A template writes its own beginning-of-sequence token; plain text leaves it to the tokenizer.
        self._prefix = [] if self.is_chat else _beginning(tokenizer)
        self._data_must_not_hold = re.compile("|".join(map(re.escape, control_tokens(tokenizer))) or r"(?!)")
        self._check_texts()
        self.answers = self._encode_answers()
        self.max_length = max_length

    def text(self, premise: str, hypothesis: str) -> str:
        """The prompt of one pair as the model reads it, up to where the answer starts.

        The two are stripped, as pairs to train on are: many templates do so with what stands at the end of a turn.
        """
        return _fill(self.template, {"premise": premise.strip(), "hypothesis": hypothesis.strip()})

    @cached_property
    def rendered(self) -> dict[str, str]:
        """What `run.json` keeps to detect that a prompt renders differently than in training.

        `frame` is a hash (16 hexadecimal digits) of the rendered template's text and token ids, `answers` one of the
        answers' token ids. `template_date` is the date that chat templates were given as today's.
        """
        return {
            "frame": _digest([self.template, *self._tokenize([self.template])]),
            "answers": _digest(self.answers),
            "template_date": TEMPLATE_DATE,
        }

    def check_rendered(self, trained: Mapping[str, str] | None, where: str | Path) -> None:
        """Compare with the `rendered` that `where` was trained with; `None` is of a run that did not keep it.

        Raises:
            UserError: if the prompt or the answers are others.
        """
        for key, what in (("frame", "prompt as rendered differs"), ("answers", "answers' token ids differ")):
            if trained is not None and trained.get(key) != self.rendered[key]:
                raise UserError(
                    f"{where}: the {what} from what was trained (hash {self.rendered[key]}, not "
                    f"{trained.get(key)}), so the model would get other prompts than in training; restore the "
                    f"chat template, the tokenizer, the prompt and train_on_end of that training"
                )

    def encode(self, premises: Sequence[str], hypotheses: Sequence[str]) -> list[list[int]]:
        """Token ids of each pair's prompt, up to where the answer starts."""
        pairs = self._clean(premises, hypotheses)
        segments = self._checked_segments(pairs)
        prompts = segments(pairs) if segments else self._tokenize(self._fill_template(pairs))
        self._check_length(prompts)
        return prompts

    def _check_length(self, prompts: list[list[int]]) -> None:
        longest = max(map(len, prompts), default=0) + max(map(len, self.answers))
        if self.max_length is not None and longest > self.max_length:
            logger.warning(
                "The longest pair has %s tokens with its prompt, but the model was trained on pairs of at most %s "
                "(max_length); expect more errors on longer ones.",
                f"{longest:,}",
                f"{self.max_length:,}",
            )
            self.max_length = None  # warn once

    def encode_rows(
        self, pairs: Dataset, *, max_length: int | None, drop_too_long: bool = False, dropped: Counter | None = None
    ) -> Dataset:
        """Rows for TRL: `input_ids` = prompt + answer, `labels` = -100 on the prompt and the ids of the answer.

        The premise stays with them, for samplers that group by it.

        Args:
            pairs: as `sources.load_pairs` gives them, with the labels of the prompt.
            max_length: the longest row allowed, in tokens.
            drop_too_long: drop longer rows and count them in `dropped["too_long"]`, instead of raising.

        Raises:
            UserError: for a row that is too long, or whose tokens do not split between prompt and answer.
        """
        if (names := pairs.features["label"].names) != list(self.prompt.labels):
            raise UserError(
                f"training needs the labels {', '.join(self.prompt.labels)}, but this set has {', '.join(names)}; set "
                f"labels to these"
            )
        rows = self._encode_all(pairs)
        if max_length is None:
            return rows
        lengths = row_lengths(rows)
        too_long = lengths > max_length
        if too_long.any() and not drop_too_long:
            raise UserError(
                f"{too_long.sum():,} of {len(rows):,} rows are longer than max_length {max_length} (the longest, "
                f"{pairs[int(lengths.argmax())]['uid']}, has {lengths.max()} tokens); raise max_length or set "
                f"drop_too_long: true"
            )
        if too_long.all() and len(rows):
            raise UserError(
                f"max_length {max_length} leaves no pair; the shortest has {lengths.min()} tokens: raise it"
            )
        if dropped is not None:
            dropped["too_long"] += int(too_long.sum())
        return rows.select(np.flatnonzero(~too_long)) if too_long.any() else rows

    @cached_property
    def instruction_tokens(self) -> int:
        """The number of tokens shared by the beginnings of all prompts."""
        return len(
            os.path.commonprefix(self.encode(["A dog runs.", "2 men sing"], ["Animals move.", "nobody's here"]))
        )

    def marked_example(self, pair: dict) -> Text:
        """One training row as text, with the tokens marked that the loss is on."""
        prompt_ids = self.encode([pair["premise"]], [pair["hypothesis"]])[0]
        marked = Text(str(self.tokenizer.decode(prompt_ids)), style="dim")
        for token in self.answers[pair["label"]]:
            marked.append(f"[{self.tokenizer.decode([token])}]", style="bold reverse")
        return marked

    def _check_texts(self) -> None:
        """See that the prompt's own texts hold no control token: a template writes these, and no answer has one.

        Without a template they may stand in the texts around a pair, which nothing else writes.
        """
        texts = [turn["content"] for turn in self.prompt.turns()] if self.is_chat else []
        for text in (*self.prompt.label_words, *texts):
            if found := self._data_must_not_hold.search(text):
                raise UserError(
                    f"prompt {self.prompt.name}: {text!r} holds {found[0]!r}, a control token of this tokenizer; "
                    f"remove it{', since the chat template writes it' if self.is_chat else ''}"
                )

    def check_pair(self, premise: str, hypothesis: str) -> None:
        """Raise `UserError` if one of the two holds a control token of the tokenizer."""
        found = self._data_must_not_hold.search(f"{premise}\n{hypothesis}")
        if found:  # it could end the turn, so that the data would dictate the answer
            raise UserError(
                f"the pair {premise!r} / {hypothesis!r} holds {found[0]!r}, a control token of this tokenizer; remove "
                f"it"
            )

    def _clean(self, premises: Sequence[str], hypotheses: Sequence[str]) -> Texts:
        """The texts of pairs by slot, stripped as in `text`, once they are known to hold no control token."""
        premises, hypotheses = premises[:], hypotheses[:]  # a column of a Dataset is slow to go through
        for premise, hypothesis in zip(premises, hypotheses, strict=True):
            self.check_pair(premise, hypothesis)
        return {"premise": [text.strip() for text in premises], "hypothesis": [text.strip() for text in hypotheses]}

    def _fill_template(self, pairs: Texts) -> list[str]:
        return [self.text(*pair) for pair in zip(pairs["premise"], pairs["hypothesis"], strict=True)]

    @cached_property
    def _segments(self) -> Segments | None:
        """The template in segments, if they give the same tokens as full prompts for all probes."""
        pairs = probes(self.tokenizer, control_tokens(self.tokenizer))
        parts = split_template(self.template, self.tokenizer, pairs)
        if parts is None:
            return None
        segments = Segments(self.tokenizer.backend_tokenizer, self._prefix, parts)  # pyright: ignore[reportArgumentType]
        return segments if self._are_same(segments, pairs) else None

    def _checked_segments(self, pairs: Texts) -> Segments | None:
        """The segments, if they give the same tokens as full prompts for these pairs too."""
        if len(pairs["premise"]) < MIN_SEGMENTED or self._segments is None:
            return None
        unseen = self._segments.unseen(pairs)
        if not self._are_same(self._segments, {slot: [texts[row] for row in unseen] for slot, texts in pairs.items()}):
            self._segments = None
        return self._segments

    def _are_same(self, segments: Segments, pairs: Texts) -> bool:
        """Whether segments give the same tokens as full prompts, alone and followed by each answer."""
        prompts, texts = segments(pairs), self._fill_template(pairs)
        return prompts == self._tokenize(texts) and all(
            [prompt + answer for prompt in prompts] == self._tokenize([text + answer_text for text in texts])
            for answer, answer_text in zip(self.answers, self.answer_texts, strict=True)
        )

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
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
                    f"prompt {self.prompt.name}: a token spans the boundary between {self.template[-20:]!r}, where "
                    f"the prompt ends, and {text!r}; "
                    + (_ANOTHER_TEMPLATE if self.is_chat else "take another label word or another tokenizer")
                )
            unknown = self.tokenizer.unk_token_id
            if unknown in answer and unknown != self.tokenizer.eos_token_id:  # which are one in GPT-2
                raise UserError(
                    f"prompt {self.prompt.name}: the tokenizer has no tokens for the label word {word!r} "
                    f"(it writes {self.tokenizer.unk_token}); choose other label_words"
                )
            answers.append(answer)
        for i, j in ((i, j) for i in range(len(answers)) for j in range(len(answers)) if i != j):
            if answers[i] == answers[j][: len(answers[i])]:
                raise UserError(
                    f"prompt {self.prompt.name}: the tokens of {self.prompt.label_words[i]!r} begin those of "
                    f"{self.prompt.label_words[j]!r}; choose other label_words, or set train_on_end: true"
                )
        return answers

    def _encode_all(self, pairs: Dataset) -> Dataset:
        texts = self._clean(pairs["premise"], pairs["hypothesis"])
        segments, labels, uids = self._checked_segments(texts), pairs["label"][:], pairs["uid"][:]
        batches = []
        silent = datasets.are_progress_bars_disabled()  # as by disable_tqdm
        with tqdm(total=len(pairs), desc="Tokenizing", unit="pair", leave=None, disable=silent) as bar:
            for start in range(0, len(pairs), ENCODED_AT_ONCE):
                part = slice(start, start + ENCODED_AT_ONCE)
                own = {slot: texts[slot][part] for slot in SLOTS}
                if segments:
                    prompts = segments(own)
                    rows = [prompt + self.answers[label] for prompt, label in zip(prompts, labels[part], strict=True)]
                else:
                    rows = self._encode_whole(own, labels[part], uids[part])
                batches.append(self._supervise(rows, labels[part]))
                bar.update(len(rows))
        table = pa.Table.from_batches(batches, ROW_SCHEMA)
        return Dataset(table.add_column(0, "premise", pairs.with_format("arrow")[:]["premise"]))

    def _encode_whole(self, pairs: Texts, labels: list[int], uids: list[str]) -> list[list[int]]:
        texts = self._fill_template(pairs)
        prompts = self._tokenize(texts)
        rows = self._tokenize([text + self.answer_texts[label] for text, label in zip(texts, labels, strict=True)])
        for uid, label, prompt, row in zip(uids, labels, prompts, rows, strict=True):
            if row != prompt + self.answers[label]:
                raise UserError(f"pair {uid}: a token spans the boundary between the prompt and its answer")
        return rows

    def _supervise(self, rows: list[list[int]], labels: list[int]) -> pa.RecordBatch:
        """`input_ids` and, with -100 on the prompt, `labels`."""
        input_ids = pa.array(rows, ROW_SCHEMA.field("input_ids").type)
        ends = input_ids.offsets.to_numpy()
        answers = ends[1:] - [len(self.answers[label]) for label in labels]  # where they start
        target = input_ids.values.to_numpy().astype(np.int64)
        target[np.arange(len(target)) < np.repeat(answers, np.diff(ends))] = -100
        return pa.record_batch([input_ids, pa.ListArray.from_arrays(input_ids.offsets, target)], ROW_SCHEMA)


def row_lengths(rows: Dataset) -> np.ndarray:
    """(n,) tokens in each of the rows of `PromptEncoder.encode_rows`."""
    return pc.list_value_length(  # pyright: ignore[reportAttributeAccessIssue] (generated by pyarrow)
        rows.with_format("arrow")[:]["input_ids"]
    ).to_numpy()


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """All tokens that a tokenizer finds in a text before it splits it, the longest first.

    Runs of white space (Phi-2 has them) and plain words that somebody added are not: they are text.
    """
    added = {
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if token.special or not re.fullmatch(r"[\w\s'’-]+", token.content)
    }
    found = added | set(tokenizer.all_special_tokens)
    return sorted((token for token in found if token.strip()), key=lambda token: (-len(token), token))


def _fix_date(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give the templates of a tokenizer a `strftime_now` of their own that does not read the clock."""

    def fixed(template: str) -> str:
        reads_clock = "strftime_now" in template and not template.startswith(_CLOCK)
        return _FIXED_CLOCK + template if reads_clock else template

    templates = tokenizer.chat_template
    named = isinstance(templates, dict)
    tokenizer.chat_template = {k: fixed(t) for k, t in templates.items()} if named else fixed(templates)


def _chat_template(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[str], str]:
    """(prompt text with open slots, answer texts, text that ends the answer's turn) through the chat template."""

    def render(messages: list[dict[str, str]], **arguments) -> str:
        try:
            return str(tokenizer.apply_chat_template(messages, tokenize=False, **TEMPLATE_ARGUMENTS, **arguments))
        except Exception as error:  # jinja2's errors, and those that templates raise on roles they do not know
            reason = " ".join(str(error).split())
            raise UserError(
                f"prompt {prompt.name}: the chat template of the tokenizer refuses it ({reason}); "
                f"{_ANOTHER_TEMPLATE}{_MOVE_SYSTEM if prompt.system else ''}"
            ) from error

    turns = prompt.turns()
    template = render(turns, add_generation_prompt=True)
    _check_turns(prompt, render)
    _check_slots_stay_open(prompt, template, render)
    answers = []
    for word in prompt.label_words:
        full = render([*turns, {"role": "assistant", "content": word}])
        answer, found, end = full.removeprefix(template).partition(word)
        if not full.startswith(template) or not found or answer.strip():
            asked = turns[-1]["content"].strip()
            start = min(template.rfind(asked) + len(asked), len(os.path.commonprefix([template, full])))
            bridge, _, _ = full[start:].partition(word)
            copy = f", such as a .jinja copy of this one that asks with {bridge!r}"
            raise UserError(
                f"prompt {prompt.name}: the chat template does not continue its own generation prompt with {word!r}: "
                f"after the pair it asks with {template[start:]!r}, and answers with {full[start:]!r}, so the model "
                f"would be trained on another text than it is asked; {_ANOTHER_TEMPLATE}"
                f"{_MOVE_SYSTEM if asked in bridge else copy}"
            )
        answers.append(answer + word)
    end_tokens = [token for token in control_tokens(tokenizer) if token in end]
    end = end[: min(end.index(token) + len(token) for token in end_tokens)] if end_tokens else ""
    return template, answers, end


def _check_turns(prompt: Prompt, render: Callable[..., str]) -> None:
    """See that a template writes every turn once. Marks at their ends tell turns apart that hold the same text."""
    marks = [f"(({n}))" for n in range(1, len(prompt.turns()) + 1)]
    turns = [
        turn | {"content": f"{turn['content'].strip()} {mark}"}
        for turn, mark in zip(prompt.turns(), marks, strict=True)
    ]
    rendered = render(turns, add_generation_prompt=True)
    for turn, mark in zip(turns, marks, strict=True):
        if rendered.count(turn["content"]) == 1:
            continue
        times = rendered.count(mark)
        what = {0: "leaves out or changes", 1: "changes"}.get(times, "repeats")
        role = {"system": "system text", "user": "user text", "assistant": "answer of an example"}[turn["role"]]
        move = _MOVE_SYSTEM if turn["role"] == "system" else ""
        raise UserError(
            f"prompt {prompt.name}: the chat template of the tokenizer {what} the {role} "
            f"{turn['content'].removesuffix(mark).strip()!r}; {_ANOTHER_TEMPLATE}{move}"
        )


def _check_slots_stay_open(prompt: Prompt, template: str, render: Callable[..., str]) -> None:
    """See that a template leaves a pair's text as it is: then it may be filled in after rendering."""
    *before, last = prompt.turns()
    for probe in _PROBES:
        pair = {"premise": probe[0], "hypothesis": probe[1]}
        rendered = render([*before, last | {"content": _fill(last["content"], pair)}], add_generation_prompt=True)
        filled = _fill(template, pair)
        if rendered != filled:
            start = max(len(os.path.commonprefix([rendered, filled])) - 20, 0)
            raise UserError(
                f"prompt {prompt.name}: the chat template of the tokenizer changes the text of a pair: it writes "
                f"{rendered[start : start + 60]!r}, not {filled[start : start + 60]!r}; {_ANOTHER_TEMPLATE}"
            )


def _plain_template(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[str], str]:
    """The same for a tokenizer without a chat template."""
    *before, last = prompt.turns()
    text = ""
    for turn in before:
        text += {"system": "{}\n\n", "user": "Instruct: {}\nOutput:", "assistant": " {}\n\n"}[turn["role"]].replace(
            "{}", turn["content"]
        )
    template = f"{text}Instruct: {last['content']}\nOutput:"
    return template, [f" {word}" for word in prompt.label_words], str(tokenizer.eos_token or "")


def _beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The beginning-of-sequence token, for tokenizers that start plain text with one."""
    bos: Any = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []
