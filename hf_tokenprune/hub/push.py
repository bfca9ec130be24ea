"""A model repository, made whole in a folder and published by one commit."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import CommitInfo, HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, LocalTokenNotFoundError
from transformers import PreTrainedModel

from ..files import write_atomically


EVIDENCE = "evidence.json"
RESULTS = ".eval_results/hf_tokenprune.yaml"
OF_A_NEW_REPOSITORY = {".gitattributes"}


class PushError(RuntimeError):
    """Nothing was published; says why, and what to do."""


def stage(
    folder: str | Path,
    model: PreTrainedModel,
    processing: Any,
    card: ModelCard,
    *,
    evidence: Mapping[str, Any] | None = None,
    pictures: Sequence[str | Path] = (),
    results: Sequence[Mapping[str, Any]] = (),
) -> Path:
    """Writes all files of a model repository into an empty folder.

    Args:
        model: one of ours, saved with the code that a stranger needs.
        processing: its tokenizer or image processor.
        evidence: what was measured, as a script wrote it. pictures: files that the card shows, by their names.
        results: entries of the Hub's `.eval_results` form.

    Raises:
        ValueError: a folder that is not empty.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"folder ({folder}) must be empty")
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    processing.save_pretrained(folder)
    write_atomically(folder / "README.md", f"{str(card).rstrip()}\n".encode())
    if evidence is not None:
        write_atomically(folder / EVIDENCE, json.dumps(evidence, indent=1).encode())
    for picture in map(Path, pictures):
        shutil.copyfile(picture, folder / picture.name)
    if results:
        write_atomically(folder / RESULTS, yaml.safe_dump(list(results), sort_keys=False).encode())
    return folder


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    overwrite: bool = False,
    message: str = "Upload a token pruning model",
    token: str | None = None,
) -> CommitInfo:
    """Publishes a folder as a model repository: large files first, then one commit that has all or nothing.

    Args:
        private: whether a repository that is made now is private; None: as the account has it.
        revision: a branch, made if it is not there; None: the main one.
        overwrite: whether the repository may hold something already. What the folder has replaces it file by file.
        token: None: the one of `HF_TOKEN` or `hf auth login`.

    Raises:
        PushError: no or a wrong token, a repository that holds something already or that changed meanwhile, no
            connection. Calling it again is safe.
    """
    api = HfApi(token=token)
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        found = api.model_info(repo_id, revision=revision)
        held = {each.rfilename for each in found.siblings or ()} - OF_A_NEW_REPOSITORY
        if held and not overwrite:
            raise PushError(
                f"repo_id ({repo_id!r}) must be new or empty, and holds {len(held)} files, {min(held)} among them: "
                "take another name, or overwrite it"
            )
        return api.upload_folder(
            repo_id=repo_id, folder_path=folder, revision=revision, commit_message=message, parent_commit=found.sha
        )
    except HFValidationError as error:
        raise PushError(f"repo_id ({repo_id!r}): {error}") from error
    except LocalTokenNotFoundError as error:
        raise PushError("no token: set HF_TOKEN, or log in by `hf auth login`") from error
    except (HTTPError, RuntimeError) as error:
        # A large file's upload wraps its cause.
        cause = error if isinstance(error, HTTPError) else error.__cause__
        if isinstance(cause, HfHubHTTPError):
            raise PushError(_refused(cause, repo_id)) from error
        if isinstance(cause, HTTPError):
            raise PushError(
                f"the connection to {api.endpoint} failed ({type(cause).__name__}: {cause}); nothing of this push was "
                f"published in {repo_id!r}: push again"
            ) from error
        raise


def _refused(error: HfHubHTTPError, repo_id: str) -> str:
    status = error.response.status_code
    said = " ".join(str(error.server_message or error).split())
    if status in (401, 403):
        return f"the token must be valid and may write to {repo_id!r} ({status}: {said}); nothing was published"
    if status in (409, 412):
        return (
            f"{repo_id!r} was changed by someone else meanwhile ({status}: {said}); nothing was published: push again"
        )
    return f"the Hub refused {repo_id!r} ({status}: {said}); nothing was published"
