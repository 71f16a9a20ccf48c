"""How many rounds a run has, what stops it early, and which file gives which round."""

from __future__ import annotations

import os
import threading
import time

import pytest
from killed import killed_after
from policy_cases import shop_of
from refusals import refused

from pipeline.run import Run
from pipeline.schedule import add_rounds, asked_rounds, parse_addition, reason_to_stop
from pipeline.sections import StopConfig
from pipeline.watched_files import WatchedFiles
from stages.errors import ConfigError, ContractError, FingerprintError, InputError


def test_rounds_are_added_to_a_finished_run(tmp_path):
    assert add_rounds(tmp_path, 3, 2, settled=3, going_on=False) == (5, True)
    assert asked_rounds(tmp_path, 3) == 5


def test_the_same_addition_carries_on_where_it_was_interrupted(tmp_path):
    add_rounds(tmp_path, 3, 2, settled=3, going_on=False)
    assert add_rounds(tmp_path, 3, 2, settled=4, going_on=False) == (5, False)
    assert add_rounds(tmp_path, 3, 2, settled=5, going_on=False) == (7, True)


def test_a_run_that_is_going_on_takes_every_addition(tmp_path):
    assert add_rounds(tmp_path, 3, 1, settled=1, going_on=True) == (4, True)
    assert add_rounds(tmp_path, 3, 1, settled=1, going_on=True) == (5, True)


def test_a_larger_number_in_the_config_counts(tmp_path):
    add_rounds(tmp_path, 3, 2, settled=3, going_on=False)
    assert asked_rounds(tmp_path, 9) == 9


@pytest.mark.parametrize("text", ["2", "+0", "+x", "+", "-1", "+1.5"])
def test_only_a_number_to_add_is_understood(text):
    with pytest.raises(ConfigError, match="--rounds"):
        parse_addition(text)


def reports(*rewards, kl=0.0, hours=0.0):
    return [
        {
            "round": number,
            "decision": "promote" if number else "first",
            "evaluate": {"reward": reward, "kl": kl if number else 0.0},
            "seconds": hours * 3600,
        }
        for number, reward in enumerate(rewards)
    ]


def test_patience_counts_rounds_since_the_best():
    stop = StopConfig(patience=2)
    assert reason_to_stop(stop, None, reports(1.0, 2.0, 1.9)) is None
    assert "best is 2.00, round 1" in reason_to_stop(stop, None, reports(1.0, 2.0, 1.9, 2.0))
    assert "before the first round" in reason_to_stop(stop, None, reports(1.0, 0.5, 0.6))
    assert reason_to_stop(stop, None, reports(1.0, 0.5, 1.1)) is None


def test_divergence_and_hours_stop_a_run_and_nothing_does_unasked():
    far = reports(1.0, 2.0, kl=12.5, hours=0.3)
    assert reason_to_stop(StopConfig(), None, far) is None
    assert "12.50 nats" in reason_to_stop(StopConfig(max_kl=10.0), None, far)
    assert reason_to_stop(StopConfig(max_kl=13.0), None, far) is None
    assert "max_hours" in reason_to_stop(StopConfig(max_hours=0.25), None, far)
    assert reason_to_stop(StopConfig(patience=1, max_kl=1e-3), None, reports(1.0)) is None


# ---- a watched folder -----------------------------------------------------------------------------------------------


def put(folder, name, age=10.0):
    (folder / name).write_text('{"prompt": "1>"}\n', encoding="utf-8")
    os.utime(folder / name, (time.time() - age,) * 2)


def test_files_are_taken_once_in_the_order_of_their_times_until_the_stop_file(tmp_path):
    folder, ledger = tmp_path / "in", tmp_path / "watched.json"
    folder.mkdir()
    for name, age in (("b.jsonl", 30.0), ("a.jsonl", 20.0), (".hidden.jsonl", 40.0), ("notes.txt", 50.0)):
        put(folder, name, age)
    taken = []
    watched = WatchedFiles(ledger, folder)
    (folder / "STOP").touch()
    while (file := watched.next_file()) is not None:
        taken.append(file.name)
        watched.take(file, round=len(taken))
    assert taken == ["b.jsonl", "a.jsonl"]
    assert WatchedFiles(ledger).file_of(2) == folder / "a.jsonl"
    assert WatchedFiles(ledger).next_file() is None


def test_a_refused_file_gives_its_round_to_the_next_one(tmp_path):
    watched = WatchedFiles(tmp_path / "run" / "watched.json", tmp_path)
    put(tmp_path, "bad.jsonl")
    file = watched.next_file()
    watched.take(file, round=1)
    watched.refuse(file, "broken")
    assert watched.file_of(1) is None
    (tmp_path / "STOP").touch()
    assert watched.next_file() is None


def test_a_file_that_was_mended_under_its_name_counts_as_another(tmp_path):
    watched = WatchedFiles(tmp_path / "run" / "watched.json", tmp_path)
    put(tmp_path, "today.jsonl", age=30.0)
    file = watched.next_file()
    watched.take(file, round=1)
    watched.refuse(file, "broken")
    put(tmp_path, "today.jsonl", age=20.0)
    assert watched.next_file() == file
    watched.take(file, round=1)
    assert (watched.file_of(1), watched.num_taken(among=3)) == (file, 1)


