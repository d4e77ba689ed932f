"""Convert Show-o from upstream's files to a checkpoint of this project.

    python -m stages.families.show_o.convert --upstream show-o-512x512 --vq magvitv2 --llm phi-1_5 \\
        --out checkpoints/show-o-512x512

--upstream is a folder of showlab/show-o, show-o-512x512, their variants with CLIP-ViT, or HermesFlow; --vq is showlab/magvitv2;
--llm is microsoft/phi-1_5, whose configuration and tokenizer upstream takes; --clip, for the variants with CLIP-ViT, is
openai/clip-vit-large-patch14-336. Only safetensors are read, unless --allow-pickle says that the sources are trusted.

The geometry comes from the configurations and from what upstream's code fixes, never from the tensors, which must fit it. The
result is checked before it is put in place: logits of a guided step of drawing, logits of an answer, latents and pixels must
equal those that upstream's operations (models/ of showlab/Show-o at 45a5a2d) give on the tensors as they came, in float32.
"""

from __future__ import annotations

import argparse
import math
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoTokenizer, CLIPVisionModel, PhiConfig, PreTrainedTokenizerBase

from stages.common.errors import UserError, run_stage
from stages.common.files import aside
from stages.families.show_o.decode import read_texts, run_layers
from stages.families.show_o.family import ShowO
from stages.families.show_o.layout import SPECIAL, add_special_tokens
from stages.families.show_o.magvit import Geometry, Magvit
from stages.families.show_o.model import ShowOConfig, ShowOModel, seen_asking
from stages.families.tools.conversion import Operations, Weights, read_json, read_weights

ALLOWED = 2e-4  # relative; orders of float32 sums differ by less
REMEDY = "fetch the checkpoint again; Show-o and its variants convert"
MAGVIT = Geometry()
MAX_TEXT = 128  # upstream's max_seq_length where it draws
BUFFERS = ("quantize.embedding", "quantize.power_vals")  # computed here


# --- what it must be ---------------------------------------------------------------------------------------------------


def make_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Return Phi's tokenizer with Show-o's special tokens."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, TypeError, ValueError) as error:
        raise UserError(f"{folder}: the tokenizer does not load ({error}); fetch all files of microsoft/phi-1_5") from None
    add_special_tokens(tokenizer)
    return tokenizer


def make_config(
    fields: dict[str, Any], path: Path, llm: Path, tokenizer: PreTrainedTokenizerBase, vq: Geometry, max_text: int
) -> ShowOConfig:
    """Return the configuration from upstream's config.json (`fields`, at `path`) and Phi's.

    UserError where they contradict each other or the tokenizer.
    """
    text, codes = len(tokenizer) - 1 - len(SPECIAL), 2**vq.bits
    vocabulary = len(tokenizer) + codes + 1
    wanted = {"llm_vocab_size": text, "codebook_size": codes, "vocab_size": vocabulary, "mask_token_id": vocabulary - 1}
    for name, value in wanted.items():
        if (found := fields.get(name, value if name == "mask_token_id" else None)) != value:
            raise UserError(
                f"{path}: {name} is {found!r}, but the tokenizer in {llm} and upstream's code ask for {value}; {REMEDY}"
            )
    places = fields.get("num_vq_tokens")
    if not isinstance(places, int) or places < 1 or math.isqrt(places) ** 2 != places:
        raise UserError(f"{path}: num_vq_tokens is {places!r}, not a square number; {REMEDY}")
    given = read_json(llm / "config.json")
    if given.get("model_type") != "phi" or given.get("tie_word_embeddings"):
        raise UserError(f"{llm}/config.json: not the configuration of microsoft/phi-1_5; give its folder as --llm")
    unwanted = ("model_type", "torch_dtype", "dtype", "_attn_implementation", "architectures", "auto_map", "qk_layernorm")
    given = {name: value for name, value in given.items() if name not in (*unwanted, "vocab_size")}
    try:
        phi = PhiConfig(**given, vocab_size=vocabulary, qk_layernorm=True)  # upstream's code sets it
    except (ArithmeticError, TypeError, ValueError, StrictDataclassError) as error:
        raise UserError(f"{llm}/config.json: not Phi's ({' '.join(str(error).split())}); give microsoft/phi-1_5") from None
    return ShowOConfig(text_config=phi, vq_config=asdict(vq), image_tokens=places, max_text_tokens=max_text)


