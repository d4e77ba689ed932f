"""Linear layers at a processor's full width."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch


def packed_linear(weight: torch.Tensor, bias: torch.Tensor | None, inputs: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")


@contextmanager
def packed_linears(*modules: torch.nn.Module) -> Iterator[None]:
    """On a CPU let oneDNN compute every float32 `nn.Linear` inside, from weights in its own layout; no gradients.

    For plain weights torch calls MKL, the slower one on an AMD EPYC: see `engine` beside `transformers-batch` of
    speed.scoring. Costs a copy of the weights while the context lasts. The operators are those that torch.compile freezes
    linear layers to; sums are float32's, in another order.
    """
    linears = [
        linear
        for module in modules
        for linear in module.modules()
        if torch.backends.mkldnn.is_available()
        and type(linear) is torch.nn.Linear
        and linear.weight.device.type == "cpu"
        and linear.weight.dtype == torch.float32
    ]
    for linear in linears:
        weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
        linear.forward = partial(packed_linear, weight, None if linear.bias is None else linear.bias.detach())
    try:
        yield
    finally:
        for linear in linears:
            del linear.forward
