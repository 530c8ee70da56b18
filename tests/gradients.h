// gradients.h: is a gradient the derivative? Central differences, for programs built with
// -DREAL=double. Along a random direction u of one array p of a loss's inputs
//     slope(h) = (loss(p + h u) - loss(p - h u)) / 2h  =  sum(gradient * u) + O(h^2)
// of which (4 slope(h) - slope(2h)) / 3 leaves an O(h^4): so h need not be so small that the
// difference drowns in rounding. Where a second derivative jumps (lrelu2 at 0) within 2h of p the
// error is O(h), and narrower h are taken: a right gradient agrees with one of three differences, a
// wrong one with none.
#ifndef GRADIENTS_H
#define GRADIENTS_H

#include "support/arithmetic.h"
#include "tests/test.h"

enum { GRADIENT_DIRECTIONS = 3 };
#define WIDE_STEP 3e-4       // h, relative to the largest value of the array
#define NARROW_STEP 3e-6
#define GRADIENT_BOUND 1e-7  // relative to the array's own derivative
#define ZERO_SLOPE 1e-9      // of nats: below it a slope is what rounding leaves of zero
#define ZERO_GRADIENT 1e-12

typedef double (*Loss)(void *arg);

// Of a dropped value only its mark is stored, and the mark is no number that could be a little
// larger: values equal to `mark` stay as they are, and their gradient must be 0. NO_MARK: none.
#define NO_MARK ((real)NAN)

// (loss(saved + h u) - loss(saved - h u)) / 2h, u being random numbers of a stream. value: what the
// loss reads.
static inline double central_difference(real *value, const real *saved, size_t n, real mark,
                                        double h, uint64_t stream, Loss loss, void *arg) {
    double side[2];
    for (int s = 0; s < 2; s++) {
        for (size_t i = 0; i < n; i++)
            if (saved[i] != mark)
                value[i] = saved[i] + (real)((s ? h : -h) * random_value(stream, i));
        side[s] = loss(arg);
    }
    return (side[1] - side[0]) / (2 * h);
}

static inline double largest_value(const real *x, size_t n) {
    double most = 0;
    for (size_t i = 0; i < n; i++)
        if (!(fabs((double)x[i]) <= most)) most = fabs((double)x[i]);  // a NaN gets in
    return most;
}

// How far grad (n) is from the derivative of loss(arg) by value (n), at one width of step, relative
// to *size: the root mean square of the slopes, so that an all-zero gradient is 100 % wrong.
static inline double gradient_error(real *value, size_t n, const real *grad, real mark, double step,
                                    Loss loss, void *arg, double *size) {
    real *saved = new_reals(n);
    memcpy(saved, value, n * sizeof *saved);
    double h = 0, worst = 0, squares = 0;
    for (size_t i = 0; i < n; i++) {
        if (value[i] != mark) h = fmax(h, step * fabs((double)value[i]));
        if (value[i] == mark && !(grad[i] == 0)) worst = INFINITY;
    }
    for (int d = 0; d < GRADIENT_DIRECTIONS; d++) {
        uint64_t stream = 900 + (uint64_t)d;
        double expected = 0;
        for (size_t i = 0; i < n; i++) expected += (double)grad[i] * random_value(stream, i);
        double near = central_difference(value, saved, n, mark, h, stream, loss, arg);
        double far = central_difference(value, saved, n, mark, 2 * h, stream, loss, arg);
        double slope = (4 * near - far) / 3, diff = fabs(slope - expected);
        if (!(diff <= worst)) worst = diff;
        squares += slope * slope;
    }
    memcpy(value, saved, n * sizeof *saved);
    free(saved);
    *size = sqrt(squares / GRADIENT_DIRECTIONS);
    return worst / *size;
}

// may_be_zero: perhaps nothing that this array holds can reach the loss. Where the slopes say so
// the gradient must be zero, too; everywhere else a loss that does not depend on it is a failure.
static inline void check_marked(const char *where, const char *tensor, real *value, size_t n,
                                const real *grad, real mark, bool may_be_zero, Loss loss,
                                void *arg) {
    double size, error = INFINITY;
    for (double h = WIDE_STEP; !(error <= GRADIENT_BOUND) && h > NARROW_STEP / 2; h /= 10) {
        error = fmin(error, gradient_error(value, n, grad, mark, h, loss, arg, &size));
        if (may_be_zero && size <= ZERO_SLOPE) {
            check_error(largest_value(grad, n), ZERO_GRADIENT, "%s: d %s is zero", where, tensor);
            return;
        }
    }
    check_error(error, GRADIENT_BOUND, "%s: d %s", where, tensor);
}
static inline void check_gradient(const char *where, const char *tensor, real *value, size_t n,
                                  const real *grad, bool may_be_zero, Loss loss, void *arg) {
    check_marked(where, tensor, value, n, grad, NO_MARK, may_be_zero, loss, arg);
}

#endif
