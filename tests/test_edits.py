"""An edit re-runs exactly the rules whose results it can change, and the rules that depend on them."""

import re

import pytest

from tests.helpers import edited, planned_outputs, rerun, restored, write_config

AFTER_JUDGE = {"judge", "evaluate", "summary", "tables", "contact_sheet", "judge_report", "pages"}
# When training re-runs, so does everything that the trained models draw and judge, with the replay and the later schedules.
AFTER_TRAIN = {"train", "generate", "score", "replay_pairs", "replay_merge", "schedule", *AFTER_JUDGE}
AFTER_SCORE = {"pairs", "reference", "replay_pool", *AFTER_TRAIN}
AFTER_PROMPTS = {"prompts", "prompt_sets", *AFTER_SCORE}

CONFIG, SETTINGS, MANIFESTS = (f"stages/common/{name}.py" for name in ("config", "settings", "manifests"))
BASE = "stages/families/base.py"
REGISTRIES = (f"stages/{name}/__init__.py" for name in ("families", "judges", "suites", "understanding"))
FAMILIES, JUDGES, SUITES, UNDERSTANDING = REGISTRIES
JANUS, DECODE = "stages/families/janus/family.py", "stages/families/janus/decode.py"
TRAINER, ASKING, METRICS = "stages/training/trainer.py", "stages/families/tools/asking.py", "stages/tools/metrics.py"

