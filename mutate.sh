#!/bin/sh
# mutate.sh: do the tests notice? Breaks the code in one place at a time and expects a test to fail.
#
# A mutant is one line below: name | file | exact old text | new text. The old text must stand in
# the file exactly once and the mutant must compile, or the run fails: a mutant that no longer fits
# the code proves nothing. To add one, add a line.
#   make mutate              all of them, two at a time, under 8 minutes on two cores
#   sh mutate.sh 'norm'      those whose name matches
# CC, CFLAGS, JOBS and TESTS (which programs are to notice) are taken from the environment.
mutants() { cat <<'LIST'
conv forward: looks ahead | model.c | s.K, s.C, s.O, -s.dil); | s.K, s.C, s.O, +s.dil);
conv forward: dilation off by one | model.c | s.K, s.C, s.O, -s.dil); | s.K, s.C, s.O, -s.dil - 1);
conv backward: looks back | model.c | s.K, s.O, s.C, +s.dil); | s.K, s.O, s.C, -s.dil);
conv: tap k read as k+1 | model.c | int64_t at = t + (int64_t)k * shift; | int64_t at = t + (int64_t)(k + 1) * shift;
conv: no clamp before the text | model.c | bool inside = row < N && at >= 0 && at < T; | bool inside = row < N && at < T;
conv: no clamp after the text | model.c | bool inside = row < N && at >= 0 && at < T; | bool inside = row < N && at >= 0;
conv: clamp off by one | model.c | bool inside = row < N && at >= 0 && at < T; | bool inside = row < N && at > 0 && at < T;
conv: rows of the batch run together | model.c | int64_t t = (int64_t)(row % (size_t)T); | int64_t t = (int64_t)row;
conv forward: bias dropped | model.c | if (start) copy_row(first, start + j0, cols); | (void)start;
conv forward: residual dropped | model.c | (res ? res[j0 + j] : 0) + a[j]; | a[j];
conv forward: residual subtracted | model.c | (res ? res[j0 + j] : 0) + a[j]; | (res ? -res[j0 + j] : 0) + a[j];
conv backward: weights not transposed | model.c | pack(panels, w, s.K, s.O, s.C, 1, (size_t)s.O); | pack(panels, w, s.K, s.O, s.C, (size_t)s.C, 1);
conv backward: written, not accumulated | model.c | g[i] += d[i]; | g[i] += 0;
conv backward: accumulated, not written | model.c | i < n && accumulate; i++) | i < n && d; i++)
conv weight gradient: taps reversed | model.c | int64_t reach = (int64_t)k * job->dil; | int64_t reach = (int64_t)(s->K - 1 - k) * job->dil;
conv weight gradient: x not shifted | model.c | (size_t)(t0 - reach)) * s->C; | (size_t)t0) * s->C;
conv weight gradient: first span only | model.c | for (int64_t t0 = reach; t0 < s->T; t0 += SPAN) { | for (int64_t t0 = reach; t0 < s->T && t0 < reach + SPAN; t0 += SPAN) {
conv weight gradient: first row of the batch only | model.c | for (int n = 0; n < s->B; n++) | for (int n = 0; n < 1; n++)
conv weight gradient: written, not accumulated | model.c | copy_row(sums[r], dw_k + (size_t)r * s->O, cols); | (void)dw_k;
conv bias gradient: once per tap | model.c | weight_block(&jobs[i], k == 0 && c0 == 0, | weight_block(&jobs[i], c0 == 0,
conv bias gradient: written, not accumulated | model.c | db[o0 + j] += panel[t][j]; | db[o0 + j] = panel[t][j];
conv rows: a lone row's columns overlap | model.c | O - o0 >= WIDE; o0 += WIDE) | O - o0 >= WIDE; o0 += COLS)
conv rows: one column too few | model.c | for (int o = o0; o < O; o++) | for (int o = o0 + 1; o < O; o++)
activation backward: not scaled | model.c | dout[j] * (scale * gelu_grad(pre[j])); | dout[j] * gelu_grad(pre[j]);
activation backward: gelu for its slope | model.c | dout[j] * (scale * gelu_grad(pre[j])); | dout[j] * (scale * gelu(pre[j]));
activation made again: not scaled | model.c | a[j] = scale * gelu(pre[j]); | a[j] = gelu(pre[j]);
gelu: a wrong constant | model.h | #define GELU_B ((real)0.044715) | #define GELU_B ((real)0.0447)
gelu: a sign | model.h | return x / (1 + exp_real(-GELU_A | return x / (1 + exp_real(GELU_A
gelu slope: factor 3 dropped | model.h | (GELU_A * (1 + 3 * GELU_B * x * x))); | (GELU_A * (1 + GELU_B * x * x)));
gelu slope: clamp dropped | model.h | x = x < -10 ? -10 : x; | (void)0;
gelu slope: not 0 far below | model.h | const real low = x < -10 ? 0 : 1; | const real low = 1;
exp: low half of ln 2 dropped | model.h | (v - n * 0.693359375f) + n * 2.12194440e-4f; | (v - n * 0.693359375f);
exp: upper clamp dropped | model.h | v = v > 89.0f ? 89.0f : v; | (void)0;
exp: lower clamp dropped | model.h | v = v < -104.0f ? -104.0f : v; | (void)0;
dropout: the kept not scaled | model.c | drop.threshold ? drop.scale : 1, n * s.O); | 1, n * s.O);
dropout: keeps what it should drop | model.c | draws[j] < d->threshold ? | draws[j] >= d->threshold ?
dropout: a byte used twice | model.c | >> 8 * (j % 4) & 0xFF; | >> 8 * (j % 2) & 0xFF;
dropout: the dropped stored as 0, whose slope is not | model.c | ? DROPPED : pre[o0 + j]; | ? 0 : pre[o0 + j];
dropout: the dropped not stored | model.c | ? DROPPED : pre[o0 + j]; | ? pre[o0 + j] : pre[o0 + j];
dropout: rows 8 apart share their bits | model.h | row / 8 % 2 ? r.v[2 + word] : r.v[word]; | r.v[word];
dropout: rows 16 apart share their draws | model.h | (row / 16 * 8 + row % 8) | (row % 8)
dropout: a row's last draw is the next row's first | model.h | (uint64_t)((O + 7) / 8) | (uint64_t)(O / 8)
dropout: draws beyond 2^32 repeat | model.h | (uint32_t)i, (uint32_t)(i >> 32), step, purpose); | (uint32_t)i, 0, step, purpose);
dropout: six rounds | model.h | philox_rounds(7, seed, | philox_rounds(6, seed,
dropout: is_dropped takes one byte for four | model.h | >> 8 * (o % 4) & 0xFFu) | & 0xFFu)
dropout: every step alike | model.c | uint32_t step = d->state->step; | uint32_t step = d->state->step * 0;
dropout: every layer alike | model.c | .purpose = RNG_DROPOUT + (uint32_t)l, | .purpose = RNG_DROPOUT,
dropout: every pass alike | model.c | .first = first * (uint64_t)m->T, .state | .first = first * 0, .state
dropout: also when not training | model.c | train ? threshold_of(m->training.dropout, 256) : 0; | train || 1 ? threshold_of(m->training.dropout, 256) : 0;
dropout: forward forgets the pass | model.c | drop.first + n0 + (uint64_t)i, s.O); | n0 + (uint64_t)i, s.O);
dropout: backward takes inference's scale | model.c | dropout_of(m, 0, true, 0).scale | dropout_of(m, 0, false, 0).scale
norm: eps dropped | model.c | (1 / sqrt(squares / C + NORM_EPS)); | (1 / sqrt(squares / C));
norm: eps outside the root | model.c | (1 / sqrt(squares / C + NORM_EPS)); | (1 / (sqrt(squares / C) + NORM_EPS));
norm: variance over C-1 | model.c | (1 / sqrt(squares / C + NORM_EPS)); | (1 / sqrt(squares / (C - 1) + NORM_EPS));
norm forward: bias dropped | model.c | * rstd * gain[c] + bias[c]; | * rstd * gain[c];
norm backward: mean dropped | model.c | rstd * (g - g_mean - xhat * gx_mean); | rstd * (g - xhat * gx_mean);
norm backward: variance dropped | model.c | rstd * (g - g_mean - xhat * gx_mean); | rstd * (g - g_mean);
norm backward: a sign | model.c | rstd * (g - g_mean - xhat * gx_mean); | rstd * (g - g_mean + xhat * gx_mean);
norm backward: d gain of g | model.c | dgain[c] += dout[c] * xhat; | dgain[c] += g * xhat;
norm backward: d bias of g | model.c | dbias[c] += dout[c]; | dbias[c] += g;
norm backward: written, not accumulated | model.c | dx[c] = accumulate ? dx[c] + d : d; | dx[c] = d;
norm backward: forward's output not written again | model.c | if (again) norm_row( | if (0) norm_row(
norm backward: below not scaled | model.c | NULL, dx_n, scale, C); | NULL, dx_n, 1, C);
norm backward: does not go on below | model.c | if (pre) act_row_backward((real *)pre + n * C, NULL, | if (0) act_row_backward((real *)pre + n * C, NULL,
norm backward: first rows only | model.c | blk < blocks; blk++) sum[c] += part | blk < 1; blk++) sum[c] += part
norm backward: parameters written, not accumulated | model.c | sum[c] += part[blk * stride + (size_t)c]; | sum[c] = part[blk * stride + (size_t)c];
embedding: a dropped byte is 0, not the norm of 0 | model.c | memcpy(rows + (size_t)BYTE_DROPPED * C, bias, | memset(rows + (size_t)BYTE_DROPPED * C, 0,
embedding backward: a byte's last occurrence only | model.c | d[c] += ((const real *)dx)[n * C + c]; | d[c] = ((const real *)dx)[n * C + c];
embedding backward: dropped bytes forgotten | model.c | dbias[c] += drows[(size_t)BYTE_DROPPED * C + c]; | dbias[c] += 0;
embedding backward: written, not accumulated | model.c | dtable[(size_t)v * C + c] += dtable_row[c]; | dtable[(size_t)v * C + c] = dtable_row[c];
embedding backward: dropped bytes overwrite | model.c | memset(drows, 0, (size_t)(V + 1) * C * sizeof *drows); | memset(drows, 0, (size_t)V * C * sizeof *drows);
softcap: not divided by the cap | model.c | real_tanh(l[v] / cap) | real_tanh(l[v])
softcap backward: slope dropped | model.c | slope[v] = 1 - t * t; | slope[v] = 1;
softcap: left out of the loss | model.c | p[v] = cap > 0 ? cap * t : l[v]; | p[v] = l[v];
cross-entropy: largest logit not subtracted | model.c | if (v == 0 || p[v] > top) top = p[v]; | if (v == 0) top = 0;
cross-entropy backward: target forgotten | model.c | - (v == target ? 1 : 0)); | - (v == target ? 0 : 0));
cross-entropy backward: not scaled | model.c | l[v] = scale * slope[v] * | l[v] = slope[v] *
cross-entropy backward: rows without target keep logits | model.c | if (!scored && scale != 0) memset | if (!scored && scale > 9) memset
losses: the last one only | model.c | state->loss_sum += losses[n]; | state->loss_sum = losses[n];
graph: unit without its residual | model.c | last ? m->x[u] : NULL, | NULL,
graph: residual's gradient lost, prenorm | model.c | m->config.channels, true, m->work); | m->config.channels, false, m->work);
graph: residual's gradient lost, paper | model.c | conv_shape(m, first), true, m->work); | conv_shape(m, first), false, m->work);
graph: the unit below forgotten, prenorm | model.c | top_pre(m, u - 1), m->dh, | NULL, m->dh,
graph: the unit below forgotten, paper | model.c | top_pre(m, u - 1), NULL, | NULL, NULL,
graph: the last unit forgotten | model.c | NULL, top_pre(m, m->U - 1), | NULL, NULL,
graph: weight gradients that wait are forgotten | model.c | run_jobs(m, &waiting); | (void)0;
graph: what waiting weight gradients read is overwritten | model.c | if (waiting->jobs[i].x == v->read) run_jobs(m, waiting); | (void)i;
graph: tied head without a gradient | model.c | branch = weight_backward(m, m->embedding, NO_BIAS, | branch = 0 && weight_backward(m, m->embedding, NO_BIAS,
graph: every conv has the first dilation | model.c | c->dilations[l % c->n_dilations]; | c->dilations[0];
graph: gradients left from the last step | model.c | grads[i] = 0;  // for the next step | (void)0;  //
branches: dh in the place of h | model.c | m->dh = m->branches ? place(&a, N * wide * size) : m->h; | m->dh = m->h;
branches: dz in the place of z | model.c | m->dz = m->branches ? place(&a, N * wide * size) : m->z; | m->dz = m->z;
branches: convs share what they read | model.c | .read = m->branches ? place(a, bytes) : shared | .read = shared
branches: a tied head's not joined before the embedding | model.c | if (m->config.tie) join(m, head); | (void)head;
branches: losses are added in the main line's scratch | model.c | m->losses, N, m->branch_work); | m->losses, N, m->work);
branches: weight gradients in the main line's scratch | model.c | conv_shape(m, 0), m->branch_work); | conv_shape(m, 0), m->work);
branches: the head's in the main line's scratch | model.c | (&job, 1, s, m->branch_work); | (&job, 1, s, m->work);
branches: taken for passes of any size | model.c | (size_t)B * T <= backend->branch_rows; | backend->branch_rows > 0;
branches: not joined at the end of a pass | model.c | join(m, waiting.branch); | (void)0;
graph: gradients not divided by the passes | model.c | 1 / ((float)t->passes * (float)N); | 1 / (float)N;
graph: a batch halved though it is to be taken at once | model.c | backend->pass_rows && !training->at_once; | backend->pass_rows;
graph: half a batch for a whole | model.c | m->B /= 2) m->training.passes *= 2; | m->B /= 2) m->training.passes *= 1;
graph: every pass draws the same windows | model.c | uint64_t first = (uint64_t)p * (uint64_t)m->B; | uint64_t first = (uint64_t)p * 0;
receptive field: K for K-1 | model.c | (int64_t)c->blocks * (c->taps - 1) * sum; | (int64_t)c->blocks * c->taps * sum;
batch: the target is the byte itself | model.c | targets[n] = window[t + 1]; | targets[n] = window[t];
batch: byte dropout forgets the pass | model.c | (first + (uint64_t)b) * (uint64_t)T + (uint64_t)t); | (uint64_t)b * (uint64_t)T + (uint64_t)t);
batch: windows reach into the next text | model.c | length[i] - (uint64_t)m->T : 0; | length[i] - (uint64_t)m->T + 1 : 0;
batch: the last window of a text belongs to the next | model.h | while (w >= c->windows[part + 1]) part++; | while (w > c->windows[part + 1]) part++;
batch: byte dropout shares the windows' numbers | model.h | step, RNG_BYTE_DROPOUT); | step, RNG_WINDOW);
fresh: standard deviation 1/n | model.c | 1 / sqrt((double)fan_in); | 1 / (double)fan_in;
fresh: every number twice | model.c | (real)(pair[k % 2] * | (real)(pair[0] *
tensors: vectors decay, matrices do not | model.c | if (matrices) m->n_decay = m->n_params; | if (!matrices) m->n_decay = m->n_params;
adamw: vectors decay | model.c | adamw_update(&a, i < n_decay, | adamw_update(&a, true,
adamw: a last block left out of the norm | model.c | blk < blocks; blk++) total += | blk + 1 < blocks; blk++) total +=
adamw: steps on NaN | model.c | if (!a.finite) return; | if (n == 0) return;
adamw: steps on an infinite gradient | model.h | loss - loss == 0 && norm - norm == 0; | loss - loss == 0;
adamw: gradients lost on NaN | model.c | if (!a.finite) return; | memset(grads, 0, a.finite ? 0 : n * sizeof *grads); if (!a.finite) return;
adamw: step not counted | model.c | state->step++; | (void)0;
adamw: clips to norm 1 whatever the bound | model.h | h->clip / norm : 1); | 1 / norm : 1);
adamw: clips what is below the bound | model.h | h->clip > 0 && norm > h->clip ? | h->clip > 0 ?
adamw: bias correction one step late | model.h | (1 / (1 - pow(h->beta1, step + 1.0))); | (1 / (1 - pow(h->beta1, step + 2.0)));
adamw: second moment of g, not g squared | model.h | (1 - a->beta2) * g * g; | (1 - a->beta2) * g;
adamw: first moment forgets | model.h | *m = a->beta1 * *m + (1 - a->beta1) * g; | *m = g;
adamw: eps inside the root | model.h | ((real)sqrt(*v * a->correct2) + a->eps); | ((real)sqrt(*v * a->correct2 + a->eps));
adamw: decay without the schedule | model.h | (real)(1 - lr * h->weight_decay); | (real)(1 - h->lr * h->weight_decay);
adamw: no decay | model.h | *p = *p * (decay ? a->decay : 1) - | *p = *p * (decay ? 1 : 1) -
adamw: average not weighted | model.h | a->ema * *ema + (1 - a->ema) * *p; | a->ema * *ema + *p;
learning rate: warm-up starts at 0 | model.h | h->lr * (double)(step + 1) / | h->lr * (double)step /
learning rate: warm-up counted in the cosine | model.h | (double)(step - h->warmup) / (double)(h->steps - h->warmup); | (double)step / (double)h->steps;
philox: nine rounds | model.h | philox_rounds(10, key, | philox_rounds(9, key,
philox: a wrong key step | model.h | k1 += 0xBB67AE85u; | k1 += 0xBB67AE86u;
philox: lanes overlap | model.h | (16 * (lane & 1)) | (8 * (lane & 1))
refusals: a dilation of 0 is taken | model.c | c->dilations[i] < 1 || | c->dilations[i] < 0 ||
LIST
}

TESTS=${TESTS:-test_gradcheck test_model test_causality}
CC=${CC:-cc}
CFLAGS=${CFLAGS:--O1}
here=$(cd "$(dirname "$0")" && pwd)
if command -v timeout >/dev/null; then limit="timeout 120"; else limit=; fi

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

# build: the test programs, in the current folder. An object that lies there already is taken.
build() {
    compile="$CC -std=c11 $CFLAGS -w"
    for object in model test_gradcheck test_model test_causality; do
        [ -f $object.o ] || $compile -c $object.c -o $object.o || return 1
    done
    for object in model test_gradcheck; do
        [ -f ${object}_f64.o ] || $compile -DREAL=double -c $object.c -o ${object}_f64.o || return 1
    done
    $compile test_gradcheck_f64.o model_f64.o -lm -o test_gradcheck &&
        $compile test_gradcheck.o model.o -lm -o test_gradcheck_f32 &&
        $compile test_model.o model.o -lm -o test_model &&
        $compile test_causality.o model.o -lm -o test_causality
}

# first_failure: the test that fails and how; false if none does.
first_failure() {
    for test in $TESTS; do
        STOP_AT_FIRST_FAILURE=1 $limit "./$test" > "$test.txt" 2>&1
        status=$?
        [ $status = 0 ] && continue
        why=$(grep -m 1 '^FAIL' "$test.txt")
        [ -n "$why" ] || why="exit status $status"
        echo "$test: $why"
        return 0
    done
    return 1
}

# one LINE: makes that mutant in a folder of its own and prints what became of it.
one() {
    name=${1%% | *} rest=${1#* | }
    file=${rest%% | *} rest=${rest#* | }
    OLD=${rest%% | *} NEW=${rest#* | }
    export OLD NEW
    folder=$(mktemp -d "$work/XXXXXX") && cd "$folder" && cp "$work"/base/*.[cho] . || exit 255
    rm -f model.o model_f64.o
    [ "$file" = model.c ] || rm -f ./*.o
    if ! replace "$file"; then
        echo "BROKEN    $name: the old text is not in $file exactly once: $OLD"
    elif ! build > build.txt 2>&1; then
        echo "BROKEN    $name: does not compile: $(grep -m 1 error build.txt)"
    elif failure=$(first_failure); then
        echo "caught    $name ($failure)"
    else
        echo "SURVIVED  $name: $file: $NEW"
    fi
    cd / && rm -rf "$folder"
}

if [ "$1" = --one ]; then
    one "$2"
    exit 0
fi

work=$(mktemp -d) && export work CC CFLAGS TESTS || exit 1
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT TERM
mkdir "$work/base" && cp "$here"/model.[ch] "$here"/kernels.h "$here"/test.h "$here"/test_*.c \
    "$work/base" && cd "$work/base" && build || exit 1
if failure=$(first_failure); then
    echo "mutate.sh: the code as it is fails already: $failure"
    exit 1
fi
mutants | grep -e "^[^|]*$1" | tr '\n' '\0' |
    xargs -0 -P "${JOBS:-2}" -n 1 sh "$here/mutate.sh" --one | tee "$work/results"
caught=$(grep -c '^caught' "$work/results")
total=$(grep -c . "$work/results")
echo "$caught of $total mutants caught"
[ "$caught" = "$total" ] && [ "$total" -gt 0 ]
