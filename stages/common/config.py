"""The configuration, field by field; an unknown key or a wrong type is an error that names it.

config.yaml is the embedded default. `python -m stages.common.config --schema` prints the JSON schema that
workflow/schemas/config.schema.json holds.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from stages.common.runtime import UserError

Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Model(Section):
    """The model that draws and judges."""

    family: Literal["janus"] = "janus"
    checkpoint: str = "models/tiny-janus"
    device: str = Field(default="auto", description="auto, cpu, cuda or cuda:0; auto takes a GPU where there is one")
    workers: Positive | None = Field(default=None, description="processes that share a shard; empty: one for each GPU seen")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(default="auto", description="auto: bfloat16 on a GPU, else float32")


class PromptSet(Section):
    """Where a list of prompts comes from."""

    source: Literal["shapes", "text", "geneval"] = "shapes"
    files: list[str] = Field(default=[], description="text: one prompt a line, the file's name is its category; geneval: JSONL")
    exclude: list[str] = Field(default=[], description="text files whose prompts are dropped (validation prompts from train)")
    split: Literal["post-training", "held-out"] = Field(default="post-training", description="shapes: which split")
    categories: list[str] = Field(default=[], description="shapes: these categories alone; empty: all")
    count: Positive | None = Field(default=None, description="how many, evenly over the categories; empty: all")

    @model_validator(mode="after")
    def _files(self) -> PromptSet:
        if (self.source != "shapes") != bool(self.files):
            raise ValueError("source text and geneval need files, source shapes takes none")
        return self


class Prompts(Section):
    train: PromptSet = PromptSet()
    evaluation: PromptSet = PromptSet(split="held-out")


class Generate(Section):
    candidates: Positive = Field(default=10, description="N, candidates a prompt")
    guidance_scale: Annotated[float, Field(ge=0)] = 5.0
    temperature: Annotated[float, Field(gt=0)] = 1.0
    batch_size: Positive = 64
    shards: Positive = Field(default=2, description="pieces a prompt set is cut into; each is a job")


class Score(Section):
    mode: Literal["p_yes", "answer"] = Field(default="p_yes", description="answer: generate and parse `The score is 0/1.`")
    question: str | None = Field(default=None, description="with {prompt}; empty: the family's own, the paper's question")
    answer_prefix: str = Field(default="", description="p_yes: how the answer to `question` begins; the verdict comes next")
    max_new_tokens: Positive = 128
    batch_size: Positive = 64

    def asked(self, family: Any) -> tuple[str, str]:
        """What the judge is asked and how its answer begins: as configured, or the family's own question and prefix."""
        return (self.question, self.answer_prefix) if self.question else (family.question, family.answer_prefix)

    @field_validator("question")
    @classmethod
    def _question(cls, question: str | None) -> str | None:
        if question is not None and "{prompt}" not in question:
            raise ValueError("the question must contain {prompt}")
        return question


class Pairs(Section):
    """Which candidates become training data. The paper leaves thresholds, ties and numbers open: these are ours."""

    filter: Literal["judge", "everything", "oracle"] = Field(default="judge", description="everything and oracle are controls")
    accept_threshold: Share = Field(default=0.7, description="accepted: p_yes at least this")
    reject_threshold: Share = Field(default=0.5, description="rejected (DPO): p_yes below this")
    minimum_margin: Share = Field(default=0.2, description="DPO: chosen's p_yes minus rejected's, at least")
    chosen_per_prompt: Positive | None = Field(default=4, description="SFT rows a prompt at most; empty: every accepted one")
    rule: Literal["highest", "random"] = Field(default="highest", description="which of the accepted")


