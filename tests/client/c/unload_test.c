/* A program that loads the library, closes it and loads it again, as hosts of plug-ins do. Threads and tables of gRPC
 * and protobuf outlive dlclose, so the library stays where it is. */

#include <dlfcn.h>
#include <stdio.h>

#include "client/c/syncbn.h"
#include "tests/client/c/check.h"

/* Declares a local variable for a function of the header, which is looked up in the library. */
#define LOOK_UP(library, function)                                  \
  __typeof__(function)* const function = dlsym(library, #function); \
  CHECK(function != NULL)

static void* Load(const char* path) {
  void* const library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (library == NULL) fprintf(stderr, "%s\n", dlerror());
  CHECK(library != NULL);
  return library;
}

static syncbn_master* StartMaster(void* library) {
  LOOK_UP(library, syncbn_master_start);
  LOOK_UP(library, syncbn_error_message);
  const syncbn_master_options options = SYNCBN_MASTER_OPTIONS_INIT;
  syncbn_master* master = NULL;
  CHECK_OK(syncbn_master_start(&options, &master, &error));
  return master;
}

/* A group of one, whose sum is the value itself. */
static void Sum(void* library, const syncbn_master* master) {
  LOOK_UP(library, syncbn_error_message);
  LOOK_UP(library, syncbn_master_target);
  LOOK_UP(library, syncbn_worker_join);
  LOOK_UP(library, syncbn_worker_destroy);
  LOOK_UP(library, syncbn_round_start_sum);
  LOOK_UP(library, syncbn_round_wait);
  LOOK_UP(library, syncbn_round_first);
  LOOK_UP(library, syncbn_round_destroy);
  syncbn_worker_options options = SYNCBN_WORKER_OPTIONS_INIT;
  options.target = syncbn_master_target(master);
  options.world_size = 1;
  syncbn_worker* worker = NULL;
  CHECK_OK(syncbn_worker_join(&options, &worker, &error));
  const double value = 2.5;
  syncbn_round* round = NULL;
  CHECK_OK(syncbn_round_start_sum(worker, "v", SYNCBN_NEXT_SEQUENCE, &value, 1, &round, &error));
  CHECK_OK(syncbn_round_wait(round, -1, &error));
  CHECK(syncbn_round_first(round)[0] == value);
  syncbn_round_destroy(round);
  syncbn_worker_destroy(worker);
}

int main(int argc, char** argv) {
  CHECK(argc == 2);
  for (int i = 0; i < 3; ++i) {
    void* library = Load(argv[1]);
    syncbn_master* const master = StartMaster(library);
    CHECK(dlclose(library) == 0); /* With the master's threads at work. */
    library = Load(argv[1]);
    Sum(library, master);
    LOOK_UP(library, syncbn_master_destroy);
    syncbn_master_destroy(master);
    CHECK(dlclose(library) == 0);
  }
  return 0;
}
