"""Experiment trackers: the points of TensorBoard's curves, sent to Weights & Biases and MLflow as well.

The driver sends them, as the training group reports its steps and as rounds are evaluated. Which run over there belongs
to the run is kept in ``trackers.json``, so that a continued run goes on in it. A tracker that fails while a run goes on
is told and left out: no run is lost to it.
"""

from __future__ import annotations

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
from pipeline.tensorboard import evaluation_scalars, step_scalars
from stages.errors import ConfigError

_FILE = "trackers.json"
_PROJECT = "prefloop"


class Tracker(Protocol):
    """One tracker's run."""

    def add(self, kind: str, at: int, scalars: Mapping[str, float]) -> None:
        """Points of `kind`, ``update`` by the step over all rounds or ``evaluation`` by the round."""

    def close(self) -> None: ...


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

    def close(self) -> None:
        """Send what is left."""
        for name in list(self.opened):
            self._or_leave_out(name, lambda tracker: tracker.close())
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
    found = Trackers(console)
    try:
        for name in config.run.trackers:
            found.opened[name] = _open(name, config, folder)
        yield found
    finally:
        found.close()


def _open(name: str, config: Config, folder: Path) -> Tracker:
    try:
        return WandbRun(config, folder) if name == "wandb" else MlflowRun(config, folder)
    except ImportError:
        raise ConfigError(
            "run.trackers",
            wanted=f"{name}, installed",
            got="no such package",
            fix=f"pip install 'prefloop[{name}]', or leave it out",
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


class WandbRun:
    """A run of Weights & Biases, project ``prefloop``; where and how it sends is wandb's environment's business.

    Steps are an axis of their own (``update/step``, ``evaluation/round``), since wandb's own counts calls. Its local
    files lie in the run's folder.
    """

    def __init__(self, config: Config, folder: Path) -> None:
        import wandb

        quiet = wandb.Settings(silent=True, console="off", disable_git=True, save_code=False)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            name=config.run.name,
            id=_kept_id(folder, "wandb", lambda: uuid.uuid4().hex[:8]),
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

    def close(self) -> None:
        self._run.finish()


_AXES = {"update": "step", "evaluation": "round"}


class MlflowRun:
    """A run of MLflow, experiment ``prefloop``: on MLFLOW_TRACKING_URI's server, else in ``RUN/mlruns``.

    A metric's slashes are dots there (``update/log_ratios.chosen.p10``): its store of files keeps a metric as a file,
    and one under another's name would need that to be a folder.
    """

    def __init__(self, config: Config, folder: Path) -> None:
        # MLflow 3 opens a store of plain files only where this says so; a database would want a package more.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or (folder / "mlruns").as_uri())
        self._id = _kept_id(folder, "mlflow", lambda: self._new(config))
        self._client.update_run(self._id, status="RUNNING")

    def _new(self, config: Config) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found is not None else self._client.create_experiment(name)
        run_id: str = self._client.create_run(experiment, run_name=config.run.name).info.run_id
        for key, value in _leaves(config.model_dump(mode="json")):
            self._client.log_param(run_id, key, value)
        return run_id

    def add(self, kind: str, at: int, scalars: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        points = [Metric(f"{kind}/{name.replace('/', '.')}", value, now_ms, at) for name, value in scalars.items()]
        self._client.log_batch(self._id, metrics=points)

    def close(self) -> None:
        self._client.set_terminated(self._id)


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _leaves(inner, f"{key}.{name}".lstrip("."))
    elif isinstance(value, Sequence) and not isinstance(value, str) and any(isinstance(v, Mapping) for v in value):
        for place, inner in enumerate(value):
            yield from _leaves(inner, f"{key}.{place}")
    elif value is not None:
        yield key, value


def _kept_id(folder: Path, name: str, make: Callable[[], str]) -> str:
    """What the run is called over there, made once."""
    file = folder / _FILE
    known = read_json(file) if file.exists() else {}
    if name not in known:
        known[name] = make()
        write_json(file, known)
    return str(known[name])
