# make demo     set up, then train on real digits: demo/report.html
# make test     set up, then every check and every test but the slow ones, which are compilations for more GPUs
# make test-all all of them
# make bench    set up, then measure against the competitors that are installed: benchmarks/results/here.jsonl, the tables
#               and the picture of README.md and docs/speed.md (an hour; after a kill it goes on where it was)
# make gpu-check  on a machine with a GPU: build for it, test on it, compute-sanitizer, ceilings, benchmarks (build/gpu_check)
# make clean    remove what was built (not .venv, whose downloads take minutes)
#
# The set-up goes to .venv and is skipped while nothing that it depends on has changed. Variables:
#   PYTHON   the Python to start from (3.10 or newer)
#   TORCH    the version of PyTorch. The usual one brings CUDA (gigabytes); the small one for a machine without a GPU:
#            make demo TORCH=2.13.0+cpu PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
#   INFOVAE_FAST_BUILD   what to build: see setup.py

PYTHON ?= python3
TORCH ?= 2.13.0
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input install -qq
NATIVE := $(wildcard csrc/*.h csrc/*.cpp csrc/*/*)

.PHONY: demo test test-all bench gpu-check clean

demo: .venv/.built
	$(BIN)/python -m infovae_fast.reproduce.small_data --out demo

test: SELECTED = -m "not slow"
test test-all: .venv/.built
	$(BIN)/ruff check --quiet .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy --no-error-summary
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal $(SELECTED)

bench: .venv/.built
	@wrong=0; \
	$(BIN)/python -m benchmarks.run --grid --resume --out build/bench.jsonl || wrong=1; \
	MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=17179869184 \
	  $(BIN)/python -m benchmarks.run --grid --resume --compile --out build/bench.jsonl || wrong=1; \
	$(BIN)/python -m benchmarks.masked_conv --compile --resume --out build/bench.jsonl || wrong=1; \
	cp build/bench.jsonl benchmarks/results/here.jsonl && \
	$(BIN)/python -m benchmarks.report benchmarks/results/here.jsonl && \
	if [ $$wrong = 0 ]; then rm build/bench.jsonl; else exit 1; fi

gpu-check: .venv/.installed
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m benchmarks.gpu_check

.venv/.installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "PYTHON=$(PYTHON) is not a Python 3.10 or newer. Give one: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
	  { echo "$(PYTHON) cannot make a virtual environment. Install its venv module (Debian: apt install python3-venv)."; exit 1; }
	@echo "Installing PyTorch $(TORCH) and the versions of requirements.txt into .venv (minutes, the first time)"
	@$(PYTHON) -m venv .venv
	@$(PIP) torch==$(TORCH)
	@$(PIP) -r requirements.txt
	@touch $@

.venv/.built: .venv/.installed setup.py pyproject.toml $(NATIVE)
	@echo "Building infovae_fast"
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP) --no-build-isolation --no-deps -e .
	@touch $@
	@$(BIN)/python -m infovae_fast

clean:
	rm -rf build dist demo *.egg-info infovae_fast/_C.*.so infovae_fast/_build.json .venv/.built
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
