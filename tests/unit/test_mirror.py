"""Laws of a run at an address: what is published, in which order it is there, and what other nodes see of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.addresses import working_folder
from pipeline.artifacts import StageFolder
from pipeline.checkpoints import CheckpointFolder, asking, drop_checkpoints
from pipeline.cleaning import weights_in
from pipeline.config_file import load_config
from pipeline.files import keep_tree, write_json
from pipeline.mirror import mirrored, obtain, obtain_records, obtain_weights, remove, sizes
from pipeline.model_folders import close_model, found_mixture, found_model, refuse_changed_model
from pipeline.run_folder import is_held, only_run
from pipeline.store import Store
from stages.contracts import TEXTS
from stages.errors import ConfigError, ContractError
from stages.protocols import Weights
from stages.update.config import UpdateConfig
from stages.weights import weights_sha256

STAGE = "round-0001/texts"
CLAIM = {"source": "a"}
QUICKSTART = Path("configs/quickstart.yaml")


def _rows(shard: int, text: str = "of a text") -> pa.Table:
    return TEXTS.table([{"text_id": f"{shard:032x}", "round": 1, "text": text, "token_ids": [shard, 1]}])


@pytest.fixture
def nodes(tmp_path, address):
    """Working folders on two nodes; the second may take the first one's place at any time."""

    def node(name: str):
        return mirrored(tmp_path / name, address)

    return node


def _stage(mirror) -> StageFolder:
    return StageFolder(mirror.root / STAGE, TEXTS)


def _published(node) -> None:
    with node("first") as here:
        stage = _stage(here)
        stage.begin(CLAIM)
        for shard in range(2):
            stage.publish(shard, _rows(shard))
        stage.close(2)


def test_another_node_reads_what_one_published(nodes):
    _published(nodes)
    with nodes("second") as here:
        stage = _stage(here)
        assert not here.root.joinpath(STAGE).exists()
        assert [entry.shard for entry in stage.entries()] == [0, 1] and stage.missing(3) == [2]
        assert [table.to_pylist() for table in stage.read_all()] == [_rows(0).to_pylist(), _rows(1).to_pylist()]


def test_the_records_of_a_run_come_without_its_tables_and_weights(nodes):
    _published(nodes)
    with nodes("first") as here:
        write_json(here.root / "run.json", {})
        _policy(here.root / "round-0001")
    with nodes("second") as here:
        obtain_records(here.root)
        found = {file.relative_to(here.root).as_posix() for file in here.root.rglob("*.*") if file.is_file()}
    assert {found for found in found if not found.startswith(".tags")} == {
        "run.json",
        "round-0001/policy/manifest.json",
        f"{STAGE}/manifest.json",
        f"{STAGE}/fingerprint.json",
        f"{STAGE}/_shards/part-00000.json",
        f"{STAGE}/_shards/part-00001.json",
    }


def test_a_shard_that_another_node_published_is_left_alone(nodes):
    _published(nodes)
    with nodes("second") as here:
        entry = _stage(here).publish(0, _rows(0, "another text"))
        assert entry.sha256 == _stage(here).entry(0).sha256
        assert _stage(here).read(0).to_pylist() == _rows(0).to_pylist()


def test_what_one_node_removes_counts_nowhere(nodes):
    _published(nodes)
    with nodes("second") as here:
        assert list(_stage(here).read_all())
    with nodes("first") as here:
        _stage(here).drop()
        assert here.store.list() == {}
        _stage(here).begin({"source": "b"})
    with nodes("second") as here:
        assert _stage(here).entries() == [] and _stage(here).entry_or_none(0) is None
        made = _stage(here).publish(0, _rows(0, "made anew"))
    with nodes("first") as here:
        assert _stage(here).entries() == [made]


def test_a_damaged_object_is_named_and_made_again(nodes, address):
    _published(nodes)
    key, store = f"{STAGE}/part-00001.parquet", Store(address)
    found = store.read(key)
    assert found is not None
    store.put(key, found[0][:-1] + b"?")
    with nodes("second") as here:
        obtain_records(here.root)
        stage = _stage(here)
        stage.refuse_changed()  # its length is right
        with pytest.raises(ContractError, match="part-00001.parquet"):
            stage.read(1)
        (damage,) = stage.drop_damaged()
        assert "part-00001.parquet was changed" in damage and stage.missing(2) == [1]
        assert not store.find(f"{STAGE}/manifest.json")


