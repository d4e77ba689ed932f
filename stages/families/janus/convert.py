"""Convert a Janus-Pro checkpoint from upstream's layout (deepseek-ai/Janus-Pro-1B, -7B) to that of transformers.

    python -m stages.families.janus.convert --upstream Janus-Pro-7B --out checkpoints/Janus-Pro-7B --allow-pickle

Upstream ships pickles; they are read with `weights_only`, and only where --allow-pickle says that their source is trusted.
The geometry comes from config.json and from what upstream's code fixes, never from the tensors, which must fit it. The result
is checked before it is put in place: text logits after a picture, image logits and decoded pixels must equal those that
upstream's own operations (deepseek-ai/Janus, janus/models/) give on the tensors as they came. Both sides compute in float32,
layer by layer, so that weights in bfloat16 are checked as exactly and need no second copy in memory. The VQ encoder, which
this project does not use, is converted only by name and shape.
"""

from __future__ import annotations

import argparse
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from tokenizers import Tokenizer
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
from transformers import (
    JanusConfig,
    JanusForConditionalGeneration,
    JanusImageProcessorPil,
    JanusProcessor,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
)
from transformers import __version__ as transformers_version
from transformers.models.janus.configuration_janus import JanusVisionConfig, JanusVQVAEConfig

from stages.common.errors import UserError, run_stage
from stages.common.files import aside
from stages.families.janus.family import ASSISTANT, CHAT_TEMPLATE, USER
from stages.families.tools.conversion import Operations, Weights, look_up, read_json, read_weights

TAGS = {"image_token": "<image_placeholder>", "boi_token": "<begin_of_image>", "eoi_token": "<end_of_image>"}
ALLOWED = 2e-4  # relative; two orders of float32 sums differ by 2.3e-5 at most over 12 sets of codes at 384 px
REMEDY = "fetch the checkpoint again; Janus-Pro-1B and 7B convert"


@dataclass(frozen=True)
class Geometry:
    """What upstream's code fixes (janus/models/ siglip_vit.py under siglip_large_patch16_384, vq_model.py under VQ-16)."""

    width: int = 1024  # of the vision tower
    blocks: int = 24
    heads: int = 16
    patch: int = 16
    channels: int = 128  # of the VQ model at full resolution
    latent: int = 256
    codes: int = 16384
    code_width: int = 8


JANUS_PRO = Geometry()
# Fields of config.json that change what upstream computes from the same tensors. None: absent.
REQUIRED: dict[str, object] = {
    "vision_config.params.model_name": "siglip_large_patch16_384",
    "vision_config.params.select_layer": -1,
    "vision_config.params.pixel_mean": None,
    "vision_config.params.pixel_std": None,
}

TOWER, VISION = "vision_model.vision_tower", r"^model\.vision_model"
NAMES = (  # transformers' name, upstream's name; all that match are applied, in order
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.language_model\.", "language_model.model."),
    (VISION + r"\.embeddings\.position_embedding\.weight$", TOWER + ".pos_embed"),
    (VISION + r"\.embeddings\.patch_embedding\.", TOWER + ".patch_embed.proj."),
    (VISION + r"\.post_layernorm\.", TOWER + ".norm."),
    (VISION + r"\.encoder\.layers\.", TOWER + ".blocks."),
    (r"(\.blocks\.\d+)\.self_attn\.projection_layer\.", r"\1.attn.proj."),
    (r"(\.blocks\.\d+)\.self_attn\.[qkv]_proj\.", r"\1.attn.qkv."),
    (r"(\.blocks\.\d+)\.layer_norm(\d)\.", r"\1.norm\2."),
    (r"^model\.aligner\.fc1\.", "aligner.layers.0."),
    (r"^model\.aligner\.hidden_layers\.0\.", "aligner.layers.2."),
    (r"^model\.generation_aligner\.fc1\.", "gen_aligner.layers.0."),
    (r"^model\.generation_aligner\.hidden_layers\.0\.", "gen_aligner.layers.2."),
    (r"^model\.generation_embeddings\.", "gen_embed."),
    (r"^model\.generation_head\.proj_out\.", "gen_head.output_mlp_projector."),
    (r"^model\.generation_head\.", "gen_head."),
    (r"^model\.vqmodel\.encoder\.down\.", "gen_vision_model.encoder.conv_blocks."),
    (r"^model\.vqmodel\.decoder\.up\.", "gen_vision_model.decoder.conv_blocks."),
    (r"^model\.vqmodel\.", "gen_vision_model."),
    (r"^(gen_vision_model\..*\.)block\.", r"\1res."),
    (r"^(gen_vision_model\..*\.)mid\.block_1\.", r"\1mid.0."),
    (r"^(gen_vision_model\..*\.)mid\.attn_1\.", r"\1mid.1."),
    (r"^(gen_vision_model\..*\.)mid\.block_2\.", r"\1mid.2."),
)  # fmt: skip
UNUSED = re.compile(r"attn_pool\.|codebook_used$")  # upstream computes neither in generation nor in understanding


