"""The content of a report, computed from the files of a run folder. `figures` and the templates lay it out."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from .. import UserError
from ..data.prompts import Prompt
from ..data.sources import describe_source
from ..evaluation.calibration import abstention_curve, temperature_text
from ..evaluation.comparison import Comparison, buckets, compare, design_effect, headline, points, smallest_difference
from ..evaluation.slices import Slice, explain, slice_changes
from ..labels import LABELS, counts_as
from ..runs import (
    HYPOTHESIS_ONLY,
    evaluation_folders,
    is_trained,
    label_sets,
    launch_command,
    read_json,
    read_metrics,
    read_predictions,
    read_run,
    training_command,
)
from .tables import NONE

# The number of pairs listed of each kind.
MAX_LISTED = 6

MODEL_NAMES = {
    "base": "before tuning",
    "tuned": "after tuning",
    "shuffled": "tuned, shuffled premises",
    "hypothesis_only": "hypothesis-only baseline",
}
BUCKET_NAMES = {
    "fixed": "corrected",
    "both_wrong": "not corrected",
    "regressed": "regressed",
    "both_right": "still right",
}


@dataclass(frozen=True)
class ListedPair:
    """One pair of a list, with the probabilities of the labels before and after tuning."""

    uid: str
    premise: str
    hypothesis: str
    gold: str
    before: str
    after: str
    p_before: tuple[float, ...]
    p_after: tuple[float, ...]


@dataclass(frozen=True)
class PairList:
    """The first of `total` pairs of one bucket."""

    title: str
    order: str
    total: int
    pairs: list[ListedPair]


def in_own_labels(table: pd.DataFrame, labels: Sequence[str], label_names: Sequence[str]) -> pd.DataFrame:
    """A table of predictions in the labels of its set.

    Args:
        labels, label_names: of the models and of the set, as `runs.label_sets` returns them.
    """
    own = {label: label_names[index] for label, index in zip(labels, counts_as(labels, label_names), strict=True)}
    columns = [name for name in table.columns if name.endswith("_prediction")]
    return table.assign(**{name: [own[label] for label in table[name]] for name in columns})


def _ids(names: Iterable[str], order: Sequence[str]) -> np.ndarray:
    """(n,) the place of each name in `order`."""
    place = {name: index for index, name in enumerate(order)}
    return np.array([place[name] for name in names])


class Evaluation:
    """One split of one source: predictions of the base, of the tuned model and of the controls that were run.

    Attributes:
        name: such as `snli test`; `key` is its form in file names.
        summary: the content of metrics.json.
        table: the content of predictions.parquet, in the labels of the set (`in_own_labels`).
        metrics: {model: metrics}, a part of `summary`.
        labels, label_names: the label sets of the models and of the set.
        main: the model that is evaluated: `tuned`, or `base` if nothing was tuned.
        compared: `base` and `tuned`, or `base` alone: then there is no comparison.
        names: {model: its name in tables and plots}.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.key = re.sub(r"[^\w.-]+", "-", folder.name)
        self.summary = read_metrics(folder)
        source = self.summary.get("name") or Path(self.summary["source"]).name
        source = re.sub(r"\.(jsonl|csv|tsv|parquet|txt)(\.gz)?$", "", source)
        self.name = source if self.summary["split"] == "all" else f"{source} {self.summary['split']}"
        self.labels, self.label_names = label_sets(self.summary)
        self.table = in_own_labels(read_predictions(folder), self.labels, self.label_names)
        self.is_two_way = self.labels != self.label_names
        self.models = [name for name in MODEL_NAMES if f"{name}_prediction" in self.table]
        self.metrics = {name: self.summary[name] for name in self.models}
        self.main = "tuned" if "tuned" in self.models else "base"
        self.compared = [name for name in ("base", "tuned") if name in self.models]
        self.names = MODEL_NAMES if self.main == "tuned" else {"base": "the model", "shuffled": "shuffled premises"}

    @property
    def _gold(self) -> np.ndarray:
        """(n,) ids of the gold labels."""
        return _ids(self.table["label"], self.label_names)

    def probabilities(self, model: str) -> np.ndarray:
        """(n, labels) constrained probability of each label of the model."""
        return self.table[[f"{model}_p_{label}" for label in self.labels]].to_numpy(dtype=np.float64)

    def _own_probabilities(self, model: str) -> np.ndarray:
        """(n, labels of the set) probabilities; of neutral and contradiction together for non-entailment."""
        return self.probabilities(model) @ np.eye(len(self.label_names))[self._mapping]

    @property
    def _mapping(self) -> list[int]:
        return counts_as(self.labels, self.label_names)

    def _unconstrained_accuracy(self, model: str) -> float:
        """Accuracy of the label with the highest unconstrained probability: `acc` of lm-evaluation-harness."""
        answers = self.table[[f"{model}_unconstrained_{label}" for label in self.labels]].to_numpy().argmax(axis=1)
        return float((np.array(self._mapping)[answers] == self._gold).mean())

    def right(self, model: str) -> np.ndarray:
        """(n,) whether each prediction is the gold label."""
        return (self.table[f"{model}_prediction"] == self.table["label"]).to_numpy()

    def p_gold(self, model: str) -> np.ndarray:
        """(n,) probability of the gold label."""
        return self._own_probabilities(model)[np.arange(len(self.table)), self._gold]

    def compare(self, before: str, after: str) -> Comparison:
        columns = ("label", f"{before}_prediction", f"{after}_prediction", "premise")
        return compare(*(self.table[name].to_numpy() for name in columns))

    @cached_property
    def comparison(self) -> Comparison:
        return self.compare("base", "tuned")

    @cached_property
    def headline(self) -> str:
        if len(self.compared) == 1:
            metrics, (label, share) = self.metrics[self.main], self.most_frequent_label
            low, high = metrics["accuracy_interval"]
            return (
                f"{metrics['accuracy']:.1%} of {metrics['n']:,} {self.name} pairs are right (95% interval {low:.1%} "
                f"to {high:.1%}). Always {label} would be right on {share:.1%}."
            )
        return headline(self.comparison, pairs=f"{self.name} pairs")

    @cached_property
    def power(self) -> str:
        """The smallest difference that the test of no change can detect on these pairs, in a sentence or two."""
        c = self.comparison
        change = self.right("tuned").astype(int) - self.right("base")
        effect = max(1.0, design_effect(change, pd.factorize(self.table["premise"])[0]))
        smallest = smallest_difference(c.pairs, c.fixed + c.regressed, design_effect=effect)
        changed = f"Power: {c.fixed + c.regressed:,} of {c.pairs:,} pairs turned right or wrong"
        if smallest is None:
            return f"{changed}, too few for the test by premise to detect any difference."
        return (
            f"{changed}. With that many, the test by premise detects a true difference of {100 * smallest:.1f} points "
            f"in 80% of cases (5% level, design effect {effect:.2f})."
        )

    def abstention(self, model: str) -> tuple[np.ndarray, np.ndarray]:
        """Coverage and accuracy if a model answers only the pairs on which it is most confident."""
        answers = _ids(self.table[f"{model}_prediction"], self.label_names)
        confidence = self._own_probabilities(model)[np.arange(len(answers)), answers]
        return abstention_curve(confidence, self.right(model))

    @cached_property
    def slices(self) -> list[Slice]:
        if len(self.compared) == 1:
            return []
        return slice_changes(self.table, self.right("base"), self.right("tuned"), self.label_names)

    @cached_property
    def explanation(self) -> list[str]:
        return explain(self.slices)

    @cached_property
    def bucket(self) -> np.ndarray:
        """(n,) the bucket of each pair, one of `comparison.BUCKETS`."""
        gold, before, after = (self.table[c].to_numpy() for c in ("label", "base_prediction", "tuned_prediction"))
        return buckets(gold, before, after)

    @property
    def most_frequent_label(self) -> tuple[str, float]:
        """The most frequent gold label, and the accuracy of always predicting it."""
        shares = self.table["label"].value_counts(normalize=True)
        return str(shares.index[0]), float(shares.iloc[0])

    def pair_lists(self) -> list[PairList]:
        """Corrected, not corrected and regressed pairs, the most confident first."""
        p_gold, p_answer = self.p_gold("tuned"), self.probabilities("tuned").max(axis=1)
        right, wrong = (f"most confident of {label} label after tuning first" for label in ("the right", "a wrong"))
        return [
            self._pair_list("fixed", "Corrected by tuning", right, p_gold),
            self._pair_list("both_wrong", "Not corrected", wrong, p_answer),
            self._pair_list("regressed", "Regressed", wrong, p_answer),
        ]

    def _pair_list(self, bucket: str, title: str, order: str, confidence: np.ndarray) -> PairList:
        rows = np.flatnonzero(self.bucket == bucket)
        first = rows[np.argsort(-confidence[rows], kind="stable")[:MAX_LISTED]]
        p_before, p_after = self.probabilities("base"), self.probabilities("tuned")
        columns = ("uid", "premise", "hypothesis", "label", "base_prediction", "tuned_prediction")
        texts = [self.table[name].to_numpy() for name in columns]
        pairs = [
            ListedPair(*(str(text[row]) for text in texts), p_before=tuple(p_before[row]), p_after=tuple(p_after[row]))
            for row in first
        ]
        return PairList(title, order, len(rows), pairs)

    def controls(self) -> list[str]:
        """Whether the model reads the premise: a sentence per control that was run."""
        sentences = []
        if "shuffled" in self.models:
            c, model = self.compare("shuffled", self.main), "tuned model" if self.main == "tuned" else "model"
            figures = (
                f"With shuffled premises, the {model} is right on {c.before:.1%} of pairs instead of "
                f"{c.after:.1%} ({points(-c.difference)} points, 95% interval {points(-c.interval[1])} to "
                f"{points(-c.interval[0])}) and gives the same answer on {c.agreement:.1%}"
            )
            verdict = "it uses the premise" if c.interval[0] > 0 else "nothing shows that it uses the premise"
            sentences.append(f"{figures}: {verdict}.")
        if "hypothesis_only" in self.models:
            c = self.compare("hypothesis_only", "tuned")
            interval = f"95% interval {points(c.interval[0])} to {points(c.interval[1])}"
            figures = (
                f"The hypothesis-only baseline is right on {c.before:.1%} of pairs. The tuned model differs by "
                f"{points(c.difference)} points ({interval})"
            )
            if c.interval[0] > 0:
                sentences.append(f"{figures}: that much of its accuracy cannot come from the hypotheses alone.")
            else:
                sentences.append(f"{figures}: its accuracy could come from the hypotheses alone.")
        return sentences

    def unconstrained_generation(self) -> str | None:
        """The outcome of unconstrained generation on a sample, in a sentence; `None` if it was not done."""
        base, tuned = self.unconstrained("base"), self.unconstrained("tuned")
        if base and len(self.compared) == 1:
            wrong, right = (round(base["n"] * base[share]) for share in ("invalid_share", "accuracy"))
            answers = f"no valid label in {wrong} of {base['n']} answers and was right in {right}"
            return f"Unconstrained, the model gave {answers}."
        if not (base and tuned):
            return None

        (no_label, right), (tuned_no_label, tuned_right) = (
            [round(answers["n"] * answers[share]) for share in ("invalid_share", "accuracy")]
            for answers in (base, tuned)
        )
        return (
            f"Unconstrained, the base model gave no valid label in {no_label} of {base['n']} answers and was right in "
            f"{right}. The tuned model gave no valid label in {tuned_no_label} and was right in {tuned_right}."
        )

    def unconstrained(self, model: str) -> Mapping[str, Any] | None:
        """`n`, `accuracy` and `invalid_share` of unconstrained generation, if it was done with this model."""
        return self.summary.get(model, {}).get("unconstrained_generation")

    def figures(self) -> list[list[str]]:
        """Rows of the table of metrics: the name, and the figure of each model of `compared`."""
        shown = [self.metrics[model] for model in self.compared]
        rows = [
            ["Accuracy", *(f"{metrics['accuracy']:.2%}" for metrics in shown)],
            ["95% interval", *("{:.1%} to {:.1%}".format(*metrics["accuracy_interval"]) for metrics in shown)],
        ]
        for key, name in (
            ("macro_f1", "Macro-F1"),
            ("nll", "Log loss, nats"),
            ("brier", "Brier score, 0 to 2"),
            ("ece", "Calibration error (ECE)"),
        ):
            rows.append([name, *(f"{metrics[key]:.3f}" for metrics in shown)])
        calibrated = [self.summary.get(model, {}).get("calibrated") for model in self.compared]
        if all(calibrated):
            rows.append(["Temperature fitted on validation", *map(temperature_text, calibrated)])
            for key, name in (("nll", "Log loss"), ("ece", "Calibration error")):
                values = (f"{t[key]:.3f}" if key in t else NONE for t in calibrated)
                rows.append([f"{name} at that temperature", *values])
        annotators = [self.summary.get(model, {}).get("annotators", {}) for model in self.compared]
        for key, name in (
            ("kl_divergence", "KL divergence from annotators, nats"),
            ("brier", "Brier score against annotators"),
        ):
            if all(key in figures for figures in annotators):
                rows.append([name, *(f"{figures[key]:.3f}" for figures in annotators)])
        rows.append(["Label mass", *(mass_text(metrics["label_mass"]) for metrics in shown)])
        by_probability = (f"{self._unconstrained_accuracy(model):.2%}" for model in self.compared)
        rows.append(["Accuracy by unconstrained probability", *by_probability])
        answers = [found for model in self.compared if (found := self.unconstrained(model))]
        if len(answers) == len(self.compared):
            invalid = (f"{found['invalid_share']:.1%}" for found in answers)
            rows.append(["Unconstrained accuracy", *(f"{found['accuracy']:.1%} of {found['n']}" for found in answers)])
            rows.append(["Unconstrained answers without a valid label", *invalid])
        return rows

    def mistakes(self) -> list[Mapping[str, Any]]:
        """The wrong answers of `main` of which it is most confident: uid, texts, label, answer and its probability."""
        answers = self.table[f"{self.main}_prediction"].to_numpy()
        confidence = self._own_probabilities(self.main)[np.arange(len(answers)), _ids(answers, self.label_names)]
        wrong = np.flatnonzero(~self.right(self.main))
        first = wrong[np.argsort(-confidence[wrong], kind="stable")[:MAX_LISTED]]
        rows = self.table.assign(answer=answers, probability=confidence).iloc[first]
        return rows[["uid", "premise", "hypothesis", "label", "answer", "probability"]].to_dict("records")


