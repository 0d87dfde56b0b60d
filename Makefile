# make test | make bench on a bare machine (python3 with venv, a C++ compiler): everything else is set up in .venv.
PYTHON ?= python3
TORCH ?= torch==2.13.0
TRITON ?= triton==3.6.0
VENV ?= .venv
BUILD_TOOLS = "setuptools>=77" wheel cmake ninja "pybind11>=2.13"
python = $(VENV)/bin/python
native = setup.py build_backend.py CMakeLists.txt pyproject.toml $(shell find csrc -type f)

.PHONY: test bench gallery native emulated gpu wheel check-abi format lint

test: $(VENV)/built
	$(python) -m pytest

bench: $(VENV)/built
	$(python) -m genkern bench
	$(python) bench/vae_digits.py

gallery: $(VENV)/built
	$(python) bench/gallery.py

$(VENV)/built: $(native)
	test -x $(python) || $(PYTHON) -m venv $(VENV)
	$(python) -m pip install $(BUILD_TOOLS) "$(TORCH)" "$(TRITON)"
	GENKERN_REQUIRE=cpu $(python) -m pip install --no-build-isolation -e ".[test,peers,dev]"
	touch $@

# The inner loop of kernel work: only the CPU library of this machine's instruction set, rebuilt where a source changed.
SET ?= $(shell $(python) -c "import torch; print({'AVX512': 'avx512', 'AVX2': 'avx2'}.get(torch.backends.cpu.get_cpu_capability(), 'base'))")
configure = test -f build/native/build.ninja || $(python) -m cmake -S . -B build/native -GNinja -DGENKERN_HOST=OFF \
  -DGENKERN_TORCH_DIR=$$($(python) -c "import os, torch; print(os.path.dirname(torch.__file__))")
native:
	$(configure)
	$(python) -m cmake --build build/native --target _C_cpu_$(SET)
	cp build/native/_C_cpu_$(SET).so genkern/.new.so && mv genkern/.new.so genkern/_C_cpu_$(SET).so  # processes keep the old one

# The CUDA sources for the CPU, where the tests of GENKERN_EMULATED_LIBRARY=$PWD/build/native/_C_emulated.so run them.
emulated:
	$(configure)
	$(python) -m cmake build/native -DGENKERN_EMULATED=ON
	$(python) -m cmake --build build/native --target _C_emulated

# On a machine with an NVIDIA GPU, into its own interpreter: install, tests, compute-sanitizer, verify, benches.
gpu:
	PYTHON=$(PYTHON) tools/gpu.sh

# One wheel per Python version, since the host module is built for one; the torch-facing libraries inside are the same.
wheel: $(VENV)/built
	GENKERN_REQUIRE=cpu $(python) -m pip wheel --no-build-isolation --no-deps -w dist .
	$(python) tools/manylinux.py dist/genkern-*-linux_*.whl

# The one binary on the oldest and the newest torch: scratch environments of several gigabytes, so on demand only.
ABI_TORCHES ?= 2.11.0 2.15.0
check-abi: wheel
	sh tools/check_abi.sh $(python) $(ABI_TORCHES)

format: $(VENV)/built
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(shell find csrc -type f)

lint: $(VENV)/built
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
