/* syncbn: batch normalization over the global batch. The stable C interface.
 *
 * Conventions
 *  1. Objects are opaque handles. What a function creates through a `**out` parameter, the caller destroys with the function
 *     that the handle's type names. Destroying NULL does nothing.
 *  2. Functions that can fail return a syncbn_code, equal to gRPC's codes: 0 is OK. They take a `syncbn_error** error` as
 *     their last argument: where it is not NULL and the call fails, it receives a handle that tells more and that the caller
 *     destroys. Out parameters are untouched by a call that fails. A handle that is NULL makes such a call fail
 *     (INVALID_ARGUMENT); the other functions must not be given one.
 *  3. Strings are UTF-8 and end in 0. Strings and arrays that a function returns belong to the handle that they were asked of
 *     and live as long as it, unless said otherwise.
 *  4. Structs of options begin with their size: set `struct_size = sizeof(the struct)` and zero the rest (the *_INIT macros do
 *     both). Zero always means the default. Later versions only append fields.
 *  5. Vectors of statistics are float64, one element for each channel.
 *  6. Any thread may use a worker or a master. A round, a pass or an error belongs to one thread at a time, and may outlive
 *     its worker's handle: what it then still waits for ends with CANCELLED (CLOSED).
 *  7. A process that was forked from one that has or had an open worker or master gets FAILED_PRECONDITION (FORKED) at once from
 *     whatever would use the parent's handles or make handles of its own: start it with spawn or forkserver, or exec. Destroying
 *     inherited handles is harmless there. The parent goes on, and its connections end with it, whether or not the child lives.
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

/* Initializes a struct of options: its size, and zeros. C99 and later, C++11 and later. */
#ifdef __cplusplus
#define SYNCBN_SIZED(type)             \
  ([]() {                              \
    type sized = type();               \
    sized.struct_size = sizeof(sized); \
    return sized;                      \
  }())
extern "C" {
#else
#define SYNCBN_SIZED(type) {.struct_size = sizeof(type)}
#endif

/* ---- Versions and errors ---------------------------------------------------------------------------------------- */

/* The interface's own version: a new minor adds, a new major may change. */
#define SYNCBN_API_VERSION_MAJOR 0
#define SYNCBN_API_VERSION_MINOR 1

/* (major << 16) | minor of the library that is loaded. */
SYNCBN_API uint32_t syncbn_api_version(void);
/* "0.1.0". Static. */
SYNCBN_API const char* syncbn_version(void);
/* What this build runs on: "cpu=AVX2 cuda=no", or "cpu=AVX2 cuda=13.0" with the version of CUDA that it was built with. The
 * library needs no driver of NVIDIA's until the first pass over a CUDA tensor. Static. */
SYNCBN_API const char* syncbn_build_info(void);

typedef int32_t syncbn_code; /* As grpc::StatusCode: 0 OK, 1 CANCELLED, 3 INVALID_ARGUMENT, 4 DEADLINE_EXCEEDED, ... */

/* What waiting functions return when their time is up and the round goes on; no gRPC code, and no error is set. */
#define SYNCBN_PENDING ((syncbn_code)-1)

typedef struct syncbn_error syncbn_error;
SYNCBN_API void syncbn_error_destroy(syncbn_error* error);
SYNCBN_API syncbn_code syncbn_error_code(const syncbn_error* error);
/* "WORKER_LOST" and the others that statistics.proto lists; "" where the error is not the master's or the client's own. */
SYNCBN_API const char* syncbn_error_reason(const syncbn_error* error);
SYNCBN_API const char* syncbn_error_message(const syncbn_error* error);
/* The layer concerned, or "". */
SYNCBN_API const char* syncbn_error_layer(const syncbn_error* error);
/* The ranks to blame, ascending. */
SYNCBN_API size_t syncbn_error_ranks(const syncbn_error* error, const uint32_t** ranks);

/* ---- The log ---------------------------------------------------------------------------------------------------- */

/* As Python's logging has them. */
enum { SYNCBN_LOG_DEBUG = 10, SYNCBN_LOG_INFO = 20, SYNCBN_LOG_WARNING = 30, SYNCBN_LOG_ERROR = 40 };

/* Receives one line, without a line end; `message` is valid during the call. Called on whatever thread has something to say,
 * threads of gRPC's among them, several at a time, and with no lock of the library held. It may call the library. */
typedef void (*syncbn_log_function)(int32_t level, const char* message, void* user);

/* Replaces what receives the log of this process. NULL brings back the default: warnings and errors on stderr, one line each.
 * gRPC's own log arrives at DEBUG. Returns when no other thread is within the function before, so that what `user` points to may
 * go; called from within such a function, it returns at once. Any thread may call it at any time, in a forked child too. */
SYNCBN_API void syncbn_set_log(syncbn_log_function function, void* user);

/* A function for syncbn_set_log, for callers that cannot be called from any thread at any time (an interpreter): keeps the newest
 * 256 lines until they are taken. */
SYNCBN_API void syncbn_log_keep(int32_t level, const char* message, void* user);
/* Takes the oldest line that is kept: copies it, cut to `size` bytes with the 0 that ends it, and returns its level; 0 if there is
 * none. With NULL: whether there is one (1 or 0), quickly. */
SYNCBN_API int32_t syncbn_log_take(char* message, size_t size);

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
} syncbn_master_options;
#define SYNCBN_MASTER_OPTIONS_INIT SYNCBN_SIZED(syncbn_master_options)

