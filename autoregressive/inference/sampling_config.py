"""How codes are sampled: guidance, temperature, filters, seed; device and precision."""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from core.distributed.config import DeviceName, Precision
from core.errors import InputError

# The usual (cfg_scale, top_k) of a model, by what it is conditioned on.
USUAL = {"class": (2.0, 0), "text": (7.5, 1000), "none": (1.0, 0)}

Rule = Literal["same_images", "same_distribution"]
Guess = Literal["first", "left", "above"]


LARGEST_SEED = 2**63 - 1


@dataclass(frozen=True)
class SamplingConfig:
    """How codes are sampled from logits.

    Args:
        cfg_scale: Classifier-free guidance, logits = null + cfg_scale * (conditional - null);
            1: none; null (or 0): the usual, 2.0 for classes, 7.5 for text.
        cfg_interval: Codes 0 .. cfg_interval + 1 are guided, later ones are not, as in the
            reference; null (or -1): all codes.
        temperature: Divides the logits.
        top_k: Keep the top_k likeliest codes (and ties); 0: all; null (or -1): the usual, all for
            classes, 1000 for text.
        top_p: Keep the likeliest codes that together reach this probability (and ties with the
            last of them); 1: all.
        greedy: Always take the likeliest code.
        seed: Sample i's codes depend only on (seed, i).
        cfg_start: First guided code (0: from the start). Together with cfg_interval it selects a
            guidance interval.
        cfg_schedule: constant; or a scale that grows from 1 at the first code to cfg_scale at the
            last, linear or along half a cosine wave.
        cfg_power: Exponent of the progress in a linear or cosine schedule; a cosine with a power
            above 1 is the power-cosine of RAR (arXiv 2411.00776).
        speculation_window: Codes verified per step; 1: no speculation. The images are the same.
            How much time it saves depends on the model; it pays only at small batches.
        speculative_rule: Which guessed codes a step accepts. same_images: those that plain sampling
            draws. same_distribution: more of them, by the rejection rule of speculative Jacobi
            decoding (arXiv 2410.01699); images then follow the same distribution, but are others,
            and depend on speculation_window and speculative_guess.
        speculative_guess: The guess at a position that no step has sampled yet: the image's first
            code, or the code to the left or above.
        guidance: Guidance strength in (0, 1], for models that take it as an input (GFT); about
            1 / cfg_scale of other models. null: 1, none, for those models.
        zipar_window: ZipAR: a row of codes begins once the row above has this many, and open rows
            are sampled side by side. Fewer steps (a grid of 32 x 32 takes 304 at 8, instead of
            1024) and other images, usually worse ones at small windows; nothing is trained. null:
            raster order.
    """

    cfg_scale: float | None = None
    cfg_interval: int | None = None
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    greedy: bool = False
    seed: int = 0
    cfg_start: int = 0
    cfg_schedule: Literal["constant", "linear", "cosine"] = "constant"
    cfg_power: float = 1.0
    speculation_window: int = 1
    guidance: float | None = None
    speculative_rule: Rule = "same_images"
    speculative_guess: Guess = "first"
    zipar_window: int | None = None

    def __post_init__(self) -> None:
        # The spelling of the reference and of configurations saved before null was accepted.
        for name, unset in (("cfg_scale", 0), ("cfg_interval", -1), ("top_k", -1)):
            if getattr(self, name) == unset:
                object.__setattr__(self, name, None)
        for name in ("cfg_scale", "temperature", "top_p", "cfg_power", "guidance"):
            if not math.isfinite(getattr(self, name) or 0):
                raise ValueError(f"{name} is {getattr(self, name)}, must be finite")
        if self.cfg_scale is not None and self.cfg_scale < 1:
            raise ValueError(f"cfg_scale is {self.cfg_scale}, must be >= 1 (1: no guidance)")
        if self.cfg_interval is not None and self.cfg_interval < 0:
            raise ValueError(
                f"cfg_interval is {self.cfg_interval}, must be >= 0 (null or -1: all codes)"
            )
        if not 0 <= self.seed <= LARGEST_SEED:
            raise ValueError(f"seed is {self.seed}, must be >= 0 and at most {LARGEST_SEED}")
        if self.cfg_start < 0 or self.cfg_power <= 0:
            raise ValueError("cfg_start must be >= 0, cfg_power > 0")
        if self.temperature < 0 or (self.top_k is not None and self.top_k < 0):
            raise ValueError("temperature and top_k must be >= 0")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}, must be in (0, 1]")
        if self.guidance is not None and not 0 < self.guidance <= 1:
            raise ValueError(f"guidance is {self.guidance}, must be in (0, 1] (1: none)")
        if self.speculation_window < 1:
            raise ValueError(
                f"speculation_window is {self.speculation_window}, must be >= 1 (1: no speculation)"
            )
        self._check_parallel_decoding()

    def _check_parallel_decoding(self) -> None:
        """Refuse what cannot be combined."""
        for name, usual in (("speculative_rule", "same_images"), ("speculative_guess", "first")):
            value = getattr(self, name)
            if value != usual and self.speculation_window == 1:
                raise ValueError(f"{name} {value} needs speculation_window > 1")
        if self.greedy and self.speculative_rule == "same_distribution":
            raise ValueError("greedy draws nothing: use speculative_rule same_images")
        if self.zipar_window is not None and self.zipar_window < 1:
            raise ValueError(f"zipar_window is {self.zipar_window}, must be >= 1 (null: off)")
        if self.zipar_window is not None and self.speculation_window > 1:
            raise ValueError("zipar_window and speculation_window > 1 cannot be combined")

    @property
    def several_codes_per_step(self) -> str:
        """The method that samples several codes of an image per step; "" for none."""
        if self.zipar_window:
            return "ZipAR"
        return "speculative decoding" if self.speculation_window > 1 else ""

    def check_order(self, parallel_regions: int | None) -> None:
        """Raise InputError for a method of raster order, for a model with parallel_regions."""
        if parallel_regions and self.several_codes_per_step:
            name = "zipar_window" if self.zipar_window else "speculation_window"
            raise InputError(
                f"{name}: this model has parallel_regions and samples {parallel_regions} codes per "
                f"step already; leave {name} out"
            )

    def resolved(self, condition: str, guidance_input: bool = False) -> "SamplingConfig":
        """A copy whose cfg_scale, top_k and guidance are set.

        condition is the model's: class, text or none. guidance_input: it takes guidance as an
        input.
        Raises InputError for guidance of an unconditional model, and for a cfg_scale where guidance
        is an input.
        """
        if condition == "none" and self.cfg_scale not in (None, 1):
            raise InputError(
                f"cfg_scale is {self.cfg_scale}, but guidance needs a condition, and this model is "
                "unconditional: leave cfg_scale out"
            )
        if guidance_input and self.cfg_scale not in (None, 1):
            raise InputError(
                f"cfg_scale is {self.cfg_scale}, but this model takes guidance as an input: leave "
                "cfg_scale out and set guidance, about 1 / cfg_scale of other models"
            )
        cfg_scale, top_k = USUAL[condition]
        guidance = self.guidance
        if guidance_input:
            cfg_scale, guidance = 1.0, 1.0 if guidance is None else guidance
        return replace(
            self,
            cfg_scale=cfg_scale if self.cfg_scale is None else self.cfg_scale,
            top_k=top_k if self.top_k is None else self.top_k,
            guidance=guidance,
        )

    def settings(self, condition: str, guidance_input: bool = False) -> dict[str, Any]:
        """The resolved values for an index.json, in the spelling that folders have had so far.

        A sample folder continues only under equal settings, so its spelling must not change.
        """
        values = asdict(self.resolved(condition, guidance_input))
        if values["guidance"] is None:
            del values["guidance"]
        if self.cfg_interval is None:
            values["cfg_interval"] = -1
        window = values.pop("speculation_window")
        rule, guess = values.pop("speculative_rule"), values.pop("speculative_guess")
        if rule != "same_images":  # else the images do not depend on them
            values |= {"speculative_rule": rule, "speculative_guess": guess}
        if values["zipar_window"] is None:
            del values["zipar_window"]
        return {**values, "speculative": window if window > 1 else 0}

    def check_grid(self, num_codes: int) -> None:
        """Raise InputError if guidance would start after an image's last code."""
        if self.cfg_start >= num_codes:
            raise InputError(
                f"cfg_start is {self.cfg_start}, but an image has {num_codes} codes, so that no "
                f"code would be guided; give at most {num_codes - 1}, or cfg_scale 1 for none"
            )

    def cfg_scales(self, num_codes: int) -> list[float]:
        """The guidance scale at each code (1: no guidance), of a resolved configuration.

        Raises InputError, see check_grid.
        """
        assert self.cfg_scale is not None
        self.check_grid(num_codes)
        last = num_codes - 1 if self.cfg_interval is None else self.cfg_interval + 1
        return [
            1 + (self.cfg_scale - 1) * self._share(position / num_codes)
            if self.cfg_start <= position <= last
            else 1.0
            for position in range(num_codes)
        ]

    def _share(self, progress: float) -> float:
        """Share of the guidance that acts after this share of the codes, both in [0, 1]."""
        if self.cfg_schedule == "constant":
            return 1.0
        progress = progress**self.cfg_power
        return progress if self.cfg_schedule == "linear" else (1 - math.cos(math.pi * progress)) / 2


