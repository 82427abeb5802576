"""The native step against the plain model, position by position.

Both compute the same weights; what remains is rounding. Differences are taken relative to the
standard deviation of the logits; the bounds are three to ten times the largest that was seen.
"""

from __future__ import annotations

import copy
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gptcore import kernels
from gptcore.errors import ContextOverflow
from gptcore.kernels import build
from gptcore.kernels.linear import NativeLinear
from gptcore.kernels.step import NativeStep, Unsupported, adopt
from gptcore.model import GPT
from tests.conftest import ROOT
from tests.kernels.shapes import (
    CASES,
    COARSE,
    SPECS,
    TOKENS,
    full_logits,
    native,
    plain,
    random_model,
    some_ids,
)

pytestmark = pytest.mark.skipif(bool(kernels.unavailable()), reason=str(kernels.unavailable()))

SUMS = 3e-5
"""fp32 sums of hundreds of products in another order: 2^-24 = 6e-8 each, 3e-6 seen."""
STEPS = 1e-3
"""Activations are off by up to 1 / 65,024 = 1.5e-5 of their group's peak, 3e-4 seen."""
EIGHT_BITS = 0.25
"""Activations of 8 bits are off by up to 1 / 254 of their group's peak, 0.08 seen."""
BFLOAT = 0.03
"""Keys and values are kept in 8 bits of mantissa: off by up to 2^-9 = 2e-3, 7e-3 seen."""


def tolerance(form: str) -> float:
    if form == "bf16":
        return BFLOAT
    if form == COARSE:
        return EIGHT_BITS
    return SUMS if form == "fp32" else STEPS


