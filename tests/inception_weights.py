"""Weights for the Inception network by a rule, and what torch-fidelity 0.4.0 made of them."""

import math

import torch
from golden_values import normals

STEM = {"1a_3x3": (32, 3, 3, 3), "2a_3x3": (32, 32, 3, 3), "2b_3x3": (64, 32, 3, 3), "3b_1x1": (80, 64, 1, 1),
        "4a_3x3": (192, 80, 3, 3)}  # fmt: skip


def shapes():
    """Name -> shape of each convolution's weight."""
    found = {f"Conv2d_{name}": shape for name, shape in STEM.items()}

    def put(block, **branches):
        found.update({f"Mixed_{block}.{name}": shape for name, shape in branches.items()})

    for block, wide, pool in (("5b", 192, 32), ("5c", 256, 64), ("5d", 288, 64)):
        put(block, branch1x1=(64, wide, 1, 1), branch5x5_1=(48, wide, 1, 1), branch5x5_2=(64, 48, 5, 5),
            branch3x3dbl_1=(64, wide, 1, 1), branch3x3dbl_2=(96, 64, 3, 3), branch3x3dbl_3=(96, 96, 3, 3),
            branch_pool=(pool, wide, 1, 1))  # fmt: skip
    put("6a", branch3x3=(384, 288, 3, 3), branch3x3dbl_1=(64, 288, 1, 1), branch3x3dbl_2=(96, 64, 3, 3),
        branch3x3dbl_3=(96, 96, 3, 3))  # fmt: skip
    for block, c in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
        put(block, branch1x1=(192, 768, 1, 1), branch7x7_1=(c, 768, 1, 1), branch7x7_2=(c, c, 1, 7),
            branch7x7_3=(192, c, 7, 1), branch7x7dbl_1=(c, 768, 1, 1), branch7x7dbl_2=(c, c, 7, 1),
            branch7x7dbl_3=(c, c, 1, 7), branch7x7dbl_4=(c, c, 7, 1), branch7x7dbl_5=(192, c, 1, 7),
            branch_pool=(192, 768, 1, 1))  # fmt: skip
    put("7a", branch3x3_1=(192, 768, 1, 1), branch3x3_2=(320, 192, 3, 3), branch7x7x3_1=(192, 768, 1, 1),
        branch7x7x3_2=(192, 192, 1, 7), branch7x7x3_3=(192, 192, 7, 1), branch7x7x3_4=(192, 192, 3, 3))  # fmt: skip
    for block, wide in (("7b", 1280), ("7c", 2048)):
        put(block, branch1x1=(320, wide, 1, 1), branch3x3_1=(384, wide, 1, 1), branch3x3_2a=(384, 384, 1, 3),
            branch3x3_2b=(384, 384, 3, 1), branch3x3dbl_1=(448, wide, 1, 1), branch3x3dbl_2=(384, 448, 3, 3),
            branch3x3dbl_3a=(384, 384, 1, 3), branch3x3dbl_3b=(384, 384, 3, 1), branch_pool=(192, wide, 1, 1))  # fmt: skip
    return found


def state():
    """The tensors of a weight file, without the classifier."""
    tensors = {}
    for name, shape in shapes().items():
        fan_in = math.prod(shape[1:])
        make = lambda part, shape: torch.from_numpy(normals(f"{name}.{part}", list(shape), 5))  # noqa: B023, E731
        tensors[f"{name}.conv.weight"] = make("conv.weight", shape) * (2 / fan_in) ** 0.5
        tensors[f"{name}.bn.weight"] = 1 + 0.1 * make("bn.weight", shape[:1])
        tensors[f"{name}.bn.bias"] = 0.1 * make("bn.bias", shape[:1])
        tensors[f"{name}.bn.running_mean"] = 0.1 * make("bn.running_mean", shape[:1])
        tensors[f"{name}.bn.running_var"] = (0.2 * make("bn.running_var", shape[:1])).exp()
    return tensors


def pictures():
    """Two uint8 pictures [2, 3, 40, 56] with gradients, edges and noise."""
    noise = torch.from_numpy(normals("pictures", [2, 3, 40, 56], 5))
    slope = torch.linspace(-1, 1, 56) + torch.linspace(-1, 1, 40)[:, None]
    return ((slope * torch.tensor([90.0, -60.0])[:, None, None, None] + 40 * noise + 128).clamp(0, 255)).byte()
