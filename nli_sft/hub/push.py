"""The Hub: push a run with its card, and fetch one back.

A repository that `push` makes is a run folder without its predictions: `NLIClassifier.from_pretrained` and
`recipes/eval.py` read it like any other.

A push is one commit. Either all of it is there or nothing is, whatever breaks on the way; pushing again finishes it.
Tokens come from `hf auth login` or the environment variable HF_TOKEN and are written nowhere.
"""

import json
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from huggingface_hub import (
    CommitOperationAdd,
    EvalResult,
    EvalResultEntry,
    HfApi,
    ModelCard,
    ModelCardData,
    eval_result_entries_to_yaml,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # of the HTTP client that this huggingface_hub uses: httpx or its successor
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from jinja2 import Environment, StrictUndefined
from scipy.stats import binomtest
from trl import SFTConfig

from .. import UserError
from ..data.prompts import Prompt, PromptEncoder, load_prompt
from ..evaluation.comparison import compare, headline
from ..evaluation.evaluate import load_encoder
from ..labels import LABELS, TWO_WAY_LABELS, to_two_way
from ..models.bases import locate_model
from ..runs import (
    evaluation_folders,
    launch_command,
    read_json,
    read_metrics,
    read_predictions,
    read_recipe,
    read_run,
    versions,
)

CARD_TEMPLATE = Path(__file__).with_name("model_card.md.jinja")

# What is pushed, and fetched back. No pickles, no training arguments (they hold the token), no pairs of the data set.
MODEL_FILES = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
RUN_FILES = ("prompt.json", "recipe.yaml", "run.json", "parity.json")
RESULT_FILES = ("eval/*/metrics.json", "eval/*.json", "report.html", "report.md", "figures/*")

# Of sources whose own page cannot be read.
KNOWN_LICENSES = {"stanfordnlp/snli": "cc-by-sa-4.0"}

MODEL_NAMES = {
    "base": "before tuning",
    "tuned": "**after tuning**",
    "shuffled": "after tuning, shuffled premises",
    "hypothesis_only": "hypothesis-only baseline",
}


@dataclass
class PushConfig:
    """What to push, and where."""

    run: str = field(default="", metadata={"help": "The run folder, or the folder of an exported model."})
    hub_model_id: str = field(default="", metadata={"help": "The repository, such as me/qwen3-0.6b-snli."})
    hub_private_repo: bool | None = field(
        default=None, metadata={"help": "Make the repository private; your namespace's default if not said."}
    )
    hub_revision: str | None = field(
        default=None, metadata={"help": "The branch to push to, made if it is not there."}
    )
    create_pr: bool = field(default=False, metadata={"help": "Open a pull request instead of changing the branch."})
    overwrite: bool = field(
        default=False,
        metadata={"help": "Replace what is there, even if its base model, prompt or label words are others."},
    )
    without_results: bool = field(default=False, metadata={"help": "Push although the run has not been evaluated."})
    eval_results: bool = field(
        default=False,
        metadata={"help": "Add .eval_results/*.yaml too, for the leaderboards of data sets that have one."},
    )
    base_model: str | None = field(
        default=None, metadata={"help": "Hub id of the base, where the run names a folder of this machine."}
    )
    license: str | None = field(
        default=None, metadata={"help": "Licence of the tuned model; by default that of its base."}
    )

    def __post_init__(self):
        if not self.run:
            raise UserError("run is missing; give the run folder as --run outputs/<model>-<method>")
        if not self.hub_model_id:
            raise UserError("hub_model_id is missing; give the repository as --hub_model_id <you>/<name>")
        if self.create_pr and self.hub_revision:
            raise UserError("create_pr opens a pull request against the main branch: leave out hub_revision")


def push(args: PushConfig) -> str:
    """Push a run in one commit: adapter or model, tokenizer, prompt, recipe, results, report, card.

    The card is left in the folder as README.md too, in place of the empty form that PEFT writes there.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        UserError: if the folder is not a run or has no weights; if its prompt is not the one that was trained; if it
            has no results and `without_results` is not set; if the repository holds another base model, prompt or
            label words and `overwrite` is not set; or with what the Hub answered. Nothing local is lost, and pushing
            again goes on where it stopped.
    """
    folder = Path(args.run)
    recipe, prompt, record = read_run(folder)
    base = args.base_model or recipe["model_name_or_path"]
    files = _run_files(folder)
    if not any(name.endswith(".safetensors") for name in files):
        raise UserError(f"{folder} has no adapter or model in safetensors; train it with recipes/sft.py")
    if not args.without_results and not any(name.endswith("/metrics.json") for name in files):
        raise UserError(
            f"{folder} has not been evaluated; run recipes/eval.py --run {folder} first, or push it with "
            f"--without_results"
        )
    if "adapter_config.json" in files and Path(locate_model(base)).exists():
        raise UserError(
            f"{folder}: its base model {locate_model(base)} is a folder of this machine, so nobody could load the "
            f"adapter; push the base and name it with --base_model, or merge it in with recipes/export.py and push "
            f"that"
        )
    load_encoder(folder)  # raises where the prompt is not the one that was trained
    api = HfApi()
    with _explained(args.hub_model_id):
        _make_destination(
            api,
            args.hub_model_id,
            args.hub_private_repo,
            args.hub_revision,
            base,
            prompt,
            # A pull request changes nothing by itself.
            overwrite=args.overwrite or args.create_pr,
        )
        card = model_card(folder, args.hub_model_id, base_model=args.base_model, license=args.license)
        card.save(folder / "README.md")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Warnings while validating metadata")
            commit = api.create_commit(
                args.hub_model_id,
                _operations(folder, files, args, recipe),
                commit_message=f"{Path(folder).resolve().name}, by nli-sft",
                revision=args.hub_revision,
                create_pr=args.create_pr,
            )
    return commit.pr_url or str(commit.commit_url)


def put_token_away(training_args: SFTConfig) -> None:
    """Move `hub_token`, with which bases and data are fetched, to the environment variable HF_TOKEN of this process.

    The Trainer pickles its arguments into every checkpoint, and W&B keeps the command line.
    """
    token = training_args.hub_token
    if token is None:
        return
    os.environ["HF_TOKEN"] = token
    training_args.hub_token = None
    sys.argv = [argument.replace(token, "<HUB_TOKEN>") for argument in sys.argv]


def download_run(name: str, revision: str | None = None) -> Path:
    """The folder, in the cache, of a run on the Hub; only the files that a classifier needs.

    Raises:
        UserError: if there is no such repository or revision, or the Hub is out of reach and the cache has none.
    """
    with _explained(name, "fetch"):
        return Path(HfApi().snapshot_download(name, revision=revision, allow_patterns=[*MODEL_FILES, *RUN_FILES]))


def model_card(
    folder: str | Path, repo_id: str, *, base_model: str | None = None, license: str | None = None
) -> ModelCard:
    """The card of a run: what it is, what was measured, how to ask it, what it was made from, what it cannot do.

    Args:
        folder: the run folder.
        repo_id: the repository that the card's code loads from; a folder would do as well.
        base_model: Hub id of the base, if the recipe names a folder.
        license: of the tuned model; by default that which the base's page on the Hub states.

    Raises:
        UserError: if the folder is not a run.
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
        frame=encoder.frame,
        prefix=_prefix(encoder),
        is_chat=encoder.is_chat,
        labels=LABELS,
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


def _prefix(encoder: PromptEncoder) -> str:
    """What the tokenizer puts before plain text: the beginning-of-sequence token, or nothing."""
    ids = encoder.encode([""], [""])[0]
    own = encoder.tokenizer(encoder.text("", ""), add_special_tokens=False)["input_ids"]
    return encoder.tokenizer.decode(ids[: len(ids) - len(own)])


def read_evaluations(folder: Path) -> list[dict[str, object]]:
    """What a run folder holds of each split that it was judged on, as the card tells it, that of its own data first.

    Each has `key`, `source`, `split`, `pairs`, `labels`, `models` {name: metrics} and, where the predictions of the
    base and the tuned model are there, `headline`.
    """
    recipe = read_recipe(folder)
    evaluations = []
    for path in evaluation_folders(folder):
        summary = read_metrics(path)
        name = f"{Path(summary['source']).name} {summary['split']}"
        is_own = summary["source"] == recipe.get("dataset_name")
        models = {key: value for key, value in summary.items() if isinstance(value, dict) and "accuracy" in value}
        evaluations.append(
            {
                "key": path.name,
                "name": name,
                "source": summary["source"],
                "is_own": is_own,
                "dataset_id": summary["source"] if _is_hub_id(summary["source"]) else None,
                "revision": recipe.get("dataset_revision")
                if summary["source"] == recipe.get("dataset_name")
                else None,
                "split": summary["split"],
                "pairs": summary["pairs"],
                "models": {MODEL_NAMES[key]: models[key] for key in MODEL_NAMES if key in models},
                "tuned": models.get("tuned"),
                "headline": _headline(path, name),
            }
        )
    return sorted(evaluations, key=lambda evaluation: not evaluation["is_own"])


def _headline(folder: Path, name: str) -> str | None:
    columns = ["premise", "label", "base_prediction", "tuned_prediction"]
    if not (folder / "predictions.parquet").exists():
        return None
    table = read_predictions(folder)
    if not set(columns) <= set(table):
        return None
    table = table[columns].to_dict(orient="list")
    if TWO_WAY_LABELS[1] in table["label"]:
        two_way = {label: TWO_WAY_LABELS[to_two_way(index)] for index, label in enumerate(LABELS)}
        for column in columns[2:]:
            table[column] = [two_way[label] for label in table[column]]
    comparison = compare(table["label"], table["base_prediction"], table["tuned_prediction"], table["premise"])
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


def _validation(record: Mapping) -> dict[str, object] | None:
    """What training measured on the validation split: the checkpoint was chosen on it, so it flatters a little."""
    accuracy = record.get("validation", {}).get("eval_accuracy")
    if accuracy is None:
        return None
    pairs = record["data"]["validation"]["pairs"]
    interval = binomtest(round(accuracy * pairs), pairs).proportion_ci(method="wilson")
    first = next((entry for entry in record.get("history", []) if "eval_accuracy" in entry), {})
    return {
        "accuracy": accuracy,
        "low": float(interval.low),
        "high": float(interval.high),
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


def _eval_result_files(folder: Path) -> dict[str, bytes]:
    """`.eval_results/*.yaml` for the splits of Hub data sets."""
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
                f"{100 * low:.2f} to {100 * high:.2f}, constrained generation over the three labels",
            )
            text = yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False)
            files[f".eval_results/{evaluation['key']}.yaml"] = text.encode()
    return files


def _run_files(folder: Path) -> list[str]:
    patterns = (*MODEL_FILES, *RUN_FILES, *RESULT_FILES)
    found = {path.relative_to(folder).as_posix() for pattern in patterns for path in folder.glob(pattern)}
    stale = {path.parent for path in folder.glob("eval/*/metrics.json")} - set(evaluation_folders(folder))
    return sorted(name for name in found if (folder / name).is_file() and (folder / name).parent not in stale)


def _operations(folder: Path, files: list[str], args: PushConfig, recipe: dict) -> list[CommitOperationAdd]:
    contents: dict[str, str | bytes] = {name: str(folder / name) for name in files}
    contents["README.md"] = str(folder / "README.md")
    if args.base_model:
        # Where the run names a folder of this machine, what is pushed names the Hub.
        text = yaml.safe_dump(recipe | {"model_name_or_path": args.base_model}, sort_keys=False, allow_unicode=True)
        contents["recipe.yaml"] = text.encode()
        contents["run.json"] = json.dumps(read_json(folder / "run.json") | {"model": args.base_model}).encode()
        if "adapter_config.json" in files:
            adapter = read_json(folder / "adapter_config.json") | {"base_model_name_or_path": args.base_model}
            contents["adapter_config.json"] = json.dumps(adapter, indent=2).encode()
    if args.eval_results:
        contents |= _eval_result_files(folder)
    return [CommitOperationAdd(name, content) for name, content in contents.items()]


def _make_destination(
    api: HfApi,
    repo_id: str,
    private: bool | None,
    revision: str | None,
    base: str,
    prompt: Prompt,
    overwrite: bool = False,
) -> None:
    """Make repository and branch where they are not there; where they are, see that they hold the same kind of run."""
    try:
        _check_destination(api, repo_id, revision, base, prompt, overwrite)
    except RepositoryNotFoundError:
        api.create_repo(repo_id, private=private)
    except RevisionNotFoundError:
        pass  # a new branch overwrites nothing
    if revision:
        api.create_branch(repo_id, branch=revision, exist_ok=True)


def _check_destination(
    api: HfApi, repo_id: str, revision: str | None, base: str, prompt: Prompt, overwrite: bool
) -> None:
    there = api.list_repo_files(repo_id, revision=revision)
    there = set(there) - {".gitattributes"}
    if not there or overwrite:
        return
    mend = "push to another hub_model_id, or replace it with recipes/push.py --overwrite"
    if not {"prompt.json", "recipe.yaml"} <= there:
        raise UserError(f"{repo_id} is there and holds something other than a run of nli-sft; {mend}")
    fetched = {name: api.hf_hub_download(repo_id, name, revision=revision) for name in ("prompt.json", "recipe.yaml")}
    their_prompt = load_prompt(fetched["prompt.json"])
    their_base = yaml.safe_load(Path(fetched["recipe.yaml"]).read_text(encoding="utf-8"))["model_name_or_path"]
    for what, theirs, ours in (
        ("base model", their_base, base),
        ("label words", ", ".join(their_prompt.label_words), ", ".join(prompt.label_words)),
        ("prompt", their_prompt.fingerprint, prompt.fingerprint),
    ):
        if theirs != ours:
            raise UserError(f"{repo_id} is there with another {what} ({theirs}; this run has {ours}); {mend}")


@contextmanager
def _explained(repo_id: str, deed: str = "push") -> Iterator[None]:
    """Turn what the Hub, or the way to it, answers into one sentence with the mend."""
    again = "nothing local is lost: push again" if deed == "push" else "try again"
    try:
        yield
    except UserError:
        raise
    except HFValidationError as error:
        raise UserError(f"{repo_id} is neither a folder here nor a Hub id of the form <owner>/<name>") from error
    except LocalTokenNotFoundError as error:
        raise UserError(f"{repo_id}: not logged in to the Hub; use `hf auth login`, or set HF_TOKEN") from error
    except OfflineModeIsEnabled as error:
        raise UserError(f"{repo_id}: HF_HUB_OFFLINE is set, so the Hub is not asked; unset it") from error
    # Uploads wrap what broke them in a RuntimeError, downloads in a LocalEntryNotFoundError or an OSError.
    except (HTTPError, OSError, RuntimeError) as error:
        status = next((e.response.status_code for e in _causes(error) if isinstance(e, HfHubHTTPError)), None)
        missing = any(isinstance(e, RepositoryNotFoundError) for e in _causes(error))
        revision = any(isinstance(e, RevisionNotFoundError) for e in _causes(error))
        if status is None and not any(isinstance(e, (HTTPError, LocalEntryNotFoundError)) for e in _causes(error)):
            raise  # of this machine, such as a full disk
        if status == 401 and not (missing and deed == "fetch"):
            reason = "the Hub does not take the token (401); use `hf auth login`, or set HF_TOKEN to a valid one"
        elif status == 403:
            reason = f"the token may not {'write to' if deed == 'push' else 'read'} it (403); use one that may"
        elif revision:
            reason = "it has no such revision (404)"
        elif missing or status == 404:
            reason = "no such repository on the Hub, or a private one that the token may not see (404)"
        elif status == 409:
            reason = "the name is taken, by a repository that the token may not see (409); choose another hub_model_id"
        elif status == 412:
            reason = f"somebody else changed it at the same time (412); {again}"
        elif status is not None and status >= 500:
            reason = f"the Hub has trouble of its own ({status}); {again}"
        elif status is not None:
            reason = f"the Hub refuses ({status}: {' '.join(str(error).split())[:300]})"
        else:
            reason = f"the connection to the Hub broke ({type(_causes(error)[-1]).__name__}); {again}"
        looked = "no such folder here, and " if deed == "fetch" and not revision else ""
        raise UserError(f"{repo_id}: {looked}{reason}") from error


def _causes(error: BaseException) -> list[BaseException]:
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    return chain


def _stated_license(repo_id: str | None, repo_type: str) -> str | None:
    """The licence that a repository states on the Hub; `None` where it cannot be read or states none."""
    if repo_id is None:
        return None
    with suppress(HTTPError, OSError, ValueError):
        card = HfApi().repo_info(repo_id, repo_type=repo_type, timeout=10).card_data
        stated = card.get("license") if card is not None else None
        if stated:
            return ", ".join(stated) if isinstance(stated, list) else stated
    return KNOWN_LICENSES.get(repo_id)


def _is_hub_id(source: str) -> bool:
    return source.count("/") == 1 and not source.startswith((".", "/", "~")) and not Path(source).exists()


def _is_image(path: Path) -> bool:
    return path.suffix in (".png", ".svg", ".jpg")
