"""The command: all checks, one table in green and red, and a refusal where a line is red."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from rich.table import Table
from rich.text import Text

from cluster.config import ClusterConfig
from pipeline import embedded
from pipeline.config import Config
from pipeline.config_file import load_config
from pipeline.console import Console
from pipeline.doctor import machine
from pipeline.doctor.finding import Check, Finding, LeftOut, looked_at
from pipeline.own_modules import importable
from pipeline.plan.command import outlook_of
from stages.errors import InputError, PrefloopError
from stages.score.config import reward_names

_SIGNS = {"good": ("green", "bold green"), "bad": ("red", "bold red"), "left out": ("-", "dim")}


def show_doctor(config_file: Path | None, overrides: Sequence[str], *, deep: bool) -> None:
    """Print what was found.

    Args:
        config_file: looked at too, if there is one: models, rows, rewards.
        deep: start an engine and a trainer.

    Raises:
        InputError: if something is not as it should be.
        ConfigError: for a config that cannot be read.
    """
    warnings.simplefilter("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    config = load_config(config_file, overrides) if config_file is not None else None
    with importable(config.run.modules if config is not None else None):
        findings = list(examined(config, deep=deep))
    Console().table(_table(findings))
    if bad := [finding.part for finding in findings if finding.state == "bad"]:
        raise InputError(
            "doctor",
            wanted="no red line",
            got=f"{len(bad)}: {', '.join(bad)}",
            fix="what each red line says, then prefloop doctor again",
        )


def examined(config: Config | None, *, deep: bool) -> Iterator[Finding]:
    """The findings on this machine and, if there is one, on a config."""
    cluster = config.cluster if config is not None else ClusterConfig()
    checks: dict[str, Check] = {
        "versions": machine.versions,
        "devices": partial(machine.devices, cluster),
        "compiler": machine.compiler,
        "ports": partial(machine.ports, cluster),
        "limits": machine.limits,
    }
    results = config.folder() if config is not None else Path("runs").absolute()
    others = {"cache": embedded.cache_root(), "temporary files": Path(tempfile.gettempdir())}
    for name, folder in ({"results": results} | others).items():
        checks[name] = partial(_disk, folder, config if name == "results" else None)
    yield from looked_at(checks)
    if config is not None and (address := config.address()) is not None:
        yield from looked_at({"address": partial(machine.address, address)})
    if config is not None:
        yield from looked_at(_of_config(config, deep=deep))


def _of_config(config: Config, *, deep: bool) -> dict[str, Check]:
    from pipeline.doctor import models

    named = models.Named(config)
    checks: dict[str, Check] = {"tokenizer": partial(models.tokenizer, named)}
    for at, (reward, name) in enumerate(zip(config.rewards, reward_names(config.score), strict=True)):
        checks[f"reward {name}"] = partial(models.reward, named, reward, name, f"score.rewards.{at}")
    checks["engine, trainer"] = partial(models.engine_against_trainer, named) if deep else _not_asked
    return checks


def _disk(folder: Path, config: Config | None) -> str:
    """A disk, with what the config will write on it."""
    needed = None
    if config is not None:
        with suppress(PrefloopError):  # for what a config names there are lines of their own
            needed = outlook_of(config).disk.total_bytes
    return machine.disk(folder, needed=needed)


def _not_asked() -> str:
    raise LeftOut("not asked for: --deep starts an engine and a trainer")


def _table(findings: Sequence[Finding]) -> Table:
    """A line for each finding; the fix below what was found."""
    table = Table(box=None, pad_edge=False, padding=(0, 2), show_header=False)
    for finding in findings:
        sign, style = _SIGNS[finding.state]
        told = Text(finding.found) if not finding.fix else Text(f"{finding.found}\nfix: {finding.fix}")
        table.add_row(Text(sign, style=style), Text(finding.part), told)
    return table
