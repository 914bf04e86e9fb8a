"""Pruned networks through ``torch.hub.load``; docs/hub.md.

An entry point takes a checkpoint of this project's: a safetensors file, of which nothing is run.
"""

from torch import nn

import tpp

# Names of modules, which torch.hub looks for before it calls anything.
dependencies = ["torch", "torchvision", "safetensors", "pydantic", "yaml", "rich"]


def pruned(checkpoint: str, companion: str | None = None) -> nn.Module:
    """The network of a checkpoint, pruned or not.

    Args:
        checkpoint: a file, or ``hf-hub:OWNER/NAME[@REVISION]``.
        companion: take these weights of the file instead of the network's, such as ``ema``.

    Returns:
        The network on the CPU in evaluation mode.

    Raises:
        tpp.UserError: the file is missing, damaged or none of ours, or cannot be fetched.
    """
    return tpp.load_model(checkpoint, companion=companion)


def hf_hub(repository: str, revision: str = "main") -> nn.Module:
    """The network of a repository on the Hugging Face Hub that ``tpp push`` wrote.

    Args:
        repository: ``OWNER/NAME``.
        revision: a branch, a tag or a commit.

    Returns:
        The network on the CPU in evaluation mode.

    Raises:
        tpp.UserError: as :func:`pruned`.
    """
    return tpp.load_model(f"hf-hub:{repository}@{revision}")
