"""What every pass promises, held to by applying it: each choice of each field, on both shapes.

A new file in ``gptcore/passes`` is tested by existing. Passes that no CPU can run are only asked
why; their own tests run them with stand-ins.
"""

from __future__ import annotations

import functools
import hashlib
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import transformers
from pydantic import ValidationError

from gptcore import weights
from gptcore.device import Placement
from gptcore.linears import Stored, resident_bytes
from gptcore.measure.memory import weight_bytes
from gptcore.model import GPT
from gptcore.passes.base import Pass, PassContext, Stage
from gptcore.passes.calibrate import text_hash
from gptcore.passes.registry import passes
from gptcore.spec import ModelSpec
from gptcore.tokenizer import load_tokenizer
from gptcore.weights.huggingface import names_of
from tests.passes.small import LLAMA, logits, made, text
from tests.tiny import tiny_checkpoint

WIDE = {"heads": 8, "kv_heads": 4, "head_width": 16, "width": 128, "hidden": 128, "layers": 2}
SHAPES = {
    "llama": LLAMA.model_copy(update=WIDE),
    "gpt2": ModelSpec(
        **{**WIDE, "kv_heads": 8},
        family="gpt2",
        context=64,
        vocabulary=199,
        norm="layernorm",
        position="learned",
        mlp="gelu",
        bias=True,
        qkv_bias=True,
    ),
}
"""Small, of widths that every choice of a group divides."""
NEUTRAL: dict[str, dict[str, Any]] = {
    "draft": {},
    "drop_layers": {"layers": 0},
    "low_rank": {"share": 1.0},
    "prune": {"sparsity": 0.0},
    "runtime": {},
    "shrink": {"neurons": 1.0, "groups": 1.0},
    "trim": {},
}
"""The fields with which a pass changes nothing."""
ROUNDING = {"cluster", "fp8", "int3", "int4", "int8", "int8_static", "int8_weights", "kv_cache"}
"""Passes that have no such fields: some bits are always gone."""
ROUNDING |= {"mixed_bits"}


ELSEWHERE = (passes()["trim"](vocabulary="text"), passes()["runtime"](compile=True))
"""A cut vocabulary needs a tokenizer, and compiling half a minute: see their own tests."""


def choices(kind: type[Pass]) -> Iterator[Pass]:
    """Yield the pass as it comes, and with each field at its other choices."""
    yield kind()
    for name, field in kind.model_fields.items():
        if field.annotation is bool:
            values: tuple[Any, ...] = (True, False)
        elif typing.get_origin(field.annotation) is Literal:
            values = typing.get_args(field.annotation)
            values = values if isinstance(values[0], str) else (values[0], values[-1])
        else:
            continue
        for value in values:
            if value == field.default:
                continue
            try:
                yield kind(**{name: value})
            except ValidationError:
                continue


def placement_of(one: Pass, spec: ModelSpec) -> Placement | None:
    """Return a placement on the CPU that a pass can run with, or None."""
    for precision in ("fp32", "bf16"):
        placement = Placement.model_validate({"precision": precision, "threads": 1})
        if one.blocked_by(spec, placement) is None:
            return placement
    return None


EVERY = [
    pytest.param(one, spec, id=f"{name}-{one.name}({one})")
    for kind in passes().values()
    for one in choices(kind)
    for name, spec in SHAPES.items()
    if (one == kind() or name == "llama")
    if placement_of(one, spec) and one not in ELSEWHERE
]
"""All choices on one shape, each pass on both."""
every = pytest.mark.parametrize(("one", "spec"), EVERY)


def run(
    one: Pass, spec: ModelSpec, model: GPT | None = None, told: list[float] | None = None
) -> tuple[GPT, PassContext]:
    """Apply a pass to the small model of that shape, or to another."""
    placement = placement_of(one, spec)
    assert placement is not None
    ids = text(spec, sequences=24)
    context = PassContext(
        placement=placement,
        seed=5,
        progress=(lambda share: None) if told is None else told.append,
        calibration_ids=ids,
        calibration_hash=text_hash(ids),
    )
    given = made(spec, placement.precision) if model is None else model
    return one.apply(given, context), context


