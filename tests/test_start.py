"""A server that is run as a script starts anew from the bytecode that Python keeps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).parent.parent / "bitrouter.py"
ENDS = ("serve", "--listen", "127.0.0.1:99999")  # reads its arguments, and goes no further


def ran(folder: Path, *args: str, options: tuple[str, ...] = (), **environ: str) -> tuple[int, str]:
    """A copy of the file in a folder, run as a script from a folder with odd modules."""
    script = folder / "bitrouter.py"
    if not script.exists():
        script.write_bytes(FILE.read_bytes())
    odd = folder / "odd"
    odd.mkdir(exist_ok=True)
    for name in ("json", "argparse", "importlib", "tomllib", "bitrouter"):
        (odd / f"{name}.py").write_text(f"raise SystemExit('{name} of a stranger')")
    kept = {"PATH": os.environ["PATH"], "HOME": str(folder)}
    done = subprocess.run(
        [sys.executable, *options, "-W", "error", str(script), *args],
        cwd=odd, env={**kept, **environ}, capture_output=True, text=True, timeout=20, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def bytecode(folder: Path) -> list[Path]:
    return list(folder.glob("__pycache__/bitrouter.*.pyc"))


def test_what_serves_keeps_bytecode_and_imports_nothing_from_where_it_is_run(
    tmp_path: Path,
) -> None:
    for _ in range(2):  # without bytecode, and with it
        status, said = ran(tmp_path, *ENDS)
        assert (status, said) == (
            1, 'bitrouter: --listen: expected HOST:PORT or unix:/PATH, got "127.0.0.1:99999"\n',
        )  # fmt: skip
        assert len(bytecode(tmp_path)) == 1


@pytest.mark.parametrize(
    ("args", "options", "environ"),
    [
        (("--version",), (), {}),
        (("serve", "--help"), (), {}),
        (("config", "schema"), (), {}),
        (ENDS, ("-B",), {}),
        (ENDS, (), {"PYTHONDONTWRITEBYTECODE": "1"}),
    ],
    ids=["version", "help", "commands", "told so", "told so by the environment"],
)
def test_what_does_not_serve_or_may_keep_nothing_starts_once(
    tmp_path: Path, args: tuple[str, ...], options: tuple[str, ...], environ: dict[str, str]
) -> None:
    status, _ = ran(tmp_path, *args, options=options, **environ)
    assert status == (1 if args == ENDS else 0)
    assert bytecode(tmp_path) == []


def test_a_changed_file_is_not_served_from_old_bytecode(tmp_path: Path) -> None:
    ran(tmp_path, *ENDS)
    script = tmp_path / "bitrouter.py"
    script.write_text(script.read_text().replace("expected HOST:PORT", "expected A:B"))
    os.utime(script, (1, 1))
    assert "expected A:B" in ran(tmp_path, *ENDS)[1]


def test_options_of_python_hold_after_the_restart(tmp_path: Path) -> None:
    (tmp_path / "bitrouter.toml").write_text('[server]\nlisten = "nowhere"\n')
    _, said = ran(tmp_path, "-c", str(tmp_path / "bitrouter.toml"), options=("-X", "importtime"))
    assert said.count("import time: self [us]") == 2
    assert json.dumps("nowhere") in said


def test_from_a_pipe_or_under_another_program_it_starts_once(tmp_path: Path) -> None:
    script = tmp_path / "bitrouter.py"
    script.write_bytes(FILE.read_bytes())
    runner = tmp_path / "runner.py"
    runner.write_text("import runpy, sys\ndel sys.argv[0]\n"
                      "runpy.run_path(sys.argv[0], run_name='__main__')\n")  # fmt: skip
    for command in (["-", *ENDS], [str(runner), str(script), *ENDS]):
        done = subprocess.run(
            [sys.executable, *command], input=FILE.read_text() if command[0] == "-" else "",
            cwd=tmp_path, capture_output=True, text=True, timeout=20, check=False,
            env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)},
        )  # fmt: skip
        assert (done.returncode, "expected HOST:PORT" in done.stderr) == (1, True), done.stderr
        assert bytecode(tmp_path) == []
