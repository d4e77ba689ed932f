"""Convert a Janus-Pro checkpoint from upstream's layout (deepseek-ai/Janus-Pro-1B, -7B) to that of transformers.

    python -m stages.families.janus.convert --upstream Janus-Pro-7B --out Janus-Pro-7B-hf --allow-pickle

Upstream ships pickles; they are read with `weights_only`, and only where --allow-pickle says that their source is trusted.
The result is checked before it is put in place: text logits after a picture, image logits and decoded pixels must equal
those that upstream's own operations (deepseek-ai/Janus, janus/models/) give on the tensors as they came.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import (
    JanusConfig,
    JanusForConditionalGeneration,
    JanusImageProcessorPil,
    JanusProcessor,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
)
from transformers.models.janus.configuration_janus import JanusVisionConfig, JanusVQVAEConfig

from stages.common.runtime import UserError, run_stage
from stages.families.janus.family import CHAT_TEMPLATE

Weights = dict[str, torch.Tensor]
HEAD_DIM = 64  # of the vision tower, siglip_large_patch16_384
TOWER, LAYERS = r"^vision_model\.vision_tower", "model.vision_model.encoder.layers"
NAMES = (  # upstream's name, transformers' name; all that match are applied, in order
    (r"^language_model\.model\.", "model.language_model."),
    (r"^language_model\.lm_head\.", "lm_head."),
    (TOWER + r"\.pos_embed$", "model.vision_model.embeddings.position_embedding.weight"),
    (TOWER + r"\.patch_embed\.proj\.", "model.vision_model.embeddings.patch_embedding."),
    (TOWER + r"\.norm\.", "model.vision_model.post_layernorm."),
    (TOWER + r"\.blocks\.(\d+)\.attn\.proj\.", LAYERS + r".\1.self_attn.projection_layer."),
    (TOWER + r"\.blocks\.(\d+)\.attn\.", LAYERS + r".\1.self_attn."),
    (TOWER + r"\.blocks\.(\d+)\.norm(\d)\.", LAYERS + r".\1.layer_norm\2."),
    (TOWER + r"\.blocks\.", LAYERS + "."),
    (r"^aligner\.layers\.0\.", "model.aligner.fc1."),
    (r"^aligner\.layers\.2\.", "model.aligner.hidden_layers.0."),
    (r"^gen_aligner\.layers\.0\.", "model.generation_aligner.fc1."),
    (r"^gen_aligner\.layers\.2\.", "model.generation_aligner.hidden_layers.0."),
    (r"^gen_embed\.", "model.generation_embeddings."),
    (r"^gen_head\.output_mlp_projector\.", "model.generation_head.proj_out."),
    (r"^gen_head\.", "model.generation_head."),
    (r"^gen_vision_model\.encoder\.conv_blocks\.", "model.vqmodel.encoder.down."),
    (r"^gen_vision_model\.decoder\.conv_blocks\.", "model.vqmodel.decoder.up."),
    (r"^gen_vision_model\.", "model.vqmodel."),
    (r"^(model\.vqmodel\..*\.)res\.", r"\1block."),
    (r"^(model\.vqmodel\..*\.)mid\.0\.", r"\1mid.block_1."),
    (r"^(model\.vqmodel\..*\.)mid\.1\.", r"\1mid.attn_1."),
    (r"^(model\.vqmodel\..*\.)mid\.2\.", r"\1mid.block_2."),
)  # fmt: skip
UNUSED = re.compile(r"attn_pool\.|codebook_used$")  # upstream computes neither in generation nor in understanding


def read_weights(folder: Path, allow_pickle: bool) -> Weights:
    """Upstream's tensors by name, memory-mapped; UserError where there are only pickles and they are not allowed."""
    safe, pickled = sorted(folder.glob("*.safetensors")), sorted(folder.glob("pytorch_model*.bin"))
    if not safe and not pickled:
        raise UserError(f"{folder}: neither *.safetensors nor pytorch_model*.bin; give the folder of upstream's checkpoint")
    if not safe and not allow_pickle:
        raise UserError(f"{folder}: {pickled[0].name} is a pickle; add --allow-pickle if you trust where it comes from")
    weights: Weights = {}
    for path in safe or pickled:
        weights |= load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return weights


