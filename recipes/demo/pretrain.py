"""Make the demo's tiny base model: generate a corpus, train a tokenizer, pretrain a small Llama.

    python recipes/demo/pretrain.py --device cuda

The corpus teaches inference in many wordings, but never contains the label words of our prompts. Two final steps edit
their embeddings, so that the model is at chance with them but can learn them (`randomize_unused_rows`,
`remove_label_directions`). The default settings take minutes on a GPU and more than a day on two CPU cores.
"""

import argparse
import hashlib
import math
import multiprocessing
import os
import time
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from corpus import ANSWER_STYLES, draw_documents
from pairs import generate_pairs
from scene import LABELS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from nli_sft.data.demo import BASE_MODEL
from nli_sft.data.prompts import PROMPTS, Prompt, PromptEncoder

PAD, START, END = "<|pad|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SHARD = 2_000  # documents of one seed
# A prompt in words of the corpus.
CORPUS_PROMPT = Prompt(
    name="corpus",
    user="Premise: {premise}\nHypothesis: {hypothesis}\nIs the hypothesis true? Answer with yes, no or maybe.",
    label_words=ANSWER_STYLES[0][0],
)


def write_shard(shard: tuple[str, int]) -> list[str]:
    """The documents of one shard, given as (seed, number of documents)."""
    seed, documents = shard
    return list(islice(draw_documents(seed), documents))


def write_corpus(documents: int, seed: int) -> list[str]:
    """The corpus: the same documents with any number of processes."""
    shards = [(f"{seed} {start}", min(SHARD, documents - start)) for start in range(0, documents, SHARD)]
    with multiprocessing.Pool(min(os.cpu_count(), len(shards))) as pool:
        written = list(tqdm(pool.imap(write_shard, shards), desc="corpus", total=len(shards)))
    return [document for shard in written for document in shard]


