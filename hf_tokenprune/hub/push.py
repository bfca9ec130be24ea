"""A model repository, made whole in a folder and published by one commit."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import CommitInfo, HfApi, ModelCard, ModelInfo, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import DEFAULT_IGNORE_PATTERNS, filter_repo_objects
from huggingface_hub.utils.sha import git_hash, sha_fileobj
from transformers import PreTrainedModel

from ..files import write_atomically


EVIDENCE = "evidence.json"
RESULTS = ".eval_results/hf_tokenprune.yaml"
OF_A_NEW_REPOSITORY = {".gitattributes"}
CHANGED = (409, 412)
# Uploads by xet fail with errors of the system, or with no more than a RuntimeError.
FAILURES = (HFValidationError, HTTPError, OSError, RuntimeError)


class PushError(RuntimeError):
    """Nothing was published, or nobody can tell; says why, and what to do."""


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
            connection. Calling it again is safe. A commit that is there is one, even if its answer was lost.
    """
    require_token(token)
    api, before = HfApi(token=token), None
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        found = api.model_info(repo_id, revision=revision)
        _check_empty(found, overwrite)
        before = found.sha
        return api.upload_folder(
            repo_id=repo_id, folder_path=folder, revision=revision, commit_message=message, parent_commit=before
        )
    except PushError:
        raise
    except FAILURES as error:
        head = _landed(api, folder, repo_id, revision, before) if before and _may_have_landed(error) else None
        if head is None:
            raise PushError(_why(error, repo_id, api.endpoint)) from error
        return CommitInfo(f"{api.endpoint}/{repo_id}/commit/{head}", message, "", head, _endpoint=api.endpoint)


def require_token(token: str | None = None) -> None:
    """Raises a PushError where there is no token to push with."""
    if (token or get_token()) is None:
        raise PushError("no token: set HF_TOKEN, or log in by `hf auth login`")


def _check_empty(found: ModelInfo, overwrite: bool) -> None:
    held = {each.rfilename for each in found.siblings or ()} - OF_A_NEW_REPOSITORY
    if held and not overwrite:
        raise PushError(
            f"repo_id ({found.id!r}) must be new or empty, and holds {len(held)} files, {min(held)} among them: "
            "take another name, or overwrite it"
        )


def _may_have_landed(error: Exception) -> bool:
    """Whether a commit may be there though it failed: its answer was lost, or asked for again and refused as old."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in CHANGED or error.response.status_code >= 500
    return isinstance(error, HTTPError)


def _landed(api: HfApi, folder: str | Path, repo_id: str, revision: str | None, before: str) -> str | None:
    """The sha of the repository's head, if that is a new one and has all that the folder has."""
    try:
        head = api.model_info(repo_id, revision=revision).sha
        if head == before:
            return None
        listed = api.list_repo_tree(repo_id, recursive=True, revision=head)
        there = {each.path: each for each in listed if isinstance(each, RepoFile)}
    except FAILURES as error:
        raise PushError(
            f"the connection to {api.endpoint} failed ({type(error).__name__}: {_line(error)}), and whether this push "
            f"was published in {repo_id!r} cannot be read: look there, and push again if it is not"
        ) from error
    files = {path.relative_to(folder).as_posix(): path for path in Path(folder).rglob("*") if path.is_file()}
    sent = filter_repo_objects(files, ignore_patterns=DEFAULT_IGNORE_PATTERNS)
    return head if all(name in there and _is_same(files[name], there[name]) for name in sent) else None


def _is_same(path: Path, there: RepoFile) -> bool:
    if path.stat().st_size != there.size:
        return False
    with path.open("rb") as file:
        if there.lfs is not None:
            return sha_fileobj(file).hex() == there.lfs.sha256
        return git_hash(file.read()) == there.blob_id


def _why(error: Exception, repo_id: str, endpoint: str) -> str:
    """One sentence on a push that published nothing."""
    if isinstance(error, HFValidationError):
        return f"repo_id ({repo_id!r}): {_line(error)}"
    # A large file's upload wraps its cause, where it does not go by xet.
    cause = error if isinstance(error, HTTPError) else error.__cause__
    if isinstance(cause, HfHubHTTPError):
        return _refused(cause, repo_id)
    failed = f"the connection to {endpoint}" if isinstance(cause, HTTPError) else f"the upload to {repo_id!r}"
    cause = cause or error
    return (
        f"{failed} failed ({type(cause).__name__}: {_line(cause)}); nothing of this push was published in "
        f"{repo_id!r}: push again"
    )


def _refused(error: HfHubHTTPError, repo_id: str) -> str:
    status = error.response.status_code
    said = _line(error.server_message or error)
    if status in (401, 403):
        return f"the token must be valid and may write to {repo_id!r} ({status}: {said}); nothing was published"
    if status in CHANGED:
        return (
            f"{repo_id!r} was changed by someone else meanwhile ({status}: {said}); nothing was published: push again"
        )
    return f"the Hub refused {repo_id!r} ({status}: {said}); nothing was published"


def _line(words: object) -> str:
    return " ".join(str(words).split())
