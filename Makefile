# transformer.h needs no build: this file builds its examples, tests and benchmark. `make help` lists what there is.
# Everything made lies under build/. V=1 prints each command.

CC ?= cc
CFLAGS ?= -O2 -g
PREFIX ?= /usr/local
AREAS ?=#            make test AREAS="ops masks" builds and runs tests/test_ops.c and tests/test_masks.c only
FILTER ?=#           make test FILTER='attention/row_*' runs the tests whose suite/name matches

Q := $(if $(V),,@)
HEADER := transformer.h
VERSION := $(shell sed -n 's/^\#define TFM_VERSION_\(MAJOR\|MINOR\|PATCH\) //p' $(HEADER) 2>/dev/null | paste -sd. -)
EXAMPLES := $(patsubst examples/%.c,build/%,$(wildcard examples/*.c))
BENCHES := $(patsubst bench/%.c,build/%,$(filter-out bench/peers_%,$(wildcard bench/*.c)))
SCRIPTS := tests/scripts

.PHONY: all examples run bench test check help install uninstall clean
.DELETE_ON_ERROR:
.SECONDARY:

all: $(EXAMPLES) $(BENCHES)
examples: $(EXAMPLES)

$(EXAMPLES): build/%: examples/%.c $(wildcard examples/*.h) $(HEADER)
	@mkdir -p $(@D)
	@echo "  build $@"
	$(Q)$(CC) $(CFLAGS) -Wall -Wextra -I. $< -o $@ -lm

# OpenMP, where the compiler has it, only for comparisons: --parallel-for openmp.
$(BENCHES): build/%: bench/%.c $(wildcard bench/*.h) $(HEADER)
	@mkdir -p $(@D)
	@echo "  build $@"
	$(Q)openmp=-fopenmp; echo 'int main(void) { return 0; }' | $(CC) -fopenmp -x c - -o /dev/null 2>/dev/null || openmp=; \
	$(CC) $(CFLAGS) $$openmp -Wall -Wextra -I. $< -o $@ -lm

run: build/tour
	cd build && ./tour

BENCH ?= all --isa each --threads each
bench: build/bench
	build/bench $(BENCH)

# The same shapes with other libraries, alternated with ours; PEERS='--threads 2 --only attention' narrows it down.
# GGML=folder adds ggml, built there by cmake.
PEERS ?=
.PHONY: bench-peers bench-report bench-readme neon-report
bench-peers: build/bench
	@CC='$(CC)' GGML='$(GGML)' bench/peers_build.sh
	@bench/peers.py $(PEERS)
	@bench/report.py
bench-report:
	@bench/report.py
# The same, and README's numbers and plots anew.
bench-readme: bench-peers
	@bench/report.py --readme

# What the NEON kernels should reach on cores that are not at hand, by llvm-mca.
neon-report:
	@bench/neon_report.py

# ---- tests ------------------------------------------------------------------------------------------------------------
# A test program is the implementation, compiled once as the configuration under test says, the tests that hold their own
# private copy of it (they define TFM_STATIC; one copy for all that leave nothing out of it), and the objects of all other
# tests, which see declarations only and are therefore shared by all configurations of one kind.

NO_AREAS := $(filter-out $(patsubst tests/test_%.c,%,$(wildcard tests/test_*.c)),$(AREAS))
$(if $(NO_AREAS),$(error there is no area $(NO_AREAS): an area is the * of a tests/test_*.c))
TESTS := $(if $(AREAS),$(AREAS:%=tests/test_%.c),$(wildcard tests/test_*.c))
PRIVATE := $(if $(TESTS),$(notdir $(basename $(shell grep -l '^\#define TFM_STATIC' $(TESTS)))))
SHARED := $(filter-out $(PRIVATE),$(notdir $(basename $(TESTS))))
space := $(subst ,, )
PROGRAM := tests$(if $(AREAS),-$(subst $(space),-,$(strip $(AREAS))))
ALONE := $(if $(PRIVATE),$(notdir $(basename $(shell grep -l '^\#define TFM_NO_' $(PRIVATE:%=tests/%.c)))))
TOGETHER := $(filter-out $(ALONE),$(PRIVATE))
COPY := private-$(subst $(space),+,$(TOGETHER:test_%=%))
PRIVATE_OBJECTS := $(ALONE) $(if $(TOGETHER),$(COPY))
FILTERS := $(foreach f,$(FILTER),'$(f)')
HARNESS := tests/test.h tests/mini_criterion.h $(wildcard tests/*_helpers.h tests/reference_*.h)

# objects(KIND, COMMAND): how the shared tests of a kind are compiled
define objects
build/$(1)/%.o: tests/%.c $(HEADER) $(HARNESS)
	@mkdir -p $$(@D)
	$$(Q)$(2) -Wall -Wextra -I. -c $$< -o $$@
OBJECTS_$(1) := $$(SHARED:%=build/$(1)/%.o) build/$(1)/mini_criterion.o
endef

# configuration(NAME, KIND, COMMAND, DEFINES OF PRIVATE TESTS, LIBRARIES, SUFFIX, SHARED ONLY): a test program, and one that lists
# the instruction sets it can run. SHARED ONLY: without the private tests, each of which costs a compilation of the header.
define configuration
build/$(1)/impl.o build/$(1)/isas.o: build/$(1)/%.o: tests/%.c $(HEADER)
	@mkdir -p $$(@D)
	$$(Q)$(3) -I. -c $$< -o $$@
$$(ALONE:%=build/$(1)/%.o): build/$(1)/%.o: tests/%.c $(HEADER) $(HARNESS)
	@mkdir -p $$(@D)
	$$(Q)$(3) $(4) -I. -c $$< -o $$@
build/$(1)/$(COPY).o: $$(TOGETHER:%=tests/%.c) $(HEADER) $(HARNESS)
	@mkdir -p $$(@D)
	@printf '#include "%s"\n' $$(TOGETHER:%=tests/%.c) >$$(@:.o=.c)
	$$(Q)$(3) $(4) -I. -c $$(@:.o=.c) -o $$@
build/$(1)/isas$(6): build/$(1)/isas.o build/$(1)/impl.o
	$$(Q)$(3) $$^ -o $$@ -lm
build/$(1)/$(PROGRAM)$(6): build/$(1)/impl.o $(if $(7),,$$(PRIVATE_OBJECTS:%=build/$(1)/%.o)) $$(OBJECTS_$(2)) | build/$(1)/isas$(6)
	@echo "  build $$@"
	$$(Q)$(3) $$^ -o $$@ $(5) -lm
endef

MINI := -DTFM_MINI_CRITERION
$(eval $(call objects,test-objects,$(CC) -O1 -g))
$(eval $(call configuration,test,test-objects,$(CC) $(CFLAGS),,-lcriterion))

test: criterion
	@$(MAKE) --no-print-directory build/test/$(PROGRAM)
	@$(SCRIPTS)/run_tests.sh test build/test/$(PROGRAM) '' --verbose=1 $(if $(FILTER),--filter '$(FILTER)')

.PHONY: criterion
criterion:
	@echo '#include <criterion/criterion.h>' | $(CC) -E - >/dev/null 2>&1 || { \
	    if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	        echo 'installing libcriterion-dev'; \
	        { apt-get install -y libcriterion-dev || { apt-get update && apt-get install -y libcriterion-dev; }; } >/dev/null 2>&1; \
	    fi; \
	    echo '#include <criterion/criterion.h>' | $(CC) -E - >/dev/null 2>&1 || { \
	        echo 'The tests need Criterion: install libcriterion-dev (Debian, Ubuntu), criterion (Fedora, Homebrew),'; \
	        echo 'or run `make test-mini`, which needs nothing.'; exit 1; }; }

# The same tests in one process, without Criterion.
.PHONY: test-mini
$(eval $(call objects,mini,$(CC) -O1 -g $(MINI)))
$(eval $(call configuration,test-mini,mini,$(CC) $(CFLAGS),$(MINI)))
test-mini: build/test-mini/$(PROGRAM)
	@$(SCRIPTS)/run_tests.sh test-mini $< '' $(FILTERS)

# ---- the long matrix --------------------------------------------------------------------------------------------------

CHECKS := lines style symbols api warnings embed no stack install flags cpp asan fuzz tsan valgrind i386 aarch64 mingw examples bench fused threads
.PHONY: $(CHECKS:%=check-%)
check: $(CHECKS:%=check-%)

check-lines:
	@$(SCRIPTS)/check_lines.py $(HEADER)
check-style:
	@$(SCRIPTS)/check_style.py $(HEADER)
check-symbols:
	@$(SCRIPTS)/check_symbols.py
check-api:
	@$(SCRIPTS)/check_api.py
check-warnings:
	@$(SCRIPTS)/check_warnings.py
check-embed:
	@$(SCRIPTS)/check_embed.py
check-no:
	@$(SCRIPTS)/check_no.py
check-stack:
	@$(SCRIPTS)/check_stack.py
check-install:
	@$(SCRIPTS)/check_install.sh
check-examples: $(EXAMPLES) build/test-mini/isas
	@$(SCRIPTS)/check_examples.py
check-bench: $(BENCHES) build/test-mini/isas
	@$(SCRIPTS)/check_bench.py

# Fused attention against the formula written with our own ops: a ratio of alternated batches, best of several tries.
check-fused: build/bench
	@bench/check_speed.py --fused

# Threads: handing over a job, gains, jobs too small to split, a parallel_for of the user's.
check-threads: build/bench
	@bench/check_speed.py --threads

# Not part of `check`: timings want a machine of their own. Floors of shares of the peak, and check-fused.
.PHONY: check-speed
check-speed: build/bench
	@bench/check_speed.py

# Optimisation levels. -Ofast is compiled but not linked with: gcc's start-up code for it turns subnormal numbers off in the
# whole program, ours or not. clang's -ffast-math is refused by the header, with the flag to add.
FLAGS := O0 O2 O3 Ofast native lto
FLAG_O0 := -O0
FLAG_O2 := -O2
FLAG_O3 := -O3
FLAG_Ofast := -Ofast
FLAG_native := -O2 -march=native
FLAG_lto := -O2 -flto
LINK_Ofast := -O2
clang_Ofast := -fno-fast-math
FLAGS_SHARED_ONLY := O0 O2 O3 native lto
FLAGS_EACH_ISA := Ofast# and the others the best
$(foreach cc,gcc clang,$(foreach f,$(FLAGS),$(eval \
    $(call configuration,$(cc)-$(f),mini,$(cc) $(FLAG_$(f)) $($(cc)_$(f)),$(MINI),$(LINK_$(f)),,$(filter $(f),$(FLAGS_SHARED_ONLY))))))
FLAG_BUILDS := $(FLAGS:%=gcc-%) $(FLAGS:%=clang-%)
.PHONY: $(FLAG_BUILDS:%=check-flags-%)
$(FLAG_BUILDS:%=check-flags-%): check-flags-%: build/%/$(PROGRAM)
	@TFM_QUICK=1 TFM_ISAS=$(if $(filter $(FLAGS_EACH_ISA:%=gcc-%) $(FLAGS_EACH_ISA:%=clang-%),$*),,best) \
	    $(SCRIPTS)/run_tests.sh check-flags-$* $< ''
check-flags: $(FLAG_BUILDS:%=check-flags-%)

# The implementation as C++, called from C. Tests with a private copy stay C.
define configuration_cpp
build/$(1)/impl.o: tests/impl.c $(HEADER)
	@mkdir -p $$(@D)
	$$(Q)$(2) -std=c++17 -O2 -I. -x c++ -c $$< -o $$@
build/$(1)/isas: build/mini/isas.o build/$(1)/impl.o
	$$(Q)$(2) $$^ -o $$@ -lm
build/$(1)/$(PROGRAM): build/$(1)/impl.o $(OBJECTS_mini) | build/$(1)/isas
	@echo "  build $$@"
	$$(Q)$(2) $$^ -o $$@ -lm
endef
$(eval $(call configuration_cpp,g++,g++))
$(eval $(call configuration_cpp,clang++,clang++))
.PHONY: check-cpp-g++ check-cpp-clang++
check-cpp-g++ check-cpp-clang++: check-cpp-%: build/%/$(PROGRAM)
	@TFM_QUICK=1 TFM_ISAS=best $(SCRIPTS)/run_tests.sh check-cpp-$* $< ''
check-cpp: check-cpp-g++ check-cpp-clang++

comma := ,
# gcc: clang takes four times as long over the undefined-behaviour checks of a file of this size.
ASAN := gcc -O1 -g -fno-omit-frame-pointer -fsanitize=address$(comma)undefined -fno-sanitize-recover=all
$(eval $(call objects,asan-objects,$(ASAN) $(MINI)))
$(eval $(call configuration,asan,asan-objects,$(ASAN),$(MINI)))
check-asan: build/asan/$(PROGRAM)
	@TFM_QUICK=1 $(SCRIPTS)/run_tests.sh check-asan $< '' $(FILTERS)

# Every parser of foreign bytes: the drivers' own mutations, a fixed number of them, under the same sanitizers.
FUZZERS := safetensors llama2c tokenizer cache
build/fuzz/cache: tests/fuzz_cache.c tests/fuzz.h $(HEADER)
	@mkdir -p $(@D)
	@echo "  build $@"
	$(Q)$(ASAN) -I. $< -o $@ -lm
$(filter-out %/cache,$(FUZZERS:%=build/fuzz/%)): build/fuzz/%: tests/fuzz_%.c tests/fuzz.h build/asan/impl.o
	@mkdir -p $(@D)
	@echo "  build $@"
	$(Q)$(ASAN) -I. $< build/asan/impl.o -o $@ -lm
.PHONY: $(FUZZERS:%=check-fuzz-%)
$(FUZZERS:%=check-fuzz-%): check-fuzz-%: build/fuzz/%
	@TFM_FUZZ_RUNS=$${TFM_FUZZ_RUNS:-20000} $< >build/fuzz/$*.log 2>&1 || { tail -n 40 build/fuzz/$*.log; echo 'check-fuzz-$*: 0 passed, 1 failed, 0 skipped'; exit 1; }
	@echo 'check-fuzz-$*: 1 passed, 0 failed, 0 skipped'
check-fuzz: $(FUZZERS:%=check-fuzz-%)

# Only what has threads in it: the rest would run serially under the sanitizer.
TSAN := clang -O1 -g -fsanitize=thread
TSAN_TESTS ?= threads* */*thread* */*parallel* */*cancel*
$(eval $(call objects,tsan-objects,$(TSAN) $(MINI)))
$(eval $(call configuration,tsan,tsan-objects,$(TSAN),$(MINI),,,1))
check-tsan: build/tsan/$(PROGRAM)
	@TFM_QUICK=1 $(SCRIPTS)/run_tests.sh check-tsan $< 'setarch -R' $(foreach t,$(TSAN_TESTS),'$(t)')

# valgrind runs AVX2 and hides AVX-512; it is slow, so only these.
VALGRIND := valgrind -q --error-exitcode=9 --leak-check=full --errors-for-leak-kinds=definite
VALGRIND_TESTS ?= harness context* memory* tensors* views* masks*
check-valgrind: build/gcc-O2/$(PROGRAM)
	@TFM_QUICK=1 $(SCRIPTS)/run_tests.sh check-valgrind $< '$(VALGRIND)' $(foreach t,$(VALGRIND_TESTS),'$(t)')

# The library is built as a user would; the tests' own arithmetic has no excess precision, which x87 registers keep.
# The kernel's headers lie in the folder of the 64-bit system where gcc-multilib has not linked them.
M32 := gcc -m32 -idirafter /usr/include/$(shell gcc -print-multiarch 2>/dev/null)
I386 := $(M32) -O2 -g
$(eval $(call objects,i386-objects,$(M32) -msse2 -mfpmath=sse -O1 -g $(MINI)))
$(eval $(call configuration,i386,i386-objects,$(I386),$(MINI),,,1))
check-i386: build/i386/$(PROGRAM)
	@TFM_QUICK=1 $(SCRIPTS)/run_tests.sh check-i386 $< ''

AARCH64 := aarch64-linux-gnu-gcc -O2 -g
QEMU_AARCH64 ?= qemu-aarch64 -L /usr/aarch64-linux-gnu -cpu max
$(eval $(call objects,aarch64-objects,aarch64-linux-gnu-gcc -O1 -g $(MINI)))
$(eval $(call configuration,aarch64,aarch64-objects,$(AARCH64),$(MINI)))
check-aarch64: build/aarch64/$(PROGRAM)
	@TFM_QUICK=1 TFM_EMULATED=1 $(SCRIPTS)/run_tests.sh check-aarch64 $< '$(QEMU_AARCH64)' $(FILTERS)

# Windows: built always, run where wine is installed.
MINGW := x86_64-w64-mingw32-gcc -O2 -g -static
$(eval $(call objects,mingw-objects,x86_64-w64-mingw32-gcc -O1 -g $(MINI)))
$(eval $(call configuration,mingw,mingw-objects,$(MINGW),$(MINI),,.exe,1))
check-mingw: build/mingw/$(PROGRAM).exe
	@TFM_QUICK=1 $(SCRIPTS)/run_mingw.sh check-mingw $< $(FILTERS)

# ---- install ----------------------------------------------------------------------------------------------------------

# For all to read, whatever the umask; folders that are there already keep their mode (install -d would not let them).
install:
	umask 022 && mkdir -p '$(DESTDIR)$(PREFIX)/include' '$(DESTDIR)$(PREFIX)/share/pkgconfig'
	install -m 644 $(HEADER) '$(DESTDIR)$(PREFIX)/include/$(HEADER)'
	printf '%s\n' 'prefix=$(PREFIX)' 'includedir=$${prefix}/include' '' 'Name: transformer' \
	    'Description: Transformers on CPUs, in one C header' 'Version: $(VERSION)' 'Cflags: -I"$${includedir}"' 'Libs: -lm' \
	    >'$(DESTDIR)$(PREFIX)/share/pkgconfig/transformer.pc'
	chmod 644 '$(DESTDIR)$(PREFIX)/share/pkgconfig/transformer.pc'

uninstall:
	rm -f '$(DESTDIR)$(PREFIX)/include/$(HEADER)' '$(DESTDIR)$(PREFIX)/share/pkgconfig/transformer.pc'

clean:
	rm -rf build

help:
	@echo 'make             examples and benchmark, to build/'
	@echo 'make run         the tour: a sentence through a Transformer, step by step'
	@echo 'make test        all tests on every instruction set of this machine (AREAS="ops masks", FILTER="suite/name*")'
	@echo 'make test-mini   the same without Criterion'
	@echo 'make bench       the benchmark (BENCH="matmul --shape 512,512,512 --isa avx2" for one op)'
	@echo 'make bench-peers the same shapes with other libraries (installs what it needs; PEERS="--threads 2 --only attention")'
	@echo 'make bench-report its table and plots again; bench-readme: README'"'"'s anew'
	@echo 'make check-speed no op has lost speed: floors of shares of the measured peak'
	@echo 'make neon-report what the NEON kernels should reach, by llvm-mca'
	@echo 'make check       the long matrix; its parts:'
	@echo '                 $(CHECKS:%=check-%)' | fold -s -w 100
	@echo 'make install     the header and a pkg-config file (PREFIX=$(PREFIX), DESTDIR=); make uninstall removes them'
	@echo 'make clean       removes build/'
