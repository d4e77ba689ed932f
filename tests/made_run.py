"""A run's folder that no model has made: random pictures, verdicts and selections, for tests of the pages."""

import random
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from stages.common import manifests, shards
from stages.common.config import Config, validate
from stages.prompts import prompt_id
from stages.tools import arms
from tests.helpers import SMALL, merged

Row = dict
AWKWARD = [
    "<img src=x onerror=\"document.title='hacked'\"> & <b>bold</b>",
    "</script><script>document.title='hacked'</script>",
    'a "quoted" cat\'s \\backslash\\ and `ticks` ${document.title="hacked"} {{ 7 * 7 }}',
    "一只红色的猫坐在蓝色的盒子上",
    "قطة حمراء على صندوق أزرق",
    "🐈 in a 📦, é́\u2028\u2029 and\nnew lines",
    "x" * 2000,
    "word " * 400,
]
CATEGORIES = ("color", "shape", "texture")
ARMS = {
    "sft": {"objective": "sft", "epochs": 2},
    "dpo": {"objective": "dpo", "epochs": 1},
    "c-sft": {"objective": "sft", "epochs": 2, "replay_epochs": [1]},
}


class Made:
    """Writes the files of a run. Everything depends on the seed only."""

    def __init__(self, folder: Path, seed: int = 0, shard_count: int = 2, side: int = 24) -> None:
        self.folder, self.count, self.random = folder, shard_count, random.Random(seed)
        generator = np.random.default_rng(seed)
        self.pictures = [shards.png(self.picture(generator, side)) for _ in range(60)]
        self.drawn: dict[tuple[str, str], list[Row]] = {}  # by folder and set of images
        self.scores: dict[str, Row] = {}  # by candidate_id

    @staticmethod
    def picture(generator: np.random.Generator, side: int) -> np.ndarray:
        """Return two colours in stripes or, for a large side, soft spots with noise, as uint8 `[side, side, 3]`."""
        if side <= 100:
            colours = generator.integers(0, 255, (2, 3), dtype=np.uint8)
            return colours[(np.arange(side) // 4 % 2)[:, None].repeat(side, 1)]
        spots = Image.fromarray(generator.integers(0, 255, (24, 24, 3), dtype=np.uint8))
        noise = generator.normal(0, 12, (side, side, 3))
        return np.clip(np.asarray(spots.resize((side, side), Image.Resampling.BICUBIC)) + noise, 0, 255).astype(np.uint8)

    def write(self, name: str, kind: str, rows: list[Row]) -> None:
        manifests.write(self.folder / name, kind, rows, stage="stages.prompts")

    def prompts(self, name: str, texts: list[str]) -> list[Row]:
        rows = [
            {"prompt_id": prompt_id(text), "prompt": text, "category": CATEGORIES[number % 3], "source": "text", "split": name}
            for number, text in enumerate(texts)
        ]
        self.write(f"prompts/{name}.parquet", "prompts", rows)
        return rows

    def draw(self, model: str, images: str, prompts: list[Row], count: int, epoch: int = 0) -> None:
        """Write candidates, tar files and scores of a model."""
        for shard in range(self.count):
            rows, scores = [], []
            base = self.folder / model / "candidates" / images / f"{shard:04d}"
            base.parent.mkdir(parents=True, exist_ok=True)
            with base.with_suffix(".tar").open("wb") as tar:
                for prompt in prompts[shard :: self.count]:
                    for index in range(count):
                        name = f"{self.random.getrandbits(64):016x}"
                        data = self.random.choice(self.pictures)
                        offset, nbytes = shards.append(tar, name, data)
                        p_yes = self.random.random()
                        known = {"candidate_id": name, "prompt_id": prompt["prompt_id"]}
                        rows.append({
                            **known, "round": epoch, "index": index, "seed": self.random.getrandbits(62),
                            "shard": f"{shard:04d}.tar", "offset": offset, "nbytes": nbytes, "width": 24, "height": 24,
                            "checkpoint": f"weights of {model}"[:16], "sampling": "{}",
                        })  # fmt: skip
                        said = {"p_yes": p_yes, "p_neither": 0.0, "verdict": p_yes >= 0.5, "answer": None}
                        if self.random.random() < 0.03:
                            said |= {"p_yes": None, "verdict": None, "answer": "what?"}
                        scores.append({**known, **said, "judge": "own"})
                shards.finish(tar)
            self.write(f"{model}/candidates/{images}/{shard:04d}.parquet", "candidates", rows)
            self.write(f"{model}/scores/{images}/{shard:04d}.parquet", "scores", scores)
            self.drawn.setdefault((model, images), []).extend(rows)
            self.scores |= {row["candidate_id"]: row for row in scores}

    def look_again(self, model: str, images: str) -> None:
        """Write a model's scores of the base model's images."""
        for shard in range(self.count):
            rows = []
            for row in self.drawn["base", images]:
                if row["shard"] == f"{shard:04d}.tar":
                    p_yes = self.random.random()
                    said = {"p_yes": p_yes, "p_neither": 0.0, "verdict": p_yes >= 0.5, "answer": None}
                    rows.append(self.scores[row["candidate_id"]] | said | {"judge": model})
            self.write(f"{model}/scores-of-base/{images}/{shard:04d}.parquet", "scores", rows)

    def judge(self, model: str, images: str, judge: str) -> None:
        """Write an external judge's verdicts, which agree with the model's own verdict on three images of four."""
        for shard in range(self.count):
            rows = []
            for row in self.drawn[model, images]:
                if row["shard"] == f"{shard:04d}.tar":
                    own = bool(self.scores[row["candidate_id"]]["verdict"])
                    right = own if self.random.random() < 0.75 else not own
                    known = {key: row[key] for key in ("candidate_id", "prompt_id")}
                    reason = None if right else self.random.choice(["color", "<i>count</i>"])
                    rows.append({**known, "verdict": right, "answer": "<b>words</b>", "reason": reason, "judge": judge})
            self.write(f"{model}/verdicts/{judge}/{images}/{shard:04d}.parquet", "verdicts", rows)

    def select(self, folder: str, model: str, images: str, objective: str, threshold: float) -> set[str]:
        """Write pairs and discard pool of a selection, and return the prompts without an accepted candidate."""
        by_prompt: dict[str, list[Row]] = {}
        for row in self.drawn[model, images]:
            by_prompt.setdefault(row["prompt_id"], []).append(self.scores[row["candidate_id"]])
        pairs, discard, waiting = [], [], set()
        for prompt, scores in by_prompt.items():
            known = sorted((row for row in scores if row["p_yes"] is not None), key=lambda row: -row["p_yes"])
            best = known[0] if known else None
            facts = {"prompt_id": prompt, "round": 0}
            if not best or best["p_yes"] < threshold:
                discard.append({**facts, "best_p_yes": best and best["p_yes"], "reason": "no_accepted"})
                waiting.add(prompt)
            elif objective == "dpo" and known[-1]["p_yes"] >= 0.5:
                discard.append({**facts, "best_p_yes": best["p_yes"], "reason": "no_rejected"})
            else:
                last = known[-1] if objective == "dpo" else {"candidate_id": None, "p_yes": None}
                margin = best["p_yes"] - last["p_yes"] if objective == "dpo" else None
                pairs.append({**facts, "chosen": best["candidate_id"], "rejected": last["candidate_id"],
                              "chosen_p_yes": best["p_yes"], "rejected_p_yes": last["p_yes"], "margin": margin})  # fmt: skip
        self.write(f"{folder}/pairs.parquet", "pairs", pairs)
        self.write(f"{folder}/discard.parquet", "discard", discard)
        return waiting


def config_of(run: str, shard_count: int = 2) -> Config:
    small = merged(SMALL, {"run": run, "generate": {"candidates": 4, "shards": shard_count}})
    return validate(small | {"arms": ARMS}, "test")


def make_run(
    folder: Path, training: int = 30, held_out: int = 12, candidates: int = 4, shard_count: int = 2, side: int = 24
) -> Path:
    """Write a whole run, but for tables and pictures, and return its folder."""
    config = config_of(folder.name, shard_count)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run_config.yaml").write_text(yaml.safe_dump(config.model_dump(), sort_keys=False))
    made = Made(folder, shard_count=shard_count, side=side)
    prompts = made.prompts("train", [*AWKWARD, *(f"training prompt of number {number}" for number in range(training))])
    made.draw("base", "train", prompts, candidates)
    waiting = made.select("sft", "base", "train", "sft", 0.8)
    made.select("dpo", "base", "train", "dpo", 0.8)
    for replay in arms.replays(config).values():
        pool = [row for row in prompts if row["prompt_id"] in waiting]
        made.write(f"{replay.name}/replay/pool.parquet", "prompts", pool)
        made.draw(replay.name, "replay", pool, candidates, replay.node.epoch)
        made.select(f"{replay.name}/replay", replay.name, "replay", "sft", 0.7)
    for name in config.benchmarks:
        tested = made.prompts(
            name, [AWKWARD[0] + " again", *(f"prompt of number {number} in {name}" for number in range(held_out))]
        )
        for model in ["base", *config.arms]:
            made.draw(model, name, tested, 2)
            made.judge(model, name, "shapes")
            if model != "base":
                made.look_again(model, name)
    return folder
