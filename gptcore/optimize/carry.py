"""Write a variant in another program's form, into the data folder."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from gptcore.export import export, form_of
from gptcore.paths import data_dir
from gptcore.recipe import Variant
from gptcore.records import RunKind
from gptcore.work import Desk, Work


class Export(Work):
    """Carry a variant away; see ``gptcore.export``."""

    kind: ClassVar[RunKind] = RunKind.EXPORT

    variant: Variant
    form: str = Field(max_length=40, title="Format", description="Of another program.")

    def variants_used(self) -> tuple[Variant, ...]:
        """Return the variant."""
        return (self.variant,)

    def perform(self, desk: Desk) -> Mapping[str, Any]:
        """Write it, and return ``path``, ``bytes``, ``sha256`` and ``note``.

        Raises:
            InvalidInput: there is no such format, it cannot hold this model, or the disk is full.
        """
        form = form_of(self.form)
        loaded = desk.load(self.variant)
        folder = data_dir() / "exports"
        folder.mkdir(exist_ok=True)
        stem = f"{Path(self.variant.model).name}-{self.variant.hash[:8]}-{form.name}"
        target = folder / f"{stem}{form.suffix}"
        if target.is_dir():
            shutil.rmtree(target)
        target.unlink(missing_ok=True)

        def progress(share: float) -> None:
            desk.check()
            desk.phase(f"writing {form.title}", share)

        found = export(loaded, self.form, target, progress)
        return {**asdict(found), "path": str(found.path)}
