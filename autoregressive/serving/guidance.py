"""Classifier-free guidance of one request: what a client may ask for, checked.

A request carries these numbers in `SamplingParams.extra_args`, over HTTP in `vllm_xargs`, e.g.
{"cfg_scale": 4.0, "cfg_schedule": "cosine"}. They mean what they mean in SamplingConfig, which
computes the schedule here too. Imports nothing but the standard library.
"""

import math
from collections.abc import Mapping
from typing import Any

from autoregressive.inference.sampling_config import SamplingConfig

SCHEDULES = ("constant", "linear", "cosine")
_INTEGERS = ("cfg_interval", "cfg_start")
_NUMBERS = ("cfg_scale", "cfg_power")
FIELDS = ("cfg_scale", "cfg_interval", "cfg_start", "cfg_schedule", "cfg_power")


def parse_guidance(arguments: Mapping[str, Any] | None) -> SamplingConfig:
    """The settings that a request asks for; absent ones have SamplingConfig's defaults.

    Keys that do not begin with cfg_ belong to someone else and are left alone.
    Raises ValueError with one line that names the key and the value.
    """
    given = {key: value for key, value in (arguments or {}).items() if key.startswith("cfg_")}
    for key, value in given.items():
        if key not in FIELDS:
            raise ValueError(f"{key} is unknown; guidance takes {', '.join(FIELDS)}")
        _check(key, value)
    return SamplingConfig(**given)


def guidance_scales(
    arguments: Mapping[str, Any] | None, condition: str, num_codes: int
) -> list[float]:
    """The scale of guidance at each code of an image; 1 for no guidance.

    condition: "class" or "text", which decides the usual scale. Raises ValueError as above.
    """
    return parse_guidance(arguments).resolved(condition).cfg_scales(num_codes)


def _check(key: str, value: Any) -> None:  # noqa: ANN401 - whatever a client sent
    value_text = repr(value)[:40]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if key in _INTEGERS and not (is_number and isinstance(value, int)):
        raise ValueError(f"{key} is {value_text}, must be an integer")
    if key in _NUMBERS and not (is_number and math.isfinite(value)):
        raise ValueError(f"{key} is {value_text}, must be a finite number")
    if key == "cfg_schedule" and value not in SCHEDULES:
        raise ValueError(f"cfg_schedule is {value_text}, must be one of {', '.join(SCHEDULES)}")
    if key == "cfg_scale" and float(value) < 1:
        raise ValueError(f"cfg_scale is {value_text}, must be >= 1 (1: no guidance)")
