"""The Work that looks inside: one ``what`` at a time, its result small enough to be kept. No torch.

Every result holds ``text`` (the tokens that were looked at, see ``Excerpt``) and what is named in
the function that makes it; arrays come as ``packed.pack`` makes them.
"""

from __future__ import annotations

import base64
import gzip
import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict
from itertools import pairwise
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from gptcore.constraint import follows
from gptcore.errors import InvalidInput
from gptcore.explain.excerpt import Excerpt, excerpt
from gptcore.explain.packed import pack
from gptcore.recipe import Variant
from gptcore.records import (
    MAX_PROMPT_CHARS,
    MAX_SEED,
    Constraint,
    FinishReason,
    Message,
    Request,
    RunKind,
    Sampling,
    checked_text,
)
from gptcore.sampling import likeliest, stages
from gptcore.work import Desk, Loaded, Work

FREE_TEXTS = 5
"""Texts that are written without the rule beside those that are held to it."""
CANDIDATES = 12
"""Next tokens that an attribution offers to explain instead."""

What = Literal["attention", "lens", "attribution", "worth", "difference", "profile", "constraint"]
Method = Literal["both", "leave_one_out", "gradients"]


class Held(BaseModel):
    """Texts to write while they are held to a rule."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    constraint: Constraint
    temperature: float = Field(
        1.0, ge=0.0, le=2.0, title="Temperature", description="Of the draws under the rule."
    )
    texts: int = Field(8, ge=1, le=200, title="Texts", description="How many to write.")
    max_new_tokens: int = Field(
        96, ge=1, le=2048, title="New tokens", description="The most of one text."
    )
    seed: int = Field(
        0, ge=0, le=MAX_SEED, title="Seed", description="Of the first text; the others count on."
    )


class Explain(Work):
    """What happens inside a variant while it reads a text."""

    kind: ClassVar[RunKind] = RunKind.EXPLAIN

    what: What
    variant: Variant
    other: Variant | None = Field(None, description="The second variant of a difference.")
    prompt: str = Field(min_length=1, max_length=MAX_PROMPT_CHARS, title="Text")
    chat: bool = Field(False, description="Read the text as the first turn of a chat.")
    layer: int = Field(0, ge=0, title="Layer", description="Of the attention, from 0.")
    head: int = Field(0, ge=0, title="Head", description="Of the attention, from 0.")
    method: Method = Field("both", title="Method")
    steps: int = Field(
        64,
        ge=8,
        le=512,
        title="Steps",
        description="Points of integrated gradients between baseline and text.",
    )
    target_id: int | None = Field(
        None, ge=0, description="The token whose probability is explained; the likeliest if empty."
    )

    held: Held | None = Field(None, description="What a look at a constraint writes.")

    @field_validator("prompt")
    @classmethod
    def _encodable(cls, text: str) -> str:
        return checked_text(text, "text")

    @model_validator(mode="after")
    def _two_for_a_difference(self) -> Explain:
        if self.what == "difference" and self.other is None:
            raise ValueError("a difference needs a second variant: choose one")
        if self.what != "difference" and self.other is not None:
            raise ValueError("only a difference looks at a second variant")
        if (self.what == "constraint") != (self.held is not None):
            raise ValueError(
                "a look at a constraint needs the texts to write: give the constraint"
                if self.held is None
                else "only a look at a constraint writes texts"
            )
        return self

    def variants_used(self) -> tuple[Variant, ...]:
        """Return the one that is looked at, and the one that it is held against."""
        return (self.variant,) if self.other is None else (self.variant, self.other)

    def perform(self, desk: Desk) -> Mapping[str, Any]:
        """Look, and return what was seen."""
        return _LOOKS[self.what](self, desk, desk.load(self.variant))


def _text(work: Explain, loaded: Loaded, most: int, least: int = 2) -> Excerpt:
    return excerpt(loaded.engine, work.prompt, chat=work.chat, most=most, least=least)


def _attention(work: Explain, desk: Desk, loaded: Loaded) -> dict[str, Any]:
    """Return ``weights``, ``q``, ``k``, ``v`` and ``output`` of one head, and all heads' ``small``.

    ``disagreement`` is the largest of all layers; ``fused`` whether all of them were caught at the
    fused operation; ``characters`` has every head in numbers.
    """
    import torch

    from gptcore.explain import attention

    model = loaded.engine.model
    text = _text(work, loaded, attention.MOST_TOKENS)
    layers = len(model.blocks)
    if work.layer >= layers:
        raise InvalidInput(f"Layer {work.layer} was asked for; this model has 0 to {layers - 1}.")
    pictures: list[Any] = []
    characters: list[Any] = []
    disagreements: list[float] = []
    fused: list[bool] = []
    one: dict[str, Any] = {}

    def visit(layer: int, heads: attention.Heads) -> None:
        desk.phase("reading the text", (layer + 1) / layers)
        pictures.append(attention.small(heads.weights))
        characters.extend(asdict(one) for one in attention.characters(layer, heads.weights))
        disagreements.append(heads.disagreement)
        fused.append(heads.fused)
        if layer == work.layer:
            if work.head >= len(heads.q):
                raise InvalidInput(
                    f"Head {work.head} was asked for; layer {layer} has 0 to {len(heads.q) - 1}."
                )
            parts = ("weights", "q", "k", "v", "output")
            one.update({name: getattr(heads, name)[work.head] for name in parts})

    attention.look(model, text.ids, visit, check=desk.check)
    most = max(len(one) for one in pictures)  # a pass may leave layers with fewer heads
    size = pictures[0].shape[-1]
    padded = torch.zeros(layers, most, size, size)
    for layer, picture in enumerate(pictures):
        padded[layer, : len(picture)] = picture
    return {
        "text": text.as_json(),
        "layer": work.layer,
        "head": work.head,
        "heads": [len(one) for one in pictures],
        "head_width": one["q"].shape[-1],
        **{name: pack(tensor.float().cpu().numpy()) for name, tensor in one.items()},
        "small": pack((255 * padded).round().numpy(), "uint8"),
        "characters": characters,
        "disagreement": max(disagreements),
        "fused": all(fused),
    }


def _lens(work: Explain, desk: Desk, loaded: Loaded) -> dict[str, Any]:
    """Return, by depth and position, candidates with probabilities, and how far from the end."""
    import torch

    from gptcore.explain import lens

    text = _text(work, loaded, lens.MOST_TOKENS)
    desk.phase("reading the text")
    depths = lens.lens(loaded.engine.model, text.ids, check=desk.check)
    ids = torch.stack([one.ids for one in depths]).cpu()  # (L + 1, T, C)
    known = {id: loaded.engine.tokenizer.token_text(id) for id in set(ids.flatten().tolist())}

    def table(name: str) -> dict[str, Any]:
        return pack(torch.stack([getattr(one, name) for one in depths]).cpu().numpy())

    return {
        "text": text.as_json(),
        "ids": pack(ids.numpy(), "int32"),
        "words": {str(id): word for id, word in known.items()},
        **{
            name: table(name)
            for name in (
                "probabilities",
                "final_probability",
                "next_probability",
                "entropy_bits",
                "kl_nats",
            )
        },
    }


def _attribution(work: Explain, desk: Desk, loaded: Loaded) -> dict[str, Any]:
    """Return ``methods`` with scores and deletion curve each, and the curves of random orders.

    ``candidates`` are the likeliest next tokens; ``leads`` is the method to believe.
    """
    from gptcore.explain import attribution

    engine = loaded.engine
    text = _text(work, loaded, attribution.MOST_TOKENS)
    logits = engine.next_logits(text.ids)
    candidates = likeliest(logits, CANDIDATES)
    chances = stages(logits, Sampling(temperature=1.0))[0].probabilities(candidates)
    target = int(candidates[0]) if work.target_id is None else work.target_id
    if target >= engine.model.spec.vocabulary:
        raise InvalidInput(
            f"Token id {target} is not in the vocabulary of {engine.model.spec.vocabulary:,}."
        )

    def tell(phase: str) -> attribution.Tell:
        def told(ratio: float) -> None:
            desk.check()
            desk.phase(phase, ratio)

        return told

    methods: dict[str, dict[str, Any]] = {}
    result = {
        "text": text.as_json(),
        "target": {"id": target, "text": engine.tokenizer.token_text(target)},
        "candidates": [
            {"id": int(id), "text": engine.tokenizer.token_text(int(id)), "probability": float(p)}
            for id, p in zip(candidates, chances, strict=True)
        ],
        "log_probability": attribution.log_probability(engine.model, [text.ids], target)[0],
        "methods": methods,
        "gradients_problem": None,
    }
    if work.method != "gradients":
        methods["leave_one_out"] = {
            "scores": attribution.leave_one_out(
                engine.model, text.ids, target, tell=tell("leaving tokens out")
            )
        }
        desk.partial(result)
    if work.method != "leave_one_out":
        try:
            found = attribution.integrated_gradients(
                engine.model, text.ids, target, steps=work.steps, tell=tell("following gradients")
            )
        except InvalidInput as error:
            if work.method == "gradients":
                raise
            result["gradients_problem"] = str(error)
        else:
            methods["gradients"] = {
                "scores": found.scores,
                "completeness_error": found.completeness_error,
                "difference": found.difference,
                "reliable": found.reliable,
                "steps": found.steps,
            }
    orders = [attribution.by_score(one["scores"]) for one in methods.values()]
    orders += attribution.random_orders(len(text.ids))
    curves = attribution.deletion_curves(
        engine.model, text.ids, target, orders, tell=tell("taking tokens out")
    )
    for one, curve in zip(methods.values(), curves, strict=False):
        one["deletion"] = curve.probabilities
        one["deletion_mean"] = curve.mean
    random_curves = curves[len(methods) :]
    result["removed"] = curves[0].removed
    result["random"] = [one.probabilities for one in random_curves]
    result["random_mean"] = sum(one.mean for one in random_curves) / len(random_curves)
    reliable = methods.get("gradients", {}).get("reliable", False)
    first = next(iter(methods))
    result["leads"] = "gradients" if reliable else first
    return result


def _worth(work: Explain, desk: Desk, loaded: Loaded) -> dict[str, Any]:
    """Return ``loss`` of the whole model, and ``parts`` with what each head and layer is worth."""
    from gptcore.explain import worth

    text = _text(work, loaded, worth.MOST_TOKENS, least=8)
    result: dict[str, Any] = {"text": text.as_json(), "layers": len(loaded.engine.model.blocks)}

    def tell(ratio: float, found: list[worth.Worth]) -> None:
        desk.check()
        desk.phase("switching parts off", ratio)
        desk.partial({**result, "parts": [asdict(one) for one in found]})

    loss, found = worth.worth(loaded.engine.model, text.ids, tell=tell)
    return {**result, "loss": loss, "parts": [asdict(one) for one in found]}


def _difference(work: Explain, desk: Desk, loaded: Loaded) -> dict[str, Any]:
    """Return ``layers``, and by position ``kl_nats``, both likeliest tokens and probabilities."""
    from gptcore.explain import difference

    assert work.other is not None
    text = _text(work, loaded, difference.MOST_TOKENS)
    tokenizer = loaded.engine.tokenizer
    desk.phase("reading the text with the first")
    first = difference.trace(loaded.engine.model, text.ids, check=desk.check)
    del loaded  # there may be no room for both
    second = desk.load(work.other).engine
    if second.tokenizer.identity != tokenizer.identity:
        raise InvalidInput(
            f"{work.variant.model} and {work.other.model} cut text into other tokens: compare two "
            "variants of one model."
        )
    desk.phase("reading the text with the second")
    found = difference.difference(first, second.model, text.ids, check=desk.check)
    return {
        "text": text.as_json(),
        "layers": [asdict(one) for one in found.layers],
        "kl_nats": found.kl_nats.tolist(),
        "a": [tokenizer.token_text(id) for id in found.a_ids.tolist()],
        "b": [tokenizer.token_text(id) for id in found.b_ids.tolist()],
        "true_probabilities": found.true_probabilities.tolist(),
        "first_divergence": found.first_divergence,
        "same_top_ratio": found.same_top_ratio,
    }


def _profile(work: Explain, desk: Desk, loaded: Loaded) -> dict[str, Any]:
    """Return ``operations`` of a decode step, and ``trace``: gzip in base64 of Chrome's format."""
    from gptcore.explain import profile

    text = _text(work, loaded, profile.MOST_TOKENS, least=1)
    desk.phase("decoding under the profiler")
    found = profile.profile(loaded.engine.model, text.ids, check=desk.check)
    desk.measured("decode_step_s", found.native_s or found.plain_s)
    return {
        "text": text.as_json(),
        "operations": [asdict(one) for one in found.operations],
        "named": found.named,
        "step_s": found.step_s,
        "plain_s": list(found.plain_s),
        "native_s": list(found.native_s),
        "trace": base64.b64encode(gzip.compress(found.trace.encode(), mtime=0)).decode(),
    }


