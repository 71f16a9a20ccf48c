"""Which checkpoint counts: whole ones of this very update, the newest first; and what is kept of them."""

from __future__ import annotations

import json
import logging
import random
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy
import pytest
import torch

from pipeline.checkpoints import CheckpointFolder, drop_checkpoints
from stages.update.config import UpdateConfig
from stages.update.randomness import random_state, seed_rank, set_random_state
from stages.update.tensor_files import TensorFiles, write_tensors

FINGERPRINT = {"start": "of this", "update": {"beta": 0.1, "loss_type": ["minor_dpo", "sft"]}, "references": []}


def checkpoints(folder: Path, *, fingerprint=FINGERPRINT, **options) -> CheckpointFolder:
    return CheckpointFolder(folder, fingerprint, UpdateConfig(**options))


def written(folder: Path, *steps: int, into: CheckpointFolder | None = None) -> list[Path]:
    into, found = into or checkpoints(folder), []
    for step in steps:
        with into.writing(step) as place:
            write_tensors(place, [("a", torch.arange(5.0) + step), ("b", torch.ones(3))], file_bytes=1)
            (place / "numbers.json").write_text(json.dumps({"step": step}))
        found.append(place)
    return found


def test_the_newest_counts_and_the_last_two_stay(tmp_path):
    assert checkpoints(tmp_path).newest() is None
    *_, before, last = written(tmp_path, 2, 4, 11, 100)
    assert checkpoints(tmp_path).newest() == last
    assert sorted(last.parent.iterdir()) == sorted([before, last])
    drop_checkpoints(tmp_path)
    drop_checkpoints(tmp_path)
    assert not last.parent.exists()


