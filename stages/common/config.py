"""The configuration, field by field. An unknown key or a wrong type is an error that names it.

config.yaml is the embedded default. `python -m stages.tools.schema` writes the JSON schema and docs/configuration.md.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from stages.common.errors import UserError
from stages.common.settings import Model, Positive, Score, Section, Share
from stages.families import FAMILIES, describe
from stages.judges import JUDGES, judge_kind
from stages.judges.base import JudgeSettings
from stages.suites import SUITES, open_suite
from stages.understanding import UNDERSTANDING, understanding_kind
from stages.understanding.base import UnderstandingSettings

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
Name = Annotated[str, Field(pattern=NAME)]
ARM = r"^[A-Za-z0-9][A-Za-z0-9.-]*$"  # the name of an arm or a baseline
FOLDERS = ("prompts", "logs", "benchmarks", "tables", "audit", "dynamics", "pages")  # of a run, beside those of its checkpoints
if TYPE_CHECKING:
    from stages.judges.base import JudgeSettings as Judging
    from stages.suites.base import PromptSource as Prompts
    from stages.understanding.base import UnderstandingSettings as Understanding
else:  # one alternative for each registered suite and for each kind of judge and of understanding benchmark
    Prompts = Annotated[Union[tuple(open_suite(name).settings for name in SUITES)], Field(discriminator="source")]  # noqa: UP007
    Judging = Annotated[Union[tuple(judge_kind(name).settings for name in JUDGES)], Field(discriminator="kind")]  # noqa: UP007
    _KINDS = tuple(understanding_kind(name).settings for name in UNDERSTANDING)
    Understanding = Annotated[Union[_KINDS], Field(discriminator="kind")] if len(_KINDS) > 1 else _KINDS[0]  # noqa: UP007


class Benchmark(Section):
    """A set of prompts on which base, baselines and arms are evaluated, and who judges the images."""

    prompts: Prompts = Field(description="Where the benchmark's prompts come from.")
    images_per_prompt: Positive = Field(default=4, description="Images that each evaluated model draws for each prompt.")
    shards: Positive | None = Field(
        default=None,
        description="Pieces into which the benchmark's prompts are cut. Empty takes generate.shards. A benchmark is smaller "
        "than the training set, and each piece is a job that loads the model, so it needs fewer.",
    )
    judge: str | None = Field(
        default=None,
        description="The external judge: a name in the section judges, or a kind of judge that needs no settings. Und. (win "
        "rate), weak generation and false-positive correction are measured against it. Empty: only Non. is measured.",
    )
    scorers: dict[str, str] = Field(
        default={},
        description="For single categories, the judge that measures generation (Gen.) there. Categories that are not listed "
        "use the suite's own scorer, or the judge.",
    )
    second_scorers: dict[str, str] = Field(
        default={},
        description="For single categories, a second judge that measures generation as well, in the metric gen_second. A "
        "benchmark can then be scored by its published formula and by a mended one at once.",
    )

    @field_validator("scorers", "second_scorers", mode="before")
    @classmethod
    def _without_removed(cls, scorers: Any) -> Any:
        """Leave out categories without a judge: a file laid over a preset removes the preset's scorers in this way."""
        return {key: name for key, name in scorers.items() if name is not None} if isinstance(scorers, dict) else scorers


class Generate(Section):
    """How candidates are drawn."""

    candidates: Positive = Field(default=10, description="N, the candidates that are drawn for each training prompt.")
    sampling: dict[str, Any] = Field(
        default={},
        description="The family's own sampling settings. Janus has guidance_scale (5.0) and temperature (1.0). A key that the "
        "family does not know is an error.",
    )
    batch_size: Positive = Field(
        default=64, description="Images that are drawn together. A batch that does not fit into memory is split."
    )
    shards: Positive = Field(
        default=2,
        description="Pieces into which each set of prompts is cut, unless its benchmark states another number. Each piece is a "
        "job of its own.",
    )


