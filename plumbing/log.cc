#include "plumbing/log.h"

#include <pthread.h>
#include <unistd.h>

#include <memory>
#include <mutex>
#include <string>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "grpc/support/log.h"

namespace syncbn {
namespace {

// The number of sinks that this thread is within.
thread_local int t_depth = 0;

struct Sink {
  LogRecordSink function;
  int callers = 0;  // Calls that have not returned.
};

struct State {
  std::mutex mutex;
  // A thread has left a sink. pthread's, since std::condition_variable::wait would need a newer libstdc++ than some
  // hosts of the wheel have.
  pthread_cond_t left = PTHREAD_COND_INITIALIZER;
  std::shared_ptr<Sink> sink;
};

State& TheState();

void LockForFork() { TheState().mutex.lock(); }
void UnlockInParent() { TheState().mutex.unlock(); }

// A forked child has only one of the threads within the sink: the one that forked.
void UnlockInChild() {
  State& state = TheState();
  if (state.sink != nullptr) state.sink->callers = t_depth;
  state.left = PTHREAD_COND_INITIALIZER;
  state.mutex.unlock();
}

// Never destroyed: threads log until the process has ended.
State& TheState() {
  static State* const state = new State();
  static const int registered = pthread_atfork(LockForFork, UnlockInParent, UnlockInChild);
  (void)registered;
  return *state;
}

const char* NameOf(LogLevel level) {
  switch (level) {
    case LogLevel::kDebug:
      return "debug";
    case LogLevel::kInfo:
      return "info";
    case LogLevel::kWarning:
      return "warning";
    case LogLevel::kError:
      return "error";
  }
  return "log";
}

// Writes a line at once, so that lines of several threads do not mix.
void WriteToStderr(LogLevel level, absl::string_view line) {
  if (level < LogLevel::kWarning) return;
  const std::string text = absl::StrCat("syncbn: ", NameOf(level), ": ", line, "\n");
  const ssize_t written = write(STDERR_FILENO, text.data(), text.size());
  (void)written;  // There is nobody to tell.
}

std::string Printable(absl::string_view line) {
  std::string text(line);
  for (char& c : text) {
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) c = '?';
  }
  return text;
}

// Tells why gRPC is about to end the process, for which a sink may have no time left.
void FromGrpc(gpr_log_func_args* arguments) {
  const absl::string_view message = arguments->message;
  if (absl::StartsWith(message, "assertion failed")) {
    WriteToStderr(LogLevel::kError, absl::StrCat("gRPC ends this process: ", Printable(message)));
  }
  Log(LogLevel::kDebug, absl::StrCat("gRPC: ", message));
}

}  // namespace

void SetLogSink(LogSink function) {
  if (function == nullptr) return SetLogRecordSink(nullptr);
  SetLogRecordSink([function = std::move(function)](const LogRecord& record) { function(record.level, record.text); });
}

void SetLogRecordSink(LogRecordSink function) {
  RouteGrpcLog();
  State& state = TheState();
  std::shared_ptr<Sink> sink;
  if (function != nullptr) sink = std::make_shared<Sink>(Sink{std::move(function)});
  std::unique_lock<std::mutex> lock(state.mutex);
  state.sink.swap(sink);
  // A thread that is within a sink would wait for itself, or for another thread that waits for it.
  if (sink == nullptr || t_depth != 0) return;
  while (sink->callers != 0) pthread_cond_wait(&state.left, state.mutex.native_handle());
}

void Log(LogLevel level, absl::string_view line, absl::Span<const LogField> fields) {
  State& state = TheState();
  std::shared_ptr<Sink> sink;
  {
    const std::lock_guard<std::mutex> lock(state.mutex);
    sink = state.sink;
    if (sink != nullptr) ++sink->callers;
  }
  const std::string text = Printable(line);
  if (sink == nullptr) return WriteToStderr(level, text);
  ++t_depth;
  sink->function({level, text, fields});
  --t_depth;
  const std::lock_guard<std::mutex> lock(state.mutex);
  --sink->callers;
  pthread_cond_broadcast(&state.left);
}

void RouteGrpcLog() {
  static const bool routed = [] {
    gpr_set_log_function(FromGrpc);
    return true;
  }();
  (void)routed;
}

}  // namespace syncbn
