# nearpath: every target does its own set-up first and says what it does.
# `sudo make test` and `sudo make demo` are all that a fresh Debian 12 or Ubuntu 24.04 needs.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.NOTPARALLEL:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

# The distribution's Python: its shared library is what gets frozen.
PYTHON ?= /usr/bin/python3
VENV := .venv
BIN := $(VENV)/bin
# Pinned here and not in the lock, for it only writes the lock.
UV_VERSION := 0.13.9

# name of the Debian and Ubuntu package[:command that makes it unnecessary]
BUILD_PACKAGES := make:make binutils:objcopy clang:clang llvm:llvm-strip libbpf-dev libbpf1 \
	libc6-dev python3 python3-venv python3-dev ca-certificates
CHECK_PACKAGES := shellcheck:shellcheck git:git
NODE_PACKAGES := containernetworking-plugins containerd:containerd runc:runc podman:podman \
	qperf:qperf iperf3:iperf3 iproute2:ip iptables:iptables nftables:nft ethtool:ethtool haproxy:haproxy \
	tcpdump:tcpdump strace:strace busybox-static kmod:modprobe \
	qemu-system-x86:qemu-system-x86_64

# What pytest is told in the VMs of `make kernels`, e.g. "tests/integration -k half_close".
KERNEL_ARGS ?= tests/integration tests/torture

SOURCES := $(shell find cni-plugin -name '*.py')
PROGRAM := dist/nearpath/nearpath

.PHONY: help
help: ## this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 18

# --- set-up -----------------------------------------------------------------

