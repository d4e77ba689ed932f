"""Drawing with Show-o: all image tokens are masked, and every step fills in some of them. This is the hot path of drawing.

Source: t2i_generate in models/modeling_showo.py and models/sampling.py of showlab/Show-o at 45a5a2d. The text never attends to
the picture, so it is computed once; logits are computed over the image codes alone and only where a token is still masked;
conditional and unconditional rows share their matrix products; and nothing in the loop waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from transformers import DynamicCache
from transformers.models.phi.modeling_phi import PhiModel

SMALLEST = 1e-20  # upstream's bound below the argument of every logarithm


@dataclass
class Group:
    """Rows of one batch whose texts are equally long, so that their attention needs no padding.

    rows: their slice of the batch. keys, values: those of the distinct texts, each `[layers, texts, heads, length, head dim]`;
    source: the text of each row, int64 `[rows]`. cos, sin: the rotary embedding of the tokens after the text, `[s, dim]`.
    seen: bool `[s, s]`, what these tokens see of each other; None for everything.
    """

    rows: slice
    keys: torch.Tensor
    values: torch.Tensor
    source: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    seen: torch.Tensor | None = None


def rotary(llm: PhiModel, start: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cos and sin, each `[count, dim]`, of the positions from `start` on."""
    weight = llm.embed_tokens.weight
    positions = torch.arange(start, start + count, device=weight.device)
    cos, sin = llm.rotary_emb(weight, positions[None])
    return cos[0], sin[0]


def read_texts(llm: PhiModel, texts: Sequence[tuple[int, ...]], first: int, after: int) -> list[Group]:
    """Return the groups of consecutive rows with these texts as ids; texts of equal length stand together.

    Each distinct text is run once. first: the number of the first row. after: how many tokens follow the text.
    """
    groups, device = [], llm.embed_tokens.weight.device
    start = 0
    while start < len(texts):
        length = len(texts[start])
        count = next((i for i, text in enumerate(texts[start:]) if len(text) != length), len(texts) - start)
        members = texts[start : start + count]
        place = {text: i for i, text in enumerate(dict.fromkeys(members))}
        cache = DynamicCache(config=llm.config)
        llm(input_ids=torch.tensor(list(place), device=device), past_key_values=cache, use_cache=True)
        groups.append(
            Group(
                slice(first + start, first + start + count),
                torch.stack([layer.keys for layer in cache.layers]),
                torch.stack([layer.values for layer in cache.layers]),
                torch.tensor([place[text] for text in members], device=device),
                *rotary(llm, length, after),
            )
        )
        start += count
    return groups


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Return states `[rows, heads, s, head dim]` with rotary embedding on the first dimensions, as many as cos has."""
    turned, kept = states[..., : cos.shape[-1]], states[..., cos.shape[-1] :]
    left, right = turned.chunk(2, -1)
    return torch.cat((turned * cos + torch.cat((-right, left), -1) * sin, kept), -1)


def run_layers(llm: PhiModel, hidden: torch.Tensor, groups: Sequence[Group]) -> torch.Tensor:
    """Run the layers over the tokens after the texts; embeddings in, states before the last norm out, `[rows, s, hidden]`."""
    rows, length, _ = hidden.shape
    activation = partial(F.gelu, approximate="tanh")  # `gelu_new` in one kernel
    for number, layer in enumerate(llm.layers):
        attention, normed = layer.self_attn, layer.input_layernorm(hidden)
        query, key, value = (
            projection(normed).view(rows, length, -1, attention.head_dim).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        if attention.qk_layernorm:
            query, key = attention.q_layernorm(query), attention.k_layernorm(key)
        mixed = torch.empty_like(query)
        for group in groups:
            part, cos, sin = group.rows, group.cos, group.sin
            keys, values = rotate(key[part], cos, sin), value[part]
            if group.keys.shape[3]:
                keys = torch.cat((group.keys[number][group.source], keys), 2)
                values = torch.cat((group.values[number][group.source], values), 2)
            mixed[part] = F.scaled_dot_product_attention(rotate(query[part], cos, sin), keys, values, attn_mask=group.seen)
        mlp = layer.mlp
        act = activation if llm.config.hidden_act == "gelu_new" else mlp.activation_fn
        hidden = hidden + attention.dense(mixed.transpose(1, 2).reshape(rows, length, -1)) + mlp.fc2(act(mlp.fc1(normed)))
    return hidden


def masked_after(step: int, steps: int, places: int) -> int:
    """Return how many of the places are masked after a step, from 0, by the cosine schedule.

    It is computed in float32, as upstream does. At two thirds of the steps this gives one less than in float64.
    """
    ratio = torch.tensor((step + 1) / steps)
    return int((places * torch.cos(ratio * math.pi * 0.5)).floor())


def sample(probabilities: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Return a code for each place, int64 `[n, k]`, by inverse-CDF sampling.

    probabilities: float32 `[n, k, codes]`. draws: float64 `[n, k]`, uniform in [0, 1).
    """
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    threshold = draws[..., None] * cumulative[..., -1:]
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(-1).clamp_(max=probabilities.shape[-1] - 1)


