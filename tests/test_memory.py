"""What is kept for a while."""

from __future__ import annotations

from bitrouter import Memory


def filled(*keys: str, entries: int = 3, size: int = 100, age_s: float = 10.0) -> Memory:
    """A memory in which each key is its own value, of size 10, put there at 0 seconds."""
    memory = Memory(entries, size, age_s)
    for key in keys:
        memory.put(key, key, 0.0, 10)
    return memory


def kept(memory: Memory, keys: str, now: float = 0.0) -> str:
    return "".join(key for key in keys if memory.get(key, now) is not None)


def test_what_was_put_in_comes_out() -> None:
    memory = filled("a", "b")
    assert (memory.get("a", 1.0), memory.get("b", 1.0), memory.get("c", 1.0)) == ("a", "b", None)
    assert len(memory) == 2


def test_an_entry_lives_as_long_as_was_said_and_no_longer() -> None:
    memory = filled("a")
    assert memory.get("a", 10.0) == "a"
    assert memory.get("a", 10.1) is None
    assert len(memory) == 0


def test_being_used_makes_an_entry_no_younger() -> None:
    memory = filled("a")
    assert memory.get("a", 9.0) == "a"
    assert memory.get("a", 11.0) is None


def test_the_least_recently_used_goes_first() -> None:
    memory = filled("a", "b", "c")
    memory.get("a", 0.0)
    memory.put("d", "d", 0.0, 10)
    assert kept(memory, "abcd") == "acd"


def test_what_is_put_in_again_is_new_again() -> None:
    memory = filled("a", "b", "c")
    memory.put("a", "A", 5.0, 10)
    memory.put("d", "d", 5.0, 10)
    assert kept(memory, "abcd") == "acd"
    assert memory.get("a", 15.0) == "A"


def test_size_bounds_it_as_entries_do() -> None:
    memory = filled("a", "b", "c", entries=99, size=35)
    memory.put("d", "d", 0.0, 20)
    assert kept(memory, "abcd") == "cd"


def test_what_is_put_in_again_counts_once() -> None:
    memory = filled(*"aaaaaaaaaaaa", "b", size=20)
    assert kept(memory, "ab") == "ab"


def test_what_has_gone_takes_no_room() -> None:
    memory = filled("a", "b", size=20)
    assert kept(memory, "ab", now=11.0) == ""
    memory.put("c", "c", 11.0, 10)
    memory.put("d", "d", 11.0, 10)
    assert kept(memory, "cd", now=11.0) == "cd"


def test_what_is_larger_than_all_the_room_is_not_kept() -> None:
    memory = filled("a")
    memory.put("b", "b", 0.0, 101)
    assert kept(memory, "b") == ""
    memory.put("c", "c", 0.0, 100)
    assert kept(memory, "c") == "c"


def test_an_empty_value_is_a_value() -> None:
    memory = filled()
    for value in ((), "", 0, False):
        memory.put("a", value, 0.0, 1)
        assert memory.get("a", 0.0) == value
