import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from core.config import InputError
from core.data.grids import image_grid
from core.data.images import (
    ImageError,
    center_crop,
    images_to_pixels,
    load_image,
    pixels_to_images,
    random_crop,
)
from core.data.npz import read_npz_images, save_npz


def make_image(height: int, width: int, mode: str = "RGB") -> Image.Image:
    random = np.random.default_rng(0)
    return Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(
        mode
    )


@pytest.mark.parametrize(
    ("height", "width"), [(300, 500), (1100, 700), (40, 31), (256, 256), (1, 1)]
)
def test_the_centre_crop_is_that_of_adm(height, width):
    side, image = 64, make_image(height, width)
    expected = image
    while min(expected.size) >= 2 * side:
        expected = expected.resize(tuple(x // 2 for x in expected.size), Image.BOX)
    scale = side / min(expected.size)
    expected = expected.resize(tuple(round(x * scale) for x in expected.size), Image.BICUBIC)
    pixels = np.asarray(expected)
    top, left = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2
    cropped = np.asarray(center_crop(image, side, side))
    assert np.array_equal(cropped, pixels[top : top + side, left : left + side])


def test_crops_of_any_shape_have_the_asked_size():
    for height, width in ((32, 96), (96, 32)):
        assert center_crop(make_image(50, 70), height, width).size == (width, height)
        random = np.random.default_rng(1)
        assert random_crop(make_image(50, 70), height, width, random).size == (width, height)


def test_a_random_crop_depends_on_its_generator_alone():
    image = make_image(80, 90)
    crops = [np.asarray(random_crop(image, 32, 32, np.random.default_rng(s))) for s in (1, 1, 2)]
    assert np.array_equal(crops[0], crops[1])
    assert not np.array_equal(crops[0], crops[2])


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK", "1", "YCbCr"])
@pytest.mark.parametrize(("height", "width"), [(9, 7), (1, 1)])
def test_every_mode_becomes_rgb(tmp_path, mode, height, width):
    image = make_image(height, width, mode)
    path = tmp_path / ("a.jpg" if mode in ("CMYK", "YCbCr") else "a.png")
    image.save(path)
    loaded = load_image(path)
    assert (loaded.mode, loaded.size) == ("RGB", (width, height))


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path):
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(1, 256)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    values = np.asarray(load_image(tmp_path / "ramp.png"))[0, :, 0]
    assert np.abs(values.astype(int) - np.arange(256)).max() <= 1


def test_a_dark_sixteen_bit_image_stays_dark(tmp_path):
    Image.fromarray(np.full((2, 2), 200, np.uint16)).save(tmp_path / "dark.png")
    assert np.asarray(load_image(tmp_path / "dark.png")).max() == 1


def test_exif_rotation_is_applied(tmp_path):
    image, exif = make_image(10, 20), Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert load_image(tmp_path / "turned.jpg").size == (10, 20)


def bomb() -> bytes:
    """A PNG of 60,000 x 60,000 pixels by its header."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(bytes(100)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IEND", b"")


def encoded(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def test_what_is_no_whole_image_is_refused_with_its_reason():
    jpeg = encoded(make_image(64, 64), "JPEG")
    for data, reason in (
        (jpeg[: len(jpeg) // 2], "damaged image"),
        (b"hello, I am text", "not an image"),
        (b"", "not an image"),
        (bomb(), "decompression bomb"),
        (bomb().replace(struct.pack(">II", 60_000, 60_000), struct.pack(">II", 12_000, 9_000)), ""),
    ):
        with pytest.raises(ImageError) as caught:
            load_image(data, "some.jpg")
        assert str(caught.value).startswith("some.jpg: ")
        if reason:
            assert caught.value.reason == reason
    with pytest.raises(ImageError, match="no such file"):
        load_image(Path("missing.png"))


def test_pixels_round_half_up_and_survive_the_way_there_and_back():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(-1, -1, -1, 3)
    images = pixels_to_images(levels)
    assert images.shape == (1, 3, 16, 16)
    assert (images.min(), images.max()) == (-1, 1)
    assert torch.equal(images_to_pixels(images), levels)
    assert images_to_pixels(torch.full((1, 3, 1, 1), 9.0)).unique().tolist() == [255]
    assert images_to_pixels(torch.zeros(1, 3, 1, 1)).unique().tolist() == [128]


def test_an_npz_is_written_as_a_stream_and_read_by_numpy(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (10, 4, 6, 3), dtype=np.uint8)
    path = tmp_path / "samples.npz"
    save_npz(path, 10, (pixels[i : i + 3] for i in range(0, 10, 3)), arr_1=np.arange(10))
    with np.load(path, allow_pickle=False) as file:
        assert np.array_equal(file["arr_0"], pixels)
        assert np.array_equal(file["arr_1"], np.arange(10))
    batches = list(read_npz_images(path, batch_size=4))
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert np.array_equal(np.concatenate(batches), pixels)
    (tmp_path / "text.npz").write_text("no")
    with pytest.raises(InputError, match="not an npz"):
        list(read_npz_images(tmp_path / "text.npz"))


def test_the_grid_holds_every_image():
    pixels = np.stack([np.full((4, 5, 3), i, np.uint8) for i in range(5)])
    grid = image_grid(pixels, columns=3, padding=1)
    assert grid.shape == (2 * 5 + 1, 3 * 6 + 1, 3)
    assert grid[6, 7, 0] == 4
    assert grid[0, 0, 0] == 255
