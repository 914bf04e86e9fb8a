"""Downloads are known by their whole address, and are whole and of the right hash or not there."""

import hashlib
import io
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from torchvision.models import ResNet18_Weights

from tpp.common.errors import UserError
from tpp.models.architecture import Architecture, build_model
from tpp.models.settings import ModelSection
from train.downloads import fetch, place_of
from train.weights import load_starting_weights, weights_missing_here

RESNET8 = Architecture("cifar_resnet8", 4)


class Server:
    """Files by their path; how often each was asked for; those that break off half way."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.broken: set[str] = set()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.asked.append(self.path)
                data = server.files.get(self.path)
                self.send_response(404 if data is None else 200)
                data = data or b""
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                half = len(data) // 2 if self.path in server.broken else len(data)
                self.wfile.write(data[:half])

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    for proxy in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(proxy, raising=False)
    found = Server()
    yield found
    found.close()


def network(seed: int, name: str = "cifar_resnet8", classes: int = 4) -> torch.nn.Module:
    torch.manual_seed(seed)
    return build_model(name, classes)


def kept(tmp_path: Path) -> list[str]:
    return sorted(p.name for p in (tmp_path / "torch").rglob("*") if p.is_file())


def test_two_addresses_that_end_alike_are_two_networks(server, tmp_path):
    """Every file on the Hub is called model.safetensors."""
    networks = {}
    for number, path in enumerate(("/a/model.safetensors", "/b/model.safetensors?v=2")):
        networks[path] = network(number)
        server.files[path] = save(networks[path].state_dict())
    for _ in range(2):
        for path, truth in networks.items():
            section = ModelSection(name="cifar_resnet8", checkpoint=server.url + path)
            found = load_starting_weights(section, RESNET8, 0)
            assert found.conv1.weight.equal(truth.conv1.weight), path
            assert weights_missing_here(section) is None
    assert sorted(server.asked) == sorted(networks), "each is downloaded once"


@pytest.mark.parametrize("length", [8, 64])
def test_a_hash_that_does_not_fit_leaves_nothing(server, tmp_path, length):
    data = server.files["/x.safetensors"] = save(network(0).state_dict())
    right = hashlib.sha256(data).hexdigest()[:length]
    wrong = ("0" if right[0] != "0" else "1") + right[1:]
    url = f"{server.url}/x.safetensors"
    section = ModelSection(name="cifar_resnet8", checkpoint=url, sha256=wrong)
    with pytest.raises(UserError) as refused:
        load_starting_weights(section, RESNET8, 0)
    assert str(refused.value).startswith(f"model.checkpoint: {url} has sha256 {right}")
    assert "\n" not in str(refused.value) and kept(tmp_path) == []
    assert not place_of(url).parent.exists()
    good = ModelSection(name="cifar_resnet8", checkpoint=url, sha256=right)
    load_starting_weights(good, RESNET8, 0)
    # What is kept is not believed either.
    with pytest.raises(UserError, match="kept at"):
        load_starting_weights(section, RESNET8, 0)


def test_a_hash_in_the_name_is_checked(server, tmp_path):
    data = server.files["/x-0123abcd.pth"] = b"nothing"
    with pytest.raises(UserError, match=hashlib.sha256(data).hexdigest()[:8]):
        fetch(f"{server.url}/x-0123abcd.pth", key="k")
    assert kept(tmp_path) == []
    name = f"x-{hashlib.sha256(data).hexdigest()[:8]}.pth"
    server.files[f"/{name}"] = data
    path = fetch(f"{server.url}/{name}", key="k")
    assert path == tmp_path / "torch" / "hub" / "checkpoints" / name, "where torch.hub has it"
    # One that was damaged since is fetched again.
    path.write_bytes(b"something else")
    assert fetch(f"{server.url}/{name}", key="k").read_bytes() == data


def test_a_download_that_breaks_off_is_none(server, tmp_path):
    server.files["/x.pth"] = b"x" * 100_000
    server.broken.add("/x.pth")
    with pytest.raises(UserError, match="broke off after 50,000 of 100,000 bytes"):
        fetch(f"{server.url}/x.pth", key="k")
    with pytest.raises(UserError, match=r"cannot download .* .*404"):
        fetch(f"{server.url}/y.pth", key="k")
    assert kept(tmp_path) == []


def test_weights_of_torchvision_are_those_of_their_address(server, monkeypatch):
    truth = network(3, "resnet18", 1000)
    stream = io.BytesIO()
    torch.save(truth.state_dict(), stream)
    data = stream.getvalue()
    name = f"resnet18-{hashlib.sha256(data).hexdigest()[:8]}.pth"
    server.files[f"/{name}"] = data
    monkeypatch.setattr(ResNet18_Weights.IMAGENET1K_V1.value, "url", f"{server.url}/{name}")
    for checkpoint in ("torchvision:IMAGENET1K_V1", "torchvision:resnet18.IMAGENET1K_V1"):
        section = ModelSection(name="resnet18", checkpoint=checkpoint)
        found = load_starting_weights(section, Architecture("resnet18", 1000), 0)
        assert found.fc.weight.equal(truth.fc.weight)
    assert server.asked == [f"/{name}"]