SYNCBN_API syncbn_code syncbn_master_start(const syncbn_master_options* options, syncbn_master** out,
                                           syncbn_error** error);
/* What workers pass as their target: "127.0.0.1:40123". */
SYNCBN_API const char* syncbn_master_target(const syncbn_master* master);
/* Tells every worker, lets streams drain for at most `grace_ns`, then ends. */
SYNCBN_API void syncbn_master_shutdown(syncbn_master* master, int64_t grace_ns);
/* Shuts down at once if still serving. */
SYNCBN_API void syncbn_master_destroy(syncbn_master* master);

/* ---- A worker: one member of a group ---------------------------------------------------------------------------- */

typedef struct syncbn_worker syncbn_worker;

enum { SYNCBN_MISSING_FAIL = 1, SYNCBN_MISSING_PROCEED = 2 };

/* Writes where the master is, as syncbn_worker_options.target has it, into `buffer`, with a 0 at its end. Returns 0, or a code: the
 * attempt has then failed. Called at each attempt to connect, by a thread that is within a call of this worker, with no lock
 * held; the worker cannot be used from within, and what takes long keeps its threads from hearing interrupts. */
typedef syncbn_code (*syncbn_target_function)(char* buffer, size_t size, void* user);

typedef struct syncbn_worker_options {
  size_t struct_size;
  /* One, or several separated by commas, which are tried in turn: HOST:PORT, unix:PATH, or another name of gRPC's. A host's
   * addresses are asked for at each attempt to connect. Required, unless there is a find_target. */
  const char* target;
  const char* job;    /* Default "default". */
  const char* group;  /* Default "default". */
  uint32_t rank;
  uint32_t world_size; /* Required, at least 1. */
  uint64_t generation;
  int64_t round_timeout_ns; /* Default 10 min. The same for all workers of the group. */
  /* How long to try to reach the master, at first and after a break. So long, too, is waited for a rank that another worker
   * holds, with a warning in the log that says which. Default 30 s. */
  int64_t join_timeout_ns;
  int64_t rejoin_grace_ns;  /* Default 50 ms; negative: none. The same for all workers. */
  int32_t missing_policy;   /* Default FAIL. The same for all workers. */
  uint32_t min_workers;     /* With PROCEED. The same for all workers. */
  const char* description;  /* For people who inspect the group. Default: library, host and process id. */
  const char* trusted_ca_file; /* Any of these three: TLS. */
  const char* cert_file;
  const char* key_file;
  syncbn_target_function find_target; /* If not NULL, what it writes takes the place of `target`. */
  void* find_target_user;             /* Given to it; must live as long as the worker. */
} syncbn_worker_options;
#define SYNCBN_WORKER_OPTIONS_INIT SYNCBN_SIZED(syncbn_worker_options)

/* Connects and joins; returns when the master has answered. */
SYNCBN_API syncbn_code syncbn_worker_join(const syncbn_worker_options* options, syncbn_worker** out,
                                          syncbn_error** error);
