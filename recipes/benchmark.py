"""Compare the speed and memory of tries with TRL's batches, generation and lm-evaluation-harness.

    python recipes/benchmark.py --dataset_name stanfordnlp/snli --model_name_or_path Qwen/Qwen3-0.6B --json out.json
    python recipes/benchmark.py --dataset_name demo --model_name_or_path my-config/ --random_weights

All methods run in one process on the same pairs, with freshly loaded weights. The first steps are a warm-up and do
not count; the rate is that of the median step. Speed and memory are compared with TRL's fastest setting at the same
batch size. The keys of SFTConfig and ModelConfig configure the training. lm-evaluation-harness is measured if it is
installed (in a clone: `pip install -e ".[benchmark]"`), transformers' decision pipeline if transformers has it (5.23).
For long documents with several claims each: --claims 17 --document_tokens 2048.
"""

import copy
import functools
import gc
import importlib.util
import itertools
import json
import os
import statistics
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback, pipeline
from transformers.modeling_layers import GradientCheckpointingLayer
from trl import ModelConfig, SFTConfig, SFTTrainer

from nli_sft import UserError, trie
from nli_sft.configs import BatchConfig, PromptConfig, TrainDataConfig, resolve_recipe, run_script
from nli_sft.data.prompts import SLOTS, PromptEncoder, load_prompt
from nli_sft.data.sources import load_pairs, pairs_dataset, subsample
from nli_sft.evaluation.scoring import distinguishing_prefixes, generate_labels, score_prompts, scoring_graphs
from nli_sft.hub.decision import label_tokens, write_decision_files
from nli_sft.labels import LABELS
from nli_sft.models.loading import adapter_config, apply_template, count_parameters, load_model, load_tokenizer
from nli_sft.report.figures import speeds
from nli_sft.training.batches import GroupShuffleSampler, TokenRows, TrieCollator
from nli_sft.training.trainer import NLITrainer

# The first four are TRL's. Compiling takes about a minute. `packed_compiled` is `tries_compiled` without sharing: rows
# contain complete pairs.
TRAIN = ["trl_defaults", "trl_padded", "trl_grouped", "trl_compiled", "packed_compiled"]
TRAIN += ["tries", "tries_by_premise", "tries_compiled"]
# lm_eval (lm-evaluation-harness), padded and tries score all tokens of all labels, as evaluations do; generate and
# tries_choice only find the label, as a classifier does. pipeline is transformers' `pipeline("decision")`.
SCORE = ["lm_eval", "generate", "padded", "pipeline", "tries", "tries_choice"]
SCORE += ["tries_compiled", "tries_choice_compiled"]
WARM_UP = 2  # steps


@dataclass
class BenchmarkConfig:
    """What to measure."""

    pairs: int = field(default=512, metadata={"help": "Number of training pairs, sampled by premise."})
    claims: int | None = field(
        default=None,
        metadata={"help": "Put premises together into documents with this many claims each, instead of single pairs."},
    )
    document_tokens: int = field(default=2048, metadata={"help": "Tokens in a document of claims."})
    random_weights: bool = field(default=False, metadata={"help": "Build the model from its config.json alone."})
    train: list[str] = field(
        default_factory=lambda: [name for name in TRAIN if "compiled" not in name],
        metadata={"help": f"Training methods to measure: {', '.join(TRAIN)}; or none."},
    )
    score: list[str] = field(
        default_factory=lambda: [name for name in SCORE if "compiled" not in name],
        metadata={"help": f"Scoring methods to measure: {', '.join(SCORE)}; or none."},
    )
    json: str | None = field(default=None, metadata={"help": "Write all figures to this file."})
    svg: str | None = field(default=None, metadata={"help": "Draw speed and memory into this file."})

    def __post_init__(self):
        for name, known in (("train", TRAIN), ("score", SCORE)):
            wanted = [method for method in getattr(self, name) if method != "none"]
            if unknown := set(wanted) - set(known):
                raise UserError(f"{name}: unknown method {', '.join(sorted(unknown))}; choose from {', '.join(known)}")
            setattr(self, name, wanted)


