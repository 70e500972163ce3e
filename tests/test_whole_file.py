"""A file that is written whole: the old one stays until the new one is complete."""

import pytest

from sharding import whole_file
from sharding.whole_file import write_whole


def test_file_when_it_is_replaced_then_nothing_else_is_left(tmp_path):
    for text in ("old", "new"):
        write_whole(tmp_path / "config.json", text)
        assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("config.json", text)]


def test_file_when_the_disk_fails_then_the_old_one_is_there_and_the_new_one_reached_the_disk_before_its_name(
    monkeypatch, tmp_path
):
    write_whole(tmp_path / "config.json", "old")

    def fsync(_: int) -> None:
        raise OSError("no power")

    monkeypatch.setattr(whole_file.os, "fsync", fsync)
    with pytest.raises(OSError, match="no power"):
        write_whole(tmp_path / "config.json", "new")
    assert (tmp_path / "config.json").read_text() == "old"
