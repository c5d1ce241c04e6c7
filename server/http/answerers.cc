#include "server/http/answerers.h"

#include <iterator>
#include <utility>

#include "plumbing/start_thread.h"
#include "server/http/routes.h"

namespace syncbn::http {
namespace {

// Threads for what is no probe. The master's loop answers one call at a time.
constexpr int kThreads = 4;

}  // namespace

Answerers::Answerers(Make make, Deliver deliver) : make_(std::move(make)), deliver_(std::move(deliver)) {}

absl::Status Answerers::Start() {
  threads_.resize(1 + kThreads);
  for (size_t i = 0; i < threads_.size(); ++i) {
    Queue* const queue = i == 0 ? &probes_ : &others_;
    const absl::Status status = StartThread(
        "the status page's answers", [this, queue] { Run(queue); }, &threads_[i]);
    if (!status.ok()) return status;
  }
  return absl::OkStatus();
}

void Answerers::Stop() {
  {
    const absl::MutexLock lock(&mutex_);
    stopping_ = true;
  }
  for (std::thread& thread : threads_) {
    if (thread.joinable()) thread.join();
  }
}

void Answerers::Add(uint64_t id, Request request) {
  const absl::MutexLock lock(&mutex_);
  Queue& queue = IsProbe(request.path) ? probes_ : others_;
  queue.push_back({id, std::move(request)});
}

void Answerers::Forget(uint64_t id) {
  const absl::MutexLock lock(&mutex_);
  for (Queue* const queue : {&probes_, &others_}) {
    queue->remove_if([id](const Waiting& waiting) { return waiting.id == id; });
  }
}

void Answerers::Run(Queue* queue) {
  for (Queue taken = Take(queue); !taken.empty(); taken = Take(queue)) {
    const Answer answer = make_(taken.front().request);
    for (const Waiting& waiting : taken) deliver_(waiting.id, answer);
  }
}

Answerers::Queue Answerers::Take(Queue* queue) {
  const absl::MutexLock lock(&mutex_);
  const auto ready = [this, queue]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { return stopping_ || !queue->empty(); };
  mutex_.Await(absl::Condition(&ready));
  Queue taken;
  if (stopping_) return taken;
  taken.splice(taken.end(), *queue, queue->begin());
  if (!IsProbe(taken.front().request.path)) return taken;
  for (auto it = queue->begin(); it != queue->end();) {
    const auto next = std::next(it);
    if (it->request.path == taken.front().request.path) taken.splice(taken.end(), *queue, it);
    it = next;
  }
  return taken;
}

}  // namespace syncbn::http
