"""The cache of compiled kernels (docs/reliability.md, R13)."""

import multiprocessing
import os
import signal
import time

import pytest

from storm_kernels.backends.cuda import cache

FORK = multiprocessing.get_context("fork")


def _ask(folder, log, start):
    def build():
        with open(log, "a") as file:
            file.write("built\n")
        time.sleep(0.2)
        return b"code"

    start.wait()
    assert cache.cached("key", build, folder) == b"code"


def test_sixteen_processes_compile_once(tmp_path):
    start = FORK.Event()
    processes = [FORK.Process(target=_ask, args=(tmp_path / "cache", tmp_path / "log", start)) for _ in range(16)]
    for process in processes:
        process.start()
    start.set()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 16
    assert (tmp_path / "log").read_text() == "built\n"


def test_a_lock_of_a_killed_process_holds_nobody(tmp_path):
    started = FORK.Event()

    def build():
        started.set()
        time.sleep(60)

    process = FORK.Process(target=cache.cached, args=("key", build, tmp_path / "cache"))
    process.start()
    assert started.wait(30)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert cache.cached("key", lambda: b"code", tmp_path / "cache") == b"code"


def test_folder_is_the_users_alone(tmp_path):
    folder = tmp_path / "cache"
    cache.cached("key", lambda: b"code", folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (folder / "key").stat().st_mode & 0o777 == 0o600
    folder.chmod(0o770)
    with pytest.raises(cache.CacheError, match="chmod"):
        cache.cached("key", lambda: b"code", folder)


def test_links_are_not_followed(tmp_path):
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / "cache").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(cache.CacheError, match="remove it"):
        cache.cached("key", lambda: b"code", tmp_path / "cache")
    folder = tmp_path / "real"
    folder.mkdir(mode=0o700)
    (tmp_path / "planted").write_bytes(b"planted")
    (folder / "key").symlink_to(tmp_path / "planted")
    with pytest.raises(OSError, match="symbolic links"):
        cache.cached("key", lambda: b"code", folder)


def test_another_users_folder_is_refused(tmp_path, monkeypatch):
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.raises(cache.CacheError, match=f"belongs to user {owner}"):
        cache.cached("key", lambda: b"code", tmp_path / "cache")


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-1], lambda data: b"", lambda data: data[:40] + b"x" + data[41:]]
)
def test_a_damaged_file_is_made_again(tmp_path, damage):
    content = b"code" * 10
    cache.cached("key", lambda: content, tmp_path)
    path = tmp_path / "key"
    path.write_bytes(damage(path.read_bytes()))
    built = []
    assert cache.cached("key", lambda: built.append(1) or content, tmp_path) == content
    assert built == [1]
    assert cache.cached("key", lambda: built.append(2) or content, tmp_path) == content
    assert built == [1]


def test_a_failed_compilation_leaves_nothing(tmp_path):
    def fail():
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        cache.cached("key", fail, tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".lock"] == []
    assert cache.cached("key", lambda: b"code", tmp_path) == b"code"


def test_keys_tell_parts_apart():
    assert (
        len({cache.key_of("ab", "c"), cache.key_of("a", "bc"), cache.key_of("abc"), cache.key_of("ab", "c", "")}) == 4
    )
