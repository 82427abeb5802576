"""Hugging Face directories: config.json and safetensors, for gpt2, llama, qwen2 and qwen3.

Only configs and safetensors headers are read to describe a model. Everything in the folder is
somebody else's word: sizes are bounded before they are believed, links may not lead out, remote
code is refused, and a pickle is never opened.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from gptcore.errors import InvalidSpec, InvalidWeights
from gptcore.spec import ModelSpec, RopeScaling
from gptcore.tokenizer import inside, read_json

if TYPE_CHECKING:
    import torch

TORCH_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
FLOATS = {"F32": "fp32", "BF16": "bf16", "F16": "fp16", "F64": "fp64"}
INTEGERS = {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1}
DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "BOOL": 1} | INTEGERS
"""What a safetensors header may say; only floats are weights, old files keep masks beside them."""
MAX_DIMENSIONS = 8
MAX_HEADER_BYTES = 32 * 2**20
MAX_FILES = 1000
LISTED = 40
"""Names in one message at most, where those of all layers count as one; the rest is counted."""
LAYER = re.compile(r"(?<=\.)\d{1,9}(?=\.)")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npz")
NOTE = "gptlab.json"
"""Our own file in a converted folder: what precision the weights had where they come from."""


@dataclass(frozen=True, slots=True)
class Inspected:
    """A directory whose files are consistent."""

    spec: ModelSpec
    files: tuple[Path, ...]
    source_precision: str


def inspect(directory: Path) -> Inspected:
    """Return spec and files of a directory after checking every tensor's name and shape.

    Raises:
        InvalidWeights, InvalidSpec: see ``weights.describe``.
    """
    spec = spec_of(read_config(directory))
    headers = {file: read_header(file) for file in weight_files(directory)}
    found: dict[str, dict[str, Any]] = {}
    for header in headers.values():
        found |= {name: one for full, one in header.items() if (name := bare(full, spec))}
    check_tensors(directory.name, spec, {name: one["shape"] for name, one in found.items()})
    kinds = {one["dtype"] for one in found.values()}
    if strange := sorted(kinds - FLOATS.keys()):
        raise InvalidWeights(
            f"{directory.name} has weights of type {', '.join(strange)}; "
            f"{', '.join(FLOATS)} can be read."
        )
    noted = read_json(directory, NOTE).get("source_precision")
    plain = "/".join(sorted(FLOATS[kind] for kind in kinds))
    return Inspected(spec, tuple(headers), noted if isinstance(noted, str) else plain)


def read_config(directory: Path) -> dict[str, Any]:
    """Return config.json, refused where it asks for code of its own."""
    config = read_json(directory, "config.json")
    if not config:
        raise InvalidWeights(f"{directory.name} has no config.json: add the model's own.")
    if "auto_map" in config or config.get("trust_remote_code"):
        raise InvalidWeights(
            f"{directory.name}/config.json asks to run code of its own (auto_map); such models "
            "are refused."
        )
    return config


def spec_of(config: Mapping[str, Any]) -> ModelSpec:
    """Return the shape that a Hugging Face config describes.

    Raises:
        InvalidSpec: another family, a missing or impossible value, or a variant we cannot compute.
    """
    family = config.get("model_type")
    readers = {
        "gpt2": _gpt2_fields,
        "llama": _llama_fields,
        "qwen2": _llama_fields,
        "qwen3": _llama_fields,
    }
    if not isinstance(family, str) or family not in readers:
        raise InvalidSpec(
            f"Models of type {str(family)[:60]!r} are not supported; these are: "
            f"{', '.join(readers)}."
        )
    try:
        return ModelSpec(family=family, **readers[family](config))
    except KeyError as error:
        raise InvalidSpec(f"config.json lacks {error.args[0]!r}.") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "shape"
        message = first["msg"].removeprefix("Value error, ")
        raise InvalidSpec(f"config.json, {where}: {message}.") from None
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise InvalidSpec(f"config.json holds a value of the wrong kind: {error}.") from None


def _gpt2_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    width, heads = config["n_embd"], config["n_head"]
    gelu = config.get("activation_function", "gelu_new")
    kinds = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "erf"}
    if gelu not in kinds:
        raise InvalidSpec(f"Activation {gelu!r} is not supported; use one of {', '.join(kinds)}.")
    if config.get("scale_attn_by_inverse_layer_idx") or not config.get("scale_attn_weights", True):
        raise InvalidSpec("This GPT-2 scales its attention in a way that is not supported.")
    if heads and width % heads:
        raise InvalidSpec(f"config.json: {heads} heads do not divide a width of {width}.")
    return {
        "layers": config["n_layer"],
        "heads": heads,
        "kv_heads": heads,
        "head_width": width // heads,
        "width": width,
        "hidden": config.get("n_inner") or 4 * width,
        "context": config["n_positions"],
        "vocabulary": config["vocab_size"],
        "gelu": kinds[gelu],
        "norm_eps": config.get("layer_norm_epsilon", 1e-5),
        "tied_head": config.get("tie_word_embeddings", True),
    }


def _llama_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    family, heads = config["model_type"], config["num_attention_heads"]
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise InvalidSpec(f"Activation {config['hidden_act']!r} is not supported; silu is.")
    if config.get("use_sliding_window"):
        raise InvalidSpec("Attention with a sliding window is not supported.")
    attention_bias = config.get("attention_bias", False)
    if family != "qwen2" and attention_bias:
        raise InvalidSpec("Biases on all attention projections of this family are not supported.")
    if config.get("mlp_bias"):
        raise InvalidSpec("Biases in the MLP of this family are not supported.")
    # Newer configs keep theta and scaling in one object, older ones beside each other.
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = rope.get("rope_theta", config.get("rope_theta", 10_000.0))
    return {
        "layers": config["num_hidden_layers"],
        "heads": heads,
        "kv_heads": config.get("num_key_value_heads") or heads,
        "head_width": config.get("head_dim") or config["hidden_size"] // heads,
        "width": config["hidden_size"],
        "hidden": config["intermediate_size"],
        "context": config["max_position_embeddings"],
        "vocabulary": config["vocab_size"],
        "norm": "rmsnorm",
        "position": "rotary",
        "mlp": "swiglu",
        "bias": False,
        "qkv_bias": family == "qwen2",
        "qk_norm": family == "qwen3",
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "rope_theta": theta,
        "rope_scaling": _rope_scaling(rope),
        "tied_head": config.get("tie_word_embeddings", False),
    }


def _rope_scaling(rope: Mapping[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise InvalidSpec(f"Rotary scaling of type {kind!r} is not supported; llama3 is.")
    return RopeScaling(
        factor=rope["factor"],
        low_freq_factor=rope["low_freq_factor"],
        high_freq_factor=rope["high_freq_factor"],
        original_context=rope["original_max_position_embeddings"],
    )


def weight_files(directory: Path) -> tuple[Path, ...]:
    """Return the safetensors files, those of the index where there is one.

    Raises:
        InvalidWeights: none, a shard is missing, or only pickles are there.
    """
    index = read_json(directory, "model.safetensors.index.json")
    if index:
        table = index.get("weight_map")
        if not isinstance(table, dict) or not table:
            raise InvalidWeights(f"{directory.name}: the index has no weight_map.")
        names = sorted({str(name) for name in table.values()})
        if len(names) > MAX_FILES:
            raise InvalidWeights(f"{directory.name}: {len(names)} shards; at most {MAX_FILES}.")
    elif inside(directory, "model.safetensors").is_file():
        names = ["model.safetensors"]
    else:
        pickles = [one.name for one in directory.iterdir() if one.suffix.lower() in PICKLES]
        raise InvalidWeights(
            f"{directory.name} has no model.safetensors"
            + (
                f", only {pickles[0]}, a pickle, which can run any code and is never opened: "
                "convert it to safetensors."
                if pickles
                else ": add the model's own."
            )
        )
    files = tuple(inside(directory, name) for name in names)
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise InvalidWeights(f"{directory.name}: {_listed(missing)} of the index is missing.")
    return files


def read_header(file: Path) -> dict[str, dict[str, Any]]:
    """Return the header of a safetensors file: name -> dtype, shape, data_offsets.

    Source: the safetensors format: 8 bytes of little-endian length, JSON, then the data.

    Raises:
        InvalidWeights: not safetensors, truncated, or a header beyond reason.
    """
    size = file.stat().st_size
    with file.open("rb") as opened:
        start = opened.read(8)
        if start[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK"):
            raise InvalidWeights(
                f"{file.name} is a pickle under another name; pickles are never opened."
            )
        if len(start) < 8:
            raise InvalidWeights(f"{file.name} has {size} bytes: it is empty or cut off.")
        (length,) = struct.unpack("<Q", start)
        if length > MAX_HEADER_BYTES or length + 8 > size:
            raise InvalidWeights(
                f"{file.name} claims a header of {length:,} bytes in a file of {size:,}: it is "
                "cut off, or no safetensors file."
            )
        text = opened.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        end = 8 + length
        for name, one in header.items():
            (begin, stop), shape, kind = one["data_offsets"], tuple(one["shape"]), one["dtype"]
            one["shape"] = shape
            if kind not in DTYPE_BYTES or len(shape) > MAX_DIMENSIONS:
                raise InvalidWeights(
                    f"{file.name}: {name[:80]!r} is of type {str(kind)[:20]!r} in "
                    f"{len(shape)} dimensions; that cannot be read."
                )
            if not 0 <= begin <= stop or stop - begin != math.prod(shape) * DTYPE_BYTES[kind]:
                raise InvalidWeights(
                    f"{file.name}: {name[:80]!r} has {stop - begin:,} bytes, which is not what "
                    "its shape takes."
                )
            end = max(end, 8 + length + stop)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InvalidWeights(f"{file.name} has a damaged header: {error}.") from None
    if end > size:
        raise InvalidWeights(
            f"{file.name} is cut off: {size:,} of {end:,} bytes are there. Fetch it again."
        )
    return dict(header)


def names_of(spec: ModelSpec) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Yield (our name, the checkpoint's name, the checkpoint's shape) of every tensor.

    GPT-2 keeps query, key and value in one Conv1D, whose weights lie transposed; there several
    of our names have one of the checkpoint's.
    """
    yield from (_gpt2_names(spec) if spec.family == "gpt2" else _llama_names(spec))


