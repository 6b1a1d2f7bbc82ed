# Each target sets up what it needs; a second run touches no network.
.DEFAULT_GOAL := help
.PHONY: help setup build demo test test-gpu lint bench asan tsan fuzz install clean

PREFIX ?= /usr/local
JOBS ?= $(shell nproc)
FUZZ_SECONDS ?= 60

help:
	@echo "Cambium: grafts fast token mixers onto a trained language model."
	@echo
	@echo "  make demo      build, then turn the shipped teacher into hybrids; report in out/demo"
	@echo "  make test      build, then run the whole test suite"
	@echo "  make test-gpu  the tests that use a GPU, on a machine that has one"
	@echo "  make build     the program alone: build/cambium (try build/cambium --help)"
	@echo "  make bench     benchmarks of operations and of the shipped model"
	@echo "  make lint      clang-format, clang-tidy and the house rules"
	@echo "  make asan      the test suite under AddressSanitizer and UndefinedBehaviorSanitizer"
	@echo "  make tsan      tests of ops, model, train and serve under ThreadSanitizer"
	@echo "  make fuzz      libFuzzer on every reader of files, FUZZ_SECONDS (now $(FUZZ_SECONDS)) each"
	@echo "  make install   install the program under PREFIX (now $(PREFIX))"
	@echo "  make clean     remove the build folders and out/"
	@echo
	@echo "System packages that are missing are installed through apt (Debian 12, Ubuntu 24.04)."

setup:
	@scripts/setup.sh build

build/build.ninja: | setup
	cmake --preset release

build: setup build/build.ninja
	cmake --build build -j $(JOBS) --target cambium

demo: build
	scripts/demo.sh

test: setup build/build.ninja
	cmake --build build -j $(JOBS)
	ctest --preset release -j $(JOBS)

test-gpu: setup build/build.ninja
	cmake --build build -j $(JOBS)
	scripts/test_gpu.sh

lint: build/build.ninja
	@scripts/setup.sh lint
	@scripts/lint.sh

bench: setup build/build.ninja
	cmake --build build -j $(JOBS) --target cambium bench_ops
	scripts/bench.sh

asan:
	@scripts/setup.sh clang
	cmake --preset asan
	cmake --build build-asan -j $(JOBS)
	ctest --preset asan -j $(JOBS)

tsan:
	@scripts/setup.sh clang
	cmake --preset tsan
	cmake --build build-tsan -j $(JOBS) --target test_base test_ops test_model test_train test_serve
	scripts/tsan.sh

fuzz:
	@scripts/setup.sh clang
	cmake --preset asan
	cmake --build build-asan -j $(JOBS) --target fuzzers
	scripts/fuzz.sh $(FUZZ_SECONDS)

install: build
	cmake --install build --prefix $(PREFIX)

clean:
	rm -rf build build-debug build-asan build-tsan build-fuzz out