class Pairs(Section):
    """Which candidates become training data. The paper leaves thresholds, ties and numbers open; these rules are ours."""

    filter: Literal["judge", "everything", "oracle"] = Field(
        default="judge",
        description="Whose verdict selects. judge is the model's own understanding branch. everything ignores all verdicts and "
        "oracle uses those of pairs.oracle; both are controls.",
    )
    oracle: str | None = Field(
        default=None, description="With filter oracle: the judge whose verdicts select, as in `benchmarks.<name>.judge`."
    )
    accept_threshold: Share = Field(default=0.7, description="A candidate is accepted when its p_yes is at least this.")
    reject_threshold: Share = Field(
        default=0.5, description="For DPO: a candidate may be the rejected one when its p_yes is below this."
    )
    minimum_margin: Share = Field(
        default=0.2, description="For DPO: the least difference between the p_yes of the chosen and the rejected candidate."
    )
    chosen_per_prompt: Positive | None = Field(
        default=4, description="For SFT: the most candidates that are taken for one prompt. Empty takes every accepted one."
    )
    rule: Literal["highest", "random"] = Field(
        default="highest",
        description="Which of the accepted candidates are taken: those with the highest p_yes, or random ones.",
    )
    matched: bool = Field(
        default=False,
        description="Take the same prompts, and for each the same number of rows, as the arm that has these settings with the "
        "filter judge, but choose the candidates by this filter, at random. everything is then the control in which nobody "
        "judges, and oracle the control in which the truth judges. stages/controls.py holds the rule.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Pairs:
        if self.reject_threshold > self.accept_threshold:
            raise ValueError(
                f"reject_threshold {self.reject_threshold} is above accept_threshold {self.accept_threshold}, so a candidate "
                "could be accepted and rejected at once; lower reject_threshold"
            )
        if (self.filter == "oracle") != bool(self.oracle):
            raise ValueError("filter oracle and the key oracle, which names a judge, belong together; set both or neither")
        if self.matched and self.filter == "judge":
            raise ValueError("matched is for controls, which the model does not judge; set filter to everything or oracle")
        return self


class Train(Section):
    """How the shared language model is trained."""

    trainable: str = Field(
        default="llm",
        description="Parameter groups of the family, joined by plus signs. The paper trains only llm; Janus also has text "
        "(text embedding and text head), projector and vision.",
    )
    lora_rank: Annotated[int, Field(ge=0)] = Field(
        default=0,
        description="Rank of LoRA adapters on every linear layer of what is trainable. 0 trains the weights themselves.",
    )
    lora_alpha: Positive = Field(default=32, description="LoRA's update is scaled by lora_alpha / lora_rank.")
    learning_rate: Annotated[float, Field(gt=0)] = Field(
        default=1e-5,
        description="AdamW's learning rate, constant after the warm-up. The presets take 1e-5 to 2e-5 for SFT and 2e-6 to 5e-6 "
        "for DPO; the tiny models take more.",
    )
    warmup_steps: Annotated[int, Field(ge=0)] = Field(
        default=10, description="Optimizer steps in which the learning rate rises from zero."
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(default=0.0, description="AdamW's weight decay.")
    max_grad_norm: Annotated[float, Field(gt=0)] = Field(default=1.0, description="Gradients are clipped to this norm.")
    batch_size: Positive = Field(default=32, description="Rows in one optimizer step, over all processes.")
    micro_batch_size: Positive = Field(default=32, description="Rows in one forward pass of one process.")
    beta: Annotated[float, Field(gt=0)] = Field(default=0.1, description="For DPO: the beta of the preference loss.")
    dpo_loss: Literal["sigmoid", "hinge", "ipo"] = Field(
        default="sigmoid",
        description="For DPO: the preference loss. sigmoid is the paper's. ipo compares means over an image's tokens, so it "
        "needs a family with an exact likelihood, such as janus.",
    )
    nll_weight: Annotated[float, Field(ge=0)] = Field(
        default=1.0, description="For DPO: the weight of the chosen image's own loss beside the preference loss."
    )
    prompt_dropout: Share = Field(
        default=0.0,
        description="For SFT: the share of rows that are trained without their prompt, as guidance needs it. The paper does "
        "not mention any.",
    )
    image_weight: Annotated[float, Field(ge=0)] = Field(
        default=1.0,
        description="Weight of the loss of the images. With 0 and a judge_anchor_weight, only the judge is trained.",
    )
    judge_anchor_weight: Annotated[float, Field(ge=0)] = Field(
        default=0.0,
        description="Weight of a cross-entropy that holds the judge to the base model's own judgements of its own candidates. "
        "0 leaves it out, as in the paper.",
    )
    judge_anchor_target: Literal["p_yes", "verdict"] = Field(
        default="p_yes",
        description="What the judge is held to. p_yes is the base model's own probability, which keeps the judge as it is. "
        "verdict is its yes or no, which trains the judge on its own decisions.",
    )
    fork_epochs: list[Positive] = Field(
        default=[10],
        description="Epochs at which every arm's training is saved, so that arms with replay can continue from there.",
    )
    save_every_steps: Positive = Field(
        default=200, description="Optimizer steps between saves. A killed training continues from its last save."
    )
    save_every_minutes: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="Minutes between additional saves. Empty makes none."
    )
    gpus: Positive = Field(
        default=1, description="Processes on each node, one for each GPU. On a machine without GPUs they run on the CPU."
    )
    nodes: Positive = Field(default=1, description="Nodes of a SLURM allocation; for other clusters see docs/training.md.")
    zero_stage: Literal[0, 2, 3] = Field(
        default=2,
        description="DeepSpeed's ZeRO stage, for several processes or offload. 2 divides the optimizer's state and the "
        "gradients among them, 3 the weights as well.",
    )
    offload: bool = Field(
        default=False, description="Keep the optimizer's state, and at zero_stage 3 the weights, in the memory of the CPU."
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="The type of forward and backward. auto follows model.dtype. The optimizer always works in float32.",
    )
    gradient_checkpointing: bool = Field(
        default=False, description="Recompute activations in the backward pass: less memory for a third more computing."
    )

    @property
    def deepspeed(self) -> bool:
        return self.gpus * self.nodes > 1 or self.offload

    def accumulation(self) -> int:
        """Return the forward passes of each process in one optimizer step; ValueError when the batch does not divide."""
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
        """Return the settings on which the trained weights depend by more than rounding."""
        return self.model_dump(exclude=set(WITHOUT_OUTCOME))


# Where a training ends, is saved and runs changes its weights by no more than rounding.
WITHOUT_OUTCOME = (
    *("fork_epochs", "save_every_steps", "save_every_minutes"),
    *("micro_batch_size", "gpus", "nodes", "zero_stage", "offload", "gradient_checkpointing"),
)


class Arm(Section):
    """One way to train. Everything that an arm does not set itself it shares with the other arms."""

    objective: Literal["sft", "dpo"] = Field(
        description="sft trains on the accepted candidates; dpo on pairs of an accepted and a rejected candidate."
    )
    epochs: Positive = Field(default=20, description="Epochs of training.")
    replay_epochs: list[Positive] = Field(
        default=[],
        description="Epochs after which the model of that moment draws and judges the prompts of the discard pool again.",
    )
    replay_by: Literal["self", "base", "drawing", "judging", "nobody"] = Field(
        default="self",
        description="Who draws and judges the discard pool at the replay epochs. self is the model as it is by then. The "
        "others are controls. With base, the untrained model draws and judges as many candidates. With drawing, the model "
        "draws and the untrained model judges, and with judging the other way round, so that only one branch has improved. "
        "With nobody, nothing is drawn, and as many rows as the model's own replay recovers join from the first candidates.",
    )
    candidates: Positive | None = Field(
        default=None, description="Use only the first so many of the N candidates. Empty uses all."
    )
    train: dict[str, Any] = Field(default={}, description="Keys of the section train that differ for this arm.")
    pairs: dict[str, Any] = Field(default={}, description="Keys of the section pairs that differ for this arm.")

    @model_validator(mode="after")
    def _epochs(self) -> Arm:
        late = [epoch for epoch in self.replay_epochs if epoch >= self.epochs]
        if late or sorted(set(self.replay_epochs)) != self.replay_epochs:
            raise ValueError(f"replay_epochs must rise and lie below epochs ({self.epochs})")
        return self


class Evaluate(Section):
    """How the metrics are summarised."""

    bootstrap: Positive = Field(
        default=2000, description="Resamples of prompts from which the 95 % confidence intervals are computed."
    )
    every_checkpoint: bool = Field(
        default=False,
        description="Also evaluate the checkpoints at the epochs of train.fork_epochs and replay_epochs on every benchmark, "
        "and plot learning curves (learning_curves.png and .csv). Nothing more is trained.",
    )


class Report(Section):
    """The contact sheet and the tables."""

    prompts: Positive = Field(default=8, description="Training prompts and benchmark prompts that are shown, of each.")
    candidates: Positive = Field(default=10, description="The most candidates that are shown for each training prompt.")
    paper_model: Literal["Janus-Pro-7B", "Show-o"] | None = Field(
        default=None,
        description="The model of arXiv 2507.16663 that is run. The tables then have the paper's numbers beside those of base "
        "and of the arms and baselines that are called like its rows: sft, dpo, c-sft, c-dpo, t2i-r1, hermesflow. Empty: none.",
    )


class Dynamics(Section):
    """Learning dynamics (`snakemake dynamics`): what a step on one image does to other images and to the judgement.

    docs/dynamics.md explains what is computed. Nothing here changes the results of the loop itself.
    """

    benchmark: str | None = Field(
        default=None,
        description="The benchmark whose images of the base model are probes. Empty: the first one with an external judge.",
    )
    arms: list[str] = Field(
        default=[],
        description="The arms whose training rows are examined and whose training is followed. Empty: the first arm of each "
        "objective that does not replay, and the first of each that does for its replayed rows. Arms with image_weight 0 are "
        "left out.",
    )
    images: Positive = Field(
        default=480, description="Images of the base model whose log-likelihood is followed through training."
    )
    probes: Positive = Field(
        default=120, description="Of these, the images for which all terms of every training row are computed."
    )
    alternatives: Positive = Field(
        default=7,
        description="Alternative prompts of each probe, over which Bayes' posterior is formed: those of the benchmark that "
        "share the most words with its own.",
    )
    rows: Positive = Field(
        default=120,
        description="Training rows of each objective: a quarter of rows that the external judge rejects, a quarter of replayed "
        "ones, as far as there are any, and otherwise rows that it does not reject.",
    )
    logit_probes: Positive = Field(
        default=24, description="Probes for which trace and norm of the kernel between logits are estimated."
    )
    logit_draws: Annotated[int, Field(ge=2)] = Field(default=8, description="Random sign vectors for these estimates.")
    step_probes: Positive = Field(default=36, description="Probes for which predicted and measured changes are compared.")
    step_sizes: list[Annotated[float, Field(gt=0)]] = Field(
        default=[4.0, 1.0, 0.25, 0.0625, 0.015625],
        description="Sizes of these steps: of AdamW as multiples of the learning rate, of SGD such that its step is as long.",
    )
    segments: Positive = Field(
        default=4, description="Pieces of each epoch of a training, at the start of each of which first-order terms are taken."
    )
    shards: Positive = Field(default=2, description="Jobs that share the probes.")
    memory: Positive = Field(default=1000, description="Megabytes of gradients of training rows that are kept at once.")
    parameters: list[str] = Field(
        default=[],
        description="Subsets of the trained parameters, such as layers.3, to which the terms are restricted. Empty takes all.",
    )
    sketch: Positive = Field(
        default=4096, description="For `snakemake dynamics_proxies`: numbers to which each gradient is compressed."
    )
    clip: str | None = Field(
        default=None, description="Folder of a CLIP checkpoint for similarities of prompts and images. Empty: none."
    )


class AuditedModel(Section):
    """A model that is audited: its checkpoint, and how it draws and is asked."""

    family: str = Field(
        default="janus", description="The model's family, as in model.family.", json_schema_extra={"enum": list(FAMILIES)}
    )
    checkpoint: str = Field(description="The checkpoint's folder, as in model.checkpoint.")
    sampling: dict[str, Any] = Field(
        default={},
        description="The family's own sampling settings for this model. generate.sampling is not used. A key that is left out "
        "has the family's default.",
    )
    score: dict[str, Any] = Field(
        default={}, description="Keys of the section score that differ for this model, such as its question."
    )


class Audit(Section):
    """The audit of models before any training (`snakemake audit`), and what its verdict takes for granted."""

    models: dict[Annotated[str, Field(pattern=ARM)], AuditedModel] = Field(
        default={},
        description="The models, by name. Each draws and judges the benchmarks; nothing is trained. Empty: the base model and "
        "the baselines. A model with a name of arXiv 2507.16663, such as Janus-Pro-7B, has the paper's numbers beside its own.",
    )
    judges: list[Name] = Field(
        default=[],
        description="Further judges of the audited images, such as a table of people's verdicts. Their agreement with the "
        "model's own judge, with the external judge and with each other is measured.",
    )
    strata: dict[str, list[str]] = Field(
        default={},
        description="The categories of each stratum, in the order in which they are shown. Categories that are not listed are "
        "left out. Empty: easy, medium and hard as the benchmarks define them, and other for the rest, or one stratum for "
        "each benchmark if none does.",
    )
    like: list[Name] = Field(
        default=[], description="The benchmarks whose prompts stand for the training prompts in the forecast. Empty: all."
    )
    prompts: Positive = Field(
        default=6000, description="The number of training prompts in the forecast. The paper has about 6,000."
    )
    correlation: Annotated[list[Share], Field(min_length=3, max_length=3)] = Field(
        default=[0.05, 0.2, 0.6],
        description="How much images of one prompt resemble each other in being accepted, as the intraclass correlation: the "
        "lowest, the assumed and the highest value. It is needed where a model draws only one image for each prompt, because "
        "one image cannot show it. With more images it is measured. The tiny model's is 0.15.",
    )
    least_gap: Annotated[float, Field(ge=0, le=100)] = Field(
        default=5.0, description="Below this Non., in percent, the gap is too small to be worth training for."
    )
    least_auc: Share = Field(
        default=0.7,
        description="Below this AUC of p_yes against the external judge, the model's own judge is too weak in a subtask.",
    )
    most_weak: Share = Field(
        default=0.5, description="If the judge is too weak in more than this share of the subtasks, it is too weak altogether."
    )
    least_rows: Positive = Field(
        default=250,
        description="With fewer expected training rows than this, there is too little to train on. The paper's smallest "
        "training set has 254.",
    )
    device: str = Field(
        default="", description="Part of the name of the GPU or CPU whose measured speed gives the GPU hours (speed/results)."
    )

    @field_validator("strata")
    @classmethod
    def _once(cls, strata: dict[str, list[str]]) -> dict[str, list[str]]:
        names = [name for categories in strata.values() for name in categories]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"the category {twice[0]} is listed twice; it belongs to one stratum")
        return strata

    @field_validator("correlation")
    @classmethod
    def _rising(cls, correlation: list[float]) -> list[float]:
        if sorted(correlation) != correlation:
            raise ValueError("the lowest, the assumed and the highest correlation must rise, as in [0.05, 0.2, 0.6]")
        return correlation


