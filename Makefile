# Set-up and tasks. Everything is installed into $(VENV); nothing outside this folder is touched.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check install --quiet -c constraints.txt
SOURCES := pyproject.toml CMakeLists.txt constraints.txt $(shell find csrc instembed -name '*.[ch]*' -o -name '*.py*' | grep -v pycache)
CPP := $(shell find csrc tests/cpp -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
CMAKE = $(VENV)/bin/cmake -S . -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(VENV))/bin/ninja -DINSTEMBED_WERROR=ON
ARCHITECTURES ?= 75,90
# What is installed here has its CUDA kernels as PTX, which a GPU compiles when it first runs them: the
# architectures of a wheel take many minutes.
export CMAKE_ARGS := -DINSTEMBED_CUDA_ARCHITECTURES=compute_75 $(CMAKE_ARGS)

.PHONY: cuda demo gpu simulator test sanitize lint format bench clean

demo: $(VENV)/demo ## train on crowded scenes, group them, compare, draw
	$(RUN) examples/demo.py

test: $(VENV)/test ## all tests
	MALLOC_PERTURB_=1 $(RUN) -m pytest  # fresh memory holds huge numbers: what is not written shows

sanitize: $(VENV)/test ## native tests under AddressSanitizer and UndefinedBehaviorSanitizer
	$(CMAKE) -B build/sanitize -DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_FLAGS_DEBUG='-Og -g1' -DINSTEMBED_PYTHON=OFF \
	  -DINSTEMBED_CUDA=OFF -DINSTEMBED_TESTS=ON -DINSTEMBED_SIMULATOR=ON -DINSTEMBED_SANITIZE=address,undefined
	$(VENV)/bin/cmake --build build/sanitize
	OMP_NUM_THREADS=2 build/sanitize/native_tests
	OMP_NUM_THREADS=2 build/sanitize/simulated_kernels 1

simulator: $(VENV)/test ## CUDA kernels on the CPU: every kernel under 20 random schedules
	$(RUN) -m pip --disable-pip-version-check install --quiet pybind11
	$(CMAKE) -B build/simulator -DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_FLAGS_DEBUG='-O2 -g1' -DINSTEMBED_CUDA=OFF \
	  -DINSTEMBED_SIMULATOR=ON -DINSTEMBED_TESTS=OFF -DINSTEMBED_KERNELS=$$(ls -t $(abspath build)/cp*/libinstembed_kernels.a | head -1) \
	  -DPython_EXECUTABLE=$(abspath $(RUN)) -Dpybind11_DIR=$$($(RUN) -m pybind11 --cmakedir)
	$(VENV)/bin/cmake --build build/simulator --target simulated_kernels simulated_core
	build/simulator/simulated_kernels 20 mean_shift & grouping=$$!; \
	  build/simulator/simulated_kernels 20 simulator associative_embedding cosine_margin discriminative gather_at \
	    group_keypoints group_on_sphere instance_pool label_statistics pairwise_similarity recurrent_mean_shift \
	    sample_pixels seeds && \
	  $(RUN) -m pytest tests/test_cuda*.py --simulated-core build/simulator/simulated_core*.so && wait $$grouping

cuda: $(VENV)/test ## CUDA kernels compiled for ARCHITECTURES (all-major: those of a wheel); no spills, no local memory
	@command -v nvcc > /dev/null || { echo '*** nvcc was not found: THE CUDA KERNELS WERE NOT COMPILED ***'; exit 0; }; \
	set -e; rm -rf build/cuda; mkdir -p build; \
	$(CMAKE) -B build/cuda -DINSTEMBED_PYTHON=OFF -DINSTEMBED_CUDA=ON -DINSTEMBED_CUDA_ARCHITECTURES=$(ARCHITECTURES) > build/cuda.log; \
	$(VENV)/bin/cmake --build build/cuda --target instembed_cuda -v >> build/cuda.log 2>&1 || { tail -50 build/cuda.log; exit 1; }; \
	$(RUN) tests/cpp/check_resources.py build/cuda.log $$(echo $(ARCHITECTURES) | tr -c '0-9\n' ' ')

gpu: ## on a machine with a GPU and torch: build in place, tests, compute-sanitizer, benchmarks
	PYTHON=$(PYTHON) CMAKE_ARGS= tests/gpu.sh

lint: $(VENV)/lint ## style and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $(CPP)
	$(VENV)/bin/mypy

format: $(VENV)/lint ## rewrite sources in the project's style
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(CPP)

bench: $(VENV)/bench ## throughput against PyTorch references and the memory's speed
	$(RUN) -m benchmarks

clean:
	rm -rf $(VENV) build dist outputs

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip

# The package is built in an isolated environment that has no torch.
$(VENV)/demo: EXTRAS := demo,sklearn
$(VENV)/test: EXTRAS := test,demo
$(VENV)/bench: EXTRAS := bench
$(VENV)/demo $(VENV)/test $(VENV)/bench: $(SOURCES) | $(VENV)/bin/python
	$(PIP) '.[$(EXTRAS)]'
	touch $@

# mypy reads what the tests and examples import.
$(VENV)/lint: pyproject.toml | $(VENV)/test
	$(PIP) --group lint
	touch $@
