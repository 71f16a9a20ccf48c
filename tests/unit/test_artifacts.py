"""Publishing: what is published stands, what is not counts for nothing, what is damaged is named."""

from __future__ import annotations

import json
import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from killed import killed_after

from pipeline.artifacts import StageFolder
from pipeline.files import read_json, read_vouched, write_vouched
from pipeline.lineage import Lineage, RoundRecord
from pipeline.model_folders import (
    OPTIMIZER,
    close_model,
    end_without_model,
    ended_without_model,
    found_model,
    found_moments,
    refuse_changed_model,
)
from pipeline.stage import Stage
from stages.contracts import FATES
from stages.errors import ContractError, FingerprintError, StageError
from stages.protocols import Weights
from stages.weights import weights_sha256


def table(fate="tied", rows=2):
    counts = {"num_candidates": 8, "num_valid": 8, "num_pairs": 0}
    return FATES.table({"prompt_id": f"p{i}", "round": 1, "fate": fate, "detail": "", **counts} for i in range(rows))


@pytest.fixture
def folder(tmp_path):
    folder = StageFolder(tmp_path / "fates", FATES)
    folder.begin({"pair": {"min_margin": 0.5}, "seed": 0})
    return folder


def test_a_published_shard_is_left_alone_by_a_second_publisher(folder):
    first = folder.publish(0, table("tied"))
    bytes_before = (folder.path / first.file).read_bytes()
    assert folder.publish(0, table("paired")) == first
    assert (folder.path / first.file).read_bytes() == bytes_before


def test_two_publishers_at_once_leave_a_file_that_its_entry_vouches_for(folder):
    threads = [threading.Thread(target=folder.publish, args=(0, table(fate, rows=50))) for fate in ("tied", "paired")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert folder.read(0).num_rows == 50
    assert len(set(folder.read(0)["fate"].to_pylist())) == 1


def test_a_file_without_an_entry_does_not_count(folder):
    (folder.path / "part-00000.parquet").write_bytes(b"half a file")
    assert folder.missing(1) == [0]
    with pytest.raises(StageError, match="missing"):
        folder.close(1)
    folder.publish(0, table())
    folder.close(1)
    assert folder.is_closed()
    assert read_json(folder.path / "manifest.json")["rows"] == 2


def flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize("what", ["part", "entry"])
@pytest.mark.parametrize("damage", [flip, lambda content: content[:-9], lambda _: b"", lambda _: b"{}"])
def test_a_damaged_part_is_named_and_made_again_and_the_others_stand(folder, what, damage):
    entries = [folder.publish(shard, table()) for shard in range(2)]
    folder.close(2)
    assert folder.drop_damaged() == [] and folder.is_closed()
    file = folder.path / (entries[0].file if what == "part" else "_shards/part-00000.json")
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ContractError, match=file.name):
        folder.read(0)
    (found,) = folder.drop_damaged()
    assert str(file) in found
    assert folder.missing(2) == [0] and not folder.is_closed()
    assert folder.publish(0, table()) == entries[0] and folder.drop_damaged() == []


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_byte_of_an_entry_changes_unseen(folder, data):
    folder.publish(0, table())
    file = folder.path / "_shards" / "part-00000.json"
    content = file.read_bytes()
    place, bit = data.draw(st.integers(0, len(content) - 1)), data.draw(st.integers(0, 7))
    file.write_bytes(content[:place] + bytes([content[place] ^ (1 << bit)]) + content[place + 1 :])
    try:
        found = folder.entry(0)
    except ContractError:
        return
    finally:
        file.write_bytes(content)
    assert found == folder.entry(0), "only the space between its words changed"


def test_a_part_that_is_gone_is_made_again(folder):
    file = folder.path / folder.publish(0, table()).file
    file.unlink()
    assert folder.drop_damaged() == [f"{file} is gone"] and folder.missing(1) == [0]


def test_any_changed_file_of_a_finished_model_is_found(tmp_path):
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
    close_model(tmp_path, {}, sha256=weights_sha256(tmp_path))
    refuse_changed_model(tmp_path)
    (tmp_path / "config.json").write_text('{"rms_norm_eps": 0.5}')
    with pytest.raises(ContractError, match="config.json"):
        refuse_changed_model(tmp_path)


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damage_is_found_before_use_and_the_file_is_named(folder, damage):
    file = folder.path / folder.publish(0, table()).file
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    {"flip": lambda: file.write_bytes(content), "cut": lambda: file.write_bytes(content[:-9]), "remove": file.unlink}[
        damage
    ]()
    with pytest.raises(ContractError) as caught:
        folder.read(0)
    assert str(file) in caught.value.where


