#!/usr/bin/env bash
# huggingface_hub 2.4.0: a download without Xet is checked by its length alone, never by its hash.
#
# A server on this machine says the sha256 of a file as the Hub does (ETag), and sends a file of the
# same length with one other byte.
#   hf_hub_download                    returns; the file lies in the cache under the sha256 it has not
#   the same again                     does not fetch it again: a blob of that name is there
# One would expect an error, and nothing in the cache: the library knows the hash, and calls the file
# by it. As it is, every process that shares the cache reads the other bytes from then on.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
bin="${FINDINGS_VENV:+$FINDINGS_VENV/bin}"
if [[ -z "$bin" ]]; then
  python3 -m venv "$folder/venv"
  "$folder/venv/bin/pip" install --quiet huggingface_hub==2.4.0
  bin="$folder/venv/bin"
fi
cat >"$folder/bytes.py" <<'PYTHON'
import hashlib
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub

version = huggingface_hub.__version__
assert version == "2.4.0", f"made for 2.4.0, not {version}"
MEANT = b"x" * 100_000
SENT = b"y" + MEANT[1:]
SHA256 = hashlib.sha256(MEANT).hexdigest()
asked = []


class Other(BaseHTTPRequestHandler):
    def do_HEAD(self):
        asked.append(self.command)
        self.send_response(200)
        self.send_header("Content-Length", str(len(SENT)))
        self.send_header("ETag", f'"{SHA256}"')
        self.send_header("X-Repo-Commit", "a" * 40)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(SENT)

    do_GET = do_HEAD

    def log_message(self, *_):
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Other)
threading.Thread(target=server.serve_forever, daemon=True).start()
endpoint = f"http://127.0.0.1:{server.server_port}"


def fetch():
    return Path(
        huggingface_hub.hf_hub_download(
            "a/b", "model.safetensors", endpoint=endpoint, cache_dir=sys.argv[1], token=False
        )
    )


path = fetch()
blob, found = path.resolve().name, hashlib.sha256(path.read_bytes()).hexdigest()
fetch()
print(f"huggingface_hub {version}: no error; the blob is called {blob[:12]}..., and is {found[:12]}...")
print(f"asked for twice: {asked.count('GET')} download")
if (blob == SHA256, found == SHA256, asked.count("GET")) != (True, False, 1):
    raise SystemExit(f"this has changed: {blob}, {found}, {asked}")
PYTHON
env -u http_proxy -u HTTP_PROXY -u HF_HUB_OFFLINE HF_HUB_DISABLE_PROGRESS_BARS=1 \
  "$bin/python" "$folder/bytes.py" "$folder/cache"
