"""An ONNX file: ids (batch, tokens) int64 -> logits (batch, tokens, vocabulary) float32.

Where ONNX Runtime is installed, the file is run beside the model before it is given out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptcore.errors import NumericalError
from gptcore.spec import ModelSpec

if TYPE_CHECKING:
    from gptcore.export import Form, Parts
    from gptcore.model import GPT

MOST_BYTES = 2**31 - 2**24
"""What one file of the format can hold, and some room for the graph."""
CHECKED_TOKENS = 32
TOLERANCE = 1e-3
"""The most that a logit may differ in ONNX Runtime."""


def blocked_by(spec: ModelSpec) -> str | None:
    """Return why one file cannot hold a shape, or None."""
    if spec.weights_bytes("fp32") > MOST_BYTES:
        return (
            f"an ONNX file holds 2 GB, and this model has {spec.weights_bytes('fp32') / 1e9:.1f} "
            "in fp32: choose hf or GGUF."
        )
    return None


def write(work: Path, form: Form, parts: Parts, progress: Callable[[float], None]) -> str:
    """Write the file, check it where that is possible, and return a note.

    Raises:
        OSError: the disk is full or cannot be written.
        NumericalError: ONNX Runtime computes something else.
    """
    import torch

    from gptcore.export.traced import Logits, example, free_shapes, quietly

    module = Logits(parts.plain).eval()
    with quietly(), torch.no_grad():
        program: Any = torch.onnx.export(
            module,
            (example(),),
            dynamo=True,
            verbose=False,
            input_names=["ids"],
            output_names=["logits"],
            dynamic_shapes=free_shapes(parts.plain.spec.context),
        )
        progress(0.6)
        program.save(str(work), external_data=False)
    progress(0.8)
    if find_spec("onnxruntime") is None:
        return "It was not checked: onnxruntime is not installed."
    found = difference(work, module.model, parts.plain.spec)
    if found.logit > TOLERANCE or found.same_tokens < CHECKED_TOKENS:
        raise NumericalError(
            f"ONNX Runtime's logits differ by up to {found.logit:.2g} and {found.same_tokens} of "
            f"{CHECKED_TOKENS} tokens are the same: nothing was written."
        )
    return (
        f"Checked in ONNX Runtime: logits differ by {found.logit:.1g} at most, {CHECKED_TOKENS} "
        "greedy tokens are the same."
    )


@dataclass(frozen=True, slots=True)
class Difference:
    """What ONNX Runtime computes, beside what the model does."""

    logit: float
    """The greatest difference of a logit, over all positions of a text."""
    same_tokens: int
    """Greedy tokens until the first that differs, ``CHECKED_TOKENS`` at most."""


def difference(file: Path, model: GPT, spec: ModelSpec) -> Difference:
    """Run a file beside the model on the same tokens."""
    import numpy as np
    import onnxruntime
    import torch

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(
        str(file), sess_options=options, providers=["CPUExecutionProvider"]
    )
    model = model.float()
    random = torch.Generator().manual_seed(0)
    begin = min(16, spec.context - CHECKED_TOKENS) if spec.context > CHECKED_TOKENS + 2 else 2
    ids = torch.randint(0, spec.vocabulary, (1, begin), generator=random)
    most, same = 0.0, 0
    with torch.inference_mode():
        while same < CHECKED_TOKENS and ids.shape[1] <= spec.context:
            (theirs,) = session.run(["logits"], {"ids": ids.numpy()})
            ours = model(ids).numpy()
            most = max(most, float(np.abs(theirs - ours).max()))
            token = int(ours[0, -1].argmax())
            if token != int(theirs[0, -1].argmax()):
                break
            same += 1
            ids = torch.cat((ids, torch.tensor([[token]])), dim=1)
    short = ids.shape[1] > spec.context
    return Difference(most, CHECKED_TOKENS if short else same)
