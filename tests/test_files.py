"""Files are whole or untouched, and a wrong one is refused in one line."""

from __future__ import annotations

import json
from typing import ClassVar, Literal

import pytest

from shardwright.errors import ShardwrightError
from shardwright.files import Document, Record, write_text


class Inner(Record):
    seconds: float


class Paper(Document):
    kind: ClassVar[str] = "shardwright.paper"
    current_version: ClassVar[int] = 2

    format: Literal["shardwright.paper"] = "shardwright.paper"
    version: Literal[2] = 2
    rows: tuple[Inner, ...]


PAPER = Paper(rows=(Inner(seconds=0.1), Inner(seconds=1e-9)))


def test_what_is_saved_is_what_is_loaded(tmp_path):
    """A document survives its file unchanged, and the file is indented JSON that ends with a newline."""
    path = tmp_path / "a.json"
    PAPER.save(path)
    assert Paper.load(path) == PAPER
    assert path.read_text().endswith("\n}\n")
    assert json.loads(path.read_text())["rows"][0] == {"seconds": 0.1}


def without(**changes):
    content = PAPER.model_dump(mode="json") | changes
    return json.dumps({key: value for key, value in content.items() if value is not None})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (PAPER.model_dump_json()[:40], "is not complete JSON"),
        ("", "is not complete JSON"),
        ("[]", "is not a paper: its format is None, expected 'shardwright.paper'"),
        ("{}", "is not a paper"),
        (without(format="shardwright.plan"), "is not a paper: its format is 'shardwright.plan'"),
        (without(format=None), "is not a paper: its format is None"),
        (without(version=None), "has paper version None"),
        (without(version=3), "has paper version 3; this shardwright reads up to 2: upgrade"),
        (without(version="2"), "has paper version '2'"),
        (without(rows=None), "is a damaged paper: rows: it is missing; make it again"),
        (without(rows=[{"seconds": "soon"}]), "is a damaged paper: rows.0.seconds: Input should be a valid number"),
        (without(rows=[{"seconds": float("inf")}]), "rows.0.seconds: Input should be a finite number"),
        (without(more=1), "is a damaged paper: more: Extra inputs are not permitted"),
    ],
)
def test_wrong_content_is_one_clear_line(tmp_path, text, says):
    """Whatever is wrong with a file, the error is one line that names the file and the fault."""
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ShardwrightError) as caught:
        Paper.load(path)
    assert says in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_and_binary_files_are_named(tmp_path):
    """A file that is not there, a folder, and a file that is no text each say so."""
    with pytest.raises(ShardwrightError, match=r"cannot read .*a\.json: No such file or directory"):
        Paper.load(tmp_path / "a.json")
    with pytest.raises(ShardwrightError, match="Is a directory"):
        Paper.load(tmp_path)
    (tmp_path / "b.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ShardwrightError, match="it is not UTF-8 text"):
        Paper.load(tmp_path / "b.json")


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    """When the disk fills up, the old file stays as it was and nothing is left beside it."""
    path = tmp_path / "a.json"
    path.write_text("old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ShardwrightError, match=r"cannot write .*: No space left on device"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_reader_keeps_the_file_that_it_opened(tmp_path):
    """A file is replaced, not written over: who reads the old one while it is written reads it whole."""
    path = tmp_path / "a.json"
    path.write_text("old")
    with path.open() as reader:
        write_text(path, "new")
        assert (reader.read(), path.read_text()) == ("old", "new")


def test_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    """Ctrl-C in the middle of writing passes through, and the old file stays as it was."""
    path = tmp_path / "a.json"
    path.write_text("old")

    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("where", ["absent/a.json", "file/a.json", "folder"])
def test_unwritable_place_is_named(tmp_path, where):
    """A folder that does not exist, a file used as one, and a folder in the way are refused in one line."""
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ShardwrightError, match=r"cannot write .*; choose a folder that exists") as caught:
        write_text(tmp_path / where, "text")
    assert "\n" not in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == {"file", "folder"}


def test_new_file_is_as_readable_as_any(tmp_path):
    """A written file has the permissions that the umask gives to new files."""
    write_text(tmp_path / "a", "")
    (tmp_path / "b").write_text("")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode
