"""A run with as many rows as a page may hold, made column by column through the project's own contracts."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import pyarrow as pa
import written_run

from pipeline.artifacts import StageFolder
from pipeline.files import read_json, write_json
from stages.contracts import CANDIDATES, FATES, PAIRS, PROMPTS, SCORED
from stages.seeds import row_id

NUM_ANSWERS, _PROMPTS_A_PART = 4, 500
_WORDS = ["river", "stone", "lantern", "quiet", "morning", "winter", "harbour", "letter", "garden", "window", "silver"]


def write_many(folder: Path, count: int) -> Path:
    """The run of `written_run` with `count` prompts, each with four answers, in its second round."""
    run = written_run.write_run(folder)
    round_folder = run / "round-0002"
    ids = [row_id("many", index) for index in range(count)]
    place = {one: at for at, one in enumerate(ids)}
    fates = ["tied" if index % 10 == 0 else "paired" for index in range(count)]
    texts = [f"story {index}: {_said(index)}" for index in range(count)]
    answers = [_said(index * 7 + number) for index in range(count) for number in range(NUM_ANSWERS)]
    rewards = [float((index * 37) % 1000) / 100 - number for index in range(count) for number in range(NUM_ANSWERS)]
    answer_ids = [row_id("answer", one, number) for one in ids for number in range(NUM_ANSWERS)]
    asked = [one for one in ids for _ in range(NUM_ANSWERS)]
    firsts = [at * NUM_ANSWERS for at in range(count) if fates[at] == "paired"]
    chosen, rejected = firsts, [first + NUM_ANSWERS - 1 for first in firsts]

    def pick(values: list, wanted: list[int]) -> list:
        return [values[at] for at in wanted]

    write(
        round_folder, PROMPTS, place, prompt_id=ids, prompt=texts, prompt_token_ids=[[1]] * count, extra=["{}"] * count
    )
    write(
        round_folder,
        CANDIDATES,
        place,
        response_id=answer_ids,
        prompt_id=asked,
        response=answers,
        response_token_ids=[[5, 6]] * len(asked),
        response_logps=[[-0.5, -0.5]] * len(asked),
        finish_reason=["stop"] * len(asked),
    )
    parts = [[{"name": "judge", "value": reward, "role": "main"}] for reward in rewards]
    write(round_folder, SCORED, place, response_id=answer_ids, prompt_id=asked, reward=rewards, rewards=parts)
    write(
        round_folder,
        PAIRS,
        place,
        pair_id=[row_id("pair", first) for first in firsts],
        prompt_id=pick(asked, firsts),
        chosen_id=pick(answer_ids, chosen),
        rejected_id=pick(answer_ids, rejected),
        score_chosen=pick(rewards, chosen),
        score_rejected=pick(rewards, rejected),
        margin=[float(NUM_ANSWERS - 1)] * len(firsts),
    )
    write(round_folder, FATES, place, prompt_id=ids, fate=fates, detail=[""] * count)
    report = read_json(round_folder / "report.json")
    report["pairs"] |= {"num_prompts": count, "num_pairs": len(firsts)}
    write_json(round_folder / "report.json", report)
    return run


def _said(index: int) -> str:
    return " ".join(_WORDS[(index // 11**place + place) % 11] for place in range(8)) + f" {index % 9973}"


def write(round_folder: Path, contract, place, **columns) -> None:
    """Publish a table in parts, by its prompts' places; columns that are not named hold nothing, or the round."""
    parts = [place[one] // _PROMPTS_A_PART for one in columns["prompt_id"]]
    length = len(parts)
    empty = {pa.string(): "", pa.int32(): 2, pa.int16(): 0, pa.int64(): 0, pa.float64(): 0.0}

    def column(field: pa.Field) -> pa.Array:
        if field.name in columns:
            return pa.array(columns[field.name], field.type)
        return pa.array([None if field.nullable else empty.get(field.type, [])] * length, field.type)

    table = pa.table([column(field) for field in contract.schema], schema=contract.schema)
    stage = StageFolder(round_folder / contract.name, contract)
    shutil.rmtree(stage.path)
    stage.begin({})
    starts = [0, *[place for place, part in enumerate(parts) if place and part != parts[place - 1]], length]
    for shard, (start, end) in enumerate(itertools.pairwise(starts)):
        stage.publish(shard, table.slice(start, end - start), stats={}, drops=())
    stage.close(len(starts) - 1)
