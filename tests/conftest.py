import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fork_server import Forks

ROOT = Path(__file__).resolve().parents[1]


def pytest_configure() -> None:
    """In the background of a shell SIGINT is ignored, and what the tests start would inherit it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def shared_data() -> Callable[[str], Path]:
    """Find one of the real-data archives by its file name, or skip with a reason.

    With TPP_REQUIRE_SHARED_DATA=1, as CI sets it, a missing archive is a failure: there a skip
    would hide that the tests on real images no longer run.
    """
    folder = Path(os.environ.get("TPP_SHARED_DATA", ROOT.parent / "shared" / "data"))

    def find(name: str) -> Path:
        path = folder / name
        if not path.exists():
            reason = f"needs {name} in {folder} (set TPP_SHARED_DATA to the folder that holds it)"
            if os.environ.get("TPP_REQUIRE_SHARED_DATA") == "1":
                pytest.fail(reason)
            pytest.skip(reason)
        return path

    return find


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 2 MB. Mounting one takes root; CI has it."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a small tmpfs (root)")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """Starts processes that need not import what a run needs."""
    forks = Forks(tmp_path_factory.mktemp("forks"))
    yield forks
    forks.close()