def test_a_table_of_another_contract_is_not_published(folder):
    with pytest.raises(ContractError):
        folder.publish(0, table().drop_columns(["detail"]))
    assert folder.missing(1) == [0]


def test_another_fingerprint_is_refused_with_the_differing_fields_only(folder):
    folder.publish(0, table())
    folder.begin({"pair": {"min_margin": 0.5}, "seed": 0})
    with pytest.raises(FingerprintError) as caught:
        folder.begin({"pair": {"min_margin": 0.75}, "seed": 0})
    assert caught.value.wanted == "pair.min_margin: 0.75"
    assert caught.value.got == "pair.min_margin: 0.5"


def test_a_claim_without_a_part_gives_way_so_that_what_failed_can_be_mended(folder):
    folder.begin({"pair": {"min_margin": 0.75}, "seed": 0})
    folder.publish(0, table())
    folder.close(1)
    assert read_json(folder.path / "manifest.json")["fingerprint"]["pair"] == {"min_margin": 0.75}


def test_a_refused_result_stays_until_it_is_made_in_another_way(folder):
    folder.publish(0, table())
    folder.close(1)
    folder.refuse("no pair")
    assert not folder.is_closed()
    folder.begin({"pair": {"min_margin": 0.5}, "seed": 0})
    assert folder.missing(1) == []
    folder.refuse("no pair")
    folder.begin({"pair": {"min_margin": 0.1}, "seed": 0})
    assert folder.missing(1) == [0]


