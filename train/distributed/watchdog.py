"""No rank is lost in silence: every rank gives signs of life, and a lost one ends the run.

A rank that is stopped or gone leaves the others inside a collective until the process group's
timeout, tens of minutes later, and the error then names nobody. The signs of life go through the
store at which the ranks met, over a connection of their own.
"""

import atexit
import json
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from train.distributed.rendezvous import agent_hosts_store

# sysexits.h calls it EX_TEMPFAIL: start the same command again.
EXIT_LOST = 75
# A rank ended with an error of its own, which starting again may well meet again.
EXIT_FAILED = 1
# How often each rank gives a sign of life within the timeout.
_BEATS = 8
# How often a rank that has ended looks whether the others have, in seconds.
_GOODBYE = 0.1
_STALL_TIMEOUTS = 10
_GROUP_TIMEOUT = 1800.0
_END = "the run ends here and resumes from its newest checkpoint when started again"
_NAMED = 16
_CONNECT_TIMEOUT = 60.0


def group_timeout(timeout: float) -> timedelta:
    """The timeout for a process group whose ranks are watched with ``timeout`` seconds.

    Twice what the watchdog allows for a stall, so that it is the watchdog who speaks, and not
    less than half an hour, as the main rank alone may have much to do while the others wait.
    """
    return timedelta(seconds=max(_GROUP_TIMEOUT, 2 * _STALL_TIMEOUTS * timeout))


@dataclass(frozen=True)
class _Sign:
    """A rank's sign of life.

    Attributes:
        rank, host, pid: whose it is.
        node, born: which kernel counts the pid, and when the process began; empty: unknown.
        beat: how many signs it has given before.
        place: how far its main thread is; the greater, the further.
        phase: what it does there, for a person.
        state: "runs", "done" or "failed".
    """

    rank: int
    host: str
    pid: int
    node: str
    born: str
    beat: int = 0
    place: tuple[int, int, int] = (0, 0, 0)
    phase: str = "start"
    state: str = "runs"

    def __str__(self) -> str:
        return f"rank {self.rank} (host {self.host}, pid {self.pid})"

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> "_Sign":
        fields = json.loads(text)
        return cls(**{**fields, "place": tuple(fields["place"])})


@dataclass
class _Watched:
    """What is known of a rank: its newest sign, and for how many rounds what was the same."""

    rank: int
    sign: _Sign | None = None
    silent: int = 0
    still: int = 0

    def note(self, new: _Sign | None) -> None:
        """Note what was read in one more round."""
        old, self.sign = self.sign, new
        self.silent = self.silent + 1 if new == old else 0
        moved = old is None or new is None or new.place != old.place
        self.still = 0 if moved else self.still + 1

    @property
    def state(self) -> str:
        return self.sign.state if self.sign is not None else "runs"

    def __str__(self) -> str:
        return str(self.sign or f"rank {self.rank}")


