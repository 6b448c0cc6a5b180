"""Paths as users write them: expanded in one place, and refused by name where no file can be there."""

import argparse
import pwd
from pathlib import Path

import pytest

from metatt_scale.files import cache_folder
from metatt_scale.paths import check_no_file_in_the_way, path_argument, usable_path, user_path
from metatt_scale.recipe import RecipeError, validate

UNUSABLE = {"null": "a\0b", "name": "x" * 256, "umlauts": "ä" * 128, "whole": "x/" * 2048}
PLAIN = {"output_dir": "out", "backbone": {"path": "model"}, "data": {"train": [{"path": "train.json"}]}}


@pytest.fixture
def homeless(monkeypatch):
    """A user id without an entry in the list of users, as containers have, and no HOME."""
    for name in ("HOME", "METATT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def unknown(key):
        raise KeyError(key)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(pwd, "getpwnam", unknown)


def test_a_home_folder_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    assert user_path("~/a") == Path("/somewhere/a") and user_path("~root") == Path(pwd.getpwnam("root").pw_dir)
    assert user_path("a/~b") == Path("a/~b") and user_path(Path("c")) == Path("c")


def test_an_unknown_user_is_named_with_the_key():
    with pytest.raises(ValueError, match=r"output_dir.*~nobody-of-this-name/run.*'nobody-of-this-name'"):
        user_path("~nobody-of-this-name/run", "output_dir")


def test_no_home_folder(homeless):
    with pytest.raises(ValueError, match=r"--out.*~/run.*HOME"):
        user_path("~/run", "--out")
    with pytest.raises(ValueError, match="METATT_CACHE"):
        cache_folder()


def test_a_cache_folder_that_is_named_needs_no_home(homeless, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "metatt_scale"
    monkeypatch.setenv("METATT_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.setenv("METATT_CACHE", "~nobody-of-this-name/cache")
    with pytest.raises(ValueError, match=r"METATT_CACHE.*nobody-of-this-name"):
        cache_folder()


@pytest.mark.parametrize("text", UNUSABLE.values(), ids=UNUSABLE)
def test_what_no_file_system_takes(text):
    for refuse, error in (
        (usable_path, ValueError),
        (user_path, ValueError),
        (path_argument, argparse.ArgumentTypeError),
    ):
        with pytest.raises(error, match=r"null byte|too long"):
            refuse(text)


def test_the_longest_name_is_usable(tmp_path):
    longest = tmp_path / ("x" * 255)
    longest.write_text("")
    assert user_path(longest) == longest


PATH_KEYS = {
    "output_dir": lambda text: {"output_dir": text},
    "backbone.path": lambda text: {"backbone": {"path": text}},
    "backbone.revision": lambda text: {"backbone": {"path": "a/b", "revision": text}},
    "adapter.start_from": lambda text: {"adapter": {"start_from": text}},
    "data.train.0.path": lambda text: {"data": {"train": [{"path": text}]}},
    "data.train.0.subset": lambda text: {"data": {"train": [{"path": "a/b", "subset": text}]}},
    "data.validation.0.path": lambda text: {"data": {**PLAIN["data"], "validation": [{"path": text}]}},
    "data.cache_dir": lambda text: {"data": {**PLAIN["data"], "cache_dir": text}},
    "parallel.deepspeed_config": lambda text: {"parallel": {"deepspeed_config": text}},
    "evaluation.data": lambda text: {"evaluation": {"data": text}},
    "evaluation.tasks.0": lambda text: {"evaluation": {"tasks": [text]}},
}


@pytest.mark.parametrize("text", UNUSABLE.values(), ids=UNUSABLE)
@pytest.mark.parametrize("key", PATH_KEYS)
def test_a_recipe_key_is_named(key, text):
    with pytest.raises(RecipeError, match=rf"`{key}`.*(null byte|too long)"):
        validate({**PLAIN, **PATH_KEYS[key](text)}, "recipe")


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below" / "it"):
        with pytest.raises(ValueError, match=rf"--out: {tmp_path}/file "):
            check_no_file_in_the_way(place, "--out")
    check_no_file_in_the_way(tmp_path, "--out")
    check_no_file_in_the_way(tmp_path / "new" / "folder", "--out")
