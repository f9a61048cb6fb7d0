# Everything below runs from a fresh clone; `make help` lists it.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
BIN := .venv/bin
LAB := $(BIN)/ansible-playbook -i inventory/lab
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PYTHONDONTWRITEBYTECODE := 1

help:  ## list the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

demo: lab  ## deploy to the lab, validate, say where the report is
	$(LAB) deploy.yml -l ascend910

test: lint test-fast test-lab  ## all tests: lint, fast and lab

lint: .venv/dev  ## ansible-lint, yamllint, ruff, mypy: no findings, no skip list
	ansible-lint --offline
	yamllint --strict .
	ruff check --no-cache .
	ruff format --check .
	mypy

test-fast: .venv/dev  ## tests without root, network or lab
	pytest -q tests/unit tests/templates tests/roles

test-lab: lab .venv/dev  ## end-to-end tests in the lab
	pytest -q tests/lab

lab: .venv/dev  ## bring the lab up
	$(LAB) playbooks/lab.yml

clean:  ## take the lab down; its caches stay
	$(LAB) playbooks/lab_remove.yml

bench-peers: .venv/dev  ## the benchmark client beside its peers, into docs/bench-peers.md (20 min, GBs of peers)
	python tests/bench_peers/compare.py

.venv/dev: requirements.txt requirements-dev.txt
	@.ci/bootstrap
	@touch $@

.PHONY: help demo test lint test-fast test-lab lab clean bench-peers
