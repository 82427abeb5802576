from pathlib import Path

import pytest
import torch

from gptcore import weights
from gptcore.device import Placement
from gptcore.engine import Engine
from gptcore.tokenizer import load_tokenizer


@pytest.fixture(scope="session")
def smollm2_engine(smollm2_gguf: Path) -> Engine:
    checkpoint = weights.describe(smollm2_gguf)
    torch.set_num_threads(1)
    model = weights.build(checkpoint, Placement())
    return Engine(model, load_tokenizer(checkpoint.directory))
