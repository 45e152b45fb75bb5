# make tune    set up, then tune a real model on real data, publish, serve, chat
# make test    set up what tests need, then run them all
# make deploy  register the deployments and the automations with the Prefect server at PREFECT_API_URL
# make check   lint, types, layers, and what the wheel holds
# make images  build the images of pods: TAG=0.1.0 REGISTRY=my.registry/kaito-flows (see containers/build)
# make install install worker, watcher, CRD and rights in the cluster of your kubeconfig: OVERLAY=kind (see docs/)
# make lock    pin the packages of the images anew
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
UV := $(BIN)/uv pip install --quiet --python $(BIN)/python

# uv reads none of pip's settings: hand on those that name where packages come from.
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
ifdef PIP_INDEX_URL
export UV_DEFAULT_INDEX ?= $(PIP_INDEX_URL)
endif
# Bytecode is kept, or every command would compile the libraries again.
unexport PYTHONDONTWRITEBYTECODE
# Without a GPU, PyTorch's build for CPUs: the other one is gigabytes. A folder of wheels has its own.
TORCH_BACKEND ?= $(if $(UV_FIND_LINKS),,--torch-backend=auto)

.PHONY: tune deploy test check images install lock format clean
tune: $(VENV)/.local
	@$(BIN)/kaito-flows tune examples/smollm2-wordnet.yaml

test: $(VENV)/.dev
	@$(BIN)/python -m pytest

deploy: $(VENV)/.local
	@$(BIN)/prefect --no-prompt deploy --all --prefect-file deployments/prefect.yaml
	@$(BIN)/python -m kaito_flows.flows.automations

check: $(VENV)/.dev
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@rm -rf build
	@$(BIN)/python -m build --wheel --no-isolation --outdir build/dist >build.log 2>&1 || { cat build.log; exit 1; }; rm -f build.log
	@$(BIN)/python .ci/check_wheel.py build/dist/*.whl build/wheel
	@MYPYPATH=build/wheel $(BIN)/mypy -p kaito_flows
	@cd build/wheel && $(abspath $(BIN))/lint-imports --no-cache --no-logo --config ../../pyproject.toml

images:
	@containers/build $(if $(TAG),--tag $(TAG)) $(if $(REGISTRY),--registry $(REGISTRY))

OVERLAY ?= kind
install:
	@kubectl apply -k deployments/kubernetes/overlays/$(OVERLAY)
	@kubectl -n kaito-flows rollout status deployment/kaito-flows-worker
	@kubectl -n kaito-flows rollout status deployment/kaito-flows-watcher

lock: $(VENV)/.dev
	@VENV=$(VENV) .ci/lock

format: $(VENV)/.dev
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

clean:
	rm -rf $(VENV) build *.egg-info

$(BIN)/uv:
	@echo "Setting up $(VENV) ..."
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "Python's venv is missing: apt-get install python3-venv"; exit 1; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv

$(VENV)/.local: pyproject.toml setup.py | $(BIN)/uv
	@$(UV) $(TORCH_BACKEND) --editable '.[local]'
	@touch $@

$(VENV)/.dev: pyproject.toml setup.py | $(BIN)/uv
	@$(UV) $(TORCH_BACKEND) --editable '.[dev]'
	@touch $@ $(VENV)/.local
