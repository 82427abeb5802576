"""A finished variant on disk: what a recipe made of a model, with how it was made.

A folder holds ``model.safetensors`` (packed numbers stay packed), ``config.json`` with the shape
and the form of every converted module, ``recipe.json``, ``artifact.json`` with lineage, coverage
and provenance, and the tokenizer's files. It is written beside its place and renamed into it, and
names the hash of its weights: what was changed since is refused. Imports torch only to read or
write weights.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from gptcore.errors import InvalidInput, InvalidWeights
from gptcore.passes.base import Coverage
from gptcore.recipe import Variant
from gptcore.sentences import sentence
from gptcore.spec import ModelSpec
from gptcore.tokenizer import byte_tokenizer, load_tokenizer, read_json
from gptcore.weights import empty, weights_id

if TYPE_CHECKING:
    from torch import Tensor

    from gptcore.linears import Stored
    from gptcore.model import GPT
    from gptcore.tokenizer import Tokenizer

VERSION = 1
CARD = "artifact.json"
CONFIG = "config.json"
RECIPE = "recipe.json"
WEIGHTS = "model.safetensors"
MODEL_TYPE = "gptlab"
"""What config.json says, so that no other program takes these weights for plain ones."""
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "LICENSE",
)

Progress = Callable[[float], None]


@dataclass(frozen=True, slots=True)
class Artifact:
    """What lies in the folder of a finished variant, before any tensor is read."""

    directory: Path
    variant: Variant
    """``model`` names what it was made of."""
    spec: ModelSpec
    """The shape that the recipe left."""
    coverage: Mapping[str, Coverage]
    weights_sha256: str
    """``sha256:…`` of the weights' file: running the recipe again gives the same."""
    stored_bytes: int
    resident_bytes: int
    source_precision: str
    """In which the weights were that the recipe began with."""
    seconds: float
    """What the passes took."""
    peak_memory_bytes: int | None
    made: Mapping[str, Any]
    """The provenance of the machine that made it."""

    @property
    def effective_bits(self) -> float:
        """Stored bits of the whole file ÷ the parameters of the shape it began with."""
        return 8 * self.stored_bytes / self.variant.spec.parameters


def coverage_json(coverage: Mapping[str, Coverage]) -> dict[str, Any]:
    """Return the coverage of every pass as JSON, with its ratio and effective bits."""
    return {
        name: {**asdict(one), "ratio": one.ratio, "effective_bits": one.effective_bits}
        for name, one in coverage.items()
    }


def is_artifact(directory: Path) -> bool:
    """Return whether a folder holds a finished variant."""
    return (directory / CARD).is_file()


def describe(directory: Path) -> Artifact:
    """Return what lies in a folder.

    Raises:
        InvalidWeights: a file is missing, damaged or of another version, or the weights are not
            those that were written.
    """
    card, config = read_json(directory, CARD), read_json(directory, CONFIG)
    if card.get("version") != VERSION:
        raise InvalidWeights(
            f"{directory.name} is a variant of version {str(card.get('version'))[:20]}; this "
            f"program reads version {VERSION}: make it again from its recipe."
        )
    try:
        found = weights_id((directory / WEIGHTS,))
        artifact = Artifact(
            directory=directory,
            variant=Variant.model_validate(card["variant"]),
            spec=ModelSpec.model_validate(config["spec"]),
            coverage={name: _coverage(one) for name, one in card["coverage"].items()},
            weights_sha256=card["weights_sha256"],
            stored_bytes=(directory / WEIGHTS).stat().st_size,
            resident_bytes=int(card["resident_bytes"]),
            source_precision=str(card["source_precision"]),
            seconds=float(card["seconds"]),
            peak_memory_bytes=card["peak_memory_bytes"],
            made=dict(card["provenance"]),
        )
    except ValidationError as error:
        raise InvalidWeights(f"{directory.name} is damaged: {sentence(error, Variant)}") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InvalidWeights(f"{directory.name}/{CARD} is damaged: {error!r}.") from None
    except InvalidInput as error:
        raise InvalidWeights(f"{directory.name} cannot be used: {error}") from None
    except OSError as error:
        raise InvalidWeights(f"{directory.name}/{WEIGHTS} cannot be read: {error}.") from None
    if found != artifact.weights_sha256:
        raise InvalidWeights(
            f"The weights of {directory.name} were changed after they were written: their hash is "
            f"{found[:19]}… and should be {artifact.weights_sha256[:19]}…. Make it again from its "
            "recipe."
        )
    return artifact


