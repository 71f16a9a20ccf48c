"""The command line as a user has it: processes, folders, what they print."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NO_FAULTS: Mapping[str, str] = {}


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


class Prefloop:
    """Runs ``prefloop`` with runs under one folder."""

    def __init__(self, runs: Path, *defaults: str) -> None:
        self.runs, self.defaults = runs, defaults

    def run(
        self,
        *overrides: str,
        config: str | Path = "configs/quickstart.yaml",
        timeout_s: float = 400,
        faults: Mapping[str, str] = NO_FAULTS,
    ) -> Outcome:
        """To its end; `faults`: variables that arm some, see `stages.faults`."""
        process = self._start(config, overrides, faults)
        out, err = process.communicate(timeout=timeout_s)
        return Outcome(process.returncode, out, err)

    def interrupted(
        self,
        *overrides: str,
        when: Callable[[], bool],
        by: signal.Signals = signal.SIGINT,
        config: str | Path = "configs/quickstart.yaml",
        faults: Mapping[str, str] = NO_FAULTS,
    ) -> Outcome:
        """Started as in a terminal, and sent Ctrl-C (to the whole process group) once `when` holds.

        Args:
            by: another signal goes to the command alone.
        """
        process = self._start(config, overrides, faults)
        while process.poll() is None and not when():
            time.sleep(0.05)
        if process.poll() is None:
            os.killpg(process.pid, by) if by == signal.SIGINT else process.send_signal(by)
        out, err = process.communicate(timeout=120)
        return Outcome(process.returncode, out, err)

    def disturbed(self, *overrides: str, when: Callable[[], bool], disturb: Callable[[], object]) -> Outcome:
        """Run to its end; once `when` holds, `disturb` is called."""
        process = self._start("configs/quickstart.yaml", overrides)
        while process.poll() is None and not when():
            time.sleep(0.02)
        disturb()
        out, err = process.communicate(timeout=400)
        return Outcome(process.returncode, out, err)

    def status(self, folder: Path) -> Outcome:
        return self.command("status", folder)

    def command(self, *words: object, sets: tuple[str, ...] = ()) -> Outcome:
        """Any command, with no default of these tests."""
        options = [part for override in sets for part in ("--set", override)]
        command = [*COMMAND, *map(str, words), *options]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
        return Outcome(done.returncode, done.stdout, done.stderr)

    def _start(
        self, config: str | Path, overrides: tuple[str, ...], faults: Mapping[str, str]
    ) -> subprocess.Popen[str]:
        sets = [part for o in (f"run.dir={self.runs}", *self.defaults, *overrides) for part in ("--set", o)]
        return subprocess.Popen(
            [*COMMAND, "run", str(config), *sets],
            cwd=ROOT,
            env=os.environ | faults,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=_hear_ctrl_c,
        )


def _hear_ctrl_c() -> None:
    """As in a terminal, whoever started the tests: a shell's background jobs inherit an ignored SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


COMMAND = [sys.executable, "-m", "pipeline"]
SMALL = ("rounds=2", "prompts.per_round=128", "prompts.shard_size=64", "evaluate.num_prompts=256")


@pytest.fixture(scope="session")
def prefloop(tmp_path_factory) -> Prefloop:
    return Prefloop(tmp_path_factory.mktemp("runs"), *SMALL)