def digest(model: GPT) -> str:
    """Return a hash over all that a file would keep of a model."""
    found = hashlib.sha256()
    for name, module in model.named_modules():
        own = module.stored() if isinstance(module, Stored) else dict(module.named_parameters())
        for key, tensor in sorted(own.items()):
            found.update(f"{name}.{key}".encode())
            found.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(frozen=True)
class Done:
    """A pass applied to a small model."""

    placement: Placement
    before: int
    """Bytes of the weights."""
    model: GPT
    context: PassContext
    told: list[float]
    """Shares of progress."""
    untouched: bool
    """Whether the tensors of the given model are what they were."""


@functools.lru_cache(maxsize=1)
def done(one: Pass, spec: ModelSpec) -> Done:
    """Apply a pass once for all questions about it, which are asked one after another."""
    placement = placement_of(one, spec)
    assert placement is not None
    model = made(spec, placement.precision)
    before, told = weight_bytes(model)[0], list[float]()
    given = dict(model.named_parameters())
    copies = {name: tensor.clone() for name, tensor in given.items()}
    model, context = run(one, spec, model, told)
    untouched = all(torch.equal(tensor, copies[name]) for name, tensor in given.items())
    return Done(placement, before, model, context, told, untouched)


@every
def test_the_given_model_is_not_written_to_and_the_same_comes_out_twice(
    one: Pass, spec: ModelSpec
) -> None:
    found, (again, _) = done(one, spec), run(one, spec)
    assert found.untouched
    assert digest(found.model) == digest(again)
    ids = text(spec, sequences=2)
    assert logits(found.model, ids).isfinite().all()
    assert torch.equal(logits(found.model, ids), logits(again, ids))


@every
def test_bytes_and_shape_are_as_was_said_before(one: Pass, spec: ModelSpec) -> None:
    """Within 2 % of what is in memory; the cache's to the byte."""
    found = done(one, spec)
    model, placement = found.model, found.placement
    said = one.weights_bytes_after(spec, placement, found.before)
    assert weight_bytes(model)[0] == pytest.approx(said, rel=0.02)
    assert one.weights_peak_bytes(spec, placement, found.before) >= max(found.before, said)
    assert model.spec == one.spec_after(spec)
    kv = one.kv_bytes_after(
        model.spec, placement, model.spec.kv_bytes_per_token(placement.precision)
    )
    cache, longer = (model.new_cache(size) for size in (32, 64))
    assert cache_bytes(longer) - cache_bytes(cache) == 32 * kv


def cache_bytes(cache: Any) -> int:
    """Return the bytes of all tensors that a cache holds."""
    tensors = [one for one in vars(cache).values() if isinstance(one, torch.Tensor)]
    return sum({one.data_ptr(): one.nbytes for one in tensors}.values())


@every
def test_coverage_counts_what_was_converted_and_says_why_the_rest_was_not(
    one: Pass, spec: ModelSpec
) -> None:
    found = done(one, spec)
    model, context, told = found.model, found.context, found.told
    assert told == sorted(told)
    assert told[-1] == 1.0
    if one.stage is Stage.RUNTIME:
        assert not context.coverage  # it concerns no weights
        return
    coverage = context.coverage[one.name]
    assert 0 <= coverage.converted_weights <= coverage.total_weights
    assert coverage.total_weights >= model.spec.matmul_parameters * 0.5
    if coverage.ratio == 1:
        assert not coverage.skipped
    else:
        assert coverage.skipped
        assert all(reason for _, reason in coverage.skipped)
    if coverage.converted_weights:
        assert coverage.effective_bits is not None
        assert coverage.resident_bytes <= resident_bytes(model)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", passes())
def test_the_neutral_setting_changes_no_logit_and_covers_nothing(name: str, shape: str) -> None:
    if name in ROUNDING:
        assert name not in NEUTRAL
        pytest.skip("it always rounds")
    spec, one = SHAPES[shape], passes()[name](**NEUTRAL[name])
    ids = text(spec, sequences=2)
    model, context = run(one, spec)
    assert torch.equal(logits(model, ids), logits(made(spec), ids))
    if one.stage is not Stage.RUNTIME and name != "prune":  # which counts its zeros' places
        assert context.coverage[name].ratio == 0
        assert context.coverage[name].skipped


