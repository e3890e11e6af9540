# Two commands for a newcomer, each starting from a bare clone: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint install

install: .venv/installed

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -r requirements.txt
	touch $@

demo: install
	$(BIN)/python -m data.prepare glyphs
	$(BIN)/python transferLearning.py --preset laptop
	$(BIN)/python metaLearning.py --preset laptop
	$(BIN)/python associative_alignment.py --preset laptop
	$(BIN)/python -m methods.report results
	$(BIN)/python -m methods.figures results

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest
