"""The presets for Janus-Pro and Show-o with the published prompts, and small checkpoints in the place of their own."""

import subprocess
import sys
from collections import Counter

import pytest
import yaml

from stages.common.config import load
from stages.tools.rescoring import source_of
from tests.helpers import BENCHMARKS, ROOT, TINY, completed, done, environment, merged, refused
from tests.test_lmms import prepare_pope
from tests.test_science import APPLE, LAPTOP, write_benchmark
from tests.tiny_judges import write_tiny_blip, write_tiny_clip, write_tiny_detector, write_tiny_geneval
from tests.tiny_show_o import write_tiny_show_o
from tests.tiny_vlm import write_tiny_vlm

JUDGES = {
    "t2i-compbench": ["qwen", "attributes", "objects", "action", "all-three"],
    "geneval": ["qwen", "geneval"],
    "science-t2i": ["qwen", "science"],
}
# The checkpoints that each preset evaluates. HermesFlow is a checkpoint of Show-o.
ARMS = ["base", "sft", "dpo", "c-sft", "c-dpo"]
EVALUATED = {"janus-pro-7b": ARMS, "janus-pro-1b": ARMS, "show-o": ["hermesflow", *ARMS]}
UNDERSTANDING = ("pope", "mmb", "gqa", "mmmu", "seed")
# Everything of a preset but its understanding benchmarks, with few prompts and one arm, so that it runs on a laptop.
FEW = {
    "prompts": {"count": 16},
    "benchmarks": {
        "t2i-compbench": {"prompts": {"count": 16}, "images_per_prompt": 1},
        "geneval": {"prompts": {"count": 6}, "images_per_prompt": 1},
        "science-t2i": {"images_per_prompt": 1},
    },
    "understanding": dict.fromkeys(UNDERSTANDING),
    "generate": {"candidates": 2, "batch_size": 16, "shards": 1},
    "pairs": {"accept_threshold": 0.0, "reject_threshold": 0.0},  # the tiny model does not know the words of these prompts
    "train": {"batch_size": 4, "micro_batch_size": 4, "gpus": 1, "warmup_steps": 0, "fork_epochs": [1]},
    "arms": {"sft": {"epochs": 1}, "dpo": None, "c-sft": None, "c-dpo": None},
    "baselines": {"t2i-r1": str(TINY)},
}
needs_benchmarks = pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="the benchmarks' prompt files are not there")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with data/ and checkpoints/, as the presets expect them."""
    folder = tmp_path_factory.mktemp("preset")
    (folder / "data/science-t2i").mkdir(parents=True)
    for name in ("t2i_compbench", "geneval"):
        (folder / "data" / name).symlink_to(BENCHMARKS / name)
    ice = APPLE | {"implicit_prompt": "ice in the sun", "category": "Chemistry"}
    write_benchmark(folder / "data/science-t2i/test-00000-of-00001.parquet", LAPTOP, APPLE, ice)
    config = ROOT / "configs/janus-pro-7b.yaml"
    prompts, phrases = folder / "data/compbench.parquet", folder / "data/phrases.parquet"
    done("prompts", "--config", config, "--set", "t2i-compbench", "--out", prompts, cwd=folder)
    done("phrases", "--prompts", prompts, "--by", "rules", "--out", phrases)

    checkpoints = folder / "checkpoints"
    write_tiny_blip(checkpoints / "blip-vqa-capfilt-large")
    for name in ("clip-vit-base-patch32", "SciScore"):
        write_tiny_clip(checkpoints / name)
    write_tiny_vlm(checkpoints / "Qwen2.5-VL-7B-Instruct")
    write_tiny_detector(folder / "written")
    write_tiny_geneval(folder / "written")
    names = {
        "rt-detr": "dfine_x_obj365",
        "dpt": "dpt-hybrid-midas",
        "detector": "mask2former-swin-small-coco-instance",
        "clip": "clip-vit-large-patch14",
    }
    for old, new in names.items():
        (folder / "written" / old).rename(checkpoints / new)
    for size in ("7B", "1B"):
        (checkpoints / f"Janus-Pro-{size}").symlink_to(TINY)
    for seed, name in enumerate(("show-o-512x512", "HermesFlow")):
        write_tiny_show_o(checkpoints / name, seed=seed)
    return folder


def run_preset(folder, preset: str, *arguments: object, **changes) -> subprocess.CompletedProcess:
    """Run snakemake with a preset and with changes laid over it."""
    (folder / "config.yaml").write_text(yaml.safe_dump(changes))
    files = ("--configfile", ROOT / f"configs/{preset}.yaml", folder / "config.yaml")
    command = list(map(str, ("snakemake", "--directory", folder, *files, *arguments)))
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)


def dry_run(folder, preset: str, *arguments: object, **changes) -> subprocess.CompletedProcess:
    asked = {name: {"python": sys.executable} for name in UNDERSTANDING}  # planning only looks whether it is there
    return run_preset(folder, preset, "-n", *arguments, **{"generate": {"shards": 2}, "understanding": asked} | changes)


@needs_benchmarks
@pytest.mark.parametrize("preset", EVALUATED)
def test_a_preset_plans_all_benchmarks_with_their_judges(preset, place):
    result = dry_run(place, preset, "--printshellcmds")
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr
    judged = [line for line in result.stdout.splitlines() if "python -m stages.judge " in line]
    found = Counter(
        (line.split("--judge ")[1].split()[0], line.split("--prompts ")[1].split()[0].split("/")[-1].removesuffix(".parquet"))
        for line in judged
    )
    shards = 2 * len(EVALUATED[preset])
    assert found == {(judge, name): shards for name, judges in JUDGES.items() for judge in judges}
    spatial = next(line for line in judged if "--judge objects " in line)
    assert "--categories spatial 3d_spatial numeracy" in spatial
    assert "--categories complex " in next(line for line in judged if "--judge all-three " in line)
    # Upstream's formulas are applied to the boxes that are there already.
    again = [line for line in result.stdout.splitlines() if "python -m stages.rescore " in line]
    for judge, categories in (("objects", "spatial 3d_spatial"), ("all-three", "complex")):
        lines = [line for line in again if f"--judge {judge}-upstream " in line]
        assert len(lines) == shards
        assert all(f"/verdicts/{judge}/t2i-compbench/" in line and f"--categories {categories} " in line for line in lines)
    assert not any("--categories" in line for line in judged if "--judge qwen" in line)
    for node in EVALUATED[preset]:
        for name in JUDGES:
            assert f"results/{preset}/{node}/metrics/{name}.parquet" in result.stdout


@needs_benchmarks
def test_a_wrong_checkpoint_of_a_judge_is_named_before_anything_is_drawn(place):
    science = {"science": {"checkpoint": "checkpoints/blip-vqa-capfilt-large"}}
    words = "blip-vqa-capfilt-large/config.json: model_type is 'blip', not 'clip'; set checkpoint of the judge sci-score"
    refused(dry_run(place, "janus-pro-7b", judges=science), words)
    absent = {"objects": {"depth": "checkpoints/absent"}}
    refused(dry_run(place, "janus-pro-7b", judges=absent), "absent/config.json: not found; set depth of the judge detector")
    absent = {"attributes": {"phrases": "data/absent.parquet"}}
    refused(dry_run(place, "janus-pro-7b", judges=absent), "data/absent.parquet: no such file; write the prompts' noun phrases")


def with_phrases(folder) -> dict:
    """Write the noun phrases of the few prompts, and return the changes that make a preset run on them."""
    preset = yaml.safe_load((ROOT / "configs/janus-pro-7b.yaml").read_text())
    (folder / "few.yaml").write_text(yaml.safe_dump(merged(preset, FEW)))
    prompts, phrases = folder / "data/few.parquet", folder / "data/few-phrases.parquet"
    done("prompts", "--config", folder / "few.yaml", "--set", "t2i-compbench", "--out", prompts, cwd=folder)
    done("phrases", "--prompts", prompts, "--by", "rules", "--out", phrases)
    attributes = {"phrases": "data/few-phrases.parquet"}
    return FEW | {"judges": {"attributes": attributes, "all-three": {"attributes": attributes}}}


def assert_the_tables_are_whole(results) -> None:
    lines = (results / "tables/generation.md").read_text().splitlines()
    models = [line.split("|")[1].strip() for line in lines if line.startswith("| ")]
    assert models[1:] == ["base", "base, paper", "t2i-r1", "t2i-r1, paper", "sft", "sft, paper"]
    base = [cell.strip() for cell in lines[4].split("|")[2:-1]]
    assert len(base) == 9
    assert all(", n " in cell for cell in base[::3]), "Gen. of every benchmark is measured"
    for name in ("generation", "by_subtask"):
        assert {path.suffix for path in (results / "tables").glob(f"{name}.*")} == {".csv", ".md", ".tex"}
    subtasks = (results / "tables/by_subtask.md").read_text().replace("\\", "")
    assert "spatial (medium) second Gen." in subtasks
    assert "complex (medium) second Gen." in subtasks
    assert all(stratum in subtasks for stratum in ("single_object (easy)", "physics (hard)"))


@needs_benchmarks
@pytest.mark.slow
def test_a_small_run_of_a_preset_ends_with_the_tables(place):
    result = run_preset(place, "janus-pro-7b", "--cores", 2, **with_phrases(place))
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert_the_tables_are_whole(place / "results/janus-pro-7b")


@needs_benchmarks
@pytest.mark.slow
@pytest.mark.lmms
def test_the_same_run_ends_with_the_table_of_understanding(place, lmms_python):
    prepare_pope(place / "data/hf")
    pope = {"python": str(lmms_python), "max_new_tokens": 8}
    asked = {"understanding": dict.fromkeys(UNDERSTANDING) | {"pope": pope}}
    result = run_preset(place, "janus-pro-7b", "--cores", 2, **with_phrases(place) | asked)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert_the_tables_are_whole(place / "results/janus-pro-7b")
    lines = (place / "results/janus-pro-7b/tables/understanding.md").read_text().splitlines()
    models = [line.split("|")[1].strip() for line in lines if line.startswith("| ")]
    assert [model for model in models[1:] if "paper" not in model] == ["base", "t2i-r1", "sft"]
    assert "pope" in lines[2]


@needs_benchmarks
def test_an_endpoint_takes_the_place_of_the_judge_in_the_process(place):
    judges = {"qwen-72b": {"kind": "openai", "endpoint": "http://node7:8000/v1", "model": "Qwen/Qwen2.5-VL-72B-Instruct"}}
    result = dry_run(
        place, "janus-pro-7b", "--printshellcmds", judges=judges, benchmarks={n: {"judge": "qwen-72b"} for n in JUDGES}
    )
    assert result.returncode == 0, result.stderr
    assert "--judge qwen-72b" in result.stdout
    assert "--judge qwen " not in result.stdout


@needs_benchmarks
@pytest.mark.slow
def test_the_published_training_prompts_are_in_none_of_the_benchmarks(place):
    preset = yaml.safe_load((ROOT / "configs/janus-pro-7b.yaml").read_text())
    del preset["understanding"]  # whose environment need not be there
    (place / "config.yaml").write_text(yaml.safe_dump(preset))
    text = completed(place, "--cores", 1, "results/janus-pro-7b/prompts/sets.parquet")
    assert "553 prompts" in text
    assert "480 prompts: 3d_spatial 60" in text


def test_a_judge_that_measures_something_else_looks_itself():
    config = load(ROOT / "configs/janus-pro-7b.yaml")
    found = {name: source_of(config, name) for name in config.judges}
    assert {name: first for name, first in found.items() if first} == {
        "objects-upstream": "objects", "all-three-upstream": "all-three"
    }  # fmt: skip

    def changed(**fields):
        return config.model_copy(update=fields)

    upstream = config.judge("objects-upstream")
    finer = upstream.model_copy(update={"detection_threshold": 0.1})
    assert source_of(changed(judges=config.judges | {"objects-upstream": finer}), "objects-upstream") is None
    strict = upstream.model_copy(update={"threshold": 0.6, "batch_size": 1})
    assert source_of(changed(judges=config.judges | {"objects-upstream": strict}), "objects-upstream") == "objects"
    chosen = config.benchmarks["t2i-compbench"]
    fewer = chosen.model_copy(update={"scorers": {"numeracy": "objects"}})  # which sees no image of spatial
    assert source_of(changed(benchmarks={"t2i-compbench": fewer}), "objects-upstream") is None


def test_all_presets_measure_the_same():
    janus, show_o = (load(ROOT / f"configs/{preset}.yaml").model_dump() for preset in ("janus-pro-7b", "show-o"))
    for section in ("prompts", "benchmarks", "understanding", "judges"):
        assert janus[section] == show_o[section], section


def test_the_presets_for_janus_pro_differ_in_the_model_and_in_what_fits_on_a_gpu():
    large, small = (load(ROOT / f"configs/janus-pro-{size}.yaml").model_dump() for size in ("7b", "1b"))
    for section in ("prompts", "benchmarks", "understanding", "judges", "generate", "score", "pairs", "arms", "evaluate"):
        assert large[section] == small[section], section
    assert {key for key in large["train"] if large["train"][key] != small["train"][key]} == {"micro_batch_size", "gpus"}
    assert {key for key in large["model"] if large["model"][key] != small["model"][key]} == {"checkpoint"}
