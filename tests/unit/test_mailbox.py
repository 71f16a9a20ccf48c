"""The training group's mailbox, without a group."""

from __future__ import annotations

import asyncio

from cluster.mailbox import Mailbox
from cluster.timing import Timed

DONE = Timed("done", 0.0, 1.0)


async def _with_job() -> Mailbox:
    box = Mailbox()
    await box.put(len)
    return box


def test_a_job_is_given_out_again_until_it_is_acknowledged():
    async def story():
        box = await _with_job()
        assert await box.first_open() == 0 and await box.take(0, 0) == [len]
        assert await box.first_open() == 0 and await box.take(0, 0) == [len]  # the group died, another came up
        await box.acknowledge(0, DONE)
        assert await box.first_open() == 1
        news = await box.look(0, 0.0)
        assert news.outcome == DONE and news.num_groups == 3

    asyncio.run(story())


def test_the_first_acknowledgement_counts():
    async def story():
        box = await _with_job()
        await box.acknowledge(0, DONE)
        await box.acknowledge(0, ValueError("late"))
        assert (await box.look(0, 0.0)).outcome == DONE

    asyncio.run(story())


def test_a_sign_of_life_is_awaited_only_while_rank_0_has_a_job():
    async def story():
        box = await _with_job()
        assert (await box.look(0, 0.0)).silent_s is None
        await box.take(0, 1)
        assert (await box.look(0, 0.0)).silent_s is None
        await box.take(0, 0)
        await asyncio.sleep(0.05)
        silent_s = (await box.look(0, 0.0)).silent_s
        assert silent_s >= 0.05
        await box.report(0, {"step": 1})
        news = await box.look(0, 0.0)
        assert news.silent_s < silent_s and news.reports == [{"step": 1}]
        await box.acknowledge(0, DONE)
        assert (await box.look(0, 0.0)).silent_s is None

    asyncio.run(story())


def test_ranks_that_are_to_be_ended_are_told_once():
    async def story():
        box = await _with_job()
        await box.enter(0, "first")
        await box.enter(0, "second")  # of the group after it
        await box.enter(1, "other")
        await box.take(0, 0)
        assert await box.ranks() == ["second", "other"]
        assert (await box.look(0, 0.0)).silent_s is None

    asyncio.run(story())


def test_late_reports_of_other_jobs_are_dropped():
    async def story():
        box = await _with_job()
        await box.report(7, "late")
        assert (await box.look(0, 0.0)).reports == []

    asyncio.run(story())
