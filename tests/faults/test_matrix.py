"""Kill anything at any time: the run ends as if nothing had happened. Real kills, the quickstart at small size."""

from __future__ import annotations

import signal
from collections import Counter

import pytest
from faulty_run import LOST_RAY, FaultyRun, refuse_wrong_end
from matrix import WHO, cells_of

from stages.faults import fired

pytestmark = pytest.mark.faults

SURVIVED = ("sampler", "scorer", "rank 0", "rank 1")
"""Whose death the driver outlives, so that their kills share a run."""


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("who", WHO)
def test_a_run_ends_as_if_nobody_had_died(runs, undisturbed, note, who):
    cells = cells_of(who)
    run = FaultyRun(runs, who.replace(" ", "-"), [cell.fault for cell in cells])
    try:
        run.finish(at_most=1 if who in SURVIVED else 1 + len(cells))
        assert [len(times) for times in fired(run.marks).values()] == [1] * len(cells), fired(run.marks)
        refuse_wrong_end(run, undisturbed.results())
        codes = Counter(call.code for call in run.calls)
        assert codes == ({0: 1} if who in SURVIVED else {0: 1, -signal.SIGKILL if who == "driver" else 1: len(cells)})
        assert who != "raylet" or all(call.err.count(LOST_RAY) == 1 for call in run.calls[:-1])
        ends = "right"
    except BaseException:
        ends = "WRONG"
        raise
    finally:
        for cell in cells:
            note((cell.who, cell.when), ends)
        seconds = sum(call.seconds for call in run.calls)
        told = f"{who}: {len(cells)} kills, {len(run.calls)} calls, {seconds:.0f} s, undisturbed "
        note(None, told + f"{undisturbed.calls[0].seconds:.0f} s")
