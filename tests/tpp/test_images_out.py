"""Networks whose output is an image: built, pruned, kept, looked at, timed and exported."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from zeroing import randomised, relative_difference, zeroed

import tpp.describe
import tpp.export
import tpp.latency
import tpp.prune
from tpp.channels.removal import prune_model
from tpp.channels.survey import survey_channels
from tpp.checkpoints.model_file import FORMAT, load_model, read_metadata, save_model
from tpp.checkpoints.prune_file import prune_checkpoint
from tpp.common.errors import UserError
from tpp.measure.counts import count
from tpp.models.architecture import Architecture, build_model, build_on_meta, input_shape
from tpp.plan import PruningPlan
from tpp.selection.selection import select_filters

ARGS = {"scale": 2, "blocks": 2, "width": 8}
STREAM = ["head", "body.0.conv2", "body.1.conv2", "body_end"]
INNER = ["body.0.conv1", "body.1.conv1"]
SIZES = [(12, 12), (7, 20), (48, 5)]


def network(**args):
    return randomised("edsr", classes=None, **{**ARGS, **args})


def images(size, channels=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(sum(size))
    return torch.rand(2, channels, *size, generator=generator, dtype=dtype)


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_images_become_larger_by_the_scale(scale):
    model = build_model("edsr", None, scale=scale, blocks=1, width=4, channels=1)
    for height, width in SIZES:
        out = model(torch.rand(2, 1, height, width))
        assert out.shape == (2, 1, scale * height, scale * width)
    assert input_shape("edsr", channels=1) == (1, 48, 48)
    assert model.architecture.output_shape((1, 48, 30)) == (1, 48 * scale, 30 * scale)


def test_pixels_are_shuffled_out_of_channels_and_the_body_is_skipped():
    """With all but the first and the last convolutions at zero, or as good as that, by hand."""
    model = network(scale=2, blocks=1, width=1, channels=1).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.zero_()
            if name in ("head.weight", "tail.weight"):
                parameter[..., 1, 1] = 1  # hands its input on
        model.upsample[0].weight[:, 0, 1, 1] = torch.tensor([1.0, 2.0, 3.0, 4.0])
        x = images((2, 3), channels=1)
        expected = torch.kron(x, torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64))
        torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize(
    ("name", "classes", "args", "message"),
    [
        (
            "edsr",
            10,
            {},
            "model 'edsr': its output is an image, so it takes no num_classes, not 10",
        ),
        ("resnet18", None, {}, "model 'resnet18': num_classes must be a positive number, not None"),
        ("edsr", None, {"scale": 5}, "scale must be one of 2, 3, 4, not 5"),
        ("edsr", None, {"depth": 5}, "depth"),
        ("edsr", None, {"weights": "x"}, "loaded from a file"),
    ],
)
def test_mistakes_are_named(name, classes, args, message):
    for build in (
        lambda: build_model(name, classes, **args),
        lambda: build_on_meta(Architecture(name, classes, args)),
    ):
        with pytest.raises(UserError) as caught:
            build()
        assert message in str(caught.value)


@pytest.mark.parametrize("layers", [INNER, STREAM, INNER + STREAM])
def test_removing_filters_equals_zeroing_them(layers):
    model = network()
    gone = {layer: [0, 3, 5] if layer in STREAM else [1, 2, 4, 6] for layer in layers}
    plan = PruningPlan.from_indices(dict.fromkeys(layers, 8), gone)
    pruned = prune_model(model, plan)
    dense = zeroed(model, plan.pruned, images(SIZES[0]))
    for size in SIZES:
        with torch.no_grad():
            assert relative_difference(pruned(images(size)), dense(images(size))) < 1e-10, size
    assert pruned.body[0].conv1.out_channels == (4 if "body.0.conv1" in layers else 8)


def test_one_filter_of_a_block_is_enough():
    plan = PruningPlan({"body.0.conv1": 8}, {"body.0.conv1": [0, 1, 2, 3, 4, 5, 7]})
    model = network()
    dense, pruned = zeroed(model, plan.pruned, images(SIZES[0])), prune_model(model, plan)
    assert relative_difference(pruned(images(SIZES[1])), dense(images(SIZES[1]))) < 1e-10


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_what_cannot_go_is_named_with_a_reason(scale):
    model = network(scale=scale)
    alone, coupled = survey_channels(model), survey_channels(model, coupled=True)
    assert list(alone.channels) == INNER
    assert sorted(coupled.channels) == sorted(INNER + STREAM)
    assert all(found.inexact is None for found in coupled.channels.values())
    for layer in STREAM:
        assert "cannot be removed alone: prune all of these layers" in alone.refused[layer]
    assert "the network's output" in coupled.refused["tail"]
    ends = [0] if scale != 4 else [0, 2]
    for number in ends:
        reason = coupled.refused[f"upsample.{number}"]
        assert (
            f"reach pixel_shuffle, which they are not followed through (at upsample.{number + 1}"
            in (reason)
        )


def test_a_pruned_network_is_kept_as_it_is(tmp_path):
    model = network(channels=1)
    plan = select_filters(model, dict.fromkeys(INNER, 0.5))
    save_model(tmp_path / "dense", model)
    prune_checkpoint(tmp_path / "dense", plan, tmp_path / "pruned")
    loaded, expected = load_model(tmp_path / "pruned"), prune_model(model, plan)
    assert loaded.architecture == Architecture("edsr", None, {**ARGS, "channels": 1})
    x = images((9, 4), channels=1)
    with torch.no_grad():
        assert torch.equal(loaded(x), expected(x))
    assert read_metadata(tmp_path / "pruned").widths["body.0.conv1"] == [8, 4]
    assert count(loaded).macs < count(model).macs


def test_what_is_said_of_classes_is_null(tmp_path):
    save_model(tmp_path / "ckpt", network())
    with (tmp_path / "ckpt").open("rb") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
    said = json.loads(json.loads(header)["__metadata__"][FORMAT])["architecture"]
    assert said == {"name": "edsr", "num_classes": None, "args": ARGS}


def test_tensors_of_another_scale_or_number_of_channels_do_not_fit(tmp_path):
    tensors = dict(network().state_dict())
    larger = Architecture("edsr", None, {**ARGS, "scale": 3})
    with pytest.raises(UserError, match=r"layers do not fit each other at upsample\.1"):
        save_model(tmp_path / "x", tensors, architecture=larger)
    tensors["tail.weight"], tensors["tail.bias"] = torch.zeros(5, 8, 3, 3), torch.zeros(5)
    with pytest.raises(UserError) as caught:
        save_model(tmp_path / "x", tensors, architecture=Architecture("edsr", None, ARGS))
    assert "makes 1x5x96x96 of images of 1x3x48x48, and not 1x3x96x96" in str(caught.value)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("name", "said", "message"),
    [
        ("edsr", 10, "its output is an image, so it takes no num_classes, not 10"),
        ("cifar_resnet8", None, "num_classes must be a positive number, not None"),
    ],
)
def test_a_file_that_is_wrong_about_classes_is_refused(tmp_path, name, said, message):
    path = tmp_path / "ckpt"
    save_model(path, network() if name == "edsr" else build_model(name, 10))
    with path.open("rb") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
    metadata = json.loads(json.loads(header)["__metadata__"][FORMAT])
    metadata["architecture"]["num_classes"] = said
    save_file(load_file(path), path, metadata={FORMAT: json.dumps(metadata)})
    with pytest.raises(UserError, match=message):
        load_model(path)


def run(monkeypatch, capsys, main, *arguments):
    """A command's output; it never speaks of classes, of which there are none."""
    monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
    main()
    printed = capsys.readouterr().out
    assert "None" not in printed and "class" not in printed and "logit" not in printed
    return printed


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A dense network and a pruned one."""
    folder = tmp_path_factory.mktemp("saved")
    model = network().float()
    save_model(folder / "dense", model)
    save_model(folder / "pruned", prune_model(model, select_filters(model, {"body.*.conv1": 0.5})))
    return folder


def test_the_pruning_command(saved, tmp_path, monkeypatch, capsys):
    files = ["--checkpoint", saved / "dense", "--output", tmp_path / "out"]
    printed = run(monkeypatch, capsys, tpp.prune.main, *files, "--ratio", "body.*.conv1=0.5")
    assert "edsr: parameters" in printed
    assert load_model(tmp_path / "out").body[1].conv1.out_channels == 4
    foreign = tmp_path / "foreign.safetensors"
    save_file(build_model("edsr", None).state_dict(), foreign)
    files = ["--checkpoint", foreign, "--output", tmp_path / "out", "--overwrite"]
    run(monkeypatch, capsys, tpp.prune.main, *files, "--model", "edsr", "--speedup", "1.2")
    save_file(load_model(saved / "dense").state_dict(), foreign)
    config = tmp_path / "config.yaml"
    model = {"name": "edsr", "args": ARGS}
    config.write_text(json.dumps({"model": model, "pruning": {"ratios": {"body.*.conv1": 0.25}}}))
    run(monkeypatch, capsys, tpp.prune.main, *files, "--config", config)
    assert load_model(tmp_path / "out").body[1].conv1.out_channels == 6


def test_the_description(saved, tmp_path, monkeypatch, capsys):
    picture = tmp_path / "layers.svg"
    main = tpp.describe.main
    printed = run(monkeypatch, capsys, main, saved / "pruned", "--plot", picture)
    assert "edsr, images out, scale=2, blocks=2, width=8" in printed
    assert "4 / 8" in printed
    assert "None" not in picture.read_text()


def test_the_latency(saved, monkeypatch, capsys):
    other = saved / "other"
    save_model(other, build_model("edsr", None, **{**ARGS, "scale": 3}))
    quick = ["--repeats", "1", "--warmup", "0"]
    printed = run(monkeypatch, capsys, tpp.latency.main, saved / "pruned", other, *quick)
    # The other one is as wide as its dense network would be, and stands for it.
    words = " ".join(printed.split())
    assert "edsr, images out, scale=2" in words and "scale=3" not in words


@pytest.mark.parametrize("ending", ["onnx", "pt2"])
def test_the_exported_file_gives_images(saved, tmp_path, monkeypatch, capsys, ending):
    file = tmp_path / f"model.{ending}"
    printed = run(monkeypatch, capsys, tpp.export.main, saved / "pruned", "--output", file)
    assert "outputs off by" in printed
    model, x = load_model(saved / "pruned"), images((48, 48), dtype=torch.float32)
    if ending == "onnx":
        onnxruntime = pytest.importorskip("onnxruntime")
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        assert [output.name for output in session.get_outputs()] == ["outputs"]
        found = torch.from_numpy(session.run(["outputs"], {"images": x.numpy()})[0])
        said = session.get_modelmeta().custom_metadata_map["architecture"]
    else:
        files = {"architecture": ""}
        found = torch.export.load(file, extra_files=files).module()(x)
        said = files["architecture"]
    assert found.shape == (2, 3, 96, 96)
    with torch.no_grad():
        torch.testing.assert_close(found, model(x), rtol=1e-4, atol=1e-5)
    assert json.loads(said)["num_classes"] is None
