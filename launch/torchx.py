"""A component of TorchX, for the schedulers that it knows.

torchx run --dryrun -s kubernetes -cfg queue=gpus --workspace= launch/torchx.py:tpp --nodes 2 \
    --image REGISTRY/tpp:latest --config configs/imagenet/resnet50_tpp_2.31x.yaml \
    data.root=/data output=/runs/resnet50
torchx run -s local_cwd launch/torchx.py:tpp --gpus 2 --config configs/demo.yaml
"""

import shlex

from torchx import specs

# What a stopped or lost rank ends with; torchx starts all of them again, as launch/job.sh does.
_RESTARTS = 50
_PORT = 29500


def tpp(
    *settings: str,
    config: str,
    image: str = "",
    nodes: int = 1,
    gpus: int = 8,
    cpus: int = 64,
    memory_mb: int = 400_000,
    python: str = "python",
    mounts: str = "",
) -> specs.AppDef:
    """Run a configuration, one rank per GPU.

    Args:
        settings: of the configuration, such as data.root=/data
        config: a configuration of configs/, or another one that the image has
        image: made by launch/container/Dockerfile
        nodes: how many
        gpus: of each node; ranks on the CPU where it has none
        cpus: of each node
        memory_mb: of each node
        python: the interpreter in the image
        mounts: torchx's, such as type=volume,src=runs,dst=/runs
    """
    train = [python, "train/main.py", "--config", config, *settings]
    # torchx puts in names of variables, which the shell of each node reads.
    command = (
        f"export MASTER_ADDR=$${{{specs.macros.rank0_env}:=localhost}} MASTER_PORT={_PORT}; "
        f"export TPP_NODE_RANK={specs.macros.replica_id}; "
        f"exec bash launch/node.sh torchrun {nodes}x{gpus} {shlex.join(train)}"
    )
    role = specs.Role(
        name="node",
        image=image,
        entrypoint="bash",
        args=["-c", command],
        env={"PYTHONUNBUFFERED": "1"},
        num_replicas=nodes,
        resource=specs.Resource(cpu=cpus, gpu=gpus, memMB=memory_mb),
        retry_policy=specs.RetryPolicy.APPLICATION,
        max_retries=_RESTARTS,
        port_map={"ranks": _PORT},
        mounts=specs.parse_mounts(mounts.split(",")) if mounts else [],
    )
    return specs.AppDef(name="tpp", roles=[role])
