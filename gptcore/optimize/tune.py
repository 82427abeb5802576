"""Search over recipes by Optuna: which passes, with which settings, under which limits.

A study lives in a database of its own (``tune.db`` in the data folder), which ``optuna-dashboard``
opens too. Every trial makes a variant, measures it and lets it go; what was killed in between is
lost, and a study of the same name goes on behind its last trial. Speed is noisy, so the best few
are measured again in turn before one is called best.
"""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from gptcore.errors import Cancelled, GptcoreError, InvalidInput, StoreError
from gptcore.measure.calibration import with_text
from gptcore.measure.compare import SIDES, Compare
from gptcore.measure.corpora import EVALUATION, evaluation_text
from gptcore.measure.divergence import compare as compare_logits
from gptcore.measure.energy import EnergyMeter
from gptcore.measure.perplexity import Passage, Windowing, model_logits, passage
from gptcore.measure.statistics import StopRule
from gptcore.measure.timing import Cell, once
from gptcore.optimize.bits import BitScan, damages_from_text, damages_to_text
from gptcore.optimize.pareto import unbeaten
from gptcore.optimize.part import Part
from gptcore.passes.registry import pass_from_json, passes
from gptcore.passes.sensitivity import Damage
from gptcore.paths import data_dir
from gptcore.recipe import Recipe, Variant
from gptcore.records import MAX_SEED, RunKind
from gptcore.sentences import sentence
from gptcore.work import Desk, Work

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial, Trial
    from torch import Tensor

Objective = Literal["kl", "tokens_per_s", "stored_bytes", "joules"]
OBJECTIVES: Mapping[Objective, tuple[str, str]] = {
    "kl": ("minimize", "KL to the baseline, nats a token"),
    "tokens_per_s": ("maximize", "Decoded tokens a second"),
    "stored_bytes": ("minimize", "Bytes on disk"),
    "joules": ("minimize", "Joules a token"),
}
LEAVE = 0
"""Bits that leave layers as other entries have them."""
CELL = Cell(prompt_tokens=32, new_tokens=24)
REPETITIONS = 5
"""Decodes whose median is a trial's speed."""
CONFIRMED = 3
"""Trials that are measured again in turn."""
LEAST_TRIALS = 8
"""Before so many nothing is said of which setting matters."""
WINDOW = 256
MAX_KEPT_LOGITS_BYTES = 512 * 2**20
"""Of the baseline's, which every trial is held against."""


class Knob(BaseModel):
    """One setting that is searched: a field of a pass with its choices, or a range."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    technique: str = Field(max_length=100)
    """Name of the pass."""
    field: str = Field("", max_length=100)
    """Of the pass; empty asks whether the pass is in the recipe at all."""
    layers: str = Field("", max_length=200)
    """For ``mixed_bits``: the layers whose bits are searched, such as ``*.mlp.down``. With a range
    it is how much more than a scan said their damage counts, in powers of two."""
    choices: tuple[str | int | float | bool, ...] = Field((), max_length=100)
    low: float | None = None
    high: float | None = None

    @model_validator(mode="after")
    def _searchable(self) -> Knob:
        if self.technique not in passes():
            raise ValueError(
                f"there is no pass {self.technique!r}; there are: {', '.join(passes())}"
            )
        fields = passes()[self.technique].model_fields
        if self.field and self.field not in fields:
            raise ValueError(f"{self.technique} has no field {self.field!r}: {', '.join(fields)}")
        if self.layers and self.technique != "mixed_bits":
            raise ValueError(f"{self.technique} does not give layers bits of their own")
        ranged = self.low is not None and self.high is not None
        if (self.field or self.layers) and not self.choices and not ranged:
            raise ValueError(f"{self.name} has neither choices nor a range: give one")
        if ranged and not (self.low or 0.0) < (self.high or 0.0):
            raise ValueError(f"the range of {self.name} is empty: {self.low} to {self.high}")
        return self

    @property
    def weighs(self) -> bool:
        """Whether it says how much the damage of some layers counts, when bits are dealt out."""
        return bool(self.layers) and not self.choices

    @property
    def name(self) -> str:
        """The parameter's name in the study."""
        return ".".join(filter(None, (self.technique, self.field or self.layers or "used")))


