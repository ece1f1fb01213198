"""Push a run with its card to the Hub.

A pushed repository is a run folder without predictions: `NLIClassifier.from_pretrained` and `recipes/eval.py` read it
like any other. A push is a single commit, so an interrupted push leaves nothing behind; push again.

The token comes from `hf auth login` or from the environment variable HF_TOKEN and is written nowhere.
"""

import json
import os
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from trl import SFTConfig

from .. import UserError
from ..data.prompts import Prompt, load_prompt
from ..models.bases import locate_model
from ..models.loading import load_encoder
from ..runs import evaluation_folders, read_json, read_run
from .card import eval_result_files, model_card
from .decision import write_decision_files
from .download import MODEL_FILES, RUN_FILES, explained

RESULT_FILES = ("eval/*/metrics.json", "eval/*.json", "report.html", "report.md", "figures/*")


@dataclass
class PushConfig:
    """The run to push, and the repository."""

    run: str = field(default="", metadata={"help": "The run folder, or the folder of an exported model."})
    hub_model_id: str = field(default="", metadata={"help": "The repository, such as me/qwen3-0.6b-snli."})
    hub_private_repo: bool | None = field(
        default=None, metadata={"help": "Make the repository private; the default is that of your namespace."}
    )
    hub_revision: str | None = field(
        default=None, metadata={"help": "The branch to push to; created if it does not exist."}
    )
    create_pr: bool = field(default=False, metadata={"help": "Open a pull request instead of changing the branch."})
    overwrite: bool = field(
        default=False,
        metadata={"help": "Replace a run with another base model, prompt or other label words."},
    )
    without_results: bool = field(default=False, metadata={"help": "Push a run that has not been evaluated."})
    eval_results: bool = field(
        default=False,
        metadata={"help": "Add .eval_results/*.yaml for the leaderboards of data sets."},
    )
    base_model: str | None = field(
        default=None, metadata={"help": "Hub id of the base, if the recipe names a local folder."}
    )
    license: str | None = field(
        default=None, metadata={"help": "Licence of the tuned model; by default the licence of its base."}
    )

    def __post_init__(self):
        if not self.run:
            raise UserError("run is missing; give the run folder as --run outputs/<model>-<method>")
        if not self.hub_model_id:
            raise UserError("hub_model_id is missing; give the repository as --hub_model_id <you>/<name>")
        if self.create_pr and self.hub_revision:
            raise UserError("create_pr opens a pull request against main; leave out hub_revision")


def push(args: PushConfig) -> str:
    """Push a run in one commit: adapter or model, tokenizer, prompt, recipe, results, report and card.

    The card is also saved in the run folder as README.md, in place of PEFT's template.

    Returns:
        The URL of the commit or of the pull request.

    Raises:
        UserError: if the folder is not a run folder or has no weights; if its prompt is not the one it was trained
            with; if it has no results and `without_results` is not set; if the repository holds another base model,
            prompt or label words and `overwrite` is not set; or if the Hub refuses or cannot be reached.
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
            f"{folder}: its base model {locate_model(base)} is a local folder, so others could not load the adapter; "
            f"push the base and name it with --base_model, or merge with recipes/export.py and push the merged model"
        )
    encoder = load_encoder(folder)  # raises if the prompt is not the one that the run was trained with
    files += write_decision_files(folder, encoder, record.get("temperature", 1.0))
    api = HfApi()
    with explained(args.hub_model_id):
        _make_destination(
            api,
            args.hub_model_id,
            args.hub_private_repo,
            args.hub_revision,
            base,
            prompt,
            # A pull request does not change the branch.
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


def move_token_to_env(training_args: SFTConfig) -> None:
    """Move `hub_token` to the environment variable HF_TOKEN of this process, which all downloads use.

    The Trainer pickles its arguments into every checkpoint, and W&B keeps the command line.
    """
    token = training_args.hub_token
    if token is None:
        return
    os.environ["HF_TOKEN"] = token
    training_args.hub_token = None
    sys.argv = [argument.replace(token, "<HUB_TOKEN>") for argument in sys.argv]


def _run_files(folder: Path) -> list[str]:
    patterns = (*MODEL_FILES, *RUN_FILES, *RESULT_FILES)
    found = {path.relative_to(folder).as_posix() for pattern in patterns for path in folder.glob(pattern)}
    stale = {path.parent for path in folder.glob("eval/*/metrics.json")} - set(evaluation_folders(folder))
    return sorted(name for name in found if (folder / name).is_file() and (folder / name).parent not in stale)


def _operations(folder: Path, files: list[str], args: PushConfig, recipe: dict) -> list[CommitOperationAdd]:
    contents: dict[str, str | bytes] = {name: str(folder / name) for name in files}
    contents["README.md"] = str(folder / "README.md")
    if args.base_model:
        # The recipe names a local folder; the pushed files name the Hub id.
        text = yaml.safe_dump(recipe | {"model_name_or_path": args.base_model}, sort_keys=False, allow_unicode=True)
        contents["recipe.yaml"] = text.encode()
        contents["run.json"] = json.dumps(read_json(folder / "run.json") | {"model": args.base_model}).encode()
        if "adapter_config.json" in files:
            adapter = read_json(folder / "adapter_config.json") | {"base_model_name_or_path": args.base_model}
            contents["adapter_config.json"] = json.dumps(adapter, indent=2).encode()
    if args.eval_results:
        contents |= eval_result_files(folder)
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
    """Create repository and branch as needed; if they exist, check that they hold the same kind of run."""
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
    fix = "push to another hub_model_id, or replace it with recipes/push.py --overwrite"
    if not {"prompt.json", "recipe.yaml"} <= there:
        raise UserError(f"{repo_id} exists and does not hold a run of nli-sft; {fix}")
    fetched = {name: api.hf_hub_download(repo_id, name, revision=revision) for name in ("prompt.json", "recipe.yaml")}
    their_prompt = load_prompt(fetched["prompt.json"])
    their_base = yaml.safe_load(Path(fetched["recipe.yaml"]).read_text(encoding="utf-8"))["model_name_or_path"]
    for what, theirs, ours in (
        ("base model", their_base, base),
        ("label words", ", ".join(their_prompt.label_words), ", ".join(prompt.label_words)),
        ("prompt", their_prompt.fingerprint, prompt.fingerprint),
    ):
        if theirs != ours:
            raise UserError(f"{repo_id} exists with {what} {theirs}, but this run has {ours}; {fix}")
