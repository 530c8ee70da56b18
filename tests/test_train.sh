#!/bin/sh
# test_train.sh: the trainer as its user meets it: exact resuming, threads, signals, kills, full
# disks, odd texts, wrong usage. One line per check; run by `make test`, alone: tests/test_train.sh
# Builds nothing; works in a temporary folder that it removes.
cd "$(dirname "$0")/.." || exit 1
root=$PWD
work=$(mktemp -d) || exit 1
pid=
trap '[ -z "$pid" ] || kill -9 $pid 2>/dev/null; rm -rf "$work"' EXIT
cd "$work" || exit 1
# Under AddressSanitizer: a program that ends with an error leaves its memory to the system.
export ASAN_OPTIONS=detect_leaks=0
# Threads that spin while they wait would fight for the cores of a busy machine.
export OMP_WAIT_POLICY=passive
passed=0 failed=0 skipped=0
ok() { passed=$((passed + 1)); echo "ok   $1"; }
bad() { failed=$((failed + 1)); echo "FAIL $1"; }
check() { if [ "$1" = 0 ]; then ok "$2"; else bad "$2"; fi; } # status, name

# A run of about 5 ms a step, with every option that draws random numbers. What matters here is
# written out: the defaults may change.
small="--device cpu --channels 48 --batch 4 --seq 96 --activation gelu --tie \
--softcap 20 --dropout 0.1 --byte-dropout 0.1 --ema 0.9 --accum 2 --warmup 5 --beta2 0.99 \
--weight-decay 0.1 --units conv:2:1"
"$root/data/language" --bytes 20000 >text || exit 1
train() { "$root/train" "$@" >>"$work/stdout" 2>>"$work/stderr"; }
start() { "$root/train" "$@" >>"$work/stdout" 2>>"$work/stderr" & pid=$!; } # no subshell between: kill meets it
same() { cmp -s "$1" "$2"; }
# The last 60,000 bytes are weights; the metadata before them names texts.
same_weights() { tail -c 60000 "$1" >weights; tail -c 60000 "$2" | cmp -s - weights; }
rows() { grep -v '^#' "$1"; }

# ---- The same bits however the run is cut, and on however many threads ----

train $small --threads 2 --steps 100 --eval-every 20 --out whole text || bad "a run of 100 steps"
start $small --threads 2 --steps 100 --eval-every 20 --save-every 0 --out cut text
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

start $small --steps 100000 --eval-every 20 --save-every 1000 --out stopped text
while kill -0 $pid 2>/dev/null && ! grep -q '^40	nan' stopped/log.tsv 2>/dev/null; do sleep 0.01; done
[ "$(ls stopped)" = log.tsv ]
check $? "no step waits for the disk before --save-every is over"
kill -TERM $pid; wait $pid
check $? "SIGTERM ends with status 0"
[ -f stopped/model.safetensors ] && [ -f stopped/state.safetensors ]
check $? "and saves model and state"
grep -q 'go on with: ./train --resume stopped' "$work/stderr"
check $? "and says how to go on"
last=$(rows stopped/log.tsv | tail -1 | cut -f1)
train --resume stopped --steps $((last + 1)) && [ "$(rows stopped/log.tsv | grep -vc nan.nan)" -gt 0 ]
check $? "the step it stopped at is where it goes on"

train $small --steps 2 --eval-every 1 --out killed text
lost=0 kills=0
while [ $kills -lt 200 ]; do # each run saves all the time; moments spread over 0..50 ms
    start $small --threads 1 --steps 100000 --eval-every 1 --save-every 0 --out killed$((kills % 2)) text
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
[ $status = 1 ] && tail -1 "$work/stderr" | grep -q 'not finite' &&
    ! tail -1 "$work/stderr" | grep -q 'stays in'
check $? "a loss that is not finite stops the run and says so"
(ulimit -t 20 # a preset that won against options would train for hours
 train --device cpu --preset paper --units block:3:1:1:1:1:1:1:1:1:1:1:1:1:1:1:1:1 \
    --channels 64 --batch 1 --seq 64 --lr 100 --warmup 0 --steps 1 --out away3 text); status=$?
[ $status = 1 ] && tail -1 "$work/stderr" | grep -q 'held-out loss is not finite'
check $? "and so does a held-out loss that is not"
train $small --steps 200 --lr 100 --clip 0 --eval-every 1 --out away2 text
tail -1 "$work/stderr" | grep -q 'not finite.*stays in away2' && [ -f away2/model.safetensors ]
check $? "and leaves the best so far, saved or not"
train $small --steps 1 --out away2 text && [ -f away2.1/model.safetensors ]
check $? "which the next try does not overwrite"

# ---- Texts ----

tr -d '\n' </dev/zero 2>/dev/null | head -c 3000 >zeros
head -c 3000 /dev/urandom >noise
awk 'BEGIN { for (i = 0; i < 300; i++) printf "%c%c\377\376\200 abc\n", 255, 192 }' >invalid
for text in zeros noise invalid; do
    train $small --steps 3 --out odd "$text"
    check $? "a text of $text trains"