def test_a_changed_file_that_is_refused_stays_with_the_round_that_had_it_before(tmp_path):
    watched = WatchedFiles(tmp_path / "run" / "watched.json", tmp_path)
    for number, age in ((1, 30.0), (2, 20.0)):
        put(tmp_path, "today.jsonl", age=age)
        watched.take(tmp_path / "today.jsonl", round=number)
    watched.refuse(tmp_path / "today.jsonl", "broken")
    assert (watched.file_of(1), watched.file_of(2)) == (tmp_path / "today.jsonl", None)


def test_a_ledger_that_was_changed_is_refused_by_its_name(tmp_path):
    """Else a round would draw from another file than the one it took."""
    for name in ("a.jsonl", "b.jsonl"):
        put(tmp_path, name, age=20.0)
    watched = WatchedFiles(tmp_path / "watched.json")
    watched.take(tmp_path / "a.jsonl", round=1)
    watched.ledger.write_text(watched.ledger.read_text().replace("a.jsonl", "b.jsonl"))
    refused(lambda: watched.file_of(1), "watched.json", "as published", kind=ContractError)


def test_a_file_that_goes_away_is_passed_over(tmp_path):
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    (tmp_path / "STOP").touch()
    assert WatchedFiles(tmp_path / "run" / "watched.json", tmp_path).next_file() is None


def test_a_file_that_is_still_written_is_waited_for(tmp_path):
    watched = WatchedFiles(tmp_path / "run" / "watched.json", tmp_path)
    put(tmp_path, "growing.jsonl", age=-2.0)
    threading.Timer(0.6, lambda: put(tmp_path, "growing.jsonl", age=5.0)).start()
    started = time.monotonic()
    assert watched.next_file() == tmp_path / "growing.jsonl"
    assert time.monotonic() - started > 0.4


def test_a_file_from_just_before_the_stop_file_is_taken_and_a_later_one_is_not(tmp_path):
    watched = WatchedFiles(tmp_path / "run" / "watched.json", tmp_path)
    put(tmp_path, "last.jsonl", age=0.7)
    put(tmp_path, "STOP", age=0.6)
    put(tmp_path, "later.jsonl", age=-60.0)
    file = watched.next_file()
    watched.take(file, round=1)
    assert file == tmp_path / "last.jsonl"
    assert watched.next_file() is None


def test_a_watched_folder_that_is_removed_is_named(tmp_path):
    watched = WatchedFiles(tmp_path / "watched.json", tmp_path / "in")
    refused(watched.next_file, f"mkdir {tmp_path / 'in'}", "any more", kind=InputError)


def given_up(models, tmp_path):
    """A run whose first round has read the watched file ``a.jsonl``; ``b.jsonl`` is newer."""
    drop = tmp_path / "in"
    drop.mkdir()
    for at, name in enumerate("ab"):
        (drop / f"{name}.jsonl").write_text(f'{{"prompt": "of {name}"}}\n{{"prompt": "more of {name}"}}\n')
        os.utime(drop / f"{name}.jsonl", (at, at))
    run = watching(models, tmp_path)
    run._watched.take(drop / "a.jsonl", round=1)
    assert run._read_watched(1, drop / "a.jsonl")
    (run.folder / "round-0001" / "candidates").mkdir(parents=True)
    (run.folder / "round-0001" / "candidates" / "part-00000.parquet").touch()
    return run


def watching(models, tmp_path):
    return Run(shop_of(models, into=tmp_path / "run"), watched=tmp_path / "in")


def asked_in(run, number):
    return sorted(run._pools[number].table.read(0)["prompt"].to_pylist())


@pytest.mark.parametrize("removals", range(1, 8))
def test_however_a_file_is_given_up_the_next_one_asks_its_own_prompts(models, tmp_path, monkeypatch, removals):
    run = given_up(models, tmp_path)
    with killed_after(removals, monkeypatch):
        run._giving_up(1)()
    again = watching(models, tmp_path)
    if again._watched.file_of(1) is not None:
        assert again._read_watched(1, again._watched.file_of(1))
        assert asked_in(again, 1) == ["more of a", "of a"]
        (again.folder / "round-0001").mkdir(exist_ok=True)  # by its stages, done again
        again._giving_up(1)()
    file = again._watched.next_file()
    again._watched.take(file, round=1)
    assert again._read_watched(1, file)
    assert asked_in(again, 1) == ["more of b", "of b"]


def test_what_was_read_of_another_file_is_refused_and_of_one_that_changed_since_it_stands(models, tmp_path, capsys):
    run = given_up(models, tmp_path)
    a, b = (tmp_path / "in" / f"{name}.jsonl" for name in "ab")
    os.utime(a, (2, 2))
    a.write_text('{"prompt": "changed"}\n')
    again = watching(models, tmp_path)
    capsys.readouterr()
    assert again._read_watched(1, a) and asked_in(again, 1) == ["more of a", "of a"]
    a.unlink()
    assert again._read_watched(1, a) and not capsys.readouterr().out, "it is told once"
    run._watched.refuse(a, "given up, but its prompts were left")
    run._watched.take(b, round=1)
    with pytest.raises(FingerprintError, match="prompts-1"):
        watching(models, tmp_path)._read_watched(1, b)