# --- what it must be ---------------------------------------------------------------------------------------------------


def read_config(path: Path) -> dict[str, Any]:
    """Upstream's config.json. UserError where it says that the same tensors would compute something else."""
    fields = read_json(path)
    if fields.get("model_type") != "multi_modality":
        raise UserError(f"{path}: model_type is {fields.get('model_type')!r}, upstream's is 'multi_modality'")
    for section in ("language_config", "vision_config"):
        if not isinstance(fields.get(section), dict):
            raise UserError(f"{path}: {section} is missing; {REMEDY}")
    for name, wanted in REQUIRED.items():
        if (found := look_up(fields, name)) != wanted:
            raise UserError(f"{path}: {name} is {found!r}, but Janus-Pro's is {wanted!r}; Janus-Pro-1B and 7B convert")
    return fields


def make_config(path: Path, geometry: Geometry, tokenizer: PreTrainedTokenizerFast) -> JanusConfig:
    """From upstream's config.json at `path`, whose defaults for the language model are LLaMA's, and from the geometry."""
    fields = read_config(path)
    size = look_up(fields, "vision_config.params.image_size")
    if not isinstance(size, int) or size < geometry.patch or size % geometry.patch:
        raise UserError(f"{path}: vision_config.params.image_size is {size!r}, not a multiple of {geometry.patch}; {REMEDY}")
    given = {
        name: value
        for name, value in fields["language_config"].items()
        if name not in ("model_type", "torch_dtype", "dtype", "_attn_implementation")
    }
    if given.pop("tie_word_embeddings", False):
        raise UserError(f"{path}: language_config.tie_word_embeddings is true, but Janus-Pro's text head has weights; {REMEDY}")
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    for name, wanted in ids.items():
        if (found := given.pop(name, None)) not in (None, wanted):
            raise UserError(
                f"{path}: language_config.{name} is {found!r}, but the tokenizer's is {wanted}; remove the field, "
                "or fetch the tokenizer's files that belong to this checkpoint"
            )
    try:
        text = LlamaConfig(**given, **ids, tie_word_embeddings=False)
    except (ArithmeticError, TypeError, ValueError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: language_config is not LLaMA's ({reason}); {REMEDY}") from None
    for name in ("image_token_embed", "n_embed"):
        if (found := look_up(fields, f"gen_head_config.params.{name}")) not in (None, text.hidden_size):
            raise UserError(
                f"{path}: gen_head_config.params.{name} is {found!r}, but language_config.hidden_size is {text.hidden_size}; "
                "transformers' Janus has one width for both, as Janus-Pro-1B and 7B have"
            )
    side = size // geometry.patch
    vision = JanusVisionConfig(
        hidden_size=geometry.width,
        num_hidden_layers=geometry.blocks,
        num_attention_heads=geometry.heads,
        image_size=size,
        patch_size=geometry.patch,
        num_image_tokens=side * side,
        projection_dim=text.hidden_size,
    )
    vq = JanusVQVAEConfig(
        embed_dim=geometry.code_width,
        num_embeddings=geometry.codes,
        latent_channels=geometry.latent,
        base_channels=geometry.channels,
        projection_dim=text.hidden_size,
        image_token_embed_dim=text.hidden_size,
        num_patches=side,
    )
    placeholder = tokenizer.convert_tokens_to_ids(TAGS["image_token"])
    return JanusConfig(
        text_config=text, vision_config=vision, vq_config=vq, image_token_id=placeholder, tie_word_embeddings=False
    )


def make_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Upstream's tokenizer, with a post-processor that adds BOS, for plain transformers."""
    path = folder / "tokenizer.json"
    broken = f"{path}: the tokenizer does not load ({{}}); fetch it and tokenizer_config.json again"
    try:
        raw = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing more specific
        raise UserError(broken.format(error)) from None
    for token in (*TAGS.values(), USER, ASSISTANT):  # transformers would add them, without rows in the model's embedding
        if raw.token_to_id(token) is None:
            raise UserError(f"{path}: has no token {token}; fetch the tokenizer's files that belong to this checkpoint")
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(
            folder, extra_special_tokens=TAGS, add_bos_token=True, local_files_only=True
        )
    except (OSError, TypeError, ValueError) as error:
        raise UserError(broken.format(error)) from None
    if tokenizer.bos_token_id is None:
        raise UserError(f"{folder}/tokenizer_config.json: names no bos_token; fetch it again")
    return tokenizer


def make_processor(path: Path, tokenizer: PreTrainedTokenizerFast, size: int, image_tokens: int) -> JanusProcessor:
    """From upstream's preprocessor_config.json at `path`."""
    fields = read_json(path)
    if fields.get("image_size", size) != size:
        raise UserError(
            f"{path}: image_size is {fields['image_size']!r}, but vision_config.params.image_size of config.json is {size}; "
            "fetch both again"
        )
    known = {
        name: fields[name]
        for name in ("do_normalize", "image_mean", "image_std", "min_size", "rescale_factor")
        if name in fields
    }
    images = JanusImageProcessorPil(size={"height": size, "width": size}, **known)
    return JanusProcessor(
        images, tokenizer, chat_template=CHAT_TEMPLATE, use_default_system_prompt=True, num_image_tokens=image_tokens
    )


def upstream_name(name: str) -> str:
    """Upstream's name of the tensor that is or contains one of transformers'."""
    for pattern, replacement in NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def converted(model: JanusForConditionalGeneration, weights: Weights, files: dict[str, str], folder: Path) -> Weights:
    """Upstream's tensors under the names of `model`, whose own may be without memory; fused query, key and value split.

    UserError where a tensor is missing, has another shape or is none of the model's.
    """
    result: Weights = {}
    known = set()
    for name, wanted in model.state_dict().items():
        theirs = upstream_name(name)
        known.add(theirs)
        if theirs not in weights:
            raise UserError(f"{folder}: no tensor {theirs} in {', '.join(sorted(set(files.values())))}; {REMEDY}")
        shape, tensor = list(wanted.shape), weights[theirs]
        if fused := ".attn.qkv." in theirs:
            shape[0] *= 3
        if positions := theirs.endswith(".pos_embed"):
            shape.insert(0, 1)
        if list(tensor.shape) != shape or not tensor.is_floating_point():
            found = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
            raise UserError(
                f"{folder / files[theirs]}: {theirs} is {found}, but config.json and upstream's code ask for floats {shape}; "
                f"{REMEDY}"
            )
        if fused:
            tensor = tensor.chunk(3)["qkv".index(name.split(".")[-2][0])]
        result[name] = tensor.squeeze(0) if positions else tensor
    if unknown := sorted(name for name in weights if name not in known and not UNUSED.search(name)):
        raise UserError(f"{folder / files[unknown[0]]}: Janus-Pro has no tensor {unknown[0]} ({len(unknown)} such); {REMEDY}")
    return result


def empty_model(path: Path, config: JanusConfig) -> JanusForConditionalGeneration:
    """The model without memory for its weights: initialising 7B at random takes minutes and 14 GiB."""
    try:
        with torch.device("meta"):
            return JanusForConditionalGeneration(config).eval()
    except (ArithmeticError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: language_config does not describe a LLaMA ({error!r}); {REMEDY}") from None


def fill(model: JanusForConditionalGeneration, weights: Weights) -> None:
    """Give an empty model its weights, which are not copied, their type, and what is computed and not stored."""
    model.load_state_dict(weights, assign=True)
    for config in (model.config, model.config.text_config, model.config.vision_config, model.config.vq_config):
        config.dtype = model.lm_head.weight.dtype
    llm, embeddings = model.model.language_model, model.model.vision_model.embeddings
    llm.rotary_emb = type(llm.rotary_emb)(llm.config)
    embeddings.position_ids = torch.arange(embeddings.num_positions)[None]
    if empty := [name for name, buffer in model.named_buffers() if buffer.is_meta]:
        raise UserError(
            f"transformers {transformers_version} computes {empty[0]}, which is unknown here; install the pinned version"
        )


class Float32(TorchFunctionMode):
    """Inside, layers compute in float32 whatever the type of their weights, which are widened for one call at a time.

    Comparing in bfloat16 would need a bound above the noise of two orders of summation, which hides real differences, and
    on a CPU without instructions for bfloat16 its convolutions are a hundred times slower.
    """

    LAYERS = (F.linear, F.conv2d, F.layer_norm, F.group_norm)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in self.LAYERS:
            args, kwargs = tree_map(widened, (args, kwargs))
        result = function(*args, **kwargs)
        return widened(result) if function is F.embedding else result


def widened(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


# --- upstream's operations, on upstream's names ----------------------------------------------------------------------


class Upstream(Operations):
    """What upstream computes from these tensors (janus/models/ modeling_vlm.py, siglip_vit.py, vq_model.py)."""

    def __init__(self, weights: Weights, config: LlamaConfig, geometry: Geometry) -> None:
        self.weights = weights
        self.geometry = geometry
        with torch.device("meta"):
            llm = LlamaModel(config)
        prefix = "language_model.model."
        llm.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}, assign=True)
        llm.rotary_emb = type(llm.rotary_emb)(config)  # a buffer, computed and not stored
        self.llm = llm.eval()

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weights[name + ".weight"], self.weights[name + ".bias"], 1e-6)

    def projected(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return self.linear(f"{name}.layers.2", F.gelu(self.linear(f"{name}.layers.0", x)))

    def look(self, pixels: torch.Tensor) -> torch.Tensor:
        x = self.conv(f"{TOWER}.patch_embed.proj", pixels, stride=self.geometry.patch).flatten(2).transpose(1, 2)
        x = x + self.weights[f"{TOWER}.pos_embed"]
        for block in range(self.geometry.blocks):
            at = f"{TOWER}.blocks.{block}"
            qkv = self.linear(f"{at}.attn.qkv", self.norm(f"{at}.norm1", x))
            q, k, v = qkv.unflatten(-1, (3, self.geometry.heads, -1)).permute(2, 0, 3, 1, 4)
            mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            x = x + self.linear(f"{at}.attn.proj", mixed)
            x = x + self.linear(f"{at}.mlp.fc2", F.gelu(self.linear(f"{at}.mlp.fc1", self.norm(f"{at}.norm2", x))))
        return self.projected("aligner", self.norm(f"{TOWER}.norm", x))

    def text_logits(self, pixels: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        inputs = torch.cat([self.look(pixels), self.llm.embed_tokens(ids)], 1)
        return self.linear("language_model.lm_head", self.llm(inputs_embeds=inputs).last_hidden_state[:, -1])

    def image_logits(self, ids: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        drawn = self.projected("gen_aligner", self.weights["gen_embed.weight"][codes])
        hidden = self.llm(inputs_embeds=torch.cat([self.llm.embed_tokens(ids), drawn], 1)).last_hidden_state[:, -1]
        return self.linear("gen_head.vision_head", F.gelu(self.linear("gen_head.output_mlp_projector", hidden)))

    def attend(self, name: str, x: torch.Tensor) -> torch.Tensor:
        h = self.group(f"{name}.norm", x)
        q, k, v = (self.conv(f"{name}.{part}", h).flatten(2).transpose(1, 2) for part in "qkv")
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        return x + self.conv(f"{name}.proj_out", mixed)

    def paint(self, codes: torch.Tensor, side: int) -> torch.Tensor:
        """Codes int64 `[n, side * side]` to pixels `[n, 3, h, w]` in [-1, 1]."""
        decoder = "gen_vision_model.decoder"
        book = F.normalize(self.weights["gen_vision_model.quantize.embedding.weight"].float(), dim=-1)
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
    """Relative to the largest value: text logits after a picture, image logits after codes, decoded pixels; in float32."""
    generator = torch.Generator().manual_seed(0)
    config = model.config
    size, side = config.vision_config.image_size, model.model.vqmodel.config.num_patches
    # Values that bfloat16 has too, because transformers casts pictures to the type of the tower's weights.
    pixels = torch.randint(-128, 129, (1, 3, size, size), generator=generator) / 128
    ids = torch.randint(config.text_config.vocab_size, (1, 12), generator=generator)
    codes = torch.randint(config.vq_config.num_embeddings, (1, side * side), generator=generator)
    with Float32():
        text = model.get_input_embeddings()(ids)
        seen = torch.cat([model.model.get_image_features(pixels).pooler_output.reshape(1, -1, text.shape[-1]), text], 1)
        drawn = torch.cat([text, model.prepare_embeddings_for_image_generation(codes[:, :9])], 1)
        llm, head = model.model.language_model, model.model.generation_head
        pairs = {
            "text logits": (model.lm_head(llm(inputs_embeds=seen).last_hidden_state[:, -1]), upstream.text_logits(pixels, ids)),
            "image logits": (head(llm(inputs_embeds=drawn).last_hidden_state[:, -1]), upstream.image_logits(ids, codes[:, :9])),
            "pixels": (model.decode_image_tokens(codes).permute(0, 3, 1, 2), upstream.paint(codes, side)),
        }
    return {name: ((one - two).abs().max() / two.abs().max()).item() for name, (one, two) in pairs.items()}


def convert(folder: Path, out: Path, allow_pickle: bool, geometry: Geometry = JANUS_PRO) -> dict[str, float]:
    """Write `out`, whole or not at all; returns the largest differences. UserError where the result would be another model.

    geometry: Janus-Pro's; tests give a small one.
    """
    if out.exists():
        raise UserError(f"{out}: exists; give another --out")
    read_config(folder / "config.json")  # first, because in another model's folder the rest would complain of less
    weights, files = read_weights(folder, allow_pickle)
    tokenizer = make_tokenizer(folder)
    config = make_config(folder / "config.json", geometry, tokenizer)
    vision = config.vision_config
    processor = make_processor(folder / "preprocessor_config.json", tokenizer, vision.image_size, vision.num_image_tokens)
    model = empty_model(folder / "config.json", config)
    fill(model, converted(model, weights, files, folder))
    found = largest_difference(model, Upstream(weights, config.text_config, geometry))
    wrong = {name: value for name, value in found.items() if not value <= ALLOWED}
    if wrong:
        raise UserError(f"{folder}: the converted model does not compute what upstream does ({wrong}); nothing was written")
    temporary = aside(out)
    try:
        model.save_pretrained(temporary)
        processor.save_pretrained(temporary)
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
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