class Train(Section):
    trainable: Literal["llm", "llm+projector", "llm+projector+vision"] = "llm"
    train_text: bool = Field(default=False, description="the text embedding and text head too")
    lora_rank: Annotated[int, Field(ge=0)] = Field(default=0, description="LoRA on what is trainable; 0: train it whole")
    lora_alpha: Positive = Field(default=32, description="LoRA's update is scaled by lora_alpha / lora_rank")
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    warmup_steps: Annotated[int, Field(ge=0)] = 10
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    batch_size: Positive = Field(default=32, description="global batch, rows an optimizer step")
    micro_batch_size: Positive = Field(default=32, description="rows a forward pass of one process")
    beta: Annotated[float, Field(gt=0)] = Field(default=0.1, description="DPO")
    dpo_loss: Literal["sigmoid", "hinge", "ipo"] = Field(default="sigmoid", description="DPO: sigmoid is the paper's")
    nll_weight: Annotated[float, Field(ge=0)] = Field(default=1.0, description="DPO: weight of the chosen image's NLL")
    judge_anchor_weight: Annotated[float, Field(ge=0)] = Field(
        default=0.0, description="weight of the cross-entropy to the base model's own p_yes on its own candidates; 0: none"
    )
    fork_epochs: list[Positive] = Field(default=[10], description="every arm's training may be forked here")
    save_every_steps: Positive = Field(default=200, description="a killed training goes on from the last save")
    save_every_minutes: Annotated[float, Field(gt=0)] | None = Field(default=None, description="and at this interval")
    gpus: Positive = Field(default=1, description="processes a node, one for each GPU (on a machine without: on the CPU)")
    nodes: Positive = Field(default=1, description="in a SLURM allocation, or see docs/training.md")
    zero_stage: Literal[0, 2, 3] = Field(
        default=2, description="DeepSpeed, for several processes or offload: 2 shares out the optimizer, 3 the weights too"
    )
    offload: bool = Field(default=False, description="DeepSpeed: the optimizer, at zero_stage 3 the weights too, in CPU memory")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="forward and backward; auto: model.dtype; the optimizer's weights are float32 in any case"
    )
    gradient_checkpointing: bool = Field(default=False, description="less memory for a third more computing")

    @property
    def deepspeed(self) -> bool:
        return self.gpus * self.nodes > 1 or self.offload

    def accumulation(self) -> int:
        """Forward passes of each process in an optimizer step; ValueError where the batch does not divide."""
        processes = self.gpus * self.nodes
        if self.batch_size % (self.micro_batch_size * processes) == 0:
            return self.batch_size // (self.micro_batch_size * processes)
        share, rest = divmod(self.batch_size, processes)
        fits = next((size for size in range(min(share, self.micro_batch_size), 0, -1) if share % size == 0), 0)
        remedy = f"set micro_batch_size to {fits}" if fits and not rest else f"set batch_size to a multiple of {processes}"
        raise ValueError(
            f"batch_size {self.batch_size} is not a multiple of micro_batch_size {self.micro_batch_size} x gpus {self.gpus} "
            f"x nodes {self.nodes}; {remedy}"
        )

    def outcome(self) -> dict[str, Any]:
        """The settings on which the trained weights depend by more than rounding: not where training ends, is saved or
        runs."""
        return self.model_dump(exclude=set(WITHOUT_OUTCOME))


WITHOUT_OUTCOME = (
    *("fork_epochs", "save_every_steps", "save_every_minutes"),
    *("micro_batch_size", "gpus", "nodes", "zero_stage", "offload", "gradient_checkpointing"),
)


class Arm(Section):
    """One way to train; what it does not set it shares with the arms that do not set it either."""

    objective: Literal["sft", "dpo"]
    epochs: Positive = 20
    replay_epochs: list[Positive] = Field(default=[], description="the discard pool is drawn and judged again at these")
    candidates: Positive | None = Field(default=None, description="only the first of the N candidates; empty: all")
    train: dict[str, Any] = Field(default={}, description="overrides of the section train")
    pairs: dict[str, Any] = Field(default={}, description="overrides of the section pairs")

    @model_validator(mode="after")
    def _epochs(self) -> Arm:
        late = [epoch for epoch in self.replay_epochs if epoch >= self.epochs]
        if late or sorted(set(self.replay_epochs)) != self.replay_epochs:
            raise ValueError(f"replay_epochs must rise and lie below epochs ({self.epochs})")
        Train.model_validate(self.train)
        Pairs.model_validate(self.pairs)
        return self


