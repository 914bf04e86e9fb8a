"""The simulation of benchmarks/scale.py: closed forms, real buckets, published scaling."""

import io
import itertools
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from rich import box
from rich.console import Console
from torch.nn.parallel import DistributedDataParallel

from benchmarks import scale
from benchmarks.scale import Cluster, Job, Options, Workload, ring_bytes, simulate
from tpp.channels.removal import prune_model
from tpp.models.architecture import build_model
from tpp.selection.selection import select_filters
from train.config.config import load_config

ROOT = Path(__file__).resolve().parents[2]
MB = 10**6
# Four gradients that come at a quarter, a half, ... of the backward pass, each a bucket.
FOUR = Workload("four", 1, (30 * MB,) * 4, (0.25, 0.5, 0.75, 1.0))
# Without anything random and without what depends on a machine.
PLAIN = Job(64, 1e-3, dispatch=0.0, jitter=0.0, loader_jitter=0.0, buffers=False)


def ideal(gpus: int, bandwidth: float = math.inf, **changes) -> Cluster:
    """A network of one bandwidth everywhere, without latency, in a ring."""
    settings = {"algorithm": "ring", "latency": 0.0, **changes}
    return Cluster(gpus, bandwidth, bandwidth, **settings)


@pytest.fixture(scope="module")
def row() -> scale.TableRow:
    return scale.table_row("ResNet-50 2.31x")


def test_a_row_is_counted_from_its_configuration(row):
    assert round(row.speedup, 4) == 2.3081
    assert row.dense.gradient_bytes == 4 * 25_557_032
    # Until layer number 51 has had its turn, every 100 steps from step 50,000 on.
    assert row.regularized == 55_201 * 256
    assert row.after_removal == (90_001 - 55_201) * 256
    assert row.finetuned == 450_411 * 256  # 90 epochs of 1,281,167 images, rounded up
    # 17.98 epochs, each evaluated at its end; 90, and twice more.
    assert (row.evaluated_dense, row.evaluated_pruned) == (11 * 50_000, (7 + 92) * 50_000)
    # The shares of the penalty add up to what one rank would do.
    assert row.rank_costs(1) / 64 <= row.rank_costs(64) < 1.2 * row.rank_costs(1) / 64


def test_gpu_hours_by_hand(row):
    dense = 55_201 * 256 + 11 * 50_000 / 3
    pruned = 34_800 * 256 + 115_305_216 + 99 * 50_000 / 3
    expected = (dense / 100 + pruned / 250) / 3600
    assert scale.gpu_hours(row, 100.0, 2.5) == pytest.approx(expected)
    # The configuration's head says that about 108 V100-hours are the most, without evaluations.
    (line,) = scale.hours_part({"2.31x": row}, {"V100": scale.GPUS["V100"]})
    assert line["V100 fp32"][1] == pytest.approx(108, rel=0.02)
    assert line["V100 fp32"][0] < line["V100 fp32"][1]


@pytest.mark.parametrize("pruned", [False, True])
def test_the_buckets_are_those_of_a_real_ddp(pruned, row, tmp_path):
    model = build_model("resnet50", 1000)
    workload = row.dense
    if pruned:
        config = load_config(scale.CONFIGS / "resnet50_tpp_2.31x.yaml")
        model = prune_model(model, select_filters(model, config.pruning.ratios))
        workload = row.pruned
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    try:
        ddp = DistributedDataParallel(model)
        for _ in range(3):  # after its first step it rearranges the buckets
            ddp(torch.zeros(2, 3, 32, 32)).sum().backward()
        log = ddp._get_ddp_logging_data()
    finally:
        dist.destroy_process_group()
    real = [int(size) for size in log["rebuilt_bucket_sizes"].split(",")]
    ends = scale.buckets(workload.gradients)
    ours = [sum(workload.gradients[a:b]) for a, b in zip([0, *ends], ends, strict=False)]
    assert ours == real and len(real) > 2
    assert log["broadcast_buffers"] == 1
    assert sum(workload.buffers) == sum(buffer.nbytes for buffer in model.buffers())


@pytest.mark.parametrize("gpus", [1, 2, 8, 64, 512])
def test_without_a_network_to_wait_for_it_is_linear(gpus):
    outcome = simulate(ideal(gpus), FOUR, PLAIN)
    assert outcome.images_per_second == pytest.approx(gpus * 1000)
    assert outcome.exposed == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("gpus", [2, 8, 64, 512])
