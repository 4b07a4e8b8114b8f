"""The Triton kernels under Triton's interpreter: every `interpreted_*.py`, all in one process apart.

Apart, since whether Triton interprets or compiles is settled when it is first imported; in one, since a start costs seconds.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FILES = sorted(path.name for path in HERE.glob("interpreted_*.py"))

Outcome = tuple[int, str]


def interpret(files: Sequence[str], kind: str) -> Outcome:
    """(exit code, report) of the files' tests of this kind, an expression of markers."""
    root = os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"TRITON_INTERPRET": "1", "WS_KERNELS": "triton", "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    plugins = [word for name in ("no:cacheprovider", "no:xdist", "quick_interpreter") for word in ("-p", name)]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rpfE", *plugins, "-m", kind, *files],
        cwd=HERE, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return done.returncode, done.stdout


def check(outcome: Outcome, name: str) -> None:
    """No test of the file failed, and some ran."""
    code, said = outcome
    report = re.sub(r"^PASSED .*\n", "", said, flags=re.MULTILINE)[-7000:]
    assert code in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED), report
    assert set(re.findall(rf"^([A-Z]+) {name}::", said, re.MULTILINE)) == {"PASSED"}, report


@pytest.fixture(scope="module")
def outcome(request: pytest.FixtureRequest) -> Outcome:
    """Of the files that were chosen on the command line."""
    return interpret([item.callspec.params["name"] for item in request.session.items
                      if item.path == request.path and hasattr(item, "callspec")], "not long")


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", FILES)
def test_kernels_hold_in_the_interpreter(outcome: Outcome, name: str) -> None:
    check(outcome, name)


@pytest.mark.long
def test_kernels_hold_in_the_interpreter_for_every_shape() -> None:
    check(interpret(FILES, "long"), r"interpreted_\w+\.py")
