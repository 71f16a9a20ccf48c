"""One round's steps, each of them skipped where its result is published, checked, timed and told in a line.

`pipeline.collect` makes its data, `pipeline.updating` trains on them, `pipeline.evaluation` judges the result.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline import figures, gate
from pipeline.ahead import Ahead
from pipeline.artifacts import StageFolder
from pipeline.collect import Collector
from pipeline.config_facts import made_by
from pipeline.console import Stopwatch
from pipeline.evaluation import Evaluation
from pipeline.files import read_json, write_json
from pipeline.gate import Rivals, Verdict, ungated
from pipeline.model_folders import refuse_changed_model
from pipeline.policies import Policies
from pipeline.round_context import RoundContext
from pipeline.tensorboard import plot_evaluation
from pipeline.updating import References, Updater
from pipeline.workshop import Workshop
from stages.contracts import CANDIDATES, FATES, PROMPTS, SCORED
from stages.protocols import Weights


class Round:
    """A round of a run, or, in a folder of its own, the steps of one by themselves.

    Args:
        shop: what the run's steps share.
        number: counted from 1.
        policies: the one that samples, the one that is trained, those that the objective refers to.
        pool: the prompts to draw from; None where the config has ready pairs.
        drawn_before: how many prompts each earlier round drew from it.
        evaluation: None where nothing is evaluated.
        label: what its lines begin with.
        folder: in the place of the run's ``round-K``.
        every_prompt: ask the whole pool instead of ``prompts.per_round`` of it.
        give_up: called where nothing can be built on what was sampled, before the error is raised.
        ahead: its data, as far as they were collected while the round before was trained.
        rivals: what its result is judged against; None where it is not.
    """

    def __init__(
        self,
        shop: Workshop,
        number: int,
        policies: Policies,
        *,
        pool: StageFolder | None = None,
        drawn_before: Sequence[int] = (),
        evaluation: Evaluation | None = None,
        label: str = "",
        folder: Path | None = None,
        every_prompt: bool = False,
        give_up: Callable[[], None] | None = None,
        ahead: Ahead | None = None,
        rivals: Rivals | None = None,
    ) -> None:
        self._at = RoundContext(shop, number, policies, folder or shop.folder / f"round-{number:04d}", label)
        self.number, self.folder = number, self._at.folder
        self.data = Collector(
            self._at, pool=pool, drawn_before=drawn_before, every_prompt=every_prompt, give_up=give_up
        )
        self._updater, self._evaluation, self._began = Updater(self._at), evaluation, time.time()
        self._ahead, self._rivals = ahead, rivals
        self._next: Ahead | None = None
        if ahead is not None:
            self._at.figures.update(ahead.figures)

    @property
    def sampling(self) -> Weights:
        """The policy that answers the prompts."""
        return self._at.policies.sampling

    @property
    def start(self) -> Weights:
        """The policy that the update begins from."""
        return self._at.policies.start

    @property
    def references(self) -> tuple[tuple[str, Weights], ...]:
        """What the objective refers to, by the names in the config."""
        return self._at.policies.references

    @property
    def why_no_result(self) -> str:
        """Why the guard ended the update without a policy."""
        return str(self._at.figures["ended_update"]["ended"])

    # ---- what a round does ------------------------------------------------------------------------------------------

    def collect(self, policy: Weights) -> StageFolder:
        """Sample with `policy`, score and pair; see `Collector.collect`."""
        if self._ahead is None:
            return self.data.collect(policy)
        self._ahead.join()
        self._at.figures.update(self._ahead.figures)
        return self.data.end()

    def reference_logps(self, data: StageFolder, references: Sequence[tuple[str, Weights]]) -> References:
        """The log-probs of all answers to train on under each reference; see `Updater.reference_logps`."""
        return self._updater.reference_logps(data, references)

    def update(self, start: Weights, data: StageFolder, references: References) -> Weights | None:
        """Train from `start`, see `Updater.update`; the next round is sampled meanwhile, where it may be."""
        result = self._updater.update(start, data, references, meanwhile=self._next.pump if self._next else None)
        if self._next is not None:
            self._next.finish()
        return result

    def meanwhile(self, ahead: Ahead | None) -> None:
        """What goes on while this round's policy is trained."""
        self._next = ahead

    def evaluate(self, policy: Weights) -> figures.Figures:
        """The figures of a policy; empty where the config evaluates nothing."""
        if self._evaluation is None:
            return {}
        watch = Stopwatch()
        before = self._rivals.before if self._rivals is not None else None
        found, made = self._evaluation.of(policy, round=self.number, config=self._at.config, before=before)
        self._at.figures["evaluate"] = found
        if made:
            told = figures.evaluated_line(found, watch.seconds) + self._at.shop.sync.told()
            self._at.tell("evaluate", told)
        else:
            self._at.note_earlier_work()
        return found

    def gate(self, result: Weights | None) -> Verdict:
        """Evaluate the round's result, and say what becomes of it; no result is held."""
        config = self._at.shop.config.gate
        assert self._rivals is not None
        if result is None:
            verdict = gate.refused(config, f"the update was ended: {self.why_no_result}", None, self._rivals)
        else:
            found = self.evaluate(result)
            if config is None or not found:
                return ungated(result, "this run has no gate" if config is None else "nothing is evaluated")
            verdict = gate.verdict(config, found, result, self._rivals)
        self._at.figures["gate"] = verdict.figures()
        self._at.tell("gate", f"{verdict.decision}: {verdict.reason}")
        return verdict

    # ---- what is kept of it -----------------------------------------------------------------------------------------

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """All that decides this round's result, as far as it is known before it runs."""
        config = self._at.config
        return {
            "start": self.start.identity,
            "sampling": self.sampling.identity,
            "references": [weights.identity for _, weights in self.references],
            "objectives": dict(self._at.sources.objectives),
            "policy_files": self._at.shop.sources.policy_files,
            "pad_token": config.policy.pad_token,
            "evaluation": self._evaluation.digest() if self._evaluation is not None else None,
            "seed": config.run.seed,
            "dtype": config.policy.dtype,
            "update": config.update.identity(),
            **self.data.fingerprint,
        }

    def refuse_damaged(self, *, with_policy: bool) -> None:
        """Check that what a settled round published is whole; `with_policy`: that there is a policy among it.

        Raises:
            ContractError: naming the first file that is not.
        """
        sampled = (PROMPTS, CANDIDATES, SCORED, FATES) if self._at.config.pairs is None else ()
        tables = map(self._at.table, (*sampled, made_by(self._at.config)))
        for table in (*tables, *self._at.reference_tables):
            table.refuse_changed()
        if with_policy:
            refuse_changed_model(self.folder / "policy")

    def write_report(self, decision: str, reason: str) -> None:
        """The round's figures, and what was decided on them."""
        file, found = self.folder / "report.json", self._at.figures
        evaluated, told = found.get("evaluate"), read_json(file).get("evaluate") if file.exists() else None
        if evaluated and evaluated != told:
            if self._at.config.run.tensorboard:
                plot_evaluation(self._at.shop.folder, round=self.number, figures=evaluated)
            self._at.shop.trackers.add_evaluation(evaluated, round=self.number)
        if syncs := self._at.shop.sync.taken():
            found["engine_sync"] = syncs
        ended = time.time()
        seconds = {"seconds": ended - self._began} if self.number else {}
        timeline = self._at.shop.crew.timeline
        times = timeline.figures(self.number, self._began, ended)
        if (sampling_s := timeline.sampling_s(self.number, self.sampling)) is not None:
            times["sampling_s"] = sampling_s
        write_json(file, {"round": self.number, "decision": decision, "reason": reason} | seconds | found | times)