def main(args, data_args, prompt_args, batch_args, training_args, model_args):
    tokenizer = load_tokenizer(model_args.model_name_or_path, model_args.model_revision)
    apply_template(tokenizer, training_args)
    encoder = PromptEncoder(
        load_prompt(prompt_args.prompt, prompt_args.label_words, prompt_args.labels or LABELS), tokenizer
    )
    source = {
        "labels": encoder.prompt.labels,
        "config": data_args.dataset_config,
        "revision": data_args.dataset_revision,
        "columns": data_args.columns(),
    }
    pairs = subsample(load_pairs(data_args.dataset_name, "train", **source), args.pairs, seed=0).shuffle(seed=0)
    if args.claims is not None:
        pairs = as_documents(pairs, args.claims, args.document_tokens, tokenizer)
    by_premise = pairs.select(list(GroupShuffleSampler(pairs["premise"], seed=0)))
    shared = {"args": args, "training_args": training_args, "model_args": model_args, "encoder": encoder}
    rows, rows_by_premise = (encoder.encode_rows(some, max_length=None) for some in (pairs, by_premise))

    compiled = {"torch_compile": True}
    methods = {
        "trl_defaults": lambda: train_speed(
            **shared,
            rows=rows.select(range(min(256, len(rows)))),
            per_device_train_batch_size=8,
            gradient_checkpointing=True,
        ),
        "trl_padded": lambda: train_speed(**shared, rows=rows),
        "trl_grouped": lambda: train_speed(**shared, rows=rows, train_sampling_strategy="group_by_length"),
        # Nearly all batches get the same length, since each new length recompiles.
        "trl_compiled": lambda: train_speed(**shared, rows=rows, pad_to_multiple_of=64, **compiled),
        "packed_compiled": lambda: train_packed(**shared, rows=rows_by_premise, batch_args=batch_args, **compiled),
        "tries": lambda: train_speed(**shared, rows=rows, batch_args=batch_args),
        "tries_by_premise": lambda: train_speed(**shared, rows=rows_by_premise, batch_args=batch_args),
        "tries_compiled": lambda: train_speed(**shared, rows=rows_by_premise, batch_args=batch_args, **compiled),
    }
    train = {}
    for name in args.train:
        train[name] = methods[name]()
        Console().print(speed_table("Training", train))
    score = score_speed(args, training_args, model_args, batch_args, encoder, pairs)

    figures = {
        "train": {"methods": train, **train_summary(train)},
        "score": {"methods": score, **score_summary(score)},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else PartialState().device.type,
        "pairs": len(pairs),
        "recipe": resolve_recipe((args, data_args, prompt_args, batch_args, training_args, model_args)),
    }
    Console().print(speed_table("Training", train), speed_table("Scoring", score))
    print({part: {k: v for k, v in figures[part].items() if k != "methods"} for part in ("train", "score")})
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=2))
    if args.svg:
        parts = {f"{part.capitalize()}, {figures['device']}": figures[part]["methods"] for part in ("train", "score")}
        figure = speeds(model_args.model_name_or_path, {part: methods for part, methods in parts.items() if methods})
        Path(args.svg).write_text(figure.on_white())


def as_documents(pairs, claims, tokens, tokenizer):
    """Pairs that share documents, made of the premises of `claims` pairs and of others up to about `tokens` tokens."""
    random = np.random.default_rng(0)
    pairs = pairs.sort("premise")
    premises = pairs["premise"][:]
    texts = list(dict.fromkeys(premises))
    lengths = dict(zip(texts, map(len, tokenizer(texts, add_special_tokens=False)["input_ids"]), strict=True))
    documents = []
    for start in range(0, len(pairs) - claims + 1, claims):
        own = list(dict.fromkeys(premises[start : start + claims]))
        order = own + [text for text in random.permutation(texts).tolist() if text not in own]
        used = itertools.accumulate(lengths[text] for text in order)
        kept = [text for text, total in zip(order, used, strict=True) if text in own or total <= tokens]
        documents += [" ".join(random.permutation(kept))] * claims
    pairs, names = pairs.select(range(len(documents))), pairs.features["label"].names
    columns = {"uid": pairs["uid"][:], "premise": documents, "hypothesis": pairs["hypothesis"][:]}
    return pairs_dataset(columns | {"label": [names[label] for label in pairs["label"]]}, names)


