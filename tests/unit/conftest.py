"""A written run that tests may break: written once, a copy for each test. A file may have a `run` of its own."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import written_run


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written_run.write_run(tmp_path_factory.mktemp("written"))


@pytest.fixture
def run(written: Path, tmp_path: Path) -> Path:
    return shutil.copytree(written, tmp_path / "run")
