"""A secret in the environment is in nothing that a run writes: tables, logs, Ray's own, reports, what is printed."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import pytest

pytestmark = pytest.mark.long

NAMES = ("HF_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY", "DATABASE_PASSWORD")
TINY = (
    *("prompts.per_round=32", "prompts.shard_size=32", "sample.num_generations=4", "rounds=1"),
    *("update.global_batch_size=16", "evaluate.num_prompts=32", "run.name=secretive"),
)


def files_with(words: list[bytes], folder: Path) -> list[Path]:
    return [
        file
        for file in folder.rglob("*")
        if file.is_file() and not file.is_symlink() and any(word in file.read_bytes() for word in words)
    ]


def test_a_secret_of_the_environment_is_found_nowhere(prefloop, monkeypatch, tmp_path):
    planted = {name: secrets.token_hex(16) for name in NAMES}
    for name, value in planted.items():
        monkeypatch.setenv(name, value)
    sessions = tmp_path / "ray"
    short = Path(f"/tmp/pl-{os.getpid()}")  # Ray's sockets need a short path
    short.symlink_to(sessions)
    sessions.mkdir()
    monkeypatch.setenv("RAY_TMPDIR", str(short))
    try:
        outcome = prefloop.run(*TINY)
    finally:
        short.unlink()
    assert outcome.code == 0, outcome.err
    words = [value.encode() for value in planted.values()]
    assert not any(value in outcome.out + outcome.err for value in planted.values())
    assert files_with(words, prefloop.runs / "secretive") == []
    assert list(sessions.rglob("*.log")), "Ray wrote its logs there"
    assert files_with(words, sessions) == []
