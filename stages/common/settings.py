"""Sections of the configuration that families, suites and judges build on, and number types with limits."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from stages.families import FAMILIES

Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Device = Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")]


class Section(BaseModel):
    """A part of the configuration. Unknown keys are errors, and a section never changes after it has been read."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Model(Section):
    """A model that draws and judges, and where it runs."""

    family: str = Field(
        default="janus",
        description="The model family. docs/extending.md says how to add one.",
        json_schema_extra={"enum": list(FAMILIES)},
    )
    checkpoint: str = Field(
        default="models/tiny-janus",
        description="The checkpoint's folder, on a file system that every machine of the run sees. Only safetensors are read.",
    )
    device: Device = Field(
        default="auto",
        description="auto, cpu, cuda, or one device such as cuda:0. auto takes a GPU where there is one, and the CPU "
        "elsewhere; cuda ends with an error where there is none.",
    )
    workers: Positive | None = Field(
        default=None,
        description="How many processes share the batches of one shard, one GPU each. Empty: one for each visible GPU.",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="The type of weights and activations. auto is bfloat16 on a GPU and float32 on a CPU."
    )

    @field_validator("family")
    @classmethod
    def _family(cls, family: str) -> str:
        if family not in FAMILIES:
            raise ValueError(f"unknown family; known families: {', '.join(FAMILIES)}")
        return family


class Score(Section):
    """How the model's understanding branch is asked about an image."""

    mode: Literal["p_yes", "answer"] = Field(
        default="p_yes",
        description="p_yes reads the probability of yes at the first answer token. answer generates the whole answer and "
        "parses it ('The score is 1.', 'Yes, ...').",
    )
    question: str | None = Field(
        default=None,
        description="The question, with {prompt} in it. Empty: the family's own, which for janus and show_o is the paper's.",
    )
    answer_prefix: str = Field(
        default="",
        description="In mode p_yes with your own question: how the answer begins, up to the token that is the verdict.",
    )
    max_new_tokens: Positive = Field(default=128, description="In mode answer: the longest answer, in tokens.")
    verdict_threshold: Share = Field(
        default=0.5,
        description="The model's verdict is yes when p_yes is at least this. It decides the metrics of the understanding "
        "branch; which candidates become training data is decided by pairs.accept_threshold.",
    )
    batch_size: Positive = Field(default=64, description="Images that are judged together. In float32 it changes no result.")

    @field_validator("question")
    @classmethod
    def _question(cls, question: str | None) -> str | None:
        if question is not None and "{prompt}" not in question:
            raise ValueError("the question must contain {prompt}")
        return question
