"""A run: its folder, its prompts, its lineage, and which rounds are left to do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pipeline import jobs, report
from pipeline.artifacts import StageFolder, refuse_other_fingerprint, write_json
from pipeline.config import Config
from pipeline.console import Console
from pipeline.crew import Crew
from pipeline.figures import total
from pipeline.lineage import Lineage, RoundRecord, describe
from pipeline.plan import PromptSource, Sources
from pipeline.round import Round
from pipeline.stage import Stage, run_stage
from stages.contracts import PROMPTS
from stages.errors import ConfigError, StageError
from stages.protocols import Weights
from stages.weights import weights_sha256


class Run:
    """One run of a config, in its folder.

    Args:
        config: what to do.
        sources: what the config names, found.
        crew: who does it.
        console: where it is told.
    """

    def __init__(self, config: Config, sources: Sources, crew: Crew, console: Console) -> None:
        self.config, self.sources, self.crew, self.console = config, sources, crew, console
        self.folder = config.folder()
        self.lineage = Lineage.read(self.folder / "run.json")
        self.pool = StageFolder(self.folder / "prompts", PROMPTS)
        self.evaluation = StageFolder(self.folder / "evaluation" / "prompts", PROMPTS) if config.evaluate else None

    # ---- prompts ----------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Check the tokenizers, then read the prompts of training and evaluation.

        Raises:
            PrefloopError: for anything in them that cannot be used.
        """
        policy = (self.sources.policy.path, self.config.policy.pad_token, "policy.path")
        rewards = [(r.folder, r.config.pad_token, r.key) for r in self.sources.rewards if r.config.type == "model"]
        self.crew.tasks.run(jobs.CheckTokenizers([policy, *rewards]))  # type: ignore[list-item]
        merged = self._prepare_evaluation() + self._prepare_pool()
        num_prompts = self.pool.entry(0).rows
        if num_prompts < self.config.prompts.per_round:
            raise ConfigError(
                "prompts.per_round",
                wanted=f"at most the {num_prompts} different prompts there are to train on",
                got=str(self.config.prompts.per_round),
                fix=f"--set prompts.per_round={num_prompts}",
            )
        held = f", {self.evaluation_size():,} held out for evaluation" if self.evaluation else ""
        more = f"; {merged} repeated rows merged" if merged else ""
        self.console.line("", "prompts", f"{num_prompts:,} to train on{held}{more}")

    def evaluation_size(self) -> int:
        return sum(entry.rows for entry in self.evaluation.entries()) if self.evaluation else 0

    def _prepare_evaluation(self) -> int:
        evaluate = self.config.evaluate
        if evaluate is None or self.evaluation is None or self.sources.evaluation is None:
            return 0
        drawn = StageFolder(self.folder / "evaluation" / "drawn", PROMPTS)
        columns = evaluate.columns or self.config.prompts.columns
        keep = "all" if evaluate.holdout is None else "heldout"
        merged = self._read_prompts(drawn, self.sources.evaluation, columns, keep, limit=evaluate.num_prompts)
        size = self.config.prompts.shard_size
        cut = jobs.AllPrompts(drawn, self.evaluation, size)
        num_shards = -(-drawn.entry(0).rows // size)
        fingerprint = {"drawn": drawn.digest(), "shard_size": size}
        stage = Stage("prompts", [self.evaluation], fingerprint, num_shards, lambda _: [cut], lambda _: self.crew.tasks)
        run_stage(stage, self.console)
        return merged

    def _prepare_pool(self) -> int:
        evaluate = self.config.evaluate
        keep = "train" if evaluate is not None and evaluate.holdout is not None else "all"
        return self._read_prompts(self.pool, self.sources.prompts, self.config.prompts.columns, keep)

    def _read_prompts(
        self, out: StageFolder, source: PromptSource, columns: dict[str, str], keep: str, limit: int | None = None
    ) -> int:
        """A source as one published table; returns how many repeated rows were merged."""
        evaluated = self.evaluation if limit is None else None
        holdout = (self.config.evaluate.holdout if self.config.evaluate else None) or 0.0
        seed, system = self.config.run.seed, self.config.prompts.system
        job = jobs.PreparePrompts(
            source.path,
            source.key,
            self.sources.policy.path,
            self.config.policy.pad_token,
            columns,
            system,
            out,
            seed,
            keep,
            holdout,
            evaluated,
            limit,
        )
        fingerprint = {
            "source": source.sha256,
            "policy": self.sources.policy.sha256,
            "columns": columns,
            "system": system,
            "keep": keep,
            "holdout": holdout,
            "evaluated": evaluated.digest() if evaluated else None,
            "limit": limit,
            "seed": seed if limit is not None else None,
        }
        stage = Stage("prompts", [out], fingerprint, 1, lambda _: [job], lambda _: self.crew.tasks)
        return int(total(run_stage(stage, self.console).entries, "merged"))

    # ---- rounds -----------------------------------------------------------------------------------------------------

    @property
    def result(self) -> Weights:
        """The policy that the last settled round stands behind; the first policy before any."""
        return self.lineage.rounds[-1].result if self.lineage.rounds else self.sources.policy

    def evaluate_first(self) -> None:
        """The first policy's figures, before the first round."""
        before = Round(self, 0, self.sources.policy, ())
        before.evaluate(self.sources.policy)
        before.write_report("first", "the policy that the run starts from")

    def unfinished_rounds(self) -> Iterator[Round]:
        """The rounds that are not settled, one at a time, each from the result of the one before.

        Raises:
            FingerprintError: if a settled round was made from something else than the config says now.
        """
        for number in range(1, self.config.rounds + 1):
            settled = self.lineage.rounds[number - 1] if number <= len(self.lineage.rounds) else None
            start = self.sources.policy if number == 1 else self.lineage.rounds[number - 2].result
            rnd = Round(self, number, start, self._references(number, start))
            if settled is None:
                yield rnd
                continue
            refuse_other_fingerprint(rnd.folder, settled.fingerprint, rnd.fingerprint)
            self._refuse_changed(settled.result)
            self.console.line(f"round {number}/{self.config.rounds}", "finished", "nothing to do")

    def settle(self, rnd: Round, figures: dict[str, Any]) -> None:
        """Promote a round's result: it is the next round's start, and the run's result so far."""
        policy = rnd.folder / "policy"
        master = rnd.folder / "master"
        result = Weights(policy, weights_sha256(policy), rnd.number, master if master.exists() else None)
        decision, reason = "promote", "every result is promoted: this run has no gate"
        rnd.write_report(decision, reason)
        self.lineage.settle(
            RoundRecord(rnd.number, rnd.start, list(rnd.references), result, decision, reason, rnd.fingerprint)
        )
        self._publish_result(result)
        report.write_reports(self.folder)

    def _references(self, number: int, start: Weights) -> list[Weights]:
        kind = self.config.reference
        if kind == "initial":
            return [self.sources.policy]
        if kind == "previous" and number > 1:
            return [self.lineage.rounds[number - 2].start]
        return [start]

    def _refuse_changed(self, weights: Weights) -> None:
        if weights_sha256(weights.path) != weights.sha256:
            raise StageError(
                str(weights.path),
                wanted=f"the weights that the round published, sha256 {weights.sha256}",
                got="other weights",
                fix="restore the folder, or start a run of another name",
            )

    def _publish_result(self, result: Weights) -> None:
        write_json(self.folder / "final.json", describe(result, self.folder))
        link, scratch = self.folder / "final", self.folder / ".final"
        scratch.unlink(missing_ok=True)
        scratch.symlink_to(result.path.relative_to(self.folder))
        scratch.replace(link)
