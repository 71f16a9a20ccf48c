"""Jobs for the training group, called on all ranks together: log-probs, and a round's update."""

from __future__ import annotations

import json
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import pyarrow as pa

from cluster.errors import WorkerLost
from pipeline.artifacts import StageFolder
from pipeline.checkpoints import CheckpointFolder
from pipeline.files import keep_tree, sync
from pipeline.jobs.probes import ProbeFolder
from pipeline.mirror import obtain, obtain_weights
from pipeline.model_folders import OPTIMIZER, close_model, end_without_model, ended_without_model, found_model
from pipeline.tensorboard import StepCurves
from stages.contracts import GROUPS
from stages.faults import fault_point
from stages.protocols import Moments, Weights
from stages.seeds import hashed_seed
from stages.update.config import UpdateConfig
from stages.update.deadly_steps import StepJournal
from stages.update.guard import SkippedStep
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

SKIPPED = "skipped.jsonl"
"""The file of a round with the optimizer steps that were not taken, and the ids of what they would have trained on."""

_STEPS = "metrics.jsonl"


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
        obtain_weights(self.weights)
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
                self.out.publish(entry.shard, table, parents=[entry], stats=logp_sums(table))


def logp_sums(table: pa.Table) -> dict[str, float]:
    """The figures of a table of `REFERENCE_LOGPS`."""
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
        journal: of its steps.
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
    journal: StepJournal
    probe: ProbeFolder

    def __call__(self, trainer: Any, report: Callable[[Any], None]) -> float | None:
        """When the last optimizer step ended, in seconds since 1970; None where there is nothing to do or to keep."""
        fault_point("update.start", here := [f"round-{self.round}/rank-{trainer.rank}"])
        policy = self.folder / "policy"
        done = found_model(policy, self.fingerprint) or ended_without_model(self.folder, self.fingerprint)
        if trainer.everyone(done is not None):
            return None
        trainer.configure(self.config)
        self._obtain()
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
                on_skip=self._on_skip,
                value_head=self.value_head,
                moments=self.moments,
                checkpoints=CheckpointFolder(self.folder, self.fingerprint, self.config),
                journal=self.journal,
            )
            stepped = time.time()
        if summary.ended is not None:
            if trainer.rank == 0:
                self._sync()
                end_without_model(self.folder, self.fingerprint, update=asdict(summary))
            return None
        result = trainer.save(self.folder, round=self.round)
        self.probe.score(trainer, probed, result)
        kept = trainer.save_moments(self.folder / OPTIMIZER) if self.config.keep_optimizer else None
        fault_point("update.publishing", here)
        if trainer.rank == 0:
            self._sync()
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

    def searching(self, lost: WorkerLost, deaths: int) -> Self | None:
        """See `cluster.mapper.Searching`: the same job, which passes over a step that has cost several groups."""
        return self if self.journal.can_go_on() else None

    def _obtain(self) -> None:
        """Have on this node what the update goes on from."""
        obtain_weights(self.start)
        for folder in (self.value_head, self.moments.path if self.moments is not None else None):
            if folder is not None:
                obtain(folder)

    def _sync(self) -> None:
        """Have what is written beside the policy where it stays: the manifest that follows says that it is there."""
        for name in (_STEPS, SKIPPED, "master", "adapter", "value_head"):
            keep_tree(self.folder / name)
        sync(self.folder)

    @contextmanager
    def _recorder(self, trainer: Any, report: Callable[[Any], None]) -> Iterator[Callable[[dict[str, float]], None]]:
        """What follows an optimizer step on rank 0: a line in ``metrics.jsonl``, a point on every curve, a report."""
        steps_file = self.folder / _STEPS
        if trainer.rank == 0:
            steps_file.write_text("", encoding="utf-8")
            (self.folder / SKIPPED).unlink(missing_ok=True)
        with self.curves.plotting() if self.curves and trainer.rank == 0 else nullcontext(lambda _: None) as plot:

            def on_step(metrics: dict[str, float]) -> None:
                with steps_file.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"round": self.round} | metrics) + "\n")
                plot(metrics)
                report(metrics)

            yield on_step

    def _on_skip(self, step: SkippedStep) -> None:
        """What follows a step that was not taken, on rank 0."""
        with (self.folder / SKIPPED).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"round": self.round} | asdict(step)) + "\n")


def step_journal(folder: Path) -> StepJournal:
    """Of the steps of a round's update by this call, in the round's folder until the round has its policy."""
    return StepJournal(folder / ".steps.jsonl", call=uuid.uuid4().hex[:8])


def rows_of(data: StageFolder, tables: Iterable[pa.Table], **more: Any) -> Sequence[Row]:
    """Tables of pairs or groups as rows to train on; `more` is for pairs, see `pair_rows`."""
    return group_rows(tables) if data.contract == GROUPS else pair_rows(tables, **more)
