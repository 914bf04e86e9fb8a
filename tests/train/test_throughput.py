"""What a stage logs of its arithmetic and memory, beside its images per second."""

import json
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from toy_methods.melting import Melting

from tpp.common.errors import UserError
from tpp.methods import available_methods
from train.config.config import load_config
from train.stages.throughput import Throughput, peak_memory, peak_tflops

# Of ResNet-8 on 32x32, by hand: the blocks' convolutions, which lose filters, and the others.
BLOCKS = 9 * (32**2 * 2 * 16 * 16 + 16**2 * (16 * 32 + 32 * 32) + 8**2 * (32 * 64 + 64 * 64))
OTHERS = 9 * 32**2 * 3 * 16 + 64 * 4


def test_figures_are_of_the_network_as_it_is(tiny_config, run_inside, monkeypatch):
    """Two quarters of the filters go during the stage; images are smaller in the other one."""
    monkeypatch.setitem(available_methods(), "toy_melting", Melting)
    regularize = {"epochs": 1, "optimizer": {"lr": 0.05}, "method": {"name": "toy_melting"}}
    tiny_config["stages"] = {"dense": tiny_config["stages"]["dense"], "regularize": regularize}
    tiny_config["training"]["peak_tflops"] = 2.5
    run_inside(tiny_config)
    folder = Path(tiny_config["output"])
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    macs = {}
    for entry in (entry for entry in log if entry["event"] == "train"):
        tera = 3 * 2 * entry["images_per_second"] / 1e12
        macs[entry["stage"], entry["step"]] = entry["tflops"] / tera
        assert entry["mfu"] == pytest.approx(entry["tflops"] / 2.5)
        assert 0.05 < entry["peak_memory_gib"] < 200
    of_widths = {1: BLOCKS + OTHERS, 2: BLOCKS * 3 / 4 + OTHERS, 3: BLOCKS * 9 / 16 + OTHERS}
    assert macs == {
        **{("dense", step): pytest.approx(of_widths[1]) for step in (2, 4, 6)},
        ("regularize", 2): pytest.approx(of_widths[1]),
        ("regularize", 4): pytest.approx(of_widths[2]),
        ("regularize", 6): pytest.approx(of_widths[3]),
    }
    events = EventAccumulator(str(folder / "regularize")).Reload()
    tags = {"train/tflops", "train/mfu", "train/peak_memory_gib", "train/images_per_second"}
    assert tags <= {*events.Tags()["scalars"]}


def test_images_of_another_size_in_training(tiny_config, run_inside):
    """And where nothing is known of the device there is no share of its peak."""
    tiny_config["data"] |= {"train_size": 16, "augmentation": "imagenet"}
    run_inside(tiny_config, "--until", "dense")
    log = (Path(tiny_config["output"]) / "log.jsonl").read_text().splitlines()
    entries = [e for e in map(json.loads, log) if e["event"] == "train"]
    for entry in entries:
        macs = entry["tflops"] * 1e12 / (6 * entry["images_per_second"])
        assert macs == pytest.approx(BLOCKS / 4 + 9 * 16**2 * 3 * 16 + 64 * 4)
        assert "mfu" not in entry
    assert entries


def test_it_is_per_device():
    throughput = Throughput(lambda: 10**9, torch.device("cpu"), 4, "bf16", 100.0)
    figures = throughput.figures(2000.0)
    assert figures["tflops"] == pytest.approx(3.0)
    assert figures["mfu"] == pytest.approx(0.03)


@pytest.mark.parametrize(
    ("name", "bf16", "fp16", "tf32", "fp32"),
    [
        ("NVIDIA H200", 989.4, 989.4, 494.7, 66.9),
        ("NVIDIA H100 80GB HBM3", 989.4, 989.4, 494.7, 66.9),
        ("NVIDIA H100 PCIe", 756, 756, 378, 51.2),
        ("NVIDIA A100-SXM4-80GB", 312, 312, 156, 19.5),
        ("NVIDIA A100 80GB PCIe", 312, 312, 156, 19.5),
        ("NVIDIA L40S", 362, 362, 183, 91.6),
        ("NVIDIA L4", 121, 121, 60, 30.3),
        ("Tesla V100-SXM2-16GB", None, 125, 15.7, 15.7),
        ("Tesla T4", None, 65, 8.1, 8.1),
        # Others, whose names are like those.
        ("NVIDIA A10G", None, None, None, None),
        ("NVIDIA GB200", None, None, None, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None, None, None, None),
        ("NVIDIA RTX A4000", None, None, None, None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None, None, None, None),
    ],
)
def test_peaks(name, bf16, fp16, tf32, fp32):
    assert peak_tflops(name, "bf16", tf32=True) == bf16
    assert peak_tflops(name, "fp16", tf32=True) == fp16
    assert peak_tflops(name, "fp32", tf32=True) == tf32
    assert peak_tflops(name, "fp32", tf32=False) == fp32


def test_memory_is_that_of_this_process():
    before = peak_memory(torch.device("cpu"))
    if before is None:
        pytest.skip("this system does not say")
    block = torch.ones(300 * 2**18)  # 300 MiB
    assert peak_memory(torch.device("cpu")) >= block.numel() * 4
    assert before < 2**40


def test_a_peak_that_is_none():
    line = "training.peak_tflops: input should be greater than 0, not 0"
    with pytest.raises(UserError, match=line):
        load_config(None, ["training.peak_tflops=0"])
