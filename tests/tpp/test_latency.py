import copy
import io
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn
from torch._dynamo.comptime import comptime

from tpp.channels.removal import prune_model
from tpp.checkpoints.model_file import save_model
from tpp.common.errors import UserError
from tpp.latency import _table, arriving_share, main, size_at_time
from tpp.measure.counts import count
from tpp.measure.timing import LatencySettings, Timing, measure
from tpp.models.architecture import build_model
from tpp.selection.selection import select_filters

ROOT = Path(__file__).resolve().parents[2]
QUICK = LatencySettings(repeats=2, warmup=1)


class Recorder(nn.Module):
    """Notes every forward pass in a list that its copies share."""

    def __init__(self, name, log):
        super().__init__()
        self.name, self.log = name, log
        self.conv = nn.Conv2d(3, 4, 3)

    def __deepcopy__(self, memo):
        twin = Recorder(self.name, self.log)
        twin.conv = copy.deepcopy(self.conv, memo)
        return twin.train(self.training)

    def forward(self, images):
        self.log.append((self.name, self.training, images.clone(), self.conv.weight))
        assert torch.is_inference_mode_enabled()
        return self.conv(images)


def test_networks_take_turns():
    log = []
    networks = {name: Recorder(name, log) for name in ("dense", "a", "b")}
    timings = measure(networks, LatencySettings(repeats=3, warmup=2))
    # One first pass each, then rounds.
    assert [entry[0] for entry in log] == ["dense", "a", "b"] * (1 + 2 + 3)
    assert list(timings) == ["dense", "a", "b"]
    assert all(len(timing.seconds) == 3 and min(timing.seconds) > 0 for timing in timings.values())


def test_times_are_seconds_of_one_network_each():
    class Sleeper(nn.Module):
        def __init__(self, seconds):
            super().__init__()
            self.seconds = seconds
            self.fc = nn.Linear(1, 1)

        def forward(self, images):
            time.sleep(self.seconds)

    started = time.perf_counter()
    networks = {"short": Sleeper(0.005), "long": Sleeper(0.02)}
    timings = measure(networks, LatencySettings(repeats=3, warmup=0))
    elapsed = time.perf_counter() - started
    assert min(timings["short"].seconds) >= 0.005 and min(timings["long"].seconds) >= 0.02
    # The whole also held a first pass of each.
    timed = sum(timings["short"].seconds) + sum(timings["long"].seconds)
    assert timed <= elapsed - 0.025


def test_median_and_quartiles():
    timing = Timing([5.0, 1.0, 2.0, 4.0, 3.0, 100.0, 7.0])
    assert (timing.low, timing.median, timing.high) == (2.5, 4.0, 6.0)
    assert (Timing([3.0]).low, Timing([3.0]).median, Timing([3.0]).high) == (3.0, 3.0, 3.0)


def test_how_much_arrives():
    assert arriving_share(3.0, 2.0) == 0.5
    assert arriving_share(2.0, 2.0) == 1.0
    assert arriving_share(3.0, 0.5) == -0.25
    assert arriving_share(1.0, 1.1) is None


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_dtype_and_memory_order_reach_the_layers(dtype, channels_last):
    log = []
    network = Recorder("a", log)
    if not channels_last:
        network.to(memory_format=torch.channels_last)  # has to be undone in the copy
    measure({"a": network}, replace(QUICK, dtype=dtype, channels_last=channels_last, batch=2))
    wanted = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    order = torch.channels_last if channels_last else torch.contiguous_format
    for _, training, images, weight in log:
        assert images.shape == (2, 3, 224, 224) and not training
        for tensor in (images, weight):
            assert tensor.dtype == wanted
            assert tensor.is_contiguous(memory_format=order)


def test_default_images_fit_the_architecture_and_are_not_blank():
    model = build_model("cifar_resnet8", 10)
    seen = []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    measure({"a": model}, replace(QUICK, batch=3))
    assert seen[0].shape == (3, 3, 32, 32)
    assert seen[0].std() > 0.9 and seen[0][0].ne(seen[0][1]).any()