class Config(Section):
    """The configuration of one run."""

    run: Name = Field(default="tiny-janus", description="The run's name. Its results are in `results/<run>/`.")
    seed: int = Field(
        default=0,
        ge=0,
        lt=2**32,
        description="The seed of everything random in the run, from 0 to 2^32 - 1. Benchmarks take the same prompts with every "
        "seed.",
    )
    model: Model = Field(default=Model(), description="The model that draws, judges and is trained.")
    prompts: Prompts = Field(default=open_suite("shapes").settings(source="shapes"), description="The training prompts.")
    benchmarks: dict[Name, Benchmark] = Field(
        default={},
        description="The benchmarks, by name. Base, the baselines and every arm are evaluated on each. With "
        "`evaluate.every_checkpoint`, so are the checkpoints within a training.",
    )
    judges: dict[Name, Judging] = Field(
        default={}, description="External judges, by name. They only measure, except in controls (pairs.filter oracle)."
    )
    understanding: dict[Name, Understanding] = Field(
        default={},
        description="Understanding benchmarks, by name: questions about images that no model drew. Base, the baselines "
        "and every arm are asked all of them.",
    )
    generate: Generate = Field(default=Generate(), description="How candidates are drawn.")
    score: Score = Field(default=Score(), description="How the model judges its own images.")
    pairs: Pairs = Field(default=Pairs(), description="Which candidates become training data.")
    train: Train = Field(default=Train(), description="How the model is trained.")
    arms: dict[Annotated[str, Field(pattern=ARM)], Arm] = Field(
        default={}, description="The arms, by name: each is one way to train the model."
    )
    baselines: dict[Annotated[str, Field(pattern=ARM)], str] = Field(
        default={},
        description="Other checkpoints of the same family, by name: the folder of each. They are evaluated beside base and the "
        "arms, with the same sampling settings and questions, and nothing is trained.",
    )
    evaluate: Evaluate = Field(default=Evaluate(), description="How the metrics are summarised.")
    report: Report = Field(default=Report(), description="The contact sheet and the tables.")
    dynamics: Dynamics = Field(default=Dynamics(), description="Learning dynamics, which only `snakemake dynamics` computes.")
    audit: Audit = Field(default=Audit(), description="The audit of models before any training.")

    @model_validator(mode="before")
    @classmethod
    def _without_removed(cls, fields: Any) -> Any:
        """Leave out named parts that are empty: a file laid over a preset removes the preset's in this way."""
        if not isinstance(fields, dict):
            return fields
        sections = ("benchmarks", "judges", "understanding", "arms", "baselines")
        named = {key: fields[key] for key in sections if isinstance(fields.get(key), dict)}
        fields = fields | {key: {k: v for k, v in part.items() if v is not None} for key, part in named.items()}
        audit = fields.get("audit")
        if isinstance(audit, dict) and isinstance(audit.get("models"), dict):
            fields["audit"] = audit | {"models": {k: v for k, v in audit["models"].items() if v is not None}}
        return fields

    @field_validator("judges", "benchmarks")
    @classmethod
    def _reserved(cls, section: dict[str, Any]) -> dict[str, Any]:
        if reserved := sorted({"train", "replay"} & section.keys()):
            raise ValueError(f"the name {reserved[0]!r} is used by the workflow itself; choose another one")
        return section

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        problems = [*self._sampling_problems(), *self._judge_problems(), *self._understanding_problems(), *self._arm_problems()]
        problems += self._dynamics_problems()
        if problems := problems or self._audit_problems():
            raise ValueError("\n".join(problems))
        return self

    def _sampling_problems(self, section: str = "generate.sampling") -> list[str]:
        family = describe(self.model.family)
        try:
            family.sampling.model_validate(self.generate.sampling)
        except ValidationError as failure:
            known = ", ".join(family.sampling.model_fields)
            return [
                f"{section}.{error['loc'][0]}: the family {family.name} has no such setting; its settings are {known}"
                if error["type"] == "extra_forbidden"
                else _line(section, error, family.sampling.model_fields)
                for error in failure.errors()
            ]
        return []

    def _audit_problems(self) -> list[str]:
        problems = []
        if self.audit.models and not self.benchmarks:
            problems.append("audit.models: there is no benchmark on which the models could be audited; add one to benchmarks")
        taken = {**dict.fromkeys(self.arms, "an arm"), **dict.fromkeys(self.baselines, "a baseline"), "base": "the base model"}
        for name, model in self.audit.models.items():
            key = f"audit.models.{name}"
            stem, _, epoch = name.partition("-by-")[0].rpartition("-epoch")
            if name in taken or name in FOLDERS or (stem in self.arms and epoch.isdigit()):
                problems.append(f"{key}: the run has a folder of this name, of {taken.get(name, 'its own')}; rename the model")
            elif model.family not in FAMILIES:
                problems.append(f"{key}.family: unknown family {model.family!r}; known families: {', '.join(FAMILIES)}")
            elif lacks := {"draw", "judge"} - describe(model.family).roles:
                problems.append(f"{key}.family: {model.family} cannot {min(lacks)} images, so it cannot be audited; remove it")
            else:
                try:
                    alone = self.audited(name)
                    problems += alone._sampling_problems(f"{key}.sampling")
                except ValidationError as failure:
                    problems += [_line(f"{key}.score", error, Score.model_fields) for error in failure.errors()]
        for name in self.audit.judges:
            try:
                self.judge(name)
            except ValueError as error:
                problems.append(f"audit.judges: {error}")
        for name in self.audit.like:
            if name not in self.benchmarks:
                problems.append(f"audit.like: {name} is not in benchmarks, which has {', '.join(self.benchmarks)}")
        return problems

    def _judge_problems(self) -> list[str]:
        wanted = {f"benchmarks.{name}.judge": benchmark.judge for name, benchmark in self.benchmarks.items()}
        for name, benchmark in self.benchmarks.items():
            for key in ("scorers", "second_scorers"):
                wanted |= {f"benchmarks.{name}.{key}.{place}": judge for place, judge in getattr(benchmark, key).items()}
        for name in self.arms:
            with_oracle = self.arms[name].pairs.get("oracle", self.pairs.oracle)
            wanted[f"arms.{name}.pairs.oracle"] = with_oracle if isinstance(with_oracle, str) else None
        problems = []
        for key, judge in wanted.items():
            if judge is not None:
                try:
                    self.judge(judge)
                except ValueError as error:
                    problems.append(f"{key}: {error}")
        return problems

    def _understanding_problems(self) -> list[str]:
        problems = []
        if self.understanding and "judge" not in describe(self.model.family).roles:
            problems.append(
                f"understanding: the family {self.model.family} only draws and cannot answer questions; choose another "
                "model.family, or remove this section"
            )
        if both := sorted(self.understanding.keys() & self.benchmarks.keys()):
            problems.append(f"understanding.{both[0]}: benchmarks has one with the same name; choose another name")
        return problems

    def _dynamics_problems(self) -> list[str]:
        chosen, problems = self.dynamics, []
        if chosen.benchmark is not None and chosen.benchmark not in self.benchmarks:
            problems.append(f"dynamics.benchmark: no benchmark {chosen.benchmark!r} in the section benchmarks")
        problems += [f"dynamics.arms: no arm {arm!r} in the section arms" for arm in chosen.arms if arm not in self.arms]
        for arm in (arm for arm in chosen.arms if arm in self.arms):
            if self.arms[arm].train.get("image_weight", self.train.image_weight) == 0:
                problems.append(
                    f"dynamics.arms: {arm} has train.image_weight 0, so a step on an image changes nothing; name other arms"
                )
        if chosen.probes > chosen.images:
            problems.append(f"dynamics.probes is above dynamics.images ({chosen.images}); lower it")
        return problems

    def _arm_problems(self) -> list[str]:
        problems = []
        family = describe(self.model.family)
        if "base" in self.arms:
            problems.append("arms: `base` is the name of the untrained model; rename that arm")
        for section, names in (("arms", self.arms), ("baselines", self.baselines)):
            problems += [f"{section}.{name}: a run has a folder of this name; rename it" for name in FOLDERS if name in names]
        for name in self.baselines:
            stem, _, epoch = name.partition("-by-")[0].rpartition("-epoch")
            if name == "base" or name in self.arms or (stem in self.arms and epoch.isdigit()):
                taken = "the untrained model" if name == "base" else f"the arm {name if name in self.arms else stem}"
                problems.append(f"baselines.{name}: {taken} has a checkpoint of this name; rename the baseline")
        for name, arm in self.arms.items():
            stem, _, epoch = name.partition("-by-")[0].rpartition("-epoch")
            if stem in self.arms and epoch.isdigit():
                problems.append(f"arms.{name}: this is the name of {stem}'s checkpoint after {epoch} epochs; rename the arm")
            if arm.candidates and arm.candidates > self.generate.candidates:
                problems.append(f"arms.{name}.candidates is above generate.candidates ({self.generate.candidates})")
        trains = {f"arms.{name}.train": self.train.model_dump() | arm.train for name, arm in self.arms.items()}
        for key, fields in ({"train": self.train.model_dump()} | trains).items():
            try:
                settings = Train.model_validate(fields)
                settings.accumulation()
                if not settings.image_weight and not settings.judge_anchor_weight:
                    raise ValueError(
                        "image_weight and judge_anchor_weight are both 0, so nothing is trained; raise one of them"
                    )
                if settings.dpo_loss == "ipo" and family.likelihood != "exact":
                    raise ValueError(
                        f"dpo_loss: ipo compares means over tokens, and {self.model.family} estimates the likelihood of whole "
                        "images; choose sigmoid or hinge"
                    )
                if unknown := [group for group in settings.trainable.split("+") if group not in family.groups]:
                    known = ", ".join(family.groups)
                    raise ValueError(f"trainable: {self.model.family} has no parameter group {unknown[0]!r}, but {known}")
            except ValidationError as failure:
                problems += [_line(key, error, Train.model_fields) for error in failure.errors()]
            except ValueError as error:
                problems.append(f"{key}: {error}")
        for name, arm in self.arms.items():
            precision = trains[f"arms.{name}.train"]["precision"]
            if arm.objective == "dpo" and precision not in ("auto", self.model.dtype):
                problems.append(
                    f"arms.{name}.train.precision: {precision}, but the reference log-probabilities of DPO are computed in "
                    f"model.dtype ({self.model.dtype}); set both to the same type, or leave precision at auto"
                )
            try:
                Pairs.model_validate(self.pairs.model_dump() | arm.pairs)
            except ValidationError as failure:
                problems += [_line(f"arms.{name}.pairs", error, Pairs.model_fields) for error in failure.errors()]
        return problems or self._control_problems()

    def _control_problems(self) -> list[str]:
        problems = []
        for name, arm in self.arms.items():
            matched = self.arm_pairs(name).matched
            if matched and arm.replay_epochs:
                problems.append(f"arms.{name}.replay_epochs: a matched control has no discard pool of its own; remove this key")
            if matched and not self.counterpart(name):
                problems.append(
                    f"arms.{name}.pairs.matched: no arm has the selection that is to be matched; add an arm with the same "
                    f"objective {arm.objective}, candidates and pairs, but without matched and with filter judge"
                )
            if arm.replay_by != "self" and not arm.replay_epochs:
                problems.append(f"arms.{name}.replay_by: nothing is replayed without replay_epochs; set them or remove it")
            elif arm.replay_by == "nobody" and not self.replay_twin(name):
                problems.append(
                    f"arms.{name}.replay_by: nobody adds as many rows as the model's own replay recovers, but no arm has these "
                    "settings with replay_by self; add that arm"
                )
        return problems

    def _alike(self, arm: str) -> list[str]:
        """Return the arms with an arm's objective and number of candidates, in the configuration's order."""
        own = self.arms[arm]
        return [n for n, a in self.arms.items() if (a.objective, a.candidates) == (own.objective, own.candidates)]

    def counterpart(self, arm: str) -> str | None:
        """Return the arm whose selection a matched control matches: the first with its settings, but the filter judge."""
        wanted = self.arm_pairs(arm).model_copy(update={"filter": "judge", "oracle": None, "matched": False})
        return next((name for name in self._alike(arm) if self.arm_pairs(name) == wanted), None)

    def replay_twin(self, arm: str) -> str | None:
        """Return the first arm that differs from an arm only in that the model itself replays, or in its later epochs."""

        def settings(name: str) -> tuple[Any, ...]:
            return self.arms[name].replay_epochs, self.arm_pairs(name), self.arm_train(name).outcome()

        alike = (name for name in self._alike(arm) if self.arms[name].replay_by == "self")
        return next((name for name in alike if settings(name) == settings(arm)), None)

    def shards(self, images: str) -> int:
        """Return into how many pieces a set of prompts is cut: train, replay or a benchmark."""
        benchmark = self.benchmarks.get(images)
        return benchmark.shards if benchmark and benchmark.shards else self.generate.shards

    def untrained(self) -> dict[str, str]:
        """Return the checkpoints that are evaluated as they are, by name: the base model and the baselines."""
        return {"base": self.model.checkpoint, **self.baselines}

    def to_audit(self) -> list[str]:
        """Return the names of the models that an audit looks at: those of the section audit, or base and the baselines."""
        return list(self.audit.models or self.untrained())

    def audited(self, name: str) -> Config:
        """Return the configuration with which an audited model draws and judges: this one, with that model as its model."""
        if name not in self.audit.models:
            return self.model_copy(update={"model": self.model.model_copy(update={"checkpoint": self.untrained()[name]})})
        chosen = self.audit.models[name]
        model = {"family": chosen.family, "checkpoint": chosen.checkpoint}
        return self.model_copy(
            update={
                "model": self.model.model_copy(update=model),
                "generate": self.generate.model_copy(update={"sampling": chosen.sampling}),
                "score": Score.model_validate(self.score.model_dump() | chosen.score),
                "understanding": {},
                "arms": {},
                "baselines": {},
                "audit": Audit(),
            }
        )

    def sampling(self) -> Any:
        """Return the family's sampling settings, with its defaults filled in."""
        return describe(self.model.family).sampling.model_validate(self.generate.sampling)

    def arm_train(self, arm: str) -> Train:
        """Return the training settings of an arm."""
        return Train.model_validate(self.train.model_dump() | self.arms[arm].train)

    def arm_pairs(self, arm: str) -> Pairs:
        """Return the selection settings of an arm."""
        return Pairs.model_validate(self.pairs.model_dump() | self.arms[arm].pairs)

    def accept_thresholds(self) -> list[float]:
        """Return the thresholds at which arms accept candidates, or that of the section pairs if no arm selects by p_yes."""
        selections = [self.arm_pairs(arm) for arm in self.arms]
        own = {selection.accept_threshold for selection in selections if selection.filter == "judge"}
        return sorted(own or {self.pairs.accept_threshold})

    def judge(self, name: str) -> JudgeSettings:
        """Return the settings of a judge: those in `judges`, or the defaults of the kind with this name."""
        if name in self.judges:
            return self.judges[name]
        if name not in JUDGES:
            raise ValueError(f"no judge {name!r}; define it in judges, or use a kind: {', '.join(JUDGES)}")
        try:
            return judge_kind(name).settings(kind=name)
        except ValidationError:
            raise ValueError(f"a judge of kind {name} needs settings; give them in judges.{name}") from None

    def understanding_benchmark(self, name: str) -> UnderstandingSettings:
        """Return the settings of an understanding benchmark. Raises UserError on an unknown name."""
        if name not in self.understanding:
            known = f"which has {', '.join(self.understanding)}" if self.understanding else "which is empty"
            raise UserError(f"--name {name}: not in the section understanding, {known}")
        return self.understanding[name]

    def scorers(self, benchmark: str) -> dict[str, str]:
        """Return the categories of a benchmark that have a scorer of their own, with the name of that judge."""
        chosen = self.benchmarks[benchmark]
        return dict(open_suite(chosen.prompts.source).scorers) | chosen.scorers

    def require_scored(self, benchmark: str, categories: set[str]) -> None:
        """Raise UserError on a scorer of a category that the prompts of the benchmark do not have."""
        for key in ("scorers", "second_scorers"):
            if unknown := sorted(getattr(self.benchmarks[benchmark], key).keys() - categories):
                raise UserError(
                    f"benchmarks.{benchmark}.{key}.{unknown[0]}: the benchmark has no prompt of this category; its categories "
                    f"are {', '.join(sorted(categories))}. Correct the name, or set it to null"
                )

    def benchmark_judges(self, benchmark: str) -> list[str]:
        """Return the names of all judges that look at a benchmark's images, the external judge first."""
        chosen = self.benchmarks[benchmark]
        scorers = [*self.scorers(benchmark).values(), *chosen.second_scorers.values()]
        return list(dict.fromkeys([*([chosen.judge] if chosen.judge else []), *scorers]))

    def scored_categories(self, benchmark: str, judge: str) -> list[str]:
        """Return the categories of a benchmark in which a judge is the scorer or the second scorer."""
        both = (self.scorers(benchmark), self.benchmarks[benchmark].second_scorers)
        return list(dict.fromkeys(category for scorers in both for category, name in scorers.items() if name == judge))


