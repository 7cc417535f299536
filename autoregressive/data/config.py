"""What the transformer is trained on: codes, captions, or images encoded online."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from core.data.config import ImageTextConfig, check_image_size, check_num_workers


@dataclass(frozen=True)
class OnlineConfig:
    """Images and captions that are encoded during training, on the device of each process.

    Args:
        pairs: The images with captions. If pairs.source is given, the only other settings of `data`
            that are used are those of the caption variants.
        tokenizer: Encodes the images: a run or checkpoint folder, a released file, or a Hub id.
        t5: Encodes the captions: a T5's folder or Hub id, or wordllama.
        image_size: Height and width of the crops.
        crop_scale: Smallest share of the resized short side that a random crop keeps, in (0, 1].
        max_tokens: Longer captions are truncated.
        clean: clean, reference or none, as for language.encode.
        num_workers: Threads that read images, per rank.
    """

    pairs: ImageTextConfig = field(default_factory=ImageTextConfig)
    tokenizer: str | None = None
    t5: str = "google/flan-t5-xl"
    image_size: tuple[int, int] = (256, 256)
    crop_scale: float = 0.9
    max_tokens: int = 120
    clean: Literal["clean", "reference", "none"] = "clean"
    num_workers: int = 8

    def __post_init__(self) -> None:
        check_image_size(*self.image_size, "data.online.image_size")
        if not 0 < self.crop_scale <= 1 or self.max_tokens < 1:
            raise ValueError("data.online: crop_scale in (0, 1], max_tokens >= 1")
        check_num_workers(self.num_workers)
        if self.num_workers < 1:
            raise ValueError("data.online.num_workers must be >= 1")


@dataclass(frozen=True)
class DataConfig:
    """The training data.

    Args:
        codes: Folders of tokenizer.encode. Several must contain the same images in the same
            order, e.g. with different crops; each sample uses one of them at random.
        labels: Only for the layout of the published code, with one `{i}.npy` per image: the label
            folder of each code folder. The next two fields then give vocabulary and classes.
        vocab_size: Size of the codebook, for the layout of the published code.
        num_classes: Number of classes, for the layout of the published code.
        features: A folder of language.encode for the same images, to train on captions; null to
            train on classes.
        condition: none: train an unconditional model, whether the images have classes or not; null:
            on classes, or on captions where features are given.
        first_class: Number that the first class of the codes has in the model, for fine-tuning
            with lora: an existing class, or the base's number of classes to add new ones.
        caption: The caption variant to use.
        short_caption: The variant to use instead at short_caption_rate; null for none.
        short_caption_rate: Share of samples that use the short caption (paper: 0.3).
        online: Instead of codes and features: images and captions to encode during training.
    """

    codes: tuple[Path, ...] = ()
    labels: tuple[Path, ...] = ()
    vocab_size: int = 16384
    num_classes: int = 1000
    features: Path | None = None
    condition: Literal["none"] | None = None
    first_class: int = 0
    caption: str = "long"
    short_caption: str | None = None
    short_caption_rate: float = 0.3
    online: OnlineConfig = field(default_factory=OnlineConfig)

    def __post_init__(self) -> None:
        if bool(self.codes) == bool(self.online.pairs.source):
            raise ValueError("data: give either codes or online.pairs.source")
        if self.labels and len(self.labels) != len(self.codes):
            raise ValueError("data.labels: give one label folder per code folder")
        if self.labels and self.features:
            raise ValueError("data: give labels or features, not both")
        if self.condition and (self.features or self.online.pairs.source):
            raise ValueError("data.condition none trains on codes: leave out features and online")
        if self.first_class < 0:
            raise ValueError(f"data.first_class is {self.first_class}, must be >= 0")
        if self.first_class and (self.features or self.online.pairs.source or self.condition):
            raise ValueError("data.first_class is for a model that is conditioned on classes")
        if not 0 <= self.short_caption_rate <= 1:
            raise ValueError("data.short_caption_rate must be in [0, 1]")
