// predictor.h: what byte comes next, as scoring, generation and compression ask it. A predictor
// gives the probability of the next bit, or of all 256 bytes, and is told the bit. Three of them:
// a network's distribution alone, an n-gram beside it, the context mixer of mix.h.
//
//   Predictor p;  predictor_open(&p, MIX_CM, network, &e);
//   for each bit, the highest of a byte first:  p1 = predictor_bit(&p);  predictor_tell(&p, bit);
//
// The network must be this program's own copy, compiled with -DPORTABLE (support/portable.h): then
// another machine's decoder comes to the same bits.
#ifndef PREDICTOR_H
#define PREDICTOR_H

#include "mix.h"
#include "support/stream.h"

typedef enum { MIX_NONE, MIX_NGRAM, MIX_CM } MixKind;
extern const char *const mix_names[];  // NULL-terminated

typedef struct Ngrams Ngrams;

typedef struct {
    MixKind kind;
    Stream *network;  // of one stream; NULL: without
    Ngrams *ngrams;
    Mixture *mixture;
    Tree tree;  // the network's distribution, or the n-gram's
    int node;   // 1, and the bits of the byte so far
    uint32_t said[V], said_sum;  // the network's distribution alone
} Predictor;

// -1 where there is no memory. The network is the caller's, and must live as long.
int predictor_open(Predictor *p, MixKind kind, Stream *network, Error *e);
void predictor_free(Predictor *p);
double predictor_memory(MixKind kind);  // bytes, without the network

// P(the next bit is 1) in parts of ONE_BIT: 1 .. ONE_BIT - 1.
int predictor_bit(const Predictor *p);
void predictor_tell(Predictor *p, int bit);
// The byte in one: its cost in nats, after which it is learnt.
double predictor_cost(Predictor *p, uint8_t byte);
// What the network alone would pay for it. Between two bytes.
double predictor_network_cost(const Predictor *p, uint8_t byte);
// P(the next byte is v), none 0, all together exactly ONE_BYTE. Between two bytes.
void predictor_bytes(const Predictor *p, uint32_t freq[V]);
// Lets the counts walk a text first. The network would be trusted too much on what it was trained
// on: it takes no part, and begins after it with nothing read.
void predictor_prime(Predictor *p, const uint8_t *text, size_t n);

// The network's distribution in whole numbers, of logits (V) before their softcap (0: none); none
// is 0. logits NULL: all are alike. Returns the sum, at most 2^24 + V.
uint32_t frequencies(uint32_t freq[V], const real *logits, float cap);
// 0, or -1: this build's arithmetic is not that of IEEE 754, so its archives would open nowhere.
int arithmetic_check(Error *e);

#endif
