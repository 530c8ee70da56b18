# What one types. The rest of this file finds out what the machine has and builds for that.
# make                all programs                          make help          this list
# make demo           train on the built-in corpus, about a minute, and print text
# make shakespeare    fetch TinyShakespeare and train the recipe
# make plot           loss curves: RUN=DIR; or tables of ./bench --tsv > FILE: BENCH=FILE
# make doctor         what was found: compiler, OpenMP, nvcc, driver, GPU
# make test           all tests; GPU tests are skipped, by name, where there is none
# make mutate         breaks the code in many ways, one at a time: every one must be caught
# make mutate-gpu     the same for the CUDA kernels, on a machine with a GPU
# make asan           the tests under AddressSanitizer and UndefinedBehaviorSanitizer
# make try            the tests in a copy, as another compiler builds them: CC=clang OPENMP= NVCC=
# make check-kernels  every GPU kernel against the CPU, and its time
# make sanitize       the kernels under compute-sanitizer's four tools
# make fuzz           libFuzzer on the checkpoint reader, FUZZ_SECONDS=60
# make clean          removes what was built
# Override on the command line: CC=clang  NVCC=  (no CUDA)  ARCH=90a  OPENMP=  (one thread)

# ---- What this machine has. Every probe compiles or runs something; none trusts a name alone. ----

# Into a folder of its own: a linker may remove its output first, whatever that is.
try = $(shell d=$$(mktemp -d) && echo 'int main(void) { return 0; }' | \
	$(CC) $(1) -x c - -o $$d/probe 2>/dev/null && echo '$(1)'; rm -rf "$$d")
OPENMP := $(or $(call try,-fopenmp),$(call try,-Xpreprocessor -fopenmp -lomp),$(call try,-fopenmp-simd))
NATIVE := $(call try,-march=native)
CONTRACT := $(call try,-ffp-contract=fast)
NO_CONTRACT := $(call try,-ffp-contract=off)
CUDA_HOME ?= /usr/local/cuda
# Where a link points to: nvcc looks for the rest of itself beside its own name.
NVCC := $(shell p=$$(command -v nvcc 2>/dev/null || ls $(CUDA_HOME)/bin/nvcc 2>/dev/null); \
	readlink -f "$$p" 2>/dev/null || echo "$$p")
# It must compile a kernel, which takes a second or two: what has done so once, and with which host
# compiler, is noted in build/.
# What it says otherwise goes into NO_CUDA, and the build is for the CPU.
TOLD_SO := $(filter command,$(firstword $(origin NVCC)))
ifneq ($(NVCC),)
NO_CUDA := $(shell id="$$(ls -lL $(NVCC) | tr -s ' ') $$($${NVCC_CCBIN:-gcc} --version 2>&1 | head -1)"; \
	[ "$$(cat build/nvcc 2>/dev/null)" = "$$id" ] && exit; d=$$(mktemp -d); \
	echo '__global__ void kernel(void) {}' > $$d/probe.cu; \
	if $(NVCC) -c $$d/probe.cu -o $$d/probe.o > $$d/said 2>&1; then mkdir -p build; \
	echo "$$id" > build/nvcc; else { grep -i -m 1 -e error -e 'not found' $$d/said || \
	echo 'no reason given'; } | tr -d '\042\047\134$$`' | cut -c1-200; fi; rm -rf "$$d")
BROKEN_NVCC := $(if $(NO_CUDA),$(NVCC))
ifneq ($(NO_CUDA),)
override NVCC :=
endif
endif
ifneq ($(NVCC),)
# The GPUs that are here, e.g. 9.0 -> 90; anything but digits is an error message and no answer.
CAPABILITY := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | \
	tr -d '. \r' | grep -E '^[0-9]+$$' | sort -un)
SUPPORTED := $(shell $(NVCC) --list-gpu-arch 2>/dev/null)
endif

# ---- Flags ----

WARN := -Wall -Wextra -Wshadow
# No -ffast-math: it removes the tests for NaN. -ffp-contract: a*b+c is one instruction. The two
# -fno: nobody reads errno or floating-point traps, and loops with exp become vectors.
CFLAGS ?= -O3 $(NATIVE)
ALL_CFLAGS := -std=c11 -I. $(CFLAGS) $(CONTRACT) -fno-math-errno -fno-trapping-math $(OPENMP) \
	$(WARN) $(WERROR)
ifeq ($(OPENMP),)
ALL_CFLAGS += -Wno-unknown-pragmas
endif
LIBS := -lm

