# make demo    set up, then run the main job on the embedded model and text   (ARGS="--model PATH_OR_ID --data PATH")
# make test    set up, then run the tests that need no GPU and no minutes
# make lint    ruff and mypy          make test-slow    the long tests as well          make clean
# make notebook    run examples/quickstart.ipynb anew and keep its outputs
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: demo test test-slow lint format notebook clean

demo: $(READY)
	$(BIN)/python -W ignore examples/demo.py $(ARGS)

test: $(READY)
	$(BIN)/python -m pytest -q -m "not slow and not gpu" $(ARGS)

test-slow: $(READY)
	$(BIN)/python -m pytest -q -m "not gpu" $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

notebook: NOTEBOOK = examples/quickstart.ipynb
notebook: $(READY)
	$(BIN)/python -c "import nbclient, nbformat; book = nbformat.read('$(NOTEBOOK)', 4); nbclient.execute(book, \
	    cwd='examples', record_timing=False, coalesce_streams=True); \
	    nbformat.write(book, '$(NOTEBOOK)')"

# torch first and by itself: where a CPU build of the pinned version is at hand, nothing later replaces it
$(READY): pyproject.toml constraints.txt CMakeLists.txt $(wildcard fairy2i/csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist outputs *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
