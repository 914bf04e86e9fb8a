"""What a job asks for, read off a script, the environment and sbatch's options."""

from pathlib import Path

import pytest

from launch.check import Request, of_tasks
from tpp.common.errors import UserError

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


@pytest.mark.parametrize(
    ("options", "environment", "tasks"),
    [
        ([], {}, (0, 1, 2, 3, 4)),
        (["--array=1,3"], {}, (1, 3)),
        (["-a", "0-4:2,7%3"], {}, (0, 2, 4, 7)),
        ([], {"SBATCH_ARRAY_INX": "2"}, (2,)),
        (["--array=all"], {}, ()),  # sbatch says it
    ],
)
def test_the_tasks_of_an_array(
    options: list[str], environment: dict[str, str], tasks: tuple[int, ...]
) -> None:
    assert Request.of(options, "#SBATCH --array=0-4\n", environment).tasks == tasks


def test_what_tasks_are_called_with() -> None:
    one, two = Path("one.yaml"), Path("two.yaml")
    assert of_tasks([one], ["seed=%a"], (3, 4)) == {"": (one, ["seed=3"])}
    assert of_tasks([one], ["seed=%a"], ()) == {"": (one, ["seed=%a"])}
    both = of_tasks([one, two], ["seed=%a"], (0, 1))
    assert [*both.values()] == [(one, ["seed=0"]), (two, ["seed=1"])]
    assert [*of_tasks([one, two], [], (1,)).values()] == [(two, [])]
    with pytest.raises(UserError, match="--array: there is no row 2; they are 0 to 1"):
        of_tasks([one, two], [], (1, 2))


def test_of_another_cluster_nothing_is_known() -> None:
    assert Request.of(["-M", "far"], "", {}).elsewhere
    assert Request.of([], "", {}) == Request()
