"""A run: its folder, its prompts, its lineage, and which rounds are left to do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

from cluster.mapper import Tasks
from pipeline import jobs, report
from pipeline.artifacts import StageFolder, refuse_other_fingerprint, write_json
from pipeline.config import Config
from pipeline.console import Bar, Console
from pipeline.crew import Crew
from pipeline.figures import Figures
from pipeline.lineage import Lineage, RoundRecord, describe
from pipeline.prompts import Form, HeldOut
from pipeline.round import Round
from pipeline.run_folder import write_config
from pipeline.sources import PromptSource, Sources
from pipeline.stage import Done, Stage, run_stage
from stages.contracts import PROMPTS
from stages.errors import ConfigError
from stages.protocols import Weights


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
        """Check the tokenizers, then read the prompts of evaluation and training.

        Raises:
            PrefloopError: for anything in them that cannot be used.
        """
        policy = (self.sources.policy.path, self.config.policy.pad_token, "policy.path")
        rewards = [(r.folder, r.config.pad_token, r.key) for r in self.sources.rewards if r.config.type == "model"]
        self.crew.tasks.run(jobs.CheckTokenizers(policy, rewards))  # type: ignore[arg-type]
        self._prepare_evaluation()
        stats = self._prepare_pool().entries[0].stats
        num_prompts, wanted = self.pool.entry(0).rows, self.config.prompts.per_round
        if num_prompts < wanted:
            raise ConfigError(
                "prompts.per_round",
                wanted=f"at most the {num_prompts} different prompts there are to train on",
                got=str(wanted),
                fix=f"--set prompts.per_round={num_prompts}",
            )
        told = f"{num_prompts:,} to train on"
        if self.evaluation is not None:
            told += f", {sum(entry.rows for entry in self.evaluation.entries()):,} held out for evaluation"
        if stats["merged"]:
            told += f"; {stats['merged']:,.0f} repeated rows merged"
        if stats["evaluated"]:
            told += f"; {stats['evaluated']:,.0f} left out of training, since they are evaluated on"
        if stats["changed"]:
            told += f"; the policy's tokenizer does not keep the text of {stats['changed']:,.0f} of them as it is"
        if self.config.rounds * wanted > num_prompts:
            told += f"; asked again, reshuffled, after {num_prompts // wanted} rounds"
        self.console.line("", "prompts", told)

    def _prepare_evaluation(self) -> None:
        evaluate, source = self.config.evaluate, self.sources.evaluation
        if evaluate is None or self.evaluation is None or source is None:
            return
        drawn = StageFolder(self.folder / "evaluation" / "drawn", PROMPTS)
        held = None if evaluate.holdout is None else HeldOut(evaluate.holdout, wanted=True)
        columns = evaluate.columns or self.config.prompts.columns
        self._read_prompts(drawn, source, columns, held_out=held, limit=evaluate.num_prompts)
        size, cut = self.config.prompts.shard_size, self.evaluation
        job = jobs.AllPrompts(drawn, cut, size)
        num_shards = -(-drawn.entry(0).rows // size)
        fingerprint = {"drawn": drawn.digest(), "shard_size": size}
        run_stage(Stage("prompts", [cut], fingerprint, num_shards, lambda _: [job], self._tasks), self.console)

    def _prepare_pool(self) -> Done:
        evaluate = self.config.evaluate
        held = None if evaluate is None or evaluate.holdout is None else HeldOut(evaluate.holdout, wanted=False)
        source, columns = self.sources.prompts, self.config.prompts.columns
        return self._read_prompts(self.pool, source, columns, held_out=held, exclude=self.evaluation)

    def _read_prompts(
        self,
        out: StageFolder,
        source: PromptSource,
        columns: dict[str, str],
        *,
        held_out: HeldOut | None,
        exclude: StageFolder | None = None,
        limit: int | None = None,
    ) -> Done:
        """A source as one published table."""
        seed, prompts = self.config.run.seed, self.config.prompts
        form = Form(columns, prompts.system, prompts.to_chat, prompts.chat_template_kwargs)
        job = jobs.PreparePrompts(
            source=source.path,
            key=source.key,
            tokenizer=self.sources.policy.path,
            pad_token=self.config.policy.pad_token,
            part=source.part,
            form=form,
            out=out,
            seed=seed,
            held_out=held_out,
            exclude=exclude,
            limit=limit,
        )
        fingerprint = {
            "source": source.sha256,
            "tokenizer": self.sources.policy_files,
            "part": asdict(source.part),
            "form": asdict(form),
            "held_out": None if held_out is None else [held_out.share, held_out.wanted],
            "exclude": exclude.digest() if exclude else None,
            "limit": limit,
            "seed": seed if limit is not None else None,
        }
        return run_stage(Stage("prompts", [out], fingerprint, 1, lambda _: [job], self._tasks), self.console)

    def _tasks(self, _bar: Bar) -> Tasks:
        return self.crew.tasks

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
            ConfigError: if more rounds are settled than the config asks for.
            FingerprintError: if a settled round was made from something else than the config says now.
            ContractError: if what it published is damaged.
        """
        if len(self.lineage.rounds) > self.config.rounds:
            raise ConfigError(
                "rounds",
                wanted=f"at least {len(self.lineage.rounds)}, which this run has settled",
                got=str(self.config.rounds),
                fix=f"--set rounds={len(self.lineage.rounds)}, or another name: --set run.name=…",
            )
        for number in range(1, self.config.rounds + 1):
            settled = self.lineage.rounds[number - 1] if number <= len(self.lineage.rounds) else None
            start = self.sources.policy if number == 1 else self.lineage.rounds[number - 2].result
            rnd = Round(self, number, start, self._references(number, start))
            if settled is None:
                yield rnd
                continue
            refuse_other_fingerprint(rnd.folder, settled.fingerprint, rnd.fingerprint)
            rnd.refuse_damaged()
            self.console.line(f"round {number}/{self.config.rounds}", "finished", "nothing to do")
        self._publish()

    def settle(self, rnd: Round, result: Weights, figures: Figures) -> None:
        """Promote a round's result, whatever its figures: it is the next round's start, and the run's result so far."""
        decision, reason = "promote", "every result is promoted: this run has no gate"
        rnd.write_report(decision, reason)
        references = list(rnd.references)
        self.lineage.settle(RoundRecord(rnd.number, rnd.start, references, result, decision, reason, rnd.fingerprint))
        self._publish()

    def _publish(self) -> None:
        """Write what follows from the lineage: the config that made it, the result's name and link, the reports."""
        write_config(self.config)
        write_json(self.folder / "final.json", describe(self.result, self.folder))
        link, scratch = self.folder / "final", self.folder / ".final"
        scratch.unlink(missing_ok=True)
        scratch.symlink_to(self.result.path.relative_to(self.folder))
        scratch.replace(link)
        report.write_reports(self.folder)

    def _references(self, number: int, start: Weights) -> list[Weights]:
        kind = self.config.reference
        if kind == "initial":
            return [self.sources.policy]
        if kind == "previous" and number > 1:
            return [self.lineage.rounds[number - 2].start]
        return [start]
