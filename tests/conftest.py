import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import processes
import pytest
from fork_server import Forks
from hub_server import TOKEN, Hub

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

# Networks that take their time, and of which each kind has a smaller one: for `make nightly` alone.
LARGE = {
    *("resnet101", "wide_resnet50_2", "resnext50_32x4d", "vgg16_bn", "densenet121"),
    *("convnext_tiny", "timm:seresnet50", "timm:resnet50d", "timm:repvit_m1"),
}

# What starts processes in these files is for `make nightly`: that a rival method is killed and
# resumed to the bit is held for each by test_method_contract.py, and benchmarks are run by hand.
NIGHTLY = {
    *(
        "test_stamp_runs.py",
        "test_iss_p_runs.py",
        "test_interspace_runs.py",
        "test_rec_lra_runs.py",
    ),
    *("test_polarization_runs.py", "test_ffr_runs.py", "test_while_training_runs.py"),
    *("test_startup_script.py", "test_loader_script.py", "test_gpu_script.py"),
    *("test_mnist_trainability.py", "test_pruner_script.py", "test_latency_script.py"),
    *("test_evaluate_script.py", "test_end_to_end_script.py", "test_step_script.py"),
    "test_graph_runs.py",
}


def pytest_configure(config: pytest.Config) -> None:
    """In the background of a shell SIGINT is ignored, and what the tests start would inherit it."""
    config.addinivalue_line("markers", "large: a large network; set by itself")
    config.addinivalue_line("markers", "nightly: not for `make test`; set by itself")
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
        alone = item.get_closest_marker("no_process") is not None
        if item.get_closest_marker("large") or (item.path.name in NIGHTLY and not alone):
            item.add_marker("nightly")
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


@pytest.fixture
def hub_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The Hub's HTTP interface on loopback, an empty cache, and a token that may write."""
    import huggingface_hub.constants

    from tpp.common import hub

    # Read when huggingface_hub is imported; the address and the token are asked for each time.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hf cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(hub, "_WAITS", (0.01, 0.01, 0.01))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    service = Hub()
    monkeypatch.setenv("HF_ENDPOINT", service.url)
    yield service
    service.close()
