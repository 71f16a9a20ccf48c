"""How a command ends: one shape for what the machines do, statuses, and quietly where nobody reads on."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.errors import KeptWaiting, NodeLost, NotEnough, TakenAway, Unprotected, Unreachable, WorkerLost
from pipeline.answering import ending
from stages.errors import ConfigError, StageError

OF_THE_CLUSTER = [
    WorkerLost("sampler-0", Path("logs/sampler-0.log"), "it was killed"),
    NodeLost("the raylet ended"),
    NotEnough("8 GPUs", "2 GPUs"),
    KeptWaiting("trainers", "2 GPUs", 60.0, "2 GPUs, none free"),
    Unreachable("head:6379", "nobody answers"),
    Unprotected("head:6379", "it asked for no token"),
]


@pytest.mark.parametrize("error", OF_THE_CLUSTER, ids=lambda error: type(error).__name__)
def test_what_the_machines_do_is_told_as_every_refusal_is(error):
    message, status = ending(error)
    where, *lines = message.splitlines()
    assert status == 1 and where and [line[:10] for line in lines] == ["  wanted: ", "  got:    ", "  fix:    "]
    assert all(line[10:].strip() for line in lines)
    assert any(str(given) in message for given in error.args)


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (StageError("here", wanted="a", got="b", fix="c"), 1, "StageError: here"),
        (ConfigError("here", wanted="a", got="b", fix="c"), 2, "ConfigError: here"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (TakenAway(), 143, "ended as asked"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "a full disk"),
        (BrokenPipeError("of a connection"), 70, "a mistake in prefloop: BrokenPipeError"),
        (KeyError("x"), 70, "a mistake in prefloop: KeyError"),
    ],
)
def test_every_ending_has_its_status(error, status, told):
    message, found = ending(error)
    assert found == status and message.startswith(told)


@pytest.mark.parametrize(
    "work",
    ["print('a line')", "sys.stdout.write('x' * 100_000)", "from pipeline.console import Console; Console().text('x')"],
)
def test_an_output_that_nobody_reads_any_more_ends_the_command_quietly(work):
    code = f"import sys\nfrom pipeline.answering import answer_for\ndef work():\n    {work}\n"
    code += "sys.stdin.read()\nanswer_for(work)"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.close()
        process.stdin.close()
        assert process.stderr.read() == b""
        assert process.wait(30) == 141