def mass_text(mass: float) -> str:
    """Label mass as a share, or in scientific notation if it is tiny."""
    return f"{mass:.2%}" if mass >= 1e-4 else f"{mass:.1e}"


@dataclass(frozen=True)
class Epoch:
    """A row of the training table; `None` where nothing was logged."""

    number: int
    training_loss: float | None
    validation_loss: float | None
    validation_accuracy: float | None
    is_best: bool


class Training:
    """The course of a training, from the log of the Trainer.

    Attributes:
        losses: [{epoch, step, loss, learning_rate}], as logged.
        validations: [{epoch, step, eval_loss, eval_accuracy}], one per step.
        best: the validation of the kept checkpoint, if one was chosen.
    """

    def __init__(self, record: Mapping):
        history = record.get("history", [])
        self.losses = [entry for entry in history if "loss" in entry]
        by_step: dict[int | None, dict] = {}
        for entry in history:
            if "eval_loss" in entry:
                # At the end, the best checkpoint is evaluated again and logged at the last step: keep the first.
                by_step.setdefault(entry["step"], entry)
        self.validations = list(by_step.values())
        self.best = by_step.get(record.get("best_checkpoint_step"))

    def epochs(self) -> list[Epoch]:
        """The mean training loss and the last validation of each epoch."""
        steps = np.diff([0, *(entry["step"] for entry in self.losses)])
        last = max((_epoch(entry) for entry in (*self.losses, *self.validations)), default=0)
        rows = []
        for number in range(1, last + 1):
            logged = [(e["loss"], n) for e, n in zip(self.losses, steps, strict=True) if _epoch(e) == number]
            validation = [e for e in self.validations if _epoch(e) == number]
            losses, weights = zip(*logged, strict=True) if logged else ((), ())
            rows.append(
                Epoch(
                    number,
                    float(np.average(losses, weights=weights)) if sum(weights) else None,
                    validation[-1]["eval_loss"] if validation else None,
                    validation[-1].get("eval_accuracy") if validation else None,
                    is_best=bool(self.best) and _epoch(self.best) == number,
                )
            )
        return rows


