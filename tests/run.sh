#!/bin/sh
# run.sh: runs every test program that `make test` built and adds up their closing lines.
# A program that fails, crashes or runs no check fails the whole.     tests/run.sh [PROGRAM...]
cd "$(dirname "$0")/.." || exit 1
[ $# -gt 0 ] || set -- ./test_language ./test_gradcheck ./test_causality ./test_units \
    ./test_model ./test_run ./test_sample ./test_mix ./test_program ./test_kernels tests/test_train.sh \
    tests/test_archive.sh tests/test_build.sh tests/test_python.sh
ulimit -f 2000000 # a program that never stops writing shall fail, not fill the disk
log=$(mktemp) || exit 1
trap 'rm -f "$log"' EXIT
passed=0 failed=0 skipped=0
for program; do
    echo "== $program"
    ${program} >"$log" 2>&1
    status=$?
    cat "$log"
    closing=$(tail -1 "$log" | grep -E '^[0-9]+ passed, [0-9]+ failed, [0-9]+ skipped$')
    if [ -n "$closing" ]; then
        passed=$((passed + $(echo "$closing" | cut -d' ' -f1)))
        failed=$((failed + $(echo "$closing" | cut -d' ' -f3)))
        skipped=$((skipped + $(echo "$closing" | cut -d' ' -f5)))
    fi
    case "$closing,$status" in
    *' 0 failed, '*,0) ;;
    ,*) echo "FAIL $program ended with status $status and no closing line"; failed=$((failed + 1)) ;;
    *' 0 failed, '*) echo "FAIL $program ended with status $status"; failed=$((failed + 1)) ;;
    esac
done
echo "== all"
echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" = 0 ] && [ "$passed" -gt 0 ]
