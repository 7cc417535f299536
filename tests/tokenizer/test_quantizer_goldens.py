"""Every quantizer gives the published code's codes, losses and gradients (float32)."""

import numpy as np
import pytest
import torch
from helpers.quantizers import normal, relative_error

from tokenizer.quantizers import vector
from tokenizer.quantizers.binary_spherical import (
    BinarySphericalOptions,
    BinarySphericalQuantizer,
)
from tokenizer.quantizers.finite_scalar import FiniteScalarOptions, FiniteScalarQuantizer
from tokenizer.quantizers.latent import LatentQuantizer
from tokenizer.quantizers.lookup_free import LookupFreeQuantizer
from tokenizer.quantizers.sim_vq import SimVQQuantizer
from tokenizer.quantizers.vector import VectorOptions, VectorQuantizer, nearest, rotate_to


@pytest.fixture
def golden(goldens):
    """Loads a file of recorded outputs by its name."""
    return lambda name: np.load(goldens / "variants" / f"{name}.npz")


def close(found: torch.Tensor, expected: np.ndarray) -> None:
    assert relative_error(found, expected) < 1e-4


def same_codes(codes: torch.Tensor, expected: np.ndarray) -> None:
    assert codes.dtype == torch.int64
    assert (codes.numpy() == expected).all()


