"""Trackers that get the metrics and sample grids of a run: wandb and tensorboard.

To add one, write a class with the two methods of `Tracker`, and name it in `open_tracker` and in
ReportConfig.trackers.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from core.config import config_values
from core.files import fingerprint


class Tracker(Protocol):
    """What a run reports to."""

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Send metrics after `step` steps."""
        ...

    def draw(self, step: int, pixels: np.ndarray) -> None:
        """Send the sample grid (height, width, 3) uint8 of a step."""
        ...


class Wandb:
    """Weights & Biases; WANDB_MODE=offline works. The configuration keeps its nesting."""

    def __init__(self, folder: Path, config: Any, project: str) -> None:  # noqa: ANN401 - dataclass
        import wandb

        self.image = wandb.Image
        self.run = wandb.init(
            project=project,
            name=folder.name,
            dir=folder,
            id=fingerprint(str(folder.resolve())),  # the same folder continues the same run
            resume="allow",
            config=config_values(config),
        )

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Send metrics after `step` steps."""
        self.run.log(dict(numbers), step=step)

    def draw(self, step: int, pixels: np.ndarray) -> None:
        """Send the sample grid of a step."""
        self.run.log({"samples": self.image(pixels)}, step=step)


class TensorBoard:
    """Event files in `tensorboard/` of the run's folder.

    Every field of the configuration is a hyperparameter with a dotted name, e.g. optimizer.lr.
    """

    def __init__(self, folder: Path, config: Any) -> None:  # noqa: ANN401 - any config dataclass
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        self.writer = SummaryWriter(str(folder / "tensorboard"))
        # SummaryWriter.add_hparams would begin a second run in a folder of its own.
        for summary in hparams(flat_values(config_values(config)), {}):
            self.writer._get_file_writer().add_summary(summary)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Send metrics after `step` steps."""
        for key, value in numbers.items():
            self.writer.add_scalar(key, value, step)
        self.writer.flush()

    def draw(self, step: int, pixels: np.ndarray) -> None:
        """Send the sample grid of a step."""
        self.writer.add_image("samples", pixels, step, dataformats="HWC")
        self.writer.flush()


def flat_values(values: Mapping[str, Any], prefix: str = "") -> dict[str, str | float | bool]:
    """Nested settings as one level with dotted names; lists and null become text."""
    flat: dict[str, str | float | bool] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flat_values(value, f"{prefix}{key}.")
        else:
            plain = isinstance(value, str | int | float)
            flat[prefix + key] = value if plain else json.dumps(value)
    return flat


def open_tracker(name: str, folder: Path, config: Any, project: str) -> Tracker:  # noqa: ANN401
    """The tracker called wandb or tensorboard, for a run's folder."""
    return Wandb(folder, config, project) if name == "wandb" else TensorBoard(folder, config)
