// Threads that do one job together, and wait for one another without burning a busy machine's CPU:
// a wait spins for microseconds and then sleeps.

#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>

#include <unistd.h>

namespace gpt {

constexpr int SPINS = 1000;  // about 50 µs on x86
constexpr int MAX_THREADS = 256;

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// A value that threads wait for to change.
class Signal {
 public:
  uint64_t now() const { return value_.load(std::memory_order_acquire); }

  void set(uint64_t value) {
    value_.store(value);
    if (sleepers_.load() == 0) return;
    std::lock_guard<std::mutex> held(mutex_);
    changed_.notify_all();
  }

  // Return the new value.
  uint64_t wait_past(uint64_t old) {
    for (int i = 0; i < SPINS; i++) {
      uint64_t value = now();
      if (value != old) return value;
      pause();
    }
    std::unique_lock<std::mutex> held(mutex_);
    sleepers_.fetch_add(1);
    changed_.wait(held, [&] { return value_.load() != old; });
    sleepers_.fetch_sub(1);
    return value_.load();
  }

 private:
  alignas(64) std::atomic<uint64_t> value_{0};
  alignas(64) std::atomic<int> sleepers_{0};
  std::mutex mutex_;
  std::condition_variable changed_;
};

// The threads of one job, as the job sees them.
class Team {
 public:
  // Start over with `threads`; called while no thread works.
  void muster(int threads) {
    threads_ = threads;
    arrived_.store(0, std::memory_order_relaxed);
    phase_ = 0;
    give_out();
  }

  int threads() const { return threads_; }

  // Wait until every thread has come here. What `share` gives out starts anew behind it.
  void meet() {
    uint64_t phase = met_.now();
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) < threads_ - 1) {
      met_.wait_past(phase);
      return;
    }
    arrived_.store(0, std::memory_order_relaxed);
    phase_++;
    give_out();
    met_.set(phase + 1);
  }

  // Do `work(i)` once for each i of `items`, together. A thread begins with its own share and then
  // takes from the others', so that one that lost its CPU does not hold up the rest. Which thread
  // does an item never changes what it computes.
  template <typename Work>
  void share(int thread, int64_t items, Work&& work) {
    Slot* slots = slots_[phase_ % 2];
    for (int turn = 0; turn < threads_; turn++) {
      int owner = (thread + turn) % threads_;
      int64_t begin = items * owner / threads_, end = items * (owner + 1) / threads_;
      while (true) {
        int64_t i = begin + slots[owner].taken.fetch_add(1, std::memory_order_relaxed);
        if (i >= end) break;
        work(i);
      }
    }
  }

 private:
  struct alignas(64) Slot {
    std::atomic<int64_t> taken{0};
  };

  // The slots of the phase before the last are free: nobody is left in it.
  void give_out() {
    for (int i = 0; i < threads_; i++)
      slots_[phase_ % 2][i].taken.store(0, std::memory_order_relaxed);
  }

  int threads_ = 1;
  uint32_t phase_ = 0;
  alignas(64) std::atomic<int> arrived_{0};
  Signal met_;
  Slot slots_[2][MAX_THREADS];
};

// The process's threads. Made on first use, never ended: they sleep while there is nothing to do.
class Pool {
 public:
  static Pool& of_this_process() {
    static std::mutex making;
    static Pool* pool = nullptr;
    std::lock_guard<std::mutex> held(making);
    if (pool == nullptr || pool->process_ != getpid()) pool = new Pool;  // a fork has no threads
    return *pool;
  }

  // Call `job(thread, team)` on `threads` threads, the caller being thread 0, and wait for all.
  template <typename Job>
  void run(int threads, Job&& job) {
    std::lock_guard<std::mutex> one_job_at_a_time(running_);
    threads = threads < 1 ? 1 : threads > MAX_THREADS ? MAX_THREADS : threads;
    while (workers_ < threads - 1) hire();
    team_.muster(threads);
    job_ = [](void* context, int thread, Team& team) {
      (*static_cast<std::remove_reference_t<Job>*>(context))(thread, team);
    };
    context_ = &job;
    jobs_++;
    if (threads > 1) order_.set(jobs_ * (MAX_THREADS + 1) + threads);
    job(0, team_);
    team_.meet();
  }

 private:
  Pool() : process_(getpid()) {}

  void hire() {
    int thread = ++workers_;
    uint64_t order = order_.now();
    std::thread([this, thread, order]() mutable {
      while (true) {
        order = order_.wait_past(order);
        // The order itself says how many work: a thread that is not among them may be so late that
        // the team is another by now.
        if (thread >= int(order % (MAX_THREADS + 1))) continue;
        job_(context_, thread, team_);
        team_.meet();
      }
    }).detach();
  }

  pid_t process_;
  std::mutex running_;
  int workers_ = 0;
  uint64_t jobs_ = 0;
  Signal order_;
  Team team_;
  void (*job_)(void*, int, Team&) = nullptr;
  void* context_ = nullptr;
};

}  // namespace gpt
