# Every target works on a fresh clone: it builds .venv (python >= 3.11 with the venv module is all it needs) and goes on.
#   make moe          trains configs/moe.py into runs/moe; run it again to resume. So for every file in configs/
#   make test         the tests, in half an hour on two cores; make lint    ruff
#   make test-long    all of them, the cases of tests/long.py too, in an hour
#   make test-changed the tests that the changes since its last run concern; the first time, all. Programs that a test starts
#                     are not followed: make test has the last word
#   make test-next    the tests with the newest jax and flax that python3.12 gets
#   make faults       programs killed and interrupted, disks filled, files damaged, hostile input: the long part of what make
#                     test tries, a recipe of stages killed 100 times; writes tests/faults/README.md. make faults-fast
#                     is the part of it that make test has
#   make check-tpu-compile, make check-gpu-compile
#                     every kernel and a train step compiled for TPUs and for NVIDIA GPUs, none of which has to be here
#   make check-hf     folders that are written here, opened and computed by transformers 5 and 4, and converted by llama.cpp
#                     (torch: a GB of packages)
#   make check-gguf   GGUF files that are written here, opened and computed by llama.cpp; the first time it is built, which takes
#                     ten minutes of a core, cmake and a C++ compiler
#   make check-litert what is exported for LiteRT, in its own interpreter (465 MB of packages)
#   make check-iree   one decoding step compiled and run by IREE, another reader of StableHLO (578 MB)
#   make check-gcs    a run at gs://, against an emulator of Google's buckets
#   make lock         requirements.lock anew, from requirements.txt: every file that pip may take, by its hash
#   make check-supply pip check in the environments of both Pythons, installing by the hashes of requirements.lock, and licences
#   make bench        training and decoding against PyTorch, on the device at hand
#   make bench-ops    every operation against its roofline and its baselines
#   make smollm2      fetches SmolLM2-135M-Instruct (98 MB, Apache-2.0) into models/smollm2, for --run=models/smollm2
#   make notebooks    runs the notebooks of experiments/ anew, from the results beside them
#   ARGS passes more words on: make moe ARGS="--config.train.steps=50"
PYTHON ?= python3
PYTHON_NEXT ?= python3.12
VENV := .venv
NEXT := .venv-next
TPU := .venv-tpu
CUDA := .venv-cuda
LITERT := .venv-litert
LLAMA := .venv-llama
HF := .venv-hf
IREE := .venv-iree
TOOLS := .venv-tools
GCS := .venv-gcs
PIP := -m pip install --quiet --disable-pip-version-check
FAULTS := tests/faults/recipe_faults_test.py tests/random_configs_test.py tests/faults tests/runs/damage_test.py tests/runs/hostile_test.py \
  tests/runs/several_test.py tests/config/leaves_test.py tests/words_test.py tests/system/workdir_test.py
