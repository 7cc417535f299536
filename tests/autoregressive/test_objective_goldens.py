"""Every objective gives the published code's losses and gradients (float32)."""

import numpy as np
import pytest
import torch
from helpers.fill import fill_, weights_of
from helpers.quantizers import normal, relative_error
from torch.nn import functional as F

from autoregressive import GPT, GPTConfig
from autoregressive.inference.sampling_config import SamplingConfig
from autoregressive.objectives.alignment import alignment_loss
from autoregressive.objectives.base import Batch, Objective, Projector, annealed
from autoregressive.objectives.clusters import balanced_clusters
from autoregressive.objectives.contrastive import ContrastiveOptions, contrastive_loss
from autoregressive.objectives.guidance_free import GuidanceFreeLoss, GuidanceFreeOptions
from autoregressive.objectives.next_patch import NextPatchLoss, NextPatchOptions
from autoregressive.objectives.next_token import NextTokenLoss
from autoregressive.objectives.noisy_context import (
    NoisyContextLoss,
    NoisyContextOptions,
    embedding_similarity,
)
from core.training.linear_cross_entropy import linear_cross_entropy


@pytest.fixture
def golden(goldens):
    """Loads a file of recorded outputs by its name."""
    return lambda name: np.load(goldens / "variants" / f"{name}.npz")


def close(found: torch.Tensor, expected: np.ndarray) -> None:
    assert relative_error(found, expected) < 1e-4


def integers(seed: int, high: int, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, high, shape))


def filled(grid: tuple[int, int], **more: bool) -> GPT:
    shape = {"num_layers": 2, "num_heads": 4, "dim": 256, "vocab_size": 1024, "num_classes": 10}
    gpt = GPT(GPTConfig(**shape, grid=grid, **more))
    fill_(gpt)
    return gpt.train()


def batch(recorded, codes: torch.Tensor) -> Batch:
    labels = torch.from_numpy(recorded["labels"]).long()
    dropped = torch.from_numpy(recorded["dropped"]).bool()
    return Batch(codes, labels, dropped, torch.arange(len(codes)), ())


