"""Where a video comes from: a path, a URL, bytes or a file object, opened as often as it is read."""

from __future__ import annotations

import http.client
import io
import os
import shutil
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote, urlsplit

from storm_kernels.tokens import described

from .containers import StormVideoError

# Seconds without a byte after which a server is given up.
TIMEOUT = 30


class Source:
    """A file that can be read more than once.

    Args:
        source: a path; a ``file:`` URL; an http or https URL, which is downloaded once to a temporary file; bytes; a
            binary file object, which is read from its beginning and stays open.

    Attributes: `name`, for messages; `path`, where there is one.

    Raises:
        TypeError: it is none of these.
        StormVideoError: there is no such file, or it cannot be downloaded.
    """

    def __init__(self, source: object):
        self.path: Path | None = None
        self._file: BinaryIO | None = None
        scheme = urlsplit(source).scheme if isinstance(source, str) else ""
        if scheme in ("http", "https"):
            self.name, self._file = source, _downloaded(source)
        elif isinstance(source, (str, os.PathLike)):
            self.path = Path(unquote(urlsplit(source).path) if scheme == "file" else source)
            self.name = str(self.path)
        elif isinstance(source, (bytes, bytearray, memoryview)):
            self.name, self._file = f"<{len(source)} bytes>", io.BytesIO(source)
        elif callable(getattr(source, "read", None)) and not isinstance(source, io.TextIOBase):
            self.name, self._file = str(getattr(source, "name", f"<{type(source).__name__}>")), _seekable(source)
        else:
            raise TypeError(
                f"source must be a path, a URL, bytes, a binary file object or images, got {described(source)}"
            )
        if self.path is not None and not self.path.is_file():
            said = "is not a regular file" if self.path.exists() else "no such file"
            raise StormVideoError(f"{self.name}: {said}")

    @contextmanager
    def opened(self) -> Iterator[BinaryIO]:
        """The file, at its beginning."""
        if self.path is None:
            self._file.seek(0)
            yield self._file
            return
        try:
            file = self.path.open("rb")
        except OSError as error:
            raise StormVideoError(f"{self.name}: cannot be read: {error.strerror}") from error
        with file:
            yield file

    @property
    def for_ffmpeg(self) -> str | BinaryIO:
        """What `av.open` is given: FFmpeg reads a path by itself."""
        if self.path is not None:
            return f"file:{self.path.absolute()}"
        self._file.seek(0)
        return self._file


def _seekable(file: BinaryIO) -> BinaryIO:
    """The file object, or a copy of one that can be read only once (a pipe, an answer of a server)."""
    if callable(getattr(file, "seekable", None)) and file.seekable():
        return file
    return _copied(file)


def _copied(file: BinaryIO) -> BinaryIO:
    kept = tempfile.TemporaryFile()  # noqa: SIM115 (it is read as long as the source lives)
    shutil.copyfileobj(file, kept, 1 << 20)
    return kept


def _downloaded(url: str) -> BinaryIO:
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
            kept, declared = _copied(answer), answer.headers.get("Content-Length")
    except urllib.error.HTTPError as error:
        raise StormVideoError(f"{url}: the server answers {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise StormVideoError(f"{url}: cannot be downloaded: {getattr(error, 'reason', error)}") from error
    if declared is not None and kept.tell() != int(declared):
        raise StormVideoError(f"{url}: truncated, the server declares {declared} bytes and sent {kept.tell()}")
    return kept
