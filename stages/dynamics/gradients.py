"""Gradients of single samples as flat vectors, by subset of parameters, and the kernel that applies to logits."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

LAYER = re.compile(r"(?:.*\.)?(\w+\.\d+)\.")  # "layers.3" in "model.layers.3.mlp.up_proj.weight"


@dataclass(frozen=True)
class Parameters:
    """The parameters that terms are computed for, ordered so that each subset is one slice of a flat gradient.

    tensors: by name. subsets: the slice of each subset (a layer, or a module outside of layers), by name, in order.
    """

    tensors: dict[str, nn.Parameter]
    subsets: dict[str, slice]

    @property
    def size(self) -> int:
        return sum(tensor.numel() for tensor in self.tensors.values())


def subset_of(name: str) -> str:
    """Return the subset of a parameter: its layer, such as layers.3, or else the module that holds it."""
    layer = LAYER.match(name)
    return layer.group(1) if layer else ".".join(name.split(".")[-2:-1]) or name


def chosen_parameters(
    model: nn.Module, prefixes: tuple[str, ...], wanted: Sequence[str] = (), containing: str = ""
) -> Parameters:
    """Return the parameters whose names have one of the prefixes and a part, and let only those have gradients.

    wanted: names of subsets, to take only these. Raises ValueError if nothing is left.
    """
    groups: dict[str, dict[str, nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        taken = name.startswith(prefixes) and containing in name and (not wanted or subset_of(name) in wanted)
        parameter.requires_grad_(taken)
        if taken:
            groups.setdefault(subset_of(name), {})[name] = parameter
    if not groups:
        raise ValueError(f"no parameters with the prefixes {prefixes} in the subsets {list(wanted)}")
    subsets, start = {}, 0
    for subset, members in groups.items():
        end = start + sum(parameter.numel() for parameter in members.values())
        subsets[subset], start = slice(start, end), end
    return Parameters({name: value for members in groups.values() for name, value in members.items()}, subsets)


def gradient(value: torch.Tensor, parameters: Parameters, keep_graph: bool = False) -> torch.Tensor:
    """Return the gradient of a scalar as one vector `[size]`; zero where the scalar does not depend on a parameter."""
    tensors = list(parameters.tensors.values())
    found = torch.autograd.grad(value, tensors, retain_graph=keep_graph, allow_unused=True)
    parts = [torch.zeros_like(t) if g is None else g for g, t in zip(found, tensors, strict=True)]
    return torch.cat([part.reshape(-1) for part in parts])


def products(left: torch.Tensor, right: torch.Tensor, parameters: Parameters) -> dict[str, torch.Tensor]:
    """Return the scalar products of vectors `[a, size]` and `[b, size]`, `[a, b]` for each subset of parameters."""
    return {name: left[:, part] @ right[:, part].T for name, part in parameters.subsets.items()}


def split(vector: torch.Tensor, parameters: Parameters) -> dict[str, torch.Tensor]:
    """Return a flat vector `[size]` as tensors of the parameters' shapes, by name."""
    pieces = vector.split([tensor.numel() for tensor in parameters.tensors.values()])
    return {name: piece.view_as(tensor) for (name, tensor), piece in zip(parameters.tensors.items(), pieces, strict=True)}


def adamw(model: nn.Module, parameters: Parameters, rate: float, weight_decay: float) -> torch.optim.AdamW:
    """Return AdamW for the parameters of a model as the trainer makes it: biases and the weights of norms do not decay."""
    from transformers import Trainer

    decaying = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]  # it reads nothing of a trainer
    groups = [
        {
            "params": [tensor for name, tensor in parameters.tensors.items() if (name in decaying) == decays],
            "weight_decay": decay,
        }
        for decays, decay in ((True, weight_decay), (False, 0.0))
    ]
    return torch.optim.AdamW(groups, lr=rate)


@torch.no_grad()
def move(parameters: Parameters, vector: torch.Tensor) -> None:
    """Add a flat vector `[size]` to the parameters."""
    for name, piece in split(vector, parameters).items():
        parameters.tensors[name].add_(piece)


@torch.no_grad()
def place(parameters: Parameters, vector: torch.Tensor) -> None:
    """Set the parameters to a flat vector `[size]`."""
    for name, piece in split(vector, parameters).items():
        parameters.tensors[name].copy_(piece)


@torch.no_grad()
def flat(parameters: Parameters) -> torch.Tensor:
    """Return a copy of the parameters as one vector `[size]`."""
    return torch.cat([tensor.reshape(-1) for tensor in parameters.tensors.values()])


class Calls(nn.Module):
    """A function that uses a model, as a module, so that it can be called with other weights of that model."""

    def __init__(self, model: nn.Module, function: Callable[[], torch.Tensor]) -> None:
        super().__init__()
        self.model, self.function = model, function

    def forward(self) -> torch.Tensor:
        return self.function()


def directional(
    model: nn.Module, parameters: Parameters, function: Callable[[], torch.Tensor], direction: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what a function of the model returns, and its derivative along a flat direction `[size]`, by forward mode.

    The derivative of n values costs about two forward passes, where n gradients would need n backward passes.
    """
    calls = Calls(model, function)
    names = {f"model.{name}": tensor.detach() for name, tensor in parameters.tensors.items()}
    tangents = {f"model.{name}": piece for name, piece in split(direction, parameters).items()}
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad():  # the fused attention has no forward mode
        value, change = jvp(lambda weights: functional_call(calls, weights, ()), (names,), (tangents,))
    return value, change


def kernel_times(
    model: nn.Module,
    parameters: Parameters,
    left: Callable[[], torch.Tensor],
    right: Callable[[], torch.Tensor],
    vector: torch.Tensor,
) -> torch.Tensor:
    """Return K v for the empirical tangent kernel K between the outputs of two functions, such as logits of two images.

    K[i, j] is the scalar product of the gradients of output i of `left` and output j of `right`. vector: in the shape of
    `right`'s output; the result has that of `left`'s. One backward pass and one pass in forward mode; K is never built.
    """
    outputs = right()
    return directional(model, parameters, left, gradient((outputs * vector).sum(), parameters))[1]


def sign_vectors(shape: Sequence[int], count: int, seed: int) -> Iterator[torch.Tensor]:
    """Yield tensors of random signs, float64, which depend on the seed only."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        yield torch.randint(0, 2, tuple(shape), generator=generator).double() * 2 - 1