/* Says goodbye: the worker is not waited for any more. Afterwards every call fails with FAILED_PRECONDITION (LEFT). Waits for
 * stream-ordered passes as syncbn_worker_settle does, and returns its error, the worker having left all the same. */
SYNCBN_API syncbn_code syncbn_worker_leave(syncbn_worker* worker, const char* reason, syncbn_error** error);
/* Breaks the stream off without a leave: the others learn at once that this worker is lost. Whatever is waited for, on any thread,
 * and every later call ends with CANCELLED (CLOSED). Twice is harmless. */
SYNCBN_API void syncbn_worker_close(syncbn_worker* worker);
/* Closes, if that has not been done. No other thread may be within a call of this worker. */
SYNCBN_API void syncbn_worker_destroy(syncbn_worker* worker);

SYNCBN_API uint32_t syncbn_worker_rank(const syncbn_worker* worker);
SYNCBN_API uint32_t syncbn_worker_world_size(const syncbn_worker* worker);
SYNCBN_API uint64_t syncbn_worker_incarnation(const syncbn_worker* worker);
SYNCBN_API uint64_t syncbn_worker_run_id(const syncbn_worker* worker);

/* Waits until every rank of the group is present, or `timeout_ns` has passed: SYNCBN_PENDING. */
SYNCBN_API syncbn_code syncbn_worker_wait_for_members(syncbn_worker* worker, int64_t timeout_ns, syncbn_error** error);

/* Every layer's next automatic sequence, in every phase, becomes `sequence`. After a restart of some workers, all of
 * them call it with one value that is greater than any used before. SYNCBN_NEXT_SEQUENCE is none: INVALID_ARGUMENT. */
SYNCBN_API syncbn_code syncbn_worker_resume_at(syncbn_worker* worker, uint64_t sequence, syncbn_error** error);

/* Ends whatever any thread or CUDA stream waits for with CANCELLED, now: for an interrupt. The worker stays usable. */
SYNCBN_API void syncbn_worker_interrupt(syncbn_worker* worker);

/* Waits until every stream-ordered pass that was started (see below) has its outcome, for at most `timeout_ns` (negative: without
 * a limit): SYNCBN_PENDING. Returns the first failure among them that no call has returned yet, as soon as there is one. Does not
 * wait for the streams. 0 at once where there is no such pass. */
SYNCBN_API syncbn_code syncbn_worker_settle(syncbn_worker* worker, int64_t timeout_ns, syncbn_error** error);

enum { SYNCBN_LAYER_BATCH_NORM = 1, SYNCBN_LAYER_SUM = 2 };
enum { SYNCBN_EPS_ADD = 0, SYNCBN_EPS_CLAMP = 1 };
enum { SYNCBN_NUMERIC_REFUSE = 0, SYNCBN_NUMERIC_PROPAGATE = 1 };

typedef struct syncbn_layer_options {
  size_t struct_size;
  const char* name; /* 1 to 255 bytes. */
  uint32_t channels;
  int32_t kind; /* SYNCBN_LAYER_*; default BATCH_NORM. */
  double eps;   /* As it is: 0 is 0. */
  int32_t eps_mode;
  int32_t numeric_policy;
  int32_t has_momentum; /* 0: the master's running statistics are a cumulative average. */
  double momentum;
  int32_t biased_running_variance;
} syncbn_layer_options;
#define SYNCBN_LAYER_OPTIONS_INIT SYNCBN_SIZED(syncbn_layer_options)

/* Makes the layer known to the master, with the next frame, and again after every reconnect.
 *
 * Declaring it differently later (other channels, another eps) changes it for the rounds that this worker begins from then on.
 * Rounds that were begun before keep the declaration that they were begun under, and a backward round has its forward round's.
 * A round under the new declaration waits until every worker has declared the same and contributed, or for the deadline.
 * Contributions to one sequence under different declarations fail that round for all, at once, with LAYER_SPEC_MISMATCH: change
 * a layer at the same sequence everywhere. Before a round of the layer has completed, a first declaration that differs from the
 * others' is told to all with the same reason. */
SYNCBN_API syncbn_code syncbn_worker_declare_layer(syncbn_worker* worker, const syncbn_layer_options* layer,
                                                   syncbn_error** error);