def load(module: torch.nn.Module, weights: Weights, folder: Path) -> None:
    """Give a module without memory its tensors, in float32. UserError where one is missing, unknown or has another shape."""
    own = module.state_dict()
    for name, tensor in own.items():
        if name not in weights:
            raise UserError(f"{folder}: no tensor {name}; {REMEDY}")
        if weights[name].shape != tensor.shape or not weights[name].is_floating_point():
            found = f"{str(weights[name].dtype).removeprefix('torch.')} {list(weights[name].shape)}"
            raise UserError(f"{folder}: {name} is {found}, but floats {list(tensor.shape)} are asked for; {REMEDY}")
    if unknown := sorted(weights.keys() - own.keys()):
        raise UserError(f"{folder}: Show-o has no tensor {unknown[0]} ({len(unknown)} such); {REMEDY}")
    module.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, assign=True)


def open_tower(folder: Path | None, path: Path, allow_pickle: bool) -> CLIPVisionModel:
    """Return the CLIP tower that a checkpoint with CLIP-ViT sees with."""
    if folder is None:
        raise UserError(f"{path}: w_clip_vit is true; give openai/clip-vit-large-patch14-336 as --clip")
    try:
        return CLIPVisionModel.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, use_safetensors=None if allow_pickle else True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{folder}: the CLIP tower does not load ({error}); fetch it again; a pickle is read with --allow-pickle only"
        ) from None


# --- upstream's operations, on upstream's names ----------------------------------------------------------------------


