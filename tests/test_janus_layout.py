"""Janus-Pro's own layout: its tokenizer's special ids, its prompts, and upstream's checkpoint format."""

import json
from itertools import count, pairwise

import numpy as np
import pytest
import torch
import yaml
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import JanusForConditionalGeneration, JanusProcessor, PreTrainedTokenizerFast

from stages.common import manifests
from stages.common.runtime import UserError
from stages.families.base import Sampling
from stages.families.janus import convert as janus_convert
from stages.families.janus.family import ASSISTANT, PAD, USER, Janus
from stages.shapes.tiny_janus import make_config, make_processor
from tests.conftest import ROOT, done, refused, stage
from tests.test_janus import seeds

BOS, EOS = "<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>"
TAGS = {"image_token": "<image_placeholder>", "boi_token": "<begin_of_image>", "eoi_token": "<end_of_image>"}
PADS = {"janus-pro-1b": 100002, "janus-pro-7b": 100015}
PROMPT = "a red circle left of 2 green squares"


def pro_tokenizer(folder, pad: int) -> Tokenizer:
    """DeepSeek's layout: byte-level BPE with single digits, 100,000 ids of text, then BOS, EOS and the added tokens."""
    tokenizer = Tokenizer(models.BPE())
    split = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+")]
    digits = pre_tokenizers.Digits(individual_digits=True)
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, digits, level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=level.alphabet(), show_progress=False)
    tokenizer.train_from_iterator([PROMPT + " Yes No yes no The score is"] * 9, trainer)
    tokenizer.add_tokens([AddedToken(f"filler {i}") for i in range(100000 - tokenizer.get_vocab_size())])
    names = [BOS, EOS, *TAGS.values(), USER, ASSISTANT]
    fillers = (f"<filler {i}>" for i in count())
    while len(names) < pad - 100000:
        names.append(next(fillers))
    names.insert(pad - 100000, PAD)
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in names])
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 100000)])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    fields = {"tokenizer_class": "LlamaTokenizerFast", "bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))
    return tokenizer


@pytest.fixture(scope="module", params=PADS)
def pro(request, tmp_path_factory):
    """A small random Janus with Janus-Pro's tokenizer, through a checkpoint folder; its raw tokenizer; its pad id."""
    folder = tmp_path_factory.mktemp(request.param)
    raw = pro_tokenizer(folder / "tokenizer", PADS[request.param])
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer", extra_special_tokens=TAGS)
    images = make_processor().image_processor
    processor = JanusProcessor(images, tokenizer, use_default_system_prompt=True, num_image_tokens=16)
    torch.manual_seed(0)
    model = JanusForConditionalGeneration(make_config(processor, hidden=32, layers=1))
    model.save_pretrained(folder / "checkpoint")
    processor.save_pretrained(folder / "checkpoint")
    settings = folder / "checkpoint" / "tokenizer_config.json"  # the class that published folders name
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"tokenizer_class": "LlamaTokenizerFast"}))
    return Janus.load(folder / "checkpoint"), raw, PADS[request.param]


def pieces(raw: Tokenizer, *parts: str | int) -> list[int]:
    """Ids given as they are, text by the raw tokenizer without BOS."""
    return [i for part in parts for i in ([part] if isinstance(part, int) else raw.encode(part, add_special_tokens=False).ids)]


def test_special_tokens_are_found_by_name(pro):
    family, raw, pad = pro
    assert family.pad == pad == raw.token_to_id(PAD)
    assert family.tokenizer.bos_token_id == 100000
    assert (family.begin, family.end) == (raw.token_to_id("<begin_of_image>"), raw.token_to_id("<end_of_image>"))
    assert family.placeholder == family.model.config.image_token_id


def test_the_prompt_is_upstreams(pro):
    family, raw, _ = pro
    user, assistant = raw.token_to_id(USER), raw.token_to_id(ASSISTANT)
    assert family._prompt_ids(PROMPT) == pieces(raw, 100000, user, f": {PROMPT}\n\n", assistant, ":", family.begin)


