#!/bin/sh
# test_build.sh: machines unlike this one. What the Makefile finds there, by stub tools on PATH and
# the lines of `make doctor`; what ./train says of drivers and GPUs that will not do, by a stub of
# the driver's library. Builds no program. Run by `make test`, alone: tests/test_build.sh
cd "$(dirname "$0")/.." || exit 1
bin=$(mktemp -d) || exit 1
trap 'rm -rf "$bin"' EXIT
passed=0 failed=0 skipped=0
for tool in sh make cc gcc as ld head tr grep sed sort cmp mkdir mktemp rm cut readlink cat ls echo; do
    path=$(command -v $tool) && ln -s "$path" "$bin/$tool" 2>/dev/null
done
stub() { # name, its text
    rm -f "$bin/$1"
    printf '#!/bin/sh\n%s\n' "$2" >"$bin/$1"
    chmod +x "$bin/$1"
}
# name, words that must stand in `make doctor`, words that must not, arguments of make
finds() {
    name=$1 words=$2 without=$3; shift 3
    out=$(PATH=$bin MAKEFLAGS= make --no-print-directory doctor CUDA_HOME=/nowhere "$@" 2>&1)
    if echo "$out" | grep -q -e "$words" && ! echo "$out" | grep -q -e "$without"; then
        passed=$((passed + 1)); echo "ok   $name"
    else
        failed=$((failed + 1)); echo "FAIL $name: no '$words', or '$without', in:"; echo "$out"
    fi
}
all='for i in 75 80 86 89 90 100 120; do echo compute_$i; done'
finds 'no nvcc: CPU only' 'builds     CPU only' gencode
finds 'told so: CPU only, and why' 'make was told NVCC=: make again without it' gencode NVCC=
stub nvcc "case \$1 in --list-gpu-arch) $all;; --version) echo release 13.0;; esac"
finds 'no nvidia-smi: code for the common GPUs and PTX for newer' 'sm_75.*sm_80.*sm_90a.*code=compute_80' sm_120
finds 'ARCH overrides' 'arch=compute_86,code=sm_86' sm_75 ARCH=86
finds 'ARCH=90 means 90a' 'code=sm_90a' sm_75 ARCH=90
stub nvidia-smi 'case $1 in *compute_cap*) echo 9.0;; *driver*) echo 580.1;; *) echo Some GPU;; esac'
finds 'an H100: sm_90a alone' 'CUDA: -gencode=arch=compute_90a,code=sm_90a$' sm_75
finds 'its name, driver and capability' 'Some GPU sm_90' 'none found'
stub nvidia-smi 'case $1 in *compute_cap*) printf "8.6\r\n12.0\r\n8.6\r\n";; *) echo x;; esac'
finds 'two kinds of GPU: code for both, once each' 'sm_86.*sm_120$' 'sm_86.*sm_86,'
stub nvidia-smi 'echo "NVIDIA-SMI has failed because it could not communicate with the driver 535."; exit 9'
finds 'a broken driver: its message is no architecture' 'sm_75.*sm_90a' 'failed'
stub nvidia-smi 'echo "[N/A]"'
finds 'a GPU that does not say: the common set' 'sm_75.*sm_90a' 'N/A.*gencode'
stub nvcc 'case $1 in --list-gpu-arch) for i in 75 80 86; do echo compute_$i; done;; esac'
finds 'an old nvcc: nothing that it does not know' 'sm_86' 'sm_90'
stub cc 'case "$*" in *-fopenmp\ *) exit 1;; *-lomp*) exit 1;; esac; exec gcc "$@"'
finds 'a compiler without OpenMP: one thread' 'OpenMP     none' 'flags.*-fopenmp '

