"""The quickstart's task: digits to reverse, a judge to please, and an exact accuracy that cannot be fooled.

A table's pairs have one chosen answer, the judge's best; the rejected one differs from it in one token (`alike`), or in
as many as any of the worse answers, at least two (`unlike`). Prompts without both kinds are left out, so that both
tables have the same prompts and the same chosen answers.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from benchmarks.robustness.grid import Kind
from benchmarks.robustness.judged import Judged, by_prompt, enough, pair_row, prompts_of
from benchmarks.robustness.recipes import REVERSE
from benchmarks.robustness.task import Task
from pipeline.embedded import make
from stages.protocols import Weights
from stages.score.config import ModelReward
from stages.score.reward_model import RewardModel
from stages.tokenizers import load_tokenizer
from stages.update.rows import AnswerRow, PairRow

UNLIKE_AT_LEAST = 2  # tokens of five digits


def reverse_task(num_threads: int) -> Task:
    policy, judge = make("reverse"), make("reverse-judge")
    tokenizer = load_tokenizer(policy, pad_token=None, key="policy.path")
    prompts, held_out = (prompts_of(make(f"reverse-{name}"), tokenizer) for name in ("prompts", "heldout"))
    held_out = held_out.slice(0, REVERSE.num_held_out)
    truths = [
        AnswerRow(
            row["prompt_id"],
            row["prompt_token_ids"],
            [*tokenizer(row["answer"], add_special_tokens=False).input_ids, tokenizer.eos_token_id],
        )
        for row in held_out.slice(0, REVERSE.num_truths).to_pylist()
    ]
    reward = RewardModel(
        ModelReward(type="model", path=str(judge)),
        name="judge",
        folder=judge,
        key="score.rewards",
        num_threads=num_threads,
        use_gpu=False,
    )
    return Task(
        REVERSE,
        Weights.found(policy, round=0),
        prompts=prompts,
        held_out=held_out,
        rewards=[reward],
        truths=truths,
        drawn=_table,
    )


def _table(task: Task, kind: Kind, seed: int) -> list[PairRow]:
    drawn = random.Random(seed).sample(range(task.prompts.num_rows), REVERSE.num_prompts)
    prompts = task.prompts.take(drawn)
    candidates, scored = task.scored(prompts, task.start, round=1, seed=seed)
    tokens = dict(zip(*(prompts[name].to_pylist() for name in ("prompt_id", "prompt_token_ids")), strict=True))
    pairs = []
    for prompt_id, answers in by_prompt(candidates, scored):
        if (found := chosen_and_rejected(answers)) is not None:
            pairs.append(pair_row(tokens[prompt_id], found["chosen"], found[kind]))
    return enough(pairs, REVERSE)


def chosen_and_rejected(answers: Sequence[Judged]) -> dict[str, Judged] | None:
    """The best answer, and of those worse by the margin the one most alike and the one least; None without both."""
    if not answers:
        return None
    best = max(answers, key=lambda a: (a.reward, a.response_id))
    worse = [a for a in answers if best.reward - a.reward >= REVERSE.min_margin and a.distance(best)]
    if not worse:
        return None
    order = sorted(worse, key=lambda a: (a.distance(best), a.reward, a.response_id))
    alike, unlike = order[0], order[-1]
    if alike.distance(best) > 1 or unlike.distance(best) < UNLIKE_AT_LEAST:
        return None
    return {"chosen": best, "alike": alike, "unlike": unlike}
