"""Figures and reports: what a person reads is what the tables say; and who gets which share of a machine."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.resources import Devices, Node, Resources, place
from pipeline import figures
from pipeline.config_file import load_config
from pipeline.console import Console
from pipeline.entries import Entry
from pipeline.evaluate import Judged, evaluation_figures
from pipeline.files import read_json, write_json
from pipeline.layout import lay_out
from pipeline.live_view import show_live
from pipeline.page.summary import warnings
from pipeline.report import result_table, round_reports, write_reports
from stages.contracts import SCORED
from stages.errors import ConfigError


def entry(rows, **stats):
    return Entry(0, "f", "sha", 1, rows, "c", 1, [], [], stats)


def test_figures_are_summed_over_shards():
    found = figures.scored(
        [entry(4, scored=3, errors=1, reward_sum=3.0, reward_min=0.0, reward_max=2.0), entry(2, scored=0, errors=2)]
    )
    assert found == {"num_scored": 3, "num_errors": 3, "min": 0.0, "max": 2.0, "mean": 1.0}
    fates = [entry(3, paired=2, tied=1), entry(2, tied=2)]
    paired = figures.paired([entry(2, margin_sum=5.0), entry(0, margin_sum=0.0)], fates)
    assert (paired["num_prompts"], paired["num_pairs"], paired["margin_mean"]) == (5, 2, 2.5)
    assert paired["fates"] == {"tied": 3, "paired": 2}
    assert sum(paired["fates"].values()) == paired["num_prompts"]


def scored(rewards):
    return SCORED.table(
        {
            "response_id": f"r{i}",
            "prompt_id": f"p{i}",
            "round": 1,
            "reward": reward,
            "rewards": [{"name": "exact", "value": exact, "role": "holdout"}],
        }
        for i, (reward, exact) in enumerate(rewards)
    )


def test_the_win_rate_counts_ties_half_and_only_prompts_that_both_answered():
    names = {"holdout": ["exact"]}
    mine = Judged.of([scored([(1.0, 1.0), (2.0, 0.0), (3.0, None), (None, 1.0)])], names)
    first = Judged.of([scored([(0.0, 0.0), (2.0, 0.0), (4.0, 0.0), (9.0, 0.0)])], names)
    found = evaluation_figures(mine, first)
    assert found["win_rate"] == pytest.approx(0.5)
    assert found["reward"] == pytest.approx(2.0)
    assert found["reward_se"] == pytest.approx(1 / 3**0.5)
    assert found["holdout"] == {"exact": pytest.approx(2 / 3)}
    assert evaluation_figures(first, first)["win_rate"] == 0.5
    assert evaluation_figures(Judged.of([scored([(None, None)])], names), first)["reward"] is None


def test_a_reward_without_a_value_is_left_out_of_the_line_and_warns_of_nothing():
    gone = {"num_prompts": 4, "reward": 2.0, "win_rate": 0.5, "holdout": {"exact": None}, "kl": 0.3}
    line = figures.evaluated_line(gone, 1.0)
    assert "exact" not in line and "KL 0.300" in line
    first = gone | {"reward": 1.0, "holdout": {"exact": 0.5}}
    assert warnings([{"round": 0, "evaluate": first}, {"round": 1, "decision": "promote", "evaluate": gone}], 1) == []


def test_the_table_has_a_row_a_round_even_where_a_figure_is_missing():
    evaluated = {"reward": 1.0, "reward_se": 0.1, "win_rate": 0.5, "holdout": {"exact": 0.4}}
    rounds = [{"round": 0, "evaluate": evaluated}, {"round": 1}, {"round": 2, "evaluate": evaluated | {"holdout": {}}}]
    assert result_table(rounds).row_count == 3


@pytest.mark.parametrize(
    "figures_of_one",
    [
        evaluation_figures(Judged.of([scored([(2.0, 1.0)])], {"holdout": ["exact"]}), Judged({})),
        evaluation_figures(Judged.of([scored([(None, None)])], {"holdout": ["exact"]}), Judged({"p0": 1.0})),
    ],
    ids=["one answer and none to compare with", "no answer with a reward"],
)
def test_what_one_answer_cannot_say_is_left_out_everywhere(run, figures_of_one, capsys):
    file = run / "round-0002" / "report.json"
    write_json(file, read_json(file) | {"evaluate": figures_of_one})
    write_reports(run)
    text = (run / "report.txt").read_text(encoding="utf-8")
    assert "None" not in text and "nan" not in text
    assert "win rate" not in figures.evaluated_line(figures_of_one, 1.0)
    Console().table(result_table(round_reports(run)))
    (last,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("after round 2"))
    reward = figures_of_one["reward"]
    assert f"{reward:.2f}  " in last if reward is not None else "-  " in last


def test_answers_without_any_reward_are_told():
    found = figures.scored([entry(2, errors=2)])
    assert "none has a reward" in figures.scored_line(found, 1.0)


def test_the_table_of_the_written_report_shows_every_name_whole_and_as_it_is(run):
    names = ["[/x] ok", "[red]apple", *(f"a rather long name of reward number {n}" for n in range(6))]
    for file in run.glob("round-*/report.json"):
        report = read_json(file)
        report["evaluate"]["holdout"] = {name: 0.123 for name in names}
        write_json(file, report)
    write_reports(run)
    head, before = (run / "report.txt").read_text(encoding="utf-8").splitlines()[2:4]
    assert all(name in head for name in names) and "…" not in head
    assert before.count("0.123") == len(names)
    show_live(run)  # draws the same table


def layout(devices, *overrides):
    return lay_out(load_config(Path("configs/quickstart.yaml"), overrides), devices)


def test_on_two_cores_all_workers_and_a_task_hold_theirs_at_once():
    found = layout(Devices(cpus=2, gpus=0))
    assert sum(count * each.cpus for count, each in found.workers) <= 2


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(1, 30))
def test_on_many_small_machines_every_worker_finds_a_place_even_once_one_is_lost(cores, num_workers):
    nodes = tuple(Node(each, 0) for each in cores)
    devices = Devices(sum(cores), 0, nodes)
    share, largest = devices.share_of_cpus(num_workers), max(cores)
    left = [[node for at, node in enumerate(nodes) if at != lost] or nodes for lost in range(len(nodes))]
    assert all(place(each, [Resources(share, 0)] * num_workers) is not None for each in left)
    assert share == 1 or any(place(each, [Resources(1, 0)] * num_workers) is None for each in left)
    assert devices.cpus_of_a_node == largest


def test_scorers_have_devices_of_their_own():
    found = layout(Devices(cpus=64, gpus=16), "update.device=auto", "score.workers=3", "sample.engines=4")
    assert found.workers[1] == (3, found.scorer) and found.scorer.gpus == 1
    assert place([Node(64, 16)], [each for count, each in found.workers for _ in range(count)]) is not None


def test_scorers_that_would_share_a_gpu_are_refused():
    sets = ("update.device=auto", "score.workers=2", "sample.engines=8", "cluster.placement=colocate")
    with pytest.raises(ConfigError, match="score.workers"):
        layout(Devices(cpus=64, gpus=8), *sets)


def test_rounds_with_other_numbers_of_workers_share_one_layout():
    """Else the workers of one round would hold what those of the next wait for."""
    grown = "rounds=[{}, {update: {workers: 2}, sample: {engines: 2}}]"
    small, found = (layout(Devices(cpus=2, gpus=0), "update.workers=1", *more) for more in ((), (grown,)))
    assert sum(count for count, _ in found.workers) == sum(count for count, _ in small.workers) + 2
    assert sum(count * each.cpus for count, each in found.workers) <= 2
    assert found.sampler.gpus == found.scorer.gpus == found.trainer.gpus == 0


def test_gpus_are_whole_where_there_are_enough_and_shared_where_they_can_be():
    many = layout(Devices(cpus=16, gpus=8), "update.device=auto")
    assert (many.sampler.gpus, many.scorer.gpus, many.trainer.gpus) == (1, 1, 1)
    one = layout(Devices(cpus=16, gpus=1))
    assert one.sampler.gpus + one.scorer.gpus <= 1 and one.trainer.gpus == 0
    for override in ("update.device=auto", "sample.tensor_parallel_size=2"):
        with pytest.raises(ConfigError):
            layout(Devices(cpus=16, gpus=1), override)
    with pytest.raises(ConfigError):
        layout(Devices(cpus=2, gpus=0), "update.device=cuda")
