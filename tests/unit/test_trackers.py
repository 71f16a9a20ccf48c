"""Trackers get TensorBoard's points, offline: read back from W&B's own file and MLflow's own store."""

from __future__ import annotations

import builtins
import json
import shutil
import sys
import time
from pathlib import Path

import pytest
from refusals import refused

from pipeline.config_file import load_config
from pipeline.console import Console
from pipeline.tensorboard import evaluation_scalars
from pipeline.trackers import open_trackers
from stages.errors import ConfigError

FIGURES = {"reward": 1.5, "win_rate": None, "holdout": {"exact_match": 0.25}, "against": {"first": {"win_rate": 0.5}}}


def config(tmp_path, *trackers):
    sets = [f"run.dir={tmp_path}", "run.name=tracked", f"run.trackers=[{','.join(trackers)}]"]
    return load_config(Path("configs/quickstart.yaml"), sets)


class Died(Exception):
    """What ends a run in these tests."""


def track(tmp_path, name, *, losses, died=False):
    """One call's points: steps after four of earlier rounds and, where it does not die before, an evaluation."""
    found = config(tmp_path, name)
    found.folder().mkdir(exist_ok=True)
    with open_trackers(found, found.folder(), Console()) as trackers:
        for step, loss in enumerate(losses, 1):
            curves = {"loss": loss, "log_ratios/chosen": 0.5, "log_ratios/chosen/p10": 0.25}
            trackers.add_step({"round": 2, "step": step, "steps": 3} | curves, steps_before=4)
        if died:
            raise Died
        trackers.add_evaluation(FIGURES, round=2)
    return found.folder()


def track_until_death(tmp_path, name):
    with pytest.raises(Died):
        track(tmp_path, name, losses=[0.7, 0.6], died=True)
    return config(tmp_path, name).folder()


def mlflow_client(folder):
    from mlflow.tracking import MlflowClient

    return MlflowClient((folder / "mlruns").as_uri())


def mlflow_runs(client):
    return client.search_runs([client.get_experiment_by_name("prefloop").experiment_id])


def test_mlflow_keeps_every_point_once_goes_on_in_the_same_run_and_knows_how_it_ended(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = track_until_death(tmp_path, "mlflow")
    (run,) = mlflow_runs(client := mlflow_client(folder))
    assert run.info.status == "FAILED"
    for _ in range(2):
        track(tmp_path, "mlflow", losses=[0.7, 0.6, 0.5])
    (run,) = mlflow_runs(client)
    points = [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "update/loss")]
    assert points == [(5, 0.7), (6, 0.6), (7, 0.5)]
    assert len(client.get_metric_history(run.info.run_id, "evaluation/reward")) == 1
    evaluated = {f"evaluation/{name.replace('/', '.')}" for name in evaluation_scalars(FIGURES)}
    updated = {"update/loss", "update/log_ratios.chosen", "update/log_ratios.chosen.p10"}
    assert run.data.metrics.keys() == evaluated | updated
    assert run.data.params["update.loss_type"] == "minor_dpo" and run.info.status == "FINISHED"


def test_what_mlflow_refuses_leaves_one_run_there_however_often_it_is_tried(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    sets = [f"run.dir={tmp_path}", "run.name=tracked", "run.trackers=[mlflow]", "policy.shapes={'no$name': 1}"]
    found = load_config(Path("configs/quickstart.yaml"), sets)
    found.folder().mkdir()
    for _ in range(2):
        refused(lambda: open_trackers(found, found.folder(), Console()).__enter__(), "run.trackers", kind=ConfigError)
    assert len(mlflow_runs(mlflow_client(found.folder()))) == 1


def test_wandb_offline_keeps_every_point_once_goes_on_in_the_same_run_and_knows_how_it_ended(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = track_until_death(tmp_path, "wandb")
    time.sleep(1.1)  # wandb names its local files by the second
    track(tmp_path, "wandb", losses=[0.7, 0.6, 0.5])
    files = sorted((folder / "wandb").glob("offline-run-*/run-*.wandb"))
    ids = {file.stem.removeprefix("run-") for file in files}
    assert ids == {json.loads((folder / "trackers.json").read_text())["wandb"]["id"]}
    told = ended(files)
    assert [record.exit.exit_code for record in told if record.HasField("exit")] == [1, 0]
    rows = [row(record) for record in told if record.HasField("history")]
    points = [(row["update/step"], row["update/loss"]) for row in rows if "update/loss" in row]
    assert points == [(5, 0.7), (6, 0.6), (7, 0.5)]
    (evaluated,) = [row for row in rows if "evaluation/reward" in row]
    assert evaluated["evaluation/holdout/exact_match"] == 0.25 and evaluated["evaluation/round"] == 2


def ended(files):
    """All that is told of some calls, once each has ended; wandb's own process may still be writing."""
    deadline = time.monotonic() + 20
    while True:
        told = [record for file in files for record in records(file)]
        if sum(record.HasField("exit") for record in told) >= len(files) or time.monotonic() > deadline:
            return told
        time.sleep(0.1)


def row(record):
    """A logged row."""
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}


def records(file):
    """What is in W&B's transaction log: records as LevelDB's log has them, after a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    content, at, parts = file.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if (room := 32768 - at % 32768) < 7:
            at += room
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind not in (1, 4):  # whole, or its last part
            continue
        record = wandb_internal_pb2.Record()
        record.ParseFromString(parts)
        parts = b""
        yield record


def test_no_tracker_is_imported_unless_it_is_asked_for(tmp_path, monkeypatch):
    real = builtins.__import__

    def guarded(name, *more, **named):
        assert name.partition(".")[0] not in ("wandb", "mlflow")
        return real(name, *more, **named)

    monkeypatch.setattr(builtins, "__import__", guarded)
    with open_trackers(config(tmp_path), tmp_path, Console()) as trackers:
        trackers.add_step({"step": 1, "loss": 0.5}, steps_before=0)


def test_a_tracker_that_is_not_installed_is_refused_with_what_installs_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # Python's own word for a module that cannot be imported
    refused(lambda: track(tmp_path, "wandb", losses=[]), "run.trackers", "-e '.[wandb]'", kind=ConfigError)


def test_a_tracker_that_fails_is_told_once_and_left_out(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    found = config(tmp_path, "mlflow")
    found.folder().mkdir()
    with open_trackers(found, found.folder(), Console()) as trackers:
        shutil.rmtree(found.folder() / "mlruns")
        for step in (1, 2):
            trackers.add_step({"step": step, "loss": 0.5}, steps_before=0)
    assert capsys.readouterr().out.count("mlflow gets no further points: ") == 1
