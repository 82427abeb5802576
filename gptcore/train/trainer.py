"""Training: AdamW or Muon, warm-up and cosine, clipping, parts of a batch, validation, checkpoints.

A run lives in a folder: ``run.json`` says what is trained (a resume with anything else is refused),
``log.jsonl`` has every event, ``checkpoints`` the last and the best state, ``model`` the result as
a Hugging Face directory. Weights and optimizer stay in fp32; matrix products are in the precision
of the settings (autocast).

Letters of shapes: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

import contextlib
import json
import math
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptcore.device import free_bytes
from gptcore.errors import Cancelled, DoesNotFit, InvalidInput, NumericalError, StoreError
from gptcore.measure.energy import EnergyMeter
from gptcore.processes import Processes
from gptcore.spec import ModelSpec
from gptcore.tokenizer import load_tokenizer
from gptcore.train import checkpoint
from gptcore.train.checkpoint import Progress
from gptcore.train.events import LOG, Event, Log, Noted, Observer, Stepped, Validated
from gptcore.train.memory import require_batch, require_room, sequence_bytes
from gptcore.train.origin import Origin
from gptcore.train.settings import Training
from gptcore.train.teaching import Teacher
from gptcore.train.tokens import Data, require_windows, sequences, starts, validation_starts
from gptcore.train.vocabulary import tokenizer_id

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from gptcore.model import GPT

RUN = "run.json"
MODEL = "model"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
)
SAMPLE_TEMPERATURE = 0.8


@dataclass(frozen=True, slots=True)
class Job:
    """What is trained, on what, from where."""

    spec: ModelSpec
    settings: Training
    data: Data
    tokenizer: Path
    """A folder with tokenizer.json."""
    start: Origin | None = None
    """Whose weights are the first; None draws them from the seed."""
    teacher: Origin | None = None
    """Whom the model learns from too."""
    prompt: str = ""
    """What the texts that it writes while learning begin with."""

    @property
    def window(self) -> int:
        """Tokens of one sequence."""
        return min(self.settings.window or self.spec.context, self.spec.context)

    def identity(self) -> dict[str, Any]:
        """Return what must be the same for a training to go on."""
        return {
            "spec": self.spec.model_dump(mode="json", exclude={"note"}),
            "tokenizer": tokenizer_id(self.tokenizer),
            "data": self.data.id,
            "start": self.start.id if self.start else None,
            "teacher": self.teacher.id if self.teacher else None,
            "settings": self.settings.model_dump(mode="json"),
        }


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a training came to."""

    ended: str
    """``steps``, ``patience`` or ``time``."""
    steps: int
    tokens: int
    seconds: float
    best_step: int
    best_loss: float
    """Validation, nats a token."""
    best_bits_per_byte: float
    last_loss: float
    """Of the last training step."""
    energy_j: float | None
    energy_label: str
    model: Path
    """The best weights, as a Hugging Face directory."""


