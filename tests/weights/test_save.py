"""What is saved here is read by ``describe`` and ``build``, and by transformers."""

from pathlib import Path

import pytest
import torch
import transformers

from gptcore import weights
from gptcore.device import Placement
from gptcore.errors import InvalidSpec
from gptcore.spec import gpt
from gptcore.weights.huggingface import read_config, spec_of
from gptcore.weights.save import config_of, save
from tests.families import CASES, Case

FP32 = Placement(precision="fp32")


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_model_of_every_family_comes_back_to_the_bit(case: Case, tmp_path: Path) -> None:
    model = weights.build(weights.describe(case.save(tmp_path / "theirs")), FP32)
    save(model, tmp_path / "ours", end_id=3)
    again = weights.build(weights.describe(tmp_path / "ours"), FP32)
    assert again.spec == model.spec
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())
    assert read_config(tmp_path / "ours")["eos_token_id"] == 3


@pytest.mark.parametrize("name", ["gpt2", "gpt2-own-hidden-width", "llama3-rope", "qwen3-norms"])
def test_transformers_reads_it_and_computes_the_same(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    model = weights.build(weights.describe(case.save(tmp_path / "theirs")), FP32)
    save(model, tmp_path / "ours")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", attn_implementation="eager"
    ).eval()
    ids = torch.arange(20)[None] * 7 % 200
    with torch.no_grad():
        assert torch.equal(theirs(ids).logits, case.model(ids).logits)


def test_a_precision_is_kept(tmp_path: Path) -> None:
    model = weights.build_random(gpt(1, 16, 2, context=8, vocabulary=20), Placement()).bfloat16()
    save(model, tmp_path)
    assert weights.describe(tmp_path).source_precision == "bf16"


def test_a_shape_that_the_family_cannot_say_is_refused() -> None:
    spec = gpt(1, 16, 2, context=8, vocabulary=20)
    assert spec_of(config_of(spec)) == spec
    with pytest.raises(InvalidSpec, match="cannot say this shape"):
        config_of(spec.model_copy(update={"norm": "rmsnorm"}))
