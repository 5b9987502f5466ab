#include "core/parallel.h"

#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace pairclip {
namespace {

double cpu_seconds() {
  timespec now{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

// How this thread rounds, and whether denormal numbers are zeros to it.
#if defined(__SSE__)
unsigned floating_mode() { return _mm_getcsr(); }
void set_floating_mode(unsigned mode) { _mm_setcsr(mode); }
#else
unsigned floating_mode() { return 0; }
void set_floating_mode(unsigned) {}
#endif

}  // namespace

struct ThreadPool::State {
  std::mutex one_run;  // held by the caller of run() from beginning to end

  std::mutex mutex;  // guards everything below but the atomics
  std::condition_variable wake, done;
  std::vector<std::thread> threads;
  std::uint64_t run = 0;  // number of the present run: a thread joins each at most once
  int wanted = 0;         // threads of the pool that may join the present run
  int working = 0;
  bool closing = false;
  const std::function<void(std::int64_t, int)>* body = nullptr;
  unsigned mode = 0;  // of the caller's floating-point arithmetic
  double helped = 0;  // CPU seconds of the pool's threads in the present run
  std::exception_ptr error;

  std::atomic<std::int64_t> next{0};
  std::int64_t tasks = 0;

  void work(int worker) {
    for (std::int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
      try {
        (*body)(task, worker);
      } catch (...) {
        const std::lock_guard lock(mutex);
        if (!error) error = std::current_exception();
        next.store(tasks, std::memory_order_relaxed);
      }
    }
  }

  void live(int worker) {
    std::uint64_t seen = 0;
    std::unique_lock lock(mutex);
    for (;;) {
      wake.wait(lock, [&] { return closing || (run != seen && worker <= wanted); });
      if (closing) return;
      seen = run;
      if (body == nullptr) continue;  // woke up after the run had ended
      ++working;
      set_floating_mode(mode);
      lock.unlock();
      const double before = cpu_seconds();
      work(worker);
      const double spent = cpu_seconds() - before;
      lock.lock();
      helped += spent;
      if (--working == 0) done.notify_one();
    }
  }
};

ThreadPool::ThreadPool() : state_(std::make_unique<State>()), process_(getpid()) {}

ThreadPool::~ThreadPool() {
  if (process_ != getpid()) {  // the threads stayed in the parent: their handles must not be joined here
    static_cast<void>(state_.release());
    return;
  }
  {
    const std::lock_guard lock(state_->mutex);
    state_->closing = true;
  }
  state_->wake.notify_all();
  for (std::thread& thread : state_->threads) thread.join();
}

double ThreadPool::run(int threads, std::int64_t tasks, const std::function<void(std::int64_t, int)>& body) {
  if (process_ != getpid()) {
    static_cast<void>(state_.release());
    state_ = std::make_unique<State>();
    process_ = getpid();
  }
  State& state = *state_;
  const std::lock_guard one_run(state.one_run);
  const int helpers = static_cast<int>(std::min<std::int64_t>(std::max(threads, 1), std::max<std::int64_t>(tasks, 1))) - 1;
  {
    const std::lock_guard lock(state.mutex);
    while (static_cast<int>(state.threads.size()) < helpers) {
      const int worker = static_cast<int>(state.threads.size()) + 1;
      state.threads.emplace_back([&state, worker] { state.live(worker); });
    }
    state.body = &body;
    state.error = nullptr;
    state.mode = floating_mode();
    state.helped = 0;
    state.tasks = tasks;
    state.next.store(0, std::memory_order_relaxed);
    state.wanted = helpers;
    ++state.run;
  }
  if (helpers > 0) state.wake.notify_all();
  state.work(0);
  std::unique_lock lock(state.mutex);
  state.done.wait(lock, [&] { return state.working == 0; });
  state.body = nullptr;
  if (state.error) std::rethrow_exception(state.error);
  return state.helped;
}

ThreadPool& ThreadPool::shared() {
  static ThreadPool threads;
  return threads;
}

}  // namespace pairclip
