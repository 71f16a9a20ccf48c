"""TensorBoard's own reader finds every metric at its step, once, whatever was broken off and made again."""

from __future__ import annotations

import json

import pytest
from curves import read_curves

from pipeline.tensorboard import StepCurves, plot_evaluation, step_curves


def metrics(step: int, loss: float) -> dict[str, float]:
    return {"step": step, "steps": 3, "loss": loss, "rewards/margins": 2 * loss, "step_s": 0.1}


def plot(curves: StepCurves, steps: list[dict[str, float]]) -> None:
    with curves.plotting() as add:
        for step in steps:
            add(step)


def test_steps_count_on_over_the_rounds(tmp_path):
    for number, num_steps in ((0, None), (1, 3), (2, 2)):
        report = {"round": number} | ({"update": {"num_steps": num_steps}} if num_steps else {})
        (tmp_path / f"round-{number:04d}").mkdir()
        (tmp_path / f"round-{number:04d}" / "report.json").write_text(json.dumps(report))
    assert [step_curves(tmp_path, round=number).steps_before for number in (1, 2, 3)] == [0, 3, 5]


def test_every_metric_is_a_curve_and_the_coordinates_are_none(tmp_path):
    plot(StepCurves(tmp_path, 2, steps_before=7), [metrics(1, 0.7), metrics(2, 0.5)])
    found = read_curves(tmp_path / "tensorboard" / "update")
    assert found.keys() == {"loss", "rewards/margins", "step_s"}
    assert found["loss"] == [(8, pytest.approx(0.7)), (9, pytest.approx(0.5))]


def test_no_step_is_there_twice_after_a_retry(tmp_path):
    plot(StepCurves(tmp_path, 1, steps_before=0), [metrics(step, 0.5) for step in (1, 2, 3)])
    second = StepCurves(tmp_path, 2, steps_before=3)
    plot(second, [metrics(1, 0.9), metrics(2, 0.8)])  # broken off here
    plot(second, [metrics(step, 0.25) for step in (1, 2, 3)])
    found = read_curves(tmp_path / "tensorboard" / "update")
    assert found["loss"] == [(1, 0.5), (2, 0.5), (3, 0.5), (4, 0.25), (5, 0.25), (6, 0.25)]


def test_a_reader_that_was_watching_forgets_what_was_broken_off(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    curves = StepCurves(tmp_path, 1, steps_before=0)
    plot(curves, [metrics(1, 0.9), metrics(2, 0.8)])
    watching = EventAccumulator(str(tmp_path / "tensorboard" / "update"))
    watching.Reload()
    assert [event.step for event in watching.Scalars("loss")] == [1, 2]
    plot(curves, [metrics(1, 0.5)])
    watching.Reload()
    assert [(event.step, event.value) for event in watching.Scalars("loss")] == [(1, 0.5)]


def test_evaluations_stand_by_round_and_a_repeated_one_once(tmp_path):
    def figures(reward: float) -> dict:
        return {"num_prompts": 8, "reward": reward, "win_rate": None, "holdout": {"exact_match": 0.5}}

    for number, reward in ((0, -1.0), (1, 0.5), (1, 1.0), (2, 2.0)):
        plot_evaluation(tmp_path, round=number, figures=figures(reward))
    found = read_curves(tmp_path / "tensorboard" / "evaluation")
    assert found.keys() == {"num_prompts", "reward", "holdout/exact_match"}
    assert found["reward"] == [(0, -1.0), (1, 1.0), (2, 2.0)]
