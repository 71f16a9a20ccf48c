"""What a reward function is, as far as fingerprints go; what is looked for before anything is made."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from refusals import refused

from pipeline import embedded
from pipeline.config import Config
from pipeline.config_file import load_config
from pipeline.sources import find_sources


def rewarded(target):
    return Config.model_validate(
        {
            "run": {"name": "x"},
            "policy": {"path": "nowhere"},
            "prompts": {"path": "nowhere.jsonl"},
            "score": {"rewards": [{"type": "function", "target": target}]},
        }
    )


def sha256(folder, monkeypatch, helper):
    """Of a reward function whose module imports `helper` beside it, in a fresh import of both."""
    (folder / "rewards_here.py").write_text("import helper_here\n\ndef f(prompts, completions, **c): return [0.0]\n")
    (folder / "helper_here.py").write_text(helper)
    monkeypatch.syspath_prepend(str(folder))
    for name in ("rewards_here", "helper_here"):
        sys.modules.pop(name, None)
    (found,) = find_sources(rewarded("rewards_here:f"), needs=("rewards",)).of(1).rewards
    return found.sha256


def test_a_changed_helper_makes_another_reward(tmp_path, monkeypatch):
    first = sha256(tmp_path, monkeypatch, "LIMIT = 1\n")
    assert sha256(tmp_path, monkeypatch, "LIMIT = 1\n") == first
    assert sha256(tmp_path, monkeypatch, "LIMIT = 22\n") != first


@pytest.mark.parametrize(
    "key",
    ["policy.path", "reference", "prompts.path", "evaluate.path", "score.rewards.0.path", "score.rewards.1.target"],
)
def test_no_model_is_taught_for_a_config_that_is_refused(key, tmp_path, monkeypatch):
    monkeypatch.setenv("PREFLOOP_CACHE", str(tmp_path))
    value = "no.module:f" if key.endswith("target") else "/no/such"
    config = load_config(Path("configs/quickstart.yaml"), [f"{key}={value}"])
    refused(lambda: find_sources(config, maker=embedded.make), key if not key.endswith("target") else "no.module")
    assert not [made for made in tmp_path.rglob("*") if made.is_dir() and made.name.startswith("reverse")]
