"""Plans, round by round: what each samples, trains, refers to and sets for itself, and what that comes to."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config import Config
from pipeline.config_file import load_config
from pipeline.plan.command import outlook_of, show_plan

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


@pytest.fixture(autouse=True)
def _where_nothing_has_run(tmp_path_factory, monkeypatch):
    """A run that lies beside the tests would change what is still to do."""
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))


def config_of(*overrides: str) -> Config:
    return load_config(QUICKSTART, overrides)


def test_each_round_says_what_it_does():
    first, second = outlook_of(config_of("rounds=2", "reference=previous")).rounds
    assert first.sentence == (
        "samples 512 prompts x 8 answers from the first policy, makes at most 512 pairs, and trains it on them in at "
        "most 32 steps, against itself as the round starts"
    )
    assert "from round 1's result" in second.sentence and "against the first policy" in second.sentence


def test_each_round_tells_what_it_sets_for_itself():
    rounds = "rounds=[{}, {update: {beta: 0.5}}, {prompts: {per_round: 64}}]"
    sentences = [found.sentence for found in outlook_of(config_of("sample.temperature=[1.0, 0.8]", rounds)).rounds]
    assert sentences[0].endswith("as the round starts, with sample.temperature 1.0")
    assert sentences[1].endswith("with sample.temperature 0.8 and update.beta 0.5")
    assert sentences[2].startswith("samples 64 prompts") and sentences[2].endswith("with sample.temperature 0.8")


@pytest.mark.parametrize(
    ("overrides", "policies", "log_probs"),
    [
        ([], 3, 1024),
        (["momentum=0.3"], 5, 1024),
        (["reference=[initial, ema]", "update.loss_type=mrpo", "momentum=0.3"], 7, 2048),
        (["update.loss_type=simpo"], 3, 0),
        (["pair.strategy=top_bottom", "pair.k=3"], 3, 4096),
    ],
)
def test_a_plan_counts_the_policies_to_be_written_and_the_log_probs_under_each_reference(
    overrides, policies, log_probs, capsys
):
    assert outlook_of(config_of(*overrides)).disk.num_policies == policies
    show_plan(QUICKSTART, overrides, devices=None, in_json=False)
    told = capsys.readouterr().out
    assert f"{policies} policies" in told and f" {log_probs:,} reference log-probs" in told
