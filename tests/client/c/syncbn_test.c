/* The C interface from C, through the shared library: a master, workers on threads, rounds, passes, errors. */

#include "client/c/syncbn.h"

#include <math.h>
#include <pthread.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/client/c/check.h"

static const char* g_target;

static syncbn_worker* Join(const char* group, uint32_t rank, uint32_t world_size, int64_t round_timeout_ns) {
  syncbn_worker_options options = SYNCBN_WORKER_OPTIONS_INIT;
  options.target = g_target;
  options.group = group;
  options.rank = rank;
  options.world_size = world_size;
  options.round_timeout_ns = round_timeout_ns;
  syncbn_worker* worker = NULL;
  CHECK_OK(syncbn_worker_join(&options, &worker, &error));
  return worker;
}

static void Declare(syncbn_worker* worker, const char* name, uint32_t channels) {
  syncbn_layer_options layer = SYNCBN_LAYER_OPTIONS_INIT;
  layer.name = name;
  layer.channels = channels;
  layer.eps = 1e-5;
  CHECK_OK(syncbn_worker_declare_layer(worker, &layer, &error));
}

/* ---- Three workers with 3, 0 and 1 rows of two channels normalize over the four rows together. ------------------- */

static const double kX[4][2] = {{1, 10}, {2, 30}, {3, -20}, {6, 40}};
static const double kDy[4][2] = {{0.5, -1}, {1.5, 2}, {-1, 0.25}, {2, 1}};
static const int kBegin[4] = {0, 3, 3, 4};

struct Rows {
  uint32_t rank;
  double y[4][2];
  double dx[4][2];
  double running_mean[2];
  double running_var[2];
  double d_weight[2];
  double d_bias[2];
};

static void* NormalizeRows(void* argument) {
  struct Rows* const rows = argument;
  const int begin = kBegin[rows->rank];
  syncbn_worker* const worker = Join("rows", rows->rank, 3, 0);
  Declare(worker, "bn", 2);
  CHECK_OK(syncbn_worker_wait_for_members(worker, -1, &error));
  CHECK(syncbn_worker_rank(worker) == rows->rank && syncbn_worker_world_size(worker) == 3);
  CHECK(syncbn_worker_incarnation(worker) == 1 && syncbn_worker_run_id(worker) != 0);

  syncbn_tensor x = {0};
  x.data = (void*)kX[begin];
  x.batch = kBegin[rows->rank + 1] - begin;
  x.channels = 2;
  x.spatial = 1;
  x.type = SYNCBN_FLOAT64;
  syncbn_forward* forward = NULL;
  CHECK_OK(syncbn_forward_start(worker, "bn", &x, NULL, &forward, &error));
  CHECK_OK(syncbn_forward_wait(forward, -1, &error));
  CHECK(syncbn_forward_count(forward) == 4 && syncbn_forward_sequence(forward) == 0);
  CHECK(syncbn_forward_backward_required(forward) == 1);
  CHECK(fabs(syncbn_forward_mean(forward)[1] - 15.0) < 1e-12);

  double weight[2] = {2.0, 0.5};
  double bias[2] = {0.25, -1.0};
  syncbn_forward_outputs outputs = SYNCBN_FORWARD_OUTPUTS_INIT;
  outputs.weight = (syncbn_vector){weight, SYNCBN_FLOAT64};
  outputs.bias = (syncbn_vector){bias, SYNCBN_FLOAT64};
  outputs.running_mean = (syncbn_vector){rows->running_mean, SYNCBN_FLOAT64};
  outputs.running_var = (syncbn_vector){rows->running_var, SYNCBN_FLOAT64};
  outputs.momentum = 0.1;
  outputs.y = x;
  outputs.y.data = rows->y[begin];
  int64_t batches = 10;
  if (rows->rank == 1) { /* The tenth batch of a cumulative average has the same weight. */
    outputs.momentum = NAN;
    outputs.cumulative = 1;
    CHECK(syncbn_forward_finish(forward, &x, &outputs, NULL) == 3 /* INVALID_ARGUMENT */);
    outputs.batches = &batches;
  }
  CHECK_OK(syncbn_forward_finish(forward, &x, &outputs, &error));
  CHECK(batches == 10);

  syncbn_backward_inputs inputs = SYNCBN_BACKWARD_INPUTS_INIT;
  inputs.dy = x;
  inputs.dy.data = (void*)kDy[begin];
  inputs.x = x.data;
  inputs.weight = outputs.weight;
  syncbn_backward* backward = NULL;
  CHECK_OK(syncbn_backward_start(forward, &inputs, NULL, &backward, &error));
  syncbn_forward_destroy(forward);
  CHECK_OK(syncbn_backward_wait(backward, -1, &error));
  syncbn_backward_outputs gradients = SYNCBN_BACKWARD_OUTPUTS_INIT;
  gradients.dx = rows->dx[begin];
  gradients.d_weight = (syncbn_vector){rows->d_weight, SYNCBN_FLOAT64};
  gradients.d_bias = (syncbn_vector){rows->d_bias, SYNCBN_FLOAT64};
  CHECK_OK(syncbn_backward_finish(backward, &inputs, &gradients, &error));
  syncbn_backward_destroy(backward);
  CHECK_OK(syncbn_worker_leave(worker, "finished", &error));
  syncbn_worker_destroy(worker);
  return NULL;
}

