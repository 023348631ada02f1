# `make demo` and `make test` are all a newcomer needs; both make the environment first and reuse it afterwards.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WORKERS ?= 2
LLAMA ?= -DGGML_NATIVE=OFF -DGGML_AVX512=ON -DGGML_AVX512_VNNI=ON -DGGML_AVX512_VBMI=ON -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON

.PHONY: demo test bench pareto install clean

install: $(STAMP)

$(STAMP): pyproject.toml requirements-lab.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)" -e ".[test]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-lab.txt
	touch $@

# Five methods on a real sentence encoder, measured side by side with `unchanged` and `bf16`; the report opens in a browser.
demo: $(STAMP)
	rm -rf demo
	$(BIN)/formulary compare llm-int8 gptq greenformers-lrt minilm xattention --model lab:minilm --data lab:kjv --out demo
	@echo "Open demo/report.html in a browser."

# Leave `-n` to WORKERS; one thread each, so that results do not depend on the number of cores.
test: $(STAMP)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(WORKERS)

# Ours beside the peers that run on a CPU, in the same rounds; tables and plots go to docs/benchmarks. `make bench ROUNDS=6` is a quick
# look, with the fewest rounds that have an interval. llama.cpp is built without AMX, on which its products crash.
bench: MEASURE = $(BIN)/python benchmarks/$(1).py $(if $(ROUNDS),$(or $(2),--rounds $(ROUNDS)))
bench: $(STAMP)
	CMAKE_ARGS="$(LLAMA)" $(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)" -e ".[bench]"
	$(call MEASURE,start)
	$(call MEASURE,encoder)
	$(call MEASURE,decoder)
	$(call MEASURE,attention,--quick)
	$(call MEASURE,sparse,--quick)
	$(call MEASURE,scans)
	test -x $(VENV)-peers/bin/python || $(PYTHON) -m venv $(VENV)-peers
	$(VENV)-peers/bin/python -m pip install --quiet --disable-pip-version-check "$(TORCH)" setuptools wheel ninja
	$(VENV)-peers/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -r benchmarks/requirements-quantizing.txt
	$(call MEASURE,quantizing,--rounds 1) --peers $(VENV)-peers/bin/python

# Every training-free method of the catalogue on three real models; a page and a plot of each in docs/benchmarks, after an hour or two.
pareto: $(STAMP)
	$(BIN)/python benchmarks/pareto.py

clean:
	rm -rf $(VENV) $(VENV)-peers demo build dist