def _read_suite(path: Path, evaluations: set[str]) -> dict:
    """A file of `suites.write_suite`; sets whose evaluation was not read count as missing."""
    suite = read_json(path, {"suite": str, "order": list, "evaluated": dict, "missing": dict})
    stale = {name for name, key in suite["evaluated"].items() if re.sub(r"[^\w.-]+", "-", key) not in evaluations}
    evaluated = {name: key for name, key in suite["evaluated"].items() if name not in stale}
    missing = suite["missing"] | dict.fromkeys(stale, "its evaluation was removed, or used other weights")
    return suite | {"evaluated": evaluated, "missing": missing}


def _epoch(entry: Mapping) -> int:
    """The epoch, from 1, in or at the end of which an entry was logged."""
    return max(1, math.ceil(entry["epoch"] - 1e-6))


class Report:
    """The content of the report on one run.

    Attributes:
        name: of the run folder.
        recipe, prompt, record: as `runs.read_run` returns them.
        evaluations: the run's own source first, then in the order of the suite.
        suites: the files of `suites.write_suite`.

    Raises:
        UserError: if the folder is not a run or has not been evaluated.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.name = self.folder.resolve().name
        self.recipe, self.prompt, self.record = read_run(folder)
        self.training = Training(self.record)
        folders = [path for path in evaluation_folders(folder) if (path / "predictions.parquet").exists()]
        evaluations = [Evaluation(path) for path in folders]
        if not evaluations:
            raise UserError(f"{folder} has not been evaluated; run recipes/eval.py --run {folder} first")
        suites = [_read_suite(path, {e.key for e in evaluations}) for path in sorted(self.folder.glob("eval/*.json"))]
        places = [key for suite in suites for key in suite["evaluated"].values()]
        self.evaluations = sorted(
            evaluations,
            key=lambda e: (
                e.summary["source"] != self.recipe.get("dataset_name"),
                places.index(e.key) if e.key in places else len(places),
            ),
        )
        self.suites = suites

    def suite(self, name: str) -> Mapping:
        """The suite of that name."""
        return next(suite for suite in self.suites if suite["suite"] == name)

    @property
    def own(self) -> Evaluation:
        return self.evaluations[0]

    @property
    def is_trained(self) -> bool:
        """Whether the run was trained, not only evaluated."""
        return is_trained(self.record)

    @property
    def method(self) -> str:
        """How the base was tuned, such as `QLoRA r=64` or `all parameters`."""
        if not is_trained(self.record):
            adapter = self.record.get("adapter")
            return f"with the adapter {adapter}" if adapter else "as it is, not tuned"
        if not self.recipe.get("use_peft"):
            return "all parameters"
        quantised = self.recipe.get("load_in_4bit") or self.recipe.get("load_in_8bit")
        return f"{'QLoRA' if quantised else 'LoRA'} r={self.recipe.get('lora_r', 16)}"

    def size(self) -> list[tuple[str, str]]:
        """Rows of the table on the model's size."""
        counts = self.record["parameters"]
        total, trainable, stored = counts["total"], counts["trainable"], counts["stored"]
        if not is_trained(self.record):
            return [("Parameters", f"{total:,}"), ("Stored elements", f"{stored:,}")]
        rows = [
            ("Parameters", f"{total:,}"),
            ("Trainable parameters", f"{trainable:,} ({trainable / total:.2%} of all)"),
        ]
        if stored != total:
            rows.append(
                (
                    "Stored elements",
                    f"{stored:,}: 4-bit storage packs two weights into a byte, so tools that count elements "
                    f"report {trainable:,} of {stored:,} ({trainable / stored:.2%})",
                )
            )
        return rows

    def resources(self) -> list[tuple[str, str]]:
        """Rows of the table on time, memory, disk and throughput, as far as they were measured."""
        training = self.record.get("resources", {})
        rows = _measured("Training run", training)
        if not training and "seconds" in self.record:
            rows.append(("Training run: wall time in all", duration(self.record["seconds"])))
        # An evaluation of several splits is measured once and recorded with each split.
        measured: list[Mapping] = []
        for evaluation in self.evaluations:
            resources = evaluation.summary.get("resources")
            if resources and resources not in measured:
                measured.append(resources)
                of = f"Evaluation {len(measured)}" if len(measured) > 1 else "Evaluation"
                rows += _measured(of, resources)
        for evaluation in self.evaluations:
            for model in evaluation.models:
                figures = evaluation.summary.get(model, {})
                if "seconds" in figures:
                    speed = f"{duration(figures['seconds'])}, {figures['pairs_per_second']:,.0f} pairs/s"
                    rows.append((f"Scoring {evaluation.name}, {evaluation.names[model]}", speed))
        return rows

    def provenance(self) -> list[tuple[str, str]]:
        """Rows of the table on the origin of the run."""
        data, versions = self.record.get("data", {}), self.record.get("versions", {})
        rows = [("Base model", self.record["model"])]
        for key, name in (("model_revision", "Base model's commit"), ("dataset_name", "Source of pairs")):
            if self.recipe.get(key):
                rows.append((name, str(self.recipe[key])))
        rows.append(("Prompt", f"{self.prompt.name}, fingerprint {self.prompt.fingerprint}"))
        for split in ("train", "validation"):
            if split in data:
                fingerprint = f"{data[split]['pairs']:,}, fingerprint {data[split]['fingerprint']}"
                rows.append((f"{split.capitalize()} pairs", fingerprint))
        for source, counts in data.get("sources", {}).items():
            rows.append((f"Train pairs of {source}", describe_source(counts)))
        dropped = ", ".join(f"{n:,} {reason.replace('_', ' ')}" for reason, n in data.get("dropped", {}).items() if n)
        if is_trained(self.record):
            rows.append(("Rows dropped before training", dropped or "none"))
        for evaluation in self.evaluations:
            summary = evaluation.summary
            text = f"{summary['pairs']:,}, fingerprint {summary['data_fingerprint']}"
            if summary.get("unlabelled_pairs_dropped"):
                text += f"; {summary['unlabelled_pairs_dropped']:,} without a gold label left out"
            if summary.get("unlinked_edits_dropped"):
                text += f"; {summary['unlinked_edits_dropped']:,} edits without their original left out"
            if summary.get("train_test_overlap"):
                text += f"; train-test overlap: {summary['train_test_overlap']:,} pairs"
            rows.append((f"Pairs of {evaluation.name}", text))
        git = self.record.get("git")
        if git:
            rows.append(("Code", git["commit"] + (", with uncommitted changes" if git["dirty"] else "")))
        rows.append(("Seed", str(self.recipe.get("seed", "the default of the Trainer, 42"))))
        rows.append(("Processes", str(self.record.get("world_size", 1))))
        rows.append(("Versions", ", ".join(f"{name} {version}" for name, version in versions.items())))
        rows.append(("Command", training_command(self.folder, self.record)))
        return rows

    def recipe_text(self) -> str:
        return (self.folder / "recipe.yaml").read_text(encoding="utf-8")

    def how_to_run_controls(self) -> list[str]:
        """Commands that train the hypothesis-only baseline and evaluate this run with it."""
        control = ["--prompt", HYPOTHESIS_ONLY, "--label_words", *self.prompt.label_words]
        if self.prompt.labels != LABELS:
            control += ["--labels", *self.prompt.labels]
        control += ["--output_dir", self.folder / HYPOTHESIS_ONLY]
        if self.recipe.get("hypothesis_only_control"):
            control += ["--hypothesis_only_control", "false"]
        code = ["--trust_remote_code", "true"] if self.recipe.get("trust_remote_code") else []
        return [
            launch_command("recipes/sft.py", "--config", self.folder / "recipe.yaml", *control, record=self.record),
            launch_command("recipes/eval.py", "--run", self.folder, *code),
        ]


