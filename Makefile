# make pretrain   pretrain a small network with a fused loss and draw a report
# make test       the test suite
# make exhaustive every kernel compiled for every GPU in every configuration; an hour and more
# make check      format, lint, types and the quick tests
# make bench      the benchmark suite
#
# Each target creates $(VENV) and installs what it needs into it, once. PACKAGE may name a wheel to
# work on instead of this checkout.

PYTHON  ?= python3
VENV    ?= .venv
PACKAGE ?= --editable .

BIN     := $(VENV)/bin
INSTALL  = @echo "== installing fastssl and its '$(1)' extra into $(VENV); the first time PyTorch" \
           "comes with it, which takes minutes" && \
           $(BIN)/pip install --quiet $(PACKAGE)"[$(1)]" && touch $@

.PHONY: pretrain test exhaustive check bench
.DELETE_ON_ERROR:

pretrain: $(VENV)/.train
	@echo "== pretraining on scikit-learn's digits; the run is kept in runs/simclr-digits"
	$(BIN)/fastssl pretrain --out runs/simclr-digits --resume

test: $(VENV)/.test
	@echo "== testing"
	$(BIN)/pytest --numprocesses 2

exhaustive: $(VENV)/.test
	@echo "== compiling every kernel for every GPU in every configuration; this takes more than an hour"
	$(BIN)/pytest -m exhaustive

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest --numprocesses 2 -q -m "not slow and not exhaustive"

bench: $(VENV)/.bench
	@echo "== benchmarking against plain PyTorch, lightly, open_clip and pytorch-metric-learning"
	$(BIN)/pytest benchmarks

$(VENV)/.train: ; $(call INSTALL,train)
$(VENV)/.test:  ; $(call INSTALL,test)
$(VENV)/.dev:   ; $(call INSTALL,dev)
$(VENV)/.bench: ; $(call INSTALL,bench)

$(VENV)/.train $(VENV)/.test $(VENV)/.dev $(VENV)/.bench: setup.py | $(BIN)/pip

$(BIN)/pip:
	@echo "== creating $(VENV)"
	$(PYTHON) -m venv $(VENV)
