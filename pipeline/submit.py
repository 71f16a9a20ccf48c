"""``prefloop submit``: the same run, but as a job on a cluster, from a machine that may be switched off afterwards.

In: a config and the address of a cluster's job server. Out: an attempt at the run on the cluster, under a submission id
that the other commands take. What only this machine has is refused before anything is sent.
"""

from __future__ import annotations

import re
import shlex
import tempfile
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from cluster.submit import Job, JobServer, address_of
from pipeline.addresses import place_of_run
from pipeline.config import Config
from pipeline.config_checks import is_policy_name
from pipeline.config_file import load_config
from pipeline.console import Console
from pipeline.remote import follow_job, reached
from pipeline.schedule import parse_addition
from pipeline.working_dir import CHECKOUT, WorkingDir, find_working_dir
from stages.errors import ConfigError, InputError, StageError

_LAST_WORDS_S = 15  # beside the time that a checkpoint may take
_CONSTRAINTS = "cluster/constraints.txt"
_ON_THE_NODE = "${RAY_RUNTIME_ENV_CREATE_WORKING_DIR}"  # Ray puts the node's own copy of the working_dir in its place


def submit(
    config_file: Path,
    overrides: Sequence[str],
    *,
    address: str,
    requirements: bool,
    follow: bool,
    more_rounds: str | None = None,
    watched: Path | None = None,
) -> None:
    """Send a run to a cluster, or find that it is going on there already.

    Args:
        address: of the cluster's job server, as ``http://HOST:8265``.
        requirements: let each node install the tested versions first.
        follow: tell what the run says until it ends.
        more_rounds: as ``+2``: add rounds to the run, which must not be going on.
        watched: a folder, as the nodes call it, whose files of prompts make further rounds.

    Raises:
        PrefloopError: for anything a user can mend.
    """
    config, console = load_config(config_file, overrides), Console()
    sent = find_working_dir()
    refuse_what_stays_here(config, config_file, sent)
    if more_rounds is not None:
        parse_addition(more_rounds)
    if watched is not None:
        refuse_unshared("--watch", watched)
    entrypoint = entrypoint_of(sent.name_of(config_file), overrides, more_rounds=more_rounds, watched=watched)
    with reached(address), tempfile.TemporaryDirectory() as aside:
        server = JobServer(address)
        if not config.cluster.allow_unauthenticated:
            server.refuse_unprotected()
        zipped = Path(aside) / "working_dir.zip"
        sent.write_zip(zipped)
        last = server.find_run(config.run.name)
        if last is not None and not last.has_ended:
            _refuse_another(last, entrypoint, address_of(zipped), address)
            job = last
            console.line("", "submit", f"{job.submission_id} is going on already; nothing is sent")
        else:
            if requirements:
                console.line("", "submit", "each node first installs the tested versions (--no-requirements: none)")
            job = server.submit(
                entrypoint,
                run=config.run.name,
                folder=folder_of(config),
                working_dir=zipped,
                stop_wait_s=config.cluster.notice_s + _LAST_WORDS_S,
                requirements=pinned_requirements(CHECKOUT, extras_of(config)) if requirements else (),
            )
            size = f"{zipped.stat().st_size / 1e6:.1f} MB"
            console.line("", "submit", f"{job.submission_id}   {len(sent.files)} files, {size}")
            console.line("", "folder", f"{folder_of(config)}, on the cluster")
        if follow:
            follow_job(server, job, console)
            return
    for command in ("status", "logs --follow", "stop"):
        verb, _, option = command.partition(" ")
        console.text(f"prefloop {verb} {job.submission_id} --address {address} {option}".rstrip())


def entrypoint_of(
    config_name: str, overrides: Sequence[str], *, more_rounds: str | None = None, watched: Path | None = None
) -> str:
    """The command that the cluster's head runs in its copy of the checkout."""
    words = [word for override in (*overrides, "cluster.address=auto") for word in ("--set", override)]
    words += ["--rounds", more_rounds] if more_rounds is not None else []
    words += ["--watch", str(watched)] if watched is not None else []
    return shlex.join(["python", "-m", "pipeline", "run", config_name, *words])


def folder_of(config: Config) -> str:
    """The run's folder, or its address, as the cluster's nodes call it."""
    return place_of_run(config.run.dir, config.run.name)


def extras_of(config: Config) -> list[str]:
    """What a run needs to be installed that most runs do not: a store's library, trackers."""
    return [*(["storage"] if config.address() is not None else []), *config.run.trackers]


