"""What the optimize page keeps: a draft in the session, and its place in the address."""

from __future__ import annotations

from typing import Any, Literal

import streamlit as st
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gptcore.lab import (
    FULL_CELLS,
    QUICK_CELLS,
    QUICK_PAIRS,
    Estimate,
    Goals,
    Lab,
    Optimize,
    Prove,
)
from gptcore.passes.base import Pass
from gptcore.recipe import Calibration, Recipe, Variant, recipe_from_text
from gptcore.records import RunKind
from pages.parts import errors, settings
from pages.parts.kept import Kept
from pages.parts.shown_run import Shown

PROOF = Shown("optimize_run", "proof", "proof", (RunKind.OPTIMIZE, RunKind.PROVE))
PRECISIONS: tuple[Literal["fp32", "bf16", "fp16"], ...] = ("fp32", "bf16", "fp16")
"""In the order in which a recipe is tried on them."""


class Draft(BaseModel):
    """Everything that decides what is made and how it is proven; the model is the sidebar's."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    recipe: Recipe = Field(default_factory=lambda: recipe_from_text("int8"))
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    name: str = Field("", max_length=100)
    thoroughness: Literal["full", "quick"] = "full"
    goals: Goals = Goals()

    def variant(self, lab: Lab) -> Variant:
        """Return the sidebar's model with this recipe, on a precision that its passes can use.

        Raises:
            UnknownModel, InvalidInput, DeviceAbsent: with the way out.
        """
        chosen = settings.current()
        wanted = PRECISIONS if self.precision == "auto" else (self.precision,)
        found = [
            lab.variant(chosen.model, one, chosen.device, chosen.threads, self.recipe)
            for one in wanted
        ]
        return next((one for one in found if one.blocked_by is None), found[0])

    def baseline(self, lab: Lab) -> Variant:
        """Return what the variant is held against: the sidebar's model as it is, in fp32.

        Raises:
            UnknownModel, InvalidInput, DeviceAbsent: with the way out.
        """
        chosen = settings.current()
        return lab.variant(chosen.model, "fp32", chosen.device, chosen.threads)

    def proof(self, lab: Lab) -> Prove:
        """Return the proof that is wanted."""
        full = self.thoroughness == "full"
        pairs = Prove.model_fields["pairs"].default if full else QUICK_PAIRS
        return Prove(
            baseline=self.baseline(lab),
            variant=self.variant(lab),
            cells=FULL_CELLS if full else QUICK_CELLS,
            pairs=pairs,
            tasks=full,
            goals=self.goals,
        )

    def work(self, lab: Lab) -> Optimize | Prove:
        """Return what to do: make, keep and prove; or only prove where a precision is all."""
        proof = self.proof(lab)
        if not self.recipe.passes:
            return proof
        return Optimize(variant=proof.variant, name=self.name or free_name(lab, self), proof=proof)


def free_name(lab: Lab, draft: Draft) -> str:
    """Return a name for the result that nothing in the catalogue has."""
    model = settings.current().model
    return lab.catalogue.free_name(
        "-".join([model, *(one.name for one in draft.recipe.passes)])[:80]
    )


_kept = Kept(Draft, key="optimize", address="o", what="recipe")
current, change, write_address = _kept.current, _kept.change, _kept.write_address


def change_recipe(passes: list[Pass], calibration: Calibration | None = None) -> None:
    """Take another list of passes, or another calibration text."""
    kept = calibration or current().recipe.calibration
    try:
        recipe = Recipe(passes=tuple(passes), calibration=kept)
    except ValidationError as error:
        settings.say(errors.sentence(error))
        return
    change(recipe=recipe)


def estimate_of(lab: Lab, variant: Variant) -> dict[str, Any] | None:
    """Return the seconds that a recipe will take, trying it small once a session where idle.

    None while it is being tried, or where nothing can be told.
    """
    known: dict[str, str] = st.session_state.setdefault("estimates", {})
    if variant.hash not in known:
        running, waiting = lab.queue()
        if running or waiting:
            return None
        known[variant.hash] = lab.start(Estimate(variant=variant))
    found = lab.snapshot(known[variant.hash])
    return dict(found.run.result) if found and found.run.result else None
