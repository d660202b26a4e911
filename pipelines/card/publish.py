"""A run's student, its card and, where asked for, its artefacts on the hub, in one commit.
The card itself is made by the files beside this one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitOperation, CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled

from distill.settings import UserError

ARTEFACTS = "artefacts"
"""The folder of them, in a run and in a repository."""


def publish(
    folder: Path, name: str, *, private: bool, artefacts: bool, write_card: Callable[[str], object]
) -> tuple[str, str]:
    """Make the repository `name` where it is not there yet and put the run's student into it, in one commit.

    What others added to the repository stays; artefacts of a student before this one do not.

    Args:
        folder: the run's.
        name: OWNER/NAME; NAME alone is the token's owner's.
        private: of a new repository; one that is there stays as it is.
        write_card: writes student/README.md for the full name, once the hub has told it.

    Returns:
        The full name and the address of the commit.

    Raises:
        UserError: no token, no right to write, a name that is none, or no way to the hub.
    """
    api = HfApi(library_name="tinybert-distill")
    with _explained(name, api.endpoint):
        if get_token() is None:
            raise UserError(
                f"--push {name}: there is no token to write with. Run `hf auth login`, or set HF_TOKEN to a token with "
                "the right to write."
            )
        full_name = api.create_repo(name, private=private or None, exist_ok=True).repo_id
        write_card(full_name)
        there = api.list_repo_files(full_name)
        commit = api.create_commit(
            full_name,
            list(_changes(folder, there, artefacts)),
            commit_message="Upload the student, its card and its artefacts" if artefacts else "Upload the student",
        )
    return full_name, commit.commit_url


def _changes(folder: Path, there: list[str], artefacts: bool) -> Iterator[CommitOperation]:
    added = {file.name: file for file in sorted((folder / "student").iterdir()) if file.is_file()}
    if artefacts:
        given = sorted(path for path in (folder / ARTEFACTS).rglob("*") if path.is_file())
        added |= {path.relative_to(folder).as_posix(): path for path in given}
    for name in there:
        if name.startswith(f"{ARTEFACTS}/") and name not in added:
            yield CommitOperationDelete(name)
    for name, file in added.items():
        yield CommitOperationAdd(name, str(file))


@contextmanager
def _explained(name: str, endpoint: str) -> Iterator[None]:
    """What the hub and the way to it answer, as an error with a remedy."""
    try:
        yield
    except OfflineModeIsEnabled:
        raise UserError(
            f"--push {name}: HF_HUB_OFFLINE is set, so the hub may not be asked. Unset it for this command."
        ) from None
    except HFValidationError as error:
        raise UserError(f"--push {name}: this is no name of a repository: {error} Write OWNER/NAME.") from None
    except HfHubHTTPError as error:
        raise UserError(f"--push {name}: {_answer(error, endpoint)}") from error
    except (HTTPError, ConnectionError, TimeoutError) as error:
        raise UserError(
            f"--push {name}: {endpoint} cannot be reached: {error}. Check the network (and HF_ENDPOINT, where it is "
            "set), then give the same command again."
        ) from error
    except ValueError as error:
        if not str(error).startswith("Invalid metadata"):
            raise
        raise UserError(f"--push {name}: the hub refuses the card: {error} See to the section `card`.") from error
    except RuntimeError as error:  # of a file's upload, by huggingface_hub or its storage client
        cause = error.__cause__
        reason = _answer(cause, endpoint) if isinstance(cause, HfHubHTTPError) else f"{error} {cause or ''}".strip()
        raise UserError(
            f"--push {name}: a file could not be uploaded: {reason} Give the same command again; what was uploaded is "
            "kept. HF_HUB_DISABLE_XET=1 takes another way."
        ) from error


def _answer(error: HfHubHTTPError, endpoint: str) -> str:
    said = " ".join((error.server_message or "").split())
    words = f" ({said})" if said else ""
    status = error.response.status_code
    if status == 401:
        return f"{endpoint} does not know the token{words}. Run `hf auth login`, or set HF_TOKEN to one that is valid."
    if status in (403, 404):
        return (
            f"the token may not write there, or the owner does not exist{words}. Take a token with the right to write "
            "and a name whose owner you are or write for."
        )
    if status == 400:
        return f"the hub refuses what it was given{words}. See to the section `card` of the config and to the name."
    if status == 429 or status >= 500:
        return f"{endpoint} answers {status}{words}. Wait a while and give the same command again."
    return f"{endpoint} answers {status}{words}."
