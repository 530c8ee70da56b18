#!/bin/sh
# test_python.sh: support/fuzzytok.py against sample --score, for every mixer. Needs python3 with
# numpy; where there is none it is skipped, by name. Run by `make test`, alone: tests/test_python.sh
cd "$(dirname "$0")/.." || exit 1
if ! python3 -c 'import numpy' 2>/dev/null; then
    echo "skip support/fuzzytok.py: no python3 with numpy"
    echo "0 passed, 0 failed, 1 skipped"
    exit 0
fi
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
export ASAN_OPTIONS=detect_leaks=0
passed=0 failed=0
data/language --bytes 4000 >"$work/text"
# With every number, too: those that have a letter.
# An input stands first. The rest has a turn at every option of the model.
for mixer in attn:6:9:kv2:r2 attn:6:9:r2:n0 $(./train --help | sed -n '/^A stack of units/,/^$/s/^  \([a-z][a-z0-9]*\).*/\1/p'); do
    for f in none gelu lrelu2; do
        case $mixer in
        smear | bigrams | positions) # of more bytes than sample scores in one piece
            bytes=2500 units="$mixer $mixer conv:2 mlp:2 conv:2:2 mlp:1" ;;
        *) bytes=300 units="$mixer block:2:1:3 $mixer" ;;
        esac
        case $f in
        none) options="--skips 1 --no-bias" ;;
        gelu) options="--no-tie --no-norm-in --no-norm-out" ;;
        *) options= ;;
        esac
        ./train --device cpu --channels 24 --units "$units" --activation $f $options --steps 3 --batch 2 --seq 64 \
            --eval-every 3 --sample-bytes 0 --out "$work/run" "$work/text" 2>"$work/err" >/dev/null
        head -c $bytes "$work/text" >"$work/part"
        want=$(./sample "$work/run/model.safetensors" --score "$work/part" | cut -d' ' -f1)
        got=$(python3 -B support/fuzzytok.py "$work/run/model.safetensors" "$work/part" | cut -d' ' -f1)
        if awk -v a="$want" -v b="$got" 'BEGIN { exit !(a + 0 > 0 && (a - b) ^ 2 < 1e-10) }'; then
            passed=$((passed + 1)); echo "ok   $units, $f${options:+, $options}: $got nats per byte in Python, too"
        else
            failed=$((failed + 1)); echo "FAIL $units, $f${options:+, $options}: $got nats per byte in Python, $want by sample"
        fi
    done
done
echo "$passed passed, $failed failed, 0 skipped"
[ "$failed" = 0 ]