def gradient(value: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(value, z, retain_graph=True)[0]


def test_the_rotation_trick_is_the_published_one(golden):
    recorded = golden("rotation")
    x = normal(5600, (64, 8)).requires_grad_()
    q = 0.5 * x.detach() + 0.7 * normal(5601, (64, 8))
    found = rotate_to(x, q)
    close(found, recorded["forward"])
    close(found, q.numpy())
    close(gradient((found * normal(5602, x.shape)).sum(), x), recorded["dx"])


@pytest.mark.parametrize(
    ("prefix", "bound", "seed"), [("fsq_", "tanh", 5100), ("ifsq_", "sigmoid", 5102)]
)
def test_fsq_and_ifsq_are_the_published_ones(golden, prefix, bound, seed):
    recorded = golden("fsq")
    levels = tuple(recorded["ifsq_levels" if bound == "sigmoid" else "levels"].tolist())
    options = FiniteScalarOptions(levels, bound)
    quantizer = FiniteScalarQuantizer(int(np.prod(levels)), len(levels), 0.0, options)
    z = normal(seed, (2, len(levels), 6, 7), 1.5).requires_grad_()
    codes, vectors, losses = quantizer(z)
    same_codes(codes, recorded[f"{prefix}codes"])
    close(vectors, recorded[f"{prefix}vectors"])
    noise = normal(seed + 1, z.shape)
    close(gradient((vectors * noise).sum(), z), recorded[f"{prefix}dz"])
    assert losses == {}


def test_lfq_is_the_published_one(golden):
    recorded = golden("lfq")
    quantizer = LookupFreeQuantizer(2**10, 10, 1.0, 1.0)
    z = normal(5200, (2, 10, 8, 8), 0.3)
    z[0, :, 0, 0] = 0
    z.requires_grad_()
    codes, vectors, losses = quantizer(z)
    same_codes(codes, recorded["codes"])
    close(vectors, recorded["vectors"])
    close(losses["entropy"], recorded["loss_entropy"])
    close(losses["commitment"], recorded["commitment_mean_square"])
    close(gradient((vectors * normal(5201, z.shape)).sum(), z), recorded["dz_vectors"])
    close(gradient(losses["entropy"], z), recorded["dz_entropy"])
    close(gradient(losses["commitment"], z), recorded["dz_commitment"])


def test_the_bits_of_an_lfq_code_are_in_the_published_order(golden):
    codes = LookupFreeQuantizer(2**18, 18, 0.25, 0.0)(normal(5202, (1, 18, 5, 7))).codes
    recorded = golden("lfq")
    same_codes(codes, recorded["factor_full"])
    same_codes(codes % 64, recorded["factor_pre"])
    same_codes(codes // 64, recorded["factor_post"])


@pytest.mark.parametrize(("file", "inverse_temperature"), [("bsq", 1.0), ("bsq_t100", 100.0)])
@pytest.mark.parametrize(("form", "group_size"), [("group", 9), ("analytical", 1)])
def test_bsq_is_the_published_one(golden, file, inverse_temperature, form, group_size):
    recorded = golden(file)
    options = BinarySphericalOptions(group_size, inverse_temperature, 1.0, 0.7)
    quantizer = BinarySphericalQuantizer(2**18, 18, 0.25, 1.3, options)
    z = normal(5300, (2, 18, 6, 6)).requires_grad_()
    codes, vectors, losses = quantizer(z)
    same_codes(codes, recorded["codes"])
    close(vectors, recorded["vectors"])
    assert torch.equal(quantizer.lookup(codes), vectors.detach())
    total = losses["commitment"] + losses["entropy"]
    close(total, recorded[f"{form}_loss"])
    close(gradient(total, z), recorded[f"{form}_dz_loss"])
    close(gradient((vectors * normal(5301, z.shape)).sum(), z), recorded["dz_vectors"])


def test_simvq_is_the_published_one(golden):
    recorded = golden("simvq")
    quantizer = SimVQQuantizer(512, 16, 0.25, 0.0)
    quantizer.embedding.weight.data = normal(5401, (512, 16), 16**-0.5)
    quantizer.embedding_proj.weight.data = normal(5402, (16, 16), 16**-0.5)
    quantizer.embedding_proj.bias.data = normal(5403, (16,), 0.1)
    z = normal(5400, (2, 16, 8, 8), 0.5).requires_grad_()
    codes, vectors, losses = quantizer(z)
    same_codes(codes, recorded["codes"])
    close(vectors, recorded["vectors"])
    close(quantizer.plain_codebook()[::8], recorded["folded_codebook"])
    total = losses["codebook"] + losses["commitment"]
    close(total, recorded["loss"])
    close(gradient((vectors * normal(5404, z.shape)).sum(), z), recorded["dz_vectors"])
    close(gradient(total, z), recorded["dz_loss"])
    close(gradient(total, quantizer.embedding_proj.weight), recorded["dW"])
    close(gradient(total, quantizer.embedding_proj.bias), recorded["dbias"])


def test_the_revival_of_dead_codes_is_the_published_one(golden, monkeypatch):
    recorded = golden("cvq")

    def recorded_where_tied(rows, codebook):
        """Revived entries lie close together: within 1e-6 of the nearest, take the recorded one."""
        found, wanted = nearest(rows, codebook), torch.from_numpy(recorded[f"codes_{step}"])
        wanted = wanted.flatten().long()
        distance = (rows.double()[:, None] - codebook.double()).square().sum(-1)
        excess = distance.gather(1, wanted[:, None]) - distance.gather(1, found[:, None])
        assert excess.abs().max() < 1e-6
        assert (found != wanted).sum() <= 2
        return wanted

    monkeypatch.setattr(vector, "nearest", recorded_where_tied)
    quantizer = VectorQuantizer(96, 12, False, 0.25, 0.0, VectorOptions(dead_codes="cvq")).train()
    quantizer.embedding.weight.data = normal(5500, (96, 12), 0.3)
    for step in range(3):
        z = normal(5501 + step, (2, 12, 6, 6), 0.5).requires_grad_()
        losses = quantizer(z).losses
        found = torch.stack([losses["commitment"], losses["codebook"]])
        close(found, recorded[f"losses_{step}"])
        close(quantizer.embedding.weight, recorded[f"codebook_{step}"])
    # The three recorded frequencies are one tensor, as it was after the last step.
    close(quantizer.code_frequency, recorded["embed_prob_2"])
    found.sum().backward()
    close(quantizer.embedding.weight.grad, recorded["codebook_grad_last"])
    close(z.grad, recorded["dz_last"])


def test_encoding_revives_no_code():
    options = VectorOptions(dead_codes="cvq")
    quantizer = VectorQuantizer(8, 4, True, 0.25, 0.0, options).eval()
    before = quantizer.embedding.weight.clone()
    quantizer(torch.randn(1, 4, 2, 2))
    assert torch.equal(quantizer.embedding.weight, before)
    quantizer.train()(torch.randn(1, 4, 2, 2))
    assert not torch.equal(quantizer.embedding.weight, before)


def test_latent_quantisation_chooses_the_library_s_values():
    library = pytest.importorskip("vector_quantize_pytorch")
    theirs = library.LatentQuantize(levels=[5, 5, 5], dim=3)
    ours = LatentQuantizer(125, 3, 1.0, 0.0)
    z = normal(5700, (2, 3, 6, 6), 0.4)
    codes, vectors, losses = ours(z)
    expected, indices, _ = theirs(z)
    torch.testing.assert_close(vectors, expected)
    assert torch.equal(codes, indices.long())
    # Each of the two losses is the mean squared distance (section 3.1).
    for loss in losses.values():
        torch.testing.assert_close(loss, (z - expected).square().mean())
    torch.testing.assert_close(gradient(losses["codebook"], ours.values), _values_gradient(z, ours))


def _values_gradient(z: torch.Tensor, quantizer: LatentQuantizer) -> torch.Tensor:
    """Of the mean of (value - channel)^2 with respect to each value, summed by hand."""
    found = torch.zeros(3, 5)
    values = quantizer.values.detach()
    for channel in range(3):
        for number in z[:, channel].flatten():
            nearest_value = (values[channel] - number).abs().argmin()
            found[channel, nearest_value] += 2 * (values[channel, nearest_value] - number)
    return found / z.numel()
