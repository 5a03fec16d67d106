"""The ranks' board: all come, or everybody is told at once why not; a failure is of one call."""

import time
import weakref

import pytest
from torch._C._distributed_c10d import HashStore

import shardwright as sw
from shardwright.sharder.runtime import board as board_module
from shardwright.sharder.runtime.board import Board


@pytest.fixture
def boards(monkeypatch):
    """Those of two ranks, on one store; nobody waits for a word that does not come."""
    monkeypatch.setattr(board_module, "TOLD_S", 0.0)
    monkeypatch.setattr(board_module, "BEAT_S", 0.02)
    store = HashStore()
    made = [Board(store, rank, 2) for rank in range(2)]
    yield made
    for board in made:
        board.close()


def test_who_waits_is_told_at_once(boards):
    """The limit is a year."""
    boards[1].fail("rank 1 has no luck")
    with pytest.raises(sw.ShardwrightError, match=r"^rank 1 has no luck$"):
        boards[0].assemble(3e7)


def test_the_first_says_what_a_call_does_and_that_is_forgotten(boards):
    """Whoever it is; of many calls the store keeps some."""
    count = board_module.KEPT_CALLS + 5
    for number in range(count):
        first, second = boards if number % 2 else boards[::-1]
        for board in boards:
            board.begin()
        assert first.same(f"step of {number} samples") == second.same("evaluate") == f"step of {number} samples"
    kept = [boards[0]._store.check([boards[0]._doing(call)]) for call in range(1, count + 1)]
    assert kept == [False] * 5 + [True] * board_module.KEPT_CALLS


def test_who_does_not_come_is_named(boards):
    """With the limit."""
    with pytest.raises(sw.ShardwrightError, match=r"rank 1 of the pipeline did not come within 0 s"):
        boards[0].assemble(0.0)
    boards[1].assemble(0.0)


def test_every_meeting_is_one_of_its_own(boards):
    """Who has come to the first has not come to the second."""
    with pytest.raises(sw.ShardwrightError, match="rank 0"):
        boards[1].assemble(0.0)
    for board in boards:
        board.begin()  # who did not come was said of the call before
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


def test_the_first_word_is_that_of_all(boards):
    """Two ranks that fail in one call, each in its own way, say the same."""
    assert [board.fail(f"rank {board.rank} has no luck") for board in boards] == ["rank 0 has no luck"] * 2
    assert [board.failure() for board in boards] == ["rank 0 has no luck"] * 2


def test_who_has_ended_is_named(boards, monkeypatch):
    """One that lives is not, whatever it does; where the store is gone, rank 0 is, which has it."""
    monkeypatch.setattr(board_module, "GONE_S", 0.3)
    assert boards[0].gone() == []
    boards[1].close()
    assert boards[0].gone() == ["rank 1"]

    class Lost:
        def add(self, *_):
            raise RuntimeError("connection reset")

    boards[1]._store = Lost()
    assert boards[1].gone() == ["rank 0"]


@pytest.mark.usefixtures("boards")
def test_who_ends_while_the_others_wait_is_named_to_all(monkeypatch):
    """The limit is a year; one that has not begun to live may still be starting."""
    monkeypatch.setattr(board_module, "ABSENT_S", 0.3)
    store = HashStore()
    waiting, ended = (Board(store, rank, 3) for rank in range(2))
    ended.close()
    line = "rank 1 left before all had met: it has ended, or is frozen"
    with pytest.raises(sw.ShardwrightError, match=f"^{line}$"):
        waiting.assemble(3e7)
    assert Board(store, 2, 3).failure() == line


def test_a_word_outlives_its_store(boards):
    """The rank that has the store may end as soon as it has said why."""
    boards[0].begin()
    boards[1].begin()
    boards[0].fail("rank 0 has no luck")
    end = time.monotonic() + 10
    while not boards[1]._pulse.word and time.monotonic() < end:
        time.sleep(0.01)
    boards[1]._store = None
    assert boards[1].failure() == "rank 0 has no luck"


def test_nobody_keeps_a_board_alive():
    """Its thread ends with it, and so can the store."""
    board = Board(HashStore(), 0, 2)
    seen, thread = weakref.ref(board), board._pulse._thread
    del board
    assert seen() is None
    thread.join(10)
    assert not thread.is_alive()
