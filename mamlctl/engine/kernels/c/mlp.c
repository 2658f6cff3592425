/* The meta-gradient of a small fully connected network with a squared error, by the adjoint method.
 *
 * adjoint.py derives the formulas: fast weights w_k, support gradients g_k, inner rates r_k, adjoint p. The derivatives
 * of layer z = W a + b, with d the derivative of the activation, are
 *
 *     dL/dW = gz^T a        dL/db = sum gz        ga = gz W        gz = d ga of the layer below
 *
 * and their tangents (suffix _t) along a direction U of the weights follow by the product rule, as in conv4.py.
 *
 * An image is one set of weights. Its first part has W [out][in] and b [out] of every layer, its second part the
 * transposed W [in][out], so that all products read rows. Rows are padded with zeros to a multiple of LANE. Images of
 * gradients have both parts too, as fast weights are updated in both. Tasks are independent and are added in their
 * order, so that results do not depend on the number of threads.
 */
#include "mlp.h"

/* Multiplies `values` by the derivative of the activation at the layer's input a, which has the sign of z. */
static void through_activation(const plan *n, const layer *at, const REAL *a, REAL *values) {
    const REAL leak = (REAL)n->s->leak;
    const long count = (long)n->examples * at->in_row;
    INDEPENDENT for (long i = 0; i < count; i++) values[i] *= a[i] > 0 ? 1 : leak;
}

static void load_examples(const plan *n, const REAL *x, REAL *tape) {
    const layer *at = n->at;
    memset(tape + at->a, 0, sizeof(REAL) * n->examples * at->in_row);
    for (int e = 0; e < n->examples; e++) memcpy(tape + at->a + e * at->in_row, x + e * at->in, sizeof(REAL) * at->in);
}

/* Keeps the input of every layer in the tape, and at the end the output. */
static void forward(const plan *n, const REAL *w, REAL *tape) {
    for (int l = 0; l < n->layers; l++) {
        const layer *at = n->at + l;
        REAL *z = tape + at[1].a;
        for (int e = 0; e < n->examples; e++) memcpy(z + e * at->out_row, w + at->b, sizeof(REAL) * at->out_row);
        multiply(tape + at->a, at->in_row, 1, w + at->t, z, n->examples, at->in, at->out_row, 1);
        if (l + 1 < n->layers) through_activation(n, at + 1, z, z);
    }
}

/* Mean of (output - y)^2 over examples and outputs; `weight` times its gradient goes into the tape. */
static double loss(const plan *n, const REAL *y, REAL weight, REAL *tape) {
    const layer *end = n->at + n->layers;
    const int outputs = end->in, count = n->examples * outputs;
    double sum = 0;
    memset(tape + end->gz, 0, sizeof(REAL) * n->examples * end->in_row);
    for (int i = 0; i < count; i++) {
        const long at = (long)(i / outputs) * end->in_row + i % outputs;
        const REAL difference = tape[end->a + at] - y[i];
        tape[end->gz + at] = 2 * weight * difference / count;
        sum += (double)difference * difference;
    }
    return sum / count;
}

/* grad (+)= gz^T a for the weights of a layer, and the sum of gz for its bias unless `a` has the tangents. */
static void weight_gradient(const plan *n, const layer *at, const REAL *gz, const REAL *a, REAL *grad, int transposed,
                            int add) {
    const int E = n->examples;
    multiply(gz, 1, at->out_row, a, grad + at->w, at->out, E, at->in_row, add);
    if (transposed) multiply(a, 1, at->in_row, gz, grad + at->t, at->in, E, at->out_row, add);
    if (add) return;
    memset(grad + at->b, 0, sizeof(REAL) * at->out_row);
    for (int e = 0; e < E; e++)
        for (int o = 0; o < at->out_row; o++) grad[at->b + o] += gz[e * at->out_row + o];
}

/* From the tape of `forward` and `loss` -> grad; keeps every gz in the tape. */
static void backward(const plan *n, const REAL *w, REAL *tape, REAL *grad, int transposed) {
    for (int l = n->layers - 1; l >= 0; l--) {
        const layer *at = n->at + l;
        const REAL *gz = tape + at[1].gz;
        weight_gradient(n, at, gz, tape + at->a, grad, transposed, 0);
        if (l == 0) return;
        multiply(gz, at->out_row, 1, w + at->w, tape + at->gz, n->examples, at->out, at->in_row, 0);
        through_activation(n, at, tape + at->a, tape + at->gz);
    }
}

