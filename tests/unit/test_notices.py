"""SIGTERM: what is under way is saved first, for as long as it is given; real signals to a real process."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import nullcontext

import pytest

from cluster.errors import TakenAway
from cluster.notices import Notices, Saving
from pipeline.checkpoints import CheckpointFolder, asking
from stages.update.config import UpdateConfig


def end_me() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def at_work(notices: Notices, *acts, saving: Saving | None = None) -> float:
    """Take notices, do some acts one after another, and then have time; how long it took."""
    began = time.monotonic()
    with pytest.raises(TakenAway):
        _work(notices, acts, saving)
    return time.monotonic() - began


def _work(notices, acts, saving):
    with notices.taken(of_nodes=False):
        with notices.saved(saving) if saving else nullcontext():
            for act in acts:
                act()
        time.sleep(10)


UNSAVED = Saving(lambda: None, lambda: True)


def pause(seconds):
    return lambda: time.sleep(seconds)


def test_without_anything_to_save_it_ends_at_once():
    assert at_work(Notices(60), end_me) < 5


def test_what_is_under_way_goes_on_is_saved_and_then_it_ends():
    said: list[str] = []
    saving = Saving(lambda: said.append("asked"), lambda: "saved" not in said)
    acts = (end_me, pause(0.3), lambda: said.append("goes on"), lambda: said.append("saved"), pause(10))
    assert 0.3 <= at_work(Notices(60), *acts, saving=saving) < 5
    assert said == ["asked", "goes on", "saved"]


def test_it_ends_when_the_work_has_ended_which_then_needs_no_saving():
    assert 0.5 <= at_work(Notices(60), end_me, pause(0.5), saving=UNSAVED) < 5


def test_what_takes_too_long_is_not_waited_for():
    assert 0.3 <= at_work(Notices(0.3), end_me, pause(10), saving=UNSAVED) < 5


def test_a_second_notice_ends_at_once():
    assert at_work(Notices(60), end_me, threading.Timer(0.3, end_me).start, pause(10), saving=UNSAVED) < 5


@pytest.mark.parametrize("made_of_it", [KeyboardInterrupt, SystemError])
def test_what_ray_makes_of_it_where_it_waits_is_still_the_notice(made_of_it):
    def waiting_in_ray():
        try:
            end_me()
            time.sleep(10)
        except TakenAway:
            raise made_of_it from None

    assert at_work(Notices(60), waiting_in_ray) < 5


def test_ctrl_c_stays_ctrl_c():
    with pytest.raises(KeyboardInterrupt) as raised, Notices(60).taken(of_nodes=False):
        raise KeyboardInterrupt
    assert raised.type is KeyboardInterrupt


def test_signals_are_as_before_afterwards():
    before = signal.getsignal(signal.SIGTERM)
    with Notices(60).taken(of_nodes=False):
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


def test_an_asked_checkpoint_is_due_whatever_the_clock_says_and_once(tmp_path):
    checkpoints = CheckpointFolder(tmp_path, {}, UpdateConfig(checkpoint_minutes=None, checkpoint_steps=None))
    saving = asking(tmp_path)
    assert not checkpoints.is_due(1) and not saving.is_asked()
    saving.ask()
    assert checkpoints.is_due(1) and saving.is_asked()
    with checkpoints.writing(1) as folder:
        folder.mkdir(parents=True)
        (folder / "state").write_text("state")
    assert not checkpoints.is_due(2) and not saving.is_asked()
    saving.ask()
    asking(tmp_path)
    assert not checkpoints.is_due(2), "who asked before this update began has gone"