class Watchdog:
    """Signs of life of all ranks, and the end of the run when one is missing.

    The main rank watches all, the others watch the main rank. Whoever finds that a rank has given
    no sign of life for ``timeout`` seconds prints one line that names it and ends its process
    with exit code 75, ``EXIT_LOST``; the other ranks end with the same code, without a word. A
    lost process is killed from its own node, so that neither its GPU nor its locks stay taken. A
    rank that ends with an error of its own ends the others with exit code 1, ``EXIT_FAILED``.

    Time is counted in this process's own rounds: one that was itself stopped for a while has
    made none meanwhile and accuses nobody. ``timeout`` has to be longer than the main thread
    ever keeps the interpreter to itself.

    All ranks have to make theirs together, when the process group is there.

    Args:
        rank, world_size: of this process; one rank alone is not watched.
        timeout: seconds.
        stall: seconds after which a rank whose process lives, but whose main thread does not get
            on while others wait for it, is lost as well; None: never.
    """

    def __init__(
        self, *, rank: int, world_size: int, timeout: float, stall: float | None = None
    ) -> None:
        self._rank, self._timeout, self._stall = rank, timeout, stall
        self._interval = timeout / _BEATS
        self._position: tuple[tuple[int, int, int], str] = ((0, 0, 0), "start")
        self._state, self._rounds = "runs", 0
        self._watched = [_Watched(r) for r in (range(world_size) if rank == 0 else range(1))]
        self._closing, self._told, self._over = (threading.Event() for _ in range(3))
        self._ending = threading.Lock()
        self._is_on = world_size > 1
        if self._is_on:
            self._start()

    @classmethod
    def from_environment(cls, timeout: float) -> "Watchdog":
        """The watchdog of a process whose launcher has set RANK, WORLD_SIZE and MASTER_*.

        To be made by all ranks, after the process group. A stall may last ten times ``timeout``.
        """
        rank, world_size = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1)))
        stall = _STALL_TIMEOUTS * timeout
        return cls(rank=rank, world_size=world_size, timeout=timeout, stall=stall)

    def at(self, step: int, phase: str) -> None:
        """Note where the main thread is; cheap.

        Args:
            step: steps done in this stage; a smaller one than before begins another stage.
            phase: what comes now, for a person: "data", "step", "evaluation". All ranks have to
                go through the phases of a step in the same order; what one rank does alone
                comes after them.
        """
        (stage, before, moves), _ = self._position
        if step < before:
            stage += 1
        self._position = ((stage, step, moves + 1 if step == before else 0), phase)

    def close(self, *, failed: bool = False) -> None:
        """Say goodbye: this rank is not missed from now on.

        The main rank waits until the others have said so too: it watches them, and may host the
        store that they need. One that fails has something to tell first, and waits at the end of
        its process.

        Args:
            failed: this rank ends with an error; the others then end too.
        """
        if not self._is_on or self._closing.is_set():
            return
        self._state = "failed" if failed else "done"
        self._closing.set()
        if not failed:
            self._over.wait()
            return
        self._told.wait(self._timeout)
        if self._hosts_store:
            atexit.register(self._over.wait, self._timeout)

    def wait_for_verdict(self) -> None:
        """After a collective failed: wait until the lost rank is known, which ends this process.

        Returns if no rank turns out to be lost.
        """
        if self._is_on:
            self._over.wait(2 * self._timeout)

    def _start(self) -> None:
        self._me = _sign_of_this_process(self._rank)
        self._hosts_store = self._rank == 0 and not agent_hosts_store()
        host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
        client = dist.TCPStore(
            host,
            int(port),
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=max(self._timeout, _CONNECT_TIMEOUT)),
        )
        # The store may be older than the ranks, as after a restart, and know of others' ends.
        told = [secrets.token_hex(8)]
        dist.broadcast_object_list(told, src=0)
        self._store = dist.PrefixStore(f"watchdog/{told[0]}", client)
        self._give_sign()
        with suppress(RuntimeError):  # who is late will be missed soon enough
            keys = [str(watched.rank) for watched in self._watched]
            self._store.wait(keys, timedelta(seconds=self._timeout))
        for target in (self._exchange, self._watch_store):
            threading.Thread(target=target, name="watchdog", daemon=True).start()

    def _exchange(self) -> None:
        """Give signs of life and look for the others', round by round, until all is over."""
        try:
            while not self._closing.is_set():
                self._give_sign()
                self._look_round()
                self._judge()
                self._closing.wait(self._interval)
            self._give_sign()
            self._told.set()
            # Whoever fails leaves the judgement to others.
            done = self._state == "done"
            while (self._hosts_store or (done and self._rank == 0)) and self._others_run():
                self._await_goodbyes()
                self._look_round()
                if done:
                    self._judge()
        except RuntimeError:  # what the store raises
            self._end_without_store()
        self._told.set()
        self._over.set()

    def _watch_store(self) -> None:
        """Look whether the exchange gets on: a call to a store that is stopped never returns."""
        seen, silent = -1, 0
        while not self._over.wait(self._interval):
            silent = silent + 1 if self._rounds == seen else 0
            seen = self._rounds
            if silent >= _BEATS:
                self._end_without_store()

    def _give_sign(self) -> None:
        place, phase = self._position
        self._me = replace(self._me, beat=self._rounds, place=place, phase=phase, state=self._state)
        self._store.set(str(self._rank), self._me.to_json())

    def _look_round(self) -> None:
        """Note the newest signs of the ranks that this one watches, as one more round."""
        found = self._signs()
        for watched in self._watched:
            watched.note(found.get(watched.rank))
        self._rounds += 1

    def _signs(self) -> dict[int, _Sign]:
        """Read the newest signs of the ranks that this one watches, as far as there are any."""
        there = [w for w in self._watched if w.sign or self._store.check([str(w.rank)])]
        contents = self._store.multi_get([str(w.rank) for w in there]) if there else []
        return {w.rank: _Sign.from_json(text) for w, text in zip(there, contents, strict=True)}

    def _await_goodbyes(self) -> None:
        """Wait until the next round, or until all others have said goodbye."""
        until = time.monotonic() + self._interval
        others = {w.rank for w in self._watched} - {self._rank}
        while time.monotonic() < until and not self._over.is_set():
            signs = self._signs()
            if all(rank in signs and signs[rank].state != "runs" for rank in others):
                return
            self._over.wait(min(self._interval, _GOODBYE))

    def _others_run(self) -> bool:
        return any(w.state == "runs" for w in self._watched if w.rank != self._rank)

    def _judge(self) -> None:
        """End the process if a rank is lost, as this one finds or another has found."""
        if self._store.check(["verdict"]):
            self._obey()
        others = [w for w in self._watched if w.rank != self._rank]
        failed = [w for w in others if w.state == "failed" and w.silent >= _BEATS // 2]
        if failed:
            self._pronounce(
                f"{names_of(failed)} ended with an error; the run ends here", EXIT_FAILED
            )
        running = [w for w in others if w.state == "runs"]
        if any(w.silent >= _BEATS for w in running):
            # A node that is gone takes all its ranks with it: they are named together.
            lost = [w for w in running if w.silent >= _BEATS // 2]
            self._pronounce(_lost_message(names_of(lost), self._timeout), EXIT_LOST, lost)
        behind = self._behind()
        if behind:
            self._pronounce(_stall_message(behind, self._stall), EXIT_LOST, behind)

    def _behind(self) -> list[_Watched]:
        """The ranks that hold the others up, if all have stood still for as long as a stall."""
        running = [w for w in self._watched if w.sign is not None and w.state == "runs"]
        if self._stall is None or any(w.still * self._interval < self._stall for w in running):
            return []
        places = [w.sign.place for w in running if w.sign is not None]
        first = max(places, default=(0, 0, 0))
        last = min(places, default=first)
        # All at the same place: nobody waits for another one.
        return [w for w in running if w.sign is not None and first > w.sign.place == last]

    def _pronounce(self, message: str, code: int, lost: Sequence[_Watched] = ()) -> None:
        """Say which rank is lost, unless another rank is faster, and end the process."""
        if self._store.add("claims", 1) > 1:
            self._store.wait(["verdict"])
            self._obey()
        tell(message)
        signs = [w.sign.to_json() for w in lost if w.sign is not None]
        self._store.set("verdict", json.dumps({"code": code, "lost": signs}))
        self._obey()

    def _obey(self) -> None:
        verdict = json.loads(self._store.get("verdict"))
        for sign in verdict["lost"]:
            self._kill_here(_Sign.from_json(sign))
        with suppress(RuntimeError):  # the store
            self._store.set(str(self._rank), replace(self._me, state="failed").to_json())
            # The others still have to read the verdict.
            for _ in range(3 if self._hosts_store else 0):
                self._look_round()
                if self._others_run():
                    self._await_goodbyes()
        os._exit(verdict["code"])

    def _kill_here(self, sign: _Sign) -> None:
        """Kill a lost process, if it is of this node and still the one that gave the sign."""
        known = sign.node and sign.born and sign.pid != os.getpid()
        if known and sign.node == self._me.node and sign.born == _birth(sign.pid):
            with suppress(OSError):
                os.kill(sign.pid, signal.SIGKILL)

    def _end_without_store(self) -> None:
        """End the process, as the store is gone: no rank can hear of another any more."""
        if self._state != "runs":  # it has said all that it had to
            self._over.set()
            return
        if not self._ending.acquire(blocking=False):
            return  # the other thread is at it
        main = self._watched[0]
        if main.state == "failed":
            os._exit(EXIT_FAILED)  # the main rank has told its error itself
        # Nothing can be agreed on: the first rank of each node speaks.
        agent = agent_hosts_store()
        if os.environ.get("LOCAL_RANK", "0") == "0" or (self._rank == 1 and not agent):
            who = f"torchrun on {os.environ['MASTER_ADDR']}" if agent else str(main)
            tell(_lost_message(who, self._timeout))
        if not agent and main.sign is not None:
            self._kill_here(main.sign)
        os._exit(EXIT_LOST)


@contextmanager
def ranks_named(watchdog: Watchdog) -> Iterator[None]:
    """Say goodbye at the end of a run, and name the rank for whose loss a collective fails.

    The collectives' own errors ("Connection closed by peer") name an address. Such an error ends
    the process as the watchdog does; if no rank turns out to be lost it is raised as it came.
    """
    try:
        yield
    except BaseException as error:
        if _is_of_a_collective(error):
            watchdog.wait_for_verdict()
        watchdog.close(failed=True)
        raise
    watchdog.close()


def _is_of_a_collective(error: BaseException) -> bool:
    backend = isinstance(error, dist.DistError) or "gloo" in str(error) or "NCCL" in str(error)
    return isinstance(error, RuntimeError) and backend


def names_of(ranks: Sequence[object]) -> str:
    """The first of some ranks, and how many there are besides."""
    more = len(ranks) - _NAMED
    return ", ".join(map(str, ranks[:_NAMED])) + (f" and {more} more" if more > 0 else "")


def _lost_message(who: str, timeout: float) -> str:
    return (
        f"{who} has given no sign of life for {timeout:g} s: it was stopped or killed, or its node "
        f"is gone; {_END}"
    )


def _stall_message(behind: Sequence[_Watched], stall: float | None) -> str:
    sign = behind[0].sign
    assert sign is not None
    return (
        f"{names_of(behind)} has stood still for {stall:g} s at step {sign.place[1]} "
        f"({sign.phase}) while other ranks wait for it; {_END}"
    )


def tell(message: str) -> None:
    """Write a line to standard error."""
    os.write(2, f"{message}\n".encode())  # in one piece: all ranks write here


def _sign_of_this_process(rank: int) -> _Sign:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        node = f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        node = ""
    pid = os.getpid()
    return _Sign(rank=rank, host=socket.gethostname(), pid=pid, node=node, born=_birth(pid))


def _birth(pid: int) -> str:
    """When a process of this node began, in clock ticks since the boot; empty: unknown."""
    try:
        # Behind the command's name, which may hold anything, it is the 20th field.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
