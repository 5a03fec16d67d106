# Each target sets up what it needs: Python 3.11 or later and make are enough.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready

.PHONY: demo test zoo test-zoo test-slow test-random lint format setup clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	mkdir -p .venv/typing && ln -sfn ../.. .venv/typing/shardwright
	touch $(READY)

# Two commands a network: measure it, then split it over two CPU workers, run the split and compare.
demo: $(READY)
	$(BIN)/python cli.py profile examples/containers.py:Net --devices cpu:0,cpu:1 --out net.profile.json
	$(BIN)/python cli.py shard examples/containers.py:Net --profile net.profile.json --out net.plan.json --run
	$(BIN)/python cli.py profile examples/containers.py:NetList --devices cpu:0,cpu:1 --out netlist.profile.json
	$(BIN)/python cli.py shard examples/containers.py:NetList --profile netlist.profile.json --out netlist.plan.json --run
	$(BIN)/python cli.py profile examples/containers.py:NetDict --devices cpu:0,cpu:1 --out netdict.profile.json
	$(BIN)/python cli.py shard examples/containers.py:NetDict --profile netdict.profile.json --out netdict.plan.json --run

# On two cores: half of the suite is waiting for workers, and tests that time nothing do not mind a neighbour.
test: $(READY)
	$(BIN)/python -m pytest -n 2

# The zoo's models come from other libraries; without them `make test` leaves those out.
zoo: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[zoo]"

# Each model of the libraries in both tests of tests/test_zoo.py; `make test` has a third of them in either.
test-zoo: $(READY)
	$(BIN)/python -m pytest -n 2 -m slow tests/test_zoo.py

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

# Property-based tests on examples nobody saw yet.
test-random: $(READY)
	$(BIN)/python -m pytest -n 2 --hypothesis-profile=random

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=.venv/typing $(BIN)/mypy -m shardwright -m shardwright.cli -p shardwright.profiler -p shardwright.sharder -p shardwright.reports

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build dist *.egg-info
