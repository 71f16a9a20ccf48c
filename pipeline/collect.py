"""A round's data: prompts drawn, answers sampled and scored, pairs or groups made of them; or ready pairs, taken in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pipeline import figures
from pipeline.artifacts import StageFolder
from pipeline.config_facts import made_by, one_answer
from pipeline.jobs import inputs
from pipeline.pairing import nothing_made, paired, pairing
from pipeline.pools import read_pairs
from pipeline.round_context import RoundContext
from pipeline.stage import Done, Stage, StageFlow, run_stage
from pipeline.workshop import is_standardised
from stages.contracts import CANDIDATES, PAIRS, PROMPTS, SCORED
from stages.errors import StageError
from stages.protocols import Weights
from stages.sample.stage import Draw
from stages.vocab import POLICY_STREAM


class Collector:
    """Collects the data of one round.

    Args:
        at: the round.
        pool: the prompts to draw from; None where the config has ready pairs.
        drawn_before: how many prompts each earlier round drew from it.
        every_prompt: ask the whole pool instead of ``prompts.per_round`` of it.
        give_up: called where nothing can be built on what was sampled, before the error is raised.
    """

    def __init__(
        self,
        at: RoundContext,
        *,
        pool: StageFolder | None = None,
        drawn_before: Sequence[int] = (),
        every_prompt: bool = False,
        give_up: Callable[[], None] | None = None,
    ) -> None:
        self._at, self._pool, self._give_up = at, pool, give_up
        self._drawn_before, self._every_prompt = tuple(drawn_before), every_prompt

    def collect(self, policy: Weights) -> StageFolder:
        """Sample with `policy`, score and pair, or take ready pairs; the pairs, or groups, as a handle on their shards.

        Where they have devices of their own, sampling, scoring and pairing run side by side: a shard is scored, and
        paired, as soon as it is there. Rewards that are standardised over the whole round keep pairing waiting.

        Raises:
            StageError: if too many answers have no finite reward, all rewards are equal, or there is no pair.
        """
        if self._at.config.pairs is not None:
            return self.ready_pairs()
        flow = self.begin(policy)
        flow.run(self._at.shop.console)
        return self.end()

    def begin(self, policy: Weights) -> StageFlow:
        """Sampling, scoring and pairing, under way; once they have ended, `end` gives what they made."""
        at = self._at
        self._refuse_stale(policy)
        prompts = self.draw_prompts()
        sampling = self._sampling(prompts, policy)
        sampling.claim()
        (candidates,) = sampling.outputs
        scoring = self._scoring(prompts, candidates)
        scoring.claim()
        (first,) = scoring.outputs
        stages, ends = [sampling, scoring], [self._sampled, lambda done: self._scored(scoring, done)]
        if not is_standardised(at.sources.rewards):
            stages.append(pairing(at.shop, at.folder, prompts, candidates, first, at.config, round=at.number))
            ends.append(lambda done: self._paired(stages[2], done))
        in_turn = not at.shop.crew.stages_overlap
        return StageFlow(stages, in_turn=in_turn, told=lambda place, done: ends[place](done))

    def end(self) -> StageFolder:
        """What is left to do once the flow has ended; the pairs, or groups."""
        at, prompts, candidates = self._at, self._at.table(PROMPTS), self._at.table(CANDIDATES)
        if "stream" in at.config.update.needs:
            self.sample_reference(prompts)
        if is_standardised(at.sources.rewards):
            return self.pair(prompts, candidates, at.table(SCORED))
        return at.table(made_by(at.config))

    def _refuse_stale(self, policy: Weights) -> None:
        """Check how old the policy is that samples.

        Raises:
            StageError: if it is more policies behind the one that the round goes on from than `max_staleness` allows.
        """
        at, line = self._at, (*self._at.policies.line, 0)
        age = line.index(policy.round) if policy.round in line else None
        if age is None or age > at.config.max_staleness:
            raise StageError(
                f"round {at.number}: sample",
                wanted=f"a policy at most {at.config.max_staleness} before the latest (max_staleness)",
                got=f"the one of round {policy.round}"
                + (f", {age} before it" if age else ", which did not lead to it"),
                fix="delete the round's folder and run again",
            )

    def ready_pairs(self) -> StageFolder:
        """The pairs that the config names."""
        pairs = self._at.table(PAIRS)
        assert self._at.sources.pairs is not None
        done = read_pairs(self._at.shop, pairs, self._at.sources.pairs, self._at.config, round=self._at.number)
        self._at.figures["pairs"] = figures.ready_pairs(done.entries)
        self._at.tell("pairs", figures.ready_pairs_line(self._at.figures["pairs"], done.seconds), done)
        return pairs

    def draw_prompts(self) -> StageFolder:
        """The round's prompts, out of the pool."""
        config, prompts = self._at.config, self._at.table(PROMPTS)
        assert config.prompts is not None and self._pool is not None
        count, size = self._num_prompts, config.prompts.shard_size
        draw = inputs.DrawPrompts(
            pool=self._pool,
            out=prompts,
            round=self._at.number,
            before=self._drawn_before,
            count=count,
            shard_size=size,
            seed=config.run.seed,
            shards=(),
        )
        fingerprint = {
            "pool": self._pool.digest(),
            "per_round": count,
            "drawn_before": list(self._drawn_before),
            "shard_size": size,
            "seed": config.run.seed,
        }
        self._at.shop.run_stage("prompts", [prompts], fingerprint, -(-count // size), draw.parted)
        return prompts

    def sample(self, prompts: StageFolder, policy: Weights) -> StageFolder:
        """Candidates of a policy."""
        stage = self._sampling(prompts, policy)
        self._sampled(run_stage(stage, self._at.shop.console))
        return stage.outputs[0]

    def _sampling(self, prompts: StageFolder, policy: Weights) -> Stage:
        at = self._at
        draw = Draw(at.config.run.seed, at.number, at.number, POLICY_STREAM)
        return at.shop.sampling(at.folder, prompts, policy, at.config, draw)

    def _sampled(self, done: Done) -> None:
        self._at.figures["sample"] = found = figures.sampled(done.entries, num_made=done.made)
        told = figures.sampled_line(found, done.seconds) + self._at.shop.sync.told()
        self._at.tell("sample", told, done)

    def sample_reference(self, prompts: StageFolder) -> None:
        """One answer of the reference to each prompt, which the objective is told to keep likely."""
        name, weights = self._at.policies.references[0]
        draw, how = (
            Draw(self._at.config.run.seed, self._at.number, self._at.number, name),
            one_answer(self._at.config.sample),
        )
        _, done = self._at.shop.sample(self._at.stream.path.parent, prompts, weights, self._at.config, draw, how=how)
        told = figures.sampled_line(figures.sampled(done.entries, num_made=done.made), done.seconds)
        self._at.tell("sample", f"{told}   by reference {name}", done)

    def score(self, prompts: StageFolder, candidates: StageFolder) -> StageFolder:
        """The candidates' rewards."""
        stage = self._scoring(prompts, candidates)
        return self._scored(stage, run_stage(stage, self._at.shop.console))

    def _scoring(self, prompts: StageFolder, candidates: StageFolder) -> Stage:
        at = self._at
        return at.shop.scoring(at.folder, prompts, candidates, at.config, at.sources.rewards, round=at.number)

    def _scored(self, stage: Stage, done: Done) -> StageFolder:
        at = self._at
        scored, done = at.shop.scored(stage, done, at.folder, at.config, at.sources.rewards, round=at.number)
        at.figures["score"] = spread = figures.scored(done.entries)
        self._refuse_equal_rewards(spread, scored)
        at.tell("score", figures.scored_line(spread, done.seconds), done)
        return scored

    def pair(self, prompts: StageFolder, candidates: StageFolder, scored: StageFolder) -> StageFolder:
        """Rejection sampling: the pairs, or the groups, and every prompt's fate."""
        at = self._at
        stage = pairing(at.shop, at.folder, prompts, candidates, scored, at.config, round=at.number)
        return self._paired(stage, run_stage(stage, at.shop.console))

    def _paired(self, stage: Stage, done: Done) -> StageFolder:
        at, found = self._at, paired(stage, done)
        at.figures[found.made.contract.name] = found.figures
        if not found.num_made:
            folders = (at.table(CANDIDATES), at.table(SCORED), StageFolder(at.folder / "unscaled", SCORED))
            self._refuse(found.made, found.fates, *folders)
            raise nothing_made(found, at.figures.get("score"), round=at.number)
        at.tell("pair", found.line, done)
        return found.made

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
            self._refuse(table, StageFolder(self._at.folder / "unscaled", SCORED))
            raise StageError(
                f"round {self._at.number}: score",
                wanted="rewards that tell answers apart",
                got=f"{spread['min']:.6g} for every one of {scored:,} answers",
                fix="check the reward model (an untrained head gives a constant) or the reward function",
            )

    # ---- what decides it --------------------------------------------------------------------------------------------

    @property
    def fingerprint(self) -> dict[str, Any]:
        """All that decides the data besides policies and seed, as far as it is known before they are made."""
        config, sources = self._at.config, self._at.sources
        if sources.pairs is not None and config.pairs is not None:
            return {"pairs": sources.pairs.sha256, "how": config.pairs.identity() | {"path": None}}
        assert self._pool is not None and config.prompts is not None
        return {
            "pool": self._pool.digest(),
            "rewards": [source.identity() for source in sources.rewards],
            "per_round": self._num_prompts,
            "shard_size": config.prompts.shard_size,
            "sample": config.sample.identity(),
            "pair": config.pair.identity(),
        }

    @property
    def _num_prompts(self) -> int:
        assert self._pool is not None and self._at.config.prompts is not None
        return self._pool.entry(0).rows if self._every_prompt else self._at.config.prompts.per_round
