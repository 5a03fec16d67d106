"""The ranks' board: all come, or everybody is told at once why not; a failure is of one call."""

import time

import pytest
from torch._C._distributed_c10d import HashStore

import shardwright as sw
from shardwright.sharder.runtime import board as board_module
from shardwright.sharder.runtime.board import Board


@pytest.fixture
def boards(monkeypatch):
    """Those of two ranks, on one store; nobody waits for a word that does not come."""
    monkeypatch.setattr(board_module, "TOLD_S", 0.0)
    store = HashStore()
    return [Board(store, rank, 2) for rank in range(2)]


def test_who_waits_is_told_at_once(boards):
    """The limit is a year."""
    boards[1].fail("rank 1 has no luck")
    with pytest.raises(sw.ShardwrightError, match=r"^rank 1 has no luck$"):
        boards[0].assemble(3e7)


def test_who_does_not_come_is_named(boards):
    """With the limit."""
    with pytest.raises(sw.ShardwrightError, match=r"rank 1 of the pipeline did not come within 0 s"):
        boards[0].assemble(0.0)
    boards[1].assemble(0.0)


def test_every_meeting_is_one_of_its_own(boards):
    """Who has come to the first has not come to the second."""
    with pytest.raises(sw.ShardwrightError, match="rank 0"):
        boards[1].assemble(0.0)
    boards[0].assemble(0.0)
    with pytest.raises(sw.ShardwrightError, match="rank 1"):
        boards[0].assemble(0.0)


def test_a_failure_is_of_its_call(boards, monkeypatch):
    """After it was caught, what breaks in a later call is not explained by it."""
    for board in boards:
        board.begin()
    boards[1].fail("the first")
    monkeypatch.setattr(board_module, "TOLD_S", 5.0)
    assert boards[0].failure() == "the first"
    monkeypatch.setattr(board_module, "TOLD_S", 0.2)
    for board in boards:
        board.begin()
    assert boards[0].failure() == ""
    boards[1].fail("the second")
    assert boards[0].failure() == "the second"


def test_a_word_that_comes_later_is_waited_for(boards, monkeypatch):
    """The rank that failed may be slower than its broken connections."""
    monkeypatch.setattr(board_module, "TOLD_S", 5.0)
    waits = []
    monkeypatch.setattr(
        time, "sleep", lambda seconds: waits.append(seconds) or boards[1]._store.set(boards[1]._failed, "late")
    )
    assert boards[0].failure() == "late"
    assert len(waits) == 1


def test_another_pipeline_on_the_same_store_begins_anew():
    """Neither the meetings nor the failures of the one before are its own."""
    store = HashStore()
    first, second = ([Board(store, rank, 2) for rank in range(2)] for _ in range(2))
    first[1].fail("of the first")
    with pytest.raises(sw.ShardwrightError, match="did not come"):
        second[0].assemble(0.0)