/* ---- Rounds over plain vectors ---------------------------------------------------------------------------------- */

/* A sequence to be counted by the worker itself: 0, 1, 2, ... for each (layer, phase). The greatest sequence is one less; a round
 * that would be counted after it fails with OUT_OF_RANGE. */
#define SYNCBN_NEXT_SEQUENCE UINT64_MAX

enum { SYNCBN_BACKWARD_REQUIRED = 1, SYNCBN_BACKWARD_IF_REQUIRED = 2, SYNCBN_BACKWARD_NONE = 3 };

typedef struct syncbn_round syncbn_round;

/* Begins a round; the vectors are copied. It is sent with the next wait or flush, in one frame with all that is ready then.
 * Moments: `mean` and `m2` of `channels` elements each (NULL if count is 0). */
SYNCBN_API syncbn_code syncbn_round_start_forward(syncbn_worker* worker, const char* layer, uint64_t sequence,
                                                  int64_t count, const double* mean, const double* m2,
                                                  size_t channels, int32_t backward_role, syncbn_round** out,
                                                  syncbn_error** error);
SYNCBN_API syncbn_code syncbn_round_start_backward(syncbn_worker* worker, const char* layer, uint64_t sequence,
                                                   const double* sum_dy, const double* sum_dy_xmu, size_t channels,
                                                   syncbn_round** out, syncbn_error** error);
/* Vectors of any length: long ones are sent in pieces. */
SYNCBN_API syncbn_code syncbn_round_start_sum(syncbn_worker* worker, const char* name, uint64_t sequence,
                                              const double* value, size_t length, syncbn_round** out,
                                              syncbn_error** error);
/* Sends what is ready without waiting. */
SYNCBN_API syncbn_code syncbn_worker_flush(syncbn_worker* worker, syncbn_error** error);

/* Waits for the outcome for at most `timeout_ns` (negative: until there is one; there always is, see round_timeout).
 * SYNCBN_PENDING: not yet, ask again. Any other code but 0 is the round's outcome, and stays. A wait of 20 ms or more, where
 * no second thread has used the worker, promises the master that nothing else will come meanwhile: so it finds deadlocks. */
SYNCBN_API syncbn_code syncbn_round_wait(syncbn_round* round, int64_t timeout_ns, syncbn_error** error);
SYNCBN_API uint64_t syncbn_round_sequence(const syncbn_round* round);
/* Of a round that completed. Forward: mean and var (biased); backward: sum_dy and sum_dy_xmu; sum: the vector, and NULL. */
SYNCBN_API int64_t syncbn_round_count(const syncbn_round* round);
SYNCBN_API size_t syncbn_round_length(const syncbn_round* round);
SYNCBN_API const double* syncbn_round_first(const syncbn_round* round);
SYNCBN_API const double* syncbn_round_second(const syncbn_round* round);
SYNCBN_API int32_t syncbn_round_backward_required(const syncbn_round* round);
SYNCBN_API size_t syncbn_round_missing_ranks(const syncbn_round* round, const uint32_t** ranks);
/* A round that is destroyed while pending still counts for the others. */
SYNCBN_API void syncbn_round_destroy(syncbn_round* round);

/* ---- Batch normalization of tensors ----------------------------------------------------------------------------- */

