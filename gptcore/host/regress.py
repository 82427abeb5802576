"""Whether what is here now is slower than a baseline: both are measured again, in turn.

The numbers that the baseline left are not used: a machine differs from itself by more between two
days than a slowdown that one wants to find. So the baseline's variant is loaded and measured beside
the other one. Where it was measured with another commit of this program, that commit's code is
taken from git and runs in a process of its own, as the program of today then does too.
"""

from __future__ import annotations

import io
import json
import os
import select
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field
from typing_extensions import override

from gptcore.errors import InvalidInput
from gptcore.host import side as side_program
from gptcore.measure.compare import Compare, Sides
from gptcore.measure.guard import CONDITIONS
from gptcore.measure.timing import Cell, Times
from gptcore.paths import ROOT, data_dir
from gptcore.recipe import Variant
from gptcore.records import Provenance, Run, RunKind
from gptcore.sentences import brief, one_line
from gptcore.work import Desk

PROGRAM = ("git_commit", "app_version")
"""Conditions that are measured and not guarded, where git has the baseline's program."""
OF_VARIANT = ("threads",)
"""Conditions that belong to what is asked about."""
POLL_S = 0.2
LAST_WORDS = 200
"""Characters of what a side said before it died."""


class Regress(Compare):
    """Measure a variant beside the baseline's, and say whether it is slower."""

    kind: ClassVar[RunKind] = RunKind.REGRESS

    baseline: str = Field(min_length=1, max_length=64, description="The run that is held against.")
    program: str | None = Field(
        None,
        pattern="[0-9a-f]{7,40}",
        description="The commit whose program measures A; empty: the same as B's.",
    )
    tolerated: float = Field(
        0.0,
        ge=0.0,
        le=10.0,
        title="Tolerated slowdown",
        description="A slowdown by no more than this share is none.",
    )

    @property
    @override
    def is_noise(self) -> bool:
        """Whether both sides are the same variant in the same program."""
        return self.program is None and super().is_noise

    @override
    def perform(self, desk: Desk) -> Mapping[str, Any]:
        """Measure, and return a comparison's result with what became slower."""
        found = dict(super().perform(desk))
        # Energy is told, but only time can be slow.
        slower = [
            one
            for one in found["comparisons"]
            if one["verdict"] == "slower" and one["coloured"] and one["ratio"] > 1 + self.tolerated
        ]
        return found | {
            "baseline": self.baseline,
            "programs": self.programs,
            "tolerated": self.tolerated,
            "slower": slower,
            "regressed": bool(slower),
        }

    @property
    def programs(self) -> str:
        """Which programs measured, as a sentence."""
        if self.program is None:
            return "Both sides were measured with the program of today."
        return (
            f"A was measured with the program of commit {self.program}, B with that of today, each "
            "in a process of its own."
        )

    @override
    def _sides(self, desk: Desk) -> Sides:
        return Sides(self, desk) if self.program is None else _Programs(self, desk, self.program)


class _Programs(Sides):
    """Each side in a process of its own, A with the program of another commit."""

    def __init__(self, work: Regress, desk: Desk, commit: str) -> None:
        super().__init__(work, desk)
        self.residency = "each side in a process of its own, both loaded all the time"
        self._folder = tempfile.TemporaryDirectory(prefix="gptlab-program-")
        self._sides: list[_Process] = []
        self._commit = commit

    @override
    def load(self) -> None:
        self._desk.phase(f"fetching the program of {self._commit}")
        old = unpacked(self._commit, Path(self._folder.name))
        for side, (tree, variant) in enumerate(zip((old, ROOT), self._work.variants, strict=True)):
            self._desk.phase(f"loading {'AB'[side]}")
            words = Path(self._folder.name) / f"{side}.log"
            self._sides.append(_Process(tree, self._desk, words))
            order = {"variant": variant.model_dump(mode="json"), "device": self._desk.device}
            if answer := self._answer(side, order):
                self._facts[side] = {**answer, "coverage": {}}

    @override
    def block(self, side: int, cell: Cell) -> tuple[list[Times], float | None] | None:
        if side in self.problems:
            return None
        work = self._work
        answer = self._answer(
            side,
            {
                "cell": cell.model_dump(),
                "seed": work.seed,
                "block_s": work.block_s,
                "delay_ratio": work.delay_ratio if side else 0.0,
            },
        )
        return ([Times(**one) for one in answer["times"]], None) if answer else None

    def _answer(self, side: int, order: Mapping[str, Any]) -> dict[str, Any] | None:
        answer = self._sides[side].answer(order)
        if said := answer.get("problem"):
            self.problems[side] = said
            return None
        return answer

    @override
    def close(self) -> None:
        for one in self._sides:
            one.close()
        self._folder.cleanup()


