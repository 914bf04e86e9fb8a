"""What a parser is fuzzed with: targets, mutations of valid inputs, and what counts as a failure.

A parser that is handed anything at all must return or raise
:class:`tpp.common.errors.UserError`, within bounds of memory and time, and its message must be fit
for a terminal: a few lines of printable text that name the file.
"""

import contextlib
import json
import resource
import shutil
import signal
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from tpp.common.errors import UserError

CORPUS = Path(__file__).with_name("corpus")
# A message names every mistake of a configuration, one a line; nobody reads more.
MOST_LINES = 40
LONGEST_LINE = 2000
# Beyond what the process has when an input comes; those inputs are a few kB.
MOST_MEMORY = 512 * 2**20
# CPU seconds for one input, over all threads: the wall clock would depend on the neighbours.
MOST_SECONDS = 20


def none(data: bytes) -> tuple[int, int] | None:
    """No JSON text inside."""
    return None


def whole(data: bytes) -> tuple[int, int] | None:
    """The input as a whole is a JSON text."""
    return 0, len(data)


def identity(data: bytes) -> bytes:
    """Nothing to repair."""
    return data


@dataclass(frozen=True)
class Target:
    """A parser under test.

    Attributes:
        name: of the target, and of its folder in the corpus.
        seeds: valid inputs, made in an empty folder by what writes them in earnest.
        parse: write the input into an empty folder as needed, and parse it; must return or
            raise UserError.
        json_inside: where a JSON text lies in an input, so that values in it can be replaced
            while it stays JSON; None where there is none.
        repair: recompute lengths and checksums, so that what was changed gets past them.
        tokens: pieces of text that mean something to the parser.
    """

    name: str
    seeds: Callable[[Path], list[bytes]]
    parse: Callable[[Path, bytes], None]
    json_inside: Callable[[bytes], tuple[int, int] | None] = none
    repair: Callable[[bytes], bytes] = identity
    tokens: tuple[bytes, ...] = ()


@dataclass
class Tally:
    """What has become of a target's inputs.

    Attributes:
        outcomes: how many inputs were ``accepted``, ``refused`` and ``failed``.
        failures: the inputs that failed, and how.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[bytes, str]] = field(default_factory=list)

    @property
    def inputs(self) -> int:
        """How many inputs there were."""
        return self.outcomes.total()


class _TooLongError(BaseException):
    """The time for one input is up; no parser's ``except Exception`` swallows it."""


def check(target: Target, folder: Path, data: bytes) -> str:
    """Parse one input in an empty folder; ``accepted`` or ``refused``.

    Raises:
        AssertionError: any exception but UserError, a message that is not fit to be shown, or
            more memory or time than an input of a few kB may cost.
    """
    before = _reset_peak()
    try:
        with _limited():
            target.parse(folder, data)
        outcome = "accepted"
    except UserError as error:
        _check_message(str(error), folder)
        outcome = "refused"
    except _TooLongError:
        raise AssertionError(f"more than {MOST_SECONDS} s of CPU time") from None
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        raise AssertionError("".join(traceback.format_exception(error)[-12:])) from None
    grown = _peak() - before
    assert grown <= MOST_MEMORY, f"memory grew by {grown / 2**20:.0f} MiB"
    return outcome


def _check_message(message: str, folder: Path) -> None:
    lines = message.splitlines()
    assert 1 <= len(lines) <= MOST_LINES, f"a message of {len(lines)} lines: {message[:500]!r}"
    for line in lines:
        assert len(line) <= LONGEST_LINE, f"a line of {len(line)} characters: {line[:500]!r}"
        assert line.isprintable(), f"escape codes in a message: {line!r}"
        assert str(folder) in line, f"a message that does not name the file: {line!r}"
    # Where memory runs out, a machine with more of it would have gone on.
    assert "allocate" not in message, message


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    """Bound the address space and the CPU time of what runs inside."""
    old = resource.getrlimit(resource.RLIMIT_AS)
    size = _status("VmSize")
    room = size + 4 * MOST_MEMORY if size else resource.RLIM_INFINITY
    handler = signal.signal(signal.SIGPROF, _too_long)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (room, old[1]))
        # Again and again: what lands in C code that ignores it comes through later.
        signal.setitimer(signal.ITIMER_PROF, MOST_SECONDS, 1)
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, handler)
        resource.setrlimit(resource.RLIMIT_AS, old)


