/* Checks for tests in C: the first that fails says where and why, and ends the process with 1. */

#ifndef SYNCBN_TESTS_CLIENT_C_CHECK_H_
#define SYNCBN_TESTS_CLIENT_C_CHECK_H_

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "client/c/syncbn.h"

#define CHECK(condition)                                              \
  do {                                                                \
    if (!(condition)) {                                               \
      fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
      exit(1);                                                        \
    }                                                                 \
  } while (0)

/* The call succeeds. It is given the `error` that the check declares: CHECK_OK(syncbn_worker_flush(worker, &error)). */
#define CHECK_OK(call)                                                       \
  do {                                                                       \
    syncbn_error* error = NULL;                                              \
    const syncbn_code code = (call);                                         \
    if (code != 0) {                                                         \
      fprintf(stderr, "%s:%d: code %d: %s\n", __FILE__, __LINE__, (int)code, \
              error == NULL ? "" : syncbn_error_message(error));             \
      exit(1);                                                               \
    }                                                                        \
  } while (0)

/* The call fails with this code and reason. */
#define CHECK_FAILS(call, expected_code, reason)                                                              \
  do {                                                                                                        \
    syncbn_error* error = NULL;                                                                               \
    const syncbn_code code = (call);                                                                          \
    if (code != (expected_code) || error == NULL || strcmp(syncbn_error_reason(error), (reason)) != 0) {      \
      fprintf(stderr, "%s:%d: code %d, %s: %s\n", __FILE__, __LINE__, (int)code,                              \
              error == NULL ? "" : syncbn_error_reason(error), error ? syncbn_error_message(error) : "none"); \
      exit(1);                                                                                                \
    }                                                                                                         \
    syncbn_error_destroy(error);                                                                              \
  } while (0)

/* Codes of gRPC. */
enum {
  kCancelled = 1,
  kInvalidArgument = 3,
  kDeadlineExceeded = 4,
  kFailedPrecondition = 9,
  kOutOfRange = 11,
  kUnimplemented = 12,
  kUnavailable = 14
};

#endif /* SYNCBN_TESTS_CLIENT_C_CHECK_H_ */
