"""Bad input ends with one message that names file, field and remedy, an exit code other than 0, and no output."""

import json
import os
import shutil
import socket
import subprocess
import sys
from contextlib import suppress

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers import ROOT, TINY, environment, refused, snakemake, stage, write_config

CONFIGURATIONS = [
    ({"train": {"lerning_rate": 1e-4}}, ["train.lerning_rate", "did you mean 'learning_rate'"]),
    ({"generat": {}}, ["generat", "did you mean 'generate'"]),
    ({"generate": {"candidates": 0}}, ["generate.candidates", "greater than or equal to 1"]),
    ({"generate": {"candidates": "many"}}, ["generate.candidates", "valid integer"]),
    ({"arms": {"sft": {"objective": "ppo"}}}, ["arms.sft.objective", "'sft' or 'dpo'"]),
    ({"arms": {"sft": {"objective": "sft", "epochs": 2, "replay_epochs": [2]}}}, ["arms.sft", "below epochs"]),
    ({"arms": {"base": {"objective": "sft"}}}, ["base", "rename"]),
    ({"arms": {"sft": {"objective": "sft", "train": {"betta": 1}}}}, ["arms.sft.train.betta", "did you mean 'beta'"]),
    ({"train": {"batch_size": 7, "micro_batch_size": 2}}, ["multiple of micro_batch_size"]),
    ({"score": {"question": "is it good?"}}, ["score.question", "{prompt}"]),
    ({"prompts": {"source": "text"}}, ["prompts.files", "required"]),
    ({"prompts": {"source": "shapes", "splitt": "validation"}}, ["prompts.splitt", "did you mean 'split'"]),
    ({"arms": {"sft": {"objective": "sft", "pairs": {"filter": "oracle"}}}}, ["arms.sft.pairs", "names a judge"]),
    (
        {"arms": {"sft": {"objective": "sft", "pairs": {"filter": "oracle", "oracle": "table"}}}},
        ["arms.sft.pairs.oracle", "judges.table"],
    ),
    ({"benchmarks": {"validation": {"judge": "nobody"}}}, ["benchmarks.validation.judge", "nobody", "shapes, table, family"]),
    ({"benchmarks": {"train": {"prompts": {"source": "shapes"}}}}, ["benchmarks", "train", "choose another"]),
    ({"arms": {"sft": {"objective": "sft", "epochs": 4}, "sft-epoch3": {"objective": "sft"}}}, ["sft-epoch3", "rename"]),
    ({"baselines": {"sft": "elsewhere"}}, ["baselines.sft", "the arm sft", "rename the baseline"]),
    ({"baselines": {"sft-epoch1": "elsewhere"}}, ["baselines.sft-epoch1", "the arm sft", "rename the baseline"]),
    ({"baselines": {"base": "elsewhere"}}, ["baselines.base", "the untrained model", "rename the baseline"]),
    ({"baselines": {"tables": "elsewhere"}}, ["baselines.tables", "folder of this name"]),
    ({"pairs": {"accept_threshold": 0.5, "reject_threshold": 0.6}}, ["pairs", "reject_threshold 0.6 is above"]),
    ({"arms": {"sft": {"objective": "sft", "pairs": {"accept_threshold": 0.1}}}}, ["arms.sft.pairs", "reject_threshold 0.9"]),
    ({"train": {"trainable": "llm+eyes"}}, ["train", "trainable", "eyes", "projector"]),
    ({"generate": {"sampling": {"guidance": 3}}}, ["generate.sampling.guidance", "janus", "guidance_scale, temperature"]),
    ({"generate": {"sampling": {"temperature": 0}}}, ["generate.sampling.temperature", "greater than 0"]),
    ({"generate": {"guidance_scale": 3}}, ["generate.guidance_scale", "moved", "generate.sampling.guidance_scale"]),
    ({"seed": -1}, ["seed", "greater than or equal to 0"]),
    (
        {"arms": {"dpo": {"objective": "dpo", "train": {"precision": "bfloat16"}}}, "model": {"dtype": "float32"}},
        ["arms.dpo.train.precision", "model.dtype (float32)", "auto"],
    ),
    ({"prompts": {"source": "txt"}}, ["prompts.source", "did you mean 'text'"]),
    ({"benchmarks": None}, ["benchmarks", "must be a mapping", "null"]),
    ({"benchmarks": {"geneval": {"prompts": {"source": "shapes"}, "imags": 1}}}, ["benchmarks.geneval.imags", "unknown key"]),
    ({"judges": {"table": {"kind": "table", "fils": []}}}, ["judges.table.fils", "did you mean 'files'"]),
    ({"judges": {"people": {"files": []}}}, ["judges.people.kind", "missing"]),
    ({"model": {"device": "gpu"}}, ["model.device", "cuda"]),
    ({"model": {"family": "jannus"}}, ["model.family", "known families: janus"]),
    ({"model": {"checkpoint": "no/such/folder"}}, ["no/such/folder", "model.checkpoint"]),
]


