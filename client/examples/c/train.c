/* Two workers with batches of 3 and 9 rows train one network through the C interface, and end where one worker with all
 * 12 rows does. README.md tells how to compile it without Bazel.
 *
 * The network: 4 inputs -> linear 3 -> batch norm -> ReLU -> linear 1, with the squared error summed over the rows. The
 * workers have in common the rounds of "bn" and the sum of their gradients; here they are threads of one process beside
 * an embedded master, and each might as well be a process of its own, anywhere.
 */

#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

#include "client/c/syncbn.h"

enum { kRows = 12, kInputs = 4, kHidden = 3, kSteps = 100 };
static const double kRate = 0.02;

static double inputs[kRows][kInputs];
static double targets[kRows];

/* Parameters, or their gradients: nothing but doubles, so that they also travel as one vector. */
typedef struct Parameters {
  double w[kHidden][kInputs];
  double gamma[kHidden];
  double beta[kHidden];
  double v[kHidden];
} Parameters;
enum { kParameters = sizeof(Parameters) / sizeof(double) };

/* Ends the program with what the library says, unless `code` is 0. */
static void Check(syncbn_code code, syncbn_error* error) {
  if (code == 0) return;
  fprintf(stderr, "train: code %d, reason %s, layer \"%s\": %s\n", (int)code, syncbn_error_reason(error),
          syncbn_error_layer(error), syncbn_error_message(error));
  syncbn_error_destroy(error);
  exit(1);
}

/* A worker's part of the batch, and what it ends with. */
typedef struct Part {
  const char* target;
  const char* group;
  uint32_t rank, world_size;
  int begin, end;
  Parameters parameters;
  double running_mean[kHidden], running_var[kHidden];
} Part;

static syncbn_tensor Matrix(double* data, int rows, int columns) {
  syncbn_tensor tensor = {0}; /* On the CPU, channels first. */
  tensor.data = data;
  tensor.batch = rows;
  tensor.channels = columns;
  tensor.spatial = 1;
  tensor.type = SYNCBN_FLOAT64;
  return tensor;
}

static syncbn_vector Vector(double* data) { return (syncbn_vector){data, SYNCBN_FLOAT64}; }

/* The gradient of the error summed over the rows of one worker, through one round forward and one backward. */
static Parameters Gradient(syncbn_worker* worker, Part* part) {
  const int rows = part->end - part->begin;
  Parameters* const p = &part->parameters;
  Parameters gradient = {0};
  syncbn_error* error = NULL;
  double x[kRows][kHidden], y[kRows][kHidden], dy[kRows][kHidden];

  for (int n = 0; n < rows; ++n) {
    for (int h = 0; h < kHidden; ++h) {
      x[n][h] = 0.0;
      for (int i = 0; i < kInputs; ++i) x[n][h] += p->w[h][i] * inputs[part->begin + n][i];
    }
  }

  /* start: the local moments, sent to the master. wait: the merged ones. finish: y, and the running statistics. */
  const syncbn_tensor x_tensor = Matrix(&x[0][0], rows, kHidden);
  syncbn_forward* forward = NULL;
  Check(syncbn_forward_start(worker, "bn", &x_tensor, NULL, &forward, &error), error);
  Check(syncbn_forward_wait(forward, -1, &error), error);
  syncbn_forward_outputs outputs = SYNCBN_FORWARD_OUTPUTS_INIT;
  outputs.weight = Vector(p->gamma);
  outputs.bias = Vector(p->beta);
  outputs.running_mean = Vector(part->running_mean);
  outputs.running_var = Vector(part->running_var);
  outputs.momentum = 0.1;
  outputs.relu = 1;
  outputs.y = Matrix(&y[0][0], rows, kHidden);
  Check(syncbn_forward_finish(forward, &x_tensor, &outputs, &error), error);

  for (int n = 0; n < rows; ++n) {
    double prediction = 0.0;
    for (int h = 0; h < kHidden; ++h) prediction += p->v[h] * y[n][h];
    const double slope = 2.0 * (prediction - targets[part->begin + n]);
    for (int h = 0; h < kHidden; ++h) {
      gradient.v[h] += slope * y[n][h];
      dy[n][h] = slope * p->v[h];
    }
  }

  /* dx takes dy's place. */
  syncbn_backward_inputs given = SYNCBN_BACKWARD_INPUTS_INIT;
  given.dy = Matrix(&dy[0][0], rows, kHidden);
  given.x = x;
  given.weight = outputs.weight;
  given.bias = outputs.bias;
  given.relu = 1;
  syncbn_backward* backward = NULL;
  Check(syncbn_backward_start(forward, &given, NULL, &backward, &error), error);
  Check(syncbn_backward_wait(backward, -1, &error), error);
  syncbn_backward_outputs wanted = SYNCBN_BACKWARD_OUTPUTS_INIT;
  wanted.dx = dy;
  wanted.d_weight = Vector(gradient.gamma);
  wanted.d_bias = Vector(gradient.beta);
  Check(syncbn_backward_finish(backward, &given, &wanted, &error), error);
  syncbn_backward_destroy(backward);
  syncbn_forward_destroy(forward);

  for (int n = 0; n < rows; ++n) {
    for (int h = 0; h < kHidden; ++h) {
      for (int i = 0; i < kInputs; ++i) gradient.w[h][i] += dy[n][h] * inputs[part->begin + n][i];
    }
  }
  return gradient;
}

