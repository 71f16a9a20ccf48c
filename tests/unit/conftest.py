"""Where runs may lie besides a folder: under a folder's address, and on an S3-speaking server."""

from __future__ import annotations

import uuid

import pytest
from s3_server import BUCKET, s3_server


@pytest.fixture(scope="session")
def s3_variables():
    """What the environment of the server's clients has."""
    with s3_server() as variables:
        yield variables


@pytest.fixture(params=["file", pytest.param("s3", marks=pytest.mark.slow)])
def address(request, tmp_path, monkeypatch) -> str:
    """Of a run that is not there yet."""
    if request.param == "file":
        return f"file://{tmp_path}/runs/example"
    for name, value in request.getfixturevalue("s3_variables").items():
        monkeypatch.setenv(name, value)
    return f"s3://{BUCKET}/{uuid.uuid4().hex}/example"
