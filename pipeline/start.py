"""From a config file to a running loop: check, find, start Ray, align, tell."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

from cluster.session import Devices, session
from pipeline import embedded
from pipeline.config import Config, load_config
from pipeline.console import Console, Stopwatch, duration
from pipeline.crew import Crew
from pipeline.driver import align
from pipeline.plan import Sources, find_sources, lay_out
from pipeline.report import result_table, round_reports, where_things_are
from pipeline.run import Run, next_log_dir, only_run, write_config
from stages.protocols import Weights


def run(config_file: Path, overrides: Sequence[str]) -> Weights:
    """Run a config to its end; the aligned policy.

    Raises:
        PrefloopError: for anything a user can mend.
    """
    config, console, watch = load_config(config_file, overrides), Console(), Stopwatch()
    folder = config.folder()
    with only_run(folder):
        log_dir = next_log_dir(folder)
        _quiet(log_dir)
        sources = _find(config, console, log_dir)
        with session(config.cluster, log_dir=log_dir) as devices:
            crew = Crew(config, sources, lay_out(config, devices), folder=folder, log_dir=log_dir)
            try:
                _announce(config, devices, console)
                aligned = Run(config, sources, crew, console)
                aligned.prepare()
                write_config(config)
                result = align(aligned)
            finally:
                crew.close()
    console.text()
    console.table(result_table(round_reports(folder)))
    console.text()
    console.text(where_things_are(folder))
    console.text(f"\n{config.rounds} rounds in {duration(watch.seconds)}")
    return result


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
    told = f"{config.run.name}: {config.rounds} rounds of {config.update.loss_type} on {config.policy.path}   {there}"
    console.line("", "run", told)


def _quiet(log_dir: Path) -> None:
    """Send the libraries' talk in this process to a file; what matters comes back as errors."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.simplefilter("ignore")
    logging.captureWarnings(True)
    logging.basicConfig(filename=log_dir / "driver.log", level=logging.INFO)