ARCH ?= $(CAPABILITY)
# 90 is built as 90a, which has Hopper's matrix instructions. No GPU here: code for those that are
# common, and PTX that the driver compiles on newer ones.
number = $(subst 90,90a,$(patsubst 90a,90,$(1)))
COMMON := $(patsubst compute_%,%,$(filter $(addprefix compute_,75 80 86 89 90),$(SUPPORTED)))
GENCODE := $(foreach a,$(or $(ARCH),$(COMMON)),-gencode=arch=compute_$(call number,$(a)),code=sm_$(call \
	number,$(a)))
ifeq ($(ARCH),)
GENCODE += -gencode=arch=compute_80,code=compute_80
endif

# Objects for the CPU alone lie in a folder of their own: neither build spoils the other.
BUILD := $(if $(NVCC),build,build/cpu)
CUDA_OBJECTS :=
ifneq ($(NVCC),)
ALL_CFLAGS += -DWITH_CUDA
NVCC_FLAGS := -O3 -I. $(GENCODE) -Xcompiler -Wall,-Wextra -DWITH_CUDA
CUDA_SOURCES := conv_kernels.cu layers.cu $(wildcard fast/*.cu support/*.cu mixers/*.cu)
CUDA_OBJECTS := $(CUDA_SOURCES:%=build/%.o) build/support/kernel_check.o
CUDA_LIBS := $(shell $(NVCC) --dryrun x.cu 2>&1 | sed -n 's/^..*LIBRARIES=//p' | tr -d '"') \
	-lcudart_static -ldl -lrt -lpthread -lstdc++
endif

# ---- Programs ----

# The model and its CPU backends; then what the programs share; then the GPU.
MODEL := $(patsubst %.c,$(BUILD)/%.o,model.c layers.c fast/cpu.c fast/attention.c support/units.c support/score.c \
	support/start.c support/stream.c support/weight_queue.c $(wildcard mixers/*.c))
CORE := $(MODEL) $(patsubst %,$(BUILD)/support/%.o,checkpoint describe heat output progress) \
	$(CUDA_OBJECTS)
# What ./sample computes with: the same sources without fused multiply-add and without libm
# (support/portable.h), so that an archive opens wherever IEEE 754 holds.
PORTABLE := $(MODEL:.o=_portable.o) $(BUILD)/mix_portable.o $(BUILD)/support/predictor_portable.o
SAMPLE_CORE := $(PORTABLE) $(patsubst %,$(BUILD)/support/%.o,archive range_coder scan) \
	$(filter-out $(MODEL),$(CORE))
TESTS := test_language test_gradcheck test_causality test_units test_model test_run \
	test_sample test_mix test_program test_kernels
PROGRAMS := train sample bench data/language

# Why this build is without CUDA: what ./train says, too. No quotes, no backslashes.
WITHOUT = $(if $(BROKEN_NVCC),$(BROKEN_NVCC) does not compile ($(NO_CUDA)): install the whole toolkit \
	or a host compiler that it knows$(COMMA) or give NVCC=PATH,$(if $(TOLD_SO),make was told NVCC=: \
	make again without it,no nvcc was found: install the CUDA toolkit$(COMMA) then make))
COMMA := ,

all: $(PROGRAMS) $(TESTS)
	@echo "built for: $(if $(NVCC),CPU and CUDA ($(strip $(GENCODE))),CPU without CUDA: $(WITHOUT))"

# A change of compiler, flags or architecture rebuilds everything; a program that was linked from
# the other folder of objects is linked anew.
NOTE = $(if $(filter %/why,$@),$(WITHOUT),$(CC) $(ALL_CFLAGS) $(NVCC) $(NVCC_FLAGS))
$(BUILD)/flags $(BUILD)/why build/linked: FORCE
	@mkdir -p $(addprefix $(BUILD)/,fast support mixers tests data)
	@echo '$(NOTE)' | cmp -s - $@ || echo '$(NOTE)' > $@
FORCE:

# bench alone compares with cuBLAS: it needs its library at run time, the others do not.
ifneq ($(NVCC),)
CUBLAS := $(shell ls $(dir $(NVCC))../lib64/libcublas.so $(dir $(NVCC))../targets/*/lib/libcublas.so \
	2>/dev/null | head -1)
endif
BENCH_CORE := $(if $(CUBLAS),$(subst support/timing.cu.o,support/timing_cublas.o,$(CORE)),$(CORE))

