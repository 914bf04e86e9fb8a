"""Backward passes by which DeepSpeed would train with another penalty than was asked for.

Seen with DeepSpeed 0.19: ``loss.backward()`` divides by the number of micro-batches what comes
through the network's outputs, and so not the penalty; and of several backward passes in a step
ZeRO 1 and 2 keep one. Neither says a word.
"""

import inspect
import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tpp.common.errors import UserError

_RIGHT = "call engine.backward(loss) once per micro-batch, with the penalty in the loss"


def watch_backward(penalty: Tensor, model: nn.Module, reached: Iterable[Tensor]) -> Tensor:
    """Have a backward pass raise by which DeepSpeed would not count the penalty as it is.

    Args:
        penalty: a scalar.
        model: the network that DeepSpeed's engine wraps; without such an engine nothing is watched.
        reached: the parameters that the penalty is computed from.

    Returns:
        The penalty.
    """
    engine = _engine_of(model) if penalty.requires_grad else None
    tracker = getattr(
        sys.modules.get("deepspeed.runtime.engine"), "_ENGINE_BACKWARD_GRAPH_TRACKER", None
    )
    if engine is None or tracker is None:
        return penalty
    mine = {id(parameter) for parameter in reached}
    other = next((p for p in model.parameters() if p.requires_grad and id(p) not in mine), None)
    node = None if other is None else torch.autograd.graph.get_gradient_edge(other).node

    def check(_: Tensor) -> None:
        by_engine = tracker.is_current_graph_registered()
        alone = node is not None and not torch._C._will_engine_execute_node(node)
        if alone and (not by_engine or engine.zero_optimization_stage() > 0):
            raise UserError(
                "the penalty has a backward pass of its own, and of several in a step DeepSpeed "
                f"keeps one: {_RIGHT}"
            )
        if not by_engine and engine.gradient_accumulation_steps() > 1:
            parts = engine.gradient_accumulation_steps()
            raise UserError(
                "under DeepSpeed loss.backward() divides the task's loss by "
                f"gradient_accumulation_steps ({parts}), but not the penalty: {_RIGHT}"
            )

    penalty.register_hook(check)
    return penalty


def _engine_of(model: nn.Module) -> Any:
    """The DeepSpeed engine that wraps a network, and has a hook in it; None where there is none."""
    for hook in model._forward_pre_hooks.values():
        if getattr(hook, "__module__", None) == "deepspeed.runtime.engine":
            return inspect.getclosurevars(hook).nonlocals.get("self")
    return None
