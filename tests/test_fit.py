"""Whether a model fits: exact weights and cache, peaks as seen, and alternatives that do fit."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest

from gptcore.device import Placement
from gptcore.fit import (
    LIBRARY_BYTES,
    RANDOM_SHAPES,
    USABLE_RATIO,
    decimal_gb,
    fit,
    gib,
    needed_bytes,
)
from gptcore.recipe import Recipe, Variant, place
from gptcore.spec import BYTES, PRESETS, SMOLLM2_135M
from tests.conftest import ROOT

GIB = 2**30
PRECISIONS = ("fp32", "bf16", "fp16", "int8", "int4")


def variant(name: str, precision: str = "fp32", device: str = "cpu") -> Variant:
    placement, recipe = place(precision, device, 1, Recipe())
    return Variant(
        model=name,
        spec=PRESETS[name],
        weights_id="random:0",
        placement=placement,
        recipe=recipe,
    )


def test_175b_in_fp32_is_refused_with_its_698_gb_and_what_would_fit() -> None:
    found = fit(variant("gpt3-175b"), 2048, free=lambda device: 24 * GIB)
    assert not found.fits
    assert found.free_bytes == 24 * GIB
    assert found.needed_bytes > 698_417_037_312
    assert found.sentence == (
        "gpt3-175b in fp32 does not fit on cpu: its 174,604,259,328 parameters take 698 GB "
        "(650.5 GiB), 668.9 GiB with cache and working space, and 24.0 GiB are free. What would "
        "fit: gpt3-6.7b in bf16 or gpt3-2.7b in fp32."
    )
    assert found.suggestions == (("gpt3-6.7b", "bf16"), ("gpt3-2.7b", "fp32"))


def test_nothing_is_allocated_to_find_out() -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    for name, precision in itertools.product(PRESETS, PRECISIONS):
        fit(variant(name, precision), 2048)
    assert process.memory_info().rss - before < 20 * 2**20


def test_where_nothing_would_fit_the_way_out_is_to_free_memory() -> None:
    found = fit(variant("gpt2"), 1024, free=lambda device: 10 * 2**20)
    assert not found.fits
    assert found.suggestions == ()
    assert found.sentence.endswith("10 MiB are free. Free some memory and try again.")


def cases() -> Iterator[tuple[str, str, float]]:
    for name, precision in itertools.product(PRESETS, PRECISIONS):
        for free_gib in (0.3, 1, 4, 24, 80, 700):
            yield name, precision, free_gib


def test_every_alternative_that_is_named_does_fit() -> None:
    refused = named = 0
    for name, precision, free_gib in cases():

        def free(device: str, size: float = free_gib) -> int:
            return int(size * GIB)

        found = fit(variant(name, precision), 2048, free=free)
        if found.fits:
            assert found.suggestions == ()
            continue
        refused += 1
        assert (name, precision) not in found.suggestions
        for other, its_precision in found.suggestions:
            named += 1
            spec = PRESETS[other]
            tokens = min(2048, spec.context)
            assert fit(variant(other, its_precision), tokens, free=free).fits
            assert f"{other} in {its_precision}" in found.sentence
    assert refused > 100
    assert named > 100


def test_the_same_model_in_fewer_bytes_is_named_first() -> None:
    found = fit(variant("gpt3-6.7b"), 2048, free=lambda device: 20 * GIB)
    assert found.suggestions[0] == ("gpt3-6.7b", "bf16")


@pytest.mark.parametrize("name", PRESETS)
def test_a_quantized_model_needs_no_less_than_what_it_starts_from(name: str) -> None:
    """So none is suggested, on any device: the plain one fits wherever it does."""
    assert needed_bytes(variant(name, "int8"), 512) > needed_bytes(variant(name, "fp32"), 512)
    assert needed_bytes(variant(name, "int4"), 512) > needed_bytes(variant(name, "bf16"), 512)


def test_models_of_the_caller_are_suggested_too() -> None:
    mine = (("mine", SMOLLM2_135M, "sha256:1"), *RANDOM_SHAPES)
    found = fit(variant("gpt2-large"), 1024, others=mine, free=lambda device: GIB)
    assert ("mine", "fp32") in (
        fit(variant("gpt2-large"), 1024, others=mine[:1], free=lambda device: GIB).suggestions
    )
    assert found.suggestions


def test_memory_that_loaded_models_would_give_back_counts_as_free() -> None:
    needed = needed_bytes(variant("gpt2"), 1024)
    half = needed // 2
    assert not fit(variant("gpt2"), 1024, free=lambda device: half).fits
    found = fit(variant("gpt2"), 1024, free=lambda device: half, reusable_bytes=needed)
    assert found.fits
    assert found.free_bytes == half + needed


def test_a_model_may_take_95_percent_and_not_a_byte_more() -> None:
    needed = needed_bytes(variant("gpt2"), 1024)
    enough = -int(-needed // USABLE_RATIO)
    assert fit(variant("gpt2"), 1024, free=lambda device: enough).fits
    assert not fit(variant("gpt2"), 1024, free=lambda device: enough - 2).fits


def test_unknown_memory_is_said_to_be_unknown() -> None:
    found = fit(variant("gpt2", device="cuda:0"), 1024, free=lambda device: None)
    assert found.fits
    assert found.free_bytes is None
    assert found.sentence.endswith("free memory is unknown.")


def test_free_memory_of_this_machine_is_asked_by_default() -> None:
    found = fit(variant("gpt2"), 1024)
    assert found.free_bytes is not None
    assert abs(found.free_bytes - psutil.virtual_memory().available) < 2 * GIB


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", PRESETS)
def test_weights_and_cache_are_exact_and_the_rest_is_small(name: str, precision: str) -> None:
    spec, context = PRESETS[name], 1000
    exact = spec.parameters * BYTES[precision]
    exact += context * 2 * spec.layers * spec.kv_heads * spec.head_width * BYTES[precision]
    rest = needed_bytes(variant(name, precision), context) - exact
    assert LIBRARY_BYTES < rest < 0.1 * exact + 2 * LIBRARY_BYTES


@pytest.mark.parametrize("tokens", [0, 1, 100, 2048])
def test_a_longer_text_needs_exactly_its_keys_and_values(tokens: int) -> None:
    one = variant("gpt3-125m")
    grown = needed_bytes(one, tokens) - needed_bytes(one, 0)
    assert grown == tokens * 2 * 12 * 768 * 4


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_what_is_there_before_a_pass_shrinks_it_counts(precision: str) -> None:
    """Random or from disk: the placement's precision is reached before anything is packed."""
    start = PRESETS["gpt2"].weights_bytes("fp32" if precision == "int8" else "bf16")
    for weights_id in ("random:0", "sha256:1"):
        one = variant("gpt2", precision).model_copy(update={"weights_id": weights_id})
        assert needed_bytes(one, 1) > start


