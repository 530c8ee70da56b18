// test.h: what the test programs share: one line per check, the closing line, Philox numbers.
//
// Every comparison is written so that a NaN fails it: `err <= bound`, never `err > bound`.
#ifndef TEST_H
#define TEST_H

#include "model.h"
#include "support/arithmetic.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#ifdef _OPENMP
#include <omp.h>
#endif

static int passed, failed, skipped;

static inline void count_check(bool ok) {
    if (ok)
        passed++;
    else
        failed++;
    // mutate.sh wants to know whether, not how often.
    if (!ok && getenv("STOP_AT_FIRST_FAILURE")) exit(1);
}

// A check of yes or no; its line says what should hold.
static inline void check(bool ok, const char *format, ...) {
    va_list args;
    va_start(args, format);
    printf(ok ? "ok   " : "FAIL ");
    vprintf(format, args);
    printf("\n");
    va_end(args);
    count_check(ok);
}

// A check of a figure against its bound.
static inline void check_error(double error, double bound, const char *format, ...) {
    bool ok = error <= bound;
    va_list args;
    va_start(args, format);
    printf(ok ? "ok   " : "FAIL ");
    vprintf(format, args);
    printf(": error %.2g, bound %.2g\n", error, bound);
    va_end(args);
    count_check(ok);
}

static inline void skip(const char *what_and_why) {
    printf("skip %s\n", what_and_why);
    skipped++;
}

// The closing line and main's return value.
static inline int finish(void) {
    printf("%d passed, %d failed, %d skipped\n", passed, failed, skipped);
    return failed ? 1 : 0;
}

// For what no test can go on without: memory, a model that opens.
static inline void need(bool ok, const char *what) {
    if (ok) return;
    printf("FAIL %s\n", what);
    failed++;
    exit(finish());
}

static inline void set_threads(int n) {
#ifdef _OPENMP
    omp_set_num_threads(n);
#else
    (void)n;
#endif
}

// ---- Values ------------------------------------------------------------------------------------

// Random number i of a stream: odd multiples of 2^-16 in (-1,1), so exact in float and never 0.
static inline double random_value(uint64_t stream, size_t i) {
    Philox r = philox(stream, (uint32_t)(i / 8), 0, 0, RNG_TEST);
    return (2.0 * philox_lane(r, (int)(i % 8)) - 65535) / 65536;
}

// x[i] = centre + spread * random, rounded to float so that every build has the same inputs.
static inline void fill(real *x, size_t n, uint64_t stream, double centre, double spread) {
    for (size_t i = 0; i < n; i++) x[i] = (real)(float)(centre + spread * random_value(stream, i));
}

// n values that are NaN until somebody writes them.
static inline real *new_reals(size_t n) {
    real *x = malloc((n ? n : 1) * sizeof *x);
    need(x != NULL, "out of memory");
    for (size_t i = 0; i < n; i++) x[i] = (real)NAN;
    return x;
}

static inline real *new_random(size_t n, uint64_t stream, double centre, double spread) {
    real *x = new_reals(n);
    fill(x, n, stream, centre, spread);
    return x;
}

static inline bool same_bits(const real *a, const real *b, size_t n) {
    return memcmp(a, b, n * sizeof *a) == 0;
}

// max |a - b| / max |b|; NaN if there is one anywhere, or if b is all zeros.
static inline double relative_error(const real *a, const real *b, size_t n) {
    double diff = 0, size = 0;
    for (size_t i = 0; i < n; i++) {
        double d = fabs((double)a[i] - (double)b[i]), s = fabs((double)b[i]);
        if (!(d <= diff)) diff = d;  // a NaN gets in ...
        if (diff - diff != 0) return NAN;
        if (s > size) size = s;
    }
    return diff / size;  // ... and so does 0/0: two all-zero arrays prove nothing
}

// ---- Models ------------------------------------------------------------------------------------

// Parameters unlike fresh ones: no bias is 0 and no gain is 1, so that none can be forgotten.
static inline void fill_params(Model *m, uint64_t stream) {
    real *host = new_reals(m->n_params);
    for (int i = 0; i < m->n_tensors; i++) {
        const Tensor *t = &m->tensors[i];
        size_t n = strlen(t->name);
        bool gain = t->ndim == 1 && n > 7 && strcmp(t->name + n - 7, ".weight") == 0;
        double fan_in = t->ndim == 3 ? (double)t->dims[0] * t->dims[1] : (double)t->dims[0];
        double spread = t->ndim == 1 ? 0.25 : t->offset == m->embedding ? 0.5 : sqrt(3 / fan_in);
        fill(host + t->offset, t->size, stream + (uint64_t)i, gain ? 1 : 0, spread);
    }
    model_write(m, m->params, host);
    free(host);
}

static inline void open_or_die(Model *m, const Backend *be, const Config *c, int B, int T,
                               const Training *training) {
    Error e;
    if (model_open(m, be, c, B, T, training, &e)) need(false, e.text);
}

#endif
