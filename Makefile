# Everything that a fresh clone needs.  `make demo` runs the whole job on real data, `make check` the quick half of the
# checks, `make test` all of them.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# What the package needs, which is enough for the demo; and what developers need on top.
CORE := $(VENV)/.demo-installed
STUDIO := $(VENV)/.studio-installed
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
PYTEST := $(BIN)/python -m pytest -q -n auto --dist loadgroup --no-loadscope-reorder
# A new folder each time: nothing that was made before is overwritten.
DEMO := $(if $(DEMO),$(DEMO),runs/demo-$(shell date +%Y%m%d-%H%M%S))

# Tests start processes by the dozen: where the environment forbids to keep bytecode each would compile our modules anew.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help setup demo studio check test pytest-fast pytest-all lint types docs figures clean

help:
	@echo "make demo   set up, then train, sample, evaluate and report on scikit-learn's digits (into $(DEMO))"
	@echo "make studio set up, then the studio: from a folder of images to a certified release in the browser"
	@echo "make check  set up, then lint, types, and the tests of mathematics, privacy and contracts: three minutes"
	@echo "make test   set up, then lint, types, the documentation and all tests"
	@echo "make docs   set up, then the documentation as a site: open site/index.html"
	@echo "make setup  a virtual environment in $(VENV) with the pinned versions of constraints.txt"

setup: $(STAMP)

# Pinned versions come from constraints.txt.  torch goes first and alone: on machines that have a CPU wheel on the disk
# pip then takes that, and nothing later pulls in CUDA packages.  torch-fidelity, which our metrics are tested against, comes
# without what it depends on (torchvision of the same kind as that torch is on no disk, and another kind does not load), and
# to a place of its own: it brings a package called "tests", which would stand before ours.
$(CORE): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "dpsyngen needs Python 3.11 or newer, this is " + sys.version.split()[0])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch numpy
	$(PIP) --editable .
	touch $@

$(STAMP): $(CORE)
	$(PIP) --editable '.[dev]'
	$(PIP) --no-deps --upgrade --target $(VENV)/torch-fidelity torch-fidelity
	touch $@

# The digits have 1,437 training images, which is few for differential privacy: ε = 10 is a weak guarantee, stated as such.
# Features of photographs have nothing to say about images of 8×8 pixels, and take as long as all the rest.
demo: $(CORE)
	@echo "== private: ε = 10"
	$(BIN)/dpsyngen train --preset demo --data digits --epsilon 10 --out $(DEMO)/private
	$(BIN)/dpsyngen sample $(DEMO)/private -n 1000 --out $(DEMO)/synthetic
	$(BIN)/dpsyngen evaluate $(DEMO)/private --test digits:test -n 4000 --features pixels-pca --classifiers logreg,cnn
	$(BIN)/dpsyngen report $(DEMO)/private
	@echo "== reference without privacy: ε = ∞, same settings"
	$(BIN)/dpsyngen train --preset demo --data digits --epsilon inf --out $(DEMO)/reference
	$(BIN)/dpsyngen evaluate $(DEMO)/reference --test digits:test -n 4000 --features pixels-pca --classifiers logreg,cnn
	$(BIN)/dpsyngen report $(DEMO)/reference
	@echo "== done: open $(DEMO)/private/private/report.html and $(DEMO)/reference/private/report.html"
	@echo "== your own images, in the browser: make studio"

$(STUDIO): $(CORE)
	$(PIP) --editable '.[studio]'
	touch $@

studio: $(STUDIO)
	$(BIN)/dpsyngen studio

lint: setup
	$(BIN)/ruff check --quiet .
	$(BIN)/ruff format --check --quiet .

types: setup
	$(BIN)/mypy

# Strict: a link that leads nowhere or a docstring that cannot be read fails the build.  tests/test_docs.py builds it, too.
# Not with --quiet, which keeps mkdocs from counting its warnings.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --clean
	@echo "== done: open site/index.html"

# Those of the documentation, from the code that they show; a test says when one is out of date.
figures: setup
	$(BIN)/python -m docs.figures.make

# Types are checked beside the tests: mypy has one process, so alone it would leave a core idle.  pytest takes longer, and
# its summary line ends the output.  A process a core, each with whole files (tests/conftest.py): fixtures are made once a file.
check: lint
	$(MAKE) --no-print-directory --jobs=2 types pytest-fast

test: lint
	$(MAKE) --no-print-directory --jobs=2 types pytest-all

pytest-fast: setup
	$(PYTEST) -m "not slow"

pytest-all: setup
	$(PYTEST) --durations=25

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build site *.egg-info
