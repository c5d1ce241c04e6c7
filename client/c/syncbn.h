/* syncbn: batch normalization over the global batch. The stable C interface.
 *
 * Conventions
 *  1. Objects are opaque handles. The caller destroys what a function creates through a `**out` parameter, with the
 *     handle type's *_destroy function. Destroying NULL does nothing.
 *  2. Returns: functions that can fail return a syncbn_code, equal to gRPC's codes; 0 is OK.
 *     Errors: such functions take a `syncbn_error** error` last. If it is not NULL and the call fails, it receives a
 *     handle with the details, which the caller destroys. A call that fails leaves out parameters untouched. A NULL
 *     handle makes such a call fail with INVALID_ARGUMENT; other functions must not be given one.
 *  3. Strings are UTF-8 and end in 0. Strings and arrays that a function returns belong to the handle they were read
 *     from, and live as long as it, unless stated otherwise.
 *  4. Option structs begin with their size: set `struct_size = sizeof(the struct)` and zero the rest (the *_INIT macros
 *     do both). Zero always means the default. In a field with an enumeration, it stands for the first value, whether
 *     that is 0 or 1; where a number has no default of its own, a has_* field in front of it tells whether it is set.
 *     Later versions only append fields.
 *  5. Vectors of statistics are float64, with one element per channel.
 *  6. Thread safety: any thread may use a worker or a master. A round, a pass or an error belongs to one thread at a
 *     time. It may outlive its worker's handle: whatever it still waits for then ends with CANCELLED (CLOSED).
 *  7. Forks: a process forked from one that has or had an open worker or master gets FAILED_PRECONDITION (FORKED) at
 *     once from every call that would use the parent's handles or create new ones: use spawn, forkserver or exec.
 *     Destroying inherited handles there is harmless. The parent is unaffected, and its connections end with it,
 *     whether or not the child lives.
 *  8. Times are in nanoseconds (int64_t).
 */

#ifndef SYNCBN_CLIENT_C_SYNCBN_H_
#define SYNCBN_CLIENT_C_SYNCBN_H_

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define SYNCBN_API
#else
#define SYNCBN_API __attribute__((visibility("default")))
#endif

/* Initializes an option struct: its size, and zeros. C99 and later, C++11 and later. */
#ifdef __cplusplus
#define SYNCBN_SIZED(type)             \
  ([]() {                              \
    type sized = type();               \
    sized.struct_size = sizeof(sized); \
    return sized;                      \
  }())