def train_summary(methods):
    """Our fastest method against TRL's fastest at the same batch size."""

    def fastest(beginning):
        return max(
            (method for name, method in methods.items() if name.startswith(beginning) and name != "trl_defaults"),
            key=lambda method: method["pairs_per_second"],
            default=None,
        )

    ours, rival = fastest("tries"), fastest("trl")
    if ours is None or rival is None:
        return {}
    same_order = [methods[name]["loss"] for name in ("tries", "trl_padded") if name in methods]
    return {
        "speedup": ours["pairs_per_second"] / rival["pairs_per_second"],
        "memory_ratio": ours["peak_bytes"] and ours["peak_bytes"] / rival["peak_bytes"],
        "loss_difference": abs(same_order[0] - same_order[-1]) if len(same_order) == 2 else None,
    }


def score_summary(methods):
    """Our fastest method against generation, and our fastest that scores all tokens against lm-evaluation-harness."""
    all_tokens = [method for name, method in methods.items() if name in ("tries", "tries_compiled")]
    ours = [method for name, method in methods.items() if name.startswith("tries")]
    if not ours:
        return {}

    def speedup(reference, candidates):
        if not candidates or reference not in methods:
            return None
        return max(one["pairs_per_second"] for one in candidates) / methods[reference]["pairs_per_second"]

    return {
        "speedup_generate": speedup("generate", ours),
        "speedup_lm_eval": speedup("lm_eval", all_tokens),
        "speedup_pipeline": speedup("pipeline", ours),
        "agreement": min((method["agreement"] for method in ours if "agreement" in method), default=None),
    }


@functools.cache
def random_weights(config_folder, dtype):
    """A folder with random weights for a config, because quantization reads weights from files."""
    folder = tempfile.mkdtemp()
    config = AutoConfig.from_pretrained(config_folder)
    with PartialState().device:
        AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).save_pretrained(folder)
    return folder


def build_model(args, model_args):
    gc.collect()  # the previous model, which is in a reference cycle with its trainer
    torch.manual_seed(0)
    if not args.random_weights:
        return load_model(model_args).to(PartialState().device)
    if model_args.load_in_4bit or model_args.load_in_8bit:
        folder = random_weights(model_args.model_name_or_path, model_args.dtype)
        return load_model(replace(model_args, model_name_or_path=folder))
    config = AutoConfig.from_pretrained(model_args.model_name_or_path)
    dtype = getattr(torch, model_args.dtype)
    with PartialState().device:
        return AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=model_args.attn_implementation
        )


class StepTimes(TrainerCallback):
    def __init__(self):
        self.ends = []

    def on_step_end(self, args, state, control, **kwargs):
        synchronize()
        self.ends.append(time.perf_counter())


