"""training.sync_batchnorm: two ranks compute what one process computes of all their images."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from sync_batchnorm_worker import images, network
from torch import nn

from tpp.common.errors import UserError
from tpp.models.architecture import build_model
from train.distributed.sync_batchnorm import check_batchnorms, convert_for_gpus

WORKER = Path(__file__).parent / "sync_batchnorm_worker.py"
# With the activation inside of BatchNorm, and without.
WITH_ACTIVATION = ("timm:mobilenetv3_small_100", "timm:efficientnet_b0", "timm:regnety_002")
NETWORKS = (*WITH_ACTIVATION, "cifar_resnet8", "kinds")


@pytest.fixture(scope="module")
def on_two_ranks(forks, tmp_path_factory) -> Callable[[str], dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("ranks")
    done = forks.run(2, WORKER, [str(folder), *NETWORKS], folder, 120)
    assert done.returncode == 0, done.stderr
    return lambda name: torch.load(folder / f"{name.replace(':', '-')}.pt")


@pytest.mark.parametrize("name", NETWORKS)
def test_two_ranks_compute_what_one_process_computes(on_two_ranks, name):
    found = on_two_ranks(name)
    alone = network(name).double().train()
    alone(images().double())
    expected = {"outputs": alone(images().double())[::2]}
    expected["evaluated"] = alone.eval()(images()[::2].double())
    expected |= {f"buffer {key}": value for key, value in alone.named_buffers()}
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        scale = value.double().abs().max() + 0.01
        assert (found[key].double() - value).abs().max() <= 1e-4 * scale, key


@pytest.mark.parametrize("name", [*WITH_ACTIVATION, "resnet18"])
def test_the_conversion_for_gpus_keeps_the_function(name):
    """Seen on the CPU in evaluation mode: torch's own conversion loses timm's activations."""
    images = torch.randn(1, 3, 32, 32)
    before = build_model(name, 4).eval()
    expected = before(images)
    after = convert_for_gpus(before)
    norms = [m for m in after.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert norms and all(isinstance(norm, nn.SyncBatchNorm) for norm in norms)
    assert after(images).equal(expected)


class Doubled(nn.BatchNorm2d):
    """Somebody's own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Renamed(nn.BatchNorm2d):
    """As BatchNorm2d computes."""


def test_a_batchnorm_of_another_kind_is_refused_by_name():
    from timm.layers import SplitBatchNorm2d

    for other in (Doubled(3), SplitBatchNorm2d(3)):
        model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Sequential(Renamed(3), other))
        with pytest.raises(UserError) as caught:
            check_batchnorms(model)
        assert f"training.sync_batchnorm: 1.1 is a {type(other).__name__}, " in str(caught.value)
    check_batchnorms(nn.Sequential(Renamed(3), nn.BatchNorm1d(3), nn.SyncBatchNorm(3)))