static void TestPasses(void) {
  struct Rows rows[3];
  pthread_t threads[3];
  memset(rows, 0, sizeof(rows));
  for (uint32_t rank = 0; rank < 3; ++rank) {
    rows[rank].rank = rank;
    rows[rank].running_var[0] = rows[rank].running_var[1] = 1.0;
    CHECK(pthread_create(&threads[rank], NULL, NormalizeRows, &rows[rank]) == 0);
  }
  for (int i = 0; i < 3; ++i) pthread_join(threads[i], NULL);
  const double weight[2] = {2.0, 0.5};
  const double bias[2] = {0.25, -1.0};
  for (int c = 0; c < 2; ++c) {
    double mean = 0, var = 0, sum_dy = 0, sum_dy_xmu = 0;
    for (int n = 0; n < 4; ++n) mean += kX[n][c] / 4;
    for (int n = 0; n < 4; ++n) var += (kX[n][c] - mean) * (kX[n][c] - mean) / 4;
    for (int n = 0; n < 4; ++n) sum_dy += kDy[n][c];
    for (int n = 0; n < 4; ++n) sum_dy_xmu += kDy[n][c] * (kX[n][c] - mean);
    const double invstd = 1 / sqrt(var + 1e-5);
    double d_bias = 0, d_weight = 0;
    for (int rank = 0; rank < 3; ++rank) {
      CHECK(fabs(rows[rank].running_mean[c] - 0.1 * mean) < 1e-12);
      CHECK(fabs(rows[rank].running_var[c] - (0.9 + 0.1 * var * 4 / 3)) < 1e-10);
      d_bias += rows[rank].d_bias[c];
      d_weight += rows[rank].d_weight[c];
      for (int n = kBegin[rank]; n < kBegin[rank + 1]; ++n) {
        const double xmu = kX[n][c] - mean;
        CHECK(fabs(rows[rank].y[n][c] - (xmu * invstd * weight[c] + bias[c])) < 1e-12);
        const double dx = weight[c] * invstd * (kDy[n][c] - sum_dy / 4 - xmu * invstd * invstd * sum_dy_xmu / 4);
        CHECK(fabs(rows[rank].dx[n][c] - dx) < 1e-12);
      }
    }
    CHECK(fabs(d_bias - sum_dy) < 1e-12 && fabs(d_weight - sum_dy_xmu * invstd) < 1e-12);
  }
}

/* ---- Rounds over plain vectors ----------------------------------------------------------------------------------- */

