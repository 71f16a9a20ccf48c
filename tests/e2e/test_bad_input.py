"""What the command says to bad input: where, wanted, got, fix; a status other than 0; no traceback.

Here is what only a whole process shows. `tests/unit/test_bad_*.py` hold the cases one by one.
"""

from __future__ import annotations

import fcntl
import shutil

import pytest

REWARDS = """
def length(prompts, completions, **columns):
    return [len(c) + sum(map(ord, c)) % 7 / 100 for c in completions]
"""


def refused(outcome, *says: str, code: int = 1) -> None:
    assert outcome.code == code, outcome.out + outcome.err
    assert "Traceback" not in outcome.out + outcome.err
    for word in ("wanted:", "got:", "fix:", *says):
        assert word in outcome.err


@pytest.mark.parametrize(
    ("overrides", "code", "says"),
    [
        (["policy.path=/no/such/folder"], 1, "policy.path"),
        pytest.param(["policy.path=no-such/model"], 1, "hub", marks=pytest.mark.slow),
        pytest.param(["score.rewards.0.path=embedded:reverse"], 1, "ForSequenceClassification", marks=pytest.mark.slow),
        (["prompts.path=/no/such/file.jsonl"], 1, "prompts.path"),
        pytest.param(["run.dir=/proc/nowhere"], 1, "run.dir", marks=pytest.mark.slow),
        pytest.param(["score.rewards.1.target=no.module:f"], 1, "no.module", marks=pytest.mark.slow),
        (["update.learning_rat=1"], 2, "update.learning_rate"),
        (["cluster.address=127.0.0.1:1"], 1, "cluster.address"),
    ],
)
def test_a_run_that_is_refused_before_anything_starts(prefloop, overrides, code, says):
    refused(prefloop.run("run.name=refused", *overrides), says, code=code)


def test_commands_with_nothing_to_work_on(prefloop, tmp_path):
    offline = ["prompts=null", "score=null", "evaluate=null", "rounds=1", "pairs.path=x"]
    sets = [part for value in offline for part in ("--set", value)]
    config, out = "configs/quickstart.yaml", ("--out", str(tmp_path / "out"))
    refused(prefloop.command("run", config, "--rounds", "2"), "--rounds +2", code=2)
    refused(prefloop.command("run", config, "--watch", str(tmp_path / "inbox")), "mkdir")
    refused(prefloop.command("update", config, *out), "--pairs TABLE", code=2)
    refused(prefloop.command("sample", config, *sets, *out), "--prompts TABLE", code=2)
    refused(prefloop.command("export", str(tmp_path)), "a run with pairs")
    refused(prefloop.command("status", str(tmp_path)), "no round in it")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_another_run_holds_or_a_file_in_its_place(prefloop):
    folder = prefloop.runs / "held"
    folder.mkdir()
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        refused(prefloop.run("run.name=held"), "another prefloop run")
    (prefloop.runs / "file").touch()
    refused(prefloop.run("run.name=file"), "File exists", "in the way")


@pytest.mark.slow
def test_a_run_that_was_refused_twice_is_mended_and_goes_on(prefloop, policy_folder, tmp_path):
    """First too few prompts, then no pair: each time the advice is followed, and what was made before is kept."""
    config = tmp_path / "bad.yaml"
    shutil.copyfile("configs/quickstart.yaml", config)
    (tmp_path / "bad_rewards.py").write_text(REWARDS)
    rewards = "score.rewards=[{type: function, target: 'bad_rewards:length'}]"
    common = [
        "run.name=mended",
        "rounds=1",
        "evaluate=null",
        f"policy.path={policy_folder}",
        "update.workers=1",
        rewards,
    ]
    refused(prefloop.run(*common, "prompts.per_round=9000", config=config), "prompts.per_round=8000", code=2)
    stopped = prefloop.run(*common, "prompts.per_round=64", "pair.min_margin=1000", config=config)
    refused(stopped, "none from 64 prompts", "gap_too_small", "rewards from", "pair.min_margin")
    candidates = prefloop.runs / "mended" / "round-0001" / "candidates" / "part-00000.parquet"
    before = candidates.stat().st_mtime_ns
    mended = prefloop.run(*common, "prompts.per_round=64", "pair.min_margin=0.01", config=config)
    assert mended.code == 0, mended.err
    assert "sample" not in mended.out and "update" in mended.out
    assert candidates.stat().st_mtime_ns == before
    assert (prefloop.runs / "mended" / "final" / "model.safetensors").exists()
