"""Computing in float64 with models that were written for float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

LOWER = (torch.float32, torch.bfloat16, torch.float16)
CASTS = (torch.Tensor.float, torch.Tensor.bfloat16, torch.Tensor.half)


class KeepDouble(TorchFunctionMode):
    """While it is active, whatever asks for a lower precision gets float64.

    Models cast to float32 where they are afraid of bfloat16: in norms, in the softmax of attention, in rotary embeddings, for
    logits. Without this mode, a model with float64 weights would compute those parts in float32.
    """

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        function = torch.Tensor.double if function in CASTS else function
        keywords = {name: _raised(value) for name, value in (keywords or {}).items()}
        return function(*map(_raised, arguments), **keywords)


def _raised(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value in LOWER else value


@contextmanager
def double(model: torch.nn.Module) -> Iterator[None]:
    """While the context is open, the model computes in float64. Its weights stay float64 afterwards."""
    model.double()
    with KeepDouble():
        yield
