"""TensorBoard's own reader finds every metric at its step, once, whatever was broken off and made again."""

from __future__ import annotations

import json

import pytest
from curves import read_curves

from pipeline.mirror import mirrored
from pipeline.tensorboard import StepCurves, plot_evaluation, step_curves


def metrics(step: int, loss: float) -> dict[str, float]:
    return {"step": step, "steps": 3, "loss": loss, "rewards/margins": 2 * loss, "step_s": 0.1}


def report(run, number, **found):
    (run / f"round-{number:04d}").mkdir()
    (run / f"round-{number:04d}" / "report.json").write_text(json.dumps({"round": number} | found))


def plot(curves: StepCurves, steps: list[dict[str, float]]) -> None:
    with curves.plotting() as add:
        for step in steps:
            add(step)


def test_steps_count_on_over_the_rounds(tmp_path):
    report(tmp_path, 0)
    report(tmp_path, 1, update={"num_steps": 3})
    report(tmp_path, 2, ended_update={"num_steps": 2, "ended": "the guard says so"})
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


def test_an_evaluation_that_is_plotted_anew_leaves_the_later_rounds_on_the_curve(tmp_path):
    """As a fork does with the evaluation before the first round, and the curves of the rounds it took over."""
    for number in range(3):
        plot_evaluation(tmp_path, round=number, figures={"reward": float(number)})
        if number:
            report(tmp_path, number, evaluate={"reward": float(number)})
    plot_evaluation(tmp_path, round=0, figures={"reward": 0.0})
    assert read_curves(tmp_path / "tensorboard" / "evaluation")["reward"] == [(0, 0.0), (1, 1.0), (2, 2.0)]


def test_the_curves_of_an_update_that_broke_off_are_on_the_store(tmp_path):
    run, store = tmp_path / "run", tmp_path / "store"
    broken_off = [metrics(1, 0.5), {}]  # metrics without a step are refused
    with mirrored(run, store.as_uri()), pytest.raises(KeyError):
        plot(StepCurves(run, 1, steps_before=0), broken_off)
    assert read_curves(store / "tensorboard" / "update")["loss"] == [(1, 0.5)]
