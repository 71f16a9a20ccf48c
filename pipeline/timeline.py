"""When which stage of a run worked: spans of time, by the workers' own clocks.

Comes in: every job that has ended, from the crew's workers. Goes out: a round's time line, its idle share, and how long
new weights took to sample. The workers' clocks are taken to agree, as on one machine.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from cluster.timing import Timed
from pipeline.jobs.answers import Evaluate, PairShard, SampleShard, ScoreShard, SumShard
from pipeline.jobs.engine_logps import Divergence, EngineGap
from pipeline.jobs.inputs import AllPrompts, DrawPrompts, PreparePairs, PreparePrompts, PrepareTexts
from pipeline.jobs.probes import ScoreProbe, TakeWeights
from pipeline.jobs.training import ScoreCandidates, ScoreRows, ScoreTexts, UpdatePolicy
from pipeline.spans import Span, idle_share, joined


class Timeline:
    """The spans of a run, in this process's life."""

    def __init__(self) -> None:
        self._spans: list[Span] = []
        self._stepped: dict[int, float] = {}
        self._answered: dict[int, float] = {}

    def note(self, job: Any, done: Timed) -> None:
        """Note when a job worked; an update ends with its last optimizer step, and publishes from there on."""
        stepped = done.value if isinstance(job, UpdatePolicy) else None
        if stepped is None:
            self._spans.append(Span(stage_of(job), done.began, done.ended, done.worker))
        else:
            self._spans.append(Span("update", done.began, stepped, done.worker))
            self._spans.append(Span("publish", stepped, done.ended, done.worker))
            self._stepped[job.round] = stepped
        if isinstance(job, SampleShard):
            made_by = job.weights.round
            self._answered[made_by] = min(done.ended, self._answered.get(made_by, done.ended))

    def between(self, start: float, end: float) -> list[Span]:
        """What worked in a stretch of time, cut to it, in seconds since its start."""
        inside = [span for span in self._spans if span.end_s > start and span.start_s < end]
        moved = [
            replace(span, start_s=max(0.0, span.start_s - start), end_s=min(end, span.end_s) - start) for span in inside
        ]
        return joined(moved)

    def figures(self, number: int, start: float, end: float) -> dict[str, Any]:
        """A round's time line for its report, in seconds since the round's start.

        ``idle_share``: of the round, in which no stage worked. ``first_answers_s``: from its last optimizer step to the
        end of the first job that sampled from its result, a bound on the first token's time from above; only where both
        happened by then.
        """
        spans = self.between(start, end)
        found: dict[str, Any] = {
            "started": start,
            "timeline": [asdict(s) | {"start_s": round(s.start_s, 3), "end_s": round(s.end_s, 3)} for s in spans],
            "idle_share": idle_share(spans, end - start),
        }
        if number in self._stepped and number in self._answered:
            found["first_answers_s"] = self._answered[number] - self._stepped[number]
        return found


def stage_of(job: Any) -> str:
    """The stage that a job belongs to."""
    match job:
        case SampleShard(out=out) | ScoreShard(out=out) | SumShard(out=out) if out.path.parent.name == "evaluation":
            return "evaluate"
        case Evaluate() | Divergence() | ScoreCandidates() | ScoreTexts():
            return "evaluate"
        case SampleShard():
            return "sample"
        case ScoreShard() | SumShard():
            return "score"
        case PairShard():
            return "pair"
        case ScoreRows() | EngineGap():
            return "reference"
        case UpdatePolicy():
            return "update"
        case TakeWeights() | ScoreProbe():
            return "swap"
        case DrawPrompts() | PreparePrompts() | AllPrompts() | PreparePairs() | PrepareTexts():
            return "prompts"
    return "other"
