"""How fast, and in how much memory: our tries against TRL's own batches, generation and lm-evaluation-harness.

    python recipes/benchmark.py --dataset_name stanfordnlp/snli --model_name_or_path Qwen/Qwen3-0.6B --json out.json
    python recipes/benchmark.py --dataset_name scenes --model_name_or_path my-config/ --random_weights

One process, the same pairs for all, weights loaded anew for each. The first step warms up and is not counted; the rate
is the median of the others. Speed and memory are compared with the best of TRL's settings at the same batch.
lm-evaluation-harness takes part where it is installed (`pip install nli-sft[benchmark]`).
"""

import importlib.util
import json
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import PartialState
from rich import print
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback
from trl import ModelConfig, SFTConfig, SFTTrainer, get_peft_config

from nli_sft import trie
from nli_sft.configs import BatchConfig, PromptConfig, TrainDataConfig, resolve_recipe, run_script
from nli_sft.decoding import LabelScores, generate_labels, score_padded, score_trie
from nli_sft.models import load_model, load_tokenizer
from nli_sft.prompts import PromptEncoder, load_prompt
from nli_sft.sources import load_pairs, subsample
from nli_sft.trainer import NLITrainer


@dataclass
class BenchmarkConfig:
    """What is measured."""

    pairs: int = field(default=512, metadata={"help": "So many training pairs, taken by premise."})
    random_weights: bool = field(default=False, metadata={"help": "Build the model from its config.json alone."})
    json: str | None = field(default=None, metadata={"help": "Write all figures to this file."})


def main(args, data_args, prompt_args, batch_args, training_args, model_args):
    tokenizer = load_tokenizer(model_args.model_name_or_path, model_args.model_revision)
    encoder = PromptEncoder(load_prompt(prompt_args.prompt, prompt_args.label_words), tokenizer)
    source = {
        "config": data_args.dataset_config,
        "revision": data_args.dataset_revision,
        "columns": data_args.columns(),
    }
    pairs = subsample(load_pairs(data_args.dataset_name, "train", **source), args.pairs, seed=0).shuffle(seed=0)
    rows = encoder.encode_rows(pairs, max_length=None)
    shared = {"args": args, "training_args": training_args, "model_args": model_args, "rows": rows}

    train = {
        "TRL, its defaults": train_speed(**shared, per_device_train_batch_size=8, gradient_checkpointing=True),
        "TRL, padded": train_speed(**shared),
        "TRL, grouped by length": train_speed(**shared, train_sampling_strategy="group_by_length"),
        "tries": train_speed(**shared, encoder=encoder, batch_args=batch_args),
    }
    score = score_speed(args, training_args, model_args, batch_args, encoder, pairs)

    best = max(
        (train["TRL, padded"], train["TRL, grouped by length"]), key=lambda figures: figures["pairs_per_second"]
    )
    ours, generated = train["tries"], score["generate"]
    figures = {
        "train": {
            "methods": train,
            "speedup": ours["pairs_per_second"] / best["pairs_per_second"],
            "memory_ratio": ours["peak_bytes"] and ours["peak_bytes"] / best["peak_bytes"],
            "loss_difference": abs(ours["loss"] - train["TRL, padded"]["loss"]),
        },
        "score": {
            "methods": score,
            "speedup_generate": score["tries"]["pairs_per_second"] / generated["pairs_per_second"],
            "speedup_lm_eval": (rival := score.get("lm-evaluation-harness"))
            and score["tries"]["pairs_per_second"] / rival["pairs_per_second"],
            "agreement": score["tries"]["agreement"],
        },
        "device": PartialState().device.type,
        "pairs": len(rows),
    }
    print(speed_table("Training", train), speed_table("Scoring", score))
    print({part: {k: v for k, v in figures[part].items() if k != "methods"} for part in ("train", "score")})
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=2))


def build_model(args, model_args):
    torch.manual_seed(0)
    if not args.random_weights:
        return load_model(model_args).to(PartialState().device)
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