def _constraint(work: Explain, desk: Desk, loaded: Loaded) -> dict[str, Any]:
    """Return ``texts`` that were held to the rule, and a few that were not; and what holding costs.

    ``mask_s`` is the mean time a step spends on finding the tokens that may come, ``step_s`` the
    mean time of a whole step, both without a text's first token, whose step is the prefill.
    """
    held = work.held
    assert held is not None
    engine = loaded.engine
    read: list[int] = []
    costs: dict[str, float] = {"prepare_s": 0.0, "compile_s": 0.0}
    mask_s: list[float] = []
    steps: list[float] = []

    def written(seed: int, constraint: Constraint | None) -> dict[str, Any]:
        what: dict[str, Any] = {"prompt": work.prompt}
        if work.chat:
            what = {"messages": (Message(role="user", content=work.prompt),)}
        request = Request(
            **what,
            constraint=constraint,
            temperature=held.temperature,
            max_new_tokens=held.max_new_tokens,
            seed=seed,
            alternatives=0,
        )
        generation = engine.start(request, cancelled=stopped)
        tokens = list(generation)
        desk.check()
        read[:] = generation.prompt_ids
        text = "".join(token.text for token in tokens)
        if generation.guide is not None:
            costs["prepare_s"] += generation.guide.prepare_s
            costs["compile_s"] = max(costs["compile_s"], generation.guide.compile_s)
            mask_s.extend(generation.guide.mask_s[1:])
            steps.extend(b.seconds - a.seconds for a, b in pairwise(tokens))
        return {
            "text": text,
            "finished": generation.finish_reason is FinishReason.EOS,
            "follows": follows(held.constraint, text if constraint else text.strip()),
            "new_tokens": generation.new_tokens,
            "seed": seed,
        }

    def stopped() -> bool:
        desk.check()  # what it raises ends the text, and is raised again behind it
        return False

    held_texts: list[dict[str, Any]] = []
    free_texts: list[dict[str, Any]] = []

    def known() -> dict[str, Any]:
        texts = tuple(map(engine.tokenizer.token_text, read))
        return {
            "rule": held.constraint.name,
            **costs,
            "texts": list(held_texts),
            "free": list(free_texts),
            "text": Excerpt(tuple(read), texts).as_json(),
            "mask_s": statistics.fmean(mask_s) if mask_s else None,
            "step_s": statistics.fmean(steps) if steps else None,
        }

    for number in range(held.texts):
        desk.phase("writing under the rule", number / held.texts)
        held_texts.append(written(held.seed + number, held.constraint))
        desk.partial(known())
    for number in range(min(held.texts, FREE_TEXTS)):
        desk.phase("writing without it", number / FREE_TEXTS)
        free_texts.append(written(held.seed + number, None))
    return known()


_LOOKS: dict[str, Callable[[Explain, Desk, Loaded], Mapping[str, Any]]] = {
    "attention": _attention,
    "lens": _lens,
    "attribution": _attribution,
    "worth": _worth,
    "difference": _difference,
    "profile": _profile,
    "constraint": _constraint,
}