/* CUDA tensors: every vector of parameters is in device memory too, and all work is enqueued in the caller's stream. Start and
 * finish return once their kernels are enqueued. A pass is of one device and one stream, from the forward pass's start to the
 * backward pass's finish. Errors: FAILED_PRECONDITION for a device that cannot be used and for a stream that is being captured
 * into a graph; INTERNAL for CUDA's own; UNIMPLEMENTED in a build without CUDA.
 *
 * Host-driven passes, the default: the waiting functions wait for the GPU's reduction and for the round, without synchronizing
 * the stream. A round begins within a wait or a flush that finds its reduction complete. Whatever fails, nothing in the stream
 * waits for a round.
 *
 * Stream-ordered passes (syncbn_pass_options.stream_ordered): finish may follow on start at once, without a wait. It enqueues a
 * wait of the stream's in front of its kernels, and the caller runs ahead. A thread of the worker's, started with its first such
 * pass and ended with the worker, begins the round when the reduction is complete, and releases the stream when the round has
 * ended. A backward pass is as its forward pass is.
 *  - The stream goes on whatever becomes of the round. After a failure, a deadline, syncbn_worker_interrupt or
 *    syncbn_worker_destroy, y, dx and the gradients of weight and bias are NaN, running statistics are left as they are, and the
 *    worker's passes whose rounds have not begun fail as well. The error, the one that a wait would return, is returned once, by
 *    the worker's next syncbn_forward_start or syncbn_backward_start of CUDA tensors, syncbn_round_start_sum,
 *    syncbn_worker_settle or syncbn_worker_leave. What the program computes until then is NaN, an optimizer's step included: who
 *    wants to go on after a failure calls syncbn_worker_settle before keeping anything.
 *  - What functions tell of a pass after a wait, they tell after a wait only, which waits on the host as ever.
 *  - syncbn_forward_stream_ordered tells which passes are host-driven all the same: those of a batch with fewer than two values
 *    in each channel (so that a global count of 0 or 1 is known before anything follows from it), of the role IF_REQUIRED, of a
 *    worker with the policy PROCEED, and of a device for which syncbn_stream_order_check fails.
 *  - Deadlocks are found by their deadline, not at once. Two workers of one group that share a GPU in one process should not both
 *    be stream-ordered: the GPU may queue the work of one behind the other's wait, until the deadline. */

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
  int32_t device_index; /* Of a CUDA device. */
} syncbn_tensor;

/* A vector of parameters of one of the four types; data NULL: absent. On the device of the tensors. */
typedef struct syncbn_vector {
  void* data;
  int32_t type;
} syncbn_vector;

typedef struct syncbn_pass_options {
  size_t struct_size;
  int32_t num_threads;   /* For CPU tensors. Default 1. */
  void* stream;          /* For CUDA tensors: a cudaStream_t that the work is ordered in. NULL: the legacy default. */
  int32_t backward_role; /* Forward passes: SYNCBN_BACKWARD_*; default REQUIRED. */
  uint64_t sequence_plus_one; /* 0: the worker counts. Else the sequence is one less. */
  int32_t stream_ordered;     /* Forward passes over CUDA tensors; see above. */
  /* Backward passes: not 0: not the first through this forward pass. Every worker goes back as often, and in the same order where
   * a layer has several forward passes. The results are those of a first one, bit for bit. */
  int64_t again;
} syncbn_pass_options;
#define SYNCBN_PASS_OPTIONS_INIT SYNCBN_SIZED(syncbn_pass_options)

/* 0 if passes on this CUDA device can be stream-ordered; else the error says why they are host-driven: FAILED_PRECONDITION, or
 * UNIMPLEMENTED in a build without CUDA. Loads the kernels when a process first asks for a device. */
SYNCBN_API syncbn_code syncbn_stream_order_check(int32_t device_index, syncbn_error** error);

/* A forward pass through one layer. It keeps what the backward pass needs (the merged statistics, float64, per channel), never
 * a tensor; the caller keeps x alive until it has finished. start -> wait -> finish, then any number of backward passes. */
typedef struct syncbn_forward syncbn_forward;

/* Reduces x to its moments and begins the round. `layer` must have been declared (eps and its mode are taken from there). */
SYNCBN_API syncbn_code syncbn_forward_start(syncbn_worker* worker, const char* layer, const syncbn_tensor* x,
                                            const syncbn_pass_options* options, syncbn_forward** out,
                                            syncbn_error** error);
/* As syncbn_round_wait. */
SYNCBN_API syncbn_code syncbn_forward_wait(syncbn_forward* forward, int64_t timeout_ns, syncbn_error** error);

typedef struct syncbn_forward_outputs {
  size_t struct_size;
  syncbn_vector weight;       /* Read. Absent: 1. */
  syncbn_vector bias;         /* Read. Absent: 0. */
  syncbn_vector running_mean; /* Updated in place, if present, unless the global count is 0. */
  syncbn_vector running_var;  /* Likewise; unbiased unless the layer says otherwise; unchanged if it has no value. */
  double momentum;            /* The new value's weight in the running statistics (the caller resolves averages). */
  const void* residual;       /* Of x's shape, type and layout: added before the activation. */
  int32_t relu;
  uint8_t* relu_mask; /* (size+7)/8 bytes; required with relu and a residual if a backward pass follows. */
  syncbn_tensor y;    /* Written; of x's shape, type and layout; y.data may be x's or the residual's. */
} syncbn_forward_outputs;
#define SYNCBN_FORWARD_OUTPUTS_INIT SYNCBN_SIZED(syncbn_forward_outputs)

