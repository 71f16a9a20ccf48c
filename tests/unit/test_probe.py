"""Laws of the verdict on an engine that was given new weights."""

from __future__ import annotations

import json
import math
import pickle
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.sample.probe import FLOAT32_TOLERANCE, Probe, judge, measured_tolerance

# Sixty-fourths are exact in binary, so that sums of them do not depend on their order.
LOGPS = st.integers(-6400, 0).map(lambda n: n / 64)
LENGTHS = st.integers(1, 50)
ANSWERS = st.lists(st.tuples(LOGPS, LOGPS, LENGTHS), min_size=1, max_size=40)
TOLERANCES = st.sampled_from([1e-6, FLOAT32_TOLERANCE, 0.02, 1.0])


def change_of(answers):
    return sum(abs(n - o) for n, o, _ in answers) / sum(length for *_, length in answers)


@given(ANSWERS, TOLERANCES)
def test_an_engine_that_says_what_the_new_weights_say_is_proved_where_they_differ_from_the_old(answers, tolerance):
    new, old, lengths = zip(*answers, strict=True)
    verdict = judge(new, new, old, lengths, tolerance=tolerance)
    moved = sum(n != o for n, o in zip(new, old, strict=True))
    assert verdict.gap == 0
    assert verdict.kind == ("proved" if moved else "not distinguishable")
    assert verdict.num_clear == moved


@given(ANSWERS, TOLERANCES)
def test_an_engine_with_the_old_weights_fails_where_the_change_exceeds_the_tolerance_and_is_never_proved(
    answers, tolerance
):
    new, old, lengths = zip(*answers, strict=True)
    verdict = judge(old, new, old, lengths, tolerance=tolerance)
    assert verdict.kind == ("failed" if change_of(answers) > tolerance else "not distinguishable")


@given(ANSWERS, st.sampled_from([-1, 1]), TOLERANCES)
def test_noise_of_one_size_within_the_tolerance_never_fails(answers, sign, tolerance):
    new, old, lengths = zip(*answers, strict=True)
    noise = [sign * (-1) ** i * 0.9 * tolerance * length for i, length in enumerate(lengths)]
    engine = [n + x for n, x in zip(new, noise, strict=True)]
    assert judge(engine, new, old, lengths, tolerance=tolerance).kind != "failed"


@given(ANSWERS, ANSWERS, TOLERANCES)
def test_a_verdict_is_blind_to_the_order_of_the_answers(answers, others, tolerance):
    def verdict(rows):
        engine, new, old, lengths = zip(*rows, strict=True)
        return judge(engine, new, old, lengths, tolerance=tolerance)

    rows = [(e, n, o, length) for (e, *_), (n, o, length) in zip(others, answers, strict=False)]
    assert verdict(rows) == verdict(rows[::-1])


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_log_prob_that_is_not_finite_fails_and_the_verdict_is_still_json(place, value):
    columns = [[-1.0, -2.0], [-1.0, -2.0], [-1.5, -2.5]]
    columns[place][1] = value
    verdict = judge(*columns, [3, 3], tolerance=1.0)
    assert verdict.kind == "failed" and verdict.gap is None
    assert "not finite" in str(verdict)
    json.dumps(asdict(verdict), allow_nan=False)


def test_without_answers_nothing_can_be_told():
    verdict = judge([], [], [], [], tolerance=FLOAT32_TOLERANCE)
    assert (verdict.kind, verdict.num_answers, verdict.nearer) == ("not distinguishable", 0, None)
    json.dumps(asdict(verdict), allow_nan=False)


def test_a_few_answers_that_stayed_old_fail_though_the_mean_is_within_the_tolerance():
    new, old, lengths = [-10.0] * 40, [-10.5] * 40, [10] * 40
    engine = [-10.5] * 3 + [-10.0] * 37
    verdict = judge(engine, new, old, lengths, tolerance=0.01)
    assert verdict.gap is not None and verdict.gap < 0.01
    assert (verdict.kind, verdict.num_clear) == ("failed", 40)
    assert verdict.nearer == verdict.clear_nearer == pytest.approx(37 / 40)


def test_answers_that_the_update_hardly_moved_do_not_fail_a_sound_engine():
    """A tenth of the answers moved by less than the noise, which put the engine on the old side of them."""
    new, old, lengths = [-10.0] * 40, [-10.01] * 4 + [-11.0] * 36, [10] * 40
    engine = [-10.02] * 4 + [-10.0 + 0.02 * (-1) ** i for i in range(36)]
    verdict = judge(engine, new, old, lengths, tolerance=0.01)
    assert verdict.nearer == 0.9
    assert (verdict.kind, verdict.num_clear, verdict.clear_nearer) == ("proved", 36, 1.0)


def test_where_no_answer_moved_clearly_a_doubtful_engine_is_neither_proved_nor_failed():
    new, old, lengths = [-10.0] * 10, [-10.25] * 10, [10] * 10
    engine = [-10.2] * 2 + [-9.95] * 8
    verdict = judge(engine, new, old, lengths, tolerance=0.1)
    assert (verdict.kind, verdict.num_clear, verdict.clear_nearer) == ("not distinguishable", 0, None)


def test_the_measured_tolerance_is_three_times_the_gap_and_never_below_float32s():
    assert measured_tolerance([-1.0, -2.0], [-1.25, -1.75], [10, 15]) == pytest.approx(3 * 0.5 / 25)
    assert measured_tolerance([-1.0], [-1.0], [10]) == FLOAT32_TOLERANCE


def test_a_probe_travels_and_judges_by_its_own_lengths_and_tolerance():
    probe = Probe(
        prompt_token_ids=[[1, 2], [1]], response_token_ids=[[3, 4, 5], [6]], new=[-1, -2], old=[-1, -3], tolerance=0.2
    )
    verdict = pickle.loads(pickle.dumps(probe)).judge([-1.5, -2])
    assert (verdict.gap, verdict.change, verdict.kind) == (0.125, 0.25, "proved")
    assert probe.judge([-1, -1]).kind == "failed"
