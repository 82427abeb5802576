"""Distillation: the divergence, what is kept of a teacher, and whether a student gains by it."""

import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from gptcore import artifact
from gptcore.catalogue import Catalogue
from gptcore.errors import InvalidInput
from gptcore.host.worker import Watcher, Worker
from gptcore.passes.base import Pass
from gptcore.passes.drop_layers import DropLayers
from gptcore.passes.quantize import Int8
from gptcore.paths import cache_dir, models_dir
from gptcore.recipe import Recipe, Variant, place
from gptcore.train.events import Stepped
from gptcore.train.settings import Training
from gptcore.train.teaching import LEAST, divergence, matched_layers
from gptcore.train.tokens import starts
from gptcore.train.trainer import Outcome, train
from tests.train.small import QUICK, changed, losses, run, small_job

pytestmark = pytest.mark.usefixtures("data_folder", "one_thread")
TEACHER = "teacher"


@pytest.fixture
def teacher(tmp_path: Path, data_folder: Path) -> str:
    """A model in the catalogue that knows the small text."""
    _, outcome = run(tmp_path / "taught", changed(QUICK, steps=150, warmup=10, validate_every=150))
    return Catalogue(models_dir()).add(outcome.model, TEACHER, lambda ratio: None)


def student(
    folder: Path, settings: Training = QUICK, **changes: object
) -> tuple[dict[int, Stepped], Outcome]:
    """Train a student of one layer; return its steps and the outcome."""
    events: list[object] = []
    shape = {"layers": 1, "teacher": TEACHER}
    what = small_job(folder, settings, **{**shape, **changes})
    outcome = train(what, folder, observe=events.append)
    return {one.step: one for one in events if isinstance(one, Stepped)}, outcome


def test_the_divergence_with_all_tokens_kept_is_torchs_own() -> None:
    torch.manual_seed(0)
    mine, his = torch.randn(2, 3, 11), torch.randn(2, 3, 11)
    log = (his / 2).log_softmax(-1)
    kept, ids = log.topk(11, dim=-1)
    kept = F.pad(kept, (0, 1), value=math.log(LEAST))
    expected = 4 * F.kl_div((mine / 2).log_softmax(-1), log, reduction="none", log_target=True)
    assert divergence(ids, kept, mine, 2.0).item() == pytest.approx(
        expected.sum(-1).mean().item(), rel=1e-5
    )
    assert divergence(ids, kept, his, 2.0).item() == pytest.approx(0.0, abs=1e-6)


def test_the_divergence_of_fewer_tokens_is_that_of_the_coarser_distribution() -> None:
    torch.manual_seed(0)
    mine, his = torch.randn(1, 1, 7).double(), torch.randn(1, 1, 7).double()
    p, q = his.softmax(-1).flatten(), mine.softmax(-1).flatten()
    ids = p.topk(3).indices
    coarse_p = torch.cat([p[ids], 1 - p[ids].sum()[None]])
    coarse_q = torch.cat([q[ids], 1 - q[ids].sum()[None]])
    expected = (coarse_p * (coarse_p / coarse_q).log()).sum().item()
    found = divergence(ids.view(1, 1, 3), coarse_p.log().view(1, 1, 4), mine, 1.0).item()
    assert found == pytest.approx(expected, rel=1e-5)
    assert found <= (p * (p / q).log()).sum().item()


@pytest.mark.parametrize(
    ("student", "teacher", "layers"),
    [(1, 4, [3]), (2, 4, [1, 3]), (3, 3, [0, 1, 2]), (27, 30, None)],
)
def test_matched_layers_are_spread_and_end_with_the_last(
    student: int, teacher: int, layers: list[int] | None
) -> None:
    found = matched_layers(student, teacher)
    assert layers is None or found == layers
    assert found == sorted(set(found))
    assert found[-1] == teacher - 1


def test_a_student_gains_by_its_teacher(teacher: str, tmp_path: Path) -> None:
    settings = changed(QUICK, steps=60, warmup=5, validate_every=60)
    taught, outcome = student(tmp_path / "with", settings)
    alone, control = student(tmp_path / "without", changed(settings, teaching_ratio=0.0))
    assert taught[60].teaching < 0.7 * taught[1].teaching
    assert alone[1].teaching is None
    assert alone[1].loss == taught[1].loss  # the same sequences, the same first weights
    assert outcome.best_loss < control.best_loss


