"""A vision-language model as judge: any image-text-to-text model of transformers, from a local checkpoint folder.

The image and the question are one turn of the model's own chat template. Mode p_yes reads the first answer token:
P(yes) / (P(yes) + P(no)), each summed over the spellings that are single tokens (as VQAScore does for yes alone,
arXiv 2404.01291). Mode answer generates greedily and parses the text as `stages.score` does.

Models whose image processor returns a grid of patches (the Qwen-VL line) are prepared here with the tokenizer and the image
processor alone, because their processor needs torchvision for videos. Other models use their own processor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from stages.common.errors import UserError
from stages.common.settings import Device, Positive
from stages.families import resolved
from stages.families.tools.checkpoints import read_config, require_safetensors
from stages.families.tools.verdicts import single_tokens
from stages.judges.asking import AskedJudge, graded, read
from stages.judges.base import Item, Judge, JudgeKind, Verdict
from stages.judges.checkpoint import runs_on

if TYPE_CHECKING:
    import torch

YES = ("yes", "Yes", "YES", " yes", " Yes", " YES", "▁yes", "▁Yes", "▁YES")  # ▁ is a space in SentencePiece vocabularies
NO = ("no", "No", "NO", " no", " No", " NO", "▁no", "▁No", "▁NO")
PARTS = ("*.json", "*.jinja", "*.safetensors", "merges.txt", "vocab.txt", "*.model")  # of a checkpoint in transformers' layout
Prepare = Callable[[Sequence[Item]], Any]  # from items to the model's inputs, padded on the left


class VlmJudge(AskedJudge):
    kind: Literal["vlm"]
    checkpoint: str = Field(
        description="The folder of an image-text-to-text model in transformers' layout, such as Qwen2.5-VL-7B-Instruct, on a "
        "file system that every machine of the run sees. Only safetensors are read."
    )
    device: Device = Field(default="auto", description="auto, cpu, cuda, or one device such as cuda:0.")
    workers: Positive | None = Field(
        default=None,
        description="How many processes share the batches of one shard, one GPU each. Empty: one for each visible GPU.",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="The type of weights and activations. auto is bfloat16 on a GPU and float32 on a CPU."
    )
    batch_size: Positive = Field(default=16, description="Images that are judged together. Lower it if memory runs out.")

    def outcome(self) -> dict[str, Any]:
        return self.model_dump(exclude={"checkpoint", "device", "workers", "batch_size"})


def files(settings: VlmJudge) -> list[str]:
    """Return the files of the checkpoint. Raises UserError when the folder does not hold a model with its preprocessing."""
    folder = Path(settings.checkpoint)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such checkpoint folder; set checkpoint of this judge in the section judges")
    if not isinstance(read_config(folder).get("model_type"), str):
        raise UserError(f"{folder}/config.json: not a model configuration with a model_type; fetch the checkpoint again")
    require_safetensors(folder)
    for names in (("preprocessor_config.json", "processor_config.json"), ("tokenizer_config.json",)):
        if not any((folder / name).exists() for name in names):
            raise UserError(f"{folder}/{names[0]}: not found; fetch the checkpoint again, with all its small files")
    return sorted(str(path) for pattern in PARTS for path in folder.glob(pattern))


def open_vlm(settings: VlmJudge) -> Judge:
    """Load the model. Raises UserError with the folder and the remedy when it is no image-text-to-text model."""
    import torch
    from safetensors import SafetensorError
    from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer, GenerationConfig
    from transformers.utils.logging import disable_progress_bar

    from stages.common.batches import planned

    disable_progress_bar()  # of loading weights; stages have their own
    files(settings)
    folder = settings.checkpoint
    place = resolved(runs_on(settings), "device")
    device = place.device
    local = {"local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", **local)
        pixels = AutoImageProcessor.from_pretrained(folder, backend="pil", **local)
        model, loaded = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=getattr(torch, place.dtype), use_safetensors=True, output_loading_info=True, **local
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{folder}: cannot be loaded as an image-text-to-text model ({reason}); set checkpoint of this judge "
            "to the folder of such a model, whole and in transformers' layout"
        ) from None
    if missing := sorted(loaded["missing_keys"]):  # transformers gives them random values
        raise UserError(f"{folder}: the weights lack {missing[0]} and {len(missing) - 1} more; fetch the checkpoint again")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.to(device).eval()
    ends = model.generation_config.eos_token_id or tokenizer.eos_token_id
    # A checkpoint's own generation settings may sample or penalise repetition; greedy is without both.
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=settings.max_new_tokens,
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id,
    )
    yes, no = (torch.tensor(single_tokens(tokenizer, spellings), device=device) for spellings in (YES, NO))
    if settings.mode == "p_yes" and not (len(yes) and len(no)):
        raise UserError(f"{folder}: its tokenizer has no single token for yes or for no; set mode of this judge to answer")
    prepare = by_grid(settings, tokenizer, pixels, model.config) if hasattr(pixels, "merge_size") else by_processor(settings)

    @torch.no_grad()
    def judge(items: Sequence[Item]) -> list[Verdict]:
        verdicts: list[Verdict] = []
        for batch in planned(items, settings.batch_size):
            inputs = prepare(batch)
            inputs = {
                key: value.to(device, model.dtype if value.is_floating_point() else None) for key, value in inputs.items()
            }
            if settings.mode == "answer":
                told = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
                verdicts += [read(text) for text in tokenizer.batch_decode(told, skip_special_tokens=True)]
                continue
            logits = model(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1]
            chances = logits.double().softmax(-1)
            pairs = zip(chances[:, yes].sum(1).tolist(), chances[:, no].sum(1).tolist(), strict=True)
            verdicts += [graded(says_yes, says_no, settings.threshold) for says_yes, says_no in pairs]
        return verdicts

    return judge


def turns(question: str, **image: Any) -> list[dict[str, Any]]:
    """Return the conversation: one turn with the image and the question."""
    return [{"role": "user", "content": [{"type": "image", **image}, {"type": "text", "text": question}]}]


def by_grid(settings: VlmJudge, tokenizer: Any, pixels: Any, config: Any) -> Prepare:
    """Return how a model of the Qwen-VL line is prepared: a placeholder in the text becomes one token for each merged patch.

    An image of t x h x w patches has t h w / merge_size^2 tokens. mm_token_type_ids (1 at image tokens) give the positions
    of M-RoPE; without them the model runs and is slightly wrong. pixel_values is flat over the images of a batch.
    """
    import torch

    placeholder = tokenizer.convert_ids_to_tokens(config.image_token_id)

    def prepare(items: Sequence[Item]) -> dict[str, torch.Tensor]:
        seen, texts = [], []
        for item in items:
            picture = pictured(item, pixels)
            count = int(picture["image_grid_thw"][0].prod()) // pixels.merge_size**2
            conversation = turns(settings.asked(item.prompt["prompt"]))
            text = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
            if (found := text.count(placeholder)) != 1:
                raise UserError(
                    f"{settings.checkpoint}: candidate {item.candidate_id}: the chat template gives {found} {placeholder} for "
                    f"one image; fetch chat_template.jinja again, and keep {placeholder} out of prompts and question"
                )
            seen.append(picture)
            texts.append(text.replace(placeholder, placeholder * count))
        inputs = dict(tokenizer(texts, padding=True, add_special_tokens=False, return_tensors="pt"))
        inputs.pop("token_type_ids", None)
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == config.image_token_id).long()
        return inputs | {key: torch.cat([picture[key] for picture in seen]) for key in ("pixel_values", "image_grid_thw")}

    return prepare


def pictured(item: Item, pixels: Any) -> Any:
    """Return an image as the model's image processor prepares it. Raises UserError that names the candidate."""
    from PIL import Image

    try:
        return pixels(images=Image.fromarray(item.image), return_tensors="pt")
    except (ValueError, TypeError) as error:
        height, width = item.image.shape[:2]
        raise UserError(
            f"candidate {item.candidate_id}: an image of {width} x {height} pixels, which this judge cannot read ({error}); "
            "draw it again, or choose another judge"
        ) from None


def by_processor(settings: VlmJudge) -> Prepare:
    """Return how other models are prepared: by their own processor, which may need more packages."""
    from PIL import Image
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(settings.checkpoint, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{settings.checkpoint}: its processor cannot be loaded ({reason}); install what it names") from None
    processor.tokenizer.padding_side = "left"
    if processor.tokenizer.pad_token_id is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token

    def prepare(items: Sequence[Item]) -> Any:
        conversations = [turns(settings.asked(item.prompt["prompt"]), image=Image.fromarray(item.image)) for item in items]
        try:
            return processor.apply_chat_template(
                conversations,
                tokenize=True,
                add_generation_prompt=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"padding": True},
            )
        except ValueError as error:
            raise UserError(
                f"images from candidate {items[0].candidate_id} on: this judge's model cannot read them ({error}); "
                "choose another judge"
            ) from None

    return prepare


VLM = JudgeKind(
    VlmJudge,
    open_vlm,
    files=files,
    runs_on=runs_on,
    batch_size=64,
)
