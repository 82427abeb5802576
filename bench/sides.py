"""One program on one side of a benchmark, in a process of its own.

The process is told what to do by a line of JSON and answers by one, so that several programs can
be loaded at once and asked in turns; only the one that is asked works. Every side is fed the same
token ids, whatever it would have chosen itself, and picks its likeliest next token all the same.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from typing_extensions import override

ROOT = Path(__file__).resolve().parents[1]


class Program(Protocol):
    """What a side can do."""

    name: str
    """With its version."""

    def read(self, ids: Sequence[int]) -> None:
        """Start over with these tokens in the cache."""

    def step(self, id: int) -> np.ndarray:
        """Read one token behind what is known and return the logits after it, (V,) float32."""

    def step_bytes(self, known: int) -> int:
        """Return the bytes of weights and cache that a step behind so many tokens reads."""

    def decoder(self) -> str:
        """Return what decodes, where that is worth saying."""


class Ours(Program):
    """The engine of this repository."""

    def __init__(
        self,
        model: str,
        precision: str,
        threads: int,
        recipe: list[dict[str, Any]] | None = None,
        native: bool = True,
    ) -> None:
        sys.path.insert(0, str(ROOT))
        if not native:
            os.environ["GPTLAB_KERNELS"] = "off"
        from gptcore.device import limit_spinning, trim_heap

        limit_spinning()
        import torch

        from gptcore import __version__
        from gptcore.catalogue import Catalogue
        from gptcore.engine import Engine
        from gptcore.measure.memory import dropping
        from gptcore.passes.base import PassContext
        from gptcore.paths import models_dir
        from gptcore.recipe import Recipe, place
        from gptcore.spec import PRESETS
        from gptcore.tokenizer import byte_tokenizer
        from gptcore.weights import build, build_random

        torch.set_num_threads(threads)
        placement, passes = place(precision, "cpu", threads, Recipe(passes=recipe or ()))
        if model.startswith("random:"):
            spec = PRESETS[model.removeprefix("random:")]
            made = build_random(spec, placement)
        else:
            checkpoint = Catalogue(models_dir()).checkpoint(model)
            spec = checkpoint.spec
            made = build(checkpoint, placement, dropping(), as_stored=passes.converts)
        for one in passes.passes:
            made = one.apply(made, PassContext(placement=placement, progress=dropping()))
        self.engine = Engine(made, byte_tokenizer(spec.vocabulary))
        trim_heap()  # as the program does
        self.name = f"gptcore {__version__}, {precision}" + (f", {passes}" if recipe else "")
        self._cache = self.engine.model.new_cache(1)

    @override
    def read(self, ids: Sequence[int]) -> None:
        from gptcore.engine import read

        model = self.engine.model
        self._cache = model.new_cache(min(model.spec.context, len(ids) + 1024))
        read(model, list(ids), self._cache, lambda: False)

    @override
    def step(self, id: int) -> np.ndarray:
        from gptcore.engine import as_numpy, decode

        return as_numpy(decode(self.engine.model, id, self._cache))

    @override
    def step_bytes(self, known: int) -> int:
        from gptcore.measure.memory import weight_bytes

        spec = self.engine.model.spec
        position = 2 * spec.layers * spec.kv_width * self._cache.k.element_size()
        return weight_bytes(self.engine.model)[1] + known * position

    @override
    def decoder(self) -> str:
        return self.engine.decoder

    def ceiling(self) -> float:
        """Return the bytes a second that one look at the machine found it to read."""
        from gptcore.measure import peaks

        size = 1 << max(20, (self.step_bytes(0) - 1).bit_length())
        return peaks._measure("cpu", min(peaks.LARGEST_BYTES, size))[0]


class Transformers(Program):
    """Hugging Face transformers, as its documentation has it decode: a cache, one token a call."""

    def __init__(self, directory: str, precision: str, threads: int) -> None:
        import torch
        import transformers

        torch.set_num_threads(threads)
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
        load = transformers.AutoModelForCausalLM.from_pretrained
        self.model = load(directory, dtype=dtype).eval()
        self.name = f"transformers {transformers.__version__}, {precision}"
        self._cache: Any = None

    @override
    def read(self, ids: Sequence[int]) -> None:
        import torch

        self._cache = None
        with torch.inference_mode():
            out = self.model(torch.tensor([list(ids)]), use_cache=True, logits_to_keep=1)
        self._cache = out.past_key_values

    @override
    def step(self, id: int) -> np.ndarray:
        import torch

        with torch.inference_mode():
            out = self.model(torch.tensor([[id]]), past_key_values=self._cache, use_cache=True)
        self._cache = out.past_key_values
        found: np.ndarray = out.logits[0, -1].float().numpy()
        return found

    @override
    def step_bytes(self, known: int) -> int:
        config, size = self.model.config, next(self.model.parameters()).element_size()
        weights = sum(one.nbytes for one in self.model.parameters())
        width = config.hidden_size // config.num_attention_heads * config.num_key_value_heads
        return weights + known * 2 * config.num_hidden_layers * width * size

    @override
    def decoder(self) -> str:
        return "torch, eager"


class LlamaCpp(Program):
    """llama.cpp through llama-cpp-python: a GGUF file, one call of its decode a token."""

    def __init__(self, file: str, label: str, threads: int, flash: bool = False) -> None:
        import llama_cpp

        self._library = llama_cpp
        self._file = Path(file)
        self.model = llama_cpp.Llama(
            file,
            n_ctx=0,
            n_threads=threads,
            n_threads_batch=threads,
            flash_attn=flash,
            verbose=False,
        )
        self.name = f"llama.cpp (llama-cpp-python {llama_cpp.__version__}), {label}"
        self._vocabulary = self.model.n_vocab()

    @override
    def read(self, ids: Sequence[int]) -> None:
        self.model.reset()
        self.model.eval(list(ids))

    @override
    def step(self, id: int) -> np.ndarray:
        library, context = self._library, self.model._ctx.ctx
        one = (library.llama_token * 1)(id)
        if library.llama_decode(context, library.llama_batch_get_one(one, 1)):
            raise RuntimeError("llama_decode failed")
        logits = library.llama_get_logits_ith(context, -1)
        return np.ctypeslib.as_array(logits, shape=(self._vocabulary,))

    @override
    def step_bytes(self, known: int) -> int:
        from gguf import GGUFReader

        found = GGUFReader(self._file)
        own = {one.name: int(one.n_bytes) for one in found.tensors}
        looked_up = "token_embd.weight" if "output.weight" in own else "position_embd.weight"
        fields = found.fields
        arch = fields["general.architecture"].contents()
        layers, width, heads = (
            fields[f"{arch}.{key}"].contents()
            for key in ("block_count", "embedding_length", "attention.head_count")
        )
        groups = fields.get(f"{arch}.attention.head_count_kv")
        share = (groups.contents() if groups else heads) / heads
        return sum(own.values()) - own.get(looked_up, 0) + int(known * 4 * layers * width * share)

    @override
    def decoder(self) -> str:
        found: bytes = self._library.llama_print_system_info()
        return found.decode().strip(" |")


class OpenVino(Program):
    """OpenVINO's runtime with the graph that OpenVINO GenAI made of a GGUF file.

    As its pipeline has it: a latency hint and the defaults of the processor, which are 8-bit keys
    and values, and bf16 where there are instructions for it; the head reads the last token alone.
    """

    def __init__(self, graph: str, label: str, threads: int) -> None:
        import openvino
        from openvino import opset13

        core, self._file = openvino.Core(), Path(graph).with_suffix(".bin")
        model = core.read_model(graph)
        head = model.outputs[0].get_node().input_value(0).get_node()
        assert head.get_type_name() == "MatMul", head.get_type_name()
        last = opset13.gather(head.input_value(0), np.array([-1]), np.array(1))
        head.input(0).replace_source_output(last.output(0))
        options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
        self._compiled = core.compile_model(model, "CPU", options)
        self._request = self._compiled.create_infer_request()
        version = metadata.version("openvino-genai")
        self.name = f"OpenVINO (openvino-genai {version}), {label}"
        self._known = 0

    @override
    def read(self, ids: Sequence[int]) -> None:
        self._request.reset_state()
        self._known = 0
        self._after(ids)

    @override
    def step(self, id: int) -> np.ndarray:
        return self._after((id,))

    def _after(self, ids: Sequence[int]) -> np.ndarray:
        known = self._known + len(ids)
        inputs = {
            "input_ids": np.array([ids], dtype=np.int64),
            "attention_mask": np.ones((1, known), dtype=np.int64),
            "position_ids": np.arange(self._known, known, dtype=np.int64)[None],
            "beam_idx": np.zeros(1, dtype=np.int32),
        }
        self._known = known
        found: np.ndarray = self._request.infer(inputs)[0][0, -1]
        return found

    @override
    def step_bytes(self, known: int) -> int:
        cache = self._request.query_state()
        return self._file.stat().st_size + sum(one.state.data.nbytes for one in cache)

    @override
    def decoder(self) -> str:
        precision = self._compiled.get_property("INFERENCE_PRECISION_HINT")
        cache = self._compiled.get_property("KV_CACHE_PRECISION")
        return f"{precision.get_type_name()}, keys and values {cache.get_type_name()}"


class OnnxRuntime(Program):
    """ONNX Runtime with our export, which has no cache: it reads prompts, and all for a step."""

    def __init__(self, file: str, threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self._session = onnxruntime.InferenceSession(file, options, ["CPUExecutionProvider"])
        self._file, self._input = Path(file), self._session.get_inputs()[0].name
        self.name = f"ONNX Runtime {onnxruntime.__version__}, fp32"
        self._ids: list[int] = []

    @override
    def read(self, ids: Sequence[int]) -> None:
        self._ids = list(ids)
        self._after()

    @override
    def step(self, id: int) -> np.ndarray:
        self._ids.append(id)
        return self._after()

    def _after(self) -> np.ndarray:
        ids = np.array([self._ids], dtype=np.int64)
        found: np.ndarray = self._session.run(None, {self._input: ids})[0][0, -1]
        return found

    @override
    def step_bytes(self, known: int) -> int:
        return self._file.stat().st_size

    @override
    def decoder(self) -> str:
        return "no cache"


def first_token(kind: str, prompt: Sequence[int], **options: object) -> dict[str, float]:
    """Let a fresh process load a side and compute the first logits; return what that took.

    Returns:
        ``seconds`` since the process was started, ``cpu_seconds``, ``rss_bytes`` then and
        ``peak_bytes`` until then, and ``base_bytes`` before the side was loaded.
    """
    command = [sys.executable, "-W", "ignore", "-m", "bench.sides", kind, json.dumps(options)]
    done = subprocess.run(
        [*command, "--first", json.dumps(list(prompt))],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": str(options["threads"])},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _first(program: type[Program], options: dict[str, Any], prompt: list[int]) -> None:
    import resource

    import psutil

    if program is not LlamaCpp:
        import torch  # noqa: F401  # what a library takes is no part of what a model takes
    process = psutil.Process()
    base_bytes = process.memory_info().rss
    loaded = program(**options)  # held until its memory was looked at
    loaded.read(prompt)
    used = process.cpu_times()
    found = {
        "seconds": time.time() - process.create_time(),
        "cpu_seconds": used.user + used.system,
        "base_bytes": base_bytes,
        "rss_bytes": process.memory_info().rss,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    print(json.dumps(found), flush=True)


KINDS: dict[str, type[Program]] = {
    "ours": Ours,
    "transformers": Transformers,
    "llama.cpp": LlamaCpp,
    "openvino": OpenVino,
    "onnxruntime": OnnxRuntime,
}


class Side:
    """A program in its own process, as the benchmark sees it."""

    def __init__(self, kind: str, **options: object) -> None:
        command = [sys.executable, "-W", "ignore", "-m", "bench.sides", kind, json.dumps(options)]
        environment = os.environ | {"OMP_NUM_THREADS": str(options["threads"])}
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        hello = self._answer()
        self.name, self.decoder = str(hello["name"]), str(hello["decoder"])

    def prefill_s(self, ids: Sequence[int]) -> tuple[float, float]:
        """Return the seconds, of the wall and of the CPU, from ids to the logits after them."""
        found = self._ask(do="prefill", ids=list(ids))
        return float(found["seconds"]), float(found["cpu_seconds"])

    def decode_s(self, prompt: Sequence[int], ids: Sequence[int]) -> tuple[float, float]:
        """Return the seconds of a token, wall and CPU, over ``ids`` behind a prompt."""
        found = self._ask(do="decode", prompt=list(prompt), ids=list(ids))
        return float(found["seconds"]), float(found["cpu_seconds"])

    def logprobs(self, ids: Sequence[int], folder: Path) -> np.ndarray:
        """Return what the side says after each of ``ids``, one decoded after the other: (T, V)."""
        file = folder / "logits.npy"
        self._ask(do="logits", ids=list(ids), file=str(file))
        logits = np.load(file).astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        """Return the tokens that the side itself would write."""
        return list(self._ask(do="greedy", prompt=list(prompt), count=count)["ids"])

    def step_bytes(self, known: int) -> int:
        """Return the bytes that a step behind so many tokens reads."""
        return int(self._ask(do="bytes", known=known)["bytes"])

    def ceiling(self) -> float:
        """Return the bytes a second that the machine was found to read; ours only."""
        return float(self._ask(do="ceiling")["bytes_per_s"])

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _ask(self, **order: object) -> dict[str, Any]:
        assert self._process.stdin is not None
        print(json.dumps(order), file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                found: dict[str, Any] = json.loads(line)
                return found
        raise SystemExit(f"A side ended with {self._process.wait()}; what it said stands above.")


def installed(package: str) -> bool:
    """Return whether a peer is there to be measured."""
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def pin(threads: int) -> None:
    """Keep this process, and all that it starts, on as many CPUs as there are threads."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def _serve(program: Program) -> None:
    def say(**answer: object) -> None:
        print(json.dumps(answer), flush=True)

    say(name=program.name, decoder=program.decoder())
    for line in sys.stdin:
        order = json.loads(line)
        if order["do"] == "prefill":
            began, worked = time.perf_counter(), time.process_time()
            program.read(order["ids"])
            seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - worked
            say(seconds=seconds, cpu_seconds=cpu_seconds)
        elif order["do"] == "decode":
            program.read(order["prompt"])
            began, worked, count = time.perf_counter(), time.process_time(), len(order["ids"])
            for id in order["ids"]:
                int(program.step(id).argmax())
            seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - worked
            say(seconds=seconds / count, cpu_seconds=cpu_seconds / count)
        elif order["do"] == "greedy":
            program.read(order["prompt"][:-1])
            ids = [order["prompt"][-1]]
            for _ in range(order["count"]):
                ids.append(int(program.step(ids[-1]).argmax()))
            say(ids=ids[1:])
        elif order["do"] == "logits":
            program.read(order["ids"][:1])
            np.save(order["file"], np.stack([program.step(id).copy() for id in order["ids"][1:]]))
            say(done=True)
        elif order["do"] == "bytes":
            say(bytes=program.step_bytes(order["known"]))
        elif order["do"] == "ceiling":
            assert isinstance(program, Ours)
            say(bytes_per_s=program.ceiling())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("options", type=json.loads)
    parser.add_argument("--first", type=json.loads, help="a prompt: load, read it, say the cost")
    chosen = parser.parse_args()
    if chosen.first:
        _first(KINDS[chosen.kind], chosen.options, chosen.first)
    else:
        _serve(KINDS[chosen.kind](**chosen.options))
