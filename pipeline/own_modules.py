"""Where a user's own modules lie, with reward functions and objectives in them, and the files of rubrics."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.config import Config
from stages.score.config import FunctionReward, JudgeReward

OURS = ("pipeline", "stages", "cluster")
"""This project's own packages."""


@contextmanager
def importable(folder: Path | None) -> Iterator[None]:
    """Let the modules in a folder, if there is one, be found before all others for the length of the block."""
    if folder is None:
        yield
        return
    place = str(folder.absolute())
    sys.path.insert(0, place)
    try:
        yield
    finally:
        sys.path.remove(place)


def name_own_modules(rounds: Iterable[Config]) -> bool:
    """Whether any round's config names a module or a rubric's file that is not this project's."""
    targets, rubrics = [], []
    for config in rounds:
        targets += own_objectives(config)
        targets += [reward.target for reward in config.rewards if isinstance(reward, FunctionReward)]
        rubrics += [reward.rubric_file for reward in config.rewards if isinstance(reward, JudgeReward)]
    tops = {target.partition(":")[0].partition(".")[0] for target in targets}
    return not tops <= set(OURS) or any(rubrics)


def own_objectives(config: Config) -> list[str]:
    """The import paths of a user's own objectives."""
    return [name for name in config.update.loss_types if ":" in name]
