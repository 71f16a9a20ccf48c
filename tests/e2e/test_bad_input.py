"""What the command says to bad input: where, wanted, got, fix; a status other than 0; no traceback."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

FUNCTIONS = """
def constant(prompts, completions, **columns):
    return [1.0] * len(completions)


def nan(prompts, completions, **columns):
    return [float("nan")] * len(completions)


def length(prompts, completions, **columns):
    return [len(c) + sum(map(ord, c)) % 7 / 100 for c in completions]
"""


def refused(outcome, *says: str, code: int = 1) -> None:
    assert outcome.code == code, outcome.out + outcome.err
    assert "Traceback" not in outcome.err
    for word in ("wanted:", "got:", "fix:", *says):
        assert word in outcome.err


@pytest.mark.parametrize(
    ("overrides", "code", "says"),
    [
        (["policy.path=/no/such/folder"], 1, "policy.path"),
        (["policy.path=no-such/model"], 1, "hub"),
        (["policy.path=embedded:revers"], 1, "embedded:reverse"),
        (["score.rewards.0.path=embedded:reverse"], 1, "ForSequenceClassification"),
        (["policy.path=embedded:reverse-judge"], 1, "score.rewards"),
        (["prompts.path=/no/such/file.jsonl"], 1, "prompts.path"),
        (["run.dir=/proc/nowhere"], 1, "run.dir"),
        (["score.rewards.1.target=no.module:f"], 1, "no.module"),
        (["update.learning_rat=1"], 2, "update.learning_rate"),
        (["rounds=-1"], 2, "rounds"),
        (["sample.temperature=0"], 2, "sample.temperature"),
        (["model={path: x}"], 2, "policy"),
        (["sample.max_new_tokens=32"], 2, "context"),
        (["cluster.address=127.0.0.1:1"], 1, "cluster.address"),
    ],
)
def test_refused_before_anything_starts(prefloop, overrides, code, says):
    refused(prefloop.run("run.name=refused", *overrides), says, code=code)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("empty.jsonl", "\n", "at least one prompt"),
        ("few.jsonl", '{"prompt": "1>"}', "prompts.per_round"),
    ],
)
def test_prompts_that_cannot_be_used(prefloop, tmp_path, name, content, says):
    file = tmp_path / name
    file.write_text(content)
    outcome = prefloop.run(f"run.name={file.stem}", f"prompts.path={file}")
    refused(outcome, says, code=2 if name == "few.jsonl" else 1)


def edited(folder: Path, target: Path, key: str) -> Path:
    shutil.copytree(folder, target)
    file = target / "tokenizer_config.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != key}))
    return target


def test_a_tokenizer_without_a_pad_token_is_refused_before_an_engine_starts(prefloop, policy_folder, tmp_path):
    folder = edited(policy_folder, tmp_path / "no_pad", "pad_token")
    outcome = prefloop.run("run.name=no_pad", f"policy.path={folder}")
    refused(outcome, "--set policy.pad_token=")
    assert not (prefloop.runs / "no_pad" / "logs" / "attempt-1" / "sampler-0.log").exists()


@pytest.fixture(scope="module")
def sampled_run(prefloop, policy_folder, tmp_path_factory):
    """A run that stops at pairing, so that its samples can be scored again in copies of its folder."""
    config = tmp_path_factory.mktemp("config") / "bad.yaml"
    shutil.copyfile("configs/quickstart.yaml", config)
    module = config.with_name("bad_rewards.py")
    module.write_text(FUNCTIONS)
    common = [
        "rounds=1",
        "prompts.per_round=64",
        "evaluate=null",
        f"policy.path={policy_folder}",
        "update.workers=1",
        "score.rewards=[{type: function, target: 'bad_rewards:%s'}]",
    ]

    def run(name: str, function: str, *more: str):
        overrides = [o % function if "%s" in o else o for o in common]
        return prefloop.run(f"run.name={name}", *overrides, *more, config=config)

    return run, run("stopped", "length", "pair.min_margin=1000")


def test_a_round_without_a_pair_stops_with_the_fates_and_the_spread(sampled_run):
    refused(sampled_run[1], "none from 64 prompts", "gap_too_small", "rewards from", "pair.min_margin")


@pytest.mark.parametrize(
    ("function", "says"), [("constant", "for every one of 512 answers"), ("nan", "512 of 512 answers without one")]
)
def test_rewards_that_say_nothing_stop_the_run(sampled_run, prefloop, function, says):
    run, _ = sampled_run
    target = prefloop.runs / function
    shutil.copytree(prefloop.runs / "stopped", target)
    for name in ("scored", "pairs", "fates"):
        shutil.rmtree(target / "round-0001" / name)
    refused(run(function, function), says)


def test_what_was_refused_can_be_mended_and_the_same_run_goes_on(sampled_run, prefloop):
    """After "no pair" the advice is followed: the samples are kept, the pairs are made anew, a policy comes out."""
    run, _ = sampled_run
    candidates = prefloop.runs / "stopped" / "round-0001" / "candidates" / "part-00000.parquet"
    before = candidates.stat().st_mtime_ns
    outcome = run("stopped", "length", "pair.min_margin=0.01")
    assert outcome.code == 0, outcome.err
    assert "sample" not in outcome.out and "update" in outcome.out
    assert candidates.stat().st_mtime_ns == before
    assert (prefloop.runs / "stopped" / "final" / "model.safetensors").exists()


def test_a_folder_that_another_run_holds_is_refused(prefloop):
    import fcntl

    folder = prefloop.runs / "held"
    folder.mkdir()
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        refused(prefloop.run("run.name=held"), "another prefloop run")