class _Process:
    """A process that answers orders with the program of a tree."""

    def __init__(self, tree: Path, desk: Desk, words: Path) -> None:
        start = (
            "import runpy, sys; sys.path.insert(0, sys.argv[1]); "
            "runpy.run_path(sys.argv[2], run_name='__main__')"
        )
        self._desk = desk
        self._words = words
        with words.open("wb") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-c", start, str(tree), str(side_program.__file__)],
                env={**os.environ, "GPTLAB_DATA": str(data_dir())},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
            )

    def answer(self, order: Mapping[str, Any]) -> dict[str, Any]:
        """Return the answer to an order; the last words where the process died of it.

        Raises:
            Cancelled: the user stopped the work.
        """
        asks, answers = self._process.stdin, self._process.stdout
        assert asks is not None
        assert answers is not None
        try:
            asks.write(json.dumps(order).encode() + b"\n")
            asks.flush()
            while not select.select([answers], [], [], POLL_S)[0]:
                self._desk.check()
            line = answers.readline()
        except BrokenPipeError:
            line = b""
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        said = self._words.read_text(errors="replace").strip() or "it said nothing"
        return {"problem": f"its program ended: {one_line(said.splitlines()[-1], LAST_WORDS)}"}

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()


def unpacked(commit: str, folder: Path) -> Path:
    """Write the program of a commit of this checkout into a folder, and return the folder.

    Raises:
        InvalidInput: git does not have it.
    """
    try:
        packed = subprocess.run(
            ["git", "archive", "--format=tar", commit, "gptcore", "data/texts"],
            cwd=ROOT,
            capture_output=True,
            timeout=60,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        raise InvalidInput(
            f"Git has no program of the commit {brief(commit)} here: accept git_commit by name to "
            "measure both sides with the program of today, or measure a new baseline."
        ) from None
    with tarfile.open(fileobj=io.BytesIO(packed.stdout)) as archive:
        archive.extractall(folder, filter="data")
    return folder


def has_program(commit: str) -> bool:
    """Return whether git can give the program of a commit."""
    command = ["git", "cat-file", "-e", f"{commit}:gptcore/host/worker.py"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, timeout=10).returncode == 0
    except (OSError, subprocess.SubprocessError):
        return False


def regression(
    baseline: Run,
    variant: Variant,
    made: Provenance | None,
    candidate: Variant,
    here: Provenance,
    *,
    accepted: Sequence[str] = (),
    **more: Any,
) -> Regress:
    """Return the work that holds ``candidate`` against the run of a baseline.

    Args:
        baseline: a run that measured, or generated.
        variant: the one that it measured.
        made: what made its numbers, None if unknown.
        candidate: what may have become slower.
        here: this machine and program.
        accepted: conditions in which here and there may differ, by name.
        more: fields of ``Regress``; cells are the baseline's unless they are given.

    Raises:
        InvalidInput: a condition differs that was not accepted.
    """
    program = None
    differing = _differing(made, here)
    if "git_commit" in differing and "git_commit" not in accepted:
        commit = (made and made.git_commit) or ""
        if commit and not commit.endswith("+") and has_program(commit):
            program = commit
            differing = {name: both for name, both in differing.items() if name not in PROGRAM}
    for name, (then, now) in differing.items():
        if name not in accepted:
            raise InvalidInput(_refusal(name, then, now))
    cells = more.pop("cells", ()) or cells_of(baseline)
    return Regress(
        variants=(variant, candidate),
        cells=cells,
        baseline=baseline.id,
        program=program,
        accepted=tuple(accepted),
        **more,
    )


def cells_of(run: Run) -> tuple[Cell, ...]:
    """Return what a run measured; for a generation a cell of its size."""
    if kept := run.settings.get("cells"):
        return tuple(Cell.model_validate(one) for one in kept)
    if run.numbers and run.numbers.prompt_tokens and run.numbers.new_tokens > 1:
        return (Cell(prompt_tokens=run.numbers.prompt_tokens, new_tokens=run.numbers.new_tokens),)
    raise InvalidInput(
        f"Run {brief(run.id)} is of the kind {run.kind} and measured no speed: choose a bench, a "
        "comparison or a generation as the baseline."
    )


def _differing(made: Provenance | None, here: Provenance) -> dict[str, tuple[str, str]]:
    def said(value: object) -> str:
        return "unknown" if value is None else str(value)

    return {
        name: (said(getattr(made, name, None)), said(getattr(here, name)))
        for name in CONDITIONS
        if name not in OF_VARIANT and (made is None or getattr(made, name) != getattr(here, name))
    }


def _refusal(name: str, then: str, now: str) -> str:
    if name == "git_commit":
        return (
            f"The baseline was measured with the program of commit {then}, which git cannot give "
            f"back (today's is {now}; + marks changes that were not committed). Accept git_commit "
            "by name to measure both sides with the program of today, or measure a new baseline."
        )
    return (
        f"The baseline was measured where {name} was {then}, and here it is {now}. Accept {name} "
        "by name to measure both sides here all the same."
    )
