PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Bump when the extras change, so that an old environment is brought up to date.
STAMP = $(VENV)/.installed-$(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)

.PHONY: demo test test-slow fuzz lint bench docs clean

## demo: reconstruct recordings and photographs with embedded models; demo-report/report.html and demo-report/images/report.html
demo: $(STAMP)
	$(BIN)/zoo eval wavtokenizer-tiny --data eval/samples --out demo-report
	$(BIN)/zoo study photographs demo-report/photographs
	$(BIN)/zoo eval flextok-tiny --data demo-report/photographs --out demo-report/images

## test: every fast test, a process for each core with one thread each
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto

## test-slow: the tests that take minutes or much memory
test-slow: $(STAMP)
	$(BIN)/python -m pytest -q -m slow

## fuzz: mutated files against every reader; make fuzz SECONDS=60 TARGET=image SEED=1
SECONDS ?= 60
SEED ?= 0
fuzz: $(STAMP)
	$(BIN)/python tests/fuzz/run.py $(TARGET) --seconds $(SECONDS) --seed $(SEED)

## lint: style, formatting and types; the sources are laid out as they are installed, so that the type checker finds them
lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/typecheck build/lib build/bdist.*
	$(BIN)/pip install -q --no-deps --no-build-isolation --target build/typecheck .
	cd build/typecheck && ../../$(BIN)/mypy --config-file ../../pyproject.toml

## bench: speed of the official architectures against their peers
bench: $(STAMP)
	$(BIN)/pip install -q -c constraints.txt -e ".[bench]"
	$(BIN)/zoo bench wavtokenizer-small-75
	$(BIN)/zoo bench flextok-d12-d12-in1k

## docs: the site in build/site, from README, cards, the catalogue and docstrings; a broken link or reference stops it
docs: $(STAMP)
	$(BIN)/pip install -q -c constraints.txt -e ".[docs]"
	$(BIN)/python cards/site/build.py build

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt "setuptools>=77" -e ".[demo,test,lint]"
	rm -f $(VENV)/.installed-*
	touch $(STAMP)

clean:
	rm -rf $(VENV) build demo-report *.egg-info .pytest_cache .ruff_cache .mypy_cache