def damages(folder: Path) -> Iterator[tuple[str, str]]:
    """Damages a folder in one way after another; the file that has to be named."""
    for file in sorted(folder.iterdir()):
        whole = file.read_bytes()
        for place in range(0, 8 * len(whole), 5 if file.suffix == ".json" else 97):
            changed = bytearray(whole)
            changed[place // 8] ^= 1 << place % 8
            file.write_bytes(changed)
            yield file.name, f"bit {place} of {file.name}"
        for length in (0, 1, len(whole) // 2, len(whole) - 2):  # a manifest ends with a newline, which says nothing
            file.write_bytes(whole[:length])
            yield file.name, f"{length} bytes of {file.name}"
        if file.name != "manifest.json":
            file.unlink()
            yield file.name, f"no {file.name}"
        file.write_bytes(whole)
    (folder / "tensors-99999.safetensors").write_bytes(b"")
    yield "tensors-99999.safetensors", "a file that is not its own"


def test_whatever_is_damaged_is_named_and_the_one_before_is_taken(tmp_path, caplog):
    before, last = written(tmp_path, 2, 4)
    assert checkpoints(tmp_path).newest() == last
    count = 0
    for name, damage in damages(last):
        caplog.clear()
        assert checkpoints(tmp_path).newest() == before, damage
        assert str(last) in caplog.text and name in caplog.text, damage
        count += 1
    assert count > 200


def test_with_every_one_damaged_there_is_none_and_a_part_of_one_is_none(tmp_path, caplog):
    before, last = written(tmp_path, 2, 4)
    (before / "numbers.json").unlink()
    (last / "manifest.json").unlink()
    with caplog.at_level(logging.WARNING):
        assert checkpoints(tmp_path).newest() is None
    assert str(before) in caplog.text and str(last) not in caplog.text


def test_one_of_another_update_does_not_count_and_goes_with_the_next(tmp_path, caplog):
    written(tmp_path, 8, 9)
    other = checkpoints(tmp_path, fingerprint=FINGERPRINT | {"start": "of that"})
    assert other.newest() is None
    assert "another update, by start" in caplog.text
    (mine,) = written(tmp_path, 1, into=other)
    assert list(mine.parent.iterdir()) == [mine]


def test_what_was_resumed_from_stays_until_two_newer_ones_are_there(tmp_path):
    _, last = written(tmp_path, 2, 4)
    (last / "numbers.json").unlink()
    resumed = checkpoints(tmp_path)
    assert resumed.newest().name == "step-000002"
    names = []
    for step in (4, 6):
        written(tmp_path, step, into=resumed)
        names.append(sorted(path.name for path in last.parent.iterdir()))
    assert names == [["step-000002", "step-000004"], ["step-000004", "step-000006"]]
    assert checkpoints(tmp_path).newest().name == "step-000006"


def test_steps_and_minutes_say_when_one_is_due(tmp_path):
    def due(**options):
        found = checkpoints(tmp_path, **options)
        return [step for step in range(1, 8) if found.is_due(step)]

    assert due() == []
    assert due(checkpoint_steps=3) == [3, 6]
    assert due(checkpoint_minutes=1e-9) == [1, 2, 3, 4, 5, 6, 7]
    assert due(checkpoint_minutes=None) == []


def test_when_it_is_due_is_no_part_of_what_an_update_is():
    assert UpdateConfig(checkpoint_minutes=1, checkpoint_steps=5).identity() == UpdateConfig().identity()


@contextmanager
def no_room(num_bytes: int) -> Iterator[None]:
    """No file of this process may grow beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_without_room_the_update_goes_on_and_the_one_before_stays(tmp_path, caplog):
    (before,) = written(tmp_path, 2)
    with no_room(64):
        (missed,) = written(tmp_path, 4)
    assert not missed.exists() and "no checkpoint after step 4" in caplog.text
    assert checkpoints(tmp_path).newest() == before


def test_tensors_are_gone_through_to_their_end_where_they_cannot_be_written(tmp_path):
    tensors = iter([(f"{i}", torch.ones(1000)) for i in range(5)])
    with no_room(64), pytest.raises(OSError, match=str(tmp_path)):
        write_tensors(tmp_path, tensors, file_bytes=1)
    assert list(tensors) == []


@pytest.mark.parametrize("file_bytes", [1, 30, 10**6])
def test_tensors_are_read_one_by_one_as_they_were_written(tmp_path, file_bytes):
    tensors = {"a/x": torch.randn(3, 4), "a/y": torch.randn(4, 3).T, "b/x": torch.tensor(7), "a/z": torch.empty(0)}
    write_tensors(tmp_path, tensors.items(), file_bytes=file_bytes)
    found = TensorFiles(tmp_path)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert TensorFiles(tmp_path, prefix="a/").keys() == {"x", "y", "z"}
    assert torch.equal(TensorFiles(tmp_path, prefix="b/")["x"], tensors["b/x"])
    assert len(list(tmp_path.iterdir())) == {1: 4, 30: 3, 10**6: 1}[file_bytes]


def draws() -> list[float]:
    return [
        *(random.random() for _ in range(3)),
        *(random.gauss() for _ in range(3)),
        *numpy.random.rand(3),
        *numpy.random.randn(3),
        *torch.randn(5).tolist(),
        *torch.rand(3).tolist(),
    ]


def test_random_numbers_go_on_where_they_were(tmp_path):
    for burn in range(4):  # so that generators hold a second normal number, and none
        seed_rank("here", burn)
        for _ in range(burn):
            random.gauss()
            numpy.random.randn()
            torch.randn(1)
        shutil.rmtree(tmp_path)
        write_tensors(tmp_path, random_state().items())
        wanted = draws()
        seed_rank("elsewhere")
        assert draws() != wanted
        set_random_state(TensorFiles(tmp_path))
        assert draws() == wanted


def test_seeds_are_by_the_work():
    found = []
    for work in [(1, 0, 0), (1, 0, 0), (1, 0, 1), (2, 0, 0)]:
        seed_rank(*work)
        found.append(draws())
    assert found[0] == found[1]
    assert len({tuple(numbers) for numbers in found}) == 3
