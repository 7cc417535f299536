"""What the vLLM tests share: models whose every weight matters, and one start of vLLM."""

import json
import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from helpers.paths import ROOT
from safetensors.torch import save_file

from autoregressive import GPT, generate
from autoregressive.models.config import GPTConfig
from autoregressive.serving.export import export_vllm
from autoregressive.serving.vllm_requests import class_prompt, sampling_arguments

PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
CLASSES = 12
MARKS = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        not (ROOT / ".venv-vllm" / "ready").exists(), reason="no .venv-vllm: run `make serve-test`"
    ),
]


def filled(seed: int = 0, **fields: object) -> GPT:
    """A small GPT whose every weight matters: a new one's head is zero, so that any code wins."""
    shape = {"num_layers": 2, "num_heads": 4, "dim": 128, "vocab_size": 96, "grid": (8, 8)}
    fields = {**shape, "num_classes": CLASSES, "ffn_multiple": 32, **fields}
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # the null caption is a random buffer
        gpt = GPT(GPTConfig(**fields))
    random = torch.Generator().manual_seed(seed)
    for parameter in gpt.parameters():
        noise = torch.randn(parameter.shape, generator=random)
        matrix = noise / parameter.shape[-1] ** 0.5
        parameter.data = matrix if parameter.ndim > 1 else 1 + 0.1 * noise
    for table in (gpt.tok_embeddings, getattr(gpt.cls_embedding, "embedding_table", None)):
        if table is not None:
            table.weight.data *= gpt.config.dim**0.5
    return gpt.eval()


def environment() -> dict[str, str]:
    """For a process of vLLM: this checkout's plugin, one thread, a small cache, no network."""
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "GOMP_SPINCOUNT": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "HF_HUB_OFFLINE": "1",
    }


@dataclass
class Job:
    """What one start of vLLM does, and what it answered."""

    folder: Path
    engines: list[dict] = field(default_factory=list)
    features: dict[str, torch.Tensor] = field(default_factory=dict)
    results: dict[str, dict] = field(default_factory=dict)

    def engine(self, name: str, model: Path, runs: dict[str, list[dict]], **options: object):
        options = {"dtype": "float32", **options}
        engine = {"name": name, "folder": str(model), "options": options, "runs": runs}
        self.engines.append(engine)

    def start(self) -> "Job":
        job, results = self.folder / "job.json", self.folder / "results.json"
        job.write_text(json.dumps(self.engines))
        features = self.folder / "features.safetensors"
        save_file(self.features, features)
        script = Path(__file__).with_name("vllm_process.py")
        done = subprocess.run(
            [PYTHON, script, job, results, features],
            env=environment(),
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=840,
        )
        assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
        self.results = json.loads(results.read_text())
        return self

    def codes(self, name: str) -> torch.Tensor:
        assert self.results[name]["error"] is None
        return torch.tensor(self.results[name]["codes"])


def request(gpt: GPT, label: int, codes: list[int] = (), **sampling: object) -> dict:
    known = {"num_known": len(codes)}
    arguments = sampling_arguments(gpt.config, temperature=0.0, **known, **sampling)
    return {**class_prompt(gpt.config, label, codes), "sampling": arguments}


def greedy(gpt: GPT, labels: list[int], **sampling: object) -> torch.Tensor:
    return generate(gpt, torch.tensor(labels), greedy=True, **sampling).flatten(1)


def exported(gpt: GPT, folder: Path) -> Path:
    export_vllm(gpt, folder)
    return folder
