"""The compiled step's C interface, mirrored in ctypes. Imports no torch."""

from __future__ import annotations

import ctypes
import functools
from ctypes import POINTER, c_char_p, c_float, c_int, c_int32, c_int64, c_uint32, c_void_p
from enum import IntEnum

from gptcore.kernels.build import NoKernels, library_path


class Format(IntEnum):
    """How the weights of a layer lie in memory; native/linear.hpp says it byte by byte."""

    FP32 = 0
    BF16 = 1
    INT8_ROWS = 2
    INT8_GROUPS = 3
    INT4 = 4


class Mlp(IntEnum):
    """What stands between the layers of an MLP."""

    SWIGLU = 0
    GELU_TANH = 1
    GELU_ERF = 2


class CLinear(ctypes.Structure):
    """``Linear`` of native/linear.hpp."""

    _fields_ = (
        ("weights", c_void_p),
        ("bias", c_void_p),
        ("rows", c_int64),
        ("columns", c_int64),
        ("format", c_int32),
        ("group", c_int32),
        ("activation_bits", c_int32),
    )


class CNorm(ctypes.Structure):
    """``Norm`` of native/step.cpp, as those below."""

    _fields_ = (
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("eps", c_float),
        ("centred", c_int32),
    )


class CBlock(ctypes.Structure):
    """One block's layers."""

    _fields_ = (
        ("attention_norm", CNorm),
        ("q", CLinear),
        ("k", CLinear),
        ("v", CLinear),
        ("out", CLinear),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("mlp_norm", CNorm),
        ("gate", CLinear),
        ("up", CLinear),
        ("down", CLinear),
    )


class CModel(ctypes.Structure):
    """All that does not change between two tokens."""

    _fields_ = (
        *((name, c_int64) for name in ("layers", "heads", "kv_heads", "head_width", "width")),
        ("vocabulary", c_int64),
        ("mlp", c_int32),
        ("cache_is_bf16", c_int32),
        ("qk_eps", c_float),
        ("embedding", CLinear),
        ("positions", CLinear),
        ("blocks", POINTER(CBlock)),
        ("norm", CNorm),
        ("head", CLinear),
    )


class CCall(ctypes.Structure):
    """One token of a call."""

    _fields_ = (
        ("id", c_int64),
        ("position", c_int64),
        ("capacity", c_int64),
        ("layer_stride", c_int64),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("logits", c_void_p),
    )


FUNCTIONS = {
    "gpt_isa": (c_char_p, ()),
    "gpt_open": (c_void_p, (POINTER(CModel),)),
    "gpt_close": (None, (c_void_p,)),
    "gpt_most_tokens": (c_int, ()),
    "gpt_step": (c_int, (c_void_p, POINTER(CCall), c_int64, c_int)),
    "gpt_linear": (c_int, (POINTER(CLinear), c_void_p, c_int, c_int64, c_void_p, c_int)),
    "gpt_packed_bytes": (c_int64, (c_int, c_int64, c_int64, c_int)),
    "gpt_pack": (
        None,
        (c_int, c_int64, c_int64, c_int, c_void_p, c_int, c_void_p, c_void_p, c_void_p, c_int),
    ),
    "gpt_unpack": (None, (POINTER(CLinear), c_void_p, c_void_p, c_void_p, c_int)),
    "gpt_rows": (None, (POINTER(CLinear), c_void_p, c_int64, c_void_p)),
    "gpt_large_pages": (None, (c_void_p, c_int64)),
    "gpt_added_up": (c_uint32, (c_void_p, c_int64, c_int)),
}


@functools.cache
def _loaded() -> ctypes.CDLL | str:
    """Return the library, or why there is none; asked once a process."""
    try:
        found = ctypes.CDLL(str(library_path()))
    except NoKernels as error:
        return str(error)
    except OSError as error:
        return f"The compiled step cannot be loaded: {error}"
    for name, (result, arguments) in FUNCTIONS.items():
        function = getattr(found, name)
        function.restype, function.argtypes = result, arguments
    return found


def unavailable() -> str | None:
    """Return why the native step cannot be used here, in a sentence, or None; builds it first."""
    found = _loaded()
    return found if isinstance(found, str) else None


def library() -> ctypes.CDLL:
    """Return the loaded library; ``unavailable`` was asked before."""
    found = _loaded()
    assert not isinstance(found, str), found
    return found


def instruction_set() -> str:
    """Return the instructions that the library was compiled for, as a person calls them."""
    name: bytes = library().gpt_isa()
    return name.decode()
