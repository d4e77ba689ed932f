"""Tiny vision-language models with random weights, of the real classes, as checkpoint folders of under a megabyte."""

import json
from pathlib import Path

CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
            "<|image_pad|>", "<|video_pad|>")  # fmt: skip


def write_tokenizer(folder: Path):
    """Write a byte-level BPE in which every spelling of yes and no is one token, and return it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges: list[tuple[str, str]] = []
    for word in ("yes", "Yes", "YES", "no", "No", "NO"):
        merges += [(word[:end], word[end]) for end in range(1, len(word))]
    merges += [("Ġ", word) for word in ("yes", "Yes", "YES", "no", "No", "NO")]  # Ġ is a space
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys([*alphabet, *("".join(pair) for pair in merges)]))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIALS])
    whole = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|endoftext|>", eos_token="<|im_end|>", chat_template=CHAT
    )
    whole.save_pretrained(folder)
    return whole


def write_tiny_vlm(folder: Path) -> Path:
    """Write a Qwen2.5-VL of 200,000 parameters and return its folder. Equal calls write equal weights."""
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    tokenizer = write_tokenizer(folder)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIALS}
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
        },
        vision_config={
            "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64, "window_size": 56,
            "fullatt_block_indexes": [1],
        },
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
    )  # fmt: skip
    torch.manual_seed(0)
    save(Qwen2_5_VLForConditionalGeneration(config), folder)
    pixels = {"image_processor_type": "Qwen2VLImageProcessor", "min_pixels": 784, "max_pixels": 12544, "patch_size": 14,
              "temporal_patch_size": 2, "merge_size": 2, "image_mean": [0.48, 0.46, 0.41],
              "image_std": [0.27, 0.26, 0.28]}  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))
    return folder


def save(model, folder: Path) -> None:
    import torch

    with torch.no_grad():  # the usual weights, of .02, would make all answers nearly equal
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6)
    model.save_pretrained(folder)


def write_tiny_llava(folder: Path) -> Path:
    """Write a LLaVA, whose images all have as many tokens and whose own processor prepares them, and return its folder."""
    import torch
    from transformers import CLIPImageProcessor, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

    tokenizer = write_tokenizer(folder)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIALS}
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlavaConfig(
        text_config={"model_type": "llama", "vocab_size": len(tokenizer), "num_key_value_heads": 2, "bos_token_id": None,
                     "eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["<|endoftext|>"], **sizes},
        vision_config={"model_type": "clip_vision_model", "image_size": 56, "patch_size": 14, **sizes},
        image_token_id=ids["<|image_pad|>"], image_seq_length=16,
    )  # fmt: skip
    torch.manual_seed(0)
    save(LlavaForConditionalGeneration(config), folder)
    LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        chat_template=CHAT,
        image_token="<|image_pad|>",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    return folder
