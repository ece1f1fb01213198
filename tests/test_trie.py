import random
import re
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from accelerate.utils import send_to_device
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.data import DataLoader

from nli_sft import trie

VOCABULARY = 61
BASE = [7, 8, 9, 10, 11]
PAIRS = [
    ([*BASE, 12, 13, 14, 20], [30]),
    ([*BASE, 12, 13, 14, 20], [30]),  # the same pair again
    ([*BASE, 12, 13, 14, 20], [31, 32, 33]),  # the same prompt, another label
    ([*BASE, 12, 13, 15, 20], [34, 35]),
    ([*BASE, 12, 13, 15, 20, 21, 22], [30]),  # the previous prompt is a prefix of this one
    ([*BASE, 12], [31, 32, 33]),
    (BASE, [34, 35]),
    ([40, 41, 42], [34, 35]),  # nothing shared
    ([43], [30]),  # a prompt of one token shares nothing, not even with itself
    ([43], [34, 35]),
    ([*BASE, 16, 17, 18, 20], [31, 32, 33]),
]
PROMPTS, ANSWERS = (list(column) for column in zip(*PAIRS, strict=True))
LABEL_WORDS = [[30], [31, 32, 33], [34, 35]]
LONGEST = 14  # tokens of the longest prompt and label word
ROW = 30  # most tokens in a row of PAIRS: several rows, each longer than the windows below

SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": VOCABULARY - 1,  # not 0, which pads rows and would get no gradient
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED: dict[str, Any] = {**SMALL, "num_key_value_heads": 2}
ALTERNATING: dict[str, Any] = {"sliding_window": LONGEST, "layer_types": ["sliding_attention", "full_attention"]}
CONFIGS = {
    "llama": lambda: tf.LlamaConfig(**GROUPED),
    "qwen2": lambda: tf.Qwen2Config(**GROUPED),
    "qwen3": lambda: tf.Qwen3Config(**GROUPED, head_dim=8),
    "phi": lambda: tf.PhiConfig(**SMALL, partial_rotary_factor=0.5),
    "phi3": lambda: tf.Phi3Config(**GROUPED),
    "mistral": lambda: tf.MistralConfig(**GROUPED, sliding_window=LONGEST),
    "gemma2": lambda: tf.Gemma2Config(
        **GROUPED, **ALTERNATING, head_dim=8, query_pre_attn_scalar=8, attn_logit_softcapping=2.0
    ),
    "gemma3": lambda: tf.Gemma3TextConfig(**GROUPED, **ALTERNATING, head_dim=8, query_pre_attn_scalar=8),
    "gpt_neox": lambda: tf.GPTNeoXConfig(**SMALL),
    "olmo2": lambda: tf.Olmo2Config(**GROUPED),
    "smollm3": lambda: tf.SmolLM3Config(**GROUPED, **ALTERNATING, use_sliding_window=True, no_rope_layers=[1, 0]),
    "gpt2": lambda: tf.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
    ),
}
# transformers gives Gemma-2 no SDPA, which cannot cap scores, and GPT-2 no flex attention.
SUPPORTED = [(name, "sdpa") for name in CONFIGS if name != "gemma2"]
SUPPORTED += [(name, "eager") for name in CONFIGS]
FLEX = [("llama", "flex_attention"), ("gemma2", "flex_attention"), ("gemma3", "flex_attention")]  # no backward on CPU


tokens = st.integers(0, 2)  # few tokens, many shared prefixes
prompt_lists = st.lists(st.lists(tokens, min_size=1, max_size=6), min_size=1, max_size=10)
answers_of_four = st.lists(tokens, min_size=1, max_size=4)
answer_lists = st.lists(answers_of_four, min_size=1, max_size=3)
budgets = st.integers(9, 50)
multiples = st.sampled_from([1, 8])


def read_nodes(batch):
    """The path from the root to each node of each row, from the depths alone. Padding follows the trie."""
    rows = []
    for depths in batch["position_ids"].tolist():
        path, paths = [], []
        for node, depth in enumerate(depths):
            assert depth <= len(path)
            path = [*path[:depth], node]
            paths.append(path)
        rows.append(paths)
    return rows


def read_pairs(batch):
    """The pairs of a training trie, in its order. Each pair has its own chain of supervised nodes."""
    pairs = []
    for row, paths in enumerate(read_nodes(batch)):
        ids, labels, exits = (batch[key][row].tolist() for key in ("input_ids", "shift_labels", "exit"))
        for node, path in enumerate(paths):
            if labels[node] == -100 or (len(path) > 1 and labels[path[-2]] != -100):
                continue
            answer = labels[node : exits[node]]
            assert ids[node + 1 : exits[node]] == answer[:-1]
            pairs.append(([ids[i] for i in path], answer))
    return pairs