def test_a_copy_that_is_damaged_is_brought_again(nodes):
    _published(nodes)
    with nodes("first") as here:
        (here.root / STAGE / "part-00001.parquet").write_bytes(b"?")
        assert _stage(here).drop_damaged() == []
        assert _stage(here).read(1).to_pylist() == _rows(1).to_pylist()


@pytest.mark.parametrize(
    "damage", [lambda store, key: store.put(key, b"?"), lambda store, key: store.delete([key])], ids=["cut", "gone"]
)
def test_a_part_of_a_closed_table_that_is_cut_or_gone_is_named(nodes, address, damage):
    _published(nodes)
    damage(Store(address), f"{STAGE}/part-00000.parquet")
    with nodes("second") as here:
        obtain_records(here.root)
        with pytest.raises(ContractError, match=r"part-00000.parquet"):
            _stage(here).refuse_changed()


_PUBLISH = """
from test_mirror import *
from test_mirror import _rows, _stage
with mirrored(Path({root!r}), {address!r}) as here:
    stage = _stage(here)
    stage.begin(CLAIM)
    for shard in range(2):
        stage.publish(shard, _rows(shard))
    stage.close(2)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("point", "there"),
    [
        ("file.written[part-00001.parquet]", []),
        ("file.placed[part-00001.parquet]", ["part-00001.parquet"]),
        ("file.written[part-00001.json]", ["part-00001.parquet"]),
        ("file.placed[part-00001.json]", ["part-00001.parquet", "_shards/part-00001.json"]),
        ("file.written[manifest.json]", ["part-00001.parquet", "_shards/part-00001.json"]),
    ],
)
def test_nothing_is_there_that_vouches_for_what_is_not(nodes, address, tmp_path, point, there):
    faults = {"PREFLOOP_FAULTS": f"{point}:kill", "PREFLOOP_FAULTS_FOLDER": str(tmp_path / "marks")}
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    code = _PUBLISH.format(root=str(tmp_path / "first"), address=address)
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | faults | {"PYTHONPATH": path})
    assert done.returncode == -signal.SIGKILL
    first = ["fingerprint.json", "part-00000.parquet", "_shards/part-00000.json"]
    assert set(Store(address).list()) == {f"{STAGE}/{name}" for name in [*first, *there]}
    before = Store(address).list()
    with nodes("second") as here:
        stage = _stage(here)
        obtain_records(here.root)
        stage.begin(CLAIM)
        assert stage.missing(2) == ([] if "_shards/part-00001.json" in there else [1])
        for shard in stage.missing(2):
            stage.publish(shard, _rows(shard))
        stage.close(2)
        stage.refuse_changed()
        assert [table.to_pylist() for table in stage.read_all()] == [_rows(0).to_pylist(), _rows(1).to_pylist()]
        after = here.store.list()
    assert {key: after[key] for key in before if "00000" in key} == {k: v for k, v in before.items() if "00000" in k}


# ---- weights --------------------------------------------------------------------------------------------------------


def _policy(folder: Path, *, content: bytes = b"weights") -> Weights:
    for name in ("policy", "master"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "model.safetensors").write_bytes(content + name.encode())
    (folder / "policy" / "config.json").write_text("{}")
    keep_tree(folder / "master")
    sha256 = weights_sha256(folder / "policy")
    master = folder / "master"
    close_model(folder / "policy", CLAIM, sha256=sha256, master_sha256=weights_sha256(master))
    return Weights(folder / "policy", sha256, 1, master, weights_sha256(master))


def test_a_policy_is_brought_where_it_is_used_and_checked_there(nodes, address):
    with nodes("first") as here:
        made = _policy(here.root / "round-0001")
    with nodes("second") as here:
        folder = here.root / "round-0001"
        assert found_model(folder / "policy", CLAIM) and not (folder / "policy" / "model.safetensors").exists()
        refuse_changed_model(folder / "policy")  # it is there, if not here
        here_too = Weights(folder / "policy", made.sha256, 1, folder / "master", made.master_sha256)
        obtain_weights(here_too)
        here_too.refuse_changed()
        assert found_mixture(folder, CLAIM)
    Store(address).delete(["round-0001/policy/config.json"])
    with nodes("third") as here:
        found_model(here.root / "round-0001" / "policy", CLAIM)
        with pytest.raises(ContractError, match="config.json"):
            refuse_changed_model(here.root / "round-0001" / "policy")


def test_weights_that_only_the_store_has_are_freed_there(nodes):
    with nodes("first") as here:
        _policy(here.root / "round-0001")
    with nodes("second") as here:
        found = weights_in(here.root / "round-0001")
        assert [file.relative_to(here.root / "round-0001").parent.name for file in found] == ["master", "policy"]
        for file in found:
            remove(file)
        assert set(here.store.list()) == {"round-0001/policy/config.json", "round-0001/policy/manifest.json"}
    with nodes("first") as here:
        assert found_mixture(here.root / "round-0001", CLAIM) is None
        assert weights_in(here.root / "round-0001") == []


def test_a_checkpoint_goes_on_on_another_node(nodes):
    config = UpdateConfig(checkpoint_steps=1)
    with nodes("first") as here:
        checkpoints = CheckpointFolder(here.root / "round-0001", CLAIM, config)
        for step in (1, 2, 3):
            with checkpoints.writing(step) as folder:
                folder.mkdir(parents=True)
                (folder / "numbers.json").write_text(str(step))
    with nodes("second") as here:
        found = CheckpointFolder(here.root / "round-0001", CLAIM, config).newest()
        assert found == here.root / "round-0001/checkpoint/step-000003"
        assert (found / "numbers.json").read_text() == "3"
        assert {key.split("/")[2] for key in here.store.list()} == {"step-000002", "step-000003"}
        drop_checkpoints(here.root / "round-0001")
        assert here.store.list() == {}


# ---- where a run lies -----------------------------------------------------------------------------------------------


def test_a_run_at_an_address_works_in_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("PREFLOOP_CACHE", str(tmp_path))

    def folders(place: str) -> tuple[str | None, Path]:
        config = load_config(QUICKSTART, [f"run.dir={place}", "run.name=x"])
        return config.address(), config.folder()

    (address, folder), (_, other) = folders("s3://bucket/runs/"), folders("s3://bucket/more")
    assert address == "s3://bucket/runs/x" and folder.is_relative_to(tmp_path) and folder.name == "x"
    assert len({folder, other, working_folder(address, "reading")}) == 3
    assert folders("runs") == (None, Path("runs/x").absolute())


def test_an_address_that_nothing_is_known_of_is_refused_with_the_config():
    with pytest.raises(ConfigError, match="run.dir"):
        load_config(QUICKSTART, ["run.dir=ftp://host/runs"])


def test_who_holds_a_run_at_an_address_is_seen_from_every_node(nodes):
    with nodes("second") as there:
        assert not is_held(there.root)
    with nodes("first") as here, only_run(here.root):
        write_json(here.root / "run.json", {})
        with nodes("second") as there:
            assert is_held(there.root)
    with nodes("second") as there:
        assert not is_held(there.root)
        with only_run(there.root):
            assert (there.root / "run.json").exists()


def test_logs_stay_and_a_folder_at_no_address_is_left_as_it_is(nodes, tmp_path):
    with nodes("first") as here:
        write_json(here.root / "logs/attempt-1/told.json", {})
        write_json(tmp_path / "elsewhere/run.json", {})
        obtain(tmp_path / "elsewhere")
        assert here.store.list() == {} and sizes(tmp_path / "elsewhere") == {"run.json": 3}


def test_a_checkpoint_that_one_node_asks_for_is_written_on_another_and_asked_for_no_longer(nodes):
    config = UpdateConfig(checkpoint_minutes=None, checkpoint_steps=None)
    with nodes("first") as here:
        saving = asking(here.root / "round-0001")
        (here.root / "round-0001").mkdir()
        saving.ask()
        assert saving.is_asked()
    with nodes("second") as there:
        checkpoints = CheckpointFolder(there.root / "round-0001", {}, config)
        assert checkpoints.is_due(1)
        with checkpoints.writing(1) as folder:
            folder.mkdir(parents=True)
            (folder / "state").write_text("state")
        assert not checkpoints.is_due(2)
    with nodes("first"):
        assert not saving.is_asked()