static void TestRounds(void) {
  syncbn_worker* const worker = Join("rounds", 0, 1, 0);
  const double value[3] = {1, 2, 3};
  syncbn_round* first = NULL;
  syncbn_round* second = NULL;
  CHECK_OK(syncbn_round_start_sum(worker, "a", SYNCBN_NEXT_SEQUENCE, value, 3, &first, &error));
  CHECK_OK(syncbn_round_start_sum(worker, "b", 7, value, 2, &second, &error));
  CHECK_OK(syncbn_worker_flush(worker, &error));
  CHECK_OK(syncbn_round_wait(second, -1, &error));
  CHECK_OK(syncbn_round_wait(first, -1, &error));
  CHECK(syncbn_round_sequence(first) == 0 && syncbn_round_sequence(second) == 7);
  CHECK(syncbn_round_length(first) == 3 && syncbn_round_first(first)[2] == 3 && syncbn_round_second(first) == NULL);
  CHECK(syncbn_round_length(second) == 2 && syncbn_round_missing_ranks(second, NULL) == 0);
  syncbn_round_destroy(first);
  syncbn_round_destroy(second);

  Declare(worker, "bn", 2);
  const double mean[2] = {1, 2};
  const double m2[2] = {8, 2};
  syncbn_round* round = NULL;
  CHECK_OK(syncbn_round_start_forward(worker, "bn", SYNCBN_NEXT_SEQUENCE, 4, mean, m2, 2, 0, &round, &error));
  CHECK_OK(syncbn_round_wait(round, -1, &error));
  CHECK(syncbn_round_count(round) == 4 && syncbn_round_second(round)[0] == 2);
  CHECK(syncbn_round_backward_required(round) == 1);
  syncbn_round* backward = NULL;
  CHECK_OK(syncbn_round_start_backward(worker, "bn", 0, mean, m2, 2, &backward, &error));
  CHECK_OK(syncbn_round_wait(backward, -1, &error));
  CHECK(syncbn_round_first(backward)[1] == 2 && syncbn_round_second(backward)[0] == 8);
  syncbn_round_destroy(round);
  syncbn_round_destroy(backward);
  CHECK_OK(syncbn_worker_resume_at(worker, 100, &error));
  CHECK_OK(syncbn_round_start_sum(worker, "a", SYNCBN_NEXT_SEQUENCE, value, 3, &first, &error));
  CHECK(syncbn_round_sequence(first) == 100);
  syncbn_round_destroy(first); /* Pending still. */
  syncbn_worker_destroy(worker);
}

/* ---- Errors ------------------------------------------------------------------------------------------------------ */

static void TestRoundError(void) {
  syncbn_worker* const worker = Join("alone", 1, 2, 50 * 1000 * 1000);
  const double value[1] = {1};
  syncbn_round* round = NULL;
  CHECK_OK(syncbn_round_start_sum(worker, "loss", SYNCBN_NEXT_SEQUENCE, value, 1, &round, &error));
  CHECK(syncbn_round_wait(round, 0, NULL) == SYNCBN_PENDING);
  syncbn_error* error = NULL;
  CHECK(syncbn_round_wait(round, -1, &error) == kDeadlineExceeded);
  CHECK(syncbn_error_code(error) == kDeadlineExceeded);
  CHECK(strcmp(syncbn_error_reason(error), "ROUND_TIMEOUT") == 0);
  CHECK(strcmp(syncbn_error_layer(error), "loss") == 0);
  CHECK(strstr(syncbn_error_message(error), "rank 0 did not contribute") != NULL);
  const uint32_t* ranks = NULL;
  CHECK(syncbn_error_ranks(error, &ranks) == 1 && ranks[0] == 0);
  syncbn_error_destroy(error);
  CHECK(syncbn_round_wait(round, -1, NULL) == kDeadlineExceeded); /* The outcome stays. */
  syncbn_round_destroy(round);
  syncbn_worker_destroy(worker);
}

static syncbn_code StartForward(syncbn_worker* worker, const char* layer, syncbn_tensor* x, syncbn_error** error) {
  syncbn_forward* forward = NULL;
  return syncbn_forward_start(worker, layer, x, NULL, &forward, error);
}

static void ExpectError(syncbn_code code, syncbn_code expected, syncbn_error** out, const char* text) {
  syncbn_error* const error = *out;
  if (code != expected || error == NULL || strstr(syncbn_error_message(error), text) == NULL) {
    fprintf(stderr, "code %d instead of %d, \"%s\" instead of \"%s\"\n", (int)code, (int)expected,
            error == NULL ? "" : syncbn_error_message(error), text);
    exit(1);
  }
  syncbn_error_destroy(error);
  *out = NULL;
}

