#!/bin/sh
# test_train.sh: the trainer as its user meets it: exact resuming, threads, signals, kills, full
# disks, odd texts, wrong usage. One line per check; run by `make test`, alone: ./test_train.sh
# Builds nothing; works in a temporary folder that it removes.
cd "$(dirname "$0")" || exit 1
root=$PWD
work=$(mktemp -d) || exit 1
pid=
trap '[ -z "$pid" ] || kill -9 $pid 2>/dev/null; rm -rf "$work"' EXIT
cd "$work" || exit 1
# Under AddressSanitizer: a program that ends with an error leaves its memory to the system.
export ASAN_OPTIONS=detect_leaks=0
passed=0 failed=0 skipped=0
ok() { passed=$((passed + 1)); echo "ok   $1"; }
bad() { failed=$((failed + 1)); echo "FAIL $1"; }
check() { if [ "$1" = 0 ]; then ok "$2"; else bad "$2"; fi; } # status, name

# A run of about 5 ms a step, with every option that draws random numbers.
small="--device cpu --channels 48 --blocks 1 --batch 4 --seq 96 --block-form prenorm --tie \
--softcap 20 --dropout 0.1 --byte-dropout 0.1 --ema 0.9 --accum 2 --warmup 5"
"$root/data/language" --bytes 20000 >text || exit 1
train() { "$root/train" "$@" >>"$work/stdout" 2>>"$work/stderr"; }
start() { "$root/train" "$@" >>"$work/stdout" 2>>"$work/stderr" & pid=$!; } # no subshell between: kill meets it
same() { cmp -s "$1" "$2"; }
rows() { grep -v '^#' "$1"; }

# ---- The same bits however the run is cut, and on however many threads ----

train $small --threads 2 --steps 100 --eval-every 20 --out whole text || bad "a run of 100 steps"
start $small --threads 2 --steps 100 --eval-every 20 --out cut text
while kill -0 $pid 2>/dev/null && ! grep -q '^60	nan' cut/log.tsv 2>/dev/null; do sleep 0.01; done
kill -9 $pid 2>/dev/null
wait $pid 2>/dev/null
train --resume cut --threads 2
check $? "a killed run goes on"
grep -q 'resumed at step' cut/log.tsv
check $? "it was killed before its end"
same whole/model.safetensors cut/model.safetensors && same whole/state.safetensors cut/state.safetensors
check $? "100 steps = 60 or so, kill -9, resume: model and state bit for bit"
rows whole/log.tsv >a; rows cut/log.tsv >b
same a b
check $? "and the same log"

for n in 1 5; do
    train $small --threads $n --steps 20 --eval-every 20 --out threads$n text
done
train $small --threads 2 --steps 20 --eval-every 20 --out threads2 text
same threads1/state.safetensors threads2/state.safetensors &&
    same threads5/state.safetensors threads2/state.safetensors
check $? "1, 2 and 5 threads give the same state bit for bit"
train $small --threads 2 --steps 20 --eval-every 20 --seed 2 --out seed2 text
! same seed2/state.safetensors threads2/state.safetensors
check $? "another seed gives another state"

# ---- Stopping: a signal loses nothing, kill -9 never leaves a folder without a checkpoint ----

start $small --steps 100000 --eval-every 20 --out stopped text
while kill -0 $pid 2>/dev/null && ! grep -q '^20	nan' stopped/log.tsv 2>/dev/null; do sleep 0.01; done
kill -TERM $pid; wait $pid
check $? "SIGTERM ends with status 0"
grep -q 'go on with: ./train --resume stopped' "$work/stderr"
check $? "and says how to go on"
last=$(rows stopped/log.tsv | tail -1 | cut -f1)
train --resume stopped --steps $((last + 1)) && [ "$(rows stopped/log.tsv | grep -vc nan.nan)" -gt 0 ]
check $? "the step it stopped at is where it goes on"

train $small --steps 2 --eval-every 1 --out killed text
lost=0 kills=0
while [ $kills -lt 200 ]; do # each run saves all the time; moments spread over 0..50 ms
    start $small --threads 1 --steps 100000 --eval-every 1 --out killed$((kills % 2)) text
    while kill -0 $pid 2>/dev/null && ! [ -f killed$((kills % 2))/state.safetensors ]; do :; done
    sleep 0.0$((kills * 37 % 50 / 10))$((kills * 37 % 10))
    kill -9 $pid 2>/dev/null; wait $pid 2>/dev/null
    "$root/sample" killed$((kills % 2))/model.safetensors --bytes 1 >/dev/null 2>>"$work/stderr" ||
        lost=$((lost + 1))
    train --resume killed$((kills % 2)) --steps 1 2>/dev/null || lost=$((lost + 1))
    rm -rf killed0 killed1 killed0.* killed1.*
    kills=$((kills + 1))
