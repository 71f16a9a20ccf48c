"""A run's jobs in this process, one after another: the same jobs, stages and folders, without Ray.

`HereCrew` stands where a run has its crew. Sampling and training have no place here: they need an engine or a group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.notices import Notices
from pipeline.config_file import load_config
from pipeline.console import Console
from pipeline.crew import BuildRewards, answers_folder
from pipeline.engine_sync import EngineSync
from pipeline.sources import find_sources
from pipeline.workshop import Workshop

QUICKSTART = Path("configs/quickstart.yaml")


@dataclass(frozen=True, slots=True)
class Here:
    """Runs jobs on one state, as a pool or the tasks do."""

    state: Any = None

    def map(self, jobs: Sequence[Callable[[Any], Any]]) -> Iterator[Any]:
        return (job(self.state) for job in jobs)

    def run(self, job: Callable[[Any], Any]) -> Any:
        return job(self.state)


class HereCrew:
    """Tasks and scorers in this process."""

    tasks, notices = Here(), Notices(0.0)

    def scorers(self, config, rewards, *, kept_in) -> Here:
        build = BuildRewards(tuple(rewards), num_threads=1, use_gpu=False, cache=answers_folder(config, kept_in))
        return Here(build())


def workshop(folder: Path, *overrides: str, needs: Sequence[str] = ("policy", "prompts", "rewards")) -> Workshop:
    """What the steps of a run of the quickstart's config share, with some keys overridden."""
    config = load_config(QUICKSTART, [f"run.dir={folder.parent}", f"run.name={folder.name}", *overrides])
    crew = HereCrew()
    return Workshop(config, find_sources(config, needs=needs), crew, Console(), folder, EngineSync(crew, folder))
