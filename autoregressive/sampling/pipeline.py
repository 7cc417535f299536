"""The GPT and the tokenizer as one text- or class-to-image pipeline.

    pipeline = ImagePipeline.from_pretrained("runs/t2i", "runs/vq16").prepare(device="auto")
    pipeline(["a red bird"], cfg_scale=7.5, seed=0).images[0].save("bird.png")

Commands, in-training samples and benchmarks use the same object, with `sample` and `decode`.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from PIL import Image
from torch.nn import functional as F
from tqdm import tqdm

from autoregressive.inference.compute import build_engine
from autoregressive.inference.engine import InferenceEngine
from autoregressive.inference.generate import generate_rows, generation_request, sample_codes
from autoregressive.inference.sampling_config import DecodePrecision, SamplingConfig
from autoregressive.models.conditioning import (
    ClassCondition,
    Condition,
    ConditionLike,
    TextCondition,
)
from autoregressive.models.gpt import GPT
from autoregressive.models.pretrained import load_gpt
from autoregressive.sampling.conditions import load_gpt_text_encoder
from autoregressive.sampling.config import ConditionConfig, PipelineConfig
from autoregressive.sampling.decode_overlap import DecodeOverlap
from core.config import InputError
from core.data.images import images_to_pixels
from core.distributed.config import DeviceName, Precision
from core.distributed.world import World, choose_device, dtype_of
from core.hub import Weights
from language.text_encoder import TextEncoder
from tokenizer.models.pretrained import LoadedTokenizer, load_tokenizer
from tokenizer.models.vq_model import VQModel


class ImagePipelineOutput(NamedTuple):
    """Images, and their codes (n, h, w) int64 on the pipeline's device."""

    images: list[Image.Image]
    codes: torch.Tensor