# Each edit: file, old text (empty: append), new text, and the exact set of rules that `snakemake -n` then plans.
EDITS: dict[str, tuple[str, str, str, set[str]]] = {
    # prose and what nothing reads
    "a docstring of the interface": (BASE, "Draw one candidate for each prompt", "Paint one candidate for each prompt", set()),
    "a docstring of the configuration": (CONFIG, '"""How candidates are drawn."""', '"""How we draw."""', set()),
    "a comment in a stage": ("stages/score.py", "", "\n# a remark\n", set()),
    "the layout of a stage": ("stages/pairs.py", "    pairs: list[Row] = []\n", "    pairs: list[Row] = [\n    ]\n", set()),
    "an annotation": (DECODE, "guidance_scale: float,", "guidance_scale: 'float',", set()),
    "the description of a setting": (CONFIG, "Gradients are clipped to this norm.", "Clip gradients to this.", set()),
    "the help of an argument": ("stages/generate.py", '"image shard (tar), in the folder of --out"', '"a tar"', set()),
    "the message of an error": ("stages/schedule.py", "no training rows, every prompt", "no rows: every prompt", set()),
    "what is printed": (TRAINER, "rows/s{share}", "rows a second{share}", set()),
    "a new function that nothing calls": ("stages/common/seeds.py", "", "\n\ndef spare(x):\n    return x + 1\n", set()),
    "a new setting that keeps behaviour": (
        CONFIG,
        '    """How candidates are drawn."""\n',
        '    """How candidates are drawn."""\n    spare: int = Field(default=0, description="Nothing reads it.")\n',
        set(),
    ),
    "a new setting of the training that nothing reads": (
        CONFIG,
        "    lora_alpha: Positive",
        '    spare: int = Field(default=0, description="Nothing reads it.")\n    lora_alpha: Positive',
        set(),
    ),
    "a new setting of a suite that nothing reads": (
        "stages/suites/shapes.py",
        "    categories: list[str] = Field(",
        '    spare: int = Field(default=0, description="Nothing reads it.")\n    categories: list[str] = Field(',
        set(),
    ),
    "a new setting of a judge that nothing reads": (
        "stages/judges/shapes.py",
        '    kind: Literal["shapes"]\n',
        '    kind: Literal["shapes"]\n    spare: int = 0\n',
        {"tables", "pages"},  # which say how images were drawn and judged
    ),
    "a new setting of the sampling that nothing reads": (
        "stages/families/janus/__init__.py",
        "    temperature: Annotated",
        '    spare: int = Field(default=0, description="Nothing reads it.")\n    temperature: Annotated',
        {"tables", "pages"},  # which say how images were drawn and judged
    ),
    "a new family": (FAMILIES, "FAMILIES = {\n", 'FAMILIES = {\n    "other": "stages.families.other:OTHER",\n', set()),
    "a new kind of judge": (JUDGES, "JUDGES = {\n", 'JUDGES = {\n    "again": "stages.judges.shapes:SHAPES",\n', set()),
    "a new suite": (SUITES, "SUITES = {\n", 'SUITES = {\n    "again": "stages.suites.shapes:SHAPES",\n', set()),
    "a new kind of understanding benchmark": (
        UNDERSTANDING,
        "UNDERSTANDING = {\n",
        'UNDERSTANDING = {\n    "again": "stages.understanding.shapes:SHAPES",\n',
        set(),
    ),
    "the code of an understanding benchmark that is not used": ("stages/understanding/shapes.py", "24", "32", set()),
    "a new kind of manifest": (
        MANIFESTS,
        '    "prompts": {\n',
        '    "notes": {"note": required(TEXT, description="")},\n    "prompts": {\n',
        set(),
    ),
    "another judge's code": ("stages/judges/table.py", "WORDS = {", 'WORDS = {"ja": True, ', set()),
    "another suite's code": ("stages/suites/text.py", 'for suffix in ("_train", "_val"):', 'for suffix in ("_train",):', set()),
    "a check of the configuration": (CONFIG, "if self.reject_threshold > self.accept_threshold:", "if False:", set()),
    "the README": ("README.md", "", "\nmore\n", set()),
    # code that changes results
    "the sampler": (DECODE, "cumsum(-1)\n", "cumsum(-1) * 1.0\n", AFTER_SCORE),
    "how the judge is asked": (ASKING, '"{prompt}", prompt)', '"{prompt}", prompt.strip())', AFTER_SCORE),
    "the trainer": (
        TRAINER,
        '"weight_decay": settings.weight_decay,',
        '"weight_decay": 1 * settings.weight_decay,',
        AFTER_TRAIN,
    ),
    "how Janus trains": (JANUS, '"vision": (vision,),', '"vision": (vision, vision),', AFTER_TRAIN),
    "the order of training": (
        "stages/schedule.py",
        "whole = -(-len(order) // batch_size)",
        "whole = (len(order) // batch_size)",
        AFTER_TRAIN,
    ),
    "the selection": (
        "stages/pairs.py",
        "top, low = accepted[0], rejected[0]",
        "top, low = accepted[0], rejected[-1]",
        AFTER_SCORE,
    ),
    "the oracle": ("stages/shapes/oracle.py", "TOLERANCE = 0.03", "TOLERANCE = 0.02", AFTER_JUDGE),
    "a metric": (
        METRICS,
        "return image.scorer.grade if",
        "return 1 * image.scorer.grade if",
        {"evaluate", "summary", "tables", "pages"},
    ),
    "an interval of the judge report": (
        "stages/tools/intervals.py",
        "inv_cdf(0.975)",
        "inv_cdf(0.95)",
        {"judge_report", "pages"},
    ),
    "the table": ("stages/common/files.py", "round(v, 3)", "round(v, 4)", {"summary", "tables", "pages"}),
    "the replayed pool": (
        "stages/replay.py",
        'WAITS = "no_accepted"',
        'WAITS = "no_" + "accepted"',
        {"replay_pool", *AFTER_TRAIN},
    ),
    "the template of a page": ("stages/pages/templates/gallery.html", "<h1>Gallery</h1>", "<h1>Images</h1>", {"pages"}),
    "the script of a page": ("stages/pages/assets/gallery.js", "", "\n// more\n", {"pages"}),
    "a page's code": ("stages/pages/gallery.py", "SEEN = 160", "SEEN = 100", {"pages"}),
    "the prompts": ("stages/prompts.py", '.lower().rstrip(".").rstrip()', '.lower().rstrip(".")', AFTER_PROMPTS),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_runs_what_it_can_change(name, run):
    source, *_ = run
    path, old, new, expected = EDITS[name]
    with edited(source / path, old, new):
        assert rerun(run) == expected


def test_nothing_runs_when_nothing_changed(run):
    assert rerun(run) == set()


def test_an_edit_of_the_judging_draws_nothing_for_training(run):
    source, *_ = run
    with edited(source / "stages/score.py"):
        assert rerun(run, "--until", "pairs") == {"score", "pairs"}
        assert "results/small/sft/candidates/" in planned_outputs(run, "generate")
        assert "base/candidates" not in planned_outputs(run, "generate")


def test_the_learning_rate_runs_training_and_what_follows(run):
    _, folder, _ = run
    with restored(folder / "config.yaml"):
        write_config(folder, train={"learning_rate": 1e-4})
        rules = rerun(run)
        assert "train" in rules
        assert not rules & {"prompts", "pairs", "reference"}
        assert "base/" not in planned_outputs(run, "generate") + planned_outputs(run, "judge")
        assert "small/base/" not in planned_outputs(run, "score")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"generate": {"batch_size": 10}, "score": {"batch_size": 5}, "report": {"prompts": 2}}, {"contact_sheet"}),
        ({"model": {"workers": 2}}, set()),
        ({"train": {"micro_batch_size": 4, "save_every_steps": 7}}, set()),
        ({"evaluate": {"bootstrap": 300}}, {"evaluate", "summary", "tables", "pages"}),
        ({"score": {"verdict_threshold": 0.6}}, AFTER_SCORE),
    ],
    ids=["speed and the sheet", "workers", "saves", "intervals", "verdict threshold"],
)  # fmt: skip
def test_a_setting_runs_what_reads_it(changes, expected, run):
    _, folder, _ = run
    with restored(folder / "config.yaml"):
        write_config(folder, **changes)
        assert rerun(run) == expected


