"""A model's native step: what torch's forward pass computes for a token or a few, in one call.

It reads and writes the same ``KVCache`` as torch, so that a text may be read by the one and
continued by the other.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from gptcore.errors import ContextOverflow
from gptcore.kernels.library import (
    CBlock,
    CCall,
    CLinear,
    CModel,
    CNorm,
    Format,
    Mlp,
    instruction_set,
    library,
    unavailable,
)
from gptcore.kernels.linear import DTYPES, NativeEmbedding, NativeLinear, take_over
from gptcore.model import GPT, Block, KVCache, local, rotary_tables

FEW_TOKENS: dict[torch.dtype | str, int] = {"packed": 64, torch.bfloat16: 64, torch.float32: 24}
"""Tokens that were read faster by the step than by torch, by what the weights are.

Measured with SmolLM2 behind 64 tokens, with AVX-512, on one thread and on two: 24 tokens in fp32 96
and 50 ms, by torch 103 and 61; 48 in fp32 186 and 101, by torch 137 and 89; 64 in bf16 202 and 123,
by torch 206 and 144; 96 in bf16 296 and 211, by torch 252 and 196.
"""


class Unsupported(Exception):
    """The step does not know this model; the text says what, in a sentence."""


class _Place(NamedTuple):
    """Where a token is read to: a position of one of a cache's texts."""

    cache: KVCache
    row: int
    position: int


