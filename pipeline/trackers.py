"""Experiment trackers: the points of TensorBoard's curves, sent to Weights & Biases and MLflow as well.

The driver sends them, as the training group reports its steps and as rounds are evaluated. Which run over there belongs
to the run, and which points it has, is kept in ``trackers.json``: a continued run goes on in it, and sends no point a
second time, also where the step or the evaluation was made again. A tracker that fails while a run goes on is told and
left out: no run is lost to it.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pipeline.config import Config
from pipeline.console import Console
from pipeline.files import read_json, write_json
from pipeline.mirror import keep
from pipeline.tensorboard import evaluation_scalars, step_scalars
from stages.errors import ConfigError

_FILE = "trackers.json"
_PROJECT = "prefloop"


class Tracker(Protocol):
    """One tracker's run."""

    def add(self, kind: str, at: int, scalars: Mapping[str, float]) -> None:
        """Points of `kind`, ``update`` by the step over all rounds or ``evaluation`` by the round."""

    def close(self, *, ended_well: bool) -> None:
        """Send what is left, and say how the run ended."""


@dataclass(slots=True)
class Trackers:
    """The trackers of a run; none by default."""

    console: Console | None = None
    opened: dict[str, Tracker] = field(default_factory=dict)

    def add_step(self, metrics: Mapping[str, float], *, steps_before: int) -> None:
        """The metrics of an optimizer step, as in ``metrics.jsonl``."""
        self._add("update", steps_before + int(metrics["step"]), step_scalars(metrics))

    def add_evaluation(self, figures: Mapping[str, Any], *, round: int) -> None:
        """The figures of a round's evaluation."""
        self._add("evaluation", round, evaluation_scalars(figures))

    def close(self, *, ended_well: bool) -> None:
        """Send what is left, and say how the run ended."""
        for name in list(self.opened):
            self._or_leave_out(name, lambda tracker: tracker.close(ended_well=ended_well))
        self.opened.clear()

    def _add(self, kind: str, at: int, scalars: Mapping[str, float]) -> None:
        for name in list(self.opened):
            self._or_leave_out(name, lambda tracker: tracker.add(kind, at, scalars))

    def _or_leave_out(self, name: str, work: Callable[[Tracker], None]) -> None:
        try:
            work(self.opened[name])
        except Exception as error:  # a server that is gone, a full disk over there
            del self.opened[name]
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            if self.console is not None:
                self.console.line("", "tracker", f"{name} gets no further points: {reason}")


@contextmanager
def open_trackers(config: Config, folder: Path, console: Console) -> Iterator[Trackers]:
    """The trackers that a config names, for the length of the block.

    Raises:
        ConfigError: if one is not installed, or takes no points from here.
    """
    found, ended_well = Trackers(console), False
    try:
        for name in config.run.trackers:
            found.opened[name] = _open(name, config, folder)
        yield found
        ended_well = True
    finally:
        found.close(ended_well=ended_well)


def _open(name: str, config: Config, folder: Path) -> Tracker:
    kept = _Kept(folder / _FILE, name)
    try:
        return _Once(WandbRun(config, folder, kept) if name == "wandb" else MlflowRun(config, folder, kept), kept)
    except ImportError:
        raise ConfigError(
            "run.trackers",
            wanted=f"{name}, installed",
            got="no such package",
            fix=f".venv/bin/pip install -e '.[{name}]' in the checkout, or leave it out",
        ) from None
    except Exception as error:
        raise ConfigError(
            "run.trackers",
            wanted=f"{name}, ready to take points",
            got=(str(error).splitlines() or [type(error).__name__])[0],
            fix=_FIXES[name],
        ) from None


_FIXES = {
    "wandb": "wandb login, or keep the points here: WANDB_MODE=offline",
    "mlflow": "set MLFLOW_TRACKING_URI to a server that answers, or unset it for a store in the run's folder",
}


