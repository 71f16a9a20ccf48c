"""What rounds hand on besides the policy: APO's momentum, and HPO's value head, interrupted and continued."""

from __future__ import annotations

import json

import pytest
import torch

from stages.update.model import read_weights
from stages.weights import weights_sha256

pytestmark = pytest.mark.long

TINY = ("prompts.per_round=64", "prompts.shard_size=32", "evaluate=null", "run.tensorboard=false")


# ---- momentum -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def apo(prefloop):
    result = prefloop.run(
        *TINY,
        "run.name=apo",
        "rounds=3",
        "momentum=0.3",
        "update.loss_type=dpo",
        "update.beta=[0.01, 0.1, 1.0]",
        "sample.num_generations=4",
        "update.keep_optimizer=true",
    )
    assert result.code == 0, result.err
    return prefloop.runs / "apo"


def records(folder):
    return json.loads((folder / "run.json").read_text())["rounds"]


def test_a_round_starts_beyond_the_result_before_it_and_samples_and_refers_to_its_start(apo):
    found = records(apo)
    first = read_weights((apo / found[0]["start"]["path"]).resolve())
    results = [first, *(read_weights(apo / record["result"]["path"]) for record in found)]
    for number, record in enumerate(found[1:], start=2):
        assert record["start"] == record["sampling"] == record["references"][0]
        assert record["start"]["path"] == f"round-{number:04d}/start/policy"
        start, newer, older = read_weights(apo / record["start"]["path"]), results[number - 1], results[number - 2]
        for name, value in start.items():
            assert torch.allclose(value, newer[name] + 0.3 * (newer[name] - older[name]), atol=1e-7)


def test_the_runs_result_is_the_last_one_as_it_was_trained(apo):
    assert json.loads((apo / "final.json").read_text()) == records(apo)[-1]["result"]
    assert records(apo)[-1]["result"]["path"] == "round-0003/policy"


def test_every_round_goes_on_with_the_moments_of_the_one_before(apo):
    rounds = [apo / f"round-{number:04d}" for number in (1, 2, 3)]
    taken = [json.loads((folder / "policy" / "manifest.json").read_text())["fingerprint"] for folder in rounds]
    kept = [weights_sha256(folder / "optimizer") for folder in rounds]
    assert [fingerprint["optimizer"] for fingerprint in taken] == ["new", *kept[:2]]
    assert len(set(kept)) == 3


def test_beta_goes_by_round(apo):
    steps = [json.loads(line) for line in (apo / "metrics.jsonl").open()]
    for number, beta in enumerate([0.01, 0.1, 1.0], start=1):
        (*_, last) = (step for step in steps if step["round"] == number)
        margin = last["log_ratios/chosen"] - last["log_ratios/rejected"]
        assert last["rewards/margins"] == pytest.approx(beta * margin, rel=1e-4, abs=1e-6)


# ---- the value head -------------------------------------------------------------------------------------------------

HPO = (
    *TINY,
    "rounds=2",
    "update.loss_type=hpo",
    "update.loss_params={base: minor_dpo, warmup_steps: 4}",
    "score.rewards.1.role=auxiliary",
)


def test_an_hpo_run_that_was_interrupted_equals_one_that_was_not(prefloop):
    whole = prefloop.run(*HPO, "run.name=whole")
    assert whole.code == 0, whole.err
    folder = prefloop.runs / "broken"
    head = folder / "round-0001" / "value_head"
    in_round_2 = folder / "round-0002" / "pairs" / "manifest.json"
    first = prefloop.interrupted(*HPO, "run.name=broken", when=in_round_2.exists)
    assert first.code == 130 and head.exists(), first.err
    second = prefloop.run(*HPO, "run.name=broken")
    assert second.code == 0, second.err
    for number in (1, 2):
        for part in ("policy", "value_head"):
            one, other = (prefloop.runs / name / f"round-{number:04d}" / part for name in ("whole", "broken"))
            assert weights_sha256(one) == weights_sha256(other), (number, part)
