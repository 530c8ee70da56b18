// progress.h: how far a run is: one line on standard error that redraws itself on a terminal, and
// elsewhere a line now and then.
#ifndef PROGRESS_H
#define PROGRESS_H

#include "support/options.h"

typedef struct {
    bool terminal, open;  // open: a line stands there that is to be redrawn
    double last;          // when the last one was printed
    struct { double time; int64_t step; } marks[2];  // 15 to 30 seconds ago, and up to 15
} Progress;

void progress_begin(Progress *p, int64_t step);
// Whether the last line is older than so many seconds, on a terminal or elsewhere.
bool progress_due(const Progress *p, double on_terminal, double elsewhere);
void progress_line(Progress *p, const char *format, ...);
// Ends the line that redraws itself, before anything else is printed.
void progress_end(Progress *p);
// Seconds until `steps`, at the pace of the last 15 to 30: a run may have begun slowly.
double progress_left(Progress *p, int64_t step, int64_t steps);
// 4m05s, 3h20m or 12d07h
const char *duration(double seconds, char *buffer, size_t size);

#endif
