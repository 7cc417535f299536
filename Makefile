# make demo   the whole pipeline on handwritten digits, in minutes
# make demo-text   captions to pictures, in minutes (PROMPT="a small red circle in the middle")
# make test   all tests
# make check  lint, types and the quick tests
# Each makes .venv first if it is missing or older than the requirements.

PYTHON ?= python3
RUN := .venv/bin/python
WORKERS ?= 2

.PHONY: demo demo-text test check quick clean

demo: .venv/ready
	$(RUN) scripts/demo.py

demo-text: .venv/ready
	$(RUN) scripts/demo_text.py $(if $(PROMPT),--prompt "$(PROMPT)")

test: .venv/ready
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(WORKERS)

quick: .venv/ready
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(WORKERS) -m "not slow"

check: .venv/ready
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m pyright
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(WORKERS) -m "not slow"

.venv/ready: requirements.txt requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| (echo "$(PYTHON) is older than 3.10; give a newer one: make PYTHON=python3.12 ..." && exit 1)
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install -qq --disable-pip-version-check -r requirements.txt -r requirements-dev.txt
	touch $@

clean:
	rm -rf runs/demo runs/demo_text .pytest_cache .ruff_cache
