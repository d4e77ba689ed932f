"""How fast candidates are judged, beside transformers' forward on the same weights in the same run.

    python -m speed.scoring --config janus-100m --prompts 4 --candidates 10 --out speed/results/scoring-100m.json

engine                     this project's: large batches, logits of the last position only
transformers-one-prompt    the processor and `forward`, one prompt's N candidates a call
transformers-batch         the same, all in one call
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from speed import cost
from speed.bench import compare, parser, report
from speed.data import question, sample_prompts
from speed.models import open_model
from stages.families.janus.family import Janus


def engine(family: Janus, images: np.ndarray, questions: list[str], candidates: int) -> None:
    family.p_yes(images, questions)


@torch.no_grad()
def transformers(family: Janus, images: np.ndarray, questions: list[str], candidates: int) -> None:
    texts = []
    for asked in questions:
        turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": asked}]}]
        texts.append(family.processor.apply_chat_template(turn, add_generation_prompt=True))
    inputs = family.processor(text=texts, images=list(images), return_tensors="pt", padding=True)
    inputs = {name: value.to(family.device) for name, value in inputs.items()}
    inputs["pixel_values"] = inputs["pixel_values"].to(family.model.dtype)
    family.model(**inputs).logits[:, -1].float().softmax(-1).cpu()


def one_prompt(family: Janus, images: np.ndarray, questions: list[str], candidates: int) -> None:
    for start in range(0, len(questions), candidates):
        transformers(family, images[start : start + candidates], questions[start : start + candidates], candidates)


WAYS = {"engine": engine, "transformers-one-prompt": one_prompt, "transformers-batch": transformers}


def main() -> None:
    arguments = parser(__doc__).parse_args()
    arguments.dtype = arguments.dtype or ("bfloat16" if arguments.device.startswith("cuda") else "float32")
    family = open_model(arguments.config, arguments.device, arguments.dtype)
    size = family.processor.image_processor.size["height"]
    count = arguments.prompts * arguments.candidates
    images = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    questions = [question(prompt) for prompt in sample_prompts(arguments.prompts) for _ in range(arguments.candidates)]
    length = round(np.mean([len(family.tokenizer.encode(asked)) for asked in questions[:: arguments.candidates]]))
    least = cost.scoring(family.model.config, int(length), family.model.dtype.itemsize)
    ways = {name: partial(way, family, images, questions, arguments.candidates) for name, way in WAYS.items()}
    report("scoring", arguments, compare(arguments, ways, count, least))


if __name__ == "__main__":
    main()
