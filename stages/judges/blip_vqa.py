"""BLIP-VQA of T2I-CompBench++ for color, shape and texture: BLIP is asked about each noun phrase of the prompt.

Source: BLIPvqa_eval/BLIP_vqa.py, models/blip_vqa.py and data/ of Karine-Huang/T2I-CompBench at 1b70949. This is a stand-in with
the same weights in transformers' form. Its own `forward` gives no logits of the answer and its tokenizer has no [ENC], so the
three parts of the model are called here one after the other. Its cross-attention ignores `encoder_attention_mask` (seen in
transformers 5.23), so the decoder would read the padding of questions; only questions of equal length share a batch.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from stages.common import manifests
from stages.common.batches import planned
from stages.common.errors import UserError
from stages.judges.base import Item, Judge, JudgeKind, Verdict
from stages.judges.checkpoint import (
    CheckpointJudge,
    checkpoint_files,
    device_of,
    load_model,
    load_tokenizer,
    normalised,
    remedy_of,
    runs_on,
)
from stages.judges.compbench_rules import attribute

MODELS = ("blip",)  # model_type
SIDE = 480  # pixels; images are squeezed to squares
TOKENS = 35  # of a question, with [ENC] and [SEP]
ENCODE, DECODE, YES, NO = 30523, 30522, 2748, 2053  # [ENC], [DEC], yes and no in BLIP's vocabulary of 30524 tokens


class BlipVqaJudge(CheckpointJudge):
    kind: Literal["blip-vqa"]
    phrases: str = Field(description="The noun phrases of the prompts, a manifest that python -m stages.phrases writes.")

    def outcome(self) -> dict[str, Any]:
        return {key: value for key, value in super().outcome().items() if key != "phrases"}


def question(phrase: str) -> str:
    """Return upstream's question about a noun phrase: lower-cased, with a question mark and without most punctuation."""
    return re.sub(r'[.!"()*#:;~]', "", f"{phrase}?".lower()).strip()


def read_phrases(path: Path) -> dict[str, list[str]]:
    """Return the noun phrases by prompt_id."""
    return {row["prompt_id"]: row["phrases"] for row in manifests.read_rows(path, "phrases")}


def open_blip(settings: BlipVqaJudge) -> Judge:
    """Load BLIP. The score is the product of P(yes) of all noun phrases, and the answer lists each."""
    import numpy as np
    import torch
    from PIL import Image
    from transformers import BlipForQuestionAnswering

    known = read_phrases(Path(settings.phrases))
    remedy = remedy_of(settings.kind)
    tokenizer = load_tokenizer(settings.checkpoint, remedy)
    model = load_model(settings.checkpoint, remedy, settings.device, BlipForQuestionAnswering, MODELS)
    device = device_of(settings.device)
    vocabulary = model.config.text_config.vocab_size
    if vocabulary <= ENCODE or tokenizer.convert_tokens_to_ids(["yes", "no"]) != [YES, NO]:
        raise UserError(
            f"{settings.checkpoint}: has not BLIP's vocabulary of {ENCODE + 1} tokens; give the judge blip-vqa a checkpoint "
            "such as Salesforce/blip-vqa-capfilt-large"
        )

    def squeezed(image: np.ndarray) -> np.ndarray:
        return np.asarray(Image.fromarray(image).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC))

    def tokens(phrase: str) -> list[int]:
        return [ENCODE, *tokenizer(question(phrase), truncation=True, max_length=TOKENS).input_ids[1:]]

    def p_yes(images: torch.Tensor, questions: list[list[int]]) -> list[float]:
        """Return P(yes) / (P(yes) + P(no)) of questions of equal length about encoded images `[questions, patches, width]`."""
        ids = torch.tensor(questions, device=device)
        begin = torch.full((len(questions), 1), DECODE, device=device)
        encoder = {"attention_mask": torch.ones_like(ids), "encoder_hidden_states": images}
        states = model.text_encoder(input_ids=ids, **encoder).last_hidden_state
        decoder = {"attention_mask": torch.ones_like(begin), "encoder_hidden_states": states}
        logits = model.text_decoder(input_ids=begin, **decoder).logits[:, -1]
        return torch.sigmoid(logits[:, YES] - logits[:, NO]).tolist()

    def judge_batch(items: Sequence[Item]) -> list[Verdict]:
        told = [of_prompt(item) for item in items]
        asked: dict[int, list[tuple[int, int, list[int]]]] = {}  # by length: the image, the phrase's number, the question
        for place, phrases in enumerate(told):
            for number, phrase in enumerate(phrases):
                ids = tokens(phrase)
                asked.setdefault(len(ids), []).append((place, number, ids))
        pixels = normalised([squeezed(item.image) for item in items]).to(device)
        images = model.vision_model(pixel_values=pixels, interpolate_pos_encoding=True).last_hidden_state
        found = [[0.0] * len(phrases) for phrases in told]
        for part in (part for same in asked.values() for part in planned(same, settings.batch_size)):
            answers = p_yes(images[[place for place, _, _ in part]], [ids for _, _, ids in part])
            for (place, number, _), probability in zip(part, answers, strict=True):
                found[place][number] = probability
        return [verdict(phrases, answers) for phrases, answers in zip(told, found, strict=True)]

    def of_prompt(item: Item) -> list[str]:
        try:
            return known[item.prompt["prompt_id"]]
        except KeyError:
            raise UserError(
                f"{settings.phrases}: no phrases of the prompt {item.prompt['prompt']!r}; "
                "write the manifest with python -m stages.phrases from the prompts of this benchmark"
            ) from None

    def verdict(phrases: list[str], answers: list[float]) -> Verdict:
        if not phrases:
            return Verdict(None, answer="the prompt has no noun phrase")
        listed = [f"{phrase} {probability:.4f}" for phrase, probability in zip(phrases, answers, strict=True)]
        return settings.verdict(attribute(answers), "; ".join(listed))

    @torch.inference_mode()
    def judge(items: Sequence[Item]) -> list[Verdict]:
        return [verdict for batch in planned(items, settings.batch_size) for verdict in judge_batch(batch)]

    return judge


def files(settings: BlipVqaJudge) -> list[str]:
    """Return the noun phrases and the files of the checkpoint. Raises UserError where either is missing."""
    if not Path(settings.phrases).is_file():
        raise UserError(f"{settings.phrases}: no such file; write the prompts' noun phrases with python -m stages.phrases")
    return [settings.phrases, *checkpoint_files(settings.checkpoint, remedy_of(settings.kind), MODELS, tokenizer=True)]


BLIP_VQA = JudgeKind(
    BlipVqaJudge,
    open_blip,
    files=files,
    runs_on=runs_on,
    batch_size=64,
)
