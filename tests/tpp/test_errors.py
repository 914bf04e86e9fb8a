"""How a command ends."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
COUNTS = """
from tpp.common.errors import run_command

def main():
    for number in range({lines}):
        print(number)
    {after}

run_command(main)
"""


def _through_head(lines: int) -> tuple[int, str]:
    """Exit code and stderr of a command whose reader takes one line and goes."""
    command = [sys.executable, "-c", COUNTS.format(lines=lines, after="pass")]
    with subprocess.Popen(
        command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as running:
        assert running.stdout is not None and running.stderr is not None
        if lines > 2**16:
            assert running.stdout.readline() == "0\n"
        running.stdout.close()
        return running.wait(), running.stderr.read()


def test_a_reader_that_has_seen_enough_gets_no_traceback() -> None:
    # More than a pipe and Python's buffer hold; and what is only written at the end.
    assert _through_head(10**6) == (141, "")
    assert _through_head(10) == (141, "")


def test_another_broken_pipe_is_not_hidden() -> None:
    command = COUNTS.format(lines=0, after="raise BrokenPipeError('of a worker')")
    done = subprocess.run(
        [sys.executable, "-c", command], cwd=ROOT, text=True, capture_output=True, check=False
    )
    assert done.returncode == 1 and "of a worker" in done.stderr
