"""Janus and Janus-Pro (`JanusForConditionalGeneration` of transformers): autoregressive over VQ codes.

Upstream: deepseek-ai/Janus, generation_inference.py (prompt format, unconditional row, guidance) and arXiv 2501.17811.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from transformers import JanusForConditionalGeneration, JanusProcessor
from transformers.models.janus.processing_janus import DEFAULT_SYSTEM_PROMPT

from stages.common.runtime import UserError
from stages.common.seeds import uniforms
from stages.families.base import Drawn, Sampling, TrainingView
from stages.families.janus.decode import cache_bytes, decode, head_dim
from stages.families.janus.training import JanusOverImages, looked_at
from stages.families.tools.checkpoints import require_model_type
from stages.families.tools.linears import packed_linears
from stages.families.tools.memory import Memory

USER, ASSISTANT = "<|User|>", "<|Assistant|>"
CHAT_TEMPLATE = (  # for plain transformers; this file writes its turns itself
    "{% for message in messages %}{{ '<|User|>' if message['role'] == 'user' else '<|Assistant|>' }}: "
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image_placeholder>\n"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}\n\n{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|>:{% endif %}"
)
PAD = "<\uff5c\u2581pad\u2581\uff5c>"  # upstream's, with fullwidth bars and lower one eighth blocks
# At once: the VQ decoder holds hundreds of numbers a pixel, gigabytes for seven images of 384 px.
DECODED_PIXELS_CPU, DECODED_PIXELS = 1 << 16, 1 << 20
YES = ("1", " 1", "yes", " yes", "Yes", " Yes", "YES", " YES")
NO = ("0", " 0", "no", " no", "No", " No", "NO", " NO")


class Janus:
    """See `stages.families.base.Family`."""

    question = (
        "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
        "provides, and assist the user with a variety of tasks using natural language. Does this original image "
        "describe {prompt}? If it describes the scene, score 1; if it does not fully describe, score 0. Please answer "
        "in the following format: The score is {your score}."
    )
    # Digits are tokens of their own in Janus-Pro's tokenizer, so the space before the score belongs to what comes before.
    answer_prefix = " The score is "

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
        # Lost by from_pretrained though saved by save_pretrained, and needed by transformers' own generate.
        model.generation_config.generation_kwargs = {"boi_token_id": self.begin}
        self.image_length = model.model.vqmodel.config.num_patches**2
        self.memory = Memory(self.device)
        self.yes = self._single_tokens(YES)
        self.no = self._single_tokens(NO)

    @classmethod
    def load(cls, checkpoint: Path, device: str = "cpu", dtype: str = "float32") -> Janus:
        require_model_type(checkpoint, "janus")
        try:
            model = JanusForConditionalGeneration.from_pretrained(
                checkpoint, dtype=getattr(torch, dtype), use_safetensors=True, local_files_only=True
            )
            processor = JanusProcessor.from_pretrained(checkpoint, local_files_only=True)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise UserError(f"{checkpoint}: the checkpoint does not load ({error}); download or convert it again") from None
        return cls(model.to(device), processor)

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)

    def _id(self, token: str | None) -> int:
        """The id of a special token by its name: ids differ between Janus-Pro-1B and 7B."""
        identifier = self.tokenizer.convert_tokens_to_ids(token) if token else None
        if identifier is None or identifier == self.tokenizer.unk_token_id:
            raise UserError(f"the checkpoint's tokenizer has no token {token!r}; it is not a Janus tokenizer")
        return identifier

    def _single_tokens(self, spellings: tuple[str, ...]) -> torch.Tensor:
        rows = [self.tokenizer.encode(text, add_special_tokens=False) for text in spellings]
        found = {row[0] for row in rows if len(row) == 1 and row[0] != self.tokenizer.unk_token_id}
        return torch.tensor(sorted(found), device=self.device)

    # --- drawing ---------------------------------------------------------------------------------------------------

    def _prompt_ids(self, prompt: str) -> list[int]:
        """BOS, user turn, assistant turn, begin-of-image: upstream's layout for Janus-Pro."""
        ids = [*self.tokenizer.encode(f"{USER}: {prompt}\n\n{ASSISTANT}:"), self.begin]
        if self.tokenizer.bos_token_id is not None and ids[0] != self.tokenizer.bos_token_id:
            ids.insert(0, self.tokenizer.bos_token_id)
        return ids

    def bucket(self, prompt: str) -> int:
        return len(self._prompt_ids(prompt))

    @torch.no_grad()
    def generate(self, prompts: list[str], seeds: np.ndarray, sampling: Sampling) -> Drawn:
        draws = torch.from_numpy(uniforms(seeds, self.image_length)).to(self.device)
        ids = [tuple(self._prompt_ids(prompt)) for prompt in prompts]
        columns = max(map(len, ids)) + self.image_length
        llm = self.model.model.language_model
        cached = cache_bytes(llm.config, columns, self.model.dtype)
        logits = 24 * self.model.config.vq_config.num_embeddings  # sampling's float64 and float32 copies
        rows = 2 if sampling.guidance_scale != 1.0 else 1

        def some(part: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            tokens, log_probabilities = self._sample(ids[part], draws[part], sampling)
            return self._decode(tokens), tokens.cpu().numpy(), log_probabilities.cpu().numpy()

        with packed_linears(llm, self.model.model.generation_head, self.model.model.generation_aligner):
            parts = self.memory.pieces(len(prompts), rows * (cached + logits), some)
        return Drawn(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))

    def _sample(self, ids: list[tuple[int, ...]], draws: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes int64 `[n, t]` and log-probabilities for prompts as ids, draws float64 `[n, t]`."""
        wanted = []
        for row in ids:
            wanted.append(row)
            if sampling.guidance_scale != 1.0:  # everything between BOS and begin-of-image padded, and attended, as upstream
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
        """Codes int64 `[n, t]` to pictures uint8 `[n, h, w, 3]`; the VQ decoder's output is in [-1, 1]."""
        pixels_at_once = DECODED_PIXELS_CPU if self.device.type == "cpu" else DECODED_PIXELS
        at_once = max(1, min(64, pixels_at_once // self.model.config.vision_config.image_size**2))
        pixels = torch.cat([self.model.decode_image_tokens(part) for part in tokens.split(at_once)])
        return ((pixels.float() + 1) * 127.5).round().clamp(0, 255).byte().cpu().numpy()

    @torch.no_grad()
    def image_log_likelihood(self, prompts: list[str], tokens: np.ndarray) -> np.ndarray:
        """Exact: the sum over codes of log p(code | prompt, earlier codes)."""
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
            result[rows] = np.concatenate(self.memory.pieces(len(rows), each, some))
        return result

    def _log_likelihood(self, texts: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """Of codes int64 `[n, t]` after prompts int64 `[n, p]`, float64 `[n]`."""
        text = self.model.get_input_embeddings()(texts)
        inputs = torch.cat([text, self.model.prepare_embeddings_for_image_generation(codes[:, :-1])], 1)
        hidden = self.model.model.language_model(inputs_embeds=inputs, use_cache=False).last_hidden_state
        logits = self.model.model.generation_head(hidden[:, texts.shape[1] - 1 :]).float()
        return logits.log_softmax(-1).gather(2, codes[:, :, None]).squeeze(2).double().sum(1)

    def _activation_bytes(self, tokens: int) -> int:
        """Bytes that one sequence's forward holds at its widest, the MLP; an estimate, see Memory."""
        config = self.model.config.text_config
        return tokens * (4 * config.intermediate_size + 12 * config.hidden_size) * self.model.dtype.itemsize

    # --- judging ---------------------------------------------------------------------------------------------------

    def _pixels(self, images: np.ndarray) -> torch.Tensor:
        """What the processor makes of uint8 `[n, h, w, 3]`; on the device where there is nothing to resize."""
        processor = self.processor.image_processor
        if images.shape[1:3] != (processor.size["height"], processor.size["width"]):
            pixels = processor(images=list(images), return_tensors="pt")["pixel_values"]
            return pixels.to(self.device, self.model.dtype)
        pixels = torch.from_numpy(images).to(self.device).permute(0, 3, 1, 2).float() * processor.rescale_factor
        mean, std = (torch.tensor(v, device=self.device)[:, None, None] for v in (processor.image_mean, processor.image_std))
        return ((pixels - mean) / std).to(self.model.dtype)

    def _question_ids(self, question: str, prefix: str = "") -> list[int]:
        """Upstream's layout: system prompt, user turn with picture and question, assistant turn.

        The paper's question opens with upstream's system prompt, whose place is before the user's turn.
        """
        asked = question.removeprefix(DEFAULT_SYSTEM_PROMPT.rstrip()).lstrip()
        system = DEFAULT_SYSTEM_PROMPT if asked != question or self.processor.use_default_system_prompt else ""
        picture = self.processor.replace_image_token({}, 0)
        return self.tokenizer.encode(f"{system}{USER}: {picture}\n{asked}\n\n{ASSISTANT}:{prefix}")

    def _padded_questions(self, questions: list[str], prefix: str = "") -> tuple[torch.Tensor, torch.Tensor]:
        """Right-padded ids `[n, s]` and the index of each row's last real token; attention is causal, so no mask."""
        rows = [self._question_ids(question, prefix) for question in questions]
        last = torch.tensor([len(row) - 1 for row in rows], device=self.device)
        width = max(len(row) for row in rows)
        return torch.tensor([row + [self.pad] * (width - len(row)) for row in rows], device=self.device), last

    def _question_embeddings(
        self, images: np.ndarray, questions: list[str], prefix: str = ""
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings `[n, s, d]` and the index of each row's last real token."""
        ids, last = self._padded_questions(questions, prefix)
        return looked_at(self.model, self._pixels(images), ids), last

    @torch.no_grad()
    def p_yes(self, images: np.ndarray, questions: list[str], prefix: str = "") -> tuple[np.ndarray, np.ndarray]:
        def some(part: slice) -> tuple[np.ndarray, np.ndarray]:
            inputs, last = self._question_embeddings(images[part], questions[part], prefix)
            hidden = self.model.model.language_model(inputs_embeds=inputs, use_cache=False).last_hidden_state
            logits = self.model.lm_head(hidden[torch.arange(len(last), device=self.device), last])
            probabilities = logits.double().softmax(-1)
            yes, no = probabilities[:, self.yes].sum(1), probabilities[:, self.no].sum(1)
            return (yes / (yes + no)).cpu().numpy(), (1 - yes - no).clamp(min=0).cpu().numpy()

        tokens = self.processor.num_image_tokens + max(len(question) for question in questions)  # at most
        with packed_linears(self.model):
            parts = self.memory.pieces(len(questions), self._activation_bytes(tokens), some)
        yes, neither = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return yes, neither

    @torch.no_grad()
    def answer(self, images: np.ndarray, questions: list[str], max_new_tokens: int = 64) -> list[str]:
        answers = []
        for i in range(len(questions)):  # one by one: unequal lengths, and this is the rare path
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

    def training_rows(self, prompts: list[str], tokens: np.ndarray) -> list[tuple[list[int], list[int]]]:
        codes = self.model.config.vq_config.num_embeddings
        return [
            ([codes + token for token in self._prompt_ids(prompt)], [int(code) for code in row])
            for prompt, row in zip(prompts, tokens, strict=True)
        ]

    def training_view(self) -> TrainingView:
        aligner, vision, head = "janus.model.aligner.", "janus.model.vision_model.", "janus.lm_head."
        groups = {
            "llm": ("janus.model.language_model.layers.", "janus.model.language_model.norm."),
            "text": ("janus.model.language_model.embed_tokens.", head),
            "projector": ("janus.model.generation_aligner.", aligner),
            "vision": (vision,),
        }
        return TrainingView(JanusOverImages(self.model), self.tokenizer, groups, (aligner, vision, head), self._flops)

    def _flops(self, tokens: float) -> float:
        """Matrices of the LLM's layers and the image head, and causal attention."""
        llm = self.model.model.language_model
        matrices = [
            parameter.numel() for module in (llm.layers, self.model.model.generation_head) for parameter in module.parameters()
        ]
        attention = 2 * tokens * llm.config.num_attention_heads * head_dim(llm.config) * llm.config.num_hidden_layers
        return tokens * (2 * sum(matrices) + attention)

    def judge_loss(
        self, model: torch.nn.Module, images: np.ndarray, questions: list[str], p_yes: np.ndarray, prefix: str = ""
    ) -> torch.Tensor:
        ids, last = self._padded_questions(questions, prefix)
        logits = model(pixels=self._pixels(images), question_ids=ids, last=last).logits.float()
        log_yes, log_no = logits[:, self.yes].logsumexp(1), logits[:, self.no].logsumexp(1)
        target = torch.as_tensor(p_yes, dtype=logits.dtype, device=logits.device)
        return F.binary_cross_entropy_with_logits(log_yes - log_no, target)
