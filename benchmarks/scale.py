"""What Table 2 costs on a cluster, and where it stops scaling: arithmetic and a small simulation.

hours    GPU-hours of every published row, from published throughput
traffic  bytes that each GPU sends per step, and what else is communicated
loader   images per second that a node of eight GPUs wants, and what that asks of cores and of the
         file system
weak     the simulation with a fixed batch per GPU: step, efficiency, hours
strong   the simulation with the reference batch of 256 over all GPUs
limits   the efficiency of both by what limits it: the network of a node, the launching of kernels
check    the simulation beside what was published of 8 GPUs in one machine

Nothing here was measured on several GPUs. Parameters, MACs and the penalty's cost come from the
project's code, throughput from others' publications; each constant below names its source, or says
that it is assumed. docs/scale.md explains. Results go to
benchmarks/results/scale.json; those of settings of your own to --output alone.

The simulation follows the events of synchronous data parallelism step by step: a batch is there
(a rate-limited loader with a prefetch queue), the forward pass is done, a gradient is there (layer
by layer, last layer first), a bucket of DistributedDataParallel is complete on the slowest rank and
reduced when the network is free, the step is over. Ranks differ by random jitter. The time of every
event is a maximum of earlier ones plus a duration, so no queue of events is needed.
"""

import argparse
import functools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

from tpp.channels.removal import prune_model
from tpp.common.command_line import Parser
from tpp.common.errors import UserError, run_command
from tpp.common.options import share
from tpp.measure.counts import count
from tpp.models.architecture import Architecture, build_on_meta
from train.config.config import load_config, steps_for
from train.preflight import check_plans

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "imagenet"
RESULTS = Path(__file__).parent / "results" / "scale.json"
LOADER_RESULTS = Path(__file__).parent / "results" / "loader.json"
ROWS = {
    "ResNet-34 1.32x": "resnet34_tpp_1.32x",
    "ResNet-50 1.49x": "resnet50_tpp_1.49x",
    "ResNet-50 2.31x": "resnet50_tpp_2.31x",
    "ResNet-50 2.56x": "resnet50_tpp_2.56x",
    "ResNet-50 3.06x": "resnet50_tpp_3.06x",
}
SIMULATED_ROW = "ResNet-50 2.31x"
COUNTS = (1, 8, 64, 512)
MOST_GPUS = 4096  # a simulated rank takes memory and time
PRECISIONS = ("fp32", "mixed")

# ImageNet-1k, images.
TRAIN_IMAGES, VAL_IMAGES = 1_281_167, 50_000
# Bytes of a mean training image: of 500 photos, as they are and scaled to 400 pixels
# (docs/data.md).
JPEG_BYTES, JPEG_400_BYTES = 55.0e6 / 500, 48.2e6 / 500
GPUS_PER_NODE = 8
# Images per GPU in weak scaling: the paper's 256 over 4 GPUs.
BATCH_PER_GPU = 64
REFERENCE_BATCH = 256
FLOAT, DOUBLE = 4, 8  # bytes

# DistributedDataParallel's buckets, bytes: torch.distributed._DEFAULT_FIRST_BUCKET_BYTES and
# bucket_cap_mb. A test compares them with a real one's.
FIRST_BUCKET, BUCKET = 2**20, 25 * 2**20
# Share of a training step's arithmetic that is the forward pass: one product of three.
FORWARD = 1 / 3
# Seconds in which the CPU launches the kernels of a forward pass of ResNet-50 in eager PyTorch; a
# pass takes at least that long however few its images. 13.3 ms on a V100's host: pytorch/benchmark,
# pull request 668. The backward pass, and newer hosts, are ASSUMED to be alike.
DISPATCH = 13.3e-3
# Spread of a step's duration over ranks, sigma of a lognormal. ASSUMED: with it the simulation
# meets the published scaling to 8 GPUs (part "check").
JITTER = 0.02
# The same for the time that a batch takes to load. ASSUMED.
LOADER_JITTER = 0.2
PREFETCH = 2  # batches; the default of data.prefetch
# What is varied in the part "limits": GB/s of a node's network cards (25 and 100 Gbit/s), and
# seconds to launch a pass; and the numbers of GPUs.
NETWORKS, DISPATCHES = (3.125, 12.5), (13.3e-3, 5e-3)
LIMITED_WEAK, LIMITED_STRONG = (16, 64, 512), (4, 8, 16, 64)
STEPS, WARM_UP = 140, 40  # simulated; not counted
# Throughput of ResNet-34 over that of ResNet-50, same card, training: 2036.51 / 1218.01 images/s,
# RTX 3090, AMP, channels last, batch 512: huggingface/pytorch-image-models,
# results/benchmark-train-amp-nhwc-pt112-cu113-rtx3090.csv. ASSUMED of the other cards.
RESNET34_TO_RESNET50 = 2036.51 / 1218.01

