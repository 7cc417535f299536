"""Opens the training data that a DataConfig names."""

from pathlib import Path

from autoregressive.data.captions import TextDataset
from autoregressive.data.codes import CodeDataset
from autoregressive.data.config import DataConfig
from autoregressive.data.online import OnlineDataset
from core.distributed.world import World

Dataset = CodeDataset | TextDataset | OnlineDataset


def open_data(config: DataConfig, world: World, out: Path) -> Dataset:
    """Open codes with classes or captions, or images encoded online (skips listed in `out`)."""
    if config.online.pairs.source:
        return OnlineDataset(config, world, out)
    return TextDataset(config) if config.features else CodeDataset(config)
