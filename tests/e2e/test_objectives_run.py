"""Every objective through two whole rounds, one after another in one run: each round's entry names its own.

The rounds of one objective start from what the objective before it made, so that all kinds of rounds follow each other:
pairs and groups, none to three references, streams, a value head that is carried on.
"""

from __future__ import annotations

import json
import math

import pyarrow.dataset as ds
import pytest
import yaml
from conftest import Prefloop

from stages.update.objectives.registry import OBJECTIVES
from stages.weights import weights_sha256

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1000)]

OWN = """
from stages.settings import Settings
from stages.update.objectives.base import Objective, term

class Params(Settings):
    beta: float = 0.1

def plain(batch, params):
    r_w, r_l = batch.log_ratios()
    return [term(-params.beta * (r_w - r_l))]

PLAIN = Objective("plain", plain, Params)

def few_nines(prompts, completions, **columns):
    return [-float(c.count("9")) - len(c) / 100 for c in completions]

def shortness(prompts, completions, **columns):
    return [-len(c) / 8 for c in completions]
"""

FREE = {"reference": "none"}
WAYS = {name: {"update": {"loss_type": name}} for name in OBJECTIVES} | {
    "exo": {"update": {"loss_type": "exo"}, "pair": {"strategy": "groups"}},
    "mrpo": {
        "update": {"loss_type": "mrpo", "loss_params": {"base": "minor_dpo"}},
        "reference": ["initial", "round_start", "previous"],
    },
    "hpo": {"update": {"loss_type": "hpo", "loss_params": {"base": "minor_dpo", "warmup_steps": 3}}},
    "mpo": {"update": {"loss_type": "mpo"}, "reference": "initial"},
    "simpo": {"update": {"loss_type": "simpo"}} | FREE,
    "sft": {"update": {"loss_type": "sft"}} | FREE,
    "own": {"update": {"loss_type": "own_parts:PLAIN"}, "reference": "ema"},
    "mixed": {
        "update": {"loss_type": ["minor_dpo", "sft"], "loss_weights": [1.0, 0.2]},
        "pair": {"strategy": "all_above", "eta": 0.501},
    },
}
ROUNDS = [(name, way) for name, way in WAYS.items() for _ in range(2)]


@pytest.fixture(scope="module")
def outcome(prefloop, policy_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("objectives")
    (folder / "own_parts.py").write_text(OWN)
    (folder / "asked.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{n:05d}>"}) + "\n" for n in range(0, 90000, 500))
    )
    config = {
        "policy": {"path": str(policy_folder), "dtype": "float32"},
        "prompts": {"path": str(folder / "asked.jsonl"), "per_round": 24, "shard_size": 12},
        "sample": {"num_generations": 4, "max_new_tokens": 8, "gpu_memory_utilization": 0.3},
        "score": {
            "rewards": [
                {"type": "function", "target": "own_parts:few_nines"},
                {"type": "function", "target": "own_parts:shortness", "role": "auxiliary", "weight": 0.5},
            ]
        },
        "pair": {"truncated": "keep"},
        "update": {"learning_rate": 1e-4, "global_batch_size": 8, "micro_batch_size": 4, "workers": 2},
        "rounds": [way for _, way in ROUNDS],
    }
    (folder / "objectives.yaml").write_text(yaml.safe_dump(config))
    result = Prefloop(prefloop.runs).run(config=folder / "objectives.yaml", timeout_s=900)
    return result, prefloop.runs / "objectives"


def rounds_of(name):
    return [number for number, (found, _) in enumerate(ROUNDS, start=1) if found == name]


def test_it_runs_to_its_end(outcome):
    result, _ = outcome
    assert result.code == 0, result.out[-2000:] + result.err


