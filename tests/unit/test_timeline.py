"""When stages worked, and what a report says of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from here import workshop
from written_run import update_of

from cluster.timing import Timed, timed
from pipeline.artifacts import StageFolder
from pipeline.entries import Entry
from pipeline.jobs.answers import SampleShard
from pipeline.jobs.probes import TakeWeights
from pipeline.policies import Policies
from pipeline.round_context import RoundContext
from pipeline.spans import Span, busy_s, idle_share
from pipeline.stage import Done
from pipeline.timeline import Timeline
from stages.contracts import CANDIDATES, PROMPTS
from stages.protocols import Weights
from stages.sample.config import SampleConfig
from stages.sample.stage import Draw

ROUND = Path("run/round-0001")


def weights(round: int) -> Weights:
    return Weights(Path("run/policy"), "a" * 64, round)


def sampling(*, of: int, folder: Path = ROUND, round: int = 1, stream: str = "policy") -> SampleShard:
    prompts, out = StageFolder(folder / "prompts", PROMPTS), StageFolder(folder / "candidates", CANDIDATES)
    return SampleShard(0, prompts, out, weights(of), SampleConfig(), Draw(0, round, 1, stream))


def test_a_time_in_which_a_stage_works_is_not_idle_however_many_work():
    spans = [Span("sample", 0, 4), Span("score", 2, 6), Span("pair", 3, 5), Span("update", 8, 10)]
    assert idle_share(spans, 10) == pytest.approx(0.2)
    assert idle_share(spans[::-1], 10) == pytest.approx(0.2)
    assert idle_share([], 10) == 1
    assert idle_share([Span("sample", 0, 10)], 10) == 0


def test_publishing_and_taking_weights_are_no_work_of_a_stage():
    assert idle_share([Span("publish", 0, 5), Span("swap", 5, 10)], 10) == 1


def test_a_round_shows_what_lies_in_it_cut_to_it():
    timeline = Timeline()
    for began, ended in ((0, 2), (4, 7), (9, 12), (20, 21)):
        timeline.note(sampling(of=0), Timed(None, 100 + began, 100 + ended))
    assert timeline.between(101, 110) == [Span("sample", 0, 1), Span("sample", 3, 6), Span("sample", 8, 9)]


def test_shards_that_follow_each_other_are_one_span():
    timeline = Timeline()
    for began, ended in ((2, 3), (0, 1), (1.001, 2)):
        timeline.note(sampling(of=0), Timed(None, began, ended))
    assert timeline.between(0, 10) == [Span("sample", 0, 3)]


def test_workers_side_by_side_have_spans_of_their_own():
    timeline = Timeline()
    for worker, began in (("sampler-0", 0), ("sampler-1", 0.5), ("sampler-0", 1)):
        timeline.note(sampling(of=0), Timed(None, began, began + 1, worker=worker))
    spans = timeline.between(0, 10)
    assert spans == [Span("sample", 0, 2, "sampler-0"), Span("sample", 0.5, 1.5, "sampler-1")]
    assert busy_s(spans) == 2 and busy_s([*spans, Span("sample", 5, 6, "sampler-1")]) == 3


def test_an_update_works_until_its_last_step_and_then_publishes():
    timeline = Timeline()
    timeline.note(update_of(ROUND, weights(0)), Timed(6.0, 1.0, 8.0))
    assert timeline.between(0, 10) == [Span("update", 1, 6), Span("publish", 6, 8)]


def test_first_answers_are_those_of_the_new_weights():
    timeline = Timeline()
    timeline.note(sampling(of=0), Timed(None, 0.0, 1.0))
    timeline.note(update_of(ROUND, weights(0)), Timed(6.0, 1.0, 8.0))
    timeline.note(sampling(of=0), Timed(None, 6.1, 6.2))  # the next round's, sampled ahead with the older policy
    assert "first_answers_s" not in timeline.figures(1, 0, 10)
    timeline.note(TakeWeights(weights(1), "b" * 64, None, 1e-4), Timed(None, 8.0, 8.5))
    for began, ended in ((8.5, 9.5), (8.5, 9.0)):
        timeline.note(sampling(of=1, folder=ROUND / "evaluation"), Timed(None, began, ended))
    assert timeline.figures(1, 0, 10)["first_answers_s"] == 3.0
    assert [span.stage for span in timeline.between(0, 10)][-2:] == ["swap", "evaluate"]


def test_answers_of_a_round_are_timed_wherever_they_were_sampled():
    """Round 2 is sampled while round 1 is trained; a reference's answers, or a rolled back policy's, do not count."""
    timeline = Timeline()
    for began, ended in ((1.0, 2.0), (1.5, 3.0), (9.0, 10.0)):
        timeline.note(sampling(of=0, round=2), Timed(None, began, ended, worker=f"sampler-{began}"))
    timeline.note(sampling(of=0, round=1), Timed(None, 0.0, 1.0))
    timeline.note(sampling(of=0, round=2, stream="initial"), Timed(None, 20.0, 30.0))
    timeline.note(sampling(of=1, round=2), Timed(None, 40.0, 50.0))
    assert timeline.sampling_s(2, weights(0)) == 3.0 and timeline.sampling_s(1, weights(0)) == 1.0
    assert timeline.sampling_s(3, weights(0)) is None


@pytest.mark.parametrize(("num_made", "is_carried_on"), [(2, False), (1, True), (0, True)])
def test_a_round_says_whether_its_times_are_those_of_all_its_work(tmp_path, num_made, is_carried_on):
    shop = workshop(tmp_path / "run", needs=())
    at = RoundContext(shop, 1, Policies(weights(0), weights(0)), tmp_path / "run" / "round-0001", "round 1/1")
    at.tell("score", "told", Done([Entry(n, "f", "sha", 1, 1, "c", 1, [], [], {}) for n in (0, 1)], 1.0, num_made))
    assert at.figures.get("is_carried_on", False) == is_carried_on


def test_a_job_is_timed_where_it_runs_and_keeps_its_value():
    done = timed(lambda a, b: a + b, 1, 2)
    assert done.value == 3
    assert done.began <= done.ended
