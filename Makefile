# Two commands for a newcomer, each starting from a bare clone: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
STAGE_1 := results/models/5way_1shot_glyphs_arcMax_Conv4_bestModel.tar

.PHONY: demo test test-gpu lint

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -r requirements.txt
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(BIN)/pip install -q -r requirements-dev.txt
	touch $@

demo: .venv/installed
	$(BIN)/python -m data.prepare glyphs
	$(BIN)/python transferLearning.py --preset laptop --resume
	$(BIN)/python metaLearning.py --preset laptop --resume --init_from $(STAGE_1)
	$(BIN)/python associative_alignment.py --preset laptop --resume
	$(BIN)/python -m reporting.report results
	$(BIN)/python -m reporting.figures results
	$(BIN)/python -m reporting.page results
	@echo "Open results/report.html. Next, your own images: python predict.py --help, and README.md tells of both."

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile --cov --durations=12

# What runs on a device, on a GPU; AA_DEVICE=cpu make test-gpu runs the same on the CPU, as every make test does.
test-gpu: .venv/installed-dev
	AA_DEVICE=$${AA_DEVICE:-cuda} $(BIN)/python -m pytest -m device
