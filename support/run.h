// run.h: what a training run leaves on disk and how it goes on from there: its folder with
// model.safetensors (the best so far), state.safetensors (all that resuming needs) and log.tsv.
// train.c takes the steps; read model.h and checkpoint.h first.
#ifndef RUN_H
#define RUN_H

#include "support/checkpoint.h"
#include "support/options.h"

typedef struct {
    Cli cli;  // its saved options and its texts make the run what it is
    Config config;
    const Backend *backend;
    Model model;
    const char *folder;
    uint64_t text;        // hash of all texts and their split: a resumed run must find it again
    real *host;           // 4 n_params: on their way to a file or to the scorer
    int64_t step;         // steps taken and seen by the host
    double best;          // lowest held-out loss so far in nats per byte
    int64_t best_step;
    real *best_params;    // (n_params)
    bool best_unsaved;
    int64_t saved_step;
    double last_save;     // seconds of now()
    FILE *log;
} Run;

// Opens the state in r->folder and takes its options and texts, where none are given.
int run_open_state(Run *r, Checkpoint *state, Error *e);
// Parameters, moments, average, step and best, once the model is open. Closes nothing.
int run_load(Run *r, const Checkpoint *state, Error *e);
// Makes r->folder; an earlier run that is there is moved aside.
int run_make_folder(const Run *r, Error *e);
// A new log with its header, or on resuming the old one without the rows after r->step.
int run_open_log(Run *r, bool resumed, Error *e);
// The best parameters so far, for others to use.
int run_save_model(Run *r, Error *e);
// Both files, the model only if it is not saved yet.
int run_save(Run *r, Error *e);

// The CPU as Linux names it: figures mean little without it.
const char *machine_name(char *buffer, size_t size);
int threads_in_use(void);

#endif
