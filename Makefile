# Run `make` for the list of targets.
SHELL := /bin/bash
CARGO ?= cargo
BIN = $(or $(CARGO_TARGET_DIR),target)/debug
.DEFAULT_GOAL = help
.PHONY: help setup build console demo dev test test-paused escape faults soak conformance bench peers reference fmt lint clean

help: ## List the targets
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/  make \1|\2/p' $(MAKEFILE_LIST) | column -t -s '|'

# Prints nothing when nothing is missing. AGENTS="claude codex gemini opencode" installs more CLIs than the default.
setup: ## Install missing dependencies
	@scripts/setup.sh $(AGENTS)

build: setup console ## Build everything in debug mode, and the agent host as it is put into sandboxes
	@$(CARGO) build --quiet
	@$(CARGO) run --quiet -p xtask -- agent-host >/dev/null

console: setup ## Build the web console, which the gateway embeds
	@scripts/console.sh

demo: ## Set up, build, start the stack and run a Claude Code session with two turns; needs no account
	@scripts/demo.sh

dev: build ## Run the stack until Ctrl-C (ARGS=--scripted-model: agents need no key)
	@$(BIN)/aod dev $(ARGS)

# One Postgres serves the whole run.
test: AGENTS = claude codex gemini opencode
test: export SETUP_TESTS = 1
test: build ## Run every test, with every agent CLI
	$(CARGO) test --workspace --no-run --quiet
	$(BIN)/testkit-run scripts/test.sh

test-paused: AGENTS = claude codex gemini opencode
test-paused: build ## Leave permission requests of all CLIs open for ten minutes of a paused sandbox
	PAUSED_SECONDS=600 $(CARGO) test --quiet -p system-tests --test it a_permission_request_stays_open

escape: build ## Attack sandboxes with each OCI runtime that is installed: runc, crun, runsc
	@CARGO="$(CARGO)" scripts/escape.sh

faults: build ## Inject faults into a stack for about ten minutes and print what was lost (ARGS="--seed 7 --only runner")
	@$(CARGO) build --quiet -p system-tests --bin faults
	@$(BIN)/faults $(ARGS)

# target/soak has the results. ARGS="--sessions 50 --agents 8" suits a larger machine.
soak: AGENTS = claude codex gemini opencode
soak: build ## Run sessions of all runtimes with a fault a minute and check every event (HOURS=8; or MINUTES=10, the default)
	@$(CARGO) build --quiet -p system-tests --bin soak
	@$(BIN)/soak $(if $(HOURS),--hours $(HOURS)) $(if $(MINUTES),--minutes $(MINUTES)) $(ARGS)

conformance: AGENTS = claude codex gemini opencode
conformance: build ## Run Anthropic's SDKs against /v1 with every agent CLI and write the table into docs/managed-agents-api.md
	@scripts/conformance.sh $(ARGS)

# ARGS=replay: one benchmark. RUNS=2: twice, and the table shows the spread. DOCS=--write puts it into docs/benchmarks.md.
bench: RUNS ?= 1
bench: export BENCH_FIGURES = $(abspath target)/bench/figures.jsonl
bench: setup console ## Measure throughput and latency beside the floors of the same run; print a table, and write it as JSON
	@$(CARGO) build --release --workspace --bins
	@$(CARGO) run --quiet -p xtask -- agent-host >/dev/null
	@mkdir -p $(dir $(BENCH_FIGURES)) && rm -f $(BENCH_FIGURES)
	@for run in $$(seq $(RUNS)); do \
		$(CARGO) bench --quiet --workspace --bench stack -- $(ARGS) && \
		$(CARGO) bench --quiet --workspace --bench gateway -- $(ARGS) && \
		$(if $(ARGS),true,$(CARGO) bench --quiet --workspace --bench sprites) || exit 1; \
	done
	@$(CARGO) run --release --quiet -p system-tests --bin bench-table -- $(BENCH_FIGURES) $(DOCS)

peers: build ## Measure a server that speaks the Managed Agents API: BASE_URL and API_KEY, or a stack of its own (ARGS="--only first")
	@scripts/peers.sh $(ARGS)

reference: build ## Regenerate docs/configuration.md from the services' --help
	@$(CARGO) run --quiet -p system-tests --bin reference

fmt: ## Format the code
	$(CARGO) fmt --all

lint: ## Check formatting and run clippy with warnings denied
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --quiet -- -D warnings

clean: ## Delete build output
	$(CARGO) clean
