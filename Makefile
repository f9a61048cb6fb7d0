# Everything below runs from a fresh clone; `make help` lists it.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
BIN := .venv/bin
STATIC_LOG := .venv/static.log
LAB := $(BIN)/ansible-playbook -i inventory/lab
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PYTHONDONTWRITEBYTECODE := 1

help:  ## list the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

demo: lab  ## deploy to the lab, validate, say where the report is
	$(LAB) deploy.yml -l ascend910

# The lab is built mostly on one core: what needs no lab runs on the other. What failed is said last.
test: machine  ## all tests: lint and fast while the lab comes up, then the lab's
	@rm -f $(STATIC_LOG)
	$(MAKE) --jobs=2 lab static || { status=$$?; [ ! -f $(STATIC_LOG) ] || cat $(STATIC_LOG); exit $$status; }
	$(MAKE) --assume-old=lab test-lab

static:
	@echo 'lint, test-fast, test-front and test-monitoring run beside the lab; what they say comes when they are through'
	@{ $(MAKE) lint && $(MAKE) test-fast && $(MAKE) test-front && $(MAKE) test-monitoring; } > $(STATIC_LOG) 2>&1
	@cat $(STATIC_LOG) && rm $(STATIC_LOG)

lint: .venv/dev  ## ansible-lint, yamllint, ruff, mypy: no findings, no skip list
	ansible-lint --offline
	yamllint --strict .
	ruff check --no-cache .
	ruff format --check .
	mypy

test-fast: .venv/dev  ## tests without root or lab; no network once .venv is made
	pytest -q -n auto tests/unit tests/templates tests/roles

test-front: .venv/dev  ## the front's tests with HAProxy itself: root, no lab; installs the package
	@.ci/bootstrap front
	pytest -q -n auto tests/front

test-monitoring: .venv/dev  ## rules, dashboard, and a real Prometheus whose alerts fire and resolve: root, no lab; unpacks the packages (1 min)
	@.ci/bootstrap monitoring
	pytest -q -n auto --dist loadfile tests/monitoring

test-lab: lab  ## end-to-end tests in the lab, but for the long ones
	pytest -q -m "not long" tests/lab

test-long: lab  ## the faults that take long: killed controllers, three nodes, a registry that goes away, podman, an engine that hangs (3 h)
	@.ci/bootstrap monitoring
	pytest -q -m long tests/lab

soak: lab  ## an hour of load on front, guard and engine in the lab, into docs/soak.md (65 min)
	SOAK_SECONDS=3600 SOAK_PAGE=docs/soak.md pytest -q -m soak tests/lab

recovery: lab  ## what ends under load, and for how long nobody is served, into docs/recovery.md (8 min)
	RECOVERY_PAGE=docs/recovery.md pytest -q tests/lab/test_recovery.py

fleet: lab  ## upgrades, kills and cuts under load, three nodes behind two gateways, into docs/fleet.md (30 min)
	FLEET_PAGE=docs/fleet.md pytest -q tests/lab/test_fleet.py

test-browser: browser  ## the reports' pages in a real Chromium, at two widths and in two languages (1 min)
	pytest -q tests/browser

screenshots: browser  ## pictures of the lab's last report, into docs/images
	PYTHONPATH=tests/support python tests/browser/screenshots.py reports/node1/latest docs/images

exposure-table: lab  ## what front and guard refuse, and what direct does with it, into docs/exposure.md (30 min)
	EXPOSURE_PAGE=docs/exposure.md pytest -q -s tests/lab/test_exposure_table.py

fault-table: lab  ## injected faults and healthy runs under all stages, in the lab, into docs/fault-table.md (75 min)
	pytest -q -m faults tests/faults

lab: machine  ## bring the lab up
	$(LAB) playbooks/lab.yml

clean: .venv/dev  ## take the lab down; its caches stay
	$(LAB) playbooks/lab_remove.yml

bench-peers: .venv/dev  ## the benchmark client beside its peers, into docs/bench-peers.md (20 min, GBs of peers)
	python tests/bench_peers/compare.py

bench-guard: .venv/dev  ## what front and guard cost beside exposure direct, into docs/request-guard.md (8 min, root)
	@.ci/bootstrap front
	pip install --quiet --disable-pip-version-check -r tests/bench_guard/requirements.txt
	PYTHONPATH=files/guard:files/scripts:roles/ocr_front/files:roles/vllm_service/files:tests/support python tests/bench_guard/measure.py

bench-fleet: lab  ## what a deploy that changes nothing costs for 1 to 16 hosts, in the lab, into docs/bench-fleet.md (1 h, 53 GB of disk); FLEET="--nodes 1,2"
	PYTHONPATH=roles/ocr_front/files:roles/vllm_service/files:tests/support:tests/bench_fleet python tests/bench_fleet/fleet_bench.py $(FLEET)

# All that the lab needs of this machine, before anything is installed.
machine:
	@.ci/bootstrap lab

# A Chromium, where there is none.
browser: .venv/dev
	@.ci/bootstrap browser

.venv/dev: requirements.txt requirements-dev.txt
	@.ci/bootstrap

.PHONY: help demo test static lint test-fast test-front test-lab test-long soak recovery fleet test-browser screenshots lab clean bench-peers bench-guard bench-fleet fault-table exposure-table machine browser test-monitoring
