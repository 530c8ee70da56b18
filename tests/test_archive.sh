#!/bin/sh
# test_archive.sh: archives open anywhere. ./sample as it is built here makes them; builds by other
# compilers, for other processors and with another libc must make the same bytes and open them.
# What is missing here is skipped by name. Run by `make test`, alone: tests/test_archive.sh
cd "$(dirname "$0")/.." || exit 1
folder=$(mktemp -d) || exit 1
trap 'rm -rf "$folder"' EXIT
export OMP_WAIT_POLICY=passive
passed=0 failed=0 skipped=0
check() { # name, status
    if [ "$2" = 0 ]; then passed=$((passed + 1)); echo "ok   $1"; else
        failed=$((failed + 1)); echo "FAIL $1"; fi
}
sources=$(MAKEFLAGS= make -s --no-print-directory NVCC= sample-sources)
portable=${sources% : *} others=${sources#* : }
# build NAME COMPILER FLAGS...: another ./sample, from the sources and flags that the Makefile has.
build() {
    name=$1 compiler=$2; shift 2
    mkdir "$folder/$name.o" && for file in $portable $others; do
        case " $portable " in *" $file "*) how='-DPORTABLE -ffp-contract=off' ;; *) how= ;; esac
        "$compiler" -std=c11 -I. "$@" $how -w -c "$file.c" \
            -o "$folder/$name.o/$(basename "$file").o" || return 1
    done
    "$compiler" "$@" "$folder/$name.o"/*.o -lm -o "$folder/$name" >"$folder/log" 2>&1
}
# Every kind of unit, every activation, a softcap; both heads.
stacks='smear bigrams:300:8 positions conv:2:3 attn:2:20:kv1:r6 mlp:2:lrelu2 block:3:1:2:gelu attn:4:9 conv:3:2:none'
./train --device cpu --units "$stacks" --channels 24 --softcap 9 --steps 12 --batch 2 --seq 64 \
    --sample-bytes 0 --out "$folder/a" 2>/dev/null >/dev/null
./train --device cpu --units "$stacks" --channels 40 --tie --steps 3 --batch 2 --seq 64 \
    --sample-bytes 0 --out "$folder/b" 2>/dev/null >/dev/null
head -c 3000 model.c >"$folder/text"
head -c 20000 layers.c >"$folder/prime"
# ways PROGRAM: archives of every kind by it, in the current folder
ways() {
    "$@" "$folder/a" --compress "$folder/text" a.cm --prime "$folder/prime" --force &&
        "$@" "$folder/b" --compress "$folder/text" b.ngram --mix ngram --force &&
        "$@" "$folder/b" --compress "$folder/text" b.none --mix none --blocks 3 --force &&
        "$@" --compress "$folder/text" cm --blocks 2 --force
}
mkdir "$folder/here" && (cd "$folder/here" && ways "$OLDPWD/sample" 2>/dev/null)
check 'this build makes archives of every kind' $?
# same NAME WHAT COMMAND...: makes the same archives, and opens those made here
same() {
    name=$1 what=$2; shift 2
    mkdir "$folder/$name.made" && (cd "$folder/$name.made" && ways "$@" 2>/dev/null)
    cmp -s "$folder/here/a.cm" "$folder/$name.made/a.cm" &&
        cmp -s "$folder/here/b.ngram" "$folder/$name.made/b.ngram" &&
        cmp -s "$folder/here/b.none" "$folder/$name.made/b.none" &&
        cmp -s "$folder/here/cm" "$folder/$name.made/cm"
    check "$what makes the same archives, bit for bit" $?
    "$@" "$folder/a" --decompress "$folder/here/a.cm" "$folder/$name.back" \
        --prime "$folder/prime" 2>/dev/null &&
        cmp -s "$folder/text" "$folder/$name.back" && rm "$folder/$name.back" &&
        "$@" "$folder/b" --decompress "$folder/here/b.none" "$folder/$name.back" 2>/dev/null &&
        cmp -s "$folder/text" "$folder/$name.back"
    check "$what opens those made here" $?
}
# another NAME WHAT TOOL COMPILER FLAGS...
another() {
    name=$1 what=$2 tool=$3; shift 3
    if ! command -v "$tool" >/dev/null || ! command -v "$1" >/dev/null; then
        echo "skip $what: no $tool or no $1 here"; skipped=$((skipped + 1)); return
    fi
    build "$name" "$@" || { check "$what builds" 1; return; }
    case $tool in
    qemu*) same "$name" "$what" "$tool" "$folder/$name" ;;
    *) same "$name" "$what" "$folder/$name" ;;
    esac
}
OMP_NUM_THREADS=3 same threads 'this build with three threads' "$PWD/sample"
another gcc0 'gcc -O0' gcc gcc -O0
another clang 'clang -O2' clang clang -O2 -march=native
case $(uname -m) in
x86_64) another v2 'gcc for x86-64-v2' gcc gcc -O2 -march=x86-64-v2 ;;
*) echo "skip x86-64-v2: another processor"; skipped=$((skipped + 1)) ;;
esac
another musl 'musl-gcc' musl-gcc musl-gcc -O2 -static
another arm 'gcc for aarch64 under qemu' qemu-aarch64 aarch64-linux-gnu-gcc -O2 -static
case $(uname -m) in
x86_64)
    build x87 gcc -O2 -mfpmath=387
    (cd "$folder" && ./x87 --compress text z >out 2>&1; grep -q '^sample: .*rounds otherwise' out &&
        [ ! -e z ])
    check 'a build that rounds otherwise says so and makes none' $? ;;
*) echo "skip a build that rounds otherwise: another processor"; skipped=$((skipped + 1)) ;;
esac
echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" = 0 ]