# Latencies of NCCL in seconds, from the model by which NCCL itself picks an algorithm: NVIDIA/nccl,
# src/graph/tuning.cc at 01afd20, ring with the Simple protocol and tree with LL128.
RING_BASE, RING_NVLINK, RING_NETWORK = 8.4e-6, 3.4e-6, 9.6e-6
TREE_BASE, TREE_NVLINK, TREE_NETWORK = 4.4e-6, 1.2e-6, 8.5e-6
# Of the ring's bandwidth, what a tree gets, and its ceiling over nodes in bytes/s; same source.
TREE_SHARE, TREE_CEILING = 0.9 * 0.915, 105e9
# Share of a network card's line rate that arrives: 46 to 48 GB/s of 50, NVIDIA/nccl-tests issue
# 290.
NETWORK_SHARE = 0.94

Row = dict[str, Any]


@dataclass(frozen=True)
class Published:
    """Training throughput of the dense ResNet-50 that somebody published.

    Attributes:
        one: images/s of one GPU.
        eight: images/s of eight GPUs in one machine.
        batch: images per GPU; None where it is not stated.
        source: repository and file.
    """

    one: float
    eight: float
    batch: int | None
    source: str


@dataclass(frozen=True)
class Gpu:
    """A GPU in the machine that its maker sells it in, eight at a time.

    Attributes:
        fp32: in float32, on A100 and H100 by TF32 (PyTorch's default for convolutions).
        mixed: in automatic mixed precision.
        nvlink: bytes/s of a ring over the GPUs of a node.
        network: bytes/s of a node's network cards together, at line rate.
    """

    fp32: Published
    mixed: Published
    nvlink: float
    network: float

    def throughput(self, precision: str) -> Published:
        """What was published for ``fp32`` or ``mixed``."""
        return self.fp32 if precision == "fp32" else self.mixed


_NVIDIA = "NVIDIA/DeepLearningExamples, PyTorch/Classification/ConvNets/resnet50v1.5/README.md"
_MXNET = "NVIDIA/DeepLearningExamples, MxNet/Classification/RN50v1.5/README.md"
_LAMBDA = "lambdal/deeplearning-benchmark, pytorch/pytorch-train-throughput-v2-{}.csv"
GPUS = {
    # DGX-1: six NVLinks of 25 GB/s, of which a ring gets 80% (NVIDIA/nccl-tests issue 212), and
    # four cards of 100 Gbit/s.
    "V100": Gpu(
        Published(367, 2855, 112, f"{_NVIDIA}, V100 16GB, FP32"),
        Published(1200, 8322, 256, f"{_NVIDIA}, V100 16GB, AMP"),
        nvlink=0.8 * 150e9,
        network=4 * 12.5e9,
    ),
    # DGX A100: NCCL's own ceiling of a ring (tuning.cc), eight cards of 200 Gbit/s.
    "A100": Gpu(
        Published(938, 7248, 256, f"{_NVIDIA}, A100 80GB, TF32"),
        Published(2470, 16621, 256, f"{_NVIDIA}, A100 80GB, AMP"),
        nvlink=235e9,
        network=8 * 25e9,
    ),
    # DGX H100: 370 GB/s of a ring (NVIDIA/nccl-tests issue 212), eight cards of 400 Gbit/s. The
    # throughput is that of one machine (192-222-52-149), measured with NVIDIA's PyTorch code.
    "H100": Gpu(
        Published(1895, 14969, None, f"{_LAMBDA.format('fp32')}, H100 SXM5"),
        Published(2789, 22059, None, f"{_LAMBDA.format('fp16')}, H100 SXM5"),
        nvlink=370e9,
        network=8 * 50e9,
    ),
}
# NVIDIA's other framework on the same machines, loading with DALI.
MXNET = {
    ("V100", "fp32"): Published(384, 3005, 96, f"{_MXNET}, V100 16GB, FP32"),
    ("V100", "mixed"): Published(1376, 10723, 192, f"{_MXNET}, V100 16GB, mixed"),
    ("A100", "fp32"): Published(1022, 8001, 256, f"{_MXNET}, A100 80GB, TF32"),
    ("A100", "mixed"): Published(2180, 16925, 256, f"{_MXNET}, A100 80GB, mixed"),
}
# Images/s beyond which PyTorch's loader did not get on a machine with 8 A100: "Composer + FFCV:
# Faster Together", mosaicml.com/blog/composer-ffcv-faster-together.
PYTORCH_LOADER_CEILING = 17_800


@dataclass(frozen=True)
class Workload:
    """What a network means for a step.

    Attributes:
        name: of the network.
        macs: multiply-accumulates of an image's forward pass.
        gradients: bytes of every parameter's gradient, in the order in which they come.
        ready: share of the backward pass that is over when each of them is there; it is taken to
            go with the layers' multiply-accumulates.
        buffers: bytes of BatchNorm's statistics and counters.
        norms: number of BatchNorm layers.
        channels: of all of them.
    """

    name: str
    macs: int
    gradients: tuple[int, ...]
    ready: tuple[float, ...]
    buffers: tuple[int, ...] = ()
    norms: int = 0
    channels: int = 0

    @property
    def gradient_bytes(self) -> int:
        """Of all gradients, in float32."""
        return sum(self.gradients)


