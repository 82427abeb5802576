"""Recipes to begin with, three of them after what published case studies set out to reach.

The goals are those of the studies; what a recipe reaches here is measured, and shown beside them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from gptcore.optimize.proof import Goals
from gptcore.recipe import Recipe, recipe_from_text


@dataclass(frozen=True, slots=True)
class Ready:
    """A recipe with a name and what it is for."""

    name: str
    about: str
    recipe: Recipe
    precision: str
    """Under the passes."""
    goals: Goals = field(default_factory=Goals)


READY = (
    Ready(
        "8 bits",
        "Weights and activations in 8 bits: the first thing to try on a CPU.",
        recipe_from_text("int8"),
        "fp32",
    ),
    Ready(
        "Half the size, 30 % quicker",
        "8-bit weights and activations. Goal: half of the bytes, and a response in at most 70 % of "
        "the time.",
        recipe_from_text("int8"),
        "fp32",
        Goals(stored_at_most=0.5, response_at_most=0.7),
    ),
    Ready(
        "40 % less time",
        "Two layers dropped, the rest in 8 bits. Goal: a response in at most 60 % of the time.",
        recipe_from_text("drop_layers(layers=2), int8"),
        "fp32",
        Goals(response_at_most=0.6),
    ),
    Ready(
        "60 % smaller, twice as fast",
        "4-bit weights by GPTQ, the embedding with them. Goal: 40 % of the bytes, twice the tokens "
        "a second.",
        recipe_from_text("int4(method='gptq', embedding=True)"),
        "bf16",
        Goals(stored_at_most=0.4, decode_speedup_at_least=2.0),
    ),
)
