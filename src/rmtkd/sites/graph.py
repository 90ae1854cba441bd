"""The words of a graph of `torch.export`: what its operators do to channels, and what its nodes say of themselves."""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.fx import Node

CALLED = "called"
"""Where a network lies that is followed as a batch's own `forward` calls it."""
CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")
CHANNEL_BY_CHANNEL = frozenset(
    (
        *("relu", "relu6", "hardtanh", "leaky_relu", "elu", "selu", "celu", "silu", "gelu", "mish", "sigmoid"),
        *("hardsigmoid", "hardswish", "tanh", "softplus", "neg", "abs", "square", "log_sigmoid", "threshold", "rrelu"),
        *("hardshrink", "softshrink", "clamp", "clamp_min", "clamp_max", "clip", "exp", "log", "sqrt", "rsqrt", "pow"),
        *("reciprocal", "sin", "cos", "erf"),
        *("dropout", "feature_dropout", "alpha_dropout", "clone", "contiguous", "to", "alias", "detach"),
        *("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d"),
        *("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool2d"),
        *("upsample_nearest1d", "upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d"),
    )
)
"""Operators that act on every channel by itself, the same on all, where they are given no tensor but it."""
LOOKING = frozenset(["_assert_tensor_metadata"])
"""Operators that give nothing: what `float` and the like put into a graph beside themselves."""
JOINING = frozenset(["add", "sub", "mul", "div", "maximum", "minimum"])
"""Operators of two activations, channel by channel."""
RESHAPING = frozenset(["flatten", "view", "reshape", "squeeze", "mean", "unsqueeze"])
"""Operators that a width comes through where channels stay what they are."""


def operator_of(node: Node) -> str:
    """The operator's plain name: `relu_` changes in place what `relu` makes anew."""
    name = getattr(node.target, "_opname", None) or getattr(node.target, "__name__", str(node.target))
    return name.split(".")[0].rstrip("_")


def place_of(node: Node) -> str:
    """The path of the innermost module that a node belongs to."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    path = stack[-1][0].removeprefix(CALLED).removeprefix(".") if stack else ""
    return path or "the network itself"


def positions_of(operator: str) -> int:
    """Over how many last dimensions a pooling or the like goes; 0 of what goes over none."""
    return int(operator[-2]) if operator[-2:] in ("1d", "2d", "3d") else 0


def weight_of(node: object) -> object:
    """The weight of a map, or the second of whatever an operator takes."""
    return node.args[1] if isinstance(node, Node) and len(node.args) > 1 else None


def shape_of(node: object) -> tuple[int, ...] | None:
    """The shape of what a node gives; None where that is no tensor."""
    value = node.meta.get("val") if isinstance(node, Node) else None
    return tuple(value.shape) if isinstance(value, Tensor) else None


def rank_of(node: Node) -> int:
    """How many dimensions that has."""
    return len(shape_of(node) or ())


def count(shape: Sequence[int] | None) -> int:
    """How many entries a tensor of this shape has."""
    return math.prod(shape or ())


def numbers(value: object) -> tuple[Any, ...]:
    """The entries of a list, or one by itself. `same` pads as far as filters reach."""
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)