def _gpt2_names(spec: ModelSpec) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    d, m = spec.width, spec.hidden
    yield "embedding.weight", "wte.weight", (spec.vocabulary, d)
    yield "positions.weight", "wpe.weight", (spec.context, d)
    for i in range(spec.layers):
        ours, theirs = f"blocks.{i}.", f"h.{i}."
        for norm, name in (("attention_norm", "ln_1"), ("mlp_norm", "ln_2")):
            yield f"{ours}{norm}.weight", f"{theirs}{name}.weight", (d,)
            yield f"{ours}{norm}.bias", f"{theirs}{name}.bias", (d,)
        for part in "qkv":
            yield f"{ours}attention.{part}.weight", f"{theirs}attn.c_attn.weight", (d, 3 * d)
            yield f"{ours}attention.{part}.bias", f"{theirs}attn.c_attn.bias", (3 * d,)
        for module, name, shape in (
            ("attention.out", "attn.c_proj", (d, d)),
            ("mlp.up", "mlp.c_fc", (d, m)),
            ("mlp.down", "mlp.c_proj", (m, d)),
        ):
            yield f"{ours}{module}.weight", f"{theirs}{name}.weight", shape
            yield f"{ours}{module}.bias", f"{theirs}{name}.bias", shape[1:]
    yield "norm.weight", "ln_f.weight", (d,)
    yield "norm.bias", "ln_f.bias", (d,)
    if not spec.tied_head:
        yield "head.weight", "lm_head.weight", (spec.vocabulary, d)