@dataclass(frozen=True)
class TableRow:
    """A published row: its networks, and how many images each of them sees.

    Attributes:
        dense, pruned: the networks.
        factor: throughput of the dense network over that of ResNet-50.
        regularized: training images of the regularised stage, before the filters are removed.
        after_removal: those of the rest of it.
        finetuned: those of finetuning.
        evaluated_dense, evaluated_pruned: validation images.
        rank_costs: multiply-adds of the penalty per step, on the busiest of so many ranks.
    """

    dense: Workload
    pruned: Workload
    factor: float
    regularized: int
    after_removal: int
    finetuned: int
    evaluated_dense: int
    evaluated_pruned: int
    rank_costs: Callable[[int], int]

    @property
    def speedup(self) -> float:
        """By counted multiply-accumulates."""
        return self.dense.macs / self.pruned.macs


def workload_of(name: str, model: nn.Module) -> Workload:
    """Sizes and order of a network's gradients; counted, nothing is computed."""
    counts = count(model)
    macs = {layer.name: layer.macs for layer in counts.layers}
    total = sum(macs.values())
    gradients, ready, done = [], [], 0
    for parameter_name, parameter in reversed(list(model.named_parameters())):
        # A layer's gradients come when its part of the backward pass is over.
        done += macs.pop(parameter_name.rpartition(".")[0], 0)
        gradients.append(parameter.numel() * FLOAT)
        ready.append(done / total)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    channels = sum(norm.num_features for norm in norms)
    return Workload(
        name=name,
        macs=counts.macs,
        gradients=tuple(gradients),
        ready=tuple(ready),
        buffers=(2 * channels * FLOAT, len(norms) * 8),
        norms=len(norms),
        channels=channels,
    )


