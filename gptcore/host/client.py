"""The server's side of a host: a queue, one host process at a time, and what runs now. No torch.

The queue lives here, so that what waits survives the death of a host. One thread a device hands
over the work in the order of its arrival and sees to what became of it; one thread a process reads
its events. Generations of one variant are handed over together, all other work alone: what comes
next waits until the host can take it, and so does everything behind it.
"""

from __future__ import annotations

import base64
import json
import logging
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np

from gptcore.errors import HostLost
from gptcore.host.wire import READING, encode, run_from_json, run_to_json, token_from_json
from gptcore.paths import ROOT
from gptcore.recipe import Variant
from gptcore.records import Numbers, Request, Run, RunState, Token, now

log = logging.getLogger(__name__)

START_S = 60.0
"""How long a host may take to say hello; importing torch took 2 s here."""
LOOK_S = 0.1
"""How often the process is looked at while it works."""
MOST_TOGETHER = 32
"""Generations that a host is given together, at most; more than these wait in the queue."""
ATTEMPTS = 2
"""Processes that an order is given to, where the first one says nothing of it."""


@dataclass(frozen=True, slots=True)
class Held:
    """A variant that a host has in memory."""

    hash: str
    model: str
    precision: str
    resident_bytes: int
    coverage: Mapping[str, Any]


class LiveRun:
    """A run that is queued, running, or has just ended: what the pages look at."""

    def __init__(self, run: Run) -> None:
        self._lock = threading.Lock()
        self._run = run
        self._tokens: list[Token] = []
        self._phase = "queued"
        self._progress: float | None = None
        self.ended = threading.Event()
        self.logits: tuple[tuple[int, ...], np.ndarray] | None = None
        self.problem: str | None = None
        """Why the run could not be saved, where it could not."""
        self.cancelled = threading.Event()

    def look(self) -> tuple[Run, tuple[Token, ...], str, float | None]:
        """Return run (with the text so far), tokens, phase and progress, all of one moment."""
        with self._lock:
            run, tokens = self._run, tuple(self._tokens)
            phase, progress = self._phase, self._progress
        if not run.state.final:
            run = replace(run, text="".join(token.text for token in tokens))
        return run, tokens, phase, progress

    def change(self, **changes: Any) -> Run:
        """Replace fields of the run and return it."""
        with self._lock:
            self._run = replace(self._run, **changes)
            return self._run

    def say(self, phase: str, progress: float | None = None) -> None:
        """Set the phase that a page shows."""
        with self._lock:
            self._phase, self._progress = phase, progress

    def add(self, token: Token) -> None:
        """Take one more token."""
        with self._lock:
            self._tokens.append(token)
            self._phase, self._progress = "writing", None

    def end(self, run: Run, then: Callable[[], None] = lambda: None) -> None:
        """Take the final state; who waits for the end goes on after ``then``."""
        with self._lock:
            self._run = run
            self._phase, self._progress = str(run.state), None
        try:
            then()
        finally:
            self.ended.set()


@dataclass(frozen=True, slots=True)
class Order:
    """One piece of work for a host."""

    live: LiveRun
    run_id: str
    op: str
    """"generate", "inspect", or "work", which lies in the run's kind and settings."""
    variant: Variant | None = None
    request: Request | None = None
    sent_at: float = 0.0
    answer_ids: tuple[int, ...] = ()


@dataclass(slots=True, eq=False)
class _Handed:
    """An order that a process has been given."""

    order: Order
    process: subprocess.Popen[bytes] | None
    attempts: int = 1
    heard: bool = False
    """Whether the process said anything of it."""
    is_open: bool = False
    """Whether its variant is loaded and the device taken, so that others can join."""
    is_over: bool = False
    """Whether the process told its end, which is being taken in."""

    @property
    def is_lost(self) -> bool:
        """Whether its process is gone, and did not tell its end before."""
        gone = self.process is not None and self.process.poll() is not None
        return gone and not self.is_over