def check_rows(batch, used, budget, multiple):
    """Check that `used` nodes of each row form a trie and attend to their paths, and padding to itself."""
    length = batch["input_ids"].shape[1]
    assert max(used) <= budget
    padded = -(-max(used) // multiple) * multiple
    assert length == (padded + multiple if padded % 128 == 64 else padded)
    assert batch["trie_tokens"] == sum(used)
    visible: Any = trie.attention_mask(batch["exit"], "sdpa", torch.bool)
    additive: Any = trie.attention_mask(batch["exit"], "eager", torch.float32)
    assert visible.shape == additive.shape == (len(used), 1, length, length)
    assert torch.equal(additive == 0, visible)
    assert torch.equal(additive < -1e30, ~visible)
    for row, paths in enumerate(read_nodes(batch)):
        for node, path in enumerate(paths):
            assert visible[row, 0, node].nonzero().flatten().tolist() == path
            if node >= used[row]:
                assert path == [node]
                assert batch["input_ids"][row, node] == 0


@pytest.fixture(autouse=True)
def _uncompiled_flex_attention(monkeypatch):
    monkeypatch.setattr(tf.integrations.flex_attention.WrappedFlexAttention, "__call__", lambda self: flex_attention)


@pytest.fixture(scope="module")
def llama():
    return build("llama", "sdpa")


def build(name, implementation):
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation=implementation).eval()
    with torch.no_grad():  # far from uniform attention, so that a wrong mask has an effect
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.25)
    return model


def reference(name, implementation):
    """The same weights; without a mask, transformers would compile one for flex attention."""
    return build(name, "eager" if implementation == "flex_attention" else implementation)


def forward(model, batch):
    return model(**trie.model_inputs(model, batch)).logits


def train_on_trie(model, batch):
    """Logits of the supervised nodes, the mean loss and all gradients."""
    targets = batch["shift_labels"].flatten()
    return train(model, forward(model, batch).flatten(0, 1)[targets != -100], targets[targets != -100])


def train_separately(model, pairs):
    logits = []
    for prompt, answer in pairs:
        sequence = torch.tensor([prompt + answer])
        logits.append(model(input_ids=sequence, use_cache=False).logits[0, len(prompt) - 1 : -1])
    return train(model, torch.cat(logits), torch.tensor([token for _, answer in pairs for token in answer]))


def train(model, logits, targets):
    model.zero_grad()
    loss = torch.nn.functional.cross_entropy(logits, targets)
    loss.backward()
    return [logits.detach(), loss.detach(), *(parameter.grad for parameter in model.parameters())]


def difference(ours, theirs, floor=0.0):
    """The largest difference, relative to the largest number of its tensor, or to `floor` of the largest gradient."""
    least = floor * max(gradient.abs().max() for gradient in theirs[2:])
    tensors = zip(ours, theirs, strict=True)
    return max(((a - b).abs().max() / b.abs().max().clamp(min=least)).item() for a, b in tensors)


def score_separately(model, prompts, answers):
    result = torch.zeros(len(prompts), len(answers), max(map(len, answers)))
    for pair, prompt in enumerate(prompts):
        for choice, answer in enumerate(answers):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([prompt + answer]), use_cache=False).logits[0]
            log_probs = logits[len(prompt) - 1 : -1].log_softmax(-1)
            result[pair, choice, : len(answer)] = log_probs.gather(1, torch.tensor(answer)[:, None])[:, 0]
    return result


def score_on_trie(model, batch):
    with torch.no_grad(), trie.exact_logits(model, batch["predict"]):
        logits = forward(model, batch)
    assert logits.shape[:2] == (1, len(batch["predict"]))
    return trie.answer_log_probs(logits[0], batch["answer_nodes"], batch["answer_ids"])


# --- the model computes the same ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "implementation"), SUPPORTED)
def test_training_equals_separate_sequences(name, implementation):
    model = build(name, implementation)
    batch = trie.pack_training(PROMPTS, ANSWERS, ROW, pad_to_multiple_of=4)
    rows, length = batch["input_ids"].shape
    assert rows > 1
    assert length > LONGEST
    assert trie.unsupported_reason(model.config, LONGEST) is None
    expected = train_separately(model, read_pairs(batch))
    assert difference(train_on_trie(model, batch), expected) < 1e-5

    # A causal mask or positions by row must make a difference.
    causal = {**batch, "exit": torch.full_like(batch["exit"], length)}
    assert difference(train_on_trie(model, causal), expected) > 1e-2
    in_row_order = {**batch, "position_ids": torch.arange(length).expand(rows, length)}
    assert difference(train_on_trie(model, in_row_order), expected) > 1e-2


