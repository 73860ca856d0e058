# make test | resources | demo | bench | wheel | sdist | clean; TORCH=torch==2.14.1 and VENV=.venv-cuda pick another torch.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check -q
TORCH_STAMP := $(VENV)/.torch-$(TORCH)
DEPS_STAMP := $(VENV)/.deps-$(TORCH)
BUILD_STAMP := $(VENV)/.build-$(TORCH)

.PHONY: test resources demo bench build wheel sdist clean

# Triton's interpreter needs a process of its own; it runs beside the other, and its report comes last.
test: build
	@mkdir -p build
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(PY) -m pytest -q -m interpret -p no:cacheprovider tests > build/interpret.log 2>&1 & interpreted=$$!; \
	$(PY) -m pytest -q tests; status=$$?; \
	wait $$interpreted || status=$$?; cat build/interpret.log; exit $$status

# Every kernel for every GPU: minutes the first time, seconds while nothing that matters has changed.
resources: build
	$(PY) -m mtkernels.lab resources

demo: build
	$(PY) examples/finetune_tasks.py
	$(PY) -m mtkernels.bench --plot out

bench: build
	$(PY) -m mtkernels.bench

build: $(BUILD_STAMP)

# torch first and alone: a package that merely wants some torch must find this one.
$(TORCH_STAMP):
	$(PYTHON) -m venv $(VENV)
	$(PIP) install "$(TORCH)" "setuptools>=77" wheel
	touch "$@"

# Editable, so that tests and demos run the tree itself; the kernels are the next step, which rebuilds only what changed.
$(DEPS_STAMP): $(TORCH_STAMP) pyproject.toml setup.py
	MTKERNELS_BUILD_EXT=0 $(PIP) install --no-build-isolation -e ".[test,bench,demo]" "$(TORCH)"
	touch "$@"

$(BUILD_STAMP): $(DEPS_STAMP) $(shell find csrc -type f)
	$(PY) setup.py -q build_ext --inplace
	touch "$@"

wheel: build
	$(PY) -m build --wheel --no-isolation

sdist: $(DEPS_STAMP)
	$(PY) -m build --sdist --no-isolation

clean:
	rm -rf build dist *.egg-info mtkernels/_C*.so
	rm -f $(VENV)/.build-*
