"""The judge vlm, with a tiny random Qwen2.5-VL and a tiny random LLaVA of the real classes."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from stages.common import manifests
from stages.common.errors import UserError
from stages.families.tools.verdicts import single_tokens
from stages.judges import judge_kind
from stages.judges.base import Item
from stages.judges.vlm import NO, YES, VlmJudge, by_grid, files, open_vlm
from tests.helpers import ROOT, done, process_of, refused, stage, wait_until
from tests.test_judges import write_images
from tests.tiny_vlm import write_tiny_llava, write_tiny_vlm


@pytest.fixture(scope="module")
def tiny_vlm(tmp_path_factory):
    return write_tiny_vlm(tmp_path_factory.mktemp("tiny-qwen"))


@pytest.fixture(scope="module")
def tiny_llava(tmp_path_factory):
    return write_tiny_llava(tmp_path_factory.mktemp("tiny-llava"))


def some_items(count: int = 7, height: int = 64, width: int = 64) -> list[Item]:
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    return [Item(f"c{i}", {"prompt": "a red square " * (1 + i % 4)}, image) for i, image in enumerate(images)]


def settings(folder: Path, **changes) -> VlmJudge:
    return VlmJudge(kind="vlm", checkpoint=str(folder), device="cpu", **changes)


@pytest.mark.parametrize("model", ["tiny_vlm", "tiny_llava"])
def test_a_batch_is_judged_as_one_by_one(model, request):
    folder = request.getfixturevalue(model)
    alone, together = (open_vlm(settings(folder, batch_size=size))(some_items()) for size in (1, 7))
    assert [verdict.score for verdict in together] == pytest.approx([verdict.score for verdict in alone], abs=1e-4)
    neither = [[json.loads(verdict.answer)["p_neither"] for verdict in verdicts] for verdicts in (alone, together)]
    assert neither[1] == pytest.approx(neither[0], abs=1e-4)
    scores = [verdict.score for verdict in alone]
    assert max(scores) - min(scores) > 0.01, "the images and prompts make a difference"


@pytest.mark.parametrize("model", ["tiny_vlm", "tiny_llava"])
def test_padding_beside_a_long_prompt_changes_nothing(model, request):
    judge = open_vlm(settings(request.getfixturevalue(model), batch_size=2))
    short = some_items(1)[0]
    long = Item("long", {"prompt": "a very long prompt " * 40}, short.image)
    assert judge([short, long])[0].score == pytest.approx(judge([short])[0].score, abs=1e-4)


def test_the_score_is_that_of_the_model_without_any_batching(tiny_vlm):
    """The reference is one forward pass over the whole text, written out by hand."""
    from PIL import Image
    from transformers import AutoImageProcessor, AutoTokenizer, Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny_vlm, dtype=torch.float32).eval()
    tokenizer, pixels = AutoTokenizer.from_pretrained(tiny_vlm), AutoImageProcessor.from_pretrained(tiny_vlm)
    for item in some_items(2, 96, 40):
        seen = pixels(images=Image.fromarray(item.image), return_tensors="pt")
        tokens = int(seen["image_grid_thw"].prod()) // 4
        question = f'Does this image show "{item.prompt["prompt"]}"? Answer with yes or no.'
        text = (
            f"<|im_start|>user\n<|vision_start|>{'<|image_pad|>' * tokens}<|vision_end|>{question}<|im_end|>\n"
            "<|im_start|>assistant\n"
        )
        ids = tokenizer(text, return_tensors="pt").input_ids
        types = (ids == model.config.image_token_id).long()
        with torch.no_grad():
            chances = model(input_ids=ids, mm_token_type_ids=types, **seen).logits[0, -1].double().softmax(-1)
        yes, no = (
            sum(float(chances[tokenizer.convert_tokens_to_ids(space + word)]) for word in words for space in ("", "Ġ"))
            for words in (("yes", "Yes", "YES"), ("no", "No", "NO"))
        )
        [verdict] = open_vlm(settings(tiny_vlm))([item])
        assert verdict.score == pytest.approx(yes / (yes + no), abs=1e-6)
        assert json.loads(verdict.answer)["p_neither"] == pytest.approx(1 - yes - no, abs=1e-5)
        assert verdict.matches == (verdict.score >= 0.5)


def test_the_inputs_have_an_image_token_for_each_merged_patch_and_padding_on_the_left(tiny_vlm):
    from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer

    config, pixels = AutoConfig.from_pretrained(tiny_vlm), AutoImageProcessor.from_pretrained(tiny_vlm)
    tokenizer = AutoTokenizer.from_pretrained(tiny_vlm, padding_side="left")
    inputs = by_grid(settings(tiny_vlm), tokenizer, pixels, config)(some_items(3, 64, 112))
    counts = (inputs["image_grid_thw"].prod(1) // 4).tolist()
    assert counts == [2 * 4] * 3, "64 x 112 pixels become 56 x 112, and a merged patch has 28 x 28"
    assert (inputs["input_ids"] == config.image_token_id).sum(1).tolist() == counts
    assert torch.equal(inputs["mm_token_type_ids"], (inputs["input_ids"] == config.image_token_id).long())
    assert inputs["attention_mask"][:, -1].tolist() == [1, 1, 1]
    assert inputs["attention_mask"][:, 0].tolist() == [0, 0, 1], "the third prompt is the longest"
    assert [len(single_tokens(tokenizer, spellings)) for spellings in (YES, NO)] == [6, 6]


def test_the_threshold_decides_the_verdict_and_not_the_score(tiny_vlm):
    loose, strict = (open_vlm(settings(tiny_vlm, threshold=threshold))(some_items()) for threshold in (0.0, 1.0))
    assert [verdict.score for verdict in loose] == [verdict.score for verdict in strict]
    assert {verdict.matches for verdict in loose} == {True}
    assert {verdict.matches for verdict in strict} == {False}


def test_generated_answers_are_the_greedy_ones_whatever_the_checkpoint_prefers(tiny_vlm, tmp_path):
    alone, together = (
        open_vlm(settings(tiny_vlm, mode="answer", max_new_tokens=6, batch_size=size))(some_items()) for size in (1, 7)
    )
    assert together == alone
    assert all(verdict.score is None for verdict in alone)
    texts = [json.loads(verdict.answer)["text"] for verdict in alone]
    assert len(set(texts)) > 1
    other = shutil.copytree(tiny_vlm, tmp_path / "other")
    generation = json.loads((other / "generation_config.json").read_text())
    generation |= {"do_sample": True, "temperature": 5.0, "repetition_penalty": 3.0, "max_new_tokens": 1}
    (other / "generation_config.json").write_text(json.dumps(generation))
    assert open_vlm(settings(other, mode="answer", max_new_tokens=6))(some_items()) == alone


def test_what_the_verdicts_depend_on_is_not_where_it_runs(tiny_vlm):
    here, there = settings(tiny_vlm), settings(Path("elsewhere"), batch_size=1, workers=3)
    assert here.outcome() == there.outcome()
    assert here.outcome() != settings(tiny_vlm, question="is this {prompt} ?").outcome()
    kind = judge_kind("vlm")
    assert kind.runs_on(there).workers == 3
    names = {Path(file).name for file in files(here)}
    assert {"config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json", "chat_template.jinja"} <= names


# Bad input


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("preprocessor_config.json", "preprocessor_config.json: not found; fetch the checkpoint again"),
        ("tokenizer_config.json", "tokenizer_config.json: not found; fetch the checkpoint again"),
        ("config.json", "config.json: not found"),
        ("model.safetensors", "no weights"),
    ],
)
def test_a_missing_file_is_named(name, words, tiny_vlm, tmp_path):
    folder = shutil.copytree(tiny_vlm, tmp_path / "checkpoint")
    (folder / name).unlink()
    with pytest.raises(UserError, match=words) as caught:
        open_vlm(settings(folder))
    assert str(folder) in str(caught.value)


def test_pickled_weights_are_refused(tiny_vlm, tmp_path):
    folder = shutil.copytree(tiny_vlm, tmp_path / "checkpoint")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"only pickled weights \(pytorch_model.bin\)"):
        open_vlm(settings(folder))


def test_a_checkpoint_of_another_kind_is_refused(tiny_vlm, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    with pytest.raises(UserError, match=r"nowhere: no such checkpoint folder; set checkpoint of this judge"):
        open_vlm(settings(tmp_path / "nowhere"))
    folder = shutil.copytree(tiny_vlm, tmp_path / "text")
    LlamaForCausalLM(
        LlamaConfig(vocab_size=300, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    ).save_pretrained(folder)
    with pytest.raises(UserError, match=r"text: cannot be loaded as an image-text-to-text model"):
        open_vlm(settings(folder))


def test_a_truncated_weight_file_is_named(tiny_vlm, tmp_path):
    folder = shutil.copytree(tiny_vlm, tmp_path / "checkpoint")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"checkpoint: cannot be loaded"):
        open_vlm(settings(folder))


def test_weights_that_lack_a_tensor_are_refused(tiny_vlm, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tiny_vlm, tmp_path / "checkpoint")
    tensors = load_file(folder / "model.safetensors")
    lost = next(name for name in tensors if "q_proj.weight" in name)
    del tensors[lost]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"checkpoint: the weights lack .*q_proj.weight and 0 more; fetch"):
        open_vlm(settings(folder))


def test_an_image_that_the_model_cannot_read_is_named(tiny_vlm):
    items = [*some_items(2), Item("c-thin", {"prompt": "a line"}, np.zeros((2, 500, 3), np.uint8))]
    with pytest.raises(UserError, match=r"candidate c-thin: an image of 500 x 2 pixels"):
        open_vlm(settings(tiny_vlm))(items)


def test_a_prompt_with_the_image_placeholder_is_refused(tiny_vlm):
    items = [Item("c-odd", {"prompt": "a <|image_pad|> sign"}, some_items(1)[0].image)]
    with pytest.raises(UserError, match=r"candidate c-odd: the chat template gives 2 <\|image_pad\|> for one image"):
        open_vlm(settings(tiny_vlm))(items)


def test_a_question_without_its_prompt_is_refused():
    with pytest.raises(ValueError, match=r"the question must contain \{prompt\}"):
        VlmJudge(kind="vlm", checkpoint="x", question="Is it good?")


# The stage


@pytest.fixture
def images(tmp_path):
    """A folder with 200 images, which are four batches of the stage, for four prompts."""
    prompts = [
        {"prompt_id": f"p{i}", "prompt": f"{number} squares", "category": "count", "source": "text", "split": "text",
         "metadata": None}
        for i, number in enumerate(("one", "two", "three", "four"))
    ]  # fmt: skip
    pixels = np.random.default_rng(1).integers(0, 256, (200, 56, 56, 3), dtype=np.uint8)
    write_images(tmp_path, prompts, pixels)
    return tmp_path


def arguments(folder: Path, checkpoint: Path, out: str) -> tuple:
    config = {"run": "judges", "judges": {"qwen": {"kind": "vlm", "checkpoint": str(checkpoint), "device": "cpu"}}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    files = {"config": "config.yaml", "prompts": "prompts.parquet", "candidates": "candidates.parquet", "out": out}
    return ("--judge", "qwen", *(part for option, file in files.items() for part in (f"--{option}", folder / file)))


def test_a_killed_judge_continues_and_writes_equal_files(images, tiny_vlm):
    out, errors = images / "stdout", images / "stderr"
    process = process_of("stages.judge", *arguments(images, tiny_vlm, "verdicts.parquet"), out=out, errors=errors, cwd=ROOT)
    assert wait_until(lambda: bool(list(images.glob(".verdicts.parquet.*/0*.parquet"))), process), errors.read_text()
    process.kill()
    process.join()
    assert not (images / "verdicts.parquet").exists()
    kept = {path: path.stat().st_mtime_ns for path in images.glob(".verdicts.parquet.*/0*.parquet")}
    assert 1 <= len(kept) < 4
    result = done("judge", *arguments(images, tiny_vlm, "verdicts.parquet"))
    assert f"judge qwen: {4 - len(kept)} of {4 - len(kept)} batches" in result.stderr, "the kept batches are not judged again"
    done("judge", *arguments(images, tiny_vlm, "whole.parquet"))
    assert (images / "verdicts.parquet").read_bytes() == (images / "whole.parquet").read_bytes()
    rows = manifests.read_rows(images / "verdicts.parquet", "verdicts")
    assert len(rows) == 200
    assert all(0 <= row["score"] <= 1 for row in rows)
    assert str(tiny_vlm) not in json.dumps(manifests.facts(images / "verdicts.parquet"))


def test_the_stage_ends_with_one_line_when_the_checkpoint_is_wrong(images):
    refused(stage("judge", *arguments(images, ROOT / "models" / "nothing", "verdicts.parquet")), "no such checkpoint folder")
