"""How far a network is from its teacher."""

import torch.nn.functional as F
from torch import Tensor


def soft_labels(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    r"""Cross entropy with a teacher's softened answers, less its least value (Hinton et al. 2015).

    With :math:`p = softmax(teacher / T)` and :math:`q = softmax(student / T)` it is

    .. math:: T^2 \cdot mean_n \sum_c p_{nc} (\log p_{nc} - \log q_{nc})

    the divergence KL(p || q), whose gradient is that of the cross entropy. The factor T^2 keeps the
    size of its gradient, which goes with 1 / T^2 ("Distilling the Knowledge in a Neural Network",
    section 2).

    Args:
        student: logits (n, classes), float32 or more.
        teacher: likewise; no gradient goes there.
        temperature: T.
    """
    divergence = F.kl_div(
        F.log_softmax(student / temperature, 1),
        F.log_softmax(teacher.detach() / temperature, 1),
        log_target=True,
        reduction="batchmean",
    )
    return temperature**2 * divergence


def attention_map(features: Tensor, channels: int) -> Tensor:
    """Mean of the squares over the channels, (n, ...) without them; float32 or more.

    Its widths are those of the images alone, so that networks of other widths, such as pruned ones,
    can be compared: F_sum^2 of Zagoruyko & Komodakis (ICLR 2017, section 3.1), but for a factor
    that the norm below takes away.

    Args:
        features: (n, channels, h, w), (n, h, w, channels) or (n, tokens, channels).
        channels: which dimension they are.
    """
    return at_least_float32(features).square().mean(channels)


def attention_transfer(student: Tensor, teacher: Tensor) -> Tensor:
    r"""How far two attention maps are apart (Zagoruyko & Komodakis, ICLR 2017, section 3.1).

    With each image's map as a vector a of P places, and of length 1, :math:`b` the teacher's:

    .. math:: mean_n \frac{1}{P} \sum_p (a_{np} - b_{np})^2

    the form that the authors' code has, where beta, our ``weight``, is 1000; the paper's equation 2
    has the distance, not its square.

    Args:
        student: maps (n, h, w) or (n, tokens).
        teacher: likewise; no gradient goes there. Where its sides are others, the larger map's are
            averaged down to the smaller one's.
    """
    teacher = teacher.detach()
    if student.shape != teacher.shape:
        (_, height, width), (_, its_height, its_width) = student.shape, teacher.shape
        sides = min(height, its_height), min(width, its_width)
        student, teacher = (
            F.adaptive_avg_pool2d(map_[:, None], sides)[:, 0] for map_ in (student, teacher)
        )
    a, b = (F.normalize(map_.flatten(1), dim=1) for map_ in (student, teacher))
    return (a - b).square().mean()


def at_least_float32(tensor: Tensor) -> Tensor:
    """In float32, where it is of less."""
    return tensor if tensor.dtype.itemsize >= 4 else tensor.float()
