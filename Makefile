# Thin: every lane is a call of a public tool. `make help` lists them.
SHELL := /bin/bash
.DEFAULT_GOAL := help
CARGO ?= cargo
TARGET := $(or $(CARGO_TARGET_DIR),target)

help: ## list the lanes
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: ## install what building and testing needs (Debian 12, root); the second time offline
	tests/setup

# All at once: building packages one by one would compile shared dependencies once for each.
build: setup ## everything, unoptimised: target/debug/pullgate, the demo, the tests
	$(CARGO) build --workspace --all-targets

demo: build ## the main job: a signed image is pulled and runs, others are refused
	$(TARGET)/debug/demo

test: build ## all tests: units, and end to end on real containerd, registry, cosign, KMS, systemd
	$(CARGO) test --workspace

unit: setup ## the unit tests only
	$(CARGO) test --package pullgate

lint: setup ## formatting, clippy, licences and bans, shell scripts
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets -- --deny warnings
	$(CARGO) deny --offline check bans licenses sources
	shellcheck tests/setup .ci/run

bench: setup ## measure against peers in the same run; writes docs/performance.md
	$(CARGO) build --release --package pullgate
	$(CARGO) run --release --package pullgate-bench

bench-quick: setup ## the same with few samples, on the screen only
	$(CARGO) build --release --package pullgate
	$(CARGO) run --release --package pullgate-bench -- --quick

release: setup ## the optimised binary, target/release/pullgate
	$(CARGO) build --release --package pullgate

clean: ## remove what was built (the parts in .parts stay)
	$(CARGO) clean

.PHONY: help setup build demo test unit lint bench bench-quick release clean