class Limits(BaseModel):
    """What a trial must keep to; one that does not is kept in the study and never best."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    kl_at_most: float | None = Field(None, ge=0.0, title="KL at most", description="Nats a token.")
    stored_at_most: float | None = Field(
        None, gt=0.0, title="Size at most", description="On disk, times the baseline's."
    )
    tokens_per_s_at_least: float | None = Field(
        None, gt=0.0, title="Tokens/s at least", description="Decoded, one sequence."
    )


class Tune(Work):
    """Search recipes for a model."""

    kind: ClassVar[RunKind] = RunKind.TUNE

    baseline: Variant
    variant: Variant
    """Model and placement of the trials, with the passes that all of them have."""
    knobs: tuple[Knob, ...] = Field(min_length=1, max_length=100)
    objectives: tuple[Objective, ...] = Field(("kl", "stored_bytes"), min_length=1, max_length=3)
    limits: Limits = Limits()
    trials: int = Field(30, ge=1, le=10_000, title="Trials", description="In all, of this study.")
    minutes: float | None = Field(
        None, gt=0.0, le=10_000.0, title="Minutes", description="No trial begins after so many."
    )
    study: str = Field(
        "", max_length=200, title="Study", description="Goes on where one of this name ended."
    )
    text: str = Field(EVALUATION, min_length=1, max_length=4096, title="Text")
    tokens: int = Field(
        768, ge=64, le=100_000, title="Tokens", description="Of the text, for a trial's KL."
    )
    start: tuple[Mapping[str, str | int | float | bool], ...] = Field(
        (), max_length=100, description="Settings to try first, by the knobs' names."
    )
    seed: int = Field(0, ge=0, le=MAX_SEED, title="Seed")
    scan: BitScan = BitScan()
    """Of the layers, where knobs weigh their damages; else nothing is scanned."""

    @model_validator(mode="after")
    def _consistent(self) -> Tune:
        names = [one.name for one in self.knobs]
        if len(set(names)) < len(names):
            raise ValueError("two knobs turn the same setting: leave one out")
        if len({one.weighs for one in self.knobs if one.layers}) > 1:
            raise ValueError(
                "some layers have bits to choose from and others a weight: bits are dealt out to "
                "all layers or to none"
            )
        if len(set(self.objectives)) < len(self.objectives):
            raise ValueError("an objective stands twice: leave one out")
        if self.baseline.placement.device != self.variant.placement.device:
            raise ValueError("baseline and trials are on two devices: put both on the same")
        return self

    @property
    def deals_bits(self) -> bool:
        """Whether a scan of the layers comes first."""
        return any(one.weighs for one in self.knobs)

    def variants_used(self) -> tuple[Variant, ...]:
        """Return the trials' start, and the baseline."""
        return (self.variant, self.baseline)

    def perform(self, desk: Desk) -> Mapping[str, Any]:
        """Search, and return ``trials``, ``front``, ``importances``, ``confirmed``, ``winner``.

        Where bits are dealt out, ``uniform`` is what the same bits for all layers give.

        Raises:
            InvalidInput: the text is too short, or the study is one of other objectives.
            StoreError: the study's database cannot be used.
        """
        with _quiet():
            return _Search(self, desk).run()


