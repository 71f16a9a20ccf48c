"""Time lines on the page: bars where the stages worked, on one scale for all rounds."""

from __future__ import annotations

import pytest

from pipeline.page.timelines import LABEL, timelines


def report(number, seconds, *spans):
    timeline = [{"stage": stage, "start_s": start, "end_s": end} for stage, start, end in spans]
    return {"round": number, "seconds": seconds, "idle_share": 0.25, "timeline": timeline}


def test_bars_lie_where_their_stages_worked_and_rounds_share_a_scale():
    long, short = timelines(
        [report(1, 40.0, ("sample", 0.0, 10.0), ("score", 10.0, 30.0), ("sample", 30.0, 40.0)), report(2, 20.0)]
        + [report(3, 20.0, ("sample", 5.0, 20.0))]
    )
    assert [lane.label for lane in long.lanes] == ["sample", "score"]
    assert [len(lane.bars) for lane in long.lanes] == [2, 1]
    for line in (long, short):
        scale = (line.end - LABEL) / line.seconds
        assert scale == pytest.approx((long.end - LABEL) / 40.0)
        for lane in line.lanes:
            assert all(bar.x >= LABEL and bar.x + bar.width <= line.end + 1e-9 for bar in lane.bars)
    assert short.lanes[0].bars[0].x - LABEL == pytest.approx(5.0 * (long.end - LABEL) / 40.0)


def test_what_was_measured_is_told():
    (line,) = timelines([report(1, 8.0, ("sample", 0.0, 6.0)) | {"first_answers_s": 0.26}])
    (carried_on,) = timelines([report(1, 8.0, ("sample", 0.0, 6.0)) | {"is_carried_on": True}])
    assert "the last call alone" in carried_on.told and "alone" not in line.told
    assert "25.0%" in line.told and "0.26 s after the last optimizer step" in line.told


def test_reports_of_older_runs_have_none():
    assert timelines([{"round": 0}, {"round": 1, "seconds": 3.0}]) == []


def test_idle_stretches_have_a_lane_and_the_longest_is_told():
    (line,) = timelines([report(1, 40.0, ("sample", 1.0, 10.0), ("publish", 10.0, 12.0), ("evaluate", 30.0, 39.9))])
    idle = line.lanes[-1]
    assert idle.idle and idle.label == "idle" and not any(lane.idle for lane in line.lanes[:-1])
    assert [bar.text for bar in idle.bars] == ["idle 0.0 to 1.0 s", "idle 10.0 to 30.0 s"], "slivers are left out"
    assert "20.0 s of it at once from 10.0 s on" in line.told


def two_workers(count=2):
    spans = [
        {"stage": "sample", "worker": f"sampler-{n}", "start_s": float(n), "end_s": 10.0 + n} for n in range(count)
    ]
    return {"round": 1, "seconds": 40.0, "idle_share": 0.0, "timeline": spans}


def test_each_worker_at_a_stage_has_a_lane_of_its_own():
    (line,) = timelines([two_workers()])
    assert [lane.label for lane in line.lanes if not lane.idle] == ["sample 0", "sample 1"]
    assert [lane.bars[0].text for lane in line.lanes][:2] == [
        "sample (sampler-0) 0.0 to 10.0 s",
        "sample (sampler-1) 1.0 to 11.0 s",
    ]


def test_more_workers_than_can_be_told_apart_share_a_lane():
    (line,) = timelines([two_workers(1000)])
    (lane,) = (lane for lane in line.lanes if not lane.idle)
    assert (lane.label, len(lane.bars)) == ("sample", 1) and "1000 workers" in lane.bars[0].text