@functools.cache
def table_row(name: str) -> TableRow:
    """A published row from its configuration."""
    config = load_config(CONFIGS / f"{ROWS[name]}.yaml")
    architecture = Architecture(config.model.name, 1000, config.model.args)
    dense = build_on_meta(architecture)
    plan = check_plans(config, architecture)
    assert plan is not None
    method = config.stage_method("regularize")
    steps, removal = method.steps(), method.removes_after(dense, plan)
    epochs = config.stages["finetune"].epochs
    assert steps is not None and removal is not None and epochs is not None
    finetuned = steps_for(epochs, TRAIN_IMAGES, REFERENCE_BATCH)
    every = steps_for(config.training.evaluate_every, TRAIN_IMAGES, REFERENCE_BATCH)
    before = removal // every
    # A training stage is also evaluated at its end; the prune and the evaluate stage once each.
    after = -(-steps // every) - before + -(-finetuned // every) + 2

    def busiest(ranks: int) -> int:
        costs = method.rank_costs(dense, plan, ranks)
        assert costs is not None
        return max(costs)

    return TableRow(
        dense=workload_of(name.partition(" ")[0], dense),
        pruned=workload_of(name, prune_model(dense, plan)),
        factor=RESNET34_TO_RESNET50 if config.model.name == "resnet34" else 1.0,
        regularized=removal * REFERENCE_BATCH,
        after_removal=(steps - removal) * REFERENCE_BATCH,
        finetuned=finetuned * REFERENCE_BATCH,
        evaluated_dense=before * VAL_IMAGES,
        evaluated_pruned=after * VAL_IMAGES,
        rank_costs=busiest,
    )


def gpu_hours(row: TableRow, dense_rate: float, gain: float, pruned_rate: float = 0.0) -> float:
    """GPU-hours of a row: regularising, finetuning and all evaluations.

    Args:
        row: the row.
        dense_rate: training images/s of a GPU with the dense network.
        gain: how many times faster the pruned network trains.
        pruned_rate: its images/s, if they are known otherwise.
    """
    dense = row.regularized + FORWARD * row.evaluated_dense
    pruned = row.after_removal + row.finetuned + FORWARD * row.evaluated_pruned
    return (dense / dense_rate + pruned / (pruned_rate or gain * dense_rate)) / 3600


def ring_bytes(size: int, gpus: int) -> float:
    """Bytes that each GPU sends when ``size`` bytes are all-reduced in a ring.

    A reduce-scatter and an all-gather, (N - 1) / N of the size each: what ZeRO 1 and 2 do with
    gradients and weights comes to the same.
    """
    return 2 * (gpus - 1) / gpus * size


@dataclass(frozen=True)
class Cluster:
    """GPUs and what connects them.

    Attributes:
        gpus: their number.
        nvlink: bytes/s of a ring within a node.
        network: bytes/s between nodes, all of a node's cards together.
        per_node: GPUs of a node.
        algorithm: ``ring``, ``tree``, or ``fastest``, as NCCL chooses.
        latency: times the latencies of NCCL's model.
    """

    gpus: int
    nvlink: float
    network: float
    per_node: int = GPUS_PER_NODE
    algorithm: str = "fastest"
    latency: float = 1.0

    @property
    def nodes(self) -> int:
        """Nodes that the GPUs fill."""
        return -(-self.gpus // self.per_node)

    @property
    def bandwidth(self) -> float:
        """Bytes/s of a ring over all GPUs: that of its slowest link."""
        return self.nvlink if self.nodes == 1 else min(self.nvlink, self.network)

    def all_reduce(self, size: float) -> float:
        """Seconds to sum ``size`` bytes over all GPUs."""
        if self.gpus == 1:
            return 0.0
        times = {"ring": self._ring(size), "tree": self._tree(size)}
        return times.get(self.algorithm, min(times.values()))

    def broadcast(self, size: float) -> float:
        """Seconds to give ``size`` bytes to all GPUs: half the way of an all-reduce."""
        return self.all_reduce(size) / 2

    def _ring(self, size: float) -> float:
        between = 2 * (self.nodes - 1)
        within = 2 * (self.gpus - 1) - between
        latency = RING_BASE + within * RING_NVLINK + between * RING_NETWORK
        return self.latency * latency + ring_bytes(1, self.gpus) * size / self.bandwidth

    def _tree(self, size: float) -> float:
        """A chain within each node and a tree over the nodes; 2 size bytes over every link."""
        chain = min(self.gpus, self.per_node) - 1
        levels = math.ceil(math.log2(self.nodes))
        latency = TREE_BASE + 2 * (chain * TREE_NVLINK + levels * TREE_NETWORK)
        bandwidth = min(TREE_SHARE * self.bandwidth, TREE_CEILING)
        return self.latency * latency + 2 * size / bandwidth


@dataclass(frozen=True)
class Job:
    """What every rank does in a step.

    Attributes:
        images: per rank.
        seconds_per_image: of forward and backward pass and optimiser.
        dispatch: seconds that a pass takes at least.
        penalty: seconds of the regulariser's share on the busiest rank.
        jitter: spread of the ranks' durations, sigma of a lognormal.
        loader: images/s that a node's loader makes.
        loader_jitter: the same for the duration of a batch's loading.
        prefetch: batches that are made ahead.
        buffers: whether DistributedDataParallel sends the main rank's buffers to all before each
            forward pass, its default.
    """

    images: int
    seconds_per_image: float
    dispatch: float = DISPATCH
    penalty: float = 0.0
    jitter: float = JITTER
    loader: float = math.inf
    loader_jitter: float = LOADER_JITTER
    prefetch: int = PREFETCH
    buffers: bool = True


@dataclass(frozen=True)
class Outcome:
    """Means over the simulated steps.

    Attributes:
        step: seconds.
        exposed: seconds by which the sum of the gradients outlasts the slowest backward pass.
        waiting: seconds for which the slowest rank waits for its images.
        images_per_second: over all ranks.
    """

    step: float
    exposed: float
    waiting: float
    images_per_second: float


def buckets(sizes: Sequence[int]) -> list[int]:
    """Where the buckets of DistributedDataParallel end in a list of gradients, in bytes.

    A bucket is closed as soon as it has its size or more; the first one is small.
    """
    ends, filled, limit = [], 0, FIRST_BUCKET
    for index, size in enumerate(sizes):
        filled += size
        if filled >= limit:
            ends.append(index + 1)
            filled, limit = 0, BUCKET
    if filled:
        ends.append(len(sizes))
    return ends


def simulate(
    cluster: Cluster, workload: Workload, job: Job, *, steps: int = STEPS, seed: int = 0
) -> Outcome:
    """Simulate training steps of all ranks.

    Args:
        cluster: GPUs and network.
        workload: the network that is trained.
        job: what a rank does in a step.
        steps: how many, of which the first :data:`WARM_UP` are not counted.
        seed: of the jitter; the same draws for the same number of GPUs, whatever else differs.
    """
    random = np.random.default_rng(seed)
    ends = buckets(workload.gradients)
    sizes = [sum(workload.gradients[a:b]) for a, b in zip([0, *ends], ends, strict=False)]
    reduces = [cluster.all_reduce(size) for size in sizes]
    ready = np.array([workload.ready[end - 1] for end in ends])
    work = job.images * job.seconds_per_image
    forward, backward = max(FORWARD * work, job.dispatch), max((1 - FORWARD) * work, job.dispatch)
    broadcast = sum(map(cluster.broadcast, workload.buffers)) if job.buffers else 0.0
    loads = _Loader(cluster, job, random)
    over, started, exposed, waiting = 0.0, 0.0, 0.0, 0.0
    for step in range(steps):
        if step == WARM_UP:
            started, exposed, waiting = over, 0.0, 0.0
        begin = max(over, loads.next_batch())
        loads.taken(begin)
        waiting += begin - over
        slower = random.lognormal(0.0, 1.0, cluster.gpus) ** job.jitter  # sigma = jitter
        start = begin + broadcast + slower * (forward + job.penalty)
        slowest = (start[:, None] + slower[:, None] * backward * ready).max(axis=0)
        free = 0.0
        for there, seconds in zip(slowest, reduces, strict=True):
            free = max(free, there) + seconds
        computed = float((start + slower * backward).max())
        over = max(computed, free)
        exposed += over - computed
    counted = steps - WARM_UP
    length = (over - started) / counted
    images = cluster.gpus * job.images / length
    return Outcome(length, exposed / counted, waiting / counted, images)


class _Loader:
    """When each rank's next batch is there: made one after the other, so many ahead at most."""

    def __init__(self, cluster: Cluster, job: Job, random: np.random.Generator) -> None:
        self._random = np.random.default_rng(random.integers(2**32))  # its own stream of numbers
        self._ranks, self._sigma = cluster.gpus, job.loader_jitter
        a_node = min(cluster.gpus, cluster.per_node)
        self._seconds = job.images * a_node / job.loader
        self._there = np.zeros(cluster.gpus)
        self._begun = [0.0] * job.prefetch  # when the place of each batch ahead became free

    def next_batch(self) -> float:
        """When the slowest rank has its batch."""
        # Of mean 1, so that the rate is the one asked for.
        factor = self._random.lognormal(-(self._sigma**2) / 2, self._sigma, self._ranks)
        self._there = np.maximum(self._there, self._begun.pop(0)) + self._seconds * factor
        return float(self._there.max())

    def taken(self, time: float) -> None:
        """A batch was taken by all ranks at ``time``; another one is made in its place."""
        self._begun.append(time)


@dataclass(frozen=True)
class Options:
    """What a reader can set; see the command's help."""

    gpus: tuple[int, ...] = COUNTS
    batch_per_gpu: int = BATCH_PER_GPU
    images_per_second: float | None = None
    network: float | None = None
    loader: float = math.inf
    dispatch: float = DISPATCH


def cluster_of(gpu: Gpu, gpus: int, network: float | None = None) -> Cluster:
    """A cluster of such GPUs; ``network`` replaces the bytes/s of a node's cards at line rate."""
    return Cluster(gpus, gpu.nvlink, NETWORK_SHARE * (network or gpu.network))


def scaling(
    row: TableRow, gpu: Gpu, precision: str, mode: str, options: Options | None = None
) -> list[Row]:
    """The simulation of a row, ``weak`` or ``strong``: one line for each number of GPUs."""
    options = options or Options()
    return [_scaled(row, gpu, precision, mode, gpus, options) for gpus in options.gpus]


def _scaled(row: TableRow, gpu: Gpu, precision: str, mode: str, gpus: int, options: Options) -> Row:
    if mode == "strong" and REFERENCE_BATCH % gpus:
        return {"gpus": gpus, "batch": REFERENCE_BATCH, "possible": False}
    images = _images_per_gpu(mode, gpus, options)
    dense = _dense(row, gpu, precision, gpus, images, options)
    job = _job(row, gpu, precision, images, options)
    cluster = cluster_of(gpu, gpus, options.network)
    hours = [
        gpu_hours(row, dense.images_per_second / gpus, gain, _pruned_rate(cluster, row, job, gain))
        for gain in (row.speedup, 1.0)
    ]
    return {
        "gpus": gpus,
        "batch": gpus * images,
        "possible": True,
        "images_per_gpu": images,
        "step_ms": 1e3 * dense.step,
        "exposed_ms": 1e3 * dense.exposed,
        "waiting_ms": 1e3 * dense.waiting,
        "images_per_second": dense.images_per_second,
        "efficiency": _efficiency(row, gpu, precision, mode, gpus, options),
        "hours": [whole / gpus for whole in hours],
        "gpu_hours": hours,
    }


def _images_per_gpu(mode: str, gpus: int, options: Options) -> int:
    return options.batch_per_gpu if mode == "weak" else REFERENCE_BATCH // gpus


def _efficiency(
    row: TableRow, gpu: Gpu, precision: str, mode: str, gpus: int, options: Options
) -> float:
    """Throughput over so many times that of one GPU alone, with images enough."""
    together, alone = (
        _dense(row, gpu, precision, n, _images_per_gpu(mode, n, settings), settings)
        for n, settings in ((gpus, options), (1, replace(options, loader=math.inf)))
    )
    return together.images_per_second / gpus / alone.images_per_second


def _job(row: TableRow, gpu: Gpu, precision: str, images: int, options: Options) -> Job:
    rate = (options.images_per_second or gpu.throughput(precision).one) * row.factor
    return Job(images, 1 / rate, dispatch=options.dispatch, loader=options.loader)


def _dense(
    row: TableRow, gpu: Gpu, precision: str, gpus: int, images: int, options: Options
) -> Outcome:
    """The regularised stage: the dense network with the penalty."""
    # In float32 whatever the precision is, as fast as the network's own products.
    macs_per_second = 3 * row.dense.macs * gpu.fp32.one * row.factor
    job = _job(row, gpu, precision, images, options)
    job = replace(job, penalty=row.rank_costs(gpus) / macs_per_second)
    return simulate(cluster_of(gpu, gpus, options.network), row.dense, job)


def _pruned_rate(cluster: Cluster, row: TableRow, job: Job, gain: float) -> float:
    """Images/s of a GPU that finetunes the pruned network, ``gain`` times as fast an image."""
    faster = replace(job, seconds_per_image=job.seconds_per_image / gain)
    return simulate(cluster, row.pruned, faster).images_per_second / cluster.gpus


def limits_part(row: TableRow, gpus: dict[str, Gpu], options: Options) -> list[Row]:
    """Efficiency in mixed precision by what limits it, for the numbers of GPUs of each limit."""
    cases: list[tuple[str, str, Options, tuple[int, ...]]] = [
        ("weak", f"{speed} GB/s per node", replace(options, network=1e9 * speed), LIMITED_WEAK)
        for speed in NETWORKS
    ]
    cases += [
        ("strong", f"{1e3 * seconds:g} ms", replace(options, dispatch=seconds), LIMITED_STRONG)
        for seconds in DISPATCHES
    ]
    return [
        {
            "mode": mode,
            "gpu": title,
            "limit": limit,
            "efficiency": {n: _efficiency(row, gpu, "mixed", mode, n, settings) for n in counts},
        }
        for title, gpu in gpus.items()
        for mode, limit, settings, counts in cases
    ]


def hours_part(rows: dict[str, TableRow], gpus: dict[str, Gpu]) -> list[Row]:
    """GPU-hours from the throughput of eight GPUs in one machine."""
    found = []
    for name, row in rows.items():
        line: Row = {"row": name, "speedup": row.speedup}
        for title, gpu in gpus.items():
            for precision in PRECISIONS:
                rate = gpu.throughput(precision).eight / 8 * row.factor
                line[f"{title} {precision}"] = [
                    gpu_hours(row, rate, gain) for gain in (row.speedup, 1.0)
                ]
        # Every GPU alike does as many multiply-adds of the penalty, at any number of them.
        line["penalty_share"] = row.rank_costs(1) / (3 * row.dense.macs * REFERENCE_BATCH)
        found.append(line)
    return found


def traffic_part(rows: dict[str, TableRow], counts: Sequence[int]) -> list[Row]:
    """Bytes per step: what each GPU sends, for every network of the table."""
    networks = {row.dense.name: row.dense for row in rows.values()}
    networks |= {name: row.pruned for name, row in rows.items()}
    found = []
    for name, network in networks.items():
        statistics = 2 * network.channels * FLOAT
        found.append(
            {
                "network": name,
                "gradients": network.gradient_bytes,
                "buckets": len(buckets(network.gradients)),
                "all_reduce": {n: ring_bytes(network.gradient_bytes, n) for n in counts},
                "buffers": sum(network.buffers),
                # Forward: every rank gets mean, deviation and count from every other; backward:
                # two sums per channel are all-reduced (torch.nn.SyncBatchNorm).
                "sync_batchnorm": {
                    n: (n - 1) * (statistics + network.norms * FLOAT) + ring_bytes(statistics, n)
                    for n in counts
                },
                "sync_batchnorm_collectives": 2 * network.norms,
            }
        )
    return found


def own_collectives() -> list[Row]:
    """What the training loop itself communicates, in bytes per rank."""
    return [
        {"what": "sums of a report", "bytes": 5 * DOUBLE, "when": "every training.log_every steps"},
        {"what": "first bad step, MIN", "bytes": 8, "when": "with each report"},
        {"what": "stop request, MAX", "bytes": 2 * DOUBLE, "when": "about once a second"},
        {"what": "sums of an evaluation", "bytes": 4 * DOUBLE, "when": "every evaluation"},
    ]


def loader_part(rows: dict[str, TableRow], gpus: dict[str, Gpu]) -> list[Row]:
    """What a node of eight GPUs asks of its loader, its cores and the file system.

    Each with the dense network, and with the smallest pruned one, should all of its counted speedup
    arrive.
    """
    per_core = _images_per_core()
    most = max(row.speedup for row in rows.values())
    found = []
    for title, gpu in gpus.items():
        for precision in PRECISIONS:
            dense = gpu.throughput(precision).eight
            rates = [dense, most * dense]
            found.append(
                {
                    "gpu": title,
                    "precision": precision,
                    "images_per_second": rates,
                    "mb_per_second": [rate * JPEG_BYTES / 1e6 for rate in rates],
                    "mb_per_second_400": [rate * JPEG_400_BYTES / 1e6 for rate in rates],
                    "cores": [rate / per_core for rate in rates],
                }
            )
    return found


def _images_per_core() -> float:
    """Images/s that our loader decodes and augments on one core, as benchmarks/loader.py found."""
    measured = json.loads(LOADER_RESULTS.read_text())["speed"]
    return float(measured["contestants"]["ours"]["median"] / measured["threads"])


def check_part(row: TableRow, gpus: dict[str, Gpu]) -> list[Row]:
    """Eight GPUs in one machine over one, as published and as simulated."""
    cases = [
        (f"{title} {precision}, PyTorch", gpu, gpu.throughput(precision), math.inf)
        for title, gpu in gpus.items()
        for precision in PRECISIONS
    ]
    cases += [
        (f"{title} {precision}, MXNet", gpus[title], published, math.inf)
        for (title, precision), published in MXNET.items()
        if title in gpus
    ]
    if "A100" in gpus:
        gpu, ceiling = gpus["A100"], PYTORCH_LOADER_CEILING
        cases.append((f"A100 mixed, loader of {ceiling} images/s", gpu, gpu.mixed, ceiling))
    return [
        {
            "case": title,
            "published": published.eight / published.one / 8,
            "simulated": _efficiency_of_eight(row.dense, gpu, published, loader),
            "source": published.source,
        }
        for title, gpu, published, loader in cases
    ]


def _efficiency_of_eight(
    workload: Workload, gpu: Gpu, published: Published, loader: float
) -> float:
    job = Job(published.batch or REFERENCE_BATCH, 1 / published.one, loader=loader)
    return simulate(cluster_of(gpu, 8), workload, job).images_per_second / 8 / published.one


def collect(gpus: dict[str, Gpu], precisions: Sequence[str], options: Options) -> Row:
    """All parts."""
    rows = {name: table_row(name) for name in ROWS}
    simulated = rows[SIMULATED_ROW]
    several = [n for n in options.gpus if n > 1]
    results: Row = {
        "hours": hours_part(rows, gpus),
        "traffic": traffic_part(rows, several),
        "own_collectives": own_collectives(),
        "loader": loader_part(rows, gpus),
    }
    for mode in ("weak", "strong"):
        results[mode] = {
            f"{title} {precision}": scaling(simulated, gpu, precision, mode, options)
            for title, gpu in gpus.items()
            for precision in precisions
        }
    results["limits"] = limits_part(simulated, gpus, options)
    results["check"] = check_part(simulated, gpus)
    # JSON knows no infinity.
    asked = {key: value for key, value in asdict(options).items() if value != math.inf}
    results["settings"] = {**asked, "row": SIMULATED_ROW, "jitter": JITTER, "steps": STEPS}
    return results


def tables(results: Row) -> list[Table]:
    """The results, to be read."""
    found = [_hours_table(results["hours"]), _traffic_table(results["traffic"])]
    found.append(_loader_table(results["loader"]))
    for mode, title in (("weak", "fixed batch per GPU"), ("strong", "batch 256 over all GPUs")):
        found.append(_scaling_table(f"{SIMULATED_ROW}, {mode} scaling, {title}", results[mode]))
    for mode, title in (("weak", "by network"), ("strong", "by launching of a pass")):
        lines = [line for line in results["limits"] if line["mode"] == mode]
        found.append(_limits_table(f"{mode} scaling, mixed, {title}", lines))
    found.append(_check_table(results["check"]))
    return found


def _table(title: str, *columns: str, left: int = 1) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < left else "right")
    return table


def _hours_table(lines: list[Row]) -> Table:
    kinds = [key for key in lines[0] if key not in ("row", "speedup", "penalty_share")]
    table = _table("GPU-hours, full counted gain - no gain", "row", *kinds, "penalty")
    for line in lines:
        cells = [_range(line[kind]) for kind in kinds]
        table.add_row(line["row"], *cells, f"{100 * line['penalty_share']:.2f} %")
    return table


def _traffic_table(lines: list[Row]) -> Table:
    counts = list(lines[0]["all_reduce"])
    columns = [f"{n} GPUs" for n in counts] + [f"SyncBN, {n}" for n in counts]
    names = ("network", "gradients", "buckets", *columns, "buffers")
    table = _table("MB that each GPU sends per step", *names)
    for line in lines:
        table.add_row(
            line["network"],
            f"{line['gradients'] / 1e6:.1f}",
            str(line["buckets"]),
            *[f"{line['all_reduce'][n] / 1e6:.1f}" for n in counts],
            *[f"{line['sync_batchnorm'][n] / 1e6:.1f}" for n in counts],
            f"{line['buffers'] / 1e6:.2f}",
        )
    return table


def _loader_table(lines: list[Row]) -> Table:
    names = ("images/s", "MB/s", "MB/s at 400 px", "cores")
    table = _table("What a node of eight GPUs asks for, dense - pruned network", "", *names)
    keys = ("images_per_second", "mb_per_second", "mb_per_second_400", "cores")
    for line in lines:
        table.add_row(f"{line['gpu']} {line['precision']}", *[_range(line[key]) for key in keys])
    return table


def _scaling_table(title: str, found: dict[str, list[Row]]) -> Table:
    names = ("GPUs", "batch", "per GPU", "step ms", "not hidden ms", "images/s", "efficiency")
    table = _table(title, "", *names, "hours", "GPU-hours")
    for name, lines in found.items():
        for line in lines:
            if line["possible"]:
                table.add_row(name, *_scaling_cells(line))
    idle = sorted(
        {line["gpus"] for lines in found.values() for line in lines if not line["possible"]}
    )
    if idle:
        table.caption = (
            f"batch {REFERENCE_BATCH} cannot be shared by {', '.join(map(str, idle))} GPUs"
        )
    return table


def _scaling_cells(line: Row) -> list[str]:
    return [
        str(line["gpus"]),
        str(line["batch"]),
        str(line["images_per_gpu"]),
        f"{line['step_ms']:.1f}",
        f"{line['exposed_ms']:.1f}",
        f"{line['images_per_second']:,.0f}",
        f"{100 * line['efficiency']:.0f} %",
        _range(line["hours"]),
        _range(line["gpu_hours"]),
    ]


def _limits_table(title: str, lines: list[Row]) -> Table:
    names = [f"{n} GPUs" for n in lines[0]["efficiency"]]
    table = _table(title, "GPU", "limit", *names, left=2)
    for line in lines:
        percent = [f"{100 * value:.0f} %" for value in line["efficiency"].values()]
        table.add_row(line["gpu"], line["limit"], *percent)
    return table


def _check_table(lines: list[Row]) -> Table:
    table = _table("8 GPUs over 8 times one GPU", "case", "published", "simulated")
    for line in lines:
        percent = [f"{100 * line[key]:.1f} %" for key in ("published", "simulated")]
        table.add_row(line["case"], *percent)
    return table


def _range(values: Sequence[float]) -> str:
    digits = 0 if min(values) >= 10 else 1 if min(values) >= 1 else 2
    return " - ".join(f"{value:,.{digits}f}" for value in values)


def _parser() -> Parser:
    parser = Parser.of_script(
        "python -m benchmarks.scale",
        __doc__,
        ["--gpu A100 --gpus 8,32,128 --precision bf16 --images-per-second 2300"],
    )
    parser.add_argument("--gpu", metavar="NAME", help="V100, A100 or H100 (default: all)")
    parser.add_argument(
        "--gpus",
        default=",".join(map(str, COUNTS)),
        metavar="N,N",
        help="how many (default: %(default)s)",
    )
    share(parser, "--precision", "; bf16 and fp16 are the same here (default: all)")
    share(parser, "--batch-size", ", of each GPU", default=BATCH_PER_GPU)
    parser.add_argument(
        "--images-per-second", metavar="N", help="of ResNet-50, training on one GPU"
    )
    parser.add_argument("--network", metavar="GB/S", help="of a node's cards together")
    parser.add_argument("--loader-speed", metavar="IMAGES/S", help="what a node's loader makes")
    parser.add_argument(
        "--dispatch-ms", metavar="MS", help="that a pass takes at least, however small its batch"
    )
    parser.add_argument("--markdown", action="store_true", help="tables as in docs/scale.md")
    share(parser, "--output")
    parser.renamed("--loader", "--loader-speed")
    parser.renamed("--batch-per-gpu", "--batch-size")
    parser.renamed_word("--precision", "mixed", "bf16")
    return parser


def _options(arguments: argparse.Namespace) -> Options:
    rate, network = arguments.images_per_second, arguments.network
    if rate is not None and not (arguments.gpu and arguments.precision):
        raise UserError("--images-per-second: needs --gpu and --precision, whose speed it replaces")
    loader, dispatch = arguments.loader_speed, arguments.dispatch_ms
    return Options(
        gpus=_gpu_counts(arguments.gpus),
        batch_per_gpu=arguments.batch_size,
        images_per_second=None if rate is None else _number("--images-per-second", rate),
        network=None if network is None else 1e9 * _number("--network", network),
        loader=math.inf if loader is None else _number("--loader-speed", loader),
        dispatch=DISPATCH if dispatch is None else 1e-3 * _number("--dispatch-ms", dispatch),
    )


def _gpu_counts(text: str) -> tuple[int, ...]:
    counts = sorted({int(_number("--gpus", part, whole=True)) for part in text.split(",")})
    for gpus in counts:
        if gpus > MOST_GPUS:
            raise UserError(f"--gpus: {gpus} is more than is simulated; at most {MOST_GPUS}")
        if gpus > GPUS_PER_NODE and gpus % GPUS_PER_NODE:
            raise UserError(
                f"--gpus: {gpus} GPUs are no whole nodes; above {GPUS_PER_NODE} use a multiple "
                f"of {GPUS_PER_NODE}"
            )
    if counts == [1]:
        raise UserError("--gpus: one GPU alone does not scale; name more, such as 8,64,512")
    return tuple(counts)


def _number(option: str, text: str, *, whole: bool = False) -> float:
    try:
        value = int(text) if whole else float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        kind = "a whole number" if whole else "a number"
        raise UserError(f"{option}: {text!r} is not {kind} above 0")
    return value


def _chosen(option: str, name: str | None, known: Sequence[str]) -> list[str]:
    if name is None:
        return list(known)
    if name not in known:
        raise UserError(f"{option}: no {name!r}; there are: {', '.join(known)}")
    return [name]


def _write(results: Row, output: Path) -> None:
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(results, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"--output: cannot write {output}: {error.strerror}") from None


def main() -> None:
    """Compute, simulate, show, and write down."""
    arguments = _parser().parse_args()
    gpus = {name: GPUS[name] for name in _chosen("--gpu", arguments.gpu, list(GPUS))}
    # Whatever has 16 bits is as fast as the other, where a GPU has both.
    mixed = arguments.precision in ("bf16", "fp16")
    asked = "mixed" if mixed else arguments.precision
    precisions = _chosen("--precision", asked, PRECISIONS)
    options = _options(arguments)
    results = collect(gpus, precisions, options)
    # docs/scale.md shows the file of the project: what somebody tries must not replace it.
    as_given = options == Options() and len(gpus) * len(precisions) == len(GPUS) * len(PRECISIONS)
    output = arguments.output or (RESULTS if as_given else None)
    if output is not None:
        _write(results, output)
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 160
    for table in tables(results):
        if arguments.markdown:
            table.box, table.title, table.caption = box.MARKDOWN, None, None
        console.print(table)


if __name__ == "__main__":
    run_command(main)
