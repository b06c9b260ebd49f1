"""A file is there whole, or as it was before."""

import os

import pytest

from traces.whole_file import replace_bytes, replace_text


def test_it_replaces_what_was_there_and_leaves_nothing_beside(tmp_path):
    path = tmp_path / "a.json"
    assert replace_text(path, "alt, größer\n") == path
    assert path.read_text(encoding="utf-8") == "alt, größer\n"
    replace_bytes(path, b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a.json"]


def test_what_breaks_before_the_end_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    replace_text(path, "old")

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        replace_text(path, "new")
    assert path.read_text() == "old"
