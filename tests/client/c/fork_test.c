/* A forked child may do nothing, and is told at once; its parent and the others notice nothing. */

#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "client/c/syncbn.h"
#include "tests/client/c/check.h"

#define CHECK_FORKED(call) CHECK_FAILS(call, kFailedPrecondition, "FORKED")

enum { kPatience = 300 };

static const int64_t kLong = 600000000000; /* 10 minutes. */

static syncbn_code TryToJoin(const char* target, uint32_t rank, uint32_t world_size, syncbn_worker** worker,
                             syncbn_error** error) {
  syncbn_worker_options options = SYNCBN_WORKER_OPTIONS_INIT;
  options.target = target;
  options.rank = rank;
  options.world_size = world_size;
  options.round_timeout_ns = kLong;
  options.join_timeout_ns = kLong;
  return syncbn_worker_join(&options, worker, error);
}

static syncbn_code StartSum(syncbn_worker* worker, double value, syncbn_round** round, syncbn_error** error) {
  return syncbn_round_start_sum(worker, "v", SYNCBN_NEXT_SEQUENCE, &value, 1, round, error);
}

static double Sum(syncbn_worker* worker, double value) {
  syncbn_round* round = NULL;
  CHECK_OK(StartSum(worker, value, &round, &error));
  CHECK_OK(syncbn_round_wait(round, -1, &error));
  const double sum = syncbn_round_first(round)[0];
  syncbn_round_destroy(round);
  return sum;
}

/* Ends with 0 if the child did. */
static void ExpectSuccess(pid_t child) {
  int status = -1;
  CHECK(child > 0);
  CHECK(waitpid(child, &status, 0) == child);
  if (status != 0) fprintf(stderr, "the child ended with status 0x%x\n", (unsigned)status);
  CHECK(status == 0);
}

static void ExpectThatNothingCanBeMade(const char* target) {
  syncbn_worker* worker = NULL;
  syncbn_master* master = NULL;
  CHECK_FORKED(TryToJoin(target, 0, 1, &worker, &error));
  CHECK_FORKED(syncbn_master_start(NULL, &master, &error));
  CHECK(worker == NULL && master == NULL);
}

static void InChild(syncbn_master* master, syncbn_worker* worker, syncbn_round* pending) {
  alarm(kPatience);
  syncbn_round* round = NULL;
  syncbn_forward* forward = NULL;
  syncbn_layer_options layer = SYNCBN_LAYER_OPTIONS_INIT;
  layer.name = "bn";
  layer.channels = 1;
  float data[2] = {1, 2};
  syncbn_tensor x = {data, 2, 1, 1, SYNCBN_FLOAT32, SYNCBN_CHANNELS_LAST, SYNCBN_DEVICE_CPU, 0};
  ExpectThatNothingCanBeMade(syncbn_master_target(master));
  CHECK_FORKED(StartSum(worker, 1, &round, &error));
  CHECK_FORKED(syncbn_round_wait(pending, -1, &error));
  CHECK_FORKED(syncbn_round_start_forward(worker, "bn", 0, 0, NULL, NULL, 1, 0, &round, &error));
  CHECK_FORKED(syncbn_round_start_backward(worker, "bn", 0, NULL, NULL, 0, &round, &error));
  CHECK_FORKED(syncbn_worker_declare_layer(worker, &layer, &error));
  CHECK_FORKED(syncbn_forward_start(worker, "bn", &x, NULL, &forward, &error));
  CHECK_FORKED(syncbn_worker_flush(worker, &error));
  CHECK_FORKED(syncbn_worker_settle(worker, -1, &error));
  CHECK_FORKED(syncbn_worker_wait_for_members(worker, -1, &error));
  CHECK_FORKED(syncbn_worker_resume_at(worker, 5, &error));
  CHECK_FORKED(syncbn_worker_leave(worker, "", &error));
  syncbn_worker_interrupt(worker);
  syncbn_worker_close(worker);
  CHECK(syncbn_worker_rank(worker) == 0 && syncbn_worker_incarnation(worker) == 1);
  CHECK(syncbn_worker_run_id(worker) != 0);
  const pid_t grandchild = fork();
  if (grandchild == 0) {
    ExpectThatNothingCanBeMade("127.0.0.1:1");
    exit(0);
  }
  ExpectSuccess(grandchild);
  syncbn_set_log(NULL, NULL);
  syncbn_round_destroy(pending);
  syncbn_worker_destroy(worker);
  syncbn_master_shutdown(master, 0);
  syncbn_master_destroy(master);
  ExpectThatNothingCanBeMade("127.0.0.1:1");
  exit(0); /* With its handlers. */
}

struct Training {
  syncbn_worker* worker;
  volatile int rounds; /* For this one thread and, once it has ended, its parent. */
};

static void* Train(void* argument) {
  struct Training* const training = (struct Training*)argument;
  while (Sum(training->worker, 1.0) != 0.0) ++training->rounds; /* The other worker ends it with -1. */
  return NULL;
}