@pytest.mark.parametrize(("name", "implementation"), SUPPORTED + FLEX)
def test_scores_equal_separate_sequences(name, implementation):
    model = build(name, implementation)
    batch = trie.pack_scoring(PROMPTS, LABEL_WORDS, ROW, pad_to_multiple_of=4)
    assert batch["input_ids"].shape[0] > 1
    expected = score_separately(reference(name, implementation), PROMPTS, LABEL_WORDS)
    torch.testing.assert_close(score_on_trie(model, batch), expected, rtol=1e-5, atol=2e-5)
    batch["exit"] = torch.full_like(batch["exit"], batch["exit"].shape[1])
    assert (score_on_trie(model, batch) - expected).abs().max() > 1e-2


def test_scores_of_a_model_wrapped_by_peft():
    model = build("llama", "sdpa")
    expected = score_separately(model, PROMPTS, LABEL_WORDS)
    batch = trie.pack_scoring(PROMPTS, LABEL_WORDS, ROW)
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    torch.testing.assert_close(score_on_trie(wrapped, batch), expected, rtol=1e-5, atol=2e-5)
    assert forward(wrapped, batch).shape == (*batch["input_ids"].shape, VOCABULARY)  # the hook has been removed


def test_logits_are_not_rounded_to_the_precision_of_the_model():
    model = build("llama", "sdpa").to(torch.bfloat16)
    batch = trie.pack_scoring(PROMPTS, LABEL_WORDS, ROW)
    hidden = {}
    handle = model.lm_head.register_forward_pre_hook(lambda module, args: hidden.update(states=args[0]))
    with torch.no_grad():
        rounded = forward(model, batch)
        with trie.exact_logits(model):
            exact = forward(model, batch)
        again = forward(model, batch)
    handle.remove()
    assert rounded.dtype == again.dtype == torch.bfloat16
    assert exact.dtype == torch.float32
    torch.testing.assert_close(exact, hidden["states"].float() @ model.lm_head.weight.float().T)
    assert not torch.equal(exact, exact.bfloat16().float())
    torch.testing.assert_close(exact.bfloat16(), rounded, rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize(("nodes", "length"), [(60, 80), (64, 80), (65, 80), (128, 128), (180, 208), (190, 208)])
def test_no_row_has_a_length_at_which_cudnn_fails(nodes, length):
    prompt = [7] * nodes
    assert trie.pack_training([prompt], [[1]], 512)["input_ids"].shape == (1, length)
    assert trie.pack_scoring([prompt], [[1], [2]], 512)["input_ids"].shape == (1, length)


def test_boolean_mask_equals_additive_mask():
    model = build("llama", "sdpa")
    batch = trie.pack_training(PROMPTS, ANSWERS, ROW)
    mask: Any = trie.attention_mask(batch["exit"], "sdpa", torch.bool)
    assert mask.dtype == torch.bool
    logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], attention_mask=mask).logits
    torch.testing.assert_close(logits, forward(model, batch), rtol=1e-5, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(data=st.data(), budget=st.integers(9, 40))
def test_random_tries_equal_separate_sequences(llama, data, budget):
    prompts = data.draw(prompt_lists)
    answers = [data.draw(answers_of_four) for _ in prompts]
    batch = trie.pack_training(prompts, answers, budget, pad_to_multiple_of=1)
    # With sequences of one token, gradients of queries and keys are 0 up to rounding: hence the floor.
    assert difference(train_on_trie(llama, batch), train_separately(llama, read_pairs(batch)), floor=0.1) < 1e-5
    choices = data.draw(answer_lists)
    scores = score_on_trie(llama, trie.pack_scoring(prompts, choices, budget, pad_to_multiple_of=1))
    torch.testing.assert_close(scores, score_separately(llama, prompts, choices), rtol=1e-5, atol=2e-5)


# --- the packing is a trie -------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(data=st.data(), prompts=prompt_lists, budget=budgets, multiple=multiples)
def test_training_trie(data, prompts, budget, multiple):
    answers = [data.draw(answers_of_four) for _ in prompts]
    batch = trie.pack_training(prompts, answers, budget, multiple)
    assert Counter(map(repr, read_pairs(batch))) == Counter(map(repr, zip(prompts, answers, strict=True)))
    assert batch["pairs"] == len(prompts)
    assert batch["sequence_tokens"] == sum(len(p) + len(a) - 1 for p, a in zip(prompts, answers, strict=True))

    # Computed naively: a row has each distinct proper prefix of its prompts once, and each pair's own nodes.
    used = []
    for row in range(len(batch["input_ids"])):
        pairs = read_pairs({key: value[row : row + 1] for key, value in batch.items() if torch.is_tensor(value)})
        shared = {tuple(prompt[:depth]) for prompt, _ in pairs for depth in range(1, len(prompt))}
        used.append(len(shared) + sum(len(answer) for _, answer in pairs))
    check_rows(batch, used, budget, multiple)
    if max(used) > max(len(p) + len(a) - 1 for p, a in zip(prompts, answers, strict=True)):
        shorter = trie.pack_training(prompts, answers, max(used) - 1, multiple)
        assert len(shorter["input_ids"]) > len(used)


@settings(max_examples=150, deadline=None)
@given(prompts=prompt_lists, answers=answer_lists, budget=budgets, multiple=multiples)
def test_scoring_trie(prompts, answers, budget, multiple):
    batch = trie.pack_scoring(prompts, answers, budget, multiple)
    ids = batch["input_ids"].tolist()
    rows = [[tuple(ids[row][i] for i in path) for path in paths] for row, paths in enumerate(read_nodes(batch))]
    paths = [path for row in rows for path in row]
    predict = batch["predict"].tolist()
    used = set()
    for pair, prompt in enumerate(prompts):
        for choice, answer in enumerate(answers):
            for step in range(batch["answer_ids"].shape[1]):
                index = batch["answer_nodes"][pair, choice, step].item()
                if step < len(answer):
                    used.add(predict[index])
                    assert paths[predict[index]] == (*prompt, *answer[:step])
                    assert batch["answer_ids"][choice, step] == answer[step]
                else:
                    assert index == 0
                    assert batch["answer_ids"][choice, step] == -100
    assert predict == sorted(used)
    assert batch["sequence_tokens"] == sum(len(p) + len(a) - 1 for p in prompts for a in answers)

    # Computed naively: a row ends with its last predicting node and has no path twice.
    length = len(ids[0])
    used_of = [max(node for node in used if node // length == row) % length + 1 for row in range(len(ids))]
    assert all(len(set(row[:end])) == end for row, end in zip(rows, used_of, strict=True))
    check_rows(batch, used_of, budget, multiple)


MANY = [random.Random(i).choices([0, 1], k=40) for i in range(40)]
ONE = [[0] * 63]  # with the first token of an answer, the chain ends at the end of a block


@pytest.mark.parametrize(
    ("block", "length", "prompts"),
    [(128, 128, MANY), (128, 300, MANY), (128, 1024, MANY), (4, 60, MANY), (4, 64, MANY), (4, 64, ONE)],
)
def test_block_mask_has_the_blocks_of_the_mask_function(monkeypatch, block, length, prompts):
    monkeypatch.setattr(trie, "FLEX_BLOCK", block)
    batch = trie.pack_training(prompts, [[1, 2]] * len(prompts), length, 1)
    rows, length = batch["exit"].shape
    sees = trie.mask_mod(batch["exit"])
    expected = create_block_mask(sees, rows, None, length, length, device="cpu", BLOCK_SIZE=block)
    mask = trie.attention_mask(batch["exit"], "flex_attention", torch.float32)
    assert mask.shape == expected.shape == (rows, 1, length, length)
    for kind in ("", "full_"):
        for axis in ("kv", "q"):
            counts, expected_counts = (getattr(m, f"{kind}{axis}_num_blocks") for m in (mask, expected))
            indices, expected_indices = (getattr(m, f"{kind}{axis}_indices") for m in (mask, expected))
            assert torch.equal(counts, expected_counts)
            listed = torch.arange(indices.shape[-1]) < counts[..., None]
            assert torch.equal(indices[listed], expected_indices[listed])


# --- inputs and outputs -----------------------------------------------------------------------------------------


def test_batches_pass_through_workers_and_accelerate():
    loader = DataLoader(
        PAIRS, batch_size=4, num_workers=1, collate_fn=lambda pairs: trie.pack_training(*zip(*pairs, strict=True), ROW)
    )
    batches = [send_to_device(batch, torch.device("cpu")) for batch in loader]
    assert [batch["pairs"] for batch in batches] == [4, 4, 3]
    assert {key: value.dtype for key, value in batches[0].items() if torch.is_tensor(value)} == dict.fromkeys(
        ("input_ids", "position_ids", "exit", "shift_labels"), torch.int64
    ) | {"shift_weights": torch.float32}


def test_all_types_of_sequences_pack_the_same():
    batch = trie.pack_training(PROMPTS, ANSWERS, ROW)
    for kind in (np.array, torch.tensor, tuple):
        other = trie.pack_training([kind(p) for p in PROMPTS], [kind(a) for a in ANSWERS], ROW)
        assert all(torch.equal(other[key], batch[key]) for key in ("input_ids", "exit", "shift_labels"))


@pytest.mark.parametrize(
    ("prompts", "answers", "message"),
    [
        ([], [], "no pairs"),
        ([[1], []], [[1], [1]], "prompt 1 has no tokens"),
        ([[1], [1]], [[1], []], "answer 1 has no tokens"),
        ([[1], [1] * ROW], [[1], [1, 2]], f"Pair 1 feeds {ROW + 1} tokens but a row holds {ROW}"),
    ],
)
def test_errors(prompts, answers, message):
    for pack in (trie.pack_training, trie.pack_scoring):
        with pytest.raises(ValueError, match=message):
            pack(prompts, answers, ROW)


def test_training_needs_one_answer_per_prompt():
    with pytest.raises(ValueError, match="2 prompts but 1 answers"):
        trie.pack_training([[1], [2]], [[1]], ROW)


def test_mask_errors():
    exit = trie.pack_training(PROMPTS, ANSWERS, ROW)["exit"]
    with pytest.raises(ValueError, match="flash_attention_2"):
        trie.attention_mask(exit, "flash_attention_2", torch.float32)
    with pytest.raises(ValueError, match="Eager attention adds"):
        trie.attention_mask(exit, "eager", torch.bool)


UNSUPPORTED = [
    (tf.T5Config, {}, "encoder-decoder"),
    (tf.MambaConfig, {}, "linear_attention|recurrent"),
    (tf.RwkvConfig, {}, "recurrent"),
    (tf.RecurrentGemmaConfig, {}, "linear_attention|recurrent"),
    (tf.FalconH1Config, {}, "hybrid"),
    (tf.Qwen3NextConfig, {}, "linear_attention"),
    (tf.Lfm2Config, {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]}, "conv"),
    (tf.GraniteMoeHybridConfig, {"layer_types": ["mamba"] * 32}, "linear_attention|mamba"),
    (tf.BambaConfig, {}, "linear_attention|mamba"),
    (tf.JambaConfig, {}, "linear_attention|mamba"),
    (tf.BloomConfig, {}, "ALiBi"),
    (tf.MptConfig, {}, "ALiBi"),
    (tf.FalconConfig, {"alibi": True}, "ALiBi"),
    (tf.OpenAIGPTConfig, {}, "builds its mask itself"),
    (tf.MistralConfig, {"sliding_window": 63}, "windows of 63 tokens and the longest pair has 64"),
    (tf.Gemma2Config, {"sliding_window": 63}, "windows of 63"),
    (tf.Llama4TextConfig, {"attention_chunk_size": 63}, "windows of 63"),
    (tf.GPTNeoConfig, {"window_size": 63}, "windows of 63"),
]
NEAR_MISSES = [
    (tf.FalconConfig, {}),
    (tf.MistralConfig, {"sliding_window": 64}),
    (tf.Qwen2Config, {"sliding_window": 8, "use_sliding_window": False}),
    (tf.Gemma3TextConfig, {"sliding_window": 8, "num_hidden_layers": 1, "layer_types": ["full_attention"]}),
    (tf.Llama4TextConfig, {}),
    (tf.GPTNeoConfig, {"window_size": 8, "attention_types": [[["global"], 24]]}),
    (tf.DbrxConfig, {}),
    (tf.Gemma3Config, {}),
]


@pytest.mark.parametrize(("config", "options", "reason"), UNSUPPORTED)
def test_unsupported_models(config, options, reason):
    sentence = str(trie.unsupported_reason(config(**options), longest=64))
    assert re.search(reason, sentence)
    assert "batching: padded" in sentence
    assert "\n" not in sentence


@pytest.mark.parametrize(("config", "options"), NEAR_MISSES)
def test_supported_models(config, options):
    assert trie.unsupported_reason(config(**options), longest=64) is None


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flash_attention_3"])
def test_unsupported_attention(implementation):
    config = tf.LlamaConfig(attn_implementation=implementation)
    assert 'attn_implementation="sdpa"' in str(trie.unsupported_reason(config, longest=64))
