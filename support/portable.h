// portable.h: exp, log, tanh, sin and cos that give the same bits on every machine.
//
// The decoder of an archive must make the encoder's numbers again, to the last bit. IEEE 754 fixes
// what +, -, *, / and sqrt give; it does not fix libm, nor whether a compiler fuses a*b + c. So
// whatever an archive depends on is compiled with -ffp-contract=off and -DPORTABLE, which puts
// these in libm's place. They use the five operations alone, in the order that is written, and are
// as exact as a series with one rounding a term: some 1e-15.
#ifndef PORTABLE_H
#define PORTABLE_H

#include <math.h>
#include <stdint.h>
#include <string.h>

// 2^n for -1022 <= n <= 1023
static inline double portable_power(int n) {
    uint64_t bits = (uint64_t)(n + 1023) << 52;
    double x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

// x = n ln 2 + r, |r| <= ln2 / 2; exp(r) by Taylor's series. A NaN stays one.
static inline double portable_exp(double x) {
    x = x < -708 ? -708 : x > 709 ? 709 : x;
    if (!(x == x)) return x;
    int n = (int)(x * 1.4426950408889634 + (x < 0 ? -0.5 : 0.5));
    // ln 2 in two parts, of which n times the first is exact.
    double r = (x - n * 0.693147180369123816490) - n * 1.90821492927058770002e-10, sum = 1;
    for (int k = 14; k > 0; k--) sum = 1 + r / k * sum;
    return sum * portable_power(n);
}

// x = 2^n m, m in [1/sqrt 2, sqrt 2); with s = (m - 1)/(m + 1): log m = 2 (s + s^3/3 + s^5/5 ...)
static inline double portable_log(double x) {
    uint64_t bits;
    memcpy(&bits, &x, sizeof bits);
    int n = (int)(bits >> 52 & 2047) - 1023;  // of a positive normal number
    double m = x * portable_power(-n), s, sum = 0;
    if (m > 1.4142135623730951) m /= 2, n++;
    s = (m - 1) / (m + 1);
    for (int k = 23; k > 0; k -= 2) sum = 1.0 / k + s * s * sum;
    return n * 0.6931471805599453 + 2 * s * sum;
}

static inline double portable_tanh(double x) {
    double e = portable_exp(x < 0 ? 2 * x : -2 * x), t = (1 - e) / (1 + e);
    return x < 0 ? -t : t;
}

// The sine of x or, where it begins at 1, the cosine. |x| <= pi: 14 terms leave less than 1e-16.
static inline double portable_turn(double x, double first, int k) {
    double term = first, sum = first;
    for (int i = 0; i < 14; i++, k += 2) {
        term *= -(x * x) / ((k + 1) * (k + 2));
        sum += term;
    }
    return sum;
}
static inline double portable_sin(double x) { return portable_turn(x, x, 1); }
static inline double portable_cos(double x) { return portable_turn(x, 1, 0); }

#ifdef PORTABLE
#define exp portable_exp
#define tanh portable_tanh
#define tanhf (float)portable_tanh
#define sin portable_sin
#define cos portable_cos
#endif

#endif