done
check $lost "200 times kill -9 around a save: model and state always load"

# ---- A disk that fills up, and a loss that runs away ----

train $small --steps 20 --eval-every 10 --out full text
cp full/state.safetensors before
(trap '' XFSZ; ulimit -f 100; train --resume full --steps 40) # a file stops growing at 50 KB
[ $? = 1 ] && same before full/state.safetensors && [ -z "$(ls full | grep tmp)" ]
check $? "a full disk: status 1, the old state whole, nothing left behind"
train $small --steps 200 --lr 100 --clip 0 --eval-every 1000 --out away text; status=$?
[ $status = 1 ] && tail -1 "$work/stderr" | grep -q 'not finite'
check $? "a loss that is not finite stops the run and says so"

# ---- Texts ----

tr -d '\n' </dev/zero 2>/dev/null | head -c 3000 >zeros
head -c 3000 /dev/urandom >noise
awk 'BEGIN { for (i = 0; i < 300; i++) printf "%c%c\377\376\200 abc\n", 255, 192 }' >invalid
for text in zeros noise invalid; do
    train $small --steps 3 --out odd "$text"
    check $? "a text of $text trains"
done
train $small --steps 3 --out stdin - <noise && train $small --steps 3 --out file noise &&
    same stdin/model.safetensors file/model.safetensors
check $? "standard input is a text like any other"
train $small --steps 3 --out two noise zeros && grep -q 'zeros: 3000 bytes, of them 300' "$work/stderr"
check $? "two texts, a tenth of each held out"
train $small --steps 3 --out val --val zeros noise && grep -q 'noise: 3000 bytes, of them 0' "$work/stderr"
check $? "--val holds out another text"
score=$("$root/sample" val/model.safetensors --score zeros 2>/dev/null | grep -o '[0-9.]*' | head -1)
logged=$(rows val/log.tsv | tail -1 | cut -f3)
awk "BEGIN { exit !(\"$score\" > 0 && ($score - $logged) ^ 2 < 1e-8) }" # scores print four decimals
check $? "sample --score is the trainer's held-out figure ($score, $logged)"

# ---- Wrong usage and bad input: status, and words that its one line must hold ----

refuse() { # status, words, arguments
    want=$1 words=$2; shift 2
    "$root/train" "$@" >/dev/null 2>message </dev/null; got=$?
    lines=$(grep -vc '^on the CPU\|^note' message)
    [ $got = "$want" ] && [ "$lines" = 1 ] && grep -q -e "$words" message
    check $? "status $want, '$words': train $*"
}
: >empty; mkdir -p folder; printf 'short' >short; touch plain; echo junk >full/state.safetensors
mkdir -p damaged; head -c 2000 before >damaged/state.safetensors
refuse 2 'unknown option' --stepz 5
refuse 2 'from 1 to' --steps 0
refuse 2 'whole number' --steps 1.5
refuse 2 'needs a value' --steps
refuse 2 'paper, prenorm' --block-form post
refuse 2 'from 0 to 0.99' --dropout 1
refuse 2 'number' --lr fast
refuse 2 'given twice' --steps 1 --steps 2
refuse 2 'leave --out out' --resume whole --out elsewhere
refuse 1 'No such file' missing
refuse 1 'is a directory' folder
refuse 1 'is empty' empty
refuse 1 'is empty' -
refuse 1 'less than one window' short
refuse 1 'latent = channels' --tie --latent 7
refuse 1 'memory' --channels 65536 --batch 1024 --seq 1024 --device cpu
refuse 1 'a smaller --batch' --batch 1000000 --seq 1000
refuse 1 'cannot' --out plain/run --device cpu --steps 1 noise
refuse 1 'No such file' --resume nowhere
refuse 1 'state.safetensors' --resume full
refuse 1 'state.safetensors' --resume damaged
refuse 1 'another text' --resume whole --device cpu noise
refuse 1 'has --lr' --resume whole --lr 0.5 --device cpu
refuse 1 'has --channels' --resume whole --channels 32 --device cpu
[ "$failed" = 0 ] || { echo "the last lines on standard error:"; tail -5 "$work/stderr"; }
echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" = 0 ]
