"""The first pages of a newcomer: what ships writes at once, and SmolLM2 is one press away."""

import shutil

import pytest
from streamlit.testing.v1 import AppTest

from gptcore.catalogue import SHIPPED, SMOLLM2
from gptcore.lab import Lab
from pages.parts import services
from tests.conftest import ROOT

HOME = str(ROOT / "pages" / "main.py")


def home() -> AppTest:
    page = AppTest.from_file(HOME, default_timeout=60).run()
    assert not page.exception
    return page


@pytest.mark.usefixtures("data_folder")
def test_without_any_other_model_the_one_that_ships_writes() -> None:
    with Lab.open(monitor=False) as lab:
        services.set_lab(lab)
        page = home()
        services.set_lab(None)
    labels = [one.label for one in page.button]
    assert "Write a sentence with Tales 6M" in labels
    assert "Bring SmolLM2-135M (93 MB)" in labels


def test_what_is_there_is_not_offered_again(lab: Lab) -> None:
    folder = lab.catalogue.folder
    shutil.copytree(folder / "tiny", folder / SMOLLM2)
    assert "Bring SmolLM2-135M (93 MB)" not in [one.label for one in home().button]


def test_the_card_of_the_model_that_ships_can_be_read(lab: Lab) -> None:
    card = lab.model_card(SHIPPED.name)
    assert card is not None
    assert not card.startswith("---")
    assert "samples" in card
    assert lab.model_card("tiny") is None