/* A worker's life. */
static void* Train(void* argument) {
  Part* const part = argument;
  syncbn_error* error = NULL;
  syncbn_worker_options options = SYNCBN_WORKER_OPTIONS_INIT;
  options.target = part->target;
  options.group = part->group;
  options.rank = part->rank;
  options.world_size = part->world_size;
  syncbn_worker* worker = NULL;
  Check(syncbn_worker_join(&options, &worker, &error), error);

  syncbn_layer_options layer = SYNCBN_LAYER_OPTIONS_INIT;
  layer.name = "bn";
  layer.channels = kHidden;
  layer.eps = 1e-5;
  layer.has_momentum = 1;
  layer.momentum = 0.1;
  Check(syncbn_worker_declare_layer(worker, &layer, &error), error);

  for (int step = 0; step < kSteps; ++step) {
    const Parameters own = Gradient(worker, part);
    syncbn_round* round = NULL;
    Check(syncbn_round_start_sum(worker, "gradients", SYNCBN_NEXT_SEQUENCE, (const double*)&own, kParameters, &round,
                                 &error),
          error);
    Check(syncbn_round_wait(round, -1, &error), error);
    double* const parameters = (double*)&part->parameters;
    for (int i = 0; i < kParameters; ++i) parameters[i] -= kRate / kRows * syncbn_round_first(round)[i];
    syncbn_round_destroy(round);
  }
  Check(syncbn_worker_leave(worker, "finished", &error), error);
  syncbn_worker_destroy(worker);
  return NULL;
}

/* Uniform in -1 .. 1, the same everywhere. */
static double Random(void) {
  static uint64_t state = 42;
  state = state * 6364136223846793005u + 1442695040888963407u;
  return (double)(state >> 11) * 0x1p-52 - 1.0;
}

static double Error(const Part* part) {
  double sum = 0.0;
  for (int n = 0; n < kRows; ++n) {
    double prediction = 0.0;
    for (int h = 0; h < kHidden; ++h) {
      double x = 0.0;
      for (int i = 0; i < kInputs; ++i) x += part->parameters.w[h][i] * inputs[n][i];
      /* Evaluation, of a single row: the running statistics. syncbn_evaluate does it for tensors. */
      x = (x - part->running_mean[h]) / sqrt(part->running_var[h] + 1e-5);
      prediction += part->parameters.v[h] * fmax(0.0, x * part->parameters.gamma[h] + part->parameters.beta[h]);
    }
    sum += (prediction - targets[n]) * (prediction - targets[n]);
  }
  return sum / kRows;
}

int main(void) {
  for (int n = 0; n < kRows; ++n) {
    for (int i = 0; i < kInputs; ++i) inputs[n][i] = Random();
    targets[n] = inputs[n][0] * inputs[n][1] + 0.5 * inputs[n][2];
  }
  Part start = {0};
  for (int h = 0; h < kHidden; ++h) {
    for (int i = 0; i < kInputs; ++i) start.parameters.w[h][i] = Random();
    start.parameters.gamma[h] = start.running_var[h] = 1.0;
    start.parameters.v[h] = Random();
  }

  syncbn_error* error = NULL;
  syncbn_master* master = NULL;
  Check(syncbn_master_start(NULL, &master, &error), error);
  start.target = syncbn_master_target(master);

  Part parts[3] = {start, start, start};
  const int begins[4] = {0, 3, kRows, 0};
  pthread_t threads[3];
  for (int i = 0; i < 3; ++i) {
    Part* const part = &parts[i];
    const int alone = i == 2; /* The reference: a group of one worker, with all rows. */
    part->group = alone ? "alone" : "two";
    part->rank = alone ? 0 : (uint32_t)i;
    part->world_size = alone ? 1 : 2;
    part->begin = alone ? 0 : begins[i];
    part->end = alone ? kRows : begins[i + 1];
    if (pthread_create(&threads[i], NULL, Train, part) != 0) return 1;
  }
  for (int i = 0; i < 3; ++i) pthread_join(threads[i], NULL);
  syncbn_master_destroy(master);

  double difference = 0.0;
  for (int i = 0; i < 2; ++i) {
    for (int k = 0; k < kParameters; ++k) {
      difference = fmax(difference, fabs(((double*)&parts[i].parameters)[k] - ((double*)&parts[2].parameters)[k]));
    }
    for (int h = 0; h < kHidden; ++h) {
      difference = fmax(difference, fabs(parts[i].running_mean[h] - parts[2].running_mean[h]));
      difference = fmax(difference, fabs(parts[i].running_var[h] - parts[2].running_var[h]));
    }
  }
  printf("%d steps: the error went from %.3f to %.3f; two workers end %.1e from one\n", kSteps, Error(&start),
         Error(&parts[0]), difference);
  return difference < 1e-12 ? 0 : 1;
}
