"""Weights into running engines, proved: which probe is asked, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline import figures
from pipeline.config import Config
from pipeline.crew import Crew
from pipeline.jobs.probes import ProbeFolder, ScoreProbe, TakeWeights
from stages.protocols import Weights
from stages.sample.probe import FLOAT32_LEAST, FLOAT32_TOLERANCE

_UNMEASURED = 0.1  # nats a token; bfloat16 before a round has measured how far engine and trainer are apart in it
_NOISE = 3  # times the mean difference on equal weights
_FLOAT32_NOISE = 10  # likewise: single tensors that stayed old may move log-probs by less than the tolerance


@dataclass(slots=True)
class EngineSync:
    """Keeps a run's engines on the weights that are asked for.

    Attributes:
        reports: what came of every change since they were last taken (`taken`).
    """

    crew: Crew
    folder: Path
    reports: list[dict[str, Any]] = field(default_factory=list)
    _num_told: int = 0
    _held: tuple[Any, Weights] | None = None
    _gap: float | None = None

    @property
    def probe(self) -> ProbeFolder:
        return ProbeFolder(self.folder / "probe")

    def samplers(self, weights: Weights, config: Config) -> Any:
        """The engines, with these weights; engines that run take them in place."""
        pool = self.crew.samplers(config)
        held = self._held[1] if self._held is not None and self._held[0] is pool else None
        self._held = pool, weights
        if held is not None and held.sha256 != weights.sha256:
            probe = self._probe(weights, held, config)
            pool = self.crew.samplers(config)  # again: the probe may have been the trainers' turn
            self.reports += pool.each(TakeWeights(weights, held.identity, probe, self._tolerance(config)))
        return pool

    def measured(self, gap: float) -> None:
        """Note how far engine and trainer are apart on equal weights, in nats a token."""
        self._gap = gap

    def taken(self) -> list[dict[str, Any]]:
        """The reports so far, once."""
        found, self.reports, self._num_told = self.reports, [], 0
        return found

    def told(self) -> str:
        """What came of the changes that have not been told yet, for the end of a stage's line."""
        found, self._num_told = self.reports[self._num_told :], len(self.reports)
        return figures.engine_sync(found)

    def _tolerance(self, config: Config) -> float:
        if config.policy.dtype == "float32":
            measured = FLOAT32_TOLERANCE if self._gap is None else _FLOAT32_NOISE * self._gap
            return min(FLOAT32_TOLERANCE, max(FLOAT32_LEAST, measured))
        return _UNMEASURED if self._gap is None else max(FLOAT32_TOLERANCE, _NOISE * self._gap)

    def _probe(self, weights: Weights, held: Weights, config: Config) -> ProbeFolder | None:
        """The probe with log-probs under both weights, made now where they lack; None before the run has answers."""
        if not self.probe.has_answers():
            return None
        for each in (held, weights):
            if not self.probe.has_logps(each.identity):
                job = ScoreProbe(self.probe, each, config.update)
                self.crew.trainers(config).run(job, on_report=lambda _: None)
        return self.probe
