"""The host process: orders come as JSON lines on standard input, events leave on the output.

Orders: ``generate``, ``inspect`` (a look at logits), ``work``, ``cancel``, ``unload``. Events:
``hello``, ``phase``, ``token``, ``numbers``, ``partial``, ``ended``, ``loaded``. An order to
generate that comes while others are written by the same variant joins them; all other orders wait
until nothing runs. The end of the input means that the server is gone: what runs is interrupted,
written down, and the process ends.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import queue
import signal
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from typing import Any, BinaryIO

from gptcore.catalogue import open_catalogue
from gptcore.errors import Cancelled, GptcoreError, StoreError, internal_error
from gptcore.host.sitting import Job
from gptcore.host.wire import encode, run_from_json, run_to_json, token_to_json
from gptcore.host.worker import Watcher, Worker
from gptcore.host.works import work_from_json
from gptcore.recipe import Variant
from gptcore.records import Request, Run, RunState, Token, now
from gptcore.store import Store, open_store
from gptcore.work import Work

FAREWELL_S = 3.0
"""How long a host may take to write down an interrupted run before it is ended anyway."""


class HostProcess:
    """Reads orders in one thread, works in the main one, and saves generations in a third.

    A generation that is saved must not hold up those that are still written; other work begins
    when all is saved.
    """

    def __init__(
        self, device: str, store: Store | None, orders: BinaryIO, events: BinaryIO
    ) -> None:
        self._worker = Worker(device, open_catalogue())
        self._store = store
        self._orders = orders
        self._events = events
        self._sending = threading.Lock()
        self._work: queue.SimpleQueue[Mapping[str, Any] | None] = queue.SimpleQueue()
        self._next: deque[Mapping[str, Any] | None] = deque()
        """Taken from there and put back: it comes before the others."""
        self._saving: queue.Queue[Callable[[], object]] = queue.Queue()
        self._cancelled: set[str] = set()
        self._server_gone = threading.Event()

    def serve(self) -> None:
        """Work until the input ends."""
        threading.Thread(target=self._listen, name="orders", daemon=True).start()
        threading.Thread(target=self._save_on, name="saving", daemon=True).start()
        import torch

        self._send({"event": "hello", "pid": os.getpid(), "torch": str(torch.__version__)})
        while (order := self._next.popleft() if self._next else self._work.get()) is not None:
            if order["op"] == "generate":
                self._generate(order)
            else:
                self._saving.join()
                if order["op"] == "unload":
                    self._worker.unload()
                else:
                    self._run(order)
            self._send_loaded()
        self._saving.join()

    def _save_on(self) -> None:
        while True:
            save = self._saving.get()
            try:
                save()
            except Exception:  # the next one must still be saved
                traceback.print_exc(file=sys.stderr)
            finally:
                self._saving.task_done()

    def _listen(self) -> None:
        for line in self._orders:
            order = json.loads(line)
            if order["op"] == "cancel":
                self._cancelled.add(order["id"])
            else:
                self._work.put(order)
        self._server_gone.set()
        self._work.put(None)
        farewell = threading.Timer(FAREWELL_S, os._exit, (0,))
        farewell.daemon = True
        farewell.start()

    def _generate(self, order: Mapping[str, Any]) -> None:
        """Generate, together with what comes meanwhile for the same variant."""
        variant = order["variant"]
        taken: dict[str, Mapping[str, Any]] = {}

        def job_of(order: Mapping[str, Any]) -> Job | None:
            run = run_from_json(order["run"])
            taken[run.id] = order

            def on_ended(finished: Run, tokens: tuple[Token, ...]) -> None:
                self._send_loaded()
                self._saving.put(partial(self._finish, finished, tokens))

            def on_error(error: Exception) -> None:
                self._saving.put(partial(self._broken, run, error))

            self._saving.put(partial(self._begin, run))
            try:
                request = Request.model_validate(order["request"])
                Variant.model_validate(variant)
            except Exception as error:
                on_error(error)
                return None
            return Job(run, request, self._watcher(run), order["sent_at"], on_ended, on_error)

        def arrived() -> Job | None:
            while (another := self._joining(variant)) is not None:
                if job := job_of(another):
                    return job
            return None

        if first := job_of(order):
            later = self._worker.generate_together(Variant.model_validate(variant), first, arrived)
            if later is not None:
                self._next.appendleft(taken[later.run.id])

    def _joining(self, variant: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """Return the next order if it is to generate with this variant, and leave it else."""
        if not self._next:
            try:
                self._next.append(self._work.get_nowait())
            except queue.Empty:
                return None
        order = self._next[0]
        if order is None or order["op"] != "generate" or order["variant"] != variant:
            return None
        return self._next.popleft()

    def _watcher(self, run: Run) -> Watcher:
        return Watcher(
            cancelled=lambda: run.id in self._cancelled or self._server_gone.is_set(),
            on_phase=lambda phase, progress: self._send(
                {"event": "phase", "id": run.id, "phase": phase, "progress": progress}
            ),
            on_token=lambda token: self._send(
                {"event": "token", "id": run.id, "token": token_to_json(token)}
            ),
            on_numbers=lambda numbers: self._send(
                {"event": "numbers", "id": run.id, "numbers": asdict(numbers)}
            ),
            on_partial=lambda result: self._send(
                {"event": "partial", "id": run.id, "result": result}
            ),
            on_measured=lambda one: self._save(lambda store: store.add_measurements([one])),
        )

    def _run(self, order: Mapping[str, Any]) -> None:
        """Do what is done alone."""
        run = run_from_json(order["run"])
        watcher = self._watcher(run)
        try:
            if order["op"] == "work":
                self._perform(run, work_from_json(run.kind, run.settings), watcher)
                return
            variant = Variant.model_validate(order["variant"])
            request = Request.model_validate(order["request"])
            self._look(run, variant, request, order["answer_ids"], watcher)
        except Exception as error:  # the loop must live on
            self._broken(run, error)

    def _broken(self, run: Run, error: Exception) -> None:
        """End a run with an error of this program: the run says what, the log says where."""
        traceback.print_exception(error, file=sys.stderr)
        kind, sentence = internal_error(error)
        failed = replace(
            run, state=RunState.FAILED, ended_at=now(), error_kind=kind, error=sentence
        )
        self._finish(failed, ())

    def _begin(self, run: Run) -> None:
        self._save(lambda store: store.update_run(run.id, state=RunState.RUNNING, started_at=now()))

    def _perform(self, run: Run, work: Work, watcher: Watcher) -> None:
        self._begin(run)
        self._finish(self._worker.perform(run, work, watcher), ())

    def _look(
        self, run: Run, variant: Variant, request: Request, answer_ids: list[int], watcher: Watcher
    ) -> None:
        try:
            ids, logits = self._worker.next_logits(variant, request, answer_ids, watcher)
        except Cancelled as error:
            self._end(replace(run, state=RunState.CANCELLED, error=str(error)), saved=True)
        except GptcoreError as error:
            failed = replace(run, state=RunState.FAILED, error_kind=error.kind, error=str(error))
            self._end(failed, saved=True)
        else:
            packed = base64.b64encode(logits.astype("<f4").tobytes()).decode()
            self._end(replace(run, state=RunState.DONE), saved=True, ids=ids, logits=packed)

    def _finish(self, run: Run, tokens: tuple[Token, ...]) -> None:
        if self._server_gone.is_set() and run.state is RunState.CANCELLED:
            run = replace(
                run,
                state=RunState.INTERRUPTED,
                error_kind="interrupted",
                error="The server ended while this was running.",
            )
        self._end(run, saved=self._save(lambda store: store.finish_run(run, tokens)))

    def _end(self, run: Run, **more: Any) -> None:
        self._cancelled.discard(run.id)
        self._send({"event": "ended", "id": run.id, "run": run_to_json(run), **more})

    def _save(self, write: Callable[[Store], object]) -> bool:
        if self._store is None:
            return False
        try:
            write(self._store)
        except StoreError as error:
            print(f"could not be saved: {error}", file=sys.stderr)  # noqa: T201
            return False
        return True

    def _send_loaded(self) -> None:
        self._send(
            {
                "event": "loaded",
                "variants": [
                    {
                        "hash": key,
                        "model": one.variant.model,
                        "precision": one.variant.precision,
                        "bytes": one.resident_bytes,
                        "coverage": {
                            name: {
                                "converted_weights": c.converted_weights,
                                "total_weights": c.total_weights,
                                "skipped": c.skipped,
                            }
                            for name, c in one.coverage.items()
                        },
                    }
                    for key, one in self._worker.loaded.items()
                ],
            }
        )

    def _send(self, message: Mapping[str, Any]) -> None:
        line = encode(message)
        try:
            with self._sending:
                self._events.write(line)
                self._events.flush()
        except (BrokenPipeError, ValueError):
            self._server_gone.set()


def main() -> None:
    """Run a host until its input ends."""
    parser = argparse.ArgumentParser(prog="gptcore.host")
    parser.add_argument("--device", required=True)
    parser.add_argument("--database", help="its URL; without one nothing is saved here")
    arguments = parser.parse_args()
    # Libraries that print must not disturb the events: the output is kept under another number.
    events = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the server's; its end is our end
    store = None
    if arguments.database:
        try:
            store = open_store(arguments.database)
        except StoreError as error:
            print(error, file=sys.stderr)  # noqa: T201
    HostProcess(arguments.device, store, sys.stdin.buffer, events).serve()