def test_a_model_folder_counts_once_its_manifest_is_there(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    assert found_model(tmp_path, {"seed": 1}) is None
    sha256 = weights_sha256(tmp_path)
    close_model(tmp_path, {"seed": 1}, sha256=sha256)
    assert found_model(tmp_path, {"seed": 1})["sha256"] == sha256
    with pytest.raises(FingerprintError):
        found_model(tmp_path, {"seed": 2})


@pytest.mark.parametrize("removals", range(1, 9))
@pytest.mark.parametrize("claimed_next", ["the same", "another"])
@pytest.mark.parametrize("how", ["dropped", "refused"])
def test_of_a_removal_cut_short_nothing_is_taken_for_another_result(folder, monkeypatch, how, removals, claimed_next):
    mine, other = {"pair": {"min_margin": 0.5}, "seed": 0}, {"pair": {"min_margin": 0.1}, "seed": 0}
    parts = [folder.publish(shard, table("tied")) for shard in range(2)]
    folder.close(2)
    if how == "refused":
        folder.refuse("no pair")
    with killed_after(removals, monkeypatch):
        folder.drop() if how == "dropped" else folder.begin(other)
    if claimed_next == "the same":
        folder.begin(mine)
        assert all(entry in parts for entry in folder.entries())
    else:
        if how == "dropped" and folder.claimed() == mine:
            folder.drop()
        folder.begin(other)
        assert folder.missing(2) == [0, 1] and not list(folder.path.glob("part-*"))
    assert not folder.is_closed()


@pytest.mark.parametrize("why", ["damaged", "stale"])
def test_a_part_taken_back_never_leaves_a_manifest_that_names_it(folder, monkeypatch, why):
    part = folder.publish(0, table("tied"))
    folder.close(1)
    if why == "damaged":
        (folder.path / part.file).write_bytes(b"")
    with killed_after(1, monkeypatch):
        folder.drop_damaged() if why == "damaged" else folder.drop_stale([StageFolder(folder.path / "none", FATES)])
    assert not folder.is_closed()


def test_a_manifest_of_other_parts_is_written_anew_and_one_of_these_is_left_alone(folder):
    folder.publish(0, table("tied"))
    folder.close(1)
    manifest = folder.path / "manifest.json"
    before = manifest.stat()
    folder.close(1)
    assert manifest.stat() == before
    (folder.path / "_shards" / "part-00000.json").unlink()
    folder.publish(0, table("paired"))
    stage = Stage("pair", [folder], folder.claimed(), 1, lambda _: [], lambda _: None, print)
    assert stage.end() == folder.entries()
    folder.refuse_changed()


def test_parts_that_nobody_claimed_are_made_again(folder):
    folder.publish(0, table())
    folder.close(1)
    (folder.path / "fingerprint.json").unlink()
    folder.begin({"pair": {"min_margin": 0.1}, "seed": 0})
    assert folder.missing(1) == [0] and not folder.is_closed()


def closed_stage(tmp_path):
    folder = StageFolder(tmp_path / "fates", FATES)
    folder.begin({"seed": 0})
    folder.publish(0, table())
    folder.close(1)
    return folder.path / "manifest.json", folder.refuse_changed


def finished_model(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    close_model(tmp_path, {"seed": 0}, sha256="ab" * 32, master_sha256=None, update={"num_steps": 2})
    return tmp_path / "manifest.json", lambda: (found_model(tmp_path, {"seed": 0}), refuse_changed_model(tmp_path))


def ended_update(tmp_path):
    end_without_model(tmp_path, {"seed": 0}, update={"ended": "the loss was not finite"})
    return tmp_path / "update_ended.json", lambda: ended_without_model(tmp_path, {"seed": 0})


def settled_round(tmp_path):
    policy = Weights(tmp_path / "round-0001" / "policy", "ab" * 32, 1)
    file = tmp_path / "run.json"
    Lineage(file).settle(RoundRecord(1, policy, policy, [policy], policy, policy, "promote", "why", {"seed": 0}))
    return file, lambda: Lineage.read(file)


@pytest.mark.parametrize("make", [closed_stage, finished_model, ended_update, settled_round])
def test_no_bit_of_what_vouches_for_a_result_changes_unseen(tmp_path, make):
    file, use = make(tmp_path)
    whole, wanted = file.read_bytes(), use()
    flips = [whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :] for at in range(len(whole))]
    by_hand = [b"", b"{}", b"[]", whole[:-9], json.dumps(read_json(file) | {"check": None}).encode()]
    refusals = []
    for content in (*flips, *by_hand):
        file.write_bytes(content)
        try:
            assert use() == wanted, "only the space between its words changed"
        except ContractError as error:
            refusals.append(error)
    assert {error.where for error in refusals} == {str(file)} and "restore the file" in refusals[0].fix
    assert len(refusals) > 0.6 * len(flips)


def test_keys_that_are_numbers_are_vouched_for_as_they_are_read_again(tmp_path):
    write_vouched(tmp_path / "a.json", {"by round": {10: "b", 9: (1, 2)}})
    assert read_vouched(tmp_path / "a.json", "a file", fix="") == {"by round": {"10": "b", "9": [1, 2]}}


@pytest.mark.parametrize("gone", ["manifest.json", "_shards/part-00001.json", "part-00001.parquet"])
def test_a_closed_folder_that_lost_a_file_is_refused_by_its_name(folder, gone):
    for shard in range(2):
        folder.publish(shard, table())
    folder.close(2)
    folder.refuse_changed()
    (folder.path / gone).unlink()
    with pytest.raises(ContractError, match=gone.rpartition("/")[2]):
        folder.refuse_changed()


def test_a_closed_folder_with_another_entry_than_its_manifests_is_refused(folder):
    folder.publish(0, table("tied"))
    folder.close(1)
    entry = folder.path / "_shards" / "part-00000.json"
    entry.write_text(entry.read_text(encoding="utf-8").replace('"rows": 2', '"rows": 3'), encoding="utf-8")
    with pytest.raises(ContractError, match="part-00000.json"):
        folder.refuse_changed()


def test_moments_count_only_beside_the_policy_that_was_made_with_them(tmp_path):
    for name in ("policy", OPTIMIZER):
        (tmp_path / name).mkdir()
        (tmp_path / name / "some.safetensors").write_bytes(name.encode())
        assert found_moments(tmp_path) is None
        close_model(tmp_path / name, {"seed": 0}, sha256=weights_sha256(tmp_path / name))
    found = found_moments(tmp_path)
    assert found is not None and found.sha256 == weights_sha256(tmp_path / OPTIMIZER)
    close_model(tmp_path / "policy", {"seed": 1}, sha256=weights_sha256(tmp_path / "policy"))
    assert found_moments(tmp_path) is None