def test_with_infinitely_fast_gpus_a_step_is_the_ring(gpus, row):
    job = replace(PLAIN, seconds_per_image=0.0)
    outcome = simulate(ideal(gpus, 10e9), row.dense, job)
    expected = 2 * (gpus - 1) / gpus * 4 * 25_557_032 / 10e9
    assert outcome.step == pytest.approx(expected, rel=0.01)
    assert outcome.exposed == pytest.approx(outcome.step)


def test_what_the_backward_pass_cannot_hide_is_the_last_bucket():
    # A quarter of the backward pass takes 10.7 ms, a bucket's way around the ring 6 ms.
    cluster = ideal(64, ring_bytes(30 * MB, 64) / 6e-3)
    outcome = simulate(cluster, FOUR, PLAIN)
    assert outcome.exposed == pytest.approx(6e-3)
    assert outcome.step == pytest.approx(64e-3 + 6e-3)
    # At 20 ms they queue up: the first one starts after a quarter, the others follow.
    outcome = simulate(ideal(64, ring_bytes(30 * MB, 64) / 20e-3), FOUR, PLAIN)
    assert outcome.step == pytest.approx(64e-3 * (1 / 3 + 2 / 3 / 4) + 4 * 20e-3)


def test_a_pass_takes_at_least_its_kernels_launches():
    job = replace(PLAIN, images=4, dispatch=13e-3)
    assert simulate(ideal(64), FOUR, job).step == pytest.approx(2 * 13e-3)


def test_batches_made_ahead_make_up_for_slow_ones():
    # A loader just as fast as the GPUs, if it never had to wait for a place to put a batch.
    job = replace(PLAIN, loader=1000.0, loader_jitter=0.5)
    rates = [
        simulate(ideal(1), FOUR, replace(job, prefetch=ahead), steps=1000).images_per_second
        for ahead in (1, 2, 16)
    ]
    assert rates[0] < rates[1] < rates[2] < 1000
    assert rates[0] < 900 < 950 < rates[2]


