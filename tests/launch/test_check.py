"""What a job asks for, read off a script, the environment and sbatch's options."""

import pytest

from launch.check import Request

SCRIPT = "#!/bin/bash\n#SBATCH --nodes=2\n#SBATCH --job-name=x\n#SBATCH -p slow --exclusive\n"


@pytest.mark.parametrize(
    ("options", "environment", "partitions", "nodes", "ranks"),
    [
        ([], {}, ("slow",), 2, None),
        (["--gpus-per-node=4"], {}, ("slow",), 2, 8),
        (["-N4", "--gpus-per-node", "a100:8"], {}, ("slow",), 4, 32),
        (["-N", "1-4", "--gpus-per-node=8"], {}, ("slow",), None, None),
        (["--gres=gpu:h100:3", "-p", "a,b"], {}, ("a", "b"), 2, 6),
        (["--gres=craynetwork:1,gpu"], {}, ("slow",), 2, 2),
        (["--gres=shard:4"], {}, ("slow",), 2, None),
        (["-G", "6"], {}, ("slow",), 2, 6),
        ([], {"SBATCH_PARTITION": "gpu", "SBATCH_GPUS_PER_NODE": "2"}, ("gpu",), 2, 4),
        (["--partition=mine"], {"SBATCH_PARTITION": "gpu"}, ("mine",), 2, None),
    ],
)
def test_what_is_asked_for(
    options: list[str],
    environment: dict[str, str],
    partitions: tuple[str, ...],
    nodes: int | None,
    ranks: int | None,
) -> None:
    request = Request.of(options, SCRIPT, environment)
    assert (request.partitions, request.nodes, request.ranks) == (partitions, nodes, ranks)
    assert not request.elsewhere


def test_of_another_cluster_nothing_is_known() -> None:
    assert Request.of(["-M", "far"], "", {}).elsewhere
    assert Request.of([], "", {}) == Request()
