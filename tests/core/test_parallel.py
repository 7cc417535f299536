"""Parts of training on clusters that one process can show."""

import os
import queue
import signal
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from core.config import InputError
from core.data.image_list import find_images
from core.data.loader import TrainingImages, training_batches
from core.data.skip_log import SkipLog, Skipped
from core.distributed.hardware import peak_flops
from core.distributed.parallel import ParallelConfig, prepare
from core.training.linear_cross_entropy import linear_cross_entropy
from core.training.memory_plan import check_fits, plan_model
from core.training.optimizer import OptimizerConfig, Stepper, build_adamw
from core.training.prefetch import prefetch

CPU = torch.device("cpu")


@pytest.mark.parametrize("chunk", [7, 100, 1000])
def test_the_loss_in_chunks_is_the_whole_one_with_its_gradients(chunk):
    torch.manual_seed(0)
    hidden, weight = torch.randn(100, 16), torch.randn(50, 16)
    targets = torch.randint(50, (100,))
    results = []
    for chunked in (True, False):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if chunked:
            loss = linear_cross_entropy(h, w, targets, chunk)
        else:
            loss = F.cross_entropy(h @ w.T, targets)
        (3 * loss).backward()
        results.append((loss.detach(), h.grad, w.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(hidden, weight, targets, chunk), loss)


def test_the_loss_in_chunks_follows_autocast():
    torch.manual_seed(0)
    hidden, weight = torch.randn(64, 32).bfloat16(), torch.randn(40, 32, requires_grad=True)
    hidden.requires_grad_()
    targets = torch.randint(40, (64,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, targets, 16)
        expected = F.cross_entropy(F.linear(hidden, weight).float(), targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert (hidden.grad.dtype, weight.grad.dtype) == (torch.bfloat16, torch.float32)


def test_batches_read_ahead_are_the_same_and_errors_keep_their_place():
    def batches():
        for i in range(3):
            yield (torch.tensor([i]), torch.tensor([-i]))
        raise InputError("the fourth is damaged")

    ahead = prefetch(batches(), CPU)
    assert [int(next(ahead)[0]) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(InputError, match="the fourth is damaged"):
        next(ahead)


def crop(image: Image.Image, random: np.random.Generator) -> np.ndarray:
    return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize("kind", [KeyError, TypeError, AssertionError, MemoryError, SystemExit])
def test_any_error_of_the_data_ends_the_run_with_its_traceback(kind):
    def damaged_batches():
        yield (torch.tensor([0]),)
        raise kind("in the data")

    ahead = prefetch(damaged_batches(), CPU)
    next(ahead)
    found = queue.Queue()

    def consume() -> None:
        with pytest.raises(kind, match="in the data") as caught:
            next(ahead)
        found.put([entry.name for entry in caught.traceback])

    # In a thread, so that a consumer that waits for ever fails this test instead of stopping it.
    threading.Thread(target=consume, daemon=True).start()
    assert "damaged_batches" in found.get(timeout=10)


def test_a_consumer_that_leaves_lets_the_thread_end():
    before = set(threading.enumerate())
    ahead = prefetch(((torch.tensor([i]),) for i in range(1000)), CPU)
    next(ahead)
    (thread,) = set(threading.enumerate()) - before
    ahead.close()
    assert not thread.is_alive()


def test_a_consumer_that_leaves_waits_for_the_batch_that_is_being_made():
    # The interpreter aborts if it exits while a thread is inside a kernel of torch.
    started, finished = threading.Event(), threading.Event()

    def batches():
        yield (torch.zeros(1),)
        started.set()
        time.sleep(0.2)
        finished.set()
        yield (torch.zeros(1),)

    ahead = prefetch(batches(), CPU)
    next(ahead)
    assert started.wait(5)
    ahead.close()
    assert finished.is_set()


class Deadly:
    """A transform that kills its loader process once, and notes it in a file."""

    def __init__(self, mark) -> None:
        self.mark = mark

    def __call__(self, image: Image.Image, random: np.random.Generator) -> np.ndarray:
        if torch.utils.data.get_worker_info() and not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return crop(image, random)


def test_a_loader_process_that_dies_is_named_and_replaced_and_no_sample_is_lost(tmp_path, caplog):
    for i in range(8):
        Image.new("RGB", (4, 4), (i, 0, 0)).save(tmp_path / f"{i}.png")
    images = find_images(tmp_path)
    seen = []
    for transform, workers in ((crop, 0), (Deadly(tmp_path / "mark"), 2)):
        positions = iter(np.arange(24).reshape(6, 4))
        batches = training_batches(TrainingImages(images, transform, 0), positions, workers, False)
        seen.append([pixels[:, 0, 0, 0].tolist() for pixels, _ in batches])
    assert seen[0] == seen[1]
    assert "DataLoader worker" in caplog.text
    assert "starting another one in its place" in caplog.text


def test_a_resumed_run_lists_no_skipped_image_twice(tmp_path):
    path = tmp_path / "skipped.txt"
    SkipLog(path).add([Skipped("a.png", "damaged image"), Skipped("b.png", "not an image")])
    resumed = SkipLog(path)
    resumed.add([Skipped("a.png", "damaged image"), Skipped("c.png", "damaged image")])
    assert len(resumed) == 3
    assert resumed.summary() == "3 images skipped (2 damaged image, 1 not an image)"
    assert len(path.read_text().splitlines()) == 3


def test_more_bad_steps_in_a_row_than_allowed_stop_the_run():
    net = nn.Linear(2, 1)
    config = OptimizerConfig(on_nan="skip", max_skipped=2)
    stepper = Stepper(build_adamw(net, config), config, CPU)
    bad = [True, True, False, True, True, True]
    for step, poison in enumerate(bad):
        (net(torch.ones(2)).sum() * (float("nan") if poison else 1)).backward()
        stepper.step(step, 10)
        if step < 5:
            assert stepper.check() == sum(bad[: step + 1])
    with pytest.raises(InputError, match="3 steps in a row"):
        stepper.check()


def test_what_cannot_fit_is_refused_and_a_sharded_one_offered(world):
    class Block(nn.Linear):
        pass

    with torch.device("meta"):
        model = nn.Sequential(*[Block(20000, 20000, bias=False) for _ in range(1000)])
    plan = plan_model(model, Block, model, 1e9, 1000, 10, 50)
    assert plan.parameters == 4e11
    assert plan.steps_per_epoch == 100
    assert plan.bytes_per_process("ddp", 64, 8) == 4e11 * 20 + 1e9
    assert plan.bytes_per_process("hsdp", 64, 8) > plan.bytes_per_process("fsdp", 64, 8)
    assert plan.host_bytes("ddp", 64, 8, here=8) == 4e11 * 16  # only the first process copies
    assert plan.host_bytes("fsdp", 64, 64, here=8) == 8 * 4e11 * 16 / 64 + 4e11 * 4
    with pytest.raises(InputError, match="strategy fsdp fits on"):
        check_fits(plan, ParallelConfig(), world)


def test_the_same_batch_on_more_processes_needs_less_memory_for_activations():
    plan = plan_model(nn.Linear(8, 8), nn.Linear, None, 4e9, 100, 10, 50, processes=2)
    needed = [plan.parts("ddp", size, 1)["activations"] for size in (1, 2, 8)]
    assert needed == [8e9, 4e9, 1e9]


@pytest.mark.slow
def test_compiled_blocks_train_as_eager_ones_do(world):
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        block = nn.Sequential(nn.Linear(8, 8), nn.GELU())
        model = nn.ModuleDict({"a": block, "b": nn.Linear(8, 1)})
        prepare(model, ParallelConfig(compile=compiled), world, "fp32", nn.Sequential)
        loss = model["b"](model["a"](torch.ones(4, 8))).mean()
        loss.backward()
        results.append([loss, *(p.grad for p in model.parameters())])
    for eager, ours in zip(*results, strict=True):
        torch.testing.assert_close(eager, ours)


@pytest.mark.parametrize(
    ("field", "value"), [("shard_size", -1), ("timeout_minutes", 0), ("shard_size", 2)]
)
def test_settings_that_mean_nothing_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=field):
        ParallelConfig(**{field: value})


def test_a_cpu_has_no_known_peak():
    assert peak_flops(CPU) is None