class Evaluate(Section):
    images_per_prompt: Positive = 4
    judge: Literal["shapes", "none"] = Field(
        default="shapes", description="the external judge; it measures, it never trains; none: of all metrics non alone"
    )
    verdict_threshold: Share = Field(default=0.5, description="und = 1: p_yes at least this")
    bootstrap: Positive = Field(default=2000, description="resamples of prompts for the intervals")


class Report(Section):
    prompts: Positive = Field(default=8, description="prompts on the contact sheet, trained and held-out each")
    candidates: Positive = Field(default=10, description="candidates of each on the contact sheet, at most")


class Config(Section):
    run: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "tiny-janus"
    seed: int = 0
    model: Model = Model()
    prompts: Prompts = Prompts()
    generate: Generate = Generate()
    score: Score = Score()
    pairs: Pairs = Pairs()
    train: Train = Train()
    arms: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9.-]*$")], Arm] = {}
    evaluate: Evaluate = Evaluate()
    report: Report = Report()

    def arm_train(self, arm: str) -> Train:
        return Train.model_validate(self.train.model_dump() | self.arms[arm].train)

    def arm_pairs(self, arm: str) -> Pairs:
        return Pairs.model_validate(self.pairs.model_dump() | self.arms[arm].pairs)

    @model_validator(mode="after")
    def _arms(self) -> Config:
        if "base" in self.arms:
            raise ValueError("arms: `base` is the untrained model's name; rename that arm")
        for name, arm in self.arms.items():
            if arm.candidates and arm.candidates > self.generate.candidates:
                raise ValueError(f"arms.{name}.candidates is above generate.candidates ({self.generate.candidates})")
            if self.arm_pairs(name).filter == "oracle" and self.evaluate.judge == "none":
                raise ValueError(f"arms.{name}.pairs.filter: oracle needs an external judge in evaluate.judge")
        for key, train in [("train", self.train), *((f"arms.{name}.train", self.arm_train(name)) for name in self.arms)]:
            try:
                train.accumulation()
            except ValueError as error:
                raise ValueError(f"{key}: {error}") from None
        return self


def _known_keys(error: Any) -> list[str]:
    section: Any = Config
    for part in error["loc"][:-1]:
        field = section.model_fields.get(part) if hasattr(section, "model_fields") else None
        section = field.annotation if field else {"arms": Arm}.get(str(error["loc"][0]), section)
    return list(getattr(section, "model_fields", {}))


def validate(fields: dict[str, Any], name: str = "config.yaml") -> Config:
    """A Config, or a UserError with one line for each mistake: file, key, what is wrong, the nearest known key."""
    try:
        return Config.model_validate(fields)
    except ValidationError as failure:
        lines = []
        for error in failure.errors():
            key = ".".join(str(part) for part in error["loc"]) or "(top level)"
            if error["type"] == "extra_forbidden":
                near = difflib.get_close_matches(str(error["loc"][-1]), _known_keys(error), n=1)
                hint = f"; did you mean {near[0]!r}?" if near else "; remove it"
                lines.append(f"{name}: {key}: unknown key{hint}")
            else:
                lines.append(f"{name}: {key}: {error['msg']} (got {error['input']!r:.80})")
        raise UserError("\n".join(lines)) from None


def load(path: Path) -> Config:
    """Read and validate a YAML configuration; raises UserError."""
    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give --config an existing file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not YAML in UTF-8: {error}") from None
    if not isinstance(fields, dict):
        raise UserError(f"{path}: must be a mapping of sections, see config.yaml in the repository")
    return validate(fields, str(path))


def main() -> None:
    print(json.dumps(Config.model_json_schema(), indent=2))


if __name__ == "__main__":
    main()
