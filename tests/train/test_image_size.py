"""What networks cost is counted for the images that they see, everywhere, and said."""

import json

import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook

import tpp.describe
import tpp.export
import tpp.latency
import tpp.prune
from tpp.channels.removal import prune_model
from tpp.checkpoints.model_file import load_model, read_metadata, save_model
from tpp.common.errors import UserError
from tpp.measure.counts import count
from tpp.models.architecture import build_model, example_input_for, set_preprocessing
from tpp.models.cifar import CifarResNet
from tpp.models.preparation import take_image_size
from tpp.selection.selection import select_filters
from train.report import show_end

SAID = {"image_size": 48, "resize": 48, "mean": [0.5] * 3, "std": [0.5] * 3, "channels": 3}


def macs(model, size, channels=3):
    return count(model, example_input=torch.zeros(1, channels, size, size)).macs


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A network that saw images of 48 pixels, dense and pruned, and what is in the files."""
    folder = tmp_path_factory.mktemp("files")
    model = build_model("cifar_resnet8", 10)
    pruned = prune_model(model, select_filters(model, {"layer*conv1": 0.5}))
    save_model(folder / "dense", model, preprocessing=SAID)
    save_model(folder / "pruned", pruned, preprocessing=SAID)
    return folder, model, pruned


def in_m(number):
    return f"{number / 1e6:.2f} M"


def test_a_file_says_what_its_network_is_counted_with(files):
    folder, model, pruned = files
    assert count(load_model(folder / "pruned")).macs == macs(pruned, 48)
    assert count(load_model(folder / "dense")).image == (3, 48, 48)
    assert count(model).macs == macs(model, 32)  # where nothing is said


def test_describe(files, capsys):
    folder, model, pruned = files
    tpp.describe.main([str(folder / "pruned")])
    text = capsys.readouterr().out
    after, before = macs(pruned, 48), macs(model, 48)
    assert f"{in_m(after)} of {in_m(before)} for a 3x48x48 image" in text
    tpp.describe.main([str(folder / "pruned"), "--image-size", "64"])
    text = capsys.readouterr().out
    assert f"{in_m(macs(pruned, 64))} of {in_m(macs(model, 64))} for a 3x64x64 image" in text
    for size, mistake in (
        ("0", "--image-size: must be at least 1, not 0"),
        ("5000", "image_size must be between 1 and 4096, not 5000"),
    ):
        with pytest.raises(UserError, match=mistake):
            tpp.describe.main([str(folder / "pruned"), "--image-size", size])


def test_budgets(files, tmp_path, capsys):
    folder, model, _ = files
    out = tmp_path / "out"
    command = ["--checkpoint", str(folder / "dense"), "--output", str(out), "--overwrite"]
    most = macs(model, 48) // 2
    tpp.prune.main([*command, "--max-macs", str(most)])
    found = macs(load_model(out), 48)
    assert 0.98 * most <= found <= most
    text = capsys.readouterr().out
    assert f"MACs {in_m(macs(model, 48))} -> {in_m(found)} for a 3x48x48 image" in text
    assert read_metadata(out).preprocessing == SAID
    with pytest.raises(UserError, match=r"1,000 MACs for a 3x48x48 image cannot be met"):
        tpp.prune.main([*command, "--max-macs", "1k"])
    # Told otherwise, the same budget is of other images, and the file keeps what was told.
    tpp.prune.main([*command, "--max-macs", str(2 * most), "--image-size", "72"])
    assert 1.96 * most <= macs(load_model(out), 72) <= 2 * most
    assert read_metadata(out).preprocessing == {**SAID, "image_size": 72, "resize": 72}


def test_a_budget_of_a_configuration(tmp_path):
    torch.save(build_model("cifar_resnet8", 10).state_dict(), tmp_path / "a.pth")
    (tmp_path / "c.yaml").write_text(
        "model: {name: cifar_resnet8}\n"
        "data: {root: nowhere, image_size: 64, resize: 80, threads: 7}\n"
        "pruning: {budget: {macs: 30M}}\n"
    )
    command = ["--checkpoint", str(tmp_path / "a.pth"), "--output", str(tmp_path / "out")]
    tpp.prune.main([*command, "--config", str(tmp_path / "c.yaml")])
    pruned = load_model(tmp_path / "out")
    assert 29.4e6 <= macs(pruned, 64) <= 30e6
    assert pruned.preprocessing["image_size"] == 64 and pruned.preprocessing["resize"] == 80


def test_latency(files, tmp_path, capsys):
    folder, model, pruned = files
    result = tmp_path / "out.json"
    quick = ["--repeats", "1", "--warmup", "0", "--json", str(result), "--overwrite"]
    tpp.latency.main([str(folder / "pruned"), *quick])
    dense, row = json.loads(result.read_text())["results"]
    assert dense["image"] == row["image"] == [3, 48, 48]
    assert (dense["macs"], row["macs"]) == (macs(model, 48), macs(pruned, 48))
    assert "batch 1, images 3x48x48, fp32" in capsys.readouterr().out
    tpp.latency.main([str(folder / "pruned"), *quick, "--image-size", "32"])
    assert json.loads(result.read_text())["results"][1]["image"] == [3, 32, 32]
    # Each beside a dense network that sees the same.
    save_model(tmp_path / "other", pruned, preprocessing={**SAID, "image_size": 32})
    tpp.latency.main([str(folder / "pruned"), str(tmp_path / "other"), *quick])
    rows = json.loads(result.read_text())["results"]
    assert [row["network"] for row in rows] == [
        "dense cifar_resnet8, 3x48x48",
        "pruned",
        "dense cifar_resnet8, 3x32x32",
        "other",
    ]
    assert rows[3]["counted_speedup"] == macs(model, 32) / macs(pruned, 32)


def test_a_latency_budget_times_those_images(files, tmp_path, capsys):
    folder, *_ = files
    seen = set()

    def note(module, inputs):
        if isinstance(module, CifarResNet) and not inputs[0].is_meta:
            seen.add(tuple(inputs[0].shape))

    handle = register_module_forward_pre_hook(note)
    command = ["--checkpoint", str(folder / "dense"), "--output", str(tmp_path / "out")]
    tpp.prune.main([*command, "--max-latency-ms", "1e6"])
    handle.remove()
    assert seen == {(1, 3, 48, 48)}
    assert "latency here, a 3x48x48 image: " in capsys.readouterr().out


def test_export(files, tmp_path, capsys):
    folder, *_ = files
    command = [
        str(folder / "pruned"),
        "--output",
        str(tmp_path / "a.pt2"),
        "--no-check",
        "--overwrite",
    ]
    tpp.export.main(command)
    assert "images Nx3x48x48 float32" in capsys.readouterr().out
    tpp.export.main([*command, "--image-size", "40"])
    assert "images Nx3x40x40 float32" in capsys.readouterr().out


def test_networks_that_see_images_of_one_side_refuse_others():
    model = build_model("vit_b_16", 10, image_size=32)
    take_image_size(model, 64)
    with pytest.raises(UserError, match="VisionTransformer does not run on an input of 1x3x64x64"):
        count(model)


@pytest.mark.parametrize("said", [{"image_size": "64"}, {"image_size": 10**6}, {"channels": 0}])
def test_nonsense_in_a_file_is_no_traceback(said, tmp_path):
    save_model(tmp_path / "a", build_model("cifar_resnet8", 10), preprocessing=said)
    with pytest.raises(UserError, match="there are no such images"):
        tpp.describe.main([str(tmp_path / "a")])


def test_a_network_for_larger_images_is_counted_with_the_smaller_ones():
    model = build_model("edsr", None, scale=3, blocks=1, width=4)
    set_preprocessing(model, {"image_size": 96, "channels": 3})
    assert example_input_for(model).shape == (1, 3, 32, 32)


def test_a_run_counts_what_its_images_cost(tiny_config, tmp_path, run_inside, capsys):
    """Of images scaled to 48 pixels, where the network's name would say 32."""
    tiny_config["data"] |= {"image_size": 48, "resize": 48, "augmentation": "none"}
    tiny_config["pruning"] = {"budget": {"macs": "16M"}}
    tiny_config["stages"] = {"prune": {"kind": "prune", "input": None}}
    run_inside(tiny_config, "--dry-run")
    model = build_model("cifar_resnet8", 4)
    dense = macs(model, 48)
    assert macs(model, 32) < 16e6 < dense
    assert f"MACs for a 3x48x48 image: {dense:,} -> " in capsys.readouterr().out
    run_inside(tiny_config)
    folder = tmp_path / "run"
    results = json.loads((folder / "results.json").read_text())
    pruned = load_model(folder / "prune" / "model.safetensors")
    assert results["image"] == [3, 48, 48]
    assert results["dense"]["macs"] == dense
    assert 15.7e6 <= results["stages"]["prune"]["macs"] == macs(pruned, 48) <= 16e6
    capsys.readouterr()
    show_end(folder)
    assert "MACs at 48x48" in " ".join(capsys.readouterr().out.split())


def test_a_training_stage_counts_so_too(tiny_config, tmp_path, run_inside):
    tiny_config["data"] |= {"image_size": 48, "resize": 48, "augmentation": "none"}
    tiny_config["stages"] = {"dense": {"epochs": 0.2, "optimizer": {"lr": 0.05}}, "evaluate": {}}
    run_inside(tiny_config)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    found = [stage["macs"] for stage in results["stages"].values()]
    assert found == [macs(build_model("cifar_resnet8", 4), 48)] * 2
