# Every target sets up the environment that it needs. `make help` lists the targets.
SHELL := /bin/sh
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SAMGRAFT := $(BIN)/samgraft
STAMP := $(VENV)/.samgraft-installed

# User variables reach the recipes through the environment and not through make's own text, so that paths with
# spaces, quotes or other scripts stay unchanged.
TYPED := MODALITY DATA LABELLED UNLABELLED MODEL METHOD BASE CKPT NAME PRESET OUT SPLIT LICENSE RUN FILE
export $(TYPED)

# Other programs use these names too: Windows' Linux sets NAME to the name of the computer, which would become the
# name of the run. Only variables after `make TARGET` count.
INHERITED := $(foreach v,$(TYPED) ARGS,$(if $(filter environment%,$(origin $(v))),$(if $(value $(v)),$(v))))
ifneq ($(strip $(INHERITED)),)
$(foreach v,$(INHERITED),$(eval $(v) :=))
$(shell echo "note: $(strip $(INHERITED)) of the environment is not used; write it after the target, as in make pretrain DATA=..." 1>&2)
endif

# Without this check, a misspelt variable (CHKPT=...) and an empty one (NAME=) would be ignored silently.
GIVEN := $(foreach v,$(.VARIABLES),$(if $(filter command line,$(origin $(v))),$(v)))
GIVEN := $(filter-out MAKEFLAGS MAKEOVERRIDES -*-command-variables-*-,$(sort $(GIVEN)))
EMPTY := $(foreach v,$(GIVEN),$(if $(value $(v)),,$(v)))
ifneq ($(strip $(GIVEN)),)
ifneq ($(shell SAMGRAFT_MAKE_VARIABLES="$(GIVEN)" SAMGRAFT_MAKE_EMPTY="$(EMPTY)" $(PYTHON) shared/make_variables.py 1>&2; echo $$?),0)
$(error see the message above)
endif
endif

# Messages then name the make command that was typed. The values of its variables are in the environment already.
export SAMGRAFT_FRONT_END := make $(MAKECMDGOALS)
export SAMGRAFT_MAKE_GIVEN := $(GIVEN)

.PHONY: help install demo-data store pretrain finetune selftrain evaluate predict study release inspect doctor test test-slow test-gpu mutants check docs site format imports types wheel clean

help: ## list the targets
	@echo "samgraft: unlabelled scans -> better SAM encoder -> segmentation models you can release"
	@echo
	@awk 'BEGIN{FS=":.*## "} /^[a-z-]+:.*## /{split($$2, t, " *[|] *"); printf "  %-11s %-66s %s\n", $$1, t[1], t[2]}' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "  The same as commands: $(SAMGRAFT) --help"

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v=sys.version_info[:2]; sys.exit(0 if (3,11) <= v <= (3,13) else "error: Python must be 3.11 to 3.13, got %d.%d.\n  next   make $(firstword $(MAKECMDGOALS)) PYTHON=python3.12" % v)'
	@echo "setting up $(VENV) (once, about a minute and 6 GB, plus downloads)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { echo "error: $(PYTHON) cannot make an environment (Debian and Ubuntu: apt install python3-venv)."; exit 2; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip >/dev/null
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[dev,docs]'
	@$(BIN)/python -m samgraft.finetune.evaluation.viewer
	@touch $@

install: $(STAMP) ## set up the environment (every other target does this by itself)

demo-data: $(STAMP) ## fetch demo scans and base weights by hash, build data/demo | make demo-data MODALITY=mri
	@$(SAMGRAFT) demo-data $${MODALITY:+--modality "$$MODALITY"}

store: $(STAMP) ## build a slice store from scans | make store DATA=scans/ OUT=data/mine.zarr MODALITY=mri
	@$(SAMGRAFT) store build "$$DATA" --out "$$OUT" $${MODALITY:+--modality "$$MODALITY"}

pretrain: $(STAMP) ## stage 1: train SAM's encoder further on unlabelled slices | make pretrain MODALITY=mri
	@$(SAMGRAFT) pretrain $${MODALITY:+--modality "$$MODALITY"} $${DATA:+--data "$$DATA"} $${LABELLED:+--labelled "$$LABELLED"} $${MODEL:+--model "$$MODEL"} \
	  $${METHOD:+--method "$$METHOD"} $${CKPT:+--ckpt "$$CKPT"} $${BASE:+--base "$$BASE"} $${NAME:+--name "$$NAME"} $${PRESET:+--preset "$$PRESET"} $(ARGS)

