# make run: set up and run the embedded default. make test: set up and pass the tests.
PYTHON ?= python3
CORES ?= 2
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: setup run test test-all test-slurm cluster lint format study tiny-model

setup: $(STAMP)

# The stamp is written last and holds what was installed: an interrupted or outdated installation is done again.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "selfgap needs Python 3.11 or newer")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

run: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" snakemake --cores $(CORES)

# The tier of every change: under ten minutes on two idle cores.
test: setup lint
	$(BIN)/python -m pytest --numprocesses $(CORES) --dist loadfile

# Everything that needs no SLURM: also kills in great number, trainings of several processes and the benchmarks' smoke tests.
test-all: setup lint
	$(BIN)/python -m pytest --numprocesses $(CORES) --dist loadfile -m 'not slurm'

# A real SLURM on this machine, with fake GPUs: root, and Debian's packages, which are installed where they are missing.
cluster: setup
	$(BIN)/python -m tests.slurm_cluster start --accounting

test-slurm: setup
	$(BIN)/python -m pytest -m slurm

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/snakefmt --check Snakefile workflow
	PATH="$(CURDIR)/$(BIN):$$PATH" snakemake --lint

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/snakefmt Snakefile workflow

# The default run with two controls and an anchored judge at five seeds; writes docs/study.csv and docs/study.png.
SEEDS := 0 1 2 3 4
study: setup
	for seed in $(SEEDS); do PATH="$(CURDIR)/$(BIN):$$PATH" snakemake --cores $(CORES) \
		--configfile config.yaml configs/study.yaml --config seed=$$seed run=study-$$seed -- all audit || exit 1; done
	$(BIN)/python -m stages.tools.study --runs $(SEEDS:%=results/study-%) --out docs/study.csv --plot docs/study.png

# Repeats models/tiny-janus from nothing: the image tokenizer, the vision encoder, then the language model. With another seed:
# make tiny-model SEED=1 MODEL=results/pretraining/seed-1/model
SEED := 0
MODEL := models/tiny-janus
PRETRAINING := results/pretraining/seed-$(SEED)
tiny-model: setup
	$(BIN)/python -m stages.shapes.train_codes --seed $(SEED) --out $(PRETRAINING)
	$(BIN)/python -m stages.shapes.train_encoder --seed $(SEED) --out $(PRETRAINING)
	$(BIN)/python -m stages.shapes.train_model --seed $(SEED) --work $(PRETRAINING) --out $(MODEL)