CONFIGS := $(basename $(notdir $(wildcard configs/*.py)))

.PHONY: $(CONFIGS) test test-long test-changed test-next faults faults-fast check-tpu-compile check-gpu-compile check-hf check-gguf check-litert check-iree check-gcs \
  lock check-supply lint bench bench-ops notebooks smollm2 clean

$(VENV)/.stamp: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "python >= 3.11 is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python $(PIP) -r requirements.txt
	touch $@

$(NEXT)/.stamp: pyproject.toml
	$(PYTHON_NEXT) -m venv $(NEXT)
	$(NEXT)/bin/python $(PIP) --upgrade -e '.[dev]'
	touch $@

# libtpu holds the compiler of TPUs; this is the version that jax 0.10.2 asks for.
$(TPU)/.stamp: requirements.txt
	$(PYTHON) -m venv $(TPU)
	$(TPU)/bin/python $(PIP) -r requirements.txt 'libtpu==0.0.42.*'
	touch $@

# The compilers of NVIDIA GPUs without the libraries that only a GPU can run: cuBLAS, cuDNN and NCCL stay away.
$(CUDA)/.stamp: pyproject.toml
	$(PYTHON_NEXT) -m venv $(CUDA)
	$(CUDA)/bin/python $(PIP) -e '.[dev]' jax==0.11.2 jaxlib==0.11.2
	$(CUDA)/bin/python $(PIP) --no-deps jax-cuda13-plugin==0.11.2 jax-cuda13-pjrt==0.11.2 nvidia-cuda-nvcc nvidia-nvvm
	touch $@

# The converter and the interpreter are pinned in the extra; one of them needs an older typing_extensions than requirements.txt.
$(LITERT)/.stamp: pyproject.toml
	$(PYTHON) -m venv $(LITERT)
	$(LITERT)/bin/python $(PIP) -e '.[dev,litert]' jax==0.10.2 jaxlib==0.10.2 flax==0.12.8
	touch $@

# llama.cpp has no wheels: it is compiled, for the processor at hand.
$(LLAMA)/.stamp: requirements.txt
	$(PYTHON) -m venv $(LLAMA)
	$(LLAMA)/bin/python $(PIP) -r requirements.txt gguf==0.19.0 llama-cpp-python==0.3.36
	touch $@

# The engines that folders of Hugging Face are written for, the converter of llama.cpp, which reads them too, and the last of
# transformers 4, which knows the older spelling of a config.
$(HF)/.stamp: requirements.txt
	$(PYTHON) -m venv $(HF)
	$(HF)/bin/python $(PIP) -r requirements.txt torch==2.13.0 transformers==5.24.0 accelerate compressed-tensors==0.20.1 sentencepiece
	$(HF)/bin/python -m pip download --quiet --no-deps --no-binary :all: --dest $(HF) llama-cpp-python==0.3.36
	tar -xzf $(HF)/llama_cpp_python-0.3.36.tar.gz -C $(HF)
	$(HF)/bin/python $(PIP) --target $(HF)/transformers4 --no-deps transformers==4.57.3 huggingface_hub==0.36.2 tokenizers==0.22.2 \
	  requests urllib3 idna certifi charset_normalizer
	touch $@

$(IREE)/.stamp: requirements.txt
	$(PYTHON) -m venv $(IREE)
	$(IREE)/bin/python $(PIP) -r requirements.txt
	$(IREE)/bin/python $(PIP) --no-deps iree-base-compiler==3.13.0 iree-base-runtime==3.13.0
	touch $@

$(GCS)/.stamp: requirements.txt
	$(PYTHON) -m venv $(GCS)
	$(GCS)/bin/python $(PIP) -r requirements.txt gcsfs==2026.10.1 gcp-storage-emulator==2026.7.19
	touch $@

$(TOOLS)/.stamp: Makefile
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python $(PIP) uv==0.13.9 pip-licenses==5.5.5
	touch $@

$(CONFIGS): %: $(VENV)/.stamp
	$(VENV)/bin/python -m efficient_lm.main --config=configs/$*.py --workdir=runs/$* $(ARGS)

test: $(VENV)/.stamp
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile --max-worker-restart 0 $(ARGS)

test-long: $(VENV)/.stamp
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile --max-worker-restart 0 --long $(ARGS)

test-changed: $(VENV)/.stamp
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile --testmon $(ARGS)

test-next: $(NEXT)/.stamp
	$(NEXT)/bin/python -m pytest -n 2 --dist loadfile --max-worker-restart 0 --long $(ARGS)

# The page is written also where a test has failed, and says so. What takes longest comes first.
faults: $(VENV)/.stamp
	rm -rf build/faults
	-$(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0 --long --kills=100 \
	  --tried=build/faults $(FAULTS) $(ARGS)
	$(VENV)/bin/python -m tests.faults.table build/faults

faults-fast: $(VENV)/.stamp
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0 $(FAULTS) $(ARGS)

check-tpu-compile: $(TPU)/.stamp
	JAX_PLATFORMS=cpu $(TPU)/bin/python -m pytest -n 2 tests/compile $(ARGS)

check-gpu-compile: $(CUDA)/.stamp
	JAX_PLATFORMS=cpu $(CUDA)/bin/python -m pytest -n 2 tests/compile $(ARGS)

check-litert: $(LITERT)/.stamp
	JAX_PLATFORMS=cpu $(LITERT)/bin/python -m pytest tests/interop/litert_test.py $(ARGS)

check-gguf: $(LLAMA)/.stamp
	JAX_PLATFORMS=cpu $(LLAMA)/bin/python -m pytest -s tests/interop/gguf/llama_cpp_test.py tests/interop/gguf/packing_test.py $(ARGS)

check-hf: $(HF)/.stamp
	JAX_PLATFORMS=cpu LLAMA_CPP=$(HF)/llama_cpp_python-0.3.36/vendor/llama.cpp $(HF)/bin/python -m pytest -n 2 \
	  tests/interop/targets tests/interop/tokenizer_files_test.py tests/interop/export_test.py tests/interop/gguf/converter_test.py $(ARGS)
	JAX_PLATFORMS=cpu PYTHONPATH=$(HF)/transformers4 $(HF)/bin/python -m pytest -n 2 tests/interop/targets/folder_test.py

check-iree: $(IREE)/.stamp
	JAX_PLATFORMS=cpu $(IREE)/bin/python -m pytest tests/interop/stablehlo/iree_test.py $(ARGS)

check-gcs: $(GCS)/.stamp
	JAX_PLATFORMS=cpu $(GCS)/bin/python -m pytest tests/runs/gcs_test.py $(ARGS)

lock: $(TOOLS)/.stamp
	$(TOOLS)/bin/uv pip compile requirements.txt --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
	  --no-emit-index-url --quiet --output-file requirements.lock

check-supply: $(VENV)/.stamp $(NEXT)/.stamp $(TOOLS)/.stamp
	$(VENV)/bin/python -m pip check
	$(NEXT)/bin/python -m pip check
	$(VENV)/bin/python $(PIP) --dry-run --ignore-installed --require-hashes -r requirements.lock
	$(NEXT)/bin/python $(PIP) --dry-run --ignore-installed --require-hashes -r requirements.lock
	$(TOOLS)/bin/pip-licenses --python=$(VENV)/bin/python --format=json | $(PYTHON) -c 'import json, sys; \
	  [print(one["Name"], one["Version"], one["License"].split("\n")[0].strip() or "see its LICENSE", sep="\t") for one in json.load(sys.stdin)]'

lint: $(VENV)/.stamp
	$(VENV)/bin/python -m ruff check .

bench: $(VENV)/.stamp
	$(VENV)/bin/python -m efficient_lm.bench $(ARGS)

bench-ops: $(VENV)/.stamp
	$(VENV)/bin/python -m efficient_lm.bench --ops $(ARGS)

notebooks: $(VENV)/.stamp
	$(VENV)/bin/python -m jupytext --quiet --to ipynb experiments/*/notebook.py
	$(VENV)/bin/jupyter-execute --inplace experiments/*/notebook.ipynb

smollm2: $(VENV)/.stamp
	$(VENV)/bin/python -m efficient_lm.interop.smollm2

clean:
	rm -rf $(VENV) $(NEXT) $(TPU) $(CUDA) $(HF) $(LLAMA) $(LITERT) $(IREE) $(TOOLS) .testmondata* .pytest_cache .ruff_cache .hypothesis