class NativeStep:
    """One model's decode step. Weights stay where the model has them.

    Raises:
        Unsupported: a part of the model is of a kind that the step does not know.
    """

    def __init__(self, model: GPT) -> None:
        self.name = f"native step, {instruction_set()}"
        packed = any(isinstance(one, NativeLinear) for one in model.modules())
        self.exact = packed
        """Whether all tokens are read here: their bits do not depend on what is read with them."""
        self.few_tokens = FEW_TOKENS.get("packed" if packed else _dtype(model), 0)
        """Up to so many tokens at once are read faster here than by torch."""
        self.most_tokens = int(library().gpt_most_tokens())
        """Tokens for which the weights are read once."""
        self._model = weakref.ref(model)
        self._kept: list[Tensor] = []
        """What the structs point to."""
        self._signature = _signature(model)
        self._checked: weakref.WeakSet[KVCache] = weakref.WeakSet()
        self._cos, self._sin = torch.empty(0), torch.empty(0)
        blocks = cast("Iterable[Block]", model.blocks)
        self._blocks = (CBlock * len(model.blocks))(*map(self._block, blocks))
        self._struct = self._described(model)
        self._session = library().gpt_open(ctypes.byref(self._struct))
        if not self._session:
            raise MemoryError("out of memory for the native step")
        weakref.finalize(self, library().gpt_close, self._session)

    def takes(self, cache: KVCache, *, texts: int = 1) -> bool:
        """Return whether this cache, of so many texts, and the model as it is can be continued.

        The model is looked over once a cache, since a generation does not change it.
        """
        if cache.k.shape[1] != texts:
            return False
        if cache in self._checked:
            return True
        model = self._model()
        fits = (
            type(cache) is KVCache
            and model is not None
            and cache.k.dtype == _dtype(model)
            and cache.k.is_contiguous()
            and _signature(model) == self._signature
        )
        if fits:
            self._checked.add(cache)
        return fits

    def __call__(self, id: int, cache: KVCache) -> Tensor:
        """Read one token into ``cache`` and return the logits after it: (V,) float32.

        Raises:
            ContextOverflow: the cache or the context is full.
        """
        return self.read((id,), cache)[0]

    def read(self, ids: Sequence[int], cache: KVCache, *, last_only: bool = False) -> Tensor:
        """Read T ≥ 1 tokens into ``cache``, the weights once for ``most_tokens`` of them.

        Every token gets the bits that it would get alone.

        Returns:
            (T, V) float32, or (1, V) with ``last_only``.

        Raises:
            ContextOverflow: they do not fit; nothing was read then.
        """
        found = list(self.read_on(ids, cache, last_only=last_only))
        return found[-1] if last_only or len(found) == 1 else torch.cat(found)

    def read_on(
        self,
        ids: Sequence[int],
        cache: KVCache,
        *,
        last_only: bool = False,
        at_once: int | None = None,
    ) -> Iterator[Tensor]:
        """Read as ``read`` does, and yield the logits of each call of the library as it is done.

        A call has ``at_once`` tokens, as many as there may be if that is None.
        """
        self._room(cache, len(ids))
        size = min(at_once or self.most_tokens, self.most_tokens)
        for begin in range(0, len(ids), size):
            some = ids[begin : begin + size]
            ends = begin + len(some) == len(ids)
            wanted = (1 if ends else 0) if last_only else len(some)
            places = [_Place(cache, 0, cache.length + i) for i in range(len(some))]
            logits = self._run(some, places, wanted)
            cache.length += len(some)
            yield logits

    def batch(self, ids: Sequence[int], caches: Sequence[KVCache]) -> Tensor:
        """Read one token into each of B caches, the weights once for ``most_tokens`` of them.

        Every text gets the bits that it would get alone.

        Returns:
            The logits after each, (B, V) float32.

        Raises:
            ContextOverflow: a cache or the context is full; nothing was read then.
        """
        assert len({id(one) for one in caches}) == len(caches), "one cache, one token"
        for cache in caches:
            self._room(cache, 1)
        found = self._side_by_side(ids, [_Place(cache, 0, cache.length) for cache in caches])
        for cache in caches:
            cache.length += 1
        return found

    def rows(self, ids: Sequence[int], cache: KVCache) -> Tensor:
        """Read one token into each of the B texts of one cache; otherwise as ``batch``."""
        self._room(cache, 1)
        places = [_Place(cache, row, cache.length) for row in range(len(ids))]
        found = self._side_by_side(ids, places)
        cache.length += 1
        return found

    def _side_by_side(self, ids: Sequence[int], places: Sequence[_Place]) -> Tensor:
        found = []
        for begin in range(0, len(ids), self.most_tokens):
            some = slice(begin, begin + self.most_tokens)
            found.append(self._run(ids[some], places[some], len(ids[some])))
        return found[0] if len(found) == 1 else torch.cat(found)

    def _room(self, cache: KVCache, tokens: int) -> None:
        """Raise ContextOverflow where so many more tokens do not fit."""
        model = self._model()
        assert model is not None
        room = min(model.spec.context, cache.capacity)
        if (end := cache.length + tokens) > room:
            raise ContextOverflow(f"{end:,} positions do not fit into {room:,}: shorten the text.")

    def _run(self, ids: Sequence[int], places: Sequence[_Place], wanted: int) -> Tensor:
        """Read tokens, each at its place, and return the logits of the last ``wanted``."""
        model = self._model()
        assert model is not None
        spec, rotary = model.spec, model.spec.position == "rotary"
        for token in ids:
            if not 0 <= token < spec.vocabulary:
                raise IndexError(
                    f"token id {token} is not in the vocabulary of {spec.vocabulary:,}"
                )
        if rotary:
            self._tables(max(one.position for one in places) + 1)
        logits = torch.empty(wanted, spec.vocabulary)
        calls = (CCall * len(ids))()
        for at, (call, token, place) in enumerate(zip(calls, ids, places, strict=True)):
            cache = place.cache
            offset = place.row * cache.k.stride(1) * cache.k.element_size()
            call.id, call.position = token, place.position
            call.capacity, call.layer_stride = cache.capacity, cache.k.stride(0)
            call.keys, call.values = cache.k.data_ptr() + offset, cache.v.data_ptr() + offset
            if rotary:
                call.cos, call.sin = self._angles(place.position)
            if (line := at - len(ids) + wanted) >= 0:
                call.logits = logits[line].data_ptr()
        if library().gpt_step(self._session, calls, len(ids), torch.get_num_threads()):
            raise MemoryError("out of memory in the native step")
        return logits

    def _tables(self, positions: int) -> None:
        """Have the angles of so many positions."""
        if positions > self._cos.shape[0]:
            model = self._model()
            assert model is not None
            size = min(model.spec.context, max(256, 1 << (positions - 1).bit_length()))
            self._cos, self._sin = rotary_tables(model.spec, size)

    def _angles(self, position: int) -> tuple[int, int]:
        """Return where cos and sin of that position lie, each (D,) float32."""
        at = position * self._cos.stride(0) * self._cos.element_size()
        return self._cos.data_ptr() + at, self._sin.data_ptr() + at

    def _described(self, model: GPT) -> CModel:
        spec, dtype = model.spec, _dtype(model)
        if dtype not in DTYPES:
            raise Unsupported(f"it computes in fp32 and bf16, not in {dtype}.")
        if spec.mlp == "swiglu":
            mlp = Mlp.SWIGLU
        else:
            mlp = Mlp.GELU_TANH if spec.gelu == "tanh" else Mlp.GELU_ERF
        learned = spec.position == "learned"
        return CModel(
            layers=len(model.blocks),
            heads=spec.heads,
            kv_heads=spec.kv_heads,
            head_width=spec.head_width,
            width=spec.width,
            vocabulary=spec.vocabulary,
            mlp=mlp,
            cache_is_bf16=dtype == torch.bfloat16,
            qk_eps=spec.norm_eps,
            embedding=self._table(model.embedding),
            positions=self._table(model.positions) if learned else CLinear(),
            blocks=self._blocks,
            norm=self._norm(model.norm),
            head=self._linear(model.head, "head", spec.vocabulary, spec.width),
        )

    def _table(self, module: nn.Module) -> CLinear:
        if isinstance(module, NativeEmbedding):
            return module.layer.described()
        if type(module) is not nn.Embedding or module.weight.dtype not in DTYPES:
            raise Unsupported(f"it does not know an embedding of the kind {type(module).__name__}.")
        return self._floats(module.weight)

    def _floats(self, weight: Tensor) -> CLinear:
        bf16 = weight.dtype == torch.bfloat16
        return CLinear(
            weights=self._pointer(weight),
            rows=weight.shape[0],
            columns=weight.shape[1],
            format=Format.BF16 if bf16 else Format.FP32,
        )

    def _block(self, block: Block) -> CBlock:
        spec, attention, mlp = block.attention.spec, block.attention, block.mlp
        hidden = _rows(mlp.up)
        norms = (attention.q_norm, attention.k_norm) if spec.qk_norm else (None, None)
        q_norm, k_norm = (None if one is None else self._float(one.weight) for one in norms)
        return CBlock(
            attention_norm=self._norm(block.attention_norm),
            q=self._linear(attention.q, "q", spec.q_width, spec.width),
            k=self._linear(attention.k, "k", spec.kv_width, spec.width),
            v=self._linear(attention.v, "v", spec.kv_width, spec.width),
            out=self._linear(attention.out, "out", spec.width, spec.q_width),
            q_norm=q_norm,
            k_norm=k_norm,
            mlp_norm=self._norm(block.mlp_norm),
            gate=self._linear(mlp.gate, "gate", hidden, spec.width) if mlp.swiglu else CLinear(),
            up=self._linear(mlp.up, "up", hidden, spec.width),
            down=self._linear(mlp.down, "down", spec.width, hidden),
        )

    def _linear(self, module: nn.Module, name: str, rows: int, columns: int) -> CLinear:
        if isinstance(module, NativeLinear):
            found = module.described()
        elif type(module) is nn.Linear and module.weight.dtype in DTYPES:
            found = self._floats(module.weight)
            found.bias = None if module.bias is None else self._float(module.bias)
        else:
            raise Unsupported(f"it does not know a layer of the kind {type(module).__name__}.")
        if (found.rows, found.columns) != (rows, columns):
            raise Unsupported(
                f"a layer {name} is {found.rows} × {found.columns}, not {rows} × {columns}."
            )
        return found

    def _norm(self, module: nn.Module) -> CNorm:
        if not isinstance(module, nn.LayerNorm | nn.RMSNorm):
            raise Unsupported(f"it does not know a norm of the kind {type(module).__name__}.")
        bias = getattr(module, "bias", None)
        return CNorm(
            weight=self._float(module.weight),
            bias=None if bias is None else self._float(bias),
            eps=module.eps,
            centred=isinstance(module, nn.LayerNorm),
        )

    def _float(self, small: Tensor) -> int:
        """Return where a float32 copy of a norm's or bias's numbers lies."""
        return self._pointer(small.detach().float())

    def _pointer(self, tensor: Tensor) -> int:
        """Return where a tensor lies, which is kept as long as this step."""
        if local(tensor) is not tensor:
            raise Unsupported("the model is split over processes.")
        if not tensor.is_contiguous():
            raise Unsupported("a weight does not lie in one piece.")
        self._kept.append(tensor)
        return tensor.data_ptr()


