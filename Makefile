# Every target works on a fresh clone: it builds .venv (python >= 3.11 with the venv module is all it needs) and goes on.
#   make moe          trains configs/moe.py into runs/moe; run it again to resume. So for every file in configs/
#   make test         the tests            make lint    ruff
#   make test-next    the tests with the newest jax and flax that python3.12 gets
#   make bench        every op against its baselines, on the device at hand
#   make notebooks    runs the notebooks of experiments/ anew, from the results beside them
#   ARGS passes more words on: make moe ARGS="--config.train.steps=50"
PYTHON ?= python3
PYTHON_NEXT ?= python3.12
VENV := .venv
NEXT := .venv-next
CONFIGS := $(basename $(notdir $(wildcard configs/*.py)))

.PHONY: $(CONFIGS) test test-next lint bench notebooks clean

$(VENV)/.stamp: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "python >= 3.11 is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(NEXT)/.stamp: pyproject.toml
	$(PYTHON_NEXT) -m venv $(NEXT)
	$(NEXT)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade -e '.[dev]'
	touch $@

$(CONFIGS): %: $(VENV)/.stamp
	$(VENV)/bin/python -m efficient_lm.main --config=configs/$*.py --workdir=runs/$* $(ARGS)

test: $(VENV)/.stamp
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile --max-worker-restart 0 $(ARGS)

test-next: $(NEXT)/.stamp
	$(NEXT)/bin/python -m pytest -n 2 --dist loadfile --max-worker-restart 0 $(ARGS)

lint: $(VENV)/.stamp
	$(VENV)/bin/python -m ruff check .

bench: $(VENV)/.stamp
	$(VENV)/bin/python -m efficient_lm.bench $(ARGS)

notebooks: $(VENV)/.stamp
	$(VENV)/bin/python -m jupytext --quiet --to ipynb experiments/*/notebook.py
	$(VENV)/bin/jupyter-execute --inplace experiments/*/notebook.ipynb

clean:
	rm -rf $(VENV) $(NEXT) .pytest_cache .ruff_cache .hypothesis
