"""Jobs on answers: sample, score, pair, and sum an evaluation up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from cluster.mapper import GoOn
from pipeline.artifacts import StageFolder
from pipeline.entries import Entry
from pipeline.jobs.quarantine import SearchedShard, without_prompts
from pipeline.mirror import obtain
from stages.faults import fault_point
from stages.protocols import Reward, Sampler, Weights
from stages.sample.config import SampleConfig
from stages.sample.stage import Draw, Dropped, sample
from stages.score.combine import Moments, Term, with_rewards
from stages.score.config import PairConfig
from stages.score.pairing.stage import pair
from stages.score.stage import Judgement, judge, with_unscored

NO_REWARD = "no reward: "  # begins the names of the figures that count reasons
_MOST_REASONS, _REASON_CHARS = 3, 160  # of a shard; of a reason


@dataclass(frozen=True, slots=True)
class SampleShard(SearchedShard):
    """One shard's candidates, on an engine."""

    weights: Weights
    config: SampleConfig
    draw: Draw

    def __call__(self, sampler: Sampler) -> Entry | GoOn:
        here = [self.out.path, f"shard-{self.shard}"]
        fault_point("sample.start", here)
        if (done := self.done()) is not None:
            return done
        obtain(self.weights.path)
        sampler.load(self.weights)
        prompts = self.prompts.read(self.shard)

        def answers_to(asked: pa.Table) -> tuple[pa.Table, list[Dropped]]:
            return sample(asked, sampler, self.config, weights=self.weights, draw=self.draw)

        if (search := self.searched(prompts, answers_to)) is not None:
            return search
        table, dropped = answers_to(without_prompts(prompts, self.set_aside))
        fault_point("sample.middle", here)
        finished = Counter(table["finish_reason"].to_pylist())
        return self.published(
            table,
            parents=[self.prompts.entry(self.shard)],
            drops=[*dropped, *self.set_aside],
            stats={
                "prompts": prompts.num_rows,
                "tokens": sum(len(ids) for ids in table["response_token_ids"].to_pylist()),
                "stop": finished["stop"],
                "length": finished["length"],
            },
        )


@dataclass(frozen=True, slots=True)
class ScoreShard(SearchedShard):
    """One shard's rewards, on the scorers; answers to prompts that are set aside have none."""

    candidates: StageFolder
    round: int

    def __call__(self, rewards: Sequence[Reward]) -> Entry | GoOn:
        here = [self.out.path, f"shard-{self.shard}"]
        fault_point("score.start", here)
        if (done := self.done()) is not None:
            return done
        prompts, candidates = self.prompts.read(self.shard), self.candidates.read(self.shard)

        def rewards_of(asked: pa.Table) -> Judgement:
            mine = candidates.filter(pc.is_in(candidates["prompt_id"], asked["prompt_id"]))
            return judge(asked, mine, rewards, round=self.round)

        if (search := self.searched(prompts, rewards_of)) is not None:
            return search
        found = rewards_of(without_prompts(prompts, self.set_aside))
        table = with_unscored(found.table, candidates, round=self.round)
        for response_id, reason in found.reasons.items():
            print(f"no reward for answer {response_id}: {reason}")  # into this worker's log
        fault_point("score.middle", here)
        return self.published(
            table,
            parents=[self.prompts.entry(self.shard), self.candidates.entry(self.shard)],
            drops=[*self.set_aside, *found.without_reward()],
            stats=_reward_stats(found.table) | reason_stats(found.reasons.values()),
        )


@dataclass(frozen=True, slots=True)
class SumShard:
    """One shard's rewards summed anew, with standardised terms."""

    shard: int
    unscaled: StageFolder
    out: StageFolder
    terms: tuple[Term, ...]

    def __call__(self, _state: None) -> Entry:
        table, entry = with_rewards(self.unscaled.read(self.shard), self.terms), self.unscaled.entry(self.shard)
        judged = table.filter(pc.greater(pc.list_value_length(table["rewards"]), 0))
        stats = _reward_stats(judged)
        return self.out.publish(self.shard, table, parents=[entry], drops=entry.drops, stats=stats)


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