class _Search:
    def __init__(self, work: Tune, desk: Desk) -> None:
        self._work = work
        self._desk = desk
        self._study = _study(work)
        text = evaluation_text(work.text, paths=True)
        loaded = desk.load(work.baseline)
        window = min(WINDOW, loaded.engine.model.spec.context)
        read = passage(text, loaded.engine.tokenizer, Windowing(window=window))
        self._passage, self._logits = read, _kept(loaded.engine.model, read, work.tokens, desk)
        from gptcore.linears import stored_bytes

        self._stored = stored_bytes(loaded.engine.model)
        del loaded
        self._damages = self._scanned() if work.deals_bits else ()
        self._uniform = self._of_uniform_bits() if work.deals_bits else None

    def _scanned(self) -> tuple[Damage, ...]:
        """Return the damages of all layers, those that the study keeps if they are the same."""
        scan, kept = self._work.scan, self._study.user_attrs
        identity = scan.identity(self._work.variant)
        if kept.get("scan_identity") == identity:
            return damages_from_text(kept["scan"])
        exact = scan.exact(self._work.variant)
        found = scan.perform(self._desk, self._desk.load(exact))
        self._let_go(exact)
        self._study.set_user_attr("scan", damages_to_text(found))
        self._study.set_user_attr("scan_identity", identity)
        return found

    def _of_uniform_bits(self) -> dict[str, Any] | None:
        """Return what the same bits for all layers give, with the trials' other settings."""
        uniform = self._work.scan.uniform()
        if uniform is None:
            return None
        recipe = with_text(self._work.variant.recipe.then(uniform), paths=True)
        variant = self._work.variant.model_copy(update={"recipe": recipe})
        if blocked := variant.blocked_by:
            raise InvalidInput(blocked)
        self._desk.phase("the same bits for all layers")
        values = self._measure(variant)
        return {"recipe": recipe.model_dump(mode="json"), "values": values}

    def run(self) -> dict[str, Any]:
        began = time.monotonic()
        for settings in self._work.start:
            self._study.enqueue_trial(dict(settings), skip_if_exists=True)
        while (done := len(self._ended())) < self._work.trials:
            minutes = self._work.minutes
            if minutes is not None and time.monotonic() - began > 60 * minutes:
                break
            self._desk.check()
            self._desk.phase(f"trial {done + 1} of {self._work.trials}", done / self._work.trials)
            self._try(self._study.ask())
            self._desk.partial(self._report())
        found = self._report()
        found["confirmed"] = self._confirm()
        return found

    def _try(self, trial: Trial) -> None:
        from optuna.trial import TrialState

        began = time.monotonic()
        try:
            variant = self._variant(trial)
            values = self._measure(variant)
        except Cancelled:
            self._study.tell(trial, state=TrialState.FAIL)
            raise
        except (GptcoreError, ValidationError) as error:
            said = sentence(error, Recipe) if isinstance(error, ValidationError) else str(error)
            trial.set_user_attr("problem", said)
            self._study.tell(trial, state=TrialState.PRUNED)
            return
        for name, value in values.items():
            trial.set_user_attr(name, value)
        trial.set_user_attr("recipe", variant.recipe.model_dump(mode="json"))
        trial.set_user_attr("seconds", time.monotonic() - began)
        for name, over in excess(self._work.limits, values).items():
            trial.set_constraint(name, over)
        self._study.tell(trial, [values[one] for one in self._work.objectives])

    def _variant(self, trial: Trial) -> Variant:
        """Return the variant of a trial's settings.

        Raises:
            InvalidInput: the passes do not go together, or cannot run on this model.
        """
        chosen = {one.name: _suggested(trial, one) for one in self._work.knobs}
        trial.set_user_attr("settings", chosen)
        recipe = recipe_of(self._work, chosen, self._damages)
        variant = self._work.variant.model_copy(update={"recipe": recipe})
        if blocked := variant.blocked_by:
            raise InvalidInput(blocked)
        return variant

    def _measure(self, variant: Variant) -> dict[str, float]:
        from gptcore.linears import stored_bytes

        loaded = self._desk.load(variant)
        model = loaded.engine.model
        stored = stored_bytes(model)
        values = {"kl": self._kl(model), "stored_bytes": float(stored)}
        values["stored_ratio"] = stored / self._stored
        if {"tokens_per_s", "joules"} & {*self._work.objectives} or (
            self._work.limits.tokens_per_s_at_least
        ):
            values |= self._speed(model, variant)
        del loaded, model
        self._let_go(variant)
        return values

    def _let_go(self, variant: Variant) -> None:
        if variant.hash != self._work.baseline.hash:
            self._desk.unload(variant)

    def _kl(self, model: Any) -> float:
        import torch

        total, count = 0.0, 0
        ask = model_logits(model)
        for window, kept in zip(self._passage.windows, self._logits, strict=False):
            self._desk.check()
            ids, first = self._passage.model_ids(window), self._passage.first_logits(window)
            fresh = torch.cat([chunk.cpu() for chunk in ask(ids, first)])
            if fresh.shape != kept.shape:
                raise InvalidInput(
                    "A trial changed the vocabulary, so its predictions cannot be held against the "
                    "baseline's: leave trimming out."
                )
            at = window.first
            targets = torch.from_numpy(self._passage.ids[at : at + len(kept)])
            _, _, kl, _ = compare_logits(kept.float(), fresh, targets)
            total, count = total + float(kl.sum()), count + len(kl)
        if not math.isfinite(total):
            raise InvalidInput("The trial's predictions hold NaN or infinity.")
        return total / count

    def _speed(self, model: Any, variant: Variant) -> dict[str, float]:
        device = variant.placement.device
        once(model, CELL, check=self._desk.check)
        with EnergyMeter(device) as meter:
            times = [once(model, CELL, check=self._desk.check) for _ in range(REPETITIONS)]
        tokens = CELL.new_tokens - 1
        values = {"tokens_per_s": tokens / statistics.median(one.decode_s for one in times)}
        if meter.energy.joules is not None:
            values["joules"] = meter.energy.joules / (REPETITIONS * CELL.new_tokens)
        return values

    def _ended(self) -> list[FrozenTrial]:
        from optuna.trial import TrialState

        wanted = (TrialState.COMPLETE, TrialState.PRUNED)
        return [one for one in self._study.get_trials(deepcopy=False) if one.state in wanted]

    def _report(self) -> dict[str, Any]:
        complete = [one for one in self._ended() if one.values is not None]
        front = best(self._work, complete)
        return {
            "study": self._study.study_name,
            "storage": str(storage_file()),
            "objectives": [
                {"name": one, "direction": OBJECTIVES[one][0], "title": OBJECTIVES[one][1]}
                for one in self._work.objectives
            ],
            "trials": [trial_json(one) for one in self._ended()],
            "front": [one.number for one in front],
            "importances": importances(self._study, self._work.objectives),
            "baseline_stored_bytes": self._stored,
            "uniform": self._uniform,
            "confirmed": None,
            "winner": self._winner(front),
        }

    def _winner(self, front: Sequence[FrozenTrial]) -> dict[str, Any] | None:
        if not front:
            return None
        first = self._work.objectives[0]
        sign = 1 if OBJECTIVES[first][0] == "minimize" else -1
        found = min(front, key=lambda one: sign * one.values[0])
        return trial_json(found)

    def _confirm(self) -> dict[str, Any] | None:
        """Measure the best few again, in turn with the baseline, where speed was an objective."""
        if "tokens_per_s" not in self._work.objectives:
            return None
        place = self._work.objectives.index("tokens_per_s")
        front = best(self._work, [one for one in self._ended() if one.values is not None])
        chosen = sorted(front, key=lambda one: -one.values[place])[:CONFIRMED]
        if not chosen:
            return None
        sides = [self._work.baseline]
        for one in chosen:
            recipe = Recipe.model_validate(one.user_attrs["recipe"])
            sides.append(self._work.variant.model_copy(update={"recipe": recipe}))
        part = Part(self._desk, "measuring the best again", 0.95, 1.0, lambda found: None)
        compare = Compare(
            variants=tuple(sides), cells=(CELL,), stop=StopRule(min_pairs=8, max_pairs=8)
        )
        found = compare.perform(part)
        return {
            "trials": dict(zip(SIDES[1:], (one.number for one in chosen), strict=False)),
            "comparisons": [one for one in found["comparisons"] if one["metric"] == "decode_s"],
        }


