"""The model against ``transformers``, and against itself computed in other ways."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from gptcore import weights
from gptcore.device import Placement
from gptcore.errors import ContextOverflow
from gptcore.model import GPT
from gptcore.spec import PRESETS, ModelSpec
from tests.families import CASES, Case

TOLERANCE = 1e-4
"""Of logits in fp32; sums of some hundred products differ by their order by about 1e-6."""
CPU = Placement(device="cpu", precision="fp32", threads=1)


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(scope="module")
def ours(case: Case, tmp_path_factory: pytest.TempPathFactory) -> GPT:
    folder = case.save(tmp_path_factory.mktemp("checkpoint"))
    assert case.shards == (folder / "model.safetensors.index.json").exists()
    return weights.build(weights.describe(folder), CPU)


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(0, 211, (2, 100), generator=torch.Generator().manual_seed(2))


def test_logits_are_those_of_transformers_at_every_position(case: Case, ours: GPT, ids: Tensor):
    with torch.inference_mode():
        theirs = case.model(ids).logits
        found = ours(ids)
    assert theirs.std() > 0.3  # logits near zero would agree by themselves
    torch.testing.assert_close(found, theirs, atol=TOLERANCE, rtol=0)


def test_greedy_64_tokens_are_those_of_transformers(case: Case, ours: GPT, ids: Tensor):
    prompt = ids[:1, :20]
    with torch.inference_mode():
        theirs = case.model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=64, do_sample=False
        )[0, 20:]
        cache = ours.new_cache(84)
        logits = ours(prompt, cache, last_only=True)
        found = []
        for _ in range(64):
            found.append(int(logits[0, -1].argmax()))
            logits = ours(torch.tensor([found[-1:]]), cache, last_only=True)
    assert found == theirs.tolist()
    assert len(set(found)) > 1  # not one token over and over


@pytest.mark.parametrize("chunks", [(100,), (1,) * 100, (40, 60), (1, 50, 1, 48), (99, 1)])
def test_cached_logits_are_uncached_ones_in_any_chunks(
    ours: GPT, ids: Tensor, chunks: tuple[int, ...]
):
    with torch.inference_mode():
        whole = ours(ids)
        cache = ours.new_cache(100, batch=2)
        pieces = [ours(piece, cache) for piece in ids.split(list(chunks), dim=1)]
    assert cache.length == 100
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=TOLERANCE, rtol=0)


def test_last_only_is_the_last_of_all_positions(ours: GPT, ids: Tensor):
    with torch.inference_mode():
        last = ours(ids, last_only=True)
        torch.testing.assert_close(last, ours(ids)[:, -1:], atol=TOLERANCE, rtol=0)


def test_a_truncated_cache_forgets_what_it_dropped(ours: GPT, ids: Tensor):
    other = ids.flip(1)
    with torch.inference_mode():
        cache = ours.new_cache(100, batch=2)
        ours(ids[:, :60], cache)
        ours(other[:, :40], cache)
        cache.truncate(60)
        found = ours(ids[:, 60:], cache)
        torch.testing.assert_close(found, ours(ids)[:, 60:], atol=TOLERANCE, rtol=0)


def test_a_later_token_never_changes_an_earlier_logit(ours: GPT, ids: Tensor):
    changed = ids.clone()
    changed[:, 50:] = (changed[:, 50:] + 1) % 211
    with torch.inference_mode():
        before, after = ours(ids), ours(changed)
    torch.testing.assert_close(before[:, :50], after[:, :50], atol=0, rtol=0)
    assert not torch.equal(before[:, 50:], after[:, 50:])


def test_every_block_projection_is_a_linear_that_passes_find(ours: GPT):
    spec = ours.spec
    each = 7 if spec.mlp == "swiglu" else 6
    found = dict(ours.linears())
    assert len(found) == each * spec.layers
    assert all(isinstance(one, torch.nn.Linear) for one in found.values())
    block_weights = sum(one.weight.numel() for one in found.values())
    assert block_weights + spec.vocabulary * spec.width == spec.matmul_parameters
    assert all(ours.get_submodule(name) is module for name, module in found.items())


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_stays_near_fp32(case: Case, ids: Tensor, tmp_path: Path, precision: str):
    checkpoint = weights.describe(case.save(tmp_path))
    model = weights.build(checkpoint, Placement(precision=precision, threads=1))
    with torch.inference_mode():
        cache = model.new_cache(100, batch=2)
        found = torch.cat([model(ids[:, :99], cache), model(ids[:, 99:], cache)], dim=1).float()
        theirs = case.model(ids).logits
    assert cache.k.dtype == getattr(torch, {"bf16": "bfloat16", "fp16": "float16"}[precision])
    # bf16 keeps 8 bits: over two layers the error stays below a tenth of the logits' spread.
    assert (found - theirs).pow(2).mean().sqrt() < 0.1 * theirs.std()


def tiny(**changes: object) -> ModelSpec:
    shape = PRESETS["smollm2-135m"].model_dump() | {"layers": 2, "width": 18, "head_width": 2}
    return ModelSpec(**shape | {"hidden": 24, "vocabulary": 50, "context": 16} | changes)


def test_more_positions_than_the_context_are_refused_and_the_cache_is_as_before():
    model = weights.build_random(tiny(), CPU)
    with pytest.raises(ContextOverflow, match="17 positions do not fit into 16"):
        model(torch.zeros(1, 17, dtype=torch.long))
    cache = model.new_cache(64)
    model(torch.zeros(1, 10, dtype=torch.long), cache)
    with pytest.raises(ContextOverflow, match="17"):
        model(torch.zeros(1, 7, dtype=torch.long), cache)
    assert cache.length == 10


def test_more_positions_than_the_cache_holds_are_refused():
    model = weights.build_random(tiny(), CPU)
    with pytest.raises(ContextOverflow, match="5 positions do not fit into 4"):
        model(torch.zeros(1, 5, dtype=torch.long), model.new_cache(4))


@pytest.mark.parametrize("shape", ["gpt2", "smollm2-135m"])
def test_gradients_reach_every_parameter_even_after_inference(shape: str):
    small = {"layers": 2, "vocabulary": 50, "context": 16}
    model = GPT(ModelSpec(**PRESETS[shape].model_dump() | small))
    ids = torch.arange(12)[None]
    with torch.inference_mode():
        model(ids[:, :4])
    model(ids).logsumexp(-1).sum().backward()
    assert all(one.grad is not None for one in model.parameters())


def test_a_model_that_is_moved_to_another_dtype_computes_in_it():
    model = weights.build_random(tiny(), CPU)
    with torch.inference_mode():
        model(torch.zeros(1, 8, dtype=torch.long))
        for dtype in (torch.float64, torch.bfloat16):
            assert model.to(dtype)(torch.zeros(1, 8, dtype=torch.long)).dtype == dtype


@pytest.mark.parametrize("name", PRESETS)
def test_the_parameter_count_of_a_preset_is_that_of_the_built_model(name: str):
    spec = PRESETS[name]
    with torch.device("meta"):
        model = GPT(spec)
    assert sum(one.numel() for one in model.parameters()) == spec.parameters
    norms = sum(p.numel() for n, p in model.named_parameters() if "norm" in n)
    assert norms == spec.parameters_by_part["norms"]
