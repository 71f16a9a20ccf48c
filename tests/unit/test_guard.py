"""The guard of an update: what it lets through, and that a step it does not take leaves everything as it was."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import on_ranks
from trainer_cases import BASE, some_rows

from stages.protocols import Weights
from stages.update.config import GuardConfig, UpdateConfig
from stages.update.guard import FEWEST, WINDOW, Guard, divergence
from stages.update.rows import answers_of

STEADY = [0.69, 0.68, 0.7, 0.66, 0.71, 0.65, 0.69, 0.64]


def after(losses, **config) -> Guard:
    guard = Guard(GuardConfig(**config))
    for loss in losses:
        guard.note(1, loss, None, [])
    return guard


@pytest.mark.parametrize("name", ["loss", "logps/chosen", "logps/rejected", "log_ratios/rejected"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_never_let_through(name, value):
    guard = Guard(GuardConfig(max_loss_jump=None, max_kl=None))
    assert name in guard.why_not({"loss": 0.7} | {name: value})


def test_a_loss_that_jumps_is_not_let_through_and_one_that_falls_is():
    assert "jumps from 0.685" in after(STEADY).why_not({"loss": 2.5})
    assert after(STEADY).why_not({"loss": 1.2}) is None
    assert after(STEADY).why_not({"loss": -50.0}) is None
    assert after(STEADY, max_loss_jump=None).why_not({"loss": 2.5}) is None
    assert after(STEADY[: FEWEST - 1]).why_not({"loss": 2.5}) is None


def test_losses_that_spread_widely_jump_further():
    wide = [0.1, 3.0, 0.5, 2.0, 0.2, 4.0, 1.0, 2.5]
    assert after(wide).why_not({"loss": 20.0}) is None
    assert after(wide).why_not({"loss": 60.0}) is not None


def saturated(steps, *, of=64):
    """Losses of batches of pairs whose margins have grown to some 14 nats: nearly 0, but for the hard pairs."""
    rng = random.Random(0)
    return [sum(math.log1p(math.exp(-rng.gauss(14, 4))) for _ in range(of)) / of for _ in range(steps)]


def test_hard_pairs_among_easy_ones_are_no_jump_and_a_loss_above_the_first_ones_still_is():
    guard = after([*STEADY, *saturated(WINDOW)])
    for loss in saturated(2000):
        assert guard.why_not({"loss": loss}) is None
        guard.note(1, loss, None, [])
    assert guard.why_not({"loss": 0.6}) is None
    assert "jumps" in guard.why_not({"loss": 0.8})
    assert "jumps" in Guard.restored(GuardConfig(), guard.state()).why_not({"loss": 0.8})
    assert Guard.restored(GuardConfig(), guard.state()).why_not({"loss": 0.6}) is None


@given(st.lists(st.floats(0.01, 10), min_size=FEWEST, max_size=WINDOW), st.floats(0.1, 1000), st.floats(-10, 1e4))
def test_the_unit_of_the_loss_does_not_matter(losses, unit, loss):
    plain = after(losses).why_not({"loss": loss})
    scaled = after([unit * found for found in losses]).why_not({"loss": unit * loss})
    far = (loss - sorted(losses)[len(losses) // 2]) if plain is None else math.inf
    assert (plain is None) == (scaled is None) or math.isclose(far, 20, rel_tol=0.5)


def test_a_policy_that_runs_away_from_its_reference_is_not_followed():
    far = {"loss": 0.1, "log_ratios/chosen": -150.0, "log_ratios/rejected": -300.0}
    assert divergence(far) == 225.0
    assert "225 nats" in Guard(GuardConfig()).why_not(far)
    assert Guard(GuardConfig(max_kl=None)).why_not(far) is None
    assert Guard(GuardConfig()).why_not(far | {"log_ratios/chosen": 10.0}) is None
    assert divergence({"loss": 0.1}) is None


def test_steps_skipped_in_a_row_end_the_update_and_single_ones_do_not():
    guard = Guard(GuardConfig(max_skipped=3))
    for _ in range(10):
        guard.note(1, math.nan, "broken", [])
        guard.note(1, 0.7, None, [])
        assert guard.why_over(steps_left=5) is None
    for left in (2, 1):
        guard.note(1, math.nan, "broken", [])
        assert guard.why_over(steps_left=left) is None
    guard.note(1, math.nan, "broken", [])
    assert "3 steps in a row" in guard.why_over(steps_left=0) and "broken" in guard.why_over(steps_left=0)
    assert (guard.num_taken, len(guard.skipped)) == (10, 13)


def test_an_update_without_any_step_makes_no_policy():
    guard = Guard(GuardConfig())
    guard.note(1, math.nan, "broken", [])
    assert guard.why_over(steps_left=1) is None
    assert "none of 1 steps" in guard.why_over(steps_left=0)


def test_the_policy_is_looked_at_once_more_after_the_last_step():
    guard, near = Guard(GuardConfig()), {"a": -10.0, "b": -20.0}
    assert guard.why_broken(near, [near]) is None and guard.why_broken(near, []) is None
    assert "not finite" in guard.why_broken(near | {"a": math.nan}, [near])
    assert "not finite" in guard.why_broken(near | {"a": -math.inf}, [])
    assert "201 nats" in guard.why_broken({"a": -211.0, "b": -221.0}, [near])


@given(st.lists(st.tuples(st.floats(-5, 5), st.booleans()), max_size=50))
def test_a_guard_restored_from_plain_numbers_judges_alike(steps):
    guard = Guard(GuardConfig())
    for loss, is_taken in steps:
        guard.note(1, loss, None if is_taken else "broken", [])
    other = Guard.restored(GuardConfig(), json.loads(json.dumps(guard.state())))
    assert other.state() == guard.state() and len(guard.losses) <= WINDOW
    assert [other.why_not({"loss": v}) for v in (0.0, 9.0)] == [guard.why_not({"loss": v}) for v in (0.0, 9.0)]


# ---- on real ranks --------------------------------------------------------------------------------------------------

STAGES = {f"ZeRO {stage}": {"zero_stage": stage} for stage in range(4)}
NUMBERS = {"not a number": math.nan, "far away": 1e6}


def stepped(folder: Path, options: dict[str, Any], dtype: str, broken: float | None) -> dict[str, Any]:
    """Four batches, the third of which has a reference log-prob that is `broken`; left out where that is None.

    Returns:
        The weights and moments after them, metrics of each step, and whether the broken one changed anything.
    """
    from stages.update import deepspeed_engine
    from stages.update.worker import Trainer

    config = UpdateConfig(
        **BASE | {"lr_scheduler_type": "constant", "warmup_ratio": 0.0, "guard": {"max_kl": None}} | options
    )
    trainer = Trainer(config, dtype=dtype, pad_token=None, num_threads=1)
    trainer.load(Weights.found(folder, round=0))
    rows = some_rows(16)
    reference = trainer.logps(answers_of(rows))
    if broken is not None:
        reference[rows[9].chosen_id] = broken - reference[rows[9].chosen_id]
    stepper, metrics, unchanged = trainer._stepper(rows, [reference], 4, None, None), [], None
    stepper.guard.losses = [0.69] * FEWEST
    for step in range(4):
        if broken is None and step == 2:
            continue
        before = _copied(deepspeed_engine.float32_state(trainer._engine))
        metrics.append(stepper(step, rows[4 * step : 4 * step + 4], own_reference=None))
        if step == 2:
            now = _copied(deepspeed_engine.float32_state(trainer._engine))
            unchanged = all(torch.equal(now[name], before[name]) for name in now)
    kept = _copied(deepspeed_engine.moments(trainer._engine))
    state = _copied(deepspeed_engine.float32_state(trainer._engine))
    return {"state": state | kept, "steps": metrics, "unchanged": unchanged, "guard": stepper.guard.state()}


def _copied(tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in tensors}


def all_stepped(folder: Path, cases: dict[str, dict[str, Any]], dtype: str) -> dict[str, Any]:
    return {
        name: {why: stepped(folder, options, dtype, broken) for why, broken in {**NUMBERS, "left out": None}.items()}
        for name, options in cases.items()
    }


def check_skips(ranks: list[dict[str, Any]]) -> None:
    """A step that was not taken leaves weights and moments to the bit, and later steps are those without it."""
    for name, found in ranks[0].items():
        plain = found["left out"]["state"]
        for why in NUMBERS:
            mine = [rank[name][why] for rank in ranks]
            assert all(rank["unchanged"] for rank in mine), (name, why)
            assert all(rank["guard"] == mine[0]["guard"] for rank in mine), "one decision on all ranks"
            assert (mine[0]["guard"]["num_taken"], len(mine[0]["guard"]["skipped"])) == (3, 1), (name, why)
            for key, value in mine[0]["state"].items():
                assert torch.equal(value, plain[key]), (name, why, key)
            (skipped,) = [step for step in mine[0]["steps"] if "skipped" in step]
            assert skipped["step"] == 3 and all(math.isfinite(value) for value in skipped.values())


@pytest.mark.slow
def test_a_skipped_step_changes_nothing_on_one_rank(policy_folder):
    check_skips(on_ranks(1, all_stepped, policy_folder, {"ZeRO 0": STAGES["ZeRO 0"]}, "float32"))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("world", [1, 2])
def test_a_skipped_step_changes_nothing_under_any_zero_stage(policy_folder, world, dtype):
    cases = STAGES | {"adapters": {"lora": {"r": 4}}}
    check_skips(on_ranks(world, all_stepped, policy_folder, cases, dtype))


@pytest.mark.slow
def test_a_skipped_step_changes_nothing_where_the_optimizer_is_offloaded(policy_folder):
    check_skips(on_ranks(2, all_stepped, policy_folder, {"offload": {"offload_optimizer": True}}, "float32"))
