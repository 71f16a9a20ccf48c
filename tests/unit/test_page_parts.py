"""What the page gathers besides its tables: the browser's rows, decisions, rates, intervals, spreads of rewards."""

from __future__ import annotations

import base64
import gzip
import json
import statistics
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import student_t
from pipeline.page.curves import about_falling
from pipeline.page.decisions import decisions
from pipeline.page.evaluated import round_curves
from pipeline.page.packed import pack
from pipeline.page.rates import rate_curves
from pipeline.page.render import page
from pipeline.page.rows import HELD_OUT, PAGE_ROOM, Room, browser_rows, shared
from pipeline.page.spreads import spreads
from pipeline.reading import published_files, round_folders, rows
from pipeline.report import round_reports
from pipeline.texts import cut

# ---- the browser's rows ---------------------------------------------------------------------------------------------


def unpacked(block: str):
    return json.loads(gzip.decompress(base64.b64decode(block)))


def packed_prompts(run: Path, room: Room = PAGE_ROOM):
    return browser_rows(run, round_folders(run), room)


def test_the_browser_holds_every_row_with_every_answer(run):
    found = packed_prompts(run)
    assert found.num_rows == found.num_in_all == 3 + 8 + 8
    by_id = {prompt.prompt_id: prompt for prompt in found.prompts}
    for number, folder in round_folders(run).items():
        if not number:
            continue
        tables = {name: rows(published_files(folder / name)) for name in ("prompts", "candidates", "scored", "pairs")}
        rewards = {row["response_id"]: row["reward"] for row in tables["scored"]}
        pairs = {row["prompt_id"]: row for row in tables["pairs"]}
        for row in tables["prompts"]:
            (column,) = (c for c in by_id[row["prompt_id"]].columns if c.where == f"round {number}")
            mine = [answer for answer in tables["candidates"] if answer["prompt_id"] == row["prompt_id"]]
            shown = sorted((answer.text, answer.reward) for answer in column.answers)
            assert shown == sorted((cut(answer["response"], 800), rewards[answer["response_id"]]) for answer in mine)
            marked = {answer.mark: answer.reward for answer in column.answers if answer.mark}
            pair = pairs.get(row["prompt_id"])
            assert marked == ({"chosen": pair["score_chosen"], "rejected": pair["score_rejected"]} if pair else {})
            assert column.margin == (pair["margin"] if pair else None)


def test_a_held_out_prompt_has_the_answers_of_every_policy_side_by_side(run):
    held_out = [p for p in packed_prompts(run).prompts if any(c.where == HELD_OUT for c in p.columns)]
    assert len(held_out) == 3
    for prompt in held_out:
        assert [column.title for column in prompt.columns] == ["before", "after round 1", "after round 2"]
        assert all(len(column.answers) == 1 for column in prompt.columns)


def test_what_is_packed_comes_back(run):
    found = packed_prompts(run).prompts
    packed = pack(found)
    index, prompts = unpacked(packed.index), [prompt for piece in packed.pieces for prompt in unpacked(piece)]
    assert [prompt[0] for prompt in prompts] == [prompt.prompt_id for prompt in found]
    assert len(index["prompt"]) == len(index["where"]) == len(index["fate"]) == len(index["margin"]) == 19
    assert index["wheres"] == ["held out", "round 1", "round 2"] and len(index["titles"]) == len(found)
    assert {index["fates"][code] for code in index["fate"]} == {"", "paired", "duplicate_answers", "prompt_too_long"}
    texts = {answer[0] for prompt in prompts for column in prompt[3] for answer in column[5]}
    assert any("<script>alert(1)</script>" in text for text in texts), "the browser shows them as text"
    assert pack(found) == packed


@pytest.mark.parametrize(("num_rows", "characters"), [(1, 10**6), (12, 10**6), (40, 1), (100, 10**6)])
def test_a_page_keeps_to_its_room_and_says_what_it_left_out(run, num_rows, characters):
    found = packed_prompts(run, Room(num_rows, characters))
    assert found.num_rows <= num_rows and found.num_in_all == 19
    html = page(run, round_reports(run), room=Room(num_rows, characters))
    assert (f"{found.num_rows} of 19 rows are in this page" in html) == (found.num_rows < 19)


@given(st.integers(0, 1000), st.dictionaries(st.integers(0, 9), st.integers(0, 400), min_size=1))
def test_rounds_share_the_room_and_leave_none_unused(num_rows, sizes):
    rooms = shared(Room(num_rows, 10**6), sizes)
    counts = {round: room.rows for round, room in rooms.items()}
    assert all(counts[round] <= size for round, size in sizes.items())
    assert sum(counts.values()) == min(num_rows, sum(sizes.values()))
    cut_short = [counts[round] for round, size in sizes.items() if counts[round] < size]
    assert not cut_short or max(counts.values()) - min(cut_short) <= 1