@pytest.mark.parametrize("name", WAYS)
def test_its_rounds_train_on_finite_losses_and_change_the_policy(outcome, name):
    _, folder = outcome
    lineage = json.loads((folder / "run.json").read_text())["rounds"]
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    for number in rounds_of(name):
        record, mine = lineage[number - 1], [step for step in steps if step["round"] == number]
        assert record["result"]["sha256"] != record["start"]["sha256"]
        assert weights_sha256(folder / record["result"]["path"]) == record["result"]["sha256"]
        assert mine and all(math.isfinite(step["loss"]) and step["grad_norm"] > 0 for step in mine)
        assert [step["step"] for step in mine] == list(range(1, len(mine) + 1))
        assert mine[0].keys() >= {"rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"}


@pytest.mark.parametrize("name", ["minor_dpo", "dpo", "dpop", "chi_po"])
def test_where_the_policy_is_the_reference_the_first_loss_is_ln_2(outcome, name):
    _, folder = outcome
    first = {s["round"]: s["loss"] for s in map(json.loads, (folder / "metrics.jsonl").open()) if s["step"] == 1}
    assert [first[number] for number in rounds_of(name)] == [pytest.approx(math.log(2), abs=1e-7)] * 2


def table(folder, number, name):
    files = sorted((folder / f"round-{number:04d}" / name).glob("part-*.parquet"))
    return ds.dataset(files).to_table() if files else None


def test_groups_hold_every_usable_answer_and_stand_in_the_place_of_pairs(outcome):
    _, folder = outcome
    for number in rounds_of("exo"):
        groups, candidates = table(folder, number, "groups"), table(folder, number, "candidates")
        assert table(folder, number, "pairs") is None
        answers = {key for row in groups["response_ids"].to_pylist() for key in row}
        assert answers <= set(candidates["response_id"].to_pylist())
        assert set(table(folder, number, "reference_logps")["response_id"].to_pylist()) == answers


def test_references_are_as_many_as_the_objective_takes(outcome):
    _, folder = outcome
    for name, count in {"minor_dpo": 1, "mrpo": 3, "simpo": 0, "sft": 0, "mpo": 0, "own": 1}.items():
        for number in rounds_of(name):
            assert len(list((folder / f"round-{number:04d}").glob("reference_logps*"))) == count, name
    (number, _) = rounds_of("mrpo")
    names = [set(table(folder, number, f"reference_logps-{i}")["reference"].to_pylist()) for i in range(3)]
    assert names == [{"initial"}, {"round_start"}, {"previous"}]


def test_a_stream_is_drawn_from_the_reference_one_answer_a_prompt(outcome):
    _, folder = outcome
    lineage = json.loads((folder / "run.json").read_text())["rounds"]
    for number in rounds_of("mpo"):
        drawn, asked = table(folder, number, "reference_answers/candidates"), table(folder, number, "prompts")
        assert sorted(drawn["prompt_id"].to_pylist()) == sorted(asked["prompt_id"].to_pylist())
        assert set(drawn["stream"].to_pylist()) == {"initial"}
        assert set(drawn["policy_version"].to_pylist()) == {lineage[number - 1]["references"][0]["sha256"]}


def test_a_value_head_is_carried_on_and_no_part_of_the_policy(outcome):
    _, folder = outcome
    first, second = (folder / f"round-{number:04d}" for number in rounds_of("hpo"))
    assert weights_sha256(first / "value_head") != weights_sha256(second / "value_head")
    other = folder / f"round-{rounds_of('dpo')[0]:04d}"
    assert not (other / "value_head").exists()
    assert sorted(f.name for f in (second / "policy").iterdir()) == sorted(f.name for f in (other / "policy").iterdir())


def test_an_average_of_the_policies_is_made_where_it_is_the_reference(outcome):
    _, folder = outcome
    lineage = json.loads((folder / "run.json").read_text())["rounds"]
    for number in rounds_of("own"):
        (reference,) = lineage[number - 1]["references"]
        assert reference["path"] == f"round-{number:04d}/ema/policy"
