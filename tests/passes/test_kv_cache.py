"""The cache in few bits: its bytes, what it gives back, and the model that uses it."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from gptcore.device import Placement
from gptcore.engine import Engine
from gptcore.fit import needed_bytes
from gptcore.kv_cache import QuantizedKVCache, row_bytes
from gptcore.model import GPT, KVCache
from gptcore.passes.base import PassContext
from gptcore.passes.kv_cache import SCALE_BYTES, KVCacheBits
from gptcore.passes.quantize import Int4, Int8
from gptcore.recipe import Recipe, Variant
from gptcore.records import Request
from gptcore.spec import SMOLLM2_135M, ModelSpec
from gptcore.tokenizer import byte_tokenizer
from tests.passes.small import GPT2, LLAMA, applied, kl, logits, made, placed, text

every_width = pytest.mark.parametrize("bits", [4, 8])
every_shape = pytest.mark.parametrize("spec", [LLAMA, GPT2], ids=["llama", "gpt2"])
LEVELS = {4: 15, 8: 255}
pytestmark = pytest.mark.usefixtures("one_thread")


def with_bits(model: GPT, bits: int) -> GPT:
    return KVCacheBits(bits=bits).apply(model, PassContext(placement=placed()))


def through_cache(model: GPT, ids: torch.Tensor, chunk: int = 16) -> torch.Tensor:
    """Return all logits, computed through a cache as a prompt is: (B, T, V)."""
    cache = model.new_cache(ids.shape[1], ids.shape[0])
    with torch.inference_mode():
        parts = [model(part, cache) for part in torch.split(ids, chunk, dim=1)]
    return torch.cat(parts, dim=1).float()


@pytest.mark.parametrize(("bits", "saved"), [(8, 0.47), (4, 0.72)])
def test_a_token_of_smollm2_takes_so_much_less_than_in_bf16(bits: int, saved: float) -> None:
    """As asked of the tensors: heads of 64 numbers take 64 or 32 bytes, and 4 of scale and zero."""
    device = torch.device("meta")
    few = QuantizedKVCache(SMOLLM2_135M, 100, 1, torch.bfloat16, device, bits=bits)
    plain = KVCache(SMOLLM2_135M, 100, 1, torch.bfloat16, device)
    held = few.k.nbytes + few.v.nbytes
    assert 1 - held / (plain.k.nbytes + plain.v.nbytes) == pytest.approx(saved, abs=0.005)
    one = KVCacheBits(bits=bits)
    before = SMOLLM2_135M.kv_bytes_per_token("bf16")
    assert one.kv_bytes_after(SMOLLM2_135M, Placement(precision="bf16"), before) * 100 == held
    assert row_bytes(64, bits) == 64 * bits // 8 + SCALE_BYTES


@every_width
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_comes_back_is_off_by_half_a_step(bits: int, dtype: torch.dtype) -> None:
    """Of the range of each head at each position, and by the rounding of scale and zero to bf16."""
    random = torch.Generator().manual_seed(0)
    sizes = torch.logspace(-2, 2, 5)[:, None]  # positions of very different size
    k, v = (torch.randn(2, 2, 5, 8, generator=random) * sizes + 0.3 for _ in range(2))
    cache = QuantizedKVCache(LLAMA, 8, 2, dtype, torch.device("cpu"), bits=bits)
    cache.extend(1, k[:, :, :2].to(dtype), v[:, :, :2].to(dtype))
    cache.length = 2
    for given, got in zip(
        (k, v), cache.extend(1, k[:, :, 2:].to(dtype), v[:, :, 2:].to(dtype)), strict=True
    ):
        assert got.shape == given.shape
        assert got.dtype == dtype
        step = (given.amax(-1) - given.amin(-1)) / LEVELS[bits]
        bound = step / 2 + (LEVELS[bits] / 2 * step + given.abs().amax(-1)) * 2**-8
        if dtype == torch.bfloat16:
            bound = bound + given.abs().amax(-1) * 2**-7
        assert ((got.float() - given).abs().amax(-1) <= bound).all()


@every_width
@every_shape
def test_a_text_in_pieces_is_the_text_at_once(spec: ModelSpec, bits: int) -> None:
    """What is attended to is what is kept, new positions too, so pieces of any length agree."""
    model, ids = with_bits(made(spec), bits), text(spec)[:2, :24]
    whole = through_cache(model, ids, 24)
    for chunk in (1, 5):
        parts = through_cache(model, ids, chunk)
        # A sum in another order may move a number across the middle of two steps.
        assert (parts - whole).norm() < 0.01 * whole.norm()


@every_shape
def test_fewer_bits_are_further_from_the_plain_cache(spec: ModelSpec) -> None:
    """A wrong position, head or scale would be off by the logits themselves."""
    ids = text(spec)[:4, :40]
    plain = through_cache(made(spec), ids)
    gap = {
        bits: ((through_cache(with_bits(made(spec), bits), ids) - plain).norm() / plain.norm())
        for bits in (4, 8)
    }
    assert 0 < gap[8] < 0.02
    assert gap[8] < gap[4] < 0.25


@every_width
def test_without_a_cache_no_logit_changes(bits: int) -> None:
    ids = text(LLAMA)[:2]
    assert torch.equal(logits(with_bits(made(LLAMA), bits), ids), logits(made(LLAMA), ids))


@every_width
def test_positions_that_were_forgotten_are_written_anew(bits: int) -> None:
    model, ids = with_bits(made(LLAMA), bits), text(LLAMA)[:1, :20]
    cache = model.new_cache(20)
    with torch.inference_mode():
        model(ids, cache)
        cache.truncate(12)
        again = model(ids[:, 12:], cache).float()
    assert torch.allclose(again, through_cache(model, ids, 12)[:, 12:], atol=1e-4)


@every_width
def test_sequences_that_are_kept_go_on_as_alone(bits: int) -> None:
    model, ids = with_bits(made(LLAMA), bits), text(LLAMA)[:3, :20]
    cache = model.new_cache(20, 3)
    with torch.inference_mode():
        model(ids[:, :15], cache)
        cache.keep(torch.tensor([0, 2]))
        rest = model(ids[[0, 2], 15:], cache).float()
    assert torch.allclose(rest, through_cache(model, ids, 15)[[0, 2], 15:], atol=1e-4)


@every_width
def test_rows_copied_from_another_cache_are_whole(bits: int) -> None:
    """Codes and scales lie in one row, so who copies keys and values copies all there is."""
    model, ids = with_bits(made(LLAMA), bits), text(LLAMA)[:1, :20]
    first, second = model.new_cache(15), model.new_cache(20)
    with torch.inference_mode():
        model(ids[:, :15], first)
        second.k[:, :, :, :15], second.v[:, :, :, :15] = first.k, first.v
        second.length = 15
        rest = model(ids[:, 15:], second).float()
    assert torch.allclose(rest, through_cache(model, ids, 15)[:, 15:], atol=1e-4)


@every_width
def test_a_text_is_written_with_it(bits: int) -> None:
    spec = LLAMA.model_copy(update={"vocabulary": 300})
    engine = Engine(with_bits(made(spec), bits), byte_tokenizer(300))
    generation = engine.start(Request(prompt="Hello", max_new_tokens=12, ignore_eos=True))
    assert len(list(generation)) == 12
    assert generation.token_ids == [token.id for token in engine.start(generation.request)]


@every_width
def test_it_stands_behind_other_passes(bits: int) -> None:
    ids = text(LLAMA)[:2, :30]
    eight, _ = applied(Int8(), made(LLAMA))
    both = with_bits(applied(Int8(), made(LLAMA))[0], bits)
    assert (through_cache(both, ids) - through_cache(eight, ids)).abs().max() > 0
    assert kl(eight, both, ids) == 0.0  # without a cache
    with pytest.raises(ValueError, match="kv_cache"):
        Recipe(passes=(KVCacheBits(bits=bits), Int4()))


def test_the_memory_of_a_variant_is_counted_with_it() -> None:
    plain = Variant(
        model="x", spec=SMOLLM2_135M, weights_id="random:0", placement=Placement(precision="bf16")
    )
    few = plain.model_copy(update={"recipe": Recipe(passes=(KVCacheBits(bits=4),))})
    saved = 8192 * (plain.kv_bytes_per_token - few.kv_bytes_per_token)
    assert plain.kv_bytes_per_token == SMOLLM2_135M.kv_bytes_per_token("bf16")
    assert few.kv_bytes_per_token == 2 * 30 * 3 * 36
    assert needed_bytes(plain, 8192) - needed_bytes(few, 8192) == saved


def test_heads_that_do_not_fill_bytes_are_refused_in_a_sentence() -> None:
    odd = LLAMA.model_copy(update={"head_width": 6})
    assert KVCacheBits().blocked_by(odd, Placement()) == (
        "heads of 6 numbers do not fill whole bytes; 4 must divide it."
    )
    assert KVCacheBits().blocked_by(LLAMA, Placement()) is None
    with pytest.raises(ValidationError):
        KVCacheBits(bits=5)
