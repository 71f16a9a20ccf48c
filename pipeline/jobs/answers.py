"""Jobs on answers: sample, score, pair, and sum an evaluation up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from pipeline.artifacts import Entry, StageFolder
from stages.protocols import Reward, Sampler, Weights
from stages.sample.config import SampleConfig
from stages.sample.stage import Draw, Dropped, sample
from stages.score.combine import Moments, Term, with_rewards
from stages.score.config import PairConfig
from stages.score.pairing import pair
from stages.score.stage import score


@dataclass(frozen=True, slots=True)
class SampleShard:
    """One shard's candidates, on an engine."""

    shard: int
    prompts: StageFolder
    out: StageFolder
    weights: Weights
    config: SampleConfig
    draw: Draw

    def __call__(self, sampler: Sampler) -> Entry:
        sampler.load(self.weights)
        prompts = self.prompts.read(self.shard)
        table, dropped = sample(prompts, sampler, self.config, weights=self.weights, draw=self.draw)
        finished = Counter(table["finish_reason"].to_pylist())
        return self.out.publish(
            self.shard,
            table,
            parents=[self.prompts.entry(self.shard)],
            drops=[asdict(drop) for drop in dropped],
            stats={
                "prompts": prompts.num_rows,
                "tokens": sum(len(ids) for ids in table["response_token_ids"].to_pylist()),
                "stop": finished["stop"],
                "length": finished["length"],
            },
        )


@dataclass(frozen=True, slots=True)
class ScoreShard:
    """One shard's rewards, on the scorers."""

    shard: int
    prompts: StageFolder
    candidates: StageFolder
    out: StageFolder
    round: int

    def __call__(self, rewards: Sequence[Reward]) -> Entry:
        candidates = self.candidates.read(self.shard)
        table = score(self.prompts.read(self.shard), candidates, rewards, round=self.round)
        return self.out.publish(
            self.shard,
            table,
            parents=[self.prompts.entry(self.shard), self.candidates.entry(self.shard)],
            stats=_reward_stats(table),
        )


@dataclass(frozen=True, slots=True)
class SumShard:
    """One shard's rewards summed anew, with standardised terms."""

    shard: int
    unscaled: StageFolder
    out: StageFolder
    terms: tuple[Term, ...]

    def __call__(self, _state: None) -> Entry:
        table = with_rewards(self.unscaled.read(self.shard), self.terms)
        parents = [self.unscaled.entry(self.shard)]
        return self.out.publish(self.shard, table, parents=parents, stats=_reward_stats(table))


def _reward_stats(table: pa.Table) -> dict[str, float]:
    """What a part's entry says of its rewards: the sum's spread, and every single reward's moments."""
    finite = [value for value in table["reward"].to_pylist() if value is not None]
    stats: dict[str, float] = {
        "scored": len(finite),
        "errors": table.num_rows - len(finite),
        "reward_sum": sum(finite),
    }
    if finite:
        stats |= {"reward_min": min(finite), "reward_max": max(finite)}
    values: dict[str, list[float | None]] = {}
    for row in table["rewards"].to_pylist():
        for reward in row:
            values.setdefault(reward["name"], []).append(reward["value"])
    for name, found in values.items():
        moments = Moments.of(found)
        stats |= {f"{name}/count": moments.count, f"{name}/mean": moments.mean, f"{name}/squares": moments.squares}
    return stats


def moments_of(entry: Entry, reward: str) -> Moments:
    """One reward's moments over a part of `SCORED`."""
    count, mean, squares = (entry.stats.get(f"{reward}/{what}", 0.0) for what in ("count", "mean", "squares"))
    return Moments(int(count), mean, squares)


@dataclass(frozen=True, slots=True)
class PairShard:
    """One shard's pairs and fates."""

    shard: int
    prompts: StageFolder
    candidates: StageFolder
    scored: StageFolder
    pairs: StageFolder
    fates: StageFolder
    config: PairConfig
    round: int

    def __call__(self, _state: None) -> Entry:
        inputs = (self.prompts, self.candidates, self.scored)
        entries = [folder.entry(self.shard) for folder in inputs]
        prompts, candidates, scored = (folder.read(self.shard) for folder in inputs)
        dropped = [Dropped(**drop) for drop in entries[1].drops]
        pairs, fates = pair(prompts, candidates, scored, dropped, self.config, round=self.round)
        assert fates.num_rows == prompts.num_rows, "every prompt has one fate"
        counts = Counter(fates["fate"].to_pylist())
        self.pairs.publish(self.shard, pairs, parents=entries, stats={"margin_sum": sum(pairs["margin"].to_pylist())})
        return self.fates.publish(self.shard, fates, parents=entries, stats=dict(counts))


@dataclass(frozen=True, slots=True)
class Evaluate:
    """A policy's figures on held-out prompts, against the first policy's answers to the same prompts."""

    mine: StageFolder
    first: StageFolder

    def __call__(self, _state: None) -> dict[str, Any]:
        from pipeline.evaluate import evaluation_figures

        return evaluation_figures(list(self.mine.read_all()), list(self.first.read_all()))
