"""``prefloop status``, ``logs`` and ``stop`` with ``--address``: runs on a cluster, looked after from any machine.

In: the address of a cluster's job server, and a run's name or a submission id. Out: lines for people. Nothing of the
run's folder is read: it may lie where only the cluster's nodes see it.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

from rich.table import Table

from cluster.errors import AlreadySubmitted, Unreachable
from cluster.submit import Job, JobServer
from pipeline.console import Console, duration
from pipeline.texts import visible
from stages.errors import InputError, StageError

_ADDRESS = r"https?://[^/\s@]+/?"
_LAST_LINES = 5


@contextmanager
def reached(address: str) -> Iterator[None]:
    """Put what goes wrong on the way to a job server into words.

    Raises:
        InputError: if the address is none, or nobody answers there.
        StageError: if somebody else submitted the same run at the same time.
    """
    where = f"--address {address}"
    if not re.fullmatch(_ADDRESS, address):
        raise InputError(where, wanted="http:// or https://, a host and a port", got=address, fix="http://HOST:8265")
    try:
        yield
    except Unreachable as error:
        fix = "the address that ray start printed for its dashboard, or a port forwarded to it; a cluster with a token "
        fix += "wants RAY_AUTH_MODE=token and RAY_AUTH_TOKEN set here"
        raise InputError(where, wanted="a Ray cluster's job server", got=error.reason, fix=fix) from None
    except AlreadySubmitted as error:
        got = f"{error.submission_id}, submitted by another at the same time"
        raise StageError(where, wanted="one attempt at a time", got=got, fix="prefloop status tells of it") from None


def show_jobs(address: str, name: str | None) -> None:
    """Print how one run on a cluster is, or which runs it knows of.

    Args:
        name: a run's, for its last attempt, or a submission id; None for all.
    """
    console = Console()
    with reached(address):
        server = JobServer(address)
        if name is None:
            console.table(_table(server.jobs()))
            return
        job = _found(server, name)
        console.table(_table([job]))
        console.text(f"\nfolder   {visible(job.folder)}, on the cluster")
        if job.has_ended and job.message:
            console.text(f"ended    {visible(job.message.strip().splitlines()[0])}")
        lines = [line for line in server.logs(job).splitlines() if line.strip()]
    if lines:
        console.text()
    for line in lines[-_LAST_LINES:]:
        console.text(visible(line))


def show_logs(address: str, name: str, *, follow: bool) -> None:
    """Print what a run on a cluster has said, and with `follow` what it goes on to say.

    Raises:
        StageError: if it was followed and did not end well.
    """
    with reached(address):
        server = JobServer(address)
        job = _found(server, name)
        if follow:
            follow_job(server, job, Console())
        else:
            _tell(server.logs(job))


def follow_job(server: JobServer, job: Job, console: Console) -> None:
    """Tell what a job says until it ends; Ctrl-C ends the telling alone.

    Raises:
        StageError: if it did not end well.
    """
    try:
        ended = server.follow(job, _tell)
    except KeyboardInterrupt:
        console.text(f"\n{job.submission_id} is no longer followed; it goes on")
        return
    if ended.status != "SUCCEEDED":
        raise StageError(
            job.submission_id,
            wanted="a run that ends well",
            got=f"{ended.status}" + (f", status {ended.exit_status}" if ended.exit_status else ""),
            fix="see its last lines above; the same submit carries on where it stopped",
        )


def stop_job(address: str, name: str) -> None:
    """End a run on a cluster, after a checkpoint where an update is under way.

    Raises:
        StageError: if it goes on all the same.
    """
    with reached(address):
        server = JobServer(address)
        job = _found(server, name)
        was_over = job.has_ended
        job = job if was_over else server.stop(job)
    if not job.has_ended:
        raise StageError(
            job.submission_id,
            wanted="a job that ends when it is asked to",
            got=job.status,
            fix="ask again, or ray list",
        )
    told = f"had ended before: {job.status}" if was_over else f"{job.status}; the same submit carries on"
    Console().line("", "stop", f"{job.submission_id}   {told}")


def _found(server: JobServer, name: str) -> Job:
    if (job := server.find(name)) is not None:
        return job
    known = ", ".join(job.submission_id for job in server.jobs()[-5:]) or "none: it has none since its head was started"
    raise InputError(
        name,
        wanted="a run's name, or a submission id, that the cluster knows",
        got=f"another; it knows {known}",
        fix=f"prefloop status --address {server.address} lists them",
    )


def _table(jobs: list[Job]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2))
    for title in ("submission id", "run", "status", "started (UTC)", "took"):
        table.add_column(title, no_wrap=True)
    for job in jobs:
        status = job.status + (f" ({job.exit_status})" if job.exit_status else "")
        began = job.started_s or 0.0
        started = datetime.fromtimestamp(began, UTC).strftime("%Y-%m-%d %H:%M:%S") if began else ""
        took = duration(max(0.0, (job.ended_s or time.time()) - began)) if began else ""
        table.add_row(visible(job.submission_id), visible(job.run), status, started, took)
    return table


def _tell(text: str) -> None:
    sys.stdout.write(visible(text))
    sys.stdout.flush()
