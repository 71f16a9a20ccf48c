"""A folder on an object store, by its address: whole files put and got, conditions kept, errors in words.

`s3://bucket/prefix`, `gs://…`, `az://…`, or `file:///a/folder` on a disk that all nodes see. A put is one request, or a
multipart upload that counts at its end: whoever is killed while he uploads leaves nothing that a reader could take for
a file. Keys and rights come from the environment, as every tool of the store finds them; nothing of them is kept.
"""

from __future__ import annotations

import fcntl
import os
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

from pipeline.addresses import SCHEMES
from stages.errors import InputError, StageError

_PIECE_BYTES = 16 << 20  # of one request, which has a time limit; S3 takes 10,000 pieces a file
_AT_ONCE = 4  # pieces, held in memory
_LOCK = ".lock"  # on a disk


@dataclass(frozen=True, slots=True)
class Found:
    """A file on the store: its length, and the tag that changes with its content."""

    bytes: int
    tag: str


class Store:
    """What lies under one address; keys are relative paths with ``/``.

    Args:
        address: with its scheme.
        patience_s: how long a request is tried again where the store does not answer.

    Raises:
        InputError: if nothing is known of such an address, or the library for it is missing.
    """

    def __init__(self, address: str, *, patience_s: float = 180.0) -> None:
        self.address = address.rstrip("/")
        self._scheme = address.partition("://")[0]
        self._store = _opened(self.address, patience_s)

    def put(self, key: str, content: Path | bytes) -> str:
        """Put a file there, in the place of what was; its tag."""
        return str(self._put(key, content)["e_tag"])

    def create(self, key: str, content: Path | bytes) -> str | None:
        """Put a file where there is none; its tag, or None if there is one."""
        from obstore.exceptions import AlreadyExistsError

        try:
            return str(self._put(key, content, mode="create")["e_tag"])
        except AlreadyExistsError:
            return None

    def swap(self, key: str, content: bytes, tag: str) -> str | None:
        """Put a file in the place of the one with this tag; its own tag, or None if there is none or another."""
        import obstore
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        if self._scheme == "file":
            return self._swapped_on_disk(key, content, tag)
        wanted = {"e_tag": tag}
        if self._scheme == "gs":  # it goes by the version that belongs to the tag
            found = self._head(key)
            if found is None or found["e_tag"] != tag:
                return None
            wanted["version"] = found["version"]
        with self._in_words(key):
            try:
                return str(obstore.put(self._store, key, content, mode=wanted)["e_tag"])  # type: ignore[arg-type]
            except (PreconditionError, AlreadyExistsError, FileNotFoundError):
                return None

    def read(self, key: str) -> tuple[bytes, str] | None:
        """A small file's content and its tag; None if there is none."""
        import obstore

        with self._in_words(key):
            try:
                found = obstore.get(self._store, key)
                return bytes(found.bytes()), str(found.meta["e_tag"])
            except FileNotFoundError:
                return None

    def get(self, key: str, target: Path, found: Found | None = None) -> str | None:
        """Write a file's content to `target`; its tag, or None if there is none.

        Args:
            found: what is known of it already; it may be another by now.
        """
        found = found or self.find(key)
        while found is not None and not self._got(key, target, found):
            found = self.find(key)
        return None if found is None else found.tag

    def _got(self, key: str, target: Path, found: Found) -> bool:
        """Write a file's content piece by piece; whether it was this very one up to the end."""
        import obstore
        from obstore.exceptions import PreconditionError

        with target.open("wb") as file, self._in_words(key):
            try:
                for start in range(0, found.bytes, _PIECE_BYTES):
                    piece = (start, min(found.bytes, start + _PIECE_BYTES))
                    got = obstore.get(self._store, key, options={"range": piece, "if_match": found.tag})
                    file.write(got.bytes())
            except (FileNotFoundError, PreconditionError):
                return False
        return True

    def find(self, key: str) -> Found | None:
        """What is known of a file; None if there is none."""
        found = self._head(key)
        return None if found is None else Found(found["size"], str(found["e_tag"]))

    def list(self, folder: str = "") -> dict[str, Found]:
        """All files below a folder, by their keys."""
        import obstore

        with self._in_words(folder):
            found = obstore.list(self._store, folder or None).collect()
        return {str(each["path"]): Found(each["size"], str(each["e_tag"])) for each in found if each["path"] != _LOCK}

    def delete(self, keys: Collection[str]) -> None:
        """Remove files; those that are gone are passed over."""
        import obstore

        for key in keys:  # one after another: what vouches for others is named first
            with self._in_words(key), suppress(FileNotFoundError):
                obstore.delete(self._store, key)

    def refuse_unconditional(self) -> None:
        """Check that the store keeps conditions: one that overlooks them would let two drivers write.

        Raises:
            StageError: if it does not.
        """
        key = f".conditions-{uuid.uuid4().hex[:8]}"
        try:
            first = self.create(key, b"1")
            kept = first is not None and self.create(key, b"2") is None and self.swap(key, b"3", _other(first)) is None
            kept = kept and self.swap(key, b"4", str(first)) is not None
        finally:
            self.delete([key])
        if not kept:
            raise StageError(
                self.address,
                wanted="a store that keeps conditions on a put (If-None-Match, If-Match)",
                got="one that put a file in spite of them",
                fix="a newer release of the store, or another one; or a run on a shared disk: --set run.dir=FOLDER",
            )

    def _put(self, key: str, content: Path | bytes, **options: Any) -> Any:
        import obstore

        with self._in_words(key):
            return obstore.put(self._store, key, content, chunk_size=_PIECE_BYTES, max_concurrency=_AT_ONCE, **options)

    def _head(self, key: str) -> Any:
        import obstore

        with self._in_words(key):
            try:
                return obstore.head(self._store, key)
            except FileNotFoundError:
                return None

    def _swapped_on_disk(self, key: str, content: bytes, tag: str) -> str | None:
        """A disk knows no condition on a put: a lock stands for it."""
        try:
            with (Path(self.address.removeprefix("file://")) / _LOCK).open("w") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                found = self.find(key)
                return self.put(key, content) if found is not None and found.tag == tag else None
        except OSError as error:
            raise self._refusal(key, error) from None

    @contextmanager
    def _in_words(self, key: str) -> Iterator[None]:
        """Errors of the store as one that a person can act on.

        Raises:
            StageError: for any of them but those that answer a condition.
        """
        from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError

        try:
            yield
        except (AlreadyExistsError, PreconditionError):
            raise
        except (BaseError, FileNotFoundError, PermissionError, TimeoutError) as error:
            raise self._refusal(key, error) from None

    def _refusal(self, key: str, error: Exception) -> StageError:
        return StageError(
            f"{self.address}/{key}",
            wanted="a store that answers, and rights to read and write there",
            got=next(iter(str(error).splitlines()), type(error).__name__)[:300],
            fix="check the address, the store's variables (AWS_ACCESS_KEY_ID, AWS_REGION, AWS_ENDPOINT_URL, …) and the "
            "network; the same command carries on",
        )