def tokenizer_of(artifact: Artifact) -> Tokenizer:
    """Return the tokenizer of a finished variant; random weights have bytes for tokens."""
    if (artifact.directory / "tokenizer.json").exists():
        return load_tokenizer(artifact.directory)
    return byte_tokenizer(artifact.spec.vocabulary)


def write(
    directory: Path,
    *,
    model: GPT,
    tokenizer: Tokenizer,
    tokenizer_files: Path | None,
    variant: Variant,
    coverage: Mapping[str, Coverage],
    resident_bytes: int,
    source_precision: str,
    seconds: float,
    peak_memory_bytes: int | None,
    made: Mapping[str, Any],
    replace: bool = False,
    card: Mapping[str, Any] | None = None,
) -> Artifact:
    """Write a finished variant, wholly or not at all, and return what lies there.

    Args:
        directory: where it shall lie; nothing may be there unless ``replace``.
        model: as the passes left it; it is not changed.
        tokenizer: its own, which a pass may have cut.
        tokenizer_files: a Hugging Face directory with the tokenizer's settings, if there is one.
        variant: what it was made of, and the recipe; passes of the runtime are kept as recipe.
        coverage: by pass.
        resident_bytes: what the weights take in memory.
        source_precision: in which the weights were that the recipe began with.
        seconds: what the passes took.
        peak_memory_bytes: while they ran, None where not measured.
        made: the machine's provenance.
        replace: whether something that lies there goes.
        card: what the catalogue shall say of it, written as ``card.json``.

    Raises:
        InvalidInput: something lies there already, or it cannot be written, as on a full disk;
            nothing half-written remains.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    if directory.exists() and not replace:
        raise InvalidInput(
            f"There is already something at {directory.name!r}: choose another name, or have it "
            "replaced."
        )
    tensors, modules = contents(model)
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        place = Path(tempfile.mkdtemp(prefix=".writing-", dir=directory.parent))
    except OSError as error:
        raise InvalidInput(_unwritable(directory, error)) from None
    try:
        work = place / directory.name
        work.mkdir()
        save_file(tensors, work / WEIGHTS, metadata={"format": MODEL_TYPE})
        config = {
            "model_type": MODEL_TYPE,
            "version": VERSION,
            "vocab_size": model.spec.vocabulary,
            "spec": model.spec.model_dump(mode="json"),
            "quantization_config": {"quant_method": MODEL_TYPE, "modules": modules},
        }
        if tokenizer.eos_ids:
            config["eos_token_id"] = sorted(tokenizer.eos_ids)
        _write_json(work / CONFIG, config)
        write_tokenizer(work, tokenizer, tokenizer_files)
        (work / RECIPE).write_text(variant.recipe.as_file())
        written = weights_id((work / WEIGHTS,))
        _write_json(
            work / CARD,
            {
                "version": VERSION,
                "variant": variant.model_dump(mode="json"),
                "coverage": {name: asdict(one) for name, one in coverage.items()},
                "weights_sha256": written,
                "resident_bytes": resident_bytes,
                "source_precision": source_precision,
                "seconds": seconds,
                "peak_memory_bytes": peak_memory_bytes,
                "provenance": dict(made),
            },
        )
        if card is not None:
            _write_json(work / "card.json", dict(card))
        if directory.exists():
            directory.rename(place / "replaced")
        work.rename(directory)
    except (OSError, SafetensorError) as error:
        raise InvalidInput(_unwritable(directory, error)) from None
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return describe(directory)


def load(artifact: Artifact, progress: Progress) -> GPT:
    """Return the model that was written, with identical numbers; runtime passes are not in it.

    Raises:
        InvalidWeights: the files are not what they were, or damaged.
    """
    from safetensors import SafetensorError, safe_open

    config = read_json(artifact.directory, CONFIG)
    modules = config.get("quantization_config", {}).get("modules", {})
    device = artifact.variant.placement.device
    try:
        with safe_open(artifact.directory / WEIGHTS, "pt", device=device) as opened:
            names = list(opened.keys())
            tensors = {}
            for done, name in enumerate(names, start=1):
                tensors[name] = opened.get_tensor(name)
                progress(done / len(names))
        model = empty(artifact.spec)
        _fill(model, tensors, modules)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise InvalidWeights(f"{artifact.directory.name} is damaged: {error!r}.") from None
    except (RuntimeError, AssertionError) as error:
        raise InvalidWeights(f"{artifact.directory.name} is damaged: {error!r}.") from None
    return model.requires_grad_(False).eval()


def contents(model: GPT) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """Return the tensors that a file keeps of a model, and the forms of its converted modules.

    Weights that two modules share, such as a tied head's, are kept under the first's name; a
    converted module that has an earlier one's says so by ``shares``.
    """
    from gptcore.linears import Stored

    tensors: dict[str, Tensor] = {}
    modules: dict[str, dict[str, Any]] = {}
    seen: dict[tuple[int, Any], str] = {}
    for name, module in model.named_modules():
        own = {key: one.detach() for key, one in module.named_parameters(recurse=False)}
        places = {(one.data_ptr(), one.shape): key for key, one in own.items() if one.numel()}
        if isinstance(module, Stored):
            modules[name] = {"kind": module.kind, **module.settings()}
            first = next((seen[at] for at in places if at in seen), None)
            if first in modules:
                modules[name]["shares"] = first
                own = {}
            else:
                own = module.stored()
        else:
            own = {key: one for key, one in own.items() if (one.data_ptr(), one.shape) not in seen}
        seen = dict.fromkeys(places, name) | seen
        tensors |= {f"{name}.{key}": one.cpu().contiguous() for key, one in own.items()}
    return tensors, modules


def _fill(
    model: GPT, tensors: Mapping[str, Tensor], modules: Mapping[str, Mapping[str, Any]]
) -> None:
    """Put converted modules in their places and the tensors into all others."""
    from torch import nn

    from gptcore.linears.embedding import PackedEmbedding

    kinds = _kinds()
    for name in sorted(modules, key=_after_what_it_needs(modules)):
        settings = dict(modules[name])
        kind, first = kinds[settings.pop("kind")], settings.pop("shares", None)
        made = kind.restored(_own(tensors, first or name), settings)
        if first is not None:
            made.weight = model.get_submodule(first).weight
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, made)
    for name, module in model.named_modules():
        if name in modules:
            continue
        for key in [key for key, _ in module.named_parameters(recurse=False)]:
            if f"{name}.{key}" in tensors:
                fresh = nn.Parameter(tensors[f"{name}.{key}"], requires_grad=False)
                setattr(module, key, fresh)
            elif not (name == "head" and key == "weight"):
                raise KeyError(f"{name}.{key}")
        if isinstance(module, nn.Linear) and module.bias is None and f"{name}.bias" in tensors:
            module.bias = nn.Parameter(tensors[f"{name}.bias"], requires_grad=False)
    if isinstance(model.embedding, PackedEmbedding):
        model.embedding.complete(model.head)
    if "head" not in modules and "head.weight" not in tensors:
        assert isinstance(model.head, nn.Linear)
        model.head.weight = model.embedding.weight


def _after_what_it_needs(
    modules: Mapping[str, Mapping[str, Any]],
) -> Callable[[str], tuple[bool, int]]:
    """Return the order in which modules are made: parents first, and what shares weights last."""
    return lambda name: ("shares" in modules[name], name.count("."))


def _own(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Return the tensors of a module, its children's left out, by their short names."""
    begin = f"{name}."
    return {
        key.removeprefix(begin): one
        for key, one in tensors.items()
        if key.startswith(begin) and "." not in key.removeprefix(begin)
    }


