"""The README is true: every block in it is run here, and its tables match the code."""

from __future__ import annotations

import http.client
import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import bitrouter

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"(?ms)^```(\w+)\n(.*?)^```$", README)


def blocks(kind: str) -> list[str]:
    return [text for language, text in BLOCKS if language == kind]


def steps(block: str) -> list[tuple[str, str]]:
    """The commands of a console block, each with what it should print."""
    parts = re.split(r"(?m)^\$ (.*)\n", block)[1:]
    return list(zip(parts[::2], parts[1::2], strict=True))


def matches(expected: str, printed: str) -> bool:
    """Whether text is as expected, where `...` stands for anything on one line."""
    pattern = r"[^\n]*?".join(re.escape(piece) for piece in expected.split("..."))
    return re.fullmatch(pattern, printed) is not None


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """`python bitrouter.py`, as the README starts it, but on a port of its own."""
    home = tmp_path_factory.mktemp("home")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number = int(free.getsockname()[1])
    command = [sys.executable, str(ROOT / "bitrouter.py"), "--port", str(number)]
    env = {"PATH": os.environ["PATH"], "HOME": str(home)}
    with subprocess.Popen(command, cwd=home, env=env, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        assert b"listening" in process.stderr.readline()
        yield number
        process.terminate()
        assert process.wait(10) == 0


def curl(words: list[str], port: int) -> str:
    """What curl would print for the few options that the README uses."""
    url, headers, data = "", {}, None
    it = iter(words)
    for word in it:
        if word == "-H":
            name, _, value = next(it).partition(": ")
            headers[name] = value
        elif word == "-d":
            data = next(it)
        elif not word.startswith("-"):
            url = word
    path = url.removeprefix("http://127.0.0.1:4356")
    assert path != url
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("POST" if data else "GET", path, data, headers)
    body = connection.getresponse().read().decode().replace("\r\n", "\n")  # as a terminal shows it
    connection.close()
    return body if body.endswith("\n") else body + "\n"


def shell(command: str, folder: Path) -> str:
    """What a command prints, with this repository's bitrouter.py in the folder."""
    bin_folder = folder / "bin"
    bin_folder.mkdir(exist_ok=True)
    python = bin_folder / "python"
    if not python.exists():
        python.symlink_to(sys.executable)
        (folder / "bitrouter.py").symlink_to(ROOT / "bitrouter.py")
    env = {"PATH": f"{bin_folder}:{os.environ['PATH']}", "HOME": str(folder)}
    done = subprocess.run(
        command, shell=True, cwd=folder, env=env, capture_output=True, text=True, check=False
    )
    return done.stdout + done.stderr


CONSOLE = [pytest.param(block, id=steps(block)[0][0][:48]) for block in blocks("console")]


@pytest.mark.parametrize("block", CONSOLE)
def test_a_console_block_prints_what_it_says(block: str, port: int, tmp_path: Path) -> None:
    for command, expected in steps(block):
        words = shlex.split(command)
        printed = curl(words[1:], port) if words[0] == "curl" else shell(command, tmp_path)
        assert matches(expected, printed), f"{command}\nprinted:\n{printed}"


@pytest.mark.parametrize("block", blocks("toml"))
def test_a_configuration_block_has_no_problems(block: str) -> None:
    loaded = bitrouter.parse_config(block, {})
    assert (loaded.problems, loaded.unset) == ([], [])


def test_the_two_commands_are_what_is_run_and_what_ci_calls() -> None:
    run, test = blocks("sh")
    assert run == "python bitrouter.py\n"
    assert test.strip() in (ROOT / ".ci" / "run").read_text().replace(" --quiet", "")


def test_only_kinds_of_blocks_that_are_run_are_in_it() -> None:
    assert {language for language, _ in BLOCKS} <= {"sh", "console", "toml"}


def test_the_configuration_blocks_name_every_key() -> None:
    schema = bitrouter.config_schema()
    tables = [schema, *schema["$defs"].values()]
    keys = {key for table in tables for key in table.get("properties", ())}
    text = "\n".join(blocks("toml"))
    assert {key for key in keys if not re.search(rf"\b{key}\b", text)} == set()


def test_every_error_code_of_ours_is_listed() -> None:
    codes = {
        error.code
        for error in vars(bitrouter).values()
        if isinstance(error, type)
        and issubclass(error, bitrouter.BitrouterError)
        and not issubclass(error, bitrouter.UpstreamError | bitrouter.ConfigError)
    }
    assert {c for c in codes if f"`{c}`" not in README} == {
        "internal_error",
        "forbidden",
        "caller_gone",
    }


def test_every_operation_is_served_where_the_readme_says() -> None:
    for below in bitrouter.OPERATIONS:
        family = re.sub(r"^/(images|audio)/.*", r"/\1/*", below)
        assert f"/v1{family}" in README, below
    for verb in bitrouter.GEMINI_VERBS:
        assert f":{verb}" in README
