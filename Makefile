# make demo   set everything up, train a small BERT on handwritten digits, compress it, print the table
# make test   set everything up and run the tests
PYTHON ?= python3
BIN    := .venv/bin

.PHONY: setup demo test lint types format clean

setup: .venv/ready

# torch first and by its exact version: otherwise pip is free to resolve it to a different build.
.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "rmtkd needs Python 3.11 or newer, $(PYTHON) is older. Run: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e '.[text,demo]' --group dev
	@touch $@

demo: setup
	rm -rf runs/digits runs/digits-teacher
	$(BIN)/rmtkd compress digits --out runs/digits --control

test: setup
	$(BIN)/pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/pyright

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv runs
