"""An S3 service on loopback (moto's server), and what may go wrong on the way to it."""

import logging
import re
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from tpp.common import object_storage

BUCKET = "bucket"
# As moto takes any; looked for in what a run writes.
SECRETS = {
    "AWS_ACCESS_KEY_ID": "key-id-of-the-tests",
    "AWS_SECRET_ACCESS_KEY": "secret-of-the-tests",
}


class ObjectService:
    """The service behind a proxy, which does what ``fault`` says of requests that match ``at``.

    Attributes:
        url: of the proxy.
        fault: ``none``; ``refuse`` closes each connection; ``503`` answers so; ``cut`` ends half
            of an answer's bytes early; ``flip`` changes an answer's last byte; ``hang`` never
            answers.
        after: how many such requests pass before the fault meets one.
        times: how many requests the fault still meets.
        at: a pattern for a request's first line.
        requests: the first lines of all requests.
    """

    def __init__(self, host: str, port: int) -> None:
        self._behind = host, port
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self.requests: list[str] = []
        self.mend()
        threading.Thread(target=self._accept, daemon=True).start()

    def mend(self) -> None:
        self.fault, self.times, self.at, self.after = "none", 0, "", 0

    def break_(self, fault: str, at: str = "", times: int = 10**9, after: int = 0) -> None:
        self.at, self.times, self.after = at, times, after
        self.fault = fault

    def close(self) -> None:
        self._socket.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._socket.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        """One request of a connection, which is closed after it."""
        with client, suppress(OSError):
            head = b""
            while b"\r\n\r\n" not in head:
                if not (data := client.recv(65536)):
                    return
                head += data
            head, _, body = head.partition(b"\r\n\r\n")
            line = head.split(b"\r\n")[0].decode()
            self.requests.append(line)
            fault = "none"
            if self.fault != "none" and self.times > 0 and re.search(self.at, line):
                if self.after > 0:
                    self.after -= 1
                else:
                    self.times -= 1
                    fault = self.fault
            if fault == "refuse":
                return
            while fault == "hang" and self.fault == "hang":
                time.sleep(0.05)
            if b"expect: 100-continue" in head.lower():
                client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
                head = re.sub(rb"(?i)\r\nexpect: 100-continue", b"", head)
            length = int((re.search(rb"(?i)\r\ncontent-length: *(\d+)", head) or [b"", b"0"])[1])
            while len(body) < length:
                body += client.recv(1 << 20)
            if fault == "503":
                client.sendall(
                    b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
                )
                return
            head = re.sub(rb"(?i)\r\nconnection:[^\r]*", b"", head) + b"\r\nConnection: close"
            with socket.create_connection(self._behind) as server:
                server.sendall(head + b"\r\n\r\n" + body)
                answer = b""
                while data := server.recv(1 << 20):
                    answer += data
            if fault == "cut":
                start = answer.index(b"\r\n\r\n") + 4
                answer = answer[: start + (len(answer) - start) // 2]
            if fault == "flip":
                answer = answer[:-1] + bytes([answer[-1] ^ 1])
            client.sendall(answer)


@contextmanager
def object_service() -> Iterator[ObjectService]:
    """The service with an empty bucket, and the environment that leads to it."""
    import s3fs
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    # What an earlier server of this process had.
    urllib.request.urlopen(f"http://{host}:{port}/moto-api/reset", data=b"").close()
    service = ObjectService(host, port)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SECRETS.items():
            patch.setenv(name, value)
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_ENDPOINT_URL", service.url)
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        # Both remember where the service of an earlier test was.
        s3fs.S3FileSystem.clear_instance_cache()
        object_storage._filesystem.cache_clear()
        s3fs.S3FileSystem().mkdir(BUCKET)
        yield service
    service.close()
    server.stop()
