"""The ledger: what is put in adds up, and neither disks nor processes that die spoil it."""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
import signal
import sqlite3
import stat
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import NOON_MS, day, receipt

import bitrouter

DAY_MS = 86_400_000
LATER_MS = NOON_MS + 2 * DAY_MS


def made(path: Path | str, **how: Any) -> tuple[bitrouter.Ledger, list[str]]:
    """A ledger that is quick and not started, and what it reports."""
    told: list[str] = []
    how = {"batch_s": 0.005, "lock_s": 0.01, "clock": lambda: NOON_MS * 10**6, **how}

    def report(level: int, text: str) -> None:
        told.append(f"{logging.getLevelName(level)} {text}")

    return bitrouter.Ledger(str(path), report=report, **how), told


def filled(path: Path, receipts: Iterable[bitrouter.Receipt], **how: Any) -> bitrouter.Ledger:
    """A ledger that was written and closed."""
    ledger, told = made(path, **how)
    for one in receipts:
        ledger.put(one)
    ledger.start()
    ledger.close()
    assert told == []
    return ledger


def usage(ledger: bitrouter.Ledger, **asked: str) -> bitrouter.JsonObject:
    return ledger.usage(bitrouter.usage_query({"from": "all", **asked}, LATER_MS))


def requests(ledger: bitrouter.Ledger, **asked: str) -> bitrouter.JsonObject:
    return ledger.requests(bitrouter.requests_query(asked, LATER_MS))


def ids(answer: bitrouter.JsonObject) -> list[str]:
    return [one["id"] for one in answer["data"]]


def until(is_so: Callable[[], object]) -> None:
    for _ in range(2_000):
        if is_so():
            return
        time.sleep(0.005)
    raise AssertionError("it never came to be so")


def count(path: Path) -> int:
    """Rows of a file that is whole."""
    db = sqlite3.connect(path)
    try:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        found: int = db.execute("SELECT count(*) FROM receipts").fetchone()[0]
        return found
    finally:
        db.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "home" / "bitrouter.db"


# What is put in adds up.

