"""Every parser of data_pipelines/, on mutated inputs and on the corpus of what was found."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.harness import Target, check, corpus_of, fuzz
from tests.fuzz.targets_data import TARGETS

ROOT = Path(__file__).resolve().parents[2]
# How many inputs; shards are synced to the disk, and SciPy starts anew for every devkit.
COUNTS = {"devkit": 4, "shard_listing": 15, "shard": 40, "shard_settings": 20, "image": 400}
# Whatever a listing says, the shards come out as they were.
ALWAYS_ACCEPTED = {"shard_listing"}
CASES = [(target, path) for target in TARGETS for path in corpus_of(target)]


def marked(target: Target):
    """SciPy reads devkits in a process of its own."""
    marks = [pytest.mark.processes] if target.name == "devkit" else []
    return pytest.param(target, marks=marks, id=target.name)


@pytest.mark.parametrize("target", [marked(target) for target in TARGETS])
def test_mutated_inputs_are_read_or_refused(target: Target, tmp_path: Path) -> None:
    tally = fuzz(target, tmp_path, COUNTS.get(target.name, 80))
    assert not tally.failures, "\n".join(f"{data[:200]!r}: {why}" for data, why in tally.failures)
    assert (tally.outcomes["refused"] > 0) == (target.name not in ALWAYS_ACCEPTED)


@pytest.mark.parametrize(
    ("target", "path"), CASES, ids=[f"{target.name}-{path.name}" for target, path in CASES]
)
def test_what_was_found_once_stays_mended(target: Target, path: Path, tmp_path: Path) -> None:
    check(target, tmp_path, path.read_bytes())


def test_loaders_deliver_or_name_every_mutated_image() -> None:
    command = [sys.executable, "-W", "ignore", "-m", "tests.fuzz.loaders", "--count", "4"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, f"{ran.stdout}\n{ran.stderr}"
    images, skipped = ran.stdout.splitlines()[-1].split(" images, ")
    assert int(images) == 96
    assert int(skipped.split()[0]) > 25