/* The Hessian times the direction u -> grad, from the tape of `backward`; the tangents go into tape_t. */
static void hessian_product(const plan *n, const REAL *w, const REAL *u, const REAL *tape, REAL *tape_t, REAL *grad,
                            int transposed) {
    const int E = n->examples;
    for (int l = 0; l < n->layers; l++) {
        const layer *at = n->at + l;
        REAL *z_t = tape_t + at[1].a;
        for (int e = 0; e < E; e++) memcpy(z_t + e * at->out_row, u + at->b, sizeof(REAL) * at->out_row);
        multiply(tape + at->a, at->in_row, 1, u + at->t, z_t, E, at->in, at->out_row, 1);
        if (l)
            multiply(tape_t + at->a, at->in_row, 1, w + at->t, z_t, E, at->in, at->out_row, 1);
        if (l + 1 < n->layers) through_activation(n, at + 1, tape + at[1].a, z_t);
    }
    const layer *end = n->at + n->layers;
    const int count = E * end->in;
    for (long i = 0; i < (long)E * end->in_row; i++) tape_t[end->gz + i] = 2 * tape_t[end->a + i] / count;
    for (int l = n->layers - 1; l >= 0; l--) {
        const layer *at = n->at + l;
        const REAL *gz = tape + at[1].gz, *gz_t = tape_t + at[1].gz;
        REAL *ga_t = tape_t + at->gz;
        weight_gradient(n, at, gz_t, tape + at->a, grad, transposed, 0);
        if (l == 0) return;
        weight_gradient(n, at, gz, tape_t + at->a, grad, transposed, 1);
        multiply(gz_t, at->out_row, 1, w + at->w, ga_t, E, at->out, at->in_row, 0);
        multiply(gz, at->out_row, 1, u + at->w, ga_t, E, at->out, at->in_row, 1);
        through_activation(n, at, tape + at->a, ga_t);
    }
}

/* Tensors W and b of every layer -> image. A tensor may be absent (0); if `row` is not negative, it has one number for
 * all weights in every row. */
static void load_image(const plan *n, const REAL *const *tensors, int row, REAL *image) {
    memset(image, 0, sizeof(REAL) * n->image);
    for (int l = 0; l < n->layers; l++) {
        const layer *at = n->at + l;
        const REAL *w = tensors[2 * l], *b = tensors[2 * l + 1];
        for (int o = 0; o < at->out; o++) {
            if (b) image[at->b + o] = b[row < 0 ? o : row];
            for (int i = 0; w && i < at->in; i++) {
                const REAL value = w[row < 0 ? o * at->in + i : row];
                image[at->w + o * at->in_row + i] = image[at->t + i * at->out_row + o] = value;
            }
        }
    }
}

static void store_image(const plan *n, const REAL *image, REAL *const *tensors) {
    for (int l = 0; l < n->layers; l++) {
        const layer *at = n->at + l;
        REAL *w = tensors[2 * l], *b = tensors[2 * l + 1];
        for (int o = 0; w && o < at->out; o++)
            memcpy(w + o * at->in, image + at->w + o * at->in_row, sizeof(REAL) * at->in);
        if (b) memcpy(b, image + at->b, sizeof(REAL) * at->out);
    }
}

typedef struct {
    plan support, query;
    long per_rates, per_thread; /* sizes: gradients of the rates of a task, and the memory of a thread */
} sizes;

static sizes sizes_of(const mlp *s, layer *support, layer *query) {
    sizes z = {plan_of(s, s->support, support), plan_of(s, s->query, query), 0, 0};
    z.per_rates = !s->learns_rates ? 0 : s->rate_per_weight ? z.support.natural : 2L * s->layers * s->rate_rows;
    z.per_thread = (2L * s->steps + 4) * z.support.image + (s->steps + 1L) * z.support.tape + z.query.tape;
    return z;
}

/* The number of REALs that mlp_meta_gradient needs as `memory`. */
long mlp_memory(const mlp *s) {
    layer support[s->layers + 1], query[s->layers + 1];
    const sizes z = sizes_of(s, support, query);
    return (1L + s->steps) * z.support.image + s->tasks * (z.support.natural + z.per_rates) + s->threads * z.per_thread;
}

static int rate_row(const mlp *s, int step) { return step < s->rate_rows ? step : s->rate_rows - 1; }

static double example_loss(const plan *n, const REAL *w, const REAL *x, const REAL *y, REAL weight, REAL *tape) {
    load_examples(n, x, tape);
    forward(n, w, tape);
    return loss(n, y, weight, tape);
}

/* -<p, g> for every tensor, or the same without the sum: the gradients of the inner rates */
static void rate_gradient(const sizes *z, const REAL *p, const REAL *g, int row, REAL *to) {
    const plan *n = &z->support;
    if (n->s->rate_per_weight) {
        INDEPENDENT for (long i = 0; i < n->natural; i++) to[i] -= p[i] * g[i];
        return;
    }
    for (int tensor = 0; tensor < 2 * n->layers; tensor++) {
        const layer *at = n->at + tensor / 2;
        const long first = tensor % 2 ? at->b : at->w, end = tensor % 2 ? at->b + at->out_row : at->b;
        double sum = 0;
#pragma omp simd reduction(+ : sum)
        for (long i = first; i < end; i++) sum += (double)p[i] * g[i];
        to[row * 2 * n->layers + tensor] -= (REAL)sum;
    }
}