class HostClient:
    """Owns the queue of one device and the process that works it off."""

    def __init__(
        self,
        device: str,
        *,
        database_url: str | None,
        log_file: Path,
        on_token: Callable[[Token], None] = lambda token: None,
        on_ended: Callable[[LiveRun, bool], None] = lambda live, saved: None,
    ) -> None:
        """Start the dispatching thread; the process starts with the first work, or ``warm``.

        Args:
            device: its id.
            database_url: where the host writes runs; None if it shall not.
            log_file: takes the host's standard error.
            on_token: called with every token.
            on_ended: called with every ended run, and whether the host saved it.
        """
        self.device = device
        self._database_url = database_url
        self._log_file = log_file
        self._on_token = on_token
        self._on_ended = on_ended
        self._changed = threading.Condition()
        self._waiting: deque[Order | str] = deque()
        self._handed: dict[str, _Handed] = {}
        """What runs, by run id."""
        self._attempts: dict[str, int] = {}
        """How many processes were given an order that waits again, because none answered."""
        self._process: subprocess.Popen[bytes] | None = None
        self._held: tuple[Held, ...] = ()
        self._hello: Mapping[str, Any] | None = None
        self._restarts = 0
        self._closed = False
        self._sending = threading.Lock()
        self._thread = threading.Thread(target=self._dispatch, name=f"host {device}", daemon=True)
        self._thread.start()

    @property
    def pid(self) -> int | None:
        """The process id of the host, None while there is none."""
        process = self._process
        return process.pid if process and process.poll() is None else None

    @property
    def held(self) -> tuple[Held, ...]:
        """What the host has in memory."""
        return self._held if self.pid else ()

    @property
    def running(self) -> tuple[LiveRun, ...]:
        """What is being worked on."""
        return tuple(one.order.live for one in tuple(self._handed.values()))

    @property
    def waiting(self) -> int:
        """How many runs wait."""
        return sum(isinstance(one, Order) for one in tuple(self._waiting))

    def describe(self) -> str:
        """Return the state of the host in a few words."""
        if not self.pid:
            return "not started" if not self._restarts else "ended; starts with the next run"
        state = "busy" if self._handed else "idle"
        return f"{state}, process {self.pid}, {len(self._held)} loaded, {self.waiting} waiting"

    def warm(self) -> None:
        """Start the process now, so that the first run need not wait for it."""
        self._put("warm")

    def unload(self) -> None:
        """Free the memory of what is loaded, after the work in hand."""
        self._put("unload")

    def submit(self, order: Order) -> None:
        """Put one piece of work at the end of the queue."""
        self._put(order)

    def place(self, run_id: str) -> int | None:
        """Return the run's place in the queue (1 is next), None if it does not wait."""
        waiting = [one.run_id for one in tuple(self._waiting) if isinstance(one, Order)]
        return waiting.index(run_id) + 1 if run_id in waiting else None

    def cancel(self, run_id: str) -> None:
        """End a run: at once if it waits, within one token if it runs."""
        with self._changed:
            for one in self._waiting:
                if isinstance(one, Order) and one.run_id == run_id:
                    self._waiting.remove(one)
                    self._end(one, RunState.CANCELLED, None)
                    self._changed.notify_all()
                    return
            handed = self._handed.get(run_id)
        if handed:
            handed.order.live.cancelled.set()
            self._send({"op": "cancel", "id": run_id})

    def close(self) -> None:
        """End the process; what runs becomes interrupted, what waits too."""
        with self._changed:
            self._closed = True
            waiting = [one for one in self._waiting if isinstance(one, Order)]
            self._waiting.clear()
            self._changed.notify_all()
        for one in waiting:
            self._end(one, RunState.INTERRUPTED, "The server ended before its turn came.")
        process = self._process
        if process:
            _close_quietly(process.stdin)
            try:
                process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._thread.join(timeout=5)

    def _put(self, one: Order | str) -> None:
        with self._changed:
            self._waiting.append(one)
            self._changed.notify_all()

    def _dispatch(self) -> None:
        while True:
            with self._changed:
                while not (self._closed or self._may_go()) and not self._gone():
                    self._changed.wait(LOOK_S if self._handed else None)
                gone = self._gone()
                if self._closed and not gone:
                    if not self._handed:
                        return
                    self._changed.wait(LOOK_S)
                    continue
                one = None if gone else self._waiting.popleft()
                if isinstance(one, Order):
                    attempts = self._attempts.pop(one.run_id, 0) + 1
                    self._handed[one.run_id] = handed = _Handed(one, None, attempts)
            if one is None:
                self._bury()
            elif isinstance(one, Order):
                self._hand_over(handed)
            elif one == "warm":
                self._try_to_start()
            elif self.pid:
                self._send({"op": "unload"})

    def _may_go(self) -> bool:
        """Whether what is next can be given to the host now."""
        if not self._waiting:
            return False
        one, handed = self._waiting[0], tuple(self._handed.values())
        if not handed:
            return True
        if not isinstance(one, Order) or one.op != "generate" or len(handed) >= MOST_TOGETHER:
            return False
        return all(
            other.order.op == "generate" and other.order.variant == one.variant for other in handed
        ) and any(other.is_open for other in handed)

    def _gone(self) -> bool:
        """Whether a process is gone that had something to do."""
        return any(one.is_lost for one in tuple(self._handed.values()))

    def _try_to_start(self) -> str | None:
        """Start the process if there is none; return why it did not, where it did not."""
        try:
            self._start()
        except HostLost as error:
            return str(error)
        return None

    def _hand_over(self, handed: _Handed) -> None:
        """Give an order to the process."""
        order = handed.order
        order.live.say("starting")
        run = order.live.change(state=RunState.RUNNING, started_at=now())
        message = {
            "op": order.op,
            "run": run_to_json(run),
            "variant": order.variant.model_dump(mode="json") if order.variant else None,
            "request": order.request.model_dump(mode="json") if order.request else None,
            "answer_ids": order.answer_ids,
            "sent_at": order.sent_at,
        }
        while problem := self._try_to_start():
            if handed.attempts >= ATTEMPTS or self._closed:
                self._handed.pop(order.run_id)
                self._end(order, RunState.FAILED, problem, HostLost.kind)
                return
            handed.attempts += 1
        handed.process = self._process
        self._send(message)
        if order.live.cancelled.is_set():
            self._send({"op": "cancel", "id": order.run_id})

    def _bury(self) -> None:
        """See to what a process had to do that is gone.

        A host that was killed while idle may not be seen as dead yet, and one may be killed while
        it starts: an order that nobody answered at all goes to the next host, before all others.
        """
        time.sleep(LOOK_S)  # for what is still in the pipe
        with self._changed:
            lost = [one for one in self._handed.values() if one.is_lost]
            for one in lost:
                del self._handed[one.order.run_id]
            again = [
                one
                for one in lost
                if not one.heard and one.attempts < ATTEMPTS and not self._closed
            ]
            self._attempts |= {one.order.run_id: one.attempts for one in again}
            self._waiting.extendleft(one.order for one in reversed(again))
        for one in lost:
            if one not in again:
                self._lost(one.order, one.process)

    def _lost(self, order: Order, process: subprocess.Popen[bytes] | None) -> None:
        code = process.returncode if process else None
        how = f"was killed by signal {-code}" if code and code < 0 else f"ended with status {code}"
        if self._closed:
            self._end(order, RunState.INTERRUPTED, "The server ended while this was running.")
        else:
            self._end(
                order,
                RunState.FAILED,
                f"The process that worked on {self.device} {how}; a new one starts with the "
                "next run.",
                HostLost.kind,
            )

    def _end(
        self, order: Order, state: RunState, sentence: str | None, kind: str | None = None
    ) -> None:
        run, *_ = order.live.look()
        run = replace(run, state=state, ended_at=now(), error=sentence, error_kind=kind)
        order.live.end(run, lambda: self._on_ended(order.live, False))

    def _start(self) -> None:
        if self.pid:
            return
        self._hello, self._held = None, ()
        command = [sys.executable, "-m", "gptcore.host", "--device", self.device]
        if self._database_url:
            command += ["--database", self._database_url]
        self._log_file.parent.mkdir(parents=True, exist_ok=True)
        with self._log_file.open("ab") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, cwd=ROOT
            )
        self._restarts += 1
        threading.Thread(
            target=self._read, args=(self._process,), name=f"events {self.device}", daemon=True
        ).start()
        deadline = time.monotonic() + START_S
        while self._hello is None:
            if self._process.poll() is not None or time.monotonic() > deadline:
                self._process.kill()
                raise HostLost(
                    f"The process for {self.device} did not start; {self._log_file} has the reason."
                )
            time.sleep(0.01)

    def _send(self, message: Mapping[str, Any]) -> None:
        process = self._process
        if process is None or process.stdin is None:
            return
        try:
            with self._sending:
                process.stdin.write(encode(message))
                process.stdin.flush()
        except (BrokenPipeError, ValueError):
            return  # the process is gone; whoever waits for it sees that

    def _read(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        with process.stdout:
            try:
                for line in process.stdout:
                    if not line.endswith(b"\n"):
                        break  # the process was killed in the middle of a line
                    self._take(json.loads(line))
            except Exception:
                # Nobody would hear the process any more: it ends, and its run with a reason.
                log.exception("An event of the process for %s could not be taken", self.device)
                process.kill()
        process.wait()
        _close_quietly(process.stdin)

    def _take(self, message: Mapping[str, Any]) -> None:
        event = message["event"]
        if event == "hello":
            self._hello = message
        elif event == "loaded":
            self._held = tuple(
                Held(v["hash"], v["model"], v["precision"], v["bytes"], v["coverage"])
                for v in message["variants"]
            )
        elif handed := self._handed.get(message["id"]):
            handed.heard = True
            self._hear(handed, event, message)

    def _hear(self, handed: _Handed, event: str, message: Mapping[str, Any]) -> None:
        live = handed.order.live
        if event == "token":
            token = token_from_json(message["token"])
            live.add(token)
            self._on_token(token)
        elif event == "numbers":
            live.change(numbers=Numbers(**message["numbers"]))
        elif event == "partial":
            live.change(result=message["result"])
        elif event == "phase":
            live.say(message["phase"], message["progress"])
            if message["phase"] == READING:
                with self._changed:
                    handed.is_open = True
                    self._changed.notify_all()
        elif event == "ended":
            if "logits" in message:
                logits = np.frombuffer(base64.b64decode(message["logits"]), dtype="<f4")
                live.logits = (tuple(message["ids"]), logits)
            saved = bool(message["saved"])
            with self._changed:
                if handed.order.run_id not in self._handed:
                    return
                handed.is_over = True
            try:
                live.end(run_from_json(message["run"]), lambda: self._on_ended(live, saved))
            finally:
                with self._changed:
                    del self._handed[handed.order.run_id]
                    self._changed.notify_all()


def _close_quietly(pipe: IO[bytes] | None) -> None:
    """Close a pipe whose other end may be gone."""
    if pipe is not None:
        with suppress(BrokenPipeError):
            pipe.close()
