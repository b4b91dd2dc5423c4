# The two commands of the README, and what they are made of.
SHELL := /bin/bash
CARGO ?= cargo
BIN = $(or $(CARGO_TARGET_DIR),target)/debug
.PHONY: setup build demo dev test faults bench reference fmt lint clean

# Says nothing when nothing is missing. AGENTS="claude codex gemini opencode" installs more CLIs than the default.
setup:
	@scripts/setup.sh $(AGENTS)

build: setup
	@$(CARGO) build --quiet

# Everything once, end to end: a real Claude Code session in a sandbox, two turns, no account.
demo:
	@scripts/demo.sh

# The stack, until Ctrl-C. ARGS="--scripted-model" and others are passed on.
dev: build
	@$(BIN)/aod dev $(ARGS)

# Every test, with every CLI. One Postgres serves the whole run.
test: AGENTS = claude codex gemini opencode
test: build
	$(CARGO) test --workspace --no-run --quiet
	$(BIN)/testkit-run $(CARGO) test --workspace --quiet

# The stack under attack, for some ten minutes, and a table of what was lost. ARGS="--seed 7 --only runner" and others are passed on.
faults: build
	@$(CARGO) build --quiet -p system-tests --bin faults
	@$(BIN)/faults $(ARGS)

# How fast it is, beside floors of the same run: the whole stack, then the sandboxes. ARGS=replay measures one thing of the first.
bench: setup
	@$(CARGO) build --release --workspace --bins
	@$(CARGO) bench --quiet -p system-tests --bench stack -- $(ARGS)
	@$(CARGO) bench --quiet -p local-sprites

# docs/configuration.md, from what the services say at --help.
reference: build
	@$(CARGO) run --quiet -p system-tests --bin reference

fmt:
	$(CARGO) fmt --all

lint:
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --quiet -- -D warnings

clean:
	$(CARGO) clean