def logarithm(values: torch.Tensor) -> torch.Tensor:
    return values.clamp(min=SMALLEST).log()


def confidence(probability: torch.Tensor, draws: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return log p with Gumbel noise, float32 like `probability`. draws: uniform in [0, 1), of the same shape."""
    return logarithm(probability) - temperature * logarithm(-logarithm(draws.to(probability.dtype)))


@dataclass
class Unknown:
    """The places that are still masked. slots, int64 `[n, k]`: their numbers, with room for ties; real, bool `[n, k]`: which
    of the slots are masked indeed."""

    slots: torch.Tensor
    real: torch.Tensor


def remasked(unknown: Unknown, confidences: torch.Tensor, most: int) -> Unknown:
    """Return what is masked again: of the unknown places, the `most` with the lowest confidence, but at least one fewer.

    Upstream masks what lies strictly below the next confidence, so places that tie there stay known; at least one is masked.
    """
    confidences = confidences.masked_fill(~unknown.real, torch.inf)
    ordered, order = confidences.sort(1)
    count = (unknown.real.sum(1, keepdim=True) - 1).clamp(max=most).clamp(min=1)
    cut = F.pad(ordered, (0, 1), value=torch.inf).gather(1, count)
    width = max(1, min(unknown.slots.shape[1] - 1, most))
    return Unknown(unknown.slots.gather(1, order[:, :width]), ordered[:, :width] < cut)


@torch.no_grad()
def fill_in(
    llm: PhiModel,
    head: Callable[[torch.Tensor], torch.Tensor],
    prompts: Sequence[tuple[int, ...]],
    unconditional: tuple[int, ...],
    image: tuple[int, int, int, int],
    draws: torch.Tensor,
    guidance_scale: float,
    temperature: float,
) -> torch.Tensor:
    """Draw n pictures; return their codes, int64 `[n, places]`.

    prompts: the ids before each picture; unconditional: those of the row without a prompt.
    head: maps hidden states to logits over the image codes. image: the ids of the picture's begin and end, of code 0 and of the
    mask. draws: float64 `[n, steps, 2, places]`, uniform in [0, 1): first for the codes, then for the noise on confidences.
    """
    begin, end, offset, mask = image
    count, steps, _, places = draws.shape
    order = sorted(range(count), key=lambda row: len(prompts[row]))
    device, guided = draws.device, guidance_scale > 0
    draws = draws[torch.tensor(order, device=device)]
    groups = read_texts(llm, [prompts[row] for row in order], 0, places + 2)
    if guided:
        groups += read_texts(llm, [unconditional] * count, count, places + 2)
    ids = torch.full((count, places + 2), mask, device=device)
    ids[:, 0], ids[:, -1] = begin, end
    unknown = Unknown(
        torch.arange(places, device=device).expand(count, places), torch.ones(count, places, dtype=torch.bool, device=device)
    )
    for step in range(steps):
        hidden = llm.embed_tokens(ids)
        hidden = run_layers(llm, hidden.repeat(2, 1, 1) if guided else hidden, groups)
        at = (unknown.slots + 1)[:, :, None].expand(-1, -1, hidden.shape[2])
        wanted = hidden.gather(1, at.repeat(2, 1, 1) if guided else at)
        logits = head(llm.final_layernorm(wanted)).float()
        if guided:
            logits = (1 + guidance_scale) * logits[:count] - guidance_scale * logits[count:]
        probabilities = logits.softmax(-1)
        codes = sample(probabilities, draws[:, step, 0].gather(1, unknown.slots))
        known = ids.gather(1, unknown.slots + 1)
        ids.scatter_(1, unknown.slots + 1, torch.where(unknown.real, codes + offset, known))
        if step == steps - 1:
            break
        temperature = temperature * (1 - (step + 1) / steps)  # cumulative, as upstream
        probability = probabilities.gather(2, codes[:, :, None]).squeeze(2)
        noise = draws[:, step, 1].gather(1, unknown.slots)
        unknown = remasked(unknown, confidence(probability, noise, temperature), masked_after(step, steps, places))
        again = torch.where(unknown.real, mask, ids.gather(1, unknown.slots + 1))
        ids.scatter_(1, unknown.slots + 1, again)
    drawn = torch.empty_like(ids[:, 1:-1])
    drawn[torch.tensor(order, device=device)] = ids[:, 1:-1] - offset
    return drawn
