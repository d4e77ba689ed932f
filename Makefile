# make run: set up and run the embedded default. make test: set up and pass the tests.
PYTHON ?= python3
CORES ?= 2
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: setup run audit test test-all test-slurm test-lmms lmms-env serve-env cluster lint format study study-show-o tune tune-show-o ablations dynamics tiny-model tiny-model-janus tiny-model-show_o

setup: $(STAMP)

# The stamp is written last and holds what was installed: an interrupted or outdated installation is done again.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "selfgap needs Python 3.11 or newer")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

run: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" snakemake --cores $(CORES)

# Is training worth it? The tiny model at three temperatures, before any training (docs/audit.md).
audit: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" snakemake audit --cores $(CORES) --configfile configs/tiny-audit.yaml

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

# `transformers serve` in an environment of its own, for tests/test_transformers_serve.py: it needs torchvision, and with that a
# CUDA build of torch (5 GB), which also runs without a GPU.
serve-env:
	test -x .venv-serve/bin/python || $(PYTHON) -m venv .venv-serve
	.venv-serve/bin/pip install --quiet torch==2.14.1 torchvision==0.29.1 'transformers[serving]==5.23.0' accelerate

# The environment of lmms-eval, which is not the project's own: see docs/evaluation.md. torch comes first, with what it needs; the
# rest is exactly the list, without torchvision.
LMMS := .venv-lmms
lmms-env: $(LMMS)/.installed

$(LMMS)/.installed: envs/lmms-eval.txt
	test -x $(LMMS)/bin/python || $(PYTHON) -m venv $(LMMS)
	$(LMMS)/bin/pip install --quiet --disable-pip-version-check --constraint envs/lmms-eval.txt torch
	$(LMMS)/bin/pip install --quiet --disable-pip-version-check --no-deps --requirement envs/lmms-eval.txt
	touch $(LMMS)/.installed

test-lmms: setup lmms-env
	$(BIN)/python -m pytest -m lmms

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

# The default arms and their controls on the test prompts, for several pretrained models and seeds; writes study.csv,
# study-runs.csv, contrasts.csv and study.png in docs/. Every run has its own seed: 0 and 1 for the first model, 10 and 11 for
# the second. A run that is finished is only checked, so the command continues where it was stopped. Further models are made by
# make tiny-model SEED=3 MODEL=models/tiny-janus-3 STORE_AS=bfloat16
MODELS ?= models/tiny-janus models/tiny-janus-1 models/tiny-janus-2
SEEDS ?= 0 1
study: setup
	@place=$(or $(FIRST_PLACE),0); started=$$(date +%s); runs=; \
	for model in $(MODELS); do for seed in $(SEEDS); do \
		begun=$$(date +%s); run=study-$$(echo $$model | tr / -)-$$seed; runs="$$runs results/$$run"; \
		PATH="$(CURDIR)/$(BIN):$$PATH" snakemake --cores $(CORES) --configfile config.yaml $(PRESET) configs/study.yaml $(OVERLAY) \
			--config seed=$$((10 * place + seed)) run=$$run model="{checkpoint: $$model}" -- all precision || exit 1; \
		echo "$$run took $$((($$(date +%s) - begun) / 60)) minutes, and the study so far $$((($$(date +%s) - started) / 60))"; \
	done; place=$$((place + 1)); done; \
	$(BIN)/python -m stages.tools.study --runs $$runs --out docs/study$(SUFFIX).csv --by-run docs/study-runs$(SUFFIX).csv \
		--contrasts docs/contrasts$(SUFFIX).csv --plot docs/study$(SUFFIX).png && \
	echo "The study took $$((($$(date +%s) - started) / 60)) minutes."

# The same for the tiny Show-o, which is one checkpoint; its seeds are 30 and 31. Writes study-show-o.csv and so on.
study-show-o: setup
	@$(MAKE) --no-print-directory study MODELS=models/tiny-show-o FIRST_PLACE=3 \
		PRESET=configs/tiny-show-o.yaml OVERLAY=configs/study-show-o.yaml SUFFIX=-show-o

# Settings and ablations are measured on the validation prompts, with seeds of their own. A run that is finished is only checked.
# $(call validated,NAME,CONFIGURATION FILE,FURTHER SETTINGS,SEEDS) runs the workflow once for each seed.
TUNING_SEEDS ?= 100 101 102
validated = for seed in $(4); do \
		PATH="$(CURDIR)/$(BIN):$$PATH" snakemake --cores $(CORES) --configfile config.yaml $(2) \
			--config run=$(1)-$$seed seed=$$seed $(3) -- all precision || exit 1; \
	done
tuned = $(TUNING_SEEDS:%=results/$(1)-%)

# The grid from which the settings of config.yaml are chosen; writes docs/tuning.csv and docs/guidance.jsonl.
tune: setup
	@mkdir -p results; for scale in 1 1.5 2 3; do \
		$(BIN)/python -m stages.shapes.measure --seeds 1 --guidance-scale $$scale || exit 1; \
	done > results/guidance.jsonl && mv results/guidance.jsonl docs/guidance.jsonl
	@$(call validated,tune,configs/tune.yaml,,$(TUNING_SEEDS))
	$(BIN)/python -m stages.tools.study --runs $(call tuned,tune) --out docs/tuning.csv

