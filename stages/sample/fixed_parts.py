"""What of a model folder a running engine cannot change: everything but the numbers.

An engine reads config, tokenizer and EOS tokens when it starts, and only the tensors' values later. Two folders with
equal fixed parts can follow each other in one engine.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stages.pretrained import read_config
from stages.weights import file_sha256

_TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "chat_template*",
)
_NO_MATTER = ("dtype", "torch_dtype", "transformers_version", "_name_or_path")


def fixed_parts(folder: Path) -> dict[str, str]:
    """A hash of each part, by its name.

    The config counts as transformers reads it, without its dtype, so that defaults may be written out or not; of the
    generation config only the EOS tokens count, since answers are sampled by the run's settings.

    Raises:
        InputError: if transformers does not know the config.
    """
    config = read_config(folder).to_dict()
    generation, eos = folder / "generation_config.json", None
    if generation.exists():
        eos = json.loads(generation.read_text(encoding="utf-8")).get("eos_token_id")
    parts = {
        "config.json": _hash({key: value for key, value in config.items() if key not in _NO_MATTER}),
        "the EOS tokens of generation_config.json": _hash(eos),
        "the names and shapes of the weights": _hash(_shapes(folder)),
    }
    files = {file for pattern in _TOKENIZER for file in folder.glob(pattern)}
    return parts | {file.name: file_sha256(file) for file in sorted(files)}


def differing_parts(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """The names of the parts that differ, or that only one of them has."""
    return sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))


def _shapes(folder: Path) -> dict[str, list[int]]:
    from safetensors import safe_open

    shapes: dict[str, list[int]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            shapes |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    return shapes


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
