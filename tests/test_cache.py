"""The cache of measurements: kept, shared, and never a reason to fail."""

import multiprocessing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import shardwright as sw
from shardwright.profiler.cache import Cache, default_folder
from shardwright.profiler.profile import Timing, Variation


def timing(forward_s=1.0):
    return Timing(repeats=6, forward_s=forward_s, forward_spread_s=0, backward_s=0, backward_spread_s=0, update_s=0)


def test_what_was_put_is_found_again(tmp_path):
    """In this process and in the next one, under its own key only."""
    Cache(tmp_path).put("a", timing(2.0))
    assert Cache(tmp_path).get("a", Timing) == timing(2.0)
    assert Cache(tmp_path).get("b", Timing) is None
    assert Cache(tmp_path).get("a", Variation) is None


@given(st.binary(max_size=200))
@settings(max_examples=60, deadline=None)
def test_a_damaged_file_counts_as_absent(tmp_path_factory, content):
    """Whatever a file holds, the measurement is made again and replaces it."""
    folder = tmp_path_factory.mktemp("cache")
    Cache(folder).put("a", timing())
    (file,) = folder.rglob("*.json")
    cache = Cache(folder)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(content)] + content)
    assert cache.get("a", Timing) in (None, timing())
    cache.put("a", timing(3.0))
    assert Cache(folder).get("a", Timing) == timing(3.0)


def test_a_file_of_another_key_is_not_taken(tmp_path):
    """A file that was renamed, or whose digest is another key's too, is not believed."""
    cache = Cache(tmp_path)
    cache.put("a", timing())
    cache.put("b", timing(2.0))
    one, other = tmp_path.rglob("*.json")
    one.write_bytes(other.read_bytes())
    assert [Cache(tmp_path).get(key, Timing) for key in "ab"].count(None) == 1


def test_what_this_profile_has_found_stays_known(tmp_path):
    """Whatever becomes of the files meanwhile; without a folder there are none."""
    for folder in (tmp_path, None):
        cache = Cache(folder)
        cache.put("a", timing())
        for file in tmp_path.rglob("*.json"):
            file.unlink()
        assert cache.get("a", Timing) == timing()


def test_refresh_takes_what_was_measured_since(tmp_path):
    """What was there is not believed; what is put now is."""
    Cache(tmp_path).put("a", timing(1.0))
    cache = Cache(tmp_path, refresh=True)
    assert cache.get("a", Timing) is None
    cache.put("a", timing(2.0))
    assert cache.get("a", Timing) == timing(2.0)
    assert Cache(tmp_path).get("a", Timing) == timing(2.0)


def _write(folder, start):
    cache = Cache(folder)
    for index in range(200):
        cache.put(f"key {index % 10}", timing(start + index))
        assert Cache(folder).get(f"key {index % 10}", Timing) is not None


def test_writers_do_not_disturb_each_other(tmp_path):
    """Four processes that write the same keys always find a whole record."""
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write, args=(tmp_path, 1000.0 * n)) for n in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0] * 4
    assert len(list(tmp_path.rglob("*.json"))) == 10
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    """One line says which folder, and how to use another."""
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(sw.ShardwrightError, match="set SHARDWRIGHT_CACHE to a folder"):
        Cache(file / "cache").put("a", timing())


def test_the_users_folder_for_caches(monkeypatch, tmp_path):
    """A variable of our own comes first, then the desktop's."""
    monkeypatch.delenv("SHARDWRIGHT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "shardwright"
    monkeypatch.setenv("SHARDWRIGHT_CACHE", "/elsewhere")
    assert str(default_folder()) == "/elsewhere"
