"""The shipped models of the shapes world draw and judge as their cards say."""

import pytest

from stages.common.settings import Model
from stages.families import describe, open_family
from stages.shapes.grammar import CATEGORIES, ERRORS
from stages.shapes.measure import measure
from tests.helpers import ROOT

SHIPPED = {"tiny-janus": ("janus", {}), "tiny-show-o": ("show_o", {"steps": 16})}
MEBIBYTE = 2**20


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "models").iterdir()))
def test_a_shipped_model_is_small_and_has_no_pickle(name):
    files = [path for path in (ROOT / "models" / name).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 12 * MEBIBYTE
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".jinja", ".md"}


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_model_sees_every_kind_of_error_and_judges_better_than_it_draws(name):
    family, sampling = SHIPPED[name]
    model = Model(family=family, checkpoint=str(ROOT / "models" / name), device="cpu", dtype="float32")
    figures = measure(
        open_family(model, None, "draw"), "validation", 96, 0, describe(family).sampling(guidance_scale=1.0, **sampling)
    )
    assert 30 < figures["gen"] < 65
    for kind in ERRORS:
        assert figures[f"auc {kind}"] > 0.95
    for category in CATEGORIES:
        assert figures[f"own {category}"] >= max(85, figures[f"gen {category}"])
    assert figures["calibration"] < 0.1
