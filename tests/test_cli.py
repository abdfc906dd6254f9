"""The command line: what each command prints, where, and how it exits."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from support import Ran

import bitrouter

pytestmark = pytest.mark.usefixtures("tmp_path")  # a server writes in its home

FILE = Path(__file__).parent.parent / "bitrouter.py"
SCRIPT = (sys.executable, "-W", "error", "-B", str(FILE))
# As the installed command does it: a module is compiled once, a script each time.
INSTALLED = (
    sys.executable, "-W", "error", "-c", "import sys, bitrouter; sys.exit(bitrouter.main())",
)  # fmt: skip
KEY = "sk-a-very-secret-key-0123456789"


def clean(**environ: str) -> dict[str, str]:
    """An environment with nothing in it that could turn a provider on."""
    kept = {name: os.environ[name] for name in ("HOME", "PATH", "SYSTEMROOT") if name in os.environ}
    return {**kept, "PYTHONPATH": str(FILE.parent), **environ}


def run_apart(*args: str, **environ: str) -> Ran:
    """A command in a process of its own."""
    done = subprocess.run(
        [*INSTALLED, *args],
        capture_output=True,
        text=True,
        timeout=9,
        env=clean(**environ),
        check=False,
    )
    return Ran(done.returncode, done.stdout, done.stderr)


@asynccontextmanager
async def running(*args: str, **environ: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """A server in the background that is gone afterwards, come what may."""
    pipe = asyncio.subprocess.PIPE
    environ = clean(PYTHONDEVMODE="1", **environ)
    process = await asyncio.create_subprocess_exec(
        *INSTALLED, *args, stdout=pipe, stderr=pipe, env=environ
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def logged(process: asyncio.subprocess.Process, event: str) -> dict[str, Any]:
    """The next line of the log that reports this event."""
    assert process.stderr
    async for line in process.stderr:
        facts: dict[str, Any] = json.loads(line)
        if facts["event"] == event:
            return facts
    raise AssertionError(f"{event} was never logged")


GOOD = """
[providers.openai]
api_key = "${MY_KEY}"
[models.smart]
endpoints = [{provider = "openai", service_id = "gpt-4o"}]
"""
BAD = '[server]\nlistn = "x"\nauth = 3\n[upstream.retry]\nmax = -1\n'


@pytest.fixture
def good(tmp_path: Path) -> str:
    path = tmp_path / "good.toml"
    path.write_text(GOOD)
    return str(path)


@pytest.fixture
def bad(tmp_path: Path) -> str:
    path = tmp_path / "bad.toml"
    path.write_text(BAD)
    return str(path)


def test_the_version_is_told() -> None:
    assert run_apart("--version") == Ran(0, f"bitrouter {bitrouter.__version__}\n", "")


def test_help_lists_every_command(run: Callable[..., Ran]) -> None:
    status, out, _ = run("--help")
    assert status == 0
    for command in bitrouter.COMMANDS:
        assert re.search(rf"^ +{command.name.split()[0]}\b", out, re.MULTILINE)


@pytest.mark.parametrize(
    "args", [["frobnicate"], ["config"], ["route"], ["serve", "--nope"], ["--port", "x"]]
)
def test_what_is_not_understood_exits_with_2(args: list[str], run: Callable[..., Ran]) -> None:
    status, out, err = run(*args)
    assert (status, out) == (2, "") and "usage: bitrouter" in err


# config validate


def test_a_good_file_is_valid_without_its_secrets(good: str, run: Callable[..., Ran]) -> None:
    ran = run("config", "validate", "-c", good)
    facts = ran.json()
    assert (ran.status, facts["valid"], facts["errors"]) == (0, True, [])
    assert (facts["path"], facts["providers"], facts["models"]) == (good, 1, 1)
    [warning] = facts["warnings"]
    assert warning.startswith(f"{good}:3: ") and "MY_KEY is not set" in warning


def test_people_get_columns(good: str, bad: str, run: Callable[..., Ran]) -> None:
    assert run("config", "validate", "-c", good, "--human", MY_KEY="k") == Ran(
        0, f"ok  {good}\n", ""
    )
    ran = run("config", "validate", "-c", bad, "--human")
    assert ran.status == 1
    assert [line.split("  ")[0] for line in ran.out.splitlines()] == ["error"] * 3


def test_there_must_be_a_file_to_validate(run: Callable[..., Ran]) -> None:
    status, out, err = run("config", "validate")
    assert (status, out) == (1, "") and "-c FILE" in err


# Which file is used.


def test_the_file_that_is_named_comes_first(
    good: str, tmp_path: Path, run: Callable[..., Ran]
) -> None:
    (tmp_path / "bitrouter.toml").write_text(BAD)
    assert run("config", "validate", "-c", good).json()["path"] == good


PLACES = ("bitrouter.toml", "home/bitrouter.toml", ".bitrouter/bitrouter.toml")


@pytest.mark.parametrize(
    ("present", "home", "found"),
    [(PLACES, "home", 0), (PLACES[1:], "home", 1), (PLACES[1:], "", 2), (PLACES[::2], "", 0)],
)
def test_a_file_is_looked_for_here_then_at_home(
    present: tuple[str, ...], home: str, found: int, tmp_path: Path
) -> None:
    for place in present:
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).write_text("")
    environ = {"HOME": str(tmp_path)} | ({"BITROUTER_HOME": str(tmp_path / home)} if home else {})
    path = bitrouter.find_config("", environ)
    assert (tmp_path / path).resolve() == (tmp_path / PLACES[found]).resolve()


def test_no_file_anywhere_is_fine() -> None:
    assert bitrouter.find_config("", {}) == ""


def test_a_home_without_a_file_is_an_error(tmp_path: Path, run: Callable[..., Ran]) -> None:
    status, out, err = run(BITROUTER_HOME=str(tmp_path))
    assert (status, out) == (1, "") and err.startswith(f"bitrouter: BITROUTER_HOME is {tmp_path}, ")


def test_a_file_that_is_not_there_is_an_error() -> None:
    assert run_apart("models", "-c", "nowhere.toml") == Ran(
        1, "", "bitrouter: there is no file nowhere.toml\n"
    )


def test_a_file_that_is_no_text_is_an_error(tmp_path: Path, run: Callable[..., Ran]) -> None:
    (tmp_path / "bitrouter.toml").write_bytes(b"\xff\xfe")
    status, out, err = run("models")
    assert (status, out) == (1, "") and err.startswith("bitrouter: bitrouter.toml cannot be read: ")


def test_an_error_is_json_for_who_asks_for_json(run: Callable[..., Ran]) -> None:
    ran = run("route", "openai/gpt-4o", "--json")
    assert (ran.status, ran.json()["error"]["code"]) == (1, "provider_key_missing")
    assert "OPENAI_API_KEY" in ran.json()["error"]["message"] and "OPENAI_API_KEY" in ran.err


# providers, models, route


def test_providers_show_what_turned_them_on_or_would(run: Callable[..., Ran]) -> None:
    rows = {
        row["id"]: row for row in run("providers", GOOGLE_API_KEY=f"{KEY},k2").json()["providers"]
    }
    google, openai = rows["google"], rows["openai"]
    assert set(rows) == set(bitrouter.PROVIDERS) and next(iter(rows)) == "google"
    assert (google["active"], google["enabled_by"], google["accounts"]) == (
        True,
        "GOOGLE_API_KEY",
        2,
    )
    assert (openai["active"], openai["env"]) == (False, ["OPENAI_API_KEY"])


def test_providers_are_readable(run: Callable[..., Ran]) -> None:
    ran = run("providers", "--human", OPENAI_API_KEY=KEY)
    lines = [line.split() for line in ran.out.splitlines()]
    assert lines[0] == ["openai", "OPENAI_API_KEY", "chat_completions,responses"]
    assert ["anthropic", "set", "ANTHROPIC_API_KEY", "messages"] in lines
    assert KEY not in ran.out + ran.err


def test_a_provider_that_is_off_against_ones_wish_is_warned_of(run: Callable[..., Ran]) -> None:
    ran = run("providers", AZURE_OPENAI_API_KEY=KEY)
    assert ran.status == 0 and "AZURE_OPENAI_RESOURCE is not" in ran.err


def test_models_are_what_can_be_asked_for_now(run: Callable[..., Ran]) -> None:
    rows = {row["id"]: row for row in run("models", OPENAI_API_KEY=KEY).json()["models"]}
    assert "echo/echo" in rows and "anthropic/claude-sonnet-5" not in rows
    mini = rows["openai/gpt-4o-mini"]
    assert (mini["providers"], mini["context"]) == (["openai"], 128000)
    assert (mini["usd_per_million_input"], mini["usd_per_million_output"]) == (0.15, 0.6)


def test_all_models_are_the_catalogue_and_can_be_narrowed(run: Callable[..., Ran]) -> None:
    everything = {row["id"] for row in run("models", "--all").json()["models"]}
    assert everything == set(bitrouter.catalogue())
    rows = run("models", "--all", "-p", "gemini").json()["models"]
    assert rows and all("google" in row["providers"] for row in rows)


def test_models_of_a_provider_that_does_not_exist_are_an_error(run: Callable[..., Ran]) -> None:
    status, _, err = run("models", "-p", "opnai")
    assert status == 1 and "openai" in err


OFFER = """
inherit_defaults = false
[providers.big]
api_base = "http://big/v1"
[[providers.big.models]]
id = "seer"
capabilities = ["image_input", "tools"]
context = 200000
pricing = {input = 4, output = 8}
[[providers.big.models]]
id = "talker"
capabilities = ["audio_output"]
context = 32000
pricing = {input = 0.5, output = 1}
[providers.small]
api_base = "http://small/v1"
[[providers.small.models]]
id = "reader"
capabilities = ["file_input", "reasoning"]
context = 8000
pricing = {input = 0, output = 0}
[[providers.small.models]]
id = "unknown"
"""

# fmt: off
FILTERS: list[tuple[tuple[str, ...], set[str]]] = [
    ((),                                      {"seer", "talker", "reader", "unknown"}),
    (("-p", "big"),                           {"seer", "talker"}),
    (("--provider", "small"),                 {"reader", "unknown"}),
    (("--capability", "tools"),               {"seer"}),
    (("--capability", "reasoning"),           {"reader"}),
    (("--capability", "video_input"),         set()),
    (("--modality", "text"),                  {"seer", "talker", "reader", "unknown"}),
    (("--modality", "image"),                 {"seer"}),
    (("--modality", "audio"),                 {"talker"}),
    (("--modality", "pdf"),                   {"reader"}),
    (("--max-price", "0"),                    {"reader"}),
    (("--max-price", "0.5"),                  {"reader", "talker"}),
    (("--max-price", "3.99"),                 {"reader", "talker"}),
    (("--max-price", "4"),                    {"reader", "talker", "seer"}),
    (("--min-context", "8001"),               {"talker", "seer"}),
    (("--min-context", "32000"),              {"talker", "seer"}),
    (("--min-context", "1000000"),            set()),
    (("-p", "big", "--max-price", "1"),       {"talker"}),
    (("--modality", "image", "--min-context", "9", "--capability", "tools"), {"seer"}),
]
# fmt: on


@pytest.mark.parametrize(("args", "wanted"), FILTERS)
def test_models_are_narrowed(
    args: tuple[str, ...], wanted: set[str], run: Callable[..., Ran]
) -> None:
    rows = run("models", *args, text=OFFER).json()["models"]
    assert {row["id"].rpartition("/")[2] for row in rows} - {"echo"} == wanted


def test_a_model_of_the_file_is_listed_as_it_says(run: Callable[..., Ran]) -> None:
    [row] = [row for row in run("models", text=OFFER).json()["models"] if "seer" in row["id"]]
    assert (row["providers"], row["context"]) == (["big"], 200000)
    assert sorted(row["capabilities"]) == ["image_input", "tools"]
    assert (row["usd_per_million_input"], row["usd_per_million_output"]) == (4, 8)


# fmt: off
NO_FILTERS = [
    (("-p", "bgi"),                           "--provider: 'bgi' is not known; "),
    (("--capability", "tool"),
     "--capability: 'tool' is not known; did you mean tools"),
    (("--capability", "zzz"),
     "--capability: 'zzz' is not known; known are tools, "),
    (("--modality", "imge"),
     "--modality: 'imge' is not known; did you mean image"),
    (("--max-price", "cheap"),                "--max-price: expected a number, got 'cheap'"),
    (("--max-price=-1",),                     "--max-price: expected a number, got '-1'"),
    (("--min-context", "1e5"),                "--min-context: expected a number, got '1e5'"),
]
# fmt: on


@pytest.mark.parametrize(("args", "said"), NO_FILTERS)
def test_a_filter_that_makes_no_sense_is_an_error(
    args: tuple[str, ...], said: str, run: Callable[..., Ran]
) -> None:
    status, out, err = run("models", *args, text=OFFER)
    assert (status, out) == (1, "") and err.startswith(f"bitrouter: {said}")


def test_a_route_is_told_in_order_with_reasons(run: Callable[..., Ran]) -> None:
    environ = {"OPENAI_API_KEY": KEY, "OPENROUTER_API_KEY": KEY}
    facts = run("route", "gpt-4o-mini", **environ).json()
    assert [(s["provider"], s["model"]) for s in facts["chain"]] == [
        ("openai", "gpt-4o-mini"),
        ("openrouter", "openai/gpt-4o-mini"),
    ]
    assert facts["protocol"] == "chat_completions" and all(s["reason"] for s in facts["chain"])


@pytest.mark.parametrize("form", ["--json", "--human"])
def test_a_route_that_is_explained_shows_no_key(form: str, run: Callable[..., Ran]) -> None:
    environ = {"OPENAI_API_KEY": f"{KEY},{KEY[::-1]}"}
    ran = run("route", "openai/gpt-4o-mini", "--explain", form, **environ)
    assert ran.status == 0 and "https://api.openai.com/v1/chat/completions" in ran.out
    assert "Bearer [redacted]" in ran.out and "OPENROUTER_API_KEY is not set" in ran.out
    assert KEY not in ran.out + ran.err and KEY[::-1] not in ran.out + ran.err


def test_a_route_that_is_explained_shows_no_secret_header_of_the_file(
    tmp_path: Path, run: Callable[..., Ran]
) -> None:
    headers = '{"x-team" = "red", "x-second-key" = "${SECOND}"}'
    path = tmp_path / "bitrouter.toml"
    path.write_text(f"[providers.openai]\nextra_headers = {headers}\n")
    ran = run("route", "openai/gpt-4o-mini", "--explain", OPENAI_API_KEY="k-1", SECOND=KEY)
    assert "x-second-key: " in ran.out and KEY not in ran.out + ran.err


def test_a_route_of_another_protocol_has_its_own_address(run: Callable[..., Ran]) -> None:
    args = ("route", "gemini-3.8-flash", "--explain", "--protocol", "google")
    first = run(*args, GEMINI_API_KEY=KEY).json()["first"]
    base = "https://generativelanguage.googleapis.com/v1beta"
    assert first["url"] == f"{base}/models/gemini-3.8-flash:generateContent"
    assert "x-goog-api-key: [redacted]" in first["headers"]


def test_a_route_to_nowhere_says_what_was_meant(run: Callable[..., Ran]) -> None:
    status, out, err = run("route", "claud-sonnet-4.6")
    assert (status, out) == (1, "") and "did you mean anthropic/claude-sonnet-4.6" in err


def test_output_that_nobody_reads_is_no_crash() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    with os.fdopen(write_end, "w") as nobody:
        command = [*SCRIPT, "models", "--all"]
        pipe = subprocess.PIPE
        done = subprocess.run(command, stdout=nobody, stderr=pipe, env=clean(), check=False)
    assert done.stderr == b""


# serve


def test_a_broken_file_is_not_served_and_all_problems_are_told(bad: str) -> None:
    status, out, err = run_apart("serve", "-c", bad, "--port", "0")
    assert (status, out) == (1, "")
    assert all(f"{bad}:{line}: " in err for line in (2, 3, 5))


def test_a_server_whose_own_variables_are_not_set_does_not_start(tmp_path: Path) -> None:
    path = tmp_path / "bitrouter.toml"
    path.write_text('[server]\n\nbase_path = "/${NOWHERE}"\n')
    status, _, err = run_apart("--port", "0")
    assert status == 1 and f"{path.name}:3: server.base_path: " in err
    assert "NOWHERE is not set" in err


def test_a_variable_that_is_not_set_breaks_only_what_uses_it(
    good: str, run: Callable[..., Ran]
) -> None:
    ran = run("route", "-c", good, "openai/gpt-4o")
    assert ran.status == 1 and "MY_KEY is not set" in ran.err
    assert run("route", "-c", good, "echo/echo").status == 0


@pytest.mark.parametrize("auth", ["auto", "none"])
def test_other_machines_are_not_served_without_keys(auth: str, tmp_path: Path) -> None:
    (tmp_path / "bitrouter.toml").write_text(f'[server]\nauth = "{auth}"')
    status, out, err = run_apart("--listen", "0.0.0.0:0")
    assert (status, out) == (1, "")
    assert err.startswith("bitrouter: server.") and "BITROUTER_KEYS" in err


def test_a_port_that_is_taken_is_told_clearly() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status, out, err = run_apart("--port", str(port))
    assert (status, out) == (1, "") and f"cannot listen on 127.0.0.1:{port}" in err
    assert "--port" in err and "Traceback" not in err


@pytest.mark.parametrize("args", [["--port", "99999"], ["--listen", "here"], ["--port", "-1"]])
def test_an_address_that_makes_no_sense_is_told(args: list[str], run: Callable[..., Ran]) -> None:
    status, out, err = run(*args)
    assert (status, out) == (1, "") and args[0] in err


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


async def health_at(address: str) -> bytes:
    host, _, port = address.removeprefix("http://").rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(b"GET /health HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n\r\n")
        return await reader.read()
    finally:
        writer.close()
        await writer.wait_closed()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_server_says_where_it_listens_and_ends_in_order(number: signal.Signals) -> None:
    async with running("serve", "--port", "0", OPENAI_API_KEY=KEY) as process:
        facts = await logged(process, "listening")
        assert facts["providers"] == "openai=OPENAI_API_KEY"
        assert b"200 OK" in await health_at(facts["address"])
        process.send_signal(number)
        out, err = await process.communicate()
    assert (process.returncode, out) == (0, b"")
    assert json.loads(err.splitlines()[-1])["event"] == "stopped"
    assert KEY.encode() not in err


async def test_without_a_word_it_serves_where_the_file_says(tmp_path: Path) -> None:
    port = free_port()
    (tmp_path / "bitrouter.toml").write_text(f'[server]\nlisten = "127.0.0.1:{port}"')
    async with running() as process:
        facts = await logged(process, "listening")
        assert facts["address"] == f"http://127.0.0.1:{port}"
        assert b"200 OK" in await health_at(facts["address"])


async def test_other_machines_are_served_with_keys() -> None:
    async with running("--listen", "0.0.0.0:0", BITROUTER_KEYS="k1") as process:
        assert (await logged(process, "listening"))["address"].startswith("http://0.0.0.0:")


async def test_a_base_that_is_ignored_is_warned_of_in_the_log() -> None:
    environ = {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": "http://api.example.com/v1"}
    async with running("--port", "0", **environ) as process:
        assert process.stderr
        facts = json.loads(await process.stderr.readline())
    assert facts["level"] == "warning" and "OPENAI_BASE_URL is ignored" in facts["message"]


async def test_a_log_for_people_is_chosen_by_the_file(tmp_path: Path) -> None:
    (tmp_path / "bitrouter.toml").write_text('[server]\nlog_format = "text"')
    async with running("--port", "0") as process:
        assert process.stderr
        line = (await process.stderr.readline()).decode()
    assert re.fullmatch(r"\S+Z info listening address=http://127\.0\.0\.1:\d+ .*\n", line)