finetune: $(STAMP) ## stage 2: tune encoder and decoder on labelled slices | make finetune CKPT=runs/NAME
	@$(SAMGRAFT) finetune $${CKPT:+--ckpt "$$CKPT"} $${MODALITY:+--modality "$$MODALITY"} $${DATA:+--data "$$DATA"} $${MODEL:+--model "$$MODEL"} \
	  $${METHOD:+--method "$$METHOD"} $${BASE:+--base "$$BASE"} $${NAME:+--name "$$NAME"} $${PRESET:+--preset "$$PRESET"} $(ARGS)

selftrain: $(STAMP) ## stage 2 with few labels: teachers label more scans | make selftrain BASE=FILE DATA=few.zarr UNLABELLED=many.zarr
	@$(SAMGRAFT) selftrain $${CKPT:+--ckpt "$$CKPT"} $${MODALITY:+--modality "$$MODALITY"} $${DATA:+--data "$$DATA"} \
	  $${UNLABELLED:+--unlabelled "$$UNLABELLED"} $${MODEL:+--model "$$MODEL"} $${METHOD:+--method "$$METHOD"} \
	  $${BASE:+--base "$$BASE"} $${NAME:+--name "$$NAME"} $${PRESET:+--preset "$$PRESET"} $(ARGS)

evaluate: $(STAMP) ## measure per-case scores with intervals, on the scans' own grid | make evaluate RUN=runs/NAME SPLIT=test
	@$(SAMGRAFT) evaluate "$$RUN" $${DATA:+--data "$$DATA"} $${SPLIT:+--split "$$SPLIT"} $${OUT:+--out "$$OUT"} $(ARGS)

predict: $(STAMP) ## write masks for new scans, in their own geometry | make predict RUN=releases/NAME DATA=scans/ OUT=masks/
	@$(SAMGRAFT) predict "$$RUN" "$$DATA" --out "$$OUT" $(ARGS)

study: $(STAMP) ## run a grid of fine-tunings with one table and one report | make study FILE=configs/study/demo.yaml
	@$(SAMGRAFT) study "$$FILE" $(ARGS)

release: $(STAMP) ## write checked weights, card and checksums from a run | make release RUN=runs/NAME OUT=releases/NAME LICENSE=cc-by-4.0
	@$(SAMGRAFT) release "$$RUN" --out "$$OUT" $${LICENSE:+--license "$$LICENSE"} $(ARGS)

inspect: $(STAMP) ## describe a weights file | make inspect FILE=sam_vit_b.pth
	@$(SAMGRAFT) inspect "$$FILE"

doctor: $(STAMP) ## check environment, disk, devices, data and weights | make doctor
	@$(SAMGRAFT) doctor

test: $(STAMP) ## run the fast suite, offline | make test
	@$(BIN)/python -m pytest -n auto

test-slow: $(STAMP) ## run the suite with real shapes and long runs | make test-slow
	@$(BIN)/python -m pytest -n auto -m "not gpu and not weights"

test-gpu: $(STAMP) ## compare the encoders with the originals on this machine's GPU | make test-gpu
	@$(BIN)/python -m pytest -n 0 -m gpu

mutants: $(STAMP) ## plant bugs one at a time and count those that the tests find | make mutants ARGS="--minutes 30"
	@$(BIN)/python benchmarks/mutants.py $(ARGS)

check: $(STAMP) imports types site ## check format, lint, language, types, imports, spelling and docs | make check
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/python tests/check_language.py api shared ssl finetune
	@$(BIN)/codespell README.md CHANGELOG.md CONTRIBUTING.md docs api ssl finetune shared configs tests benchmarks

# Static checkers see the namespace package through a tree of links. import-linter needs an __init__.py in every
# package, which ssl/ must not have, so that its children are linked one by one next to an empty __init__.py.
.PHONY: linktree
linktree:
	@rm -rf build/types && mkdir -p build/types/samgraft/ssl && touch build/types/samgraft/ssl/__init__.py
	@ln -s ../../../api ../../../finetune ../../../shared build/types/samgraft/
	@for child in ssl/*; do ln -s "../../../../$$child" build/types/samgraft/ssl/; done

types: $(STAMP) linktree
	@MYPYPATH=build/types $(BIN)/mypy --namespace-packages --explicit-package-bases -p samgraft

imports: $(STAMP) linktree
	@PYTHONPATH=build/types $(BIN)/lint-imports

docs: $(STAMP) ## write docs/commands and docs/reference from the code | make docs
	@$(BIN)/python docs/tools/write_reference.py docs

site: $(STAMP) ## build the documentation into build/site/index.html | make site
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

format: $(STAMP) ## format the code | make format
	@$(BIN)/ruff format . && $(BIN)/ruff check --fix .

wheel: $(STAMP) ## build the wheel into dist/ | make wheel
	@$(BIN)/python -m samgraft.finetune.evaluation.viewer
	@$(BIN)/python -m build --wheel --installer uv

clean: ## remove build products (never data, weights or runs) | make clean
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
