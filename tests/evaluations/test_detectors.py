import hashlib
import json

import numpy as np
import pytest
import torch

from core.config import InputError
from evaluations.detectors import (
    InceptionDetector,
    ProxyDetector,
    build_detector,
    build_inception,
    pool_features,
    tf1_resize,
)


def test_the_resize_equals_tensorflow_bit_for_bit(goldens):
    for case in json.loads((goldens / "adm_tf.json").read_text())["resize"]["cases"]:
        height, width = case["h"], case["w"]
        random = np.random.RandomState(height * 1000 + width)
        pixels = random.randint(0, 256, (1, height, width, 3)).astype(np.float32)
        resized = tf1_resize(torch.from_numpy(pixels).movedim(-1, 1), 299).movedim(1, -1)
        digest = hashlib.sha256(resized.contiguous().numpy().tobytes()).hexdigest()
        assert digest == case["sha256_f32"], (height, width)


def recipe_weights(network: torch.nn.Module) -> None:
    """The golden file's weights, from key names and shapes alone."""
    for key, value in sorted(network.state_dict().items()):
        if key.endswith("num_batches_tracked"):
            continue
        folded = 0
        for byte in key.encode():
            folded = (folded * 131 + byte) % 2**32
        random, shape = np.random.RandomState(folded), tuple(value.shape)
        normal = random.standard_normal if not key.endswith("running_var") else random.random_sample
        drawn = normal(shape)
        if key.endswith("conv.weight"):
            drawn = drawn * np.sqrt(2 / np.prod(shape[1:]))
        elif key.endswith("bn.weight"):
            drawn = 1 + 0.1 * drawn
        elif key.endswith("running_var"):
            drawn = 0.5 + drawn
        else:
            drawn = (0.02 if key.startswith("fc") else 0.1) * drawn
        value.copy_(torch.from_numpy(drawn.astype(np.float32)))


@pytest.mark.slow
def test_inception_features_equal_the_original(goldens):
    network = build_inception().eval()
    with torch.no_grad():
        recipe_weights(network)
    for case in json.loads((goldens / "inception.json").read_text())["cases"]:
        size = case["size"]
        random = np.random.RandomState(100 + size)
        pixels = torch.from_numpy(random.randint(0, 256, (2, 3, size, size)).astype(np.uint8))
        with torch.no_grad():
            x = (tf1_resize(pixels.float(), 299) - 128) / 128
            pooled = pool_features(network, x)
            logits = pooled @ network.fc.weight.T
        expected = torch.tensor(case["pool_first6"])
        torch.testing.assert_close(pooled[0, :6], expected, rtol=1e-5, atol=1e-6)
        assert pooled.double().sum().item() == pytest.approx(case["pool_sum"], rel=1e-5)
        expected = torch.tensor(case["logits_unbiased_first6"])
        torch.testing.assert_close(logits[0, :6], expected, rtol=1e-5, atol=1e-5)


def test_missing_inception_weights_name_the_file_and_the_flag(tmp_path):
    with pytest.raises(InputError, match=r"--inception_weights.*--detector proxy"):
        InceptionDetector(tmp_path / "nowhere.pth", torch.device("cpu"))


def test_the_proxy_is_seeded_and_never_called_fid():
    pixels = torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8)
    first, second = (build_detector("proxy", None, torch.device("cpu")) for _ in range(2))
    assert isinstance(first, ProxyDetector)
    assert first.metric == "proxy_fd"
    features = first(pixels)
    assert features.logits is None
    assert features.pooled.shape == (4, first.dim)
    assert torch.equal(features.pooled, second(pixels).pooled)
