"""Jobs for the training group, called on all ranks together, and what compares its log-probs with the engine's."""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.artifacts import StageFolder
from pipeline.jobs.probes import ProbeFolder
from pipeline.model_folders import OPTIMIZER, close_model, found_model
from pipeline.tensorboard import StepCurves
from stages.contracts import GROUPS
from stages.faults import fault_point
from stages.protocols import Moments, Weights
from stages.seeds import hashed_seed
from stages.update.config import UpdateConfig
from stages.update.rows import (
    AnswerRow,
    Row,
    answers_of,
    candidate_answers,
    group_rows,
    pair_rows,
    reference_logps,
    reference_table,
    text_answers,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreAnswers(ABC):
    """The log-probs of some answers under one policy, a part for each part of the answers' table.

    Attributes:
        reference: the policy's name in the table.
    """

    out: StageFolder
    weights: Weights
    reference: str
    config: UpdateConfig
    round: int

    @abstractmethod
    def answered(self) -> StageFolder:
        """The table of the answers."""

    @abstractmethod
    def rows(self, shard: int) -> list[AnswerRow]:
        """The answers of one part."""

    def __call__(self, trainer: Any, report: Callable[[Any], None]) -> None:
        trainer.configure(self.config)
        trainer.load(self.weights)
        parts = [(entry, self.rows(entry.shard)) for entry in self.answered().entries()]
        logps = trainer.logps([row for _, rows in parts for row in rows], progress=report)
        if trainer.rank == 0:
            for entry, rows in parts:
                table = reference_table(
                    rows,
                    logps,
                    weights=self.weights,
                    reference=self.reference,
                    dtype=trainer.dtype,
                    round=self.round,
                )
                self.out.publish(entry.shard, table, parents=[entry], stats=_sums(table))


def _sums(table: pa.Table) -> dict[str, float]:
    return {"logp": sum(table["logp"].to_pylist()), "tokens": sum(table["num_tokens"].to_pylist())}


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRows(ScoreAnswers):
    """Every answer of the pairs, or groups, to train on."""

    data: StageFolder

    def answered(self) -> StageFolder:
        return self.data

    def rows(self, shard: int) -> list[AnswerRow]:
        return answers_of(rows_of(self.data, [self.data.read(shard)]))


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreCandidates(ScoreAnswers):
    """Every candidate."""

    prompts: StageFolder
    candidates: StageFolder

    def answered(self) -> StageFolder:
        return self.candidates

    def rows(self, shard: int) -> list[AnswerRow]:
        return candidate_answers(self.prompts.read(shard), self.candidates.read(shard))


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreTexts(ScoreAnswers):
    """Every text, each token given those before it."""

    texts: StageFolder

    def answered(self) -> StageFolder:
        return self.texts

    def rows(self, shard: int) -> list[AnswerRow]:
        return text_answers(self.texts.read(shard))


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdatePolicy:
    """A round's update, by the training group: all pairs or groups, then the new policy's folder.

    Attributes:
        auxiliary_weights: of the auxiliary rewards, by name.
        stream: answers drawn from the reference, where the objectives take some.
        value_head: to go on with; None for a new one, or where none is needed.
        moments: AdamW's, to go on with; None for new ones.
        probe: gets what the trainer says of its answers before and after.
    """

    start: Weights
    data: StageFolder
    references: Sequence[tuple[Weights, StageFolder]]
    config: UpdateConfig
    folder: Path
    fingerprint: Mapping[str, Any]
    round: int
    seed: int
    curves: StepCurves | None
    auxiliary_weights: Mapping[str, float]
    stream: StageFolder | None
    value_head: Path | None
    moments: Moments | None
    probe: ProbeFolder

    def __call__(self, trainer: Any, report: Callable[[Any], None]) -> float | None:
        """When the last optimizer step ended, in seconds since 1970; None where the policy is there already."""
        fault_point("update.start", here := [f"round-{self.round}/rank-{trainer.rank}"])
        policy = self.folder / "policy"
        if trainer.everyone(found_model(policy, self.fingerprint) is not None):
            return None
        trainer.configure(self.config)
        trainer.load(self.start)
        rows = rows_of(
            self.data,
            self.data.read_all(),
            aux_weights=self.auxiliary_weights,
            stream=self.stream.read_all() if self.stream is not None else (),
        )
        references = [reference_logps(folder.read_all(), rows) for _, folder in self.references]
        identities = [weights.identity for weights, _ in self.references]
        probed = self.probe.choose(trainer, rows, round=self.round)
        self.probe.score(trainer, probed, self.start)
        with self._recorder(trainer, report) as on_step:
            summary = trainer.update(
                rows,
                references,
                own_reference=identities.index(self.start.identity) if self.start.identity in identities else None,
                seed=hashed_seed("update", self.seed, self.round),
                on_step=on_step,
                value_head=self.value_head,
                moments=self.moments,
            )
            stepped = time.time()
        result = trainer.save(self.folder, round=self.round)
        self.probe.score(trainer, probed, result)
        kept = trainer.save_moments(self.folder / OPTIMIZER) if self.config.keep_optimizer else None
        fault_point("update.publishing", here)
        if trainer.rank == 0:
            if kept is not None:
                close_model(kept.path, self.fingerprint, sha256=kept.sha256)
            close_model(
                policy,
                self.fingerprint,
                sha256=result.sha256,
                master_sha256=result.master_sha256,
                update=asdict(summary),
            )
        fault_point("update.end", here)
        return stepped

    @contextmanager
    def _recorder(self, trainer: Any, report: Callable[[Any], None]) -> Iterator[Callable[[dict[str, float]], None]]:
        """What follows an optimizer step on rank 0: a line in ``metrics.jsonl``, a point on every curve, a report."""
        steps_file = self.folder / "metrics.jsonl"
        if trainer.rank == 0:
            steps_file.write_text("", encoding="utf-8")
        with self.curves.plotting() if self.curves and trainer.rank == 0 else nullcontext(lambda _: None) as plot:

            def on_step(metrics: dict[str, float]) -> None:
                with steps_file.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"round": self.round} | metrics) + "\n")
                plot(metrics)
                report(metrics)

            yield on_step


