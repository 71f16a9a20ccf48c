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
from pipeline.evaluation import Evaluation, one_answer
from pipeline.files import read_json, write_json
from pipeline.jobs import inputs, training
from pipeline.model_folders import found_model, refuse_changed_model
from pipeline.pairing import made_by, nothing_made, pair_round
from pipeline.policies import Policies
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
from stages.weights import weights_sha256

ENGINE_GAP_LIMIT = 0.1  # nats a token; float32 differs by 1e-7, bfloat16 by some 1e-2

_RESULTS = ("round_start", "initial", "previous")
"""References that are the result of a round, or the first policy."""

References = Sequence[tuple[Weights, StageFolder]]
"""The references that the objective takes log-probs of, each with the tables of these."""


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
    ) -> None:
        self.shop, self.number = shop, number
        self.sampling, self.start, self.references = policies.sampling, policies.start, policies.references
        self.config: Config = shop.config.for_round(number)
        self.sources: RoundSources = shop.sources.of(number)
        self.folder: Path = folder or shop.folder / f"round-{number:04d}"
        self.figures: figures.Figures = {}
        self._pool, self._evaluation, self._label = pool, evaluation, label
        self._drawn_before, self._every_prompt = tuple(drawn_before), every_prompt
        self._give_up, self._watch = give_up, Stopwatch()

    # ---- collect ----------------------------------------------------------------------------------------------------

    def collect(self, policy: Weights) -> StageFolder:
        """Sample with `policy`, score and pair, or take ready pairs; the pairs, or groups, as a handle on their shards.

        Raises:
            StageError: if too many answers have no finite reward, all rewards are equal, or there is no pair.
        """
        if self.config.pairs is not None:
            return self.ready_pairs()
        prompts = self.draw_prompts()
        candidates = self.sample(prompts, policy)
        if "stream" in self.config.update.needs:
            self.sample_reference(prompts)
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

    def sample(self, prompts: StageFolder, policy: Weights) -> StageFolder:
        """Candidates of a policy."""
        draw = Draw(self.config.run.seed, self.number, self.number, POLICY_STREAM)
        candidates, done = self.shop.sample(self.folder, prompts, policy, self.config, draw)
        self.figures["sample"] = found = figures.sampled(done.entries)
        made_now = done.made / len(done.entries)
        self._tell("sample", figures.sampled_line(found, done.seconds, made_now=made_now), done)
        return candidates

    def sample_reference(self, prompts: StageFolder) -> None:
        """One answer of the reference to each prompt, which the objective is told to keep likely."""
        name, weights = self.references[0]
        draw, how = Draw(self.config.run.seed, self.number, self.number, name), one_answer(self.config.sample)
        _, done = self.shop.sample(self._stream.path.parent, prompts, weights, self.config, draw, how=how)
        found = figures.sampled(done.entries)
        told = figures.sampled_line(found, done.seconds, made_now=done.made / len(done.entries))
        self._tell("sample", f"{told}   by reference {name}", done)

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

    def reference_logps(self, data: StageFolder, references: Sequence[tuple[str, Weights]]) -> References:
        """The log-probs of all answers to train on under each reference, one at a time, from the training group.

        None where the objective takes none.
        """
        if self.config.update.num_references[1] == 0:
            return []
        tables = []
        num_answers = 2 * sum(entry.rows for entry in data.entries()) if data.contract == PAIRS else None
        for (name, weights), out in zip(references, self._reference_folders, strict=True):
            job = training.ScoreRows(
                data=data,
                out=out,
                weights=weights,
                reference=name,
                config=self.config.update,
                round=self.number,
            )
            done = self.shop.run_stage(
                "reference",
                [out],
                {"pairs": data.digest(), "weights": weights.identity, "dtype": self.config.policy.dtype},
                len(data.entries()),
                lambda _, job=job: [job],  # type: ignore[misc]
                by_group(lambda: self.shop.crew.trainers(self.config), total=num_answers),
            )
            told = f"{sum(entry.rows for entry in done.entries):,} answers   {duration(done.seconds)}   under "
            told += f"the policy of round {weights.round}" if name in _RESULTS else name
            if weights.identity == self.start.identity:
                told += ", its start"
            if weights.identity == self.sampling.identity:
                told += self._engine_gap(out)
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
        """Train from `start` on all pairs or groups; the new policy, published in the round's folder."""
        shop, config, policy = self.shop, self.config, self.folder / "policy"
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
        if manifest is None:
            job = training.UpdatePolicy(
                start=start,
                data=data,
                references=references,
                config=config.update,
                folder=self.folder,
                fingerprint=fingerprint,
                round=self.number,
                seed=config.run.seed,
                curves=step_curves(shop.folder, round=self.number) if config.run.tensorboard else None,
                auxiliary_weights=self._auxiliary_weights,
                stream=self._stream if "stream" in config.update.needs else None,
                value_head=self._value_head if "value" in config.update.needs else None,
            )
            with shop.console.bar("update", total=None) as bar:
                shop.crew.trainers(config).run(job, on_report=lambda step: bar.at(step["step"], step["steps"]))
            manifest = found_model(policy, fingerprint)
            assert manifest is not None, "the training group published no policy"
            self._tell("update", figures.updated_line(manifest["update"], watch.seconds, rows=data.contract.name))
        self.figures["update"] = manifest["update"]
        master = self.folder / "master" if manifest["master_sha256"] else None
        return Weights(policy, manifest["sha256"], self.number, master, manifest["master_sha256"])

    def _more_inputs(self) -> dict[str, Any]:
        """What an update depends on besides rows, weights and settings, where its objectives need it."""
        needs = self.config.update.needs
        found: dict[str, Any] = {}
        if "auxiliary" in needs:
            found["auxiliary"] = self._auxiliary_weights
        if "stream" in needs:
            found["stream"] = self._stream.digest()
        if "value" in needs:
            found["value_head"] = weights_sha256(self._value_head) if self._value_head is not None else "new"
        return found | ({"objectives": dict(self.sources.objectives)} if self.sources.objectives else {})

    @property
    def _auxiliary_weights(self) -> dict[str, float]:
        return {
            source.name: source.config.weight for source in self.sources.rewards if source.config.role == "auxiliary"
        }

    @property
    def _stream(self) -> StageFolder:
        """The reference's answers, where the objective takes some."""
        return StageFolder(self.folder / "reference_answers" / CANDIDATES.name, CANDIDATES)

    @property
    def _value_head(self) -> Path | None:
        """The value head of the last round before this one that has one; with none, training begins with a new one."""
        earlier = (self.shop.folder / f"round-{number:04d}" / "value_head" for number in range(self.number - 1, 0, -1))
        return next((folder for folder in earlier if folder.exists()), None)

    @property
    def _reference_folders(self) -> list[StageFolder]:
        names = [f"-{index}" for index in range(len(self.references))] if len(self.references) > 1 else [""]
        return [StageFolder(self.folder / f"reference_logps{name}", REFERENCE_LOGPS) for name in names]

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
            "sampling": self.sampling.identity,
            "references": [weights.identity for _, weights in self.references],
            "objectives": dict(self.sources.objectives),
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
        for folder in (*map(self._folder, (*sampled, made_by(self.config))), *self._reference_folders):
            if folder.path.exists():
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
