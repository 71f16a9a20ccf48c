"""Trackers get TensorBoard's points, offline: read back from W&B's own file and MLflow's own store."""

from __future__ import annotations

import builtins
import json
import shutil
import sys
import time
from pathlib import Path

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


def track(tmp_path, name, *, losses):
    """One call's points: three steps after four of earlier rounds, and an evaluation."""
    found = config(tmp_path, name)
    found.folder().mkdir(exist_ok=True)
    with open_trackers(found, found.folder(), Console()) as trackers:
        for step, loss in enumerate(losses, 1):
            curves = {"loss": loss, "log_ratios/chosen": 0.5, "log_ratios/chosen/p10": 0.25}
            trackers.add_step({"round": 2, "step": step, "steps": 3} | curves, steps_before=4)
        trackers.add_evaluation(FIGURES, round=2)
    return found.folder()


def test_mlflow_keeps_every_point_at_its_step_and_goes_on_in_the_same_run(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = track(tmp_path, "mlflow", losses=[0.7, 0.6])
    track(tmp_path, "mlflow", losses=[0.7, 0.6, 0.5])
    from mlflow.tracking import MlflowClient

    client = MlflowClient((folder / "mlruns").as_uri())
    experiment = client.get_experiment_by_name("prefloop")
    (run,) = client.search_runs([experiment.experiment_id])
    points = {(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "update/loss")}
    assert points == {(5, 0.7), (6, 0.6), (7, 0.5)}
    evaluated = {f"evaluation/{name.replace('/', '.')}" for name in evaluation_scalars(FIGURES)}
    updated = {"update/loss", "update/log_ratios.chosen", "update/log_ratios.chosen.p10"}
    assert run.data.metrics.keys() == evaluated | updated
    assert run.data.params["update.loss_type"] == "minor_dpo" and run.info.status == "FINISHED"


def test_wandb_offline_keeps_every_point_and_goes_on_in_the_same_run(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = track(tmp_path, "wandb", losses=[0.7, 0.6])
    time.sleep(1.1)  # wandb names its local files by the second
    track(tmp_path, "wandb", losses=[0.7, 0.6, 0.5])
    files = sorted((folder / "wandb").glob("offline-run-*/run-*.wandb"))
    ids = {file.stem.removeprefix("run-") for file in files}
    assert ids == {json.loads((folder / "trackers.json").read_text())["wandb"]}
    rows = [row for file in files for row in history(file)]
    points = {(row["update/step"], row["update/loss"]) for row in rows if "update/loss" in row}
    assert points == {(5, 0.7), (6, 0.6), (7, 0.5)}
    (evaluated, *_) = [row for row in rows if "evaluation/reward" in row]
    assert evaluated["evaluation/holdout/exact_match"] == 0.25 and evaluated["evaluation/round"] == 2


def history(file):
    """The logged rows of W&B's transaction log: records as LevelDB's log has them, after a header of 7 bytes."""
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
        if record.HasField("history"):
            yield {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}


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
    refused(lambda: track(tmp_path, "wandb", losses=[]), "run.trackers", "prefloop[wandb]", kind=ConfigError)


def test_a_tracker_that_fails_is_told_once_and_left_out(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    found = config(tmp_path, "mlflow")
    found.folder().mkdir()
    with open_trackers(found, found.folder(), Console()) as trackers:
        shutil.rmtree(found.folder() / "mlruns")
        for step in (1, 2):
            trackers.add_step({"step": step, "loss": 0.5}, steps_before=0)
    assert capsys.readouterr().out.count("mlflow gets no further points: ") == 1