done
train $small --steps 3 --out stdin - <noise && train $small --steps 3 --out file noise &&
    same_weights stdin/model.safetensors file/model.safetensors
check $? "standard input is a text like any other"
train $small --steps 3 --out two noise zeros && grep -q 'zeros: 3000 bytes, of them 300' "$work/stderr"
check $? "two texts, a tenth of each held out"
train $small --steps 3 --out val --val zeros noise && grep -q 'noise: 3000 bytes, of them 0' "$work/stderr"
check $? "--val holds out another text"
score=$("$root/sample" val/model.safetensors --score zeros 2>/dev/null | grep -o '[0-9.]*' | head -1)
logged=$(rows val/log.tsv | tail -1 | cut -f3)
awk "BEGIN { exit !(\"$score\" > 0 && ($score - $logged) ^ 2 < 1e-8) }" # scores print four decimals
check $? "sample --score is the trainer's held-out figure ($score, $logged)"

# ---- What a run came to ----

# The files in windows of 256 that do not overlap, nats per byte as nanoGPT counts: without byte 0,
# for which sample charges ln 256.
in_windows() { # model, files
    model=$1; shift
    for file; do "$root/sample" "$model" --score "$file" --windows 256:256; done |
        awk '{ sum += $1 * $7 - log(256); n += $7 - 1 } END { printf "%.6f", sum / n }'
}
near() { awk -v a="$1" -v b="$2" 'BEGIN { exit !(a + 0 > 0 && (a - b) ^ 2 < 1e-10) }'; }
logged() { tail -1 "$1/log.tsv" | grep '^# best' | grep -o '[0-9.]*$'; }
# Learns 400 bytes by heart: the best on other text is not the last. Scores three rows of 300 at a
# time: more than a window each, and fewer than there are windows.
wide=$(echo "$small" | sed 's/--batch 4 --seq 96/--batch 3 --seq 300/')
head -c 400 text >heart; tail -c 900 text >val900; tail -c 100 text >val100
"$root/train" $wide --lr 3e-2 --steps 60 --eval-every 20 --out result --val val900 heart >/dev/null 2>message
rows result/log.tsv | awk '$1 != "step" && $3 != "nan" { print $3, $1 }' | sort -g >scores
best=$(head -1 scores | cut -d' ' -f2)
line=$(grep '^best held-out' message)
[ "$best" -lt 60 ] && echo "$line" |
    grep -q "nats/byte at step $best, [0-9]*\.[0-9][0-9] s after the first step began\$"