def prompt_text(prompt: Prompt) -> str:
    """The prompt by role, then the answers that the model may give."""
    turns = "\n\n".join(f"{turn['role']}:\n{turn['content']}" for turn in prompt.turns())
    answers = " | ".join(prompt.label_words)
    return f"{turns}\n\nassistant:\n{answers}"


def duration(seconds: float) -> str:
    """`2,522 s (42 min)`, rounded for reading."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{seconds:,.0f} s ({minutes:.0f} min)" if minutes < 120 else f"{seconds:,.0f} s ({minutes / 60:.1f} h)"


def size_text(n: float) -> str:
    """A number of bytes in GiB or MiB."""
    return f"{n / 2**30:.2f} GiB" if n >= 2**30 else f"{n / 2**20:,.1f} MiB"


def _measured(what: str, resources: Mapping) -> list[tuple[str, str]]:
    """Rows from the result of `resources.ResourceRecorder.summary`."""
    if not resources:
        return []
    rows = [(f"{what}: wall time in all", duration(resources["seconds"]))]
    for name, phase in resources["phases"].items():
        speeds = [f"{phase[f'{unit}_per_second']:,.0f} {unit}/s" for unit in ("pairs", "tokens") if unit in phase]
        rows.append((f"{what}: {name.replace('_', ' ')}", ", ".join([duration(phase["seconds"]), *speeds])))
    processes = resources["processes"]
    for number, process in enumerate(processes):
        of = f", process {number}" if len(processes) > 1 else ""
        rows.append((f"{what}: peak RAM{of}", size_text(process["peak_ram_bytes"])))
        device = process["device"]
        if device:
            rows.append(
                (
                    f"{what}: peak GPU memory{of}",
                    f"{size_text(device['peak_allocated_bytes'])} allocated, "
                    f"{size_text(device['peak_reserved_bytes'])} reserved, of "
                    f"{size_text(device['memory_bytes'])} on {device['name']}",
                )
            )
    for key, name in (("run_bytes", "disk used by the run"), ("model_bytes", "disk used by the base model")):
        if resources["disk"][key] is not None:
            rows.append((f"{what}: {name}", size_text(resources["disk"][key])))
    hardware = resources["hardware"]
    rows.append(
        (f"{what}: machine", f"{hardware['cpu']}, {hardware['cores']} cores, {size_text(hardware['ram_bytes'])} RAM")
    )
    return rows
