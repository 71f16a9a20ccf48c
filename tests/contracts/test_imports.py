"""The layers: who may import whom, and what the light parts do without."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "vllm", "ray", "deepspeed", "transformers")


def test_layers_are_kept():
    result = subprocess.run(
        [str(Path(sys.executable).with_name("lint-imports"))], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    "work",
    [
        "from pipeline.cli import main; main(['--help'], standalone_mode=False)",
        "import pathlib, pipeline.config_file as c; c.load_config(pathlib.Path('configs/quickstart.yaml'))",
        "import stages.contracts, stages.protocols, stages.errors",
        "from pipeline.cli import main; main(['doctor', '--help'], standalone_mode=False)",
        "import pipeline.submit, pipeline.remote",
        "from pipeline.status import show_status; from pipeline.report import show_page; "
        "import pipeline.compare, pipeline.trace",
        "import pipeline.fork, pipeline.live_view, pipeline.model_export, pipeline.export, pipeline.trackers",
        "from pathlib import Path; from pipeline.plan.command import show_plan; "
        "show_plan(Path('configs/quickstart.yaml'), ['rounds=2'], devices='8x80GB', in_json=False)",
    ],
)
def test_light_parts_import_no_heavy_library(work):
    check = f"{work}; import sys; found = [m for m in {HEAVY} if m in sys.modules]; assert not found, found"
    result = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_package_files_re_export_nothing():
    for file in ROOT.glob("*/**/__init__.py"):
        if file.relative_to(ROOT).parts[0] in ("pipeline", "stages", "cluster"):
            assert "import" not in file.read_text().split('"""')[-1]
