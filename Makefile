# make demo     install into .venv and draw one image for each modality into outputs/demo
# make test     install the test extra into .venv and run the tests
# make style    format the code and fix what ruff can fix
# make quality  lint, formatting, types and spelling, without changing a file
# make clean    remove caches and outputs (the environment stays: delete .venv to start afresh)

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?= -n 2 -q
BIN := $(VENV)/bin
SOURCES := medisyn tests scripts

.PHONY: demo test style quality clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(BIN)/medisyn generate --demo --out outputs/demo
	@echo "The grid of all modalities is outputs/demo/grid.png"

# The tests load small models only: one thread in each worker is faster than many that compete for the cores.
test: $(VENV)/.installed-test
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

style: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

quality: $(VENV)/.installed-dev
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/typos

clean:
	rm -rf outputs build dist .pytest_cache .ruff_cache .mypy_cache
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +

# pip is the last thing that venv writes, so an environment that was cut off half-way is made again.
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "medisyn needs Python 3.10 or newer; choose one with: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

# A stamp newer than pyproject.toml means that the dependencies it names are installed.
$(VENV)/.installed: pyproject.toml | $(BIN)/pip
	$(BIN)/python -m pip install -e .
	touch $@

$(VENV)/.installed-test: pyproject.toml | $(BIN)/pip
	$(BIN)/python -m pip install -e ".[test]"
	touch $@ $(VENV)/.installed

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/pip
	$(BIN)/python -m pip install -e ".[dev]"
	touch $@ $(VENV)/.installed $(VENV)/.installed-test
