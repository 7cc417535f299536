"""The body of POST /v1/images/generations, and the answers, in the shape of OpenAI's API.

Fields of OpenAI: prompt, model, n, size, response_format, output_format, stream, partial_images,
user. Fields of ours: class_index, seed, cfg_scale, cfg_schedule, guidance, temperature, top_k,
top_p, negative_prompt.
"""

import base64
import io
from typing import Any, Literal

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

LARGEST_SEED = 2**63 - 1


class ImagesRequest(BaseModel):
    """What a client may ask for; any other field, type or value is refused."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    prompt: str | None = Field(None, max_length=4000)
    class_index: int | None = Field(None, ge=0)
    negative_prompt: str | None = Field(None, max_length=4000)
    model: str | None = Field(None, max_length=200)
    n: int = Field(1, ge=1)
    size: str | None = Field(None, max_length=20)
    seed: int | None = Field(None, ge=0, le=LARGEST_SEED)
    cfg_scale: float | None = Field(None, ge=1, le=1000)
    cfg_schedule: Literal["constant", "linear", "cosine"] = "constant"
    guidance: float | None = Field(None, gt=0, le=1)  # of a model that takes it as an input
    temperature: float = Field(1.0, ge=0, le=100)
    top_k: int | None = Field(None, ge=0, le=2**31)
    top_p: float = Field(1.0, gt=0, le=1)
    response_format: Literal["b64_json"] = "b64_json"
    output_format: Literal["png"] = "png"
    stream: bool = False
    partial_images: int = Field(0, ge=0)
    user: str | None = Field(None, max_length=200)


def parse_request(body: bytes) -> ImagesRequest:
    """The request in a body; raises ValueError with one line that names the field."""
    try:
        return ImagesRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        raise ValueError(one_line(f"{field}: {first['msg']}" if field else first["msg"])) from None


def one_line(text: str) -> str:
    """At most 300 characters without line breaks or other unprintable characters."""
    spaced = " ".join(text.split())[:300]
    return "".join(character if character.isprintable() else "?" for character in spaced)


def error_body(message: str, kind: str) -> dict[str, Any]:
    """OpenAI's form of an error."""
    return {"error": {"message": one_line(message), "type": kind, "param": None, "code": None}}


def png_base64(pixels: np.ndarray) -> str:
    """Pixels (height, width, 3) uint8 -> a PNG file, in base64."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return base64.b64encode(buffer.getvalue()).decode()


def stream_event(kind: Literal["partial_image", "completed"], **values: Any) -> dict[str, Any]:  # noqa: ANN401
    """One server-sent event of OpenAI's image stream; `values` are its further fields."""
    return {
        "type": f"image_generation.{kind}",
        "background": "opaque",
        "output_format": "png",
        "quality": "auto",
        **values,
    }


def usage(num_codes: int, images: int) -> dict[str, Any]:
    """What was sampled, in OpenAI's fields: codes count as tokens of output."""
    return {
        "input_tokens": 0,
        "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
        "output_tokens": num_codes * images,
        "total_tokens": num_codes * images,
    }
