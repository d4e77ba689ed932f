"""Small checkpoints with random weights, of the real classes that external judges load."""

from pathlib import Path

from stages.judges.geneval_rules import CLASSES


def randomise(model, seed: int) -> None:
    """Give the model weights that are large enough for its answers to differ."""
    import torch

    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.25)


SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def write_tiny_blip(folder: Path) -> Path:
    """Write a small BLIP that has BLIP's vocabulary, and return its folder."""
    from transformers import BertTokenizer, BlipConfig, BlipForQuestionAnswering

    words = [f"[unused{number}]" for number in range(30522)]
    for number, word in {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]", 2748: "yes", 2053: "no"}.items():
        words[number] = word
    for number, letter in enumerate("abcdefghijklmnopqrstuvwxyz?,'-"):
        words[1000 + number], words[1100 + number] = letter, f"##{letter}"
    BertTokenizer(vocab={word: number for number, word in enumerate(words)}).save_pretrained(folder)
    config = BlipConfig(
        text_config=SMALL | {"vocab_size": 30524, "encoder_hidden_size": 32, "projection_dim": 16},
        vision_config=SMALL | {"image_size": 384, "patch_size": 96},
    )
    model = BlipForQuestionAnswering(config)
    randomise(model, 0)
    model.save_pretrained(folder)
    return folder


def write_tiny_clip(folder: Path) -> Path:
    """Write a small CLIP whose tokens are letters, and return its folder."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz.,"
    names = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    CLIPTokenizer(vocab={name: number for number, name in enumerate(names)}, merges=[]).save_pretrained(folder)
    text = SMALL | {"vocab_size": len(names), "bos_token_id": len(names) - 2, "eos_token_id": len(names) - 1}
    model = CLIPModel(
        CLIPConfig(text_config=text, vision_config=SMALL | {"image_size": 64, "patch_size": 16}, projection_dim=16)
    )
    randomise(model, 1)
    model.save_pretrained(folder)
    return folder


def write_tiny_detector(folder: Path) -> Path:
    """Write a small RT-DETR of three labels and a small DPT to the subfolders rt-detr and dpt, and return the folder."""
    from transformers import DPTConfig, DPTForDepthEstimation, RTDetrResNetConfig, RTDetrV2Config, RTDetrV2ForObjectDetection

    backbone = RTDetrResNetConfig(
        embeddings_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], layer_type="bottleneck",
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = RTDetrV2Config(
        backbone_config=backbone, encoder_hidden_dim=32, encoder_in_channels=[16, 24, 32], encoder_ffn_dim=32, d_model=32,
        encoder_attention_heads=2, num_queries=20, decoder_in_channels=[32, 32, 32], decoder_ffn_dim=32, decoder_layers=2,
        decoder_attention_heads=2, num_denoising=0, id2label={0: "Cat", 1: "Dog", 2: "Person"},
    )  # fmt: skip
    import torch

    torch.manual_seed(0)
    RTDetrV2ForObjectDetection(config).save_pretrained(folder / "rt-detr")
    depth = DPTConfig(
        **SMALL | {"num_hidden_layers": 4}, image_size=64, patch_size=16, backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 8, 16, 16], fusion_hidden_size=8, is_hybrid=False,
    )  # fmt: skip
    DPTForDepthEstimation(depth).save_pretrained(folder / "dpt")
    return folder


def write_tiny_depth_anything(folder: Path, kind: str = "relative") -> Path:
    """Write a small Depth Anything of relative or metric depth, and return its folder."""
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config

    backbone = Dinov2Config(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=2, mlp_ratio=2, image_size=56, patch_size=14,
        out_indices=[1, 2, 3, 4], reshape_hidden_states=False,
    )  # fmt: skip
    config = DepthAnythingConfig(
        backbone_config=backbone, reassemble_hidden_size=32, neck_hidden_sizes=[8, 8, 16, 16], fusion_hidden_size=8,
        head_hidden_size=8, depth_estimation_type=kind,
    )  # fmt: skip
    model = DepthAnythingForDepthEstimation(config)
    randomise(model, 3)
    model.head.conv3.weight.data.abs_()  # so that the last layer, which cuts negative depths, cuts none
    model.head.conv3.bias.data.fill_(1.0)
    model.save_pretrained(folder)
    return folder


def write_tiny_geneval(folder: Path) -> Path:
    """Write a small Mask2Former with very different class scores and a small CLIP to the subfolders detector and clip."""
    import torch
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, Mask2FormerConfig, SwinConfig
    from transformers import Mask2FormerForUniversalSegmentation as Mask2Former
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil

    torch.manual_seed(0)
    torch.set_num_threads(1)
    stages = [f"stage{number}" for number in range(1, 5)]
    swin = SwinConfig(embed_dim=8, depths=[1] * 4, num_heads=[2] * 4, window_size=2, image_size=64, out_features=stages)
    sizes = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "dim_feedforward": 32}
    layers = {"encoder_feedforward_dim": 32, "encoder_layers": 1, "decoder_layers": 2, "num_attention_heads": 2}
    config = Mask2FormerConfig(backbone_config=swin, num_queries=24, **sizes, **layers)
    config.id2label = dict(enumerate(CLASSES))
    detector = Mask2Former(config).eval()
    with torch.no_grad():
        detector.class_predictor.weight.mul_(400)
        for parameter in detector.model.transformer_module.decoder.mask_predictor.parameters():
            parameter.mul_(3)
    detector.save_pretrained(folder / "detector")
    Mask2FormerImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(folder / "detector")

    characters = [chr(number) for number in range(33, 127)]
    tokens = [*characters, *(character + "</w>" for character in characters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={token: number for number, token in enumerate(tokens)}, merges=[])
    ends = {"bos_token_id": len(tokens) - 2, "eos_token_id": len(tokens) - 1, "pad_token_id": len(tokens) - 1}
    part = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = part | {"vocab_size": len(tokens), "max_position_embeddings": 77} | ends
    vision = part | {"image_size": 32, "patch_size": 8}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()
    with torch.no_grad():
        for parameter in clip.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    clip.save_pretrained(folder / "clip")
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder / "clip")
    tokenizer.save_pretrained(folder / "clip")
    return folder
