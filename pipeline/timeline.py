"""When which stage of a run worked: spans of time, by the workers' own clocks.

Comes in: every job that has ended, from the crew's workers. Goes out: a round's time line, its idle share, and how long
new weights took to sample. The workers' clocks are taken to agree, as on one machine.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from cluster.timing import Timed
from pipeline.jobs.answers import Evaluate, PairShard, SampleShard, ScoreShard, SumShard
from pipeline.jobs.engine_logps import Divergence, EngineGap
from pipeline.jobs.inputs import AllPrompts, DrawPrompts, PreparePairs, PreparePrompts, PrepareTexts
from pipeline.jobs.probes import ScoreProbe, TakeWeights
from pipeline.jobs.training import ScoreCandidates, ScoreRows, ScoreTexts, UpdatePolicy
from pipeline.spans import Span, Stretches, busy_s, idle_share
from stages.protocols import Weights
from stages.vocab import POLICY_STREAM


class Timeline:
    """The spans of a run, in this process's life."""

    def __init__(self) -> None:
        self._spans = Stretches()
        self._stepped: dict[int, float] = {}
        self._answered: dict[int, float] = {}
        self._sampled: dict[tuple[int, int], Stretches] = {}  # by round, and the round of the policy that sampled

    def note(self, job: Any, done: Timed) -> None:
        """Note when a job worked; an update ends with its last optimizer step, and publishes from there on."""
        stepped = done.value if isinstance(job, UpdatePolicy) else None
        if stepped is None:
            self._spans.add(Span(stage_of(job), done.began, done.ended, done.worker))
        else:
            self._spans.add(Span("update", done.began, stepped, done.worker))
            self._spans.add(Span("publish", stepped, done.ended, done.worker))
            self._stepped[job.round] = stepped
        if isinstance(job, SampleShard):
            made_by = job.weights.round
            self._answered[made_by] = min(done.ended, self._answered.get(made_by, done.ended))
            if job.draw.stream == POLICY_STREAM:
                spans = self._sampled.setdefault((job.draw.round, made_by), Stretches())
                spans.add(Span("sample", done.began, done.ended, done.worker))

    def between(self, start: float, end: float) -> list[Span]:
        """What worked in a stretch of time, cut to it, in seconds since its start."""
        return self._spans.between(start, end)

    def sampling_s(self, number: int, policy: Weights) -> float | None:
        """Seconds in which a policy sampled a round's answers, also where that was before the round; None for none."""
        spans = self._sampled.get((number, policy.round))
        return busy_s(list(spans)) if spans is not None else None

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
