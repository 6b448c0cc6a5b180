"""Files and folders are whole or absent, whatever happens while they are written."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from metatt_scale import files
from metatt_scale.files import cache_folder, new_folder, save_tensors, sha256, write_json, write_text


class Stop(BaseException):
    """What Ctrl-C would raise, without stopping pytest."""


def test_write_text_replaces_and_makes_folders(tmp_path):
    path = tmp_path / "a" / "b.txt"
    write_text(path, "älter\n")
    write_text(str(path), "neu\n")
    assert path.read_bytes() == b"neu\n" and os.listdir(path.parent) == ["b.txt"]
    assert path.stat().st_mode & 0o777 == 0o644, "others may read it, which a temporary file does not allow"


@pytest.mark.parametrize("make_error", [lambda: OSError(28, "No space left on device"), Stop], ids=["full", "stop"])
@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_failing_write_leaves_the_old_text(tmp_path, monkeypatch, name, make_error):
    path, error = tmp_path / "file", make_error()
    write_text(path, "old")

    def fail(*_):
        raise error

    with monkeypatch.context() as patch, pytest.raises(type(error)):
        patch.setattr(files.os, name, fail)
        write_text(path, "new")
    assert getattr(error, "filename", str(path)) == str(path), "a full disk does not say which file it is about"
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "half a pair: \ud800")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_json_that_others_could_not_read_is_not_written(tmp_path):
    path = tmp_path / "file.json"
    write_json(path, {"ä": [1, None]})
    assert json.loads(path.read_text(encoding="utf-8")) == {"ä": [1, None]}
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError):
            write_json(path, value)
    with pytest.raises(TypeError):
        write_json(path, {1, 2})
    assert json.loads(path.read_text(encoding="utf-8")) == {"ä": [1, None]} and os.listdir(tmp_path) == ["file.json"]


def fill(folder, text):
    (folder / "inner").mkdir()
    (folder / "inner" / "file").write_text(text)


def test_new_folder(tmp_path):
    target = tmp_path / "deep" / "folder"
    with new_folder(target) as temporary:
        assert temporary.parent == target.parent and not target.exists()
        fill(temporary, "new")
    assert (target / "inner" / "file").read_text() == "new" and os.listdir(target.parent) == ["folder"]
    assert target.stat().st_mode & 0o777 == 0o755


def test_new_folder_refuses_to_overwrite_unless_told(tmp_path):
    target = tmp_path / "folder"
    with new_folder(target) as temporary:
        fill(temporary, "old")
    with pytest.raises(FileExistsError, match="folder exists already"), new_folder(target) as temporary:
        raise AssertionError("not reached")
    assert (target / "inner" / "file").read_text() == "old"
    with new_folder(target, replace=True) as temporary:
        (temporary / "only").write_text("new")
    assert os.listdir(target) == ["only"] and os.listdir(tmp_path) == ["folder"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), Stop()])
@pytest.mark.parametrize("old", [False, True])
def test_an_exception_inside_leaves_what_was_there(tmp_path, old, error):
    target = tmp_path / "folder"
    if old:
        fill_through(target, "old")
    with pytest.raises(type(error)), new_folder(target, replace=True) as temporary:
        fill(temporary, "new")
        raise error
    assert_unchanged(target, old)


@pytest.mark.parametrize("fail_at", [1, 2, 3])
def test_a_failing_fsync_leaves_what_was_there(tmp_path, monkeypatch, fail_at):
    target = tmp_path / "folder"
    fill_through(target, "old")
    calls, real = [], os.fsync

    def fsync(handle):
        calls.append(handle)
        if len(calls) == fail_at:
            raise OSError(5, "Input/output error")
        real(handle)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="Input/output"):
        patch.setattr(files.os, "fsync", fsync)
        with new_folder(target, replace=True) as temporary:
            fill(temporary, "new")
    assert_unchanged(target, True)


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), Stop()])
@pytest.mark.parametrize("fail_at", [1, 2])
def test_a_failing_rename_puts_the_old_folder_back(tmp_path, monkeypatch, fail_at, error):
    target = tmp_path / "folder"
    fill_through(target, "old")
    calls, real = [], os.rename

    def rename(source, destination):
        calls.append(source)
        if len(calls) == fail_at:
            raise error
        real(source, destination)

    with monkeypatch.context() as patch, pytest.raises(type(error)):
        patch.setattr(files.os, "rename", rename)
        with new_folder(target, replace=True) as temporary:
            fill(temporary, "new")
    assert len(calls) >= fail_at
    assert_unchanged(target, True)


def fill_through(target, text):
    with new_folder(target) as temporary:
        fill(temporary, text)


def assert_unchanged(target, old):
    assert os.listdir(target.parent) == (["folder"] if old else [])
    if old:
        assert (target / "inner" / "file").read_text() == "old"


def test_everything_is_on_disk_before_the_rename(tmp_path, monkeypatch):
    events, real_fsync, real_rename = [], os.fsync, os.rename

    def fsync(handle):
        events.append(os.path.basename(os.readlink(f"/proc/self/fd/{handle}")))
        real_fsync(handle)

    def rename(source, destination):
        events.append("rename")
        real_rename(source, destination)

    if not os.path.exists("/proc/self/fd"):
        pytest.skip("needs /proc to tell which file an fsync was for")
    monkeypatch.setattr(files.os, "fsync", fsync)
    monkeypatch.setattr(files.os, "rename", rename)
    with new_folder(tmp_path / "folder") as temporary:
        fill(temporary, "new")
    assert sorted(events[:3]) == sorted(["inner", "file", temporary.name])
    assert events[3:] == ["rename", tmp_path.name]


def test_sha256_reads_in_blocks(tmp_path):
    import hashlib

    content = os.urandom((1 << 20) + 17)
    (tmp_path / "file").write_bytes(content)
    assert sha256(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_save_tensors(tmp_path):
    save_tensors(tmp_path / "file", {"a": torch.arange(6.0).reshape(2, 3)})
    assert torch.equal(load_file(tmp_path / "file")["a"], torch.arange(6.0).reshape(2, 3))


@pytest.mark.slow
def test_a_full_disk_is_an_os_error(tmp_path):
    """Safetensors raises an error of its own; a limit on the size of files stands for the full disk."""
    code = (
        "import resource, sys, torch\n"
        "from metatt_scale.files import save_tensors\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try: save_tensors(sys.argv[1], {'a': torch.zeros(10**4)})\n"
        "except OSError as error: print(error)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "file")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith(f"{tmp_path / 'file'}: cannot be written (") and "too large" in done.stdout.lower()


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("METATT_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("METATT_CACHE")
    assert cache_folder() == tmp_path / "xdg" / "metatt_scale"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "metatt_scale"