def test_rewards_are_spread_by_what_became_of_the_answers(run):
    found = spreads(packed_prompts(run).prompts)
    assert [one.title for one in found] == ["round 1", "round 2"]
    for one in found:
        kinds = {lane.kind: lane for lane in one.lanes}
        assert set(kinds) == {"chosen", "rejected", "in no pair", "duplicate_answers"}
        assert all(lane.places == sorted(lane.places) for lane in one.lanes)
        assert kinds["chosen"].places[2] > kinds["rejected"].places[2]


# ---- the gate, rates, and whether falling is a bug ------------------------------------------------------------------


def test_every_limit_of_the_gate_stands_beside_its_figure():
    checks = [
        {"name": "max_kl", "limit": 20.0, "got": 31.5, "kept": False, "told": "31.50 nats an answer"},
        {"name": "min_win_rate", "limit": 0.5, "got": 0.7, "kept": True, "told": "win rate 64.1%"},
    ]
    reports = [
        {"round": 0, "decision": "first", "reason": "the start"},
        {"round": 1, "decision": "hold", "reason": "too far", "gate": {"standing_round": 0, "checks": checks}},
        {"round": 2, "decision": "promote", "reason": "better"},
    ]
    held, promoted = decisions(reports)
    assert held.standing == "the first policy" and promoted.standing == "the policy of round 2"
    assert [(one.limit, one.told, one.kept) for one in held.judgements] == [
        ("max_kl 20", "31.50 nats an answer", False),
        ("min_win_rate 0.5", "win rate 64.1%", True),
    ]


def test_tokens_a_second_are_counted_while_sampling_and_over_the_round():
    report = {"round": 1, "sample": {"num_tokens": 1000, "num_tokens_now": 1000}, "seconds": 10.0, "sampling_s": 2.0}
    steps = [{"tokens/processed": 300.0, "step_s": 0.5}, {"tokens/processed": 100.0, "step_s": 1.5}]
    sampling, training = rate_curves([{"round": 0}, report], {1: steps}, {"max_staleness": 0})
    assert [series.values for series in sampling.series] == [[500.0], [100.0]]
    assert training.series[0].values == [200.0]
    assert rate_curves([{"round": 0}, {"round": 1}], {}, {}) == []


def test_rates_are_of_what_was_made_in_the_time_that_was_taken():
    rounds = [
        {"round": 1, "sample": {"num_tokens": 1000, "num_tokens_now": 1000}, "seconds": 10.0, "sampling_s": 2.0},
        {"round": 2, "sample": {"num_tokens": 1000, "num_tokens_now": 250}, "seconds": 4.0, "sampling_s": 0.5},
        {"round": 3, "sample": {"num_tokens": 1000, "num_tokens_now": 0}, "seconds": 3.0},
    ]
    rounds = [rounds[0], *(report | {"is_carried_on": True} for report in rounds[1:])]
    (sampling,) = rate_curves(rounds, {}, {"max_staleness": 0})
    assert [series.values for series in sampling.series] == [[500.0, 500.0, None], [100.0, None, None]]
    (ahead,) = rate_curves(rounds, {}, {"max_staleness": 1})
    assert [series.values for series in ahead.series] == [[500.0, 500.0, None], [None] * 3]


def test_whether_falling_is_a_bug_is_answered_with_the_rounds_own_figures():
    fell = {"log_ratios/chosen": -0.5, "log_ratios/rejected": -2.0}
    rose = {"log_ratios/chosen": 0.5, "log_ratios/rejected": 0.7}
    told = about_falling({1: [rose, fell], 2: [rose], 3: [{"loss": 1.0}]})
    assert "Not by itself" in told and "below their reference in 1 of 2 rounds" in told
    assert "above the rejected ones in 1." in told
    assert about_falling({1: [{"loss": 1.0}]}) == ""


def test_intervals_of_single_rewards_and_of_lengths_come_from_the_answers(run):
    charts = {chart.title: chart for chart in round_curves(round_reports(run), round_folders(run))}
    assert list(charts)[:4] == ["Reward", "exact_match", "Win rate", "Length"]
    for number, report in enumerate(round_reports(run)):
        times = student_t.quantile(0.025, df=report["evaluate"]["num_prompts"] - 1)
        assert charts["Reward"].series[0].errors[number] == pytest.approx(times * report["evaluate"]["reward_se"], 1e-3)
        answers = rows(published_files(round_folders(run)[number] / "evaluation" / "scored"))
        exact = [reward["value"] for row in answers for reward in row["rewards"] if reward["name"] == "exact_match"]
        spread = statistics.stdev(exact) / len(exact) ** 0.5
        assert charts["exact_match"].series[0].errors[number] == pytest.approx(
            student_t.quantile(0.025, df=len(exact) - 1) * spread, 1e-3
        )
        assert charts["Length"].series[0].errors[number] == 0.0


def test_the_time_line_shows_who_worked(run):
    shown = page(run, round_reports(run))
    for told in ("sample 0", "sample 1", "sample (sampler-1) 1.0 to 4.0 s", "update (trainers) 5.0 to 9.0 s"):
        assert told in shown, told