def renamed(weights: Weights) -> Weights:
    """transformers' names; fused query, key and value split."""
    result: Weights = {}
    for name, tensor in weights.items():
        if UNUSED.search(name):
            continue
        new = name
        for pattern, replacement in NAMES:
            new = re.sub(pattern, replacement, new)
        if ".qkv." in new:
            result |= {
                new.replace("qkv", part): t for part, t in zip(("q_proj", "k_proj", "v_proj"), tensor.chunk(3), strict=True)
            }
        else:
            result[new] = tensor.squeeze(0) if new.endswith("position_embedding.weight") else tensor
    return result


def make_config(fields: dict[str, Any], weights: Weights, tokenizer: PreTrainedTokenizerFast) -> JanusConfig:
    """Geometry from upstream's config.json for the language model, whose defaults are LLaMA's, and from the tensors else."""
    given = {
        k: v for k, v in fields["language_config"].items() if k not in ("model_type", "torch_dtype", "_attn_implementation")
    }
    text = LlamaConfig(
        **given,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )
    tower = "vision_model.vision_tower."
    patch = weights[tower + "patch_embed.proj.weight"]
    blocks = {name.split(".")[3] for name in weights if name.startswith(tower + "blocks.")}
    size = fields["vision_config"]["params"]["image_size"]
    vision = JanusVisionConfig(
        hidden_size=patch.shape[0],
        num_hidden_layers=len(blocks),
        num_attention_heads=patch.shape[0] // HEAD_DIM,
        mlp_ratio=weights[tower + "blocks.0.mlp.fc1.weight"].shape[0] / patch.shape[0],
        image_size=size,
        patch_size=patch.shape[-1],
        num_image_tokens=(size // patch.shape[-1]) ** 2,
        projection_dim=text.hidden_size,
    )
    codes, width = weights["gen_embed.weight"].shape
    vq = JanusVQVAEConfig(
        embed_dim=width,
        num_embeddings=codes,
        latent_channels=weights["gen_vision_model.post_quant_conv.weight"].shape[0],
        base_channels=weights["gen_vision_model.encoder.conv_in.weight"].shape[0],
        projection_dim=text.hidden_size,
        image_token_embed_dim=weights["gen_head.output_mlp_projector.weight"].shape[0],
        num_patches=size // patch.shape[-1],
    )
    placeholder = tokenizer.convert_tokens_to_ids("<image_placeholder>")
    return JanusConfig(
        text_config=text, vision_config=vision, vq_config=vq, image_token_id=placeholder, tie_word_embeddings=False
    )


def make_processor(folder: Path, image_size: int, image_tokens: int) -> JanusProcessor:
    tags = {"image_token": "<image_placeholder>", "boi_token": "<begin_of_image>", "eoi_token": "<end_of_image>"}
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, extra_special_tokens=tags, local_files_only=True)
    fields = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
    known = {
        name: fields[name]
        for name in ("do_normalize", "image_mean", "image_std", "min_size", "rescale_factor")
        if name in fields
    }
    images = JanusImageProcessorPil(size={"height": image_size, "width": image_size}, **known)
    return JanusProcessor(
        images, tokenizer, chat_template=CHAT_TEMPLATE, use_default_system_prompt=True, num_image_tokens=image_tokens
    )


# --- upstream's operations, on upstream's names ----------------------------------------------------------------------