def test_the_unconditional_row_is_pads_between_first_and_last(pro):
    family, _, pad = pro
    rows = []
    embed = family.model.get_input_embeddings()
    hook = embed.register_forward_hook(lambda module, inputs, out: rows.append(inputs[0].tolist()))
    try:
        family.generate([PROMPT], seeds(1), Sampling(5.0))
    finally:
        hook.remove()
    conditional = family._prompt_ids(PROMPT)
    assert rows == [conditional, [100000, *[pad] * (len(conditional) - 2), family.begin]]


def test_the_question_is_upstreams_with_the_system_prompt_before_the_users_turn(pro):
    family, raw, _ = pro
    user, assistant = raw.token_to_id(USER), raw.token_to_id(ASSISTANT)
    system = "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    system += "provides, and assist the user with a variety of tasks using natural language."
    picture = [family.begin, *[family.placeholder] * 16, family.end]
    for question, asked in ((family.question, family.question.removeprefix(system + " ")), ("is it red?", "is it red?")):
        expected = pieces(raw, 100000, system + "\n\n", user, ": ", *picture, f"\n{asked}\n\n", assistant, ":")
        assert family._question_ids(question) == expected


def test_the_verdict_follows_the_answers_prefix(pro):
    """After ` The score is ` the next token is the digit, which is one of those that are summed."""
    family, raw, _ = pro
    question = family.question.replace("{prompt}", PROMPT)
    before = family._question_ids(question, family.answer_prefix)
    after = family._question_ids(question, family.answer_prefix + "1.")
    assert after[: len(before)] == before
    assert after[len(before)] in family.yes.tolist()
    assert {raw.id_to_token(i) for i in family.yes.tolist()} >= {"1", "Yes"}
    assert {raw.id_to_token(i) for i in family.no.tolist()} >= {"0", "No"}
    image = np.zeros((1, 64, 64, 3), dtype=np.uint8)
    assert family.p_yes(image, [question], family.answer_prefix)[0] != family.p_yes(image, [question])[0]


def test_a_tokenizer_without_role_tags_is_refused_by_name(tmp_path):
    family_processor = make_processor()
    tokenizer = family_processor.tokenizer
    model = JanusForConditionalGeneration(make_config(family_processor, hidden=32, layers=1))
    text = tokenizer.backend_tokenizer.to_str().replace(ASSISTANT, "<|Helper|>")
    family_processor.tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(text),
        **{name: getattr(tokenizer, name) for name in ("pad_token", "bos_token", "eos_token", "unk_token")},
    )
    with pytest.raises(UserError, match="Assistant"):
        Janus(model, family_processor)


# --- upstream's checkpoint format --------------------------------------------------------------------------------------

HIDDEN, TOWER, BASE, LATENT, CODES, SIZE = 64, 128, 32, 16, 50, 32


