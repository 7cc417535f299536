"""The GPT in unpatched vLLM draws what `generate` draws; vLLM runs as a process in .venv-vllm."""

import pytest
import torch
from scipy.stats import chi2
from vllm_job import CLASSES, MARKS, Job, exported, filled, greedy, request

from autoregressive import GPT, generate
from autoregressive.inference.sampler import filter_logits
from autoregressive.models.conditioning import ConditionLike, as_condition
from autoregressive.models.config import GPTConfig
from autoregressive.serving.export import PROCESSORS
from autoregressive.serving.vllm_requests import (
    caption_prompt,
    class_prompt,
    condition_prompt,
    sampling_arguments,
)

pytestmark = MARKS
SCALES = [1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0]
LENGTHS = [1, 7, 60, 120]


def class_runs(gpt: GPT) -> dict[str, list[dict]]:
    some = [0, 3, 5, 11]
    return {
        "one scale": [request(gpt, label, cfg_scale=2.0) for label in range(CLASSES)],
        "scales": [request(gpt, i, cfg_scale=scale) for i, scale in enumerate(SCALES)],
        "usual": [request(gpt, label) for label in some],
        "cosine": [request(gpt, i, cfg_scale=4.0, cfg_schedule="cosine") for i in some],
        "mixed": [request(gpt, i, **settings) for i, settings in enumerate(MIXED)],
    }


# Settings of requests that run side by side.
MIXED = [
    {"cfg_scale": 4.0, "cfg_interval": 20},
    {"cfg_scale": 5.0, "cfg_start": 10},
    {"cfg_scale": 6.0, "cfg_start": 8, "cfg_interval": 30},
    {"cfg_scale": 7.0, "cfg_schedule": "linear", "cfg_power": 0.5},
    {"cfg_scale": 8.0, "cfg_schedule": "cosine", "cfg_power": 2.0},
    {"cfg_scale": 1.0},
    {},
]


def expected(gpt: GPT, run: str) -> torch.Tensor:
    """What `generate` draws for a run of class_runs, (requests, codes)."""
    some = [0, 3, 5, 11]
    if run == "one scale":
        return greedy(gpt, list(range(CLASSES)), cfg_scale=2.0)
    if run == "scales":
        return torch.cat([greedy(gpt, [i], cfg_scale=scale) for i, scale in enumerate(SCALES)])
    if run == "usual":
        return greedy(gpt, some, cfg_scale=2.0)
    if run == "cosine":
        return greedy(gpt, some, cfg_scale=4.0, cfg_schedule="cosine")
    settings = [{"cfg_scale": 2.0, **one} for one in MIXED]
    return torch.cat([greedy(gpt, [i], **one) for i, one in enumerate(settings)])


DRAWS = 20_000
FILTERS = {"temperature": 0.8, "top_k": 9, "top_p": 0.85}
DRAW_SCALE = 1.7


def draws_model() -> GPT:
    return filled(seed=7, vocab_size=12, grid=(1, 2), num_classes=2)


def text_models() -> dict[str, GPT]:
    shape = {"condition": "text", "max_text_tokens": 120}
    return {
        "text wide": filled(seed=3, text_dim=160, **shape),
        "text narrow": filled(seed=4, text_dim=48, rope_condition="identity", **shape),
    }


def captions(gpt: GPT) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(5)
    features = torch.randn(len(LENGTHS), 120, gpt.config.text_dim, generator=random)
    return features, torch.tensor(LENGTHS)


def text_run(gpt: GPT, job: Job, name: str) -> list[dict]:
    """Captions of all lengths at one scale, and one again at another, side by side."""
    requests = []
    features, lengths = captions(gpt)
    for i, scale in [(0, 3.0), (1, 3.0), (2, 3.0), (3, 3.0), (1, 7.5)]:
        key = f"{name} {i}"
        prompt = caption_prompt(gpt.config, features[i, : lengths[i]])["prompt_embeds"]
        job.features[key] = prompt.contiguous()
        sampling = sampling_arguments(gpt.config, temperature=0.0, cfg_scale=scale)
        requests.append({"features": key, "sampling": sampling})
    return requests


STRENGTHS = [0.2, 0.5, 0.9, 1.0, 0.3]  # of a model that takes guidance as an input


def one_stream_models() -> dict[str, GPT]:
    text = {"condition": "text", "max_text_tokens": 120, "text_dim": 48}
    return {
        "one row": filled(seed=11, guidance_input=True),
        "one row, text": filled(seed=12, guidance_input=True, **text),
    }


def one_stream_conditions(gpt: GPT) -> list[ConditionLike]:
    if gpt.config.condition == "class":
        return [torch.tensor([label]) for label in (0, 3, 5, 11, 3)]
    features, lengths = captions(gpt)
    return [(features[i : i + 1], lengths[i : i + 1]) for i in (0, 1, 2, 3, 1)]