def train(
    job: Job,
    folder: Path,
    *,
    device: str = "cpu",
    resume: bool = False,
    processes: Processes | None = None,
    peak_flop_per_s: float | None = None,
    observe: Observer = lambda event: None,
    breathe: Callable[[], None] = lambda: None,
    deadline_s: float | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Outcome:
    """Train until the steps, the patience or the time end it, and write the best model.

    Args:
        job: what.
        folder: of the run; made, and must not hold another run unless it is resumed.
        device: of this process.
        resume: go on from the last checkpoint in ``folder``.
        processes: that share every batch.
        peak_flop_per_s: of ``device`` in the settings' precision, for MFU.
        observe: told every event, in the first process alone.
        breathe: called before every step in the first process; a Cancelled that it raises leaves a
            checkpoint first.
        deadline_s: seconds after which no further step begins.
        clock: seconds.

    Raises:
        NumericalError: the loss is no number any more; the last good checkpoint is kept.
        InvalidInput: the folder holds another run, or the data are too short.
        DoesNotFit: with the largest batch that would.
        StoreError: a checkpoint could not be written.
        Cancelled: by ``breathe``.
    """
    processes = processes or Processes()
    run = _Run(job, folder, device, processes, peak_flop_per_s, observe, clock)
    with no_denormals():
        run.prepare(resume)
        with EnergyMeter(device) as run.energy:
            ended = run.loop(breathe, deadline_s)
        return run.finish(ended)


@contextlib.contextmanager
def no_denormals() -> Iterator[None]:
    """Let this thread, and those that it starts, take numbers below 1e-38 for 0.

    The gradient of a confident softmax is full of them, and a CPU multiplies them 40 times more
    slowly than others.
    """
    import torch

    before = torch.ones(1).mul(1e-38).mul(0.1).item() == 0.0
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


class _Run:
    """A training on its way."""

    def __init__(
        self,
        job: Job,
        folder: Path,
        device: str,
        processes: Processes,
        peak_flop_per_s: float | None,
        observe: Observer,
        clock: Callable[[], float],
    ) -> None:
        self.job, self.folder, self.device = job, folder, device
        self.settings, self.processes = job.settings, processes
        self.progress = Progress()
        self.energy = EnergyMeter(device)
        self.last_loss = math.nan
        self._peak = peak_flop_per_s
        self._observe, self._clock = observe, clock
        self._began = self._since = clock()

    def prepare(self, resume: bool) -> None:
        """Check everything, build the model, and load the checkpoint of a resume."""
        import torch

        job = self.job
        if job.settings.batch % (job.settings.parts * self.processes.count):
            raise InvalidInput(
                f"A batch of {job.settings.batch} cannot be shared by {self.processes.count} "
                f"processes in {job.settings.parts} parts: choose a multiple of "
                f"{self.processes.count * job.settings.parts}."
            )
        require_windows(job.data, job.window)
        self._claim(resume)
        require_room(job.spec, self.device)
        self.model = first_model(job, self.device)
        dropout(self.model, job.settings.dropout)
        self.autocast = autocast(job.settings.precision, self.device)
        self._require_batch()
        self.optimizers = optimizers(self.model, job.settings, self.device)
        self.scaler = torch.amp.GradScaler(
            self.device.partition(":")[0], enabled=job.settings.precision == "fp16"
        )
        if resume:
            self.progress = checkpoint.read(self.folder, self.model, self.optimizers)
            if self.progress.scaler:
                self.scaler.load_state_dict(dict(self.progress.scaler))
        if self.processes.first:
            self._log = Log(self.folder, self.progress.step)
        self._module = wrapped(self.model, self.processes)
        self.teacher = self._hired()

    def _hired(self) -> Teacher | None:
        """Return the teacher, if it has a say."""
        settings, origin = self.settings, self.job.teacher
        if origin is None or not (settings.teaching_ratio or settings.hidden_ratio):
            return None
        require_room(origin.spec, self.device)
        return Teacher(
            origin.model(self.device),
            self.model,
            id=origin.id,
            data=self.job.data,
            settings=settings,
            window=self.job.window,
            autocast=self.autocast,
        )

    def loop(self, breathe: Callable[[], None], deadline_s: float | None) -> str:
        """Train; return why it ended."""
        settings = self.settings
        self._began = self._since = self._clock()
        while self.progress.step < settings.steps:
            late = deadline_s is not None and self._clock() - self._began >= deadline_s
            if self._asked_to_end(breathe, late):
                break
            self._step()
            if self.progress.step % settings.validate_every == 0:
                self._validate()
                if settings.patience and self.progress.worse >= settings.patience:
                    return "patience"
        if self.progress.validated_step != self.progress.step:
            self._validate()
        return "steps" if self.progress.step == settings.steps else "time"

    def finish(self, ended: str) -> Outcome:
        """Write the best weights as a model, and return what was reached."""
        progress = self.progress
        assert progress.best_step is not None
        assert progress.best_loss is not None
        assert progress.best_bits_per_byte is not None
        if self.processes.first:
            checkpoint.load_weights(checkpoint.place(self.folder, progress.best_step), self.model)
            self._write_model()
        self.processes.wait()
        return Outcome(
            ended=ended,
            steps=progress.step,
            tokens=progress.tokens,
            seconds=progress.seconds,
            best_step=progress.best_step,
            best_loss=progress.best_loss,
            best_bits_per_byte=progress.best_bits_per_byte,
            last_loss=self.last_loss,
            energy_j=self.energy.energy.joules,
            energy_label=self.energy.energy.label,
            model=self.folder / MODEL,
        )

    def _claim(self, resume: bool) -> None:
        """Write down whose folder this is, or check that it is this job's."""
        file, identity = self.folder / RUN, self.job.identity()
        if resume:
            try:
                before = json.loads(file.read_text())
            except (OSError, ValueError):
                raise InvalidInput(
                    f"There is no training in {self.folder} to go on with."
                ) from None
            if changed := differences(before["identity"], identity):
                raise InvalidInput(
                    f"The training in {self.folder} cannot go on with another {changed}: give what "
                    "it began with, or begin a new one in another folder."
                )
            return
        if self.processes.first:
            if file.exists() and checkpoint.steps(self.folder):
                raise InvalidInput(
                    f"There is a training in {self.folder} already: go on with it (--resume), or "
                    "name another folder."
                )
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                about = {"identity": identity, "source": self.job.data.source}
                file.write_text(json.dumps(about, indent=1))
                (self.folder / LOG).unlink(missing_ok=True)
            except OSError as error:
                raise StoreError(
                    f"The folder {self.folder} cannot be written: {error.strerror}. Name another."
                ) from None
        self.processes.wait()

    def _require_batch(self) -> None:
        """Refuse a batch that does not fit; a GPU that is full says so itself."""
        try:
            sequence = sequence_bytes(self.model, self.autocast, self.job.window)
        except RuntimeError as error:
            raise _does_not_fit(error, 1) from None
        shared = 1 if self.device.startswith("cuda") else self.processes.count
        moments = 12 * self.job.spec.parameters
        free = free_bytes(self.device)
        require_batch(
            self.settings,
            sequence,
            free=None if free is None else free // shared - moments,
            processes=self.processes.count,
        )

    def _asked_to_end(self, breathe: Callable[[], None], late: bool) -> bool:
        """Return whether the time is over; leave a checkpoint where somebody stopped the work."""
        stopped: Cancelled | None = None
        signal = 0.0
        if self.processes.first:
            try:
                breathe()
            except Cancelled as error:
                stopped, signal = error, 2.0
            else:
                signal = float(late)
        (signal,) = self.processes.sums(signal)
        if signal == 2.0:
            if self.progress.step > 0:
                self._keep()
            raise stopped or Cancelled("Stopped by the first process.")
        return signal == 1.0

    def _step(self) -> None:
        """Learn from one batch."""
        import torch
        from torch.nn.utils import clip_grad_norm_

        settings, step = self.settings, self.progress.step
        began = self._clock()
        # Dropout draws from torch's one generator; seeded by the step, a resume draws the same.
        draws = (settings.seed * 1_000_003 + step) * 1024 + self.processes.rank
        torch.manual_seed(draws % 2**63)
        rate = settings.rate(step)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        self.model.train()
        try:
            own = self._gradients(step)
        except RuntimeError as error:
            raise _does_not_fit(error, settings.batch // settings.parts) from None
        total, near = self.processes.sums(*own)
        loss = total / self.processes.count
        self._require_number(loss, "loss")
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        norm = float(clip_grad_norm_(self.model.parameters(), settings.clip or math.inf))
        if not self.scaler.is_enabled():  # fp16 skips such a step, and lowers its scale
            self._require_number(norm, "gradient")
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
        self.scaler.update()
        self.model.zero_grad(set_to_none=True)
        seconds = self._clock() - began
        tokens = settings.batch * self.job.window
        self.progress = replace(self.progress, step=step + 1, tokens=self.progress.tokens + tokens)
        self.last_loss = loss
        tokens_per_s = tokens / max(seconds, 1e-9)
        self._say(
            Stepped(
                step=step + 1,
                loss=loss,
                learning_rate=rate,
                gradient_norm=norm,
                seconds=seconds,
                tokens_per_s=tokens_per_s,
                mfu_ratio=mfu_ratio(
                    self.job.spec,
                    self.job.window,
                    tokens_per_s / self.processes.count,
                    self._peak,
                ),
                memory_bytes=peak_memory(self.device),
                teaching=near / self.processes.count if self.teacher else None,
            )
        )

    def _gradients(self, step: int) -> tuple[float, float]:
        """Add up the gradients of this process's share of a batch.

        Returns its mean cross-entropy, and its mean divergence from the teacher, if there is one.
        """
        import torch
        from torch.nn import functional as F

        settings, data = self.settings, self.job.data.train
        begins = starts(
            data,
            self.job.window,
            settings.seed,
            step,
            settings.batch,
            shifted=self.job.teacher is None,
        )
        own = self.processes.share(begins)
        size = len(own) // settings.parts
        ids, total, taught = data.read(), 0.0, 0.0
        for part in range(settings.parts):
            rows = own[part * size : (part + 1) * size]
            inputs, targets = self._batch(ids, rows)
            last = part == settings.parts - 1
            with together(self._module, last):
                with self.autocast:
                    logits = self._module(inputs)  # (B, T, V)
                nats = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
                loss = nats
                if self.teacher is not None:
                    near, far = self.teacher.loss(rows, inputs, logits)
                    share = settings.teaching_ratio
                    loss = (1 - share) * nats + share * near + settings.hidden_ratio * far
                    taught += float(near.detach()) / settings.parts
                torch.autograd.backward(self.scaler.scale(loss / settings.parts))
            total += float(nats.detach()) / settings.parts
        return total, taught

    def _validate(self) -> None:
        """Hold the model against the validation text, say so, and write a checkpoint."""
        began = self._clock()
        loss = self._validation_loss()
        self._require_number(loss, "validation loss")
        data, progress = self.job.data.validation, self.progress
        per_byte = loss / math.log(2) * data.tokens / data.text_bytes
        best = progress.best_loss is None or loss < progress.best_loss
        self.progress = replace(
            progress, worse=0 if best else progress.worse + 1, validated_step=progress.step
        )
        if best:
            self.progress = replace(
                self.progress,
                best_step=progress.step,
                best_loss=loss,
                best_bits_per_byte=per_byte,
            )
        self._keep()
        if not self.processes.first:
            return
        energy = self.energy.so_far()
        self._say(
            Validated(
                step=progress.step,
                loss=loss,
                bits_per_byte=per_byte,
                best=best,
                seconds=self._clock() - began,
                energy_j=energy.joules,
                energy_label=energy.label,
                sample=self._sample(),
            )
        )

    def _validation_loss(self) -> float:
        """Return the mean cross-entropy over the validation windows, nats a token."""
        import torch
        from torch.nn import functional as F

        data, context = self.job.data.validation, self.job.window
        begins = validation_starts(data, context, self.settings.validation_windows)
        own, ids = self.processes.share(begins), data.read()
        size = max(1, self.settings.batch // self.settings.parts // self.processes.count)
        total = 0.0
        self.model.eval()
        with torch.no_grad(), self.autocast:
            for at in range(0, len(own), size):
                inputs, targets = self._batch(ids, own[at : at + size])
                logits = self.model(inputs).flatten(0, 1).float()
                total += float(F.cross_entropy(logits, targets.flatten(), reduction="sum"))
        (nats,) = self.processes.sums(total)
        return nats / (len(begins) * context)

    def _batch(self, ids: Any, begins: Any) -> tuple[Tensor, Tensor]:
        """Return what is read and what shall follow, each (B, T) int64 on the device."""
        import torch

        both = torch.from_numpy(sequences(ids, begins, self.job.window)).to(self.device)
        return both[:, :-1], both[:, 1:]

    def _sample(self) -> str:
        """Return a text that the model writes now, always with the same random numbers."""
        if not self.settings.sample_tokens:
            return ""
        import torch

        from gptcore.engine import Engine
        from gptcore.records import Request

        self.model.eval()
        engine = Engine(self.model, load_tokenizer(self.job.tokenizer))
        request = Request(
            prompt=self.job.prompt or "\n",
            seed=self.settings.seed,
            temperature=SAMPLE_TEMPERATURE,
            max_new_tokens=self.settings.sample_tokens,
            alternatives=0,
        )
        with torch.no_grad():
            return self.job.prompt + "".join(token.text for token in engine.start(request))

    def _keep(self) -> None:
        """Write a checkpoint of this step, once."""
        clock = self._clock()
        seconds, self._since = self.progress.seconds + clock - self._since, clock
        scaler = self.scaler.state_dict() if self.scaler.is_enabled() else None
        self.progress = replace(self.progress, seconds=seconds, scaler=scaler)
        there = checkpoint.steps(self.folder)
        if self.processes.first and there[-1:] != [self.progress.step]:
            checkpoint.write(self.folder, self.model, self.optimizers, self.progress)

    def _require_number(self, value: float, name: str) -> None:
        """End the training where a value is no number any more; checkpoints are left alone."""
        if math.isfinite(value):
            return
        step = self.progress.step + 1
        there = checkpoint.steps(self.folder)
        kept = f"the checkpoint of step {there[-1]:,} is kept" if there else "no checkpoint yet"
        said = (
            f"The {name} of step {step:,} is {value}: training was stopped, {kept}. Choose a lower "
            f"learning rate than {self.settings.learning_rate:g}, a longer warm-up, or clipping."
        )
        self._say(Noted(step=self.progress.step, text=said))
        raise NumericalError(said)

    def _say(self, event: Event) -> None:
        if self.processes.first:
            self._log(event)
            self._observe(event)

    def _write_model(self) -> None:
        """Write the Hugging Face directory beside its place, and rename it into it."""
        from gptcore.weights.save import save

        target, fresh = self.folder / MODEL, self.folder / f".{MODEL}.new"
        try:
            shutil.rmtree(fresh, ignore_errors=True)
            ends = load_tokenizer(self.job.tokenizer).eos_ids
            save(self.model, fresh, end_id=min(ends, default=None))
            for name in TOKENIZER_FILES:
                if (self.job.tokenizer / name).exists():
                    shutil.copyfile(self.job.tokenizer / name, fresh / name)
            shutil.rmtree(target, ignore_errors=True)
            fresh.rename(target)
        except OSError as error:
            raise StoreError(
                f"The model could not be written to {target}: {error.strerror or error}. Make "
                "room; --resume writes it again."
            ) from None


def first_model(job: Job, device: str) -> GPT:
    """Return the model before its first step, in fp32, with weights that can be learned.

    Raises:
        InvalidWeights: those to begin with cannot be read.
    """
    if job.start is not None:
        return job.start.model(device).requires_grad_(True)
    from gptcore import weights
    from gptcore.device import Placement

    placement = Placement(device=device, precision="fp32")
    return weights.build_random(job.spec, placement, job.settings.seed).requires_grad_(True)


def optimizers(model: GPT, settings: Training, device: str) -> tuple[torch.optim.Optimizer, ...]:
    """Return what updates the weights: AdamW, and Muon for the blocks' matrices where it is asked.

    AdamW is fused where there is such a kernel; what is no matrix does not decay. Muon's updates
    are as large as AdamW's, so that both take one learning rate.
    """
    import torch

    from gptcore.train.muon import Muon

    parameters = list(model.parameters())
    by_muon = []
    if settings.optimizer == "muon":
        by_muon = [p for p in model.blocks.parameters() if p.ndim == 2]
    left = {id(p) for p in parameters} - {id(p) for p in by_muon}
    decaying = [p for p in parameters if id(p) in left and p.ndim >= 2]
    groups = [
        {"params": decaying, "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(
        groups,
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        fused=device.startswith(("cuda", "cpu", "mps")),
    )
    if not by_muon:
        return (adamw,)
    muon = Muon(by_muon, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    return (adamw, muon)


def wrapped(model: nn.Module, processes: Processes) -> nn.Module:
    """Return the model such that its gradients are the mean over all processes."""
    if processes.count == 1:
        return model
    from torch.nn.parallel import DistributedDataParallel

    return DistributedDataParallel(model)


def dropout(model: GPT, share: float) -> None:
    """Drop a share of what enters the residual stream, while the model is in training mode.

    Source: Srivastava et al. 2014; the places are GPT-2's ``embd_pdrop`` and ``resid_pdrop``. The
    attention's own probabilities are left whole.
    """
    if share == 0.0:
        return
    from torch.nn import functional as F

    def dropped(module: nn.Module, given: Any, out: Tensor) -> Tensor:
        return F.dropout(out, share, module.training)

    def entered(module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        return (F.dropout(given[0], share, module.training), *given[1:])

    model.blocks[0].register_forward_pre_hook(entered)
    for block in model.blocks:
        block.get_submodule("attention").register_forward_hook(dropped)
        block.get_submodule("mlp").register_forward_hook(dropped)


def autocast(precision: str, device: str) -> torch.autocast:
    """Return the context in which matrix products are in ``precision``."""
    import torch

    dtypes = {"fp32": torch.bfloat16, "bf16": torch.bfloat16, "fp16": torch.float16}
    kind = device.partition(":")[0]
    return torch.autocast(kind, dtype=dtypes[precision], enabled=precision != "fp32")


def together(module: nn.Module, last: bool) -> contextlib.AbstractContextManager[None]:
    """Let processes exchange their gradients after the last part of a batch alone."""
    from torch.nn.parallel import DistributedDataParallel

    if last or not isinstance(module, DistributedDataParallel):
        return contextlib.nullcontext()
    return module.no_sync()


def mfu_ratio(
    spec: ModelSpec, window: int, tokens_per_s: float, peak_flop_per_s: float | None
) -> float | None:
    """Return the share of the measured peak that the model's arithmetic reaches."""
    if not peak_flop_per_s:
        return None
    flop = 6 * spec.parameters + 12 * spec.layers * spec.q_width * window
    return flop * tokens_per_s / peak_flop_per_s


def peak_memory(device: str) -> int | None:
    """Return the most bytes that this process has held so far, None where unknown."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    if device != "cpu":
        return None
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else 1024 * size


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Return what is not the same, as a person calls it; empty where nothing is."""
    names = {"data": "corpus", "start": "first model"}
    found = [
        names.get(key, key) for key in after if key != "settings" and before.get(key) != after[key]
    ]
    known = {**Training().model_dump(mode="json"), **before["settings"]}
    found += [
        f"{key.replace('_', ' ')} ({known[key]}, not {value})"
        for key, value in after["settings"].items()
        if known[key] != value
    ]
    return ", ".join(found)


def _does_not_fit(error: RuntimeError, sequences_at_once: int) -> Exception:
    """Return what a full memory means to a person; any other error as it is."""
    text = str(error).lower()
    if "out of memory" not in text and "allocate memory" not in text:
        return error
    return DoesNotFit(
        f"{sequences_at_once:,} sequences at once do not fit into memory: compute the batch in "
        "more parts, or choose a smaller one."
    )
