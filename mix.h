// mix.h: the context mixer: what a text has said so far, and what a network thinks of it, as one
// probability for the next bit. As a predictor beside others: support/predictor.h.
//
//   Mixture *m = mixture_open(with a network);
//   for each byte { mixture_begin(m, what the network says);
//                   for each bit, the highest first { p = mixture_bit(m); mixture_tell(m, bit); } }
// Every bit is predicted before it is learnt. All is done in integers, so that a decoder on another
// machine comes to the same numbers.
#ifndef MIX_H
#define MIX_H

#include "support/backend.h"

typedef struct Mixture Mixture;

// Probabilities are parts of these: of a bit, and of a byte.
enum { ONE_BIT = 1 << 16, ONE_BYTE = 1 << 30 };

// The 256 bytes as the leaves of a tree of whole numbers: byte v at V + v, node n is the sum of 2n
// and 2n + 1. Nodes are written as 1 and the bits of the byte so far.
typedef uint32_t Tree[2 * V];
static inline uint64_t hash2(uint64_t a, uint64_t b) {
    a = (a + b + 1) * 0x9E3779B97F4A7C15u;
    return a ^ a >> 29;
}
// P(1) of the bit after a node.
static inline int tree_bit(const uint32_t *tree, int node) {
    int p = (int)(((uint64_t)tree[2 * node + 1] << 16) / tree[node]);
    return p < 1 ? 1 : p > ONE_BIT - 1 ? ONE_BIT - 1 : p;
}

// NULL where there is no memory; free() ends it. network: it will say something.
Mixture *mixture_open(bool network);
size_t mixture_memory(void);  // bytes
// The next byte begins. tree: what the network says of it, to stay until the byte's last bit; NULL:
// nothing.
void mixture_begin(Mixture *m, const uint32_t *tree);
// P(the next bit is 1) in parts of ONE_BIT: 1 .. ONE_BIT - 1.
int mixture_bit(const Mixture *m);
void mixture_tell(Mixture *m, int bit);
// P(the next byte is v) in parts of ONE_BYTE, none 0, all together exactly that. Between two bytes.
// Nothing is learnt and nothing is changed by it. (A byte that is told costs a little less than it
// says: its first bits teach something of its last.)
void mixture_bytes(Mixture *m, uint32_t freq[V]);
// All so far was read without the network, which from now on takes part.
void mixture_join(Mixture *m);
// `mass` split in two as a bit's p says; every one of `leaves` bytes on either side keeps 1.
static inline uint32_t mass_of_one(uint32_t mass, int p, uint32_t leaves) {
    uint32_t ones = (uint32_t)((uint64_t)mass * (uint64_t)p / ONE_BIT);
    return ones < leaves ? leaves : ones > mass - leaves ? mass - leaves : ones;
}

#endif
