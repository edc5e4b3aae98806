# Two commands: `make demo` and `make test`. Both make .venv with pinned versions first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test clean

.venv/demo.stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	touch $@

.venv/test.stamp: .venv/demo.stamp
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,export,serve]'
	touch $@

demo: .venv/demo.stamp
	rm -rf runs/demo
	$(BIN)/tokenfusion train digits --model tokenfusion_early_micro --out runs/demo
	$(BIN)/tokenfusion evaluate runs/demo
	$(BIN)/python examples/save_digits.py runs/demo runs/demo/images
	$(BIN)/tokenfusion predict runs/demo runs/demo/images --topk 2
	$(BIN)/tokenfusion report runs/demo

test: .venv/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest -n 2 --dist worksteal

clean:
	rm -rf .venv build src/*.egg-info runs/demo
