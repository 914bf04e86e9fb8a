"""What `make check` leaves out is all that starts processes, and what it runs starts none."""

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fork_server import Forks
from hypothesis import given
from hypothesis import strategies as st
from processes import _names_one, none_may_start


def by_a_helper():
    return [sorted(one) for one in [[subprocess.PIPE]]]


class Worker(subprocess.Popen):
    pass


class Holder:
    def start(self):
        return lambda: Worker(["true"])


def directly():
    subprocess.run(["true"], check=True)


@given(st.integers())
def drawn(number):
    by_a_helper()


def plain():
    return os.getpid(), pytest.approx(1)


@pytest.mark.parametrize(
    "function", [directly, drawn, by_a_helper, Worker, Holder, Forks, Forks.start]
)
def test_what_names_a_starter_is_found(function):
    assert _names_one(function) and not _names_one(plain)


def begin(start):
    with none_may_start():
        start()


@pytest.mark.processes
@pytest.mark.parametrize(
    "start",
    [
        lambda: subprocess.run([sys.executable, "-c", ""], check=True),
        lambda: os._exit(0) if os.fork() == 0 else None,
        lambda: os.posix_spawn("/bin/true", ["true"], {}),
        lambda: os.system("true"),
        *(
            multiprocessing.get_context(way).Process(target=print).start
            for way in ("fork", "spawn")
        ),
    ],
    ids=["subprocess", "fork", "posix_spawn", "system", "multiprocessing", "spawned"],
)
def test_the_guard_lets_none_start(start):
    with pytest.raises(pytest.fail.Exception, match="mark the test with"):
        begin(start)


def test_this_one_is_guarded(request):
    """As conftest.py sees to for every test that names no starter."""
    assert request.node.get_closest_marker("no_process")
    with pytest.raises(pytest.fail.Exception):
        os.system("true")


def test_a_pid_that_is_used_again_is_another_process(forks, tmp_path):
    last = Path("/proc/sys/kernel/ns_last_pid")
    if not os.access(last, os.W_OK):
        pytest.skip("choosing the next pid takes root")
    script = tmp_path / "end.py"
    script.write_text("import sys; sys.exit(int(sys.argv[1]))")
    first = forks.start(script, ["3"], tmp_path, dict(os.environ))
    assert first.wait(60) == 3
    for _ in range(100):  # another process may get it first
        last.write_text(str(first.pid - 1))
        second = forks.start(script, ["0"], tmp_path, dict(os.environ))
        assert second.wait(60) == 0
        if second.pid == first.pid:
            break
    assert second.pid == first.pid
    assert first.poll() == 3