# Where the keys of earlier versions are now.
MOVED = {
    "prompts.train": "the training prompts are the section prompts itself",
    "prompts.evaluation": "evaluation prompts are benchmarks.<name>.prompts",
    "generate.guidance_scale": "it is generate.sampling.guidance_scale",
    "generate.temperature": "it is generate.sampling.temperature",
    "evaluate.judge": "it is benchmarks.<name>.judge",
    "evaluate.images_per_prompt": "it is benchmarks.<name>.images_per_prompt",
    "evaluate.verdict_threshold": "it is score.verdict_threshold",
    "train.train_text": "add the group text to train.trainable, as in llm+text",
}


def _known_keys(location: Sequence[int | str]) -> list[str]:
    """Return the keys of the section at this location."""
    section: Any = Config
    for part in location:
        fields = getattr(section, "model_fields", {})
        if part in fields:
            section = fields[part].annotation
        elif str(section).startswith("dict["):
            section = section.__args__[1]
        elif location[0] == "understanding" and part in UNDERSTANDING:
            section = understanding_kind(str(part)).settings
        elif part in SUITES:
            section = open_suite(str(part)).settings
        elif part in JUDGES:
            section = judge_kind(str(part)).settings
    return list(getattr(section, "model_fields", {}))


def _line(section: str, error: Any, known: Iterable[str]) -> str:
    """Return one line for one of pydantic's errors below `section`. known: the keys that exist where the error is."""
    location = error["loc"]
    key = ".".join(part for part in (section, *map(str, location)) if part)
    message = str(error["msg"]).removeprefix("Value error, ")
    context = error.get("ctx", {})
    named = context.get("discriminator", "").strip("'")  # the key that says which kind of section this is
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(location[-1]), list(known), n=1)
        remedy = f"did you mean {near[0]!r}?" if near else "remove it, or set it to null if it comes from a preset"
        return f"{key}: unknown key; {remedy}"
    if error["type"] == "union_tag_invalid":
        tags = context["expected_tags"].replace("'", "").split(", ")
        near = difflib.get_close_matches(context["tag"], tags, n=1)
        asked = f"; did you mean {near[0]!r}?" if near else ""
        return f"{key}.{named}: unknown {named} {context['tag']!r}{asked} (known: {', '.join(tags)})"
    if error["type"] == "union_tag_not_found":
        return f"{key}.{named}: missing; docs/configuration.md lists what it can be"
    if error["type"] in ("dict_type", "model_type", "model_attributes_type"):
        message = "must be a mapping of keys; to leave out what a preset has, set each of its keys to null"
    if not location:
        return f"{key}: {message}" if key else message
    return f"{key}: {message} (got {error['input']!r:.80})"