def train_tokenizer(corpus: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: words that are not in the corpus become several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def encode(corpus: list[str], tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """The corpus as one row of token ids, (tokens,), in 16 bits: the vocabulary is small."""
    rows = []
    for start in range(0, len(corpus), SHARD):
        texts = [text + END for text in corpus[start : start + SHARD]]
        encodings = tokenizer.backend_tokenizer.encode_batch_fast(texts)
        rows.append(torch.tensor([token for encoding in encodings for token in encoding.ids], dtype=torch.int16))
    return torch.cat(rows)


def build_model(tokenizer: PreTrainedTokenizerFast, hidden_size: int, layers: int) -> LlamaForCausalLM:
    """A randomly initialized Llama with tied embeddings and heads of 32 dimensions."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def answer_weights(tokenizer: PreTrainedTokenizerFast, weight: float) -> torch.Tensor:
    """The weight of each token in the loss, (vocabulary,): `weight` for first tokens of answers, 1 for all others.

    Only these tokens depend on the inference. With equal weights, the noise of all others hides it for a long time.
    """
    weights = torch.ones(len(tokenizer))
    for answers, _ in ANSWER_STYLES:
        for answer in answers:
            weights[[tokenizer(text).input_ids[0] for text in (answer, f" {answer}")]] = weight
    return weights


def train(model: LlamaForCausalLM, tokens: torch.Tensor, weights: torch.Tensor, args: argparse.Namespace) -> float:
    """Next-token training on random windows of one long row of tokens; returns the mean of the last 100 losses."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    warmup = max(1, args.steps // 20)

    def rate(step):
        return min((step + 1) / warmup, 0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * step / args.steps)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    generator = torch.Generator().manual_seed(args.seed)
    tokens, weights, span = tokens.to(args.device), weights.to(args.device), torch.arange(args.window + 1)
    losses = torch.zeros(args.steps, device=args.device)  # read rarely, so that the host need not wait for the device
    model.train()
    progress = tqdm(range(args.steps), desc="pretrain")
    for step in progress:
        starts = torch.randint(len(tokens) - args.window, (args.batch_size, 1), generator=generator)
        batch = tokens[(starts + span).to(args.device)].long()
        with torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda"):
            logits = model(input_ids=batch[:, :-1]).logits
        loss = cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten(), weights)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses[step] = loss.detach()
        if step % 50 == 0:
            progress.set_postfix(loss=f"{losses[step]:.3f}")
    return losses[-100:].mean().item()


@torch.no_grad()
def randomize_unused_rows(model: LlamaForCausalLM, tokens: torch.Tensor, seed: int) -> None:
    """Add noise to the embeddings of tokens that do not occur in the corpus.

    Half of a BPE vocabulary consists of intermediate merges, which do not occur by themselves. Pretraining moves all
    of them to one point. Words that are not in the corpus consist of such tokens, and an adapter that does not train
    the embeddings could not distinguish them.

    Args:
        tokens: the corpus.
    """
    rows = model.get_output_embeddings().weight
    unused = tokens.long().bincount(minlength=len(rows)) == 0
    noise = torch.randn(rows.shape, generator=torch.Generator().manual_seed(seed)).to(rows.device)
    rows[unused] += noise[unused] * rows[~unused].std()


@torch.no_grad()
def remove_label_directions(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, n: int = 900) -> None:
    """Project the directions that separate the labels out of the embeddings of the label words' first tokens.

    The final hidden states form one cluster for each label, and the embeddings of any three tokens differ along the
    directions between clusters: by chance alone, the label words of the default prompt were right on 43 % of the
    pairs. Mean projection (Haghighatkhah et al., 2022, "Better Hit the Nail on the Head than Beat around the Bush")
    removes these directions, less than a tenth of each embedding. Tuning changes the states.

    Args:
        n: training pairs from which the cluster means are computed.
    """
    encoder = PromptEncoder(PROMPTS["plain"], tokenizer)
    states, gold = answer_states(model, encoder, generate_pairs("train", n))
    entailment, neutral, contradiction = (states[gold == label].mean(dim=0) for label in range(len(LABELS)))
    directions = torch.linalg.qr(torch.stack([entailment - contradiction, neutral - contradiction], dim=1)).Q
    first = [answer[0] for answer in encoder.answers]
    rows = model.get_output_embeddings().weight
    rows[first] -= rows[first] @ directions @ directions.T


@torch.no_grad()
def answer_accuracy(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: Prompt, n: int = 300
) -> float:
    """Accuracy on dev pairs, choosing the label by the most likely first token of the answers."""
    encoder = PromptEncoder(prompt, tokenizer)
    states, gold = answer_states(model, encoder, generate_pairs("dev", n))
    rows = model.get_output_embeddings().weight[[answer[0] for answer in encoder.answers]]
    return ((states @ rows.T).argmax(dim=1) == gold).float().mean().item()


def answer_states(
    model: LlamaForCausalLM, encoder: PromptEncoder, pairs: list[dict]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Final hidden states at the answer, (pairs, hidden size), and gold labels, (pairs,)."""
    prompts = encoder.encode([pair["premise"] for pair in pairs], [pair["hypothesis"] for pair in pairs])
    one_by_one = (torch.tensor([prompt], device=model.device) for prompt in prompts)
    states = torch.cat([model.model(input_ids=ids).last_hidden_state[:, -1] for ids in one_by_one])
    return states, torch.tensor([LABELS.index(pair["label"]) for pair in pairs], device=model.device)


def write_card(folder: Path, args: argparse.Namespace, facts: dict) -> None:
    """Write README.md beside the weights: how they were made, and the command to remake them."""
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    options = " ".join(f"--{name} {value}" for name, value in vars(args).items() if name != "output_dir")
    facts = facts | {"sha256 of model.safetensors": digest}
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    (folder / "README.md").write_text(
        f"""# The base model of the built-in demo

A tiny Llama-shaped language model for trying `nli-sft` where nothing can be downloaded. It was trained from random
weights on text that `recipes/demo/` generates: descriptions of scenes, with statements and questions about them. It
knows nothing else. The three label words of natural language inference are not in that text, and their first tokens
carry no information about the label (`remove_label_directions`). Before tuning, the model can therefore solve the task
in the words of the corpus, but is at chance with the label words. Tokens that are not in the corpus have random
embeddings (`randomize_unused_rows`).

Command:

    python recipes/demo/pretrain.py {options}

| | |
|---|---|
{rows}

The command makes the same corpus and tokenizer on any machine, and the same weights up to rounding.
"""
    )


def main(argv: list[str] | None = None) -> None:
    """Make the corpus, the tokenizer, the model and its card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=BASE_MODEL)
    parser.add_argument("--documents", type=int, default=500_000)
    parser.add_argument("--steps", type=int, default=6_000)
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--window", type=int, default=256, help="tokens in a training sequence")
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--answer_weight", type=float, default=10.0, help="loss weight of an answer's first token")
    parser.add_argument("--vocab_size", type=int, default=1_024)
    parser.add_argument("--hidden_size", type=int, default=192)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)

    set_seed(args.seed)
    start = time.perf_counter()
    corpus = write_corpus(args.documents, args.seed)
    tokenizer = train_tokenizer(corpus[:20_000], args.vocab_size)
    tokens = encode(corpus, tokenizer)
    model = build_model(tokenizer, args.hidden_size, args.layers).to(args.device)
    loss = train(model, tokens, answer_weights(tokenizer, args.answer_weight), args)
    randomize_unused_rows(model, tokens, args.seed)
    remove_label_directions(model.eval(), tokenizer)

    model.to(torch.bfloat16).save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    accuracy = partial(answer_accuracy, model, tokenizer)
    facts = {
        "parameters": f"{model.num_parameters():,}",
        "tokens in the corpus": f"{len(tokens):,}",
        "final loss (mean of the last 100 steps)": f"{loss:.4f}",
        "accuracy on dev pairs with yes, maybe or no (chance: 0.333)": f"{accuracy(CORPUS_PROMPT):.3f}",
        "accuracy on dev pairs with the label words": f"{accuracy(PROMPTS['plain']):.3f}",
        "seconds": f"{time.perf_counter() - start:.0f}",
        "torch": torch.__version__,
    }
    write_card(args.output_dir, args, facts)


if __name__ == "__main__":
    main()
