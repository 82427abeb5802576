"""The real model: SmolLM2-135M, from its GGUF, against ``transformers``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from gptcore import weights
from gptcore.device import Placement
from gptcore.model import GPT
from gptcore.spec import SMOLLM2_135M
from gptcore.tokenizer import Tokenizer, load_tokenizer
from gptcore.weights import Checkpoint
from tests.conftest import ROOT

pytestmark = [pytest.mark.smollm2, pytest.mark.usefixtures("one_thread")]

NEW_TOKENS = 24
END = 2
PROMPTS = [
    "Once upon a time",
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "1, 1, 2, 3, 5, 8,",
    "Dear Sir or Madam,",
    "The three laws of thermodynamics are:\n1.",
    "Q: How many legs has a spider?\nA:",
    "<html>\n<head>",
    "Roses are red,",
    "import numpy as np\n\nx = np.",
    "Es war einmal",
    "Il était une fois",
    "今天天气",
    "😀😀😀",
    "x",
    " ",
    "SELECT name FROM users WHERE",
    "A list of fruit: apple, banana,",
    "In 1969, the first",
    "The quick brown fox jumps over the lazy dog. " * 8,
]


@pytest.fixture(scope="module")
def checkpoint(smollm2_gguf: Path) -> Checkpoint:
    return weights.describe(smollm2_gguf)


@pytest.fixture(scope="module")
def ours(checkpoint: Checkpoint) -> GPT:
    return weights.build(checkpoint, Placement(precision="fp32"))


@pytest.fixture(scope="module")
def theirs(checkpoint: Checkpoint) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint.directory, dtype=torch.float32
    ).eval()


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    return load_tokenizer(checkpoint.directory)


def greedy(model: GPT, ids: list[int]) -> list[int]:
    cache = model.new_cache(len(ids) + NEW_TOKENS)
    found: list[int] = []
    with torch.inference_mode():
        logits = model(torch.tensor([ids]), cache, last_only=True)
        while True:
            found.append(int(logits[0, -1].argmax()))
            if len(found) == NEW_TOKENS:
                return found
            logits = model(torch.tensor([found[-1:]]), cache, last_only=True)


@pytest.mark.slow
def test_greedy_text_is_token_for_token_that_of_transformers_on_20_prompts(
    ours: GPT, theirs: transformers.PreTrainedModel, tokenizer: Tokenizer
):
    assert len(PROMPTS) == len(set(PROMPTS)) == 20
    differing, compared = {}, 0
    for prompt in PROMPTS:
        ids = tokenizer.encode_prompt(prompt)
        found = greedy(ours, ids)
        with torch.inference_mode():
            whole = theirs.generate(
                torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                generation_config=transformers.GenerationConfig(
                    max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=END, pad_token_id=END
                ),
            )
        expected = whole[0, len(ids) :].tolist()
        assert len(expected) == NEW_TOKENS or expected[-1] == END
        if found[: len(expected)] != expected:
            differing[prompt] = (found, expected)
        compared += len(expected)
    assert not differing
    assert compared > 15 * NEW_TOKENS  # most texts do not end at once


def test_the_file_says_the_shape_that_the_preset_promises(checkpoint: Checkpoint):
    assert checkpoint.spec == SMOLLM2_135M
    assert checkpoint.source_precision == "Q4_1 (GGUF)"
    assert checkpoint.weights_id.startswith("sha256:")
    assert sum(one.numel() for one in weights.empty(checkpoint.spec).parameters()) == 134_515_008


def test_the_text_of_a_known_prompt_makes_sense(ours: GPT, tokenizer: Tokenizer):
    text = tokenizer.decode(greedy(ours, tokenizer.encode_prompt("The capital of France is")))
    assert "Paris" in text  # wrongly ordered rotary rows or a wrong scale would babble


LOAD = """
import json, sys, time
from pathlib import Path
begin = time.perf_counter()
from gptcore import weights
from gptcore.device import Placement
checkpoint = weights.describe(Path(sys.argv[1]))
described = time.perf_counter()
import torch
imported = time.perf_counter()
weights.build(checkpoint, Placement())
whole = time.perf_counter() - begin - (imported - described)
print(json.dumps({"seconds": whole, "compiler": "torch._dynamo" in sys.modules}))
"""


@pytest.mark.slow
def test_the_first_load_converts_in_seconds_and_later_ones_only_map(
    smollm2_gguf: Path, tmp_path: Path
):
    environment = {**os.environ, "GPTLAB_DATA": str(tmp_path), "OMP_NUM_THREADS": "1"}

    def load() -> dict[str, float]:
        done = subprocess.run(
            [sys.executable, "-c", LOAD, str(smollm2_gguf)],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        return json.loads(done.stdout)

    first, then = load(), load()
    # On a quiet machine 2.5 s and 0.3 s; 6 s and 1.5 s are promised. Twice that is allowed for
    # what else runs here, and the reader of the gguf package alone takes longer than our all.
    assert first["seconds"] < 12
    assert then["seconds"] < 3
    assert then["seconds"] < first["seconds"]  # else the conversion was not kept
    assert not then["compiler"]  # its import alone is a second
