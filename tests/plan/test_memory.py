"""Memory: predictions against what models really take, and the arithmetic of splitting them."""

import os
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from gptcore.errors import InvalidInput
from gptcore.model import GPT
from gptcore.plan import memory
from gptcore.plan.memory import Split
from gptcore.recipe import Recipe, place
from gptcore.spec import BYTES, PRESETS, SMOLLM2_135M, ModelSpec, gpt
from tests.conftest import ROOT
from tests.plan.steps import TRAINED

GPT3 = PRESETS["gpt3-175b"]
WITHIN = 0.10
"""What is promised."""


def taken(*arguments: str) -> int:
    # A fixed threshold lets freed tensors go back to the system at once, so that the resident set
    # is what lives.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    if arguments[0] == "generate":
        del environment["MALLOC_MMAP_THRESHOLD_"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.plan.steps", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "precision", "context"),
    [
        ("gpt2", "fp32", 1024),
        ("gpt2", "bf16", 1024),
        ("gpt2", "int8", 1024),
        ("gpt2", "int4", 1024),
        ("smollm2-135m", "fp32", 4096),
        ("gpt3-350m", "bf16", 2048),
    ],
)
def test_generating_takes_what_was_predicted(name: str, precision: str, context: int) -> None:
    predicted = memory.inference(PRESETS[name], precision, context=context, on_cpu=True).total
    seen = taken("generate", name, precision, str(context))
    assert predicted == pytest.approx(seen, rel=WITHIN)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs glibc's allocator settings")
@pytest.mark.parametrize(
    ("name", "batch", "context"), [("gpt", 4, 512), ("gpt", 1, 128), ("llama", 4, 512)]
)
def test_training_takes_what_was_predicted(name: str, batch: int, context: int) -> None:
    predicted = memory.training(
        TRAINED[name], "fp32", batch=batch, context=context, scratch_bytes=0
    ).total
    assert predicted == pytest.approx(taken("train", name, str(batch), str(context)), rel=WITHIN)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "spec",
    [
        gpt(4, 256, 4, context=256, vocabulary=64),
        SMOLLM2_135M.model_copy(update={"layers": 4, "vocabulary": 64}),
    ],
    ids=["gpt2", "llama"],
)
def test_a_block_keeps_what_was_predicted(spec: ModelSpec, precision: str) -> None:
    """Counted from the tensors that torch saves for the backward pass, two depths apart."""
    tokens = 2 * 256

    def saved(layers: int) -> int:
        model = GPT(spec.model_copy(update={"layers": layers}))
        model.to(torch.float32 if precision == "fp32" else torch.bfloat16)
        own = {one.untyped_storage().data_ptr() for one in model.parameters()}
        seen: dict[int, torch.Tensor] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            pointer = tensor.untyped_storage().data_ptr()
            if pointer not in own:
                seen[pointer] = tensor
            return tensor

        ids = torch.zeros(2, 256, dtype=torch.long)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda one: one):
            F.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
        return sum(one.untyped_storage().nbytes() for one in seen.values())

    kept = (saved(4) - saved(2)) / 2
    assert memory.kept_per_token(spec, precision) * tokens == pytest.approx(kept, rel=WITHIN)


def test_the_known_figures_of_175b() -> None:
    assert memory.weights_bytes(GPT3, "fp32") == 698_417_037_312
    assert memory.kv_bytes_per_token(GPT3, "fp16") == 4_718_592


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("name", ["gpt2", "smollm2-135m", "gpt3-1.3b"])
def test_weights_are_what_the_passes_say_they_leave(name: str, precision: str) -> None:
    spec = PRESETS[name]
    placement, recipe = place(precision, "cpu", 1, Recipe())
    left = spec.parameters * BYTES[placement.precision]
    for one in recipe.passes:
        left = one.weights_bytes_after(spec, placement, left)
    if precision == "int8":  # its table lies in the head then, where the native step looks it up
        left -= spec.vocabulary * (spec.width + 4)
    assert memory.weights_bytes(spec, precision, on_cpu=True) == left


@pytest.mark.parametrize("split", [Split(8), Split(1, 12), Split(8, 12), Split(96, 96)])
def test_no_parameter_is_lost_in_a_split(split: Split) -> None:
    held = memory.stages(GPT3, "fp16", split)
    assert [one.first for one in held[1:]] == [one.end for one in held[:-1]]
    assert held[-1].end == GPT3.layers
    together = sum(one.parameters for one in held) * split.tensor
    second_head = GPT3.vocabulary * GPT3.width if split.pipeline > 1 else 0
    assert together >= GPT3.parameters + second_head
    assert together == pytest.approx(GPT3.parameters + second_head, rel=0.02)


def test_splitting_shrinks_what_a_device_holds() -> None:
    def total(split: Split) -> int:
        return memory.training(GPT3, "fp16", context=2048, split=split).total

    assert total(Split()) > total(Split(8)) > total(Split(8, 12))
    assert total(Split(8, 12, 8, 3)) < total(Split(8, 12, 8, 1)) < total(Split(8, 12, 8))
    assert total(Split(8, 12, 8)) == total(Split(8, 12))


def test_mixed_precision_with_adam_takes_16_bytes_a_parameter() -> None:
    found = memory.training(GPT3, "bf16", context=1)
    assert found.weights + found.gradients + found.optimizer == 16 * GPT3.parameters
    plain = memory.training(GPT3, "fp32", context=1, optimizer="sgd")
    assert plain.weights + plain.gradients + plain.optimizer == 8 * GPT3.parameters


def test_computing_blocks_again_keeps_less() -> None:
    kept = memory.training(GPT3, "bf16", context=2048).activations
    again = memory.training(GPT3, "bf16", context=2048, recompute="blocks").activations
    assert again < kept / 5


@pytest.mark.parametrize(
    ("split", "said"),
    [(Split(7), r"does not divide 96 heads.*: 1, 2, 3, 4, 6"), (Split(1, 97), "there are 96")],
)
def test_a_split_that_cannot_be_names_what_can(split: Split, said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        memory.inference(GPT3, "fp16", context=1, split=split)


def test_packed_weights_are_not_trained() -> None:
    with pytest.raises(InvalidInput, match="choose fp32, bf16 or fp16"):
        memory.training(GPT3, "int8", context=1)