check $? "the best step and the seconds until then ($line)"
total=$(grep -o '^[0-9.]* s with saving' message) seconds=${line#*, }
awk "BEGIN { exit !(${seconds%% *} > 0 && ${seconds%% *} < ${total%% *}) }"
check $? "which are fewer than the whole run's ($total)"
want=$(in_windows result/model.safetensors val900)
said=$(sed -n 's/.*as nanoGPT counts: \([0-9.]*\) nats.*/\1/p' message)
near "$(logged result)" "$want" && awk "BEGIN { exit !(($said - $want) ^ 2 < 1e-8) }"
check $? "the best in windows of 256 that do not overlap ($(logged result), $want)"
slid=$(head -1 scores | cut -d' ' -f1)
near "$slid" "$slid" && ! near "$(logged result)" "$slid"
check $? "which is not the loss with sliding context ($slid)"
"$root/train" --resume result >/dev/null 2>message
[ "$(grep -c '^best held-out' message)" = 1 ] && near "$(logged result)" "$want"
check $? "a finished run that is resumed says it again"
mv result/model.safetensors moved
"$root/train" --resume result >/dev/null 2>message
[ $? = 1 ] && grep -q 'result/model.safetensors.*No such file' message
check $? "a run whose best is gone is not resumed"
train $small --steps 3 --out result100 --val val100 text
near "$(logged result100)" "$(in_windows result100/model.safetensors val100)"
check $? "a held-out text shorter than a window"
train $small --steps 3 --out result2 text noise
tail -c 2000 text >held1; tail -c 300 noise >held2
near "$(logged result2)" "$(in_windows result2/model.safetensors held1 held2)"
check $? "two held-out texts, no window across both"
head -c 1 text >val1
"$root/train" $small --steps 3 --out result1 --val val1 text >/dev/null 2>message &&
    grep -q '^best held-out' message && ! grep -q 'do not overlap\|nan' message
check $? "of one held-out byte no window is scored"
"$root/train" $small --steps 3 --val-frac 0 --out result0 text >/dev/null 2>message &&
    grep -q ' s with saving' message && ! grep -q 'best\|do not overlap' message result0/log.tsv
check $? "nothing held out: nothing said of it"

# ---- Presets and switches: what a run with them was, by its log ----

settings() { grep '^# --' "$1/log.tsv" | sed 's/^# //; s/ --seed.*\( --eval\)/\1/'; } # of a run
option() { settings "$1" | grep -q -e " $2 " -e "^$2 "; }
tiny="--device cpu --channels 8 --steps 1 --sample-bytes 0"
(ulimit -t 20; train --batch 2 $tiny --preset shakespeare --no-at-once --seq 64 --out preset text) &&
    option preset '--activation gelu' && option preset '--tie' && option preset '--batch 2' &&
    option preset '--seq 64' && option preset '--steps 1' && option preset '--no-at-once'
check $? "--preset shakespeare, and options beside it win, before it or after"
train $tiny --batch 2 --seq 64 --preset shakespeare --out preset2 text && option preset2 '--at-once'
check $? "and its switches are on"
# Both stay what README's figures are of, wherever the defaults go.
train $tiny --preset paper --out paper text && [ "$(settings paper)" = "--channels 8 --latent 0 \
--units 3x(block:3:1:2:4) --activation gelu --window 0 --no-tie --softcap 0 --skips 0 --norm-in --norm-out --bias --steps 1 --batch 16 \
--seq 512 --accum 1 --no-at-once --lr 0.002 --min-lr 0 --warmup 100 --beta1 0.9 --beta2 0.99 \
--weight-decay 0.1 --clip 1 --ema 0 --dropout 0 --byte-dropout 0 --eval-every 250" ]
check $? "--preset paper is the paper's configuration"
train $tiny --preset small --out small text && [ "$(settings small)" = "--channels 8 --latent 0 \
--units \"2x(conv:3:1 conv:3:2 conv:3:4)\" --activation gelu --window 0 --tie --softcap 30 --skips 0 --norm-in --norm-out --bias --steps 1 \
--batch 16 --seq 256 --accum 1 --no-at-once --lr 0.004 --min-lr 0 --warmup 50 --beta1 0.9 \
--beta2 0.99 --weight-decay 0.1 --clip 1 --ema 0 --dropout 0.05 --byte-dropout 0.05 --eval-every 200" ]
check $? "--preset small is the demo's"
train $tiny --batch 2 --out default text && train $tiny --batch 2 --preset default --out default2 text &&
    [ "$(settings default)" = "$(settings default2)" ] && option default '--activation gelu' &&
    option default '--tie'
check $? "--preset default changes nothing: pre-norm, tied"
train $tiny --batch 2 --preset shakespeare --seq 64 --out tale text && [ "$(settings tale)" = "--channels 8 \
--latent 0 --units \"3x(conv:2:1 conv:2:2 conv:2:4 conv:2:8)\" --activation gelu --window 0 --tie --softcap 30 --skips 0 --norm-in --norm-out --bias --steps 1 \
--batch 2 --seq 64 --accum 1 --at-once --lr 0.006 --min-lr 0 --warmup 100 --beta1 0.9 --beta2 0.95 \
--weight-decay 4 --clip 1 --ema 0 --dropout 0.2 --byte-dropout 0.15 --eval-every 500" ]
check $? "--preset shakespeare is the recipe of README's first figure"
train $tiny --batch 2 --preset hybrid --seq 64 --out hybrid text && [ "$(settings hybrid)" = "--channels 8 \
--latent 0 --units \"3x(conv:2:1 attn:4 mlp:2)\" --activation gelu --window 512 --tie --softcap 30 --skips 0 --norm-in --norm-out --bias --steps 1 \
--batch 2 --seq 64 --accum 1 --at-once --lr 0.005 --min-lr 0 --warmup 100 --beta1 0.9 --beta2 0.95 \
--weight-decay 1 --clip 1 --ema 0 --dropout 0.2 --byte-dropout 0.15 --eval-every 500" ]
check $? "--preset hybrid: a conv, an attention and an mlp, three times"
train $tiny --batch 2 --preset transformer --seq 64 --out pt text && [ "$(settings pt)" = "--channels 8 \
--latent 0 --units \"positions 2x(attn:4:r0:n0 mlp:4)\" --activation gelu --window 0 --no-tie --softcap 0 \
--skips 0 --no-norm-in --no-norm-out --bias --steps 1 --batch 2 --seq 64 --accum 1 --no-at-once --lr 0.001 \
--min-lr 0 --warmup 100 --beta1 0.9 --beta2 0.99 --weight-decay 0.1 --clip 1 --ema 0 --dropout 0 \
--byte-dropout 0 --eval-every 250" ]
check $? "--preset transformer: the paper's baseline"
# (It scores windows of four receptive fields: nothing is held out here.)
train $tiny --batch 1 --accum 1 --preset golf --seq 64 --val-frac 0 --out golf text &&
    [ "$(settings golf)" = "--channels 8 --latent 0 \
--units \"smear bigrams:4096:32 13x(attn:8:4096 mlp:2:lrelu2)\" --activation gelu --window 4096 --tie \
--softcap 30 --skips 2 --norm-in --norm-out --no-bias --steps 1 --batch 1 --seq 64 --accum 1 --no-at-once \
--lr 0.003 --min-lr 0 --warmup 200 --beta1 0.9 --beta2 0.95 --weight-decay 0.1 --clip 1 --ema 0 --dropout 0 \
--byte-dropout 0 --eval-every 500" ]
check $? "--preset golf: 13 layers, SmearGate, bigrams, skips"
train $tiny --batch 2 --seq 64 --init pt --no-tie --out from_pt text && option from_pt --no-norm-out &&
    option from_pt --no-norm-in && train $tiny --batch 2 --seq 64 --init golf --val-frac 0 --out from_golf text &&
    option from_golf --no-bias && option from_golf '--skips 2'
check $? "--init takes over skips, norms and biases"
train $tiny --batch 2 --no-tie --latent 7 --no-selftest --out untied text && option untied '--no-tie'
check $? "--no-tie switches off what is on by default"
train --resume untied --steps 2 --no-tie && train --resume untied --steps 3 && option untied '--no-tie' &&
    rows untied/log.tsv | cut -f1 | grep -q '^3$'
check $? "and stays off on resuming, given again or not"
"$root/train" --help >message && [ "$(grep -c -e '--no-NAME' message)" = 1 ] &&
    grep -q -e '--tie  .*\[yes\]' message && ! grep -q -e '--at-once .*\[' message
check $? "--help says --no-NAME once, and which switches are on"

# ---- Stacks: what is printed, and every way to get one wrong ----

"$root/train" $tiny --batch 2 --seq 64 --units "2x(conv:2:1 2x(block:3:1:2)) conv:2:1:lrelu2" --out stack text \
    >/dev/null 2>message
[ "$(grep -c '^  conv:2:1 ' message)" = 1 ] && [ "$(grep -c '2x block:3:1:2 .*reaches 6 back' message)" = 1 ] &&
    grep -q '^  conv:2:1:lrelu2 .*x + f(conv(norm(x))) .*(2,8,8).*parameters, reaches 1 back' message &&
    ! grep -q 'units.0.conv.weight' message
check $? "the stack: a line for each unit, repeated ones once"
"$root/train" --resume stack --steps 2 --tensors >/dev/null 2>message && grep -q 'units.6.conv.weight .*(2,8,8) decayed' message
check $? "--tensors lists every tensor; a stack is saved with its run"
small2="--device cpu --channels 8 --batch 2 --seq 64 --steps 3 --sample-bytes 0"
train $small2 --kernels plain --units "conv:2:2 block:2:1:2" --out plain1 text &&
    train $small2 --kernels cpu --units "conv:2:2 block:2:1:2" --out plain2 text &&
    rows plain1/log.tsv >a && rows plain2/log.tsv | paste a - | awk '$1 > 0 && $2 != "nan" && $2 != "train_loss" { n++; if (($2 - $7) ^ 2 > 1e-10) bad++ }
        END { exit bad || n != 3 }'
check $? "--kernels plain trains to the same losses"

# ---- One trainer at a time in a folder ----

wait_for() { # file, text: until it is there, 30 s at most
    for i in $(seq 3000); do grep -q -e "$2" "$1" 2>/dev/null && return 0; sleep 0.01; done
    return 1
}
fails() { "$root/train" "$@" >/dev/null 2>message </dev/null; [ $? = 1 ]; } # status 1 and a message
start $small --steps 100000 --eval-every 10 --save-every 0 --out live text
wait_for live/log.tsv '^20	nan'
fails $small --steps 1 --out live text &&
    grep -q "process $pid since .* trains in live: choose another --out, or wait" message &&
    [ ! -e live.1 ]
check $? "a second trainer is told who trains there, and moves nothing"
fails --resume live && grep -q "process $pid since" message
check $? "and so is one that would go on with that run"
kill -9 $pid; wait $pid 2>/dev/null
train --resume live --steps $(($(rows live/log.tsv | tail -1 | cut -f1) + 5))
check $? "a killed trainer holds nothing"
train $small --steps 1 --out slash/ text && train $small --steps 1 --out slash/ text &&
    [ -f slash/model.safetensors ] && [ -f slash.1/model.safetensors ]
check $? "--out slash/ twice: the first run is moved aside"
mkdir dot
(cd dot && train $small --steps 1 --out . ../text && fails $small --steps 1 --out . ../text &&
    grep -q 'cannot be moved aside.*current folder.*another --out' message &&
    "$root/sample" model.safetensors --bytes 1 >/dev/null 2>&1)
check $? "--out . twice: the first run stays, and the second is told what to do"
mkdir target && ln -s target link
train $small --steps 1 --out link text && train $small --steps 1 --out link text && [ -L link ] &&
    [ -f target/model.safetensors ] && [ -f target.1/model.safetensors ]
check $? "a link stays a link to the folder of the last run"
lost=0
for round in 1 2 3 4 5; do # a finished run lies there; six begin at once
    rm -rf race race.*
    train $small --steps 1 --out race text
    pids=
    for i in 1 2 3 4 5 6; do
        "$root/train" $small --threads 1 --steps 1000000 --eval-every 100000 --out race text \
            >/dev/null 2>message$i &
        pids="$pids $!"
    done
    for i in $(seq 6000); do # until five have given up
        alive=0
        for p in $pids; do kill -0 $p 2>/dev/null && alive=$((alive + 1)); done
        [ $alive = 1 ] && break
        sleep 0.01
    done
    # The five may be gone before the sixth has moved the run of before, whose log has a '^step', too.
    [ $alive = 1 ] && wait_for race.1/log.tsv '^step' && wait_for race/log.tsv '^step' &&
        [ -f race.1/model.safetensors ] && [ ! -e race.2 ] || lost=$((lost + 1))
    kill -9 $pids 2>/dev/null; wait $pids 2>/dev/null
done
check $lost "of six that begin at once one trains; the run of before is moved aside, once"

# SLOW: make asan, ten times as slow. What goes by the clock is not for it.
if [ -n "$SLOW" ]; then
skipped=$((skipped + 1)); echo "skip evaluations and their signals, logs, --init and --minutes: SLOW is set"
else

# ---- Evaluation: bounded, and it can be stopped ----

"$root/data/language" --bytes 1000000 --seed 3 >long
stopped() { grep -q 'stopped after step 5;' "$1" && [ "$(rows stop/log.tsv | tail -1 | cut -f1)" = 5 ]; }
"$root/train" $small --steps 10 --eval-every 5 --threads 1 --val long --val-bytes 800000 --out stop text >/dev/null 2>message & pid=$!
wait_for stop/log.tsv '^5	'
kill -TERM $pid; wait $pid
check $? "a signal during an evaluation: status 0"
stopped message && ! rows stop/log.tsv | grep -q '^5	nan'
check $? "it ends that evaluation"
train --resume stop --threads 1
train $small --steps 10 --eval-every 5 --threads 1 --val long --val-bytes 800000 --out unstopped text
rows stop/log.tsv >a; rows unstopped/log.tsv >b
same a b && same stop/state.safetensors unstopped/state.safetensors &&
    same stop/model.safetensors unstopped/model.safetensors
check $? "which is made up for on resuming: the same log, state and model bit for bit"
# Steps of a good part of a second: the first signal waits for the end of one.
start $(echo $small | sed 's/--batch 4/--batch 500/') --steps 100 --eval-every 100 --out twice text
wait_for twice/log.tsv '^1	'
kill -TERM $pid; sleep 0.05; kill -TERM $pid; wait $pid
[ $? = 143 ] && [ ! -e twice/state.safetensors ]
check $? "a second signal ends the program at once"
start $small --steps 100000 --eval-every 20 --save-every 1000 --out hangup text
wait_for hangup/log.tsv '^40	nan'
kill -HUP $pid; wait $pid && [ -f hangup/state.safetensors ]
check $? "a closed terminal (SIGHUP) stops a run as SIGTERM does"
# In its own words: under nohup SIGHUP is ignored, and stays so.
(trap '' HUP; exec "$root/train" $small --steps 100000 --eval-every 20 --save-every 1000 --out nohup text) \
    >/dev/null 2>message & pid=$!
wait_for nohup/log.tsv '^40	nan'
kill -HUP $pid; sleep 0.3; kill -0 $pid && ! [ -f nohup/state.safetensors ]
check $? "and not where it was ignored (nohup)"
kill -KILL $pid; wait $pid 2>/dev/null
"$root/train" $small --steps 2 --threads 1 --val long --val-bytes 1 --out last text >/dev/null 2>message & pid=$!
wait_for message '^best held-out'
kill -TERM $pid; wait $pid && grep -q 'stopped after step 2; go on with: ./train --resume last' message &&
    ! grep -q 'whole held-out' message
check $? "a signal during the last figure: no figure, and how to get it"
train --resume last --threads 1 && grep -q '^# best.* on all 1000000 bytes' last/log.tsv
check $? "which resuming makes up for"
"$root/train" $small --steps 4 --eval-every 2 --val text --val-bytes 1 --out first text >/dev/null 2>message
rows first/log.tsv | cut -f3 | grep '^[0-9]' | awk '{ n++; if (($1 - log(256)) ^ 2 < 1e-6) bad++ } END { exit bad || n != 2 }'
check $? "of a held-out file a part begins after byte 0, which always costs ln 256"
[ "$(grep -c 'on 255 of 20000 held-out bytes' message)" = 2 ]
check $? "a part is a pass at least: of windows of 256 all but the context"
train $small --steps 12 --eval-every 6 --out few text; train $small --steps 12 --eval-every 6 --sample-every 4 --out samples text
same few/state.safetensors samples/state.safetensors && [ "$(wc -l <few/log.tsv)" = "$(wc -l <samples/log.tsv)" ]
check $? "a sample evaluates nothing and changes nothing"
"$root/train" $small --steps 4 --sample-bytes 0 --val long --val-bytes 5000 --last-bytes 9000 --out bound text >/dev/null 2>message
grep -q '^9[0-9]* of 1000000 held-out bytes, [0-9.]* nats/byte$\|^8[0-9]* of 1000000 held-out bytes, [0-9.]* nats/byte$' message
check $? "--last-bytes bounds the last figure"
bounded="--steps 12 --eval-every 4 --val-bytes 900"
"$root/train" $small $bounded --out bounded text noise >/dev/null 2>message
grep -q 'step 4 .*, on [789][0-9][0-9] of 2300 held-out bytes' message &&
    grep -q '^whole held-out text: 2300 bytes, [0-9.]* nats/byte$' message
check $? "--val-bytes: evaluations score a part, the last figure is of the whole"
train $small --steps 12 --eval-every 4 --out unbounded text noise
figure() { head -c 1000 "$1/model.safetensors" | tr -d '\n' | sed 's/.*held_out_nats_per_byte":"\([0-9.]*\).*/\1/'; }
[ "$(rows bounded/log.tsv | tail -1 | cut -f3)" != "$(rows unbounded/log.tsv | tail -1 | cut -f3)" ] &&
    [ "$(figure bounded)" = "$(figure unbounded)" ] && [ -n "$(figure bounded)" ]
check $? "which is the figure that the model is saved with ($(figure bounded))"

# ---- Numbers, the log, names, pipes, memory ----

start $small --threads 1 --steps 2000000000 --out endless text
: >"$work/endless-message"
wait_for "$work/stderr" '/2000000000 .* [0-9]*d[0-9][0-9]h left$'
check $? "the time left of two thousand million steps is days"
kill -9 $pid; wait $pid 2>/dev/null
cp unbounded/state.safetensors before
"$root/train" --resume unbounded --steps 5 >/dev/null 2>message </dev/null && [ "$(grep -vc '^on the CPU' message)" = 1 ] &&
    grep -q 'has taken 12 steps; to go on, give --steps above' message && same before unbounded/state.safetensors
check $? "fewer steps than are taken: nothing left to do, in one line"
printf '9\t0.5\t' >>unbounded/log.tsv
train --resume unbounded --steps 15 && ! grep -q '0.5	#' unbounded/log.tsv &&
    [ "$(grep -c '^# resumed at step 12$' unbounded/log.tsv)" = 1 ] &&
    [ "$(rows unbounded/log.tsv | awk '$1 + 0 > 0 && $2 != "nan"' | wc -l)" = 15 ]
check $? "a log that a crash has cut goes on with a row of its own"
# 15 KB a file: enough for the state, not for the log.
(trap '' XFSZ; ulimit -f 30
 "$root/train" --device cpu --channels 2 --units conv --batch 1 --seq 16 --steps 1000 --eval-every 1000 \
    --sample-bytes 0 --out fulllog text >/dev/null 2>message) && grep -q 'note: cannot write fulllog/log.tsv (File too large)' message &&
    [ "$(tail -c 1 fulllog/log.tsv)" = "" ] && "$root/sample" fulllog/model.safetensors --bytes 1 >/dev/null 2>&1 &&
    train --resume fulllog --steps 1001
check $? "a log that cannot be written is said once, and the training goes on"
cp -r unbounded mixed && cp bounded/model.safetensors mixed
fails --resume mixed && grep -q 'model.safetensors is of another run' message
check $? "another run's model is not taken for this one's best"
sed 's/"checksum"/"checksun"/' unbounded/state.safetensors >mixed/state.safetensors
fails --resume mixed && grep -q 'without checksum' message
check $? "a state without checksum is refused"
odd=$(printf 'two\nlines \\x41 \377')
cp text "$odd"
train $small --steps 2 --out odd2 "$odd" && train --resume odd2 --steps 3
check $? "a run on a file whose name holds a new line and other bytes goes on"
grep -aq '"run":"[0-9a-f]*","step":"[0-9]*","trained_on":"two.u000alines .*","training_bytes":"18000","held_out' odd2/model.safetensors
check $? "the model's metadata names run, text and bytes"
("$root/train" $small --steps 30 --eval-every 10 --sample-every 5 --sample-bytes 300 --out pipe text 2>message; echo $? >status) |
    head -c 10 >/dev/null
[ "$(cat status)" = 0 ] && [ "$(grep -c 'note: cannot write to standard output' message)" = 1 ] &&
    [ "$(rows pipe/log.tsv | tail -1 | cut -f1)" = 30 ] && train --resume pipe --steps 31
check $? "a reader that has gone ends the samples, not the training"
if [ -c /dev/full ]; then
    "$root/train" $small --steps 3 --sample-bytes 9 --out full-disk text 2>message >/dev/full
    [ $? = 1 ] && grep -q 'cannot write to standard output' message && [ -s full-disk/model.safetensors ]
    check $? "a sample lost to a full disk: status 1, and the model is there"
fi
truncate -s 8T sparse 2>/dev/null || : >sparse
if [ -s sparse ]; then
    fails $small --steps 1 --out sparse-out sparse && grep -q 'needs 8.*e+03 GB of memory for sparse' message
    check $? "a text beyond the memory is refused before it is read"
else
    skipped=$((skipped + 1)); echo "skip a text beyond the memory: no sparse file here"
fi
rm -f sparse
fails --device cpu --channels 1024 --units "4x(conv:2:1048576)" --batch 1 --seq 16 --steps 1 --out sparse-out text &&
    grep -q 'to evaluate: needs .* GB' message
check $? "and a scorer beyond it, by name"
fails --device cpu --channels 64 --units attn:4:16777216 --batch 1 --seq 16 --steps 1 --out sparse-out text &&
    grep -q 'to evaluate: needs .* GB.* or --units that reach less than 16777215 bytes back$' message
check $? "and one for a window of attention that no memory holds"

# ---- --init and --minutes ----

train $small --steps 40 --eval-every 20 --out base text
fine="--device cpu --batch 4 --seq 96 --steps 6 --eval-every 3 --warmup 0 --lr 1e-4"
train $fine --init base --out tuned noise text && train $fine --init base/model.safetensors --out tuned2 noise text &&
    same tuned/model.safetensors tuned2/model.safetensors && option tuned '--channels 48' && option tuned '--units conv:2:1'
check $? "--init takes weights and stack of a model, given as a folder or a file"
first() { rows "$1/log.tsv" | awk '$1 == 1 { print $2 }'; }
train $fine --init base --dropout 0 --byte-dropout 0 --out tuned3 text
awk "BEGIN { exit !($(first tuned3) < 3.5 && $(first whole) > 5) }"
check $? "and begins where that model ended ($(first tuned3))"
train ${fine%%--seq*} --seq 8 --steps 2 --init base --out tuned5 text && option tuned5 '--window 96' && option tuned5 '--seq 8'
check $? "also with shorter windows"
train $fine --init base --ema 0.99 --out tuned6 text &&
    rows tuned6/log.tsv | cut -f3 | grep '^[0-9]' | awk '{ n++; if ($1 > 3.5) bad++ } END { exit bad || n != 2 }'
check $? "and the average of --ema begins there, too"
mv base base-gone
cp tuned/state.safetensors before; train --resume tuned --steps 8 && ! same before tuned/state.safetensors
check $? "its run goes on without that model"
mv base-gone base
fails $fine --init base --channels 64 --out tuned4 text && grep -q 'channels is 48 there and 64 here' message
check $? "another stack is refused with the difference"
fails $fine --init base/state.safetensors --out tuned4 text && grep -q 'state of a run' message
check $? "and so is a state"
timed="--device cpu --channels 16 --units conv --batch 4 --seq 64 --sample-bytes 0 --threads 1"
"$root/train" $timed --minutes 0.05 --out timed text >/dev/null 2>message
check $? "--minutes trains"
fitted=$(sed -n 's/^note: --minutes 0.05: \(--steps [0-9]*\) ([^)]*)\(.*\)/\1\2/p' message)
train $timed $fitted --out timed2 text
same timed/state.safetensors timed2/state.safetensors && same timed/model.safetensors timed2/model.safetensors
check $? "and is the run of the options that it prints, bit for bit ($fitted)"
seconds=$(grep -o '^[0-9.]* s with saving' message)
awk "BEGIN { exit !(${seconds%% *} > 0.5 && ${seconds%% *} < 9) }"
check $? "and takes about that time ($seconds of 3)"
timed2=$(echo "$timed" | sed 's/--channels 16/--channels 96/')
truncate -s 40M large
"$root/train" $timed2 --minutes 0.1 --out large1 large >/dev/null 2>message &&
    line=$(grep '^[0-9]* of 4194304 held-out bytes, ' message) && "$root/train" --resume large1 >/dev/null 2>message &&
    [ "$line" = "$(grep '^[0-9]* of' message)" ]
check $? "the last figure of a large text takes a part of the time, on resuming, too ($line)"
# The scorer's pass is of 2,052 bytes, a step of 64: an evaluation of one byte costs many steps.
slight="--device cpu --threads 1 --sample-bytes 0 --batch 1"
fitted_steps() { # options: the steps that --minutes finds
    "$root/train" $slight --channels 16 --seq 64 --units conv:2:512 --minutes 0.05 "$@" --out often text 2>&1 |
        sed -n 's/^note: --minutes.*--steps \([0-9]*\).*/\1/p'
}
often=$(fitted_steps --eval-every 1 --val-bytes 1) rare=$(fitted_steps --eval-every 1000000 --val-bytes 1)
[ "$often" -gt 0 ] && [ $((3 * often)) -lt "$rare" ]
check $? "a part of a pass is charged as a pass, after every step ($often steps of $rare)"
head -c 300 text >little
"$root/train" --device cpu --threads 1 --minutes 0.03 --sample-bytes 0 --out little1 little >/dev/null 2>message && option little1 '--seq 135'
check $? "windows that nobody chose fit a small text"
fails --device cpu --seq 512 --minutes 0.03 --out little2 little && grep -q 'less than one window' message
check $? "and those that somebody chose do not change"
"$root/train" $slight --units conv:1 --channels 1 --seq 1 --minutes 1e6 --out ages text >/dev/null 2>message & pid=$!
wait_for ages/log.tsv '^100	' && kill -TERM $pid; wait $pid
option ages '--steps 2000000000' && "$root/train" --resume ages >/dev/null 2>message & pid=$!
wait_for message '^step'
check $? "an age is a run of 2e9 steps, which goes on"
kill -9 $pid 2>/dev/null; wait $pid 2>/dev/null
fails $timed --minutes 0.0000001 --out timed3 text && grep -q 'too short' message && [ ! -e timed3 ]
check $? "a time that is too short is refused"
"$root/train" $timed --out five text >/dev/null 2>message & pid=$!
wait_for message '^note: --minutes 5: --steps'
check $? "five minutes are a CPU's default"
kill -9 $pid; wait $pid 2>/dev/null
"$root/train" --device cpu --threads 1 --minutes 0.2 --out five2 text >/dev/null 2>message & pid=$!
wait_for five2/log.tsv '^step' && option five2 '--channels 64'
check $? "and without a size --minutes chooses one for the time"
kill -9 $pid; wait $pid 2>/dev/null

fi

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
refuse 2 'leave --preset out' --resume whole --preset small
refuse 2 'unknown option' --stepz 5
refuse 2 'from 1 to' --steps 0
refuse 2 'whole number' --steps 1.5
refuse 2 'needs a value' --steps
refuse 2 'none, gelu, lrelu2' --activation relu
refuse 2 'from 0 to 0.99' --dropout 1
refuse 2 'number' --lr fast
refuse 2 'given twice' --steps 1 --steps 2
refuse 2 'given twice' --tie --no-tie
refuse 2 'unknown option --no-steps' --no-steps 5
refuse 2 'unknown option --no-' --no-
refuse 2 'no-tie=1: this option takes no value' --no-tie=1
refuse 2 'default, paper, small, shakespeare' --preset large
refuse 2 'leave --out out' --resume whole --out elsewhere
refuse 1 'No such file' missing
refuse 1 'is a directory' folder
refuse 1 'is empty' empty
refuse 1 'is empty' -
refuse 1 'less than one window' short
refuse 1 'latent = channels.* --no-tie' --latent 64
refuse 1 'conv, block.*character 1' --units foo
refuse 1 'character 10' --units "conv:2:1 mpl:2"
refuse 1 'taps of conv is 0, expected 1 to 256 at character 6' --units conv:0
refuse 1 'dilation of conv is 2000000, expected 1 to 1048576' --units conv:2:2000000
refuse 1 'at most 2 numbers' --units conv:2:1:1
refuse 1 'activation: none gelu lrelu2' --units conv:2:1:relu
refuse 1 "without its ')'" --units "3x(conv:2:1"
refuse 1 "a ')' too many" --units "conv:2:1)"
refuse 1 'too deep: more than 4096' --units "100x(100x(conv))"
refuse 1 'no unit' --units " "
refuse 1 'runs on the CPU' --kernels plain --device cuda
refuse 1 'memory' --units "4096x(conv:256)" --channels 4096 --device cpu
refuse 1 'memory' --channels 65536 --batch 1024 --seq 1024 --device cpu
refuse 1 'a smaller --batch' --batch 1000000 --seq 1000
refuse 1 'cannot' --out plain/run --device cpu --steps 1 noise
refuse 1 'No such file' --resume nowhere
refuse 1 'state.safetensors' --resume full
refuse 1 'state.safetensors' --resume damaged
refuse 1 'another text' --resume whole --device cpu noise
refuse 1 'has --lr' --resume whole --lr 0.5 --device cpu
refuse 1 'has --channels' --resume whole --channels 32 --device cpu
refuse 1 'has --tie yes, not no' --resume whole --no-tie --device cpu
refuse 2 'leave --init out' --resume whole --init base
refuse 2 'leave --minutes out' --resume whole --minutes 1
refuse 2 'minutes is 0, expected more than 0' --minutes 0
refuse 2 'leave --steps or --minutes out' --steps 5 --minutes 1
refuse 1 'No such file' --init missing
[ "$failed" = 0 ] || { echo "the last lines on standard error:"; tail -5 "$work/stderr"; }
echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" = 0 ]
