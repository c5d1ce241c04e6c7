// The calls that a pass makes, as functions of Python: its objects in, its objects out, in a tenth of the time of
// ctypes.
//
// The functions of Python that this takes are of its stable interface (PEP 384), which every CPython from 3.9 on has.
// They are given by address, so that the library is linked with no Python, and built without one.

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "client/c/syncbn.h"

namespace {

struct Object;       // PyObject.
struct ThreadState;  // PyThreadState.

using Method = Object* (*)(Object* self, Object* const* given, intptr_t count);

// PyMethodDef, with METH_FASTCALL.
struct MethodDef {
  const char* name;
  Method method;
  int flags;
  const char* text;
};
constexpr int kFastCall = 0x80;

// In the order of _PYTHON in client/python/syncbn/_calls.py.
struct Python {
  void* (*long_as_void_ptr)(Object*);
  Object* (*long_from_void_ptr)(void*);
  int64_t (*long_as_long_long)(Object*);
  Object* (*long_from_long_long)(int64_t);
  char* (*bytes_as_string)(Object*);
  Object* (*err_occurred)();
  int (*err_bad_argument)();
  ThreadState* (*eval_save_thread)();
  void (*eval_restore_thread)(ThreadState*);
  Object* (*object_call_function_obj_args)(Object*, ...);
  void (*dec_ref)(Object*);
  Object* (*function_new)(MethodDef*, Object* self, Object* module);
};
Python python;  // The same at every call of syncbn_python_function, since a process has one.

// Reads a call's arguments from the first to the last.
class Arguments {
 public:
  Arguments(Object* const* given, intptr_t count) : next_(given), end_(given + count) {}

  template <typename Handle>
  Handle* Address() {
    Object* const object = Next();
    return object == nullptr ? nullptr : static_cast<Handle*>(python.long_as_void_ptr(object));
  }

  template <typename Struct>
  const Struct* Bytes() {
    Object* const object = Next();
    return object == nullptr ? nullptr : reinterpret_cast<const Struct*>(python.bytes_as_string(object));
  }

  int64_t Number() {
    Object* const object = Next();
    return object == nullptr ? 0 : python.long_as_long_long(object);
  }

  // Returns true if there were as many as have been read, each of its type. Else an exception is set.
  bool Done() {
    if (python.err_occurred() != nullptr) return false;
    if (next_ == end_ && !missing_) return true;
    python.err_bad_argument();
    return false;
  }

 private:
  Object* Next() {
    // A conversion that has failed has set an exception, which the next one would hide.
    missing_ = missing_ || next_ == end_;
    return missing_ || python.err_occurred() != nullptr ? nullptr : *next_++;
  }