@pytest.mark.parametrize(("changes", "words"), CONFIGURATIONS, ids=[" ".join(words[:1]) for _, words in CONFIGURATIONS])
def test_a_wrong_setting_is_named_by_stages(changes, words, tmp_path):
    config = write_config(tmp_path, **changes)
    out = tmp_path / "prompts.parquet"
    result = stage("prompts", "--config", config, "--set", "train", "--out", out)
    if "checkpoint" in words[-1]:  # prompts needs no model
        prompts, out = out, tmp_path / "candidates.parquet"
        result = stage("generate", "--config", config, "--prompts", prompts, "--out", out, "--images", tmp_path / "images.tar")
    refused(result, *words)
    assert not out.exists()


@pytest.mark.parametrize(("changes", "words"), [CONFIGURATIONS[0], CONFIGURATIONS[2], CONFIGURATIONS[-1]])
def test_a_wrong_setting_is_named_by_the_workflow(changes, words, tmp_path):
    write_config(tmp_path, **changes)
    refused(snakemake(tmp_path, "-n"), *words)


def test_a_baseline_that_does_not_open_is_named_before_anything_runs(tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    write_config(tmp_path, baselines={"t2i-r1": "no/such/folder"})
    result = snakemake(tmp_path, "-n")
    refused(result, "baselines.t2i-r1: no/such/folder", "set baselines.t2i-r1 to a local folder")
    assert "model.checkpoint" not in result.stdout + result.stderr
    (other / "config.json").write_text(json.dumps({"model_type": "llama"}))
    write_config(tmp_path, baselines={"t2i-r1": str(other)})
    refused(snakemake(tmp_path, "-n"), f"baselines.t2i-r1: {other}", "model_type is 'llama'", "baselines.t2i-r1")
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [("run: [", ["config.yaml", "not YAML"]), ("- a\n", ["config.yaml", "mapping"]), (None, ["config.yaml", "cannot be read"])],
)
def test_a_configuration_that_is_none(text, words, tmp_path):
    if text is not None:
        (tmp_path / "config.yaml").write_text(text)
    result = stage("prompts", "--config", tmp_path / "config.yaml", "--set", "train", "--out", tmp_path / "out.parquet")
    refused(result, *words)
    assert not (tmp_path / "out.parquet").exists()


@pytest.fixture
def copy(small_inputs, tmp_path):
    """A copy of the files of small_inputs, which a test may damage."""
    for path in small_inputs.iterdir():
        if path.is_file():
            shutil.copy(path, tmp_path / path.name)
    return tmp_path


def score(folder, *more) -> subprocess.CompletedProcess:
    (folder / "scores.parquet").unlink(missing_ok=True)
    return stage("score", "--config", folder / "config.yaml", "--prompts", folder / "prompts.parquet",
                 "--candidates", folder / "candidates.parquet", "--out", folder / "scores.parquet", *more)  # fmt: skip


def not_scored(folder, *words: str, checkpoint=None) -> None:
    """Assert that scoring is refused and leaves no output."""
    refused(score(folder, *(("--checkpoint", checkpoint) if checkpoint else ())), *words)
    assert not (folder / "scores.parquet").exists()


def test_a_missing_column(copy):
    table = pq.read_table(copy / "candidates.parquet")
    pq.write_table(table.drop_columns(["offset"]), copy / "candidates.parquet")
    not_scored(copy, "candidates.parquet", "'offset'", "missing", "run again")


def test_a_column_of_another_type(copy):
    table = pq.read_table(copy / "candidates.parquet")
    place = table.column_names.index("offset")
    table = table.set_column(place, "offset", [["first"] * len(table)])
    pq.write_table(table, copy / "candidates.parquet")
    not_scored(copy, "candidates.parquet", "'offset'", "string")


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_a_truncated_manifest(copy, keep):
    path = copy / "candidates.parquet"
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    not_scored(copy, "candidates.parquet", "not a readable Parquet file", "delete it and run again")


def test_an_image_shard_cut_in_half(copy):
    path = copy / "candidates.tar"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    not_scored(copy, "candidates.tar", "cut short or broken", "run again")


def test_a_missing_image_shard(copy):
    (copy / "candidates.tar").unlink()
    not_scored(copy, "candidates.tar", "no such image shard")


def test_prompts_of_another_set(copy):
    table = pq.read_table(copy / "prompts.parquet")
    pq.write_table(table.slice(0, 3), copy / "prompts.parquet")
    not_scored(copy, "prompts.parquet", "prompt_id")


