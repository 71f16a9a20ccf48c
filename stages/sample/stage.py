"""Prompts in, candidates out: one shard's prompts as one batch, in a fixed order, with seeds that are hashes.

Comes in: a table of `PROMPTS`. Goes out: a table of `CANDIDATES`, and a reason for each prompt without any. Does not
know vLLM (`stages.sample.vllm_sampler` does), nor where tables lie.
"""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa

from stages.contracts import CANDIDATES
from stages.faults import fault_point
from stages.protocols import Answer, Sampler, SampleRequest, Weights
from stages.sample.config import SampleConfig
from stages.seeds import hashed_seed, row_id
from stages.vocab import Fate


@dataclass(frozen=True, slots=True)
class Dropped:
    """A prompt that left no candidate, and why."""

    prompt_id: str
    fate: Fate
    detail: str


@dataclass(frozen=True, slots=True)
class Draw:
    """What the seeds and ids of a draw of answers are made from.

    Attributes:
        run_seed: the run's seed.
        round: the round that the answers belong to (their ids and their column).
        seed_round: the round that enters the seeds; evaluations keep one, so that policies are compared on equal
            random numbers.
        stream: see `stages.vocab`.
    """

    run_seed: int
    round: int
    seed_round: int
    stream: str

    def seed(self, prompt_id: str) -> int:
        """The seed of a prompt's first answer; answer i has this plus i."""
        return hashed_seed("sample", self.run_seed, self.seed_round, self.stream, prompt_id)

    def response_id(self, prompt_id: str, index: int) -> str:
        return row_id("response", self.run_seed, self.round, self.stream, prompt_id, index)


def sample(
    prompts: pa.Table, sampler: Sampler, config: SampleConfig, *, weights: Weights, draw: Draw
) -> tuple[pa.Table, list[Dropped]]:
    """``num_generations`` answers to every prompt of one shard.

    Args:
        prompts: a table of `PROMPTS`.
        sampler: an engine that already holds `weights`.
        weights: the policy that answers; its sha256 goes into every candidate.
        draw: what seeds and ids are made from.

    Returns:
        A table of `CANDIDATES`, and the prompts that have none in it: too long for the context, or failed in the
        engine.
    """
    room = sampler.max_model_len - config.max_new_tokens
    rows = prompts.select(["prompt_id", "prompt_token_ids"]).to_pylist()
    fitting = [row for row in rows if len(row["prompt_token_ids"]) <= room]
    dropped = [
        Dropped(
            row["prompt_id"],
            "prompt_too_long",
            f"{len(row['prompt_token_ids'])} tokens; the context of {sampler.max_model_len} leaves {max(room, 0)} "
            f"beside max_new_tokens {config.max_new_tokens}",
        )
        for row in rows
        if len(row["prompt_token_ids"]) > room
    ]
    requests = [SampleRequest(row["prompt_token_ids"], draw.seed(row["prompt_id"])) for row in fitting]
    fault_point("sample.rows", [row["prompt_id"] for row in fitting])
    candidates = []
    for row, request, answers in zip(fitting, requests, sampler.generate(requests, config), strict=True):
        made = [
            _candidate(row["prompt_id"], index, answer, request.seed, weights, draw)
            for index, answer in enumerate(answers)
            if answer is not None
        ]
        candidates.extend(made)
        if not made:
            dropped.append(Dropped(row["prompt_id"], "engine_error", "the engine aborted every answer"))
    return CANDIDATES.table(candidates), dropped


def _candidate(
    prompt_id: str, index: int, answer: Answer, seed: int, weights: Weights, draw: Draw
) -> dict[str, object]:
    return {
        "response_id": draw.response_id(prompt_id, index),
        "prompt_id": prompt_id,
        "round": draw.round,
        "stream": draw.stream,
        "sample_index": index,
        "response": answer.text,
        "response_token_ids": answer.token_ids,
        "response_logps": answer.logps,
        "finish_reason": answer.finish_reason,
        "policy_version": weights.sha256,
        "policy_round": weights.round,
        "seed": seed + index,
    }