def _other(tag: str | None) -> str:
    """A tag of the same form that no content has."""
    return '"' + "0" * 32 + '"' if tag != '"' + "0" * 32 + '"' else '"' + "1" * 32 + '"'


@lru_cache(maxsize=16)
def opened(address: str) -> Store:
    """The store of an address, one for the whole process."""
    return Store(address)


def _opened(address: str, patience_s: float) -> Any:
    scheme, _, rest = address.partition("://")
    if scheme not in SCHEMES or not rest:
        raise InputError(
            address,
            wanted=f"an address that begins with {', '.join(f'{known}://' for known in SCHEMES)}, or a folder",
            got=address,
            fix="for example s3://bucket/runs",
        )
    try:
        from obstore.store import LocalStore, from_url
    except ImportError:
        raise InputError(
            address,
            wanted="the library that speaks to object stores",
            got="it is not installed",
            fix=".venv/bin/pip install -e '.[storage]' in the checkout",
        ) from None
    if scheme == "file":
        return LocalStore(rest, mkdir=True)
    # Without TLS only where the environment says so itself, as for a store on this machine.
    endpoint = next((os.environ[name] for name in _ENDPOINTS if os.environ.get(name)), "")
    client = {"allow_http": endpoint.startswith("http://"), "timeout": timedelta(seconds=min(60.0, patience_s))}
    make: Callable[..., Any] = from_url
    return make(address, client_options=client, retry_config={"retry_timeout": timedelta(seconds=patience_s)})


_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
