"""Runs whose images are in an object store, also while that is away."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from object_service import BUCKET, ObjectService, object_service
from safetensors.torch import load_file

from data_pipelines.images.image_index import open_images
from data_pipelines.sets.shard_writer import write_shards
from tpp.common.object_storage import Store

pytest.importorskip("s3fs")
pytest.importorskip("moto.server")


@pytest.fixture
def service() -> Iterator[ObjectService]:
    with object_service() as service:
        yield service


def test_two_ranks_whose_store_goes_away_go_on_when_it_is_back(
    service, tiny_config, tiny_data, tmp_path, run_main
):
    shards, url = tmp_path / "shards", f"s3://{BUCKET}/set"
    for part in ("train", "val"):
        write_shards(open_images(tiny_data / part), shards / part, shard_bytes=60_000)
    for path in shards.rglob("*"):
        if path.is_file():
            Store(url).write(path.relative_to(shards).as_posix(), path.read_bytes())
    tiny_config["stages"] = {"dense": {**tiny_config["stages"]["dense"], "epochs": 4}}
    run = Path(tiny_config["output"])
    undisturbed = run.with_name("undisturbed")
    run_main(tiny_config, f"output={undisturbed}", f"data.root={shards}", ranks=2)

    tiny_config["data"]["root"] = url
    gone = {"at": r"^GET .*train/[^ ]*\.tar ", "after": 200}
    service.break_("refuse", **gone)
    run_main(tiny_config, f"output={run.with_name('alone')}", expect=75)
    service.break_("refuse", **gone)
    ended = run_main(tiny_config, ranks=2, expect=None)
    # 75 is the rank's that needed the image; the other one may be seen to end first.
    assert ended.returncode in (1, 75)
    assert "cannot be reached" in ended.stderr and "Traceback" not in ended.stderr
    assert "started again, the run goes on" in ended.stderr
    service.mend()
    done = run_main(tiny_config, ranks=2)
    assert "resumed after" in done.stdout
    here, there = (load_file(f / "dense" / "model.safetensors") for f in (run, undisturbed))
    assert here.keys() == there.keys() and all(here[key].equal(there[key]) for key in here)
