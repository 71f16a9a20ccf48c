"""What happens to a run's files between two calls: made again where that is safe, else refused by name."""

from __future__ import annotations

import shutil
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from threading import Thread

import pytest

pytestmark = pytest.mark.long

TINY = (
    *("prompts.per_round=64", "prompts.shard_size=32", "sample.num_generations=4", "rounds=1", "run.tensorboard=false"),
    *("update.global_batch_size=16", "evaluate.num_prompts=32"),
)
TABLES = ("prompts", "candidates", "scored", "pairs", "fates", "reference_logps")


@pytest.fixture(scope="module")
def finished(prefloop) -> Path:
    outcome = prefloop.run(*TINY, "run.name=finished")
    assert outcome.code == 0, outcome.err
    return prefloop.runs / "finished"


def copy_of(finished: Path, name: str) -> Path:
    folder = finished.parent / name
    shutil.copytree(finished, folder, symlinks=True)
    return folder


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])


def remove(file: Path) -> None:
    file.unlink()


@pytest.mark.parametrize("damage", [flip, cut, remove], ids=lambda damage: damage.__name__)
def test_an_unsettled_rounds_parts_are_made_again_and_named_and_come_out_the_same(prefloop, finished, damage):
    name = f"unsettled-{damage.__name__}"
    folder = copy_of(finished, name)
    (folder / "run.json").unlink()  # as if it had been killed before it settled the round
    damaged = [folder / "round-0001" / table / "part-00001.parquet" for table in TABLES]
    before = [file.read_bytes() for file in damaged]
    for file in damaged:
        damage(file)
    outcome = prefloop.run(*TINY, f"run.name={name}")
    assert outcome.code == 0, outcome.out + outcome.err
    told = outcome.out.replace("\n", "")
    assert all(f"{file.parent.name}/{file.name}" in told for file in damaged), outcome.out
    assert [file.read_bytes() for file in damaged] == before


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("round-0001/policy/model.safetensors", flip),
        ("round-0001/candidates/part-00000.parquet", cut),
        ("round-0001/pairs/manifest.json", cut),
        ("round-0001/fates/_shards/part-00001.json", flip),
        ("run.json", cut),
    ],
)
def test_a_settled_rounds_file_is_refused_by_name(prefloop, finished, file, damage):
    name = "settled-" + file.replace("/", "-")
    folder = copy_of(finished, name)
    damage(folder / file)
    outcome = prefloop.run(*TINY, f"run.name={name}")
    assert outcome.code == 1, outcome.out + outcome.err
    assert Path(file).name in outcome.err and "fix:" in outcome.err and "Traceback" not in outcome.err


def test_a_full_disk_is_said_and_what_was_there_stays_and_goes_on_when_there_is_room(prefloop, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=30m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("no file system may be mounted here")
    try:
        sets = (*TINY, "evaluate=null", "run.name=full", f"run.dir={disk}")
        filler = Thread(target=fill, args=(disk, disk / "full" / "round-0001" / "pairs" / "manifest.json"))
        filler.start()
        full = prefloop.run(*sets)
        filler.join()
        assert full.code == 1 and "No space left" in full.err and "fix:" in full.err, full.out + full.err
        assert "Traceback" not in full.out + full.err
        published = {file: file.read_bytes() for file in disk.rglob("part-*.parquet")}
        assert published and not (disk / "full" / "round-0001" / "policy" / "manifest.json").exists()
        (disk / "filler").unlink()
        again = prefloop.run(*sets)
        assert again.code == 0, again.out + again.err
        assert all(file.read_bytes() == content for file, content in published.items())
    finally:
        subprocess.run(["umount", disk], check=True)


def fill(disk: Path, when: Path) -> None:
    """Take all room once a file is there."""
    deadline = time.monotonic() + 300
    while not when.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    with suppress(OSError), (disk / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
