# `make` lists the targets. Each sets up what it needs in .venv first; the next time that is fast.

PYTHON ?= python3
DOCKER ?= docker
IMAGE ?= agenticai-websocket

VENV := .venv
BIN := $(VENV)/bin
# Two sets of packages, each with a stamp of its own: the small one runs the platform, and the other,
# which contains it, tests it. The figures were measured with an empty pip cache.
RUNNABLE := $(VENV)/.runnable
INSTALLED := $(VENV)/.installed
LOCAL_COST := 30 MB to download, 125 MB on disk, half a minute or less
DEV_COST := 250 MB to download, 860 MB on disk, one or two minutes
PIN = $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	--no-strip-extras --no-header $(if $(UPGRADE),--upgrade)
# What tests of the browser client need; without npm they are skipped, and say so.
CLIENT_INSTALLED := $(if $(shell command -v npm),client/node_modules/.package-lock.json)
# The benchmark's peers: those from Python, and where there is npm, those for Node.
PEERS_INSTALLED := $(VENV)/.peers-installed \
	$(if $(shell command -v npm),bench/peers/node_modules/.package-lock.json)
# The AWS CLI, for the deployments that tests play through; its pins differ from ours.
AWS_CLI_INSTALLED := $(VENV)/aws-cli/.installed

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: run image test lint audit chaos streams rehearsal deployments hostile conformance fuzz bench bench-quick requirements clean help

##@ Run it

run: $(RUNNABLE) ## Run a stand-in for AWS, sample agents and the server (TASKS=2 PORT=8080 FIFO=1)
	@$(BIN)/python -m local --end-with-parent $(if $(PORT),--port $(PORT)) \
		$(if $(filter-out 0 no false off,$(FIFO)),--fifo)

image: ## Build the container image (DOCKER=podman, IMAGE=name:tag)
	$(DOCKER) build --tag $(IMAGE) .

##@ Check it

test: $(INSTALLED) $(CLIENT_INSTALLED) $(AWS_CLI_INSTALLED) ## Run all tests, and measure the coverage of server.py; or some (ARGS="-k name -x")
	$(BIN)/python -m $(if $(ARGS),pytest --cov=server --cov-fail-under=0 $(ARGS),tests $(if $(AGAIN),--again))

lint: $(INSTALLED) ## Check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

audit: $(INSTALLED) ## Look for known vulnerabilities in the packages and the code
	$(BIN)/python -m tests.audit

##@ Try to break it: each run prints what it found

chaos: $(INSTALLED) ## Kill, cut and disturb three tasks, and count every event (SEEDS=100)
	$(BIN)/python -m tests.chaos --seeds $(or $(SEEDS),100) --faults mixed

streams: $(INSTALLED) $(CLIENT_INSTALLED) ## Have texts grow while tasks, agents and pages die, and look at each (SEEDS=30)
	$(BIN)/python -m tests.streams --seeds $(or $(SEEDS),30)

rehearsal: $(INSTALLED) ## Replace a task behind a real proxy under 500 clients (ARGS="--trigger sigterm")
	$(BIN)/python -m tests.rehearsal $(ARGS)

deployments: $(INSTALLED) $(AWS_CLI_INSTALLED) ## Play every deployment through, by the real shell and AWS CLI
	$(BIN)/python -m pytest --no-cov tests/test_deployment.py tests/deployment/every_case.py $(ARGS)

hostile: $(INSTALLED) ## Attack a server with 100 honest clients on it, and print what they felt
	$(BIN)/python -m tests.hostile

conformance: $(INSTALLED) ## Run the Autobahn test suite against the connection class
	$(BIN)/python -m tests.conformance

fuzz: $(INSTALLED) ## Feed the parsers random and mutated input (SECONDS=600)
	@$(BIN)/pip install --quiet --require-hashes --requirement tests/fuzz/requirements.txt || true
	$(BIN)/python -m tests.fuzz --seconds $(or $(SECONDS),600)

##@ Measure it

bench: $(INSTALLED) $(PEERS_INSTALLED) ## Measure beside comparable servers, and rewrite docs/PERFORMANCE.md
	$(BIN)/python -m bench $(ARGS)

bench-quick: $(INSTALLED) $(PEERS_INSTALLED) ## Measure the most telling part, in a few minutes
	$(BIN)/python -m bench --quick $(ARGS)

##@ Maintain it

requirements: $(INSTALLED) ## Pin the packages anew after a change of *.in (UPGRADE=1: newest versions)
	$(BIN)/pip install --quiet --require-hashes --requirement tests/audit/uv.txt
	$(PIN) --output-file requirements.txt requirements.in
	$(PIN) --output-file requirements-local.txt requirements-local.in
	$(PIN) --output-file requirements-dev.txt requirements-dev.in
	$(PIN) --constraint requirements-dev.txt \
		--output-file bench/requirements.txt bench/requirements.in
	$(PIN) --output-file tests/deployment/aws-cli.txt tests/deployment/aws-cli.in

clean: ## Remove .venv and the tools' caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage htmlcov

help: ## Show this list
	@awk -F ':.*## ' '/^##@ / {printf "\n%s\n", substr($$0, 5)} \
		/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# What must be there before anything can be installed.
define check_python
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "This needs Python 3.11 or newer, and $(PYTHON) is not. Install one and name it:" \
			"make PYTHON=python3.13 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "$(PYTHON) cannot make virtual environments here. On Debian or Ubuntu:" \
			"apt-get install python3-venv" >&2; exit 1; }
endef

$(RUNNABLE): requirements-local.txt
	$(check_python)
	@$(PYTHON) local/install.py $(VENV) $< "$(LOCAL_COST)"
	@touch $@

$(INSTALLED): requirements-dev.txt
	$(check_python)
	@$(PYTHON) local/install.py $(VENV) $< "$(DEV_COST)"
	@touch $@ $(RUNNABLE)

$(AWS_CLI_INSTALLED): tests/deployment/aws-cli.txt $(INSTALLED)
	@$(PYTHON) -m venv $(@D)
	@$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r $<
	@touch $@

$(VENV)/.peers-installed: bench/requirements.txt $(INSTALLED)
	@$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r $<
	@touch $@

%/node_modules/.package-lock.json: %/package-lock.json
	@npm ci --silent --no-audit --no-fund --prefix $*
