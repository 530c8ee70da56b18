// train.h: what the trainer's two files share: train.c takes the steps, begin.c comes before them.
#ifndef TRAIN_H
#define TRAIN_H

#include "support/run.h"
#include "support/texts.h"

typedef struct {
    int preset;
    // windows of seq bytes, batch to a pass, accum passes to a step; *_every and warmup in steps
    int64_t steps, batch, seq, accum, warmup, channels, latent, window, skips, eval_every, threads;
    int64_t val_bytes, last_bytes, sample_bytes, sample_every;
    double lr, min_lr, beta1, beta2, weight_decay, clip, ema, dropout, byte_dropout, softcap;
    // val_frac of each text; save_every in seconds
    double val_frac, save_every, minutes;
    uint64_t seed;
    int activation, device;
    bool tie, norm_in, norm_out, bias, at_once, no_selftest, tensors;
    const char *units, *val, *out, *resume, *init, *kernels;
} Options;

enum { WINDOW = 256 };  // nanoGPT's block_size for TinyShakespeare

extern Options opt;
extern const char *const device_names[];
extern Texts data;
extern Model scorer;  // the same parameters as the run's model, planned for inference

// Reads what is to be read, plans and allocates; the folder and the log come last, so that a run
// which cannot start leaves no trace. began: when the process did, in seconds of now().
int begin_run(Run *r, double began, Error *e);

// Whether the option stands on the command line.
bool given(const Cli *cli, const char *name);
// Types a row of presets or sizes for the user. It comes after the command line, whose options it
// leaves.
void apply_row(const Cli *cli, const char *units, const char *options);

double step_bytes(void);
double step_operations(const Run *r);
size_t middle_bytes(void);  // that an evaluation before the end scores
size_t last_bytes(void);    // that the last figure is of

#endif
