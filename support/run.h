// run.h: what a training run leaves on disk and how it goes on from there: its folder with
// model.safetensors (the best so far), state.safetensors (all that resuming needs) and log.tsv.
// train.c takes the steps. Read model.h and checkpoint.h first.
#ifndef RUN_H
#define RUN_H

#include "support/checkpoint.h"
#include "support/options.h"

typedef struct {
    Cli cli;  // its saved options and its texts make the run what it is
    Config config;
    const Backend *backend;
    Model model;
    char folder[4096];
    int lock;              // descriptor of folder/.lock, held until the process ends
    char id[17];           // in both files: which model and state belong together
    uint64_t text;         // hash of all texts and their split: a resumed run must find it again
    char trained_on[256];  // the texts' names
    size_t training_bytes, held_out_bytes;
    real *host;            // 4 n_params: on their way to a file or to the scorer
    int64_t step;          // steps taken and seen by the host
    int64_t evaluated;     // the step of the last evaluation
    double best;           // lowest held-out loss so far in nats per byte, or INFINITY
    int64_t best_step;     // 0: there is no best yet
    real *best_params;     // (n_params)
    double whole;          // their last figure, on more than the part that `best` is of; or 0
    bool best_unsaved;
    int64_t saved_step;
    double last_save;      // seconds of now()
    FILE *log;             // NULL once it could not be written
    long log_end;          // bytes of it that are written
} Run;

// ---- The folder: one trainer at a time ----------------------------------------------------------

// Takes the folder `name` for a new run, and makes it. A run that is there already is moved aside,
// but not with a text, --val or --init of this one in it. One that is being trained is an error
// that says by which process. r->cli must be complete.
int run_take_folder(Run *r, const char *name, Error *e);
// Takes the folder of a run that shall go on, opens its state and takes its options and texts,
// where none are given.
int run_open_state(Run *r, const char *name, Checkpoint *state, Error *e);
// Parameters, moments, average, step and best, once the model is open.
int run_load(Run *r, const Checkpoint *state, Error *e);

// ---- What it writes -----------------------------------------------------------------------------

// Gives a new run its id, once its options and texts are known: two runs of one id begin as the
// same computation. One that goes on with other --steps keeps its id. start: checksum of the
// parameters of --init, else 0.
int run_identify(Run *r, uint64_t start, Error *e);
// The best parameters so far, for others to use.
int run_save_model(Run *r, Error *e);
// Both files, the model only if it is not saved yet.
int run_save(Run *r, Error *e);
// A new log with its header, or on resuming the old one up to its last whole row at or before
// r->step.
int run_open_log(Run *r, bool resumed, Error *e);
// A line of the log, or a part of one. A log that cannot be written ends with a note; the training
// goes on.
void run_log(Run *r, const char *format, ...);
void run_flush_log(Run *r);

// The CPU as Linux names it: figures mean little without it.
const char *machine_name(char *buffer, size_t size);
int threads_in_use(void);
char *copy_text(const char *text);  // for good: options and file names stay

#endif