def reason_stats(reasons: Iterable[str]) -> dict[str, float]:
    """The most frequent reasons for a missing reward, and how often each was given."""
    found = Counter(reason[:_REASON_CHARS] for reason in reasons)
    return {f"{NO_REWARD}{reason}": float(count) for reason, count in found.most_common(_MOST_REASONS)}


def moments_of(entry: Entry, reward: str) -> Moments:
    """One reward's moments over a part of `SCORED`."""
    count, mean, squares = (entry.stats.get(f"{reward}/{what}", 0.0) for what in ("count", "mean", "squares"))
    return Moments(int(count), mean, squares)


@dataclass(frozen=True, slots=True, kw_only=True)
class PairShard:
    """One shard's pairs or groups, and fates.

    Attributes:
        out: for `PAIRS`, or for `GROUPS` with that strategy.
        seed: the run's.
        needs_auxiliary, lower_is_better: see `pair`.
    """

    shard: int
    prompts: StageFolder
    candidates: StageFolder
    scored: StageFolder
    out: StageFolder
    fates: StageFolder
    config: PairConfig
    round: int
    seed: int
    needs_auxiliary: bool = False
    lower_is_better: frozenset[str] = frozenset()

    def __call__(self, _state: None) -> Entry:
        inputs = (self.prompts, self.candidates, self.scored)
        entries = [folder.entry(self.shard) for folder in inputs]
        prompts, candidates, scored = (folder.read(self.shard) for folder in inputs)
        made, fates = pair(
            prompts,
            candidates,
            scored,
            [Dropped(**drop) for entry in entries for drop in entry.drops],
            self.config,
            round=self.round,
            seed=self.seed,
            needs_auxiliary=self.needs_auxiliary,
            lower_is_better=self.lower_is_better,
        )
        assert fates.num_rows == prompts.num_rows, "every prompt has one fate"
        counts = Counter(fates["fate"].to_pylist())
        stats = group_stats(made) if self.config.strategy == "groups" else pair_stats(made)
        self.out.publish(self.shard, made, parents=entries, stats=stats)
        return self.fates.publish(self.shard, fates, parents=entries, stats=dict(counts))


def pair_stats(pairs: pa.Table) -> dict[str, float]:
    """What a part's entry says of its pairs: their margins, and how long both sides are in tokens."""
    lengths = {side: pc.list_value_length(pairs[f"{side}_token_ids"]) for side in ("chosen", "rejected")}
    return {
        "margin_sum": sum(pairs["margin"].to_pylist()),
        "chosen_tokens": sum(lengths["chosen"].to_pylist()),
        "rejected_tokens": sum(lengths["rejected"].to_pylist()),
        "chosen_longer": pc.sum(pc.greater(lengths["chosen"], lengths["rejected"])).as_py() or 0,
    }


def group_stats(groups: pa.Table) -> dict[str, float]:
    """Of groups: their answers, and how far the best answer's reward is from the worst's."""
    rewards = groups["rewards"].to_pylist()
    return {"answers": sum(map(len, rewards)), "spread_sum": sum(found[0] - found[-1] for found in rewards)}


@dataclass(frozen=True, slots=True)
class Evaluate:
    """A policy's figures on held-out prompts.

    Attributes:
        mine: its answers' rewards.
        candidates: its answers.
        first: the rewards of the first policy's answers to the same prompts.
        others: those of policies to compare it with, by name.
        names: of the rewards of each role but ``main``.
        max_error_share: of the answers, that may lack a value.
    """

    mine: StageFolder
    candidates: StageFolder
    first: StageFolder
    others: Mapping[str, StageFolder]
    names: Mapping[str, Sequence[str]]
    max_error_share: float

    def __call__(self, _state: None) -> dict[str, Any]:
        from pipeline.evaluate import Judged, comparison, evaluation_figures, form_figures

        def judged(folder: StageFolder) -> Judged:
            return Judged.of(folder.read_all(), self.names)

        mine, first = judged(self.mine), judged(self.first)
        against = {
            name: comparison(mine, judged(folder), max_error_share=self.max_error_share)
            for name, folder in self.others.items()
        }
        return evaluation_figures(mine, first) | form_figures(self.candidates.read_all()) | {"against": against}
