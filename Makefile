# make demo: everything from nothing to a report · make test: everything from nothing to green tests
SHELL := /bin/bash
VENV := .venv
PYTHON := $(VENV)/bin/python
SCALEPROG := $(VENV)/bin/scaleprog
INSTALLED := $(VENV)/.installed
FASHION := /usr/share/datasets/fashion-mnist
CHROMIUM := /usr/bin/chromium
DEMO := runs/demo
SEED := 0

.PHONY: install demo tables test test-gpu test-fast format chaos fuzz lint docs lock image-check cluster cluster-down clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import pip' 2> /dev/null || python3 -m venv --clear $(VENV)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "scaleprog needs Python 3.11 or later, and $(VENV) has " + sys.version.split()[0] + "; remove $(VENV), and put a newer python3 first on the PATH")'
	$(PYTHON) -m pip install --quiet --editable '.[dev]'
	touch $@

# Real images, two FSDP2 ranks, minutes: handwritten digits, Original first and then AutoProg.
demo: install
	$(SCALEPROG) shards digits data/digits
	$(SCALEPROG) plan configs/digits/autoprog.yaml
	$(SCALEPROG) train configs/digits/original.yaml seed=$(SEED) --nproc 2 --run-dir $(DEMO)/original
	$(SCALEPROG) train configs/digits/autoprog.yaml seed=$(SEED) --nproc 2 --run-dir $(DEMO)/autoprog --baseline $(DEMO)/original
	$(SCALEPROG) export $(DEMO)/autoprog $(DEMO)/autoprog.safetensors
	$(SCALEPROG) report $(DEMO)/original $(DEMO)/autoprog --out $(DEMO)/report
	@echo "picture: $(DEMO)/report/verdict.png; curves: $(VENV)/bin/tensorboard --logdir $(DEMO)"
	@echo "next, with your own images: $(SCALEPROG) shards image-folder FOLDER data/mine"

# Three files at a time, because the Slurm tests mostly wait. The many processes that the tests start keep bytecode, though
# a shell may say otherwise: compiling scaleprog takes a tenth of a rank's start.
test: export PYTHONDONTWRITEBYTECODE =
test: install $(FASHION) $(CHROMIUM)
	$(PYTHON) -m pytest -n 3 --dist loadfile --no-loadscope-reorder

# Installs a Debian package that some tests need, if root and apt are available: the images that the Fashion-MNIST builder
# reads, and the browser that looks at TensorBoard.
$(FASHION): PACKAGE := dataset-fashion-mnist
$(CHROMIUM): PACKAGE := chromium
$(FASHION) $(CHROMIUM):
	@if [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
		(apt-get update -qq && apt-get install -y -qq $(PACKAGE)) || echo "cannot install $(PACKAGE): its tests skip"; \
	fi

# The tests that need a GPU; `make test` hides all GPUs, because it compares ranks on CPUs.
test-gpu: install
	SCALEPROG_TEST_GPU=1 $(PYTHON) -m pytest -m gpu

# For daily work: unit tests that start no processes.
test-fast: install
	$(PYTHON) -m pytest -n 2 -m "not process" tests/unit

# The paper's Tables 2 to 8 and Figure 4 at micro scale, on half of Fashion-MNIST: about 5 hours on two idle cores.
# It may be stopped and started again. docs/results/paper.md gets what has finished.
tables: install data/fashion_mnist data/digits
	nice -n 10 $(PYTHON) -m benchmarks.paper

data/fashion_mnist: | $(FASHION)
	$(SCALEPROG) shards fashion-mnist $@

data/digits:
	$(SCALEPROG) shards digits $@

# N runs under random faults drawn by SEED (25: one of each kind), each compared with the undisturbed run.
# ENGINE: fsdp, hsdp, or zero; MODEL: vit or volo.
chaos: N := 25
ENGINE := fsdp
MODEL := vit
chaos: install
	$(PYTHON) -m tests.chaos.harness --runs $(N) --seed $(SEED) --engine $(ENGINE) --model $(MODEL) --out docs/results/chaos.md

# N starts on randomly changed inputs, drawn by SEED; REAL of them also as separate processes.
fuzz: N := 5000
REAL := 200
fuzz: install
	$(PYTHON) -m tests.fuzz --n $(N) --seed $(SEED) --real $(REAL) --out docs/results/fuzz.md

format: install
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

lint: install docs
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# docs/ as a site in build/site. A link that leads nowhere is an error.
docs: install
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

# The versions that are installed here, which `make test` has tried, with their hashes: for Python 3.11 on x86-64 Linux.
lock: install
	$(PYTHON) -m venv build/lock
	build/lock/bin/pip install --quiet pip-tools
	$(PYTHON) -m pip freeze --exclude-editable > requirements.lock
	CUSTOM_COMPILE_COMMAND="make lock" build/lock/bin/pip-compile --quiet --generate-hashes --strip-extras --allow-unsafe \
		--no-emit-index-url --no-emit-find-links --no-emit-trusted-host --no-emit-options \
		--extra slurm --extra deepspeed --extra s3 --extra http --output-file requirements.lock pyproject.toml

# Every command of the Dockerfile in a fresh virtual environment, the whole lock file included: 5.5 GB, minutes.
image-check: install
	SCALEPROG_TEST_IMAGE=1 $(PYTHON) -m pytest --timeout 3000 tests/unit/test_image.py

# A real Slurm of four nodes on this machine, for root: see slurm/dev_cluster.sh.
cluster:
	@slurm/dev_cluster.sh up

cluster-down:
	slurm/dev_cluster.sh down

# Deletes ALL that was made here: runs with their checkpoints, shards in data/, build/, and .venv.
clean:
	rm -rf runs data build $(VENV)
