# Every command of the project. `make run` and `make test` work on a bare Debian 12 or 13, as root.
SHELL := /bin/sh
.DEFAULT_GOAL := help
.PHONY: help run prepare agent demo test test-long lint format bench package bundle clean

# Arguments for pytest: make test PYTEST_ARGS='-k disks'
PYTEST_ARGS ?=
# Options for the bench: make bench BENCH_ARGS='--quick --only rooms' (docs/performance.md)
BENCH_ARGS ?=

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

run: ## install what is missing, then start the server in the foreground
	@setup/prepare.sh run
	@exec .venv/bin/inn serve

prepare: ## only install what is missing
	@setup/prepare.sh run

agent: ## build the program that runs in every guest
	@setup/build_agent.sh

demo: ## with the server up: a chart drawn in a room, fetched without a token
	@exec .venv/bin/python deploy/demo.py

test: ## install what the tests need, then run them all
	@exec setup/test.sh $(PYTEST_ARGS)

test-long: ## also the full form of the fault, attack and size tests: an hour or more
	@setup/test.sh -m '' --timeout 3600 --numprocesses 0

lint: ## formatting, lints, types, layers, Go and shell
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports
	cd guest && CGO_ENABLED=0 go vet ./...
	test -z "$$(gofmt -l guest)"
	shellcheck setup/*.sh setup/debian/p* .ci/run images/*/customize.sh src/innkeeper/host/disks/image_tree.sh

format: ## rewrite the Python and Go sources in the one style
	.venv/bin/ruff check --fix-only --quiet .
	.venv/bin/ruff format .
	gofmt -w guest

bench: ## the performance tables
	@setup/prepare.sh bench
	@exec .venv/bin/python -m bench $(BENCH_ARGS)

package: ## the wheel and the Debian package, into dist
	@setup/prepare.sh package
	@setup/package.sh

bundle: ## all of it for machines without a network, into dist
	@setup/prepare.sh package
	@setup/bundle.sh

clean: ## remove what was built here; images and rooms in the state directory stay
	rm -rf build dist .venv .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find src tests bench -name __pycache__ -prune -exec rm -rf {} +