stub nvcc 'case "$*" in *probe.cu*) echo "sh: 1: cicc: not found" >&2; exit 1;; --list*) echo compute_80;; esac'
finds 'an nvcc that does not compile: for the CPU, with the reason' 'builds     CPU only' gencode
finds 'and what to do' 'does not compile (sh: 1: cicc: not found): install' 'go on without'
stub nvcc 'case "$*" in *probe.cu*) echo "error: #error -- unsupported GNU version!" >&2; exit 1;; esac'
finds 'a host compiler that nvcc does not know' 'error -- unsupported GNU version' gencode
if PATH=$bin MAKEFLAGS= make -n build/cpu/bench.o CUDA_HOME=/nowhere 2>&1 |
    grep -q "WITHOUT_CUDA='\".*does not compile (error: #error -- unsupported GNU version!)"; then
    passed=$((passed + 1)); echo "ok   which ./bench and ./train say, too"
else
    failed=$((failed + 1)); echo "FAIL the reason does not reach the compiler"
fi
stub gcc 'echo gcc 1'
stub nvcc 'case "$*" in *probe.cu*) gcc --version | grep -q 1 || { echo "error: this gcc is too new"; exit 1; };;
--list*) echo compute_80;; esac'
finds 'what compiled once is not tried again' 'CUDA: -gencode.*sm_80' 'CPU only'
stub gcc 'echo gcc 2'
finds 'but with another host compiler it is' 'this gcc is too new' 'gencode'
rm "$bin/gcc" && ln -s "$(command -v gcc)" "$bin/gcc"
mkdir "$bin/toolkit" && stub toolkit/nvcc 'case "$*" in
*probe.cu*) case $0 in */toolkit/nvcc) ;; *) echo "cicc: not found"; exit 1;; esac;; --list*) echo compute_80;; esac'
rm "$bin/nvcc" && ln -s toolkit/nvcc "$bin/nvcc"
finds 'a link to nvcc: the toolkit beside which it lies' 'CUDA: -gencode.*sm_80' 'CPU only'

# ---- Flags that would make the tests pass for nothing ----

for compiler in gcc clang; do
    for flag in -Ofast -ffast-math -ffinite-math-only; do
        name="$compiler $flag is refused, in one line that says why"
        if ! command -v $compiler >/dev/null; then
            skipped=$((skipped + 1)); echo "skip $name: there is no $compiler"
        elif ! out=$($compiler -std=c11 -I. $flag -c support/units.c -o "$bin/units.o" 2>&1) &&
            [ "$(echo "$out" | grep -c 'error:')" = 1 ] && echo "$out" | grep -q 'error:.*-O3 instead'; then
            passed=$((passed + 1)); echo "ok   $name"
        else
            failed=$((failed + 1)); echo "FAIL $name:"; echo "$out"
        fi
    done
done

# ---- The download: beside the file, under a name of its own ----

mkdir "$bin/data" "$bin/tools"
echo keep >"$bin/data/tinyshakespeare.txt.part"
printf '#!/bin/sh\necho text >"$4"\n' >"$bin/tools/curl"
chmod +x "$bin/tools/curl"
out=$(PATH=$bin/tools:$PATH MAKEFLAGS= make -C "$bin" -f "$PWD/Makefile" NVCC= \
    data/tinyshakespeare.txt 2>&1)
if echo "$out" | grep -q 'got SHA-256' && [ "$(ls "$bin/data")" = tinyshakespeare.txt.part ] &&
    grep -q keep "$bin/data/tinyshakespeare.txt.part"; then
    passed=$((passed + 1)); echo "ok   a download that is not the text leaves nothing, and no other file is touched"
else
    failed=$((failed + 1)); echo "FAIL the download:"; echo "$out"; ls "$bin/data"
fi

# ---- Pictures: only beside the table, whole or not at all ----

printf '#!/bin/sh\necho "$*" >>"$BIN/code"; pwd >>"$BIN/pwd"; [ -z "$BREAK" ] && echo new >picture\n' \
    >"$bin/tools/gnuplot"
