"""Invented run folders in the layout of recipes/sft.py and recipes/eval.py, for tests of their readers."""

from datetime import datetime, timedelta

import numpy as np

from nli_sft.data.prompts import load_prompt
from nli_sft.evaluation.metrics import compute
from nli_sft.labels import LABELS
from nli_sft.runs import evaluation_folder, write_json, write_run

START = datetime(2026, 3, 1)


def predictions(accuracy, pairs=600, seed=0):
    """Predictions on pairs, three per premise: a share of `accuracy` is right, and half for the base."""
    import pandas as pd

    gold = np.arange(pairs) % 3
    random = np.random.default_rng(seed)

    def answers(share):
        wrong = (gold + random.integers(1, 3, pairs)) % 3
        return np.where(random.random(pairs) < share, gold, wrong)

    table = pd.DataFrame(
        {
            "uid": [f"pair-{number}" for number in range(pairs)],
            "premise": [f"premise {number // 3}" for number in range(pairs)],
            "hypothesis": [f"hypothesis {number}" for number in range(pairs)],
            "label": [LABELS[label] for label in gold],
        }
    )
    for model, share in (("base", 0.35), ("tuned", accuracy)):
        if model == "base":
            random = np.random.default_rng(99)  # the base predicts the same in every run
        chosen = answers(share)
        table[f"{model}_prediction"] = [LABELS[label] for label in chosen]
        for label, name in enumerate(LABELS):
            table[f"{model}_p_{name}"] = np.where(chosen == label, 0.8, 0.1)
            table[f"{model}_unconstrained_{name}"] = np.log(np.where(chosen == label, 0.7, 0.05))
        random = np.random.default_rng(seed)
    return table


def write_past_run(
    folder,
    accuracy,
    *,
    seed=1,
    prompt="plain",
    validation="v1",
    seconds=100.0,
    resources=None,
    evaluations=("snli-test",),
    pairs=600,
    test_data="t1",
    hypothesis_only=None,
    train_pairs=900,
    **recipe,
):
    """A run folder with this validation accuracy and a similar one on every evaluation."""
    prompt = load_prompt(prompt)
    recipe = {
        "model_name_or_path": "hub/tiny",
        "dataset_name": "snli",
        "learning_rate": 1e-3,
        "seed": seed,
        "output_dir": str(folder),
        **recipe,
    }
    history = [{"step": 0, "epoch": 0, "eval_accuracy": 0.33, "eval_loss": 2.0}]
    for step in (10, 20):
        history += [
            {"step": step, "epoch": step / 20, "loss": 1.0},
            {
                "step": step,
                "epoch": step / 20,
                "eval_accuracy": 0.33 + (accuracy - 0.33) * step / 20,
                "eval_loss": 1.0,
            },
        ]
    record = {
        "model": "hub/tiny",
        "parameters": {"total": 1000, "trainable": 100, "stored": 1000, "trainable_share": 0.1},
        "prompt_fingerprint": prompt.fingerprint,
        "data": {
            "dropped": {"unlabelled": 3},
            "train": {"pairs": train_pairs, "fingerprint": f"train-{seed}"},
            "validation": {"pairs": 500, "fingerprint": validation},
        },
        "train": {"train_runtime": seconds},
        "validation": {"eval_loss": 1.0, "eval_accuracy": accuracy},
        "history": history,
        "seconds": seconds + 5,
        "world_size": 1,
        "versions": {"torch": "2.13.0", "nli-sft": "0.1"},
        "git": {"commit": "c" * 40, "dirty": False},
        **({"resources": resources} if resources else {}),
    }
    write_run(folder, recipe=recipe, prompt=prompt, record=record)
    for name in evaluations:
        source, split = name.rsplit("-", 1)
        path = evaluation_folder(folder, source, split)
        table = predictions(accuracy, pairs, seed=seed)
        gold = [LABELS.index(label) for label in table["label"]]
        figures = {}
        for model in ("base", "tuned"):
            chosen = [LABELS.index(label) for label in table[f"{model}_prediction"]]
            mass = np.exp(table[[f"{model}_unconstrained_{label}" for label in LABELS]]).sum(axis=1)
            figures[model] = compute(gold, chosen, table[[f"{model}_p_{label}" for label in LABELS]].to_numpy(), mass)
        if hypothesis_only is not None:
            figures["hypothesis_only"] = {"accuracy": hypothesis_only, "accuracy_interval": [0.5, 0.7]}
        path.mkdir(parents=True)
        table.to_parquet(path / "predictions.parquet")
        summary = {"source": source, "split": split, "pairs": pairs, "data_fingerprint": test_data}
        write_json(path / "metrics.json", summary | {"prompt_fingerprint": prompt.fingerprint, **figures})
    return folder


def as_wandb_run(folder, number, **config):
    """A run folder as an entry of `wandb_server.WandbServer.runs`."""
    return {
        "id": f"id{number}",
        "name": folder.name,
        "group": "tiny-snli",
        "config": {"lora_r": number, **config},
        "created": (START + timedelta(days=number)).isoformat() + "Z",
        "folder": str(folder),
    }
