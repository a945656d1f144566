# make demo       sets everything up in .venv and does the main job
# make test       sets everything up in .venv and passes the tests
# make test-long  the tests that `make test` leaves out for their time
# make test-all   both
# make lint       ruff and mypy
# make clean      removes .venv and what the tools leave behind

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# Each stamp says that .venv holds an extra as pyproject.toml and constraints.txt state it now.
TEST   := $(VENV)/.installed-test
LONG   := $(VENV)/.installed-long
DEV    := $(VENV)/.installed-dev

.PHONY: demo test test-long test-all lint clean check-machine
.DELETE_ON_ERROR:

demo: $(TEST)
	$(BIN)/convgen generate --kernel 3 --stride 2
	$(BIN)/python -m examples.training_loop
	$(BIN)/convgen verify conv_transpose3d_k3_s2

# A process for each core. Neighbouring tests share what they compile, also between processes.
PYTEST = $(BIN)/python -m pytest --numprocesses auto --dist worksteal

test: $(TEST)
	$(PYTEST) -m "not long"

test-long: $(LONG)
	$(PYTEST) -m long

test-all: test test-long

lint: $(DEV)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(TEST): pyproject.toml constraints.txt | check-machine
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e ".[test]"
	@touch $@

$(LONG): pyproject.toml constraints.txt | check-machine
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e ".[test,networks]"
	@touch $@

$(DEV): pyproject.toml constraints.txt | check-machine
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e ".[dev]"
	@touch $@

check-machine:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo >&2 \
	  "convgen needs Python 3.10 or later as $(PYTHON); name another: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' || { echo >&2 \
	  "$(PYTHON) has no venv; install it, for example: sudo apt install python3-venv"; exit 1; }
	@for cxx in "$${CXX:-c++}" g++ clang++; do command -v $$cxx >/dev/null && exit 0; done; echo >&2 \
	  "No C++ compiler was found; install one, for example: sudo apt install g++"; exit 1
