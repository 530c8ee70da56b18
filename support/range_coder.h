// range_coder.h: bytes into as many bits as a model is surprised by them, and back.
//
// A range coder narrows an interval of whole numbers, byte after byte, to the part that the model
// gives the byte: n bits of surprise cost n bits. The decoder makes the same distributions from the
// bytes it has already, so a model that saw even one byte ahead could not be decoded. After
// Schindler and Subbotin: when the top bytes of both ends agree they are written; when the interval
// gets too small while they differ, it is cut off at the boundary.
#ifndef RANGE_CODER_H
#define RANGE_CODER_H

#include <stdio.h>

#include "support/backend.h"

#ifdef __cplusplus
extern "C" {
#endif

// Begins with range = UINT64_MAX; the decoder's code with eight next_byte. The encoder ends with
// the eight bytes of low, the highest first.
typedef struct {
    uint64_t low, range, code;  // code: the decoder's next 64 bits
    FILE *out;                  // of the encoder
    const uint8_t *in;          // of the decoder
    size_t left;
    bool cut_off;  // it wanted more than there is
} Coder;

// freq (V), none of them 0, with their sum.
void encode_byte(Coder *c, const uint32_t *freq, uint32_t total, int byte);
// -1: no byte has this code, so the file is damaged.
int decode_byte(Coder *c, const uint32_t *freq, uint32_t total);
uint8_t next_byte(Coder *c);

// A model's distribution in whole numbers, of logits (V) before their softcap (0: none). None is 0,
// so that any byte can be coded. Returns the sum.
uint32_t frequencies(uint32_t freq[V], const real *logits, float cap);
// The distribution before the first byte: there is no context, so all are alike.
uint32_t no_context(uint32_t freq[V]);

#ifdef __cplusplus
}
#endif
#endif
