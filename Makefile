# make            every program, with CUDA where nvcc is found       make test      all tests
# make demo       train on the built-in corpus for a minute or two   make doctor    what was found
# make shakespeare    fetch TinyShakespeare and train the recipe     make plot      loss curves
# Override on the command line: CC=clang  NVCC=  (no CUDA)  ARCH=90a  OPENMP=  (one thread)

# ---- What this machine has. Every probe compiles or runs something; none trusts a name alone. ----

try = $(shell echo 'int main(void) { return 0; }' | $(CC) $(1) -x c - -o /dev/null 2>/dev/null && \
	echo '$(1)')
OPENMP := $(or $(call try,-fopenmp),$(call try,-Xpreprocessor -fopenmp -lomp),$(call try,-fopenmp-simd))
NATIVE := $(call try,-march=native)
CONTRACT := $(call try,-ffp-contract=fast)
CUDA_HOME ?= /usr/local/cuda
NVCC := $(shell command -v nvcc 2>/dev/null || ls $(CUDA_HOME)/bin/nvcc 2>/dev/null)
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
ALL_CFLAGS := -std=c11 $(CFLAGS) $(CONTRACT) -fno-math-errno -fno-trapping-math $(OPENMP) $(WARN) $(WERROR)
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

CUDA_OBJECTS :=
ifneq ($(NVCC),)
ALL_CFLAGS += -DWITH_CUDA
NVCC_FLAGS := -O3 $(GENCODE) -Xcompiler -Wall,-Wextra -DWITH_CUDA
CUDA_OBJECTS := build/conv_kernels.o build/conv_tensor.o build/layers.o build/kernel_check.o
CUDA_LIBS := $(shell $(NVCC) --dryrun x.cu 2>&1 | sed -n 's/^..*LIBRARIES=//p' | tr -d '"') \
	-lcudart_static -ldl -lrt -lpthread -lstdc++
endif

# ---- Programs ----

CORE := build/model.o build/checkpoint.o build/stream.o $(CUDA_OBJECTS)
TESTS := test_gradcheck test_causality test_model test_sample test_kernels
PROGRAMS := train sample bench data/language

all: $(PROGRAMS) $(TESTS)
	@echo "built for: $(if $(NVCC),CPU and CUDA ($(strip $(GENCODE))),CPU; no nvcc found, so no CUDA)"

# A change of compiler, flags or architecture rebuilds everything.
build/flags: FORCE
	@mkdir -p build
	@echo '$(CC) $(ALL_CFLAGS) $(NVCC) $(NVCC_FLAGS)' | cmp -s - $@ || \
	 echo '$(CC) $(ALL_CFLAGS) $(NVCC) $(NVCC_FLAGS)' > $@
FORCE:

