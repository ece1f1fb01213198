"""Download runs and adapters from the Hub, and explain errors of the Hub in one sentence."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # of httpx, or of another client that huggingface_hub uses
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .. import UserError

# The files to push and to download. No pickles, no training arguments (they hold the token), no pairs.
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


def download_tuned(name: str, revision: str | None = None) -> Path | None:
    """Download a run or an adapter from the Hub, and return its folder in the cache.

    Returns:
        `None` for any other model: transformers downloads what it needs of one.

    Raises:
        UserError: if the repository or revision does not exist, or if it is not cached and the Hub cannot be reached.
    """
    with explained(name, "download"):
        if {"run.json", "adapter_config.json"}.isdisjoint(_files(name, revision)):
            return None
        return Path(HfApi().snapshot_download(name, revision=revision, allow_patterns=[*MODEL_FILES, *RUN_FILES]))


def _files(name: str, revision: str | None) -> set[str]:
    """The names of the files of a repository; of those in the cache if the Hub cannot be reached."""
    try:
        return {file.rfilename for file in HfApi().model_info(name, revision=revision).siblings or ()}
    except (HTTPError, OfflineModeIsEnabled) as error:
        if isinstance(error, HfHubHTTPError):  # the Hub has answered
            raise
        folder = Path(HfApi().snapshot_download(name, revision=revision, local_files_only=True))
        return {file.name for file in folder.iterdir()}


@contextmanager
def explained(repo_id: str, action: str = "push") -> Iterator[None]:
    """Turn errors of the Hub and of the connection into one sentence with the fix."""
    again = "nothing local is lost: push again" if action == "push" else "try again"
    try:
        yield
    except UserError:
        raise
    except HFValidationError as error:
        raise UserError(f"{repo_id} is neither a local folder nor a Hub id of the form <owner>/<name>") from error
    except LocalTokenNotFoundError as error:
        raise UserError(f"{repo_id}: not logged in to the Hub; use `hf auth login`, or set HF_TOKEN") from error
    except OfflineModeIsEnabled as error:
        raise UserError(f"{repo_id}: HF_HUB_OFFLINE is set; unset it to use the Hub") from error
    # Uploads wrap their errors in a RuntimeError, downloads in a LocalEntryNotFoundError or an OSError.
    except (HTTPError, OSError, RuntimeError) as error:
        status = next((e.response.status_code for e in _causes(error) if isinstance(e, HfHubHTTPError)), None)
        missing = any(isinstance(e, RepositoryNotFoundError) for e in _causes(error))
        revision = any(isinstance(e, RevisionNotFoundError) for e in _causes(error))
        if status is None and not any(isinstance(e, (HTTPError, LocalEntryNotFoundError)) for e in _causes(error)):
            raise  # a local error, such as a full disk
        if status == 401 and not (missing and action == "download"):
            reason = "the Hub rejected the token (401); use `hf auth login`, or set HF_TOKEN to a valid one"
        elif status == 403:
            reason = (
                f"the token has no permission to {'write' if action == 'push' else 'read'} (403); use one that has"
            )
        elif revision:
            reason = "it has no such revision (404)"
        elif missing or status == 404:
            reason = "no such repository on the Hub, or a private one that the token cannot access (404)"
        elif status == 409:
            reason = (
                "the name is taken by a repository that the token cannot access (409); choose another hub_model_id"
            )
        elif status == 412:
            reason = f"someone else changed the repository at the same time (412); {again}"
        elif status is not None and status >= 500:
            reason = f"the Hub failed ({status}); {again}"
        elif status is not None:
            reason = f"the Hub refused ({status}: {' '.join(str(error).split())[:300]})"
        else:
            reason = f"the connection to the Hub broke ({type(_causes(error)[-1]).__name__}); {again}"
        looked = "no such local folder, and " if action == "download" and not revision else ""
        raise UserError(f"{repo_id}: {looked}{reason}") from error


def _causes(error: BaseException) -> list[BaseException]:
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    return chain
