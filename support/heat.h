// heat.h: a text in which the colour of every byte says how much it surprised the model: on a
// terminal, or as a page of HTML that needs nothing beside itself.
//
//   HeatPage p;  heat_page_begin(&p, f, name);  heat_page_byte(&p, byte, bits) ...;
//   heat_page_end(&p, nats, n);
#ifndef HEAT_H
#define HEAT_H

#include <stdio.h>

#include "support/backend.h"

#ifdef __cplusplus
extern "C" {
#endif

// Writes text, e.g. a name, so that it cannot drive a terminal: as "?" whatever is a control, has
// no shape of its own or is not UTF-8. Returns the number of bytes written.
int put_clean(FILE *f, const char *text);

// Writes a byte for a terminal, coloured from white over yellow to red, and returns how many bytes
// that took. Characters stay whole; a control is shown as '?'. before: the byte before it, or 0.
// saved: bits that another predictor would have paid more; from 1 on the byte is underlined.
enum { HEAT_TEXT = 48 };
int heat_terminal(char text[HEAT_TEXT], uint8_t byte, uint8_t before, double bits, double saved);

typedef struct {
    FILE *file;        // to be written and sought
    const char *name;  // of the text, for title and heading
    uint8_t bytes[4];  // not yet written: a character is at most four bytes long
    double bits[4], saved[4];
    int n;
    int step;  // of colour, + 16 where underlined, of what was written last
} HeatPage;

// A write that fails sets the file's error. The bytes of one character have one colour: their mean.
// Control bytes, bytes that are not UTF-8 and characters without a shape are shown by name.
void heat_page_begin(HeatPage *p, FILE *file, const char *name);
void heat_page_byte(HeatPage *p, uint8_t byte, double bits, double saved);
// nats: the mean over all n bytes. -1 if the file cannot be sought.
int heat_page_end(HeatPage *p, double nats, uint64_t n);

#ifdef __cplusplus
}
#endif
#endif