static void TestBadInput(void) {
  syncbn_error* error = NULL;
  syncbn_worker* none = NULL;
  syncbn_worker_options options = SYNCBN_WORKER_OPTIONS_INIT;
  ExpectError(syncbn_worker_join(&options, &none, &error), kInvalidArgument, &error, "target");
  options.target = g_target;
  options.rank = 3;
  options.world_size = 2;
  ExpectError(syncbn_worker_join(&options, &none, &error), kInvalidArgument, &error, "rank 3");
  options.struct_size = 2;
  ExpectError(syncbn_worker_join(&options, &none, &error), kInvalidArgument, &error, "struct_size is 2");

  options.struct_size = (size_t)1 << 60; /* Never set. */
  ExpectError(syncbn_worker_join(&options, &none, &error), kInvalidArgument, &error,
              "struct_size is 1152921504606846976");

  /* A size that ends within a field, whose other bytes would be taken for zeros. */
  options.struct_size = offsetof(syncbn_worker_options, world_size) + 1;
  ExpectError(syncbn_worker_join(&options, &none, &error), kInvalidArgument, &error, "struct_size is 37");

  syncbn_worker* const worker = Join("bad", 0, 1, 0);
  syncbn_layer_options layer = SYNCBN_LAYER_OPTIONS_INIT;
  layer.name = "odd";
  layer.channels = 1;
  layer.eps_mode = 7;
  ExpectError(syncbn_worker_declare_layer(worker, &layer, &error), kInvalidArgument, &error, "eps_mode is 7");
  layer.eps_mode = SYNCBN_EPS_CLAMP;
  layer.numeric_policy = -1;
  ExpectError(syncbn_worker_declare_layer(worker, &layer, &error), kInvalidArgument, &error, "numeric_policy is -1");
  double data[4] = {0};
  syncbn_tensor x = {data, 2, 2, 1, SYNCBN_FLOAT64, SYNCBN_CHANNELS_FIRST, SYNCBN_DEVICE_CPU, 0};
  ExpectError(StartForward(worker, "bn", &x, &error), kFailedPrecondition, &error, "\"bn\" has not been declared");
  Declare(worker, "bn", 3);
  ExpectError(StartForward(worker, "bn", &x, &error), kInvalidArgument, &error, "has 3 channels, and the tensor has 2");
  x.type = 9;
  ExpectError(StartForward(worker, "bn", &x, &error), kInvalidArgument, &error, "type is 9");
  x.type = SYNCBN_FLOAT64;
  x.data = NULL;
  ExpectError(StartForward(worker, "bn", &x, &error), kInvalidArgument, &error, "x has 4 elements and no data");
  Declare(worker, "bn", 2);
  x.data = data;
  x.batch = (int64_t)1 << 61; /* 2^62 elements of 8 bytes: 0 bytes, modulo 2^64. */
  ExpectError(StartForward(worker, "bn", &x, &error), kInvalidArgument, &error, "more than 2^56 bytes");
  x.batch = 2;
  syncbn_round* sum = NULL;
  CHECK_OK(syncbn_round_start_sum(worker, "bn", 0, data, 1, &sum, &error));
  syncbn_round_destroy(sum);
  ExpectError(StartForward(worker, "bn", &x, &error), kFailedPrecondition, &error, "was used for a sum");
  Declare(worker, "bn", 2);
  x.device = SYNCBN_DEVICE_CUDA;
  CHECK(StartForward(worker, "bn", &x, NULL) != 0);
  CHECK_OK(syncbn_worker_leave(worker, "done", &error));
  syncbn_round* round = NULL;
  ExpectError(syncbn_round_start_sum(worker, "a", 0, data, 1, &round, &error), kFailedPrecondition, &error, "left");
  syncbn_worker_destroy(worker);
  syncbn_worker_destroy(NULL);
}

static void TestNoSequenceComesAfterTheGreatest(void) {
  syncbn_worker* const worker = Join("sequences", 0, 1, 0);
  const double value[1] = {1};
  syncbn_round* round = NULL;
  syncbn_error* error = NULL;
  ExpectError(syncbn_worker_resume_at(worker, SYNCBN_NEXT_SEQUENCE, &error), kInvalidArgument, &error,
              "the greatest is 18446744073709551614");
  CHECK_OK(syncbn_worker_resume_at(worker, SYNCBN_NEXT_SEQUENCE - 1, &error));
  CHECK_OK(syncbn_round_start_sum(worker, "v", SYNCBN_NEXT_SEQUENCE, value, 1, &round, &error));
  CHECK_OK(syncbn_round_wait(round, -1, &error));
  CHECK(syncbn_round_sequence(round) == SYNCBN_NEXT_SEQUENCE - 1);
  syncbn_round_destroy(round);
  ExpectError(syncbn_round_start_sum(worker, "v", SYNCBN_NEXT_SEQUENCE, value, 1, &round, &error), kOutOfRange, &error,
              "there is none after it");
  syncbn_worker_destroy(worker);
}