def test_adding_an_arm_runs_only_that_arm(run):
    _, folder, _ = run
    with restored(folder / "config.yaml"):
        write_config(folder, arms={"sft-slow": {"objective": "sft", "epochs": 2, "train": {"learning_rate": 1e-5}}})
        rules = rerun(run)
        assert "pairs" not in rules
        for stage in ("generate", "score", "train", "judge", "evaluate"):
            nodes = set(re.findall(r"results/small/([^/]+)/", planned_outputs(run, stage)))
            assert nodes <= {"sft-slow", "sft-slow-epoch1"}
            assert nodes


def test_adding_a_benchmark_runs_only_that_benchmark(run):
    _, folder, _ = run
    benchmark = {"prompts": {"source": "shapes", "split": "validation", "categories": ["color"], "count": 3}, "judge": "shapes"}
    with restored(folder / "config.yaml"):
        write_config(folder, benchmarks={"colours": benchmark})
        drawn = {"prompts", "prompt_sets", "generate", "score", "judge", "evaluate"}
        assert rerun(run) == drawn | {"summary", "tables", "judge_report", "pages"}
        for stage in ("generate", "score", "judge"):
            assert {"colours"} == {line.split("/")[-2] for line in planned_outputs(run, stage).splitlines()}


def test_adding_an_understanding_benchmark_asks_every_arm_and_nothing_else(run):
    _, folder, _ = run
    with restored(folder / "config.yaml"):
        write_config(folder, understanding={"scenes": {"kind": "shapes", "count": 8, "captions": 0}})
        assert rerun(run) == {"understand", "count_answers", "summary", "tables", "pages"}
        asked = {line.split("/")[2] for line in planned_outputs(run, "understand").splitlines()}
        assert asked == {"base", "sft", "dpo", "c-sft"}


def test_learning_curves_evaluate_the_checkpoints_within_the_arms_and_nothing_else(run):
    _, folder, _ = run
    with restored(folder / "config.yaml"):
        write_config(folder, evaluate={"every_checkpoint": True})
        assert rerun(run) == {"generate", "score", "judge", "evaluate", "learning_curves", "pages"}
        for stage in ("generate", "score", "judge", "evaluate"):
            assert {line.split("/")[2] for line in planned_outputs(run, stage).splitlines()} == {"sft-epoch1"}
