"""Many tensors in a folder of safetensors, written and read a few at a time, so that nobody holds them all at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

FILE_BYTES = 2 * 2**30
_PATTERN = "tensors-*.safetensors"


def write_tensors(folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], *, file_bytes: int = FILE_BYTES) -> None:
    """Write tensors by name, in as many files as their bytes ask for.

    The tensors are gone through to their end even where a file cannot be written: others may be gathering them too.

    Raises:
        OSError: if a file cannot be written.
    """
    left = iter(tensors)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for number, part in enumerate(_parts(left, file_bytes)):
            save_file(part, folder / _PATTERN.replace("*", f"{number:05d}"))
    except SafetensorError as error:
        raise OSError(f"{folder}: {error}") from error
    finally:
        for _ in left:
            pass


def _parts(tensors: Iterator[tuple[str, torch.Tensor]], file_bytes: int) -> Iterator[dict[str, torch.Tensor]]:
    part: dict[str, torch.Tensor] = {}
    num_bytes = 0
    for name, tensor in tensors:
        part[name] = tensor.detach().cpu().contiguous()
        num_bytes += tensor.nbytes
        if num_bytes >= file_bytes:
            yield part
            part, num_bytes = {}, 0
    if part:
        yield part


class TensorFiles(Mapping[str, torch.Tensor]):
    """What `write_tensors` wrote, each tensor read when it is asked for.

    Args:
        prefix: only the tensors whose names begin with it, by the rest of their names.
    """

    def __init__(self, folder: Path, *, prefix: str = "") -> None:
        self._prefix = prefix
        self._files: dict[str, Path] = {}
        for file in sorted(folder.glob(_PATTERN)):
            with safe_open(file, framework="pt") as opened:
                self._files |= {name: file for name in opened.keys() if name.startswith(prefix)}  # noqa: SIM118

    def __getitem__(self, name: str) -> torch.Tensor:
        with safe_open(self._files[self._prefix + name], framework="pt") as opened:
            return opened.get_tensor(self._prefix + name)  # type: ignore[no-any-return]

    def __iter__(self) -> Iterator[str]:
        return (name.removeprefix(self._prefix) for name in self._files)

    def __len__(self) -> int:
        return len(self._files)
