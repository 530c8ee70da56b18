// range_coder.h: bits at the price that a predictor puts on them, and back.
//
// A range coder narrows an interval of whole numbers, bit after bit, to the part that the
// prediction gives the bit: n bits of surprise cost n bits. The decoder makes the same predictions
// from what it has already, so a predictor that saw even one bit ahead could not be decoded. After
// Schindler and Subbotin: when the top bytes of both ends agree they are written; when the interval
// gets too small while they differ, it is cut off at the boundary.
#ifndef RANGE_CODER_H
#define RANGE_CODER_H

#include "support/backend.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    uint64_t low, range, code;  // code: the decoder's next 64 bits
    uint8_t *at, *end;          // room of the encoder, or what is left for the decoder
    bool over;                  // it wanted more than there is
} Coder;

// p: probability of a 1 in 1/65536, 1 to 65535. A bit writes at most eight bytes.
Coder encoder(uint8_t *room, size_t n);
void encode_bit(Coder *c, int p, int bit);
void encode_end(Coder *c);  // eight bytes
Coder decoder(uint8_t *code, size_t n);
int decode_bit(Coder *c, int p);
// Whether what was decoded is all that was encoded: the encoder ended by writing `low`.
bool decode_ended(const Coder *c);

#ifdef __cplusplus
}
#endif
#endif