/* One task: forward through the inner steps and back. p gets the natural part of p_0. */
static void task(const sizes *z, const REAL *slow, const REAL *rates, const REAL *const *sets, REAL *memory, REAL *p_0,
                 REAL *rate_grad, double *support_loss, double *query_losses) {
    const plan *n = &z->support;
    const mlp *s = n->s;
    const long size = n->image, moved = s->first_order ? n->natural : size;
    REAL *fast = memory, *g = fast + s->steps * size, *p = g + s->steps * size, *q = p + size, *u = q + size;
    REAL *h = u + size, *tapes = h + size, *tape_t = tapes + s->steps * n->tape, *query_tape = tape_t + n->tape;
    const REAL *w = slow;
    memset(rate_grad, 0, sizeof(REAL) * z->per_rates);
    if (s->weights[s->steps - 1] == 0) memset(p, 0, sizeof(REAL) * size);
    for (int k = 0;; k++, w = fast + (k - 1) * size) {
        if (s->measured[k] && !(k && s->weights[k - 1]))
            query_losses[k] = example_loss(&z->query, w, sets[2], sets[3], 0, query_tape);
        if (k == s->steps) break;
        REAL *tape = tapes + k * n->tape, *g_k = g + k * size, *next = fast + k * size;
        const REAL *rate = rates + k * size;
        support_loss[k] = example_loss(n, w, sets[0], sets[1], 1, tape);
        backward(n, w, tape, g_k, 1);
        INDEPENDENT for (long i = 0; i < size; i++) next[i] = w[i] - rate[i] * g_k[i];
    }
    for (int k = s->steps - 1; k >= 0; k--) {
        const REAL weight = (REAL)s->weights[k], *rate = rates + k * size, *g_k = g + k * size;
        if (weight) {
            w = fast + k * size;
            query_losses[k + 1] = example_loss(&z->query, w, sets[2], sets[3], weight, query_tape);
            const int last = k == s->steps - 1; /* p is still empty */
            backward(&z->query, w, query_tape, last ? p : q, !s->first_order);
            if (!last)
                INDEPENDENT for (long i = 0; i < moved; i++) p[i] += q[i];
        }
        if (s->learns_rates) rate_gradient(z, p, g_k, rate_row(s, k), rate_grad);
        if (s->first_order) continue;
        INDEPENDENT for (long i = 0; i < size; i++) u[i] = rate[i] * p[i];
        hessian_product(n, k ? fast + (k - 1) * size : slow, u, tapes + k * n->tape, tape_t, h, k > 0);
        REAL *to = k ? p : p_0;
        const long needed = k ? size : n->natural;
        INDEPENDENT for (long i = 0; i < needed; i++) to[i] = p[i] - h[i];
    }
    if (s->first_order) memcpy(p_0, p, sizeof(REAL) * n->natural);
}

/* Adds the rows of tasks to the first one, in order. */
static REAL *total(REAL *rows, long size, int tasks) {
    for (int t = 1; t < tasks; t++)
        INDEPENDENT for (long i = 0; i < size; i++) rows[i] += rows[t * size + i];
    return rows;
}

/* slow: tensors W and b of every layer, hidden layers first. rates: the same, absent for tensors that the inner loop
 * does not adapt; each has one number per row, or one per weight. sets: support x and y, query x and y, of all tasks.
 * Output: the gradients of slow, and of the learnt rates by row and tensor or per weight; means [2 steps + 2] over
 * tasks of the support losses before each step, then of the query losses after 0, 1, .. steps, of which those that are
 * not measured are 0, and the meta-loss. losses [tasks][2 steps + 1] and memory are for use by this function only. */
