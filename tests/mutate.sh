#!/bin/sh
# mutate.sh: do the tests notice? Breaks the code in one place at a time and expects a test to fail.
#
# A mutant is one line of mutants.txt: name | file | exact old text | new text. The old text must
# stand in the file exactly once and the mutant must compile, or the run fails: a mutant that no
# longer fits the code proves nothing. To add one, add a line.
#   make mutate                    all of mutants.txt, two at a time: 16 minutes for 392 on two cores
#   tests/mutate.sh 'norm'         those whose name matches
#   tests/mutate.sh --fits         only whether every old text stands where it should
#   tests/mutate.sh --gpu [NAME]   mutants_gpu.txt on a machine with a GPU: test_kernels --small
# CC, CFLAGS, NVCC, JOBS and TESTS (which programs are to notice, the quickest first) are taken from
# the environment.
TESTS=${TESTS:-test_units test_causality test_model test_run test_units_f64 test_gradcheck \
    test_sample test_mix test_program test_language}
CC=${CC:-cc}
CFLAGS=${CFLAGS:--O2}
here=$(cd "$(dirname "$0")" && pwd)
root=$(dirname "$here")
# Seconds for a test; a mutant that never ends counts as caught. (GPU mutants share one GPU.)
export LIMIT=${LIMIT:-120}
if command -v timeout >/dev/null; then limit="timeout $LIMIT"; else limit=; fi

# replace FILE: FILE with $OLD, which must stand in it once, replaced by $NEW.
replace() {
    awk 'BEGIN { old = ENVIRON["OLD"]; new = ENVIRON["NEW"] }
         { at = index($0, old)
           if (at) {
               rest = substr($0, at + length(old))
               found += index(rest, old) ? 2 : 1
               $0 = substr($0, 1, at - 1) new rest
           }
           print }
         END { exit found != 1 }' "$1" > "$1.new" && mv "$1.new" "$1"
}

# ---- Building: in the current folder; an object that lies there already is taken ----

# objects SUFFIX NAME...: compiles what is missing.
objects() {
    suffix=$1
    shift
    for object; do
        [ -f "$object$suffix" ] && continue
        case $suffix in
        _f64.o) real=-DREAL=double ;;
        _portable.o) real="-DPORTABLE -ffp-contract=off" ;;
        *) real= ;;
        esac
        $CC -std=c11 $CFLAGS -w -MMD -I. $real -c "$object.c" -o "$object$suffix" || return 1
    done
}

# program FILE SUFFIX OBJECT...
program() {
    out=$1 suffix=$2 linked=
    shift 2
    objects "$suffix" "$@" || return 1
    for object; do linked="$linked $object$suffix"; done
    $CC $CFLAGS $linked -lm -o "$out"
}

# portable FILE OBJECT...: with what ./sample computes with
portable() {
    out=$1 linked=
    shift
    objects _portable.o $model mix support/predictor && objects .o "$@" || return 1
    for object in $model mix support/predictor; do linked="$linked ${object}_portable.o"; done
    for object; do linked="$linked $object.o"; done
    $CC $CFLAGS $linked -lm -o "$out"
}

# source TEST: where it stands, without .c
source_of() { if [ -f "tests/$1.c" ]; then echo "tests/$1"; else echo "$1"; fi; }

# build TEST: that program and what it runs
build() {
    model="model layers fast/cpu fast/attention support/units support/score support/start
        support/stream support/weight_queue"
    for mixer in mixers/*.c; do model="$model ${mixer%.c}"; done
    files="support/checkpoint support/describe support/heat support/output support/progress"
    core="$model $files"
    packing="support/archive support/range_coder support/scan $files"
    source=$(source_of "$1")
    case $1 in
    test_gradcheck)
        program test_gradcheck _f64.o "$source" $model &&
            program test_gradcheck_f32 .o "$source" $model ;;
    test_units_f64) program test_units_f64 _f64.o tests/test_units $model ;;
    test_mix) portable test_mix "$source" $packing ;;
    test_program) portable sample sample $packing && portable test_program "$source" $packing ;;
    test_run) program test_run .o "$source" support/run support/texts data/language $core ;;
    *) program "$1" .o "$source" $core ;;
    esac
}

# With a GPU: every .cu for it alone, little optimised, and test_kernels. (layers.c and layers.cu
# have the same name: the object of X.cu is X_cu.o.)
build_gpu() {
    for cuda in *.cu fast/*.cu support/*.cu mixers/*.cu; do
        [ -f "${cuda%.cu}_cu.o" ] || echo "${cuda%.cu}"
    done | xargs -P "$COMPILERS" -I {} \
        "$NVCC" -O1 -Xptxas -O1 -w -I. "$GENCODE" -DWITH_CUDA -c {}.cu -o {}_cu.o || return 1
    linked=
    for object in model layers fast/cpu fast/attention support/units support/score support/stream support/weight_queue \
        support/kernel_check tests/test_kernels $(ls mixers/*.c); do
        object=${object%.c}
        [ -f "$object.o" ] || $CC -std=c11 -O2 -fopenmp -w -I. -DWITH_CUDA -c "$object.c" \
            -o "$object.o" || return 1
        linked="$linked $object.o"
    done
    "$NVCC" "$GENCODE" -Xcompiler -fopenmp $linked ./*_cu.o ./*/*_cu.o -lm -o test_kernels
}

