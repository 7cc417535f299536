"""IBQ: equal to the published quantiser and tokenizer, with closed-form gradients."""

import weakref

import numpy as np
import pytest
import torch
from helpers.fill import image, weights_of
from helpers.models import small
from helpers.quantizers import normal, relative_error
from torch.utils._python_dispatch import TorchDispatchMode

from core.files import read_json
from core.weights import load_weights
from tokenizer import VQConfig, VQModel
from tokenizer.models.released_layouts import seed_names
from tokenizer.quantizers import index_backprop
from tokenizer.quantizers.index_backprop import IndexBackpropQuantizer


def published(weight: float = 1.0) -> tuple[IndexBackpropQuantizer, torch.Tensor]:
    quantizer = IndexBackpropQuantizer(1024, 32, 0.25, weight)
    quantizer.embedding.weight.data = normal(1101, (1024, 32), 0.3)
    return quantizer, normal(1100, (2, 32, 16, 16)).requires_grad_()


@pytest.mark.parametrize("chunk", [index_backprop.CHUNK_ELEMENTS, 1024 * 100])
@pytest.mark.parametrize("loss", ["vectors", "quant", "entropy", "total"])
def test_values_and_gradients_are_the_published_ones(goldens, monkeypatch, chunk, loss):
    monkeypatch.setattr(index_backprop, "CHUNK_ELEMENTS", chunk)
    golden = np.load(goldens / "variants" / "ibq_quantizer.npz")
    quantizer, z = published()
    codes, vectors, losses = quantizer(z)
    assert (codes.numpy() == golden["codes"]).all()
    np.testing.assert_allclose(vectors.detach(), golden["quantized"], atol=1e-6)
    quant = losses["index"] + losses["commitment"] + losses["codebook"]
    np.testing.assert_allclose(quant.item(), golden["loss_quant"], rtol=1e-5)
    np.testing.assert_allclose(losses["entropy"].item(), golden["loss_entropy"], rtol=1e-5)
    {
        "vectors": (vectors * normal(1102, z.shape)).sum(),
        "quant": quant,
        "entropy": losses["entropy"],
        "total": quant + 0.05 * losses["entropy"],
    }[loss].backward()
    for found, name in ((z.grad, "dz"), (quantizer.embedding.weight.grad[::8], "dE")):
        expected = golden[f"{name}_{loss}"]
        error = relative_error(found, expected)
        assert error < 1e-4, (name, loss, error)


def test_gradients_are_those_of_the_definition():
    torch.manual_seed(0)
    # Small, for the entropy divides the scores by 0.01.
    rows = (torch.randn(12, 5, dtype=torch.float64) / 30).requires_grad_()
    book = torch.randn(20, 5, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(12, 5, dtype=torch.float64)
    codes = index_backprop.best_entries(rows, book)
    ours, entries, entropy = index_backprop._IndexBackprop.apply(rows, book, codes, True)
    found = torch.autograd.grad(
        (ours * weights).sum() + entries.square().sum() + entropy, (rows, book)
    )

    p = (rows @ book.T).softmax(-1)
    one_hot = torch.nn.functional.one_hot(codes, 20).double()
    defined = (one_hot - p.detach() + p) @ book
    log_p = (rows @ book.T / 0.01).log_softmax(-1)
    mean = log_p.exp().mean(0)
    spread = -(log_p.exp() * log_p).sum(-1).mean() + (mean * (mean + 1e-5).log()).sum()
    expected = torch.autograd.grad(
        (defined * weights).sum() + book[codes].square().sum() + spread, (rows, book)
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.slow
def test_the_tokenizer_is_the_published_one(goldens):
    golden = np.load(goldens / "variants" / "ibq_tokenizer_1024_64px.npz")
    keys = read_json(goldens / "variants" / "ibq_tokenizer_1024_keys.json")["live"]
    state = {key: weights_of(key, tuple(shape)) for key, shape in keys.items()}
    fields = {"num_res_blocks": 4, "codebook_dim": 256, "l2_normalize": False}
    vq = VQModel(VQConfig(**fields, quantizer="ibq", vocab_size=1024)).eval()
    load_weights(vq, seed_names(state), "the published file")
    with torch.no_grad():
        codes = vq.encode(image(11, 64, 2))
        decoded = vq.decode(torch.from_numpy(golden["codes"].astype(np.int64)))
    clear = golden["margin"] > 1e-3  # one position is a tie
    assert (codes.numpy() == golden["codes"])[clear].all()
    np.testing.assert_allclose(decoded, golden["recon"].astype(np.float32), atol=2e-3)


def test_a_model_with_this_quantizer_trains_and_decodes_its_codes():
    vq = small(quantizer="ibq", l2_normalize=False, entropy_weight=0.05).train()
    result = vq(torch.rand(2, 3, 16, 16))
    sum(result.losses.values()).backward()
    assert set(result.losses) == {"index", "commitment", "codebook", "entropy"}
    gradient = vq.quantize.embedding.weight.grad
    assert (gradient.abs().sum(-1) > 0).all()  # of every entry, also those that no vector chose
    images = torch.rand(1, 3, 16, 16)
    vq.eval()
    assert vq.decode(vq.encode(images)).shape == images.shape


class PeakMemory(TorchDispatchMode):
    """The most bytes of tensors that live at once, of those made within it."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage() not in self.known:
                storage = tensor.untyped_storage()
                self.known.add(storage)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.release, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def release(self, size):
        self.now -= size


def memory_of_a_step(vocab_size: int, monkeypatch) -> tuple[int, int]:
    """Peak bytes that forward and backward allocate, and the bytes of the codebook before them."""
    monkeypatch.setattr(index_backprop, "CHUNK_ELEMENTS", 1 << 20)
    quantizer = IndexBackpropQuantizer(vocab_size, 8, 0.25, 0.05)
    z = torch.randn(4, 8, 4, 4, requires_grad=True)
    with PeakMemory() as memory:
        _, vectors, losses = quantizer(z)
        (vectors.sum() + sum(losses.values())).backward()
    weight = quantizer.embedding.weight
    return memory.peak, weight.numel() * weight.element_size()


def test_the_memory_of_a_step_hardly_grows_with_the_vocabulary(monkeypatch):
    small_peak, small_book = memory_of_a_step(16_384, monkeypatch)
    large_peak, large_book = memory_of_a_step(262_144, monkeypatch)
    # The gradient is as large as the codebook.
    assert large_peak - 2 * large_book <= 1.5 * (small_peak - 2 * small_book)
    assert large_peak < 64 * 262_144 * 4  # one (rows, vocab_size) tensor alone would take as much
