"""What people deploy with: that it keeps to published schemas, and names only what is there. No cluster is started."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator
from packaging.requirements import Requirement

from pipeline.cli import main
from pipeline.config_file import load_config
from pipeline.secret_words import refuse_secrets
from pipeline.working_dir import find_working_dir

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "cluster" / "deploy"
SCHEMA = json.loads(Path(__file__).with_name("kuberay-1.6.2.json").read_text())
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
KUBERAY = ("raycluster.yaml", "raycluster-gpu.yaml", "rayjob.yaml")
BUILDS = ("cpu", "cuda")
PAGES = ("docs/clusters.md",)


def manifest(name: str) -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / name).read_text())


def cluster_of(found: dict[str, Any]) -> dict[str, Any]:
    return found["spec"] if found["kind"] == "RayCluster" else found["spec"]["rayClusterSpec"]


def pods(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


def instructions(build: str) -> list[tuple[str, str]]:
    """A container file's instructions: name and rest, continued lines joined."""
    text = (DEPLOY / f"Containerfile.{build}").read_text()
    lines = re.sub(r"\\\n", " ", re.sub(r"(?m)^#.*\n", "", text)).splitlines()
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in lines) if name]


@pytest.mark.parametrize("name", KUBERAY)
def test_kuberay_manifests_use_only_what_its_schema_has(name):
    problems = list(Draft202012Validator(SCHEMA).iter_errors(manifest(name)))
    assert not problems, [f"{'.'.join(map(str, each.absolute_path))}: {each.message}" for each in problems]


@pytest.mark.parametrize(
    ("path", "value"),
    [(("spec", "rayVersions"), "2"), (("spec", "authOptions", "mode"), "tokens"), (("metadata", "name"), "Not_A_Name")],
)
def test_the_schema_refuses_a_slip(path, value):
    found = manifest("raycluster.yaml")
    inner = found
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    assert list(Draft202012Validator(SCHEMA).iter_errors(found))


@pytest.mark.parametrize("name", KUBERAY)
def test_clusters_run_the_tested_ray_ask_for_a_token_and_share_a_folder(name):
    cluster = cluster_of(manifest(name))
    ray = next(Requirement(text) for text in PROJECT["dependencies"] if text.startswith("ray["))
    assert f"=={cluster['rayVersion']}" == str(ray.specifier)
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
    claim = manifest("shared-folder.yaml")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    images = set()
    for pod in pods(cluster):
        volumes = {each["name"]: each for each in pod["volumes"]}
        assert volumes["shared"]["persistentVolumeClaim"] == {"claimName": claim["metadata"]["name"]}
        (container,) = pod["containers"]
        mounts = {each["mountPath"]: each["name"] for each in container["volumeMounts"]}
        assert mounts == {"/shared": "shared", "/dev/shm": "memory"} and set(mounts.values()) == set(volumes)
        assert all(each["value"].startswith("/shared/") for each in container["env"] if "value" in each)
        assert container["resources"]["requests"] == container["resources"]["limits"]
        images.add(container["image"])
    (image,) = images
    assert (DEPLOY / f"Containerfile.{image.rpartition(':')[2]}").exists()


@pytest.mark.parametrize("name", KUBERAY)
def test_pods_run_as_the_images_user_without_rights_and_hold_no_secret(name):
    (uid,) = {int(found) for build in BUILDS for found in re.findall(r"useradd .*--uid (\d+)", all_runs(build))}
    for pod in pods(cluster_of(manifest(name))):
        assert pod["securityContext"] == {"runAsNonRoot": True, "runAsUser": uid, "fsGroup": uid}
        assert pod["automountServiceAccountToken"] is False
        assert all(each["securityContext"]["allowPrivilegeEscalation"] is False for each in pod["containers"])
    refuse_secrets({"manifest": (DEPLOY / name).read_text().splitlines()}, file=name)


def all_runs(build: str) -> str:
    return " ".join(rest for name, rest in instructions(build) if name == "RUN")


