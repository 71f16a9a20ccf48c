"""One round's steps, each of them skipped where its result is published, checked, timed and told in a line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline import figures
from pipeline.artifacts import StageFolder
from pipeline.config import Config
from pipeline.console import Stopwatch, duration
from pipeline.evaluation import Evaluation
from pipeline.files import read_json, write_json
from pipeline.jobs import inputs, training
from pipeline.model_folders import found_model, refuse_changed_model
from pipeline.pairing import made_by, nothing_made, pair_round
from pipeline.pools import read_pairs
from pipeline.sources import RoundSources
from pipeline.stage import Done, by_group
from pipeline.tensorboard import plot_evaluation, step_curves
from pipeline.workshop import Workshop
from stages.contracts import CANDIDATES, FATES, PAIRS, PROMPTS, REFERENCE_LOGPS, SCORED, Contract
from stages.errors import StageError
from stages.protocols import Weights
from stages.sample.stage import Draw
from stages.vocab import POLICY_STREAM

ENGINE_GAP_LIMIT = 0.1  # nats a token; float32 differs by 1e-7, bfloat16 by some 1e-2

References = Sequence[tuple[Weights, StageFolder]]
"""The references of a round, each with the tables of its log-probs."""


class Round:
    """A round of a run, or, in a folder of its own, the steps of one by themselves.

    Args:
        shop: what the run's steps share.
        number: counted from 1.
        start: the policy that samples and is trained.
        references: the policies that the objective refers to.
        pool: the prompts to draw from; None where the config has ready pairs.
        drawn_before: how many prompts each earlier round drew from it.
        evaluation: None where nothing is evaluated.
        label: what its lines begin with.
        folder: in the place of the run's ``round-K``.
        every_prompt: ask the whole pool instead of ``prompts.per_round`` of it.
        give_up: called where nothing can be built on what was sampled, before the error is raised.
    """

    def __init__(
        self,
        shop: Workshop,
        number: int,
        start: Weights,
        references: Sequence[Weights],
        *,
        pool: StageFolder | None = None,
        drawn_before: Sequence[int] = (),
        evaluation: Evaluation | None = None,
        label: str = "",
        folder: Path | None = None,
        every_prompt: bool = False,
        give_up: Callable[[], None] | None = None,
    ) -> None:
        self.shop, self.number, self.start, self.references = shop, number, start, tuple(references)
        self.config: Config = shop.config.for_round(number)
        self.sources: RoundSources = shop.sources.of(number)
        self.folder: Path = folder or shop.folder / f"round-{number:04d}"
        self.figures: figures.Figures = {}
        self._pool, self._evaluation, self._label = pool, evaluation, label
        self._drawn_before, self._every_prompt = tuple(drawn_before), every_prompt
        self._give_up, self._watch = give_up, Stopwatch()

    # ---- collect ----------------------------------------------------------------------------------------------------

    def collect(self, start: Weights) -> StageFolder:
        """Sample, score and pair, or take ready pairs; the pairs as a handle on their shards.

        Raises:
            StageError: if too many answers have no finite reward, all rewards are equal, or there is no pair.
        """
        if self.config.pairs is not None:
            return self.ready_pairs()
        prompts = self.draw_prompts()
        candidates = self.sample(prompts, start)
        return self.pair(prompts, candidates, self.score(prompts, candidates))

    def ready_pairs(self) -> StageFolder:
        """The pairs that the config names."""
        pairs = self._folder(PAIRS)
        assert self.sources.pairs is not None
        done = read_pairs(self.shop, pairs, self.sources.pairs, self.config, round=self.number)
        self.figures["pairs"] = figures.ready_pairs(done.entries)
        self._tell("pairs", figures.ready_pairs_line(self.figures["pairs"], done.seconds), done)
        return pairs

    def draw_prompts(self) -> StageFolder:
        """The round's prompts, out of the pool."""
        config, prompts = self.config, self._folder(PROMPTS)
        assert config.prompts is not None and self._pool is not None
        count, size = self._num_prompts, config.prompts.shard_size
        draw = inputs.DrawPrompts(self._pool, prompts, self.number, self._drawn_before, count, size, config.run.seed)
        fingerprint = {
            "pool": self._pool.digest(),
            "per_round": count,
            "drawn_before": list(self._drawn_before),
            "shard_size": size,
            "seed": config.run.seed,
        }
        self.shop.run_stage("prompts", [prompts], fingerprint, -(-count // size), lambda _: [draw])
        return prompts

    def sample(self, prompts: StageFolder, start: Weights) -> StageFolder:
        """Candidates of the start policy."""
        draw = Draw(self.config.run.seed, self.number, self.number, POLICY_STREAM)
        candidates, done = self.shop.sample(self.folder, prompts, start, self.config, draw)
        self.figures["sample"] = found = figures.sampled(done.entries)
        made_now = done.made / len(done.entries)
        self._tell("sample", figures.sampled_line(found, done.seconds, made_now=made_now), done)
        return candidates

    def score(self, prompts: StageFolder, candidates: StageFolder) -> StageFolder:
        """The candidates' rewards."""
        scored, done = self.shop.score(
            self.folder, prompts, candidates, self.config, self.sources.rewards, round=self.number
        )
        self.figures["score"] = spread = figures.scored(done.entries)
        self._refuse_equal_rewards(spread, scored)
        self._tell("score", figures.scored_line(spread, done.seconds), done)
        return scored

    def pair(self, prompts: StageFolder, candidates: StageFolder, scored: StageFolder) -> StageFolder:
        """Rejection sampling: the pairs, or the groups, and every prompt's fate."""
        paired = pair_round(self.shop, self.folder, prompts, candidates, scored, self.config, round=self.number)
        self.figures[paired.made.contract.name] = paired.figures
        if not paired.num_made:
            unscaled = StageFolder(self.folder / "unscaled", SCORED)
            self._refuse(paired.made, paired.fates, candidates, scored, unscaled)
            raise nothing_made(paired, self.figures.get("score"), round=self.number)
        self._tell("pair", paired.line, paired.done)
        return paired.made

    def _refuse(self, *tables: StageFolder) -> None:
        """Let results give way that nothing can be built on; a watched file's round is given up."""
        for table in tables:
            if table.entries():
                table.refuse("nothing can be built on it")
        if self._give_up is not None:
            self._give_up()

    def _refuse_equal_rewards(self, spread: figures.Figures, table: StageFolder) -> None:
        scored = spread["num_scored"]
        if scored > 1 and spread["min"] == spread["max"]:
            self._refuse(table, StageFolder(self.folder / "unscaled", SCORED))
            raise StageError(
                f"round {self.number}: score",
                wanted="rewards that tell answers apart",
                got=f"{spread['min']:.6g} for every one of {scored:,} answers",
                fix="check the reward model (an untrained head gives a constant) or the reward function",
            )

    # ---- update -----------------------------------------------------------------------------------------------------

    def reference_logps(self, data: StageFolder, references: Sequence[Weights]) -> References:
        """The log-probs of all paired answers under each reference, from the training group."""
        tables = []
        num_pairs = sum(entry.rows for entry in data.entries())
        for index, weights in enumerate(references):
            folder = "reference_logps" if len(references) == 1 else f"reference_logps-{index}"
            out = StageFolder(self.folder / folder, REFERENCE_LOGPS)
            job = training.ScorePairs(
                pairs=data,
                out=out,
                weights=weights,
                reference=self.config.reference,
                config=self.config.update,
                round=self.number,
            )
            done = self.shop.run_stage(
                "reference",
                [out],
                {"pairs": data.digest(), "weights": weights.identity, "dtype": self.config.policy.dtype},
                len(data.entries()),
                lambda _, job=job: [job],  # type: ignore[misc]
                by_group(lambda: self.shop.crew.trainers(self.config), total=2 * num_pairs),
            )
            num_answers = sum(entry.rows for entry in done.entries)
            told = f"{num_answers:,} answers   {duration(done.seconds)}   under the policy of round {weights.round}"
            if weights.identity == self.start.identity:
                told += ", its start" + self._engine_gap(out)
            self._tell("reference", told, done)
            tables.append((weights, out))
        return tables

    def _engine_gap(self, scored: StageFolder) -> str:
        """Compare the engine's log-probs with the trainer's, where an engine sampled the pairs.

        Raises:
            StageError: if they are too far apart.
        """
        candidates = self._folder(CANDIDATES)
        if not candidates.is_closed():
            return ""
        gap = self.figures["engine_gap"] = self.shop.crew.tasks.run(training.EngineGap(candidates, scored))
        if not gap <= ENGINE_GAP_LIMIT:  # so that NaN, of broken weights, is refused too
            raise StageError(
                f"round {self.number}: reference",
                wanted=f"log-probs of engine and trainer within {ENGINE_GAP_LIMIT} nats a token of each other",
                got=f"{gap:.3g}: the answers were not sampled from the policy that would be trained",
                fix="see that the policy's folder is whole, then delete the round's folder and run again; "
                "if it stays so, vLLM and transformers disagree on this model",
            )
        return f"; the engine differs by {gap:.0e} nats a token"

    def update(self, start: Weights, data: StageFolder, references: References) -> Weights:
        """Train from `start` on all pairs; the new policy, published in the round's folder."""
        shop, config, policy = self.shop, self.config, self.folder / "policy"
        fingerprint = {
            "pairs": data.digest(),
            "start": start.identity,
            "references": [weights.identity for weights, _ in references],
            "update": config.update.identity(),
            "dtype": config.policy.dtype,
            "pad_token": config.policy.pad_token,
            "seed": config.run.seed,
        }
        watch = Stopwatch()
        manifest = found_model(policy, fingerprint)
        if manifest is None:
            seed = config.run.seed
            curves = step_curves(shop.folder, round=self.number) if config.run.tensorboard else None
            job = training.UpdatePolicy(
                start, data, references, config.update, self.folder, fingerprint, self.number, seed, curves
            )
            with shop.console.bar("update", total=None) as bar:
                shop.crew.trainers(config).run(job, on_report=lambda step: bar.at(step["step"], step["steps"]))
            manifest = found_model(policy, fingerprint)
            assert manifest is not None, "the training group published no policy"
            self._tell("update", figures.updated_line(manifest["update"], watch.seconds))
        self.figures["update"] = manifest["update"]
        master = self.folder / "master" if manifest["master_sha256"] else None
        return Weights(policy, manifest["sha256"], self.number, master, manifest["master_sha256"])

    # ---- evaluate ---------------------------------------------------------------------------------------------------

    def evaluate(self, policy: Weights) -> figures.Figures:
        """The figures of a policy; empty where the config evaluates nothing."""
        if self._evaluation is None:
            return {}
        watch = Stopwatch()
        found, made = self._evaluation.of(policy, round=self.number, config=self.config)
        self.figures["evaluate"] = found
        if made:
            self._tell("evaluate", figures.evaluated_line(found, watch.seconds))
        return found

    # ---- what all steps share ---------------------------------------------------------------------------------------

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """All that decides this round's result, as far as it is known before it runs."""
        config = self.config
        known: dict[str, Any] = {
            "start": self.start.identity,
            "references": [weights.identity for weights in self.references],
            "policy_files": self.shop.sources.policy_files,
            "pad_token": config.policy.pad_token,
            "evaluation": self._evaluation.digest() if self._evaluation is not None else None,
            "seed": config.run.seed,
            "dtype": config.policy.dtype,
            "update": config.update.identity(),
        }
        if self.sources.pairs is not None and config.pairs is not None:
            return known | {"pairs": self.sources.pairs.sha256, "how": config.pairs.identity() | {"path": None}}
        assert self._pool is not None and config.prompts is not None
        return known | {
            "pool": self._pool.digest(),
            "rewards": [source.identity() for source in self.sources.rewards],
            "per_round": self._num_prompts,
            "shard_size": config.prompts.shard_size,
            "sample": config.sample.identity(),
            "pair": config.pair.identity(),
        }

    @property
    def _num_prompts(self) -> int:
        assert self._pool is not None and self.config.prompts is not None
        return self._pool.entry(0).rows if self._every_prompt else self.config.prompts.per_round

    def refuse_damaged(self) -> None:
        """Check that what a settled round published is whole.

        Raises:
            ContractError: naming the first file that is not.
        """
        sampled = (PROMPTS, CANDIDATES, SCORED, FATES) if self.config.pairs is None else ()
        for folder in map(self._folder, (*sampled, made_by(self.config), REFERENCE_LOGPS)):
            folder.refuse_changed()
        refuse_changed_model(self.folder / "policy")

    def write_report(self, decision: str, reason: str) -> None:
        """The round's figures, and what was decided on them."""
        file = self.folder / "report.json"
        evaluated, told = self.figures.get("evaluate"), read_json(file).get("evaluate") if file.exists() else None
        if self.config.run.tensorboard and evaluated and evaluated != told:
            plot_evaluation(self.shop.folder, round=self.number, figures=evaluated)
        seconds = {"seconds": self._watch.seconds} if self.number else {}
        write_json(file, {"round": self.number, "decision": decision, "reason": reason} | seconds | self.figures)

    def _folder(self, contract: Contract) -> StageFolder:
        return StageFolder(self.folder / contract.name, contract)

    def _tell(self, stage: str, text: str, done: Done | None = None) -> None:
        """A line for a stage that did something now."""
        if done is None or done.made:
            self.shop.console.line(self._label, stage, text)
