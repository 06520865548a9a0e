# make demo   build and run the main job: a small Mixtral on our kernels beside transformers
# make test   build and run all tests
# make bench  build and print the speed table of this machine
# make gpu-check   tests, sanitizers and benchmarks that need an NVIDIA GPU, with the current python (no environment is made, nothing is
#                  installed); PARTS="tests graph sanitizer bench attention silicon", OUT=folder; for less of bench (the expert layer)
#                  TOKENS="1 16 4096", ROUTINGS="natural", of attention LENGTHS="4096 16384", BATCHES="1 16"; LIMIT=seconds for everything
PYTHON ?= python3
BIN := .venv/bin
PARTS =
OUT = build/gpu-check
TOKENS =
ROUTINGS =
LENGTHS =
BATCHES =
LIMIT =

.PHONY: demo test bench build gpu-check clean

demo: build
	$(BIN)/python -m mixtral_model demo

test: build
	$(BIN)/python -m pytest

bench: build
	$(BIN)/python -m mixtral_bench

# Incremental: CMake rebuilds what changed in build/ and installs it into mixtral_ext/lib.
build: .venv/requirements.installed
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .

.venv/requirements.installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	touch $@

gpu-check:
	PYTHONPATH=$(CURDIR):$(CURDIR)/python:$$PYTHONPATH $(PYTHON) -m mixtral_bench.gpu_check --out $(OUT) \
	  $(if $(PARTS),--parts $(PARTS)) $(if $(TOKENS),--tokens $(TOKENS)) $(if $(ROUTINGS),--routings $(ROUTINGS)) \
	  $(if $(LENGTHS),--lengths $(LENGTHS)) $(if $(BATCHES),--batches $(BATCHES)) $(if $(LIMIT),--seconds $(LIMIT))

clean:
	rm -rf .venv build mixtral_ext/lib mixtral_ext/include