HEADERS := model.h mix.h $(wildcard support/*.h support/*.cuh fast/*.h fast/*.cuh mixers/*.h mixers/*.cuh tests/*.h \
	data/*.h)
# These say why there is no CUDA.
SAY_WHY := $(if $(NVCC),,$(patsubst %,$(BUILD)/%.o,bench support/begin test_causality tests/test_kernels))
$(SAY_WHY): $(BUILD)/why
$(BUILD)/%.o: %.c $(HEADERS) $(BUILD)/flags
	$(CC) $(ALL_CFLAGS) $(if $(filter $@,$(SAY_WHY)),-DWITHOUT_CUDA='"$(WITHOUT)"') -c $< -o $@
$(BUILD)/%.cu.o: %.cu $(HEADERS) $(BUILD)/flags
	$(NVCC) $(NVCC_FLAGS) -c $< -o $@
$(BUILD)/support/timing_cublas.o: support/timing.cu $(HEADERS) $(BUILD)/flags
	$(NVCC) $(NVCC_FLAGS) -DWITH_CUBLAS -c $< -o $@
$(BUILD)/%_portable.o: %.c $(HEADERS) $(BUILD)/flags
	$(CC) $(filter-out $(CONTRACT),$(ALL_CFLAGS)) -DPORTABLE $(NO_CONTRACT) -c $< -o $@
$(BUILD)/%_f64.o: %.c $(HEADERS) $(BUILD)/flags
	$(CC) $(filter-out -DWITH_CUDA,$(ALL_CFLAGS)) -DREAL=double -c $< -o $@

$(PROGRAMS) $(TESTS) test_gradcheck_f32 test_units_f64: build/linked
RUN_OBJECTS := $(patsubst %,$(BUILD)/support/%.o,run texts) $(BUILD)/data/language.o
train: $(BUILD)/train.o $(BUILD)/support/begin.o $(RUN_OBJECTS) $(CORE)
bench: $(BUILD)/bench.o $(BENCH_CORE)
	$(CC) $(ALL_CFLAGS) $(filter %.o,$^) -o $@ $(if $(CUBLAS),-L$(dir $(CUBLAS)) -lcublas) \
	$(CUDA_LIBS) $(LIBS)
sample: $(BUILD)/sample.o $(SAMPLE_CORE)
test_causality: $(BUILD)/test_causality.o $(CORE)
test_mix test_program: %: $(BUILD)/tests/%.o $(SAMPLE_CORE)
test_language test_units test_model test_sample test_kernels: %: $(BUILD)/tests/%.o $(CORE)
test_run: $(BUILD)/tests/test_run.o $(RUN_OBJECTS) $(CORE)
test_units: test_units_f64
$(BUILD)/tests/test_language.o: data/language.c
train sample test_causality test_language test_units test_model test_run test_sample test_mix \
test_program test_kernels:
	$(CC) $(ALL_CFLAGS) $(filter %.o,$^) -o $@ $(CUDA_LIBS) $(LIBS)
data/language: data/language.c $(HEADERS) $(MODEL) $(patsubst %,$(BUILD)/support/%.o,heat checkpoint output)
	$(CC) $(filter-out -DWITH_CUDA,$(ALL_CFLAGS)) -DLANGUAGE_MAIN $(filter %.c %.o,$^) -o $@ $(LIBS)
# In double, for finite differences.
test_gradcheck: $(BUILD)/test_gradcheck_f64.o $(MODEL:.o=_f64.o) test_gradcheck_f32
test_units_f64: $(BUILD)/tests/test_units_f64.o $(MODEL:.o=_f64.o)
test_gradcheck_f32: $(BUILD)/test_gradcheck.o $(MODEL)
test_gradcheck test_units_f64 test_gradcheck_f32:
	$(CC) $(ALL_CFLAGS) $(filter %.o,$^) -o $@ $(LIBS)

# What ./sample is made of, PORTABLE first: for tests/test_archive.sh.
sample-sources:
	@echo $(PORTABLE:$(BUILD)/%_portable.o=%) : sample \
	$(patsubst $(BUILD)/%.o,%,$(filter-out $(PORTABLE) $(CUDA_OBJECTS),$(SAMPLE_CORE)))

# ---- Use ----

help:
	@sed -n '/^# make/s/^# //p' Makefile

# Where there is no GPU the demo does not wait for CUDA code.
demo:
	$(if $(CAPABILITY),$(MAKE),$(MAKE) NVCC=) --no-print-directory -j2 train sample
	./train --preset small --out out

# The recipe on the text that it was sought on.
shakespeare: train sample data/tinyshakespeare.txt
	./train data/tinyshakespeare.txt --preset shakespeare --out out-shakespeare
	@if ! command -v gnuplot >/dev/null; then echo "no gnuplot, no picture: see make plot"; \
	else $(MAKE) --no-print-directory plot RUN=out-shakespeare LINE=1.4697 \
	LINE_TITLE="nanoGPT, 10.7 M parameters"; fi

data/tinyshakespeare.txt:
	@set -e; d=$$(mktemp -d $@.XXXXXX); trap 'rm -rf "$$d"' EXIT; \
	url=https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt; \
	sum=86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed; \
	if command -v curl >/dev/null; then curl -fsSL "$$url" -o $$d/text; \
	else wget -qO $$d/text "$$url"; fi || { echo "$@: the download from $$url failed; put the" \
	"file there by hand, or try make demo, which needs no network"; exit 1; }; \
	if command -v sha256sum >/dev/null; then got=$$(sha256sum < $$d/text); \
	else got=$$(shasum -a 256 < $$d/text); fi; \
	[ "$${got%% *}" = $$sum ] || { echo "$@: got SHA-256 $${got%% *}, expected $$sum"; exit 1; }; \
	mv $$d/text $@

# The loss curves of RUN (a folder), or with BENCH every table of ./bench --tsv > bench.tsv.
RUN ?= out
export RUN
plot:
	@if [ -n "$$BENCH" ]; then support/plot.sh bench "$$BENCH"; \
	else support/plot.sh run "$$RUN" "$$LINE" "$$LINE_TITLE"; fi

doctor:
	@echo "compiler   $(CC): $$($(CC) --version | head -1)"
	@echo "flags      $(ALL_CFLAGS)"
	@echo "OpenMP     $(if $(filter-out -fopenmp-simd,$(OPENMP)),$(OPENMP),none: one thread)"
	@echo "nvcc       $(if $(NVCC),$(NVCC): $$($(NVCC) --version | grep release),$(if \
	$(BROKEN_NVCC),$(WITHOUT),none: $(WITHOUT)$(COMMA) or go on without))"
	@echo "driver     $$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | \
	head -1 | grep -E '^[0-9.]+$$' || echo 'none found')"
	@echo "GPU        $(if $(CAPABILITY),$$(nvidia-smi --query-gpu=name --format=csv,noheader | \
	head -1) $(addprefix sm_,$(CAPABILITY)),none found)"
	@echo "builds     $(if $(NVCC),CPU and CUDA: $(strip $(GENCODE)),CPU only)"

# ---- Tests ----

test: $(TESTS) $(PROGRAMS)
	tests/run.sh

# The same tests in a copy, so that the programs here stay as they are: with sanitizers, or as
# another compiler builds them (make try CC=clang OPENMP= NVCC=).
COPY = rm -rf build/$@ && mkdir -p build/$@ && \
	cp -r Makefile *.c *.h *.cu data fast mixers support tests build/$@
asan:
	$(COPY)
	SLOW=1 $(MAKE) -C build/$@ NVCC= CFLAGS='-O2 -g -fsanitize=address,undefined -fno-sanitize-recover=all' test
try:
	$(COPY)
	$(MAKE) -C build/$@ test

mutate:
	CC='$(CC)' CFLAGS='-O2 $(NATIVE) -fno-math-errno -fno-trapping-math' tests/mutate.sh
mutate-gpu:
	tests/mutate.sh --gpu

check-kernels: test_kernels
	./test_kernels --time
sanitize: test_kernels
	for tool in memcheck racecheck initcheck synccheck; do echo "== $$tool"; \
	compute-sanitizer --tool $$tool --error-exitcode 1 ./test_kernels --small || exit 1; done

# libFuzzer on the checkpoint reader. Needs clang and its runtime.
FUZZ_SECONDS ?= 60
fuzz: train
	@mkdir -p build/corpus
	./train --device cpu --channels 4 --units conv --steps 1 --batch 1 --seq 64 --sample-bytes 0 \
	--out build/seed 2>/dev/null
	cp build/seed/*.safetensors build/corpus
	clang -g -O1 -std=c11 -I. -DFUZZ -fsanitize=fuzzer,address,undefined -Wno-unknown-pragmas \
	support/checkpoint.c support/output.c $(MODEL:$(BUILD)/%.o=%.c) -lm -o fuzz_checkpoint
	./fuzz_checkpoint -max_total_time=$(FUZZ_SECONDS) -max_len=65536 build/corpus

clean:
	rm -rf build $(PROGRAMS) $(TESTS) test_gradcheck_f32 test_units_f64 fuzz_checkpoint

.PHONY: all help demo shakespeare plot doctor test asan try mutate mutate-gpu check-kernels sanitize \
	fuzz clean sample-sources FORCE