def stepped(model: GPT, ids: list[int], *, prefix: int = 0) -> torch.Tensor:
    """Return the logits after each of ``ids``, those behind ``prefix`` by the native step."""
    step, cache = NativeStep(model), model.new_cache(len(ids))
    found = []
    if prefix:
        with torch.inference_mode():
            found = list(model(torch.tensor([ids[:prefix]]), cache)[0].float())
    assert step.takes(cache)
    found += [step(id, cache) for id in ids[prefix:]]
    return torch.stack(found)


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Return the largest difference of any position, in standard deviations of the logits."""
    return float((found - wanted).abs().max() / wanted.std())


@pytest.mark.parametrize(("spec", "form"), CASES)
def test_every_position_agrees_with_the_plain_model(spec: str, form: str) -> None:
    model = native(random_model(SPECS[spec]), form)
    ids = some_ids(SPECS[spec])
    found = stepped(model, ids)
    assert found.shape == (TOKENS, SPECS[spec].vocabulary)
    assert difference(found, full_logits(plain(model), ids)) < tolerance(form)


@pytest.mark.parametrize("form", ["fp32", "bf16", "int8, rows"])
@pytest.mark.parametrize("spec", ["llama, odd sizes", "gpt2, odd sizes"])
def test_a_text_that_torch_read_is_continued(spec: str, form: str) -> None:
    model = native(random_model(SPECS[spec]), form)
    ids = some_ids(SPECS[spec], 150)
    found = stepped(model, ids, prefix=101)
    assert difference(found[101:], full_logits(plain(model), ids)[101:]) < tolerance(form)


def test_torch_continues_a_text_that_the_step_read() -> None:
    model = random_model(SPECS["qwen3"])
    ids = some_ids(model.spec, 90)
    step, cache = NativeStep(model), model.new_cache(90)
    for id in ids[:60]:
        step(id, cache)
    with torch.inference_mode():
        found = model(torch.tensor([ids[60:]]), cache)[0]
    assert difference(found, full_logits(model, ids)[60:]) < SUMS


@pytest.mark.parametrize("form", ["bf16", "int8, rows", "int4, groups of 32"])
def test_the_number_of_threads_changes_no_bit(form: str) -> None:
    model = native(random_model(SPECS["qwen2"]), form)
    ids = some_ids(model.spec, 200)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(stepped(model, ids))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


SEVERAL = ["fp32", "bf16", "int8, rows", COARSE, "int8, groups of 32", "int4, groups of 64"]


@pytest.mark.parametrize(
    ("spec", "form"),
    [(one, form) for one in ("gpt2", "qwen3") for form in SEVERAL if (one, form) in CASES],
)
def test_several_tokens_at_once_get_the_bits_of_each_alone(spec: str, form: str) -> None:
    # 1 to 11 and 40 tokens, so that every tile is met, over three chunks of attention.
    model = native(random_model(SPECS[spec]), form)
    ids = some_ids(SPECS[spec], 150)
    alone = stepped(model, ids)
    step, cache, sizes = (
        NativeStep(model),
        model.new_cache(len(ids)),
        itertools.cycle((*range(1, 12), 40)),
    )
    found = []
    while cache.length < len(ids):
        some = ids[cache.length : cache.length + next(sizes)]
        found.append(step.read(some, cache))
    assert torch.equal(torch.cat(found), alone)
    cache.truncate(100)
    assert torch.equal(step.read(ids[100:], cache, last_only=True), alone[-1:])


@pytest.mark.parametrize("form", SEVERAL)
def test_several_texts_at_once_get_the_bits_of_each_alone(form: str) -> None:
    model = native(random_model(SPECS["llama"]), form)
    lengths = [1, 70, 3, 129, 64, 2, 90, 33, 5, 17]
    texts = [some_ids(model.spec, 140)[-length:] for length in lengths]
    step, wanted, caches = NativeStep(model), [], []
    for text in texts:
        cache, twin = model.new_cache(140), model.new_cache(150)
        step.read(text, cache)
        step.read(text, twin)
        wanted.append(torch.stack([step(id, cache) for id in (4, 8, 15)]))
        caches.append(twin)
    found = [step.batch([id] * len(texts), caches) for id in (4, 8, 15)]
    assert torch.equal(torch.stack(found, dim=1), torch.stack(wanted))


def test_the_texts_of_one_cache_are_continued_side_by_side() -> None:
    model = native(random_model(SPECS["qwen2"]), "bf16")
    step, texts = NativeStep(model), torch.randint(0, 211, (11, 70))
    cache, wanted = model.new_cache(80, batch=11), []
    with torch.inference_mode():
        model(texts[:, :-1], cache)
    assert step.takes(cache, texts=11)
    assert not step.takes(cache)
    for row, text in enumerate(texts):
        alone = model.new_cache(80)
        alone.k[:, 0, :, :69], alone.v[:, 0, :, :69] = (
            cache.k[:, row, :, :69],
            cache.v[:, row, :, :69],
        )
        alone.length = 69
        wanted.append(step(int(text[-1]), alone))
    assert torch.equal(step.rows(texts[:, -1].tolist(), cache), torch.stack(wanted))
    assert cache.length == 70


def test_tokens_that_do_not_fit_are_refused_before_any_is_read() -> None:
    model = random_model(SPECS["llama"])
    step, cache, full = NativeStep(model), model.new_cache(10), model.new_cache(1)
    with pytest.raises(ContextOverflow, match="11 positions do not fit into 10"):
        step.read(range(11), cache)
    step(1, full)
    with pytest.raises(ContextOverflow):
        step.batch([1, 2], [cache, full])
    assert cache.length == 0


def test_a_cache_that_was_cut_back_is_continued() -> None:
    model = random_model(SPECS["llama"])
    ids = some_ids(model.spec, 40)
    step, cache = NativeStep(model), model.new_cache(40)
    whole = [step(id, cache) for id in ids]
    cache.truncate(25)
    again = [step(id, cache) for id in ids[25:]]
    assert torch.equal(torch.stack(whole[25:]), torch.stack(again))


def test_a_full_cache_is_refused_in_one_sentence() -> None:
    model = random_model(SPECS["llama"])
    step, cache = NativeStep(model), model.new_cache(2)
    step(1, cache)
    step(2, cache)
    with pytest.raises(ContextOverflow, match="3 positions do not fit into 2"):
        step(3, cache)
    with pytest.raises(IndexError):
        step(model.spec.vocabulary, model.new_cache(2))


def test_what_is_no_number_is_seen_in_the_logits() -> None:
    # Quantized activations are integers, which cannot be NaN: their scale has to tell.
    for form in ("fp32", "bf16", "int8, rows", "int4, groups of 32"):
        model = random_model(SPECS["qwen2"])
        model.blocks[1].mlp_norm.weight[3] = float("nan")
        assert stepped(native(model, form), [1, 2])[1].isnan().all(), form


def test_a_model_that_was_changed_is_not_continued_from_copies() -> None:
    model = random_model(SPECS["llama"])
    step = NativeStep(model)
    assert step.takes(model.new_cache(4))
    hook = model.blocks[0].mlp.register_forward_hook(lambda *_: None)
    assert not step.takes(model.new_cache(4))
    hook.remove()
    assert step.takes(model.new_cache(4))
    model.norm.weight.mul_(2)
    assert not step.takes(model.new_cache(4))


def test_several_sequences_are_left_to_torch() -> None:
    model = random_model(SPECS["llama"])
    assert not NativeStep(model).takes(model.new_cache(4, batch=2))


def test_a_layer_of_another_kind_is_left_to_torch_and_named() -> None:
    class Odd(torch.nn.Linear):
        pass

    model = random_model(SPECS["llama"]).bfloat16()
    model.blocks[1].mlp.up = Odd(192, 320, bias=False).bfloat16()
    with pytest.raises(Unsupported, match="Odd"):
        NativeStep(model)
    assert "Odd" in str(adopt(model))


def test_a_step_does_not_keep_its_model_alive() -> None:
    import gc
    import weakref

    model = native(random_model(SPECS["llama"]), "bf16")
    model.step = NativeStep(model)
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


def test_a_forked_process_has_threads_of_its_own() -> None:
    # The child of a fork has only the thread that forked; waiting for the others would be forever.
    code = """
