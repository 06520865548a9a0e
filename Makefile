# make demo   build and run the main job: a small Mixtral on our kernels beside transformers
# make test   build and run all tests
# make bench  build and measure all ops on this machine (an hour on two cores): build/bench.json
# make gpu-check   tests, sanitizers, benchmarks and models that need an NVIDIA GPU, with the current python (no environment is made, nothing is
#                  installed); PARTS="tests graph sanitizer moe attention model silicon", each at most 9 minutes; OUT=folder for logs and results;
#                  CASES='T=(1|4096)$$' for fewer rows of moe and attention; MODELS="mistral-7b"; LIMIT=seconds for everything
PYTHON ?= python3
BIN := .venv/bin
PARTS =
OUT = build/gpu-check
CASES =
MODELS =
LIMIT =

.PHONY: demo test bench build gpu-check clean

demo: build
	$(BIN)/python -m mixtral_model demo

test: build
	$(BIN)/python -m pytest --numprocesses=2 --dist=loadfile

bench: build
	$(BIN)/python -m mixtral_bench run --json build/bench.json

# Incremental: CMake rebuilds what changed in build/ and installs it into mixtral_ext/lib.
build: .venv/requirements.installed
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .

.venv/requirements.installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	touch $@

gpu-check:
	PYTHONPATH=$(CURDIR):$(CURDIR)/python:$$PYTHONPATH $(PYTHON) -m mixtral_bench.gpu_check --out $(OUT) \
	  $(if $(PARTS),--parts $(PARTS)) $(if $(CASES),--cases '$(CASES)') $(if $(MODELS),--models $(MODELS)) $(if $(LIMIT),--seconds $(LIMIT))

clean:
	rm -rf .venv build mixtral_ext/lib mixtral_ext/include
