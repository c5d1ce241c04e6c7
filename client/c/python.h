// Python as this library sees it: functions of its stable interface (PEP 384), which every CPython from 3.9 on has.
// They are given by address, so that the library is linked with no Python, and built without one.

#ifndef SYNCBN_CLIENT_C_PYTHON_H_
#define SYNCBN_CLIENT_C_PYTHON_H_

#include <cstdint>
#include <utility>

namespace syncbn::python {

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

// In the order of _PYTHON in client/python/syncbn/_calls.py. Functions have Python's names, less their prefix.
struct Functions {
  void* (*long_as_void_ptr)(Object*);
  Object* (*long_from_void_ptr)(void*);
  int64_t (*long_as_long_long)(Object*);
  Object* (*long_from_long_long)(int64_t);
  int (*bytes_as_string_and_size)(Object*, char**, intptr_t*);
  Object* (*bytes_from_string_and_size)(const char*, intptr_t);
  intptr_t (*list_size)(Object*);
  int (*list_append)(Object*, Object*);
  intptr_t (*tuple_size)(Object*);
  Object* (*tuple_get_item)(Object*, intptr_t);
  Object* (*dict_get_item)(Object*, Object*);
  Object* (*build_value)(const char* format, ...);
  Object* (*err_occurred)();
  int (*err_exception_matches)(Object* type);
  void (*err_clear)();
  int (*err_bad_argument)();
  ThreadState* (*eval_save_thread)();
  void (*eval_restore_thread)(ThreadState*);
  Object* (*object_type)(Object*);
  Object* (*object_get_attr)(Object*, Object* name);
  int (*object_is_true)(Object*);
  Object* (*object_call)(Object*, Object* arguments, Object* keywords);
  Object* (*object_call_function_obj_args)(Object*, ...);
  void (*dec_ref)(Object*);
  Object* (*function_new)(MethodDef*, Object* self, Object* module);
};
extern Functions functions;  // The same at every call of syncbn_python_function, since a process has one Python.

// An object of one's own, or none.
class Reference {
 public:
  explicit Reference(Object* owned) : object_(owned) {}
  Reference(const Reference&) = delete;
  Reference& operator=(const Reference&) = delete;
  ~Reference() {
    if (object_ != nullptr) functions.dec_ref(object_);
  }

  Object* get() const { return object_; }
  Object* release() { return std::exchange(object_, nullptr); }
  void reset(Object* owned) {
    if (object_ != nullptr) functions.dec_ref(object_);
    object_ = owned;
  }

 private:
  Object* object_;
};

// Descriptions of torch's tensors; see python_tensors.cc.
Object* ForwardSight(Object* self, Object* const* given, intptr_t count);
Object* BackwardSight(Object* self, Object* const* given, intptr_t count);

}  // namespace syncbn::python

#endif  // SYNCBN_CLIENT_C_PYTHON_H_