import os, sys, torch
from gptcore.kernels.step import NativeStep
from tests.kernels.shapes import SPECS, random_model
torch.set_num_threads(2)
model = random_model(SPECS["llama"])
step = NativeStep(model)
first = step(3, model.new_cache(4))
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(step(3, model.new_cache(4)), first) else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = _python(code)
    assert done.returncode == 0, done.stderr


LOGITS = """
import sys, torch
from gptcore import kernels
from gptcore.kernels.step import NativeStep
from tests.kernels.shapes import FORMATS, SPECS, native, random_model, some_ids
assert kernels.unavailable() is None, kernels.unavailable()
found = {}
for form in FORMATS:
    model = native(random_model(SPECS["llama"]), form)
    step, cache = NativeStep(model), model.new_cache(80)
    found[form] = torch.stack([step(id, cache) for id in some_ids(model.spec, 80)])
torch.save(found, sys.argv[1])
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", list(build.INSTRUCTIONS)[1:])
def test_all_instruction_sets_agree(name: str, tmp_path: Path) -> None:
    # They add in another order, over as many lanes as a register has.
    needed, _ = build.INSTRUCTIONS[name]
    if not needed <= build.cpu_flags():
        pytest.skip(f"this processor has no {name}")
    done = _python(LOGITS, str(tmp_path / "logits.pt"), **{build.SWITCH: name})
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "logits.pt", weights_only=True)
    for form, logits in found.items():
        model = native(random_model(SPECS["llama"]), form)
        wanted = stepped(model, some_ids(model.spec, 80))
        assert difference(logits, wanted) < tolerance(form), form


SANITIZED = "odd or erf or several or side_by_side or float64 or come_back or many or taken_over"
"""Every function of the library at sizes that fill no register; the other tests add models."""


@pytest.mark.slow
def test_the_sanitizers_find_nothing_in_these_tests() -> None:
    # What throws must be there when the sanitizer starts, or it ends at torch's first exception.
    compiler, runtimes = build._compiler(), []
    for name in ("libasan.so", "libstdc++.so.6"):
        asked = [compiler, f"-print-file-name={name}"]
        found = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
        if not Path(found).is_absolute():
            pytest.skip(f"{compiler} has no {name}")
        runtimes.append(found)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"),
            *("tests/kernels/test_linear.py", "tests/kernels/test_step.py", "--capture=no"),
            *("-m", "not slow", "-k", SANITIZED),
        ],
        cwd=ROOT,
        env=os.environ
        | {
            build.FLAGS: "-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all",
            "LD_PRELOAD": " ".join(runtimes),
            "ASAN_OPTIONS": "detect_leaks=0",  # Python's own are many
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert " passed" in done.stdout


def test_a_copy_of_a_native_model_computes_the_same() -> None:
    model = native(random_model(SPECS["qwen2"]), "int8, rows")
    again = copy.deepcopy(model)
    layer, other = model.head, again.head
    assert isinstance(layer, NativeLinear)
    assert isinstance(other, NativeLinear)
    assert layer.matrix.packed.data_ptr() != other.matrix.packed.data_ptr()
    ids = some_ids(model.spec, 10)
    assert torch.equal(stepped(model, ids), stepped(again, ids))


def _python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
