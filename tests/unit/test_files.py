"""What is on the disk, and when: a power failure leaves the old file or the new one, under its name."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from policy_cases import shop_of, weights
from written_run import update_of

from pipeline.files import place, sync_tree, write_json
from pipeline.lineage import RoundRecord
from pipeline.run import Run
from stages.errors import FingerprintError


@pytest.fixture
def synced(monkeypatch):
    """Each file or folder that was synced, in order, with the names that were in a folder then."""
    found, fsync = [], os.fsync

    def recorded(handle):
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        found.append((path, {file.name for file in path.iterdir()} if path.is_dir() else set()))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", recorded)
    return found


def test_a_files_name_is_synced_after_it_has_got_it(tmp_path, synced):
    write_json(tmp_path / "a.json", {})
    assert synced[-1] == (tmp_path, {"a.json"})
    assert synced[0][0].name.startswith(".a.json.")


def test_so_is_a_folders_with_all_that_is_in_it(tmp_path, synced):
    (tmp_path / "scratch" / "inner").mkdir(parents=True)
    (tmp_path / "scratch" / "inner" / "weights").write_bytes(b"1")
    sync_tree(tmp_path / "scratch")
    place(tmp_path / "scratch", tmp_path / "policy")
    assert {path.name for path, _ in synced[:-1]} == {"scratch", "inner", "weights"}
    assert synced[-1] == (tmp_path, {"policy"})
    sync_tree(tmp_path / "nothing")


def test_what_lies_beside_a_policy_is_synced_with_it(tmp_path, synced):
    update = update_of(tmp_path, weights(0))
    (tmp_path / "master").mkdir()
    files = {"metrics.jsonl", "skipped.jsonl", "master/model.safetensors"}
    for name in files:
        (tmp_path / name).touch()
    update._sync()
    assert {tmp_path / name for name in files} <= {path for path, _ in synced}
    assert synced[-1][0] == tmp_path


def test_a_round_settled_by_a_call_that_was_killed_then_is_published_by_the_next(models, tmp_path):
    run = Run(shop_of(models, into=tmp_path / "run"))
    run.prepare()
    first, made = run.shop.sources.policy, weights(1)
    write_json(run.folder / "round-0001" / "report.json", {"round": 1, "decision": "promote", "reason": "better"})
    run.lineage.settle(RoundRecord(1, first, first, [], made, made, "promote", "better", {"seed": "another"}))
    again = Run(run.shop)
    again.prepare()
    for left in (None, "{", json.dumps({"round": 0})):
        if left is not None:
            (run.folder / "final.json").write_text(left)
        with pytest.raises(FingerprintError):
            next(again.unfinished_rounds())
        assert json.loads((run.folder / "final.json").read_text())["sha256"] == made.sha256
        assert (run.folder / "final").readlink() == made.path
    assert json.loads((run.folder / "report.json").read_text())["rounds"][0]["round"] == 1
    assert not (run.folder / "config.yaml").exists(), "the config at hand is not the one that made the round"