extern "C" {
#else
#define SYNCBN_SIZED(type) \
  { .struct_size = sizeof(type) }
#endif

/* ---- Versions and errors ---------------------------------------------------------------------------------------- */

/* The interface's own version: a new minor version adds, a new major version may change. */
#define SYNCBN_API_VERSION_MAJOR 0
#define SYNCBN_API_VERSION_MINOR 1

/* Returns (major << 16) | minor of the loaded library's interface. */
SYNCBN_API uint32_t syncbn_api_version(void);
/* Returns the library's version, as "1.2.3". Static. */
SYNCBN_API const char* syncbn_version(void);
/* Returns what this build runs on: "cpu=AVX2 cuda=no", or "cpu=AVX2 cuda=13.0" with the CUDA version it was built with.
 * The NVIDIA driver is needed only from the first pass over a CUDA tensor. Libraries of packages end it with the commit
 * that they were built from: " commit=1b2c3d4e5f60". Static. */
SYNCBN_API const char* syncbn_build_info(void);

typedef int32_t syncbn_code; /* As grpc::StatusCode: 0 OK, 1 CANCELLED, 3 INVALID_ARGUMENT, 4 DEADLINE_EXCEEDED, ... */

/* Returned by waiting functions when their timeout has passed and the round goes on. Not a gRPC code; sets no error. */
#define SYNCBN_PENDING ((syncbn_code)-1)

typedef struct syncbn_error syncbn_error;
SYNCBN_API void syncbn_error_destroy(syncbn_error* error);
SYNCBN_API syncbn_code syncbn_error_code(const syncbn_error* error);
/* Returns one of the reasons that statistics.proto lists, as "WORKER_LOST"; "" for an error of another origin. */
SYNCBN_API const char* syncbn_error_reason(const syncbn_error* error);
SYNCBN_API const char* syncbn_error_message(const syncbn_error* error);
/* Returns the layer concerned, or "". */
SYNCBN_API const char* syncbn_error_layer(const syncbn_error* error);
/* Sets *ranks to the ranks to blame, ascending, and returns their number. */
SYNCBN_API size_t syncbn_error_ranks(const syncbn_error* error, const uint32_t** ranks);

/* ---- The log ---------------------------------------------------------------------------------------------------- */

/* The levels of Python's logging. */
enum { SYNCBN_LOG_DEBUG = 10, SYNCBN_LOG_INFO = 20, SYNCBN_LOG_WARNING = 30, SYNCBN_LOG_ERROR = 40 };

/* Receives one line, without its line end; `message` is valid during the call.
 *
 * Thread safety: called on any thread that logs, those of gRPC among them, and by several at a time. The library holds
 * no lock meanwhile, so the function may call the library. */
typedef void (*syncbn_log_function)(int32_t level, const char* message, void* user);

/* Replaces the function that receives this process's log. NULL restores the default: warnings and errors on stderr, one
 * line each. gRPC's own log arrives at level DEBUG.
 *
 * Returns once no other thread is within the previous function, so that `user` may be freed; called from within such a
 * function, it returns at once.
 * Thread safety: any thread may call it at any time, in a forked child too. */
SYNCBN_API void syncbn_set_log(syncbn_log_function function, void* user);

/* A function to pass to syncbn_set_log. It keeps the newest 256 lines until syncbn_log_take takes them, for programs
 * that cannot be called back on any thread at any time, such as interpreters. */
SYNCBN_API void syncbn_log_keep(int32_t level, const char* message, void* user);
/* Takes the oldest kept line: copies it to `message`, cut to `size` bytes including the final 0. With `message` NULL it
 * takes nothing.
 *
 * Returns: the line's level, or 0 if there is none; with NULL, 1 if there is a line, else 0, without taking a lock. */
SYNCBN_API int32_t syncbn_log_take(char* message, size_t size);

/* A function of Python, for the Python package: a call of a pass, or a description of torch's tensors. `python` has
 * `count` addresses of Python's own functions. `self` is for a call a callable that gives the log's lines to Python's
 * logger; given the code of a failed call and its syncbn_error instead of 0 and NULL, it destroys that and raises the
 * error. For a description it is a tuple of torch's objects. The caller holds the interpreter's lock.
 *
 * Returns: a new reference (PyObject*); NULL if the name is unknown, or the count is not that of this library. */
SYNCBN_API void* syncbn_python_function(const void* const* python, size_t count, const char* name, void* self);

/* ---- A master in this process ----------------------------------------------------------------------------------- */

typedef struct syncbn_master syncbn_master;

typedef struct syncbn_master_options {
  size_t struct_size;
  const char* address; /* HOST:PORT (port 0: any free one) or unix:PATH. Default "127.0.0.1:0". */
  int32_t insecure;    /* Listen beyond loopback without TLS. */
  const char* cert_file;
  const char* key_file;
  const char* trusted_ca_file;
  int32_t client_cert_auth;
  const char* token;     /* Every worker must join with it. Default: each job has the token of its first join. */
  const char* state_dir; /* Where running statistics are kept between masters; NULL: nowhere. */
} syncbn_master_options;
#define SYNCBN_MASTER_OPTIONS_INIT SYNCBN_SIZED(syncbn_master_options)

/* Starts a master that serves until it is shut down.
 *
 * Errors: INVALID_ARGUMENT for options that contradict each other, for an address beyond loopback without TLS, and for
 * a state directory that cannot be used; UNAVAILABLE for an address that cannot be listened on, and for a state
 * directory that another master uses; DATA_LOSS for a damaged state file, and FAILED_PRECONDITION for one of a newer
 * version. */
SYNCBN_API syncbn_code syncbn_master_start(const syncbn_master_options* options, syncbn_master** out,
                                           syncbn_error** error);
/* Returns the target that workers connect to, as "127.0.0.1:40123". */
SYNCBN_API const char* syncbn_master_target(const syncbn_master* master);
/* Serves the master's status page, metrics and probes by HTTP at `address`, HOST:PORT (port 0: any free one), until the
 * master is destroyed. Without TLS: beyond loopback, everybody who reaches the port can read them. Readers of all but
 * metrics and probes must bear `token`, as "Authorization: Bearer TOKEN" or as the password that a browser asks for;
 * NULL: nothing. A process that is forked meanwhile does not hold the port.
 *
 * Errors: INVALID_ARGUMENT for an address that is no HOST:PORT or does not exist, and for a token with other than
 * printable characters; UNAVAILABLE for an address that cannot be listened on; FAILED_PRECONDITION where it is served
 * already. */
SYNCBN_API syncbn_code syncbn_master_serve_http(syncbn_master* master, const char* address, const char* token,
                                                syncbn_error** error);
/* Returns the address with the actual port, as "127.0.0.1:8080"; "" where nothing is served by HTTP. */
SYNCBN_API const char* syncbn_master_http_address(const syncbn_master* master);
/* The number of workers' streams that are open now, over all groups. A process that ends closes its own. */
SYNCBN_API size_t syncbn_master_workers(const syncbn_master* master);
/* Tells every worker that the master ends, lets their streams drain for at most `grace_ns` (negative: without a limit),
 * then ends them. */
SYNCBN_API void syncbn_master_shutdown(syncbn_master* master, int64_t grace_ns);
/* Shuts the master down at once if it still serves. */
SYNCBN_API void syncbn_master_destroy(syncbn_master* master);

/* Makes a certificate for a master of this program's, which clients trust by trusting the certificate itself: a key
 * pair and a self-signed certificate for `host`, an IP address (without brackets) or a DNS name, valid for ten years.
 * Writes both as PEM to files that must be new; the key's can be read by its owner alone. Errors: INVALID_ARGUMENT for
 * a host that no certificate can carry and for files that exist or cannot be written; INTERNAL where the certificate
 * cannot be made. */
SYNCBN_API syncbn_code syncbn_make_certificate(const char* host, const char* cert_file, const char* key_file,
                                               syncbn_error** error);

/* ---- A worker: one member of a group ---------------------------------------------------------------------------- */

typedef struct syncbn_worker syncbn_worker;

/* Rounds without a lost worker do one of these: fail; proceed with min_workers; wait for its successor, for
 * rejoin_grace, which repeats what the worker had contributed since its checkpoint and goes on in its place. */
enum { SYNCBN_MISSING_FAIL = 1, SYNCBN_MISSING_PROCEED = 2, SYNCBN_MISSING_WAIT = 3 };

/* Writes the master's address, in the form of syncbn_worker_options.target, into `buffer`, with a final 0.
 *
 * Returns: 0, or a code, with which the attempt to connect then fails.
 * Thread safety: called at each attempt to connect, by a thread that is within a call of this worker, with no lock
 * held. The function must not use the worker. While it runs, the worker's calls do not notice interrupts. */
typedef syncbn_code (*syncbn_target_function)(char* buffer, size_t size, void* user);

typedef struct syncbn_worker_options {
  size_t struct_size;
  /* One address, or several separated by commas, which are tried in turn: HOST:PORT, unix:PATH, or another name that
   * gRPC resolves. Host names are resolved at each attempt to connect. Required, unless there is a find_target. */
  const char* target;
  const char* job;   /* Default "default". */
  const char* group; /* Default "default". */
  uint32_t rank;
  uint32_t world_size; /* Required, at least 1. */
  uint64_t generation;
  int64_t round_timeout_ns; /* Default 10 min. The same for all workers of the group. */
  /* Time to try to reach the master, at first and after a break. Also the time to wait for a rank that another
   * worker holds; a warning in the log then names the holder. Default 30 s. */
  int64_t join_timeout_ns;
  /* Default 50 ms, with WAIT half of round_timeout; negative: none. The same for all workers. */
  int64_t rejoin_grace_ns;
  int32_t missing_policy;      /* Default FAIL. The same for all workers. */
  uint32_t min_workers;        /* With PROCEED. The same for all workers. */
  const char* description;     /* For people who inspect the group. Default: library, host and process id. */
  const char* trusted_ca_file; /* Any of these three files: TLS. */
  const char* cert_file;
  const char* key_file;
  syncbn_target_function find_target; /* If not NULL, what it writes takes the place of `target`. */
  void* find_target_user;             /* Passed to find_target; must live as long as the worker. */
  /* The job's secret, the same for all its workers: 1 to 1024 printable ASCII characters without spaces. Default: none.
   * The library copies it, and shows it nowhere. */
  const char* token;
  /* Another thread ends syncbn_worker_join by storing 1 there: with CANCELLED (INTERRUPTED), after a tenth of a second
   * or so. Must live as long as the call. NULL: nobody does. */
  const int32_t* join_cancelled;
} syncbn_worker_options;
#define SYNCBN_WORKER_OPTIONS_INIT SYNCBN_SIZED(syncbn_worker_options)

/* Connects to the master and joins the group; returns when the master has answered.
 *
 * Errors: INVALID_ARGUMENT for options that contradict each other; UNAVAILABLE if no master answers within
 * join_timeout_ns; UNAUTHENTICATED (TOKEN_MISMATCH) if the token is not the job's; ALREADY_EXISTS (RANK_TAKEN) if
 * another worker holds the rank that long; whatever the master refuses the join with (PROTOCOL.md, section 9). */
SYNCBN_API syncbn_code syncbn_worker_join(const syncbn_worker_options* options, syncbn_worker** out,
                                          syncbn_error** error);
/* Leaves the group: other workers stop waiting for this rank. Waits for stream-ordered passes first, as
 * syncbn_worker_settle does, and returns its error; the worker has left nevertheless. Then waits until the others have
 * read of it, for a second or so at most: should the master die meanwhile, they need what this worker holds.
 * INVALID_ARGUMENT, with which the worker has not left, if the reason is not UTF-8. Every later call fails with
 * FAILED_PRECONDITION (LEFT). */
SYNCBN_API syncbn_code syncbn_worker_leave(syncbn_worker* worker, const char* reason, syncbn_error** error);
/* Ends the connection without leaving: the master reports this worker to the others as lost, at once. Pending waits, on
 * any thread, and every later call end with CANCELLED (CLOSED). A second call does nothing. */
SYNCBN_API void syncbn_worker_close(syncbn_worker* worker);
/* Closes the worker if it is open, and frees it. No other thread may be within a call of this worker. */
SYNCBN_API void syncbn_worker_destroy(syncbn_worker* worker);

SYNCBN_API uint32_t syncbn_worker_rank(const syncbn_worker* worker);
SYNCBN_API uint32_t syncbn_worker_world_size(const syncbn_worker* worker);
SYNCBN_API uint64_t syncbn_worker_incarnation(const syncbn_worker* worker);
SYNCBN_API uint64_t syncbn_worker_run_id(const syncbn_worker* worker);
/* 1 if frames go through memory that the master shares, at this moment; 0 if they go by gRPC. */
SYNCBN_API int32_t syncbn_worker_shares_memory(const syncbn_worker* worker);

/* Waits until every rank of the group is present. Returns SYNCBN_PENDING once `timeout_ns` has passed. */
SYNCBN_API syncbn_code syncbn_worker_wait_for_members(syncbn_worker* worker, int64_t timeout_ns, syncbn_error** error);

/* Sets the next automatic sequence of every layer and phase to `sequence`. After a restart of some workers, all workers
 * call it with the same value, greater than any used before.
 *
 * Errors: INVALID_ARGUMENT for SYNCBN_NEXT_SEQUENCE. */
SYNCBN_API syncbn_code syncbn_worker_resume_at(syncbn_worker* worker, uint64_t sequence, syncbn_error** error);

enum { SYNCBN_PHASE_FORWARD = 1, SYNCBN_PHASE_BACKWARD = 2, SYNCBN_PHASE_SUM = 3 };

/* Sets the next automatic sequence of one layer in one phase to `sequence`.
 *
 * Errors: INVALID_ARGUMENT for SYNCBN_NEXT_SEQUENCE, an unknown phase, and a name of other than 1 to 255 bytes. */
SYNCBN_API syncbn_code syncbn_worker_resume_layer_at(syncbn_worker* worker, const char* layer, int32_t phase,
                                                     uint64_t sequence, syncbn_error** error);

/* A list of rounds, ordered by layer. Free it with syncbn_rounds_destroy.
 *
 * Thread safety: any thread may read it. */
typedef struct syncbn_rounds syncbn_rounds;

/* Lists the rounds that SYNCBN_NEXT_SEQUENCE begins next: what a checkpoint keeps, for syncbn_worker_resume_layer_at.
 * The first has an empty name and stands for all layers that are not listed, for syncbn_worker_resume_at. */
SYNCBN_API syncbn_code syncbn_worker_next_rounds(const syncbn_worker* worker, syncbn_rounds** out,
                                                 syncbn_error** error);
/* Lists where the group stood when this worker joined it: the completed round of the greatest sequence for each layer
 * and phase. Empty in a group that began then. */
SYNCBN_API syncbn_code syncbn_worker_newest_rounds(const syncbn_worker* worker, syncbn_rounds** out,
                                                   syncbn_error** error);
SYNCBN_API size_t syncbn_rounds_size(const syncbn_rounds* rounds);
/* The round at `index`, which is less than the size. The name lives as long as the list. */
SYNCBN_API const char* syncbn_rounds_layer(const syncbn_rounds* rounds, size_t index);
SYNCBN_API int32_t syncbn_rounds_phase(const syncbn_rounds* rounds, size_t index);
SYNCBN_API uint64_t syncbn_rounds_sequence(const syncbn_rounds* rounds, size_t index);
SYNCBN_API void syncbn_rounds_destroy(syncbn_rounds* rounds);

/* Ends every wait of any thread or CUDA stream with CANCELLED, now: for an interrupt. The worker stays usable. */
SYNCBN_API void syncbn_worker_interrupt(syncbn_worker* worker);

/* Waits until every stream-ordered pass that was started (see below) has its outcome; does not wait for the streams.
 *
 * Returns: SYNCBN_PENDING once `timeout_ns` has passed (negative: no limit); 0 at once if there is no such pass.
 * Errors: the first failure among these passes that no call has returned yet, as soon as there is one. */
SYNCBN_API syncbn_code syncbn_worker_settle(syncbn_worker* worker, int64_t timeout_ns, syncbn_error** error);

enum { SYNCBN_LAYER_BATCH_NORM = 1, SYNCBN_LAYER_SUM = 2 };
enum { SYNCBN_EPS_ADD = 0, SYNCBN_EPS_CLAMP = 1 };
enum { SYNCBN_NUMERIC_REFUSE = 0, SYNCBN_NUMERIC_PROPAGATE = 1 };

typedef struct syncbn_layer_options {
  size_t struct_size;
  const char* name; /* 1 to 255 bytes. */
  uint32_t channels;
  int32_t kind; /* SYNCBN_LAYER_*; default BATCH_NORM. */
  double eps;   /* No default: 0 is 0. */
  int32_t eps_mode;
  int32_t numeric_policy;
  int32_t has_momentum; /* 0: the master's running statistics are a cumulative average. */
  double momentum;
  int32_t biased_running_variance;
} syncbn_layer_options;
#define SYNCBN_LAYER_OPTIONS_INIT SYNCBN_SIZED(syncbn_layer_options)

/* Declares the layer to the master, with the next frame, and again after every reconnect.
 *
 * A later, different declaration (other channels, another eps) holds for the rounds that this worker begins from then
 * on. Rounds begun earlier keep the declaration they were begun under, and a backward round has that of its forward
 * round. A round under the new declaration waits until every worker has declared the same and contributed, or for the
 * deadline.
 *
 * Errors: contributions to one sequence under different declarations fail that round for all workers, at once, with
 * LAYER_SPEC_MISMATCH: change a layer at the same sequence everywhere. Until a round of the layer has completed, a
 * first declaration that differs from the others' is reported to all workers with the same reason. */
SYNCBN_API syncbn_code syncbn_worker_declare_layer(syncbn_worker* worker, const syncbn_layer_options* layer,
                                                   syncbn_error** error);

/* ---- Rounds over plain vectors ---------------------------------------------------------------------------------- */

/* Lets the worker count the sequences itself: 0, 1, 2, ... for each layer and phase. The greatest sequence is one less;
 * a round that would be counted after it fails with OUT_OF_RANGE. After a deadlock, or a round that lacked a worker
 * which waits elsewhere, it counts on from a number that is the same for all workers; so give a backward round the
 * sequence of its forward round. */
#define SYNCBN_NEXT_SEQUENCE UINT64_MAX

enum { SYNCBN_BACKWARD_REQUIRED = 1, SYNCBN_BACKWARD_IF_REQUIRED = 2, SYNCBN_BACKWARD_NONE = 3 };

typedef struct syncbn_round syncbn_round;

/* Begins a round and copies the vectors. The contribution is sent with the next wait or flush, in one frame with all
 * others that are ready by then. `mean` and `m2` have `channels` elements each (NULL if count is 0). */
SYNCBN_API syncbn_code syncbn_round_start_forward(syncbn_worker* worker, const char* layer, uint64_t sequence,
                                                  int64_t count, const double* mean, const double* m2, size_t channels,
                                                  int32_t backward_role, syncbn_round** out, syncbn_error** error);
SYNCBN_API syncbn_code syncbn_round_start_backward(syncbn_worker* worker, const char* layer, uint64_t sequence,
                                                   const double* sum_dy, const double* sum_dy_xmu, size_t channels,
                                                   syncbn_round** out, syncbn_error** error);
/* Begins the sum of a vector of any length; long ones are sent in pieces. */
SYNCBN_API syncbn_code syncbn_round_start_sum(syncbn_worker* worker, const char* name, uint64_t sequence,
                                              const double* value, size_t length, syncbn_round** out,
                                              syncbn_error** error);
/* Sends the contributions that are ready, without waiting for their rounds. */
SYNCBN_API syncbn_code syncbn_worker_flush(syncbn_worker* worker, syncbn_error** error);

/* Waits for the round's outcome, for at most `timeout_ns` (negative: until there is one; the group's round_timeout
 * ensures that there is). Sends the round even if the time is up, for which it may take 100 ms longer if an earlier
 * frame is still being written. Without a connection, a later wait sends it.
 *
 * Returns: SYNCBN_PENDING if there is none yet; call again. Any other code is the round's outcome, and every later call
 * returns the same.
 * Deadlock detection: a wait of 20 ms or more, in a worker that no second thread has used, tells the master that this
 * worker sends nothing else meanwhile. */
SYNCBN_API syncbn_code syncbn_round_wait(syncbn_round* round, int64_t timeout_ns, syncbn_error** error);
SYNCBN_API uint64_t syncbn_round_sequence(const syncbn_round* round);
/* The result of a completed round. `first` and `second` are, in a forward round, mean and biased variance; in a
 * backward round, sum_dy and sum_dy_xmu; in a sum, the vector and NULL. */
SYNCBN_API int64_t syncbn_round_count(const syncbn_round* round);
SYNCBN_API size_t syncbn_round_length(const syncbn_round* round);
SYNCBN_API const double* syncbn_round_first(const syncbn_round* round);
SYNCBN_API const double* syncbn_round_second(const syncbn_round* round);
SYNCBN_API int32_t syncbn_round_backward_required(const syncbn_round* round);
SYNCBN_API size_t syncbn_round_missing_ranks(const syncbn_round* round, const uint32_t** ranks);
/* A round destroyed while pending still counts for the other workers. */
SYNCBN_API void syncbn_round_destroy(syncbn_round* round);

/* ---- Batch normalization of tensors ----------------------------------------------------------------------------- */

/* CUDA tensors: every vector of parameters is in device memory too, and all work is enqueued in the caller's stream.
 * Start and finish return once their kernels are enqueued. A pass stays with one device and one stream, from the
 * forward pass's start to the backward pass's finish. Errors: FAILED_PRECONDITION for an unusable device, and for a
 * stream that is being captured into a graph (evaluations are captured); INTERNAL for errors of CUDA; UNIMPLEMENTED in
 * a build without CUDA.
 *
 * Host-driven passes, the default: the waiting functions wait for the GPU's reduction and for the round, without
 * synchronizing the stream. A round begins within a wait or a flush that finds its reduction complete. No failure
 * leaves anything in the stream that waits for a round.
 *
 * Stream-ordered passes (syncbn_pass_options.stream_ordered): finish may follow start at once, without a wait. It makes
 * the stream wait ahead of its kernels, and the caller runs ahead. A background thread of the worker, started with its
 * first such pass and ended with the worker, begins the round when the reduction is complete and releases the stream
 * when the round has ended. A backward pass is stream-ordered if its forward pass is.
 *  - The stream always goes on. After a failure, a deadline, syncbn_worker_interrupt or syncbn_worker_destroy, y, dx
 *    and the gradients of weight and bias are NaN, running statistics stay unchanged, and the worker's passes whose
 *    rounds have not begun fail as well. The error that a wait would return is returned once, by the worker's next
 *    syncbn_forward_start or syncbn_backward_start of CUDA tensors, syncbn_round_start_sum, syncbn_worker_settle or
 *    syncbn_worker_leave. Until then the program computes NaN, an optimizer's step included. To recover from
 *    failures, call syncbn_worker_settle before keeping any result.
 *  - Functions that need a wait to have an answer still need one, and that wait blocks the host.
 *  - Some passes are host-driven nevertheless, as syncbn_forward_stream_ordered tells: passes of a batch with fewer
 *    than two values per channel (so that a global count of 0 or 1 is known before anything depends on it), with the
 *    role IF_REQUIRED, of a worker with the policy PROCEED, and on a device for which syncbn_stream_order_check
 *    fails.
 *  - Deadlocks are found by their deadline, not at once. Two workers of one group that share a GPU in one process
 *    should not both be stream-ordered: the GPU may queue the work of one behind the other's wait, until the
 *    deadline. */

enum { SYNCBN_FLOAT32 = 0, SYNCBN_FLOAT64 = 1, SYNCBN_FLOAT16 = 2, SYNCBN_BFLOAT16 = 3 };
enum { SYNCBN_CHANNELS_FIRST = 0, SYNCBN_CHANNELS_LAST = 1 };
enum { SYNCBN_DEVICE_CPU = 0, SYNCBN_DEVICE_CUDA = 1 };

/* A dense tensor [batch, channels, spatial] (channels first) or [batch, spatial, channels] (channels last). */
typedef struct syncbn_tensor {
  void* data; /* May be NULL if the tensor is empty. */
  int64_t batch;
  int64_t channels;
  int64_t spatial; /* Height, width and depth in one; 1 for a 2-D tensor. */
  int32_t type;
  int32_t layout;
  int32_t device;       /* SYNCBN_DEVICE_*. */
  int32_t device_index; /* CUDA's number of the device. */
} syncbn_tensor;

/* A vector of parameters, of one of the four types, on the tensors' device; absent if `data` is NULL. */
typedef struct syncbn_vector {
  void* data;
  int32_t type;
} syncbn_vector;

typedef struct syncbn_pass_options {
  size_t struct_size;
  int32_t num_threads;   /* For CPU tensors. Default 1. */
  void* stream;          /* For CUDA tensors: the cudaStream_t to enqueue work in. NULL: the legacy default stream. */
  int32_t backward_role; /* Forward passes: SYNCBN_BACKWARD_*; default REQUIRED. */
  int32_t has_sequence;  /* Forward passes. 0: the worker counts; else the round has the number `sequence`. */
  uint64_t sequence;
  int32_t stream_ordered; /* Forward passes over CUDA tensors; see above. */
  /* Backward passes: nonzero for every backward pass but the first through this forward pass. Every worker makes as
   * many, and in the same order where a layer has several forward passes. Each gives the bits of the first. */
  int64_t again;
} syncbn_pass_options;
#define SYNCBN_PASS_OPTIONS_INIT SYNCBN_SIZED(syncbn_pass_options)

/* Tells whether passes on this CUDA device can be stream-ordered. The first call for a device loads its kernels.
 *
 * Returns: 0 if they can.
 * Errors: why they are host-driven: FAILED_PRECONDITION, or UNIMPLEMENTED in a build without CUDA. */
SYNCBN_API syncbn_code syncbn_stream_order_check(int32_t device_index, syncbn_error** error);

/* A forward pass through one layer: start, wait, finish, then any number of backward passes. It keeps the merged
 * statistics for the backward passes (float64, per channel), but no tensor: the caller keeps x alive until finish. */
typedef struct syncbn_forward syncbn_forward;

/* Reduces x to its moments and begins the round. `layer` must have been declared; the declaration gives eps and its
 * mode. */
SYNCBN_API syncbn_code syncbn_forward_start(syncbn_worker* worker, const char* layer, const syncbn_tensor* x,
                                            const syncbn_pass_options* options, syncbn_forward** out,
                                            syncbn_error** error);
/* Waits for the pass's round, as syncbn_round_wait does. */
SYNCBN_API syncbn_code syncbn_forward_wait(syncbn_forward* forward, int64_t timeout_ns, syncbn_error** error);

/* Outputs with a tensor's shape may have the memory of an input, beginning at the same address, or memory of their own.
 * Those that overlap an input or one another otherwise are refused with INVALID_ARGUMENT. */
typedef struct syncbn_forward_outputs {
  size_t struct_size;
  syncbn_vector weight;       /* Read. Absent: 1. */
  syncbn_vector bias;         /* Read. Absent: 0. */
  syncbn_vector running_mean; /* Updated in place, if present, unless the global count is 0. */
  syncbn_vector running_var;  /* Likewise; unbiased unless the layer is declared otherwise; unchanged if undefined. */
  double momentum;            /* The new value's weight in the running statistics. */
  const void* residual;       /* Added before the activation; x's shape, type and layout. */
  int32_t relu;
  uint8_t* relu_mask; /* (size+7)/8 bytes; required with relu and a residual if a backward pass follows. */
  syncbn_tensor y;    /* Written; x's shape, type and layout; y.data may be x's or the residual's: see above. */
  /* The number of batches in the running statistics, on x's device. The caller has counted this one already, and it is
   * counted out again if they do not take it: if the pass is stream-ordered and its round fails, or if the global count
   * is 0. NULL: not kept. */
  int64_t* batches;
  int64_t cumulative; /* Nonzero: the new value's weight is 1 / *batches, and momentum is not read. */
} syncbn_forward_outputs;
#define SYNCBN_FORWARD_OUTPUTS_INIT SYNCBN_SIZED(syncbn_forward_outputs)

/* Normalizes x with the round's result. Requires a successful wait, unless the pass is stream-ordered. */
SYNCBN_API syncbn_code syncbn_forward_finish(syncbn_forward* forward, const syncbn_tensor* x,
                                             const syncbn_forward_outputs* outputs, syncbn_error** error);
/* Known after a successful wait; 0 and NULL before it. */
SYNCBN_API uint64_t syncbn_forward_sequence(const syncbn_forward* forward);
SYNCBN_API int64_t syncbn_forward_count(const syncbn_forward* forward);
SYNCBN_API const double* syncbn_forward_mean(const syncbn_forward* forward);
SYNCBN_API const double* syncbn_forward_var(const syncbn_forward* forward);
/* Returns 1 if a backward round follows, in which this worker must then take part (unless its role was NONE); else 0.
 */
SYNCBN_API int32_t syncbn_forward_backward_required(const syncbn_forward* forward);
/* Returns 1 if the pass is stream-ordered, else 0. Known from the start. */
SYNCBN_API int32_t syncbn_forward_stream_ordered(const syncbn_forward* forward);
SYNCBN_API void syncbn_forward_destroy(syncbn_forward* forward);

typedef struct syncbn_backward syncbn_backward;

typedef struct syncbn_backward_inputs {
  size_t struct_size;
  syncbn_tensor dy;
  const void* x;        /* As in the forward pass; dy's shape, type and layout. */
  syncbn_vector weight; /* As in the forward pass. */
  syncbn_vector bias;   /* As in the forward pass; read only to gate a ReLU without a mask. */
  int32_t relu;
  const uint8_t* relu_mask;
} syncbn_backward_inputs;
#define SYNCBN_BACKWARD_INPUTS_INIT SYNCBN_SIZED(syncbn_backward_inputs)

typedef struct syncbn_backward_outputs {
  size_t struct_size;
  void* dx;               /* dy's shape, type and layout; may be dy.data. NULL: not wanted. */
  void* d_residual;       /* Likewise, in other memory than dx. */
  syncbn_vector d_weight; /* This worker's own, not summed over workers. Absent: not wanted. */
  syncbn_vector d_bias;
} syncbn_backward_outputs;
#define SYNCBN_BACKWARD_OUTPUTS_INIT SYNCBN_SIZED(syncbn_backward_outputs)

/* Reduces dy to its two sums and begins the backward round. There is none if no worker requires it, or if this worker's
 * contribution did not count; wait then returns 0 at once. The forward pass may be destroyed afterwards. */
SYNCBN_API syncbn_code syncbn_backward_start(const syncbn_forward* forward, const syncbn_backward_inputs* inputs,
                                             const syncbn_pass_options* options, syncbn_backward** out,
                                             syncbn_error** error);
SYNCBN_API syncbn_code syncbn_backward_wait(syncbn_backward* backward, int64_t timeout_ns, syncbn_error** error);
/* `inputs` are those that the pass was started with: INVALID_ARGUMENT if dy or x is in other memory; nothing else of
 * them is read again. */
SYNCBN_API syncbn_code syncbn_backward_finish(syncbn_backward* backward, const syncbn_backward_inputs* inputs,
                                              const syncbn_backward_outputs* outputs, syncbn_error** error);
SYNCBN_API void syncbn_backward_destroy(syncbn_backward* backward);

/* Evaluation computes y from x with given statistics, without a worker or a round. It adds eps to the variance in both
 * modes: CLAMP adds it in evaluation, as the original module does.
 *
 * CUDA tensors: a stream that is being captured into a CUDA graph takes evaluations and their gradients. Replays read
 * tensors, statistics and parameters anew, at the same addresses. The graph allocates a little memory, so it is one of
 * those that CUDA instantiates once at a time and takes for no child graph. */
typedef struct syncbn_evaluate_options {
  size_t struct_size;
  int32_t num_threads;
  void* stream;
  syncbn_vector mean; /* Required. */
  syncbn_vector var;  /* Required. */
  syncbn_vector weight;
  syncbn_vector bias;
  double eps;
  const void* residual;
  int32_t relu;
  uint8_t* relu_mask;
} syncbn_evaluate_options;
#define SYNCBN_EVALUATE_OPTIONS_INIT SYNCBN_SIZED(syncbn_evaluate_options)

SYNCBN_API syncbn_code syncbn_evaluate(const syncbn_tensor* x, const syncbn_evaluate_options* options, void* y,
                                       syncbn_error** error);
/* Computes the gradient of syncbn_evaluate with constant statistics. `inputs` and `outputs` are those of a backward
 * pass. */
SYNCBN_API syncbn_code syncbn_evaluate_backward(const syncbn_backward_inputs* inputs,
                                                const syncbn_evaluate_options* options,
                                                const syncbn_backward_outputs* outputs, syncbn_error** error);

#ifdef __cplusplus
} /* extern "C" */
#endif

#endif /* SYNCBN_CLIENT_C_SYNCBN_H_ */