def _llama_names(spec: ModelSpec) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    d, m, q, kv = spec.width, spec.hidden, spec.q_width, spec.kv_width
    yield "embedding.weight", "model.embed_tokens.weight", (spec.vocabulary, d)
    for i in range(spec.layers):
        ours, theirs = f"blocks.{i}.", f"model.layers.{i}."
        yield f"{ours}attention_norm.weight", f"{theirs}input_layernorm.weight", (d,)
        yield f"{ours}mlp_norm.weight", f"{theirs}post_attention_layernorm.weight", (d,)
        for part, rows in (("q", q), ("k", kv), ("v", kv)):
            name = f"{theirs}self_attn.{part}_proj"
            yield f"{ours}attention.{part}.weight", f"{name}.weight", (rows, d)
            if spec.qkv_bias:
                yield f"{ours}attention.{part}.bias", f"{name}.bias", (rows,)
        if spec.qk_norm:
            for part in "qk":
                name = f"{theirs}self_attn.{part}_norm.weight"
                yield f"{ours}attention.{part}_norm.weight", name, (spec.head_width,)
        yield f"{ours}attention.out.weight", f"{theirs}self_attn.o_proj.weight", (d, q)
        yield f"{ours}mlp.gate.weight", f"{theirs}mlp.gate_proj.weight", (m, d)
        yield f"{ours}mlp.up.weight", f"{theirs}mlp.up_proj.weight", (m, d)
        yield f"{ours}mlp.down.weight", f"{theirs}mlp.down_proj.weight", (d, m)
    yield "norm.weight", "model.norm.weight", (d,)
    if not spec.tied_head:
        yield "head.weight", "lm_head.weight", (spec.vocabulary, d)


