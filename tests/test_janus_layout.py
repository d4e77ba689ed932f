"""Janus-Pro's own layout: its tokenizer's special ids, its prompts, and upstream's checkpoint format."""

import copy
import json
import shutil
import sys
from dataclasses import replace
from functools import partial
from itertools import count, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import JanusForConditionalGeneration, JanusProcessor, PreTrainedTokenizerFast

from stages.common import manifests
from stages.common.errors import UserError
from stages.families.janus import JANUS
from stages.families.janus import convert as janus_convert
from stages.families.janus.family import ASSISTANT, PAD, USER, Janus
from stages.shapes.tiny_janus import make_config, make_processor
from tests.helpers import ROOT, done, refused, stage
from tests.test_janus import sampling, seeds

BOS, EOS = "<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>"
TAGS = {"image_token": "<image_placeholder>", "boi_token": "<begin_of_image>", "eoi_token": "<end_of_image>"}
PADS = {"janus-pro-1b": 100002, "janus-pro-7b": 100015}
PROMPT = "a red circle left of 2 green squares"


def pro_tokenizer(folder, pad: int, text: int = 100000, adds_bos: bool = True) -> Tokenizer:
    """DeepSeek's layout: byte-level BPE with single digits, 100,000 ids of text, then BOS, EOS and the added tokens.

    adds_bos: whether the post-processor adds BOS; otherwise tokenizer_config.json asks for it, in vain with transformers 5.
    """
    tokenizer = Tokenizer(models.BPE())
    split = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+")]
    digits = pre_tokenizers.Digits(individual_digits=True)
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, digits, level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=level.alphabet(), show_progress=False)
    tokenizer.train_from_iterator([PROMPT + " Yes No yes no The score is"] * 9, trainer)
    tokenizer.add_tokens([AddedToken(f"filler {i}") for i in range(text - tokenizer.get_vocab_size())])
    names = [BOS, EOS, *TAGS.values(), USER, ASSISTANT]
    fillers = (f"<filler {i}>" for i in count())
    while len(names) < pad - text:
        names.append(next(fillers))
    names.insert(pad - text, PAD)
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in names])
    template = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, text)])
    tokenizer.post_processor = template if adds_bos else processors.ByteLevel(trim_offsets=False)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    fields = {"tokenizer_class": "LlamaTokenizerFast", "bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
    fields |= {} if adds_bos else {"add_bos_token": True}
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
        family.generate([PROMPT], seeds(1), sampling(5.0))
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
    for question, asked in ((JANUS.question, JANUS.question.removeprefix(system + " ")), ("is it red?", "is it red?")):
        expected = pieces(raw, 100000, system + "\n\n", user, ": ", *picture, f"\n{asked}\n\n", assistant, ":")
        assert family._question_ids(question) == expected


def test_the_verdict_follows_the_answers_prefix(pro):
    """After ` The score is ` the next token is the digit, which is one of those that are summed."""
    family, raw, _ = pro
    question = JANUS.question.replace("{prompt}", PROMPT)
    before = family._question_ids(question, JANUS.answer_prefix)
    after = family._question_ids(question, JANUS.answer_prefix + "1.")
    assert after[: len(before)] == before
    assert after[len(before)] in family.yes.tolist()
    assert {raw.id_to_token(i) for i in family.yes.tolist()} >= {"1", "Yes"}
    assert {raw.id_to_token(i) for i in family.no.tolist()} >= {"0", "No"}
    image = np.zeros((1, 64, 64, 3), dtype=np.uint8)
    assert family.p_yes(image, [question], JANUS.answer_prefix)[0] != family.p_yes(image, [question])[0]


def test_prompt_and_question_begin_with_bos_where_the_post_processor_does_not_add_it(pro):
    family, _, _ = pro
    other = copy.copy(family)
    other.tokenizer = copy.deepcopy(family.tokenizer)
    other.tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    assert other.tokenizer.encode(PROMPT)[0] != 100000
    assert other._prompt_ids(PROMPT) == family._prompt_ids(PROMPT)
    assert other._question_ids(JANUS.question) == family._question_ids(JANUS.question)
    assert family._question_ids(JANUS.question).count(100000) == 1


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
SMALL = janus_convert.Geometry(width=TOWER, blocks=2, heads=2, channels=BASE, latent=LATENT, codes=CODES)


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
    vision = {"image_size": SIZE, "model_name": "siglip_large_patch16_384", "select_feature": "same", "select_layer": -1}
    config = {"model_type": "multi_modality", "language_config": language, "vision_config": {"params": vision}}
    (folder / "config.json").write_text(json.dumps(config))
    images = {"image_size": SIZE, "min_size": 14, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "rescale_factor": 1 / 255}
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    torch.save(upstream_weights(), folder / "pytorch_model.bin")
    return folder


def converted(folder: Path, out: Path, geometry: janus_convert.Geometry = SMALL) -> dict[str, float]:
    return janus_convert.convert(folder, out, allow_pickle=True, geometry=geometry)


def test_upstreams_checkpoint_converts_and_draws_and_judges(upstream, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(janus_convert, "convert", partial(janus_convert.convert, geometry=SMALL))
    arguments = ["--upstream", str(upstream), "--out", str(tmp_path / "hf"), "--allow-pickle"]
    monkeypatch.setattr(sys, "argv", ["convert", *arguments])
    janus_convert.main()
    assert "image logits within" in capsys.readouterr().out
    family = Janus.load(tmp_path / "hf")
    drawn = family.generate([PROMPT], seeds(1), sampling(5.0))
    assert drawn.images.shape == (1, SIZE, SIZE, 3)
    reference = janus_convert.Upstream(torch.load(upstream / "pytorch_model.bin"), family.model.config.text_config, SMALL)
    with torch.no_grad():
        pixels = reference.paint(torch.from_numpy(drawn.tokens), SIZE // 16).permute(0, 2, 3, 1)
    below = ((pixels + 1) / 2 * 255).clamp(0, 255).numpy() - drawn.images  # upstream's uint8 array truncates
    assert below.min() > -1e-3
    assert below.max() < 1 + 1e-3
    p_yes, p_neither = family.p_yes(drawn.images, [JANUS.question.replace("{prompt}", PROMPT)], JANUS.answer_prefix)
    assert 0 < p_yes[0] < 1
    assert 0 < p_neither[0] < 1


def test_a_pickle_is_not_read_unless_allowed(upstream, tmp_path):
    result = stage("families.janus.convert", "--upstream", upstream, "--out", tmp_path / "hf")
    refused(result, "pytorch_model.bin is a pickle; add --allow-pickle")
    assert not (tmp_path / "hf").exists()


@pytest.fixture(scope="module")
def tokenizer(upstream):
    return janus_convert.make_tokenizer(upstream)


@pytest.fixture
def case(upstream, tokenizer, tmp_path, monkeypatch):
    """A checkpoint of its own for a test to change: its folder, config.json's fields and its tensors.

    The tokenizer, whose 100,000 tokens take seconds, is read once for all.
    """
    monkeypatch.setattr(janus_convert, "make_tokenizer", lambda folder: tokenizer)
    folder = tmp_path / "Janus-Pro"
    folder.mkdir()
    shutil.copy(upstream / "preprocessor_config.json", folder)
    return folder, json.loads((upstream / "config.json").read_text()), torch.load(upstream / "pytorch_model.bin")


def write(folder: Path, config: dict, weights: dict[str, torch.Tensor], files: int = 0) -> None:
    """A pickle, or so many safetensors with an index."""
    (folder / "config.json").write_text(json.dumps(config))
    if not files:
        torch.save(weights, folder / "pytorch_model.bin")
        return
    place = {name: f"model-{i % files + 1:05d}-of-{files:05d}.safetensors" for i, name in enumerate(weights)}
    for file in set(place.values()):
        save_file({name: weights[name].contiguous() for name in place if place[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": place}))


def refuses(folder: Path, *words: str, geometry: janus_convert.Geometry = SMALL) -> None:
    """One UserError with these words, and nothing is left in the folder of the output."""
    before = sorted(folder.parent.iterdir())
    with pytest.raises(UserError) as error:
        converted(folder, folder.parent / "hf", geometry)
    for word in words:
        assert word in str(error.value), (word, str(error.value))
    assert sorted(folder.parent.iterdir()) == before


def test_a_conversion_that_computes_something_else_writes_nothing(case, monkeypatch):
    right = janus_convert.converted

    def wrong(*arguments):
        result = right(*arguments)
        name = "model.vision_model.encoder.layers.0.self_attn.{}_proj.weight"
        result[name.format("q")], result[name.format("v")] = result[name.format("v")], result[name.format("q")]
        return result

    write(*case)
    monkeypatch.setattr(janus_convert, "converted", wrong)
    refuses(case[0], "does not compute what upstream does", "text logits")


@pytest.mark.parametrize("files", [0, 3])
def test_bfloat16_is_checked_as_exactly_as_float32(case, tmp_path, files):
    """In float32: two orders of summing in bfloat16 differ by up to .04, more than many a mistake."""
    folder, config, weights = case
    narrow = {name: tensor.bfloat16() for name, tensor in weights.items()}
    write(folder, config, narrow, files)
    assert max(converted(folder, tmp_path / "hf").values()) < 1e-5
    fields = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert fields["dtype"] == fields["text_config"]["dtype"] == "bfloat16"
    kept = load_file(tmp_path / "hf" / "model.safetensors")
    assert torch.equal(kept["model.generation_embeddings.weight"], narrow["gen_embed.weight"])
    assert {tensor.dtype for tensor in kept.values()} == {torch.bfloat16}


def test_a_model_is_filled_without_being_initialised_and_lacks_nothing(case):
    """Initialising 7B at random takes minutes and 14 GiB. What is computed and not stored equals what transformers computes."""
    folder, config, weights = case
    write(folder, config, weights)
    own = filled(folder, weights)
    reference = dict(JanusForConditionalGeneration(own.config).named_buffers())
    assert len(reference) >= 3
    assert all(torch.equal(buffer, reference[name]) for name, buffer in own.named_buffers())


def filled(folder: Path, weights: dict, geometry: janus_convert.Geometry = SMALL) -> JanusForConditionalGeneration:
    config = janus_convert.make_config(folder / "config.json", geometry, janus_convert.make_tokenizer(folder))
    model = janus_convert.empty_model(folder, config)
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    janus_convert.fill(model, janus_convert.converted(model, weights, dict.fromkeys(weights, ""), folder))
    return model


def test_the_vision_towers_heads_are_those_of_its_name_and_change_what_it_computes(case):
    """Janus-Pro's 16 heads of 64; the tensors of 32 heads of 32 have the same shapes, so that only the name tells."""
    folder, config, weights = case
    assert (janus_convert.JANUS_PRO.width, janus_convert.JANUS_PRO.blocks, janus_convert.JANUS_PRO.heads) == (1024, 24, 16)
    write(folder, config, weights)
    pixels, features = torch.rand(1, 3, SIZE, SIZE), []
    for heads in (2, 4):
        model = filled(folder, weights, replace(SMALL, heads=heads))
        assert model.config.vision_config.num_attention_heads == heads
        with torch.no_grad():
            features.append(model.model.get_image_features(pixels).pooler_output)
    assert (features[0] - features[1]).abs().max() > 0.01 * features[0].abs().max()
    right = janus_convert.Upstream(weights, model.config.text_config, SMALL)
    assert janus_convert.largest_difference(model, right)["text logits"] > 10 * janus_convert.ALLOWED


def without(*names: str):
    def change(config: dict, weights: dict) -> None:
        for name in names:
            del weights[name]

    return change


def instead(name: str, *shape: int):
    def change(config: dict, weights: dict) -> None:
        weights[name] = torch.zeros(shape)

    return change


def field(dotted: str, value: object):
    """Set a field of config.json, or remove it where the value is `...`."""

    def change(config: dict, weights: dict) -> None:
        *sections, last = dotted.split(".")
        for name in sections:
            config = config.setdefault(name, {})
        if value is ...:
            del config[last]
        else:
            config[last] = value

    return change


BLOCKS = "vision_model.vision_tower.blocks"
WRONG = {
    "no image embedding": (without("gen_embed.weight"), "no tensor gen_embed.weight in pytorch_model.bin"),
    "no patch embedding": (without(f"{BLOCKS[:-7]}.patch_embed.proj.weight"), "patch_embed.proj.weight in pytorch_model.bin"),
    "no last block": (
        lambda config, weights: [weights.pop(name) for name in list(weights) if name.startswith(f"{BLOCKS}.1.")],
        f"no tensor {BLOCKS}.1.",
    ),
    "one block more": (instead(f"{BLOCKS}.2.norm1.weight", TOWER), f"has no tensor {BLOCKS}.2.norm1.weight"),
    "a wide text head": (instead("language_model.lm_head.weight", 102400, 65), "lm_head.weight is float32 [102400, 65]"),
    "a wide fused query": (instead(f"{BLOCKS}.0.attn.qkv.weight", 3 * TOWER, 64), f"ask for floats [{3 * TOWER}, {TOWER}]"),
    "a long picture": (instead(f"{BLOCKS[:-7]}.pos_embed", 1, 9, TOWER), f"ask for floats [1, 4, {TOWER}]"),
    "codebooks of unequal size": (instead("gen_vision_model.quantize.embedding.weight", 49, 8), "is float32 [49, 8]"),
    "integers": (
        lambda config, weights: weights.update({"gen_embed.weight": torch.zeros(CODES, 8, dtype=torch.int8)}),
        "gen_embed.weight is int8",
    ),
    "no language model": (field("language_config", ...), "config.json: language_config is missing"),
    "no vision tower": (field("vision_config", ...), "config.json: vision_config is missing"),
    "another tower": (field("vision_config.params.model_name", "siglip_so400m_patch14_384"), "model_name is 'siglip_so400m"),
    "no tower's name": (field("vision_config.params.model_name", ...), "model_name is None"),
    "another layer": (field("vision_config.params.select_layer", -2), "select_layer is -2, but Janus-Pro's is -1"),
    "pictures normalised twice": (field("vision_config.params.pixel_mean", [0.5] * 3), "pixel_mean is [0.5, 0.5, 0.5]"),
    "an image size in words": (field("vision_config.params.image_size", "384"), "image_size is '384'"),
    "another image size": (field("vision_config.params.image_size", 48), "preprocessor_config.json: image_size is 32"),
    "another BOS": (
        field("language_config.bos_token_id", 1),
        "language_config.bos_token_id is 1, but the tokenizer's is 100000",
    ),
    "one table for both ends": (field("language_config.tie_word_embeddings", True), "tie_word_embeddings is true"),
    "heads that do not divide": (field("language_config.num_attention_heads", 7), "language_config"),
    "an unknown activation": (field("language_config.hidden_act", "relu7"), "relu7"),
    "layers in words": (field("language_config.num_hidden_layers", "two"), "num_hidden_layers"),
    "an image head of another width": (
        field("gen_head_config", {"params": {"image_token_embed": 96, "n_embed": HIDDEN}}),
        "gen_head_config.params.image_token_embed is 96, but language_config.hidden_size is 64",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_no_janus_pro_is_refused_in_a_sentence(wrong, case):
    folder, config, weights = case
    change, words = WRONG[wrong]
    change(config, weights)
    write(folder, config, weights)
    refuses(folder, str(folder), words)


def test_ids_and_untied_weights_in_the_language_models_configuration_are_no_obstacle(case, tokenizer):
    folder, config, weights = case
    config["language_config"] |= {"bos_token_id": 100000, "pad_token_id": None, "tie_word_embeddings": False}
    write(folder, config, weights)
    text = janus_convert.make_config(folder / "config.json", SMALL, tokenizer).text_config
    assert (text.bos_token_id, text.pad_token_id) == (100000, tokenizer.pad_token_id)


def test_an_index_is_read_and_what_it_names_must_be_there(case):
    folder, config, weights = case
    write(folder, config, weights, files=2)
    index = folder / "model.safetensors.index.json"
    place = json.loads(index.read_text())["weight_map"]
    (folder / place["gen_embed.weight"]).rename(folder / "aside")
    refuses(folder, place["gen_embed.weight"], "not found, but model.safetensors.index.json names it")
    (folder / "aside").rename(folder / place["gen_embed.weight"])
    index.write_text(json.dumps({"weight_map": place | {"gen_embed.bias": place["gen_embed.weight"]}}))
    refuses(folder, "has no tensor gen_embed.bias, but model.safetensors.index.json places it there")
    index.write_text("[]")
    refuses(folder, "model.safetensors.index.json: not a JSON object")


@pytest.mark.parametrize("files", [0, 1])
@pytest.mark.parametrize("left", [0.5, 0.0], ids=["half", "nothing"])
def test_a_cut_file_is_refused_by_name(case, files, left):
    folder, config, weights = case
    write(folder, config, weights, files)
    path = next(path for path in folder.iterdir() if path.suffix in (".bin", ".safetensors"))
    path.write_bytes(path.read_bytes()[: int(left * path.stat().st_size)])
    refuses(folder, f"{path}: cannot be read", "fetch it again")


def test_a_pickle_of_something_else_is_refused_by_name(case):
    folder, config, _ = case
    write(folder, config, {})
    torch.save([1, 2], folder / "pytorch_model.bin")
    refuses(folder, "pytorch_model.bin: not a dictionary of tensors")


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
@pytest.mark.parametrize(("text", "words"), [(None, "not found"), ("{", "not JSON"), ("[]", "not a JSON object")])
def test_a_broken_configuration_file_is_refused_by_name(case, name, text, words):
    folder, config, weights = case
    write(folder, config, weights)
    (folder / name).unlink()
    if text is not None:
        (folder / name).write_text(text)
    refuses(folder, f"{folder / name}: {words}")


def test_a_failed_write_leaves_nothing(case, tmp_path, monkeypatch):
    write(*case)

    def full(self, folder):
        folder.mkdir()
        (folder / "model.safetensors").write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(JanusForConditionalGeneration, "save_pretrained", full)
    with pytest.raises(OSError, match="No space"):
        converted(case[0], tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["Janus-Pro"]


def test_the_converted_tokenizer_adds_bos_and_one_without_roles_is_refused(tmp_path):
    raw = pro_tokenizer(tmp_path / "tokenizer", 515, text=500, adds_bos=False)
    assert janus_convert.make_tokenizer(tmp_path / "tokenizer").encode(PROMPT) == pieces(raw, 500, PROMPT)
    path = tmp_path / "tokenizer" / "tokenizer.json"
    path.write_text(path.read_text().replace(ASSISTANT, "<|Helper|>"))
    with pytest.raises(UserError, match=r"tokenizer\.json: has no token .*Assistant"):
        janus_convert.make_tokenizer(tmp_path / "tokenizer")
    path.write_text("{")
    with pytest.raises(UserError, match=r"tokenizer\.json: the tokenizer does not load"):
        janus_convert.make_tokenizer(tmp_path / "tokenizer")


@pytest.mark.parametrize("name", PADS)
def test_the_configuration_draws_and_judges_with_a_converted_checkpoint(name, upstream, tmp_path):
    """configs/janus-pro-*.yaml with small random weights in Janus-Pro's layout and three prompts of its own."""
    converted(upstream, tmp_path / "checkpoint")
    settings = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())
    settings["model"]["checkpoint"] = str(tmp_path / "checkpoint")
    settings["generate"]["candidates"] = 2
    for part, lines in (("train", ["A red book.", "a green bench", "two cats"]), ("val", ["Two cats."])):
        (tmp_path / f"color_{part}.txt").write_text("\n".join(lines))
    files, exclude = ([str(tmp_path / f"color_{split}.txt")] for split in ("train", "val"))
    settings["prompts"] = {"source": "text", "files": files, "exclude": exclude}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    config = ("--config", tmp_path / "config.yaml")
    prompts, candidates = tmp_path / "prompts.parquet", tmp_path / "candidates.parquet"
    done("prompts", *config, "--set", "train", "--out", prompts)
    done("generate", *config, "--prompts", prompts, "--out", candidates, "--images", tmp_path / "candidates.tar")
    done("score", *config, "--prompts", prompts, "--candidates", candidates, "--out", tmp_path / "scores.parquet")
    scores = manifests.read_rows(tmp_path / "scores.parquet", "scores")
    assert len(scores) == 2 * 2
    assert all(0 < row["p_yes"] < 1 and 0 < row["p_neither"] < 1 for row in scores)
