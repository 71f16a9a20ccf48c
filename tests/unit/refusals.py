"""What a refusal must hold, wherever it comes from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stages.errors import PrefloopError


def refused(work: Callable[[], Any], *says: str, kind: type[PrefloopError] = PrefloopError) -> PrefloopError:
    """The refusal that `work` ends with: where, wanted, got and fix are said, and each of `says` is in it."""
    with pytest.raises(kind) as caught:
        work()
    error = caught.value
    assert all(part.strip() for part in (error.where, error.wanted, error.got, error.fix)), str(error)
    for word in says:
        assert word in str(error), f"{word!r} is not in\n{error}"
    return error


def refuse_published(folder: Path) -> None:
    """Fail if anything under `folder` counts as a stage's result."""
    assert not list(folder.rglob("manifest.json"))
