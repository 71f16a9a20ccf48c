"""What the doctor says of this machine, and of parts that are broken on purpose."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models
from here import QUICKSTART
from reward_servers import Fault, serving

from cluster.config import ClusterConfig
from pipeline.config_file import load_config
from pipeline.doctor import machine
from pipeline.doctor.command import examined
from pipeline.doctor.finding import looked_at

ROOT = Path(__file__).parents[2]
LOCAL = ClusterConfig()


def bad(check):
    """What a check finds bad, and its fix."""
    (finding,) = looked_at({"part": check})
    assert finding.state == "bad" and finding.found and finding.fix, finding
    return f"{finding.found} {finding.fix}"


# ---- the machine ----------------------------------------------------------------------------------------------------


def test_this_machine_passes(tmp_path):
    checks = {
        "versions": machine.versions,
        "devices": lambda: machine.devices(LOCAL),
        "compiler": machine.compiler,
        "ports": lambda: machine.ports(LOCAL),
        "disk": lambda: machine.disk(tmp_path / "not" / "there", needed=1000),
    }
    assert [f for f in looked_at(checks) if f.state != "good"] == []
    assert not list(tmp_path.iterdir())


def test_no_compiler_no_ninja_and_a_compiler_that_builds_nothing(tmp_path, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "apt-get install g++" in bad(machine.compiler)
    liar = tmp_path / "c++"
    liar.write_text("#!/bin/sh\necho 'try.cpp:2:10: fatal error: Python.h: No such file' >&2\nexit 1\n")
    liar.chmod(0o755)
    assert "python3-dev" in bad(machine.compiler)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no-such-compiler" in bad(machine.compiler)


def test_other_versions_than_the_tested_ones_are_named_with_them(tmp_path):
    pins = tmp_path / "pyproject.toml"
    text = (ROOT / "pyproject.toml").read_text()
    pins.write_text(text.replace('"deepspeed==0.19.8"', '"deepspeed==0.0.1", "no-such-package>=2"'))
    told = bad(lambda: machine.versions(pins))
    assert "tested: deepspeed==0.0.1" in told and "no-such-package is missing" in told and "torch" not in told
    pins.write_text(text.replace('requires-python = ">=3.11,<3.13"', 'requires-python = "<3"'))
    assert "Python 3" in bad(lambda: machine.versions(pins))


def test_more_gpus_than_there_are(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "cluster.devices=0" in bad(lambda: machine.devices(ClusterConfig(devices=3)))


def test_a_cluster_that_is_not_there():
    with serving() as served:
        address = served.url.removeprefix("http://")
        assert "is reached" in machine.ports(ClusterConfig(address=address))
    assert "address=local" in bad(lambda: machine.ports(ClusterConfig(address=address)))
    assert "address=local" in bad(lambda: machine.ports(ClusterConfig(address="ray://head:port")))


@pytest.mark.parametrize("folder", ["/proc/runs", "/dev/null/runs"])
def test_a_folder_that_cannot_be_written(folder):
    assert "run.dir" in bad(lambda: machine.disk(Path(folder), needed=None))


def test_a_disk_that_is_too_small(tmp_path):
    assert "another disk" in bad(lambda: machine.disk(tmp_path, needed=1 << 62))


def test_a_full_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=500k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("no right to mount a small disk")
    try:
        assert "make room there" in bad(lambda: machine.disk(disk, needed=1))
    finally:
        subprocess.run(["umount", disk], check=True)


# ---- what a config names --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return tiny_models.policy("qwen3", tmp_path_factory.mktemp("models") / "qwen3")


def lines(folder, policy, reward, *sets, rows=({"prompt": "one two three", "answer": "four"},) * 3):
    """The findings on a config with one reward, by their parts."""
    numbered = [{**row, "number": at} for at, row in enumerate(rows)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in numbered))
    given = (
        f"policy.path={policy}",
        f"prompts.path={folder / 'prompts.jsonl'}",
        f"run.dir={folder / 'runs'}",
        "evaluate=null",
        f"score.rewards={json.dumps([{'name': 'mine', **reward}])}",
        *sets,
    )
    return {finding.part: finding for finding in examined(load_config(QUICKSTART, given), deep=False)}


def function(name):
    return {"type": "function", "target": f"{__name__}:{name}"}


def fair(prompts, completions, **columns):
    return [float(len(completion)) for completion in completions]


def of_its_batch(prompts, completions, **columns):
    return [float(len(completions))] * len(completions)


def nothing(prompts, completions, **columns):
    return [None] * len(completions)


def test_what_a_config_names_passes(tmp_path, policy):
    found = lines(tmp_path, policy, function("fair"))
    assert {part: f.state for part, f in found.items() if part in ("tokenizer", "reward mine", "results")} == {
        "tokenizer": "good",
        "reward mine": "good",
        "results": "good",
    }
    assert found["engine, trainer"].state == "left out"


def test_a_broken_template_comes_out_red_with_its_fix(tmp_path, policy):
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in policy.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    (broken / "chat_template.jinja").write_text("{% for message in messages %}{{ message.content }}")
    found = lines(tmp_path, broken, function("fair"), "prompts.to_chat=true")
    assert found["tokenizer"].state == "bad" and "template" in found["tokenizer"].found and found["tokenizer"].fix


def test_a_policy_without_its_tokenizer_and_a_broken_row(tmp_path, policy):
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in policy.iterdir():
        if "token" not in file.name:
            (bare / file.name).write_bytes(file.read_bytes())
    assert lines(tmp_path, bare, function("fair"))["tokenizer"].state == "bad"
    found = lines(tmp_path, policy, function("fair"), rows=({"prompt": ""},))
    assert found["tokenizer"].state == "bad" and "prompts.jsonl" in found["tokenizer"].found


@pytest.mark.parametrize(
    ("reward", "says"), [("of_its_batch", "padding"), ("nothing", "no number for 3 of 3"), ("nowhere", "spelling")]
)
def test_a_reward_that_depends_on_its_batch_or_gives_none(tmp_path, policy, reward, says):
    finding = lines(tmp_path, policy, function(reward))["reward mine"]
    assert finding.state == "bad" and says in f"{finding.found} {finding.fix}"


def test_reward_models_and_servers_are_asked_in_a_batch_and_alone(tmp_path, policy):
    judge = tiny_models.judge("gpt2", tmp_path / "judge")
    pad = tiny_models.KINDS["gpt2"].pad_token
    found = lines(tmp_path, policy, {"type": "model", "path": str(judge), "pad_token": pad})["reward mine"]
    assert found.state == "good", found
    with serving() as served:
        asked = {"type": "http", "url": served.url + "/get_reward", "retries": 0}
        assert lines(tmp_path, policy, asked)["reward mine"].state == "good"
        assert [len(body["query"]) for body in served.asked] == [3, 1, 1, 1]
        served.faults = [Fault(status=401)]
        assert "token_env" in lines(tmp_path, policy, asked)["reward mine"].fix
    assert "no connection" in lines(tmp_path, policy, asked)["reward mine"].found


# ---- the command ----------------------------------------------------------------------------------------------------


def doctor(*words, **variables):
    command = [sys.executable, "-m", "pipeline", "doctor", *words]
    return subprocess.run(command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True)


@pytest.mark.slow
def test_the_commands_status_is_that_of_its_table(tmp_path):
    done = doctor()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "red" not in done.stdout.split() and "versions" in done.stdout
    broken = doctor(CXX="no-such-compiler")
    assert broken.returncode == 1 and "fix: apt-get install g++" in broken.stdout
    assert "compiler" in broken.stderr and "no red line" in broken.stderr
    assert doctor("--deep").returncode == 2
    assert doctor(str(tmp_path / "none.yaml")).returncode == 2


def test_a_check_that_breaks_is_a_finding():
    def broken():
        raise RuntimeError("the driver is gone\nmore")

    assert "RuntimeError: the driver is gone" in bad(broken)


@pytest.mark.slow
def test_engine_and_trainer_agree_on_the_embedded_policy():
    found = {f.part: f for f in examined(load_config(QUICKSTART), deep=True)}
    assert found["engine, trainer"].state == "good", found["engine, trainer"]