def _too_long(*_: object) -> None:
    raise _TooLongError


def _status(key: str) -> int:
    """A size of this process in bytes, 0 where there is no /proc."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    return 0


def _reset_peak() -> int:
    """Forget the peak of memory so far; the memory in use now."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    return _peak()


def _peak() -> int:
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def fuzz(target: Target, folder: Path, count: int, seed: int = 0) -> Tally:
    """Mutate the target's seeds ``count`` times; the same seed gives the same inputs.

    Args:
        target: the parser.
        folder: an empty folder to work in.
        count: how many inputs.
        seed: of the mutations.
    """
    random, seeds, tally = Random(seed), seeds_of(target, folder), Tally()
    for _ in range(count):
        data = mutate(random, seeds, target)
        tally_one(target, folder / "case", data, tally)
    return tally


def seeds_of(target: Target, folder: Path) -> list[bytes]:
    """A target's valid inputs; each has to be accepted."""
    with fresh(folder / "seeds") as scratch:
        seeds = target.seeds(scratch)
    for data in seeds:
        with fresh(folder / "case") as scratch:
            outcome = check(target, scratch, data)
            assert outcome == "accepted", f"{target.name}: a valid input was {outcome}"
    return seeds


def tally_one(target: Target, folder: Path, data: bytes, tally: Tally) -> None:
    """Check one input and count what becomes of it."""
    with fresh(folder) as scratch:
        try:
            tally.outcomes[check(target, scratch, data)] += 1
        except AssertionError as error:
            tally.outcomes["failed"] += 1
            tally.failures.append((data, str(error)))


