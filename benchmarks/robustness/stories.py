"""TinyStories: a real small model, a reward in Python (happy words), and real stories that it should not forget.

A pair is the best and the worst of some continuations of an opening. `unlike`: whole continuations. `alike`: the first
two thirds are one continuation, sampled once, and only the last third differs, by which it is judged.
"""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pyarrow as pa

from benchmarks.robustness.grid import Kind
from benchmarks.robustness.judged import by_prompt, enough, pair_row, prompts_of
from benchmarks.robustness.recipes import STORIES
from benchmarks.robustness.task import Task
from stages.contracts import PROMPTS
from stages.protocols import SampleRequest, Weights
from stages.sample.config import SampleConfig
from stages.score.functions import FunctionScorer
from stages.seeds import hashed_seed
from stages.tokenizers import load_tokenizer
from stages.update.rows import AnswerRow, PairRow

STEM = 32  # tokens that the answers of an alike pair have in common
TRUTH = 256  # tokens of a real story that are looked at


def stories_task(data: Path) -> Task:
    """The task on a folder with ``stories260k`` and ``tinystories`` in it."""
    policy = data / "stories260k"
    tokenizer = load_tokenizer(policy, pad_token=None, key="policy.path")
    found = prompts_of(data / "tinystories" / "prompts.jsonl", tokenizer)
    lines = (data / "tinystories" / "stories.jsonl").read_text(encoding="utf-8").splitlines()[-STORIES.num_truths :]
    stories = [tokenizer(json.loads(line)["text"]).input_ids[:TRUTH] for line in lines]
    return Task(
        STORIES,
        Weights.found(policy, round=0),
        prompts=found.slice(STORIES.num_held_out),
        held_out=found.slice(0, STORIES.num_held_out),
        rewards=[FunctionScorer("happy_words", "main", 1.0, "configs.stories_rewards:happy_words")],
        truths=[AnswerRow(f"{number}", tokens[:1], tokens[1:]) for number, tokens in enumerate(stories)],
        drawn=_table,
    )


def _table(task: Task, kind: Kind, seed: int) -> list[PairRow]:
    drawn = random.Random(seed).sample(range(task.prompts.num_rows), STORIES.num_prompts)
    prompts = task.prompts.take(drawn)
    stems = _stems(task, prompts, seed) if kind == "alike" else {}
    asked = dict(zip(*(prompts[name].to_pylist() for name in ("prompt_id", "prompt_token_ids")), strict=True))
    continued = _with_stems(prompts, stems) if kind == "alike" else prompts
    length = STORIES.max_new_tokens - (STEM if kind == "alike" else 0)
    candidates, scored = task.scored(continued, task.start, round=1, seed=seed, max_new_tokens=length)
    pairs = []
    for prompt_id, answers in by_prompt(candidates, scored, truncated=True):
        ranked = sorted(answers, key=lambda a: (a.reward, a.response_id))
        if ranked and ranked[-1].reward - ranked[0].reward >= STORIES.min_margin:
            stem = stems.get(prompt_id, [])
            chosen, rejected = (replace(a, token_ids=stem + a.token_ids) for a in (ranked[-1], ranked[0]))
            pairs.append(pair_row(asked[prompt_id], chosen, rejected))
    return enough(pairs, STORIES)


def _stems(task: Task, prompts: pa.Table, seed: int) -> dict[str, list[int]]:
    """A beginning of an answer to each prompt, by prompt id; stories that are over by then are left out."""
    rows = prompts.select(["prompt_id", "prompt_token_ids"]).to_pylist()
    requests = [SampleRequest(row["prompt_token_ids"], hashed_seed("stem", seed, row["prompt_id"])) for row in rows]
    config = SampleConfig(num_generations=1, max_new_tokens=STEM)
    answers = [answer for (answer,) in task.sampler.generate(requests, config) if answer is not None]
    both = zip(rows, answers, strict=True)
    return {row["prompt_id"]: answer.token_ids for row, answer in both if answer.finish_reason == "length"}


def _with_stems(prompts: pa.Table, stems: dict[str, list[int]]) -> pa.Table:
    rows = [row for row in prompts.to_pylist() if row["prompt_id"] in stems]
    return PROMPTS.table(row | {"prompt_token_ids": row["prompt_token_ids"] + stems[row["prompt_id"]]} for row in rows)
