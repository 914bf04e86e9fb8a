"""Holds a run folder's lock until its standard input ends: lock_worker.py FOLDER [options].

Options: ``beat=SECONDS``; ``fork`` leaves a child that outlives it; ``host=NAME`` calls this node
by another name; ``no-locks`` makes the file system one that has none; ``start`` waits for a line
before it begins.
"""

import errno
import fcntl
import os
import socket
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tpp.common.errors import run_command  # noqa: E402
from train.run_folder.lock import RunLock  # noqa: E402


def _no_locks(descriptor: int, command: int) -> None:
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


def main() -> None:
    folder, *words = sys.argv[1:]
    options = dict(word.partition("=")[::2] for word in words)
    if "host" in options:
        socket.gethostname = lambda: options["host"]
    if "no-locks" in options:
        fcntl.lockf = _no_locks
    lock = RunLock(Path(folder), beat=float(options.get("beat", 5)))
    if "start" in options:
        print("ready", flush=True)
        sys.stdin.readline()
    lock.acquire()
    child = 0
    if "fork" in options:
        child = os.fork()
        if child == 0:
            os.close(1)  # whoever reads the parent's output is not to wait for this one
            os.close(2)
            time.sleep(60)
            os._exit(0)
    print(f"held {child}", flush=True)
    sys.stdin.read()
    lock.release()
    lock.release()


if __name__ == "__main__":
    run_command(main)
