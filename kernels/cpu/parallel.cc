#include "kernels/cpu/parallel.h"

#include <pthread.h>
#include <sys/types.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <deque>
#include <mutex>
#include <system_error>
#include <thread>

namespace syncbn::kernels::cpu {
namespace {

constexpr int kMaxHelpers = 255;

// Conditions are pthread's: std::condition_variable::wait would need a newer libstdc++ than some hosts of the wheel
// have.
template <typename Predicate>
void WaitUntil(pthread_cond_t* condition, std::mutex* locked, const Predicate& done) {
  while (!done()) pthread_cond_wait(condition, locked->native_handle());
}

// One call of ParallelFor. It lies on the caller's stack, so the caller leaves only when no helper is in it.
struct Job {
  const std::function<void(int64_t)>* run;
  int64_t blocks;
  std::fenv_t environment;
  std::atomic<int64_t> next{0};
  int wanted;      // Helpers that may still join. Guarded by Pool::mutex_, as is `inside`.
  int inside = 0;  // Helpers that have joined and not left.
  pthread_cond_t left = PTHREAD_COND_INITIALIZER;

  ~Job() { pthread_cond_destroy(&left); }

  void Work() {
    for (int64_t block = next.fetch_add(1); block < blocks; block = next.fetch_add(1)) (*run)(block);
  }
};

class Pool {
 public:
  explicit Pool(pid_t pid) : pid_(pid) {}

  pid_t pid() const { return pid_; }

  void Run(Job* job) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      Grow(job->wanted);
      jobs_.push_back(job);
    }
    pthread_cond_broadcast(&work_);
    job->Work();
    std::lock_guard<std::mutex> lock(mutex_);
    const auto queued = std::find(jobs_.begin(), jobs_.end(), job);
    if (queued != jobs_.end()) jobs_.erase(queued);
    WaitUntil(&job->left, &mutex_, [job] { return job->inside == 0; });
  }

 private:
  // A host that refuses another thread leaves the pool smaller; the caller does the work itself in the worst case.
  void Grow(int helpers) {
    while (helpers_ < helpers) {
      try {
        std::thread([this] { Help(); }).detach();
      } catch (const std::system_error&) {
        return;
      }
      ++helpers_;
    }
  }

  void Help() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      WaitUntil(&work_, &mutex_, [this] { return !jobs_.empty(); });
      Job* job = jobs_.front();
      ++job->inside;
      if (--job->wanted == 0) jobs_.pop_front();
      lock.unlock();
      std::fesetenv(&job->environment);
      job->Work();
      lock.lock();
      // No work is left in it, so no other helper needs to look.
      const auto queued = std::find(jobs_.begin(), jobs_.end(), job);
      if (queued != jobs_.end()) jobs_.erase(queued);
      if (--job->inside == 0) pthread_cond_signal(&job->left);
    }
  }

  const pid_t pid_;
  std::mutex mutex_;
  pthread_cond_t work_ = PTHREAD_COND_INITIALIZER;
  std::deque<Job*> jobs_;  // Those that helpers may still join.
  int helpers_ = 0;
};

// The process's pool, never destroyed: its threads may outlive static destructors. A child of fork() has the parent's
// pool in memory but none of its threads, and perhaps a locked mutex, so it makes its own and leaves that one alone.
Pool* SharedPool() {
  static std::atomic<Pool*> shared{nullptr};
  const pid_t pid = getpid();
  Pool* pool = shared.load(std::memory_order_acquire);
  while (pool == nullptr || pool->pid() != pid) {
    Pool* fresh = new Pool(pid);
    if (shared.compare_exchange_strong(pool, fresh, std::memory_order_acq_rel)) return fresh;
    delete fresh;
  }
  return pool;
}

}  // namespace

void ParallelFor(int num_threads, int64_t blocks, const std::function<void(int64_t)>& run) {
  const int64_t helpers = std::min<int64_t>({int64_t{num_threads} - 1, blocks - 1, kMaxHelpers});
  if (helpers <= 0) {
    for (int64_t block = 0; block < blocks; ++block) run(block);
    return;
  }
  Job job;
  job.run = &run;
  job.blocks = blocks;
  job.wanted = static_cast<int>(helpers);
  std::fegetenv(&job.environment);
  SharedPool()->Run(&job);
}

}  // namespace syncbn::kernels::cpu
