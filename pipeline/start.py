"""From a config file to a running loop: check, find, start Ray, align, tell."""

from __future__ import annotations

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path

from cluster.resources import Devices
from cluster.session import refuse_unless_it_fits, session, set_environment
from pipeline import embedded
from pipeline.config import Config, load_config
from pipeline.console import Console, Stopwatch, duration
from pipeline.layout import lay_out
from pipeline.plan import refuse_what_cannot_be_held
from pipeline.report import result_table, round_reports, where_things_are
from pipeline.run_folder import next_log_dir, only_run
from pipeline.sources import Sources, find_sources
from stages.errors import PrefloopError


def run(config_file: Path, overrides: Sequence[str]) -> None:
    """Run a config to its end.

    Raises:
        PrefloopError: for anything a user can mend.
        Exception: for anything else, with a note of where its traceback was written.
    """
    config, console, watch = load_config(config_file, overrides), Console(), Stopwatch()
    folder = config.folder()
    with only_run(folder):
        log_dir = next_log_dir(folder)
        _quiet(log_dir)
        try:
            _align(config, config_file.absolute().parent, log_dir, console)
        except PrefloopError:
            raise
        except Exception as error:
            crash = log_dir / "crash.log"
            crash.write_text(traceback.format_exc(), encoding="utf-8")
            error.add_note(f"traceback: {crash}")
            raise
    console.text()
    console.table(result_table(round_reports(folder)))
    console.text()
    console.text(where_things_are(folder))
    console.text(f"\nthis call took {duration(watch.seconds)}")


def _align(config: Config, beside: Path, log_dir: Path, console: Console) -> None:
    """The run itself; modules of reward functions are looked for `beside` the config first."""
    sys.path.insert(0, str(beside))
    set_environment(config.cluster)
    sources = _find(config, console, log_dir)
    for shortage in refuse_what_cannot_be_held(config):
        told = f"{shortage.where} may be too small: {shortage.wanted.splitlines()[0]}; there are {shortage.got}"
        console.line("", "plan", told)
    # From here on Ray is imported.
    from pipeline.crew import Crew
    from pipeline.driver import align
    from pipeline.run import Run

    with session(config.cluster, log_dir=log_dir, search_path=[beside]) as devices:
        layout = lay_out(config, devices)
        refuse_unless_it_fits(layout.workers)
        crew = Crew(config, sources, layout, log_dir=log_dir)
        _announce(config, devices, console)
        run = Run(config, sources, crew, console)
        run.prepare()
        align(run)
        crew.close()  # after an error, the end of the session ends them too


def _find(config: Config, console: Console, log_dir: Path) -> Sources:
    with console.bar("models", total=None) as bar:

        def progress(what: str, done: int, total: int) -> None:
            if done == 1:
                console.line("", "models", f"teaching the embedded {what} once, for all later runs")
            bar.say(f"teaching the {what}")
            bar.at(done, total)

        def maker(name: str) -> Path:
            return embedded.make_aside(name, log=log_dir / "embedded.log", progress=progress)

        return find_sources(config, maker=maker)


def _announce(config: Config, devices: Devices, console: Console) -> None:
    there = f"{devices.cpus} cores, {devices.gpus or 'no'} GPU{'s' if devices.gpus > 1 else ''}"
    rounds = f"{config.rounds} round{'s' * (config.rounds > 1)}"
    told = f"{config.run.name}: {rounds} of {config.update.loss_type} on {config.policy.path}   {there}"
    console.line("", "run", told)


def _quiet(log_dir: Path) -> None:
    """Send the libraries' talk in this process to a file; what matters comes back as errors."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.simplefilter("ignore")
    logging.captureWarnings(True)
    logging.basicConfig(filename=log_dir / "driver.log", level=logging.INFO)