  Object* const* next_;
  Object* const* const end_;
  bool missing_ = false;
};

// Calls a function without the interpreter's lock.
template <typename Function>
auto Unlocked(Function function) {
  ThreadState* const state = python.eval_save_thread();
  const auto result = function();
  python.eval_restore_thread(state);
  return result;
}

// Raises the exception for a failed call by `raise`, which takes the code and the error, and owns that. Returns null.
Object* Raise(Object* raise, syncbn_code code, syncbn_error* error) {
  Object* const code_object = python.long_from_long_long(code);
  Object* const error_object = python.long_from_void_ptr(error);
  if (code_object != nullptr && error_object != nullptr) {
    Object* const result = python.object_call_function_obj_args(raise, code_object, error_object, nullptr);
    if (result != nullptr) {
      python.dec_ref(result);
      python.err_bad_argument();
    }
  }
  if (code_object != nullptr) python.dec_ref(code_object);
  if (error_object != nullptr) python.dec_ref(error_object);
  return nullptr;
}

// (worker, layer, x, options, send) -> the pass. send: the contribution goes out at once.
Object* ForwardStart(Object* self, Object* const* given, intptr_t count) {
  Arguments arguments(given, count);
  auto* const worker = arguments.Address<syncbn_worker>();
  const auto* const layer = arguments.Bytes<char>();
  const auto* const x = arguments.Bytes<syncbn_tensor>();
  const auto* const options = arguments.Bytes<syncbn_pass_options>();
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
  return code == 0 ? python.long_from_void_ptr(pass) : Raise(self, code, error);
}

// (forward, inputs, options) -> the pass.
Object* BackwardStart(Object* self, Object* const* given, intptr_t count) {
  Arguments arguments(given, count);
  auto* const forward = arguments.Address<syncbn_forward>();
  const auto* const inputs = arguments.Bytes<syncbn_backward_inputs>();
  const auto* const options = arguments.Bytes<syncbn_pass_options>();
  if (!arguments.Done()) return nullptr;
  syncbn_backward* pass = nullptr;
  syncbn_error* error = nullptr;
  const syncbn_code code = Unlocked([&] { return syncbn_backward_start(forward, inputs, options, &pass, &error); });
  return code == 0 ? python.long_from_void_ptr(pass) : Raise(self, code, error);
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
  return code == 0 || code == SYNCBN_PENDING ? python.long_from_long_long(code) : Raise(self, code, error);
}

// (pass, inputs, outputs) -> 0.
template <typename Pass, typename Inputs, typename Outputs,
          syncbn_code (*kFinish)(Pass*, const Inputs*, const Outputs*, syncbn_error**)>
Object* Finish(Object* self, Object* const* given, intptr_t count) {
  Arguments arguments(given, count);
  auto* const pass = arguments.Address<Pass>();
  const auto* const inputs = arguments.Bytes<Inputs>();
  const auto* const outputs = arguments.Bytes<Outputs>();
  if (!arguments.Done()) return nullptr;
  syncbn_error* error = nullptr;
  const syncbn_code code = Unlocked([&] { return kFinish(pass, inputs, outputs, &error); });
  return code == 0 ? python.long_from_long_long(0) : Raise(self, code, error);
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
  return python.long_from_long_long(0);
}

// (forward) -> a number that is known once the pass has been waited for.
template <typename Number, Number (*kGet)(const syncbn_forward*)>
Object* Get(Object*, Object* const* given, intptr_t count) {
  Arguments arguments(given, count);
  const auto* const forward = arguments.Address<const syncbn_forward>();
  if (!arguments.Done()) return nullptr;
  return python.long_from_long_long(kGet(forward));
}

// () -> 1 if there is a line to take, else 0.
Object* HasLog(Object*, Object* const* given, intptr_t count) {
  if (!Arguments(given, count).Done()) return nullptr;
  return python.long_from_long_long(syncbn_log_take(nullptr, 0));
}

MethodDef methods[] = {
    {"forward_start", ForwardStart, kFastCall, nullptr},
    {"forward_wait", Wait<syncbn_forward, syncbn_forward_wait>, kFastCall, nullptr},
    {"forward_finish", Finish<syncbn_forward, syncbn_tensor, syncbn_forward_outputs, syncbn_forward_finish>, kFastCall,
     nullptr},
    {"forward_count", Get<int64_t, syncbn_forward_count>, kFastCall, nullptr},
    {"forward_backward_required", Get<int32_t, syncbn_forward_backward_required>, kFastCall, nullptr},
    {"forward_destroy", Destroy<syncbn_forward, syncbn_forward_destroy>, kFastCall, nullptr},
    {"backward_start", BackwardStart, kFastCall, nullptr},
    {"backward_wait", Wait<syncbn_backward, syncbn_backward_wait>, kFastCall, nullptr},
    {"backward_finish",
     Finish<syncbn_backward, syncbn_backward_inputs, syncbn_backward_outputs, syncbn_backward_finish>, kFastCall,
     nullptr},
    {"backward_destroy", Destroy<syncbn_backward, syncbn_backward_destroy>, kFastCall, nullptr},
    {"has_log", HasLog, kFastCall, nullptr},
};

}  // namespace

void* syncbn_python_function(const void* const* given, size_t count, const char* name, void* raise) {
  static_assert(sizeof(Python) % sizeof(void*) == 0);
  if (count != sizeof(Python) / sizeof(void*)) return nullptr;
  std::memcpy(&python, given, sizeof(Python));
  for (MethodDef& method : methods) {
    if (std::strcmp(method.name, name) != 0) continue;
    return python.function_new(&method, static_cast<Object*>(raise), nullptr);
  }
  return nullptr;
}