.PHONY: setup
setup: ## install the apt packages that are missing (as root)
	@missing=(); \
	for entry in $(BUILD_PACKAGES) $(CHECK_PACKAGES) $(NODE_PACKAGES); do \
		name=$${entry%%:*}; tool=$${entry#"$$name"}; tool=$${tool#:}; \
		if [ -n "$$tool" ] && PATH="$$PATH:/usr/sbin:/sbin" command -v "$$tool" >/dev/null; then continue; fi; \
		state=$$(dpkg-query -W -f '$${Status}' "$$name" 2>/dev/null || true); \
		[ "$$state" = "install ok installed" ] || missing+=("$$name"); \
	done; \
	if [ $${#missing[@]} -eq 0 ]; then echo "==> packages: all installed"; exit 0; fi; \
	if [ "$$(id -u)" -ne 0 ]; then \
		echo "==> packages missing: $${missing[*]}; run: sudo make setup" >&2; exit 1; \
	fi; \
	echo "==> packages: installing $${missing[*]}"; \
	export DEBIAN_FRONTEND=noninteractive; \
	apt-get -o DPkg::Lock::Timeout=300 update -qq; \
	apt-get -o DPkg::Lock::Timeout=300 install -qq --yes --no-install-recommends "$${missing[@]}" >/dev/null; \
	echo "==> packages: installed"

.PHONY: venv
venv: $(VENV)/.installed ## make .venv with the pinned Python packages

$(VENV)/.installed: requirements.lock
	@echo "==> Python packages: installing the versions of requirements.lock into $(VENV)"
	@[ -x "$(PYTHON)" ] || { echo "==> no $(PYTHON); run: sudo make setup" >&2; exit 1; }
	@rm -f $@
	@$(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/pip install -qq --disable-pip-version-check --no-input --only-binary :all: \
		--no-deps --require-hashes --requirement requirements.lock
	@touch $@

.PHONY: lock
lock: ## write requirements.lock from pyproject.toml
	@echo "==> lock: resolving pyproject.toml"
	@$(PYTHON) -m venv --clear build/lock
	@build/lock/bin/pip install -qq --disable-pip-version-check uv==$(UV_VERSION)
	@UV_CUSTOM_COMPILE_COMMAND="make lock" build/lock/bin/uv pip compile --quiet \
		--python-version 3.11 --python-platform linux --extra dev --generate-hashes \
		--no-emit-index-url --no-emit-find-links --output-file requirements.lock pyproject.toml
	@echo "==> lock: requirements.lock is up to date"

# --- build ------------------------------------------------------------------

.PHONY: bpf
bpf: ## compile the BPF programs to bpf/build
	@command -v clang >/dev/null || { echo "==> no clang; run: sudo make setup" >&2; exit 1; }
	@$(MAKE) -q -C bpf 2>/dev/null || echo "==> bpf: compiling the BPF programs"
	@$(MAKE) -s -C bpf

.PHONY: build
build: venv bpf ## freeze dist/nearpath/nearpath with the BPF objects and libbpf inside
	@mkdir -p build
	@flock build/.lock $(MAKE) -s $(PROGRAM)
	@echo "==> build: $(PROGRAM) is up to date"

# Frozen in build/ and swapped in at the end: a failed build leaves the old program.
$(PROGRAM): $(SOURCES) $(wildcard bpf/build/*.bpf.o) build.spec $(VENV)/.installed
	@echo "==> build: freezing $@"
	@PYI_LOG_LEVEL=ERROR $(BIN)/python -m PyInstaller --noconfirm --distpath build/dist \
		--workpath build/pyinstaller build.spec
	@rm -rf build/previous && mkdir -p dist
	@if [ -e dist/nearpath ]; then mv dist/nearpath build/previous; fi
	@mv build/dist/nearpath dist/nearpath && rm -rf build/previous
	@touch $@

# --- run --------------------------------------------------------------------

.PHONY: root
root:
	@if [ "$$(id -u)" -ne 0 ]; then echo "==> needs root (BPF, network namespaces): use sudo" >&2; exit 1; fi

.PHONY: test
test: root setup build ## everything: linters, unit, integration, e2e tests, stock kernels (as root)
	@echo "==> tests"
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

.PHONY: kernels
kernels: root setup build ## integration tests and torture on stock Debian kernels in VMs (Debian 12, as root)
	@echo "==> kernels: $(KERNEL_ARGS)"
	@$(BIN)/python -m pytest tests/kernels --in-kernels="$(KERNEL_ARGS)" --in-kernels-seconds=10800 $(PYTEST_ARGS)

.PHONY: soak
soak: root setup build ## random socket programs on both paths, for an hour (SOAK_ARGS="--minutes 600")
	@echo "==> soak"
	@PYTHONPATH=cni-plugin:tests $(BIN)/python -m torture $(or $(SOAK_ARGS),--minutes 60)

.PHONY: demo
demo: root setup build ## two pods on this node, kernel path against nearpath (as root)
	@echo "==> demo"
	@$(PROGRAM) demo $(DEMO_ARGS)

.PHONY: bench
bench: root setup build ## start-up of the plugin, socket lane, tap lane, each against without; 20 min (as root)
	@echo "==> bench: start-up"
	@$(BIN)/python tests/bench/bench_startup.py $(BENCH_ARGS)
	@echo "==> bench: socket lane"
	@nice -n -20 $(BIN)/python tests/bench/bench_lane.py $(LANE_ARGS)
	@echo "==> bench: tap lane"
	@nice -n -20 $(BIN)/python tests/bench/bench_tap.py $(TAP_ARGS)

.PHONY: lint
lint: venv ## the linters alone
	@$(BIN)/python -m pytest -q tests/unit/test_house.py

.PHONY: format
format: venv ## rewrite Python and C the way the linters want them
	@$(BIN)/ruff check --quiet --fix-only . && $(BIN)/ruff format .
	@if compgen -G 'bpf/*.[ch]' >/dev/null; then $(BIN)/clang-format -i bpf/*.[ch]; fi

.PHONY: clean
clean: ## remove what make made, apart from apt packages
	@rm -rf build dist bpf/build $(VENV)
	@find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
	@echo "==> clean"