def upstream_weights() -> dict[str, torch.Tensor]:
    """Random tensors under the names that janus/models/ of deepseek-ai/Janus gives them; one block of each kind a level."""
    torch.manual_seed(0)
    weights: dict[str, torch.Tensor] = {}

    def linear(name: str, inputs: int, outputs: int, *kernel: int, bias: bool = True) -> None:
        weights[name + ".weight"] = torch.randn(outputs, inputs, *kernel) / (inputs * np.prod(kernel)) ** 0.5
        if bias:
            weights[name + ".bias"] = 0.1 * torch.randn(outputs)

    def norm(name: str, width: int) -> None:
        weights[name + ".weight"], weights[name + ".bias"] = 1 + 0.1 * torch.randn(width), 0.1 * torch.randn(width)

    def residual(name: str, inputs: int, outputs: int) -> None:
        norm(f"{name}.norm1", inputs)
        linear(f"{name}.conv1", inputs, outputs, 3, 3)
        norm(f"{name}.norm2", outputs)
        linear(f"{name}.conv2", outputs, outputs, 3, 3)
        if inputs != outputs:
            linear(f"{name}.nin_shortcut", inputs, outputs, 1, 1)

    def attention(name: str, width: int) -> None:
        norm(f"{name}.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            linear(f"{name}.{part}", width, width, 1, 1)

    def half(name: str, first: int, last: int, levels: list[tuple[int, int]], blocks: int, middle: int, change: str) -> None:
        """Encoder or decoder of the VQ model; attention at its coarsest level (ch_mult 4)."""
        linear(f"{name}.conv_in", first, BASE if change == "downsample" else middle, 3, 3)
        for level, (inputs, outputs) in enumerate(levels):
            at = f"{name}.conv_blocks.{level}"
            for place in range(blocks):
                residual(f"{at}.res.{place}", inputs if place == 0 else outputs, outputs)
                if outputs == 4 * BASE:
                    attention(f"{at}.attn.{place}", outputs)
            if level < len(levels) - 1:
                linear(f"{at}.{change}.conv", outputs, outputs, 3, 3)
        residual(f"{name}.mid.0", middle, middle)
        attention(f"{name}.mid.1", middle)
        residual(f"{name}.mid.2", middle, middle)
        norm(f"{name}.norm_out", levels[-1][1])
        linear(f"{name}.conv_out", levels[-1][1], last, 3, 3)

    tower = "vision_model.vision_tower"
    linear(f"{tower}.patch_embed.proj", 3, TOWER, 16, 16)
    weights[f"{tower}.pos_embed"] = torch.randn(1, (SIZE // 16) ** 2, TOWER)
    norm(f"{tower}.norm", TOWER)
    linear(f"{tower}.attn_pool.q", TOWER, TOWER)
    for block in range(2):
        at = f"{tower}.blocks.{block}"
        for name in ("norm1", "norm2"):
            norm(f"{at}.{name}", TOWER)
        linear(f"{at}.attn.qkv", TOWER, 3 * TOWER)
        linear(f"{at}.attn.proj", TOWER, TOWER)
        linear(f"{at}.mlp.fc1", TOWER, 4 * TOWER)
        linear(f"{at}.mlp.fc2", 4 * TOWER, TOWER)
    for name, inputs in (("aligner", TOWER), ("gen_aligner", 8)):
        linear(f"{name}.layers.0", inputs, HIDDEN)
        linear(f"{name}.layers.2", HIDDEN, HIDDEN)
    weights["gen_embed.weight"] = torch.randn(CODES, 8)
    linear("gen_head.output_mlp_projector", HIDDEN, HIDDEN)
    linear("gen_head.vision_head", HIDDEN, CODES)
    wide = [BASE, BASE, BASE, 2 * BASE, 2 * BASE, 4 * BASE]
    half("gen_vision_model.encoder", 3, LATENT, list(pairwise(wide)), 2, 4 * BASE, "downsample")
    wide = [4 * BASE, 4 * BASE, 2 * BASE, 2 * BASE, BASE, BASE]
    half("gen_vision_model.decoder", LATENT, 3, list(pairwise(wide)), 3, 4 * BASE, "upsample")
    linear("gen_vision_model.quant_conv", LATENT, 8, 1, 1)
    linear("gen_vision_model.post_quant_conv", 8, LATENT, 1, 1)
    weights["gen_vision_model.quantize.embedding.weight"] = torch.randn(CODES, 8)
    weights["gen_vision_model.quantize.codebook_used"] = torch.zeros(65536)
    weights["language_model.model.embed_tokens.weight"] = torch.randn(102400, HIDDEN)
    weights["language_model.lm_head.weight"] = torch.randn(102400, HIDDEN) / HIDDEN**0.5
    weights["language_model.model.norm.weight"] = torch.ones(HIDDEN)
    for layer in range(2):
        at = f"language_model.model.layers.{layer}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{at}.{name}.weight"] = 1 + 0.1 * torch.randn(HIDDEN)
        for part in "qkvo":
            linear(f"{at}.self_attn.{part}_proj", HIDDEN, HIDDEN, bias=False)
        for part, inputs, outputs in (("gate", HIDDEN, 96), ("up", HIDDEN, 96), ("down", 96, HIDDEN)):
            linear(f"{at}.mlp.{part}_proj", inputs, outputs, bias=False)
    return weights


@pytest.fixture(scope="module")
def upstream(tmp_path_factory):
    folder = tmp_path_factory.mktemp("upstream") / "Janus-Pro"
    pro_tokenizer(folder, PADS["janus-pro-7b"])
    language = {"hidden_size": HIDDEN, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 4}
    language |= {"num_hidden_layers": 2, "vocab_size": 102400, "max_position_embeddings": 2048, "torch_dtype": "bfloat16"}
    config = {"model_type": "multi_modality", "language_config": language, "vision_config": {"params": {"image_size": SIZE}}}
    (folder / "config.json").write_text(json.dumps(config))
    images = {"image_size": SIZE, "min_size": 14, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "rescale_factor": 1 / 255}
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    torch.save(upstream_weights(), folder / "pytorch_model.bin")
    return folder


def test_upstreams_checkpoint_converts_and_draws_and_judges(upstream, tmp_path):
    result = done("families.janus_convert", "--upstream", upstream, "--out", tmp_path / "hf", "--allow-pickle")
    assert "image logits within" in result.stdout
    family = Janus.load(tmp_path / "hf")
    drawn = family.generate([PROMPT], seeds(1), Sampling(5.0))
    assert drawn.images.shape == (1, SIZE, SIZE, 3)
    reference = janus_convert.Upstream(torch.load(upstream / "pytorch_model.bin"), family.model.config.text_config)
    with torch.no_grad():
        pixels = reference.paint(torch.from_numpy(drawn.tokens), SIZE // 16).permute(0, 2, 3, 1)
    np.testing.assert_allclose(drawn.images, ((pixels + 1) * 127.5).clamp(0, 255), atol=0.51)
    p_yes, p_neither = family.p_yes(drawn.images, [family.question.replace("{prompt}", PROMPT)], family.answer_prefix)
    assert 0 < p_yes[0] < 1
    assert 0 < p_neither[0] < 1


def test_a_pickle_is_not_read_unless_allowed(upstream, tmp_path):
    result = stage("families.janus_convert", "--upstream", upstream, "--out", tmp_path / "hf")
    refused(result, "pytorch_model.bin is a pickle; add --allow-pickle")
    assert not (tmp_path / "hf").exists()


def test_a_conversion_that_computes_something_else_writes_nothing(upstream, tmp_path, monkeypatch):
    right = janus_convert.renamed

    def wrong(weights):
        result = right(weights)
        name = "model.vision_model.encoder.layers.0.self_attn.{}_proj.weight"
        result[name.format("q")], result[name.format("v")] = result[name.format("v")], result[name.format("q")]
        return result

    monkeypatch.setattr(janus_convert, "renamed", wrong)
    with pytest.raises(UserError, match=r"does not compute what upstream does.*text logits"):
        janus_convert.convert(upstream, tmp_path / "hf", allow_pickle=True)
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("name", PADS)
def test_the_configuration_draws_and_judges_with_a_converted_checkpoint(name, upstream, tmp_path):
    """configs/janus-pro-*.yaml with small random weights in Janus-Pro's layout and three prompts of its own."""
    janus_convert.convert(upstream, tmp_path / "checkpoint", allow_pickle=True)
    settings = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())
    settings["model"]["checkpoint"] = str(tmp_path / "checkpoint")
    settings["generate"]["candidates"] = 2
    for part in ("train", "evaluation"):
        for key in ("files", "exclude"):
            settings["prompts"][part][key] = []
    for part, lines in (("train", ["A red book.", "a green bench", "two cats"]), ("evaluation", ["Two cats."])):
        (tmp_path / f"color_{part}.txt").write_text("\n".join(lines))
        settings["prompts"][part]["files"] = [str(tmp_path / f"color_{part}.txt")]
    settings["prompts"]["train"]["exclude"] = settings["prompts"]["evaluation"]["files"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    config = ("--config", tmp_path / "config.yaml")
    prompts, candidates = tmp_path / "prompts.parquet", tmp_path / "candidates.parquet"
    done("prompts", *config, "--set", "train", "--out", prompts)
    done("generate", *config, "--prompts", prompts, "--out", candidates, "--images", tmp_path / "candidates.tar")
    done("score", *config, "--prompts", prompts, "--candidates", candidates, "--out", tmp_path / "scores.parquet")
    scores = manifests.read_rows(tmp_path / "scores.parquet", "scores")
    assert len(scores) == 2 * 2
    assert all(0 < row["p_yes"] < 1 and 0 < row["p_neither"] < 1 for row in scores)