chmod +x "$bin/tools/gnuplot"
plot=$PWD/support/plot.sh
# name, status, shell command that must hold afterwards, arguments; in a folder of its own
plots() {
    name=$1 want=$2 then=$3; shift 3
    (cd "$bin/plots" && BIN=$bin PATH=$bin/tools:$PATH "$plot" "$@") >"$bin/said" 2>&1; got=$?
    if [ $got = "$want" ] && (cd "$bin/plots" && eval "$then") && [ ! -e "$bin/plots/.plot"* ] &&
        [ ! -e "$bin/plots/r/.plot"* ]; then
        passed=$((passed + 1)); echo "ok   plot: $name"
    else
        failed=$((failed + 1)); echo "FAIL plot: $name: status $got:"; cat "$bin/said"
        ls -laR "$bin/plots"
    fi
}
mkdir "$bin/plots" "$bin/plots/r" "$bin/plots/it's" "$bin/plots/r.d"
echo log | tee "$bin/plots/r/log.tsv" >"$bin/plots/it's/log.tsv"
printf '# step\tx\n1\t2\n' | tee "$bin/plots/table" "$bin/plots/-t" "$bin/plots/r.d/b" >"$bin/plots/b.tsv"
plots 'the loss' 0 'grep -q new r/loss.png' run r 1.5 "it's"
plots 'is made beside the picture' 0 "grep -q /plots/r/.plot '$bin/pwd'" run r
plots 'a name with a quote is none of its code' 0 \
    "grep -q new it*/loss.png && ! grep -q \"it's/\" '$bin/code' && grep -q \"1.5 it''s'\" '$bin/code'" run "it's"
plots 'a level that is code' 1 'grep -q "expected a number" "$bin/said"' run r "1; system('x')"
echo old >"$bin/plots/r/loss.png"
BREAK=1; export BREAK
plots 'gnuplot fails: status 1, and the old picture stays' 1 'grep -q old r/loss.png' run r
plots 'of a table, too' 1 '[ ! -e table-step.png ]' bench table
unset BREAK
rm "$bin/plots/r/loss.png"; ln -s ../kept "$bin/plots/r/loss.png"; echo old >"$bin/plots/kept"
plots 'a link stays, its file is new' 0 '[ -L r/loss.png ] && grep -q new kept' run r
rm "$bin/plots/r/loss.png"; mkfifo "$bin/plots/r/loss.png"
plots 'a pipe stays' 1 '[ -p r/loss.png ] && grep -q "not a file" "$bin/said"' run r
plots 'a table' 0 'grep -q new b-step.png' bench b.tsv
plots 'a name with ./' 0 'grep -q new table-step.png' bench ./table
plots 'a name with -' 0 'grep -q new ./-t-step.png' bench -t
plots 'a folder with a dot' 0 'grep -q new r.d/b-step.png && [ ! -e r-step.png ]' bench r.d/b
printf '# length\tx\nstack\tT\tms\n' >"$bin/plots/l.tsv"
plots 'cost against length' 0 'grep -q new l-length.png' bench l.tsv
plots 'no table' 1 'grep -q "holds no table" "$bin/said"' bench kept
rm "$bin/plots/it's/loss.png"
if out=$(BIN=$bin PATH=$bin/tools:$PATH MAKEFLAGS= make --no-print-directory NVCC= plot \
    RUN="$bin/plots/it's" 2>&1) && [ -f "$bin/plots/it's/loss.png" ]; then
    passed=$((passed + 1)); echo "ok   make plot of a folder with a quote"
else
    failed=$((failed + 1)); echo "FAIL make plot:"; echo "$out"
fi

# ---- Wrong usage that depends on the build, and a full disk ----

says_one() { # status, words, arguments
    want=$1 words=$2; shift 2
    out=$(./train "$@" --out "$bin/out" 2>&1 >/dev/full); got=$?
    if [ $got = "$want" ] && echo "$out" | tail -1 | grep -q -e "$words"; then
        passed=$((passed + 1)); echo "ok   status $want, '$words'"
    else
        failed=$((failed + 1)); echo "FAIL status $got, no '$words' in:"; echo "$out"
    fi
}
says_one 1 'expected one of: plain cpu' --kernels foo
says_one 2 'one of auto, cpu, cuda' --device foo
says_one 2 'did you mean --channels?' --chanels 3
says_one 1 'standard output: No space left' --help
says_one 1 'cannot write to standard output' --device cpu --steps 1 --batch 1 --seq 64 --channels 4 \
    --units conv
