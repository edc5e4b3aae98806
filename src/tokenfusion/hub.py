"""Runs on a hub of Hugging Face's kind: fetched and sent by its own client, tensors and JSON alone.

Nothing that comes from a hub is executed: of a repository two files are fetched, `model.json` and `model.safetensors`,
both of one commit.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenfusion.errors import InputError, first_line, how_to_install

FETCHED = ("model.json", "model.safetensors")
REFERENCE = re.compile(r"hf:/{1,2}(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>.+))?")  # a Path has lost one of the slashes


def is_reference(place: str | Path) -> bool:
    """Whether a place is in a hub: `hf://...`."""
    return str(place).startswith("hf:/")


def fetch(reference: str | Path) -> Path:
    """Fetch a model from a hub, unless this machine has it already.

    Args:
        reference: `hf://ORG/NAME`, with `@REVISION` for a branch, a tag or a commit.

    Returns:
        A folder with `model.json` and `model.safetensors` of one commit.

    Raises:
        InputError: no such reference, repository or revision, no access, or no connection.
    """
    found = REFERENCE.fullmatch(str(reference))
    if not found:
        raise InputError(f"{str(reference)!r} names no model of a hub; write hf://ORG/NAME or hf://ORG/NAME@REVISION")
    with explained(found["repo"]):
        return Path(client().snapshot_download(found["repo"], revision=found["revision"], allow_patterns=[*FETCHED]))


def send(files: Sequence[Path], repo: str, *, public: bool, message: str) -> str:
    """Send files to a repository in one commit; a repository that is not there is made.

    Args:
        files: they stand at the top of the repository under their names.
        repo: `ORG/NAME`.
        public: whether anyone may read it.
        message: of the commit.

    Returns:
        The commit's address.

    Raises:
        InputError: no such name, no access, no connection; or the repository is public and `public` is false.
    """
    require_repo(repo)
    from huggingface_hub import CommitOperationAdd

    hub = client()
    with explained(repo):
        hub.create_repo(repo, private=not public, exist_ok=True)
        if not public and not hub.repo_info(repo).private:
            raise InputError(f"{repo} is there already, and public; give --public, or another name")
        added = [CommitOperationAdd(path.name, path) for path in files]
        return hub.create_commit(repo, added, commit_message=message).commit_url


LONGEST_REPO = 96
"""Characters of a repository's name that a hub takes."""


def require_repo(repo: str) -> None:
    """Refuse what is no name of a repository."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*", repo, re.ASCII) or len(repo) > LONGEST_REPO:
        raise InputError(
            f"{repo!r} names no repository; write ORG/NAME, of up to {LONGEST_REPO} letters, digits, - _ ."
        )


def client() -> Any:
    """The hub's own client, without its progress bars and warnings; what it fails by is said by `explained`."""
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.utils import logging
        from huggingface_hub.utils.tqdm import disable_progress_bars
    except ImportError as error:
        raise InputError(f"the hub's client is missing; {how_to_install('hub')}") from error
    disable_progress_bars()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    return HfApi(library_name="tokenfusion")


@contextmanager
def explained(repo: str) -> Iterator[None]:
    """Put what the hub's client raises in words."""
    from huggingface_hub import errors

    transport: Any = errors.HfHubHTTPError.__bases__  # the errors of whichever HTTP client it is built on
    try:
        yield
    except (errors.HfHubHTTPError, errors.LocalTokenNotFoundError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(error, errors.RevisionNotFoundError):
            reason, remedy = "it has no such revision", "give a branch, a tag or a commit that it has"
        elif status in (401, 403) or isinstance(error, errors.LocalTokenNotFoundError):
            reason, remedy = "access is refused, or it is not there", "check the name, or log in with `hf auth login`"
        elif status == 404:
            reason, remedy = "it is not there, or it is private", "check the name, or log in with `hf auth login`"
        else:
            reason, remedy = first_line(error), "try again later"
        raise InputError(f"{repo} on the hub: {reason}; {remedy}") from error
    except (errors.LocalEntryNotFoundError, errors.HFValidationError, *transport) as error:
        if isinstance(error, InputError):
            raise
        reason = first_line(error)
        raise InputError(f"{repo} on the hub: {reason}; check the name and the connection") from error