def test_the_job_runs_a_config_that_is_there_under_the_names_by_which_it_is_found():
    spec = manifest("rayjob.yaml")["spec"]
    words = shlex.split(spec["entrypoint"])
    assert words[:4] == ["python", "-m", "pipeline", "run"]
    sets = [words[index + 1] for index, word in enumerate(words) if word == "--set"]
    config = load_config(ROOT / words[4], sets)
    assert config.cluster.address == "auto"
    assert spec["metadata"] == {"prefloop_run": config.run.name, "prefloop_folder": str(config.folder())}
    constants = (ROOT / "cluster" / "submit.py").read_text()
    assert all(f'"{key}"' in constants for key in spec["metadata"])


@pytest.mark.parametrize("build", BUILDS)
def test_images_are_built_from_pinned_bases_by_make_and_not_run_as_root(build):
    found = instructions(build)
    assert {name for name, _ in found} <= {"FROM", "RUN", "USER", "WORKDIR", "COPY", "ENV", "CMD"}
    base = dict(found)["FROM"]
    assert re.fullmatch(r"docker\.io/[\w./-]+:\d[\w.-]+", base), base
    assert [rest for name, rest in found if name == "USER"][-1] == "prefloop"
    installs = re.findall(r"make (install) BUILD=(\w+)(?: PYTHON=(\S+))?", all_runs(build))
    assert [each[:2] for each in installs] == [("install", build)]
    assert re.search(rf"(?m)^install-{build}:", (ROOT / "Makefile").read_text())
    python = installs[0][2].removeprefix("python") or re.search(r"/python:(\d+\.\d+)", base)[1]
    assert python in ({"3.11"} if build == "cpu" else {"3.11", "3.12"})
    assert json.loads(dict(found)["CMD"])[0] in PROJECT["scripts"]
    refuse_secrets({"file": [rest for _, rest in found]}, file=build)


def test_images_hold_what_installing_needs_and_nothing_hidden():
    rules = (ROOT / ".dockerignore").read_text().split("\n")
    assert {".*", "runs", "tests"} <= set(rules)
    needed = ("Makefile", "pyproject.toml", PROJECT["readme"], "cluster/constraints.txt", "cluster/vllm-cpu.txt")
    for name in (*needed, "configs/quickstart.yaml"):
        assert (ROOT / name).is_file() and not set(Path(name).parts) & set(rules)


def test_the_slurm_script_parses():
    script = DEPLOY / "slurm.sh"
    assert subprocess.run(["bash", "-n", str(script)], capture_output=True).returncode == 0
    assert script.stat().st_mode & 0o111
    if shutil.which("shellcheck") is None:
        pytest.skip("no shellcheck here: apt-get install shellcheck")
    done = subprocess.run(["shellcheck", str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def commands(text: str) -> Iterator[list[str]]:
    """Every call of prefloop in a page's blocks of shell, or in a script."""
    blocks = re.findall(r"(?ms)^```sh\n(.*?)^```", text) or [text]
    for line in re.sub(r"\\\n\s*", " ", "\n".join(blocks)).splitlines():
        line = line.partition(" #")[0].strip()
        if re.match(r"(exec )?(\S*/)?prefloop ", line):
            yield shlex.split(line.removeprefix("exec "))


@pytest.mark.parametrize("page", [*PAGES, "cluster/deploy/slurm.sh"])
def test_the_commands_and_files_that_pages_name_are_there(page):
    text = (ROOT / page).read_text()
    found = list(commands(text))
    assert found
    for _, verb, *words in found:
        options = {option for each in main.commands[verb].params for option in each.opts}
        named = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert named <= options, (verb, named - options)
    for name in set(re.findall(r"\b(?:cluster|configs|docs|pipeline)/[\w./-]+\.\w+", text)) - {"configs/mine.yaml"}:
        assert (ROOT / name).is_file(), name


def test_what_is_deployed_with_goes_along():
    assert all(find_working_dir().holds(file) for file in DEPLOY.iterdir())