def rows_of(data: StageFolder, tables: Iterable[pa.Table], **more: Any) -> Sequence[Row]:
    """Tables of pairs or groups as rows to train on; `more` is for pairs, see `pair_rows`."""
    return group_rows(tables) if data.contract == GROUPS else pair_rows(tables, **more)


@dataclass(frozen=True, slots=True)
class EngineGap:
    """How far the engine's log-probs of the paired answers are from the trainer's under the same weights."""

    candidates: StageFolder
    reference: StageFolder

    def __call__(self, _state: None) -> float:
        """Mean absolute difference in nats a token."""
        gap, num_tokens = 0.0, 0
        for sampled, scored, length in log_probs_side_by_side(self.candidates, self.reference):
            gap += abs(sampled - scored)
            num_tokens += length
        return gap / max(1, num_tokens)


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
        ratios = [ours - theirs for ours, theirs, _ in log_probs_side_by_side(self.candidates, self.reference)]
        return sum(ratios) / len(ratios) if ratios else None


def log_probs_side_by_side(candidates: StageFolder, scored: StageFolder) -> Iterator[tuple[float, float, int]]:
    """For each candidate that was scored too: the engine's summed log-prob, the trainer's, and the number of tokens."""
    trainers = {row["response_id"]: row for table in scored.read_all() for row in table.to_pylist()}
    for table in candidates.read_all():
        for row in table.select(["response_id", "response_logps"]).to_pylist():
            if (found := trainers.get(row["response_id"])) is not None:
                yield sum(row["response_logps"]), found["logp"], found["num_tokens"]
