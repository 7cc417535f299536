"""The page at /: choose a class or a prompt and watch the images grow (Gradio)."""

# Gradio is an extra: pyright may not see it.
# pyright: reportMissingImports=false

import asyncio
import json
import math
import shlex
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import gradio as gr
import numpy as np
from fastapi import FastAPI

from autoregressive.inference.sampling_config import USUAL
from autoregressive.serving.http.image_engine import BLANK, EngineStoppingError
from autoregressive.serving.http.images_api import LARGEST_SEED, parse_request
from autoregressive.serving.http.service import ImageService, QueueFullError
from core.data.grids import image_grid


def mount_page(app: FastAPI, service: ImageService, address: str) -> FastAPI:
    """Mount the page at / of the application -> the same application.

    address: where clients find the images' endpoint, for the curl line.
    """
    return gr.mount_gradio_app(
        app, build_page(service, address), path="/", server_name="127.0.0.1", max_file_size=1
    )


def build_page(service: ImageService, address: str) -> gr.Blocks:
    """The page of a service."""
    gpt = service.engine.gpt
    _, usual_top_k = USUAL[gpt.condition]
    with gr.Blocks(title=service.name, analytics_enabled=False) as page:
        gr.Markdown(f"## {service.name}")
        with gr.Row():
            with gr.Column():
                prompt = _prompt_input(service)
                negative = gr.Textbox(
                    label="Negative prompt",
                    visible=gpt.condition == "text" and service.engine.negative_prompts,
                )
                guidance_field, strength = _guidance_input(service)
                top_k = gr.Slider(
                    0, gpt.vocab_size, usual_top_k, step=1, label="Top-k (0: all codes)"
                )
                temperature = gr.Slider(0, 2, 1.0, step=0.05, label="Temperature")
                seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=LARGEST_SEED)
                most = service.limits.images
                number = gr.Slider(1, most, min(4, most), step=1, label="Number of images")
                with gr.Row():
                    start = gr.Button("Generate", variant="primary", elem_id="generate")
                    stop = gr.Button("Stop")
            with gr.Column():
                grid = gr.Image(label="Images", format="png", interactive=False, elem_id="grid")
                line = gr.Textbox(label="The same request", lines=3, interactive=False)

        async def generate(*values: Any) -> AsyncGenerator[tuple[np.ndarray, str], None]:  # noqa: ANN401
            body = request_body(guidance_field, *values)
            curl = curl_line(address, body)
            async for pixels in growing_grid(service, body):
                yield pixels, curl

        inputs = [prompt, negative, strength, top_k, temperature, seed, number]
        running = start.click(generate, inputs, [grid, line], concurrency_limit=None)
        stop.click(None, cancels=[running])
    return page


def _prompt_input(service: ImageService) -> gr.Textbox | gr.Dropdown | gr.Number:
    gpt, names = service.engine.gpt, list(service.class_names)
    if gpt.condition == "text":
        return gr.Textbox(label="Prompt", lines=3)
    if names:
        return gr.Dropdown(names, value=names[0], label="Class")
    return gr.Number(0, label=f"Class (0 to {gpt.num_classes - 1})", precision=0)


def _guidance_input(service: ImageService) -> tuple[str, gr.Slider]:
    """The field of a request that sets the model's guidance, and the slider for it."""
    gpt = service.engine.gpt
    if gpt.guidance_input:
        return "guidance", gr.Slider(0.05, 1, 1, step=0.05, label="Guidance (1: no guidance)")
    usual, _ = USUAL[gpt.condition]
    label = "Guidance scale (1: no guidance)"
    return "cfg_scale", gr.Slider(1, 20, usual, step=0.1, label=label)


def request_body(
    guidance_field: str,
    prompt: str | int,
    negative: str | None,
    strength: float,
    top_k: int,
    temperature: float,
    seed: int,
    number: int,
) -> dict[str, Any]:
    """The inputs of the page as the body of a request."""
    given = {"negative_prompt": negative} if negative else {}
    sampling = {guidance_field: strength, "top_k": int(top_k), "temperature": temperature}
    return {"prompt": str(prompt), **given, **sampling, "seed": int(seed), "n": int(number)}


def curl_line(address: str, body: dict[str, Any]) -> str:
    """The shell command that asks for the same images."""
    return f"curl {address} -d {shlex.quote(json.dumps(body))}"


async def growing_grid(
    service: ImageService, body: dict[str, Any]
) -> AsyncGenerator[np.ndarray, None]:
    """The images of a request as one grid, again after each row of codes; gr.Error if refused."""
    rows = service.engine.gpt.grid[0]
    streamed = {**body, "stream": True, "partial_images": rows - 1}
    try:
        tasks = service.tasks(parse_request(json.dumps(streamed).encode()))
        pixels = np.full((len(tasks), *service.engine.image_size, 3), BLANK, np.uint8)
        columns = math.ceil(math.sqrt(len(tasks)))
        async with aclosing(service.images(tasks)) as images:
            async for image in images:
                pixels[image.index] = image.pixels
                yield image_grid(pixels, columns)
    except ValueError as error:
        raise gr.Error(str(error)) from error
    except QueueFullError as error:
        raise gr.Error("the queue is full; try again later") from error
    except EngineStoppingError as error:
        raise gr.Error("the server is being stopped") from error
    except asyncio.TimeoutError as error:
        raise gr.Error("the images took too long") from error