DecodePrecision = Literal["fp32", "bf16", "int8", "w8a8", "fp8"]


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """Device and precision of sampling.

    Args:
        precision: fp32 or bf16 for the transformer. Quantised weights: int8 (all devices) or fp8
            (GPUs). w8a8 (CPUs) quantises activations too, which is faster for larger batches. The
            effect of quantisation on the distribution is measured and printed first.
        cache_precision: int8 or fp8 for the key-value cache, half the memory of bf16; null for
            the transformer's dtype. Measured and printed in the same way.
        tokenizer_precision: fp32 or bf16 for the VQ decoder; bf16 is faster and changes pixels by
            one or two levels of 255.
        compile: torch.compile the transformer, and on CUDA the VQ decoder. null: compile for 5,000
            generation steps or more (one step is one token of a batch) if there is a compiler.
        device: auto, cpu, cuda or mps.
    """

    precision: DecodePrecision = "bf16"
    cache_precision: Literal["int8", "fp8"] | None = None
    tokenizer_precision: Precision = "fp32"
    compile: bool | None = None
    device: DeviceName = "auto"

    def arguments(self) -> dict[str, Any]:
        """The arguments of ImagePipeline.prepare, except the device: each rank has its own."""
        return {
            "precision": self.precision,
            "cache_precision": self.cache_precision,
            "tokenizer_precision": self.tokenizer_precision,
            "compile": self.compile,
        }

    @property
    def settings(self) -> dict[str, Any]:
        """What the images depend on; keys and values of settings.json stay those of older runs."""
        cache = self.cache_precision or "model"
        return {"precision": [self.precision, cache, self.tokenizer_precision]}
