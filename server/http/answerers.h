// The threads that answer requests of HTTP.

#ifndef SYNCBN_SERVER_HTTP_ANSWERERS_H_
#define SYNCBN_SERVER_HTTP_ANSWERERS_H_

#include <cstdint>
#include <functional>
#include <list>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "server/http/answer.h"
#include "server/http/request.h"

namespace syncbn::http {

// Answers ask the master and wait for it, on threads of their own. Probes have a thread to themselves, and those of one
// path that wait together get one answer, so that neither pages nor other probes hold one up.
//
// Thread safety: Start and Stop from one thread, the others from any.
class Answerers {
 public:
  // Returns the answer to a request. Called on several threads.
  using Make = std::function<Answer(const Request& request)>;
  // Takes the answer to the request of this number. Called on several threads.
  using Deliver = std::function<void(uint64_t id, const Answer& answer)>;

  Answerers(Make make, Deliver deliver);
  // Stop() must have been called if Start() was.
  ~Answerers() = default;
  Answerers(const Answerers&) = delete;
  Answerers& operator=(const Answerers&) = delete;

  // Errors: RESOURCE_EXHAUSTED if the system grants too few threads.
  absl::Status Start();
  // Ends the threads, once they have answered what they are about to answer.
  void Stop();

  void Add(uint64_t id, Request request);
  // Forgets a request that nobody has begun to answer.
  void Forget(uint64_t id);

 private:
  struct Waiting {
    uint64_t id;
    Request request;
  };
  using Queue = std::list<Waiting>;

  void Run(Queue* queue);
  // Waits for requests that have the same answer. Returns none if the threads are to end.
  Queue Take(Queue* queue);

  const Make make_;
  const Deliver deliver_;
  absl::Mutex mutex_;
  Queue probes_ ABSL_GUARDED_BY(mutex_);
  Queue others_ ABSL_GUARDED_BY(mutex_);
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  std::vector<std::thread> threads_;
};

}  // namespace syncbn::http

#endif  // SYNCBN_SERVER_HTTP_ANSWERERS_H_