# forget FILE: removes the objects that FILE went into. Compilers list the headers of C files (.d);
# of a header for CUDA files every .cu counts as a reader.
forget() {
    case $1 in
    data/language.c) rm -f tests/test_language.o ;;  # which includes it
    *.c) rm -f "${1%.c}.o" "${1%.c}_f64.o" "${1%.c}_portable.o" ;;
    *.cu) rm -f "${1%.cu}_cu.o" ;;
    *)
        grep -l -e " $1\$" -e " $1 " ./*.d ./*/*.d 2>/dev/null | sed 's/d$/o/' | xargs rm -f
        rm -f ./*_cu.o ./*/*_cu.o ;;
    esac
}

# first_failure: builds and runs one test after the other up to the first that fails, and says in
# $failure which and how. 1 if none does, 2 if one does not compile.
first_failure() {
    for test in $TESTS; do
        $BUILD "$test" > build.txt 2>&1 || return 2
        case $test in
        test_kernels) part=--small ;;
        test_units) part=--float ;;  # test_units_f64 has a turn of its own
        *) part= ;;
        esac
        STOP_AT_FIRST_FAILURE=1 $limit "./$test" $part > "$test.txt" 2>&1
        status=$?
        [ $status = 0 ] && continue
        failure=$(grep -m 1 '^FAIL' "$test.txt")
        failure="$test: ${failure:-exit status $status}"
        return 0
    done
    return 1
}

# begin_with TEST: it has the first turn, where it has one at all
begin_with() {
    case " $TESTS " in
    *" $1 "*) TESTS="$1 $(echo " $TESTS " | sed "s/ $1 / /")" ;;
    esac
}

# one LINE: makes that mutant in a folder of its own and prints what became of it.
one() {
    name=${1%% | *} rest=${1#* | }
    file=${rest%% | *} rest=${rest#* | }
    OLD=${rest%% | *} NEW=${rest#* | }
    export OLD NEW
    folder=$(mktemp -d "$work/XXXXXX") && cd "$folder" && cp -r "$work"/base/. . || exit 255
    if ! replace "$file"; then
        echo "BROKEN    $name: the old text is not in $file exactly once: $OLD"
    elif [ -n "$FITS" ]; then
        echo "fits      $name"
    else
        forget "$file"
        case $file in  # what only one of them sees should not wait for all others to pass
        support/run.c | support/score.c | support/texts.c | support/progress.c)
            begin_with test_run ;;
        support/checkpoint.c | support/stream.c) begin_with test_sample ;;
        mix.c | support/predictor.c | support/portable.h | support/range_coder.c)
            begin_with test_mix ;;
        support/archive.c) begin_with test_program ;;
        sample.c | support/[dhor]*.[ch]) begin_with test_program ;;
        data/language.c) begin_with test_language ;;
        esac
        first_failure
        case $? in
        0) echo "caught    $name ($failure)" ;;
        1) echo "SURVIVED  $name: $file: $NEW" ;;
        *) echo "BROKEN    $name: does not compile: $(grep -m 1 -i error build.txt)" ;;
        esac
    fi
    cd / && rm -rf "$folder"
}

if [ "$1" = --one ]; then
    one "$2"
    exit 0
fi

BUILD=build mutants=mutants.txt FITS= gpu=
while :; do
    case $1 in --fits) FITS=fit ;; --gpu) gpu=1 ;; *) break ;; esac
    shift
done
if [ -n "$gpu" ]; then
    LIMIT=600 BUILD=build_gpu mutants=mutants_gpu.txt TESTS=test_kernels COMPILERS=$(nproc)
    NVCC=${NVCC:-$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)}
    arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -1 |
        tr -d '. \r' | grep -E '^[0-9]+$')
    if [ -z "$arch" ] && [ -z "$FITS" ]; then
        echo "mutate.sh --gpu needs a machine with a GPU: none found"
        exit 0
    fi
    [ "$arch" = 90 ] && arch=90a
    GENCODE="-gencode=arch=compute_$arch,code=sm_$arch"
fi

work=$(mktemp -d) && export work CC CFLAGS TESTS BUILD FITS NVCC GENCODE COMPILERS || exit 1
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT TERM
mkdir "$work/base" && cd "$work/base" || exit 1
for folder in . support fast mixers tests data; do
    mkdir -p "$folder"
    for file in "$root/$folder"/*.[ch] "$root/$folder"/*.cu "$root/$folder"/*.cuh; do
        case $file in *'*'*) continue ;; esac  # a pattern that matches nothing
        # Without --gpu nothing reads CUDA files, and forget looks at those that are there.
        case $file in *.cu | *.cuh) [ -n "$gpu" ] || continue ;; esac
        cp "$file" "$folder" || exit 1
    done
done
if [ -z "$FITS" ]; then
    first_failure
    case $? in
    0) echo "mutate.sh: the code as it is fails already: $failure" && exit 1 ;;
    2) echo "mutate.sh: the code as it is does not compile:" && cat build.txt && exit 1 ;;
    esac
fi
export COMPILERS=1
grep -v -e '^#' -e '^ *$' "$here/$mutants" | grep -e "^[^|]*$1" | tr '\n' '\0' |
    xargs -0 -P "${JOBS:-2}" -n 1 sh "$here/mutate.sh" --one | tee "$work/results"
caught=$(grep -c -e '^caught' -e '^fits' "$work/results")
total=$(grep -c . "$work/results")
echo "$caught of $total mutants ${FITS:-caught}"
[ "$caught" = "$total" ] && [ "$total" -gt 0 ]
