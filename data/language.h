// language.h: the built-in corpus, text in an invented, inflected, English-looking language whose
// entropy is known exactly. language.c says how the text is made and why the figure is a floor.
//
// The first call of any function fills tables shared by all of them: make it before any threads.
#ifndef LANGUAGE_H
#define LANGUAGE_H

#include <stddef.h>
#include <stdint.h>

// Fills out[0..bytes) with text. It is a function of the seed alone, the same on every machine, and
// a longer text begins with the shorter one; its end may cut a sentence or a word. The seed changes
// the draws, never the language.
void language_write(unsigned char *out, size_t bytes, uint64_t seed);

// The entropy rate of the text in bits per byte, computed from the probabilities of the grammar and
// of the words: no model, however large, gets below it on average.
double language_entropy(void);

#endif