def same_gradients(objective: Objective, names: np.ndarray, norms: np.ndarray) -> None:
    gradients = {n: p.grad for n, p in objective.gpt.named_parameters() if p.grad is not None}
    assert set(names.tolist()) == set(gradients)
    found = torch.stack([gradients[name].norm() for name in names.tolist()])
    np.testing.assert_allclose(found.numpy(), norms, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("side", [1, 2, 4])
def test_next_patch_prediction_is_the_published_one(golden, side):
    recorded, gpt = golden("npp_2layer"), filled((16, 16))
    objective: Objective = NextTokenLoss(gpt, 100)
    if side > 1:
        objective = NextPatchLoss(gpt, 100, 0, NextPatchOptions(side))
    loss = objective.training_loss(batch(recorded, integers(4100, 1024, (2, 256))))
    loss.backward()
    close(loss, recorded[f"loss_p{side}"])
    same_gradients(objective, recorded["grad_names"], recorded[f"grad_norms_p{side}"])


def test_guidance_free_training_is_the_published_one(golden):
    recorded, gpt = golden("gft_2layer"), filled((8, 8), guidance_input=True)
    objective = GuidanceFreeLoss(gpt, 100, 0, GuidanceFreeOptions())
    betas = torch.from_numpy(recorded["betas"]).float()
    loss = objective.loss(batch(recorded, integers(3100, 1024, (4, 64))), betas)
    loss.backward()
    close(loss, recorded["loss"])
    same_gradients(objective, recorded["grad_names"], recorded["grad_norms"])
    rows = gpt.cls_embedding.embedding_table.weight.grad[[0, 3, 7, 9, 10]]
    close(rows, recorded["grad_class_embedding_rows"])
    close(gpt.t_embedder.mlp[2].bias.grad, recorded["grad_t_embedder_mlp_2_bias"])


@pytest.mark.parametrize("case", ["cca_published", "cca_mild", "cca_small_lambda"])
def test_contrastive_alignment_is_the_published_one(golden, case):
    recorded, shape = golden("cca_loss"), (6, 16, 48)
    before, before_negative = normal(3201, shape, 2), normal(3202, shape, 2)
    logits = (before + normal(3203, shape, 0.3)).requires_grad_()
    shuffled = (before_negative + normal(3204, shape, 0.3)).requires_grad_()
    codes = integers(3200, 48, (6, 16))

    def likelihood(some: torch.Tensor) -> torch.Tensor:
        return -F.cross_entropy(some.transpose(1, 2), codes, reduction="none").sum(1)

    gap = likelihood(logits) - likelihood(before)
    negative_gap = likelihood(shuffled) - likelihood(before_negative)
    close(gap, recorded["gap"])
    close(negative_gap, recorded["gap_negative"])
    same = torch.from_numpy(recorded["c_indices"] == recorded["shuffled_c_indices"])
    beta, negative_weight, _ = recorded[f"{case}_settings"].tolist()
    loss = contrastive_loss(gap, negative_gap, same, ContrastiveOptions(beta, negative_weight))
    loss.backward()
    close(loss, recorded[f"{case}_loss"])
    close(logits.grad, recorded[f"{case}_dlogits"])
    close(shuffled.grad, recorded[f"{case}_dshuffled"])


def test_the_loss_of_the_embedding_heads_is_the_published_one(golden):
    recorded = golden("rear_loss")
    encode, decode = normal(7100, (3, 18, 8)), normal(7101, (3, 18, 8))
    encode.requires_grad_(), decode.requires_grad_()
    codes = integers(7103, 64, (3, 16))
    vectors = F.normalize(normal(7102, (64, 8)), dim=-1)[codes]
    replaced = torch.from_numpy(recorded["mask"]).bool()
    # The published sequence begins with two tokens: cls and class.
    loss = -embedding_similarity(encode[:, 2:], decode[:, 1:-1], vectors, replaced)
    loss.backward()
    close(loss, recorded["proj_loss"])
    close(encode.grad, recorded["dencode"])
    close(decode.grad, recorded["ddecode"])


def test_alignment_is_the_published_one(golden):
    recorded = golden("alignment")
    projector = Projector(32, 64, 24, 3)
    keys = recorded["projector_keys"].tolist()
    for key, parameter in zip(keys, projector.parameters(), strict=True):
        prefixed = key if key.startswith("projectors.") else f"projectors.{key}"
        parameter.data = weights_of(prefixed, tuple(parameter.shape))
    hidden = normal(8000, (2, 36, 32)).requires_grad_()
    loss = alignment_loss(projector(hidden), normal(8001, (2, 36, 24)))
    loss.backward()
    close(projector(hidden), recorded["gear_projected"])
    close(loss, recorded["gear_loss_none"])
    close(hidden.grad, recorded["gear_dhidden"])
    norms = np.array([p.grad.norm().item() for p in projector.parameters()])
    np.testing.assert_allclose(norms, recorded["gear_grad_norms"], rtol=1e-4)


def test_both_annealings_are_the_published_ones(golden):
    recorded = golden("rar_schedules")
    for i, step in enumerate(recorded["steps"].tolist()):
        progress = step / 250_000
        assert annealed(progress, 0.5, 0.75) == pytest.approx(recorded["rar_random_ratio"][i])
        assert annealed(progress, 0.0, 0.75) == pytest.approx(recorded["rear_noise_ratio"][i])


@pytest.mark.parametrize("name", ["rar_b", "rar_l", "rar_xl", "rar_xxl", "rear_s", "rear_bl"])
def test_the_power_cosine_schedule_is_the_published_one(golden, name):
    recorded = golden("rar_schedules")
    scale, power = recorded[f"setting_{name}"].tolist()
    schedule = SamplingConfig(scale, cfg_schedule="cosine", cfg_power=power)
    np.testing.assert_allclose(schedule.cfg_scales(256), recorded[f"cfg_{name}"], rtol=1e-5)


def test_alignment_of_the_state_that_has_read_a_code_is_the_published_one(golden):
    recorded = golden("alignment")
    student = normal(8002, (2, 36, 24)).requires_grad_()
    loss = alignment_loss(student[:, 1:], normal(8001, (2, 36, 24)))
    loss.backward()
    close(loss, recorded["mirai_i_losses"][0])
    close(student.grad, recorded["mirai_i_dstudent0"])


@pytest.mark.parametrize("ratio", [1.0, 0.5, 0.0])
def test_the_noise_of_inputs_has_the_published_statistics(golden, ratio):
    recorded = golden("rear_noise")[f"switch_{ratio}"]
    shape = {"num_layers": 1, "num_heads": 1, "dim": 8, "vocab_size": 1024, "grid": (16, 16)}
    objective = NoisyContextLoss(GPT(GPTConfig(**shape)), 100, 0, NoisyContextOptions(ratio))
    codes = integers(0, 1024, (4000, 256))
    some = Batch(codes, codes[:, 0], codes[:, 0] > 0, torch.arange(4000), ())
    replaced, inputs = objective.perturb(some)
    share = replaced.float().mean(1)
    quantiles = share.quantile(torch.tensor([0.1, 0.9])).tolist()
    changed = inputs != codes
    found = [share.mean().item(), share.std().item(), *quantiles, changed.float().mean().item()]
    np.testing.assert_allclose(found, recorded[:5], atol=0.02)  # 0.005 is one standard error
    assert not (changed & ~replaced).any()
    assert inputs.min() >= 0 and inputs.max() == recorded[6]


def test_the_loss_of_clusters_equals_its_definition():
    torch.manual_seed(0)
    hidden, head = torch.randn(7, 6, requires_grad=True), torch.randn(12, 6, requires_grad=True)
    targets, clusters = torch.randint(12, (7,)), torch.arange(12) % 3
    loss = linear_cross_entropy(hidden, head, targets, 3, clusters=clusters, cluster_weight=0.7)
    found = torch.autograd.grad(loss, (hidden, head))
    logits = hidden @ head.T
    sums = torch.stack([logits[:, clusters == c].logsumexp(1) for c in range(3)], dim=1)
    plain = F.cross_entropy(logits, targets) + 0.7 * F.cross_entropy(sums, clusters[targets])
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(found, torch.autograd.grad(plain, (hidden, head)))


def test_clusters_have_equal_sizes_and_hold_near_vectors():
    centers = torch.tensor([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0], [9.0, 9.0]])
    vectors = centers.repeat(5, 1) + 0.1 * torch.randn(20, 2)
    clusters = balanced_clusters(vectors, 4, seed=0, iterations=100)
    assert clusters.bincount().tolist() == [5] * 4