def recipe_of(work: Tune, chosen: Mapping[str, Any], damages: Sequence[Damage] = ()) -> Recipe:
    """Return the recipe that settings of the knobs make.

    Args:
        work: the search.
        chosen: a setting for each of its knobs, by name.
        damages: what the scan found, where the search deals out bits.

    Raises:
        InvalidInput, ValidationError: the passes do not go together.
    """
    settings: dict[str, dict[str, Any]] = {}
    unused: set[str] = set()
    layers: list[str] = []
    weights: dict[str, float] = {}
    for knob in work.knobs:
        value = chosen[knob.name]
        fields = settings.setdefault(knob.technique, {})
        if knob.weighs:
            weights[knob.layers] = value
        elif knob.layers:
            layers += [f"{knob.layers}:{value}"] if value != LEAVE else []
        elif knob.field:
            fields[knob.field] = value
        elif not value:
            unused.add(knob.technique)
    if layers:
        settings["mixed_bits"]["layers"] = " ".join(layers)
    if weights:
        dealt = work.scan.deal(damages, work.variant.spec_after, weights)
        settings["mixed_bits"] |= {"bits": dealt.bits, "layers": dealt.layers, "group": dealt.group}
    recipe = work.variant.recipe
    for name, fields in settings.items():
        if name not in unused:
            recipe = recipe.then(pass_from_json({"pass": name, **fields}))
    return with_text(recipe, paths=True)


def excess(limits: Limits, values: Mapping[str, float]) -> dict[str, float]:
    """Return by how much each limit is exceeded; 0 or less keeps to it."""
    found = {}
    if limits.kl_at_most is not None:
        found["kl"] = values["kl"] - limits.kl_at_most
    if limits.stored_at_most is not None:
        found["stored"] = values["stored_ratio"] - limits.stored_at_most
    if limits.tokens_per_s_at_least is not None:
        found["tokens_per_s"] = limits.tokens_per_s_at_least - values["tokens_per_s"]
    return found


def keeps_to_limits(trial: FrozenTrial) -> bool:
    """Return whether a trial exceeds no limit."""
    return all(one <= 0 for one in trial.constraints.values())