def test_given_images_are_repeated_or_cut_to_the_batch():
    images = torch.randn(2, 3, 8, 8)
    for batch, order in ((1, [0]), (2, [0, 1]), (5, [0, 1, 0, 1, 0])):
        log = []
        measure({"a": Recorder("a", log)}, replace(QUICK, batch=batch), example_input=images)
        assert torch.equal(log[0][2], images[order])


def test_the_networks_are_left_alone():
    model = build_model("cifar_resnet8", 10).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_state = torch.get_rng_state()
    measure({"a": model}, replace(QUICK, dtype="bf16", channels_last=True))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert model.training and all(module.training for module in model.modules())
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name])
        assert tensor.stride() == before[name].stride()
    assert not any(p.is_inference() for p in model.parameters())


@pytest.mark.parametrize("broken", [False, True])
def test_threads_are_set_and_put_back(broken):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(1, 1)

        def forward(self, images):
            seen.append(torch.get_num_threads())
            if broken:
                raise RuntimeError("broken\nin many lines")

    seen, before = [], torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        if broken:
            with pytest.raises(UserError, match=r"a: does not run in fp32 on cpu .*: broken$"):
                measure({"a": Net()}, replace(QUICK, threads=2))
        else:
            measure({"a": Net()}, replace(QUICK, threads=2))
        assert set(seen) == {2}
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


class Watched(nn.Module):
    """Notes the passes that run as Python rather than compiled."""

    def __init__(self, features, uncompiled):
        super().__init__()
        self.fc = nn.Linear(3, features)
        self.uncompiled = uncompiled

    def __deepcopy__(self, memo):
        twin = Watched(self.fc.out_features, self.uncompiled)
        return twin.train(self.training)

    def forward(self, images):
        comptime.assert_static(images.shape[0])
        if not torch.compiler.is_compiling():
            self.uncompiled.append(self.fc.out_features)
        return self.fc(images).relu()


@pytest.mark.processes
def test_any_number_of_networks_is_compiled_each_for_its_sizes():
    torch.compiler.reset()
    uncompiled = []
    networks = {str(n): Watched(n, uncompiled) for n in (4, 5, 6)}
    with torch._dynamo.config.patch(recompile_limit=1):
        measure(networks, replace(QUICK, compile=True), example_input=torch.randn(1, 3))
        assert not uncompiled
        measure(networks, replace(QUICK, compile=True, batch=2), example_input=torch.randn(1, 3))
        measure(networks, replace(QUICK, compile=True, batch=3), example_input=torch.randn(1, 3))
        assert not uncompiled
        assert torch._dynamo.config.recompile_limit == 1
    measure(networks, QUICK, example_input=torch.randn(1, 3))
    assert uncompiled == [4, 5, 6] * 4  # the way to tell works


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch": 0}, "batch must be 1 or more, not 0"),
        ({"threads": 0}, "threads must be 1 or more, not 0"),
        ({"repeats": 0}, "repeats must be 1 or more, not 0"),
        ({"warmup": -1}, "warmup must be 0 or more, not -1"),
        ({"dtype": "int8"}, "dtype must be one of fp32, bf16, fp16, not 'int8'"),
        ({"device": "tpu"}, "device must be one of cpu, cuda, not 'tpu'"),
    ],
)
def test_settings_that_make_no_sense(values, message):
    with pytest.raises(UserError) as error:
        LatencySettings(**values)
    assert str(error.value) == message


def test_an_input_that_does_not_fit():
    with pytest.raises(UserError) as error:
        measure({"a.ckpt": nn.Conv2d(3, 4, 3)}, QUICK, example_input=torch.zeros(1, 1, 8, 8))
    message = str(error.value)
    assert message.startswith("a.ckpt: does not run in fp32 on cpu on images of 1x1x8x8: ")
    assert "\n" not in message


