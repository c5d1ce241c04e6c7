// The calls that a pass makes, as functions of Python: its objects in, its objects out, in a tenth of the time of
// ctypes.

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <type_traits>

#include "client/c/python.h"
#include "client/c/syncbn.h"

namespace syncbn::python {

Functions functions;

namespace {

// Reads a call's arguments from the first to the last.
class Arguments {
 public:
  Arguments(Object* const* given, intptr_t count) : next_(given), end_(given + count) {}

  template <typename Handle>
  Handle* Address() {
    Object* const object = Next();
    return object == nullptr ? nullptr : static_cast<Handle*>(functions.long_as_void_ptr(object));
  }

  // Text, which ends with a 0.
  const char* Text() {
    intptr_t size = 0;
    return Bytes(&size);
  }

  // A struct from its bytes, which have to be as many as it says, or as it is known to have.
  template <typename Struct>
  const Struct* Packed() {
    intptr_t size = 0;
    const char* const bytes = Bytes(&size);
    if (bytes == nullptr) return nullptr;
    size_t needed = sizeof(Struct);
    if constexpr (!std::is_same_v<Struct, syncbn_tensor>) {
      needed = sizeof(size_t);
      if (static_cast<size_t>(size) >= needed) std::memcpy(&needed, bytes, sizeof(needed));
    }
    if (static_cast<size_t>(size) < needed) functions.err_bad_argument();
    return reinterpret_cast<const Struct*>(bytes);
  }

  Object* List() {
    Object* const object = Next();
    if (object != nullptr && functions.list_size(object) < 0) functions.err_bad_argument();
    return object;
  }

  int64_t Number() {
    Object* const object = Next();
    return object == nullptr ? 0 : functions.long_as_long_long(object);
  }

  // Returns true if there were as many as have been read, each of its type. Else an exception is set.
  bool Done() {
    if (functions.err_occurred() != nullptr) return false;
    if (next_ == end_ && !missing_) return true;
    functions.err_bad_argument();
    return false;
  }

 private:
  const char* Bytes(intptr_t* size) {
    Object* const object = Next();
    char* bytes = nullptr;
    return object == nullptr || functions.bytes_as_string_and_size(object, &bytes, size) != 0 ? nullptr : bytes;
  }

  Object* Next() {
    // A conversion that has failed has set an exception, which the next one would hide.
    missing_ = missing_ || next_ == end_;
    return missing_ || functions.err_occurred() != nullptr ? nullptr : *next_++;
  }

  Object* const* next_;
  Object* const* const end_;
  bool missing_ = false;
};

// Calls a function without the interpreter's lock.
template <typename Function>
auto Unlocked(Function function) {
  ThreadState* const state = functions.eval_save_thread();
  const auto result = function();
  functions.eval_restore_thread(state);
  return result;
}

// Calls `attend`, which delivers the log and, unless the code is 0, raises the exception for a failed call. It owns the
// error. Returns true if there is no exception.
bool Attend(Object* attend, syncbn_code code, syncbn_error* error) {
  Object* const code_object = functions.long_from_long_long(code);
  Object* const error_object = functions.long_from_void_ptr(error);
  Object* result = nullptr;
  if (code_object != nullptr && error_object != nullptr) {
    result = functions.object_call_function_obj_args(attend, code_object, error_object, nullptr);
  } else {
    syncbn_error_destroy(error);
  }
  for (Object* const object : {code_object, error_object, result}) {
    if (object != nullptr) functions.dec_ref(object);
  }
  return result != nullptr;
}

// Raises the exception for a failed call. Returns null.
Object* Raise(Object* attend, syncbn_code code, syncbn_error* error) {
  if (Attend(attend, code, error)) functions.err_bad_argument();
  return nullptr;
}

// Returns a pass's address as an object, and destroys the pass if there is no memory for one.
template <typename Pass>
Object* Made(Pass* pass, void (*destroy)(Pass*)) {
  Object* const object = functions.long_from_void_ptr(pass);
  if (object == nullptr) destroy(pass);
  return object;
}

// The time that a thread waits for a round.
class Stopwatch {
 public:
  template <typename Wait>
  syncbn_code Measure(Wait wait) {
    const auto begun = std::chrono::steady_clock::now();
    const syncbn_code code = wait();
    const std::chrono::nanoseconds waited = std::chrono::steady_clock::now() - begun;
    ended_ = code != SYNCBN_PENDING;
    nanoseconds_ = code == 0 ? waited.count() : ~waited.count();
    return code;
  }

  // Appends the nanoseconds to a list, or ~nanoseconds if the round has failed; nothing if it goes on. Returns false
  // with an exception.
  bool AppendTo(Object* list) const {
    if (!ended_) return true;
    Object* const number = functions.long_from_long_long(nanoseconds_);
    if (number == nullptr) return false;
    const bool appended = functions.list_append(list, number) == 0;
    functions.dec_ref(number);
    return appended;
  }

