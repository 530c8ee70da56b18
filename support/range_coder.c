// range_coder.c: a predictor's bits as code. Read range_coder.h first.
#include "support/range_coder.h"

#define TOP ((uint64_t)1 << 56)
#define BOTTOM ((uint64_t)1 << 24)  // a bit then still has 2^24 / 2^16 to choose from

static uint8_t next_byte(Coder *c) {
    c->over |= c->at == c->end;
    return c->over ? 0 : *c->at++;
}

static void put_byte(Coder *c, uint8_t byte) {
    c->over |= c->at == c->end;
    if (!c->over) *c->at++ = byte;
}

// What the interval is cut at: below it lies the part of a 1.
static uint64_t part(const Coder *c, int p) { return (c->range >> 16) * (uint64_t)p; }

static void narrow(Coder *c, int p, int bit, bool decode) {
    uint64_t ones = part(c, p);
    c->low += bit ? 0 : ones;
    c->range = bit ? ones : c->range - ones;
    for (;;) {
        if ((c->low ^ (c->low + c->range)) >= TOP) {
            if (c->range >= BOTTOM) break;
            c->range = (0 - c->low) & (BOTTOM - 1);
        }
        if (decode)
            c->code = c->code << 8 | next_byte(c);
        else
            put_byte(c, (uint8_t)(c->low >> 56));
        c->low <<= 8;
        c->range <<= 8;
    }
}

Coder encoder(uint8_t *room, size_t n) {
    return (Coder){.range = UINT64_MAX, .at = room, .end = room + n};
}

void encode_bit(Coder *c, int p, int bit) { narrow(c, p, bit, false); }

void encode_end(Coder *c) {
    for (int b = 0; b < 8; b++, c->low <<= 8) put_byte(c, (uint8_t)(c->low >> 56));
}

Coder decoder(uint8_t *code, size_t n) {
    Coder c = {.range = UINT64_MAX, .at = code, .end = code + n};
    for (int b = 0; b < 8; b++) c.code = c.code << 8 | next_byte(&c);
    return c;
}

int decode_bit(Coder *c, int p) {
    int bit = c->code - c->low < part(c, p);
    narrow(c, p, bit, true);
    return bit;
}

bool decode_ended(const Coder *c) { return !c->over && c->at == c->end && c->code == c->low; }