class Upstream(Operations):
    """What upstream computes from its tensors: the whole sequence with its pads, at every step, and all logits."""

    def __init__(self, weights: Weights, vq: Weights, config: ShowOConfig) -> None:
        self.weights = {name: tensor.float() for name, tensor in (weights | vq).items() if tensor.is_floating_point()}
        self.phi, self.geometry = config.text_config, Geometry(**config.vq_config)

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.weights[name + ".weight"], self.weights[name + ".bias"]
        return F.layer_norm(x, x.shape[-1:], weight, bias, self.phi.layer_norm_eps)

    def turned(self, x: torch.Tensor) -> torch.Tensor:
        """Rotary embedding on the first part of each head, positions from 0; x is `[n, heads, s, head dim]`."""
        rope = self.phi.rope_parameters
        dim = int(x.shape[-1] * rope["partial_rotary_factor"])
        frequencies = 1.0 / rope["rope_theta"] ** (torch.arange(0, dim, 2) / dim)
        angles = (torch.arange(x.shape[2])[:, None] * frequencies).repeat(1, 2)
        first, second = x[..., : dim // 2], x[..., dim // 2 : dim]
        swapped = torch.cat([-second, first], -1)
        return torch.cat([x[..., :dim] * angles.cos() + swapped * angles.sin(), x[..., dim:]], -1)

    def embedded(self, ids: torch.Tensor) -> torch.Tensor:
        return self.weights["showo.model.embed_tokens.weight"][ids]

    def logits(self, x: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """Embeddings `[n, s, d]` and what they see, bool `[s, s]` or `[n, s, s]`, to logits `[n, s, vocabulary]`."""
        heads = self.phi.num_attention_heads
        hidden = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
        hidden = hidden[:, None] if hidden.dim() == 3 else hidden
        for layer in range(self.phi.num_hidden_layers):
            at = f"showo.model.layers.{layer}"
            normed = self.norm(f"{at}.input_layernorm", x)
            q, k, v = (
                self.linear(f"{at}.self_attn.{part}_proj", normed).unflatten(-1, (heads, -1)).transpose(1, 2) for part in "qkv"
            )
            q, k = self.norm(f"{at}.self_attn.q_layernorm", q), self.norm(f"{at}.self_attn.k_layernorm", k)
            scores = self.turned(q) @ self.turned(k).transpose(2, 3) / math.sqrt(q.shape[-1]) + hidden
            mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
            inner = F.gelu(self.linear(f"{at}.mlp.fc1", normed), approximate="tanh")
            x = x + self.linear(f"{at}.self_attn.dense", mixed) + self.linear(f"{at}.mlp.fc2", inner)
        return self.linear("showo.lm_head", self.norm("showo.model.final_layernorm", x))

    def projected(self, features: torch.Tensor) -> torch.Tensor:
        return self.linear("mm_projector.2", F.gelu(self.linear("mm_projector.0", features)))

    def middle(self, name: str, x: torch.Tensor) -> torch.Tensor:
        x = self.residual(f"{name}.block_1", x)
        h = self.group(f"{name}.attn_1.norm", x)
        q, k, v = (self.conv(f"{name}.attn_1.{part}", h).flatten(2) for part in "qkv")
        mixed = v @ (q.transpose(1, 2) @ k / math.sqrt(x.shape[1])).softmax(-1).transpose(1, 2)
        return self.residual(f"{name}.block_2", x + self.conv(f"{name}.attn_1.proj_out", mixed.reshape(x.shape)))

    def latents(self, pixels: torch.Tensor) -> torch.Tensor:
        x = self.conv("encoder.conv_in", pixels, padding=1)
        blocks = self.geometry.encoder_blocks
        for level, count in enumerate(blocks):
            for block in range(count):
                x = self.residual(f"encoder.down.{level}.block.{block}", x)
            if level < len(blocks) - 1:
                x = self.conv(f"encoder.down.{level}.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2)
        x = F.silu(self.group("encoder.norm_out", self.middle("encoder.mid", x)))
        return self.conv("encoder.quant_conv", self.conv("encoder.conv_out", x, padding=1))

    def paint(self, codes: torch.Tensor) -> torch.Tensor:
        side, bits = math.isqrt(codes.shape[1]), self.geometry.bits
        book = 2.0 * ((torch.arange(2**bits)[:, None] >> torch.arange(bits - 1, -1, -1)) & 1) - 1
        x = self.conv("decoder.post_quant_conv", book[codes].unflatten(1, (side, side)).permute(0, 3, 1, 2))
        x = self.middle("decoder.mid", self.conv("decoder.conv_in", x, padding=1))
        blocks = self.geometry.decoder_blocks
        for level in reversed(range(len(blocks))):
            for block in range(blocks[level]):
                x = self.residual(f"decoder.up.{level}.block.{block}", x)
            if level:
                x = F.interpolate(x, scale_factor=2.0, mode="nearest")
                x = self.conv(f"decoder.up.{level}.upsample.conv", x, padding=1)
        return self.conv("decoder.conv_out", F.silu(self.group("decoder.norm_out", x)), padding=1)


def drawing_logits(family: ShowO, codes: torch.Tensor, prompt: str) -> torch.Tensor:
    """Return our logits over the codes of a half-masked picture, with guidance 5, `[places, codes]`. codes: ids `[places]`."""
    llm, layout = family.model.llm.model, family.layout
    ids = torch.tensor([[layout.begin, *codes.tolist(), layout.end]])
    texts = [tuple(layout.drawing(prompt)), tuple(layout.drawing(""))]
    groups = [group for row, text in enumerate(texts) for group in read_texts(llm, [text], row, ids.shape[1])]
    hidden = run_layers(llm, llm.embed_tokens(ids).repeat(2, 1, 1), groups)
    logits = family.code_head()(llm.final_layernorm(hidden[:, 1:-1]))
    return 6 * logits[0] - 5 * logits[1]


def upstream_drawing_logits(family: ShowO, upstream: Upstream, codes: torch.Tensor, prompt: str) -> torch.Tensor:
    """Return the same from upstream's operations: texts padded on the left, and the whole vocabulary."""
    layout = family.layout
    texts = [layout.drawing(text) for text in (prompt, "")]
    rows = [[layout.pad] * (layout.max_text + 1 - len(text)) + text for text in texts]
    ids = torch.tensor([[*row, layout.begin, *codes.tolist(), layout.end] for row in rows])
    place, pad = torch.arange(ids.shape[1]), ids == layout.pad
    text_sees = (place[None] <= place[:, None]) & ~(pad[:, None, :] & ~pad[:, :, None])
    seen = torch.where((place >= layout.max_text + 1)[:, None], ~pad[:, None, :], text_sees)
    logits = upstream.logits(upstream.embedded(ids), seen)[:, layout.max_text + 2 : -1, layout.offset : layout.mask]
    return 6 * logits[0] - 5 * logits[1]


@torch.no_grad()
def largest_difference(family: ShowO, upstream: Upstream) -> dict[str, float]:
    """Return the largest differences relative to the largest value, in float32."""
    generator, layout = torch.Generator().manual_seed(0), family.layout
    images = torch.randint(256, (1, family.side, family.side, 3), generator=generator, dtype=torch.uint8).numpy()
    codes = torch.randint(layout.codes, (1, family.places), generator=generator)
    half = torch.where(torch.rand(family.places, generator=generator) < 0.5, layout.mask, codes[0] + layout.offset)
    prompt, question = "a red circle left of two green squares", "Does this image show a red circle?"
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    latents = upstream.latents(pixels)
    asked = family._asked(images, [question])
    if asked["pixels"] is None:
        read = upstream_codes(latents)
        ids = torch.tensor([layout.asking(read.flatten().tolist(), question)])
        x, columns = upstream.embedded(ids), (0, family.places + 3)
    else:
        features = family.model.vision(asked["pixels"], output_hidden_states=True).hidden_states[-2][:, 1:]
        ids, at = layout.asking_tower(question)
        x, columns = upstream.embedded(torch.tensor([ids])), (at, at + features.shape[1])
        x = torch.cat([x[:, :at], upstream.projected(features), x[:, at:]], 1)
    answer = upstream.logits(x, seen_asking(x.shape[1], *columns, x.device))[:, -1]
    pairs = {
        "drawing logits": (drawing_logits(family, half, prompt), upstream_drawing_logits(family, upstream, half, prompt)),
        "answer logits": (family.model.llm.lm_head(family._hidden(asked)), answer),
        "latents": (family.vq.encoder(pixels), latents),
        "pixels": (family.vq.decode(codes), upstream.paint(codes)),
    }
    return {name: ((one - two).abs().max() / two.abs().max()).item() for name, (one, two) in pairs.items()}


def upstream_codes(latents: torch.Tensor) -> np.ndarray:
    """Return the codes of latents `[n, bits, h, w]`, int64 `[n, h * w]`, channel 0 the highest bit."""
    powers = 2 ** np.arange(latents.shape[1])[::-1]
    return np.einsum("nbp,b->np", (latents.flatten(2) > 0).numpy().astype(np.int64), powers)


def convert(
    folder: Path,
    vq_folder: Path,
    llm: Path,
    out: Path,
    clip: Path | None = None,
    allow_pickle: bool = False,
    max_text: int = MAX_TEXT,
    geometry: Geometry = MAGVIT,
) -> dict[str, float]:
    """Write `out`, whole or not at all; returns the largest differences. UserError where the result would be another model.

    geometry: MAGVIT-v2's; tests give a small one.
    """
    if out.exists():
        raise UserError(f"{out}: exists; give another --out")
    path = folder / "config.json"
    fields = read_json(path)
    if fields.get("_class_name") != "Showo" or not isinstance(fields.get("w_clip_vit"), bool):
        raise UserError(f"{path}: _class_name is {fields.get('_class_name')!r}, Show-o's is 'Showo', with w_clip_vit; {REMEDY}")
    tokenizer = make_tokenizer(llm)
    config = make_config(fields, path, llm, tokenizer, geometry, max_text)
    tower = open_tower(clip, path, allow_pickle) if fields["w_clip_vit"] else None
    if tower is not None:
        config.vision_config = tower.config
    weights, _ = read_weights(folder, allow_pickle)
    vq_weights, _ = read_weights(vq_folder, allow_pickle)
    vq_weights = {name: tensor for name, tensor in vq_weights.items() if name not in BUFFERS}
    with torch.device("meta"):
        model, vq = ShowOModel(config).eval(), Magvit(geometry)
    named = {
        name.replace("showo.", "llm.", 1).replace("mm_projector.", "projector.", 1): tensor for name, tensor in weights.items()
    }
    if tower is not None:
        named |= {f"vision.{name}": tensor for name, tensor in tower.state_dict().items()}
    load(model, named, folder)
    load(vq, vq_weights, vq_folder)
    materialise(model, tower)
    family = ShowO(model, vq, tokenizer)  # type: ignore[arg-type]
    found = largest_difference(family, Upstream(weights, vq_weights, config))
    wrong = {name: value for name, value in found.items() if not value <= ALLOWED}
    if wrong:
        raise UserError(f"{folder}: the converted model does not compute what upstream does ({wrong}); nothing was written")
    model.to(weights["showo.lm_head.weight"].dtype)
    temporary = aside(out)
    try:
        temporary.mkdir()
        family.save(temporary)
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return found


def materialise(model: ShowOModel, tower: CLIPVisionModel | None) -> None:
    """Give an empty model what is computed and not stored."""
    llm = model.llm.model
    llm.rotary_emb = type(llm.rotary_emb)(llm.config)
    for name, buffer in tower.named_buffers() if tower is not None else ():
        owner, _, last = name.rpartition(".")
        model.vision.get_submodule(owner).register_buffer(last, buffer, persistent=False)
    if empty := [name for name, buffer in model.named_buffers() if buffer.is_meta]:
        raise UserError(f"transformers computes {empty[0]}, which is unknown here; install the pinned version")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upstream", type=Path, required=True, help="folder of a Show-o checkpoint in upstream's layout")
    parser.add_argument("--vq", type=Path, required=True, help="folder of showlab/magvitv2")
    parser.add_argument("--llm", type=Path, required=True, help="folder of microsoft/phi-1_5: config.json and the tokenizer")
    parser.add_argument("--clip", type=Path, help="folder of openai/clip-vit-large-patch14-336, for variants with CLIP-ViT")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--max-text", type=int, default=MAX_TEXT, help="the longest prompt in tokens; upstream draws with 128")
    parser.add_argument("--allow-pickle", action="store_true", help="read *.bin; only from sources you trust")
    arguments = parser.parse_args()
    found = convert(
        arguments.upstream,
        arguments.vq,
        arguments.llm,
        arguments.out,
        arguments.clip,
        arguments.allow_pickle,
        arguments.max_text,
    )
    print(f"{arguments.out}: " + ", ".join(f"{name} within {value:.1e}" for name, value in found.items()) + " of upstream's")


if __name__ == "__main__":
    run_stage(main)
