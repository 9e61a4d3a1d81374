"""Compiled kernels on disk: a folder that only its user can read or write, whole files or none, one
compilation a key however many processes ask.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import stat
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

_DIGEST = 32


class CacheError(OSError):
    """The cache folder or a file in it is not safe to use; the message says which and why."""


def default_folder() -> Path:
    """``$XDG_CACHE_HOME/storm_kernels/cuda``, or ``~/.cache/storm_kernels/cuda``."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "storm_kernels" / "cuda"


def key_of(*parts: str) -> str:
    """A file name that differs wherever any of ``parts`` differs."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def _private(path: Path, found: os.stat_result, kind: Callable[[int], bool]) -> None:
    if not kind(found.st_mode):
        raise CacheError(
            f"{path} is not what the kernel cache put there (mode {stat.filemode(found.st_mode)}); remove it"
        )
    if found.st_uid != os.geteuid():
        raise CacheError(
            f"{path} belongs to user {found.st_uid}, not to {os.geteuid()}; set XDG_CACHE_HOME to a folder of your own"
        )
    if found.st_mode & 0o077:
        raise CacheError(f"{path} is open to other users (mode {stat.filemode(found.st_mode)}); chmod go-rwx it")


def _open_folder(folder: Path) -> Path:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _private(folder, folder.lstat(), stat.S_ISDIR)
    return folder


def _read(path: Path) -> bytes | None:
    """The content of a cache file; None if there is none or it is damaged."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    with os.fdopen(handle, "rb") as file:
        _private(path, os.fstat(handle), stat.S_ISREG)
        data = file.read()
    content = data[_DIGEST:]
    return content if data[:_DIGEST] == hashlib.sha256(content).digest() else None


def _write(path: Path, content: bytes) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)  # mode 0600
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(hashlib.sha256(content).digest() + content)
            file.flush()
            os.fsync(handle)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


@contextmanager
def _locked(path: Path):
    """Holds the lock on ``path``; the system lets go of it when its holder dies."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def cached(key: str, build: Callable[[], bytes], folder: Path | None = None) -> bytes:
    """What ``build()`` returned the first time any process asked for ``key``. Raises `CacheError`
    if the folder is not the user's alone.
    """
    path = _open_folder(folder or default_folder()) / key
    content = _read(path)
    if content is None:
        with _locked(path.with_suffix(".lock")):
            content = _read(path)
            if content is None:
                content = build()
                _write(path, content)
    return content