def bare(name: str, spec: ModelSpec) -> str | None:
    """Return a checkpoint's tensor name as ``names_of`` has it, None where it is no weight.

    GPT-2 files come with and without the prefix ``transformer.``, and with masks.
    """
    if spec.family == "gpt2":
        name = name.removeprefix("transformer.")
        if name.endswith((".attn.bias", ".attn.masked_bias")):
            return None
    if name.endswith(".rotary_emb.inv_freq"):
        return None
    if spec.tied_head and name == "lm_head.weight":
        return None
    return name


def check_tensors(model: str, spec: ModelSpec, there: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse missing, extra and wrongly shaped tensors, all of them named.

    Args:
        model: for the message.
        spec: what the config promises.
        there: bare name -> shape.

    Raises:
        InvalidWeights: with the list.
    """
    expected = {theirs: shape for _, theirs, shape in names_of(spec)}
    missing = sorted(expected.keys() - there.keys())
    extra = sorted(there.keys() - expected.keys())
    wrong = [
        f"{name} is {there[name]}, not {shape}"
        for name, shape in expected.items()
        if name in there and there[name] != shape
    ]
    parts = [
        f"{len(names)} {what}: {_listed(names)}"
        for what, names in (("missing", missing), ("not known", extra), ("wrongly shaped", wrong))
        if names
    ]
    if parts:
        raise InvalidWeights(f"{model}: its tensors do not match its config. {'; '.join(parts)}.")


def tensors(
    directory: Path, spec: ModelSpec, dtype: torch.dtype, device: str, *, as_stored: bool = False
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (our name, tensor) in ``dtype`` on ``device``; mapped where nothing has to change.

    With ``as_stored``, which is for the CPU, matrices that lie as ours do stay mapped, in the type
    of the file.
    """
    from safetensors import SafetensorError, safe_open

    wanted: dict[str, list[str]] = {}
    for ours, theirs, _ in names_of(spec):
        wanted.setdefault(theirs, []).append(ours)
    try:
        for file in weight_files(directory):
            with safe_open(file, framework="pt", device="cpu") as opened:
                for full in opened.keys():  # noqa: SIM118  no mapping
                    name = bare(full, spec)
                    if name in wanted:
                        tensor = opened.get_tensor(full)
                        mapped = tensor.ndim == 2 and not _turned(wanted[name], tensor, spec)
                        if not (as_stored and mapped):
                            tensor = tensor.to(device=device, dtype=dtype)
                        yield from _ours(wanted[name], tensor, spec)
    except (SafetensorError, OSError) as error:
        raise InvalidWeights(f"{directory.name} cannot be read: {error}.") from None


def _ours(
    names: list[str], tensor: torch.Tensor, spec: ModelSpec
) -> Iterator[tuple[str, torch.Tensor]]:
    if _turned(names, tensor, spec):
        tensor = tensor.T.contiguous()
    yield from zip(names, tensor.chunk(len(names)), strict=True)


def _turned(names: list[str], tensor: torch.Tensor, spec: ModelSpec) -> bool:
    """Return whether the file has the matrix transposed: GPT-2's Conv1D keeps (in, out)."""
    projection = ".attention." in names[0] or ".mlp." in names[0]
    return spec.family == "gpt2" and projection and tensor.ndim == 2


def _listed(names: Sequence[str]) -> str:
    """Return all names, those that differ in their layer alone as one: ``h.{0-11}.ln_1.bias``."""
    layers: dict[tuple[str, ...], list[int]] = {}
    for name in names:
        before, *rest = LAYER.split(name[:200], maxsplit=1)
        number = LAYER.search(name[:200])
        layers.setdefault((before, *rest), []).extend([int(number[0])] if number else [])
    shown = [
        f"{parts[0]}{_ranges(numbers)}{parts[1]}" if numbers else parts[0]
        for parts, numbers in layers.items()
    ]
    more = f" and {len(shown) - LISTED} more" if len(shown) > LISTED else ""
    return ", ".join(shown[:LISTED]) + more


def _ranges(numbers: Sequence[int]) -> str:
    """Return numbers with runs drawn together: ``7``, or ``{0-3,5}``."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number <= runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    texts = [f"{first}" if first == last else f"{first}-{last}" for first, last in runs]
    more = ",…" if len(texts) > LISTED else ""
    return texts[0] if len(numbers) == 1 else f"{{{','.join(texts[:LISTED])}{more}}}"
