"""Parts that several tests share: tiny models of the embedded kind, made once a session; addresses to put runs at."""

from __future__ import annotations

import os
import uuid
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


@pytest.fixture(scope="session")
def s3_variables():
    """What the environment of clients of an S3-speaking server has."""
    from s3_server import s3_server

    with s3_server() as variables:
        yield variables


@pytest.fixture(params=["file", pytest.param("s3", marks=pytest.mark.slow)])
def address(request, tmp_path, monkeypatch) -> str:
    """Of a run that is not there yet."""
    from s3_server import BUCKET

    if request.param == "file":
        return f"file://{tmp_path}/runs/example"
    for name, value in request.getfixturevalue("s3_variables").items():
        monkeypatch.setenv(name, value)
    return f"s3://{BUCKET}/{uuid.uuid4().hex}/example"
