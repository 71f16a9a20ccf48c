"""Runs as Ray jobs: submitted to a cluster's job server, found, followed and stopped from any machine that reaches it.

In: the server's address, an entrypoint, the zip of a working_dir. Out: `Job` records. What is in the entrypoint is the
caller's affair; a run is known here by its name alone. Attempts at one run are numbered, since a server never takes a
submission id twice.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from cluster.access import refuse_silence
from cluster.errors import AlreadySubmitted, Unprotected, Unreachable

if TYPE_CHECKING:
    from ray.job_submission import JobDetails

_ATTEMPT = ":"  # before an attempt's number; in no run's name
_RUN, _FOLDER = "prefloop_run", "prefloop_folder"  # keys of a job's metadata
_TALKERS = ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk")  # on standard error
_PORTS = {"http": 80, "https": 443}
_MOST_STOP_S = 600  # to wait for the end of a job that was asked to
_AGAIN_S, _MOST_FAILURES = 2.0, 30  # while following: a minute without a server
_COMING_UP_S = 60  # a head answers before it can take a job
_ENDED = ("STOPPED", "SUCCEEDED", "FAILED")


@dataclass(frozen=True, slots=True)
class Job:
    """One attempt at a run, as the job server tells of it.

    Attributes:
        run: the run's name.
        folder: the run's, as the cluster's nodes call it.
        status: in Ray's words: PENDING, RUNNING, STOPPED, SUCCEEDED, FAILED.
        working_dir: the address of what was sent.
        started_s: seconds since the epoch; `ended_s` likewise.
        exit_status: of the entrypoint, once it ended by itself.
    """

    submission_id: str
    run: str
    folder: str
    status: str
    message: str
    entrypoint: str
    working_dir: str
    started_s: float | None
    ended_s: float | None
    exit_status: int | None

    @property
    def has_ended(self) -> bool:
        return self.status in _ENDED


class JobServer:
    """A cluster's job server, behind its dashboard's address.

    Every method raises `Unreachable` if it gives no answer, or takes no token that is set here.
    """

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/")
        parts = urlsplit(self.address)
        assert parts.hostname is not None and parts.scheme in _PORTS, self.address
        refuse_silence(self.address, parts.hostname, parts.port or _PORTS[parts.scheme])
        os.environ["RAY_API_SERVER_ADDRESS"] = self.address  # of several places to name it, Ray lets this one win
        with self._asked():
            from ray.job_submission import JobSubmissionClient

            for name in _TALKERS:
                logging.getLogger(name).setLevel(logging.WARNING)
            self._client = JobSubmissionClient(self.address)

    def refuse_unprotected(self) -> None:
        """Refuse a server that takes jobs from whoever reaches it.

        Raises:
            Unprotected: if it answers without a token.
        """
        import requests

        with self._asked():
            bare = requests.get(f"{self.address}/api/jobs/", timeout=30)
        if bare.ok:
            raise Unprotected(self.address, "its job server answers without a token")

    def jobs(self) -> list[Job]:
        """All attempts at runs that the server knows of, the oldest first; a head that was lost forgets them."""
        with self._asked():
            found = [_job(details) for details in self._client.list_jobs() if _RUN in (details.metadata or {})]
        return sorted(found, key=lambda job: job.started_s or 0.0)

    def find_run(self, run: str) -> Job | None:
        """The last attempt at the run of a name."""
        return next((job for job in reversed(self.jobs()) if job.run == run), None)

    def find(self, name: str) -> Job | None:
        """The attempt with a submission id, or else the last one at the run of that name."""
        return next((job for job in self.jobs() if job.submission_id == name), None) or self.find_run(name)

    def submit(
        self,
        entrypoint: str,
        *,
        run: str,
        folder: str,
        working_dir: Path,
        stop_wait_s: float,
        requirements: Sequence[str] = (),
    ) -> Job:
        """Send an attempt at a run.

        Args:
            run: the run's name.
            folder: the run's, as the cluster's nodes call it.
            working_dir: a zip; a server that has the same one already is not sent it again.
            stop_wait_s: between the SIGTERM that stops the job and its end by force.
            requirements: what each node installs first, as pip reads it.

        Raises:
            AlreadySubmitted: if another attempt was sent meanwhile.
        """
        submission_id = f"{run}{_ATTEMPT}{self._last_attempt(run) + 1}"
        runtime_env: dict[str, Any] = {
            "working_dir": str(working_dir),
            "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(math.ceil(stop_wait_s))},
        }
        if requirements:
            runtime_env["pip"] = {"packages": list(requirements), "pip_check": False}
        job = {"entrypoint": entrypoint, "submission_id": submission_id, "metadata": {_RUN: run, _FOLDER: folder}}
        deadline = time.monotonic() + _COMING_UP_S
        while True:
            try:
                with self._asked():
                    self._client.submit_job(**job, runtime_env=runtime_env)
                return self._job(submission_id)
            except Unreachable as error:
                if "already exists" in str(error.__cause__):
                    raise AlreadySubmitted(submission_id) from None
                if "No available agent" not in error.reason or time.monotonic() > deadline:
                    raise
            time.sleep(_AGAIN_S)

    def _last_attempt(self, run: str) -> int:
        with self._asked():
            taken = [details.submission_id or "" for details in self._client.list_jobs()]
        numbers = [re.fullmatch(re.escape(run + _ATTEMPT) + r"(\d+)", each) for each in taken]
        return max((int(found[1]) for found in numbers if found), default=0)

    def _job(self, submission_id: str) -> Job:
        with self._asked():
            return _job(self._client.get_job_info(submission_id))

    def logs(self, job: Job) -> str:
        """All that the entrypoint has said so far."""
        with self._asked():
            return self._client.get_job_logs(job.submission_id)

    def follow(self, job: Job, tell: Callable[[str], None], *, most_failures: int = _MOST_FAILURES) -> Job:
        """Tell what the entrypoint says until it ends; a connection that breaks is made again, for a minute.

        Args:
            most_failures: tries in a row that bring nothing new.
        """
        told = failures = 0
        while True:
            try:
                with self._asked():
                    told = asyncio.run(self._tail(job, tell, told))
                    job = self._job(job.submission_id)
                if job.has_ended:
                    return job
                failures = 0
            except _Broken as broken:
                told, failures = broken.told, 0
            except Unreachable as error:
                failures += 1
                if failures > most_failures or "does not exist" in error.reason:
                    raise
            time.sleep(_AGAIN_S)

    async def _tail(self, job: Job, tell: Callable[[str], None], skipped: int) -> int:
        """Tell all but the first characters; how many there were in all."""
        seen, before = 0, skipped
        try:
            async for text in self._client.tail_job_logs(job.submission_id):
                seen += len(text)
                if seen > skipped:
                    tell(text[-(seen - skipped) :])
                    skipped = seen
        except Exception as error:
            if skipped > before:
                raise _Broken(skipped) from error
            raise
        return skipped

    def stop(self, job: Job) -> Job:
        """Ask an attempt to end, and wait until it has."""
        with self._asked():
            self._client.stop_job(job.submission_id)
        deadline = time.monotonic() + _MOST_STOP_S
        while not (job := self._job(job.submission_id)).has_ended and time.monotonic() < deadline:
            time.sleep(0.5)
        return job

    @contextmanager
    def _asked(self) -> Iterator[None]:
        """What Ray, requests and aiohttp raise, as one error."""
        from aiohttp import ClientError
        from ray.exceptions import AuthenticationError
        from requests import RequestException

        try:
            yield
        except AuthenticationError as error:
            held = "none is set here" if "Missing" in str(error) else "the one set here is another's"
            raise Unreachable(self.address, f"it asks for a token, and {held}") from error
        except (ConnectionError, OSError, RuntimeError, ValueError, ClientError, RequestException) as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise Unreachable(self.address, lines[-1]) from error  # the last: of a traceback of the server's


class _Broken(Exception):
    """A connection that broke after it had told more of a job that is followed: so many characters in all."""

    def __init__(self, told: int) -> None:
        super().__init__(told)
        self.told = told


def _job(details: JobDetails) -> Job:
    metadata = details.metadata or {}
    return Job(
        submission_id=details.submission_id or "",
        run=metadata.get(_RUN, ""),
        folder=metadata.get(_FOLDER, ""),
        status=str(details.status),
        message=details.message or "",
        entrypoint=details.entrypoint,
        working_dir=(details.runtime_env or {}).get("working_dir", ""),
        started_s=details.start_time / 1000 if details.start_time else None,
        ended_s=details.end_time / 1000 if details.end_time else None,
        exit_status=details.driver_exit_code,
    )


def address_of(zipped: Path) -> str:
    """What the server will call a working_dir, without sending it."""
    from ray._private.runtime_env.packaging import get_uri_for_package

    return str(get_uri_for_package(zipped))