/* Normalizes x with the round's result. The forward pass must have been waited for, successfully, or be stream-ordered. */
SYNCBN_API syncbn_code syncbn_forward_finish(syncbn_forward* forward, const syncbn_tensor* x,
                                             const syncbn_forward_outputs* outputs, syncbn_error** error);
/* The rest is known after a successful wait; before it, 0 and NULL. */
SYNCBN_API uint64_t syncbn_forward_sequence(const syncbn_forward* forward);
SYNCBN_API int64_t syncbn_forward_count(const syncbn_forward* forward);
SYNCBN_API const double* syncbn_forward_mean(const syncbn_forward* forward);
SYNCBN_API const double* syncbn_forward_var(const syncbn_forward* forward);
/* Whether a backward round follows, in which this worker must then take part (unless its role was NONE). */
SYNCBN_API int32_t syncbn_forward_backward_required(const syncbn_forward* forward);
/* Whether it is stream-ordered: known from the start. */
SYNCBN_API int32_t syncbn_forward_stream_ordered(const syncbn_forward* forward);
SYNCBN_API void syncbn_forward_destroy(syncbn_forward* forward);

typedef struct syncbn_backward syncbn_backward;

typedef struct syncbn_backward_inputs {
  size_t struct_size;
  syncbn_tensor dy;
  const void* x;        /* Of dy's shape, type and layout, as in the forward pass. */
  syncbn_vector weight; /* As in the forward pass. */
  syncbn_vector bias;   /* As in the forward pass; read only to gate a ReLU without a mask. */
  int32_t relu;
  const uint8_t* relu_mask;
} syncbn_backward_inputs;
#define SYNCBN_BACKWARD_INPUTS_INIT SYNCBN_SIZED(syncbn_backward_inputs)

typedef struct syncbn_backward_outputs {
  size_t struct_size;
  void* dx;         /* Of dy's shape, type and layout; may be dy.data. NULL: not wanted. */
  void* d_residual; /* Likewise. */
  syncbn_vector d_weight; /* This worker's own, not summed over workers. Absent: not wanted. */
  syncbn_vector d_bias;
} syncbn_backward_outputs;
#define SYNCBN_BACKWARD_OUTPUTS_INIT SYNCBN_SIZED(syncbn_backward_outputs)

/* Reduces dy to its two sums and begins the backward round (none, if no worker requires it or this one's contribution did not
 * count: wait then returns 0 at once). The forward pass may be destroyed afterwards. */
SYNCBN_API syncbn_code syncbn_backward_start(const syncbn_forward* forward, const syncbn_backward_inputs* inputs,
                                             const syncbn_pass_options* options, syncbn_backward** out,
                                             syncbn_error** error);
SYNCBN_API syncbn_code syncbn_backward_wait(syncbn_backward* backward, int64_t timeout_ns, syncbn_error** error);
SYNCBN_API syncbn_code syncbn_backward_finish(syncbn_backward* backward, const syncbn_backward_inputs* inputs,
                                              const syncbn_backward_outputs* outputs, syncbn_error** error);
SYNCBN_API void syncbn_backward_destroy(syncbn_backward* backward);

/* Evaluation: no worker, no round. y from x with given statistics; invstd by eps and its mode (CLAMP adds eps in evaluation,
 * as the original does). */
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
/* The gradient of the same, with the statistics constant. `inputs` and `outputs` as in a backward pass. */
SYNCBN_API syncbn_code syncbn_evaluate_backward(const syncbn_backward_inputs* inputs,
                                                const syncbn_evaluate_options* options,
                                                const syncbn_backward_outputs* outputs, syncbn_error** error);

#ifdef __cplusplus
} /* extern "C" */
#endif

#endif /* SYNCBN_CLIENT_C_SYNCBN_H_ */
