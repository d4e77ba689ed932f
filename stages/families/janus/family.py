"""Janus and Janus-Pro (`JanusForConditionalGeneration` of transformers): an autoregressive model over VQ codes.

Prompt format, unconditional row and guidance follow upstream: generation_inference.py of deepseek-ai/Janus, and arXiv
2501.17811.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from transformers import JanusForConditionalGeneration, JanusProcessor
from transformers.models.janus.processing_janus import DEFAULT_SYSTEM_PROMPT

from stages.common.errors import UserError
from stages.common.seeds import uniforms
from stages.families.base import Drawn, Pictures, Role, TokenRows, TrainingView
from stages.families.janus import JANUS, JanusSampling
from stages.families.janus.decode import cache_bytes, decode, head_dim
from stages.families.janus.training import JanusOverImages, looked_at
from stages.families.tools.linears import packed_linears
from stages.families.tools.memory import Memory
from stages.families.tools.verdicts import NO, YES, require_verdicts, single_tokens

USER, ASSISTANT = "<|User|>", "<|Assistant|>"
CHAT_TEMPLATE = (  # for use with plain transformers; this module formats turns itself
    "{% for message in messages %}{{ '<|User|>' if message['role'] == 'user' else '<|Assistant|>' }}: "
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image_placeholder>\n"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}\n\n{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|>:{% endif %}"
)
PAD = "<\uff5c\u2581pad\u2581\uff5c>"  # upstream's token, with fullwidth bars and lower one eighth blocks
# How many pixels are decoded at once. The VQ decoder holds hundreds of numbers per pixel: gigabytes for seven 384 px images.
DECODED_PIXELS_CPU, DECODED_PIXELS = 1 << 16, 1 << 20


class Janus:
    """See `stages.families.base.Family`."""

    def __init__(self, model: JanusForConditionalGeneration, processor: JanusProcessor) -> None:
        self.model = model.eval()
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.device = model.device
        self.begin = self._id(processor.image_start_token)
        self.end = self._id(processor.image_end_token)
        self.placeholder = self._id(processor.image_token)
        self.pad = self._id(PAD if PAD in self.tokenizer.get_vocab() else self.tokenizer.pad_token)
        for tag in (USER, ASSISTANT):
            self._id(tag)
        if self.placeholder != model.config.image_token_id:
            raise UserError(
                f"the checkpoint's image_token_id is {model.config.image_token_id}, but its tokenizer's "
                f"{processor.image_token} is {self.placeholder}; its tokenizer files are another model's"
            )
        # transformers' own generate needs this; save_pretrained writes it, but from_pretrained does not restore it.
        model.generation_config.generation_kwargs = {"boi_token_id": self.begin}
        self.image_length = model.model.vqmodel.config.num_patches**2
        self.memory = Memory(self.device, sum(parameter.nbytes for parameter in model.parameters()))
        self.yes, self.no = (torch.tensor(single_tokens(self.tokenizer, words), device=self.device) for words in (YES, NO))

    @classmethod
    def load(cls, checkpoint: Path, device: str = "cpu", dtype: str = "float32", role: Role = "draw") -> Janus:
        JANUS.files(checkpoint, role)  # raises UserError on a folder of another family
        try:
            model, found = JanusForConditionalGeneration.from_pretrained(
                checkpoint, dtype=getattr(torch, dtype), use_safetensors=True, local_files_only=True, output_loading_info=True
            )
            if missing := sorted(found["missing_keys"]):
                raise ValueError(f"its weights lack {missing[0]}")
            processor = JanusProcessor.from_pretrained(checkpoint, local_files_only=True)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise UserError(f"{checkpoint}: the checkpoint does not load ({error}); download or convert it again") from None
        return cls(model.to(device), processor)

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)

    def _id(self, token: str | None) -> int:
        """Return the id of a special token by its name, because ids differ between Janus-Pro-1B and 7B."""
        identifier = self.tokenizer.convert_tokens_to_ids(token) if token else None
        if identifier is None or identifier == self.tokenizer.unk_token_id:
            raise UserError(f"the checkpoint's tokenizer has no token {token!r}; it is not a Janus tokenizer")
        return identifier

    # --- drawing ---------------------------------------------------------------------------------------------------

    def _text_ids(self, text: str) -> list[int]:
        """Return the ids of a text with exactly one BOS before it.

        The tokenizer is asked to add no special tokens, because checkpoints differ: in some its post-processor adds BOS, in
        others only `add_bos_token` in tokenizer_config.json requests it, which transformers 5 ignores.
        """
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        return ids if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id, *ids]

    def _prompt_ids(self, prompt: str) -> list[int]:
        """Return upstream's layout for Janus-Pro: BOS, user turn, assistant turn, begin-of-image."""
        return [*self._text_ids(f"{USER}: {prompt}\n\n{ASSISTANT}:"), self.begin]

    def bucket(self, prompt: str) -> int:
        return len(self._prompt_ids(prompt))

    @torch.no_grad()
    def generate(self, prompts: list[str], seeds: np.ndarray, sampling: JanusSampling) -> Drawn:
        """See `Family.generate`. Whether a candidate depends on its batch is determined by the precision:

        In float32 on a CPU it does not, except for near ties. Another batch size changes logits in the seventh digit, so a code
        changes only if its uniform draw is that close to the boundary between two codes. No code changed in 2,000 images of
        tiny-janus, drawn 1 to 500 at once.

        In bfloat16 on a GPU it depends on the batch, because the shape of a matrix product determines how it is rounded, and a
        rounding difference can change a code. Equal batches give equal candidates: a batch is split into pieces by the geometry
        of model, prompts and device, never by the free memory. Only a piece that runs out of memory is split further. A message
        then says so, because this may change codes too.
        """
        draws = torch.from_numpy(uniforms(seeds, self.image_length)).to(self.device)
        ids = [tuple(self._prompt_ids(prompt)) for prompt in prompts]
        columns = max(map(len, ids)) + self.image_length
        llm = self.model.model.language_model
        cached = cache_bytes(llm.config, columns, self.model.dtype)
        logits = 24 * self.model.config.vq_config.num_embeddings  # float32 and float64 copies during sampling
        rows = 2 if sampling.guidance_scale != 1.0 else 1

        def some(part: slice) -> tuple[torch.Tensor, torch.Tensor]:
            return self._sample(ids[part], draws[part], sampling)

        at_once = self.memory.fit(rows * (cached + logits))
        with packed_linears(llm, self.model.model.generation_head, self.model.model.generation_aligner):
            parts = self.memory.pieces("drawing", len(prompts), at_once, some)
        tokens, log_probabilities = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        return Drawn(self._decode(tokens), tokens=tokens.cpu().numpy(), log_probabilities=log_probabilities.cpu().numpy())

    def _sample(
        self, ids: list[tuple[int, ...]], draws: torch.Tensor, sampling: JanusSampling
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return codes, int64 `[n, t]`, and log-probabilities, float64 `[n]`, for prompts as ids and draws float64 `[n, t]`."""
        wanted = []
        for row in ids:
            wanted.append(row)
            if sampling.guidance_scale != 1.0:  # as upstream: padding, attended to, between BOS and begin-of-image
                wanted.append((row[0], *[self.pad] * (len(row) - 2), row[-1]))
        distinct = {row: place for place, row in enumerate(dict.fromkeys(wanted))}
        embed = self.model.get_input_embeddings()
        return decode(
            self.model.model.language_model,
            [embed(torch.tensor(row, device=self.device)) for row in distinct],
            [distinct[row] for row in wanted],
            draws,
            self.model.model.generation_head,
            self.model.prepare_embeddings_for_image_generation,
            sampling.guidance_scale,
            sampling.temperature,
        )

    @torch.no_grad()
    def _decode(self, tokens: torch.Tensor) -> np.ndarray:
        """Return the images of codes int64 `[n, t]`, uint8 `[n, h, w, 3]`. The VQ decoder's output is in [-1, 1].

        The pieces are independent of those of sampling, so that no codes are lost if the decoder runs out of memory. A pixel
        may differ by one level in a piece of another size.
        """

        def some(part: slice) -> np.ndarray:
            pixels = self.model.decode_image_tokens(tokens[part]).float()
            return ((pixels + 1) * 127.5).clamp(0, 255).byte().cpu().numpy()  # truncated, as upstream does

        pixels_at_once = DECODED_PIXELS_CPU if self.device.type == "cpu" else DECODED_PIXELS
        at_once = max(1, min(64, pixels_at_once // self.model.config.vision_config.image_size**2))
        return np.concatenate(self.memory.pieces("decoding", len(tokens), at_once, some))

    @torch.no_grad()
    def log_likelihood(self, prompts: list[str], pictures: Pictures, seeds: np.ndarray | None = None) -> np.ndarray:
        """Return the exact value: the sum over codes of log p(code | prompt, earlier codes). Seeds are ignored."""
        tokens = pictures.tokens
        ids = [self._prompt_ids(prompt) for prompt in prompts]
        result = np.zeros(len(ids))
        for length in sorted({len(row) for row in ids}):
            rows = [i for i, row in enumerate(ids) if len(row) == length]
            codes = torch.from_numpy(np.asarray(tokens)[rows].astype(np.int64)).to(self.device)
            texts = torch.tensor([ids[i] for i in rows], device=self.device)

            def some(part: slice, texts: torch.Tensor = texts, codes: torch.Tensor = codes) -> np.ndarray:
                return self._log_likelihood(texts[part], codes[part]).cpu().numpy()

            logits = 12 * self.image_length * self.model.config.vq_config.num_embeddings
            each = logits + self._activation_bytes(length + self.image_length)
            result[rows] = np.concatenate(self.memory.pieces("scoring", len(rows), self.memory.fit(each), some))
        return result

    def _log_likelihood(self, texts: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """Return the log-likelihood, float64 `[n]`, of codes int64 `[n, t]` after prompt ids int64 `[n, p]`."""
        text = self.model.get_input_embeddings()(texts)
        inputs = torch.cat([text, self.model.prepare_embeddings_for_image_generation(codes[:, :-1])], 1)
        hidden = self.model.model.language_model(inputs_embeds=inputs, use_cache=False).last_hidden_state
        logits = self.model.model.generation_head(hidden[:, texts.shape[1] - 1 :]).float()
        return logits.log_softmax(-1).gather(2, codes[:, :, None]).squeeze(2).double().sum(1)

    def _activation_bytes(self, tokens: int) -> int:
        """Return an estimate of the bytes that the forward pass of one sequence needs at its peak, in the MLP."""
        config = self.model.config.text_config
        return tokens * (4 * config.intermediate_size + 12 * config.hidden_size) * self.model.dtype.itemsize

    # --- judging ---------------------------------------------------------------------------------------------------

    def _pixels(self, images: np.ndarray) -> torch.Tensor:
        """Return what the processor returns for uint8 `[n, h, w, 3]`, computed on the device if the images need no resizing."""
        processor = self.processor.image_processor
        if images.shape[1:3] != (processor.size["height"], processor.size["width"]):
            pixels = processor(images=list(images), return_tensors="pt")["pixel_values"]
            return pixels.to(self.device, self.model.dtype)
        pixels = torch.from_numpy(images).to(self.device).permute(0, 3, 1, 2).float() * processor.rescale_factor
        mean, std = (torch.tensor(v, device=self.device)[:, None, None] for v in (processor.image_mean, processor.image_std))
        return ((pixels - mean) / std).to(self.model.dtype)

    def _question_ids(self, question: str, prefix: str = "") -> list[int]:
        """Return upstream's layout: BOS, system prompt, user turn with image and question, assistant turn.

        The paper's question begins with upstream's system prompt, which belongs before the user turn.
        """
        asked = question.removeprefix(DEFAULT_SYSTEM_PROMPT.rstrip()).lstrip()
        system = DEFAULT_SYSTEM_PROMPT if asked != question or self.processor.use_default_system_prompt else ""
        picture = self.processor.replace_image_token({}, 0)
        return self._text_ids(f"{system}{USER}: {picture}\n{asked}\n\n{ASSISTANT}:{prefix}")

    def _padded_questions(self, questions: Sequence[str], prefix: str = "") -> tuple[torch.Tensor, torch.Tensor]:
        """Return right-padded ids `[n, s]` and the index of each row's last real token. Causal attention needs no mask."""
        rows = [self._question_ids(question, prefix) for question in questions]
        last = torch.tensor([len(row) - 1 for row in rows], device=self.device)
        width = max(len(row) for row in rows)
        return torch.tensor([row + [self.pad] * (width - len(row)) for row in rows], device=self.device), last

    def _question_embeddings(
        self, images: np.ndarray, questions: list[str], prefix: str = ""
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return embeddings `[n, s, d]` and the index of each row's last real token."""
        ids, last = self._padded_questions(questions, prefix)
        return looked_at(self.model, self._pixels(images), ids), last

    @torch.no_grad()
    def p_yes(self, images: np.ndarray, questions: list[str], prefix: str = "") -> tuple[np.ndarray, np.ndarray]:
        require_verdicts(self.yes, self.no)

        def some(part: slice) -> tuple[np.ndarray, np.ndarray]:
            inputs, last = self._question_embeddings(images[part], questions[part], prefix)
            hidden = self.model.model.language_model(inputs_embeds=inputs, use_cache=False).last_hidden_state
            logits = self.model.lm_head(hidden[torch.arange(len(last), device=self.device), last])
            probabilities = logits.double().softmax(-1)
            yes, no = probabilities[:, self.yes].sum(1), probabilities[:, self.no].sum(1)
            return (yes / (yes + no)).cpu().numpy(), (1 - yes - no).clamp(min=0).cpu().numpy()

        tokens = self.processor.num_image_tokens + max(len(question) for question in questions)  # an upper bound
        with packed_linears(self.model):
            parts = self.memory.pieces("judging", len(questions), self.memory.fit(self._activation_bytes(tokens)), some)
        yes, neither = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return yes, neither

    @torch.no_grad()
    def answer(self, images: np.ndarray, questions: list[str], max_new_tokens: int = 64) -> list[str]:
        answers = []
        for i in range(len(questions)):  # one by one, because lengths differ and this mode is rarely used
            inputs, _ = self._question_embeddings(images[i : i + 1], questions[i : i + 1])
            cache = None
            ids: list[int] = []
            while len(ids) < max_new_tokens:
                out = self.model.model.language_model(inputs_embeds=inputs, past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                token = self.model.lm_head(out.last_hidden_state[:, -1]).argmax(-1)
                if int(token) == self.tokenizer.eos_token_id:
                    break
                ids.append(int(token))
                inputs = self.model.get_input_embeddings()(token)[:, None]
            answers.append(self.tokenizer.decode(ids))
        return answers

    # --- training --------------------------------------------------------------------------------------------------

    def token_ids(self, prompts: list[str], pictures: Pictures) -> list[tuple[list[int], list[int]]]:
        """Return (prompt ids, image ids) for each row, in the joint vocabulary of `JanusOverImages`."""
        assert pictures.tokens is not None
        codes = self.model.config.vq_config.num_embeddings
        return [
            ([codes + token for token in self._prompt_ids(prompt)], row.tolist())
            for prompt, row in zip(prompts, pictures.tokens, strict=True)
        ]

    def training_view(self) -> TrainingView:
        aligner, vision, head = "janus.model.aligner.", "janus.model.vision_model.", "janus.lm_head."
        groups = {
            "llm": ("janus.model.language_model.layers.", "janus.model.language_model.norm."),
            "text": ("janus.model.language_model.embed_tokens.", head),
            "projector": ("janus.model.generation_aligner.", aligner),
            "vision": (vision,),
        }
        pad = self.model.config.vq_config.num_embeddings + self.pad  # in the joint vocabulary

        def unconditional(ids: list[int]) -> list[int]:
            return [ids[0], *[pad] * (len(ids) - 2), ids[-1]]  # as `_sample` draws it

        rows = TokenRows(self.tokenizer, self.token_ids, unconditional)
        return TrainingView(JanusOverImages(self.model), groups, (aligner, vision, head), self._row_flops, token_rows=rows)

    def _row_flops(self, prompt: str) -> float:
        return self._flops(len(self._prompt_ids(prompt)) + self.image_length)

    def _flops(self, tokens: float) -> float:
        """Return the FLOPs of a forward pass: the matrices of the LLM's layers and the image head, and causal attention."""
        llm = self.model.model.language_model
        matrices = [
            parameter.numel() for module in (llm.layers, self.model.model.generation_head) for parameter in module.parameters()
        ]
        attention = 2 * tokens * llm.config.num_attention_heads * head_dim(llm.config) * llm.config.num_hidden_layers
        return tokens * (2 * sum(matrices) + attention)

    def judge_loss(
        self, model: torch.nn.Module, images: np.ndarray, questions: Sequence[str], p_yes: np.ndarray, prefix: str = ""
    ) -> torch.Tensor:
        require_verdicts(self.yes, self.no)
        ids, last = self._padded_questions(questions, prefix)
        logits = model(pixels=self._pixels(images), question_ids=ids, last=last).logits.float()
        log_yes, log_no = logits[:, self.yes].logsumexp(1), logits[:, self.no].logsumexp(1)
        target = torch.as_tensor(p_yes, dtype=logits.dtype, device=logits.device)
        return F.binary_cross_entropy_with_logits(log_yes - log_no, target)