static void TestNullHandles(void) {
  syncbn_error* error = NULL;
  const double value = 1.0;
  syncbn_round* round = NULL;
  ExpectError(syncbn_worker_leave(NULL, "", &error), kInvalidArgument, &error, "worker is NULL");
  ExpectError(syncbn_worker_flush(NULL, &error), kInvalidArgument, &error, "worker is NULL");
  ExpectError(syncbn_worker_resume_at(NULL, 0, &error), kInvalidArgument, &error, "worker is NULL");
  ExpectError(syncbn_worker_wait_for_members(NULL, 0, &error), kInvalidArgument, &error, "worker is NULL");
  ExpectError(syncbn_worker_declare_layer(NULL, NULL, &error), kInvalidArgument, &error, "worker is NULL");
  ExpectError(syncbn_round_start_sum(NULL, "a", 0, &value, 1, &round, &error), kInvalidArgument, &error, "worker");
  ExpectError(syncbn_round_wait(NULL, 0, &error), kInvalidArgument, &error, "round is NULL");
  ExpectError(syncbn_forward_wait(NULL, 0, &error), kInvalidArgument, &error, "forward is NULL");
  ExpectError(syncbn_worker_settle(NULL, 0, &error), kInvalidArgument, &error, "worker is NULL");
  ExpectError(syncbn_forward_finish(NULL, NULL, NULL, &error), kInvalidArgument, &error, "forward is NULL");
  ExpectError(syncbn_backward_start(NULL, NULL, NULL, NULL, &error), kInvalidArgument, &error, "forward is NULL");
  ExpectError(syncbn_backward_wait(NULL, 0, &error), kInvalidArgument, &error, "backward is NULL");
  ExpectError(syncbn_backward_finish(NULL, NULL, NULL, &error), kInvalidArgument, &error, "backward is NULL");
}

static void TestPassThatOutlivesItsWorker(void) {
  syncbn_worker* const worker = Join("outlives", 0, 1, 0);
  Declare(worker, "bn", 2);
  double data[4] = {1, 2, 3, 4};
  syncbn_tensor x = {data, 2, 2, 1, SYNCBN_FLOAT64, SYNCBN_CHANNELS_FIRST, SYNCBN_DEVICE_CPU, 0};
  syncbn_forward* forward = NULL;
  CHECK_OK(syncbn_forward_start(worker, "bn", &x, NULL, &forward, &error));
  CHECK(syncbn_forward_count(forward) == 0 && syncbn_forward_mean(forward) == NULL);
  CHECK_OK(syncbn_forward_wait(forward, -1, &error));
  syncbn_worker_destroy(worker);
  syncbn_backward_inputs inputs = SYNCBN_BACKWARD_INPUTS_INIT;
  inputs.dy = x;
  inputs.x = data;
  syncbn_backward* backward = NULL;
  CHECK(syncbn_backward_start(forward, &inputs, NULL, &backward, NULL) == kCancelled);
  syncbn_forward_destroy(forward);
}

