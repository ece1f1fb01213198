import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import TOKENIZERS, byte_level_tokenizer, chatml_tokenizer, few_pairs
from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers

from nli_sft import UserError
from nli_sft.data import prompts
from nli_sft.data.prompts import PROMPTS, Prompt, PromptEncoder
from nli_sft.data.sources import pairs_dataset
from nli_sft.labels import LABELS

# How Llama 3, Qwen 2 and GPT-4o split a text, after their tokenizer.json.
SPLITS = {
    "llama3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",
    "gpt4o": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
TEST_PROMPTS = (
    PROMPTS["plain"],
    PROMPTS["few_shot"],
    PROMPTS["hypothesis_only"],
    Prompt("last first", 'H: "{hypothesis}"\nP:{premise}.\nTrue?'),
    Prompt("twice", "Given that {premise}: {hypothesis}? Think of {premise} only."),
    Prompt("digits", "1{premise}23 4{hypothesis}5 6"),
)
text = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
    st.text("aZ9.'\"  \n\t-_é▁Ġ日😀s", max_size=8),
    st.sampled_from(["A dog runs.", "It's", "12", "covid", "x covid", "</b>", "..."]),
)


def split_as(pattern):
    tokenizer = chatml_tokenizer()
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    return tokenizer


def metaspace():
    """Like Llama 2 and T5 with words split: a space before the first."""
    tokenizer = TOKENIZERS["sentencepiece"]()
    tokenizer.backend_tokenizer.normalizer = None
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    return tokenizer


def greedy_word():
    """With an added token that absorbs the white space around it."""
    tokenizer = chatml_tokenizer()
    tokenizer.add_tokens([AddedToken("covid", lstrip=True, rstrip=True), AddedToken("dog", single_word=True)])
    return tokenizer


ALL = TOKENIZERS | {name: lambda pattern=pattern: split_as(pattern) for name, pattern in SPLITS.items()}
ALL |= {"metaspace": metaspace, "greedy_word": greedy_word}


def encoder_of(tokenizer, prompt):
    encoder = PromptEncoder(prompt, tokenizer)
    return encoder, lambda pairs: encoder._tokenize([encoder.text(*pair) for pair in pairs])


@pytest.fixture(scope="module", params=ALL)
def encoders(request):
    tokenizer, made = ALL[request.param](), []
    for prompt in TEST_PROMPTS:
        try:
            made.append(encoder_of(tokenizer, prompt))
        except UserError:  # with this tokenizer, a token spans the end of that prompt
            assert prompt.name in ("digits", "last first")
    return made


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(pairs=st.lists(st.tuples(text, text), min_size=1, max_size=8))
def test_segments_give_the_same_tokens_as_full_prompts(encoders, pairs):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompts, "MIN_SEGMENTED", 0)
        for encoder, tokenize in encoders:
            pairs = [pair for pair in pairs if not encoder._data_must_not_hold.search("\n".join(pair))]
            if pairs:
                assert encoder.encode(*zip(*pairs, strict=True)) == tokenize(pairs)


@pytest.mark.parametrize("name", ALL)
def test_which_tokenizers_have_segments(name):
    encoder, _ = encoder_of(ALL[name](), PROMPTS["few_shot"])
    # Without a pre-tokenizer, as in sentencepiece, any two parts of a text can merge. Metaspace splits at spaces, and
    # there is none between the hypothesis and the answer.
    assert (encoder._segments is None) == (name in ("sentencepiece", "metaspace"))


def many_pairs(**changed):
    """Enough pairs for segments, one of them changed."""
    columns = few_pairs(10).to_dict() | {"label": [LABELS[number % 3] for number in range(120)]}
    for column, value in changed.items():
        columns[column][77] = value
    return pairs_dataset(columns)


@pytest.mark.parametrize("max_length", [None, 512])
def test_rows_are_the_same_with_and_without_segments(any_tokenizer, max_length, monkeypatch):
    pairs = many_pairs()
    rows = PromptEncoder(PROMPTS["plain"], any_tokenizer).encode_rows(pairs, max_length=max_length)
    monkeypatch.setattr(prompts, "split_template", lambda *_: None)
    expected = PromptEncoder(PROMPTS["plain"], any_tokenizer).encode_rows(pairs, max_length=max_length)
    assert rows.features == expected.features
    assert rows.to_dict() == expected.to_dict()


def replacing(text, by):
    tokenizer = byte_level_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(text, by)
    return tokenizer


def test_data_that_make_a_split_unsafe_are_tokenized_without_segments():
    """No probe ends like this premise, which the tokenizer merges with the text after it."""
    encoder, tokenize = encoder_of(replacing("zq\nHypothesis: ", "A"), PROMPTS["plain"])
    assert encoder._segments is not None
    pairs = many_pairs(premise="A man zq")
    rows = encoder.encode_rows(pairs, max_length=None)
    expected = tokenize(zip(pairs["premise"], pairs["hypothesis"], strict=True))
    assert [row["input_ids"] for row in rows] == [
        prompt + encoder.answers[label] for prompt, label in zip(expected, pairs["label"], strict=True)
    ]
    assert encoder._segments is None


def test_a_token_across_the_boundary_is_found_in_the_data():
    encoder, _ = encoder_of(replacing("zq\nOutput: neutral", "A"), PROMPTS["plain"])
    encoder.encode_rows(many_pairs(), max_length=None)
    assert encoder._segments is not None
    with pytest.raises(UserError, match="pair pair-77: a token spans the boundary between the prompt and its answer"):
        encoder.encode_rows(many_pairs(hypothesis="A man zq", label="neutral"), max_length=None)


def test_padding_left_on_in_the_tokenizer_does_not_pad_segments():
    tokenizer = chatml_tokenizer()
    encoder, tokenize = encoder_of(tokenizer, PROMPTS["plain"])
    pairs = many_pairs()
    assert encoder._segments is not None
    tokenizer(["a", "a b c d"], padding=True, truncation=True, max_length=3)
    assert encoder.encode(pairs["premise"], pairs["hypothesis"]) == tokenize(
        zip(pairs["premise"], pairs["hypothesis"], strict=True)
    )
