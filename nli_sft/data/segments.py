"""Tokenize prompts in segments, so that shared text is tokenized once.

All prompts of a run fill one template. It is split into a beginning and an end that all prompts share, a segment
around the premise, which NLI sets repeat, and one around the hypothesis. Every split is checked:

- it lies inside the template, not next to a text, and between two words of the pre-tokenizer;
- for texts with unusual beginnings and ends (`probes`), segments give the same tokens as full prompts;
- the same is checked on data, for the first prompt with each new beginning or end of a text (`Segments.unseen`).

Some tokenizers cannot be used with segments: slow ones, and those that do not split text into words first (Llama 2,
Gemma).
"""

import re
from collections.abc import Sequence
from itertools import chain

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

_SLOT = re.compile(r"\{(premise|hypothesis)\}")
# Texts that begin and end in ways which tokenizers treat differently.
_PROBES = (
    "A dog runs.", "2 men sing", "", "a", "É", "'s here", "the dogs'", "I'm", "don't", '"Stop!"', "(in red)", "{x}",
    "... and so", "well...", "?!", "12345", "1", "$5", "50%", "#7", "-", "--x--", "_a_", "<b>so</b>", "&amp;", "##a",
    "x=1;", "C:\\new", "/path/", "http://a.b/", "U.S.A", "McDonald", "THE END", "ñ", "e\u0301", "\u0301x", "日本語",
    "你好。", "अब", "ไทย", "عربي", "😀", "👩\u200d🚀 a", "a\u200b", "\u200ba", "▁a▁", "Ġa", "¿a?", "ﬁ", "a\nb", "a\tb",
)  # fmt: skip
_MAX_DISTANCE = 64  # how far from a text a split is tried, in characters of the template
_EDGE = 2  # characters at either end of a text that are compared with those of earlier texts
_CACHE_SIZE = 2**16  # segments; most sets list the pairs of a premise together

Texts = dict[str, Sequence[str]]  # the premises and hypotheses of pairs, by slot


class Segments:
    """A template split into segments. Turns pairs into the token ids of their prompts.

    Args:
        backend: the backend of a fast tokenizer.
        prefix: token ids before every prompt, such as that of the beginning of a sequence.
        parts: the parts of the template, as `split_template` returns them.
    """

    def __init__(self, backend: Tokenizer, prefix: list[int], parts: Sequence[str]):
        self._backend = backend
        head, *middle, tail = parts
        self._head, self._tail = self._tokenize([head, tail])
        self._head = prefix + self._head
        self._middle = [_SLOT.split(part) for part in middle]  # text before, slot, text after
        self._known: list[dict[str, list[int]]] = [{} for _ in middle]
        self._seen: set[tuple[str, str, str]] = set()

    def __call__(self, pairs: Texts) -> list[list[int]]:
        """The token ids of each pair's prompt."""
        segments = []
        for (before, slot, after), known in zip(self._middle, self._known, strict=True):
            if len(known) > _CACHE_SIZE:
                known.clear()
            new = [text for text in dict.fromkeys(pairs[slot]) if text not in known]
            known.update(zip(new, self._tokenize([f"{before}{text}{after}" for text in new]), strict=True))
            segments.append([known[text] for text in pairs[slot]])
        return [[*self._head, *chain(*row), *self._tail] for row in zip(*segments, strict=True)]

    def unseen(self, pairs: Texts) -> list[int]:
        """Indices of pairs with a text that begins or ends as no text did before. Counts them as seen."""
        found = {}
        for _, slot, _ in self._middle:
            for row, text in enumerate(pairs[slot]):
                found.setdefault((slot, "begins", text[:_EDGE]), row)
                found.setdefault((slot, "ends", text[-_EDGE:]), row)
        rows = {row for end, row in found.items() if end not in self._seen}
        self._seen.update(found)
        return sorted(rows)

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        # Calling the tokenizer itself also computes offsets, which doubles the time.
        self._backend.no_padding()
        self._backend.no_truncation()
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]


def probes(tokenizer: PreTrainedTokenizerBase, control_tokens: Sequence[str]) -> Texts:
    """Pairs of unusual texts, including added tokens that data may contain, as these can absorb white space."""
    added = {token.content.strip() for token in tokenizer.added_tokens_decoder.values()} - set(control_tokens)
    texts = [*_PROBES, *sorted(added)]
    return {"premise": texts, "hypothesis": [*texts[7:], *texts[:7]]}


def split_template(template: str, tokenizer: PreTrainedTokenizerBase, pairs: Texts) -> list[str] | None:
    """Split a template for `Segments`.

    Args:
        pairs: texts for which the parts must have the same tokens as the filled template.

    Returns:
        The beginning of all prompts, one part around each slot, and the end of all prompts; `None` if the tokenizer
        allows no split before, between or after the texts.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.pre_tokenizer is None:
        return None

    def fill(part: str, number: int) -> str:
        return _SLOT.sub(lambda slot: pairs[slot[1]][number], part)

    def words(text: str) -> list[str]:
        normal = backend.normalizer.normalize_str(text) if backend.normalizer else text
        return [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(normal)]

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    prompts = [fill(template, number) for number in range(len(pairs["premise"]))]
    expected = [(words(prompt), ids(prompt)) for prompt in prompts]

    def is_safe(place: int) -> bool:
        for number, (prompt_words, prompt_ids) in enumerate(expected):
            left, right = fill(template[:place], number), fill(template[place:], number)
            if words(left) + words(right) != prompt_words or ids(left) + ids(right) != prompt_ids:
                return False
        return True

    edges = [0, *chain.from_iterable(slot.span() for slot in _SLOT.finditer(template)), len(template)]
    splits = [0]
    for start, end in zip(edges[::2], edges[1::2], strict=True):
        places = range(start + 1, end)
        # As close to the text as possible, since all that is further away is tokenized only once.
        near = places[:_MAX_DISTANCE] if end == len(template) else places[: -_MAX_DISTANCE - 1 : -1]
        place = next(filter(is_safe, near), None)
        if place is None:
            return None
        splits.append(place)
    return [template[start:end] for start, end in zip(splits, [*splits[1:], len(template)], strict=True)]
