"""Jobs on the probe: some answers, fixed for a run, of which the trainer says what every policy thinks.

An engine that takes new weights is asked the same; see `stages.sample.swap`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.artifacts import StageFolder
from pipeline.mirror import obtain, obtain_weights
from stages.contracts import PROBE, REFERENCE_LOGPS
from stages.protocols import Sampler, Weights
from stages.sample.probe import Probe
from stages.sample.swap import take
from stages.update.config import UpdateConfig
from stages.update.rows import AnswerRow, Row, answers_of, probe_answers, probe_table, reference_table

NUM_ANSWERS = 32


@dataclass(frozen=True, slots=True)
class ProbeFolder:
    """A run's probe: its answers, and for each policy their log-probs by the trainer."""

    path: Path

    @property
    def answers(self) -> StageFolder:
        return StageFolder(self.path / "answers", PROBE)

    def logps(self, identity: str) -> StageFolder:
        """The log-probs under the weights of an identity (`Weights.identity`)."""
        return StageFolder(self.path / f"logps-{identity[:16]}", REFERENCE_LOGPS)

    def has_answers(self) -> bool:
        return self.answers.entry_or_none(0) is not None

    def has_logps(self, identity: str) -> bool:
        return self.logps(identity).entry_or_none(0) is not None

    def probe(self, new: str, old: str, *, tolerance: float) -> Probe:
        """What an engine is asked that goes from the weights `old` to `new`."""
        answers = probe_answers(self.answers.read(0))
        logps = []
        for identity in (new, old):
            table = self.logps(identity).read(0)
            known = dict(zip(table["response_id"].to_pylist(), table["logp"].to_pylist(), strict=True))
            logps.append([known[answer.response_id] for answer in answers])
        return Probe(
            prompt_token_ids=[answer.prompt_token_ids for answer in answers],
            response_token_ids=[answer.token_ids for answer in answers],
            new=logps[0],
            old=logps[1],
            tolerance=tolerance,
        )

    # ---- by the training group, on all ranks together ---------------------------------------------------------------

    def choose(self, trainer: Any, rows: Sequence[Row], *, round: int) -> list[AnswerRow]:
        """The probe's answers: those of the run, or, in its first update, the first ones by id of those trained on."""
        if trainer.everyone(self.has_answers()):
            return probe_answers(self.answers.read(0))
        chosen = answers_of(rows)[:NUM_ANSWERS]
        if trainer.rank == 0:
            self.answers.publish(0, probe_table(chosen, round=round))
        return chosen

    def score(self, trainer: Any, answers: Sequence[AnswerRow], weights: Weights) -> None:
        """What the trainer, which holds `weights` now, says of the answers."""
        if trainer.everyone(self.has_logps(weights.identity)):
            return
        logps = trainer.logps(answers)
        if trainer.rank == 0:
            table = reference_table(
                answers, logps, weights=weights, reference="probe", dtype=trainer.dtype, round=weights.round
            )
            self.logps(weights.identity).publish(0, table)


@dataclass(frozen=True, slots=True)
class ScoreProbe:
    """The probe's log-probs under weights that no update of the run has made."""

    folder: ProbeFolder
    weights: Weights
    config: UpdateConfig

    def __call__(self, trainer: Any, _report: Callable[[Any], None]) -> None:
        trainer.configure(self.config)
        obtain_weights(self.weights)
        trainer.load(self.weights)
        self.folder.score(trainer, probe_answers(self.folder.answers.read(0)), self.weights)


@dataclass(frozen=True, slots=True)
class TakeWeights:
    """Give an engine other weights, and prove it; without a probe it is started anew.

    Attributes:
        held: the identity of the weights that engines hold now.
        tolerance: nats a token.
    """

    weights: Weights
    held: str
    probe: ProbeFolder | None
    tolerance: float

    def __call__(self, sampler: Sampler) -> dict[str, Any]:
        obtain(self.weights.path)
        if self.probe is None:
            loading = sampler.load(self.weights, afresh=True)
            return {"attempts": [{"loading": asdict(loading), "verdict": None, "probe_s": 0.0}]}
        probe = self.probe.probe(self.weights.identity, self.held, tolerance=self.tolerance)
        return asdict(take(sampler, self.weights, probe))
