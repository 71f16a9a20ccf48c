"""The name of a set of weights: a hash of the safetensors files that hold them."""

from __future__ import annotations

import hashlib
from pathlib import Path

from stages.errors import InputError, StageError

_CHUNK_BYTES = 1 << 20
_MEANING = (".json", ".model", ".txt", ".jinja")


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def files_sha256(folder: Path) -> str:
    """A hash of what stands beside the weights and decides what they mean: config, tokenizer, chat template."""
    files = sorted(f for f in folder.iterdir() if f.suffix in _MEANING and f.name != "manifest.json")
    lines = "".join(f"{file_sha256(file)}  {file.name}\n" for file in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def weights_sha256(folder: Path) -> str:
    """The sha256 of a model folder's weights.

    With one safetensors file it is what ``sha256sum`` prints for it; with several, the sha256 of ``sha256sum *``'s
    output lines in order of name.

    Raises:
        InputError: if the folder holds no safetensors file.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise InputError(
            str(folder),
            wanted="a model folder with *.safetensors",
            got="no such file in it",
            fix="save the model again: model.save_pretrained(folder) writes safetensors",
        )
    if len(files) == 1:
        return file_sha256(files[0])
    lines = "".join(f"{file_sha256(file)}  {file.name}\n" for file in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def refuse_changed_weights(folder: Path, sha256: str) -> None:
    """Check that a model folder still holds these weights.

    Raises:
        StageError: if it does not.
    """
    if (got := weights_sha256(folder)) != sha256:
        raise StageError(
            str(folder),
            wanted=f"weights with sha256 {sha256}",
            got=got,
            fix="restore the folder, or start a run of another name",
        )
