// A fixed set of sleeping threads and one way to use them: run numbered tasks, each exactly once.
//
// Idle threads sleep on a futex; nothing ever spins. OpenMP's pool spins at every barrier, and on a machine whose cores are
// shared with another process each barrier then costs a scheduler slice. Tasks are handed out by an atomic counter, so a
// thread that was descheduled delays only its own task. Results must not depend on which thread runs what: a task writes to
// places of its own, and rounds and treats denormal numbers as the caller does.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>

namespace pairclip {

class ThreadPool {
 public:
  ThreadPool();
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  // Calls body(task, worker) for every task in [0, tasks), on the caller and up to threads - 1 others; worker in
  // [0, threads) tells them apart. Returns when all are done. The first exception of a task is thrown here, after the
  // tasks under way have ended; tasks not yet begun are left out. One run at a time: a second caller waits for the first.
  // A pool inherited through fork() starts threads of its own in the child. Returns the CPU seconds of the others.
  double run(int threads, std::int64_t tasks, const std::function<void(std::int64_t task, int worker)>& body);

  // The pool of what computes for its caller (bank operations, tower, convolutions), which takes turns. (The loader works beside
  // them.)
  static ThreadPool& shared();

 private:
  struct State;
  std::unique_ptr<State> state_;
  std::int64_t process_;
};

}  // namespace pairclip
