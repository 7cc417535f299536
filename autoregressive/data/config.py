"""What the transformer is trained on: codes, captions, or images encoded online."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from core.data.image_text import ImageTextConfig


@dataclass(frozen=True)
class OnlineConfig:
    """Pictures and captions that are encoded while training, on each process's device.

    Args:
        pairs: The pictures with captions; with a source, nothing else of `data` is read but the
            captions' variants.
        tokenizer: Encodes the pictures: a run or checkpoint folder, a released file, or a Hub id.
        t5: Encodes the captions: a folder or a Hub id.
        image_size: Height and width of the crops.
        crop_scale: The least share of the resized short side that a random crop keeps.
        max_tokens: Longer captions are cut.
        clean: clean, reference or none, as for language.encode.
        num_workers: Threads that read pictures, per rank.
    """

    pairs: ImageTextConfig = field(default_factory=ImageTextConfig)
    tokenizer: str = ""
    t5: str = "google/flan-t5-xl"
    image_size: tuple[int, int] = (256, 256)
    crop_scale: float = 0.9
    max_tokens: int = 120
    clean: Literal["clean", "reference", "none"] = "clean"
    num_workers: int = 8

    def __post_init__(self) -> None:
        if not 0 < self.crop_scale <= 1 or min(*self.image_size, self.max_tokens) < 1:
            raise ValueError("data.live: crop_scale in (0, 1], image_size and max_tokens >= 1")
        if self.num_workers < 1:
            raise ValueError("data.live.num_workers must be >= 1")


@dataclass(frozen=True)
class DataConfig:
    """Where the codes are.

    Args:
        codes: Folders of tokenizer.encode. Several must hold the same images in the same order,
            e.g. at two crop ranges: each sample is taken from one of them at random.
        labels: Only for the reference's layout: the label folder of each code folder, both with
            one `{i}.npy` per image. Vocabulary and classes then come from the next two fields.
        vocab_size: Entries of the codebook, for the reference's layout.
        num_classes: Classes, for the reference's layout.
        features: A folder of language.encode, of the same pictures: trains on captions.
        caption: For features: the variant of the caption to take.
        short_caption: The variant to take instead at short_caption_rate; empty for none.
        short_caption_rate: Share of the samples with the short caption (paper: 0.3).
        live: Instead of codes and features: pictures and captions encoded while training.
    """

    codes: tuple[Path, ...] = ()
    labels: tuple[Path, ...] = ()
    vocab_size: int = 16384
    num_classes: int = 1000
    features: Path | None = None
    caption: str = "long"
    short_caption: str = ""
    short_caption_rate: float = 0.3
    live: OnlineConfig = field(default_factory=OnlineConfig)

    def __post_init__(self) -> None:
        if bool(self.codes) == bool(self.live.pairs.source):
            raise ValueError("data: give codes, or live.pairs.source; one of them")
        if self.labels and len(self.labels) != len(self.codes):
            raise ValueError("data.labels: give one label folder per code folder")
        if self.labels and self.features:
            raise ValueError("data: give labels or features, not both")
        if not 0 <= self.short_caption_rate <= 1:
            raise ValueError("data.short_caption_rate must be in [0, 1]")
