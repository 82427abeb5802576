"""A training in a process of its own, started and watched from here. Imports no torch.

It is the command line's ``train``: it yields the device to a generation between steps, leaves a
checkpoint when it is stopped, and goes on from it. When this process dies it is stopped too.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gptcore.errors import Cancelled, InvalidInput
from gptcore.paths import ROOT, data_dir
from gptcore.train.events import Stepped, read_log
from gptcore.train.order import Order
from gptcore.train.settings import Training

POLL_S = 0.5
STOP_S = 30.0
"""How long a training may take to leave its checkpoint before it is ended anyway."""
PR_SET_PDEATHSIG = 1
SAID_CHARS = 400

Tell = Callable[[str, float | None], None]


def new_folder() -> Path:
    """Make a folder for a training, under the next free number.

    Raises:
        StoreError: the data folder cannot be used.
    """
    trainings = data_dir() / "trainings"
    trainings.mkdir(exist_ok=True)
    number = 1
    while True:
        folder = trainings / f"{number:04d}"
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            return folder
        number += 1


def arguments(
    order: Order,
    folder: Path,
    *,
    name: str = "",
    device: str = "cpu",
    threads: int = 0,
    minutes: float | None = None,
    resume: bool = False,
) -> list[str]:
    """Return the command that trains what was ordered."""
    command = [sys.executable, "-m", "gptcore", "train", "--json", "--wait", "--to", str(folder)]
    command += ["--device", device, "--threads", str(threads)]
    if name:
        command += ["--add", name]
    if minutes is not None:
        command += ["--minutes", str(minutes)]
    if resume:
        return [*command, "--resume"]
    for owner, values in ((Order, order), (Training, order.settings)):
        for field in owner.model_fields:
            if field != "settings" and (value := getattr(values, field)) != "":
                command += [f"--{field.replace('_', '-')}", str(value)]
    return command


def run(
    command: list[str], folder: Path, tell: Tell, cancelled: Callable[[], bool]
) -> dict[str, Any]:
    """Run a training to its end and return its outcome.

    Args:
        command: of ``arguments``.
        folder: of the training; its log tells the progress.
        tell: told what is being done and the share done.
        cancelled: asked twice a second; then the training leaves a checkpoint and ends.

    Raises:
        InvalidInput: it was refused or failed, with its own sentence.
        Cancelled: it was stopped; it can go on.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as said:
        child = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=said,
            preexec_fn=_die_with_us if sys.platform == "linux" else None,
        )
        stopping = False
        while child.poll() is None:
            if cancelled() and not stopping:
                stopping = True
                tell("leaving a checkpoint", None)
                child.send_signal(signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(STOP_S)
                child.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(POLL_S)
            if not stopping:
                tell(*progress(folder))
        out.seek(0)
        said.seek(0)
        printed, text = out.read(), said.read().strip()
    if stopping:
        raise Cancelled("Stopped; a checkpoint is kept, and the training can go on from it.")
    if child.returncode:
        last = text.splitlines()[-1] if text else f"the process ended with {child.returncode}."
        raise InvalidInput(last[-SAID_CHARS:])
    found: dict[str, Any] = json.loads(printed)
    return found


def progress(folder: Path) -> tuple[str, float | None]:
    """Return what a training does and the share of its steps that is done."""
    steps = [event for event in read_log(folder) if isinstance(event, Stepped)]
    if not steps:
        return "preparing the texts", None
    last = steps[-1]
    wanted = Order.model_validate_json((folder / "order.json").read_text()).settings.steps
    return f"step {last.step:,} of {wanted:,}, loss {last.loss:.3f}", last.step / wanted


def _die_with_us() -> None:
    """Be stopped, as by Ctrl-C, when the thread that started this process ends."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGINT)
    os.setpgid(0, 0)
