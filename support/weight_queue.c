// weight_queue.c: weight gradients that wait to be computed together, and the side stream on which
// they run. Read model.c (backward) first.
#include "support/weight_queue.h"

void queue_fork(const Model *m) {
    if (m->side_stream) m->backend->fork();
}
int queue_end_fork(const Model *m) { return m->side_stream ? m->backend->end_fork() : 0; }

void queue_join(Model *m) {
    if (m->queue.fork) m->backend->join(m->queue.fork);
    m->queue.fork = m->queue.n_on_side = 0;
}

void queue_now(Model *m, const WeightJob *jobs, int n, ConvShape s) {
    WeightQueue *q = &m->queue;
    queue_fork(m);
    m->backend->conv_backward_weight(jobs, n, s, m->side_work);
    int done = queue_end_fork(m);
    if (!done) return;
    q->fork = done;
    for (int i = 0; i < 2 * n; i++) {
        if (q->n_on_side == MAX_ON_SIDE) queue_join(m);
        q->on_side[q->n_on_side].array = i % 2 ? jobs[i / 2].dy : jobs[i / 2].x;
        q->on_side[q->n_on_side++].fork = done;
    }
    if (!q->fork) q->n_on_side = 0;  // joined above: nothing is read any more
}

static bool same_shape(ConvShape a, ConvShape b) {  // but for dil, which stands in the job
    return a.B == b.B && a.T == b.T && a.C == b.C && a.O == b.O && a.K == b.K;
}

// Runs the waiting jobs that have the shape of job `like` and, unless `reads` is NULL, read that
// array; at most MAX_WEIGHT_JOBS of them, the oldest first. Jobs whose x is not ready stay.
static void run_group(Model *m, int like, const act *reads) {
    WeightQueue *q = &m->queue;
    const ConvShape s = q->shapes[like];
    WeightJob group[MAX_WEIGHT_JOBS];
    int n = 0, kept = 0;
    for (int i = 0; i < q->n; i++) {
        const WeightJob *j = &q->jobs[i];
        bool take = n < MAX_WEIGHT_JOBS && same_shape(q->shapes[i], s) && j->x != q->not_ready &&
                    (!reads || j->x == reads || j->dy == reads);
        if (take) {
            group[n++] = *j;
        } else {
            q->shapes[kept] = q->shapes[i];
            q->jobs[kept++] = *j;
        }
    }
    q->n = kept;
    queue_now(m, group, n, s);
}

void queue_run(Model *m, bool all) {
    WeightQueue *q = &m->queue;
    for (int i = 0; i < q->n;) {
        int ready = 0;
        for (int j = i; j < q->n; j++)
            ready += same_shape(q->shapes[j], q->shapes[i]) && q->jobs[j].x != q->not_ready;
        bool full = ready >= MAX_WEIGHT_JOBS || (q->n == MAX_WAITING && ready > 0);
        if (q->jobs[i].x != q->not_ready && (full || all))
            run_group(m, i, NULL);  // takes job i, and others behind it
        else
            i++;
    }
}

void weight_gradient(Model *m, const Linear *l, const act *x, const act *dy) {
    WeightQueue *q = &m->queue;
    q->shapes[q->n] = linear_shape(m, l);
    q->jobs[q->n++] = (WeightJob){m->grads + l->weight, bias_of(m->grads, l), x, dy, l->dil};
    queue_run(m, false);
}

void before_write(Model *m, const act *array) {
    WeightQueue *q = &m->queue;
    for (int i = 0; i < q->n;)
        if (q->jobs[i].x != q->not_ready && (q->jobs[i].x == array || q->jobs[i].dy == array))
            run_group(m, i, array);
        else
            i++;
    for (int i = 0; i < q->n_on_side; i++)
        if (q->on_side[i].array == array) {
            queue_join(m);
            return;
        }
}