def test_what_a_teacher_said_is_kept_and_changes_no_number(
    teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = changed(QUICK, steps=6, warmup=2, validate_every=6)
    first, _ = student(tmp_path / "first", settings)
    (kept,) = (cache_dir() / "teachers").iterdir()
    assert {one.name for one in kept.iterdir()} == {"ids", "log", "done"}

    def asked(self: object, logits: torch.Tensor) -> None:
        raise AssertionError("the teacher was asked again")

    monkeypatch.setattr("gptcore.train.teaching.Teacher.softened", asked)
    again, _ = student(tmp_path / "again", settings)
    assert [one.loss for one in again.values()] == [one.loss for one in first.values()]
    assert [one.teaching for one in again.values()] == [one.teaching for one in first.values()]


def test_hidden_states_come_nearer(teacher: str, tmp_path: Path) -> None:
    settings = changed(QUICK, steps=30, warmup=2, validate_every=30, learning_rate=1e-3)
    near, _ = student(tmp_path / "near", changed(settings, hidden_ratio=1.0), layers=2)
    far, _ = student(tmp_path / "far", settings, layers=2)
    assert near[1].loss == far[1].loss
    assert near[2].loss != far[2].loss
    assert near[30].teaching < near[1].teaching


def test_a_copy_of_the_teacher_is_at_no_distance(teacher: str, tmp_path: Path) -> None:
    settings = changed(QUICK, steps=1, warmup=0, validate_every=1)
    taught, _ = student(tmp_path / "copy", settings, start=TEACHER)
    assert taught[1].teaching == pytest.approx(0.0, abs=2e-3)  # kept in 16 bits


def test_taught_windows_stand_at_multiples(tmp_path: Path) -> None:
    data = small_job(tmp_path / "job").data.train
    for step in range(200):
        begins = starts(data, 16, 1, step, 4, shifted=False)
        assert all(one % 16 == 0 and one + 16 < data.tokens for one in begins)


@pytest.mark.parametrize(
    ("changes", "settings", "sentence"),
    [
        ({"width": 64}, {"hidden_ratio": 1.0}, "Hidden states of width 64 cannot be matched"),
        ({"context": 32}, {}, "reads at most 16 tokens at once, and a sequence has 32"),
    ],
)
def test_a_teacher_that_does_not_suit_is_one_sentence(
    teacher: str,
    tmp_path: Path,
    changes: dict[str, object],
    settings: dict[str, object],
    sentence: str,
) -> None:
    with pytest.raises(InvalidInput, match=sentence):
        student(tmp_path / "wrong", changed(QUICK, **settings), **changes)


def test_a_teacher_of_other_tokens_is_refused(teacher: str, tmp_path: Path) -> None:
    other = tmp_path / "digits"
    other.mkdir()
    (other / "text.txt").write_text("0123456789\n" * 400)
    _, outcome = run(other / "training")
    Catalogue(models_dir()).add(outcome.model, "stranger", lambda ratio: None)
    with pytest.raises(InvalidInput, match="stranger reads other tokens than the student"):
        student(tmp_path / "wrong", start=TEACHER, teacher="stranger")


def test_windows_shorter_than_the_context_learn_too(tmp_path: Path) -> None:
    events, outcome = run(tmp_path / "short", changed(QUICK, window=8))
    assert outcome.tokens == 12 * 8 * 8
    assert losses(events)[12] < losses(events)[1]
    assert small_job(tmp_path / "short", resume=True).spec.context == 16


def finished(name: str, one: Pass) -> str:
    """Put a finished variant of the teacher into the catalogue."""
    catalogue = Catalogue(models_dir())
    spec, weights_id = catalogue.identity(TEACHER)
    placement, recipe = place("fp32", "cpu", 1, Recipe(passes=(one,)))
    variant = Variant(
        model=TEACHER, spec=spec, weights_id=weights_id, placement=placement, recipe=recipe
    )
    loaded = Worker("cpu", catalogue).load(variant, Watcher())
    artifact.write(
        models_dir() / name,
        model=loaded.engine.model,
        tokenizer=loaded.engine.tokenizer,
        tokenizer_files=catalogue.checkpoint(TEACHER).directory,
        variant=variant,
        coverage=loaded.coverage,
        resident_bytes=loaded.resident_bytes,
        source_precision="fp32",
        seconds=0.0,
        peak_memory_bytes=None,
        made={"app_version": "test"},
    )
    return name


def test_a_variant_that_lost_a_layer_is_healed(teacher: str, tmp_path: Path) -> None:
    name = finished("hurt", DropLayers(layers=1, compensated=False))
    settings = changed(QUICK, steps=60, warmup=5, validate_every=20)
    before, _ = student(tmp_path / "before", changed(settings, steps=6), start=name)
    after, outcome = student(tmp_path / "healed", settings, start=name)
    assert after[1].loss == before[1].loss
    assert after[60].loss < after[1].loss
    assert after[60].teaching < 0.5 * after[1].teaching
    healed = Catalogue(models_dir()).add(outcome.model, "healed", lambda ratio: None)
    assert Catalogue(models_dir()).checkpoint(healed).spec.layers == 1


def test_packed_weights_are_refused(teacher: str, tmp_path: Path) -> None:
    finished("packed", Int8())
    with pytest.raises(InvalidInput, match=r"packed numbers in .* take teacher"):
        student(tmp_path / "wrong", start="packed")
