# Set-up and tasks. Everything is installed into $(VENV); nothing outside this folder is touched.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check install --quiet -c constraints.txt
SOURCES := pyproject.toml CMakeLists.txt constraints.txt $(shell find csrc instembed -name '*.[ch]*' -o -name '*.py*' | grep -v pycache)
CPP := $(shell find csrc tests/cpp -name '*.h' -o -name '*.cpp')

.PHONY: demo test sanitize lint format bench clean

demo: $(VENV)/demo ## train on crowded scenes, group them, compare, draw
	$(RUN) examples/demo.py

test: $(VENV)/test ## all tests
	MALLOC_PERTURB_=1 $(RUN) -m pytest  # fresh memory holds huge numbers: what is not written shows

sanitize: $(VENV)/test ## native tests under AddressSanitizer and UndefinedBehaviorSanitizer
	$(VENV)/bin/cmake -S . -B build/sanitize -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(VENV))/bin/ninja \
	  -DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_FLAGS_DEBUG='-O1 -g1' -DINSTEMBED_PYTHON=OFF -DINSTEMBED_TESTS=ON -DINSTEMBED_WERROR=ON \
	  -DINSTEMBED_SANITIZE=address,undefined
	$(VENV)/bin/cmake --build build/sanitize
	OMP_NUM_THREADS=2 build/sanitize/native_tests

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
$(VENV)/lint: EXTRAS := lint,test,demo
$(VENV)/demo $(VENV)/test $(VENV)/bench $(VENV)/lint: $(SOURCES) | $(VENV)/bin/python
	$(PIP) '.[$(EXTRAS)]'
	touch $@
