"""Runs the driver as a user does: a process with arguments, its output, its exit code."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# One thread each, like the tests themselves: several share the cores, and torch's threads wait busily.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
DRIVER = [sys.executable, str(ROOT / "single_shot_inference.py")]


def run(*arguments: object, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    command = [*DRIVER, *map(str, arguments)]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=timeout,
        stdin=subprocess.DEVNULL,
        env=ENVIRONMENT,
    )


def refused(done: subprocess.CompletedProcess[str], *expected: str) -> None:
    assert done.returncode == 2 and done.stdout == "", (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert "error:" in last and all(text in last for text in expected), last
