"""Hashes of large files: all bytes count, and a file is read again exactly when it may have changed."""

import hashlib
import os
from pathlib import Path

import pytest

from metatt_scale import hashes
from metatt_scale.hashes import bytes_to_hash, cached_sha256

CONTENT = b"x" * 3000


@pytest.fixture(autouse=True)
def reads(monkeypatch, tmp_path):
    """The files that were read, with a cache of its own in which small and new files are kept too."""
    read: list[Path] = []

    def sha256(path):
        read.append(Path(path))
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()

    monkeypatch.setenv("METATT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hashes, "sha256", sha256)
    monkeypatch.setattr(hashes, "_SMALL_BYTES", 0)
    monkeypatch.setattr(hashes, "_SETTLED_SECONDS", 0.0)
    forget(monkeypatch)
    return read


def forget(monkeypatch):
    """Be another process."""
    monkeypatch.setattr(hashes, "_in_this_process", {})


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(CONTENT)
    return path


def test_the_second_start_does_not_read_the_file(file, reads, monkeypatch):
    expected = hashlib.sha256(CONTENT).hexdigest()
    assert bytes_to_hash(file) == len(CONTENT)
    assert cached_sha256(file) == expected
    assert cached_sha256(file) == expected
    forget(monkeypatch)
    assert bytes_to_hash(file) == 0
    assert cached_sha256(file) == expected
    assert reads == [file]


def in_place(file):
    times = os.stat(file)
    with file.open("r+b") as stream:
        stream.seek(1500)
        stream.write(b"y")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # as a copy that keeps times


def another_file(file):
    other = file.with_name("other")
    other.write_bytes(CONTENT[:1500] + b"y" + CONTENT[1501:])
    os.utime(other, ns=(os.stat(file).st_atime_ns, os.stat(file).st_mtime_ns))
    os.replace(other, file)


@pytest.mark.parametrize("change", [in_place, another_file])
@pytest.mark.parametrize("same_process", [True, False])
def test_a_changed_file_is_read_again(file, monkeypatch, change, same_process):
    before = cached_sha256(file)
    change(file)
    if not same_process:
        forget(monkeypatch)
    assert cached_sha256(file) == hashlib.sha256(file.read_bytes()).hexdigest() != before


def test_a_link_shares_the_entry_of_its_file(file, reads, tmp_path):
    (tmp_path / "link").symlink_to(file)
    assert cached_sha256(tmp_path / "link") == cached_sha256(file) and len(reads) == 1


def test_a_file_that_was_just_written_is_not_kept(file, reads, monkeypatch):
    monkeypatch.setattr(hashes, "_SETTLED_SECONDS", 1000.0)
    cached_sha256(file)
    cached_sha256(file)
    assert len(reads) == 2


@pytest.mark.parametrize("damage", ["", "[]", "{}", '{"file": 1, "sha256": 2}', "[" * 100_000])
def test_a_damaged_entry_is_made_again(file, reads, monkeypatch, tmp_path, damage):
    expected = cached_sha256(file)
    (entry,) = (tmp_path / "cache" / "hashes").glob("*.json")
    entry.write_text(damage)
    forget(monkeypatch)
    assert cached_sha256(file) == expected and len(reads) == 2
    forget(monkeypatch)
    assert cached_sha256(file) == expected and len(reads) == 2


def test_without_a_cache_folder_each_process_reads_once_and_says_so(file, reads, monkeypatch, caplog):
    monkeypatch.setenv("METATT_CACHE", "/dev/null/cache")
    assert cached_sha256(file) == cached_sha256(file) and len(reads) == 1
    assert "METATT_CACHE" in caplog.text