class ImagePipeline:
    """A GPT and the tokenizer that decodes its codes.

    gpt, vq: the two models. settings: the values that images depend on (sources, sha256 of the
    weights, grid), for settings.json. engine: the GPT prepared for sampling, after `prepare`.
    Sampling and decoding run in torch.inference_mode().
    """

    def __init__(
        self,
        gpt: GPT,
        vq: VQModel,
        settings: dict[str, Any] | None = None,
        engine: InferenceEngine | None = None,
    ) -> None:
        self.gpt, self.vq, self.settings = gpt, vq, settings or {}
        self._engine = engine
        self._text_encoders: dict[str, TextEncoder] = {}

    @classmethod
    def from_pretrained(
        cls,
        gpt: str,
        tokenizer: str,
        *,
        gpt_weights: Weights = "auto",
        tokenizer_weights: Weights = "auto",
        grid: tuple[int, int] | None = None,
        verify_weights: bool = True,
        device: torch.device | DeviceName | None = None,
        dtype: torch.dtype | None = None,
    ) -> "ImagePipeline":
        """Load both models from run folders, checkpoint folders, released files or Hub ids.

            pipeline = ImagePipeline.from_pretrained("runs/gpt", "runs/vq16", device="cuda")

        grid: rows and columns of codes, for a released file that does not tell.
        device, dtype: with either, the models are prepared at once; dtype is that of the GPT,
            torch.bfloat16 (the default) or torch.float32. See `prepare` for more.
        verify_weights: compare the files of our checkpoints with their checksums.
        Raises InputError if a model is missing or the two do not fit each other.
        """
        overrides: dict[str, Any] = {} if grid is None else {"grid": grid}
        loaded, gpt_sha256 = load_gpt(gpt, gpt_weights, verify_weights=verify_weights, **overrides)
        found = load_tokenizer(tokenizer, tokenizer_weights, verify_weights=verify_weights)
        check_compatible(loaded, found, str(tokenizer))
        settings = {
            "gpt": str(gpt),
            "gpt_sha256": gpt_sha256,
            "tokenizer": str(tokenizer),
            "tokenizer_sha256": found.sha256,
            "grid": list(loaded.config.grid),
        }
        pipeline = cls(loaded, found.vq, settings)
        if device is None and dtype is None:
            return pipeline
        precision: DecodePrecision = "fp32" if dtype == torch.float32 else "bf16"
        if dtype not in (None, torch.float32, torch.bfloat16):
            raise InputError(f"dtype is {dtype}: give torch.bfloat16 or torch.float32")
        return pipeline.prepare(precision, device=device, verbose=False)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write folder/gpt and folder/tokenizer, for from_pretrained.

        Call it before `prepare`, which rounds weights to the precision of sampling.
        """
        self.gpt.save_pretrained(Path(folder) / "gpt")
        self.vq.save_pretrained(Path(folder) / "tokenizer")

    @property
    def device(self) -> torch.device:
        """Where the models are: that of the engine, once they are prepared."""
        return self._engine.device if self._engine else self.gpt.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the GPT's weights as loaded; `prepare` chooses that of sampling."""
        return self.gpt.dtype

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the decoded images, in pixels."""
        height, width = (self.vq.config.downsample * side for side in self.gpt.config.grid)
        return height, width

    @property
    def engine(self) -> InferenceEngine:
        """The prepared GPT; `prepare` with its defaults is called if it was not called before."""
        if self._engine is None:
            self.prepare()
        assert self._engine is not None
        return self._engine

    @functools.cached_property
    def overlap(self) -> DecodeOverlap:
        """The second stream of this pipeline; one for all batches, so that memory is reused."""
        return DecodeOverlap(self.engine.device)

    @torch.no_grad()
    def prepare(
        self,
        precision: DecodePrecision = "bf16",
        cache_precision: Literal["int8", "fp8"] | None = None,
        tokenizer_precision: Precision = "fp32",
        device: torch.device | DeviceName | None = None,
        compile: bool | None = None,
        num_steps: int | None = None,
        verbose: bool = True,
    ) -> "ImagePipeline":
        """Put both models on the device, ready for sampling, and print how -> self.

        Arguments: see ComputeConfig. device: None or "auto" for the best one. num_steps: number of
        generation steps to come, which decides about compilation if `compile` is None.
        Raises InputError for a precision that the device does not support.
        """
        if not isinstance(device, torch.device):
            device = choose_device(device or "auto")
        engine = build_engine(
            self.gpt, precision, cache_precision, device, compile, num_steps, verbose
        )
        vq_dtype, compile_vq = (
            dtype_of(tokenizer_precision),
            engine.compiled and device.type == "cuda",
        )
        self.vq = self.vq.for_inference(device, vq_dtype, compile_vq)
        self._engine = engine
        self.__dict__.pop("overlap", None)
        return self

    @torch.inference_mode()
    def sample(
        self,
        condition: ConditionLike,
        sampling: SamplingConfig,
        sample_ids: torch.Tensor | None = None,
        negative: ConditionLike | None = None,
        forced_codes: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Sample one image's codes per condition -> (n, h, w) int64; see `sample_codes`."""
        return sample_codes(self.engine, condition, sampling, sample_ids, negative, forced_codes)

    @torch.inference_mode()
    def partial_grids(
        self,
        condition: ConditionLike,
        sampling: SamplingConfig,
        sample_ids: torch.Tensor | None = None,
        negative: ConditionLike | None = None,
    ) -> Iterator[torch.Tensor]:
        """Like `sample`, but yields the codes (n, rows so far, w) after each row, for previews.

        `decode` turns a partial grid into the upper part of the images.
        """
        request = generation_request(self.engine, condition, sampling, sample_ids, negative)
        yield from generate_rows(self.engine, request)

    @torch.inference_mode()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Images (n, 3, height, width) float in [-1, 1] -> codes (n, h, w) int64."""
        return self.vq.encode(images)

    @torch.inference_mode()
    def decode(self, codes: torch.Tensor, resize: int | None = None) -> torch.Tensor:
        """Codes (n, h, w) int64 -> pixels (n, height, width, 3) uint8, on the tokenizer's device.

        resize: side of the square to resize to (bicubic, no antialiasing) before rounding.
        """
        images = self.vq.decode(codes).float()
        if resize:
            images = F.interpolate(images, (resize, resize), mode="bicubic", antialias=False)
        return images_to_pixels(images)

    @torch.inference_mode()
    def __call__(
        self,
        prompts_or_classes: str | int | Sequence[str] | Sequence[int] | None,
        *,
        cfg_scale: float | None = None,
        seed: int | None = None,
        num_images_per_prompt: int = 1,
        negative_prompt: str | None = None,
        sampling: SamplingConfig | None = None,
        text_encoder: str | None = None,
        batch_size: int = 16,
        progress: bool = True,
    ) -> ImagePipelineOutput:
        """Generate images of prompts (text model) or of class numbers (class model).

            images = pipeline([207, 360], cfg_scale=4.0, seed=0).images  # PIL images

        An unconditional model takes None, and draws num_images_per_prompt images. Runs in
        torch.inference_mode().
        cfg_scale, seed: replace these two fields of `sampling`; None keeps what it says (seed 0
        by default). Image i depends on (seed, i), not on batch_size.
        text_encoder: a T5's folder or Hub id, or wordllama; loaded on the first call with prompts.
        """
        values = prompts_or_classes
        values = [values] if isinstance(values, str | int | None) else list(values)
        given = {"cfg_scale": cfg_scale, "seed": seed}
        given = {name: value for name, value in given.items() if value is not None}
        chosen = replace(sampling or SamplingConfig(), **given)
        condition, negative = self._encode(values, negative_prompt, text_encoder)
        ids = torch.arange(len(values) * num_images_per_prompt)
        codes, images = [], []
        with tqdm(total=len(ids), unit="image", disable=not progress) as bar:
            for part in ids.split(batch_size):
                rows = condition[part // num_images_per_prompt]
                away = negative and negative.repeat(len(part))
                codes.append(self.sample(rows, chosen, part, away))
                images += map(Image.fromarray, self.decode(codes[-1]).cpu().numpy())
                bar.update(len(part))
        return ImagePipelineOutput(images, torch.cat(codes))

    def _encode(
        self,
        values: Sequence[str | int | None],
        negative_prompt: str | None,
        text_encoder: str | None,
    ) -> tuple[Condition, Condition | None]:
        """The condition of each value, and the negative one (a single row) if there is one."""
        if not values:
            raise InputError("give at least one prompt or class")
        if self.gpt.config.condition == "none":
            if negative_prompt or any(value is not None for value in values):
                raise InputError("this model is unconditional: give None, and no negative_prompt")
            return ClassCondition(torch.zeros(len(values), dtype=torch.int64)), None
        if None in values:
            raise InputError("None is for unconditional models: give prompts or classes")
        if self.gpt.config.condition == "text":
            encode = self._text_encoder(text_encoder).encode
            away = TextCondition(*encode([negative_prompt])) if negative_prompt else None
            return TextCondition(*encode([str(value) for value in values])), away
        if negative_prompt:
            raise InputError("negative_prompt needs a text model; this model is class-conditional")
        try:
            return ClassCondition(torch.tensor([int(str(value)) for value in values])), None
        except ValueError as error:
            last = self.gpt.config.num_classes - 1
            raise InputError(f"a class is a number in 0 .. {last} ({error})") from error

    def _text_encoder(self, source: str | None) -> TextEncoder:
        """The text encoder, loaded once and kept."""
        usual = ConditionConfig()
        source = source or usual.text_encoder
        if source not in self._text_encoders:
            self._text_encoders[source] = load_gpt_text_encoder(
                self.gpt.config,
                source,
                self.engine.device,
                dtype_of(usual.text_encoder_precision),
                usual.clean_prompts,
            )
        return self._text_encoders[source]


def check_compatible(gpt: GPT, tokenizer: LoadedTokenizer, name: str) -> None:
    """Raise InputError if the GPT was not trained on this tokenizer's codes."""
    codes = tokenizer.vq.config.vocab_size
    if gpt.config.vocab_size != codes:
        raise InputError(
            f"{name}: its codebook has {codes} entries, but the GPT has a "
            f"vocabulary of {gpt.config.vocab_size} codes"
        )
    # Older GPTs know the tokenizer by its file, newer ones by its weights.
    expected = gpt.config.tokenizer_sha256
    if expected and not tokenizer.is_known_as(expected):
        raise InputError(
            f"{name}: its weights (sha256 {tokenizer.identity()[:12]}) differ from the tokenizer "
            f"that the GPT was trained with ({expected[:12]})"
        )


def load_pipeline(config: PipelineConfig) -> ImagePipeline:
    """Load both models; InputError if one is missing or the two do not fit each other."""
    return ImagePipeline.from_pretrained(
        config.gpt,
        config.tokenizer,
        gpt_weights=config.weights.gpt,
        tokenizer_weights=config.weights.tokenizer,
        grid=config.grid,
        verify_weights=config.verify_weights,
    )


def prepare_pipeline(
    config: PipelineConfig, pipeline: ImagePipeline, batches: int, world: World
) -> None:
    """Put the models on this process's device, to sample `batches` batches of images."""
    pipeline.prepare(
        **config.compute.arguments(),
        device=world.device,
        num_steps=batches * pipeline.gpt.config.num_codes,
        verbose=world.is_main,
    )