class Upstream:
    """What upstream computes from these tensors (janus/models/ modeling_vlm.py, siglip_vit.py, vq_model.py)."""

    def __init__(self, weights: Weights, config: LlamaConfig) -> None:
        self.weights = weights
        with torch.device("meta"):
            llm = LlamaModel(config)
        prefix = "language_model.model."
        llm.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}, assign=True)
        llm.rotary_emb = type(llm.rotary_emb)(config)  # a buffer, computed and not stored
        self.llm = llm.eval()

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weights[name + ".weight"], self.weights.get(name + ".bias"))

    def conv(self, name: str, x: torch.Tensor, **keywords: Any) -> torch.Tensor:
        return F.conv2d(x, self.weights[name + ".weight"], self.weights.get(name + ".bias"), **keywords)

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weights[name + ".weight"], self.weights[name + ".bias"], 1e-6)

    def projected(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return self.linear(f"{name}.layers.2", F.gelu(self.linear(f"{name}.layers.0", x)))

    def look(self, pixels: torch.Tensor) -> torch.Tensor:
        tower = "vision_model.vision_tower"
        weight = self.weights[f"{tower}.patch_embed.proj.weight"]
        x = self.conv(f"{tower}.patch_embed.proj", pixels, stride=weight.shape[-1]).flatten(2).transpose(1, 2)
        x = x + self.weights[f"{tower}.pos_embed"]
        block = 0
        while f"{tower}.blocks.{block}.norm1.weight" in self.weights:
            at = f"{tower}.blocks.{block}"
            qkv = self.linear(f"{at}.attn.qkv", self.norm(f"{at}.norm1", x))
            q, k, v = qkv.unflatten(-1, (3, -1, HEAD_DIM)).permute(2, 0, 3, 1, 4)
            mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            x = x + self.linear(f"{at}.attn.proj", mixed)
            x = x + self.linear(f"{at}.mlp.fc2", F.gelu(self.linear(f"{at}.mlp.fc1", self.norm(f"{at}.norm2", x))))
            block += 1
        return self.projected("aligner", self.norm(f"{tower}.norm", x))

    def text_logits(self, pixels: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        inputs = torch.cat([self.look(pixels), self.llm.embed_tokens(ids)], 1)
        return self.linear("language_model.lm_head", self.llm(inputs_embeds=inputs).last_hidden_state[:, -1])

    def image_logits(self, ids: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        drawn = self.projected("gen_aligner", self.weights["gen_embed.weight"][codes])
        hidden = self.llm(inputs_embeds=torch.cat([self.llm.embed_tokens(ids), drawn], 1)).last_hidden_state[:, -1]
        return self.linear("gen_head.vision_head", F.gelu(self.linear("gen_head.output_mlp_projector", hidden)))

    def group(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.group_norm(x, 32, self.weights[name + ".weight"], self.weights[name + ".bias"], 1e-6)

    def residual(self, name: str, x: torch.Tensor) -> torch.Tensor:
        h = self.conv(f"{name}.conv1", F.silu(self.group(f"{name}.norm1", x)), padding=1)
        h = self.conv(f"{name}.conv2", F.silu(self.group(f"{name}.norm2", h)), padding=1)
        shortcut = f"{name}.nin_shortcut"
        return h + (self.conv(shortcut, x) if f"{shortcut}.weight" in self.weights else x)

    def attend(self, name: str, x: torch.Tensor) -> torch.Tensor:
        h = self.group(f"{name}.norm", x)
        q, k, v = (self.conv(f"{name}.{part}", h).flatten(2).transpose(1, 2) for part in "qkv")
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        return x + self.conv(f"{name}.proj_out", mixed)

    def paint(self, codes: torch.Tensor, side: int) -> torch.Tensor:
        """Codes int64 `[n, side * side]` to pixels `[n, 3, h, w]` in [-1, 1]."""
        decoder = "gen_vision_model.decoder"
        book = F.normalize(self.weights["gen_vision_model.quantize.embedding.weight"], dim=-1)
        x = self.conv("gen_vision_model.post_quant_conv", book[codes].unflatten(1, (side, side)).permute(0, 3, 1, 2))
        x = self.residual(f"{decoder}.mid.0", self.conv(f"{decoder}.conv_in", x, padding=1))
        x = self.residual(f"{decoder}.mid.2", self.attend(f"{decoder}.mid.1", x))
        level = 0
        while f"{decoder}.conv_blocks.{level}.res.0.norm1.weight" in self.weights:
            at, place = f"{decoder}.conv_blocks.{level}", 0
            while f"{at}.res.{place}.norm1.weight" in self.weights:
                x = self.residual(f"{at}.res.{place}", x)
                if f"{at}.attn.{place}.norm.weight" in self.weights:
                    x = self.attend(f"{at}.attn.{place}", x)
                place += 1
            if f"{at}.upsample.conv.weight" in self.weights:
                x = self.conv(f"{at}.upsample.conv", F.interpolate(x, scale_factor=2.0, mode="nearest"), padding=1)
            level += 1
        return self.conv(f"{decoder}.conv_out", F.silu(self.group(f"{decoder}.norm_out", x)), padding=1)


@torch.no_grad()
def largest_difference(model: JanusForConditionalGeneration, upstream: Upstream) -> dict[str, float]:
    """Relative to the largest value: text logits after a picture, image logits after codes, decoded pixels."""
    generator = torch.Generator().manual_seed(0)
    config, dtype = model.config, model.dtype
    size, side = config.vision_config.image_size, model.model.vqmodel.config.num_patches
    pixels = (torch.rand(1, 3, size, size, generator=generator) * 2 - 1).to(dtype)
    ids = torch.randint(config.text_config.vocab_size, (1, 12), generator=generator)
    codes = torch.randint(config.vq_config.num_embeddings, (1, side * side), generator=generator)
    embed = model.get_input_embeddings()
    seen = torch.cat(
        [model.model.get_image_features(pixels).pooler_output.reshape(1, -1, embed.weight.shape[1]), embed(ids)], 1
    )
    drawn = torch.cat([embed(ids), model.prepare_embeddings_for_image_generation(codes[:, :9])], 1)
    llm = model.model.language_model
    pairs = {
        "text logits": (model.lm_head(llm(inputs_embeds=seen).last_hidden_state[:, -1]), upstream.text_logits(pixels, ids)),
        "image logits": (
            model.model.generation_head(llm(inputs_embeds=drawn).last_hidden_state[:, -1]),
            upstream.image_logits(ids, codes[:, :9]),
        ),
        "pixels": (model.decode_image_tokens(codes).permute(0, 3, 1, 2), upstream.paint(codes, side)),
    }
    return {name: ((one - two).abs().max() / two.abs().max()).item() for name, (one, two) in pairs.items()}


def convert(folder: Path, out: Path, allow_pickle: bool) -> dict[str, float]:
    """Write `out`, whole or not at all; returns the largest differences. UserError where the result would be another model."""
    for name in ("config.json", "tokenizer.json", "preprocessor_config.json"):
        if not (folder / name).is_file():
            raise UserError(f"{folder / name}: not found; give the folder of upstream's checkpoint, with all its files")
    if out.exists():
        raise UserError(f"{out}: exists; give another --out")
    fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if fields.get("model_type") != "multi_modality":
        raise UserError(f"{folder}/config.json: model_type is {fields.get('model_type')!r}, upstream's is 'multi_modality'")
    weights = read_weights(folder, allow_pickle)
    dtype = weights["gen_embed.weight"].dtype
    size = fields["vision_config"]["params"]["image_size"]
    patch = weights["vision_model.vision_tower.patch_embed.proj.weight"].shape[-1]
    processor = make_processor(folder, size, (size // patch) ** 2)
    config = make_config(fields, weights, processor.tokenizer)
    model = JanusForConditionalGeneration._from_config(config, dtype=dtype).eval()
    missing, unexpected = model.load_state_dict(renamed(weights), strict=False, assign=True)
    if missing or unexpected:
        raise UserError(
            f"{folder}: not a Janus-Pro: missing {missing[:3]}, unknown {unexpected[:3]}; Janus-Pro-1B and 7B convert"
        )
    found = largest_difference(model, Upstream(weights, config.text_config))
    allowed = 1e-4 if dtype == torch.float32 else 3e-2
    wrong = {name: value for name, value in found.items() if not value <= allowed}
    if wrong:
        raise UserError(f"{folder}: the converted model does not compute what upstream does ({wrong}); nothing was written")
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    processor.save_pretrained(temporary)
    temporary.rename(out)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upstream", type=Path, required=True, help="folder in upstream's layout")
    parser.add_argument("--out", type=Path, required=True, help="folder to write, in the layout of transformers")
    parser.add_argument("--allow-pickle", action="store_true", help="read pytorch_model*.bin; only from a source you trust")
    arguments = parser.parse_args()
    found = convert(arguments.upstream, arguments.out, arguments.allow_pickle)
    print(f"{arguments.out}: " + ", ".join(f"{name} within {value:.1e}" for name, value in found.items()) + " of upstream's")


if __name__ == "__main__":
    run_stage(main)
