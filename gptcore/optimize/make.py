"""Apply a recipe, keep the result as a model of the catalogue, and prove what it changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, model_validator

from gptcore import artifact
from gptcore.artifact import Artifact
from gptcore.catalogue import NAME, card_of, taken
from gptcore.errors import InvalidInput
from gptcore.optimize.part import Part
from gptcore.optimize.proof import Prove
from gptcore.paths import models_dir
from gptcore.provenance import provenance
from gptcore.recipe import Variant
from gptcore.records import RunKind
from gptcore.spec import PRESETS
from gptcore.work import Desk, Loaded, Work

MADE = 0.3
"""Share of the work that making the variant is taken for, where a proof follows."""


class Optimize(Work):
    """Make a variant by its recipe and keep it."""

    kind: ClassVar[RunKind] = RunKind.OPTIMIZE

    variant: Variant
    name: str = Field(
        "",
        max_length=100,
        title="Name",
        description="Under which the catalogue lists the result; empty keeps none.",
    )
    out: str = Field(
        "", max_length=4096, description="A folder to write into instead (command line only)."
    )
    replace: bool = Field(False, title="Replace", description="What has that name already goes.")
    proof: Prove | None = Field(None, description="What to measure of the result afterwards.")

    @model_validator(mode="after")
    def _has_passes(self) -> Optimize:
        if not self.variant.recipe.passes:
            raise ValueError("the recipe is empty: choose a pass at least")
        if self.name and self.out:
            raise ValueError("both a name and a folder are given: choose one")
        return self

    def variants_used(self) -> tuple[Variant, ...]:
        """Return the variant, and the baseline where a proof follows."""
        return (self.variant, self.proof.baseline) if self.proof else (self.variant,)

    def perform(self, desk: Desk) -> Mapping[str, Any]:
        """Make and keep the variant, then prove it.

        Returns:
            ``artifact``, ``name``, ``seconds``, ``passes_s``, ``stored_bytes``, ``resident_bytes``,
            ``effective_bits``, ``coverage_ratio``, ``coverage``, ``skipped``, ``weights_sha256``,
            and ``proof`` (``Card.as_json``; None where none was asked for).

        Raises:
            InvalidInput: the recipe cannot run, the name is taken, or the disk is full; nothing
                half-written remains.
        """
        target = self._target()
        desk.unload(self.variant)  # so that what is timed is the making
        share = MADE if self.proof else 1.0
        making = Part(desk, "making", 0.0, share, lambda found: None)
        making.phase("loading weights", 0.0)
        loaded = making.load(self.variant)
        found = self._result(loaded)
        if target is not None:
            making.phase("writing the variant", 0.9)
            kept = self._write(target, loaded)
            found |= {
                "artifact": str(kept.directory),
                "stored_bytes": kept.stored_bytes,
                "effective_bits": kept.effective_bits,
                "weights_sha256": kept.weights_sha256,
            }
        del loaded
        desk.partial(found)
        if self.proof:
            part = Part(
                desk, "proof", MADE, 1.0, lambda card: desk.partial({**found, "proof": card})
            )
            found["proof"] = dict(self.proof.perform(part))
        return found

    def _target(self) -> Path | None:
        """Return where the variant shall lie, refused before any work where it cannot."""
        if self.out:
            folder = Path(self.out).expanduser()
            if folder.exists() and not self.replace and any(folder.iterdir()):
                raise InvalidInput(
                    f"There is already something in {folder.name!r}: choose another folder, or "
                    "have it replaced."
                )
            return folder
        if not self.name:
            return None
        if not NAME.fullmatch(self.name) or self.name in PRESETS:
            raise InvalidInput(
                f"{self.name[:80]!r} is no name for a variant: use letters, digits, dots, dashes "
                "and underscores, a letter or digit first, and no name of a shape."
            )
        folder = models_dir() / self.name
        if folder.exists() and not (self.replace and artifact.is_artifact(folder)):
            raise InvalidInput(taken(self.name))
        return folder

    def _result(self, loaded: Loaded) -> dict[str, Any]:
        from gptcore.linears import stored_bytes

        stored = stored_bytes(loaded.engine.model)
        converted = [one for one in loaded.coverage.values() if one.total_weights]
        return {
            "artifact": None,
            "name": self.name or None,
            "recipe": self.variant.recipe.model_dump(mode="json"),
            "seconds": sum(loaded.passes_s.values()),
            "passes_s": dict(loaded.passes_s),
            "peak_memory_bytes": loaded.passes_peak_bytes,
            "stored_bytes": stored,
            "resident_bytes": loaded.resident_bytes,
            "effective_bits": 8 * stored / self.variant.spec.parameters,
            "coverage_ratio": min((one.ratio for one in converted), default=None),
            "coverage": artifact.coverage_json(loaded.coverage),
            "skipped": [
                {"pass": name, "module": module, "reason": reason}
                for name, one in loaded.coverage.items()
                for module, reason in one.skipped
            ],
            "weights_sha256": None,
            "source_precision": loaded.source_precision,
            "proof": None,
        }

    def _write(self, target: Path, loaded: Loaded) -> Artifact:
        card = None
        if self.name:
            card = {"title": self.name, "added_at": datetime.now(UTC).isoformat(timespec="seconds")}
            known = card_of(loaded.source) if loaded.source else {}
            card |= {key: known[key] for key in ("licence",) if key in known}
        made = provenance(self.variant.weights_id, self.variant.placement.resolved_threads)
        return artifact.write(
            target,
            model=loaded.engine.model,
            tokenizer=loaded.engine.tokenizer,
            tokenizer_files=loaded.source,
            variant=self.variant,
            coverage=loaded.coverage,
            resident_bytes=loaded.resident_bytes,
            source_precision=loaded.source_precision,
            seconds=sum(loaded.passes_s.values()),
            peak_memory_bytes=loaded.passes_peak_bytes,
            made=asdict(made),
            replace=self.replace,
            card=card,
        )
