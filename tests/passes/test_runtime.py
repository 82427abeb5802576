"""Other operations, the same numbers; and what cannot be had is said before."""

from __future__ import annotations

import pytest
import torch

from gptcore.device import Placement
from gptcore.engine import Engine
from gptcore.errors import InvalidInput
from gptcore.passes import runtime
from gptcore.passes.base import PassContext
from gptcore.passes.quantize import Int8
from gptcore.passes.runtime import Runtime
from gptcore.recipe import Recipe
from gptcore.records import Request
from gptcore.spec import ModelSpec
from gptcore.tokenizer import byte_tokenizer
from tests.passes.small import GPT2, LLAMA, SHAPES, logits, made, placed, text

every_shape = pytest.mark.parametrize("spec", SHAPES.values(), ids=SHAPES)
pytestmark = pytest.mark.usefixtures("one_thread")


@every_shape
@pytest.mark.parametrize("way", ["flash", "math"])
def test_every_way_to_compute_attention_gives_the_same(spec: ModelSpec, way: str) -> None:
    """To 1e-5 of the largest logit; with a cache too, where only the last positions are new."""
    ids, exact = text(spec, sequences=2), made(spec)
    model = Runtime(attention=way).apply(made(spec), PassContext(placement=placed()))
    want = logits(exact, ids)
    assert (logits(model, ids) - want).abs().max() < 1e-5 * want.abs().max()
    with torch.inference_mode():
        cache = model.new_cache(48, batch=2)
        model(ids[:, :20], cache)
        rest = model(ids[:, 20:], cache)
    assert (rest - want[:, 20:]).abs().max() < 1e-5 * want.abs().max()


def test_the_way_is_really_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only one back end is left while the model runs, and all are back afterwards."""
    model = Runtime(attention="math").apply(made(LLAMA), PassContext(placement=placed()))
    seen: list[tuple[bool, bool]] = []

    def look(*_: object) -> None:
        backends = torch.backends.cuda
        seen.append((backends.flash_sdp_enabled(), backends.math_sdp_enabled()))

    before = torch.backends.cuda.flash_sdp_enabled()
    model.blocks[0].register_forward_pre_hook(look)
    logits(model, text(LLAMA)[:1])
    assert seen == [(False, True)]
    assert torch.backends.cuda.flash_sdp_enabled() == before


def test_decode_by_torch_writes_what_the_native_step_writes() -> None:
    request = Request(prompt="abc", temperature=0.0, max_new_tokens=12, ignore_eos=True)
    said, decoders = [], []
    for recipe in ((Int8(),), (Int8(), Runtime(decode="torch"))):
        model = made(LLAMA)
        for one in Recipe(passes=recipe).passes:
            model = one.apply(model, PassContext(placement=placed()))
        engine = Engine(model, byte_tokenizer(LLAMA.vocabulary))
        decoders.append(engine.decoder)
        said.append([token.id for token in engine.start(request)])
    assert decoders[1] == "torch: the recipe leaves the native step out."
    assert decoders[0] != decoders[1]
    assert len(said[0]) == len(said[1]) == 12
    assert said[0][0] == said[1][0]  # later ones may part: activations are rounded differently


@pytest.mark.slow
@pytest.mark.timeout(900)  # a compiler runs
@pytest.mark.filterwarnings("ignore")
def test_compiled_mlps_give_the_same_for_any_length() -> None:
    one = Runtime(compile=True)
    if one.blocked_by(GPT2, Placement()):
        pytest.skip("no C++ compiler")
    told: list[float] = []
    before = graphs()
    model = one.apply(made(GPT2), PassContext(placement=placed(), progress=told.append))
    assert told[-1] == 1.0
    counted = graphs()
    assert 1 <= counted - before <= 3  # one for all layers and lengths, and some for short ones
    exact = made(GPT2)
    for tokens in (2, 29, 48):
        ids = text(GPT2, sequences=2)[:, :tokens]
        want = logits(exact, ids)
        assert (logits(model, ids) - want).abs().max() < 1e-5 * want.abs().max()
    assert graphs() <= counted + 1


def graphs() -> int:
    """Return how many pieces of code torch compiled so far."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def test_what_cannot_be_had_is_said_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, mac = Placement(), Placement(device="mps")
    said = "efficient attention is for CUDA, not cpu: choose flash or auto."
    assert Runtime(attention="efficient").blocked_by(GPT2, cpu) == said
    assert Runtime(attention="efficient").blocked_by(GPT2, Placement(device="cuda:0")) is None
    assert Runtime(attention="math").blocked_by(GPT2, mac) is not None
    with pytest.raises(InvalidInput, match="Runtime cannot run here: efficient attention"):
        Runtime(attention="efficient").apply(made(GPT2), PassContext(placement=cpu))
    packed = Int8().apply(made(LLAMA), PassContext(placement=placed()))
    with pytest.raises(InvalidInput, match="cannot look into packed layers"):
        Runtime(compile=True).apply(packed, PassContext(placement=placed()))
    monkeypatch.setattr(runtime.shutil, "which", lambda name: None)
    assert "needs a C++ compiler" in str(Runtime(compile=True).blocked_by(GPT2, cpu))
    assert Runtime().blocked_by(GPT2, cpu) is None
