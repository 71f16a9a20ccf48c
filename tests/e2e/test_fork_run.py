"""Forks of a run: what the settings leave alone is reused, and the result is that of a run from the beginning."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from test_two_rounds import hashes

from pipeline.config_file import load_config
from pipeline.own_modules import importable
from pipeline.reuse import Comparison
from pipeline.reuse_reasons import Reasons
from pipeline.sources import find_sources
from stages.weights import weights_sha256

TINY = ("prompts.per_round=32", "prompts.shard_size=16", "evaluate.num_prompts=32", "rounds=2")
REWARD = """
def begins_right(prompts, completions, answer, **columns):
    return [float(completion[:1] == truth[:1]) for completion, truth in zip(completions, answer)]
"""
STAGES = ["prompts", "sample", "score", "pair", "reference", "update", "evaluate", "settle"]


def reuse(folder: Path, *overrides: str):
    old = load_config(folder / "config.yaml")
    new = load_config(folder / "config.yaml", [*overrides, "run.name=other"])
    with importable(new.run.modules):
        return Comparison(Reasons(folder, old, new, find_sources(new))).reuse()


def check_reuse(folder: Path) -> None:
    """On a finished run of two rounds: the first stage that is made again, by what is set otherwise."""
    cases = {
        (): None,
        ("update.workers=1", "sample.engines=2"): None,
        ("rounds=5",): None,
        ("prompts.per_round=31",): (1, "prompts"),
        ("run.seed=7",): (1, "prompts"),
        ("sample.temperature=0.9",): (1, "sample"),
        ("score.rewards.0.weight=2",): (1, "score"),
        ("pair.min_margin=2",): (1, "pair"),
        ("reference=initial",): (1, "reference"),
        ("update.beta=0.05",): (1, "update"),
        ("update.loss_type=dpo",): (1, "update"),
        ("gate.max_kl=5",): (1, "settle"),
        ("rounds=[{}, {pair: {min_margin: 2}}]",): (2, "pair"),
        ("rounds=[{}, {sample: {temperature: 0.9}}]",): (2, "sample"),
        ("rounds=[{}, {prompts: {per_round: 31}}]",): (2, "prompts"),
        ("momentum=0.5",): (1, "reference"),
    }
    for overrides, first in cases.items():
        found = reuse(folder, *overrides)
        again = [(stage.round, stage.stage) for stage in found.stages if stage.round and not stage.stays]
        assert again[:1] == ([] if first is None else [first]), overrides
        assert found.num_settled == (2 if first is None else first[0] - 1), overrides
        if first is not None:  # all that comes after it, and nothing before
            order = [(number, stage) for number in (1, 2) for stage in STAGES]
            assert again == order[order.index(first) :], overrides


def check_dropped_weights(folder: Path, copy: Path) -> None:
    """Weights that nothing goes on from are not missed; where those of the last round are, all that are gone are."""
    shutil.copytree(folder, copy, symlinks=True)
    for number, again in ((1, None), (2, (1, "update"))):
        for file in (copy / f"round-{number:04d}" / "policy").glob("*.safetensors"):
            file.unlink()
        first = next(((f.round, f.stage) for f in reuse(copy, "rounds=3").stages if not f.stays), None)
        assert first == again


def inodes(folder: Path) -> dict[str, int]:
    return {str(file.relative_to(folder)): file.stat().st_ino for file in folder.rglob("part-*.parquet")}


@pytest.mark.long
def test_a_fork_is_the_run_from_the_beginning_and_leaves_the_first_as_it_was(prefloop, tmp_path):
    """The run names a reward of its own, whose module lies beside its config."""
    base, fork, fresh = (prefloop.runs / name for name in ("fork-base", "fork-beta", "fork-fresh"))
    config = tmp_path / "mine.yaml"
    shutil.copyfile("configs/quickstart.yaml", config)
    (tmp_path / "rewards_of_mine.py").write_text(REWARD)
    tiny = (*TINY, "score.rewards.1.target=rewards_of_mine:begins_right")
    done = prefloop.run(*tiny, "run.name=fork-base", config=config)
    assert done.code == 0, done.err
    check_reuse(base)
    check_dropped_weights(base, tmp_path / "cleaned")
    before = {str(file): file.read_bytes() for file in sorted(base.rglob("*")) if file.is_file()}

    told = prefloop.command("fork", base, "--name", "fork-beta", "--dry-run", sets=("update.beta=0.05",))
    assert told.code == 0 and "update.beta: 0.1 -> 0.05" in told.out and not fork.exists()
    forked = prefloop.command("fork", base, "--name", "fork-beta", sets=("update.beta=0.05",))
    assert forked.code == 0, forked.err
    assert "round 1/2  sample" not in forked.out and "round 1/2  update" in forked.out
    again = prefloop.run(*tiny, "run.name=fork-fresh", "update.beta=0.05", config=config)
    assert again.code == 0, again.err

    assert hashes(fork).keys() and weights_sha256(fork / "final") == weights_sha256(fresh / "final")
    mine, theirs = (json.loads((folder / "run.json").read_text())["rounds"] for folder in (fork, fresh))
    assert [record["fingerprint"] for record in mine] == [record["fingerprint"] for record in theirs]
    shared = {name for name, node in inodes(fork).items() if inodes(base).get(name) == node}
    assert {f"round-0001/{table}/part-00000.parquet" for table in ("candidates", "scored", "pairs")} <= shared
    assert not any(name.startswith("round-0002") for name in shared)
    assert {str(file): file.read_bytes() for file in sorted(base.rglob("*")) if file.is_file()} == before
    refused = prefloop.command("fork", base, "--name", "fork-beta")
    assert refused.code == 1 and "another name" in refused.err and os.path.isdir(fork)