void mlp_meta_gradient(const mlp *s, const REAL *const *slow, const REAL *const *rates, const REAL *const *sets,
                       REAL *const *grads, REAL *const *rate_grads, double *means, double *losses, REAL *memory) {
    layer support[s->layers + 1], query[s->layers + 1];
    const sizes z = sizes_of(s, support, query);
    const plan *n = &z.support;
    const int I = s->steps, in = s->widths[0], out = s->widths[s->layers];
    REAL *slow_image = memory, *rate_images = slow_image + n->image, *p_0 = rate_images + I * n->image;
    REAL *rate_grad = p_0 + s->tasks * n->natural, *of_threads = rate_grad + s->tasks * z.per_rates;
    load_image(n, slow, -1, slow_image);
    for (int k = 0; k < I; k++)
        load_image(n, rates, s->rate_per_weight ? -1 : rate_row(s, k), rate_images + k * n->image);
#pragma omp parallel for num_threads(s->threads) schedule(static)
    for (int t = 0; t < s->tasks; t++) {
        const REAL *own[] = {sets[0] + (long)t * s->support * in, sets[1] + (long)t * s->support * out,
                             sets[2] + (long)t * s->query * in, sets[3] + (long)t * s->query * out};
        double *of_task = losses + t * (2L * I + 1);
        task(&z, slow_image, rate_images, own, of_threads + omp_get_thread_num() * z.per_thread, p_0 + t * n->natural,
             rate_grad + t * z.per_rates, of_task, of_task + I);
    }
    store_image(n, total(p_0, n->natural, s->tasks), grads);
    for (int i = 0; i < 2 * I + 1; i++) {
        double sum = 0;
        for (int t = 0; t < s->tasks; t++) sum += losses[t * (2L * I + 1) + i];
        means[i] = i < I || s->measured[i - I] ? sum / s->tasks : 0;
    }
    means[2 * I + 1] = 0;
    for (int k = 0; k < I; k++)
        if (s->weights[k]) means[2 * I + 1] += s->tasks * s->weights[k] * means[I + k + 1];
    if (!s->learns_rates) return;
    total(rate_grad, z.per_rates, s->tasks);
    if (s->rate_per_weight) {
        store_image(n, rate_grad, rate_grads);
        return;
    }
    for (int row = 0; row < s->rate_rows; row++)
        for (int tensor = 0; tensor < 2 * s->layers; tensor++)
            if (rate_grads[tensor]) rate_grads[tensor][row] = rate_grad[row * 2 * s->layers + tensor];
}

typedef struct {
    int tensors;
    double b1, b2, eps;
    const long *counts; /* of values per tensor */
    REAL *const *weights, *const *first, *const *second;
    float *const *steps; /* taken before, for each tensor */
} adam;

/* A step of Adam; grads are in the order of the other tensors. */
void adam_step(const adam *s, double lr, const REAL *const *grads) {
    for (int tensor = 0; tensor < s->tensors; tensor++) {
        REAL *w = s->weights[tensor], *m = s->first[tensor], *v = s->second[tensor];
        const REAL *g = grads[tensor];
        const double taken = *s->steps[tensor] += 1;
        const REAL rate = (REAL)(lr / (1 - pow(s->b1, taken))), correction = (REAL)sqrt(1 - pow(s->b2, taken));
        const REAL keep_m = (REAL)s->b1, keep_v = (REAL)s->b2, take_m = (REAL)(1 - s->b1), take_v = (REAL)(1 - s->b2);
        INDEPENDENT for (long i = 0; i < s->counts[tensor]; i++) {
            m[i] = keep_m * m[i] + take_m * g[i];
            v[i] = keep_v * v[i] + take_v * g[i] * g[i];
            const REAL root = sizeof(REAL) == 4 ? sqrtf(v[i]) : (REAL)sqrt(v[i]);
            w[i] -= rate * m[i] / (root / correction + (REAL)s->eps);
        }
    }
}

static int all_finite(const adam *s, const REAL *const *grads, const double *means, int count) {
    double sum = 0;
    for (int i = 0; i < count; i++) sum += means[i];
    for (int tensor = 0; tensor < s->tensors; tensor++)
#pragma omp simd reduction(+ : sum)
        for (long i = 0; i < s->counts[tensor]; i++) sum += grads[tensor][i];
    return isfinite(sum);
}

/* `count` meta-steps: mlp_meta_gradient for each [tasks] of the sets, then adam_step, with the rates lr [count].
 * Returns how many were done: a step with a loss or gradient that is not finite changes nothing and is the end.
 * `ordered` are the gradients in the order of Adam's tensors; means is [count][2 steps + 2]. */
int mlp_train(const mlp *s, const adam *optimizer, int count, const double *lr, const REAL *const *slow,
              const REAL *const *rates, const REAL *const *sets, REAL *const *grads, REAL *const *rate_grads,
              const REAL *const *ordered, double *means, double *losses, REAL *memory) {
    const long support = (long)s->tasks * s->support, query = (long)s->tasks * s->query;
    const int in = s->widths[0], out = s->widths[s->layers];
    const int width = 2 * s->steps + 2;
    for (long n = 0; n < count; n++, means += width) {
        const REAL *now[] = {sets[0] + n * support * in, sets[1] + n * support * out, sets[2] + n * query * in,
                             sets[3] + n * query * out};
        mlp_meta_gradient(s, slow, rates, now, grads, rate_grads, means, losses, memory);
        if (!all_finite(optimizer, ordered, means, width)) return (int)n;
        adam_step(optimizer, lr[n], ordered);
    }
    return count;
}
