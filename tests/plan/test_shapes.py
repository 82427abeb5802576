"""Size: exact counts against the ones that are known, and shapes from anywhere."""

import json
from pathlib import Path

import pytest
import torch

from gptcore.errors import InvalidInput, InvalidSpec, UnknownModel
from gptcore.model import GPT
from gptcore.plan.shapes import PUBLISHED, formula, free, from_config, quirks, shape, size
from gptcore.spec import PRESETS

COUNTS = {
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
}
QWEN3 = {
    "model_type": "qwen3",
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_size": 48,
    "intermediate_size": 80,
    "max_position_embeddings": 128,
    "vocab_size": 100,
    "tie_word_embeddings": False,
}


@pytest.mark.parametrize(("name", "count"), COUNTS.items())
def test_the_parts_sum_to_the_known_count(name: str, count: int) -> None:
    parts = size(PRESETS[name])
    assert parts.pop("total") == count == sum(parts.values())


@pytest.mark.parametrize("name", ["gpt2", "smollm2-135m", "gpt3-175b"])
def test_the_count_is_that_of_a_built_model(name: str) -> None:
    with torch.device("meta"):
        model = GPT(PRESETS[name])
    assert size(PRESETS[name])["total"] == sum(one.numel() for one in model.parameters())


def test_a_config_of_another_family_is_counted_as_built() -> None:
    spec = from_config(json.dumps(QWEN3))
    with torch.device("meta"):
        model = GPT(spec)
    assert size(spec)["total"] == sum(one.numel() for one in model.parameters())


def test_only_the_two_rows_whose_heads_do_not_divide_the_width_say_so() -> None:
    odd = {name for name in PUBLISHED if any("heads of" in said for said in quirks(name))}
    assert odd == {"gpt3-1.3b", "gpt3-13b"}
    (said,) = quirks("gpt3-13b")
    assert "5,120 and not the width of 5,140" in said
    assert "20 heads of 257" in said


def test_the_formula_is_written_with_its_numbers() -> None:
    assert formula(PRESETS["gpt3-175b"]) == (
        "12·96·12,288² + 13·96·12,288 + (50,257 + 2,048)·12,288 + 2·12,288 = 174,604,259,328"
    )
    assert formula(PRESETS["smollm2-135m"]).endswith("= 134,515,008")


def test_a_shape_comes_from_a_name_a_file_or_a_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN3))
    expected = from_config(json.dumps(QWEN3))
    for path in (tmp_path, tmp_path / "config.json"):
        assert shape(str(path), paths=True) == expected
        with pytest.raises(UnknownModel):
            shape(str(path))
    assert shape("mine", known={"mine": expected}) == expected


@pytest.mark.parametrize("name", ["", "gpt9", "a\x00b", "x" * 5000, "/", "~nobody/x"])
def test_an_unknown_name_is_refused_in_a_sentence(name: str) -> None:
    with pytest.raises(UnknownModel, match="There is no model or config"):
        shape(name, paths=True)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "no JSON"),
        ("[1]", "no JSON object"),
        ("[" * 100_000, "no JSON"),
        ('{"model_type": "bert"}', "bert"),
        (json.dumps({**QWEN3, "num_key_value_heads": 3}), "cannot share"),
        (json.dumps({**QWEN3, "num_hidden_layers": 0}), "greater than or equal to 1"),
        (json.dumps({**QWEN3, "hidden_size": 10**30}), "config.json"),
        (json.dumps({**QWEN3, "vocab_size": "many"}), "config.json"),
        ("x" * (2**20 + 1), "bytes"),
    ],
)
def test_a_bad_config_is_refused_in_a_sentence(text: str, said: str) -> None:
    with pytest.raises(InvalidSpec, match=said):
        from_config(text)


def test_a_free_shape_says_which_heads_would_divide_the_width() -> None:
    assert free(96, 12288, 96, 2048, 50257).parameters == COUNTS["gpt3-175b"]
    with pytest.raises(InvalidInput, match="20 heads would"):
        free(40, 5140, 40, 2048, 50257)
    with pytest.raises(InvalidSpec, match="more than the"):
        free(1000, 1_000_000, 1000, 2048, 50257)
