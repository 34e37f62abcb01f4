# Everything runs in .venv, made on first use. PYTHON picks the interpreter that makes it.
PYTHON ?= python3
VENV := .venv
TORCH := .venv-torch
GEMMA := .venv-gemma
TF4 := .venv-tf4
OLDEST := .venv-oldest
AUDIT := .venv-audit
TPU := .venv-tpu
BIN := $(VENV)/bin

.PHONY: help install demo test test-long test-interop test-oldest test-gemma test-transformers4 lint bench bench-torch bench-tpu bench-collectives bench-quality audit clean

help: ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(VENV)/.installed ## install the package into .venv

demo: $(VENV)/.demo ## fine-tune a real BERT on real reviews, save, load, merge (about 5 minutes)
	$(BIN)/python examples/classify.py

test: $(VENV)/.dev ## lint, type-check and run all the tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python -m pytest -n 2

test-long: $(VENV)/.dev ## 100,000 broken files, 200 kills of runs and of saves (about 25 minutes)
	FUZZ=100000 FUZZ_SEED=$${SEED:-1} FAULTS=200 $(BIN)/python -m pytest -n 2 --dist worksteal \
	  tests/test_fuzz.py tests/test_faults.py

test-oldest: $(OLDEST)/.installed ## the tests on the oldest versions that pyproject allows
	$(OLDEST)/bin/python -m pytest -n 2

test-interop: $(VENV)/.dev $(TORCH)/.installed ## compare with torch, PEFT and loralib, run anew with another seed
	mkdir -p $(TORCH)/references
	for library in peft loralib loralib_files; do \
	  $(TORCH)/bin/python tests/references/make_$$library.py $(TORCH)/references 1 || exit 1; done
	JAXLORA_REFERENCES=$(TORCH)/references $(BIN)/python -m pytest \
	  tests/test_parity.py tests/test_interop_loralib.py
	for form in saved peft loralib; do \
	  rm -rf $(TORCH)/$$form && mkdir $(TORCH)/$$form && \
	  $(BIN)/python tests/references/check_$$form.py write $(TORCH)/$$form && \
	  $(TORCH)/bin/python tests/references/check_$$form.py check $(TORCH)/$$form || exit 1; done

test-gemma: $(GEMMA)/.installed ## Google's gemma library, in an environment of its own
	$(GEMMA)/bin/python -m pytest tests/test_interop_gemma.py

test-transformers4: $(TF4)/.installed ## the Flax models of transformers 4, in an environment of their own
	$(TF4)/bin/python -m pytest tests/test_transformers4.py

lint: $(VENV)/.dev ## format and lint in place
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/pyright

bench: $(VENV)/.dev ## time everything and make BENCHMARKS.md (about 20 minutes; a torch part: make bench-torch)
	for name in step inference merging memory growth; do $(BIN)/python -m benchmarks.$$name || exit 1; done
	$(BIN)/python -m benchmarks.report

bench-torch: $(VENV)/.dev $(TORCH)/.installed ## the training step in torch and PEFT, and BENCHMARKS.md again (about 3 minutes)
	$(TORCH)/bin/python -m benchmarks.step_torch
	$(BIN)/python -m benchmarks.report

bench-tpu: $(TPU)/.installed ## what a TPU's compiler makes of a step, without a TPU, and BENCHMARKS.md again (20 minutes)
	$(TPU)/bin/python -m benchmarks.tpu
	$(TPU)/bin/python -m benchmarks.collectives --topology v5e:2x4
	$(TPU)/bin/python -m benchmarks.report

bench-collectives: $(VENV)/.dev ## what a step on a mesh sends, from its HLO
	$(BIN)/python -m benchmarks.collectives

bench-quality: $(VENV)/.dev $(TORCH)/.installed ## LoRA against full fine-tuning and PEFT (hours; SST2=FOLDER adds SST-2)
	$(BIN)/python benchmarks/quality.py $(if $(SST2),--sst2 $(SST2))
	$(TORCH)/bin/python benchmarks/quality_peft.py
	$(BIN)/python benchmarks/quality.py --no-train --markdown docs/quality.md

audit: $(VENV)/.dev ## known weaknesses of what is installed
	$(PYTHON) -m venv $(AUDIT) && $(AUDIT)/bin/pip install -q --disable-pip-version-check pip-audit
	$(BIN)/python -m pip freeze --exclude-editable > $(AUDIT)/all.txt
	$(AUDIT)/bin/pip-audit --strict --no-deps --disable-pip -s $(or $(SERVICE),pypi) -r $(AUDIT)/all.txt || \
	  { echo "audit: a weakness above, or a package that $(or $(SERVICE),pypi) could not be asked about: not a pass (or SERVICE=osv)"; exit 1; }

clean: ## remove .venv and caches
	rm -rf $(VENV) $(TORCH) $(GEMMA) $(TF4) $(OLDEST) $(AUDIT) $(TPU) .pytest_cache .ruff_cache .hypothesis

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install -q --disable-pip-version-check -e .
	touch $@

$(VENV)/.demo: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[train]'
	touch $@

$(VENV)/.dev: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[dev]'
	touch $@

$(TORCH)/.installed:
	$(PYTHON) -m venv $(TORCH)
	$(TORCH)/bin/python -m pip install -q --disable-pip-version-check \
	  torch==2.13.0+cpu peft==0.21.2 loralib==0.1.2 'transformers>=5' numpy rich
	touch $@

# gemma declares more than it imports, and versions that exclude one another: named one by one.
$(GEMMA)/.installed:
	$(PYTHON) -m venv $(GEMMA)
	$(GEMMA)/bin/python -m pip install -q --disable-pip-version-check -e . pytest \
	  'sentencepiece==0.2.0' 'etils[edc,enp,epath,epy,etree]' einops jaxtyping treescope grain \
	  typeguard lark chex clu immutabledict ml_collections tabulate graphviz mediapy pandas altair \
	  scikit-image tensorboard tensorflow-cpu tensorflow_datasets
	$(GEMMA)/bin/python -m pip install -q --disable-pip-version-check --no-deps \
	  gemma==3.3.0 kauldron==1.4.2
	touch $@

$(TF4)/.installed:
	$(PYTHON) -m venv $(TF4)
	$(TF4)/bin/python -m pip install -q --disable-pip-version-check -e . pytest transformers==4.57.6
	touch $@

$(TPU)/.installed:
	$(PYTHON) -m venv $(TPU)
	$(TPU)/bin/python -m pip install -q --disable-pip-version-check -e '.[train,bench,topology]'
	touch $@

$(OLDEST)/.installed:
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install -q --disable-pip-version-check -e '.[dev]' \
	  jax==0.10.2 jaxlib==0.10.2 flax==0.12.8 optax==0.2.8 orbax-checkpoint==0.12.8
	touch $@
