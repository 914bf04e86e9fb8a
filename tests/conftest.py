import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import processes
import pytest
from fork_server import Forks

ROOT = Path(__file__).resolve().parents[1]
# A worker of pytest-xdist runs a file from its beginning to its end, so that what begins last
# should be short. The jobs of the cluster mostly wait.
LONGEST = (
    *("test_jobs.py", "test_table1.py", "test_architectures.py", "test_engines.py"),
    *("test_data.py", "test_watchdog.py", "test_chaos.py", "test_run.py"),
    *("test_sweep.py", "test_export.py", "test_evaluate.py", "test_faults.py"),
    *("test_stopping.py", "test_prepare.py", "test_ranks.py", "test_prune_faults.py"),
    "test_method_contract.py",
)

# Networks that take their time, and of which each kind has a smaller one: not for `make check`.
LARGE = {
    *("resnet101", "wide_resnet50_2", "resnext50_32x4d", "vgg16_bn", "densenet121"),
    *("convnext_tiny", "timm:seresnet50", "timm:resnet50d", "timm:repvit_m1"),
}


def pytest_configure(config: pytest.Config) -> None:
    """In the background of a shell SIGINT is ignored, and what the tests start would inherit it."""
    # Where it is by default, clones in two places build what DeepSpeed compiles again and again.
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(ROOT / ".cache" / "torch_extensions"))
    config.addinivalue_line("markers", "large: a large network; set by itself")
    for marker in processes.MARKERS:
        config.addinivalue_line("markers", marker)
    processes.install_guard()
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what `make check` asks for; begin with the files that take longest, see Makefile."""
    for item in items:
        if not processes.needs_processes(item):
            item.add_marker("no_process")
        parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
        if LARGE.intersection(map(str, parameters)):
            item.add_marker("large")
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    """What is taken to start no process cannot, be it in a fixture.

    Its end is not looked at: the last test of a session takes down what others have set up.
    """
    with processes.none_may_start(item.get_closest_marker("no_process") is not None):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """As :func:`pytest_runtest_setup`."""
    with processes.none_may_start(item.get_closest_marker("no_process") is not None):
        return (yield)


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
