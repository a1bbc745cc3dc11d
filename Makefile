# `make TORCH=...` chooses another build of torch, e.g. TORCH="torch==2.13.0 --index-url <CPU or CUDA index>".
PYTHON ?= python3
TORCH ?= torch==2.13.0
ARGS ?=
BIN := .venv/bin
INSTALLED := .venv/installed
MINIMUM := .venv-minimum

# Two workers of one thread each are faster on small tensors than one of two.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -q

.PHONY: quickstart test test-slow test-minimum lint clean

quickstart: $(INSTALLED)
	$(BIN)/python -m examples.quickstart $(ARGS)

test: $(INSTALLED) lint
	$(PYTEST)

test-slow: $(INSTALLED)
	$(PYTEST) -m slow

# The same tests with each library at the lowest version that setup.cfg allows (torch: the one of $(TORCH)).
test-minimum: $(MINIMUM)/installed
	$(subst $(BIN),$(MINIMUM)/bin,$(PYTEST))

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/mypy

# torch first: what comes after is content with it, and does not fetch another build.
$(INSTALLED): setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable ".[examples,test]"
	touch $@

$(MINIMUM)/installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(MINIMUM)
	$(MINIMUM)/bin/python -m pip install --quiet --upgrade pip
	$(MINIMUM)/bin/python -m pip install --quiet $(TORCH)
	sed -n '/^install_requires/,/^$$/ { /torch/d; s/^ *\(.*\)>=\(.*\)/\1==\2/p }' setup.cfg > $(MINIMUM)/lowest.txt
	$(MINIMUM)/bin/python -m pip install --quiet --constraint $(MINIMUM)/lowest.txt --editable ".[examples,test]"
	touch $@

clean:
	rm -rf .venv $(MINIMUM) outputs
