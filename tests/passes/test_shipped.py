"""Every pass that this machine can run, on the model that ships: real weights, real text."""

import pytest
import torch

from gptcore import weights
from gptcore.catalogue import SHIPPED
from gptcore.corpus.shards import corpus_dir, texts
from gptcore.device import Placement
from gptcore.model import GPT
from gptcore.passes.base import Pass, PassContext
from gptcore.passes.calibrate import text_hash
from gptcore.passes.registry import passes
from gptcore.tokenizer import load_tokenizer
from tests.passes.test_contract import placement_of

pytestmark = pytest.mark.usefixtures("one_thread")
KL_AT_MOST = {
    "cluster": 0.5,
    "draft": 1e-6,
    "drop_layers": 4.0,
    "int3": 0.6,
    "int4": 0.1,
    "int8": 0.01,
    "int8_static": 0.1,
    "int8_weights": 0.01,
    "kv_cache": 0.05,
    "low_rank": 2.0,
    "mixed_bits": 0.3,
    "prune": 1.5,
    "runtime": 1e-6,
    "shrink": 3.0,
    "trim": 1e-6,
}
"""Nats a token, as each pass comes: far more than was seen, far less than of a broken model."""


def ids(part: str, sequences: int) -> torch.Tensor:
    tokenizer = load_tokenizer(SHIPPED)
    stream = [id for one in texts(corpus_dir(), part) for id in tokenizer.encode(one.text)]
    return torch.tensor(stream[: sequences * 128]).view(sequences, 128)


def logits(model: GPT, given: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        cache = model.new_cache(128, len(given))
        return model(given, cache).float()


@pytest.mark.parametrize("kind", passes().values(), ids=lambda kind: kind.name)
def test_a_pass_runs_on_it_and_costs_no_more_than_it_may(kind: type[Pass]) -> None:
    one, checkpoint = kind(), weights.describe(SHIPPED)
    placement = placement_of(one, checkpoint.spec)
    if placement is None:
        pytest.skip(str(one.blocked_by(checkpoint.spec, Placement(threads=1))))
    before = weights.build(checkpoint, placement)
    given = ids("test", 4)
    wanted = logits(before, given)
    calibration = ids("calibration", 16)
    context = PassContext(
        placement=placement,
        seed=1,
        calibration_ids=calibration,
        calibration_hash=text_hash(calibration),
        tokenizer=load_tokenizer(SHIPPED),
    )
    found = logits(one.apply(before, context), given)
    divergence = torch.nn.functional.kl_div(
        found.log_softmax(-1), wanted.log_softmax(-1), reduction="none", log_target=True
    )
    assert divergence.sum(-1).mean() <= KL_AT_MOST[one.name]
