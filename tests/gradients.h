// gradients.h: is a gradient the derivative? Central differences, for programs built with
// -DREAL=double. Along a random direction u of one array p of a loss's inputs
//     slope(h) = (loss(p + h u) - loss(p - h u)) / 2h  =  sum(gradient * u) + O(h^2)
// of which (4 slope(h) - slope(2h)) / 3 leaves an O(h^4): so h need not be so small that the
// difference drowns in rounding. Where a second derivative jumps (lrelu2 at 0) within 2h of p that
// reasoning fails, and a narrow h is taken instead. A gradient is right if it agrees with one of
// the two; a wrong one agrees with neither.
#ifndef GRADIENTS_H
#define GRADIENTS_H

#include "support/arithmetic.h"
#include "tests/test.h"

enum { GRADIENT_DIRECTIONS = 2 };
#define WIDE_STEP 3e-4         // h, relative to the largest value of the array
#define NARROW_STEP 1e-6
#define GRADIENT_TOLERANCE 3e-6  // relative to the array's own derivative
#define ZERO_GRADIENT 1e-9       // of nats: below it a slope is what rounding leaves of zero

typedef double (*Loss)(void *arg);

// (loss(saved + h u) - loss(saved - h u)) / 2h, u being random numbers of a stream. value: what the
// loss reads.
static inline double central_difference(real *value, const real *saved, size_t n, double h,
                                        uint64_t stream, Loss loss, void *arg) {
    double side[2];
    for (int s = 0; s < 2; s++) {
        for (size_t i = 0; i < n; i++)
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
static inline double gradient_error(real *value, size_t n, const real *grad, double step, Loss loss,
                                    void *arg, double *size) {
    real *saved = new_reals(n);
    memcpy(saved, value, n * sizeof *saved);
    double h = 0, worst = 0, squares = 0;
    for (size_t i = 0; i < n; i++)  // around DROPPED nothing changes, however wide the step
        if (value[i] != (real)DROPPED) h = fmax(h, step * fabs((double)value[i]));
    for (int d = 0; d < GRADIENT_DIRECTIONS; d++) {
        uint64_t stream = 900 + (uint64_t)d;
        double expected = 0;
        for (size_t i = 0; i < n; i++) expected += (double)grad[i] * random_value(stream, i);
        double near = central_difference(value, saved, n, h, stream, loss, arg);
        double far = central_difference(value, saved, n, 2 * h, stream, loss, arg);
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
static inline void check_gradient(const char *where, const char *tensor, real *value, size_t n,
                                  const real *grad, bool may_be_zero, Loss loss, void *arg) {
    double size, error = gradient_error(value, n, grad, WIDE_STEP, loss, arg, &size);
    if (may_be_zero && size <= ZERO_GRADIENT) {
        check_error(largest_value(grad, n), ZERO_GRADIENT, "%s: d %s is zero", where, tensor);
        return;
    }
    if (!(error <= GRADIENT_TOLERANCE)) {
        double narrow = gradient_error(value, n, grad, NARROW_STEP, loss, arg, &size);
        if (narrow < error) error = narrow;
    }
    check_error(error, GRADIENT_TOLERANCE, "%s: d %s", where, tensor);
}

#endif