# The same for the tiny Show-o; writes docs/tuning-show-o.csv and docs/guidance-show-o.jsonl.
tune-show-o: setup
	@mkdir -p results; for steps in 8 16; do for scale in 0 0.5 1 2; do \
		$(BIN)/python -m stages.shapes.measure --family show_o --checkpoint models/tiny-show-o --seeds 1 --guidance-scale $$scale \
			--sampling "{\"steps\": $$steps}" || exit 1; \
	done; done > results/guidance-show-o.jsonl && mv results/guidance-show-o.jsonl docs/guidance-show-o.jsonl
	@$(call validated,tune-show-o,configs/tiny-show-o.yaml configs/tune-show-o.yaml,,$(TUNING_SEEDS))
	$(BIN)/python -m stages.tools.study --runs $(call tuned,tune-show-o) --out docs/tuning-show-o.csv

# The ablations of the paper and some more: first learning curves, which say when Gen. stalls, then all arms, then a second round
# of the whole loop with the model that the first one has trained, and drawing under guidance. The curves have another seed than
# the ablations, since the epoch of replay is chosen from them. Writes docs/ablations*
# and docs/learning_curves*.
CURVE_SEEDS ?= 100
ABLATION_SEEDS ?= 101 102 103
STALL = arms="{c-sft-stall: {objective: sft, epochs: 6, replay_epochs: [$$epoch]}}"
SECOND = model="{checkpoint: results/ablations-$$seed/sft/checkpoint}"
ablated = $(BIN)/python -m stages.tools.study --runs $(ABLATION_SEEDS:%=results/$(1)-%) --out docs/$(1).csv \
	--contrasts docs/$(1)-contrasts.csv
ablations: setup
	@$(call validated,ablations-curves,configs/learning_curves.yaml,,$(CURVE_SEEDS))
	@epoch=$$($(BIN)/python -m stages.tools.stall --curves $(CURVE_SEEDS:%=results/ablations-curves-%/learning_curves.csv) \
		--arm sft) || exit 1; echo "Gen. stalls after epoch $$epoch."; \
	$(call validated,ablations,configs/ablations.yaml,$(STALL),$(ABLATION_SEEDS))
	@$(call validated,ablations-second,configs/second-round.yaml,$(SECOND),$(ABLATION_SEEDS))
	@$(call validated,ablations-guided,configs/guided.yaml,,$(ABLATION_SEEDS))
	$(call ablated,ablations) --plot docs/ablations.png
	$(call ablated,ablations-second)
	$(call ablated,ablations-guided)
	cp results/ablations-curves-$(firstword $(CURVE_SEEDS))/learning_curves.png docs/learning_curves.png
	grep -e ^benchmark, -e ,overall, results/ablations-curves-$(firstword $(CURVE_SEEDS))/learning_curves.csv > docs/learning_curves.csv

# Learning dynamics on the tiny model with validation prompts, for several seeds; writes docs/dynamics.csv, the pictures and the
# tables in docs/dynamics.md (the text around them stays). A run that is finished is only checked. For a smaller one:
# make dynamics DYNAMICS_SEEDS=200 DYNAMICS='dynamics={probes: 24, images: 96, segments: 1}'
DYNAMICS_SEEDS ?= 200 201 202
DYNAMICS ?=
MACHINE = $(shell nproc --all) cores of $(shell sed -n 's/^model name.*: //p' /proc/cpuinfo | head -1)
dynamics: setup
	@for seed in $(DYNAMICS_SEEDS); do \
		PATH="$(CURDIR)/$(BIN):$$PATH" snakemake dynamics --cores $(CORES) --configfile config.yaml \
			--config run=dynamics-$$seed seed=$$seed $(if $(DYNAMICS),'$(DYNAMICS)') || exit 1; \
	done
	$(BIN)/python -m stages.dynamics.page --dynamics $(DYNAMICS_SEEDS:%=results/dynamics-%/dynamics) \
		--facts "make dynamics, seeds $(DYNAMICS_SEEDS), $(or $(DYNAMICS),settings of config.yaml), models/tiny-janus, $(MACHINE)" \
		--out docs/dynamics.md --csv docs/dynamics.csv

# Trains a tiny model from nothing: its image tokenizer, for janus the vision encoder, then the language model. It takes the place
# of models/tiny-janus, or with FAMILY=show_o of models/tiny-show-o, unless MODEL names another folder.
SEED := 0
FAMILY := janus
STORE_AS := float32
MODEL := models/tiny-$(subst _,-,$(FAMILY))
PRETRAINING := results/pretraining/$(if $(filter-out janus,$(FAMILY)),$(FAMILY)-)seed-$(SEED)
tiny-model: setup tiny-model-$(FAMILY)

tiny-model-janus: setup
	$(BIN)/python -m stages.shapes.train_codes --seed $(SEED) --out $(PRETRAINING)
	$(BIN)/python -m stages.shapes.train_encoder --seed $(SEED) --out $(PRETRAINING)
	$(BIN)/python -m stages.shapes.train_model --seed $(SEED) --work $(PRETRAINING) --out $(MODEL) --store-as $(STORE_AS)

tiny-model-show_o: setup
	$(BIN)/python -m stages.shapes.train_show_o --seed $(SEED) --work $(PRETRAINING) --out $(MODEL) --store-as $(STORE_AS)
