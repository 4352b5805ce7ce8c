# Two commands do all: `make demo` and `make test`. Variables:
#   PYTHON       the interpreter that .venv is made with (3.11 or newer)
#   TORCH_INDEX  where CPU wheels of torch are, asked only where pip's own indexes have none
#   PIP_ARGS     further options for pip install
#   JOBS         test processes
#   ARGS         options for the program behind `make demo` and `make bench`, or for pytest
PYTHON      ?= python3
VENV        ?= .venv
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
PIP_ARGS    ?=
JOBS        ?= 2
ARGS        ?=

PY      := $(VENV)/bin/python
CLEAN   := .venv-wheel
INSTALL := -m pip install --quiet --disable-pip-version-check --constraint constraints.txt $(PIP_ARGS)
# The CPU build first, so that nothing behind it asks for torch again; the default index has only the CUDA one.
TORCH    = $(1) $(INSTALL) torch 2> /dev/null || $(1) $(INSTALL) --extra-index-url $(TORCH_INDEX) torch
PYTEST  := QFX_CHECK=1 $(PY) -m pytest -n $(JOBS) --dist loadgroup

.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help demo test lint types unit wheel bench nightly clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.demo ## quantize a small ResNet trained on digits, print the table, accuracy, size and latency
	$(PY) -m qfx.tools.demo $(ARGS)

test: lint types unit wheel ## lint, types, tests, then the wheel in a clean environment

lint: $(VENV)/.test ## ruff
	$(PY) -m ruff check

types: $(VENV)/.test ## mypy --strict
	$(PY) -m mypy

unit: $(VENV)/.test ## the fast tests
	$(PYTEST) $(ARGS)

# Through the source distribution, so that both are known to be complete; then only what the wheel itself asks for, and
# pytest and hypothesis, which tests/conftest.py needs. PYTHONSAFEPATH keeps the checkout off sys.path.
wheel: $(VENV)/.test ## build the wheel, install it in a clean environment, run the packaging tests there
	rm -rf dist $(CLEAN)
	$(PY) -m build --no-isolation --outdir dist . > /dev/null
	$(PY) -m venv $(CLEAN)
	$(call TORCH,$(CLEAN)/bin/python)
	$(CLEAN)/bin/python $(INSTALL) dist/*.whl pytest hypothesis
	PYTHONSAFEPATH=1 QFX_CHECK=1 QFX_WHEEL="$$(echo "$(CURDIR)"/dist/*.whl)" $(CLEAN)/bin/python -m pytest tests/packaging
	rm -rf $(CLEAN)

bench: $(VENV)/.bench ## the benchmarks
	$(PY) -m qfx.tools.bench $(ARGS)

nightly: $(VENV)/.test ## all tests, the slow ones too, and more examples for each property
	$(PYTEST) -m "slow or not slow" --hypothesis-profile=nightly $(ARGS)

clean: ## remove the environment and everything built
	rm -rf $(VENV) $(CLEAN) build dist qfx.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp an extra: the installation is editable, so only a change of what is required repeats it.
$(VENV)/.%: pyproject.toml constraints.txt | $(PY)
	@echo "installing qfx[$*] into $(VENV)"
	@$(call TORCH,$(PY))
	@$(PY) $(INSTALL) --editable '.[$*]'
	@touch $@

$(PY):
	@command -v "$(PYTHON)" > /dev/null || \
		{ echo "qfx needs Python 3.11 or newer, and there is no '$(PYTHON)' here. Name one: make ... PYTHON=/path/to/python" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "qfx needs Python 3.11 or newer, and $(PYTHON) is %d.%d. Name another: make ... PYTHON=python3.12" % sys.version_info[:2])'
	"$(PYTHON)" -m venv $(VENV)
