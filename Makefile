# make demo   set everything up, train a small BERT and a small ResNet on handwritten digits, compress them, print the tables
# make test   set everything up and run the tests
# make docs   build the site into site/, notebooks run
PYTHON ?= python3
# A file's tests go to one worker, so that what they share is made once, in the order of their names.
PYTEST := pytest -n 2 --dist loadfile --no-loadscope-reorder
BIN    := .venv/bin
OLDEST := $(shell sed -n 's/^text = \["transformers>=\([0-9.]*\).*/\1/p' pyproject.toml)

.PHONY: setup demo test test-oldest lint types docs format clean

setup: .venv/ready

# torch first and by its exact version: otherwise pip is free to resolve it to a different build.
.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "rmtkd needs Python 3.11 or newer, $(PYTHON) is older. Run: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e '.[text,demo,vision,onnx]' --group dev
	@touch $@

demo: setup
	rm -rf runs/digits runs/digits-teacher runs/digits-images runs/digits-images-teacher
	$(BIN)/rmtkd compress digits --out runs/digits --control
	$(BIN)/rmtkd compress digits_cnn --out runs/digits-images

test: setup
	OMP_NUM_THREADS=1 $(BIN)/$(PYTEST)

# What touches transformers, against the oldest that pyproject.toml declares.
test-oldest: .oldest/ready
	OMP_NUM_THREADS=1 .oldest/bin/python -m $(PYTEST) $(addprefix tests/test_,$(addsuffix .py,families sites surgery artifact pretrained conformance export images status))

# Laid over .venv, so that only what differs is fetched: torch is not.
.oldest/ready: .venv/ready
	rm -rf .oldest
	$(PYTHON) -m venv --without-pip .oldest
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		> $$(.oldest/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/below.pth
	.oldest/bin/python -m pip install --quiet transformers==$(OLDEST)
	.oldest/bin/python -c 'import transformers as t; assert (t.__version__ + ".").startswith("$(OLDEST)."), t.__version__'
	@touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/pyright

# Links, anchors and formulas that lead nowhere end the build, and so does a cell of a notebook that raises.
docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 OMP_NUM_THREADS=1 $(BIN)/mkdocs build --quiet

.venv/docs: .venv/ready
	$(BIN)/pip install --quiet -c constraints.txt --group docs
	@touch $@

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv .oldest runs site