static void TestEvaluation(void) {
  float data[3] = {1, 2, 4};
  float y[3];
  float dx[3];
  float mean[1] = {2};
  float var[1] = {4};
  double d_weight[1];
  syncbn_tensor x = {data, 3, 1, 1, SYNCBN_FLOAT32, SYNCBN_CHANNELS_LAST, SYNCBN_DEVICE_CPU, 0};
  syncbn_evaluate_options options = SYNCBN_EVALUATE_OPTIONS_INIT;
  options.mean = (syncbn_vector){mean, SYNCBN_FLOAT32};
  options.var = (syncbn_vector){var, SYNCBN_FLOAT32};
  options.relu = 1;
  CHECK_OK(syncbn_evaluate(&x, &options, y, &error));
  CHECK(y[0] == 0 && y[1] == 0 && y[2] == 1);
  syncbn_backward_inputs inputs = SYNCBN_BACKWARD_INPUTS_INIT;
  inputs.dy = x;
  inputs.x = data;
  inputs.relu = 1;
  syncbn_backward_outputs outputs = SYNCBN_BACKWARD_OUTPUTS_INIT;
  outputs.dx = dx;
  outputs.d_weight = (syncbn_vector){d_weight, SYNCBN_FLOAT64};
  CHECK_OK(syncbn_evaluate_backward(&inputs, &options, &outputs, &error));
  CHECK(dx[0] == 0 && dx[1] == 0 && dx[2] == 2 && d_weight[0] == 4);
}

/* Numbers that would make every output NaN, or every running statistic. */
static void TestNumbersThatAreNotFinite(void) {
  double data[2] = {1, 3}, y[2] = {0}, mean[1] = {0}, var[1] = {1};
  const syncbn_tensor x = {data, 2, 1, 1, SYNCBN_FLOAT64, SYNCBN_CHANNELS_FIRST, SYNCBN_DEVICE_CPU, 0};
  syncbn_evaluate_options evaluation = SYNCBN_EVALUATE_OPTIONS_INIT;
  evaluation.mean = (syncbn_vector){mean, SYNCBN_FLOAT64};
  evaluation.var = (syncbn_vector){var, SYNCBN_FLOAT64};
  syncbn_backward_inputs inputs = SYNCBN_BACKWARD_INPUTS_INIT;
  inputs.dy = x;
  inputs.x = data;
  syncbn_backward_outputs gradients = SYNCBN_BACKWARD_OUTPUTS_INIT;
  gradients.dx = y;
  syncbn_error* error = NULL;
  const double bad_eps[] = {NAN, INFINITY, -1.0};
  for (int i = 0; i < 3; ++i) {
    evaluation.eps = bad_eps[i];
    ExpectError(syncbn_evaluate(&x, &evaluation, y, &error), kInvalidArgument, &error, "eps is ");
    ExpectError(syncbn_evaluate_backward(&inputs, &evaluation, &gradients, &error), kInvalidArgument, &error,
                "eps is ");
  }

  syncbn_worker* const worker = Join("not_finite", 0, 1, 0);
  Declare(worker, "bn", 1);
  syncbn_forward* forward = NULL;
  CHECK_OK(syncbn_forward_start(worker, "bn", &x, NULL, &forward, &error));
  CHECK_OK(syncbn_forward_wait(forward, -1, &error));
  syncbn_forward_outputs outputs = SYNCBN_FORWARD_OUTPUTS_INIT;
  outputs.y = x;
  outputs.y.data = y;
  outputs.momentum = NAN;
  CHECK_OK(syncbn_forward_finish(forward, &x, &outputs, &error)); /* Not read without running statistics. */
  outputs.running_mean = (syncbn_vector){mean, SYNCBN_FLOAT64};
  ExpectError(syncbn_forward_finish(forward, &x, &outputs, &error), kInvalidArgument, &error, "momentum is nan");
  CHECK(mean[0] == 0);
  outputs.momentum = 0.5;
  CHECK_OK(syncbn_forward_finish(forward, &x, &outputs, &error));
  CHECK(mean[0] == 1);
  syncbn_forward_destroy(forward);
  syncbn_worker_destroy(worker);
}

/* A forward pass has the sequence that its options give, if they give one. */
static void TestSequencesOfPasses(void) {
  syncbn_worker* const worker = Join("pass_sequences", 0, 1, 0);
  Declare(worker, "given", 1);
  Declare(worker, "counted", 1);
  float data[2] = {1, 2};
  const syncbn_tensor x = {data, 2, 1, 1, SYNCBN_FLOAT32, SYNCBN_CHANNELS_LAST, SYNCBN_DEVICE_CPU, 0};
  syncbn_pass_options options = SYNCBN_PASS_OPTIONS_INIT;
  for (int given = 1; given >= 0; --given) {
    options.has_sequence = given;
    options.sequence = 7;
    syncbn_forward* forward = NULL;
    CHECK_OK(syncbn_forward_start(worker, given ? "given" : "counted", &x, &options, &forward, &error));
    CHECK_OK(syncbn_forward_wait(forward, -1, &error));
    CHECK(syncbn_forward_sequence(forward) == (given ? 7 : 0));
    syncbn_forward_destroy(forward);
  }
  CHECK_OK(syncbn_worker_leave(worker, "done", &error));
  syncbn_worker_destroy(worker);
}

