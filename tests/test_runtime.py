"""What runs things: tasks that start at once, tasks in the background, who may call."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import pytest

import bitrouter
from bitrouter import Errand, Signal, auth_required, caller_keys, parse_config


def begin(work: Coroutine[Any, Any, None]) -> Errand:
    return Errand(asyncio.get_running_loop(), work)


async def turns(count: int = 3) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


# Errands: coroutines that begin at once and go on without a task.


async def test_the_first_stretch_runs_at_once() -> None:
    seen = list[str]()

    async def work() -> None:
        seen.append("first")
        await asyncio.sleep(0)
        seen.append("rest")

    errand = begin(work())
    assert (seen, errand.done) == (["first"], False)
    await errand.finished()
    assert (seen, errand.done) == (["first", "rest"], True)


async def test_what_never_waits_is_done_at_once() -> None:
    seen = list[str]()

    async def work() -> None:
        seen.append("all")

    assert begin(work()).done
    assert seen == ["all"]


async def test_who_waits_for_what_is_done_already_waits_no_more() -> None:
    async def work() -> None: ...

    async with asyncio.timeout(0.5):
        await begin(work()).finished()


async def test_several_may_wait_for_the_end() -> None:
    errand = begin(turns(4))
    await asyncio.gather(errand.finished(), errand.finished())
    assert errand.done


async def test_a_failure_in_the_first_stretch_is_raised_at_once() -> None:
    async def work() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        begin(work())


async def test_a_failure_after_a_wait_ends_it_and_is_reported() -> None:
    async def work() -> None:
        await asyncio.sleep(0)
        raise ZeroDivisionError

    reported: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, told: reported.append(told))
    errand = begin(work())
    async with asyncio.timeout(0.5):
        await errand.finished()
    assert isinstance(reported[0]["exception"], ZeroDivisionError)


async def wait_for(future: asyncio.Future[str], got: list[str]) -> None:
    try:
        got.append(await future)
        got.append(await future)  # done by now: no wait
    except ZeroDivisionError:
        got.append("failed")
    await asyncio.sleep(0)
    got.append("went on")


async def test_a_future_wakes_who_waits_for_it_with_its_value() -> None:
    future, got = asyncio.get_running_loop().create_future(), list[str]()
    errand = begin(wait_for(future, got))
    await turns()
    assert got == []
    future.set_result("x")
    await errand.finished()
    assert got == ["x", "x", "went on"]


async def test_a_future_wakes_who_waits_for_it_with_its_failure() -> None:
    future, got = asyncio.get_running_loop().create_future(), list[str]()
    errand = begin(wait_for(future, got))
    future.set_exception(ZeroDivisionError())
    await errand.finished()
    assert got == ["failed", "went on"]


async def test_a_signal_wakes_an_errand_at_once() -> None:
    signal, failing = Signal(), Signal()
    got, other = list[Any](), list[Any]()
    begin(wait_for(signal, got))  # type: ignore[arg-type]
    begin(wait_for(failing, other))  # type: ignore[arg-type]
    signal.set_result(None)
    failing.set_exception(ZeroDivisionError())
    assert (got, other) == ([None, None], ["failed"])


async def test_an_errand_that_waits_for_a_signal_can_be_cancelled() -> None:
    signal, seen = Signal(), list[str]()

    async def work() -> None:
        try:
            await signal
        finally:
            seen.append("unwound")

    begin(work()).cancel()
    assert (seen, signal.cancelled()) == (["unwound"], True)


async def test_a_task_waits_for_a_signal_as_for_any_future() -> None:
    signal, got = Signal(), list[Any]()
    task = asyncio.get_running_loop().create_task(wait_for(signal, got))  # type: ignore[arg-type]
    await turns()
    signal.set_result(None)
    assert got == []
    await task
    assert got == [None, None, "went on"]


async def test_a_task_can_be_waited_for() -> None:
    got = list[str]()

    async def work() -> None:
        got.append(await asyncio.get_running_loop().create_task(asyncio.sleep(0.001, "slept")))

    await begin(work()).finished()
    assert got == ["slept"]


async def unwinding(passed: int, seen: list[str]) -> None:
    try:
        for _ in range(passed):
            await asyncio.sleep(0)
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        seen.append("cancelled")
        raise
    finally:
        await asyncio.sleep(0)  # unwinding may wait
        seen.append("unwound")


@pytest.mark.parametrize("waited", range(4))
@pytest.mark.parametrize("passed", [0, 1, 3])
async def test_a_cancellation_reaches_the_work_wherever_it_waits(passed: int, waited: int) -> None:
    seen = list[str]()
    errand = begin(unwinding(passed, seen))
    await turns(waited)
    errand.cancel()
    await errand.finished()
    assert (errand.done, seen) == (True, ["cancelled", "unwound"])


async def test_a_cancellation_cancels_what_is_waited_for() -> None:
    inner = asyncio.get_running_loop().create_task(asyncio.Event().wait())

    async def work() -> None:
        await inner

    errand = begin(work())
    errand.cancel()
    await asyncio.gather(inner, return_exceptions=True)
    assert errand.done and inner.cancelled()


async def test_a_cancellation_may_be_survived() -> None:
    seen = list[str]()

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            await asyncio.sleep(0)
        seen.append("went on")

    errand = begin(work())
    errand.cancel()
    await errand.finished()
    assert seen == ["went on"]


async def test_what_cancels_itself_is_cancelled_at_its_next_wait() -> None:
    errands: list[Errand] = []

    async def work() -> None:
        await asyncio.sleep(0)
        errands[0].cancel()
        await asyncio.Event().wait()

    errands.append(begin(work()))
    async with asyncio.timeout(0.5):
        await errands[0].finished()
    assert errands[0].done


async def test_a_cancellation_wins_over_a_value_that_has_just_come() -> None:
    future, got = asyncio.get_running_loop().create_future(), list[str]()
    errand = begin(wait_for(future, got))
    future.set_result("x")
    errand.cancel()
    await turns()
    assert (errand.done, got) == (True, [])


async def test_a_cancellation_after_the_end_does_nothing() -> None:
    errand = begin(turns(1))
    await errand.finished()
    errand.cancel()
    await turns()
    assert errand.done


async def test_a_cancelled_future_is_seen_by_who_waits_for_it() -> None:
    future, got = asyncio.get_running_loop().create_future(), list[str]()

    async def work() -> None:
        try:
            await future
        except asyncio.CancelledError:
            got.append("the future was")
        await asyncio.sleep(0)
        got.append("went on")

    errand = begin(work())
    future.cancel()
    await errand.finished()
    assert got == ["the future was", "went on"]


async def numbers() -> AsyncIterator[int]:
    for i in range(3):
        await asyncio.sleep(0)
        yield i


async def test_async_generators_may_be_used() -> None:
    got: list[int] = []

    async def work() -> None:
        got.extend([i async for i in numbers()])

    await begin(work()).finished()
    assert got == [0, 1, 2]


async def test_one_may_begin_another() -> None:
    seen = list[str]()

    async def inner() -> None:
        await asyncio.sleep(0)
        seen.append("inner")

    async def outer() -> None:
        await begin(inner()).finished()
        seen.append("outer")

    await begin(outer()).finished()
    assert seen == ["inner", "outer"]


# Tasks in the background.


async def test_a_spawned_task_is_kept_until_it_is_done(gateway: Any) -> None:
    done: list[int] = []

    async def work() -> None:
        await asyncio.sleep(0.005)
        done.append(1)

    async with gateway() as gw:
        gw.app.spawn(work())
        gc.collect()
        await asyncio.sleep(0.02)
    assert done


async def test_a_background_failure_is_logged(gateway: Any) -> None:
    async def work() -> None:
        raise ZeroDivisionError("oh")

    async with gateway() as gw:
        await asyncio.gather(gw.app.spawn(work()), return_exceptions=True)
        await turns()
        [line] = gw.lines("background_task_failed")
        assert line["level"] == "error" and "ZeroDivisionError('oh')" in line["message"]


async def test_stopping_cancels_the_background_without_a_word(gateway: Any) -> None:
    async with gateway() as gw:
        task = gw.app.spawn(asyncio.Event().wait())
        await turns()
        await gw.app.stop()
        assert task.cancelled() and gw.lines("background_task_failed") == []


async def test_a_background_task_may_stop_the_app(gateway: Any) -> None:
    async with gateway() as gw:
        task = gw.app.spawn(gw.app.stop())
        await task
        assert not task.cancelled()


async def test_ids_are_long_and_do_not_repeat(gateway: Any) -> None:
    async with gateway() as gw:
        ids = {gw.app.new_id() for _ in range(1000)}
    assert len(ids) == 1000 and {len(ident) for ident in ids} == {24}


# Who may call.

# fmt: off
KEYS = [
    # file                                  BITROUTER_KEYS  names
    ("",                                    None,           set()),
    ("",                                    "",             set()),
    ("",                                    "a",            {"env-1"}),
    ("",                                    "a, b",         {"env-1", "env-2"}),
    ("",                                    "a,,",          {"env-1"}),
    ('[keys.me]\nkey = "c"\n',              None,           {"me"}),
    ('[keys.me]\nkey = "c"\n',              "a",            {"me", "env-1"}),
    ('[keys.me]\nkey = "${MINE}"\n',        None,           {"me"}),
]
# fmt: on


@pytest.mark.parametrize(("toml", "variable", "names"), KEYS)
def test_callers_have_keys_from_file_and_environment(
    toml: str, variable: str | None, names: set[str]
) -> None:
    environ = {"MINE": "c", **({} if variable is None else {"BITROUTER_KEYS": variable})}
    assert set(caller_keys(parse_config(toml, environ).config, environ).values()) == names


def test_keys_are_held_as_digests() -> None:
    environ = {"BITROUTER_KEYS": "sk-secret"}
    [digest] = caller_keys(bitrouter.Config(), environ)
    assert len(digest) == 32 and b"sk-secret" not in digest


# fmt: off
LISTENS = [
    # listen               auth        required
    ("127.0.0.1:4356",     "auto",     False),
    ("127.8.9.1:4356",     "auto",     False),
    ("localhost:4356",     "auto",     False),
    ("[::1]:4356",         "auto",     False),
    ("unix:/tmp/x.sock",   "auto",     False),
    ("0.0.0.0:4356",       "auto",     True),
    ("[::]:4356",          "auto",     True),
    (":4356",              "auto",     True),
    ("10.0.0.1:4356",      "auto",     True),
    ("127.evil.test:4356", "auto",     True),
    ("127.0.0.1:4356",     "required", True),
    ("unix:/tmp/x.sock",   "required", True),
    ("0.0.0.0:4356",       "none",     False),
]
# fmt: on


@pytest.mark.parametrize(("listen", "auth", "required"), LISTENS)
def test_keys_are_asked_for_where_others_could_come(listen: str, auth: str, required: bool) -> None:
    config = bitrouter.Config()
    config.server.listen, config.server.auth = listen, auth
    assert auth_required(config) is required


async def test_a_wake_up_on_its_way_does_not_wake_what_was_cancelled() -> None:
    loop, seen, faults = asyncio.get_running_loop(), list[str](), list[Any]()
    loop.set_exception_handler(lambda _, fault: faults.append(fault))
    first, second = loop.create_future(), loop.create_future()

    async def work() -> None:
        try:
            await first
        finally:
            seen.append(await second)

    errand = begin(work())
    first.set_result("x")  # the wake-up is on its way
    errand.cancel()
    await turns()
    second.set_result("unwound")
    await turns()
    assert (errand.done, seen, faults) == (True, ["unwound"], [])
