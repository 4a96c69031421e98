# A fresh machine needs python3 (3.11 or later, with venv) and make, nothing else.
#
#   PYTHON       the interpreter that makes .venv               make boot PYTHON=python3.13
#   ARGS         more arguments for `cbit boot` or `cbit run`   make boot ARGS=--help
#   PYTEST_ARGS  more arguments for pytest                      make test PYTEST_ARGS="-k swiotlb"
#   CBIT_KERNEL  a kernel image of yours; none is fetched       make test CBIT_KERNEL=/boot/vmlinuz
#   CBIT_BUSYBOX a static busybox of yours; none is fetched     make test CBIT_BUSYBOX=/bin/busybox

PYTHON ?= python3
VENV = .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip -qq --disable-pip-version-check --no-input

.DEFAULT_GOAL = help
.NOTPARALLEL: # every target may install into the same environment

.PHONY: help
help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /make \1\t/p' Makefile | expand -t 18

.PHONY: boot
boot: $(VENV)/.run ## watch the reference kernel turn memory encryption on
	@$(BIN)/cbit boot $(ARGS)

.PHONY: run
run: $(VENV)/.dev kernel ## run a real Linux kernel until it says that SME is active
	@$(BIN)/cbit run $${CBIT_KERNEL:-build/kernel/boot/vmlinuz-*} \
		--until "Memory Encryption Features active: AMD SME" $(ARGS)

.PHONY: test
test: $(VENV)/.dev kernel ## run every test, except benchmarks and soak campaigns
	$(BIN)/pytest $(PYTEST_ARGS)

# The whole test-suite is `make test`; this one keeps to what it does not say.
.PHONY: check
check: $(VENV)/.dev types ## check format, lint, types and the rules of the house
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest $(PYTEST_ARGS) tests/test_house.py tests/test_conformance.py

# An editable install maps `cbit` to this folder in a way no checker can follow.
.PHONY: types
types: ## show type checkers this folder under its import name
	@mkdir -p build/typing && ln -sfn ../.. build/typing/cbit

.PHONY: kernel
kernel: ## bring the real Linux kernels that tests read and boot, and a busybox
	@tools/fetch-kernel

.PHONY: bench
bench: $(VENV)/.dev kernel ## measure speed; the numbers in brackets are ratios
	$(BIN)/pytest --benchmark-only --benchmark-group-by=group \
		--benchmark-columns=min,median,stddev,ops,rounds $(PYTEST_ARGS) tests/bench

.PHONY: soak
soak: $(VENV)/.dev kernel ## run the long random campaigns
	$(BIN)/pytest -m soak --hypothesis-profile=soak $(PYTEST_ARGS)

.PHONY: conformance
conformance: $(VENV)/.dev kernel ## write CONFORMANCE.md: each requirement, its tests, their result
	$(BIN)/pytest --conformance=CONFORMANCE.md $(PYTEST_ARGS) tests

.PHONY: dist
dist: $(VENV)/.dev ## build the source archive and the wheel into dist/
	$(PIP) install build
	$(BIN)/pyproject-build

.PHONY: clean
clean: ## remove everything the other targets made
	rm -rf build dist *.egg-info $(VENV) .benchmarks .hypothesis
	rm -rf .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps: an environment is made once and filled again when pyproject.toml changes.

$(VENV)/.made:
	@command -v "$(PYTHON)" >/dev/null || { \
		echo "Error: no $(PYTHON) here; install Python 3.11 or later," \
			"or name one: make PYTHON=/path/to/python3" >&2; exit 2; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Error: cbit needs Python 3.11 or later, $(PYTHON) is" \
			"$$("$(PYTHON)" --version 2>&1); name another: make PYTHON=python3.11" >&2; exit 2; }
	@"$(PYTHON)" -m venv --clear $(VENV) || { \
		echo "Error: $(PYTHON) cannot make a virtual environment;" \
			"on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 2; }
	@touch $@

$(VENV)/.run: pyproject.toml $(VENV)/.made
	@echo "cbit: installing into $(VENV), once" >&2
	@$(PIP) install --editable .
	@touch $@

$(VENV)/.dev: pyproject.toml $(VENV)/.made
	@echo "cbit: installing into $(VENV) with what tests and checks need, once" >&2
	@$(PIP) install --editable '.[check,test]'
	@touch $@ $(VENV)/.run
