import argparse
import json

import name_retrieval
import numpy as np
import pytest
import torch
from helpers.models import tiny, write_models
from PIL import Image

from core.config import InputError
from evaluations.features.extractors import ProxyExtractor
from evaluations.metrics.retrieval import retrieval_ranks, top_k_shares


@pytest.fixture
def gallery() -> torch.Tensor:
    return torch.randn(150, 16, generator=torch.Generator().manual_seed(0))


def test_copies_of_the_real_images_are_found_at_any_scale_and_order(gallery):
    wanted = torch.arange(150).flip(0)
    ranks = retrieval_ranks(gallery[wanted], wanted, gallery)
    assert ranks.tolist() == [0] * 150
    noise = torch.randn(gallery.shape, generator=torch.Generator().manual_seed(1))
    near = retrieval_ranks(gallery + 0.1 * noise, torch.arange(150), gallery)
    assert top_k_shares(near)["top1"] > 0.98


def test_unrelated_images_are_found_by_chance(gallery):
    wanted = torch.arange(3000) % 150
    unrelated = torch.randn(3000, 16, generator=torch.Generator().manual_seed(2))
    ranks = retrieval_ranks(unrelated, wanted, gallery)
    assert ranks.min() >= 0 and ranks.max() <= 99
    shares = top_k_shares(ranks)
    assert shares["top1"] == pytest.approx(0.01, abs=0.007)
    assert shares["top5"] == pytest.approx(0.05, abs=0.015)


def test_an_image_that_is_as_near_to_every_name_gets_the_last_place(gallery):
    same = gallery[:1].expand(120, -1)
    ranks = retrieval_ranks(same[:5], torch.arange(5), same)
    assert ranks.tolist() == [99] * 5


def test_the_candidates_of_an_image_do_not_depend_on_later_images(gallery):
    wanted = torch.arange(40)
    many = retrieval_ranks(gallery[:40] + 1, wanted, gallery, candidates=20, seed=3)
    few = retrieval_ranks(gallery[:7] + 1, wanted[:7], gallery, candidates=20, seed=3)
    assert torch.equal(many[:7], few)


def test_fewer_names_than_candidates_are_refused(gallery):
    with pytest.raises(AssertionError, match="fewer names"):
        retrieval_ranks(gallery[:5], torch.arange(5), gallery[:50])


def test_the_script_scores_samples_beside_reconstructions_and_real_images(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(name_retrieval, "EfficientNetExtractor", ProxyExtractor)  # quick
    monkeypatch.setattr(name_retrieval, "CANDIDATES", 3)
    monkeypatch.setattr(
        name_retrieval, "retrieval_ranks", lambda *given: retrieval_ranks(*given, candidates=3)
    )
    _, vq = write_models(tmp_path, tiny())
    pixels = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    pairs, run = tmp_path / "pairs", tmp_path / "run"
    for folder in (pairs, run):
        folder.mkdir()
    names = ["a cat", "a dog", "a hat"]
    for i, name in enumerate([*names, "a cat"]):
        Image.fromarray(pixels[i]).save(pairs / f"{i}.png")
        (pairs / f"{i}.txt").write_text(name)
    np.savez(run / "samples.npz", arr_0=pixels[[0, 0, 2, 2]])
    index = {"prompts": ["a cat", "a hat"], "images_per_prompt": 2, "rows": [4], "count": 4}
    (run / "index.json").write_text(json.dumps(index))
    given = argparse.Namespace(pairs=pairs, samples=run, tokenizer=str(vq), caption="txt")
    name_retrieval.print_scores(given)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("samples: top1 1.000, top5 1.000 of 4 images, 3 of 3 names each")
    assert [line.split(":")[0] for line in lines[1:]] == [
        "reconstructions",
        "real, moved by 2 pixels",
    ]
    index["prompts"][1] = "a bird"
    (run / "index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="no image of: a bird"):
        name_retrieval.print_scores(given)
