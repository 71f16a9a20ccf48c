"""How tables are published: shards and manifests.

A stage's folder holds ``part-*.parquet``, an entry for each of them in ``_shards/``, and, once all are there, a
``manifest.json``. A part counts once its entry is published; a folder without a manifest is unfinished and its
published parts stand. Files are written under another name, synced and renamed; nothing relies on renaming a folder.
A retried shard that finds its entry published leaves it alone.
"""

from __future__ import annotations

import fcntl
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.entries import Entry
from pipeline.files import read_json, read_vouched, replacing, write_json, write_vouched
from pipeline.fingerprints import differing_fields, refuse_other_fingerprint
from pipeline.mirror import AlreadyThere, fetch, obtain, remove, sizes
from pipeline.row_groups import ROWS_A_GROUP, take_rows
from stages.contracts import Contract
from stages.errors import ContractError, StageError
from stages.weights import file_sha256

MANIFEST = "manifest.json"
_FINGERPRINT = "fingerprint.json"
_REFUSED = "refused.json"
_SHARDS = "_shards"
_RESTORE = "restore the file, or start a run of another name: --set run.name=…"


@dataclass(frozen=True, slots=True)
class StageFolder:
    """Where one stage's tables lie."""

    path: Path
    contract: Contract

    # ---- the driver's side ------------------------------------------------------------------------------------------

    def begin(self, fingerprint: Mapping[str, Any]) -> None:
        """Claim the folder for a result made from `fingerprint`.

        A claim without a published part, or on a result that was refused, gives way to another. Parts that nobody
        claimed are what is left of a removal, and go.

        Raises:
            FingerprintError: if it holds parts of another result.
        """
        claim, refused = self.path / _FINGERPRINT, self.path / _REFUSED
        if not claim.exists():
            self._drop_parts()
        elif not differing_fields(read_json(claim), fingerprint):
            if refused.exists():
                remove(refused)
            return
        elif refused.exists():
            self.drop()
        elif self.entries():
            refuse_other_fingerprint(self.path, read_json(claim), fingerprint)
        write_json(claim, fingerprint)

    def refuse(self, reason: str) -> None:
        """Note that nothing can be built on this result: it stays to be looked at until it is made in another way."""
        write_json(self.path / _REFUSED, {"reason": reason})
        remove(self.path / MANIFEST)

    def claimed(self) -> dict[str, Any]:
        """What the folder's result is made from; empty where nobody claimed it."""
        claim = self.path / _FINGERPRINT
        return read_json(claim) if claim.exists() else {}

    def drop(self) -> None:
        """Remove the folder with all that is in it.

        The claim goes last: however much is left of a removal, it never looks like another result's parts.
        """
        if self.path.exists():
            self._drop_parts()
            remove(self.path / _REFUSED)
            remove(self.path)

    def _drop_parts(self) -> None:
        """Remove what is published: first what says that it is whole, then what vouches for it, then the parts."""
        remove(self.path / MANIFEST)
        remove(self.path / _SHARDS)
        for name in sizes(self.path):
            if name.startswith("part-"):
                remove(self.path / name)

    def is_closed(self) -> bool:
        return (self.path / MANIFEST).exists()

    def missing(self, num_shards: int) -> list[int]:
        """The shards that are not published yet."""
        self._obtain_entries()
        return [shard for shard in range(num_shards) if not self._entry_file(shard).exists()]

    def close(self, num_shards: int) -> list[Entry]:
        """Write the manifest, unless it says the same already; the entries that it holds.

        Raises:
            StageError: if a shard is missing.
        """
        if missing := self.missing(num_shards):
            raise StageError(
                str(self.path), wanted=f"{num_shards} shards", got=f"{missing[0]} is missing", fix="run again"
            )
        entries = [Entry.read(self._entry_file(shard)) for shard in range(num_shards)]
        manifest = {
            "contract": self.contract.name,
            "version": self.contract.version,
            "rows": sum(entry.rows for entry in entries),
            "fingerprint": read_json(self.path / _FINGERPRINT),
            "shards": [asdict(entry) for entry in entries],
        }
        with suppress(ContractError):  # one that was changed is written anew, as its parts are
            if self.is_closed() and self._manifest() == manifest:
                return entries
        write_vouched(self.path / MANIFEST, manifest)
        return entries

    def _manifest(self) -> dict[str, Any]:
        return read_vouched(self.path / MANIFEST, "a stage's manifest", fix=_RESTORE)

    def entries(self) -> list[Entry]:
        """Every published part, in order."""
        return [Entry.read(file) for file in self._entry_files()]

    def _obtain_entries(self) -> None:
        """Have here what workers on other nodes published; where the manifest is here, all entries are."""
        if not self.is_closed():
            obtain(self.path / _SHARDS)

    def _entry_files(self) -> list[Path]:
        self._obtain_entries()
        return sorted((self.path / _SHARDS).glob("part-*.json"))

    def num_parts(self) -> int:
        """How many parts are published."""
        self._obtain_entries()
        return sum(1 for _ in (self.path / _SHARDS).glob("part-*.json"))

    def digest(self) -> str:
        """A hash of the published parts' hashes: what a result made from them goes by."""
        return hashlib.sha256("".join(entry.sha256 for entry in self.entries()).encode()).hexdigest()

    def claim(self) -> str:
        """A hash of what the folder's result is made from: known before its parts are."""
        return hashlib.sha256((self.path / _FINGERPRINT).read_bytes()).hexdigest()

    def drop_stale(self, sources: Sequence[StageFolder]) -> None:
        """Take back the parts that were made from others than `sources` hold now, or are about to make again."""
        for entry in self.entries():
            made_from = (source.entry_or_none(entry.shard) for source in sources)
            if not all(found is not None and found.sha256 in entry.parents for found in made_from):
                self._take_back(self._entry_file(entry.shard))

    def drop_damaged(self, look: Damages | None = None) -> list[str]:
        """Take back the parts that are not as they were published, to be made again; a line for each finding.

        Args:
            look: finds them; None: `damages`, here and now.
        """
        published = [int(file.stem.removeprefix("part-")) for file in self._entry_files()]
        found = (look or StageFolder.damages)(self, published)
        for shard, _ in found:
            self._take_back(self._entry_file(shard))
        return [damage for _, damage in found]

    def damages(self, shards: Sequence[int]) -> list[tuple[int, str]]:
        """Of published parts, those that are not as they were published, and what is wrong with each."""
        found = ((shard, self._damage(self._entry_file(shard))) for shard in shards)
        return [(shard, damage) for shard, damage in found if damage]

    def _take_back(self, entry_file: Path) -> None:
        """The manifest goes first: none is left that names a part which is to be made again."""
        remove(self.path / MANIFEST)
        remove(entry_file)

    def _damage(self, entry_file: Path) -> str:
        """What is wrong with a published part; nothing where it is whole."""
        try:
            entry = Entry.read(entry_file)
        except ContractError:
            return f"{entry_file} was changed"
        file, got = self.path / entry.file, self._sha256(entry)
        if got is None:
            return f"{file} is gone"
        length = file.stat().st_size
        if length != entry.bytes:
            return f"{file} has {length:,} of {entry.bytes:,} bytes"
        return "" if got == entry.sha256 else f"{file} was changed"

    def refuse_changed(self) -> None:
        """Check that a closed folder still holds what its manifest says, each part in its full length.

        Raises:
            ContractError: naming the first file that is missing, was changed or differs.
        """
        manifest, lengths = self.path / MANIFEST, sizes(self.path)
        if not manifest.exists():
            raise _not_as_settled(manifest, "the manifest, as published", "no such file")
        for wanted in self._manifest()["shards"]:
            file, entry = self.path / wanted["file"], self._entry_file(wanted["shard"])
            if not entry.exists() or asdict(Entry.read(entry)) != wanted:
                got = "another" if entry.exists() else "no such file"
                raise _not_as_settled(entry, "the entry, as in the manifest", got)
            length = lengths.get(file.name)
            if length != wanted["bytes"]:
                got = "no such file" if length is None else f"{length} bytes"
                raise _not_as_settled(file, f"{wanted['bytes']} bytes, as published", got)

    # ---- a worker's side --------------------------------------------------------------------------------------------

    def entry(self, shard: int) -> Entry:
        fetch(self._entry_file(shard))
        return Entry.read(self._entry_file(shard))

    def entry_or_none(self, shard: int) -> Entry | None:
        """A part's entry, if it is published."""
        fetch(self._entry_file(shard))
        return Entry.read(self._entry_file(shard)) if self._entry_file(shard).exists() else None

    def publish(
        self,
        shard: int,
        table: pa.Table,
        *,
        parents: Sequence[Entry] = (),
        drops: Sequence[Mapping[str, Any]] = (),
        stats: Mapping[str, float] | None = None,
    ) -> Entry:
        """Write a part and then its entry; if the entry is there already, leave both alone and return it.

        Raises:
            ContractError: if the table does not keep the contract.
        """
        name = f"part-{shard:05d}.parquet"
        self.contract.check(table, where=f"{self.path.name}/{name}")
        with self._publishing(shard):
            if (done := self.entry_or_none(shard)) is not None:
                return done
            with replacing(self.path / name) as scratch:
                pq.write_table(table, scratch, compression="zstd", row_group_size=ROWS_A_GROUP)
            entry = Entry(
                shard,
                name,
                file_sha256(self.path / name),
                (self.path / name).stat().st_size,
                table.num_rows,
                self.contract.name,
                self.contract.version,
                [parent.sha256 for parent in parents],
                [dict(drop) for drop in drops],
                dict(stats or {}),
            )
            try:
                entry.write(self._entry_file(shard))
            except AlreadyThere:  # a twin on another node
                return self.entry(shard)
            return entry

    def read(self, shard: int) -> pa.Table:
        """A published part, its bytes checked against its entry and its table against the contract.

        Raises:
            ContractError: if the file is missing, differs from its entry or breaks the contract.
        """
        file = self._checked(shard)
        return self.contract.check(pq.read_table(file), where=str(file))

    def slices(self, shard: int, num_rows: int) -> Iterator[pa.Table]:
        """A published part's rows in order, so many at a time; checked as `read` does."""
        file = self._checked(shard)
        with pq.ParquetFile(file) as part:
            for batch in part.iter_batches(num_rows):
                yield self.contract.check(pa.Table.from_batches([batch]), where=str(file))

    def read_rows(self, shard: int, rows: Sequence[int]) -> pa.Table:
        """Some rows of a published part by their numbers, in their order; checked as `read` does.

        However large the part is, memory is needed for a group of its rows (`ROWS_A_GROUP`) and for those asked for.
        """
        file = self._checked(shard)
        return self.contract.check(take_rows(file, rows), where=str(file))

    def _checked(self, shard: int) -> Path:
        """A published part's file, as it was published under the contract of today."""
        entry = self.entry(shard)
        file, got = self.path / entry.file, self._sha256(entry)
        if got != entry.sha256:
            raise self._not_as_published(entry, f"sha256 {entry.sha256}, as published", got or "no such file")
        if entry.version != self.contract.version:
            raise ContractError(
                str(file),
                wanted=f"{self.contract.name} version {self.contract.version}",
                got=f"version {entry.version}",
                fix="finish the run with the release that began it, or start another run",
            )
        return file

    def read_all(self) -> Iterator[pa.Table]:
        """Every published part's table, in order."""
        for entry in self.entries():
            yield self.read(entry.shard)

    def _sha256(self, entry: Entry) -> str | None:
        """Of a part's file as it is; one that is missing here, or was changed, is brought from the run's store."""
        file = self.path / entry.file
        got = file_sha256(file) if file.exists() else None
        if got != entry.sha256:
            fetch(file, anew=True)
            got = file_sha256(file) if file.exists() else None
        return got

    def _not_as_published(self, entry: Entry, wanted: str, got: str) -> ContractError:
        return ContractError(
            str(self.path / entry.file),
            wanted=wanted,
            got=got,
            fix="restore the file; or, to make it anew, delete "
            f"{self._entry_file(entry.shard)} and {self.path / MANIFEST} and run again",
        )

    def _entry_file(self, shard: int) -> Path:
        return self.path / _SHARDS / f"part-{shard:05d}.json"

    @contextmanager
    def _publishing(self, shard: int) -> Iterator[None]:
        """One publisher of a shard at a time, so that a slow twin cannot overwrite what was published."""
        (self.path / _SHARDS).mkdir(parents=True, exist_ok=True)
        lock = self.path / _SHARDS / f".part-{shard:05d}.lock"
        with lock.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
            lock.unlink(missing_ok=True)


Damages = Callable[[StageFolder, Sequence[int]], Sequence[tuple[int, str]]]
"""As `StageFolder.damages`."""


def _not_as_settled(file: Path, wanted: str, got: str) -> ContractError:
    """Of a settled round, whose result later ones were made from: nothing of it is made anew."""
    return ContractError(str(file), wanted=wanted, got=got, fix=_RESTORE)
