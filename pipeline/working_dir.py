"""What a cluster gets of this checkout: Ray's working_dir, as one zip.

In: the checkout that these modules lie in. Out: the files that git tracks or would add, in a zip whose bytes depend on
them alone, so that the same checkout is sent once. Hidden files and links stay here, and so does what no run reads:
tests, pages, benchmarks.
"""

from __future__ import annotations

import os
import subprocess
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from stages.errors import InputError

CHECKOUT = Path(__file__).resolve().parents[1]
MOST_BYTES = 100_000_000  # the cluster's head keeps it in memory, and every node unpacks it
_STAY = ("tests", "docs", "benchmarks", "runs")
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest date that a zip can hold
_EXECUTABLE = 0o100


@dataclass(frozen=True, slots=True)
class WorkingDir:
    """Files to send.

    Attributes:
        root: the folder that they lie in.
        files: below it, sorted, with slashes.
        num_bytes: of all of them, as they are here.
    """

    root: Path
    files: tuple[str, ...]
    num_bytes: int

    def holds(self, path: Path) -> bool:
        """Whether a file, or all that git knows of a folder, is sent: at its place below the root."""
        if not path.resolve().is_relative_to(self.root):
            return False
        name = path.resolve().relative_to(self.root).as_posix()
        return name in self.files or any(file.startswith(f"{name}/") for file in self.files)

    def name_of(self, path: Path) -> str:
        """A file's path below the root, as the cluster will call it."""
        return path.resolve().relative_to(self.root).as_posix()

    def write_zip(self, target: Path) -> None:
        """All files in one zip, the same bytes for the same files."""
        with zipfile.ZipFile(target, "w") as archive:
            for name in self.files:
                runs = (self.root / name).stat().st_mode & _EXECUTABLE
                entry = zipfile.ZipInfo(name, date_time=_EPOCH)
                entry.external_attr = (0o100755 if runs else 0o100644) << 16
                entry.compress_type = zipfile.ZIP_DEFLATED
                archive.writestr(entry, (self.root / name).read_bytes())


def find_working_dir(root: Path = CHECKOUT) -> WorkingDir:
    """The files of a checkout that a run on a cluster needs.

    Raises:
        InputError: if it is no git checkout, or more than a cluster should be sent.
    """
    listed = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        found = subprocess.run(listed, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        told = getattr(error, "stderr", b"") or str(error).encode()
        raise InputError(
            str(root),
            wanted="a git checkout of prefloop, to know what belongs to it",
            got=told.decode(errors="replace").strip().splitlines()[0],
            fix="submit from a clone of its repository (git init && git add . makes one of a bare copy)",
        ) from None
    names = sorted({os.fsdecode(name) for name in found.split(b"\0") if name})
    files = tuple(name for name in names if _goes(name) and (root / name).is_file() and not (root / name).is_symlink())
    sizes = {name: (root / name).stat().st_size for name in files}
    if sum(sizes.values()) > MOST_BYTES:
        largest = sorted(files, key=lambda name: -sizes[name])[:3]
        raise InputError(
            str(root),
            wanted=f"at most {MOST_BYTES / 1e6:,.0f} MB of files to send",
            got=f"{sum(sizes.values()) / 1e6:,.0f} MB; the largest: "
            + ", ".join(f"{name} ({sizes[name] / 1e6:,.0f} MB)" for name in largest),
            fix="put data and models into a folder that all nodes share, or name them in .gitignore",
        )
    return WorkingDir(root.resolve(), files, sum(sizes.values()))


def _goes(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return parts[0] not in _STAY and not any(part.startswith(".") for part in parts)
