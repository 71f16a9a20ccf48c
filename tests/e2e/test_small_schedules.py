"""The published schedules in small, two rounds of each: what is special of one shows in its lineage and its tables."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.config_file import load_config

pytestmark = pytest.mark.long

SMALL = Path(__file__).parents[2] / "configs" / "small"
TINY = (
    "rounds=2",
    "prompts.per_round=64",
    "prompts.shard_size=32",
    "evaluate.num_prompts=128",
    "run.tensorboard=false",
)


@pytest.mark.parametrize("name", sorted(file.stem for file in SMALL.glob("*.yaml")))
def test_two_rounds_of_a_small_schedule_refer_start_and_pair_as_it_says(prefloop, name):
    file = SMALL / f"{name}.yaml"
    done = prefloop.run(*TINY, config=file)
    assert done.code == 0, done.err
    assert "Traceback" not in done.err
    config = load_config(file)
    folder = prefloop.runs / config.run.name
    first, second = json.loads((folder / "run.json").read_text())["rounds"]

    # What the second round starts from and refers to.
    assert second["sampling"] == second["start"]
    assert (second["start"] == first["result"]) == (config.momentum == 0)
    (reference,) = second["references"]
    assert reference == {"round_start": second["start"], "initial": first["start"]}[config.reference]
    assert json.loads((folder / "final.json").read_text()) == second["result"]

    # The pairs of each prompt.
    for number in (1, 2):
        pairs = pq.read_table(sorted((folder / f"round-{number:04d}" / "pairs").glob("part-*.parquet"))).to_pylist()
        assert pairs and all(pair["margin"] > 0 for pair in pairs)
        most = max(Counter(pair["prompt_id"] for pair in pairs).values())
        allowed = config.pair.most_pairs(config.sample.num_generations)
        assert 1 < most <= allowed if allowed > 1 else most == 1

    # The beta of each round.
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for number in (1, 2):
        last = [step for step in steps if step["round"] == number][-1]
        margin = last["log_ratios/chosen"] - last["log_ratios/rejected"]
        beta = config.for_round(number).update.beta
        assert last["rewards/margins"] == pytest.approx(beta * margin, rel=1e-4, abs=1e-6)