@pytest.fixture
def saved(tmp_path):
    """Two prunings of one network, in files of the same name."""
    paths = []
    for folder, ratio in (("half", 0.5), ("most", 0.75)):
        model = build_model("cifar_resnet8", 10)
        plan = select_filters(model, {"layer*.conv1": ratio})
        paths.append(tmp_path / folder / "model.safetensors")
        save_model(paths[-1], prune_model(model, plan))
    return paths


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["latency", *map(str, arguments)])
    main()


def test_table_and_json(saved, tmp_path, monkeypatch, capsys):
    file = tmp_path / "new" / "results.json"
    run(monkeypatch, *saved, saved[0], "--batch-size", "1,3", "--repeats", 4, "--warmup", 0,
        "--threads", 1, "--json", file)  # fmt: skip
    text = capsys.readouterr().out
    content = json.loads(file.read_text())
    assert content["settings"]["repeats"] == 4 and content["on"]["threads"] == 1
    rows = content["results"]
    names = ["dense cifar_resnet8", str(saved[0]), str(saved[1])]
    assert [(row["batch"], row["network"]) for row in rows] == [
        (b, n) for b in (1, 3) for n in names
    ]
    dense = count(build_model("cifar_resnet8", 10))
    for row in rows:
        of_dense = rows[0 if row["batch"] == 1 else 3]
        assert row["image"] == [3, 32, 32]
        assert len(row["seconds"]) == 4
        assert row["median_ms"] == pytest.approx(1e3 * sum(sorted(row["seconds"])[1:3]) / 2)
        assert row["low_ms"] <= row["median_ms"] <= row["high_ms"]
        assert row["images_per_second"] == pytest.approx(1e3 * row["batch"] / row["median_ms"])
        assert row["counted_speedup"] == dense.macs / row["macs"]
        real = of_dense["median_ms"] / row["median_ms"]
        assert row["real_speedup"] == pytest.approx(real)
        if row is of_dense:
            assert row["arrives"] is None and row["macs"] == dense.macs
            assert row["parameters"] == dense.parameters
        else:
            share = (real - 1) / (row["counted_speedup"] - 1)
            assert row["arrives"] == pytest.approx(share)
            assert f"{row['counted_speedup']:.2f}x" in text
            assert f"{share:.0%}" in text
    # 16 -> 8 and 16 -> 4 inner filters: convolutions of both sides shrink by the ratio.
    assert rows[2]["counted_speedup"] > rows[1]["counted_speedup"] > 1.5
    assert "batch 1, images 3x32x32, fp32, contiguous, eager, 1 thread, median of 4" in text
    assert "batch 3, images 3x32x32, fp32" in text and "\x1b" not in text
    assert all(line == line.rstrip() for line in text.splitlines())  # no blanks into a pipe


