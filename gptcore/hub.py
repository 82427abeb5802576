"""A model's files from the hub: those that are wanted, checked, resumed where they were cut off.

``huggingface_hub`` knows the hub: its address, the token, the list of files. Its own download
starts again at the first byte after every failure, so the bytes are fetched here.
"""

from __future__ import annotations

import fnmatch
import functools
import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import filelock

from gptcore.errors import InvalidInput, NetworkError, UnknownModel
from gptcore.paths import cache_dir

if TYPE_CHECKING:
    import httpx2

TIMEOUT_S = 20.0
TRIES = 3
"""How often in a row a connection may end without one byte more."""
PAUSE_S = 0.5
PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")
"""What a file may be called: nothing that leads into another folder."""


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file as the hub lists it."""

    name: str
    url: str
    size: int
    sha256: str | None
    """None for small files, of which the hub keeps no such hash."""


def fetch(
    model: str, wanted: Sequence[str], target: Path, progress: Callable[[float], None]
) -> None:
    """Bring the files of ``model`` that match one of the patterns ``wanted`` into ``target``.

    What has come stays in the cache until all is there, so that the next try goes on from it.

    Args:
        model: the hub's name, ``owner/model``.
        wanted: patterns of file names; files in sub-folders are left out.
        target: an existing folder on the same disk as the cache.
        progress: told the share of bytes that are there; what it raises ends the fetching.

    Raises:
        UnknownModel: the hub has no such model, or asks for a consent or a token.
        NetworkError: the hub cannot be reached, breaks off, or sends what it did not promise.
        InvalidInput: the disk has not enough room.
    """
    import httpx2
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    try:
        with filelock.FileLock(f"{_folder_of(model)}.lock", blocking=False):
            _fetch_all(model, wanted, target, progress)
    except filelock.Timeout:
        raise InvalidInput(f"{model} is being fetched already: wait for that.") from None
    except GatedRepoError:
        raise UnknownModel(
            f"The hub gives {model!r} only to those whom its owner lets in: accept its conditions "
            "there and set HF_TOKEN."
        ) from None
    except RepositoryNotFoundError:
        raise UnknownModel(f"The hub has no model {model!r} that may be read.") from None
    except HFValidationError as error:
        raise InvalidInput(f"{model!r} is no name of the hub: {error}.") from None
    except (httpx2.HTTPError, ConnectionError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise NetworkError(
            f"{model} could not be fetched: {said[:200].rstrip('.')}. What has come is kept; try "
            "again with a network."
        ) from None


def _fetch_all(
    model: str, wanted: Sequence[str], target: Path, progress: Callable[[float], None]
) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError

    try:
        info = HfApi(endpoint=_endpoint()).model_info(model, files_metadata=True, timeout=TIMEOUT_S)
    except HFValidationError:
        raise
    except (ValueError, KeyError, TypeError):  # such as the page of a hotel's network
        raise NetworkError(
            f"{model} could not be fetched: what answers in the hub's place is not the hub."
        ) from None
    revision = info.sha if info.sha and PLAIN_NAME.fullmatch(info.sha) else "main"
    files = tuple(_listed(model, revision, info.siblings or (), wanted))
    folder = _folder_of(model) / revision
    for other in folder.parent.iterdir():
        if other != folder:  # what is left of another revision
            shutil.rmtree(other)
    folder.mkdir(exist_ok=True)
    _check_room(model, files, folder)
    total, before = max(1, sum(file.size for file in files)), 0
    for file in files:
        _fetch_file(file, folder, functools.partial(_tell, progress, total, before))
        before += file.size
    for file in files:
        shutil.move(folder / file.name, target / file.name)
    shutil.rmtree(folder.parent)


def _endpoint() -> str | None:
    """Return the hub's address where it is not the usual one."""
    return os.environ.get("HF_ENDPOINT") or None


def _tell(progress: Callable[[float], None], total: int, before: int, there: int) -> None:
    progress((before + there) / total)


def _folder_of(model: str) -> Path:
    """Return where the files of a model gather, one folder a revision."""
    folder = cache_dir() / "hub" / model.replace("/", "--")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _listed(
    model: str, revision: str, siblings: Sequence[object], wanted: Sequence[str]
) -> Iterator[HubFile]:
    from huggingface_hub import hf_hub_url

    for one in siblings:
        name, size, lfs = (getattr(one, field, None) for field in ("rfilename", "size", "lfs"))
        if not PLAIN_NAME.fullmatch(str(name)) or not isinstance(size, int):
            continue
        if any(fnmatch.fnmatch(str(name), pattern) for pattern in wanted):
            url = hf_hub_url(model, str(name), revision=revision, endpoint=_endpoint())
            yield HubFile(str(name), url, size, getattr(lfs, "sha256", None))


def _check_room(model: str, files: Sequence[HubFile], folder: Path) -> None:
    there = sum(one.stat().st_size for one in folder.iterdir())
    needed, free = sum(file.size for file in files) - there, shutil.disk_usage(folder).free
    if needed > free:
        raise InvalidInput(
            f"{model} needs {needed / 1e9:.1f} GB more on disk, and {free / 1e9:.1f} GB are free."
        )


def _fetch_file(file: HubFile, folder: Path, told: Callable[[int], None]) -> None:
    """Fetch one file, going on from what is there.

    Args:
        file: which.
        folder: where it and its unfinished part lie.
        told: how many of its bytes are there.
    """
    import httpx2

    whole, part = folder / file.name, folder / f"{file.name}.part"
    if whole.exists():
        return told(file.size)
    failed = 0
    part.touch()
    while (there := part.stat().st_size) < file.size:
        try:
            _go_on(file, part, there, told)
        except httpx2.TransportError:
            if failed == TRIES:
                raise
        failed = 0 if part.stat().st_size > there else failed + 1
        if failed > TRIES:
            raise httpx2.ReadError(f"{file.name} breaks off after {there:,} bytes")
        if failed:
            time.sleep(PAUSE_S)
    with part.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if there != file.size or found != (file.sha256 or found):
        part.unlink()
        raise NetworkError(
            f"{file.name} came with {there:,} bytes and the hash {found[:16]}…, not as the hub "
            "promised: it was thrown away; try again."
        )
    part.replace(whole)
    return told(file.size)


def _go_on(file: HubFile, part: Path, there: int, told: Callable[[int], None]) -> None:
    """Fetch what is missing of a file behind the ``there`` bytes of its part."""
    from huggingface_hub import get_session
    from huggingface_hub.utils._headers import build_hf_headers
    from huggingface_hub.utils._http import hf_raise_for_status

    headers = build_hf_headers() | {"Accept-Encoding": "identity"}
    if there:
        headers["Range"] = f"bytes={there}-"
    client: httpx2.Client = get_session()
    with client.stream(
        "GET", file.url, headers=headers, timeout=TIMEOUT_S, follow_redirects=True
    ) as response:
        if response.status_code >= 400:
            response.read()
            hf_raise_for_status(response)
        if there and response.status_code != 206:  # a server that only sends whole files
            there = 0
        with part.open("ab" if there else "wb") as out:
            for chunk in response.iter_bytes():
                out.write(chunk)
                there += len(chunk)
                told(min(there, file.size))
                if there > file.size:
                    return
