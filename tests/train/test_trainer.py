"""The trainer: what it learns, and that every way of computing a step gives the same numbers."""

import contextlib
import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from gptcore import weights
from gptcore.catalogue import Catalogue
from gptcore.device import Placement
from gptcore.engine import Engine
from gptcore.errors import Cancelled, DoesNotFit, InvalidInput, NumericalError, StoreError
from gptcore.processes import Processes
from gptcore.records import Request
from gptcore.tokenizer import load_tokenizer
from gptcore.train import checkpoint
from gptcore.train.events import Noted, Stepped, Validated, read_log
from gptcore.train.memory import require_batch, sequence_bytes, state_bytes
from gptcore.train.settings import Training
from gptcore.train.tokens import sequences, validation_starts
from gptcore.train.trainer import Job, autocast, dropout, first_model, mfu_ratio, train
from tests.conftest import ROOT
from tests.train.small import QUICK, changed, losses, run, small_job, small_text

pytestmark = pytest.mark.usefixtures("data_folder")
PRECISE = 1e-6
"""The order of additions differs; fp32 has 1.2e-7."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "training"


class Stop:
    """Stands for Ctrl-C before step ``at`` is computed."""

    def __init__(self, at: int) -> None:
        self.left = at

    def __call__(self) -> None:
        if self.left == 0:
            raise Cancelled("Stopped.")
        self.left -= 1


def test_it_learns_and_what_it_wrote_down_is_what_happened(folder: Path) -> None:
    settings = changed(QUICK, steps=60, warmup=5, validate_every=20)
    events, outcome = run(folder, settings)
    found = losses(events)
    vocabulary = small_job(folder, settings, resume=True).spec.vocabulary
    assert found[1] == pytest.approx(math.log(vocabulary), abs=0.2)  # it knows nothing at first
    assert outcome.best_loss < 0.75 * math.log(vocabulary)
    assert outcome.ended == "steps"
    assert (outcome.steps, outcome.tokens) == (60, 60 * 8 * 16)
    assert read_log(folder) == events
    validated = [one for one in events if isinstance(one, Validated)]
    assert [one.step for one in validated] == [20, 40, 60]
    assert outcome.best_loss == min(one.loss for one in validated)


def test_the_validation_loss_is_that_of_the_model_that_was_written(folder: Path) -> None:
    _, outcome = run(folder)
    what = small_job(folder, resume=True)
    model = weights.build(weights.describe(outcome.model), Placement())
    begins = validation_starts(what.data.validation, 16, QUICK.validation_windows)
    ids = torch.from_numpy(sequences(what.data.validation.read(), begins, 16))
    logits = model(ids[:, :-1]).double()
    nats = -logits.log_softmax(-1).gather(2, ids[:, 1:, None]).mean().item()
    assert outcome.best_loss == pytest.approx(nats, rel=1e-5)
    held = Path(what.data.source).read_bytes()[-what.data.validation.text_bytes :]
    assert outcome.best_bits_per_byte == pytest.approx(
        nats / math.log(2) * len(load_tokenizer(outcome.model).encode(held.decode())) / len(held)
    )


def test_parts_of_a_batch_add_up_to_the_whole(folder: Path, tmp_path: Path) -> None:
    whole, _ = run(folder, changed(QUICK, parts=1))
    parts, _ = run(tmp_path / "parts", changed(QUICK, parts=4))
    # Twelve steps of AdamW amplify rounding; a part that was weighted wrongly is off by far more.
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-4)
    assert losses(parts)[1] == pytest.approx(losses(whole)[1], rel=PRECISE)


@pytest.mark.parametrize(
    "kind", [{"precision": "fp32"}, {"precision": "fp16"}, {"optimizer": "muon"}]
)
def test_a_training_that_was_stopped_goes_on_to_the_same_numbers(
    folder: Path, tmp_path: Path, kind: dict[str, str]
) -> None:
    settings = changed(QUICK, dropout=0.2, **kind)
    straight, outcome = run(tmp_path / "straight", settings)
    with pytest.raises(Cancelled):
        run(folder, settings, breathe=Stop(at=7))
    assert checkpoint.steps(folder)[-1] == 7
    resumed, again = run(folder, settings, resume=True)
    assert losses(resumed) == {n: loss for n, loss in losses(straight).items() if n > 7}
    assert again.best_loss == outcome.best_loss
    assert [e.step for e in read_log(folder) if isinstance(e, Stepped)] == list(range(1, 13))


def test_a_killed_process_goes_on_to_the_same_loss(folder: Path, tmp_path: Path) -> None:
    settings = changed(QUICK, steps=3000, validate_every=5, warmup=10, validation_windows=1)
    small_text(tmp_path)
    given = {k: v for k, v in settings.model_dump().items() if v != Training().model_dump()[k]}
    command = [sys.executable, "-m", "gptcore", "train", "--text", str(tmp_path / "text.txt")]
    command += ["--to", str(folder), "--layers", "2", "--width", "32", "--heads", "2"]
    command += ["--context", "16", "--threads", "1"]
    command += [word for k, v in given.items() for word in (f"--{k.replace('_', '-')}", str(v))]
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 120
        while not any(step >= 10 for step in checkpoint.steps(folder)):
            assert child.poll() is None
            assert time.monotonic() < until
            time.sleep(0.02)
        child.send_signal(signal.SIGKILL)
    finally:
        child.kill()
        child.wait()
    before = losses(read_log(folder))
    at = checkpoint.steps(folder)[-1]
    with pytest.raises(Cancelled):
        run(folder, settings, resume=True, breathe=Stop(at=6))
    after = losses(read_log(folder))
    assert at + 6 in after
    straight = tmp_path / "straight"
    with pytest.raises(Cancelled):
        run(straight, settings, breathe=Stop(at=at + 6))
    assert losses(read_log(straight)) == after
    shared = before.keys() & after.keys()
    assert {n: before[n] for n in shared} == {n: after[n] for n in shared}


def test_a_loss_that_is_no_number_ends_it_and_keeps_the_last_good_checkpoint(folder: Path) -> None:
    gentle = changed(QUICK, steps=10, warmup=0, validate_every=5, learning_rate=1e-3)
    run(folder, gentle)
    what = small_job(folder, changed(gentle, steps=100, learning_rate=1e9), resume=True)
    adopt(folder, what)
    events: list[object] = []
    with pytest.raises(NumericalError, match=r"was stopped, .* kept\. Choose a lower learning"):
        train(what, folder, resume=True, observe=events.append)
    said = events[-1]
    assert isinstance(said, Noted)
    assert "inf" in said.text or "nan" in said.text
    model = first_model(what, "cpu")
    last = checkpoint.place(folder, checkpoint.steps(folder)[-1])
    checkpoint.load_weights(last, model)
    assert all(one.isfinite().all() for one in model.parameters())


def adopt(folder: Path, what: Job) -> None:
    """Let the training in ``folder`` go on as another one, which it refuses by itself."""
    file = folder / "run.json"
    about = json.loads(file.read_text())
    file.write_text(json.dumps(about | {"identity": what.identity()}))


def test_no_better_for_too_long_ends_it_with_the_best_model(folder: Path) -> None:
    settings = changed(
        QUICK, steps=400, warmup=0, learning_rate=0.3, clip=0.0, validate_every=2, patience=3
    )
    events, outcome = run(folder, settings)
    validated = [one for one in events if isinstance(one, Validated)]
    assert outcome.ended == "patience"
    assert [one.best for one in validated[-3:]] == [False] * 3
    assert outcome.steps == outcome.best_step + 6
    assert checkpoint.steps(folder) == [outcome.best_step, outcome.steps]
    best = first_model(small_job(folder, settings, resume=True), "cpu")
    checkpoint.load_weights(checkpoint.place(folder, outcome.best_step), best)
    written = weights.build(weights.describe(outcome.model), Placement())
    assert torch.equal(written.embedding.weight, best.embedding.weight)


def test_the_time_ends_it_with_a_checkpoint(folder: Path) -> None:
    ticks = iter(range(10_000))
    _, outcome = run(folder, deadline_s=20.0, clock=lambda: float(next(ticks)))
    assert outcome.ended == "time"
    assert 0 < outcome.steps < QUICK.steps
    assert checkpoint.steps(folder)[-1] == outcome.steps


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"width": 64}, "spec"),
        ({"tokenizer": "bpe"}, "tokenizer"),
        ({"settings": changed(QUICK, seed=2)}, r"seed \(1, not 2\)"),
        ({"settings": changed(QUICK, batch=16)}, r"batch \(8, not 16\)"),
    ],
)
def test_a_resume_with_something_else_is_refused_by_name(
    folder: Path, changes: dict[str, object], named: str
) -> None:
    run(folder)
    before = checkpoint.steps(folder)
    with pytest.raises(InvalidInput, match=f"cannot go on with another.*{named}"):
        train(small_job(folder, resume=True, **changes), folder, resume=True)
    assert checkpoint.steps(folder) == before


def test_a_resume_with_another_text_is_refused(folder: Path) -> None:
    run(folder)
    small_text(folder.parent, lines=500)
    with pytest.raises(InvalidInput, match="another corpus"):
        run(folder, resume=True)


def test_a_second_training_does_not_overwrite_the_first(folder: Path) -> None:
    run(folder)
    with pytest.raises(InvalidInput, match="already: go on with it"):
        small_job(folder, width=64)


def test_a_full_disk_in_a_checkpoint_leaves_the_one_before(folder: Path) -> None:
    with pytest.raises(Cancelled):
        run(folder, breathe=Stop(at=5))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # No file may grow beyond what the log takes: the weights of step 6 cannot be written.
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(StoreError, match=r"step 6 could not be written.*step 5 is kept"):
            run(folder, resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert checkpoint.steps(folder) == [5]
    assert not list((folder / "checkpoints").glob(".*"))
    _, outcome = run(folder, resume=True)
    assert outcome.steps == QUICK.steps


def test_a_damaged_checkpoint_is_named(folder: Path) -> None:
    run(folder)
    last = checkpoint.place(folder, checkpoint.steps(folder)[-1])
    whole = (last / "optimizer.safetensors").read_bytes()
    (last / "optimizer.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InvalidInput, match=f"{last.name}.*is damaged"):
        run(folder, resume=True)


def test_a_batch_that_does_not_fit_names_the_largest_that_would() -> None:
    settings = changed(QUICK, batch=64, parts=1)
    sequence = 10 * 2**20
    require_batch(settings, sequence, free=int(64 * sequence / 0.9) + sequence)
    with pytest.raises(DoesNotFit, match=r"largest batch .* is 20\..*64 in 4 parts"):
        require_batch(settings, sequence, free=int(20.5 * sequence / 0.9))
    with pytest.raises(DoesNotFit, match="One sequence"):
        require_batch(settings, sequence, free=sequence // 2)


def test_a_sequence_is_measured_to_take_what_its_parts_take(folder: Path) -> None:
    what = small_job(folder, width=64, context=64, heads=2)
    spec = what.spec
    measured = sequence_bytes(first_model(what, "cpu"), autocast("fp32", "cpu"), what.window)
    # Each block keeps at least its two norms' inputs, q, k, v, what attention gives, and two
    # tensors inside the MLP: 6 widths and two of four widths a token. Three times that is too much.
    least = spec.layers * spec.context * (6 * spec.width + 2 * spec.hidden) * 4
    logits = 3 * spec.context * spec.vocabulary * 4
    assert least < measured - logits < 3 * least
    assert state_bytes(spec) == 16 * spec.parameters


def test_bf16_ends_near_fp32(folder: Path, tmp_path: Path) -> None:
    settings = changed(QUICK, steps=40)
    _, full = run(folder, settings)
    _, half = run(tmp_path / "half", changed(settings, precision="bf16"))
    assert half.best_loss == pytest.approx(full.best_loss, rel=0.02)
    assert half.best_loss != full.best_loss  # else it was not bf16


def test_dropout_is_for_learning_alone(folder: Path) -> None:
    model = first_model(small_job(folder), "cpu")
    ids = torch.randint(0, model.spec.vocabulary, (2, 16))
    plain = model.eval()(ids)
    dropout(model, 0.5)
    assert torch.equal(model(ids), plain)
    torch.manual_seed(0)
    first, second = model.train()(ids), model(ids)
    assert not torch.allclose(first, plain, atol=1e-3)
    assert not torch.equal(first, second)


def test_it_goes_on_from_the_weights_of_a_model(folder: Path, tmp_path: Path) -> None:
    _, first = run(folder)
    before = (first.model / "model.safetensors").read_bytes()
    second = tmp_path / "second"
    name = Catalogue(Path(os.environ["GPTLAB_DATA"]) / "models")
    name.folder.mkdir(exist_ok=True)
    name.add(first.model, "mine", lambda ratio: None)
    events = []
    settings = changed(QUICK, learning_rate=1e-9, steps=6, warmup=0)
    outcome = train(small_job(second, settings, start="mine"), second, observe=events.append)
    assert outcome.best_loss == pytest.approx(first.best_loss, rel=1e-5)
    assert (first.model / "model.safetensors").read_bytes() == before


def test_the_result_is_a_model_of_the_catalogue_that_writes(folder: Path) -> None:
    _, outcome = run(folder)
    checked = weights.describe(outcome.model)
    model = weights.build(checked, Placement())
    engine = Engine(model, load_tokenizer(outcome.model))
    tokens = list(engine.start(Request(prompt="the small ", max_new_tokens=5, ignore_eos=True)))
    assert len(tokens) == 5
    assert checked.source_precision == "fp32"


def test_mfu_is_arithmetic_over_the_peak(folder: Path) -> None:
    spec = small_job(folder).spec
    flop = 6 * spec.parameters + 12 * 2 * 32 * 16
    assert mfu_ratio(spec, spec.context, 1000.0, 1e9) == pytest.approx(flop * 1000 / 1e9)
    assert mfu_ratio(spec, spec.context, 1000.0, None) is None


def test_a_text_is_written_at_each_validation_and_only_the_weights_change_it(folder: Path) -> None:
    settings = changed(QUICK, sample_tokens=12)
    events, _ = run(folder, settings)
    texts = [one.sample for one in events if isinstance(one, Validated)]
    assert len(texts) == 2
    assert all(texts)
    assert losses(events) == losses(run(folder.with_name("silent"))[0])


@pytest.mark.slow
def test_two_processes_learn_what_one_does(folder: Path, tmp_path: Path) -> None:
    small_text(tmp_path)
    alone, outcome = run(folder, changed(QUICK, parts=2))
    together = tmp_path / "together"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "gptcore", "train", "--text", str(tmp_path / "text.txt"), "--to"]
    command += [str(together), "--layers", "2", "--width", "32", "--heads", "2"]
    command += ["--context", "16", "--threads", "1", "--parts", "2"]
    given = {k: v for k, v in QUICK.model_dump().items() if v != Training().model_dump()[k]}
    command += [word for k, v in given.items() for word in (f"--{k.replace('_', '-')}", str(v))]
    said = tmp_path / "said"
    with said.open("w") as out:
        child = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out, start_new_session=True)
        try:
            assert child.wait(timeout=240) == 0, said.read_text()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
    both = read_log(together)
    assert losses(both) == pytest.approx(losses(alone), abs=1e-5)
    (last,) = [one for one in both if isinstance(one, Validated) and one.step == QUICK.steps]
    assert last.loss == pytest.approx(outcome.best_loss, abs=1e-5)


def test_what_each_process_takes_is_the_whole_batch_once() -> None:
    rows = list(range(12))
    shares = [Processes(rank, 3).share(rows) for rank in range(3)]
    assert sorted(row for share in shares for row in share) == rows
    assert {len(share) for share in shares} == {4}
