"""Faster float32 linear layers on a CPU, computed by oneDNN from packed weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch


def pack(weight: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight)


def packed_linear(weight: torch.Tensor, bias: torch.Tensor | None, inputs: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")


def packing_works() -> bool:
    """Return whether this torch has the two operators in the form used here, by trying them on a 2 x 2 layer.

    They are private, so another version of torch may rename or change them, and a build without oneDNN does not have them.
    """
    identity = torch.eye(2)
    try:
        return torch.equal(packed_linear(pack(identity), None, identity), identity)
    except (AttributeError, RuntimeError, TypeError):
        return False


@contextmanager
def packed_linears(*modules: torch.nn.Module) -> Iterator[None]:
    """While the context is open, let oneDNN compute every float32 `nn.Linear` of the modules on a CPU, without gradients.

    oneDNN works on copies of the weights in its own layout, which exist as long as the context is open. For plain weights torch
    calls MKL, which is slower on an AMD EPYC: compare `engine` with `transformers-batch` in speed.scoring. The operators are
    those to which torch.compile freezes linear layers. They sum in float32 but in another order. If this torch lacks the
    operators, the layers remain as they are; results agree within float32 rounding, and drawing and judging take longer.
    """
    works = packing_works()
    linears = [
        linear
        for module in modules
        for linear in module.modules()
        if works
        and type(linear) is torch.nn.Linear
        and linear.weight.device.type == "cpu"
        and linear.weight.dtype == torch.float32
    ]
    for linear in linears:
        bias = None if linear.bias is None else linear.bias.detach()
        linear.forward = partial(packed_linear, pack(linear.weight.detach()), bias)
    try:
        yield
    finally:
        for linear in linears:
            del linear.forward