def checkpoint(folder, **changes):
    shutil.copytree(TINY, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def test_a_checkpoint_of_another_family(copy):
    other = checkpoint(copy / "other", model_type="showo")
    not_scored(copy, "config.json", "'showo'", "model.family", checkpoint=other)


def test_a_checkpoint_with_a_pickle_only(copy):
    other = checkpoint(copy / "other")
    (other / "model.safetensors").unlink()
    torch.save({}, other / "pytorch_model.bin")
    not_scored(copy, "pytorch_model.bin", "pickle", "safetensors", checkpoint=other)


def test_a_truncated_checkpoint(copy):
    other = checkpoint(copy / "other")
    path = other / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100_000])
    not_scored(copy, str(other), "does not load", checkpoint=other)


def test_a_checkpoint_without_some_weights(copy):
    other = checkpoint(copy / "other")
    weights = load_file(other / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    not_scored(copy, str(other), "does not load", "lack lm_head.weight", checkpoint=other)


def test_an_unknown_arm(copy):
    files = ("--out", copy / "p.parquet", "--discard", copy / "d.parquet")
    result = stage("pairs", "--config", copy / "config.yaml", "--arm", "sfft", "--candidates", copy / "candidates.parquet",
                   "--scores", copy / "scores.parquet", *files)  # fmt: skip
    refused(result, "sfft", "sft, dpo, c-sft")
    assert not (copy / "p.parquet").exists()


def test_nothing_accepted_says_which_threshold(copy):
    config = write_config(copy, pairs={"accept_threshold": 1.0})
    files = ("--candidates", copy / "candidates.parquet", "--scores", copy / "scores.parquet")
    stage("pairs", "--config", config, "--arm", "sft", *files, "--out", copy / "p.parquet", "--discard", copy / "d.parquet")
    result = stage("schedule", "--config", config, "--arm", "sft", "--epochs", 1, "--pairs", copy / "p.parquet",
                   "--out", copy / "s.parquet")  # fmt: skip
    refused(result, "p.parquet", "accept_threshold")
    assert not (copy / "s.parquet").exists()


@pytest.mark.parametrize("shard", ["2/2", "x", "1", "-1/2"])
def test_a_shard_that_is_none(copy, shard):
    result = stage("generate", "--config", copy / "config.yaml", "--prompts", copy / "prompts.parquet", f"--shard={shard}",
                   "--out", copy / "n.parquet", "--images", copy / "n.tar")  # fmt: skip
    refused(result, "--shard")
    assert not (copy / "n.parquet").exists()


@pytest.fixture
def tiny_disk(tmp_path):
    """A folder on a file system of 64 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk(small_inputs, tiny_disk):
    result = stage("generate", "--config", small_inputs / "config.yaml", "--prompts", small_inputs / "prompts.parquet",
                   "--out", tiny_disk / "c.parquet", "--images", tiny_disk / "c.tar")  # fmt: skip
    refused(result, str(tiny_disk), "No space left", "free space")
    assert not (tiny_disk / "c.parquet").exists()
    assert not (tiny_disk / "c.tar").exists()


def test_a_read_only_folder(small_inputs, tmp_path):
    folder = tmp_path / "readonly"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro,size=64k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:  # not root, so permissions suffice
        if os.geteuid() == 0:
            pytest.skip("mounting a tmpfs is not allowed here")
        folder.chmod(0o500)
    try:
        result = stage("prompts", "--config", small_inputs / "config.yaml", "--set", "train", "--out", folder / "p.parquet")
        refused(result, str(folder), "check the path, its permissions")
    finally:
        if not mounted.returncode:
            subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize(("options", "words"), [("ro,size=64k", "Read-only"), ("size=8k", "No space left")])
def test_a_results_folder_that_cannot_be_written(tmp_path, options, words):
    results = tmp_path / "results"
    results.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", results], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        with suppress(OSError):
            (results / "ballast").write_bytes(b"0" * 65536)
        write_config(tmp_path)
        refused(snakemake(tmp_path, "--cores", 1), "run_config.yaml", words, "permissions and free space")
    finally:
        subprocess.run(["umount", results], check=True)


def test_a_missing_package_is_named_with_the_machine(copy):
    script = "import sys; sys.modules['torch'] = None; import runpy; runpy.run_module('stages.generate', run_name='__main__')"
    options = {"config": "config.yaml", "prompts": "prompts.parquet", "out": "other.parquet", "images": "other.tar"}
    arguments = [part for name, file in options.items() for part in (f"--{name}", copy / file)]
    command = [sys.executable, "-c", script, *arguments]
    refused(subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True), "torch", socket.gethostname())
