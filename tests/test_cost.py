"""What a run costs, told before it: counts by hand, speeds and sizes from where they say."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from stages.common import manifests
from stages.common.config import load, validate
from stages.common.errors import UserError
from stages.families import describe
from stages.families.show_o import ShowOSampling
from stages.suites.science_t2i import SciencePrompts
from stages.tools import cost
from tests.helpers import ROOT, SMALL, TINY, done, merged, refused, stage

PROMPTS = {
    "train": [{"category": "color"}] * 18,
    "validation": [{"category": "color"}] * 8 + [{"category": "complex"}] * 4,
}


def config_of(**changes):
    return validate(merged(SMALL, changes))


def total(works, kind, **fields) -> int:
    return sum(work.count for work in works if work.kind == kind and all(getattr(work, k) == v for k, v in fields.items()))


def test_images_and_judgements_of_the_small_run():
    works = cost.works_of(config_of(), PROMPTS)
    assert total(works, "draw", name="train") == 18 * 6
    assert total(works, "draw", name="validation") == 4 * 12 * 2  # base and three arms
    assert total(works, "draw", name="replay") == 18 * 6  # c-sft's, at most
    assert total(works, "judge", name="validation of base") == 3 * 24
    assert total(works, "external", judge="shapes") == 4 * 24
    assert total(works, "reference") == 2 * 18
    assert {work.name for work in works if work.bound and work.kind == "draw"} == {"replay"}


def test_a_baseline_and_every_checkpoint_cost_their_evaluation_and_no_training():
    plain = cost.works_of(config_of(), PROMPTS)
    more = cost.works_of(config_of(baselines={"t2i-r1": "elsewhere"}, evaluate={"every_checkpoint": True}), PROMPTS)
    added = [work for work in more if work not in plain]
    assert {work.node for work in added} == {"t2i-r1", "sft-epoch1"}
    assert {(work.kind, work.name) for work in added} == {
        ("draw", "validation"), ("judge", "validation"), ("judge", "validation of base"), ("external", "validation")
    }  # fmt: skip


def test_a_scorer_sees_its_own_categories_only():
    table = {"kind": "table", "files": ["table.csv"]}
    changes = {"judges": {"detector": table}, "benchmarks": {"validation": {"scorers": {"complex": "detector"}}}}
    works = cost.works_of(config_of(**changes), PROMPTS)
    assert total(works, "external", judge="detector", node="base") == 4 * 2
    assert total(works, "external", judge="shapes", node="base") == 12 * 2


def test_a_scorer_that_an_audit_compares_with_other_judges_sees_all_images():
    table = {"kind": "table", "files": ["table.csv"]}
    changes = {"judges": {"detector": table}, "benchmarks": {"validation": {"scorers": {"complex": "detector"}}}}
    works = cost.works_of(config_of(**changes, audit={"judges": ["detector"]}), PROMPTS)
    assert total(works, "external", judge="detector", node="base") == 12 * 2


def test_a_judge_that_reads_the_answers_of_another_one_sees_nothing():
    boxes = {"kind": "detector", "checkpoint": "dfine"}
    judges = {"boxes": boxes, "again": boxes | {"rules": "upstream"}, "finer": boxes | {"detection_threshold": 0.1}}
    chosen = {"scorers": {"complex": "boxes"}, "second_scorers": {"complex": "again", "color": "finer"}}
    works = cost.works_of(config_of(judges=judges, benchmarks={"validation": chosen}), PROMPTS)
    assert total(works, "external", judge="boxes", node="base") == 4 * 2
    assert total(works, "external", judge="finer", node="base") == 8 * 2
    assert not [work for work in works if work.judge == "again"]
    audited = config_of(judges=judges, benchmarks={"validation": chosen}, audit={"judges": ["again"]})
    assert total(cost.works_of(audited, PROMPTS), "external", judge="again", node="base") == 12 * 2  # boxes sees complex only


def test_an_audit_counts_what_its_models_draw_and_judge():
    config = load(ROOT / "configs/tiny-audit.yaml")
    assert list(config.audit.models) == ["tiny-janus", "tiny-janus-cool", "tiny-janus-hot"]
    works = cost.works_of(config, {"validation": PROMPTS["validation"]})
    assert {(work.kind, work.node, work.count) for work in works} == {
        (kind, model, 12) for kind in ("draw", "judge", "external") for model in config.audit.models
    }
    chosen = config.audit.model_copy(update={"judges": ["people"]})
    people = config.model_copy(update={"audit": chosen, "judges": {"people": config.judge("shapes")}})
    assert total(cost.works_of(people, {"validation": PROMPTS["validation"]}), "external", judge="people") == 3 * 12
    text = done("tools.cost", "--configfile", ROOT / "configs/tiny-audit.yaml").stdout
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "Run tiny-audit from its beginning. An audit." in lines
    assert lines.count("validation 720 3 models") == 2  # 240 prompts, drawn and judged
    assert "shapes, kind shapes 720 3 models" in lines
    assert "Training" not in text
    size = sum(path.stat().st_size for path in describe("janus").files(TINY, "draw")) / 1e9
    drawing = next(line for line in lines if line.startswith("tiny-janus-hot, drawing"))
    assert float(drawing.split()[2]) == pytest.approx(cost.SECONDS["draw"] * size * 240 / 3600, rel=0.01)


def test_drawing_in_steps_takes_what_its_operations_take(tmp_path):
    text = {"hidden_size": 2048, "num_hidden_layers": 24, "intermediate_size": 8192}
    fields = {"model_type": "show_o", "text_config": text, "image_tokens": 1024}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    draws = describe("show_o").drawing_flops
    each = draws(tmp_path, ShowOSampling(guidance_scale=0, steps=1))
    weights = 24 * (4 * 2048**2 + 2 * 2048 * 8192)
    assert each == pytest.approx(2 * 1026 * weights, rel=0.1)  # attention is the rest
    assert draws(tmp_path, ShowOSampling(guidance_scale=5, steps=50)) == 100 * each

    model = {"family": "show_o", "checkpoint": str(ROOT / "models/tiny-show-o"), "dtype": "bfloat16"}
    generate = {"sampling": {"guidance_scale": 1.0, "steps": 10000}}
    config = validate({**SMALL, "model": model, "generate": generate})
    seconds, source = cost.limit(config, "draw")
    assert seconds == pytest.approx(draws(ROOT / "models/tiny-show-o", config.sampling()) / cost.FLOPS["bfloat16"])
    assert "TFLOP" in source
    assert cost.limit(config, "judge")[0] == cost.SECONDS["judge"] * cost.gigabytes(config)


def test_prompts_of_a_parquet_file_are_its_rows_whatever_its_images_hold(tmp_path):
    path = tmp_path / "science.parquet"
    pq.write_table(pa.table({"implicit_prompt": ["a laptop"] * 3, "image": [b"\n" * 5000] * 3}), path)
    chosen = SciencePrompts(source="science-t2i", files=[str(path)])
    assert cost.prompt_limit(chosen) == 3
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=r"science\.parquet: not a readable Parquet file .* fetch it again"):
        cost.prompt_limit(chosen)


def test_gpu_memory_of_a_training_follows_from_its_state_and_from_zero():
    numbers = cost.tensor_numbers(describe("janus").files(TINY, "draw"))

    def memory(**train) -> float:
        return cost.gpu_memory(config_of(model={"dtype": "bfloat16"}, train=train))["training, sft"] / numbers

    assert cost.gpu_memory(config_of(model={"dtype": "bfloat16"}))["drawing, judging, reference"] == 2 * numbers
    assert cost.gpu_memory(config_of(model={"dtype": "float32"}))["drawing, judging, reference"] == 4 * numbers
    assert memory() == 16  # weights, gradients and two moments, all in float32
    assert memory(gpus=4, micro_batch_size=2) == 2 + (2 + 12) / 4
    assert memory(gpus=4, micro_batch_size=2, zero_stage=3) == (2 + 2 + 12) / 4
    assert memory(offload=True) == 2 + 2  # AdamW's state is in the memory of the machine
    assert memory(lora_rank=4) == 2
    on_gpus = config_of(model={"dtype": "bfloat16", "device": "cuda"})
    assert "Memory of each GPU" in cost.report(on_gpus)
    assert "Memory of each GPU" not in cost.report(config_of(model={"device": "cpu"}))


def test_an_oracle_judges_the_training_images_and_the_pool_in_place_of_the_model():
    truth = {"objective": "sft", "epochs": 2, "replay_epochs": [1], "pairs": {"filter": "oracle", "oracle": "shapes"}}
    works = cost.works_of(
        validate({**merged(SMALL, {}), "arms": {"truth": truth}, "benchmarks": {}}), {"train": PROMPTS["train"]}
    )
    assert total(works, "external", name="train") == total(works, "external", name="replay") == 108
    assert not [work for work in works if work.kind == "judge"]


def test_rows_and_steps_are_bounds_by_segment():
    found = {training.node: training for training in cost.trainings(config_of(), 18)}
    assert found.keys() == {"sft-epoch1", "sft", "dpo", "c-sft"}
    assert (found["sft"].rows, found["sft"].epochs, found["sft"].steps) == (18 * 2, 1, 5)  # 36 rows in batches of 8
    assert (found["dpo"].rows, found["dpo"].steps) == (18, 3)
    few = config_of(arms={"sft": {"candidates": 1}})
    assert cost.rows_per_prompt(few, "sft") == 1


def test_calls_of_an_endpoint_are_named_apart():
    judges = {"gpt": {"kind": "openai", "endpoint": "http://node7:8000/v1", "model": "m"}}
    text = cost.report(config_of(judges=judges, benchmarks={"validation": {"judge": "gpt"}}))
    apart = text.split("Calls of endpoints, which may cost money\n")[1].split("\n\n")[0]
    assert apart.split() == ["gpt,", "http://node7:8000/v1", "96", "4", "models"]
    assert "External judgements" not in text


def test_hours_follow_from_the_model_of_the_time_limits_unless_the_device_was_measured():
    config = config_of()
    works = cost.works_of(config, PROMPTS)
    size = sum(path.stat().st_size for path in describe("janus").files(TINY, "draw")) / 1e9
    hours, speed = cost.hours(config, works, cost.speeds(config, None))["drawing"]
    assert hours == pytest.approx(cost.SECONDS["draw"] * size * total(works, "draw") / 3600)
    assert speed.source.startswith("estimate")
    facts = json.loads((ROOT / "speed/results/generation-tiny-cpu.json").read_text())
    hours, speed = cost.hours(config, works, cost.speeds(config, "EPYC"))["drawing"]
    per_image = next(row for row in facts["results"] if row["name"] == "engine")["seconds_per_1000_images"] / 1000
    assert hours == pytest.approx(per_image * total(works, "draw") / 3600)
    assert "generation-tiny-cpu.json (AMD EPYC, 2 threads)" in speed.source
    assert cost.speeds(config, "H100")["draw"].source.startswith("estimate")


def test_image_sizes_are_stated_measured_or_assumed_and_say_which(small_inputs, tmp_path):
    assert cost.image_size(tmp_path, None).source.startswith("assumed")
    assert cost.image_size(tmp_path, 99).image == 99
    candidates = tmp_path / "base/candidates/train"
    candidates.mkdir(parents=True)
    for ending in ("parquet", "tar"):
        (candidates / f"0000.{ending}").write_bytes((small_inputs / f"candidates.{ending}").read_bytes())
    size = cost.image_size(tmp_path, None)
    count = len(manifests.read_rows(candidates / "0000.parquet", "candidates"))
    assert size.image * count == (candidates / "0000.tar").stat().st_size
    assert f"measured, {count} images" in size.source


def test_the_numbers_of_a_checkpoint_are_counted_from_its_header():
    from safetensors.numpy import load_file

    numbers = sum(tensor.size for tensor in load_file(TINY / "model.safetensors").values())
    assert cost.tensor_numbers(describe("janus").files(TINY, "train")) == numbers
    sizes = cost.disk(config_of(), [], cost.ImageSize(1, 1, ""))
    assert sizes["saves"] > 4 * 2 * 12 * numbers  # four trainings with two saves each
    lora = cost.disk(config_of(train={"lora_rank": 4}), [], cost.ImageSize(1, 1, ""))
    assert lora["saves"] == 0


def test_files_are_laid_over_each_other_as_snakemake_does(tmp_path):
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"run": "mine", "benchmarks": {"validation": {"images_per_prompt": 1}}}))
    config = load(ROOT / "config.yaml", tmp_path / "mine.yaml")
    assert (config.run, config.benchmarks["validation"].images_per_prompt) == ("mine", 1)
    assert config.benchmarks["validation"].judge == "shapes"
    text = done("tools.cost", "--configfile", ROOT / "config.yaml", tmp_path / "mine.yaml").stdout
    assert "Run mine" in text
    assert [line.split() for line in text.splitlines() if line.strip().startswith("validation ")][1] == [
        "validation", "1,200", "5", "models"
    ]  # fmt: skip


def test_a_checkpoint_that_is_missing_is_one_message(tmp_path):
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"model": {"checkpoint": "no/such/folder"}}))
    result = stage("tools.cost", "--configfile", ROOT / "config.yaml", tmp_path / "mine.yaml")
    refused(result, "no/such/folder", "model.checkpoint")
