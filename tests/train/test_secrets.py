"""What is secret in the environment or in a URL stays out of run folders and of what is printed."""

from pathlib import Path

import pytest

from tpp.common.errors import UserError
from tpp.models.settings import ModelSection
from train.weights import starting_weights_exist

SECRETS = {
    "HF_TOKEN": "hf_Xq7secretXq7",
    "AWS_SECRET_ACCESS_KEY": "wJalrXq7secretKEY",
    "WANDB_API_KEY": "Xq7secret0123456789",
    "https_proxy": "http://someone:Xq7secretpw@proxy.invalid:3128",
    "SLURM_JWT": "Xq7secret.jwt",
    "TPP_ANYTHING": "Xq7secret-anything",
}
MARK = b"Xq7secret"


def test_no_byte_of_a_run_folder_is_from_the_environment(
    run_main, tiny_config, tmp_path, monkeypatch
):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    done = run_main(tiny_config)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    names = {path.name.split(".")[0] for path in files}
    assert {"results", "log", "config", "report", "model", "events"} <= names
    assert not [path for path in files if MARK in path.read_bytes()]
    assert MARK.decode() not in done.stdout + done.stderr


@pytest.mark.parametrize(
    "url",
    [
        "https://someone:Xq7secret@example.org/x.pth",
        "https://Xq7secret@example.org/x.pth",
        "https://example.org/x.pth?X-Amz-Signature=Xq7secret",
        "https://example.org/x.pth?download=1&access_token=Xq7secret",
        "https://example.org/x.pth?sig=Xq7secret",
    ],
)
def test_a_url_with_a_secret_is_refused_and_not_repeated(url):
    with pytest.raises(UserError, match=r"model\.checkpoint: the URL of example\.org") as caught:
        starting_weights_exist(ModelSection(name="resnet18", checkpoint=url))
    assert MARK.decode() not in str(caught.value)


def test_other_urls_are_fine():
    for url in ("https://example.org/a/x.pth", "https://example.org/x.pth?download=true&v=3"):
        starting_weights_exist(ModelSection(name="resnet18", checkpoint=url))


def test_it_is_refused_before_anything_is_written(run_inside, tiny_config, tmp_path, capsys):
    tiny_config["model"]["checkpoint"] = "https://someone:Xq7secret@example.org/x.pth"
    run_inside(tiny_config, expect=2)
    printed = capsys.readouterr()
    assert "holds a password or a token" in printed.err
    assert MARK.decode() not in printed.out + printed.err
    assert not (tmp_path / "run").exists()


def test_a_mark_in_a_run_folder_would_be_seen(tmp_path: Path):
    (tmp_path / "log.jsonl").write_bytes(b"x" + SECRETS["HF_TOKEN"].encode())
    assert all(MARK.decode() in value for value in SECRETS.values())
    assert MARK in (tmp_path / "log.jsonl").read_bytes()