def _kinds() -> dict[str, type[Stored]]:
    """Return every form of a module by its name in a file."""
    import importlib
    import pkgutil

    import gptcore.linears

    found: dict[str, Any] = {}
    for module in pkgutil.iter_modules(gptcore.linears.__path__):
        classes = vars(importlib.import_module(f"gptcore.linears.{module.name}")).values()
        for one in classes:
            if isinstance(one, type) and hasattr(one, "restored") and "kind" in vars(one):
                found[vars(one)["kind"]] = one
    return found


def write_tokenizer(work: Path, tokenizer: Tokenizer, files: Path | None) -> None:
    """Write the tokenizer as it is now, with the settings that lie beside the original."""
    text = tokenizer.as_json()
    if text is None:
        return
    (work / "tokenizer.json").write_text(text)
    for name in TOKENIZER_FILES[1:]:
        if files is not None and (files / name).is_file():
            shutil.copyfile(files / name, work / name)
    settings = read_json(work, "generation_config.json")
    if settings:  # a cut vocabulary gave the special tokens other ids
        settings["eos_token_id"] = sorted(tokenizer.eos_ids)
        _write_json(work / "generation_config.json", settings)


def _coverage(value: Mapping[str, Any]) -> Coverage:
    known = dict(value)
    known["skipped"] = tuple((str(name), str(why)) for name, why in known.get("skipped", ()))
    return Coverage(**known)


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value, ensure_ascii=False, indent=1))


def _unwritable(directory: Path, error: Exception) -> str:
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return f"{directory.name} could not be written ({said}); nothing of it was kept."
