"""Where the ranks of a run meet."""

import ipaddress
import os
import socket

import torch.distributed as dist

from tpp.common.errors import UserError

_BACKLOG = 1024
_stores: list[dist.TCPStore] = []  # that this process hosts: they end with the last reference


def keep_to_loopback() -> None:
    """Let a run whose ranks are all on one node listen on that node's loopback address alone.

    To be called before the process group is made. What the user has set stays. A store that
    torchrun's agent hosts listens on every address; torch has no option against it.

    Raises:
        UserError: MASTER_PORT cannot be had.
    """
    environment = os.environ
    ranks = environment.get("WORLD_SIZE")
    if ranks is None or environment.get("LOCAL_WORLD_SIZE") != ranks:
        return
    interfaces = [name for _, name in socket.if_nameindex()]
    loopback = next((name for name in ("lo", "lo0") if name in interfaces), None)
    if loopback is not None:
        environment.setdefault("GLOO_SOCKET_IFNAME", loopback)
        environment.setdefault("NCCL_SOCKET_IFNAME", f"={loopback}")
    port = environment.get("MASTER_PORT", "")
    hosts_store = environment.get("RANK") == "0" and not agent_hosts_store()
    if hosts_store and port.isdigit():
        host_store(environment.get("MASTER_ADDR", ""), int(port))


def meet_anew_after_restart() -> None:
    """Let ranks on one node that torchrun has restarted meet at a store of their own.

    To be called before the process group is made. torchrun goes on with its store, where the
    addresses of the processes that are gone still stand, so that a group may try to connect to
    them (https://github.com/pytorch/pytorch/issues/135712). Ranks on several nodes cannot agree on
    how often they were restarted; there TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 helps, for torchrun.
    """
    environment = os.environ
    attempt = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
    one_node = environment.get("LOCAL_WORLD_SIZE") == environment.get("WORLD_SIZE")
    if attempt == "0" or not one_node or not agent_hosts_store():
        return
    host, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    old = dist.TCPStore(host, port, is_master=False, wait_for_workers=False)
    key = f"restart/{attempt}/port"
    if environment["RANK"] == "0":
        host_store("127.0.0.1", 0)
        old.set(key, str(_stores[-1].port))
    environment["MASTER_ADDR"] = "127.0.0.1"
    environment["MASTER_PORT"] = old.get(key).decode()
    environment["TORCHELASTIC_USE_AGENT_STORE"] = "False"


def host_store(host: str, port: int) -> None:
    """Host the ranks' store in this process, unless it does so already; for rank 0.

    On the loopback address alone, if that is where they are to meet; torch itself would listen on
    every address. It takes up a store that this process hosts at the same port.

    Args:
        host, port: where the ranks meet; port 0 for any that is free.

    Raises:
        UserError: the port cannot be had.
    """
    if any(store.port == port for store in _stores):
        return
    try:
        listener = _listener(host, port)
    except OSError as error:
        raise UserError(
            f"MASTER_PORT={port}: the ranks cannot meet at this port of {socket.gethostname()} "
            f"({error.strerror}); set another one (torchrun: --master_port), or leave it out under "
            "srun"
        ) from None
    store = dist.TCPStore(
        host,
        listener.getsockname()[1],
        is_master=True,
        wait_for_workers=False,
        multi_tenant=True,
        master_listen_fd=listener.detach(),
    )
    _stores.append(store)


def _listener(host: str, port: int) -> socket.socket:
    try:
        address = socket.gethostbyname(host)
    except OSError:
        address = ""
    if address and ipaddress.ip_address(address).is_loopback:
        return socket.create_server((address, port), backlog=_BACKLOG)
    if socket.has_dualstack_ipv6():
        family = socket.AF_INET6
        return socket.create_server(
            ("", port), family=family, backlog=_BACKLOG, dualstack_ipv6=True
        )
    return socket.create_server(("", port), backlog=_BACKLOG)


def agent_hosts_store() -> bool:
    """Whether torchrun's agent, which outlives the ranks, keeps the store where they meet."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