for wrong in '--seed " -3x"' '--seed +3' '--seed 3x' '--shape 1,2,3,4,5,6x' '--shape " 1,2,3,4,5,6"'; do
    if eval "./test_kernels $wrong" 2>&1 | grep -q '^usage: test_kernels'; then
        passed=$((passed + 1)); echo "ok   test_kernels $wrong is refused"
    else
        failed=$((failed + 1)); echo "FAIL test_kernels takes $wrong"
    fi
done
out=$(./bench --device cpu --only stream --seconds 0.01 --tsv 2>&1 >/dev/full); got=$?
if [ $got = 1 ] && echo "$out" | grep -q 'bench: cannot write to standard output: No space'; then
    passed=$((passed + 1)); echo "ok   bench says that it cannot write"
else
    failed=$((failed + 1)); echo "FAIL bench on a full disk: status $got, $out"
fi
out=$(./bench --device cpu --only layers --units "attn:2 2x(mlp:1)" --batch 1 --seq 8 --seconds 0.01 2>&1)
if echo "$out" | grep -q '^attention_backward  *1 ' && echo "$out" | grep -q -e '--units "attn:2 2x(mlp:1)"'; then
    passed=$((passed + 1)); echo "ok   bench takes another stack, and says so"
else
    failed=$((failed + 1)); echo "FAIL bench --units: $out"
fi
rm -rf "$bin/out"

# ---- Drivers and GPUs that will not do: one line each, before anything is read or written ----

# The driver's version and what cuInit answers come from the environment.
cat >"$bin/cuda.c" <<'C'
#include <stdlib.h>
int cuInit(unsigned flags) { return (void)flags, atoi(getenv("STUB_INIT")); }
int cuDriverGetVersion(int *version) { return *version = atoi(getenv("STUB_CUDA")), 0; }
C
# name, version, cuInit's answer, status, words that the one line must hold, arguments
says() {
    name=$1 version=$2 init=$3 want=$4 words=$5; shift 5; rm -rf "$bin/out"
    out=$(STUB_CUDA=$version STUB_INIT=$init LD_LIBRARY_PATH=$bin ./train "$@" --steps 1 --batch 1 \
        --channels 4 --units conv --sample-bytes 0 --out "$bin/out" 2>&1); got=$?
    lines=$(echo "$out" | wc -l) # of a refusal just one, and nothing is written
    if [ $got = "$want" ] && echo "$out" | head -1 | grep -q -e "$words" &&
        { [ $got = 0 ] || { [ "$lines" = 1 ] && [ ! -e "$bin/out" ]; }; }; then
        passed=$((passed + 1)); echo "ok   $name"
    else
        failed=$((failed + 1)); echo "FAIL $name: status $got and no '$words' first in:"; echo "$out"
    fi
}
: >"$bin/libcuda.so.1" # a file that no program can load
if LD_LIBRARY_PATH=$bin ./train --device cuda --out "$bin/out" 2>&1 | grep -q 'without CUDA'; then
    if ./train --device cuda --out "$bin/out" 2>&1 | grep -q -e 'CUDA: make was told NVCC=' \
        -e 'CUDA: no nvcc was found' -e 'CUDA: .* does not compile'; then
        passed=$((passed + 1)); echo "ok   the reason why there is no CUDA"
    else
        failed=$((failed + 1)); echo "FAIL no reason why there is no CUDA"
    fi
    skipped=5; echo "skip 5 messages about drivers and GPUs: this build is without CUDA"
else
    says 'no driver' 0 0 1 'no NVIDIA driver found.*--device cpu' --device cuda
    cc -shared -fPIC "$bin/cuda.c" -o "$bin/libcuda.so.1"
    says 'an old driver' 11000 0 1 'driver knows CUDA 11.0, this build needs 1[0-9]' --device cuda
    says 'an old driver, any device: on the CPU, and why' 11000 0 0 '^on the CPU: .* CUDA 11.0'
    says 'a driver without a GPU' 99000 100 1 'no NVIDIA GPU found' --device cuda
    says 'a GPU that does not answer' 99000 999 1 'cannot reach the GPU: unknown error' --device cuda
fi
echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" = 0 ]