# bench alone compares with cuBLAS: it needs its library at run time, the others do not.
ifneq ($(NVCC),)
CUBLAS := $(shell ls $(dir $(NVCC))../lib64/libcublas.so $(dir $(NVCC))../targets/*/lib/libcublas.so \
	2>/dev/null | head -1)
endif
BENCH_CORE := $(if $(CUBLAS),$(subst build/layers.o,build/layers_cublas.o,$(CORE)),$(CORE))

HEADERS := model.h checkpoint.h stream.h cli.h kernels.h test.h data/language.h
build/%.o: %.c $(HEADERS) build/flags
	$(CC) $(ALL_CFLAGS) -c $< -o $@
build/language.o: data/language.c $(HEADERS) build/flags
	$(CC) $(ALL_CFLAGS) -c $< -o $@
build/%.o: %.cu $(HEADERS) build/flags
	$(NVCC) $(NVCC_FLAGS) -c $< -o $@
build/layers_cublas.o: layers.cu $(HEADERS) build/flags
	$(NVCC) $(NVCC_FLAGS) -DWITH_CUBLAS -c $< -o $@
build/%_f64.o: %.c $(HEADERS) build/flags
	$(CC) $(filter-out -DWITH_CUDA,$(ALL_CFLAGS)) -DREAL=double -c $< -o $@

train: build/train.o build/language.o $(CORE)
bench: build/bench.o $(BENCH_CORE)
	$(CC) $(ALL_CFLAGS) $^ -o $@ $(if $(CUBLAS),-L$(dir $(CUBLAS)) -lcublas) $(CUDA_LIBS) $(LIBS)
sample test_causality test_model test_sample test_kernels: %: build/%.o $(CORE)
train sample test_causality test_model test_sample test_kernels:
	$(CC) $(ALL_CFLAGS) $^ -o $@ $(CUDA_LIBS) $(LIBS)
data/language: data/language.c data/language.h build/flags
	$(CC) $(ALL_CFLAGS) -DLANGUAGE_MAIN $< -o $@ $(LIBS)
test_gradcheck: build/test_gradcheck_f64.o build/model_f64.o test_gradcheck_f32
	$(CC) $(ALL_CFLAGS) $(filter %.o,$^) -o $@ $(LIBS)
test_gradcheck_f32: build/test_gradcheck.o build/model.o
	$(CC) $(ALL_CFLAGS) $^ -o $@ $(LIBS)

# ---- Use ----

demo: train sample
	./train --preset small --out out

# The recipe on the text that it was sought on.
shakespeare: train sample data/tinyshakespeare.txt
	./train data/tinyshakespeare.txt --preset shakespeare --out out-shakespeare
	@if ! command -v gnuplot >/dev/null; then echo "no gnuplot, no picture: see make plot"; \
	else $(MAKE) --no-print-directory plot RUN=out-shakespeare LINE=1.4697 \
	LINE_TITLE="nanoGPT, 10.7 M parameters"; fi

data/tinyshakespeare.txt:
	@set -e; trap 'rm -f $@.part' EXIT; \
	url=https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt; \
	sum=86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed; \
	if command -v curl >/dev/null; then curl -fsSL "$$url" -o $@.part; \
	else wget -qO $@.part "$$url"; fi || { echo "$@: the download from $$url failed; put the" \
	"file there by hand, or try make demo, which needs no network"; exit 1; }; \
	if command -v sha256sum >/dev/null; then got=$$(sha256sum < $@.part); \
	else got=$$(shasum -a 256 < $@.part); fi; \
	[ "$${got%% *}" = $$sum ] || { echo "$@: got SHA-256 $${got%% *}, expected $$sum"; exit 1; }; \
	mv $@.part $@

# The loss curves of RUN (a folder) as RUN/loss.png: training as the mean of every n steps, at most
# 150 points. LINE=1.4697 adds a level, LINE_TITLE names it. The first twentieth, where the loss
# falls from 5.5, may lie above the picture.
RUN ?= out
comma := ,
have_gnuplot = command -v gnuplot >/dev/null || { echo "make plot needs gnuplot: apt-get install \
	gnuplot-nox (or brew install gnuplot); $(1) is plain text for any other plotter"; exit 1; }
ifneq ($(BENCH),)
# Every table in BENCH (of ./bench --tsv > bench.tsv) as a picture beside it. After the colon: the
# columns to draw.
plot:
	@$(call have_gnuplot,$(BENCH))
	@[ -f $(BENCH) ] || { echo "$(BENCH) is not there: ./bench --tsv > $(BENCH)"; exit 1; }
	@for t in step:3:3 layers:3:3 stream:2:2 table1:2:4 memory:2:3 ladder:2:2; do \
	name=$${t%%:*}; to=$${t##*:}; from=$${t#*:}; from=$${from%:*}; \
	grep -q "^# $$name	" $(BENCH) || continue; \
	awk -F '\t' -v t="# $$name" '/^#/ {if (NF > 1) on = $$1 == t; next} on' $(BENCH) >$(BENCH).one; \
	gnuplot -e "set terminal pngcairo noenhanced size 900,540; \
	set output '$(basename $(BENCH))-$$name.png'; \
	set datafile separator '\t'; set title '$$name'; set logscale y; set grid y; set style fill solid; \
	set style data histograms; set xtics rotate by -60; set key left autotitle columnhead; \
	plot for [i=$$from:$$to] '$(BENCH).one' using i:xtic(1)" && \
	echo "$(basename $(BENCH))-$$name.png"; done; rm -f $(BENCH).one
else
plot:
	@$(call have_gnuplot,$(RUN)/log.tsv)
	@[ -f $(RUN)/log.tsv ] || { echo "$(RUN)/log.tsv is not there: train first, or name RUN=DIR"; \
	exit 1; }
	@gnuplot -e "log = '$(RUN)/log.tsv'; set terminal pngcairo size 900,540; \
	set output '$(RUN)/loss.png'; set xlabel 'step'; set ylabel 'nats per byte'; set grid; \
	set datafile missing 'nan'; stats log using 1 nooutput; last = STATS_max; \
	n = ceil(last / 150.0); top = 0; top(x) = (x > top ? (top = x) : top); \
	stats log using (\$$1 > last / 20 ? top(\$$2) : 0) nooutput; \
	stats log using (top(\$$3)) nooutput; set yrange [*:1.02 * top]; \
	plot log using (n * floor((\$$1 - 1) / n) + n / 2.0):2 smooth unique with lines lw 2 \
	title sprintf('training, mean of %d steps', n), log using 1:3 with linespoints lw 2 pt 7 \
	title 'held out' $(if $(LINE),$(comma) $(LINE) with lines dt 2 title '$(LINE) $(LINE_TITLE)')"
	@echo "$(RUN)/loss.png"
endif

doctor:
	@echo "compiler   $(CC): $$($(CC) --version | head -1)"
	@echo "flags      $(ALL_CFLAGS)"
	@echo "OpenMP     $(if $(filter-out -fopenmp-simd,$(OPENMP)),$(OPENMP),none: one thread)"
	@echo "nvcc       $(if $(NVCC),$(NVCC): $$($(NVCC) --version | grep release),none: install the \
	CUDA toolkit for the GPU, or go on without)"
	@echo "driver     $$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | \
	head -1 | grep -E '^[0-9.]+$$' || echo 'none found')"
	@echo "GPU        $(if $(CAPABILITY),$$(nvidia-smi --query-gpu=name --format=csv,noheader | \
	head -1) $(addprefix sm_,$(CAPABILITY)),none found)"
	@echo "builds     $(if $(NVCC),CPU and CUDA: $(strip $(GENCODE)),CPU only)"

# ---- Tests ----

test: $(TESTS) train sample data/language
	./run_tests.sh

# The same tests in a copy, so that the programs here stay as they are: with sanitizers, or as
# another compiler builds them (make try CC=clang OPENMP= NVCC=).
COPY = rm -rf build/$@ && mkdir -p build/$@/data && cp Makefile *.c *.h *.cu *.sh build/$@ && \
	cp data/*.[ch] build/$@/data
asan:
	$(COPY)
	$(MAKE) -C build/$@ NVCC= CFLAGS='-O2 -g -fsanitize=address,undefined -fno-sanitize-recover=all' test
try:
	$(COPY)
	$(MAKE) -C build/$@ test

mutate:
	./mutate.sh

# On a machine with a GPU: every kernel against the CPU, then timed beside the others.
check-kernels: test_kernels
	./test_kernels --time
# The same at small shapes under each tool of compute-sanitizer.
sanitize: test_kernels
	for tool in memcheck racecheck initcheck synccheck; do echo "== $$tool"; \
	compute-sanitizer --tool $$tool --error-exitcode 1 ./test_kernels --small || exit 1; done

# libFuzzer on the checkpoint reader, a minute by default. Needs clang and its runtime.
FUZZ_SECONDS ?= 60
fuzz: train
	@mkdir -p build/corpus
	./train --device cpu --channels 4 --blocks 1 --steps 1 --batch 1 --seq 64 --sample-bytes 0 \
	--out build/seed 2>/dev/null
	cp build/seed/*.safetensors build/corpus
	clang -g -O1 -std=c11 -DFUZZ -fsanitize=fuzzer,address,undefined -Wno-unknown-pragmas \
	checkpoint.c model.c -lm -o fuzz_checkpoint
	./fuzz_checkpoint -max_total_time=$(FUZZ_SECONDS) -max_len=65536 build/corpus

.PHONY: all demo shakespeare plot doctor test asan try mutate check-kernels sanitize fuzz FORCE
