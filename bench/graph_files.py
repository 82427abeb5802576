"""The weights that our side has as files of OpenVINO and ONNX Runtime, made once and kept."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]


def openvino_graph(source: Path, folder: Path) -> Path:
    """Return the graph that OpenVINO GenAI makes of a GGUF file, its weights in the file's form."""
    import openvino_genai

    graph = folder / "openvino_model.xml"
    if not graph.exists():
        folder.mkdir(exist_ok=True)
        beside = folder / source.name  # the graph is written where the file lies
        beside.unlink(missing_ok=True)
        beside.symlink_to(source)
        openvino_genai.LLMPipeline(str(beside), "CPU", enable_save_ov_model=True)
    return graph


def onnx_graph(model: str, target: Path) -> Path:
    """Return our export of a model in fp32, cut to the logits behind the last token.

    The export gives those of all tokens, which no peer computes for a prompt.
    """
    if target.exists():
        return target
    import onnx
    from onnx import helper, numpy_helper

    whole = target.with_name(f"whole-{target.name}")
    whole.unlink(missing_ok=True)
    command = [sys.executable, "-m", "gptcore", "export", "--model", model, "--format", "onnx"]
    subprocess.run([*command, "--out", str(whole)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    file = onnx.load(whole)
    made_by = {name: node for node in file.graph.node for name in node.output}
    head = made_by[file.graph.output[0].name]
    assert head.op_type == "MatMul", head.op_type
    file.graph.initializer.append(numpy_helper.from_array(np.array([-1]), "last_place"))
    gather = helper.make_node("Gather", [head.input[0], "last_place"], ["last_hidden"], axis=1)
    head.input[0] = "last_hidden"
    file.graph.node.insert(list(file.graph.node).index(head), gather)
    file.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 1
    onnx.save(file, target)
    whole.unlink()
    return target
