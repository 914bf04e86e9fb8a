#!/usr/bin/env bash
# s3fs 2026.9.0 (aiobotocore 3.10.0): reading an object tries again within tries. Where a store drops
# connections, `cat_file`, and with it `cat_ranges`, asks five times as often as any other call, and
# takes five times as long to say so; `retries` is 5 for both. Below, botocore's own retries are off.
#
#   info(path)              5 tries,  10 connections (each request opens two),  about 2 s
#   pipe_file(path, ...)    5 tries,  10 connections,                            about 2 s
#   cat_file(path, 0, 10)  25 tries,  50 connections,                            about 12 s
# One would expect `retries` to be a bound: what reads is wrapped into the same function that wraps the
# request inside. With botocore's retries at their default each of these is multiplied once more, to
# half a minute for info and some minutes for a read, in which a training loop stands still.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
bin="${FINDINGS_VENV:+$FINDINGS_VENV/bin}"
if [[ -z "$bin" ]]; then
  python3 -m venv "$folder/venv"
  "$folder/venv/bin/pip" install --quiet s3fs==2026.9.0 aiobotocore==3.10.0
  bin="$folder/venv/bin"
fi
cat >"$folder/count.py" <<'PYTHON'
import socket
import threading
import time
from importlib.metadata import version

import s3fs

for name, expected in (("s3fs", "2026.9.0"), ("aiobotocore", "3.10.0")):
    assert version(name) == expected, f"made for {name} {expected}, not {version(name)}"
connections = 0
server = socket.create_server(("127.0.0.1", 0))


def drop():
    """Take each request and close its connection."""
    global connections
    while True:
        client, _ = server.accept()
        client.recv(65536)
        connections += 1
        client.close()


threading.Thread(target=drop, daemon=True).start()
files = s3fs.S3FileSystem(
    key="key",
    secret="secret",
    endpoint_url=f"http://127.0.0.1:{server.getsockname()[1]}",
    client_kwargs={"region_name": "us-east-1"},
    config_kwargs={"retries": {"max_attempts": 0}},
    use_listings_cache=False,
)
calls = {
    "info": lambda: files.info("bucket/object"),
    "pipe_file": lambda: files.pipe_file("bucket/object", b"1"),
    "cat_file": lambda: files.cat_file("bucket/object", 0, 10),
}
counted = {}
for name, call in calls.items():
    connections, started = 0, time.monotonic()
    try:
        call()
    except Exception as error:
        said = type(error).__name__
    counted[name] = connections
    print(f"{name}: {connections} connections in {time.monotonic() - started:.1f} s, then {said}")
print(f"retries: {files.retries}")
if files.retries != 5 or counted != {"info": 10, "pipe_file": 10, "cat_file": 50}:
    raise SystemExit("this has changed")
PYTHON
cd "$folder"
"$bin/python" count.py
