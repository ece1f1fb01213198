"""Tokenize prompts in segments, so that shared text is tokenized once.

All prompts of a run fill one template. It is split into a beginning and an end that all prompts share, a segment
around the premise, which NLI sets repeat, and one around the hypothesis. Every split is checked:

- it lies inside the template, never at the edge of a text, and between two words of the pre-tokenizer;
- for texts with unusual beginnings and ends (`probes`), segments give the tokens of whole prompts;
- the same is checked on data, for the first prompt with each new beginning or end of a text (`Segments.unseen`).

Some tokenizers have no such cuts: slow ones, and those that do not split a text into words first (Llama 2, Gemma).
"""

import re
from collections.abc import Sequence
from itertools import chain

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

_SLOT = re.compile(r"\{(premise|hypothesis)\}")
# Texts that begin and end in ways which tokenizers treat differently.
_ODD = (
    *("A dog runs.", "2 men sing", "", "a", "É", "'s here", "the dogs'", "I'm", "don't", '"Stop!"', "(in red)", "{x}"),
    *(
        "... and so",
        "well...",
        "?!",
        "12345",
        "1",
        "$5",
        "50%",
        "#7",
        "-",
        "--x--",
        "_a_",
        "<b>so</b>",
        "&amp;",
        "##a",
    ),
    *("x=1;", "C:\\new", "/path/", "http://a.b/", "U.S.A", "McDonald", "THE END", "ñ", "e\u0301", "\u0301x", "日本語"),
    *(
        "你好。",
        "अब",
        "ไทย",
        "عربي",
        "😀",
        "👩\u200d🚀 a",
        "a\u200b",
        "\u200ba",
        "▁a▁",
        "Ġa",
        "¿a?",
        "ﬁ",
        "a\nb",
        "a\tb",
    ),
)
_NEAR = 64  # characters of the frame beside a text that are tried as cuts
_END = 2  # characters at either end of a text that distinguish one beginning or end from another
_REMEMBERED = 2**16  # segments that are kept: most sets have the pairs of a premise together

Texts = dict[str, Sequence[str]]  # by slot, of as many pairs each


class Segments:
    """A frame that was cut into segments: texts in, the token ids of prompts out.

    Args:
        backend: of a fast tokenizer.
        prefix: token ids that stand before every prompt.
        parts: the frame in parts: one that all prompts begin with, one around each slot, and one that all end with.
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
        """Token ids of the prompt of each pair."""
        segments = []
        for (before, slot, after), known in zip(self._middle, self._known, strict=True):
            if len(known) > _REMEMBERED:
                known.clear()
            new = [text for text in dict.fromkeys(pairs[slot]) if text not in known]
            known.update(zip(new, self._tokenize([f"{before}{text}{after}" for text in new]), strict=True))
            segments.append([known[text] for text in pairs[slot]])
        return [[*self._head, *chain(*row), *self._tail] for row in zip(*segments, strict=True)]

    def unseen(self, pairs: Texts) -> list[int]:
        """The pairs with a text that begins or ends as none did before. They count as seen from now on."""
        found = {}
        for _, slot, _ in self._middle:
            for row, text in enumerate(pairs[slot]):
                found.setdefault((slot, "begins", text[:_END]), row)
                found.setdefault((slot, "ends", text[-_END:]), row)
        rows = {row for end, row in found.items() if end not in self._seen}
        self._seen.update(found)
        return sorted(rows)

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        # A tokenizer's own call computes offsets as well, which takes as long again.
        self._backend.no_padding()
        self._backend.no_truncation()
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]


def probes(tokenizer: PreTrainedTokenizerBase, control_tokens: Sequence[str]) -> Texts:
    """Pairs with odd texts, among them the added tokens that data may hold: those can take in white space beside."""
    added = {token.content.strip() for token in tokenizer.added_tokens_decoder.values()} - set(control_tokens)
    texts = [*_ODD, *sorted(added)]
    return {"premise": texts, "hypothesis": [*texts[7:], *texts[:7]]}


def cut(frame: str, tokenizer: PreTrainedTokenizerBase, pairs: Texts) -> list[str] | None:
    """The parts of a frame, for `Segments`; `None` where the tokenizer has no cut between two texts, or beside one.

    Args:
        pairs: texts around which a cut must be none for the tokens.
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

    whole = [fill(frame, number) for number in range(len(pairs["premise"]))]
    wanted = [(words(text), ids(text)) for text in whole]

    def is_safe(place: int) -> bool:
        for number, (its_words, its_ids) in enumerate(wanted):
            left, right = fill(frame[:place], number), fill(frame[place:], number)
            if words(left) + words(right) != its_words or ids(left) + ids(right) != its_ids:
                return False
        return True

    edges = [0, *chain.from_iterable(slot.span() for slot in _SLOT.finditer(frame)), len(frame)]
    cuts = [0]
    for start, end in zip(edges[::2], edges[1::2], strict=True):
        places = range(start + 1, end)
        # As near to the texts as can be: what lies beyond is tokenised once.
        near = places[:_NEAR] if end == len(frame) else places[: -_NEAR - 1 : -1]
        place = next(filter(is_safe, near), None)
        if place is None:
            return None
        cuts.append(place)
    return [frame[start:end] for start, end in zip(cuts, [*cuts[1:], len(frame)], strict=True)]
