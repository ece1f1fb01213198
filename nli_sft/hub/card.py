"""The model card of a run, with its results as metadata."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import (
    EvalResult,
    EvalResultEntry,
    HfApi,
    ModelCard,
    ModelCardData,
    eval_result_entries_to_yaml,
)
from huggingface_hub.errors import HTTPError  # of httpx, or of another client that huggingface_hub uses
from jinja2 import Environment, StrictUndefined

from ..data.prompts import listed
from ..evaluation.comparison import accuracy_interval, compare, headline
from ..labels import LABELS, TWO_WAY_LABELS
from ..models.bases import locate_model
from ..models.loading import load_encoder
from ..report.compare import EvaluationRecord
from ..runs import evaluation_folders, launch_command, read_json, read_recipe, read_run, versions
from .decision import label_tokens, prompt_prefix

CARD_TEMPLATE = Path(__file__).with_name("model_card.md.jinja")

# Used if the page of a data set cannot be read.
KNOWN_LICENSES = {"stanfordnlp/snli": "cc-by-sa-4.0"}

# What a model with these labels predicts. (Of others, the labels alone are known.)
FOLLOWS = {
    LABELS: "follows from a **premise** (`entailment`), may or may not be true (`neutral`), or cannot be true "
    "(`contradiction`)",
    TWO_WAY_LABELS: "follows from a **premise** (`entailment`) or not (`non-entailment`)",
}

MODEL_NAMES = {
    "base": "before tuning",
    "tuned": "**after tuning**",
    "shuffled": "after tuning, shuffled premises",
    "hypothesis_only": "hypothesis-only baseline",
}


def model_card(
    folder: str | Path, repo_id: str, *, base_model: str | None = None, license: str | None = None
) -> ModelCard:
    """The card of a run: results, code to use the model, prompt, training, limits and licences.

    Args:
        folder: the run folder.
        repo_id: the repository (or folder) from which the code on the card loads the model.
        base_model: Hub id of the base, if the recipe names a local folder.
        license: of the tuned model; by default the licence that the page of the base states.

    Raises:
        UserError: if the folder is not a run folder.
    """
    folder = Path(folder)
    recipe, prompt, record = read_run(folder)
    encoder = load_encoder(folder)
    tokenizer = encoder.tokenizer
    base = base_model or recipe["model_name_or_path"]
    base_id = None if Path(locate_model(base)).exists() else base
    dataset = recipe["dataset_name"]
    dataset_id = dataset if _is_hub_id(dataset) else None
    base_license = _stated_license(base_id, "model")
    data_license = _stated_license(dataset_id, "dataset")
    is_adapter = (folder / "adapter_config.json").is_file()
    adapter = read_json(folder / "adapter_config.json") if is_adapter else {}
    evaluations = read_evaluations(folder)
    results = [result for evaluation in evaluations for result in _eval_results(evaluation)]
    results = results or _validation_results(recipe, record, dataset_id)
    data = ModelCardData(
        base_model=base_id,
        base_model_relation=("adapter" if is_adapter else "finetune") if base_id else None,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-generation",
        datasets=[dataset_id] if dataset_id else None,
        language="en",
        license=license or base_license,
        metrics=["accuracy", "f1"],
        tags=["natural-language-inference", "nli", "nli-sft", "trl", "sft", *(["lora"] if is_adapter else [])],
        model_name=repo_id.rpartition("/")[2],
        eval_results=results or None,
    )
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    content = environment.from_string(CARD_TEMPLATE.read_text(encoding="utf-8")).render(
        card_data=data.to_yaml(),
        repo_id=repo_id,
        is_adapter=is_adapter,
        adapter=adapter,
        base=base,
        base_id=base_id,
        base_revision=recipe.get("model_revision"),
        quantised=recipe.get("load_in_4bit") or recipe.get("load_in_8bit"),
        dataset=dataset if dataset_id else Path(dataset).name,
        dataset_id=dataset_id,
        license=license,
        base_license=base_license,
        data_license=data_license,
        evaluations=evaluations,
        headline=next((e["headline"] for e in evaluations if e.get("headline")), None),
        validation=_validation(record),
        figures=[path.relative_to(folder).as_posix() for path in sorted(folder.glob("figures/*")) if _is_image(path)],
        has_report=(folder / "report.html").is_file(),
        command=launch_command("recipes/sft.py", "--config", "recipe.yaml", record=record),
        prompt=prompt,
        template=encoder.template,
        prefix=prompt_prefix(encoder),
        decision_labels=label_tokens(encoder),
        criteria=dict.fromkeys(prompt.labels),
        is_chat=encoder.is_chat,
        labels=prompt.labels,
        follows=FOLLOWS.get(prompt.labels),
        listed_labels=listed([f"`{label}`" for label in prompt.labels]),
        answers=encoder.answers,
        answer_texts=[tokenizer.decode(answer) for answer in encoder.answers],
        end_token_id=tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.pad_token_id,
        recipe_text=yaml.safe_dump(
            {key: value for key, value in recipe.items() if key != "output_dir"} | {"model_name_or_path": base},
            sort_keys=False,
            allow_unicode=True,
        ),
        record=record,
        versions=record.get("versions") or versions(),
    )
    return ModelCard(content)


def read_evaluations(folder: Path) -> list[dict[str, Any]]:
    """The evaluations in a run folder, as the card shows them, the run's own source first.

    Each has `key`, `source`, `split`, `pairs`, `models` {name: metrics} and, if the predictions of the base and the
    tuned model were kept, `headline`.
    """
    recipe = read_recipe(folder)
    evaluations = []
    for record in map(EvaluationRecord, evaluation_folders(folder)):
        source, split = record.summary["source"], record.summary["split"]
        is_own = source == recipe.get("dataset_name")
        name = f"{Path(source).name} {split}"
        evaluations.append(
            {
                "key": record.key,
                "name": name,
                "source": source,
                "is_own": is_own,
                "dataset_id": source if _is_hub_id(source) else None,
                "revision": recipe.get("dataset_revision") if is_own else None,
                "split": split,
                "pairs": record.summary["pairs"],
                "models": {MODEL_NAMES[key]: record.summary[key] for key in MODEL_NAMES if key in record.models},
                "tuned": record.summary["tuned"] if "tuned" in record.models else None,
                "headline": _headline(record, name),
            }
        )
    return sorted(evaluations, key=lambda evaluation: not evaluation["is_own"])


def _headline(record: EvaluationRecord, name: str) -> str | None:
    columns = ["label", "base_prediction", "tuned_prediction", "premise"]
    if record.table is None or not set(columns) <= set(record.table.columns):
        return None
    comparison = compare(*(record.table[column].to_numpy() for column in columns))
    return headline(comparison, pairs=f"{name} pairs")


def _eval_results(evaluation: Mapping) -> list[EvalResult]:
    """The `model-index` entries of one split."""
    tuned = evaluation["tuned"]
    if tuned is None:
        return []
    low, high = tuned["accuracy_interval"]
    about = {
        "task_type": "text-classification",
        "task_name": "Natural language inference",
        "dataset_type": evaluation["dataset_id"] or evaluation["key"],
        "dataset_name": evaluation["name"],
        "dataset_split": evaluation["split"],
        "dataset_revision": evaluation["revision"],
    }
    interval = f"Accuracy (95% interval {low:.4f} to {high:.4f}, {evaluation['pairs']:,} pairs)"
    return [
        EvalResult(**about, metric_type="accuracy", metric_value=round(tuned["accuracy"], 6), metric_name=interval),
        EvalResult(**about, metric_type="f1", metric_value=round(tuned["macro_f1"], 6), metric_name="Macro-F1"),
    ]


def _validation(record: Mapping) -> dict[str, Any] | None:
    """Validation accuracy measured in training. The checkpoint was chosen by it, so it is slightly optimistic."""
    accuracy = record.get("validation", {}).get("eval_accuracy")
    if accuracy is None:
        return None
    pairs = record["data"]["validation"]["pairs"]
    low, high = accuracy_interval(accuracy, pairs)
    first = next((entry for entry in record.get("history", []) if "eval_accuracy" in entry), {})
    return {
        "accuracy": accuracy,
        "low": low,
        "high": high,
        "pairs": pairs,
        "base": first["eval_accuracy"] if first.get("epoch") == 0 else None,
    }


def _validation_results(recipe: Mapping, record: Mapping, dataset_id: str | None) -> list[EvalResult]:
    measured = _validation(record)
    if measured is None:
        return []
    name = Path(recipe["dataset_name"]).name
    return [
        EvalResult(
            task_type="text-classification",
            task_name="Natural language inference",
            dataset_type=dataset_id or name,
            dataset_name=f"{name} validation",
            dataset_split="validation",
            dataset_revision=recipe.get("dataset_revision"),
            metric_type="accuracy",
            metric_value=round(measured["accuracy"], 6),
            metric_name=f"Accuracy (95% interval {measured['low']:.4f} to {measured['high']:.4f})",
        )
    ]


def eval_result_files(folder: Path) -> dict[str, bytes]:
    """{name: content} of `.eval_results/*.yaml`, for evaluations on Hub data sets."""
    files = {}
    for evaluation in read_evaluations(folder):
        if evaluation["dataset_id"] and evaluation["tuned"]:
            low, high = evaluation["tuned"]["accuracy_interval"]
            entry = EvalResultEntry(
                dataset_id=evaluation["dataset_id"],
                task_id="default",
                value=round(100 * evaluation["tuned"]["accuracy"], 2),
                dataset_revision=evaluation["revision"],
                notes=f"accuracy in %, split {evaluation['split']}, {evaluation['pairs']} pairs, 95% interval "
                f"{100 * low:.2f} to {100 * high:.2f}, constrained generation over the labels",
            )
            text = yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False)
            files[f".eval_results/{evaluation['key']}.yaml"] = text.encode()
    return files


def _stated_license(repo_id: str | None, repo_type: str) -> str | None:
    """The licence that a repository on the Hub states; `None` if it states none or cannot be read."""
    if repo_id is None:
        return None
    with suppress(HTTPError, OSError, ValueError):
        info = HfApi().repo_info(repo_id, repo_type=repo_type, timeout=10)
        card = getattr(info, "card_data", None)
        stated = card.get("license") if card is not None else None
        if stated:
            return ", ".join(stated) if isinstance(stated, list) else stated
    return KNOWN_LICENSES.get(repo_id)


def _is_hub_id(source: str) -> bool:
    return source.count("/") == 1 and not source.startswith((".", "/", "~")) and not Path(source).exists()


def _is_image(path: Path) -> bool:
    return path.suffix in (".png", ".svg", ".jpg")