def train_speed(args, training_args, model_args, encoder, rows, batch_args=None, **changes):
    """Speed, mean loss and peak memory of one epoch, with `NLITrainer` if `batch_args` is given, else `SFTTrainer`."""
    forget_compilation()
    times = StepTimes()
    options = resolve_recipe([training_args]) | {"report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    options |= {"num_train_epochs": 1, "train_sampling_strategy": "sequential"} | changes
    with tempfile.TemporaryDirectory() as folder:
        arguments = {
            "model": build_model(args, model_args),
            "args": SFTConfig(**options | {"output_dir": folder}),
            "train_dataset": rows,
            "callbacks": [times],
            "peft_config": adapter_config(model_args),
        }
        if batch_args is not None:
            trainer = NLITrainer(encoder=encoder, batch_args=batch_args, **arguments)
        else:
            trainer = SFTTrainer(processing_class=encoder.tokenizer, **arguments)
        parameters = count_parameters(trainer.model)
        batch = trainer.args.per_device_train_batch_size
        distinct, positions = tokens_per_pair(rows, encoder, batch, trainer.data_collator)
        start_memory_count()
        loss = trainer.train().training_loss
    steps = [end - start for start, end in zip(times.ends, times.ends[1:], strict=False)]
    rate = batch / statistics.median(steps[WARM_UP:] or steps)
    # The forward pass and the gradients of activations take 2 FLOP each per weight and token, those of weights 2 more.
    per_token = 4 * parameters.total + 2 * parameters.trainable
    return {
        "pairs_per_second": rate,
        "loss": loss,
        "peak_bytes": peak_memory(),
        "distinct_tokens_per_pair": distinct,
        "computed_tokens_per_pair": positions,
        "useful_flops": rate * distinct * per_token,
    }


def train_packed(**options):
    with patch.object(trie, "pack_training", functools.partial(trie.pack_training, share=False)):
        return train_speed(**options)


def forget_compilation():
    """Reset accelerate's state, in which compiling applies to all later trainers of the process."""
    AcceleratorState._reset_state()
    for name in [name for name in os.environ if name.startswith("ACCELERATE_DYNAMO_")]:
        del os.environ[name]


def tokens_per_pair(rows, encoder, batch, collator):
    """Tokens per pair in batches of consecutive rows: (nodes of the tries, tokens fed to the model with padding)."""
    tokens = TokenRows(rows, encoder.answers)
    prompts, gold = [tokens.prompt(index) for index in range(len(tokens))], tokens.gold.tolist()
    given = tokens if isinstance(collator, TrieCollator) else rows
    nodes = fed = 0
    for start in range(0, len(rows), batch):
        part = slice(start, start + batch)
        nodes += trie.pack_training(prompts[part], [encoder.answers[label] for label in gold[part]], 2**20)[
            "trie_tokens"
        ]
        inputs = collator([given[index] for index in range(*part.indices(len(rows)))])
        fed += sum(piece["input_ids"].numel() for piece in inputs.get("micro_batches", [inputs]))
    return nodes / len(rows), fed / len(rows)


def score_speed(args, training_args, model_args, batch_args, encoder, pairs):
    """Speed and memory of each scoring method.

    Also the share of pairs on which it agrees with `generate`, and how far its probabilities differ from `padded`.
    """
    if not args.score:
        return {}
    model = build_model(args, model_args).eval()
    prompts = encoder.encode(pairs["premise"], pairs["hypothesis"])
    texts = dict(zip(map(tuple, prompts), pairs.select_columns(list(SLOTS)).to_list(), strict=True))
    prompts.sort(key=len)  # minimizes padding for `generate`; the other methods sort by themselves
    answers, tokenizer = encoder.answers, encoder.tokenizer
    longest = max(map(len, prompts)) + max(map(len, answers))
    row = trie.row_tokens("trie", batch_args.max_row_tokens, model.config, longest, encoder.instruction_tokens)

    size = training_args.per_device_eval_batch_size

    def generate(prompts):
        batches = [prompts[at : at + size] for at in range(0, len(prompts), size)]
        return [label for batch in batches for label in generate_labels(model, tokenizer, batch, answers)], None

    def decide(compiled):
        with tempfile.TemporaryDirectory() as folder:
            write_decision_files(folder, encoder)
            ask = pipeline("decision", model=model, tokenizer=copy.deepcopy(tokenizer), decision_config=folder)
        question = {"type": "choice", "criteria": dict.fromkeys(encoder.prompt.labels)}

        def answer(prompts):
            requests = ({"state": texts[tuple(prompt)], "questions": {"label": question}} for prompt in prompts)
            probabilities = torch.tensor([[*ask(one)["label"]["probabilities"].values()] for one in requests])
            return probabilities.argmax(1).tolist(), probabilities

        return answer

    def score(answers, row, compiled):
        options = {"batch_size": size, "max_row_tokens": row, "graphs": scoring_graphs(model, size, row, compiled)}

        def answer(prompts):
            scores = score_prompts(model, prompts, answers, tokenizer.pad_token_id, **options)
            return scores.choice.tolist(), scores.log_probs.exp()

        return answer

    methods = {
        "generate": lambda compiled: generate,
        "pipeline": decide,
        "padded": functools.partial(score, answers, None),
        "tries": functools.partial(score, answers, row),
        "tries_choice": functools.partial(score, distinguishing_prefixes(answers), row),
    }
    figures, predictions, probabilities = {}, {}, {}
    for name in [method for method in SCORE if method in args.score]:
        if name == "pipeline" and not can_decide(encoder):
            continue
        if name == "lm_eval":
            if importlib.util.find_spec("lm_eval"):
                figures[name] = lm_eval_speed(model, encoder, prompts, size)
            continue
        if compiled := name.endswith("compiled"):
            for layer in model.modules():
                if isinstance(layer, GradientCheckpointingLayer):
                    layer.compile(dynamic=not torch.cuda.is_available())  # graphs have few shapes
        method = methods[name.removesuffix("_compiled")](compiled)
        method(prompts if name.startswith("tries") else prompts[: 2 * size])  # warm up; record
        start_memory_count()
        rates = []
        for _ in range(3):
            start = time.perf_counter()
            predictions[name], probabilities[name] = method(prompts)
            rates.append(len(prompts) / (time.perf_counter() - start))
        figures[name] = {"pairs_per_second": statistics.median(rates), "peak_bytes": peak_memory()}
        if "generate" in predictions:
            agreeing = sum(map(int.__eq__, predictions[name], predictions["generate"]))
            figures[name]["agreement"] = agreeing / len(prompts)
        if probabilities.get("padded") is not None and probabilities[name] is not None:
            difference = (probabilities[name] - probabilities["padded"]).abs().max()
            figures[name]["largest_difference"] = difference.item()
        Console().print(speed_table("Scoring", figures))
    return figures


def can_decide(encoder):
    """Whether transformers has the decision pipeline, and this prompt works with it."""
    return importlib.util.find_spec("transformers.decision") is not None and label_tokens(encoder) is not None


def lm_eval_speed(model, encoder, prompts, batch_size):
    from lm_eval.models.huggingface import HFLM

    harness = HFLM(pretrained=model, tokenizer=encoder.tokenizer, batch_size=batch_size)
    # Token ids instead of texts, so that it scores exactly the same sequences.
    requests = [(("", ""), prompt, answer) for prompt in prompts for answer in encoder.answers]
    harness._loglikelihood_tokens(requests[: 3 * batch_size], disable_tqdm=True)
    start_memory_count()
    start = time.perf_counter()
    harness._loglikelihood_tokens(requests, disable_tqdm=True)
    synchronize()
    return {"pairs_per_second": len(prompts) / (time.perf_counter() - start), "peak_bytes": peak_memory()}


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def start_memory_count():
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_memory():
    return torch.cuda.max_memory_reserved() if torch.cuda.is_available() else None


def speed_table(title, methods):
    columns = {
        "pairs/s": ("pairs_per_second", 1, ",.1f"),
        "peak GiB": ("peak_bytes", 2**30, ".1f"),
        "tokens/pair": ("distinct_tokens_per_pair", 1, ".1f"),
        "fed": ("computed_tokens_per_pair", 1, ".1f"),
        "TFLOP/s": ("useful_flops", 1e12, ".1f"),
        "loss": ("loss", 1, ".4f"),
        "as generate": ("agreement", 0.01, ".2f"),
        "from padded": ("largest_difference", 1, ".0e"),
    }
    columns = {title: of for title, of in columns.items() if any(method.get(of[0]) for method in methods.values())}
    table = Table("", *columns, title=title)
    for name, method in methods.items():
        found = ((method.get(key), unit, form) for key, unit, form in columns.values())
        table.add_row(name, *("–" if value is None else format(value / unit, form) for value, unit, form in found))
    return table


if __name__ == "__main__":
    run_script(main, (BenchmarkConfig, TrainDataConfig, PromptConfig, BatchConfig, SFTConfig, ModelConfig))
