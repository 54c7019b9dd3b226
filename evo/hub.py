"""Checkpoints by their id on the Hugging Face Hub: "org/name" or "org/name@revision"."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from search_spaces.recipe import Source

_ID = re.compile(r"(?P<id>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[\w./-]+))?")
_SNAPSHOT = re.compile(r"models--(?P<org>.+?)--(?P<name>.+)/snapshots/(?P<revision>[0-9a-f]+)$")
_WANTED = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.py", "*.tiktoken", "merges.txt", "vocab.txt"]
_UNWANTED = ["*/*", "consolidated*"]  # the same weights in other layouts


class HubError(ValueError):
    """The Hub, or what has been downloaded from it before, does not have what was asked for."""


def is_id(text: str) -> bool:
    """Whether a text could be an id."""
    return _ID.fullmatch(text) is not None


def download(text: str) -> Path:
    """The local folder of an id: weights, config and tokenizer, and code, which is passed on and never run.

    Nothing is downloaded twice. With HF_HUB_OFFLINE=1 nothing is downloaded at all.

    Raises:
        HubError: saying why it cannot be had.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    match = _ID.fullmatch(text)
    assert match, "is_id has been asked"
    try:
        folder = snapshot_download(
            match["id"], revision=match["revision"], allow_patterns=_WANTED, ignore_patterns=_UNWANTED
        )
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        revision = f" --revision {match['revision']}" if match["revision"] else ""
        raise HubError(
            f"{text} has not been downloaded, or not all of it, and the Hub at {constants.ENDPOINT} cannot be reached "
            f"({_first_line(error.__cause__ or error)}). Where there is a network: hf download {match['id']}{revision}"
        ) from error
    except (HTTPError, OSError, ValueError, RuntimeError) as error:  # the latter: hf_xet's, of a network that fails
        raise HubError(f"the Hub does not give {text}: {_what_to_do(error, match['id'])}") from error
    return Path(folder)


def _what_to_do(error: Exception, name: str) -> str:
    """Why there is no download, and the remedy. The first line of the Hub's own refusals is no more than a status."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if isinstance(error, GatedRepoError):
        return "access to it is gated. Ask for access on its page there, then log in: hf auth login, or HF_TOKEN"
    if isinstance(error, RepositoryNotFoundError):
        return "it is not there, or private. Check the id; for a private one, log in: hf auth login, or HF_TOKEN"
    if isinstance(error, RevisionNotFoundError):
        return f"{name} is there, but not that revision. Expected a branch, a tag or a whole commit hash after the @"
    if isinstance(error, ValueError):
        return _first_line(error)
    return f"{_first_line(error)}. Whole files that have arrived are kept: try again for the others"


def _first_line(error: BaseException) -> str:
    """The first line of a message that has words, or what kind of error it is."""
    lines = (line.strip(" .") for line in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__)


def locate(path: Path, folder: Path) -> Path:
    """A checkpoint's folder: relative to `folder` if there is one, else what the Hub has under this id.

    Raises:
        HubError: if there is neither.
    """
    try:
        local = (folder / path.expanduser()).resolve()
        if local.is_dir():
            return local
        if local.exists():
            raise HubError(f"{local} is a file: expected the folder of a checkpoint")
    except (OSError, RuntimeError) as error:  # too long a name; nobody's home
        raise HubError(f"no checkpoint folder can be called {str(path)[:80]!r}: {error}") from error
    if not is_id(path.as_posix()):
        raise HubError(f"no checkpoint folder at {local}")
    try:
        return download(path.as_posix())
    except HubError as error:
        raise HubError(f"no checkpoint folder at {local}, and {error}") from error


def origin(folder: Path) -> tuple[str, str | None]:
    """Where a checkpoint came from: the Hub's id and commit, or its folder and None."""
    if match := _SNAPSHOT.search(folder.as_posix()):
        return f"{match['org']}/{match['name']}", match["revision"]
    return str(folder), None


def recipe_sources(folders: Mapping[str, Path], digests: Mapping[str, str]) -> dict[str, Source]:
    """Checkpoints as recipes name them.

    Args:
        folders: of each.
        digests: of their content, as far as they are known.
    """
    origins = {name: origin(path) for name, path in folders.items()}
    return {name: Source(place, digests.get(name), revision) for name, (place, revision) in origins.items()}
