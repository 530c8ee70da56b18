// range_coder.c: a model's distributions as a compressed file. Read range_coder.h first.
#include "support/range_coder.h"

#include <math.h>

enum { SCALE = 1 << 24 };  // what the frequencies add up to, roughly
#define TOP ((uint64_t)1 << 56)
#define BOTTOM ((uint64_t)1 << 48)

uint8_t next_byte(Coder *c) {
    if (c->left == 0) c->cut_off = true;
    if (c->cut_off) return 0;
    c->left--;
    return *c->in++;
}

// Narrows the interval to [from, from + freq) of total.
static void narrow(Coder *c, uint32_t from, uint32_t freq, uint32_t total) {
    c->range /= total;
    c->low += from * c->range;
    c->range *= freq;
    for (;;) {
        if ((c->low ^ (c->low + c->range)) >= TOP) {
            if (c->range >= BOTTOM) break;
            c->range = (0 - c->low) & (BOTTOM - 1);
        }
        if (c->out) fputc((int)(c->low >> 56), c->out);
        if (c->in) c->code = c->code << 8 | next_byte(c);
        c->low <<= 8;
        c->range <<= 8;
    }
}

void encode_byte(Coder *c, const uint32_t *freq, uint32_t total, int byte) {
    uint32_t from = 0;
    for (int v = 0; v < byte; v++) from += freq[v];
    narrow(c, from, freq[byte], total);
}

int decode_byte(Coder *c, const uint32_t *freq, uint32_t total) {
    uint64_t at = (c->code - c->low) / (c->range / total);
    uint32_t from = 0;
    int byte = 0;
    if (at >= total) return -1;
    while (at >= from + freq[byte]) from += freq[byte++];
    narrow(c, from, freq[byte], total);
    return byte;
}

uint32_t frequencies(uint32_t freq[V], const real *logits, float cap) {
    double p[V], top = -INFINITY, sum = 0;
    uint32_t total = 0;
    for (int v = 0; v < V; v++) {
        p[v] = cap > 0 ? (double)cap * tanh((double)logits[v] / cap) : (double)logits[v];
        if (p[v] > top) top = p[v];
    }
    for (int v = 0; v < V; v++) sum += p[v] = exp(p[v] - top);
    for (int v = 0; v < V; v++) {
        double share = p[v] / sum;
        freq[v] = 1 + (share <= 1 ? (uint32_t)(share * SCALE) : 0);  // a NaN counts as 0
        total += freq[v];
    }
    return total;
}

uint32_t no_context(uint32_t freq[V]) {
    for (int v = 0; v < V; v++) freq[v] = 1;
    return V;
}