def pinned_requirements(root: Path, extras: Sequence[str] = ()) -> list[str]:
    """The tested versions as pip reads them on a node: of what is asked for here, and by constraints of all the rest.

    The CUDA build: pip alone cannot put a CPU build together (see the Makefile's install-cpu). Ray is the node's own.

    Args:
        extras: of the project, beside that build's.
    """
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    optional = project["optional-dependencies"]
    asked = [*project["dependencies"], *(text for extra in ("cuda", *extras) for text in optional[extra])]
    names = [Requirement(text).name for text in asked]
    lines = (root / _CONSTRAINTS).read_text(encoding="utf-8").splitlines()
    pins = {canonicalize_name(line.partition("==")[0]): line for line in lines if "==" in line}
    pinned = [pins.get(canonicalize_name(name), name) for name in names if name != "ray"]
    return [f"--constraint {_ON_THE_NODE}/{_CONSTRAINTS}", *pinned]


def refuse_what_stays_here(config: Config, config_file: Path, sent: WorkingDir) -> None:
    """Refuse a run that needs a file, or writes to a folder, that the cluster's nodes do not see.

    Raises:
        PrefloopError: naming the first.
    """
    if not sent.holds(config_file):
        raise InputError(
            str(config_file),
            wanted=f"a config among the files that are sent: those of {sent.root} that git does not ignore",
            got="one that is not",
            fix=f"put it there, for example into {sent.root / 'configs'}, with the modules and files that it names",
        )
    if not re.match(r"/|[a-z][a-z0-9+]*:/", str(config.run.dir)):
        raise ConfigError(
            f"{config_file}: run.dir",
            wanted="a folder that all nodes share, by its absolute path; a lost head node then loses nothing",
            got=f"{config.run.dir}, which is taken from where a node unpacks the checkout",
            fix="for example --set run.dir=/shared/runs",
        )
    if config.score is not None and config.score.cache is not None:
        refuse_unshared(f"{config_file}: score.cache", config.score.cache)
    for key, name in _names(config.model_dump(mode="json"), ""):
        for here, there in _found_here(key, name, config_file, sent.root):
            if not sent.holds(there) or here.resolve() != there.resolve():
                raise InputError(
                    f"{config_file}: {key}",
                    wanted="a name that means the same on the cluster",
                    got=f"{name}, which is {here} and is not sent",
                    fix="put it into a folder that all nodes share, and name it by its absolute path",
                )


def refuse_unshared(where: str, folder: Path) -> None:
    """Refuse a folder whose path is taken from where a node unpacks the checkout.

    Raises:
        ConfigError: naming `where` it stands.
    """
    if not folder.is_absolute():
        raise ConfigError(
            where,
            wanted="a folder that all nodes share, by its absolute path",
            got=f"{folder}, which is taken from where a node unpacks the checkout",
            fix=f"for example /shared/{folder.name}",
        )


def _found_here(key: str, name: str, config_file: Path, root: Path) -> list[tuple[Path, Path]]:
    """The files or folders behind a name in the config: as they are here, and where the cluster will look for them."""
    words = [word for word in key.split(".") if not word.isdecimal()]
    beside = config_file.absolute().parent
    pairs: list[tuple[Path, Path]] = []
    if Path(name).is_absolute():
        return []
    if words[-1] in ("path", "modules") or (words[-1] == "reference" and is_policy_name(name)):
        pairs = [(Path(name).absolute(), root / name)]
    elif words[-1] == "rubric_file":
        pairs = [(beside / name, beside / name)]
    elif words[-1] in ("target", "loss_type") and ":" in name:
        top = name.partition(":")[0].partition(".")[0]
        pairs = [(place, place) for place in (beside / f"{top}.py", beside / top)]
    return [(here, there) for here, there in pairs if here.exists()]


def _refuse_another(job: Job, entrypoint: str, working_dir: str, address: str) -> None:
    """Refuse a run under the name of one that is going on and is not this one."""
    if (job.entrypoint, job.working_dir) == (entrypoint, working_dir):
        return
    other = f"by {job.entrypoint}" if job.entrypoint != entrypoint else "of a checkout with other files"
    raise StageError(
        job.run,
        wanted="a name under which nothing else is going on there",
        got=f"{job.submission_id}, {other}",
        fix=f"prefloop stop {job.submission_id} --address {address}, or give this run another name: --set run.name=…",
    )


def _names(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """What in a config's plain values may name a file or a module, with its key."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _names(inner, f"{key}.{name}".lstrip("."))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _names(inner, f"{key}.{index}")
    elif isinstance(value, str) and value:
        yield key, value
