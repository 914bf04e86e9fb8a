"""Every parser of tpp/ and train/, on mutated inputs and on the corpus of what was found."""

import json
import re
from pathlib import Path
from random import Random

import pytest

from tests.fuzz import targets_tpp, targets_train
from tests.fuzz.harness import (
    CORPUS,
    Target,
    check,
    corpus_of,
    fresh,
    fuzz,
    mutate,
    seeds_of,
    whole,
)
from tests.fuzz.run import all_targets
from tpp.common.errors import UserError
from tpp.common.reading import parse_json

TARGETS = [*targets_tpp.TARGETS, *targets_train.TARGETS]
# How many inputs; reading YAML and drawing take their time. python -m tests.fuzz.run goes on.
COUNTS = {"config": 50, "override": 100, "sweep": 60, "run_folder": 60, "table": 30, "run_drawn": 2}
# Of the corpus: what is read in spite of it all, as the part that makes no sense is left out, the
# markup is escaped, and the like. Everything else with a name is refused.
READ = {
    "checkpoint": {"escape-codes"},
    "torch": {"optimizer-huge", "optimizer-nonsense"},
    "config": {"date"},
    "run_folder": {
        *("config-extends", "config-input", "deep-log", "escape-codes", "infinite-time", "nan"),
        *("input-of-itself", "log-layers", "log-steps", "markup"),
    },
    "run_drawn": {path.name for path in corpus_of(targets_train.DRAWN)},
    "table": {path.name for path in corpus_of(targets_train.TABLE)},
}
CASES = [(target, path) for target in TARGETS for path in corpus_of(target)]


def named(target: object) -> str | None:
    return target.name if isinstance(target, Target) else None


@pytest.mark.parametrize("target", TARGETS, ids=named)
def test_mutated_inputs_are_read_or_refused(target, tmp_path):
    tally = fuzz(target, tmp_path, COUNTS.get(target.name, 150))
    assert not tally.failures, "\n".join(f"{data[:200]!r}: {why}" for data, why in tally.failures)
    assert tally.outcomes["refused"] > 0


@pytest.mark.parametrize(
    ("target", "path"), CASES, ids=[f"{target.name}-{path.name}" for target, path in CASES]
)
def test_what_was_found_once_stays_mended(target, path, tmp_path):
    outcome = check(target, tmp_path, path.read_bytes())
    if not re.fullmatch("[0-9a-f]{16}", path.name):  # those go by their hash that a run has added
        assert outcome == ("accepted" if path.name in READ.get(target.name, ()) else "refused")


def test_every_corpus_belongs_to_a_target():
    assert {path.name for path in CORPUS.iterdir()} <= all_targets().keys()


# The harness itself


def failing(what: str, tmp_path: Path) -> str:
    """What check says of a parser that does something wrong."""

    def parse(folder: Path, data: bytes) -> None:
        if what == "raises":
            raise KeyError("x")
        if what == "exits":
            raise SystemExit(0)
        if what == "long":
            raise UserError("\n".join(f"{folder}: {n}" for n in range(10)) + "\nelsewhere")
        if what == "memory":
            bytearray(600 * 2**20)
        if what == "loops":
            while True:
                pass

    with pytest.raises(AssertionError) as caught:
        check(Target("x", lambda _: [], parse), tmp_path, b"")
    return str(caught.value)


def test_what_counts_as_a_failure(tmp_path, monkeypatch):
    assert "KeyError" in failing("raises", tmp_path)
    assert "SystemExit" in failing("exits", tmp_path)
    assert "does not name the file" in failing("long", tmp_path)
    assert "memory grew" in failing("memory", tmp_path)
    monkeypatch.setattr("tests.fuzz.harness.MOST_SECONDS", 0.2)
    assert "CPU time" in failing("loops", tmp_path)


def test_the_same_seed_gives_the_same_inputs(tmp_path):
    target = targets_tpp.CHECKPOINT
    seeds = seeds_of(target, tmp_path)
    once, again = ([mutate(Random(3), seeds, target) for _ in range(20)] for _ in range(2))
    assert once == again and len(set(map(bytes, once))) == 1
    random = Random(3)
    assert len({mutate(random, seeds, target) for _ in range(20)}) == 20


def test_json_stays_json_where_only_values_are_mutated():
    random, target = Random(0), Target("x", lambda _: [], lambda *_: None, json_inside=whole)
    seed = json.dumps({"a": [1, {"b": "c"}], "d": {"e": None}}).encode()
    texts = [mutate(random, [seed], target).decode("utf-8", "replace") for _ in range(300)]
    read = []
    for text in texts:
        try:
            read.append(parse_json(text, "x"))
        except UserError as error:
            assert "x" in str(error)
    assert len(read) > 100  # nearly all of those that one value was changed in


def test_repaired_files_get_past_their_checksums(tmp_path):
    target = targets_tpp.CHECKPOINT
    seed = seeds_of(target, tmp_path)[0]
    broken = seed[:-1] + bytes([seed[-1] ^ 1])
    for data, outcome in ((broken, "refused"), (target.repair(broken), "accepted")):
        with fresh(tmp_path / "case") as folder:
            assert check(target, folder, data) == outcome