@torch.no_grad()
def one_stream_run(gpt: GPT, job: Job, name: str) -> list[dict]:
    """One request per condition and strength, whose tokens are the prompt."""
    requests = []
    sampling = sampling_arguments(gpt.config, temperature=0.0)
    for i, (given, strength) in enumerate(zip(one_stream_conditions(gpt), STRENGTHS, strict=True)):
        condition = as_condition(given)
        lengths = gpt.cls_embedding.lengths(condition)
        length = None if lengths is None else int(lengths[0])
        tokens = gpt.prefix(condition, torch.tensor([False]), torch.tensor([strength]))[0, :length]
        prompt = condition_prompt(gpt.config, tokens)["prompt_embeds"]
        job.features[f"{name} {i}"] = prompt.contiguous()
        requests.append({"features": f"{name} {i}", "sampling": sampling})
    return requests


VARIANTS = {
    "head 100": {"num_heads": 2, "dim": 200},
    "head 20, grouped": {"num_heads": 6, "dim": 120, "num_kv_heads": 2},
    "identity": {"rope_condition": "identity", "grid": (4, 12)},
}
if "qk_norm" in GPTConfig.__dataclass_fields__:
    VARIANTS["qk_norm"] = {"qk_norm": True}


def variant(name: str) -> GPT:
    return filled(seed=9, **VARIANTS[name])


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Job:
    """One start of vLLM for every check that fits in one process."""
    folder = tmp_path_factory.mktemp("vllm")
    job, gpt = Job(folder), filled()
    model = exported(gpt, folder / "class")
    runs = class_runs(gpt)
    half = greedy(gpt, [2], cfg_scale=4.0, cfg_schedule="cosine")[0, :30].tolist()
    cosine = {"cfg_scale": 4.0, "cfg_schedule": "cosine"}
    odd = {"prompt_token_ids": [99_999], "sampling": request(gpt, 0)["sampling"]}
    wrong = {
        "bad scale": {"extra_args": {"cfg_scale": 0.5}},
        "bad schedule": {"extra_args": {"cfg_schedule": "sine"}},
        "bad key": {"extra_args": {"cfg_sclae": 2.0}},
        "prompt logprobs": {"prompt_logprobs": 1},
    }
    sampling = request(gpt, 0)["sampling"]
    refused = {k: [{**request(gpt, 0), "sampling": {**sampling, **v}}] for k, v in wrong.items()}
    known = {"known": [request(gpt, 2, half, **cosine)], "odd id": [odd], **refused}
    job.engine("class", model, {**runs, **known, "after": runs["usual"]})
    job.engine("preempted", model, runs, num_gpu_blocks_override=10, block_size=32)
    job.engine("compiled", model, runs, enforce_eager=False)

    released = filled(seed=2, num_heads=2, ffn_multiple=256)  # heads of 64: what a file tells
    torch.save({"model": released.state_dict(), "steps": 1}, folder / "released.pt")
    loaded = GPT.from_pretrained(folder / "released.pt", grid=(8, 8))
    one = {"one scale": class_runs(released)["one scale"]}
    job.engine("released", exported(loaded, folder / "from released"), one)

    for name in VARIANTS:
        one = {"scales": class_runs(variant(name))["scales"]}
        job.engine(name, exported(variant(name), folder / name.replace(" ", "_")), one)
    for name, text in text_models().items():
        runs = {"captions": text_run(text, job, name)}
        long = {"features": f"{name} 0", "sampling": {**sampling, "max_tokens": 150}}
        runs |= {"too many codes": [long], "after": runs["captions"]}
        options = {"enable_prompt_embeds": True, "max_num_batched_tokens": 256}
        job.engine(name, exported(text, folder / name.replace(" ", "_")), runs, **options)

    for name, gpt in one_stream_models().items():
        requests = one_stream_run(gpt, job, name)
        scale = {**requests[0]["sampling"], "extra_args": {"cfg_scale": 2.0}}
        runs = {"strengths": requests, "scale": [{**requests[0], "sampling": scale}]}
        options = {"enable_prompt_embeds": True, "logits_processors": [PROCESSORS[True]]}
        job.engine(name, exported(gpt, folder / name.replace(" ", "_")), runs, **options)

    tiny = draws_model()
    arguments = sampling_arguments(tiny.config, **FILTERS, cfg_scale=DRAW_SCALE)
    draws = [{**class_prompt(tiny.config, 1), "sampling": arguments}] * DRAWS
    job.engine("draws", exported(tiny, folder / "draws"), {"draws": draws}, max_num_seqs=256)
    return job.start()


@pytest.mark.parametrize("run", ["one scale", "scales", "usual", "cosine", "mixed"])
@pytest.mark.parametrize("engine", ["class", "preempted", "compiled"])
def test_greedy_codes_equal_those_of_generate(job, engine, run):
    wanted = expected(filled(), run)
    assert torch.equal(job.codes(f"{engine}/{run}"), wanted)
    assert len(wanted.unique()) > 20  # not a model of one code


