"""Learning curves: the points of each arm, and errors on missing checkpoints."""

from pathlib import Path

import pandas
import pytest
from PIL import Image

from stages.common import manifests
from stages.common.config import load
from stages.common.errors import UserError
from stages.learning_curves import curve_rows
from stages.tools import arms
from tests.helpers import done, write_config


def metrics(folder: Path, checkpoint: str, gen: float) -> Path:
    rows = [
        {"run": "small", "arm": checkpoint, "benchmark": "some", "category": category, "metric": metric, "value": gen,
         "prompts": 4, "numerator": gen, "denominator": 100, "ci_low": gen - 5, "ci_high": gen + 5, "seed": 0}
        for category in ("color", "overall") for metric in ("gen", "non")
    ]  # fmt: skip
    path = folder / f"{checkpoint}.parquet"
    manifests.write(path, "metrics", rows, stage="stages.evaluate")
    return path


def test_a_curve_begins_at_base_and_passes_the_checkpoints_that_arms_share(tmp_path):
    config = write_config(tmp_path)
    values = {"base": 40.0, "sft-epoch1": 45.0, "sft": 50.0, "dpo": 48.0, "c-sft": 52.0}
    files = [metrics(tmp_path, name, value) for name, value in values.items()]
    done("learning_curves", "--config", config, "--metrics", *files, "--out", tmp_path / "curves.csv", "--plot",
         tmp_path / "curves.png")  # fmt: skip
    table = pandas.read_csv(tmp_path / "curves.csv")
    table = table[(table.category == "overall") & (table.metric == "gen")]
    points = {arm: list(zip(line.epoch, line.value, strict=True)) for arm, line in table.groupby("arm")}
    assert points == {
        "sft": [(0, 40), (1, 45), (2, 50)],
        "dpo": [(0, 40), (1, 48)],
        "c-sft": [(0, 40), (1, 45), (2, 52)],
    }
    assert list(table[table.arm == "c-sft"].checkpoint) == ["base", "sft-epoch1", "c-sft"]
    assert Image.open(tmp_path / "curves.png").width > 500


def test_a_checkpoint_without_metrics_is_named(tmp_path):
    config = load(write_config(tmp_path))
    rows = manifests.read_rows([metrics(tmp_path, name, 50.0) for name in ("base", "sft")], "metrics")
    with pytest.raises(UserError, match="no metrics of sft-epoch1 on some"):
        curve_rows(rows, arms.nodes(config), list(config.arms))
