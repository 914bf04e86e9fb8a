#!/usr/bin/env bash
# torch 2.15.0: torch.hub keeps a download that broke off half way, and says nothing.
#
# A server on this machine announces 100,000 bytes and closes the connection after 50,000.
#   torch.hub.download_url_to_file           returns; the file has 50,000 bytes
#   the same again, by load_state_dict_from_url   does not ask the server: a file is there
#   with the sha256's first digits given     RuntimeError: invalid hash value, and no file
#   urllib.request.urlretrieve               ContentTooShortError
# One would expect an error as urlretrieve has it. So long as no hash is given, the half file stays in
# the cache for good, and what reads it later says that it is damaged.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
bin="${FINDINGS_VENV:+$FINDINGS_VENV/bin}"
if [[ -z "$bin" ]]; then
  python3 -m venv "$folder/venv"
  "$folder/venv/bin/pip" install --quiet torch==2.15.0 numpy
  bin="$folder/venv/bin"
fi
cat >"$folder/half.py" <<'PYTHON'
import hashlib
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from urllib.error import ContentTooShortError
from urllib.request import urlretrieve

import torch

assert torch.__version__.startswith("2.15.0"), f"made for 2.15.0, not {torch.__version__}"
DATA = bytes(100_000)
asked = []


class Half(BaseHTTPRequestHandler):
    def do_GET(self):
        asked.append(self.path)
        self.send_response(200)
        self.send_header("Content-Length", str(len(DATA)))
        self.end_headers()
        self.wfile.write(DATA[:50_000])

    def log_message(self, *_):
        pass


server = HTTPServer(("127.0.0.1", 0), Half)
threading.Thread(target=server.serve_forever, daemon=True).start()
url = f"http://127.0.0.1:{server.server_port}/x.pth"
folder = Path(sys.argv[1])

torch.hub.download_url_to_file(url, str(folder / "x.pth"), progress=False)
size = (folder / "x.pth").stat().st_size
try:
    torch.hub.load_state_dict_from_url(url, model_dir=str(folder), progress=False)
    read = "read"
except Exception:
    read = "not readable"
requests = len(asked)

digits = hashlib.sha256(DATA).hexdigest()[:8]
try:
    torch.hub.download_url_to_file(url, str(folder / "y.pth"), digits, progress=False)
    checked = "kept"
except RuntimeError as error:
    checked = str(error).split("(")[0].strip()
there = (folder / "y.pth").exists()
try:
    urlretrieve(url, folder / "z.pth")
    standard = "kept"
except ContentTooShortError as error:
    standard = type(error).__name__

print(f"torch {torch.__version__}: announced {len(DATA):,} bytes, kept {size:,}; no error")
print(f"asked for again: {read}, after {requests} request")
print(f"with a hash: {checked}; a file is there: {there}")
print(f"urlretrieve: {standard}")
found = (size, read, requests, checked, there, standard)
if found != (50_000, "not readable", 1, "invalid hash value", False, "ContentTooShortError"):
    raise SystemExit(f"this has changed: {found}")
PYTHON
env -u http_proxy -u HTTP_PROXY "$bin/python" "$folder/half.py" "$folder" 2>"$folder/log" || { cat "$folder/log"; exit 1; }
