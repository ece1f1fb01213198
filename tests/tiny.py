"""Tokenizers of four families, tiny models and a few pairs for tests, all built in the process."""

import json

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from nli_sft.data.sources import pairs_dataset
from nli_sft.labels import LABELS

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

SCENES = [
    ("A man in a red coat sleeps on a bench.", "A person is asleep.", "entailment"),
    ("A man in a red coat sleeps on a bench.", "The man is tired after work.", "neutral"),
    ("A man in a red coat sleeps on a bench.", "A man is running.", "contradiction"),
    ("Two dogs run along the beach.", "Animals are outdoors.", "entailment"),
    ("Two dogs run along the beach.", "The dogs belong to the same woman.", "neutral"),
    ("Two dogs run along the beach.", "The dogs are asleep indoors.", "contradiction"),
    ("A woman plays the violin.", "Somebody makes music.", "entailment"),
    ("A woman plays the violin.", "The woman is a teacher.", "neutral"),
    ("A woman plays the violin.", "Nobody has an instrument.", "contradiction"),
    ("A child throws a yellow ball (very far)!", "A ball is thrown.", "entailment"),
    ("A child throws a yellow ball (very far)!", "It's the child's birthday.", "neutral"),
    ("A child throws a yellow ball (very far)!", "The ball is blue.", "contradiction"),
]

CORPUS = [
    *(text for premise, hypothesis, _ in SCENES for text in (premise, hypothesis)),
    "Premise: A man in a red coat sleeps on a bench. Hypothesis: A person is asleep outdoors.",
    "Instruct: Does the premise entail the hypothesis? Output: entailment neutral contradiction",
    "Two dogs run along the beach while a child throws a yellow ball.",
    "user system assistant Answer entailment, neutral or contradiction.",
    "A woman plays the violin; nobody is listening. It's cold (very cold) & wet!",
]


def chatml_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = byte_level_tokenizer(special=["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.chat_template = CHATML
    tokenizer.eos_token = "<|im_end|>"
    return tokenizer


def byte_level_tokenizer(special=("<|endoftext|>",)) -> PreTrainedTokenizerFast:
    """Like GPT-2 and Phi-2: byte-level BPE, no beginning token, no chat template."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=list(special), initial_alphabet=alphabet)
    backend.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=special[0], pad_token=special[0])


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """Like Llama 2: spaces are part of tokens, bytes are a fallback, and there is a beginning token."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    # Training splits at spaces, so that no token spans one. Encoding does not split the text.
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=700, special_tokens=special))
    backend.pre_tokenizer = None
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )


def wordpiece_tokenizer() -> PreTrainedTokenizerFast:
    """Like BERT: words are split into pieces, spaces are dropped, and [CLS] and [SEP] surround a text."""
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    backend.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=300, special_tokens=special))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


TOKENIZERS = {
    "chatml": chatml_tokenizer,
    "byte_level": byte_level_tokenizer,
    "sentencepiece": sentencepiece_tokenizer,
    "wordpiece": wordpiece_tokenizer,
}


def tiny_llama(vocab_size: int, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,  # bitsandbytes quantises blocks of 64
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=0,
        initializer_range=0.3,  # large enough that random models disagree about labels
    )
    return LlamaForCausalLM(config).eval()


# A long document of the scenes, and a claim about each of them with its label.
DOCUMENT = " ".join(dict.fromkeys(premise for premise, _, _ in SCENES)) + " Nobody else is there." * 20
CLAIMS = [(hypothesis, label) for _, hypothesis, label in SCENES]


def few_pairs(copies: int = 1, labels=LABELS):
    """Pairs with SNLI's labels, or with others in turn."""
    rows = [(f"{p}{' Again.' * k}", h, label) for k in range(copies) for p, h, label in SCENES]
    premises, hypotheses, gold = zip(*rows, strict=True)
    if labels != LABELS:
        gold = [labels[index % len(labels)] for index in range(len(rows))]
    uids = [f"pair-{index}" for index in range(len(rows))]
    return pairs_dataset({"uid": uids, "premise": premises, "hypothesis": hypotheses, "label": gold}, labels)


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