GROUPS: dict[str, Callable[[bitrouter.Receipt], list[str]]] = {
    "model": lambda one: [one.model],
    "provider": lambda one: [one.provider],
    "key": lambda one: [one.key],
    "session": lambda one: [one.session],
    "tag": lambda one: [f"{name}={value}" for name, value in one.tags] or [""],
    "day": lambda one: [time.strftime("%Y-%m-%d", time.gmtime(one.at // 1000))],
    "hour": lambda one: [time.strftime("%Y-%m-%dT%H:00Z", time.gmtime(one.at // 1000))],
}


def charged(one: bitrouter.Receipt) -> int | None:
    """The cost by integers alone: each rate of the scripted day is a whole number of nano-dollars
    for a token."""
    if one.usage is None or one.price is None:
        return None
    tokens, price = one.usage, one.price
    for above, tier in price.tiers:
        price = tier if tokens.input_tokens > above else price
    plain = tokens.input_tokens - tokens.cached_tokens - tokens.cache_write_tokens
    counts = (plain, tokens.output_tokens, tokens.cached_tokens, tokens.cache_write_tokens)
    return sum(
        tokens * int((rate or 0) * 1000) for tokens, rate in zip(counts, price[:4], strict=True)
    )


def summed(receipts: list[bitrouter.Receipt]) -> bitrouter.JsonObject:
    """What the ledger should say of receipts, added up one by one."""
    used = [one.usage for one in receipts if one.usage]
    costs = [charged(one) for one in receipts if one.usage]
    known = [cost for cost in costs if cost is not None]
    cost = sum(known) if known or not costs else None
    ttfts = [round(one.ttft * 10**6) for one in receipts if one.ttft is not None]
    tooks = [round(one.took * 10**6) for one in receipts]
    return {
        "requests": len(receipts),
        "errors": sum(one.status >= 400 for one in receipts),
        **{n: sum(getattr(one, n) for one in used) for n in bitrouter.Usage._fields},
        "cost_nano": cost,
        "cost_usd": None if cost is None else cost / 1e9,
        "unpriced": len(costs) - len(known),
        "ttft_ms": round(sum(ttfts) / len(ttfts) / 1000, 3) if ttfts else None,
        "took_ms": round(sum(tooks) / len(tooks) / 1000, 3),
    }


@pytest.fixture(scope="module")
def scripted(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[list[bitrouter.Receipt], bitrouter.Ledger]:
    receipts = day(5_000, seed=6)
    return receipts, filled(tmp_path_factory.mktemp("day") / "bitrouter.db", receipts)


@pytest.mark.parametrize("group_by", GROUPS)
def test_a_day_adds_up_to_the_nano_dollar(
    scripted: tuple[list[bitrouter.Receipt], bitrouter.Ledger], group_by: str
) -> None:
    receipts, ledger = scripted
    groups = defaultdict(list)
    for one in receipts:
        for name in GROUPS[group_by](one):
            groups[name].append(one)
    answer = usage(ledger, group_by=group_by)
    found = {one.pop("group"): one for one in answer["data"]}
    assert found == {name: summed(members) for name, members in groups.items()}
    assert answer["total"] == summed(receipts)


def test_the_most_expensive_comes_first(
    scripted: tuple[list[bitrouter.Receipt], bitrouter.Ledger],
) -> None:
    costs = [one["cost_nano"] or 0 for one in usage(scripted[1], group_by="session")["data"]]
    assert costs == sorted(costs, reverse=True)


# fmt: off
FILTERS: dict[str, tuple[dict[str, str], Callable[[bitrouter.Receipt], bool]]] = {
    "provider":     ({"provider": "google"},      lambda one: one.provider == "google"),
    "model":        ({"model": "model-1"},        lambda one: one.model == "model-1"),
    "full model":   ({"model": "google/model-2"}, lambda one: one.provider == "google"),
    "model asked":  ({"model": "openai/gpt-4o-mini"}, lambda _: True),
    "key":          ({"key": "chat"},             lambda one: one.key == "chat"),
    "session":      ({"session": "s7"},           lambda one: one.session == "s7"),
    "caller":       ({"caller": "openai-python"}, lambda _: True),
    "other caller": ({"caller": "openai"},        lambda _: False),
    "tag":          ({"tag": "team:b"},           lambda one: ("team", "b") in one.tags),
    "half a tag":   ({"tag": "eam:b"},            lambda _: False),
    "status":       ({"status": "499"},           lambda one: one.status == 499),
    "class":        ({"status": "5xx"},           lambda one: one.status == 503),
    "error":        ({"status": "error"},         lambda one: one.status >= 400),
    "two":          ({"key": "chat", "status": "error"},
                     lambda one: one.key == "chat" and one.status >= 400),
    "one day":      ({"to": "2026-11-25"},        lambda one: one.at < NOON_MS + DAY_MS // 2),
    "from an hour": ({"from": "2026-11-26T06:00"}, lambda one: one.at >= NOON_MS + DAY_MS * 3 // 4),
    "id":           ({"id": "nobody's"},          lambda _: False),
}
# fmt: on


@pytest.mark.parametrize("name", FILTERS)
def test_filters_keep_what_they_say(
    scripted: tuple[list[bitrouter.Receipt], bitrouter.Ledger], name: str
) -> None:
    receipts, ledger = scripted
    asked, keeps = FILTERS[name]
    kept = [one for one in receipts if keeps(one)]
    assert usage(ledger, **asked)["total"]["requests"] == len(kept)
    newest_first = [one.id for one in sorted(kept, key=lambda one: -one.at)]
    assert ids(requests(ledger, limit="1000", **asked)) == newest_first[:1000]


def test_a_receipt_is_told_as_it_was_put_in(path: Path) -> None:
    receipts = day(300, seed=1)
    ledger = filled(path, receipts)
    told = requests(ledger, limit="1000")["data"]
    assert told == [bitrouter.receipt_json(one) for one in reversed(receipts)]


# Pages.


def pages(ledger: bitrouter.Ledger, **asked: str) -> Iterator[bitrouter.JsonObject]:
    while True:
        page = requests(ledger, **asked)
        yield page
        if not page["has_more"]:
            assert page["next"] is None
            return
        asked["before"] = page["next"]


@pytest.mark.parametrize("limit", [1, 7, 25, 40])
def test_paging_tells_each_receipt_once_even_those_of_one_moment(path: Path, limit: int) -> None:
    at = [NOON_MS + n // 10 for n in range(25)]
    ledger = filled(path, [receipt(id=f"r{n}", at=at[n]) for n in range(25)])
    found = [ids(page) for page in pages(ledger, limit=str(limit))]
    assert [len(page) for page in found[:-1]] == [limit] * (len(found) - 1)
    assert [*itertools.chain(*found)] == [f"r{n}" for n in reversed(range(25))]


def test_what_is_new_does_not_move_older_pages(path: Path) -> None:
    ledger = filled(path, [receipt(id=f"r{n}") for n in range(4)])
    page = requests(ledger, limit="2")
    filled(path, [receipt(id="new")])
    assert ids(requests(ledger, limit="2", before=page["next"])) == ["r1", "r0"]


# Files.


def test_nobody_else_may_read_the_file_or_its_folder(path: Path) -> None:
    before = os.umask(0)
    try:
        ledger, _ = made(path)
        ledger.put(receipt())
        ledger.start()
        until(lambda: ledger.written)
        files = sorted(path.parent.iterdir())
        modes = {stat.S_IMODE(file.stat().st_mode) for file in files}
        ledger.close()
    finally:
        os.umask(before)
    assert [file.name for file in files] == [path.name + more for more in ("", "-shm", "-wal")]
    assert modes == {0o600}
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


@pytest.mark.parametrize(
    ("environ", "url", "found"),
    [
        ({"BITROUTER_HOME": "/b"}, "", "/b/bitrouter.db"),
        ({}, "", "~/.bitrouter/bitrouter.db"),
        ({"BITROUTER_HOME": ""}, "", "~/.bitrouter/bitrouter.db"),
        ({"BITROUTER_HOME": "/b"}, "~/x.db", "~/x.db"),
        ({}, "x.db", "x.db"),
        ({}, "sqlite:///var/x.db", "/var/x.db"),
        ({"BITROUTER_HOME": "/b"}, "memory:", "memory:"),
    ],
)
def test_where_the_ledger_is(environ: dict[str, str], url: str, found: str) -> None:
    assert Path(bitrouter.ledger_path(environ, url)) == Path(found).expanduser()


def test_another_database_is_refused_without_telling_its_password() -> None:
    text = '[state]\nurl = "postgres://u:secret@h/db"\n'
    [problem] = bitrouter.parse_config(text, {}).problems
    assert problem.startswith("bitrouter.toml:2: state.url: expected the path of an SQLite file")
    assert problem.endswith("got one that begins with postgres:")


def test_where_there_is_no_file_nothing_is_told_and_none_is_made(path: Path) -> None:
    ledger, _ = made(path)
    assert (usage(ledger)["data"], requests(ledger)["data"]) == ([], [])
    ledger.close()
    assert not path.exists()


def test_without_a_file_receipts_are_kept_in_memory(path: Path) -> None:
    ledger, told = made("memory:")
    assert usage(ledger)["total"]["requests"] == 0
    for one in day(1_200, seed=2):
        ledger.put(one)
    ledger.start()
    until(lambda: ledger.written == 1_200)
    assert usage(ledger)["total"]["requests"] == 1_200
    assert len(requests(ledger)["data"]) == 50
    ledger.close()
    assert told == []
    assert not list(path.parent.parent.iterdir())


def test_memory_keeps_the_latest_fifty_thousand() -> None:
    ledger, _ = made("memory:", room=50_100)
    for n in range(50_100):
        ledger.put(receipt(at=NOON_MS + n))
    ledger.start()
    until(lambda: ledger.written == 50_100)
    assert usage(ledger)["total"]["requests"] == 50_000
    assert usage(ledger, to="2026-11-25T12:00:00.100")["total"]["requests"] == 0
    ledger.close()


def test_tables_of_others_in_the_file_stay(path: Path) -> None:
    path.parent.mkdir()
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE requests (id TEXT)")
    db.execute("INSERT INTO requests VALUES ('theirs')")
    db.commit()
    db.close()
    ledger = filled(path, [receipt(id="ours")])
    assert ids(requests(ledger)) == ["ours"]
    db = sqlite3.connect(path)
    assert db.execute("SELECT * FROM requests").fetchall() == [("theirs",)]
    db.close()


# Versions.


def test_a_file_of_an_older_version_is_renewed_and_keeps_its_receipts(path: Path) -> None:
    filled(path, [], migrations=bitrouter.MIGRATIONS[:2])
    db = sqlite3.connect(path)
    with db:
        db.execute(
            "INSERT INTO receipts (at, status, took_us, upstream_us, provider, model, key, session,"
            " caller, asked, id, op, account, code, finish, warnings, trace, attempts, price,"
            " input_tokens, output_tokens, cached_tokens, cache_write_tokens, reasoning_tokens)"
            " VALUES (?, 200, 1, 1, '', '', '', '', '', '', 'old', '', '', '', '', '', '', '[]',"
            " '[1.0,2.0,0.5,4.0]', 9, 1, 0, 0, 0)",
            [receipt().at],
        )
    db.close()
    ledger = filled(path, [receipt(id="new")])
    assert ids(requests(ledger)) == ["new", "old"]
    db = sqlite3.connect(path)
    assert db.execute("PRAGMA user_version").fetchone() == (len(bitrouter.MIGRATIONS),)
    assert db.execute("SELECT name FROM sqlite_master WHERE type='index'").fetchall()
    db.close()


def test_who_only_reads_renews_nothing(path: Path) -> None:
    filled(path, [], migrations=bitrouter.MIGRATIONS[:1])
    with pytest.raises(bitrouter.LedgerError, match="older version: start the server"):
        usage(made(path)[0])


def test_a_file_of_a_newer_version_is_left_alone(path: Path) -> None:
    newer = (*bitrouter.MIGRATIONS, "ALTER TABLE receipts ADD COLUMN mood TEXT")
    filled(path, [receipt(id="newer")], migrations=newer)
    before = path.read_bytes()
    ledger, told = made(path)
    ledger.put(receipt())
    ledger.start()
    until(lambda: told)
    assert "written by a newer bitrouter (its version is 4" in told[0]
    with pytest.raises(bitrouter.LedgerError, match="newer bitrouter"):
        usage(ledger)
    ledger.close()
    assert path.read_bytes() == before
    assert told[-1].startswith("ERROR ledger_lost receipts=1 ")


# What goes wrong.


def test_a_file_that_is_none_of_ours_is_moved_aside(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"not a database, but a letter\n" * 500)
    ledger, told = made(path)
    ledger.put(receipt())
    ledger.start()
    until(lambda: ledger.written)
    ledger.close()
    aside = Path(f"{path}.corrupt-{NOON_MS // 1000}")
    assert aside.read_bytes() == b"not a database, but a letter\n" * 500
    assert told == [
        f"ERROR ledger_corrupt error=file is not a database kept={aside} begun=anew",
    ]
    assert count(path) == 1


def test_a_file_whose_inside_is_damaged_is_moved_aside(path: Path) -> None:
    filled(path, day(500, seed=3))
    whole = path.read_bytes()
    path.write_bytes(whole[:4096] + os.urandom(len(whole) - 4096))
    ledger, told = made(path)
    ledger.put(receipt())
    ledger.start()
    until(lambda: ledger.written)
    assert ids(requests(ledger)) == [receipt().id]
    ledger.close()
    assert "ledger_corrupt" in told[0]
    assert len(told) == 1


def test_who_only_reads_a_damaged_file_is_told(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"x" * 9_999)
    with pytest.raises(bitrouter.LedgerError, match="file is not a database"):
        usage(made(path)[0])


def test_a_file_that_was_removed_is_begun_anew(path: Path) -> None:
    ledger, told = made(path)
    ledger.put(receipt(id="gone"))
    ledger.start()
    until(lambda: ledger.written == 1)
    for file in path.parent.iterdir():
        file.unlink()
    ledger.put(receipt(id="here"))
    until(lambda: ledger.written == 2)
    assert ids(requests(ledger)) == ["here"]
    ledger.close()
    assert told == []


def test_while_another_has_the_lock_receipts_wait(path: Path) -> None:
    filled(path, [])
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    ledger, told = made(path)
    ledger.put(receipt())
    ledger.start()
    until(lambda: ledger.error)
    time.sleep(0.05)  # several turns
    assert ledger.status() == {
        "path": str(path),
        "written": 0,
        "waiting": 1,
        "dropped": 0,
        "error": "database is locked",
    }
    other.execute("COMMIT")
    until(lambda: ledger.written == 1)
    other.execute("BEGIN IMMEDIATE")  # once more, in the same minute: no news
    ledger.put(receipt())
    until(lambda: ledger.error)
    other.close()
    ledger.close()
    assert ledger.status()["error"] is None
    assert [line.split(" path=")[0] for line in told] == [
        "ERROR ledger_failing error='database is locked'",
        "WARNING ledger_recovered dropped=0",
    ]
    assert count(path) == 2


def test_what_waits_is_bounded_and_the_oldest_goes_first(path: Path) -> None:
    ledger, _ = made(path, room=100)
    for n in range(250):
        ledger.put(receipt(id=f"r{n}"))
    assert (ledger.dropped, ledger.status()["waiting"]) == (150, 100)
    ledger.start()
    ledger.close()
    assert set(ids(requests(ledger, limit="1000"))) == {f"r{n}" for n in range(150, 250)}


def test_half_a_character_from_somebodys_json_spoils_nothing(path: Path) -> None:
    odd = receipt(id="odd", asked="\ud83d", tags=(("\udc00", "\ud800"),))
    ledger = filled(path, [receipt(id="a"), odd, receipt(id="b")])
    assert ids(requests(ledger)) == ["b", "odd", "a"]
    assert requests(ledger, id="odd")["data"][0]["asked"] == "?"


def test_a_receipt_that_cannot_be_written_at_all_does_not_stop_the_others(path: Path) -> None:
    ledger, told = made(path)
    ledger.put(receipt(took=None))
    ledger.start()
    until(lambda: ledger.dropped)
    ledger.put(receipt())
    until(lambda: ledger.written)
    ledger.close()
    assert [line.split()[1] for line in told] == ["ledger_failing", "ledger_recovered"]


def test_what_upstreams_claim_cannot_break_sums(path: Path) -> None:
    most = receipt(usage=bitrouter.Usage(10**12), cost_nano=10**15)
    absurd = receipt(usage=bitrouter.Usage(10**15), cost_nano=10**24)
    total = usage(filled(path, [most, absurd] * 20))["total"]
    assert (total["input_tokens"], total["cost_nano"]) == (20 * 10**12, 20 * 10**15)


def test_a_question_may_not_take_for_ever(path: Path) -> None:
    filled(path, day(3_000, seed=4))
    ledger, _ = made(path, deadline_s=0.0)
    with pytest.raises(bitrouter.LedgerError, match="longer than 0 s: ask for a shorter time"):
        usage(ledger)


# Age.


def test_what_is_too_old_is_removed_in_small_steps(path: Path) -> None:
    old = [receipt(id=f"o{n}", at=NOON_MS - 10 * DAY_MS) for n in range(4_500)]
    young = [receipt(id="y", at=NOON_MS - 9 * DAY_MS)]
    filled(path, [*young, *old], keep_days=0)
    ledger, _ = made(path, keep_days=9.5)
    ledger.start()
    until(lambda: requests(ledger, limit="2")["has_more"] is False)
    assert ids(requests(ledger)) == ["y"]
    ledger.close()


def test_each_hour_what_has_become_too_old_is_removed(path: Path) -> None:
    hours = itertools.count()
    filled(path, [receipt()])
    ledger, _ = made(path, keep_days=1, clock=lambda: (NOON_MS + next(hours) * 3_600_000) * 10**6)
    ledger.start()
    until(lambda: not ids(requests(ledger)))
    ledger.close()
    assert next(hours) > 24


# Processes. Each is given a ledger, as `made` makes them.

BEFORE = f"""
import json, os, resource, sys, time
sys.path[:0] = {sys.path!r}
import {bitrouter.__name__} as bitrouter
from support import receipt
told = []
def made(path, **how):
    return bitrouter.Ledger(path, batch_s=0.005, report=lambda _, text: told.append(text), **how)
def until(is_so):
    for _ in range(2_000):
        if is_so():
            return
        time.sleep(0.005)
    raise AssertionError("it never came to be so")
path = sys.argv[1]
"""


def begun(script: str, path: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", BEFORE + script, str(path)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def said(process: subprocess.Popen[str]) -> Any:
    """The JSON that a process prints before it ends."""
    with process:
        text, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    return json.loads(text)


def test_a_process_that_is_killed_loses_its_last_batch_at_most(path: Path) -> None:
    process = begun(
        """
ledger = made(path)
ledger.start()
for n in range(10**6):
    ledger.put(receipt(id=f"r{n}"))
    if n % 50 == 0:
        time.sleep(0.001)
        print(ledger.written, flush=True)
""",
        path,
    )
    assert process.stdout
    with process:
        written = 0
        while written < 1_000:
            written = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
        lines = process.stdout.read().splitlines()
    if lines:
        written = int(lines[-1])
    assert count(path) >= written
    ledger = filled(path, [receipt(id="after")])
    assert ids(requests(ledger, limit="1")) == ["after"]


def test_a_full_disk_stops_nothing_and_loses_nothing_once_there_is_room(path: Path) -> None:
    process = begun(
        """
ledger = made(path)
ledger.start()
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
for n in range(3_000):
    ledger.put(receipt(id=f"r{n}"))
until(lambda: ledger.error)
ledger.put(receipt(id="more"))
time.sleep(0.05)
failing = list(told)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
until(lambda: not ledger.error)
ledger.close()
print(json.dumps([failing, told, ledger.status()]))
""",
        path,
    )
    failing, told, status = said(process)
    assert len(failing) == 1
    assert re.match("ledger_failing error='(database or disk is full|disk I/O error)' ", failing[0])
    assert told[1:] == ["ledger_recovered dropped=0"]
    assert (status["written"], status["waiting"], status["error"]) == (3_001, 0, None)
    assert count(path) == 3_001


READ_ONLY = """
import sqlite3
if os.getuid() == 0:
    os.setuid(65534)  # to root nothing is read-only
ledger = made(path)
ledger.start()
for n in range(10):
    ledger.put(receipt())
until(lambda: ledger.error)
time.sleep(0.05)
ledger.close()
print(json.dumps(told))
"""


@pytest.mark.parametrize("what", ["folder", "file"])
def test_where_nothing_may_be_written_serving_goes_on(what: str) -> None:
    with tempfile.TemporaryDirectory() as place:  # tmp_path is closed to other users
        folder = Path(place) / "home"
        path = folder / "bitrouter.db"
        if what == "file":
            filled(path, [receipt()])
            path.chmod(0o444)
        else:
            folder.mkdir()
        Path(place).chmod(0o755)
        folder.chmod(0o777 if what == "file" else 0o555)
        told = said(begun(READ_ONLY, path))
        folder.chmod(0o700)
    assert len(told) == 2
    assert "Permission denied" in told[0]
    assert told[1].startswith("ledger_lost receipts=10 ")


def test_two_processes_share_a_file(path: Path) -> None:
    script = """
ledger = made(path)
ledger.start()
for n in range(2_000):
    ledger.put(receipt(session=str(os.getpid())))
    if n % 100 == 0:
        time.sleep(0.002)
ledger.close()
print(json.dumps([os.getpid(), ledger.status()]))
"""
    ends = [said(process) for process in [begun(script, path) for _ in range(2)]]
    answer = usage(made(path)[0], group_by="session")
    assert {one["group"]: one["requests"] for one in answer["data"]} == {
        str(pid): 2_000 for pid, _ in ends
    }
    assert {(status["written"], status["dropped"]) for _, status in ends} == {(2_000, 0)}
    assert count(path) == 4_000


def test_damage_that_only_a_reader_sees_is_set_aside_by_the_writer(path: Path) -> None:
    filled(path, day(2000, 1))
    with path.open("r+b") as file:  # pages in the middle, which writing does not touch
        file.seek(4096 * 5)
        file.write(os.urandom(4096 * 5))
    ledger, told = made(path)
    ledger.start()
    with pytest.raises(bitrouter.LedgerError, match="malformed"):
        usage(ledger)
    until(lambda: told)
    ledger.put(receipt())
    until(lambda: ids(requests(ledger)))
    ledger.close()
    assert told[0].startswith("ERROR ledger_corrupt") and len(told) == 1
    assert [*path.parent.glob("*.corrupt-*")]


def test_rates_of_any_size_are_multiplied_exactly() -> None:
    rates = bitrouter.Price(0.0123455, 4e-7)
    assert bitrouter.cost_nanousd(bitrouter.Usage(1_000_000), rates) == 12_345_500
    assert bitrouter.cost_nanousd(bitrouter.Usage(0, 5_000_000), rates) == 2_000