def train_speed(args, training_args, model_args, rows, encoder=None, batch_args=None, **changes):
    """Pairs a second (median step), the mean loss, and the device's peak, of one epoch of one trainer."""
    start_memory_count()
    times = StepTimes()
    options = resolve_recipe([training_args]) | {"report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    options |= {"num_train_epochs": 1, "train_sampling_strategy": "sequential"} | changes
    with tempfile.TemporaryDirectory() as folder:
        arguments = {
            "model": build_model(args, model_args),
            "args": SFTConfig(**options | {"output_dir": folder}),
            "train_dataset": rows,
            "callbacks": [times],
            "peft_config": get_peft_config(model_args),
        }
        if encoder is not None:
            trainer = NLITrainer(encoder=encoder, batch_args=batch_args, **arguments)
        else:
            trainer = SFTTrainer(**arguments)
        loss = trainer.train().training_loss
    steps = [end - start for start, end in zip(times.ends, times.ends[1:], strict=False)]
    batch = trainer.args.per_device_train_batch_size
    return {"pairs_per_second": batch / statistics.median(steps), "loss": loss, "peak_bytes": peak_memory()}


def score_speed(args, training_args, model_args, batch_args, encoder, pairs):
    """Pairs a second of each way to judge the same pairs, and the share on which it agrees with `generate`."""
    model = build_model(args, model_args).eval()
    prompts = encoder.encode(pairs["premise"], pairs["hypothesis"])
    prompts.sort()  # as `score_prompts` does: prompts that share a premise stand together
    answers, pad = encoder.answers, encoder.tokenizer.pad_token_id
    longest = max(map(len, prompts)) + max(map(len, answers))
    tokens = trie.row_tokens("trie", batch_args.max_row_tokens, model.config, longest)

    def choices(log_probs):
        return LabelScores.from_token_log_probs(log_probs, answers).choice.tolist()

    ways = {
        "generate": lambda batch: generate_labels(model, encoder.tokenizer, batch, answers),
        "padded": lambda batch: choices(score_padded(model, batch, answers, pad)),
        "tries": lambda batch: choices(score_trie(model, batch, answers, tokens)),
    }
    size = training_args.per_device_eval_batch_size
    figures, said = {}, {}
    for name, way in ways.items():
        way(prompts[:size])
        start_memory_count()
        start = time.perf_counter()
        said[name] = [label for at in range(0, len(prompts), size) for label in way(prompts[at : at + size])]
        synchronize()
        agreement = sum(map(int.__eq__, said[name], said["generate"])) / len(prompts)
        rate = len(prompts) / (time.perf_counter() - start)
        figures[name] = {"pairs_per_second": rate, "agreement": agreement, "peak_bytes": peak_memory()}
    if importlib.util.find_spec("lm_eval"):
        figures["lm-evaluation-harness"] = lm_eval_speed(model, encoder, prompts, size)
    return figures


def lm_eval_speed(model, encoder, prompts, batch_size):
    from lm_eval.models.huggingface import HFLM

    harness = HFLM(pretrained=model, tokenizer=encoder.tokenizer, batch_size=batch_size)
    # Token ids instead of texts, so that it judges exactly the sequences that we do.
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
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


def speed_table(title, methods):
    table = Table("", "pairs/s", "peak GiB", "loss", "agrees with generate", title=title)
    for name, figures in methods.items():
        peak = figures["peak_bytes"]
        table.add_row(
            name,
            f"{figures['pairs_per_second']:,.1f}",
            f"{peak / 2**30:.1f}" if peak else "–",
            f"{figures['loss']:.4f}" if "loss" in figures else "–",
            f"{figures['agreement']:.2%}" if "agreement" in figures else "–",
        )
    return table


if __name__ == "__main__":
    run_script(main, (BenchmarkConfig, TrainDataConfig, PromptConfig, BatchConfig, SFTConfig, ModelConfig))