MEASURE = r"""
import json, re, resource, sys
from pathlib import Path
import psutil, torch
from gptcore import weights
from gptcore.catalogue import Catalogue
from gptcore.engine import Engine
from gptcore.fit import needed_bytes
from gptcore.measure.memory import weight_bytes
from gptcore.passes.base import PassContext
from gptcore.recipe import Recipe, Variant, place
from gptcore.records import Request
from gptcore.spec import gpt
from gptcore.tokenizer import byte_tokenizer

def peak():
    # Linux hands ru_maxrss down from a parent.
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

def run(spec, placement, recipe, context):
    model = weights.build_random(spec, placement)
    for one in recipe.passes:
        model = one.apply(model, PassContext(placement=placement))
    engine = Engine(model, byte_tokenizer(spec.vocabulary))
    request = Request(prompt="a" * (context - 4), max_new_tokens=4, ignore_eos=True)
    assert len(list(engine.start(request))) == 4
    return model

torch.set_num_threads(1)
placement, recipe = place(sys.argv[1], "cpu", 1, Recipe())
spec = gpt(6, 768, 12, vocabulary=50257)
run(gpt(1, 64, 4, vocabulary=300), placement, recipe, 20)
before = psutil.Process().memory_info().rss
model = run(spec, placement, recipe, 300)
taken = peak() - before
variant = Variant(
    model="m", spec=spec, weights_id="random:0", placement=placement, recipe=recipe
)
resident = spec.weights_bytes(placement.precision)
for one in recipe.passes:
    resident = one.weights_bytes_after(spec, placement, resident)
print(json.dumps({
    "peak": taken,
    "needed": needed_bytes(variant, 300),
    "resident": resident,
    "held": weight_bytes(model)[0],
    "embedding": spec.vocabulary * (spec.width + 2),
}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_prediction_is_what_a_model_of_82_million_takes(precision: str) -> None:
    """A process of its own, from the moment torch is warm to the end of a long text.

    At most 10 % too little (the heap of the C library is not ours to know), and at most 50 % and
    the library's own allowance too much: a precision mistaken for another is off by 100 %.
    """
    for _ in range(3):  # what the library keeps of freed pages differs from start to start
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, precision],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        seen = json.loads(done.stdout)
        # Where there is a compiler, the native step shares a tied embedding with the head, and
        # keeps a few bytes less for each row.
        assert 0 <= seen["resident"] - seen["held"] <= 1.1 * seen["embedding"]
        if 0.9 * seen["peak"] < seen["needed"] < 1.5 * seen["peak"] + LIBRARY_BYTES:
            return
    pytest.fail(f"{seen['needed']:,} bytes were predicted and {seen['peak']:,} were taken")


@pytest.mark.parametrize(
    ("size", "binary", "decimal"),
    [
        (698_417_037_312, "650.5 GiB", "698 GB"),
        (GIB, "1.0 GiB", "1.1 GB"),
        (GIB - 1, "1,024 MiB", "1.1 GB"),
        (540_000_000, "515 MiB", "0.5 GB"),
        (0, "0 MiB", "0.0 GB"),
    ],
)
def test_bytes_read_as_a_person_reads_them(size: int, binary: str, decimal: str) -> None:
    assert gib(size) == binary
    assert decimal_gb(size) == decimal


def test_nothing_here_needs_torch() -> None:
    code = (
        "import sys, gptcore.fit, gptcore.passes.registry as all_passes;"
        "all_passes.passes(); print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


def test_a_placement_of_another_device_asks_that_device() -> None:
    asked: list[str] = []

    def free(device: str) -> int:
        asked.append(device)
        return GIB

    one = variant("gpt2").model_copy(update={"placement": Placement(device="cuda:3")})
    fit(one, 16, free=free)
    assert asked == ["cuda:3"]
