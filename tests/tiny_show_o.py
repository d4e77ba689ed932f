"""A small Show-o with random weights, of the classes of the family and with upstream's names of special tokens."""

from pathlib import Path


def tiny_show_o(vision: bool = False, hidden: int = 64, seed: int = 0):
    """Return the family's object. vision: whether it sees pictures through a CLIP tower."""
    import torch
    from transformers import CLIPVisionConfig

    from stages.families.show_o.family import ShowO
    from stages.families.show_o.magvit import Magvit
    from stages.families.show_o.model import ShowOModel
    from stages.shapes.tiny_show_o import VQ, make_config, make_tokenizer

    torch.manual_seed(seed)
    tower = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=64, patch_size=16
    )
    tokenizer = make_tokenizer()
    family = ShowO(ShowOModel(make_config(tokenizer, hidden, 2, tower if vision else None)), Magvit(VQ), tokenizer)
    for part in (family.model, family.vq):
        for name, parameter in part.named_parameters():
            if parameter.dim() > 1:  # large enough that logits, pictures and answers differ
                torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
            elif name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.1)
    llm = family.model.llm
    with torch.no_grad():  # verdicts that depend on the picture
        llm.lm_head.weight[family.no], llm.lm_head.bias[family.no] = (
            -llm.lm_head.weight[family.yes],
            -llm.lm_head.bias[family.yes],
        )
        llm.model.embed_tokens.weight[family.layout.offset :] *= 4
        for layer in llm.model.layers:
            layer.self_attn.v_proj.weight *= 3
    return family


def write_tiny_show_o(folder: Path, **keywords) -> Path:
    """Write the checkpoint of `tiny_show_o` to a folder, and return the folder."""
    tiny_show_o(**keywords).save(folder)
    return folder