def adopt(model: GPT) -> NativeStep | str:
    """Return the model's native step, or in a sentence why torch decodes.

    What a pass quantized is moved into the step's format, a layer at a time, with the same
    numbers.
    """
    _STEPS.pop(model, None)
    if (device := next(model.norm.parameters()).device.type) != "cpu":
        return f"the native step is for CPUs, not for {device}."
    if not model.native:
        return "the recipe leaves the native step out."
    if reason := unavailable():
        return reason
    take_over(model)
    try:
        _STEPS[model] = NativeStep(model)
    except Unsupported as error:
        return str(error)
    return _STEPS[model]


def step_of(model: GPT) -> NativeStep | None:
    """Return the step that ``adopt`` made for a model, if it made one."""
    return _STEPS.get(model)


_STEPS: weakref.WeakKeyDictionary[GPT, NativeStep] = weakref.WeakKeyDictionary()


def _rows(module: nn.Module) -> int:
    if isinstance(module, NativeLinear):
        return module.rows
    if not isinstance(module, nn.Linear):
        raise Unsupported(f"it does not know a layer of the kind {type(module).__name__}.")
    return module.out_features


def _dtype(model: GPT) -> torch.dtype:
    """Return the type of the model's activations, and so of its cache."""
    return cast(Tensor, model.norm.weight).dtype


def _signature(model: GPT) -> tuple[object, ...]:
    """Return what changes when a layer is replaced, written to or given a hook."""
    found: list[object] = []
    for module in model.modules():
        hooks = len(module._forward_hooks) + len(module._forward_pre_hooks)
        found.append((id(module), hooks))
        for one in module.parameters(recurse=False):
            found.append((one.data_ptr(), 0 if one.is_inference() else one._version))
    return tuple(found)
