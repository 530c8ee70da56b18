// language.h: the built-in corpus, text in an invented, inflected, English-looking language whose
// entropy is known exactly. language.c says how the text is made and why the figure is a floor.
//
// The first call of any function fills tables shared by all of them: make it before any threads.
#ifndef LANGUAGE_H
#define LANGUAGE_H

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#ifdef __cplusplus
extern "C" {
#endif

// Fills out[0..bytes) with text and returns bytes. The text is a function of the seed alone, the
// same on every machine, and a longer text begins with the shorter one; its end may cut a sentence
// or a word. The seed changes the draws, never the language.
// If roots is not NULL, every word that lies wholly inside gets one line there:
//     byte offset TAB the word as it stands in the text TAB its root TAB its category
// Errors in writing to roots are left for the caller to see with ferror(roots).
size_t language_write(unsigned char *out, size_t bytes, uint64_t seed, FILE *roots);

// The entropy rate of the text in bits per byte, computed from the probabilities of the grammar and
// of the words: no model, however large, gets below it on average.
double language_entropy(void);

// The ideal coder. It parses text, which must start where a sentence starts and may stop anywhere,
// and returns the bits of its complete sentences under the generator's own probabilities, divided
// by their bytes. NaN if text is not of the language, or holds no complete sentence.
double language_cost(const unsigned char *text, size_t n);

// Checks all of the above. Prints one line per check to report ("ok ..." or "FAIL ..."), and last
// "N passed, N failed, N skipped". Returns the number that failed; takes a few seconds.
int language_self_test(FILE *report);

#ifdef __cplusplus
}
#endif
#endif