def test_preemption_happened_where_it_was_forced(job):
    assert job.results["preempted"]["preemptions"] > 5
    assert job.results["class"]["preemptions"] == 0


def test_known_codes_continue_an_image_and_its_schedule(job):
    whole = greedy(filled(), [2], cfg_scale=4.0, cfg_schedule="cosine")
    assert torch.equal(job.codes("class/known"), whole[:, 30:])


def test_a_released_file_exports_to_the_same_codes(job):
    released = filled(seed=2, num_heads=2, ffn_multiple=256)
    assert torch.equal(job.codes("released/one scale"), expected(released, "one scale"))


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_of_the_architecture_gives_equal_codes(job, name):
    assert torch.equal(job.codes(f"{name}/scales"), expected(variant(name), "scales"))


@pytest.mark.parametrize("name", ["text wide", "text narrow"])
@pytest.mark.parametrize("run", ["captions", "after"])
def test_captions_of_all_lengths_in_one_batch_give_equal_codes(job, name, run):
    gpt = text_models()[name]
    features, lengths = captions(gpt)
    wanted = [
        generate(gpt, (features[i : i + 1], lengths[i : i + 1]), cfg_scale=scale, greedy=True)
        for i, scale in [(0, 3.0), (1, 3.0), (2, 3.0), (3, 3.0), (1, 7.5)]
    ]
    assert torch.equal(job.codes(f"{name}/{run}"), torch.cat(wanted).flatten(1))


@pytest.mark.parametrize("name", ["one row", "one row, text"])
def test_a_model_with_guidance_as_an_input_draws_equal_codes_with_one_row_per_image(job, name):
    gpt = one_stream_models()[name]
    wanted = [
        generate(gpt, condition, guidance=strength, greedy=True)
        for condition, strength in zip(one_stream_conditions(gpt), STRENGTHS, strict=True)
    ]
    drawn = job.codes(f"{name}/strengths")
    assert torch.equal(drawn, torch.cat(wanted).flatten(1))
    assert not torch.equal(drawn[1], drawn[4])  # the strength matters
    # The keys and values of one row: one stream's heads, not two.
    assert job.results[name]["kv_heads"] == gpt.config.kv_heads
    assert job.results["class"]["kv_heads"] == 2 * filled().config.kv_heads
    assert "this model takes guidance in its prompt" in job.results[f"{name}/scale"]["error"]


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ("bad scale", "cfg_scale is 0.5, must be >= 1 (1: no guidance)"),
        ("bad schedule", "cfg_schedule is 'sine', must be one of constant, linear, cosine"),
        ("bad key", "cfg_sclae is unknown"),
        ("prompt logprobs", "prompt_logprobs is not supported"),
    ],
)
def test_wrong_settings_are_refused_with_one_line(job, run, message):
    error = job.results[f"class/{run}"]["error"]
    assert message in error
    assert "\n" not in error


def test_a_wrong_request_never_ends_the_engine(job):
    assert torch.equal(job.codes("class/after"), expected(filled(), "usual"))
    assert job.codes("class/odd id").shape == (1, 64)
    assert job.codes("text wide/too many codes").shape == (1, 150)


def test_draws_have_the_exact_distribution(job):
    """Chi-square of 20,000 images of two codes against their exact joint probability."""
    gpt = draws_model()
    vocab = gpt.config.vocab_size
    pairs = torch.cartesian_prod(torch.arange(vocab), torch.arange(vocab))
    labels = torch.full((len(pairs),), 1)
    conditional, null = gpt(pairs, labels), gpt(pairs, torch.full_like(labels, 2))
    logits = (null + DRAW_SCALE * (conditional - null)) / FILTERS["temperature"]
    kept = filter_logits(logits.flatten(0, 1), FILTERS["top_k"], FILTERS["top_p"])
    exact = kept.double().softmax(-1).unflatten(0, (-1, 2))
    exact = exact.gather(2, pairs[..., None])[..., 0].prod(dim=1)
    assert exact.sum().item() == pytest.approx(1, abs=1e-6)
    assert (exact > 0).sum() < len(pairs) // 2  # the filters matter

    drawn = job.codes("draws/draws")
    counts = torch.bincount(drawn[:, 0] * vocab + drawn[:, 1], minlength=len(pairs)).double()
    assert drawn.shape == (DRAWS, 2)
    assert counts[exact == 0].sum() == 0
    frequent = exact * DRAWS >= 5
    observed = torch.cat([counts[frequent], counts[~frequent].sum()[None]])
    wanted = torch.cat([exact[frequent], exact[~frequent].sum()[None]]) * DRAWS
    used = wanted > 0
    statistic = ((observed - wanted)[used] ** 2 / wanted[used]).sum().item()
    assert statistic < chi2.ppf(0.999, int(used.sum()) - 1)