/* Children while another thread is in the middle of rounds: locks are held, and a thread drives the connection. */
static void TestChildrenOfATrainer(void) {
  syncbn_master* master = NULL;
  CHECK_OK(syncbn_master_start(NULL, &master, &error));
  syncbn_worker* workers[2] = {NULL, NULL};
  for (uint32_t rank = 0; rank < 2; ++rank) {
    CHECK_OK(TryToJoin(syncbn_master_target(master), rank, 2, &workers[rank], &error));
  }
  struct Training training = {workers[1], 0};
  pthread_t thread;
  CHECK(pthread_create(&thread, NULL, Train, &training) == 0);
  for (int i = 0; i < 8; ++i) {
    for (int step = 0; step < 20; ++step) CHECK(Sum(workers[0], 1.0) == 2.0);
    syncbn_round* pending = NULL;
    CHECK_OK(StartSum(workers[0], 2.0, &pending, &error));
    fflush(NULL);
    const pid_t child = fork();
    if (child == 0) InChild(master, workers[0], pending);
    ExpectSuccess(child);
    CHECK_OK(syncbn_round_wait(pending, -1, &error));
    CHECK(syncbn_round_first(pending)[0] == 3.0);
    syncbn_round_destroy(pending);
  }
  CHECK(Sum(workers[0], -1.0) == 0.0);
  CHECK(pthread_join(thread, NULL) == 0);
  CHECK(training.rounds == 8 * 21);
  for (int rank = 0; rank < 2; ++rank) syncbn_worker_destroy(workers[rank]);
  syncbn_master_shutdown(master, 0);
  syncbn_master_destroy(master);
}

static void TestChildOfAMasterAlone(void) {
  syncbn_master* master = NULL;
  CHECK_OK(syncbn_master_start(NULL, &master, &error));
  fflush(NULL);
  const pid_t child = fork();
  if (child == 0) {
    alarm(kPatience);
    ExpectThatNothingCanBeMade(syncbn_master_target(master));
    syncbn_master_destroy(master);
    exit(0);
  }
  ExpectSuccess(child);
  syncbn_worker* worker = NULL;
  CHECK_OK(TryToJoin(syncbn_master_target(master), 0, 1, &worker, &error));
  CHECK(Sum(worker, 3.0) == 3.0);
  syncbn_worker_destroy(worker);
  syncbn_master_destroy(master);
}

/* A child of a process that has closed everything lacks what gRPC keeps, and is told so instead of waiting for it. */
static void TestChildOfAProcessThatHasClosed(void) {
  fflush(NULL);
  const pid_t child = fork();
  if (child == 0) {
    alarm(kPatience);
    ExpectThatNothingCanBeMade("127.0.0.1:1");
    exit(0);
  }
  ExpectSuccess(child);
}

/* A worker with a long-lived child is killed: the others hear of it though the child lives. */
static void TestLossOfAWorkerWithAChild(void) {
  int to_worker[2], from_worker[2];
  CHECK(pipe(to_worker) == 0 && pipe(from_worker) == 0);
  fflush(NULL);
  const pid_t lost = fork();
  if (lost == 0) {
    alarm(kPatience);
    char target[256] = "";
    CHECK(read(to_worker[0], target, sizeof(target) - 1) > 0);
    syncbn_worker* worker = NULL;
    CHECK_OK(TryToJoin(target, 1, 2, &worker, &error));
    CHECK(Sum(worker, 2.0) == 3.0);
    const pid_t child = fork();
    if (child == 0) {
      alarm(2 * kPatience);
      for (;;) pause();
    }
    CHECK(write(from_worker[1], &child, sizeof(child)) == sizeof(child));
    for (;;) pause();
  }
  syncbn_master* master = NULL;
  CHECK_OK(syncbn_master_start(NULL, &master, &error));
  const char* const target = syncbn_master_target(master);
  CHECK(write(to_worker[1], target, strlen(target)) == (ssize_t)strlen(target));
  syncbn_worker* worker = NULL;
  CHECK_OK(TryToJoin(target, 0, 2, &worker, &error));
  CHECK(Sum(worker, 1.0) == 3.0);
  pid_t child = 0;
  CHECK(read(from_worker[0], &child, sizeof(child)) == sizeof(child));
  syncbn_round* round = NULL;
  CHECK_OK(StartSum(worker, 1.0, &round, &error));
  CHECK(kill(lost, SIGKILL) == 0);
  CHECK_FAILS(syncbn_round_wait(round, -1, &error), kUnavailable, "WORKER_LOST");
  CHECK(kill(child, SIGKILL) == 0); /* It has lived until here. */
  int status = 0;
  CHECK(waitpid(lost, &status, 0) == lost);
  syncbn_round_destroy(round);
  syncbn_worker_destroy(worker);
  syncbn_master_destroy(master);
}

int main(void) {
  TestLossOfAWorkerWithAChild(); /* First, since it forks a worker of this process, which has none yet. */
  TestChildrenOfATrainer();
  TestChildOfAProcessThatHasClosed();
  TestChildOfAMasterAlone();
  puts("4 passed, 0 failed");
  return 0;
}