def best(work: Tune, trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Return the trials within the limits that no other beats on all objectives."""
    signs = [1 if OBJECTIVES[one][0] == "minimize" else -1 for one in work.objectives]
    front = unbeaten(
        {
            one.number: tuple(s * v for s, v in zip(signs, one.values, strict=True))
            for one in trials
            if keeps_to_limits(one)
        }
    )
    return [one for one in trials if one.number in front]


def trial_json(trial: FrozenTrial) -> dict[str, Any]:
    """Return what is told of a trial."""
    known = trial.user_attrs
    return {
        "number": trial.number,
        "settings": known.get("settings", dict(trial.params)),
        "values": {
            name: known[name]
            for name in ("kl", "stored_bytes", "stored_ratio", "tokens_per_s", "joules")
            if name in known
        },
        "recipe": known.get("recipe"),
        "seconds": known.get("seconds"),
        "problem": known.get("problem"),
        "within_limits": keeps_to_limits(trial) and trial.values is not None,
    }


def importances(study: Study, objectives: Sequence[Objective]) -> dict[str, dict[str, float]]:
    """Return how much each setting decides each objective, by PED-ANOVA; shares of 1.

    Source: Watanabe et al. 2023, arXiv:2304.10255. Empty while there are too few trials.
    """
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
    from optuna.trial import TrialState

    found: dict[str, dict[str, float]] = {}
    if len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))) < LEAST_TRIALS:
        return found
    for place, name in enumerate(objectives):
        try:
            told = get_param_importances(
                study,
                evaluator=PedAnovaImportanceEvaluator(),
                target=partial(_cost, place, OBJECTIVES[name][0] == "maximize"),
            )
        except (ValueError, RuntimeError, ZeroDivisionError):
            continue
        found[name] = {key: float(value) for key, value in told.items()}
    return found


def _cost(place: int, maximized: bool, trial: FrozenTrial) -> float:
    """Return an objective so that less is better, as PED-ANOVA takes it."""
    value = float(trial.values[place])
    return -value if maximized else value


def storage_file() -> Path:
    """Return where the studies lie."""
    return data_dir() / "tune.db"


def _study(work: Tune) -> Study:
    import optuna
    from optuna.trial import TrialState

    name = work.study or f"{work.variant.model} {work.variant.hash}"
    directions = [
        optuna.study.StudyDirection[OBJECTIVES[one][0].upper()] for one in work.objectives
    ]

    try:
        study = optuna.create_study(
            storage=f"sqlite:///{storage_file()}",
            study_name=name,
            directions=directions,
            load_if_exists=True,
        )
        before = len(study.get_trials(deepcopy=False))
        study.sampler = optuna.samplers.TPESampler(seed=work.seed + before, multivariate=True)
        for lost in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            study.tell(lost.number, state=TrialState.FAIL)
    except (optuna.exceptions.StorageInternalError, OSError) as error:
        raise StoreError(
            f"The studies in {storage_file().name} cannot be used: {error}. Move the file away."
        ) from None
    if study.directions != directions:
        raise InvalidInput(
            f"The study {name[:60]!r} has other objectives: choose another name for this one."
        )
    return study


def _suggested(trial: Trial, knob: Knob) -> Any:
    if not knob.field and not knob.layers:
        return trial.suggest_categorical(knob.name, [True, False])
    if knob.choices:
        return trial.suggest_categorical(knob.name, list(knob.choices))
    assert knob.low is not None
    assert knob.high is not None
    if knob.weighs:
        return round(trial.suggest_float(knob.name, knob.low, knob.high), 2)
    if passes()[knob.technique].model_fields[knob.field].annotation is int:
        return trial.suggest_int(knob.name, round(knob.low), round(knob.high))
    return round(trial.suggest_float(knob.name, knob.low, knob.high), 3)


def _kept(model: Any, read: Passage, tokens: int, desk: Desk) -> list[Tensor]:
    """Return the baseline's logits of the first windows, (t, V) each, on the CPU."""
    import torch

    ask = model_logits(model)
    found: list[Tensor] = []
    scored, held = 0, 0
    for window in read.windows:
        if found and (scored >= tokens or held > MAX_KEPT_LOGITS_BYTES):
            break
        desk.check()
        desk.phase("the baseline's predictions")
        ids, first = read.model_ids(window), read.first_logits(window)
        found.append(torch.cat([chunk.cpu() for chunk in ask(ids, first)]))
        scored, held = scored + len(found[-1]), held + found[-1].nbytes
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Optuna's log and its notices of experimental parts out of ours."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            warnings.filterwarnings("ignore", "PedAnovaImportanceEvaluator", UserWarning)
            warnings.filterwarnings("ignore", "Some regimes for parameter", UserWarning)
            yield
    finally:
        optuna.logging.set_verbosity(before)
