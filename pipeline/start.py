"""From a config file to a running loop: check, find, start Ray, align, tell."""

from __future__ import annotations

import logging
import os
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.errors import ClusterError
from cluster.session import refuse_unless_it_fits, session, set_environment
from pipeline import embedded
from pipeline.config import Config
from pipeline.config_file import load_config
from pipeline.console import Console, Stopwatch, duration
from pipeline.lineage import Lineage
from pipeline.mirror import worker_variables
from pipeline.own_modules import importable
from pipeline.plan.command import refuse_what_cannot_be_held
from pipeline.report import result_table, round_reports, where_things_are
from pipeline.run_folder import following, is_held, next_log_dir, only_run
from pipeline.schedule import add_rounds, parse_addition
from pipeline.sources import ALL, Sources, find_sources, imported_from
from pipeline.trackers import Trackers, open_trackers
from pipeline.watched_files import WatchedFiles, refuse_watched
from pipeline.worker_log import WorkerLog
from stages.errors import ConfigError, PrefloopError
from stages.faults import fault_point

if TYPE_CHECKING:
    from pipeline.workshop import Workshop


def run(
    config_file: Path, overrides: Sequence[str], *, more_rounds: str | None = None, watched: Path | None = None
) -> None:
    """Run a config to its end.

    Args:
        more_rounds: as ``+2``: add rounds to the run, be it finished, interrupted or going on.
        watched: a folder whose files of prompts make further rounds.

    Raises:
        PrefloopError: for anything a user can mend.
        Exception: for anything else, with a note of where its traceback was written.
    """
    config, console, watch = load_config(config_file, overrides), Console(), Stopwatch()
    if watched is not None:
        refuse_watched(config, watched)
    with following(config) as folder:
        if more_rounds is not None and _add_rounds(config, parse_addition(more_rounds), console):
            return
        with only_run(folder), opened(config, folder, console) as shop:
            from pipeline.driver import align
            from pipeline.run import Run

            _announce(shop)
            run = Run(shop, watched=watched.absolute() if watched is not None else None)
            run.prepare()
            align(run)
        console.text()
        console.table(result_table(round_reports(folder)))
        console.text()
        console.text(where_things_are(folder))
    console.text(f"\nthis call took {duration(watch.seconds)}")


def _add_rounds(config: Config, more: int, console: Console) -> bool:
    """Add rounds to a run; whether a process that works on it will do them."""
    folder, going_on = config.folder(), is_held(config.folder())
    if config.pairs is not None:
        raise ConfigError(
            "--rounds",
            wanted="a run that samples its pairs",
            got="ready pairs: nothing new is sampled between rounds",
            fix="--set update.num_train_epochs=2 for more passes",
        )
    num_settled = len(Lineage.read(folder / "run.json").rounds)
    settled = num_settled - WatchedFiles(folder / "watched.json").num_taken(among=num_settled)
    rounds, added = add_rounds(folder, config.num_rounds, more, settled=settled, going_on=going_on)
    told = f"{more} added: {rounds} in all" if added else f"{rounds} in all; the {more} added before are not done yet"
    by_it = "; the run that is going on does them too (should it just be ending, the same command does)"
    console.line("", "rounds", told + (by_it if going_on else ""))
    return going_on


@contextmanager
def opened(config: Config, folder: Path, console: Console, *, needs: Sequence[str] = ALL) -> Iterator[Workshop]:
    """Everything that steps need, for the length of the block: inputs found, Ray up, workers there when asked for.

    Args:
        config: what to do.
        folder: where results and logs go.
        console: where it is told.
        needs: which of the config's names are used, see `find_sources`; not `ALL` of them for a stage by itself, which
            the plan says nothing of and trackers get no points of.
    """
    log_dir = next_log_dir(folder)
    _quiet(log_dir)
    set_environment(config.cluster)
    modules = [config.run.modules.absolute()] if config.run.modules is not None else []
    with importable(config.run.modules), _crash_noted(log_dir):
        sources = _find(config, console, log_dir, needs)
        if needs == ALL:
            _tell_shortages(config, console)
        # From here on Ray is imported.
        from cluster.notices import Notices
        from pipeline.crew import Crew
        from pipeline.engine_sync import EngineSync
        from pipeline.workshop import Workshop

        with (
            open_trackers(config, folder, console) if needs == ALL else nullcontext(Trackers()) as trackers,
            session(
                config.cluster,
                log_dir=log_dir,
                search_path=modules,
                shipped=[path for place in modules for path in shipped_from(place)],
                variables=worker_variables(),
            ) as devices,
        ):
            fault_point("driver.start")
            notices = Notices(config.cluster.notice_s, lambda node: console.line("", "drained", f"node {node[:8]}"))
            worker_log = WorkerLog(log_dir, console)
            crew = Crew(config, devices, log_dir=log_dir, worker_log=worker_log, notices=notices)
            refuse_unless_it_fits(crew.layout.workers)
            with notices.taken(of_nodes=config.cluster.address != "local"):
                yield Workshop(config, sources, crew, console, folder, EngineSync(crew, folder), trackers)
            crew.close()  # after an error, the end of the session ends them too


@contextmanager
def _crash_noted(log_dir: Path) -> Iterator[None]:
    """Keep the traceback of what nobody foresaw, and say where."""
    try:
        yield
    except (PrefloopError, ClusterError):
        raise
    except Exception as error:
        crash = log_dir / "crash.log"
        with suppress(OSError):  # of a full disk
            crash.write_text(traceback.format_exc(), encoding="utf-8")
            error.add_note(f"traceback: {crash}")
        raise


def _tell_shortages(config: Config, console: Console) -> None:
    """Refuse what this machine cannot hold, and name what it might not."""
    for shortage in refuse_what_cannot_be_held(config):
        told = f"{shortage.where} may be too small: {shortage.wanted.splitlines()[0]}; there are {shortage.got}"
        console.line("", "plan", told)


def shipped_from(folder: Path) -> list[Path]:
    """The modules and packages of a folder that this process has imported: reward functions, and what they use."""
    tops = {folder / file.relative_to(folder).parts[0] for file in imported_from(folder)}
    return sorted(path for path in tops if path.suffix == ".py" or (path / "__init__.py").exists())


def _find(config: Config, console: Console, log_dir: Path, needs: Sequence[str]) -> Sources:
    with console.bar("models", total=None) as bar:

        def progress(what: str, done: int, total: int) -> None:
            if done == 1:
                console.line("", "models", f"teaching the embedded {what} once, for all later runs")
            bar.say(f"teaching the {what}")
            bar.at(done, total)

        def maker(name: str) -> Path:
            return embedded.make_aside(name, log=log_dir / "embedded.log", progress=progress)

        return find_sources(config, maker=maker, needs=needs)


def _announce(shop: Workshop) -> None:
    config, devices = shop.config, shop.crew.devices
    nodes = f"{devices.num_nodes} nodes, " if devices.num_nodes > 1 else ""
    there = f"{nodes}{devices.cpus} cores, {devices.gpus or 'no'} GPU{'s' if devices.gpus > 1 else ''}"
    rounds = f"{config.num_rounds} round{'s' * (config.num_rounds != 1)}"
    told = f"{config.run.name}: {rounds} of {config.update.told} on {config.policy.path}   {there}"
    shop.console.line("", "run", told)


def _quiet(log_dir: Path) -> None:
    """Send the libraries' talk in this process to a file; what matters comes back as errors."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.simplefilter("ignore")
    logging.captureWarnings(True)
    logging.basicConfig(filename=log_dir / "driver.log", level=logging.INFO)
