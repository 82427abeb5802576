"""Recipe and variant: one thing has one hash, different things differ. No torch."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from gptcore.device import Placement, cores
from gptcore.errors import InvalidInput
from gptcore.passes.base import Pass, Stage
from gptcore.passes.quantize import Int4, Int8
from gptcore.passes.registry import passes
from gptcore.recipe import SHORTHANDS, Calibration, Recipe, Variant, place, recipe_from_text
from gptcore.spec import GPT2, ModelSpec, gpt
from tests.conftest import ROOT

TINY = gpt(1, 32, 2, context=16, vocabulary=40)


class Shape(Pass):
    """Stands for a pass that changes the shape."""

    name: ClassVar[str] = "shape_for_test"
    stage: ClassVar[Stage] = Stage.SHAPE
    layers: int = 1


class Runtime(Pass):
    """Stands for a pass that changes how a model runs."""

    name: ClassVar[str] = "runtime_for_test"
    stage: ClassVar[Stage] = Stage.RUNTIME


def variant(**changes: Any) -> Variant:
    whole = {"model": "tiny", "spec": TINY, "weights_id": "random:0", "placement": Placement()}
    return Variant.model_validate({**whole, **changes})


def picked(precision: str, recipe: Recipe = Recipe()) -> Variant:
    placement, recipe = place(precision, "cpu", 0, recipe)
    return variant(placement=placement, recipe=recipe)


def test_int4_picked_as_precision_is_int4_in_the_recipe() -> None:
    by_name = picked("int4")
    by_recipe = picked("bf16", Recipe(passes=(Int4(),)))
    by_json = picked("bf16", Recipe.model_validate({"passes": [{"pass": "int4"}]}))
    in_full = picked("bf16", Recipe.model_validate({"passes": [{"pass": "int4", "group": 64}]}))
    assert by_name == by_recipe == by_json == in_full
    assert len({one.hash for one in (by_name, by_recipe, by_json, in_full)}) == 1
    assert by_name.precision == "int4"
    assert by_name.placement.precision == "bf16"


def test_int8_stands_on_fp32() -> None:
    assert picked("int8") == picked("fp32", Recipe(passes=(Int8(),)))
    assert picked("int8").placement.precision == "fp32"
    assert picked("int8").precision == "int8"


def test_zero_threads_are_the_same_as_naming_all_cores() -> None:
    assert variant(placement=Placement(threads=cores())).hash == variant().hash
    assert variant(placement=Placement(threads=cores() + 1)).hash != variant().hash


def test_threads_of_the_cpu_decide_nothing_on_a_gpu() -> None:
    one, two = (variant(placement=Placement(device="cuda:0", threads=n)) for n in (1, 2))
    assert one.hash == two.hash


def test_a_label_or_a_note_is_no_part_of_the_hash() -> None:
    assert variant(model="a/path/to/it").hash == variant().hash
    noted = TINY.model_copy(update={"note": "said beside it"})
    assert variant(spec=noted).hash == variant().hash


def test_the_hash_is_the_same_in_another_process() -> None:
    """Else the store would know no variant again after a restart."""
    code = (
        "import sys; from gptcore.recipe import Variant;"
        "print(Variant.model_validate_json(sys.argv[1]).hash, 'torch' in sys.modules)"
    )
    one = picked("int4")
    done = subprocess.run(
        [sys.executable, "-c", code, one.model_dump_json()],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [one.hash, "False"]


def test_a_known_variant_keeps_its_hash() -> None:
    """It is the key of what is stored: a change here orphans every earlier run of a variant."""
    placement = Placement(precision="bf16", threads=2)
    known = Variant(
        model="gpt2",
        spec=GPT2["gpt2"],
        weights_id="random:0",
        placement=placement,
        recipe=Recipe(passes=(Int4(group=32),)),
    )
    assert known.hash == "3a2c7e6491633c93"


OTHER_SPECS = st.sampled_from(
    [
        TINY.model_copy(update={name: value})
        for name, value in {
            "layers": 2,
            "context": 17,
            "vocabulary": 41,
            "gelu": "erf",
            "tied_head": False,
            "norm_eps": 1e-6,
            "rope_theta": 5e5,
        }.items()
    ]
    + [TINY]
)
PLACEMENTS = st.builds(
    Placement,
    device=st.sampled_from(["cpu", "cuda:0", "cuda:1", "mps"]),
    precision=st.sampled_from(["fp32", "bf16", "fp16"]),
    threads=st.integers(0, 3),
)
RECIPES = st.sampled_from(
    [Recipe(), *(Recipe(passes=(p,)) for p in (Int8(), Int4(), Int4(group=32)))]
)
VARIANTS = st.builds(
    variant,
    spec=OTHER_SPECS,
    weights_id=st.sampled_from(["random:0", "random:1", "sha256:00"]),
    placement=PLACEMENTS,
    recipe=RECIPES,
)


def decisive(one: Variant) -> tuple[object, ...]:
    on_cpu = one.placement.device == "cpu"
    threads = (one.placement.threads or cores()) if on_cpu else 0
    placed = (one.placement.device, one.placement.precision, threads)
    return (one.spec, one.weights_id, placed, one.recipe)


@settings(max_examples=300, deadline=None)
@given(VARIANTS, VARIANTS)
def test_hashes_are_equal_exactly_where_what_decides_is_equal(one: Variant, two: Variant) -> None:
    assert (one.hash == two.hash) == (decisive(one) == decisive(two))


@settings(max_examples=100, deadline=None)
@given(VARIANTS)
def test_json_gives_a_variant_back(one: Variant) -> None:
    again = Variant.model_validate_json(one.model_dump_json())
    assert again == one
    assert again.hash == one.hash
    assert Variant.model_validate(json.loads(json.dumps(one.model_dump(mode="json")))) == one
    assert len(one.hash) == 16
    assert int(one.hash, 16) >= 0


def test_every_field_of_a_spec_but_its_note_decides_the_hash() -> None:
    """A field that is added later is part of it by itself."""
    dumped = TINY.model_dump()
    other: dict[str, Any] = {
        "family": "llama",
        "norm": "rmsnorm",
        "position": "rotary",
        "mlp": "swiglu",
        "gelu": "erf",
        "norm_eps": 1e-6,
        "rope_theta": 5.0,
        "rope_scaling": {},
        "kv_heads": 1,
        "note": "said",
    }
    for name, value in dumped.items():
        changed = other.get(
            name, not value if isinstance(value, bool) else 2 * value if value else 1
        )
        spec = ModelSpec.model_validate({**dumped, name: changed})
        assert (variant(spec=spec).hash == variant().hash) == (name == "note"), name


def test_passes_stand_in_the_order_of_their_stages() -> None:
    right = (Shape(), Int4(), Runtime())
    assert Recipe(passes=right).passes == right
    for wrong in [(Int4(), Shape()), (Runtime(), Int4()), (Runtime(), Shape())]:
        with pytest.raises(ValidationError, match="the order is SHAPE, NUMBERS, RUNTIME"):
            Recipe(passes=wrong)


def test_the_order_within_a_stage_is_kept_and_counts() -> None:
    one, two = Shape(layers=1), Shape(layers=2)
    first, second = Recipe(passes=(one, two)), Recipe(passes=(two, one))
    assert first != second
    assert variant(recipe=first).hash != variant(recipe=second).hash


def test_a_pass_is_added_at_the_end_of_its_stage() -> None:
    recipe = Recipe(passes=(Shape(), Runtime()))
    assert recipe.then(Int4()).passes == (Shape(), Int4(), Runtime())
    assert recipe.then(Shape(layers=2)).passes == (Shape(), Shape(layers=2), Runtime())
    assert Recipe().then(Int8()).passes == (Int8(),)
    assert recipe.passes == (Shape(), Runtime())


@pytest.mark.parametrize("two", [(Int8(), Int8()), (Int8(), Int4()), (Int4(), Int4(group=32))])
def test_a_recipe_quantizes_once(two: tuple[Pass, ...]) -> None:
    """The second would find no layer left, yet make another hash."""
    with pytest.raises(ValidationError, match="both quantize; choose one"):
        Recipe(passes=two)


@pytest.mark.parametrize("precision", SHORTHANDS)
def test_a_quantized_precision_with_a_quantizing_recipe_is_refused(precision: str) -> None:
    with pytest.raises(InvalidInput, match=rf"^Precision {precision} and the recipe \(int4\)"):
        place(precision, "cpu", 0, Recipe(passes=(Int4(),)))


@pytest.mark.parametrize("precision", ["int3", "", "FP32", "fp64", "int8 "])
def test_an_unknown_precision_is_refused_with_those_there_are(precision: str) -> None:
    with pytest.raises(InvalidInput, match="there are: fp32, bf16, fp16, int8, int4"):
        place(precision, "cpu", 0, Recipe())


def test_a_recipe_reads_as_its_passes() -> None:
    assert str(Recipe()) == "baseline"
    assert str(Recipe(passes=(Shape(), Int4()))) == "shape_for_test → int4"
    assert repr(Recipe(passes=(Int4(group=32),))) == "Recipe(passes=(Int4(group=32),))"


@pytest.mark.parametrize("value", ["int8", 7, [7], [{"pass": "int4", "group": 1}], {"int8": {}}])
def test_what_is_no_recipe_is_refused(value: Any) -> None:
    with pytest.raises((ValidationError, InvalidInput)):
        Recipe.model_validate({"passes": value})


@pytest.mark.parametrize("name", sorted(passes()))
def test_every_pass_is_written_and_read_back(name: str) -> None:
    assert recipe_from_text(Recipe(passes=(passes()[name](),)).as_text()).passes[0].name == name


@pytest.mark.parametrize(
    ("recipe", "text"),
    [
        (Recipe(), ""),
        (Recipe(passes=(Int8(),)), "int8"),
        (Recipe(passes=(Int4(group=32),)), "int4(group=32)"),
        (
            recipe_from_text("drop_layers(chosen=[1, 3]), int8"),
            "drop_layers(chosen=[1, 3]), int8",
        ),
        (Recipe(passes=(Int8(),), calibration=Calibration(hash="sha256:1")), "int8"),
    ],
)
def test_a_recipe_is_written_as_a_person_would(recipe: Recipe, text: str) -> None:
    assert recipe.as_text() == text
    assert recipe_from_text(text).passes == recipe.passes


def test_a_recipe_with_a_text_of_its_own_is_written_with_it() -> None:
    recipe = Recipe(passes=(Int8(),), calibration=Calibration(text="mine", tokens=64))
    assert recipe_from_text(recipe.as_text()) == recipe
