# make demo: everything from nothing to a report · make test: everything from nothing to green tests
SHELL := /bin/bash
VENV := .venv
PYTHON := $(VENV)/bin/python
SCALEPROG := $(VENV)/bin/scaleprog
INSTALLED := $(VENV)/.installed
FASHION := /usr/share/datasets/fashion-mnist
DEMO := runs/demo
# the same recipes, shortened to minutes, on a batch that feeds two ranks
DEMO_RECIPE := train.epochs=1 train.batch=128 optimizer.warmup_epochs=0.1 search.epochs=0.05 evaluate.every=0.25

.PHONY: install demo test chaos fuzz lint cluster cluster-down clean

install: $(INSTALLED)

# Fashion-MNIST comes from its Debian package where root and apt are there, else `scaleprog shards` downloads it.
$(INSTALLED): pyproject.toml
	@if [ ! -d $(FASHION) ] && [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
		(apt-get update -qq && apt-get install -y -qq dataset-fashion-mnist) || echo "no apt package: will download"; \
	fi
	test -x $(PYTHON) || python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --editable '.[dev]'
	touch $@

demo: install
	$(SCALEPROG) shards fashion-mnist data/fashion_mnist
	$(SCALEPROG) plan configs/fashion_mnist/autoprog.yaml
	$(SCALEPROG) train configs/fashion_mnist/original.yaml $(DEMO_RECIPE) --nproc 2 --run-dir $(DEMO)/original
	$(SCALEPROG) train configs/fashion_mnist/autoprog.yaml $(DEMO_RECIPE) --nproc 2 --run-dir $(DEMO)/autoprog --baseline $(DEMO)/original
	$(SCALEPROG) export $(DEMO)/autoprog $(DEMO)/autoprog.safetensors
	$(SCALEPROG) report $(DEMO)/original $(DEMO)/autoprog --out $(DEMO)/report
	@echo "curves: $(VENV)/bin/tensorboard --logdir $(DEMO)"

# Two files at a time: those on Slurm mostly wait.
test: install
	$(PYTHON) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Runs under random faults, each compared with the undisturbed run; N of them, drawn by SEED, on fsdp, hsdp or zero.
chaos: N := 20
SEED := 0
ENGINE := fsdp
chaos: install
	$(PYTHON) -m tests.chaos.harness --runs $(N) --seed $(SEED) --engine $(ENGINE) --out docs/results/chaos.md

# Starts on inputs changed at random: N of them, drawn by SEED, REAL of them also as processes of their own.
fuzz: N := 5000
REAL := 200
fuzz: install
	$(PYTHON) -m tests.fuzz --n $(N) --seed $(SEED) --real $(REAL) --out docs/results/fuzz.md

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# A real Slurm of four nodes on this machine, for root: see slurm/dev_cluster.sh.
cluster:
	@slurm/dev_cluster.sh up

cluster-down:
	slurm/dev_cluster.sh down

clean:
	rm -rf runs data $(VENV)