@pytest.mark.parametrize("gpus", [4, 8, 64])
def test_a_slow_loader_sets_the_rate(gpus):
    job = replace(PLAIN, loader=500.0)
    outcome = simulate(ideal(gpus, 100e9), FOUR, job)
    nodes = max(1, gpus // 8)
    assert outcome.images_per_second == pytest.approx(500.0 * nodes)
    assert outcome.waiting > 0.9 * (outcome.step - 70e-3)
    # One that is a little faster than the GPUs costs nothing.
    quick = replace(PLAIN, loader=1010.0 * min(gpus, 8))
    assert simulate(ideal(gpus), FOUR, quick).images_per_second == pytest.approx(1000 * gpus)


def test_a_step_with_jitter_is_the_slowest_rank():
    job = replace(PLAIN, jitter=0.05)
    steps = 4000
    outcome = simulate(ideal(64), FOUR, job, steps=steps)
    slowest = np.exp(0.05 * np.random.default_rng(7).standard_normal((20_000, 64))).max(1).mean()
    assert slowest > 1.1
    assert outcome.step == pytest.approx(64e-3 * slowest, rel=0.003)


def test_latencies_are_those_of_nccls_model():
    # 14 steps within a node; 7 hops of a chain and 6 levels of a tree over 64 nodes, both ways.
    assert Cluster(8, 1e11, 1e11, algorithm="ring").all_reduce(0) == pytest.approx(
        (8.4 + 14 * 3.4) * 1e-6
    )
    big = Cluster(512, 1e11, 1e11)
    tree = replace(big, algorithm="tree").all_reduce(0)
    assert tree == pytest.approx((4.4 + 2 * (7 * 1.2 + 6 * 8.5)) * 1e-6)
    ring = replace(big, algorithm="ring").all_reduce(0)
    assert ring == pytest.approx((8.4 + 896 * 3.4 + 126 * 9.6) * 1e-6)
    assert big.all_reduce(0) == tree < ring
    # Large messages within a node go in a ring.
    node = Cluster(8, 235e9, 1e9)
    assert node.all_reduce(1e9) == replace(node, algorithm="ring").all_reduce(1e9)
    assert Cluster(1, 1e9, 1e9).all_reduce(1e9) == 0


COUNTS = st.sampled_from([2, 4, 8, 16, 64, 256])
BANDWIDTHS = st.floats(1e8, 1e12)
JOBS = st.builds(
    Job,
    images=st.integers(1, 256),
    seconds_per_image=st.floats(1e-4, 1e-2),
    dispatch=st.floats(0, 0.02),
    penalty=st.floats(0, 0.01),
    jitter=st.floats(0, 0.1),
    loader=st.floats(100, 1e5) | st.just(math.inf),
    loader_jitter=st.floats(0, 0.5),
    prefetch=st.integers(1, 4),
)
CASES = st.tuples(COUNTS, BANDWIDTHS, BANDWIDTHS, JOBS, st.integers(0, 99))
SHORT = scale.WARM_UP + 20


@settings(max_examples=40, deadline=None)
@given(CASES, st.floats(1, 100))
def test_more_of_anything_is_never_slower(case, more):
    gpus, nvlink, network, job, seed = case
    base = Cluster(gpus, nvlink, network)

    def rate(cluster: Cluster, job: Job) -> float:
        return simulate(cluster, FOUR, job, steps=SHORT, seed=seed).images_per_second

    # Of all steps from the first one on: a queue that empties later may be slower afterwards.
    def total(cluster: Cluster, job: Job) -> float:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(scale, "WARM_UP", 0)
            return rate(cluster, job) * (1 + 1e-9)

    before = total(base, job) / (1 + 1e-9)
    assert total(replace(base, nvlink=more * nvlink), job) >= before
    assert total(replace(base, network=more * network), job) >= before
    assert total(base, replace(job, loader=more * job.loader)) >= before
    assert total(base, replace(job, prefetch=job.prefetch + 1)) >= before
    assert total(base, replace(job, seconds_per_image=job.seconds_per_image / more)) >= before


@settings(max_examples=40, deadline=None)
@given(BANDWIDTHS, BANDWIDTHS, JOBS)
def test_more_gpus_are_never_more_efficient_each(nvlink, network, job):
    job = replace(job, jitter=0.0, loader=math.inf)
    strong, weak = [], []
    for gpus in (1, 2, 4, 8, 16, 64, 256):
        cluster = Cluster(gpus, nvlink, network)
        shared = replace(job, images=256 // gpus)
        strong.append(simulate(cluster, FOUR, shared, steps=SHORT).images_per_second / gpus)
        weak.append(simulate(cluster, FOUR, job, steps=SHORT).images_per_second / gpus)
    for rates in (strong, weak):
        for fewer, more in itertools.pairwise(rates):
            assert more <= fewer * (1 + 1e-9)


def test_published_scaling_to_eight_gpus(row):
    lines = {line["case"]: line for line in scale.check_part(row, scale.GPUS)}
    # NVIDIA's PyTorch runs in mixed precision loaded with PyTorch's loader, and MXNet's with DALI
    # scaled as float32 did on the same machines.
    limited = {"V100 mixed, PyTorch", "A100 mixed, PyTorch"}
    assert len(lines) == 11 and limited < lines.keys()
    for case, line in lines.items():
        if case not in limited:
            assert line["simulated"] == pytest.approx(line["published"], abs=0.02), case
    assert lines["A100 mixed, PyTorch"]["simulated"] > 0.95
    assert lines["A100 mixed, loader of 17800 images/s"]["simulated"] < 0.9


def test_synchronised_batchnorm_is_counted(row):
    (line, _) = scale.traffic_part({"2.31x": row}, [8, 512])
    assert line["all_reduce"][8] == pytest.approx(1.75 * 102_228_128)
    assert line["buffers"] == 2 * 26_560 * 4 + 53 * 8
    gathered = 511 * (2 * 26_560 + 53) * 4
    assert line["sync_batchnorm"][512] == pytest.approx(gathered + 2 * 511 / 512 * 2 * 26_560 * 4)
    assert line["sync_batchnorm_collectives"] == 106


def test_strong_scaling_ends_where_the_batch_does(row):
    options = Options(gpus=(8, 256, 512))
    lines = scale.scaling(row, scale.GPUS["V100"], "fp32", "strong", options)
    assert [line["possible"] for line in lines] == [True, True, False]
    assert [line.get("images_per_gpu") for line in lines] == [32, 1, None]
    assert lines[1]["efficiency"] < 0.2 < lines[0]["efficiency"]
    assert lines[0]["gpu_hours"][0] == pytest.approx(8 * lines[0]["hours"][0])


def test_the_script_runs(tmp_path, monkeypatch, capsys):
    output = tmp_path / "new" / "scale.json"
    arguments = ["--gpu", "A100", "--precision", "bf16", "--gpus", "8,64", "--network", "12.5"]
    arguments += ["--images-per-second", "2000", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["scale", *arguments])
    scale.run_command(scale.main)
    shown = capsys.readouterr().out
    results = json.loads(output.read_text())
    assert [line["gpus"] for line in results["weak"]["A100 mixed"]] == [8, 64]
    # Of a GPU's 2000 images/s as much arrives as the simulation lets through.
    line = results["weak"]["A100 mixed"][0]
    assert 0.8 * 16_000 < line["images_per_second"] < 16_000
    assert "weak scaling, fixed batch per GPU" in shown and "A100 mixed" in shown
    assert "V100" not in shown
    # Without --output, what is tried leaves the project's own results alone.
    before = scale.RESULTS.read_bytes()
    monkeypatch.setattr(sys, "argv", ["scale", "--gpu", "V100", "--gpus", "8"])
    scale.run_command(scale.main)
    assert scale.RESULTS.read_bytes() == before and "V100 fp32" in capsys.readouterr().out


def test_the_command_ends_a_mistake_with_code_2():
    command = [sys.executable, "-m", "benchmarks.scale", "--gpu", "H300"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 2
    assert done.stderr == "error: --gpu: no 'H300'; there are: V100, A100, H100\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "B200"], "--gpu: no 'B200'; there are: V100, A100, H100"),
        (
            ["--precision", "fp8"],
            "python -m benchmarks.scale: --precision: 'fp8' is none of fp32, bf16, fp16; "
            "did you mean fp32?",
        ),
        (["--gpus", "8,x"], "--gpus: 'x' is not a whole number above 0"),
        (["--gpus", "0"], "--gpus: '0' is not a whole number above 0"),
        (
            ["--gpus", "8,12"],
            "--gpus: 12 GPUs are no whole nodes; above 8 use a multiple of 8",
        ),
        (["--gpus", "8192"], "--gpus: 8192 is more than is simulated; at most 4096"),
        (["--gpus", "1"], "--gpus: one GPU alone does not scale; name more, such as 8,64,512"),
        (["--network", "nan"], "--network: 'nan' is not a number above 0"),
        (["--loader-speed", "-3"], "--loader-speed: '-3' is not a number above 0"),
        (["--dispatch-ms", "inf"], "--dispatch-ms: 'inf' is not a number above 0"),
        (
            ["--batch-size", "1.5"],
            "python -m benchmarks.scale: --batch-size: '1.5' is not a whole number",
        ),
        (
            ["--images-per-second", "9"],
            "--images-per-second: needs --gpu and --precision, whose speed it replaces",
        ),
    ],
)
def test_a_mistake_is_one_line(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["scale", *arguments])
    with pytest.raises(SystemExit) as ended:
        scale.run_command(scale.main)
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"error: {message}\n"


def test_an_output_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    output = tmp_path / "file" / "scale.json"
    monkeypatch.setattr(sys, "argv", ["scale", "--output", str(output)])
    monkeypatch.setattr(scale, "collect", lambda *_: {})
    with pytest.raises(SystemExit) as ended:
        scale.run_command(scale.main)
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: --output: cannot write {output}: ")


def test_the_document_shows_what_the_script_finds():
    stored = json.loads(scale.RESULTS.read_text())
    fresh = json.loads(json.dumps(scale.collect(scale.GPUS, scale.PRECISIONS, Options())))
    assert_alike(fresh, stored)
    document = (ROOT / "docs" / "scale.md").read_text()
    for table in scale.tables(stored):
        title = table.title
        table.box, table.title, table.caption = box.MARKDOWN, None, None
        console = Console(file=io.StringIO(), width=200)
        console.print(table)
        lines = [line.strip() for line in console.file.getvalue().splitlines() if line.strip()]
        assert "\n".join(lines) in document, f"docs/scale.md: not as the script prints it: {title}"


def assert_alike(found, expected, where: str = "scale.json") -> None:
    """The same to rounding, in all parts."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        pairs = [(found[key], expected[key], f"{where}: {key}") for key in expected]
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        pairs = [
            (*pair, f"{where}[{n}]") for n, pair in enumerate(zip(found, expected, strict=True))
        ]
    else:
        approximate = isinstance(expected, float)
        assert found == (pytest.approx(expected, rel=1e-6) if approximate else expected), where
        return
    for one, other, place in pairs:
        assert_alike(one, other, place)
