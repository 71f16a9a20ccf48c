"""Fault points: how they are spelt, when they fire, and that they are nothing while none is armed."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from stages import faults
from stages.faults import Fault, fault_point, fired, parse_faults


@pytest.fixture
def arm(monkeypatch, tmp_path):
    def arm(text: str) -> None:
        monkeypatch.setenv(faults.FAULTS, text)
        monkeypatch.setenv(faults.FOLDER, str(tmp_path))
        faults._armed.cache_clear()

    yield arm
    monkeypatch.undo()
    faults._armed.cache_clear()


def num_raised(times: int, *on: str) -> int:
    found = 0
    for _ in range(times):
        try:
            fault_point("sample.start", on)
        except RuntimeError:
            found += 1
    return found


def test_a_fault_is_spelt_with_defaults_of_first_and_once():
    assert parse_faults("sample.start:kill; file.written[a/b]:hang@3*2") == [
        Fault("sample.start", "", "kill", 1, 1),
        Fault("file.written", "a/b", "hang", 3, 2),
    ]


@pytest.mark.parametrize("text", ["sample.start", "sample.nowhere:kill", "sample.start:faint", "sample.start[a:kill"])
def test_what_is_misspelt_is_refused(text):
    with pytest.raises(ValueError, match="POINT"):
        parse_faults(text)


def test_nothing_happens_while_none_is_armed(tmp_path):
    assert num_raised(3) == 0 and not list(tmp_path.iterdir())


def test_it_fires_the_nth_time_and_so_often_in_all(arm, tmp_path):
    arm("sample.start:raise@2*2")
    assert [num_raised(1) for _ in range(5)] == [0, 1, 1, 0, 0]
    assert [len(times) for times in fired(tmp_path).values()] == [2]


def test_it_fires_only_on_what_it_names(arm):
    arm("sample.start[round-0002]:raise")
    assert num_raised(2, "runs/round-0001/candidates") == 0
    assert num_raised(1, "runs/round-0002/candidates") == 1


def test_counts_outlive_the_process(arm, tmp_path):
    arm("sample.start:kill")
    code = "from stages.faults import fault_point; fault_point('sample.start'); print('alive')"
    found = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True) for _ in range(2)]
    assert [(each.returncode, each.stdout) for each in found] == [(-signal.SIGKILL, ""), (0, "alive\n")]
