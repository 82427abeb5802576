"""What fits: the catalogue's cards, the limits of a size, and this machine."""

import pytest

from gptcore.device import Placement
from gptcore.engine import decode
from gptcore.errors import InvalidInput
from gptcore.fit import fit
from gptcore.plan.cards import CARDS, Card, card
from gptcore.plan.fits import cell, limits, machine_card, matrix, usable_bytes
from gptcore.recipe import Recipe, Variant
from gptcore.spec import PRESETS
from gptcore.weights import build_random


@pytest.mark.parametrize("one", CARDS.values(), ids=list(CARDS))
def test_a_card_says_its_source_and_has_sane_numbers(one: Card) -> None:
    assert len(one.source) > 5
    year, month = map(int, one.dated.split("-"))
    assert 2017 <= year <= 2026
    assert 1 <= month <= 12
    assert 4e9 <= one.memory_bytes <= 3e11
    assert 1e11 <= one.bytes_per_s <= 1e13
    for precision in ("fp32", "bf16", "fp16", "int8", "int4"):
        assert 1e12 <= one.rate(precision) <= 1e16
    assert one.rate("fp32") <= one.rate("fp16") <= one.rate("int8")


def test_the_promised_cards_are_there() -> None:
    assert set(CARDS) >= {
        "v100-32gb", "rtx-6000", "rtx-8000", "rtx-a6000", "a100-80gb", "h100", "h200", "b200",
        "tpu-v4",
    }  # fmt: skip


def test_an_unknown_card_names_those_that_are_there() -> None:
    with pytest.raises(InvalidInput, match="h200"):
        card("voodoo2")


def test_a_card_without_bf16_computes_it_in_fp32() -> None:
    assert card("v100-32gb").rate("bf16") == card("v100-32gb").rate("fp32")


def test_1_3b_on_an_8_gb_card() -> None:
    eight, spec = card("rtx-3070"), PRESETS["gpt3-1.3b"]
    half = limits(eight, spec, "fp16")
    assert half.longest_context == 2048
    assert 5 <= half.most_batch <= 15
    assert limits(eight, spec, "int4").most_batch > half.most_batch
    assert not limits(eight, PRESETS["gpt3-6.7b"], "fp16").fits


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4"])
def test_limits_are_the_last_that_fit(precision: str) -> None:
    one, spec = card("rtx-3070"), PRESETS["gpt3-1.3b"]
    found = limits(one, spec, precision)
    assert cell(one, "", spec, precision, 2048, found.most_batch).fits
    assert not cell(one, "", spec, precision, 2048, found.most_batch + 1).fits


def test_a_context_beyond_the_model_has_no_cell() -> None:
    cells = matrix(card("h100"), {"gpt2": PRESETS["gpt2"]}, (512, 1024, 2048))
    assert {one.context for one in cells} == {512, 1024}
    assert len(cells) == 2 * 5


def test_cells_of_this_machine_agree_with_what_the_lab_lets_through() -> None:
    """``gptcore.fit`` decides before a model is loaded; a cell that fits must pass there."""
    here = machine_card()
    for name, spec in PRESETS.items():
        for precision in ("fp32", "bf16"):
            found = cell(here, name, spec, precision, 1024)
            variant = Variant(
                model=name,
                spec=spec,
                weights_id="random:0",
                placement=Placement(device="cpu", precision=precision),
                recipe=Recipe(),
            )
            checked = fit(variant, 1024, free=lambda device: here.memory_bytes)
            if abs(found.used_ratio - 1) > 0.15:
                assert found.fits == checked.fits, (name, precision)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "precision"), [("gpt2", "fp32"), ("gpt3-350m", "bf16"), ("gpt2-large", "bf16")]
)
def test_a_cell_that_fits_loads(name: str, precision: str) -> None:
    found = cell(machine_card(), name, PRESETS[name], precision, 1024)
    if not found.fits:
        pytest.skip(
            f"{name} needs {found.needed_bytes:,} bytes and {found.usable_bytes:,} are free"
        )
    model = build_random(PRESETS[name], Placement(precision=precision, threads=1))
    assert decode(model, 1, model.new_cache(1024)).shape == (PRESETS[name].vocabulary,)


def test_a_card_keeps_something_for_itself() -> None:
    assert usable_bytes(card("rtx-3070")) < 0.95 * card("rtx-3070").memory_bytes
