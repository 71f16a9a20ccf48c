"""The command ``prefloop``; importing it loads none of the heavy libraries."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from stages.errors import ConfigError, PrefloopError


@click.group()
def main() -> None:
    """Iterative, on-policy preference alignment on Ray: sample, score, pair, update, again."""


@main.command("run")
@click.argument("config", type=click.Path(path_type=Path))
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="override a key, e.g. sample.temperature=0.8"
)
def run_command(config: Path, overrides: tuple[str, ...]) -> None:
    """Run CONFIG to its end, or carry on where it stopped."""
    from pipeline.start import run

    _answer_for(lambda: run(config, overrides))


@main.command("plan")
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--devices", metavar="DEVICES", help="plan for these, e.g. 8x80GB, 2x8x80GB or cpu:16x64GB")
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="override a key, e.g. sample.temperature=0.8"
)
@click.option("--json", "in_json", is_flag=True, help="for machines")
def plan_command(config: Path, devices: str | None, overrides: tuple[str, ...], in_json: bool) -> None:
    """Show what CONFIG will do and need, and refuse what the devices cannot hold; starts nothing."""
    from pipeline.plan import show_plan

    _answer_for(lambda: show_plan(config, overrides, devices=devices, in_json=in_json))


@main.command("status")
@click.argument("run", type=click.Path(path_type=Path))
def status_command(run: Path) -> None:
    """Show how far the run in folder RUN is."""
    from pipeline.status import show_status

    _answer_for(lambda: show_status(run))


def _answer_for(work: Callable[[], Any]) -> None:
    """Do the work, and end the process; what goes wrong becomes words and an exit status, never a traceback.

    0: done; 1: it could not be done; 2: the config is wrong; 70: a mistake of ours; 130: interrupted.
    """
    from cluster.errors import KeptWaiting, NotEnough, Unreachable, WorkerLost

    try:
        work()
        _leave("", 0)
    except PrefloopError as error:
        _leave(str(error), 2 if isinstance(error, ConfigError) else 1)
    except WorkerLost as error:
        _leave(f"{error}\n  fix:    read the log; the same command carries on where this one stopped", 1)
    except NotEnough as error:
        fix = "fewer sample.engines or update.workers, or a larger cluster"
        _leave(f"the cluster is too small\n  wanted: {error.wanted}\n  got:    {error.got}\n  fix:    {fix}", 1)
    except KeptWaiting as error:
        fix = "wait until others let go (ray status tells what is held), then give the same command; it carries on"
        _leave(
            f"cluster.start_timeout_s\n  wanted: {error.name}: {error.wanted}, within {error.waited_s:g} s\n"
            f"  got:    {error.got}\n  fix:    {fix}",
            1,
        )
    except Unreachable as error:
        fix = "--set cluster.address=local, or the address that ray status prints"
        _leave(
            f"cluster.address\n  wanted: a Ray cluster\n  got:    {error.address}: {error.reason}\n  fix:    {fix}", 1
        )
    except KeyboardInterrupt:
        _leave("interrupted; the same command carries on where this one stopped", 130)
    except Exception as error:  # the last line before the user
        notes = "".join(f"\n  {note}" for note in getattr(error, "__notes__", []))
        first_line = (str(error).splitlines() or [""])[0]
        _leave(f"a mistake in prefloop: {type(error).__name__}: {first_line}{notes}", 70)


def _leave(message: str, status: int) -> None:
    sys.stdout.flush()
    if message:
        print(message, file=sys.stderr, flush=True)
    # Ray and torch threads may still be up; they must not delay the exit, talk over it, or change its status.
    os._exit(status)
