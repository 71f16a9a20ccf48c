"""What a cluster is sent, and what is refused before anything is: real git checkouts, no cluster."""

from __future__ import annotations

import shlex
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from refusals import refused

from cluster.errors import Unreachable
from cluster.submit import Job, JobServer
from pipeline.config_file import load_config
from pipeline.remote import show_jobs
from pipeline.submit import (
    entrypoint_of,
    extras_of,
    folder_of,
    pinned_requirements,
    refuse_what_stays_here,
    submit,
)
from pipeline.working_dir import CHECKOUT, MOST_BYTES, find_working_dir

TOLD_AND_GONE = """
import os
import sys
from aiohttp import web

async def version(request):
    return web.json_response({"version": "4", "ray_version": "2.60.0", "ray_commit": "", "session_name": ""})

async def tail(request):
    socket = web.WebSocketResponse()
    await socket.prepare(request)
    await socket.send_str("a line\\n")
    os._exit(9)

app = web.Application()
app.add_routes([web.get("/api/version", version), web.get("/api/jobs/mine:1/logs/tail", tail)])
web.run_app(app, host="127.0.0.1", port=int(sys.argv[1]), print=lambda _: print(flush=True))
"""
"""A job server that is lost as soon as it has told a line of a job."""

CONFIG = """
policy: {path: "embedded:reverse"}
prompts: {path: "embedded:reverse-prompts"}
score: {rewards: [{type: model, path: "embedded:reverse-judge"}]}
"""


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A git repository with a file of each kind."""
    root = tmp_path / "checkout"
    for name in ("pipeline/cli.py", "configs/mine.yaml", "tests/test_a.py", "runs/a/run.json", ".env", "data/big.bin"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(CONFIG if name.endswith(".yaml") else name)
    (root / ".gitignore").write_text("data/\n*.log\n")
    subprocess.run(["git", "init", "--quiet", str(root)], check=True)
    subprocess.run(["git", "-C", str(root), "add", "pipeline", "tests", ".gitignore"], check=True)
    return root


def test_what_git_knows_or_would_add_is_sent_but_no_hidden_file_no_test_and_no_run(checkout):
    sent = find_working_dir(checkout)
    assert sent.files == ("configs/mine.yaml", "pipeline/cli.py")
    assert sent.num_bytes == sum((checkout / name).stat().st_size for name in sent.files)
    (checkout / "pipeline/cli.py").unlink()
    assert find_working_dir(checkout).files == ("configs/mine.yaml",)


def test_the_same_files_make_the_same_zip_and_others_another(checkout, tmp_path):
    def zipped(name: str) -> bytes:
        find_working_dir(checkout).write_zip(tmp_path / name)
        return (tmp_path / name).read_bytes()

    first = zipped("first.zip")
    (checkout / "pipeline/cli.py").touch()
    (checkout / "new.log").write_text("ignored")
    assert zipped("second.zip") == first
    (checkout / "pipeline/new.py").write_text("")
    assert zipped("third.zip") != first
    with zipfile.ZipFile(tmp_path / "third.zip") as archive:
        assert archive.read("pipeline/cli.py") == b"pipeline/cli.py"


def test_too_much_to_send_is_refused_with_the_largest_files(checkout):
    with (checkout / "weights.safetensors").open("wb") as file:
        file.truncate(MOST_BYTES + 1)
    refused(lambda: find_working_dir(checkout), "weights.safetensors", "100 MB", ".gitignore")


def test_a_folder_that_is_no_checkout_is_refused(tmp_path):
    refused(lambda: find_working_dir(tmp_path), "git")


def test_this_checkout_is_small_and_holds_what_a_run_needs():
    sent = find_working_dir()
    assert all(
        sent.holds(CHECKOUT / name) for name in ("configs/quickstart.yaml", "stages/sample", "cluster/submit.py")
    )
    assert not sent.holds(CHECKOUT / "tests") and not sent.holds(CHECKOUT.parent)
    assert sent.num_bytes < 5_000_000


def test_the_entrypoint_is_the_same_command_on_the_clusters_own_ray():
    overrides = ('prompts.system=it\'s "quoted"; rm -rf $HOME', "cluster.address=local")
    words = shlex.split(entrypoint_of("configs/mine.yaml", overrides))
    assert words[:5] == ["python", "-m", "pipeline", "run", "configs/mine.yaml"]
    assert words[5:] == ["--set", overrides[0], "--set", overrides[1], "--set", "cluster.address=auto"]
    more = shlex.split(entrypoint_of("configs/mine.yaml", (), more_rounds="+2", watched=Path("/shared/new prompts")))
    assert more[5:] == ["--set", "cluster.address=auto", "--rounds", "+2", "--watch", "/shared/new prompts"]


def test_the_folder_is_told_as_the_nodes_call_it():
    quickstart = CHECKOUT / "configs" / "quickstart.yaml"
    for where in ("/shared/runs", "/shared/runs/"):
        assert folder_of(load_config(quickstart, [f"run.dir={where}"])) == "/shared/runs/quickstart"


def test_requirements_are_pinned_to_the_tested_set_and_leave_ray_to_the_node():
    constraint, *pinned = pinned_requirements(CHECKOUT)
    assert constraint.endswith("/cluster/constraints.txt")
    found = {Requirement(line).name: str(Requirement(line).specifier) for line in pinned}
    assert all(version.startswith("==") for version in found.values()), found
    assert found["torch"] == "==2.13.0" and found["vllm"] == "==0.32.0" and "ray" not in found


def test_a_run_at_an_address_or_with_trackers_has_their_libraries_installed_too():
    quickstart, plain = CHECKOUT / "configs" / "quickstart.yaml", pinned_requirements(CHECKOUT)
    assert pinned_requirements(CHECKOUT, extras_of(load_config(quickstart, ["run.dir=/shared/runs"]))) == plain
    config = load_config(quickstart, ["run.dir=s3://bucket/runs", "run.trackers=[mlflow]"])
    more = [Requirement(line) for line in pinned_requirements(CHECKOUT, extras_of(config)) if line not in plain]
    assert [each.name for each in more] == ["obstore", "mlflow-skinny"] and all(
        "==" in str(each.specifier) for each in more
    )


@pytest.mark.parametrize(
    ("config", "beside", "says"),
    [
        ("run: {dir: runs}", (), ("run.dir", "--set run.dir=/shared/runs")),
        ("prompts: {path: data/big.bin}", (), ("prompts.path", "data/big.bin")),
        ("policy: {path: ../elsewhere}", (), ("policy.path", "elsewhere")),
        ('score: {rewards: [{type: function, target: "my.mine:polite"}]}', ("my.log",), ()),
        ('score: {rewards: [{type: function, target: "mine:polite"}]}', ("mine.py",), ("target", "mine.py")),
        ("evaluate: {path: pipeline/cli.py}", (), ()),
        ("run: {dir: s3://bucket/runs}", (), ()),
        ("policy: {path: /shared/model}", (), ()),
        ("score: {cache: answers, rewards: [{type: model, path: org/judge}]}", (), ("score.cache", "/shared/answers")),
        ("score: {cache: /shared/answers, rewards: [{type: model, path: org/judge}]}", (), ()),
        ("policy: {path: org/model}", (), ()),
    ],
)
def test_what_the_nodes_would_not_see_is_refused(checkout, monkeypatch, config, beside, says):
    (checkout.parent / "elsewhere").mkdir()
    (checkout / ".gitignore").write_text("data/\n*.log\nmine.py\n")
    for name in beside:
        (checkout / "configs" / name).write_text("")
    section = config.partition(":")[0]
    kept = [line for line in CONFIG.strip().splitlines() if not line.startswith(section)]
    kept += [config] if section == "run" else [config, "run: {dir: /shared/runs}"]
    file = checkout / "configs" / "mine.yaml"
    file.write_text("\n".join(kept))
    monkeypatch.chdir(checkout)
    loaded, sent = load_config(file), find_working_dir(checkout)
    if says:
        refused(lambda: refuse_what_stays_here(loaded, file, sent), *says)
    else:
        refuse_what_stays_here(loaded, file, sent)


@pytest.mark.parametrize(
    ("more", "says"),
    [({"watched": Path("new")}, ("--watch", "/shared/new")), ({"more_rounds": "two"}, ("--rounds", "+2"))],
)
def test_what_is_asked_of_a_run_beside_its_config_is_refused_before_it_is_sent(more, says):
    sets, quickstart = ("run.dir=/shared/runs",), CHECKOUT / "configs" / "quickstart.yaml"
    nowhere = {"address": "http://127.0.0.1:9", "requirements": False, "follow": False}
    refused(lambda: submit(quickstart, sets, **nowhere, **more), *says)


def test_a_config_that_is_not_sent_is_refused(checkout):
    file = checkout.parent / "mine.yaml"
    file.write_text(CONFIG + "run: {dir: /shared/runs}\n")
    refused(lambda: refuse_what_stays_here(load_config(file), file, find_working_dir(checkout)), "mine.yaml", "git")


def test_a_name_that_means_another_file_from_here_is_refused(checkout, monkeypatch):
    """A relative path is taken from the working folder: here the caller's, on the cluster the checkout's root."""
    (checkout / "configs" / "pipeline").mkdir()
    (checkout / "configs" / "pipeline" / "cli.py").write_text("another")
    file = checkout / "configs" / "mine.yaml"
    file.write_text(CONFIG + "evaluate: {path: pipeline/cli.py}\nrun: {dir: /shared/runs}\n")
    monkeypatch.chdir(checkout / "configs")
    refused(lambda: refuse_what_stays_here(load_config(file), file, find_working_dir(checkout)), "evaluate.path")


@pytest.mark.parametrize("address", ["10.0.0.1:8265", "ray://10.0.0.1:10001", "auto", "http://me:word@host:8265"])
def test_an_address_that_is_none_of_a_job_server_is_refused(address):
    refused(lambda: show_jobs(address, None), "--address", "http://HOST:8265")


def test_where_nobody_listens_is_said_at_once():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
        refused(lambda: show_jobs(address, "mine"), address, "refused", "RAY_AUTH_TOKEN")
        sets = ("run.dir=/shared/runs",)
        quickstart = CHECKOUT / "configs" / "quickstart.yaml"
        refused(lambda: submit(quickstart, sets, address=address, requirements=False, follow=False), "refused")


@pytest.mark.slow
def test_a_job_is_followed_no_longer_once_its_server_is_gone_for_good():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with subprocess.Popen([sys.executable, "-c", TOLD_AND_GONE, str(port)], stdout=subprocess.PIPE) as gone:
        gone.stdout.readline()  # it listens
        server, told = JobServer(f"http://127.0.0.1:{port}"), []
        job = Job("mine:1", "mine", "", "RUNNING", "", "", "", None, None, None)
        with pytest.raises(Unreachable):
            server.follow(job, told.append, most_failures=1)
    assert told == ["a line\n"]