@dataclass(frozen=True, slots=True)
class _Kept:
    """What the run keeps of a tracker's run: what it is called over there, and the last point of each kind it was sent.

    Attributes:
        file: of all trackers.
        name: of this one.
    """

    file: Path
    name: str

    def id(self, make: Callable[[], str]) -> str:
        """What the run is called over there, made once."""
        known = self._read()
        if self.name not in known:
            known[self.name] = {"id": make()}
            write_json(self.file, known)
        return str(known[self.name]["id"])

    def is_first(self, kind: str, at: int) -> bool:
        """Whether a point was not sent yet; from now on it counts as sent."""
        known = self._read()
        if at <= known[self.name].get(kind, -1):
            return False
        known[self.name][kind] = at
        scratch = self.file.with_name(f".{self.file.name}")
        scratch.write_text(json.dumps(known), encoding="utf-8")
        scratch.replace(self.file)  # unsynced, and not on a run's store at once: there may be many steps a second
        return True

    def keep(self) -> None:
        """Have it in the run's store too; on another node, what came after the last time is sent again."""
        keep(self.file)

    def _read(self) -> dict[str, dict[str, Any]]:
        return read_json(self.file) if self.file.exists() else {}


@dataclass(frozen=True, slots=True)
class _Once:
    """A tracker's run that gets no point twice."""

    tracker: Tracker
    kept: _Kept

    def add(self, kind: str, at: int, scalars: Mapping[str, float]) -> None:
        if self.kept.is_first(kind, at):
            self.tracker.add(kind, at, scalars)
        if kind == "evaluation":
            self.kept.keep()

    def close(self, *, ended_well: bool) -> None:
        self.tracker.close(ended_well=ended_well)
        self.kept.keep()


class WandbRun:
    """A run of Weights & Biases, project ``prefloop``; where and how it sends is wandb's environment's business.

    Steps are an axis of their own (``update/step``, ``evaluation/round``), since wandb's own counts calls. Its local
    files lie in the run's folder.
    """

    def __init__(self, config: Config, folder: Path, kept: _Kept) -> None:
        import wandb

        quiet = wandb.Settings(silent=True, console="off", disable_git=True, save_code=False)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            name=config.run.name,
            id=kept.id(lambda: uuid.uuid4().hex[:8]),
            resume="allow",
            dir=str(folder),
            config=config.model_dump(mode="json"),
            settings=quiet,
        )
        for kind, axis in _AXES.items():
            self._run.define_metric(f"{kind}/{axis}")
            self._run.define_metric(f"{kind}/*", step_metric=f"{kind}/{axis}")

    def add(self, kind: str, at: int, scalars: Mapping[str, float]) -> None:
        self._run.log({f"{kind}/{name}": value for name, value in scalars.items()} | {f"{kind}/{_AXES[kind]}": at})

    def close(self, *, ended_well: bool) -> None:
        self._run.finish(exit_code=0 if ended_well else 1)


_AXES = {"update": "step", "evaluation": "round"}


class MlflowRun:
    """A run of MLflow, experiment ``prefloop``: on MLFLOW_TRACKING_URI's server, else in ``RUN/mlruns``.

    A metric's slashes are dots there (``update/log_ratios.chosen.p10``): its store of files keeps a metric as a file,
    and one under another's name would need that to be a folder.
    """

    def __init__(self, config: Config, folder: Path, kept: _Kept) -> None:
        # MLflow 3 opens a store of plain files only where this says so; a database would want a package more.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or (folder / "mlruns").as_uri())
        self._id = kept.id(lambda: self._new(config))
        self._client.update_run(self._id, status="RUNNING")
        known = self._client.get_run(self._id).data.params
        for key, value in _leaves(config.model_dump(mode="json")):
            if key not in known:  # it refuses another value, such as of rounds that were added
                self._client.log_param(self._id, key, value)

    def _new(self, config: Config) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found is not None else self._client.create_experiment(name)
        return str(self._client.create_run(experiment, run_name=config.run.name).info.run_id)

    def add(self, kind: str, at: int, scalars: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        points = [Metric(f"{kind}/{name.replace('/', '.')}", value, now_ms, at) for name, value in scalars.items()]
        self._client.log_batch(self._id, metrics=points)

    def close(self, *, ended_well: bool) -> None:
        self._client.set_terminated(self._id, status="FINISHED" if ended_well else "FAILED")


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _leaves(inner, f"{key}.{name}".lstrip("."))
    elif isinstance(value, Sequence) and not isinstance(value, str) and any(isinstance(v, Mapping) for v in value):
        for place, inner in enumerate(value):
            yield from _leaves(inner, f"{key}.{place}")
    elif value is not None:
        yield key, value
