"""How far engine and trainer may be apart where the engine's log-probs are taken."""

from __future__ import annotations

import math
import re

from hypothesis import given
from hypothesis import strategies as st
from refusals import refused

from pipeline.jobs.engine_logps import Gap

WHERE = "round 1: update.reference_logps"


def test_a_gap_is_per_token_and_the_largest_of_an_answer():
    assert Gap.between(iter([(-1.0, -1.5, 5), (-2.0, -2.25, 5)])) == Gap(0.075, 0.5)
    assert math.isnan(Gap.between(iter([(-1.0, -1.5, 5), (math.nan, -2.0, 5)])).largest)


def test_a_floor_covers_twice_the_largest_gap_that_was_seen():
    gap = Gap(0.01, 0.25)
    gap.refuse_low_floor(WHERE, 0.5)
    for floor in (0.25, 0.49, None):
        refused(lambda floor=floor: gap.refuse_low_floor(WHERE, floor), "at least 2 times", "0.25 nats", "gate_floor=")


@given(st.floats(1e-9, 1e3))
def test_the_floor_that_is_proposed_is_enough_and_not_much_more(largest):
    gap = Gap(0.0, largest)
    error = refused(lambda: gap.refuse_low_floor(WHERE, 0.0))
    (proposed,) = map(float, re.findall(r"gate_floor=([\d.e+-]+)", error.fix))
    gap.refuse_low_floor(WHERE, proposed)
    assert proposed < 2.5 * largest
