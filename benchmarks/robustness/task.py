"""A task of the study: a policy to start from, prompts, rewards, pair tables, and what a trained policy is worth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean

import pyarrow as pa

from benchmarks.robustness.grid import Kind
from benchmarks.robustness.recipes import Recipe
from benchmarks.robustness.sampler import PlainSampler
from stages.protocols import Reward, Weights
from stages.sample.config import SampleConfig
from stages.sample.stage import Draw, sample
from stages.score.stage import score
from stages.update.rows import AnswerRow, PairRow
from stages.vocab import EVALUATION_STREAM, POLICY_STREAM

Drawn = Callable[["Task", Kind, int], list[PairRow]]


class Task:
    """Everything that the cells of a task share.

    Args:
        prompts, held_out: tables of `PROMPTS`.
        rewards: main ones; the first one's mean is reported.
        truths: known good answers or texts.
        drawn: makes the pair table of a kind and a seed.
    """

    def __init__(
        self,
        recipe: Recipe,
        start: Weights,
        *,
        prompts: pa.Table,
        held_out: pa.Table,
        rewards: Sequence[Reward],
        truths: Sequence[AnswerRow],
        drawn: Drawn,
    ) -> None:
        self.recipe, self.start, self.prompts, self.rewards = recipe, start, prompts, rewards
        self.sampler, self._first = PlainSampler(), PlainSampler()
        self.sampler.load(start)
        self._first.load(start)
        self._held_out, self._truths, self._drawn = held_out, truths, drawn
        self._tables: dict[tuple[Kind, int], list[PairRow]] = {}

    def table(self, kind: Kind, seed: int) -> list[PairRow]:
        """The pairs that every method trains on, sampled by the start policy."""
        if (kind, seed) not in self._tables:
            self.sampler.load(self.start)
            self._tables[kind, seed] = self._drawn(self, kind, seed)
        return self._tables[kind, seed]

    def scored(
        self,
        prompts: pa.Table,
        weights: Weights,
        *,
        round: int,
        seed: int,
        stream: str = POLICY_STREAM,
        max_new_tokens: int | None = None,
    ) -> tuple[pa.Table, pa.Table]:
        """Answers of the policy that the sampler holds, and their rewards, by the stages.

        Args:
            max_new_tokens: None: the recipe's.
        """
        count = self.recipe.num_generations if stream == POLICY_STREAM else 1
        config = SampleConfig(num_generations=count, max_new_tokens=max_new_tokens or self.recipe.max_new_tokens)
        draw = Draw(seed, round, round, stream)
        candidates, _ = sample(prompts, self.sampler, config, weights=weights, draw=draw)
        return candidates, score(prompts, candidates, self.rewards, round=round)

    def figures(self, weights: Weights, pairs: Sequence[PairRow] = ()) -> dict[str, float]:
        """What a policy is worth, measured without the trainer.

        Args:
            pairs: those it was trained on, whose log-ratios are then told.

        Returns:
            ``reward``: mean of one sampled answer a held-out prompt. ``kl``: from the start policy, on these answers,
            in nats an answer. ``truth``: log-likelihood of the known good texts, in nats a token. ``exact``: the share
            of these answers that are right, where that is known; ``greedy``: the same of the likeliest answers.
            ``ratio_chosen``, ``ratio_rejected``: means over `pairs`, in nats an answer.
        """
        self.sampler.load(weights)
        candidates, scored = self.scored(self._held_out, weights, round=0, seed=0, stream=EVALUATION_STREAM)
        asked = dict(
            zip(*(self._held_out[name].to_pylist() for name in ("prompt_id", "prompt_token_ids")), strict=True)
        )
        prompts = [asked[prompt_id] for prompt_id in candidates["prompt_id"].to_pylist()]
        answers = candidates["response_token_ids"].to_pylist()
        found = {
            "reward": fmean(reward for reward in scored["reward"].to_pylist() if reward is not None),
            "kl": fmean(self._log_ratios(prompts, answers)),
            "truth": sum(self._logps_of(self._truths)) / sum(len(row.token_ids) for row in self._truths),
        }
        if self._held_out["answer"].null_count == 0:
            truths = dict(zip(*(self._held_out[name].to_pylist() for name in ("prompt_id", "answer")), strict=True))
            rows = candidates.select(["prompt_id", "response"]).to_pylist()
            found["exact"] = fmean(row["response"].strip() == truths[row["prompt_id"]] for row in rows)
            found["greedy"] = self._greedy()
        for side, name in enumerate(("ratio_chosen", "ratio_rejected")):
            rows = [pair.answers[side] for pair in pairs]
            if rows:
                found[name] = fmean(self._log_ratios([r.prompt_token_ids for r in rows], [r.token_ids for r in rows]))
        return {name: round(value, 5) for name, value in found.items()}

    def _log_ratios(self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> list[float]:
        now, first = (sampler.logps(prompts, answers) for sampler in (self.sampler, self._first))
        return [a - b for a, b in zip(now, first, strict=True)]

    def _logps_of(self, rows: Sequence[AnswerRow]) -> list[float]:
        return self.sampler.logps([row.prompt_token_ids for row in rows], [row.token_ids for row in rows])

    def _greedy(self) -> float:
        answers = self.sampler.greedy(
            self._held_out["prompt_token_ids"].to_pylist(), max_new_tokens=self.recipe.max_new_tokens
        )
        truths = self._held_out["answer"].to_pylist()
        return fmean(answer.text.strip() == truth for answer, truth in zip(answers, truths, strict=True))
