# Two commands on a fresh machine: `make demo` and `make test`. Everything runs in a virtual environment of its own.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
IN_PARALLEL := -n 2 --dist loadscope --no-loadscope-reorder

.PHONY: setup demo test test-all chaos soak nat fuzz docs check format bench proto clean

setup: $(INSTALLED)

# Not compiled: of the 16,000 modules that are installed, few are ever imported. Those that the commands import are
# compiled at the end: where the environment forbids to keep that, each process would do it anew, for seconds.
$(INSTALLED): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '.[dev]'
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -c 'import client.api.server, client.cli, dashboard.server, demo.cli, dht.cli, peer.cli, tests.preloaded'
	@touch $@

demo: setup
	$(BIN)/python -m demo

# Two at a time, those of a module one after the other: they share swarms. Those of tests/chaos take the time of answers,
# and so run alone.
test test-all: export OMP_NUM_THREADS = 1
# Else each of the many processes would compile anew what was changed of ours, where the environment forbids to keep it.
demo test test-all chaos soak nat bench: export PYTHONDONTWRITEBYTECODE =
test: setup
	$(BIN)/python -m pytest -m "not slow" $(IN_PARALLEL) --ignore tests/chaos
	$(BIN)/python -m pytest -m "not slow" tests/chaos

test-all: setup
	$(BIN)/python -m pytest $(IN_PARALLEL) --ignore tests/chaos
	$(BIN)/python -m pytest tests/chaos

# Both want a machine that has nothing else to do. CHAOS_SEED, CHAOS_ONLY and CHAOS_REPORT: see tests/chaos/test_chaos.py.
chaos: setup
	$(BIN)/python -m pytest -m slow -s tests/chaos/test_chaos.py

soak: setup
	$(BIN)/python -m pytest -m slow -s tests/chaos/test_soak.py tests/api/test_processes.py

# FUZZ_MINUTES (10) of the processor for each harness, FUZZ_JOBS (1) at a time; see tests/fuzz/__main__.py. atheris comes
# as a wheel for Linux on x86-64, and is needed for nothing else.
fuzz: export OMP_NUM_THREADS = 1
fuzz: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,fuzz]'
	$(BIN)/python -m tests.fuzz $(FUZZ_TARGETS)

# Two homes behind routers and a relay between them, in network namespaces: as root.
nat: setup
	$(BIN)/python -m pytest -m slow -s tests/reach/test_nat.py

# The parts of the docs that are read off the code; a test says if they are behind.
docs: setup
	$(BIN)/python -m potluck.reference docs/*.md

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: setup
	$(BIN)/python -m benchmarks all

# The generated stubs are in the repository; a test proves that they match the .proto file.
proto: setup
	$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. --grpc_python_out=. protocol/potluck.proto

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