def validate(fields: dict[str, Any], name: str = "config.yaml") -> Config:
    """Return a Config, or raise a UserError with one line for each mistake: file, key, problem and the nearest known key."""
    moved = [key for key in MOVED if _has(fields, key.split("."))]
    if moved:
        raise UserError("\n".join(f"{name}: {key}: this key has moved: {MOVED[key]}" for key in moved))
    try:
        return Config.model_validate(fields)
    except ValidationError as failure:
        lines: list[str] = []
        tags = {*SUITES, *JUDGES, *UNDERSTANDING}  # pydantic puts the alternative that it has chosen into the location
        for error in failure.errors():
            location = _written(error["loc"], fields, tags)
            lines += _line("", {**error, "loc": location}, _known_keys(error["loc"][:-1])).split("\n")
        raise UserError("\n".join(f"{name}: {line}" for line in lines)) from None


def _written(location: Sequence[int | str], fields: Any, tags: set[str]) -> list[int | str]:
    """Return a location as it is written in the configuration, without the tags that pydantic puts into it."""
    found: list[int | str] = []
    for place, part in enumerate(location):
        known = isinstance(fields, dict) and part in fields
        if part in tags and not known and place < len(location) - 1:
            continue
        found.append(part)
        fields = fields[part] if known or (isinstance(fields, list) and isinstance(part, int)) else None
    return found


def _has(fields: Any, keys: list[str]) -> bool:
    for key in keys:
        if not isinstance(fields, dict) or key not in fields:
            return False
        fields = fields[key]
    return True


def load(path: Path, *others: Path) -> Config:
    """Read and validate a YAML configuration, over which others may be laid in turn; raises UserError."""
    fields = read(path)
    for other in others:
        fields = laid_over(fields, read(other))
    return validate(fields, ", ".join(map(str, (path, *others))))


def laid_over(fields: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Return fields with another file's over them, as `snakemake --configfile` does: only mappings merge."""
    merged = dict(fields)
    for key, value in other.items():
        both = isinstance(value, dict) and isinstance(fields.get(key), dict)
        merged[key] = laid_over(fields[key], value) if both else value
    return merged


def read(path: Path) -> dict[str, Any]:
    """Return the sections of a YAML file; raises UserError."""
    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give --config an existing file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not YAML in UTF-8: {error}") from None
    if not isinstance(fields, dict):
        raise UserError(f"{path}: must be a mapping of sections, see config.yaml in the repository")
    return fields
