"""What the engine's own log-probs of its answers are good for: references, a check of the engine, a divergence.

The engine stores them as it samples, at temperature 1. Under the same weights they differ from the trainer's by
rounding alone: 1e-7 nats a token in float32, some 1e-2 in bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline.artifacts import StageFolder
from pipeline.entries import Entry
from pipeline.jobs.training import ScoreRows, logp_sums
from stages.errors import StageError
from stages.update.rows import AnswerRow, reference_table

GAP_LIMIT = 0.1  # nats a token
_FLOOR_OVER_GAP = 2  # since a few answers are compared, and others may be further apart
_SAMPLE = 32  # answers that the trainer scores too, before the engine's word is taken


@dataclass(frozen=True, slots=True)
class Gap:
    """How far the engine's log-probs of some answers are from the trainer's.

    Attributes:
        mean: of the absolute differences, in nats a token.
        largest: absolute difference of an answer, in nats.
    """

    mean: float
    largest: float

    @classmethod
    def between(cls, pairs: Iterator[tuple[float, float, int]]) -> Gap:
        """From each answer's log-prob by the engine, that by the trainer, and its number of tokens."""
        found = [(abs(engine - trainer), length) for engine, trainer, length in pairs]
        total = sum(length for _, length in found)
        # max() would pass over a NaN that is not the first.
        largest = max((gap for gap, _ in found), key=lambda gap: (gap != gap, gap), default=0.0)
        return cls(sum(gap for gap, _ in found) / max(1, total), largest)

    def refuse_wide(self, where: str) -> None:
        """See that engine and trainer hold the same policy.

        Raises:
            StageError: if they are too far apart.
        """
        if not self.mean <= GAP_LIMIT:  # so that NaN, of broken weights, is refused too
            raise StageError(
                where,
                wanted=f"log-probs of engine and trainer within {GAP_LIMIT} nats a token of each other",
                got=f"{self.mean:.3g}: the answers were not sampled from the policy that would be trained",
                fix="see that the policy's folder is whole, then delete the round's folder and run again; "
                "if it stays so, vLLM and transformers disagree on this model",
            )

    def refuse_low_floor(self, where: str, floor: float | None) -> None:
        """See that a gate's floor covers the gaps of all answers, of which these are a few.

        Raises:
            StageError: if it is below twice the largest of these.
        """
        if floor is None or not _FLOOR_OVER_GAP * self.largest <= floor:
            raise StageError(
                where,
                wanted=f"update.gate_floor at least {_FLOOR_OVER_GAP} times the largest gap between the engine's "
                "log-probs and the trainer's, so that no rejected answer is pushed for its rounding",
                got=f"{floor}, and {self.largest:.3g} nats for one of {_SAMPLE} answers",
                # 1.1 times what is needed, since two digits may be rounded down.
                fix=f"--set update.gate_floor={1.1 * _FLOOR_OVER_GAP * self.largest:.2g}, or "
                "--set update.reference_logps=trainer",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class TakeEngineLogps(ScoreRows):
    """The engine's log-probs of every answer to train on, once the trainer's of some have been compared with them.

    Answers that the engine did not sample get the trainer's.

    Attributes:
        candidates: the engine's answers, in the shards that `data` was made from.
    """

    candidates: StageFolder

    def __call__(self, trainer: Any, report: Callable[[Any], None]) -> None:
        """Publish the log-probs.

        Raises:
            StageError: if engine and trainer are too far apart, for a gated objective by more than half of its floor.
        """
        trainer.configure(self.config)
        trainer.load(self.weights)
        parts = [(entry, self.rows(entry.shard)) for entry in self.data.entries()]
        answers = [row for _, rows in parts for row in rows]
        sampled = self._sampled(parts)
        compared = _spread([row for row in answers if row.response_id in sampled], _SAMPLE)
        others = [row for row in answers if row.response_id not in sampled]
        scored = trainer.logps([*compared, *others], progress=report)
        gap = Gap.between((sampled[row.response_id], scored[row.response_id], len(row.token_ids)) for row in compared)
        self._refuse_wide(gap)
        logps = scored | sampled
        if trainer.rank == 0:
            for entry, rows in parts:
                table = reference_table(
                    rows, logps, weights=self.weights, reference=self.reference, dtype=trainer.dtype, round=self.round
                )
                self.out.publish(
                    entry.shard,
                    table,
                    parents=[entry, self.candidates.entry(entry.shard)],
                    stats=logp_sums(table) | {"engine_gap": gap.mean, "engine_gap_largest": gap.largest},
                )

    def _sampled(self, parts: Sequence[tuple[Entry, Sequence[AnswerRow]]]) -> dict[str, float]:
        """The engine's log-probs of the answers to train on, by response id."""
        found: dict[str, float] = {}
        for entry, rows in parts:
            wanted = {row.response_id for row in rows}
            found |= {id: logp for id, logp in _engine_logps(self.candidates.read(entry.shard)) if id in wanted}
        return found

    def _refuse_wide(self, gap: Gap) -> None:
        where = f"round {self.round}: update.reference_logps"
        gap.refuse_wide(where)
        if any(loss.gated for loss in self.config.losses()):
            gap.refuse_low_floor(where, self.config.gate_floor)


@dataclass(frozen=True, slots=True)
class EngineGap:
    """How far the engine's log-probs of the paired answers are from the trainer's under the same weights."""

    candidates: StageFolder
    reference: StageFolder

    def __call__(self, _state: None) -> Gap:
        return Gap.between(_side_by_side(self.candidates, self.reference))


@dataclass(frozen=True, slots=True)
class Divergence:
    """How far a policy is from another one, on the policy's own answers."""

    candidates: StageFolder
    reference: StageFolder

    def __call__(self, _state: None) -> float | None:
        """The mean log-ratio of policy and reference in nats an answer; None without an answer.

        It estimates KL(policy || reference) without bias, since the answers are the policy's own at temperature 1; for
        nearly equal policies noise may take it below 0.
        """
        ratios = [ours - theirs for ours, theirs, _ in _side_by_side(self.candidates, self.reference)]
        return sum(ratios) / len(ratios) if ratios else None


def _side_by_side(candidates: StageFolder, scored: StageFolder) -> Iterator[tuple[float, float, int]]:
    """For each candidate that was scored too: the engine's summed log-prob, the trainer's, and the number of tokens."""
    trainers = {row["response_id"]: row for table in scored.read_all() for row in table.to_pylist()}
    for table in candidates.read_all():
        for response_id, logp in _engine_logps(table):
            if (found := trainers.get(response_id)) is not None:
                yield logp, found["logp"], found["num_tokens"]


def _engine_logps(candidates: pa.Table) -> Iterator[tuple[str, float]]:
    """Each candidate's id and the engine's summed log-prob in nats."""
    for row in candidates.select(["response_id", "response_logps"]).to_pylist():
        yield row["response_id"], sum(row["response_logps"])


def _spread(answers: Sequence[AnswerRow], count: int) -> Sequence[AnswerRow]:
    """So many of the answers, evenly over all."""
    return answers[:: max(1, -(-len(answers) // count))]


def taken_gap(entries: Sequence[Entry]) -> Gap | None:
    """The gap that was measured as the engine's log-probs were taken; None where the trainer's were."""
    stats: Mapping[str, float] = entries[0].stats if entries else {}
    return Gap(stats["engine_gap"], stats["engine_gap_largest"]) if "engine_gap" in stats else None
