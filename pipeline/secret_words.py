"""No password, token or key in a config: it would go on into the run's folder, its report, and whoever gets a copy.

Found by what they look like, and by what the environment holds under a secret's name. What is found is never repeated.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from stages.errors import ConfigError

_SECRET_NAME = re.compile(r"(?i)(^|[_.-])(token|secret|passw(or)?d|pwd|credentials?|(api|access|private|auth)_?key)$")
_SHAPES = {
    "a password in an address": re.compile(r"\b[a-z][a-z0-9+.-]*://[^/\s:@]*:[^/\s@]+@"),
    "a Hugging Face token": re.compile(r"\bhf_[A-Za-z0-9]{20,}"),
    "an API key": re.compile(r"\b(sk|rk|pk|xox[abp]|gh[pousr]|glpat)[-_][A-Za-z0-9_-]{16,}"),
    "an AWS access key": re.compile(r"\b(AKIA|ASIA)[A-Z0-9]{16}\b"),
    "a private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
}
_SHORTEST = 8  # characters; a shorter value of the environment may be an ordinary word
_NO_SECRETS = {"pad_token", "pwd"}  # a key of a config, and the shell's name for the folder it works in


def refuse_secrets(values: Mapping[str, Any], *, file: str) -> None:
    """Check a config's plain values.

    Raises:
        ConfigError: naming the first key whose value is a secret, without the value.
    """
    for key, value in _texts(values, ""):
        name = key.rpartition(".")[2]
        found = next((what for what, shape in _SHAPES.items() if shape.search(value)), None)
        if found is None and (variable := _variable_with(value)) is not None:
            found = f"the value of the environment's {variable}"
        if found is None and _names_secret(name) and value:
            found = "a value under a secret's name"
        if found is not None:
            raise ConfigError(
                f"{file}: {key}",
                wanted="no secret, since the config is kept in the run's folder",
                got=f"{found} (not shown)",
                fix="leave it in the environment: the hub's token as HF_TOKEN, Ray's as RAY_AUTH_TOKEN",
            )


def _texts(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """Every text in some plain values, keys too, with where it stands."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            if isinstance(name, str) and any(shape.search(name) for shape in _SHAPES.values()):
                yield f"{key}.(a key)".lstrip("."), name
            else:
                yield from _texts(inner, f"{key}.{name}".lstrip("."))
    elif isinstance(value, list | tuple):
        for place, inner in enumerate(value):
            yield from _texts(inner, f"{key}.{place}".lstrip("."))
    elif isinstance(value, str):
        yield key, value


def _variable_with(text: str) -> str | None:
    """The environment's secret that a text contains."""
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and value in text and _names_secret(name):
            return name
    return None


def _names_secret(name: str) -> bool:
    return _SECRET_NAME.search(name) is not None and name.lower() not in _NO_SECRETS
