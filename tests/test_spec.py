"""Shapes: published counts, custom ones against built models, and limits said in one sentence."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from gptcore.sentences import sentence
from gptcore.spec import GPT2, GPT3, PRESETS, SMOLLM2_135M, ModelSpec, RopeScaling, gpt
from gptcore.weights import empty

PUBLISHED = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "gpt3-125m": 125_226_240,
    "gpt3-350m": 355_871_744,
    "gpt3-760m": 760_300_032,
    "gpt3-1.3b": 1_315_723_264,
    "gpt3-2.7b": 2_651_553_280,
    "gpt3-6.7b": 6_658_404_352,
    "gpt3-13b": 12_952_938_780,
    "gpt3-175b": 174_604_259_328,
    "smollm2-135m": 134_515_008,
}
TABLE = {
    "gpt3-125m": (12, 768, 12),
    "gpt3-350m": (24, 1024, 16),
    "gpt3-760m": (24, 1536, 16),
    "gpt3-1.3b": (24, 2048, 16),
    "gpt3-2.7b": (32, 2560, 32),
    "gpt3-6.7b": (32, 4096, 32),
    "gpt3-13b": (40, 5140, 20),
    "gpt3-175b": (96, 12288, 96),
}
"""Layers, width, heads as built: table 2.1 gives 24 heads for 1.3B and 40 for 13B."""
TINY = {
    "layers": 2,
    "heads": 4,
    "kv_heads": 2,
    "head_width": 8,
    "width": 32,
    "hidden": 64,
    "context": 16,
    "vocabulary": 50,
}


def test_the_presets_are_gpt2_gpt3_and_smollm2() -> None:
    assert list(PRESETS) == list(PUBLISHED)


@pytest.mark.parametrize(("name", "count"), PUBLISHED.items())
def test_a_preset_has_the_published_count(name: str, count: int) -> None:
    spec = PRESETS[name]
    assert spec.parameters == count
    assert sum(spec.parameters_by_part.values()) == count
    assert all(part >= 0 for part in spec.parameters_by_part.values())


@pytest.mark.parametrize("name", [*GPT2, *GPT3])
def test_a_gpt_has_the_count_of_the_closed_formula(name: str) -> None:
    """12Ld² + 13Ld + (V + n_ctx)d + 2d: another way to the same number."""
    spec = PRESETS[name]
    L, d = spec.layers, spec.width
    by_formula = 12 * L * d**2 + 13 * L * d + (spec.vocabulary + spec.context) * d + 2 * d
    assert spec.parameters == by_formula


@pytest.mark.parametrize(("name", "shape"), TABLE.items())
def test_gpt3_is_built_as_the_table_says(name: str, shape: tuple[int, int, int]) -> None:
    spec = GPT3[name]
    assert (spec.layers, spec.width, spec.heads) == shape
    assert (spec.context, spec.vocabulary, spec.hidden) == (2048, 50257, 4 * spec.width)
    assert spec.head_width * spec.heads == spec.width
    quirk = {"gpt3-1.3b": "24 heads", "gpt3-13b": "40 heads"}.get(name)
    assert (quirk in spec.note) if quirk else spec.note == ""


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_counts_what_is_built(name: str) -> None:
    """On the meta device, so that 175 billion parameters take no memory."""
    model = empty(PRESETS[name])
    assert sum(one.numel() for one in model.parameters()) == PRESETS[name].parameters
    assert all(one.is_meta for one in model.parameters())


@settings(max_examples=60, deadline=None)
@given(
    groups=st.integers(1, 4),
    kv_heads=st.integers(1, 3),
    head_width=st.sampled_from([2, 4, 6, 10]),
    layers=st.integers(1, 3),
    sizes=st.tuples(*[st.integers(1, 40)] * 4),
    norm=st.sampled_from(["layernorm", "rmsnorm"]),
    position=st.sampled_from(["learned", "rotary"]),
    mlp=st.sampled_from(["gelu", "swiglu"]),
    flags=st.tuples(*[st.booleans()] * 4),
)
def test_any_shape_counts_what_is_built(
    groups: int,
    kv_heads: int,
    head_width: int,
    layers: int,
    sizes: tuple[int, ...],
    norm: str,
    position: str,
    mlp: str,
    flags: tuple[bool, ...],
) -> None:
    width, hidden, context, vocabulary = sizes
    spec = ModelSpec.model_validate(
        {
            "layers": layers,
            "heads": groups * kv_heads,
            "kv_heads": kv_heads,
            "head_width": head_width,
            "width": width,
            "hidden": hidden,
            "context": context,
            "vocabulary": vocabulary,
            "norm": norm,
            "position": position,
            "mlp": mlp,
            **dict(zip(("bias", "qkv_bias", "qk_norm", "tied_head"), flags, strict=True)),
        }
    )
    model = empty(spec)
    assert sum(one.numel() for one in model.parameters()) == spec.parameters
    linears = [*model.linears(), ("head", model.head)]
    built = sorted((*one.weight.shape, one.bias is not None) for _, one in linears)
    counted = sorted((a.rows, a.columns, a.bias) for a in spec.linears for _ in range(a.count))
    assert built == counted
    assert spec.matmul_parameters == sum(one.weight.numel() for _, one in linears)
    assert {one.name for one in spec.linears} == {name.rpartition(".")[2] for name, _ in linears}


def test_175b_in_fp32_is_698_gb() -> None:
    assert GPT3["gpt3-175b"].weights_bytes("fp32") == 698_417_037_312
    assert round(GPT3["gpt3-175b"].weights_bytes("fp32") / 1e9) == 698
    assert GPT3["gpt3-175b"].weights_bytes("bf16") == 349_208_518_656


def test_a_token_of_175b_keeps_4_718_592_bytes_at_16_bits() -> None:
    assert GPT3["gpt3-175b"].kv_bytes_per_token("fp16") == 4_718_592
    assert GPT3["gpt3-175b"].kv_bytes_per_token("fp32") == 2 * 4_718_592


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("spec", [SMOLLM2_135M, gpt(2, 64, 4, vocabulary=211)])
def test_a_cache_holds_what_is_said_of_a_token(spec: ModelSpec, precision: str) -> None:
    import torch

    from gptcore.model import KVCache

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    cache = KVCache(spec, 37, 1, dtype, torch.device("meta"))
    assert cache.k.nbytes + cache.v.nbytes == 37 * spec.kv_bytes_per_token(precision)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"layers": 10**9}, "Layers is 1000000000; the most is 1,000."),
        ({"layers": 0}, "Layers is 0; the least is 1."),
        ({"vocabulary": -1}, "Vocabulary is -1; the least is 1."),
        ({"vocabulary": 10**8}, "Vocabulary is 100000000; the most is 10,000,000."),
        ({"width": 2.5}, "Width is 2.5; it must be a whole number."),
        ({"width": "wide"}, "Width is wide; it must be a whole number."),
        ({"width": 10**400}, None),
        ({"context": float("inf")}, None),
        ({"family": "mamba"}, "Family is mamba; there are: 'gpt2', 'llama', 'qwen2' or 'qwen3'."),
        ({"norm_eps": 0.0}, "Norm eps is 0.0; it must be above 0."),
        ({"norm_eps": 1.0}, "Norm eps is 1.0; it must be below 1."),
        ({"norm_eps": float("nan")}, "Norm eps is nan; it must be a number."),
        ({"rope_theta": float("-inf")}, "Rope theta is -inf; it must be a number."),
        (
            {"kv_heads": 3},
            "4 query heads cannot share 3 key/value heads: the first must be a multiple of the "
            "second.",
        ),
        (
            {"position": "rotary", "head_width": 7},
            "Rotary positions need an even head width, not 7.",
        ),
        (
            {"width": 1_000_000, "hidden": 4_000_000, "layers": 1000},
            "8,000,106,068,064,000 parameters is more than the 10,000,000,000,000 allowed.",
        ),
        ({"stride": 3}, None),
        ({"hidden": None}, "Hidden is None; it must be a whole number."),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_shape_out_of_range_is_refused_in_one_sentence(
    changes: dict[str, Any], said: str | None
) -> None:
    with pytest.raises(ValidationError) as refused:
        ModelSpec.model_validate({**TINY, **changes})
    text = sentence(refused.value, ModelSpec)
    if said is not None:
        assert text == said
    assert text.endswith(".")
    assert "\n" not in text
    assert len(text) < 400


@pytest.mark.parametrize("field", TINY)
def test_a_missing_field_is_named(field: str) -> None:
    with pytest.raises(ValidationError) as refused:
        ModelSpec.model_validate({name: value for name, value in TINY.items() if name != field})
    assert sentence(refused.value, ModelSpec).endswith(" is missing.")


def test_stretched_rotary_positions_need_ordered_bands() -> None:
    with pytest.raises(ValidationError, match="high_freq_factor must be above low_freq_factor"):
        RopeScaling(low_freq_factor=4.0, high_freq_factor=4.0)


def test_a_spec_is_a_value() -> None:
    spec = ModelSpec.model_validate(TINY)
    assert ModelSpec.model_validate_json(spec.model_dump_json()) == spec
    assert hash(ModelSpec.model_validate(TINY)) == hash(spec)
    with pytest.raises(ValidationError, match="frozen"):
        spec.layers = 3


@pytest.mark.parametrize("heads", [1, 3, 7, 24, 40, 96])
def test_heads_that_do_not_divide_the_width_are_lowered_and_said(heads: int) -> None:
    spec = gpt(1, 96, heads, vocabulary=100)
    assert 96 % spec.heads == 0
    assert spec.heads <= heads
    assert not [h for h in range(spec.heads + 1, heads + 1) if 96 % h == 0]
    assert bool(spec.note) == bool(96 % heads)
