"""Parts that several tests share: tiny models of the embedded kind, made once a session."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("shared machine", deadline=None)  # a case may wait for the core that another process holds
settings.load_profile("shared machine")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def small_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def make_small(small_cache: Path):
    """`embedded.make` under the small recipe: a real policy and judge after 30 steps each."""
    from pipeline import embedded, embedded_models

    def make(name: str) -> Path:
        before = os.environ.get("PREFLOOP_CACHE")
        os.environ["PREFLOOP_CACHE"] = str(small_cache)
        try:
            return embedded.make(name, recipe=embedded_models.SMALL)
        finally:
            if before is None:
                del os.environ["PREFLOOP_CACHE"]
            else:
                os.environ["PREFLOOP_CACHE"] = before

    return make


@pytest.fixture(scope="session")
def policy_folder(make_small) -> Path:
    return make_small("reverse")


@pytest.fixture(scope="session")
def judge_folder(make_small) -> Path:
    return make_small("reverse-judge")


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny policy with a brother and a stranger, and prompts."""
    from policy_cases import make_models

    return make_models(tmp_path_factory.mktemp("models"))