def test_one_dense_row_for_each_architecture(saved, tmp_path, monkeypatch, capsys):
    other = tmp_path / "other.safetensors"
    save_model(other, build_model("mlp7_linear", 7, image_size=32))
    file = tmp_path / "results.json"
    run(monkeypatch, saved[0], other, saved[1], "--repeats", 1, "--warmup", 0, "--json", file)
    capsys.readouterr()
    rows = json.loads(file.read_text())["results"]
    # A file that has lost nothing is the dense one, which is not timed again beside it.
    ten, seven = "dense cifar_resnet8, 10 classes", "other.safetensors"
    assert [(row["network"], row["dense"]) for row in rows] == [
        (ten, ten), (str(saved[0]), ten), (str(saved[1]), ten),
        (seven, seven),
    ]  # fmt: skip
    assert rows[3]["image"] == [1, 32, 32]
    assert rows[3]["counted_speedup"] == 1 and rows[3]["arrives"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch-size", "0"], "batch must be 1 or more, not 0"),
        (["--batch-size", "1,x"], "--batch-size 1,x: must be numbers of images, such as 1 or 1,16"),
        (["--json", "."], "--json .: is a folder; name a file"),
        (["--json", "{file}/r.json"], "--json {file}/r.json: {file} is a file, not a folder"),
    ],
)
def test_options_that_make_no_sense(saved, options, message, monkeypatch):
    options = [option.format(file=saved[0]) for option in options]
    with pytest.raises(UserError) as error:
        run(monkeypatch, saved[0], *options)
    assert str(error.value) == message.format(file=saved[0])


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_no_gpu_is_one_line_and_exit_code_2(saved):
    command = [sys.executable, "-m", "tpp.latency", str(saved[0]), "--device", "cuda"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.splitlines()[-1] == (
        "error: device cuda: PyTorch finds no CUDA GPU on this machine; use cpu"
    )
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("width", [72, 80, 100, 120, 200])
def test_names_and_figures_are_whole_on_a_screen_of_any_width(width):
    rows = [
        {
            "network": name, "dense": "dense resnet50", "image": [3, 224, 224],
            "parameters": 25_557_032, "macs": 4_089_184_256, "counted_speedup": 1.0,
            "median_ms": 1234.5, "low_ms": 1230.1, "high_ms": 1249.9,
            "images_per_second": 0.81, "real_speedup": 1.0, "arrives": None,
        }
        for name in ("dense resnet50", "resnet50_tpp_2.31x.safetensors")
    ]  # fmt: skip
    console = Console(file=io.StringIO(), width=width)
    console.print(_table(rows, QUICK, width))
    lines = console.file.getvalue().splitlines()
    text = "\n".join(lines)
    assert max(map(len, lines)) <= width and "…" not in text
    for figure in ("25,557,032", "4,089.2 M", "1,234.5", "1,230.1 - 1,249.9", "0.810"):
        assert text.count(figure) == 2
    # A name that does not fit beside the figures stands before them, in one piece.
    assert text.count("resnet50_tpp_2.31x.safetensors") == 1


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(4.0, 224.0), (1.0, 128.0), (3.0, 200.0), (1.5, 152.0), (0.9, None), (4.1, None)],
)
def test_the_size_at_equal_time_is_interpolated(seconds, expected):
    assert size_at_time([(224, 4.0), (128, 1.0), (176, 2.0)], seconds) == expected
    noisy = [(128, 3.0), (176, 2.0), (224, 4.0)]
    assert size_at_time(noisy, 2.5) == 188.0  # of two places, that of the larger sizes


def test_dense_networks_at_other_sizes(saved, tmp_path, monkeypatch, capsys):
    file = tmp_path / "results.json"
    run(monkeypatch, *saved, "--dense-sizes", "16,24,32", "--repeats", 3, "--warmup", 0,
        "--json", file)  # fmt: skip
    text, rows = capsys.readouterr().out, json.loads(file.read_text())["results"]
    dense = "dense cifar_resnet8"
    names = [dense, f"{dense} at 16 px", f"{dense} at 24 px", *map(str, saved)]
    assert [row["network"] for row in rows] == names
    model = build_model("cifar_resnet8", 10)
    for row, side in zip(rows[:3], (32, 16, 24), strict=True):
        assert row["image"] == [3, side, side] and row["dense_size"] is None
        assert row["macs"] == count(model, example_input=torch.empty(1, 3, side, side)).macs
    curve = [(row["image"][-1], row["median_ms"]) for row in rows[:3]]
    for row in rows[3:]:
        assert row["dense_size"] == pytest.approx(size_at_time(curve, row["median_ms"]))
    assert "as dense at" in text and "batch 1, images 3x32x32" in text


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ("16;24", "--dense-sizes 16;24: must be sides in pixels, such as 160,176,192"),
        ("0", "--dense-sizes 0: dense cifar_resnet8: image_size must be between 1 and"),
    ],
)
def test_sizes_that_make_no_sense(saved, sizes, message, monkeypatch):
    with pytest.raises(UserError) as error:
        run(monkeypatch, saved[0], "--dense-sizes", sizes)
    assert str(error.value).startswith(message)


def test_a_network_of_one_size_is_not_timed_at_another(tmp_path, monkeypatch):
    path = tmp_path / "mlp.safetensors"
    save_model(path, build_model("mlp7_linear", 7, image_size=32))
    with pytest.raises(UserError, match=r"^--dense-sizes 16: dense mlp7_linear: .*does not run"):
        run(monkeypatch, path, "--dense-sizes", "16")
