"""Show-o (arXiv 2408.12528): one transformer that reads text and draws by filling in masked image tokens.

Source: showlab/Show-o at 45a5a2d. The image codes are those of MAGVIT-v2. Pictures are understood through the same codes or, in
checkpoints with a CLIP tower, through its features.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPImageProcessorPil, DynamicCache, PreTrainedTokenizerFast

from stages.common.errors import UserError
from stages.common.seeds import uniforms
from stages.families.base import Drawn, Pictures, Role, RowLosses, TrainingView
from stages.families.show_o import PICTURES, SHOW_O, TRAINING, ShowOSampling
from stages.families.show_o.decode import Group, fill_in, rotary, run_layers
from stages.families.show_o.layout import Layout
from stages.families.show_o.magvit import Geometry, Magvit
from stages.families.show_o.model import ShowOModel, seen_asking, seen_drawing
from stages.families.tools.linears import packed_linears
from stages.families.tools.memory import Memory
from stages.families.tools.pictures import square
from stages.families.tools.verdicts import NO, YES, require_verdicts, single_tokens

# How many pixels MAGVIT-v2 holds at once: it has hundreds of numbers for each.
PIXELS_CPU, PIXELS = 1 << 16, 1 << 20
MASKS_PER_ROW = 1


class ShowO:
    """See `stages.families.base.Family`."""

    def __init__(
        self, model: ShowOModel, vq: Magvit, tokenizer: PreTrainedTokenizerFast, masks_per_row: int = MASKS_PER_ROW
    ) -> None:
        """masks_per_row: over how many masks the loss and the likelihood of a row are averaged."""
        self.model, self.vq, self.tokenizer = model.eval(), vq.eval(), tokenizer
        self.masks_per_row = masks_per_row
        self.device = model.device
        config = model.config
        self.layout = Layout(tokenizer, 2**vq.geometry.bits, config.max_text_tokens)
        self.places = config.image_tokens
        self.side = int(self.places**0.5) * vq.geometry.patch  # of a picture, in pixels
        if config.text_config.vocab_size != self.layout.vocabulary:
            raise UserError(
                f"the checkpoint's vocab_size is {config.text_config.vocab_size}, but its tokenizer, {2**vq.geometry.bits} "
                f"image codes and the mask make {self.layout.vocabulary}; its tokenizer files are another model's"
            )
        self.memory = Memory(self.device, sum(parameter.nbytes for parameter in model.parameters()))
        self.yes, self.no = (torch.tensor(single_tokens(tokenizer, words), device=self.device) for words in (YES, NO))

    @classmethod
    def load(cls, checkpoint: Path, device: str = "cpu", dtype: str = "float32", role: Role = "draw") -> ShowO:
        SHOW_O.files(checkpoint, role)  # raises UserError on a folder of another family
        try:
            model, found = ShowOModel.from_pretrained(
                checkpoint, dtype=getattr(torch, dtype), use_safetensors=True, local_files_only=True, output_loading_info=True
            )
            if wrong := sorted(found["missing_keys"] | found["unexpected_keys"]):
                raise ValueError(f"its weights and config.json differ in {wrong[0]}")
            vq = Magvit(Geometry(**model.config.vq_config))
            vq.load_state_dict(load_file(checkpoint / PICTURES))
            tokenizer = PreTrainedTokenizerFast.from_pretrained(checkpoint, local_files_only=True)
        except (OSError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
            raise UserError(f"{checkpoint}: the checkpoint does not load ({error}); convert or copy it again") from None
        # MAGVIT-v2 stays in float32: many latents are near 0, where rounding changes the code.
        return cls(model.to(device), vq.to(device), tokenizer, masks_per_row(checkpoint / TRAINING))

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        save_file({name: tensor.contiguous() for name, tensor in self.vq.state_dict().items()}, folder / PICTURES)
        (folder / TRAINING).write_text(json.dumps({"masks_per_row": self.masks_per_row}, indent=2) + "\n")

    def code_head(self) -> nn.Linear:
        """Return the part of the output layer that belongs to the image codes, without copying its weights."""
        codes = slice(self.layout.offset, self.layout.mask)
        whole = self.model.llm.lm_head
        with torch.device("meta"):
            head = nn.Linear(whole.in_features, self.layout.codes)
        head.weight, head.bias = (nn.Parameter(part.data[codes], requires_grad=False) for part in (whole.weight, whole.bias))
        return head

    # --- drawing ---------------------------------------------------------------------------------------------------

    def bucket(self, prompt: str) -> int:
        return len(self.layout.drawing(prompt))

    @torch.no_grad()
    def generate(self, prompts: list[str], seeds: np.ndarray, sampling: ShowOSampling) -> Drawn:
        """See `Family.generate`. As with Janus, a candidate is independent of its batch in float32 on a CPU, except for near
        ties; in bfloat16 on a GPU equal batches give equal candidates, and other batches may round a code differently."""
        layout = self.layout
        ids = [tuple(layout.drawing(prompt)) for prompt in prompts]
        head = self.code_head()  # anew, because the weights may have been trained since
        rows = 2 if sampling.guidance_scale > 0 else 1
        tokens = max(map(len, ids)) + self.places + 2
        each = rows * (self._activation_bytes(tokens) + 12 * self.places * layout.codes) + 20 * self.places * layout.codes
        each += 16 * sampling.steps * self.places

        def some(part: slice) -> torch.Tensor:
            draws = torch.from_numpy(uniforms(seeds[part], 2 * sampling.steps * self.places)).to(self.device)
            return fill_in(
                self.model.llm.model,
                head,
                ids[part],
                tuple(layout.drawing("")),
                (layout.begin, layout.end, layout.offset, layout.mask),
                draws.view(-1, sampling.steps, 2, self.places),
                sampling.guidance_scale,
                sampling.temperature,
            )

        with packed_linears(self.model.llm.model, head):
            codes = torch.cat(self.memory.pieces("drawing", len(prompts), self.memory.fit(each), some))
        return Drawn(self._decode(codes), tokens=codes.cpu().numpy())

    def _pixels_at_once(self) -> int:
        return max(1, (PIXELS_CPU if self.device.type == "cpu" else PIXELS) // self.side**2)

    @torch.no_grad()
    def _decode(self, codes: torch.Tensor) -> np.ndarray:
        """Return the images of codes int64 `[n, places]`, uint8 `[n, h, w, 3]`. Values are truncated, as upstream does."""

        def some(part: slice) -> np.ndarray:
            pixels = ((self.vq.decode(codes[part]).float() + 1) / 2).clamp(0, 1) * 255
            return pixels.byte().permute(0, 2, 3, 1).cpu().numpy()

        return np.concatenate(self.memory.pieces("decoding", len(codes), self._pixels_at_once(), some))

    @torch.no_grad()
    def encode(self, images: np.ndarray) -> torch.Tensor:
        """Return the codes of images, uint8 `[n, h, w, 3]`, as int64 `[n, places]`."""

        def some(part: slice) -> torch.Tensor:
            pixels = square(images[part], self.side).astype(np.float32)  # not by torch: `stages.dynamics.precision` raises that
            # TF32, which cuDNN would take on a GPU, has the mantissa of float16, and many latents are near 0.
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                return self.vq.encode((torch.from_numpy(pixels).to(self.device).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5)

        return torch.cat(self.memory.pieces("encoding", len(images), self._pixels_at_once(), some))

    # --- judging ---------------------------------------------------------------------------------------------------

    def _asked(self, images: np.ndarray, questions: Sequence[str], prefix: str = "") -> dict[str, torch.Tensor | int | None]:
        """Return questions about images as arguments of `ShowOModel.forward`: it then gives the logits of the answers' first
        tokens. Rows are padded on the right, where nothing that counts sees the pads."""
        layout = self.layout
        pixels, at = None, 0
        if self.model.config.vision_config is None:
            codes = self.encode(images).tolist()
            rows = [layout.asking(*asked, prefix) for asked in zip(codes, questions, strict=True)]
            start, stop = 0, self.places + 3
        else:
            rows = [layout.asking_tower(question, prefix)[0] for question in questions]
            start = at = layout.asking_tower("")[1]
            pixels = self._tower_pixels(images)
            stop = at + (self.model.config.vision_config.image_size // self.model.config.vision_config.patch_size) ** 2
        width = max(map(len, rows))
        ids = torch.tensor([row + [layout.pad] * (width - len(row)) for row in rows], device=self.device)
        more = 0 if pixels is None else stop - start
        columns = torch.tensor([len(row) + more - 1 for row in rows], device=self.device)
        seen = seen_asking(width + more, start, stop, self.device)
        places = torch.arange(len(rows), device=self.device)
        return {"ids": ids, "seen": seen[None], "rows": places, "columns": columns, "pixels": pixels, "at": at}

    def _tower_pixels(self, images: np.ndarray) -> torch.Tensor:
        side = self.model.config.vision_config.image_size
        size = {"height": side, "width": side}
        processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=size)
        return processor(images=list(images), return_tensors="pt")["pixel_values"].to(self.device)

    def _hidden(self, asked: dict) -> torch.Tensor:
        """Return what `ShowOModel.forward` has before the output layer, `[n, hidden]`, by the faster layers of drawing."""
        llm = self.model.llm.model
        inputs = self.model.embedded(asked["ids"], asked["pixels"], asked["at"])
        nothing = torch.empty(len(llm.layers), 1, 1, 0, 1)
        whole = Group(slice(None), nothing, nothing, nothing, *rotary(llm, 0, inputs.shape[1]), asked["seen"][0])
        return llm.final_layernorm(run_layers(llm, inputs, [whole])[asked["rows"], asked["columns"]])

    @torch.no_grad()
    def p_yes(self, images: np.ndarray, questions: list[str], prefix: str = "") -> tuple[np.ndarray, np.ndarray]:
        require_verdicts(self.yes, self.no)

        def some(part: slice) -> tuple[np.ndarray, np.ndarray]:
            hidden = self._hidden(self._asked(images[part], questions[part], prefix))
            probabilities = self.model.llm.lm_head(hidden).double().softmax(-1)
            yes, no = probabilities[:, self.yes].sum(1), probabilities[:, self.no].sum(1)
            return (yes / (yes + no)).cpu().numpy(), (1 - yes - no).clamp(min=0).cpu().numpy()

        each = self._activation_bytes(self.places + 700 + max(map(len, questions))) + 16 * self.layout.vocabulary
        with packed_linears(self.model):
            parts = self.memory.pieces("judging", len(questions), self.memory.fit(each), some)
        yes, neither = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return yes, neither

    @torch.no_grad()
    def answer(self, images: np.ndarray, questions: list[str], max_new_tokens: int = 64) -> list[str]:
        answers = []
        for i in range(len(questions)):  # one by one, because lengths differ and this mode is rarely used
            asked = self._asked(images[i : i + 1], questions[i : i + 1])
            inputs = self.model.embedded(asked["ids"], asked["pixels"], asked["at"])
            mask = self.model.attention_mask(asked["seen"], inputs.dtype)
            cache = DynamicCache(config=self.model.llm.config)
            ids: list[int] = []
            while len(ids) < max_new_tokens:
                out = self.model.llm.model(inputs_embeds=inputs, attention_mask=mask, past_key_values=cache, use_cache=True)
                token = self.model.llm.lm_head(out.last_hidden_state[:, -1]).argmax(-1)
                if int(token) == self.layout.text_end:
                    break
                ids.append(int(token))
                inputs, mask = self.model.get_input_embeddings()(token)[:, None], None  # it sees everything before it
            answers.append(self.tokenizer.decode(ids, skip_special_tokens=True))
        return answers

    # --- training --------------------------------------------------------------------------------------------------

    def masks(self, seeds: np.ndarray) -> np.ndarray:
        """Return the masks of rows with these seeds, bool `[n, masks_per_row, places]`.

        The share of masked places is cos(pi u / 2) with u uniform, as upstream trains, and at least one place is masked.
        """
        draws = uniforms(seeds, self.masks_per_row * (1 + self.places)).reshape(len(seeds), self.masks_per_row, -1)
        count = np.maximum(1, np.round(self.places * np.cos(np.pi / 2 * draws[..., :1])))
        return draws[..., 1:].argsort(-1).argsort(-1) < count

    def masked(self, prompts: list[str], codes: np.ndarray, masks: np.ndarray) -> tuple[dict[str, torch.Tensor], list[int]]:
        """Return rows of masked pictures as arguments of `ShowOModel.forward`, and how many targets each row has.

        codes: int64 `[n, places]`. masks: bool `[n, places]`. The targets of a row are its masked codes and then the tokens of
        the picture's begin and end, which upstream trains as well.
        """
        layout = self.layout
        texts = [layout.drawing(prompt) for prompt in prompts]
        width = max(map(len, texts))
        pads = [width - len(text) for text in texts]
        labels = np.concatenate([codes + layout.offset, np.broadcast_to([layout.begin, layout.end], (len(codes), 2))], 1)
        shown = np.where(masks, layout.mask, labels[:, :-2])
        ids = [
            [layout.pad] * pad + text + [layout.begin, *picture, layout.end]
            for pad, text, picture in zip(pads, texts, shown.tolist(), strict=True)
        ]
        ends = np.ones((len(masks), 2), dtype=bool)
        rows, places = np.nonzero(np.concatenate([masks, ends], 1))
        columns = np.concatenate([np.arange(1, self.places + 1), [0, self.places + 1]])[places] + width
        tensors = {"ids": np.array(ids), "rows": rows, "columns": columns, "targets": labels[rows, places]}
        arguments = {name: torch.from_numpy(array).to(self.device) for name, array in tensors.items()}
        seen = seen_drawing(torch.tensor(pads, device=self.device), width + self.places + 2, self.places + 2)
        return arguments | {"seen": seen}, (masks.sum(1) + 2).tolist()

    def masked_losses(self, model: nn.Module, prompts: list[str], codes: np.ndarray, masks: np.ndarray) -> RowLosses:
        """Return the losses of rows under given masks; codes int64 `[n, places]`, masks bool `[n, places]`.

        sft: the mean cross-entropy, over the whole vocabulary, of the masked codes and the picture's begin and end. It is what
        upstream's training computes for a batch of this one row. preference: the sum over the masked codes alone, in nats.
        """
        arguments, counts = self.masked(prompts, codes, masks)
        rows = (-model(**arguments)).split(counts)
        return RowLosses(torch.stack([row.mean() for row in rows]), torch.stack([row[:-2].sum() for row in rows]))

    def _losses(self, model: nn.Module, prompts: list[str], pictures: Pictures, seeds: np.ndarray) -> RowLosses:
        assert pictures.tokens is not None
        each, masks = self.masks_per_row, self.masks(seeds)
        texts = [prompt for prompt in prompts for _ in range(each)]
        found = self.masked_losses(model, texts, pictures.tokens.repeat(each, 0), masks.reshape(-1, self.places))
        return RowLosses(found.sft.view(-1, each).mean(1), found.preference.view(-1, each).mean(1))

    @torch.no_grad()
    def log_likelihood(self, prompts: list[str], pictures: Pictures, seeds: np.ndarray) -> np.ndarray:
        """Return an estimate: the log-probability of the codes that a random mask hides, given the others.

        It is the mean over `masks_per_row` masks, and not the likelihood of the whole picture, of which a masked model knows
        no closed form.
        """
        tokens = pictures.tokens
        assert tokens is not None
        length = max(map(self.bucket, prompts)) + self.places + 2
        each = self.masks_per_row * (self._activation_bytes(length) + length**2 + 8 * self.places * self.layout.vocabulary)

        def some(part: slice) -> np.ndarray:
            found = self._losses(self.model, prompts[part], Pictures(tokens=tokens[part]), seeds[part])
            return -found.preference.double().cpu().numpy()

        return np.concatenate(self.memory.pieces("scoring", len(prompts), self.memory.fit(each), some))

    @torch.no_grad()
    def mean_states(self, prompts: list[str], pictures: Pictures, seeds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `Family.mean_states`. Every place of the picture counts, masked or not; `masks_per_row` masks are averaged."""
        tokens, each = pictures.tokens, self.masks_per_row
        assert tokens is not None
        lengths = torch.tensor([self.bucket(prompt) for prompt in prompts], device=self.device)
        masks, places = self.masks(seeds), self.places

        def states(texts: list[str], codes: np.ndarray, shown: np.ndarray) -> torch.Tensor:
            arguments, _ = self.masked(texts, codes, shown)
            inputs = self.model.embedded(arguments["ids"])
            seen = self.model.attention_mask(arguments["seen"], inputs.dtype)
            return self.model.llm.model(inputs_embeds=inputs, attention_mask=seen, use_cache=False).last_hidden_state.double()

        def some(part: slice) -> tuple[np.ndarray, np.ndarray]:
            texts, codes, count = prompts[part], tokens[part], lengths[part]
            read = states(texts, codes, masks[part, 0])[:, : -places - 2]
            own = torch.arange(read.shape[1], device=self.device) >= read.shape[1] - count[:, None]  # after the pads
            whole = masks[part].reshape(-1, places)
            drawn = states([""] * len(whole), codes.repeat(each, 0), whole)[:, -places - 1 : -1]
            means = ((read * own[:, :, None]).sum(1) / count[:, None], drawn.mean(1).view(len(texts), each, -1).mean(1))
            return means[0].cpu().numpy(), means[1].cpu().numpy()

        length = int(lengths.max()) + places + 2
        fit = self.memory.fit(each * (self._activation_bytes(length) + length**2))
        parts = self.memory.pieces("embedding", len(prompts), fit, some)
        read, drawn = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return read, drawn

    def _activation_bytes(self, tokens: int) -> int:
        """Return an estimate of the bytes that the forward pass of one sequence needs at its peak, in the MLP."""
        config = self.model.config.text_config
        return tokens * (4 * config.intermediate_size + 16 * config.hidden_size) * self.model.dtype.itemsize

    def training_view(self) -> TrainingView:
        groups: dict[str, tuple[str, ...]] = {"llm": ("llm.",), "projector": ("projector.",), "vision": ("vision.",)}
        return TrainingView(self.model, groups, ("projector.", "vision."), self._row_flops, losses=self._losses)

    def _row_flops(self, prompt: str) -> float:
        """Return the FLOPs of a training row's forward pass: layers, attention, and the output layer at the masked places."""
        config = self.model.config.text_config
        tokens = self.bucket(prompt) + self.places + 2
        layers = sum(parameter.numel() for parameter in self.model.llm.model.layers.parameters())
        attention = 4 * tokens * self.places * config.hidden_size * config.num_hidden_layers
        targets = 2 / np.pi * self.places + 2  # the mean of cos(pi u / 2)
        head = 2 * targets * config.hidden_size * self.layout.vocabulary
        return self.masks_per_row * (2 * tokens * layers + attention + head)

    def judge_loss(
        self, model: nn.Module, images: np.ndarray, questions: Sequence[str], p_yes: np.ndarray, prefix: str = ""
    ) -> torch.Tensor:
        require_verdicts(self.yes, self.no)
        logits = model(**self._asked(images, questions, prefix)).float()
        log_yes, log_no = logits[:, self.yes].logsumexp(1), logits[:, self.no].logsumexp(1)
        target = torch.as_tensor(p_yes, dtype=logits.dtype, device=logits.device)
        return F.binary_cross_entropy_with_logits(log_yes - log_no, target)


def masks_per_row(path: Path) -> int:
    """Return the setting of that name in training.json. Raises UserError where it is no number from 1."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["masks_per_row"]
    except (KeyError, TypeError, ValueError):
        found = None
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise UserError(f'{path}: must hold {{"masks_per_row": a number from 1}}')
    return found