def test_a_pass_that_finds_nothing_to_convert_says_so_with_reasons() -> None:
    """After another pass took all linear layers, the next one's coverage is 0, not an error."""
    spec = SHAPES["llama"]
    ids = text(spec, sequences=24)
    context = PassContext(placement=Placement(threads=1), calibration_ids=ids)
    model = passes()["int8"]().apply(made(spec), context)
    passes()["prune"]().apply(model, context)
    coverage = context.coverage["prune"]
    assert coverage.ratio == 0
    assert coverage.effective_bits is None
    named = dict(coverage.skipped)
    assert set(named) == {ours for ours, _ in block_layers(spec)} | {"head"}


def block_layers(spec: ModelSpec) -> list[tuple[str, str]]:
    """Return (our name, the checkpoint's) of every projection of the blocks."""
    return [
        (ours.removesuffix(".weight"), theirs)
        for ours, theirs, shape in names_of(spec)
        if ours.startswith("blocks.") and len(shape) == 2
    ]


@pytest.fixture(scope="module")
def gpt2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GPT-2's 12 layers, narrow, as transformers writes them: Conv1D, lying transposed."""
    config = transformers.GPT2Config(
        n_layer=12, n_head=2, n_embd=64, n_positions=64, vocab_size=199, eos_token_id=None
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("gpt2")
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "name", [name for name in passes() if name not in ("draft", "kv_cache", "runtime")]
)
def test_all_48_projections_of_gpt2s_shape_are_converted(name: str, gpt2_folder: Path) -> None:
    """Programs that look for linear layers find none in GPT-2: its are Conv1D."""
    if name in ("fp8", "trim"):
        pytest.skip("it needs a GPU" if name == "fp8" else "it leaves the blocks as they are")
    checkpoint = weights.describe(gpt2_folder)
    one = passes()[name](**{"shrink": {"neurons": 0.5}}.get(name, {}))
    placement = placement_of(one, checkpoint.spec)
    assert placement is not None
    model = weights.build(checkpoint, placement)
    ids = text(checkpoint.spec, sequences=24)
    context = PassContext(placement=placement, calibration_ids=ids)
    before = {name: type(model.get_submodule(name)) for name, _ in block_layers(checkpoint.spec)}
    one.apply(model, context)
    skipped = dict(context.coverage[name].skipped)
    layers = block_layers(checkpoint.spec)
    if name == "drop_layers":
        assert len(model.blocks) == 11
        return
    if name == "shrink":  # heads were to be kept
        layers = [(ours, theirs) for ours, theirs in layers if ".mlp." in ours]
    converted = {theirs for ours, theirs in layers if ours not in skipped}
    assert len(converted) == (24 if name == "shrink" else 48)
    assert len(before) == 12 * 6


def test_a_recipe_of_every_stage_works_on_the_kind_of_model_that_is_trained_here(
    tmp_path: Path,
) -> None:
    """Smaller shape, fewer numbers, smaller cache, one after another, and it still writes."""
    folder = tiny_checkpoint(tmp_path / "tiny")
    checkpoint, tokenizer = weights.describe(folder), load_tokenizer(folder)
    ids = torch.tensor(tokenizer.encode("Once upon a time there was a small fox. ") * 120)
    placement = Placement(threads=1)
    context = PassContext(
        placement=placement,
        tokenizer=tokenizer,
        calibration_ids=ids[: len(ids) // 64 * 64].view(-1, 64),
    )
    model = weights.build(checkpoint, placement)
    for name, fields in (
        ("trim", {"vocabulary": "text"}),
        ("shrink", {"neurons": 0.5}),
        ("int8", {}),
        ("kv_cache", {"bits": 4}),
    ):
        model = passes()[name](**fields).apply(model, context)
    assert context.tokenizer is not None
    new = torch.tensor([context.tokenizer.encode("Once upon a time")])
    assert logits(model, new).isfinite().all()
    assert model(new, model.new_cache(16)).isfinite().all()
    assert context.coverage["int8"].ratio == 1.0
