"""A lab with one small model, which the pages draw."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from gptcore.lab import Lab
from pages.parts import services
from tests.tiny import tiny_checkpoint


@pytest.fixture
def lab(data_folder: Path) -> Iterator[Lab]:
    """Where nothing else is said: ``tiny`` is installed, and nothing was ever run."""
    tiny_checkpoint(data_folder / "models" / "tiny")
    with Lab.open(monitor=False) as lab:
        services.set_lab(lab)
        yield lab
        services.set_lab(None)


@pytest.fixture(scope="module")
def lasting_lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """One such lab for all tests of a file, since each host takes seconds to start."""
    folder: Path = tmp_path_factory.mktemp("lab")
    tiny_checkpoint(folder / "data" / "models" / "tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPTLAB_DATA", str(folder / "data"))
        patch.setenv("GPTLAB_LOCKS", str(folder / "locks"))
        with Lab.open(monitor=False) as lab:
            services.set_lab(lab)
            yield lab
            services.set_lab(None)
