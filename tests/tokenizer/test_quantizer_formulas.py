"""Quantizers at many settings against their definitions, and against an independent library.

The recorded outputs of the published code are of one setting each; here sizes, weights, odd batches
and grids that are not square vary.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tokenizer.quantizers import index_backprop
from tokenizer.quantizers.binary_spherical import (
    BinarySphericalOptions,
    BinarySphericalQuantizer,
)
from tokenizer.quantizers.finite_scalar import FiniteScalarOptions, FiniteScalarQuantizer
from tokenizer.quantizers.index_backprop import IndexBackpropQuantizer
from tokenizer.quantizers.lookup_free import LookupFreeQuantizer
from tokenizer.quantizers.sim_vq import SimVQQuantizer
from tokenizer.quantizers.vector import rotate_to


def features(dim: int, scale: float = 1.0) -> torch.Tensor:
    """An odd batch on a grid that is not square, (3, dim, 2, 5)."""
    return scale * torch.randn(3, dim, 2, 5, generator=torch.Generator().manual_seed(dim))


def same_gradients(found: torch.Tensor, expected: torch.Tensor, *inputs: torch.Tensor) -> None:
    ours = torch.autograd.grad(found, inputs, retain_graph=True)
    theirs = torch.autograd.grad(expected, inputs, retain_graph=True)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def signs(dim: int, first_is_lowest: bool) -> torch.Tensor:
    """All patterns of signs, (2 ** dim, dim), in the order of their codes."""
    places = torch.arange(dim) if first_is_lowest else torch.arange(dim - 1, -1, -1)
    return (torch.arange(2**dim)[:, None] >> places & 1) * 2.0 - 1


@pytest.mark.parametrize("dim", [1, 2, 5, 9])
@pytest.mark.parametrize(("commitment", "weight"), [(0.25, 0.1), (1.0, 0.02)])
def test_lfq_is_its_definition(dim, commitment, weight):
    z = features(dim, 0.01).requires_grad_()
    codes, vectors, losses = LookupFreeQuantizer(2**dim, dim, commitment, weight)(z)
    rows, patterns = z.movedim(1, -1).flatten(0, -2), signs(dim, first_is_lowest=True)
    assert torch.equal(patterns[codes.flatten()], (rows > 0) * 2.0 - 1)
    p = (2 * rows @ patterns.T / 0.01).softmax(-1)
    mean = p.mean(0)
    entropy = -torch.special.xlogy(p, p).sum(-1).mean() + (mean * (mean + 1e-5).log()).sum()
    torch.testing.assert_close(losses["entropy"], weight * entropy, rtol=1e-4, atol=1e-6)
    same_gradients(losses["entropy"], weight * entropy, z)
    distance = (rows - (rows > 0) * 2.0 + 1).square().mean()
    torch.testing.assert_close(losses["commitment"], commitment * distance)
    same_gradients(vectors.square().sum(), 2 * (vectors.detach() * z).sum(), z)


@pytest.mark.parametrize(("dim", "group"), [(6, 1), (6, 3), (6, 6), (8, 2)])
@pytest.mark.parametrize("inverse_temperature", [0.5, 10.0])
def test_bsq_is_its_definition(dim, group, inverse_temperature):
    z = features(dim).requires_grad_()
    options = BinarySphericalOptions(group, inverse_temperature, 0.8, 1.2)
    codes, vectors, losses = BinarySphericalQuantizer(2**dim, dim, 0.5, 1.7, options)(z)
    u = F.normalize(z.movedim(1, -1).flatten(0, -2), dim=-1)
    chosen = signs(dim, first_is_lowest=False)[codes.flatten()] / dim**0.5
    assert torch.equal(chosen > 0, u > 0)
    torch.testing.assert_close(vectors.movedim(1, -1).flatten(0, -2), chosen)
    commitment = 0.5 * (chosen - u).square().sum(-1).mean()
    patterns, sample, whole = signs(group, first_is_lowest=False) / dim**0.5, 0, 0
    for part in u.split(group, dim=1):
        distance = (part[:, None] - patterns).square().sum(-1)
        p = (-distance * inverse_temperature).softmax(-1)
        sample = sample - (p * (p + 1e-8).log()).sum(-1).mean()
        whole = whole - (p.mean(0) * (p.mean(0) + 1e-8).log()).sum()
    entropy = 1.7 * (0.8 * sample - 1.2 * whole) / inverse_temperature
    torch.testing.assert_close(losses["commitment"], commitment)
    torch.testing.assert_close(losses["entropy"], entropy, rtol=1e-4, atol=1e-5)
    same_gradients(losses["commitment"] + losses["entropy"], commitment + entropy, z)


@pytest.mark.parametrize(("vocab_size", "dim"), [(7, 3), (300, 5)])
@pytest.mark.parametrize("chunk", [1, 20, 10**9])
def test_ibq_is_its_definition_for_any_chunk(vocab_size, dim, chunk, monkeypatch):
    monkeypatch.setattr(index_backprop, "CHUNK_ELEMENTS", chunk * vocab_size)
    quantizer, z = IndexBackpropQuantizer(vocab_size, dim, 0.4, 0.3), features(dim, 0.02)
    z.requires_grad_()
    codes, vectors, losses = quantizer(z)
    rows, book = z.movedim(1, -1).flatten(0, -2), quantizer.embedding.weight
    logits = rows @ book.T
    assert torch.equal(codes.flatten(), logits.argmax(-1))
    p = logits.softmax(-1)
    q = (F.one_hot(codes.flatten(), vocab_size) - p.detach() + p) @ book
    sharp = (logits / 0.01).softmax(-1)
    mean = sharp.mean(0)
    entropy = -torch.special.xlogy(sharp, sharp).sum(-1).mean()
    entropy = entropy + (mean * (mean + 1e-5).log()).sum()
    chosen = book[codes.flatten()]
    expected = (q - rows).square().mean() + (chosen.detach() - rows).square().mean()
    expected = expected + 0.4 * (chosen - rows.detach()).square().mean() + 0.3 * entropy
    found = sum(losses.values())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    same_gradients(found, expected, z, book)
    noise = torch.randn_like(q)
    ours = (vectors.movedim(1, -1).flatten(0, -2) * noise).sum()
    same_gradients(ours, (q * noise).sum(), z, book)


@pytest.mark.parametrize("levels", [(3, 5), (3, 3, 7, 17)])
def test_ifsq_fills_its_levels_evenly(levels):
    """A normal input lands in every level of a channel with nearly the same share."""
    options = FiniteScalarOptions(levels, "sigmoid")
    size = torch.tensor(levels).prod().item()
    quantizer = FiniteScalarQuantizer(size, len(levels), 0.0, options)
    z = torch.randn(1, len(levels), 100, 100, generator=torch.Generator().manual_seed(0))
    codes, vectors, _ = quantizer(z)
    assert torch.equal(quantizer.lookup(codes), vectors)
    bounded = 2 * torch.sigmoid(1.6 * z[0]) - 1
    for channel, count in enumerate(levels):
        expected = (bounded[channel] * (count - 1) / 2).round() / (count // 2)
        torch.testing.assert_close(vectors[0, channel], expected)
        share = expected.unique(return_counts=True)[1] / expected.numel()
        assert len(share) == count and share[1:-1].min() > 0.6 / (count - 1)


# Against vector-quantize-pytorch, where it has the same formulas.


@pytest.fixture
def library():
    """The independent implementation."""
    return pytest.importorskip("vector_quantize_pytorch")


@pytest.mark.parametrize("levels", [(8, 5, 5, 5), (4,) * 7, (3, 3), (8, 8, 8, 6, 5), (16, 9)])
def test_fsq_is_that_of_the_library(library, levels):
    size, dim = int(torch.tensor(levels).prod()), len(levels)
    quantizer = FiniteScalarQuantizer(size, dim, 0.0, FiniteScalarOptions(levels))
    z = features(dim, 2.0).requires_grad_()
    codes, vectors, _ = quantizer(z)
    theirs, indices = library.FSQ(levels=list(levels))(z)
    assert torch.equal(codes, indices.long())
    torch.testing.assert_close(vectors, theirs)
    noise = torch.randn_like(z)
    same_gradients((vectors * noise).sum(), (theirs * noise).sum(), z)


@pytest.mark.parametrize("dim", [3, 8])
def test_lfq_is_that_of_the_library_with_reversed_bits(library, dim):
    z = features(dim, 0.02).requires_grad_()
    codes, vectors, losses = LookupFreeQuantizer(2**dim, dim, 0.25, 0.1)(z)
    theirs = library.LFQ(dim=dim, codebook_size=2**dim, entropy_loss_weight=0.1).train()
    (quantized, indices, _), parts = theirs(z, inv_temperature=100.0, return_loss_breakdown=True)
    torch.testing.assert_close(vectors, quantized)
    flipped = sum((indices.long() >> i & 1) << (dim - 1 - i) for i in range(dim))
    assert torch.equal(codes, flipped)
    # They clamp the logarithm where the published code adds a constant.
    entropy = parts.per_sample_entropy - parts.batch_entropy
    torch.testing.assert_close(losses["entropy"], 0.1 * entropy, rtol=1e-3, atol=1e-4)


def test_simvq_is_that_of_the_library_with_a_bias(library):
    quantizer, z = SimVQQuantizer(60, 6, 0.25, 0.0), features(6).requires_grad_()
    theirs = library.SimVQ(
        dim=6,
        codebook_size=60,
        codebook_transform=nn.Linear(6, 6),
        rotation_trick=False,
        input_to_quantize_commit_loss_weight=0.25,
        channel_first=True,
    )
    theirs.frozen_codebook.copy_(quantizer.embedding.weight)
    theirs.code_transform.load_state_dict(quantizer.embedding_proj.state_dict())
    codes, vectors, losses = quantizer(z)
    quantized, indices, loss = theirs(z)
    assert torch.equal(codes, indices)
    torch.testing.assert_close(vectors, quantized)
    torch.testing.assert_close(sum(losses.values()), loss)
    same_gradients(sum(losses.values()), loss, z)
    ours = torch.autograd.grad(sum(losses.values()), list(quantizer.embedding_proj.parameters()))
    expected = torch.autograd.grad(loss, list(theirs.code_transform.parameters()))
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_the_rotation_trick_is_that_of_the_library(library, scale):
    from vector_quantize_pytorch.vector_quantize_pytorch import rotate_to as theirs

    x = (scale * features(6).movedim(1, -1)).requires_grad_()
    q = torch.randn_like(x)
    ours, expected = rotate_to(x, q), theirs(x, q)
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)
    noise = torch.randn_like(x)
    found = torch.autograd.grad((ours * noise).sum(), x)[0]
    wanted = torch.autograd.grad((expected * noise).sum(), x)[0]
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3 / scale)


def test_the_rotation_to_the_opposite_vector_is_finite():
    x = torch.randn(4, 6)
    x[0] = 0
    x.requires_grad_()
    for target in (-x.detach(), torch.zeros(4, 6), x.detach(), torch.ones(4, 6)):
        found = rotate_to(x, target)
        assert found.isfinite().all()
        assert torch.autograd.grad(found.sum(), x)[0].isfinite().all()