@contextlib.contextmanager
def fresh(folder: Path) -> Iterator[Path]:
    """An empty folder that is gone afterwards."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def corpus_of(target: Target) -> list[Path]:
    """The inputs that once failed, and others worth keeping, in a fixed order."""
    folder = CORPUS / target.name
    return sorted(path for path in folder.iterdir()) if folder.is_dir() else []


# Mutations

_EDGES = (0, 1, 2, 0x7F, 0x80, 0xFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
_EDGES += (0x7FFFFFFFFFFFFFFF, 0x8000000000000000, 0xFFFFFFFFFFFFFFFF, 0x10000)


@dataclass(frozen=True)
class _Raw:
    """Text that stands in a JSON document as it is."""

    text: str


class _Pairs(list[tuple[str, Any]]):
    """A JSON object as a list of pairs, so that a key can be there twice."""


_NASTY: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 2, 3, 2**31, 2**63, 2**64, -(2**63), 10**18, 10**30),
    *(0.0, -0.0, 0.5, 1e308, 1e-320, float("nan"), float("inf"), float("-inf")),
    *("", "../x", "../../../etc/passwd", "/etc/passwd", "a/b", "\0", "a\nb", "\x1b[31m", "\u202e"),
    *("\ud800", "x" * 5000, "<script>alert(1)</script>", "[bold]", "%s{0}", "-1", "0", "1e9", "é"),
    *([], _Pairs(), [None], [[]], [0, 0], [-1], [2**70], ["a"], _Pairs([("a", 1), ("a", 2)])),
    *(_Pairs([("", None)]), list(range(3)), [0] * 5000),
    *map(_Raw, ("[" * 3000 + "]" * 3000, '{"a":' * 3000 + "1" + "}" * 3000, "9" * 5000, "1e999")),
    _Raw("-" + "9" * 400),
)


def mutate(random: Random, seeds: list[bytes], target: Target) -> bytes:
    """One input, made of a valid one by one to four changes."""
    data = random.choice(seeds)
    for _ in range(random.choice((1, 1, 1, 2, 2, 3, 4))):
        span = target.json_inside(data)
        if span is not None and random.random() < 0.7:
            data = _mutate_json(random, data, span)
        else:
            data = _mutate_bytes(random, data, random.choice(seeds), target.tokens)
    return target.repair(data) if random.random() < 0.8 else data


def _mutate_bytes(random: Random, data: bytes, other: bytes, tokens: tuple[bytes, ...]) -> bytes:
    if not data:
        return other
    at, to = sorted((random.randrange(len(data) + 1), random.randrange(len(data) + 1)))
    kind = random.randrange(9)
    if kind == 0:  # flip a bit
        at = min(at, len(data) - 1)
        return data[:at] + bytes([data[at] ^ 1 << random.randrange(8)]) + data[at + 1 :]
    if kind == 1:
        return data[:at]
    if kind == 2:
        return data[:at] + data[to:]
    if kind == 3:
        return data[:to] + data[at:to] * random.choice((1, 2, 20)) + data[to:]
    if kind == 4:  # splice two inputs
        return data[:at] + other[random.randrange(len(other) + 1) :]
    if kind == 5:  # a whole number at an edge of its range
        width, order = random.choice((1, 2, 4, 8)), random.choice(("little", "big"))
        value = random.choice(_EDGES) % 2 ** (8 * width)
        return data[:at] + value.to_bytes(width, order) + data[at + width :]  # type: ignore[arg-type]
    if kind == 6:
        return data[:at] + random.randbytes(random.choice((1, 4, 64))) + data[at:]
    if kind == 7:  # the first bytes, where lengths and magic numbers are
        at = random.randrange(min(len(data), 32))
        return data[:at] + bytes([random.choice((0, 1, 0x7F, 0x80, 0xFF))]) + data[at + 1 :]
    token = random.choice(tokens) if tokens else b"\0"
    return data[:at] + token + data[random.choice((at, to)) :]


def _mutate_json(random: Random, data: bytes, span: tuple[int, int]) -> bytes:
    start, stop = span
    try:
        value = json.loads(data[start:stop], object_pairs_hook=_Pairs)
    except (ValueError, RecursionError):
        return _mutate_bytes(random, data, data, ())
    text = _dump(_mutate_value(random, value))
    return data[:start] + text.encode("utf-8", "surrogatepass") + data[stop:]


def _mutate_value(random: Random, value: Any) -> Any:
    """Change something at a random place of a JSON document."""
    if isinstance(value, str) and value[:1] in ("{", "[") and random.random() < 0.9:
        with contextlib.suppress(ValueError, RecursionError):  # JSON inside JSON
            inside = json.loads(value, object_pairs_hook=_Pairs)
            return _dump(_mutate_value(random, inside))
    if not isinstance(value, list) or not value or random.random() < 0.15:
        return random.choice(_NASTY)
    at = random.randrange(len(value))
    pairs = isinstance(value, _Pairs)
    kind = random.random()
    if kind < 0.75:
        inner = _mutate_value(random, value[at][1] if pairs else value[at])
        changed: list[Any] = [(value[at][0], inner)] if pairs else [inner]
    elif kind < 0.8:
        changed = []
    elif kind < 0.9:  # a key or an entry twice
        changed = [value[at], value[at]]
    else:
        name = random.choice([item for item in _NASTY if isinstance(item, str)])
        inner = value[at][1] if pairs else random.choice(_NASTY)
        changed = [(name, inner)] if pairs else [value[at], inner]
    return type(value)([*value[:at], *changed, *value[at + 1 :]])


def _dump(value: Any) -> str:
    """JSON text; unlike json.dumps, with repeated keys and raw pieces."""
    if isinstance(value, _Raw):
        return value.text
    if isinstance(value, _Pairs):
        return "{" + ", ".join(f"{json.dumps(k)}: {_dump(v)}" for k, v in value) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_dump, value)) + "]"
    return json.dumps(value)