 private:
  bool ended_ = false;
  int64_t nanoseconds_ = 0;
};

// Ends a wait: records its time and delivers the log, or raises the error, which it owns. Returns true if there
// is no exception.
bool Settle(Object* attend, const Stopwatch& stopwatch, Object* waits, syncbn_code code, syncbn_error* error) {
  if (!stopwatch.AppendTo(waits)) {
    syncbn_error_destroy(error);
    return false;
  }
  if (code != 0 && code != SYNCBN_PENDING) return Raise(attend, code, error) != nullptr;
  return syncbn_log_take(nullptr, 0) == 0 || Attend(attend, 0, nullptr);
}

// (worker, layer, x, options, send) -> the pass. send: the contribution goes out at once.
Object* ForwardStart(Object* self, Object* const* given, intptr_t count) {
  Arguments arguments(given, count);
  auto* const worker = arguments.Address<syncbn_worker>();
  const auto* const layer = arguments.Text();
  const auto* const x = arguments.Packed<syncbn_tensor>();
  const auto* const options = arguments.Packed<syncbn_pass_options>();
  const bool send = arguments.Number() != 0;
  if (!arguments.Done()) return nullptr;
  syncbn_forward* pass = nullptr;
  syncbn_error* error = nullptr;
  const syncbn_code code = Unlocked([&] {
    const syncbn_code started = syncbn_forward_start(worker, layer, x, options, &pass, &error);
    if (started != 0 || !send) return started;
    const syncbn_code sent = syncbn_worker_flush(worker, &error);
    if (sent != 0) syncbn_forward_destroy(pass);
    return sent;
  });
  return code == 0 ? Made(pass, syncbn_forward_destroy) : Raise(self, code, error);
}

// (pass, timeout_ns, x, outputs, waits, ended) -> the number of values in each channel, or SYNCBN_PENDING. The wait
// and, from two values on, the finish. That number is then appended to the list `ended`, whatever comes between this
// and the caller, as Ctrl-C does.
Object* ForwardEnd(Object* self, Object* const* given, intptr_t count) {
  Arguments arguments(given, count);
  auto* const pass = arguments.Address<syncbn_forward>();
  const int64_t timeout_ns = arguments.Number();
  const auto* const x = arguments.Packed<syncbn_tensor>();
  const auto* const outputs = arguments.Packed<syncbn_forward_outputs>();
  Object* const waits = arguments.List();
  Object* const ended = arguments.List();
  if (!arguments.Done()) return nullptr;
  syncbn_error* error = nullptr;
  int64_t values = 0;
  Stopwatch stopwatch;
  const syncbn_code code = Unlocked([&] {
    const syncbn_code waited = stopwatch.Measure([&] { return syncbn_forward_wait(pass, timeout_ns, &error); });
    if (waited != 0) return waited;
    values = syncbn_forward_count(pass);
    return values < 2 ? 0 : syncbn_forward_finish(pass, x, outputs, &error);
  });
  Reference result(functions.long_from_long_long(code == 0 ? values : code));
  const bool written = code == 0 && values >= 2 && result.get() != nullptr;
  if (result.get() == nullptr || (written && functions.list_append(ended, result.get()) != 0)) {
    syncbn_error_destroy(error);
    return nullptr;
  }
  return Settle(self, stopwatch, waits, code, error) ? result.release() : nullptr;
}

// (forward, inputs, options, outputs, timeout_ns, waits) -> 0, or the pass if its round goes on. The start, the wait
// unless timeout_ns is negative, and the finish.
Object* Backward(Object* self, Object* const* given, intptr_t count) {
  Arguments arguments(given, count);
  auto* const forward = arguments.Address<syncbn_forward>();
  const auto* const inputs = arguments.Packed<syncbn_backward_inputs>();
  const auto* const options = arguments.Packed<syncbn_pass_options>();
  const auto* const outputs = arguments.Packed<syncbn_backward_outputs>();
  const int64_t timeout_ns = arguments.Number();
  Object* const waits = arguments.List();
  if (!arguments.Done()) return nullptr;
  syncbn_backward* pass = nullptr;
  syncbn_error* error = nullptr;
  Stopwatch stopwatch;
  const syncbn_code code = Unlocked([&] {
    syncbn_code done = syncbn_backward_start(forward, inputs, options, &pass, &error);
    if (done != 0) return done;
    if (timeout_ns >= 0) done = stopwatch.Measure([&] { return syncbn_backward_wait(pass, timeout_ns, &error); });
    if (done == 0) done = syncbn_backward_finish(pass, inputs, outputs, &error);
    if (done == SYNCBN_PENDING) return done;
    syncbn_backward_destroy(pass);
    pass = nullptr;
    return done;
  });
  if (Settle(self, stopwatch, waits, code, error)) return Made(pass, syncbn_backward_destroy);
  syncbn_backward_destroy(pass);
  return nullptr;
}

// (pass, timeout_ns) -> 0, or SYNCBN_PENDING.
template <typename Pass, syncbn_code (*kWait)(Pass*, int64_t, syncbn_error**)>
Object* Wait(Object* self, Object* const* given, intptr_t count) {
  Arguments arguments(given, count);
  auto* const pass = arguments.Address<Pass>();
  const int64_t timeout_ns = arguments.Number();
  if (!arguments.Done()) return nullptr;
  syncbn_error* error = nullptr;
  const syncbn_code code = Unlocked([&] { return kWait(pass, timeout_ns, &error); });
  return code == 0 || code == SYNCBN_PENDING ? functions.long_from_long_long(code) : Raise(self, code, error);
}

// (pass, inputs, outputs) -> 0.
template <typename Pass, typename Inputs, typename Outputs,
          syncbn_code (*kFinish)(Pass*, const Inputs*, const Outputs*, syncbn_error**)>
Object* Finish(Object* self, Object* const* given, intptr_t count) {
  Arguments arguments(given, count);
  auto* const pass = arguments.Address<Pass>();
  const auto* const inputs = arguments.Packed<Inputs>();
  const auto* const outputs = arguments.Packed<Outputs>();
  if (!arguments.Done()) return nullptr;
  syncbn_error* error = nullptr;
  const syncbn_code code = Unlocked([&] { return kFinish(pass, inputs, outputs, &error); });
  return code == 0 ? functions.long_from_long_long(0) : Raise(self, code, error);
}

// (pass) -> 0.
template <typename Pass, void (*kDestroy)(Pass*)>
Object* Destroy(Object*, Object* const* given, intptr_t count) {
  Arguments arguments(given, count);
  auto* const pass = arguments.Address<Pass>();
  if (!arguments.Done()) return nullptr;
  Unlocked([&] {
    kDestroy(pass);
    return 0;
  });
  return functions.long_from_long_long(0);
}

// (forward) -> a number that is known once the pass has been waited for.
template <typename Number, Number (*kGet)(const syncbn_forward*)>
Object* Get(Object*, Object* const* given, intptr_t count) {
  Arguments arguments(given, count);
  const auto* const forward = arguments.Address<const syncbn_forward>();
  if (!arguments.Done()) return nullptr;
  return functions.long_from_long_long(kGet(forward));
}

// () -> 1 if there is a line to take, else 0.
Object* HasLog(Object*, Object* const* given, intptr_t count) {
  if (!Arguments(given, count).Done()) return nullptr;
  return functions.long_from_long_long(syncbn_log_take(nullptr, 0));
}

MethodDef methods[] = {
    {"forward_start", ForwardStart, kFastCall, nullptr},
    {"forward_end", ForwardEnd, kFastCall, nullptr},
    {"forward_wait", Wait<syncbn_forward, syncbn_forward_wait>, kFastCall, nullptr},
    {"forward_finish", Finish<syncbn_forward, syncbn_tensor, syncbn_forward_outputs, syncbn_forward_finish>, kFastCall,
     nullptr},
    {"forward_count", Get<int64_t, syncbn_forward_count>, kFastCall, nullptr},
    {"forward_backward_required", Get<int32_t, syncbn_forward_backward_required>, kFastCall, nullptr},
    {"forward_destroy", Destroy<syncbn_forward, syncbn_forward_destroy>, kFastCall, nullptr},
    {"backward", Backward, kFastCall, nullptr},
    {"backward_wait", Wait<syncbn_backward, syncbn_backward_wait>, kFastCall, nullptr},
    {"backward_finish",
     Finish<syncbn_backward, syncbn_backward_inputs, syncbn_backward_outputs, syncbn_backward_finish>, kFastCall,
     nullptr},
    {"backward_destroy", Destroy<syncbn_backward, syncbn_backward_destroy>, kFastCall, nullptr},
    {"has_log", HasLog, kFastCall, nullptr},
    {"forward_sight", ForwardSight, kFastCall, nullptr},
    {"backward_sight", BackwardSight, kFastCall, nullptr},
};

}  // namespace
}  // namespace syncbn::python

void* syncbn_python_function(const void* const* given, size_t count, const char* name, void* self) {
  namespace python = syncbn::python;
  static_assert(sizeof(python::Functions) % sizeof(void*) == 0);
  if (count != sizeof(python::Functions) / sizeof(void*)) return nullptr;
  std::memcpy(&python::functions, static_cast<const void*>(given), sizeof(python::Functions));
  for (python::MethodDef& method : python::methods) {
    if (std::strcmp(method.name, name) != 0) continue;
    return python::functions.function_new(&method, static_cast<python::Object*>(self), nullptr);
  }
  return nullptr;
}