/* Without a GPU there is no stream-ordered pass; calls that ask for one, or wait for one, work nevertheless. */
static void TestStreamOrder(void) {
  syncbn_worker* worker = Join("stream_order", 0, 1, 0);
  Declare(worker, "bn", 1);
  float data[3] = {1, 2, 6};
  syncbn_tensor x = {data, 3, 1, 1, SYNCBN_FLOAT32, SYNCBN_CHANNELS_LAST, SYNCBN_DEVICE_CPU, 0};
  syncbn_pass_options options = SYNCBN_PASS_OPTIONS_INIT;
  options.stream_ordered = 1;
  syncbn_forward* forward = NULL;
  CHECK_OK(syncbn_forward_start(worker, "bn", &x, &options, &forward, &error));
  CHECK(!syncbn_forward_stream_ordered(forward));
  CHECK_OK(syncbn_forward_wait(forward, -1, &error));
  CHECK(syncbn_forward_count(forward) == 3);
  syncbn_forward_destroy(forward);
  CHECK_OK(syncbn_worker_settle(worker, -1, &error));
  CHECK_OK(syncbn_worker_settle(worker, 0, &error));
  syncbn_error* error = NULL;
  const syncbn_code code = syncbn_stream_order_check(1000, &error); /* No machine has that many. */
  CHECK(code == kFailedPrecondition || code == kUnimplemented);
  CHECK(syncbn_error_message(error)[0] != 0);
  syncbn_error_destroy(error);
  CHECK_OK(syncbn_worker_leave(worker, "done", &error));
  syncbn_worker_destroy(worker);
}

/* ---- The log, targets, and callers that are older than the library ----------------------------------------------- */

static void CountLine(int32_t level, const char* message, void* user) {
  CHECK(level >= SYNCBN_LOG_DEBUG && level <= SYNCBN_LOG_ERROR && message != NULL);
  ++*(int*)user;
}

static void TestLog(void) {
  int lines = 0;
  char text[8];
  syncbn_set_log(syncbn_log_keep, NULL);
  while (syncbn_log_take(text, sizeof(text)) != 0) {
  }
  CHECK(syncbn_log_take(NULL, 0) == 0);
  syncbn_log_keep(SYNCBN_LOG_WARNING, "a line that is long", NULL);
  syncbn_log_keep(SYNCBN_LOG_ERROR, "b", NULL);
  CHECK(syncbn_log_take(NULL, 0) == 1);
  CHECK(syncbn_log_take(text, sizeof(text)) == SYNCBN_LOG_WARNING && strcmp(text, "a line ") == 0);
  CHECK(syncbn_log_take(text, sizeof(text)) == SYNCBN_LOG_ERROR && strcmp(text, "b") == 0);
  CHECK(syncbn_log_take(text, sizeof(text)) == 0 && syncbn_log_take(NULL, 0) == 0);
  for (int i = 0; i < 1000; ++i) syncbn_log_keep(SYNCBN_LOG_INFO, "c", NULL);
  int kept = 0;
  CHECK(syncbn_log_take(text, sizeof(text)) == SYNCBN_LOG_WARNING && strncmp(text, "744 lin", 7) == 0);
  while (syncbn_log_take(text, sizeof(text)) != 0) ++kept;
  CHECK(kept == 256);
  syncbn_set_log(CountLine, &lines);
  syncbn_set_log(NULL, NULL);
  CHECK(lines >= 0);
}

static syncbn_code FindMaster(char* buffer, size_t size, void* user) {
  int* const asked = (int*)user;
  if (++*asked == 1) return 14; /* The attempt fails, and another follows. */
  snprintf(buffer, size, "%s", g_target);
  return 0;
}

