"""A training step in plain PyTorch, beside which TRL's trainer can be measured."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from speed.data import Rows
from stages.families.janus.family import Janus

LOGITS_AT_ONCE = 4096  # positions whose logits are held
LORA_ALPHA, BETA = 32, 0.1


def log_probabilities(head: torch.nn.Module, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Of targets int64 `[m]` after hidden states `[m, d]`, float32 `[m]`; logits are held for a part of them at a time."""

    def some(part: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        return -F.cross_entropy(head(part).float(), wanted, reduction="none")

    parts = zip(hidden.split(LOGITS_AT_ONCE), targets.split(LOGITS_AT_ONCE), strict=True)
    return torch.cat([checkpoint(some, part, wanted, use_reentrant=False) for part, wanted in parts])


def training_step(family: Janus, data: Rows, reference: np.ndarray | None, lora: int) -> Callable[[], None]:
    """An optimizer step in plain PyTorch: AdamW on float32 weights, forward and backward in the model's type."""
    view, dtype, device = family.training_view(), family.model.dtype, family.device
    model, prefixes = view.model.train(), view.groups["llm"]
    if lora:
        from peft import LoraConfig, inject_adapter_in_model

        linear = [name for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)]
        wanted = [name for name in linear if name.startswith(prefixes)]
        inject_adapter_in_model(LoraConfig(r=lora, lora_alpha=LORA_ALPHA, target_modules=wanted), model)
    trained = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name if lora else name.startswith(prefixes))
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
            trained.append(parameter)
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=device.type == "cuda")
    length = family.image_length
    width = max(len(prompt) + len(image) for prompt, image in data)
    padded = [prompt + image + [0] * (width - len(prompt) - len(image)) for prompt, image in data]
    ids = torch.tensor(padded, device=device)  # padded at the right, so causal attention needs no mask
    places = torch.tensor([range(len(prompt), len(prompt) + length) for prompt, _ in data], device=device)
    before = None if reference is None else torch.tensor(reference, device=device, dtype=torch.float32)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            hidden = model.base_model(input_ids=ids).last_hidden_state
            scored = hidden.gather(1, (places - 1)[:, :, None].expand(-1, -1, hidden.shape[2])).flatten(0, 1)
            found = log_probabilities(model.get_output_embeddings(), scored, ids.gather(1, places).flatten())
        loss = -found.mean()
        if before is not None:
            chosen, rejected = (found.view(-1, length).sum(1) - before).chunk(2)
            loss = -F.logsigmoid(BETA * (chosen - rejected)).mean() - found.chunk(2)[0].mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step
