"""No password, token or key in a config: it would go on into the run's folder, its report, and whoever gets a copy.

Found by what they look like, by the names that they stand under, and by what the environment holds under such names:
no proof that there is none. What is found is never repeated.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from stages.errors import ConfigError

_WORD = r"(token|secret|passw(or)?d|pass|passphrase|pwd|pat|jwt|credentials?|connection_?string|(\w+_)?key|apikey)"
_SECRET_NAME = re.compile(rf"(?i)(^|[_.-]){_WORD}(_?\d+)?$")
_SHAPES = {
    "a password in an address": re.compile(r"\b[a-z][a-z0-9+.-]*://[^/\s@]+@"),
    "a token in an address": re.compile(rf"(?i)[?&]([\w-]+[_-])?(sig|signature|{_WORD})=[^&\s]{{4,}}"),
    "a Hugging Face token": re.compile(r"\bhf_[A-Za-z0-9]{20,}"),
    "an API key": re.compile(
        r"\b(sk|rk|pk|xox[a-z]|gh[pousr]|github_pat|glpat)[-_][A-Za-z0-9_-]{16,}|\bAIza[\w-]{30,}"
    ),
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
    for key, value, is_under_secret in _texts(values, ""):
        found = next((what for what, shape in _SHAPES.items() if shape.search(value)), None)
        if found is None and (variable := _variable_with(value)) is not None:
            found = f"the value of the environment's {variable}"
        if found is None and is_under_secret and value:
            found = "a value under a secret's name"
        if found is not None:
            raise ConfigError(
                f"{file}: {key}",
                wanted="no secret, since the config is kept in the run's folder",
                got=f"{found} (not shown)",
                fix="leave it in the environment: the hub's token as HF_TOKEN, Ray's as RAY_AUTH_TOKEN, a reward "
                "server's under the name that its token_env gives",
            )


def _texts(value: Any, key: str, is_under_secret: bool = False) -> Iterator[tuple[str, str, bool]]:
    """Every text in some plain values, keys and numbers too: where it stands, and whether under a secret's name."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            if _is_secret(str(name)):
                yield f"{key}.(a key)".lstrip("."), str(name), is_under_secret
            else:
                is_secret = is_under_secret or _names_secret(str(name))
                yield from _texts(inner, f"{key}.{name}".lstrip("."), is_secret)
    elif isinstance(value, list | tuple):
        for place, inner in enumerate(value):
            yield from _texts(inner, f"{key}.{place}".lstrip("."), is_under_secret)
    elif value is not None and not isinstance(value, bool):
        yield key, str(value), is_under_secret


def _is_secret(text: str) -> bool:
    return any(shape.search(text) for shape in _SHAPES.values()) or _variable_with(text) is not None


def _variable_with(text: str) -> str | None:
    """The environment's secret that a text contains."""
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and value in text and _names_secret(name):
            return name
    return None


def _names_secret(name: str) -> bool:
    return _SECRET_NAME.search(name) is not None and name.lower() not in _NO_SECRETS
