"""A round's update: the log-probs of its answers under the references, and the training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipeline import figures
from pipeline.artifacts import StageFolder
from pipeline.checkpoints import asking, drop_checkpoints
from pipeline.console import Stopwatch, duration
from pipeline.jobs import training
from pipeline.jobs.engine_logps import EngineGap, TakeEngineLogps, taken_gap
from pipeline.mirror import obtain, sizes
from pipeline.model_folders import ended_without_model, found_model, found_moments
from pipeline.round_context import RoundContext
from pipeline.stage import Done, by_group
from pipeline.tensorboard import step_curves
from stages.contracts import CANDIDATES, PAIRS
from stages.protocols import Moments, Weights
from stages.weights import weights_sha256

References = Sequence[tuple[Weights, StageFolder]]
"""The references that the objective takes log-probs of, each with the tables of these."""

_RESULTS = ("round_start", "initial", "previous")
"""References that are the result of a round, or the first policy."""


class Updater:
    """Trains one round's policy.

    Args:
        at: the round.
    """

    def __init__(self, at: RoundContext) -> None:
        self._at = at

    def reference_logps(self, data: StageFolder, references: Sequence[tuple[str, Weights]]) -> References:
        """The log-probs of all answers to train on under each reference, one at a time, from the training group.

        None where the objective takes none.
        """
        if self._at.config.update.num_references[1] == 0:
            return []
        tables = []
        for (name, weights), out in zip(references, self._at.reference_tables, strict=True):
            done = self._log_probs(data, name, weights, out)
            told = f"{sum(entry.rows for entry in done.entries):,} answers   {duration(done.seconds)}   under "
            told += f"the policy of round {weights.round}" if name in _RESULTS else name
            if weights.identity == self._at.policies.start.identity:
                told += ", its start"
            if weights.identity == self._at.policies.sampling.identity:
                told += self._engine_gap(out)
            self._at.tell("reference", told, done)
            tables.append((weights, out))
        return tables

    def _log_probs(self, data: StageFolder, name: str, weights: Weights, out: StageFolder) -> Done:
        """The log-probs under one reference: the trainer's, or those with which the engine sampled, if these count."""
        config, candidates = self._at.config, self._at.table(CANDIDATES)
        fingerprint = {"pairs": data.digest(), "weights": weights.identity, "dtype": config.policy.dtype}
        asked: dict[str, Any] = {
            "data": data,
            "out": out,
            "weights": weights,
            "reference": name,
            "config": config.update,
            "round": self._at.number,
        }
        if config.update.reference_logps == "engine" and weights.identity == self._at.policies.sampling.identity:
            fingerprint["candidates"] = candidates.digest()
            job: training.ScoreRows = TakeEngineLogps(**asked, candidates=candidates)
            num_answers = None
        else:
            job = training.ScoreRows(**asked)
            num_answers = 2 * sum(entry.rows for entry in data.entries()) if data.contract == PAIRS else None
        return self._at.shop.run_stage(
            "reference",
            [out],
            fingerprint,
            data.num_parts(),
            lambda _: [job],
            by_group(lambda: self._at.shop.crew.trainers(config), total=num_answers),
        )

    def _engine_gap(self, scored: StageFolder) -> str:
        """Compare the engine's log-probs with the trainer's, where an engine sampled the pairs.

        Raises:
            StageError: if they are too far apart.
        """
        candidates = self._at.table(CANDIDATES)
        if not candidates.is_closed():
            return ""
        taken = taken_gap(scored.entries())
        gap = taken or self._at.shop.crew.tasks.run(EngineGap(candidates, scored))
        self._at.figures["engine_gap"] = gap.mean
        self._at.shop.sync.measured(gap.mean)
        gap.refuse_wide(f"round {self._at.number}: reference")
        if taken is not None:
            return f", by the engine; the trainer differs by {gap.mean:.0e} nats a token"
        return f"; the engine differs by {gap.mean:.0e} nats a token"

    def update(
        self,
        start: Weights,
        data: StageFolder,
        references: References,
        *,
        meanwhile: Callable[[], None] | None = None,
    ) -> Weights | None:
        """Train from `start` on all pairs or groups; the new policy, published in the round's folder.

        None where the guard ended the update, whose figures then say why.

        Args:
            meanwhile: called again and again while the group trains.
        """
        shop, config, policy = self._at.shop, self._at.config, self._at.folder / "policy"
        fingerprint = {
            data.contract.name: data.digest(),
            "start": start.identity,
            "references": [weights.identity for weights, _ in references],
            "update": config.update.identity(),
            "dtype": config.policy.dtype,
            "pad_token": config.policy.pad_token,
            "seed": config.run.seed,
            **self._more_inputs(),
        }
        watch = Stopwatch()
        manifest = found_model(policy, fingerprint)
        ended = ended_without_model(self._at.folder, fingerprint)
        journal = training.step_journal(self._at.folder)
        if manifest is None and ended is None:
            curves = step_curves(shop.folder, round=self._at.number)
            job = training.UpdatePolicy(
                start=start,
                data=data,
                references=references,
                config=config.update,
                folder=self._at.folder,
                fingerprint=fingerprint,
                round=self._at.number,
                seed=config.run.seed,
                curves=curves if config.run.tensorboard else None,
                auxiliary_weights=self._auxiliary_weights,
                stream=self._at.stream if "stream" in config.update.needs else None,
                value_head=self._value_head if "value" in config.update.needs else None,
                moments=self._moments,
                journal=journal,
                probe=shop.sync.probe,
            )
            journal.drop()
            with shop.console.bar("update", total=None) as bar, shop.crew.notices.saved(asking(self._at.folder)):

                def on_step(step: dict[str, float]) -> None:
                    bar.at(step["step"], step["steps"])
                    shop.trackers.add_step(step, steps_before=curves.steps_before)
                    amounts = {"rows": step.get("num_pairs", 0.0), "tokens": step.get("num_tokens", 0.0)}
                    shop.crew.rates.show("update", amounts, step.get("step_s", 0.0))

                shop.crew.trainers(config).run(job, on_report=on_step, meanwhile=meanwhile)
            manifest = found_model(policy, fingerprint)
            ended = ended_without_model(self._at.folder, fingerprint)
            assert manifest is not None or ended is not None, "the training group published no policy"
            if manifest is not None:
                told = figures.updated_line(manifest["update"], watch.seconds, rows=data.contract.name)
                self._at.tell("update", told)
        else:
            self._at.note_earlier_work()
        journal.drop()
        drop_checkpoints(self._at.folder)
        if manifest is None:
            assert ended is not None
            self._at.figures["ended_update"] = ended["update"]
            return None
        self._at.figures["update"] = manifest["update"]
        if manifest["update"].get("resumed_at") is not None:
            self._at.note_earlier_work()
        master = self._at.folder / "master" if manifest["master_sha256"] else None
        return Weights(policy, manifest["sha256"], self._at.number, master, manifest["master_sha256"])

    def _more_inputs(self) -> dict[str, Any]:
        """What an update depends on besides rows, weights and settings, where its objectives need it."""
        needs = self._at.config.update.needs
        found: dict[str, Any] = {}
        if "auxiliary" in needs:
            found["auxiliary"] = self._auxiliary_weights
        if "stream" in needs:
            found["stream"] = self._at.stream.digest()
        if "value" in needs:
            found["value_head"] = weights_sha256(self._value_head) if self._value_head is not None else "new"
        if self._at.config.update.keep_optimizer:
            found["optimizer"] = self._moments.sha256 if self._moments is not None else "new"
        return found | ({"objectives": dict(self._at.sources.objectives)} if self._at.sources.objectives else {})

    @property
    def _auxiliary_weights(self) -> dict[str, float]:
        return {
            source.name: source.config.weight
            for source in self._at.sources.rewards
            if source.config.role == "auxiliary"
        }

    @property
    def _moments(self) -> Moments | None:
        """AdamW's moments of the update that made the start, where they are to be kept and were."""
        if not self._at.config.update.keep_optimizer or not self._at.policies.line:
            return None
        return found_moments(self._at.shop.folder / f"round-{self._at.policies.line[0]:04d}")

    @property
    def _value_head(self) -> Path | None:
        """The value head of the last of the rounds that led here which has one; with none, training begins with a new
        one."""
        run = self._at.shop.folder
        earlier = (run / f"round-{before:04d}" / "value_head" for before in self._at.policies.line)
        found = next((folder for folder in earlier if sizes(folder)), None)
        if found is not None:
            obtain(found)
        return found