static void TestTargets(void) {
  int asked = 0;
  syncbn_worker_options options = SYNCBN_WORKER_OPTIONS_INIT;
  options.group = "targets";
  options.world_size = 1;
  options.find_target = FindMaster;
  options.find_target_user = &asked;
  syncbn_worker* worker = NULL;
  CHECK_OK(syncbn_worker_join(&options, &worker, &error));
  CHECK(asked == 2);
  syncbn_worker_destroy(worker);
}

/* A caller that was compiled before the struct grew: what lies behind its end is not read. */
static void TestOlderCaller(void) {
  syncbn_worker_options options = SYNCBN_WORKER_OPTIONS_INIT;
  options.struct_size = offsetof(syncbn_worker_options, find_target);
  options.target = g_target;
  options.group = "older";
  options.world_size = 1;
  options.find_target = (syncbn_target_function)(uintptr_t)1;
  syncbn_worker* worker = NULL;
  CHECK_OK(syncbn_worker_join(&options, &worker, &error));
  syncbn_worker_destroy(worker);
}

static void* WaitUntilClosed(void* argument) {
  syncbn_error* error = NULL;
  CHECK(syncbn_round_wait((syncbn_round*)argument, -1, &error) == kCancelled);
  CHECK(strcmp(syncbn_error_reason(error), "CLOSED") == 0);
  syncbn_error_destroy(error);
  return NULL;
}

/* The other thread may wait already, or be about to. */
static void TestCloseDuringAWait(void) {
  for (int i = 0; i < 20; ++i) {
    syncbn_worker* worker = Join("closing", 0, 2, 0);
    syncbn_round* round = NULL;
    const double value = 1;
    CHECK_OK(syncbn_round_start_sum(worker, "v", 0, &value, 1, &round, &error));
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, WaitUntilClosed, round) == 0);
    CHECK_OK(syncbn_worker_flush(worker, &error));
    syncbn_worker_close(worker);
    syncbn_worker_close(worker);
    CHECK(pthread_join(thread, NULL) == 0);
    syncbn_round_destroy(round);
    syncbn_worker_destroy(worker);
  }
}

/* ---- One of the threads that ask for a master's page at once serves it. ------------------------------------------ */

static void* ServePage(void* master) {
  syncbn_error* error = NULL;
  const syncbn_code code = syncbn_master_serve_http(master, "127.0.0.1:0", NULL, &error);
  if (code != 0) {
    CHECK(code == kFailedPrecondition && strstr(syncbn_error_message(error), "serves HTTP on \"127.0.0.1:") != NULL);
    syncbn_error_destroy(error);
  }
  CHECK(strlen(syncbn_master_http_address(master)) > strlen("127.0.0.1:"));
  return code == 0 ? master : NULL;
}

static void TestPageForSeveralThreads(syncbn_master* master) {
  CHECK(strcmp(syncbn_master_http_address(master), "") == 0);
  pthread_t threads[8];
  for (int i = 0; i < 8; ++i) CHECK(pthread_create(&threads[i], NULL, ServePage, master) == 0);
  int served = 0;
  for (int i = 0; i < 8; ++i) {
    void* result = NULL;
    CHECK(pthread_join(threads[i], &result) == 0);
    served += result != NULL;
  }
  CHECK(served == 1);
}

int main(void) {
  CHECK(syncbn_api_version() == ((SYNCBN_API_VERSION_MAJOR << 16) | SYNCBN_API_VERSION_MINOR));
  CHECK(strlen(syncbn_version()) >= 5 && strstr(syncbn_build_info(), "cpu=") != NULL);
  syncbn_master* master = NULL;
  CHECK_OK(syncbn_master_start(NULL, &master, &error));
  g_target = syncbn_master_target(master);
  TestPageForSeveralThreads(master);
  TestPasses();
  TestRounds();
  TestNoSequenceComesAfterTheGreatest();
  TestRoundError();
  TestBadInput();
  TestNullHandles();
  TestPassThatOutlivesItsWorker();
  TestEvaluation();
  TestNumbersThatAreNotFinite();
  TestSequencesOfPasses();
  TestStreamOrder();
  TestLog();
  TestTargets();
  TestOlderCaller();
  TestCloseDuringAWait();
  syncbn_master_shutdown(master, 1000000000);
  syncbn_master_destroy(master);
  puts("16 passed, 0 failed");
  return 0;
}
