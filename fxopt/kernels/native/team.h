// Threads that stay awake through a call of many small kernels.
//
// OpenMP's fall asleep after each region as soon as a process holds more of them than it has cores,
// as one does that serves from several threads, and waking one takes longer than such a kernel. A
// team is one region for the whole call, whose threads watch for work until it ends. Work is cut
// into parts that whoever is free takes, the caller among them, so that a thread that isn't
// scheduled is not waited for.
#include <immintrin.h>
#include <omp.h>

#include <atomic>
#include <exception>
#include <thread>

namespace fxopt {
namespace {

class Team {
  using Run = void (*)(const void* body, int64_t part);

  const int threads_;
  std::atomic<bool> ended_{false};
  // Which task it is, its parts and the next one that is free: 32, 16 and 16 bits.
  std::atomic<uint64_t> state_{0};
  std::atomic<int64_t> left_{0};
  uint64_t task_ = 0;
  Run run_ = nullptr;
  const void* body_ = nullptr;

  static constexpr int kPatience = 512;

  static void pause(int spins) {
    spins % kPatience == kPatience - 1 ? std::this_thread::yield() : _mm_pause();
  }

  // Take a part of the present task, if one is free.
  bool take() {
    uint64_t state = state_.load(std::memory_order_acquire);
    const uint64_t part = state & 0xffff, parts = state >> 16 & 0xffff;
    if (part >= parts) return false;
    if (state_.compare_exchange_weak(state, state + 1, std::memory_order_acq_rel)) {
      // What the task is stays as it is until this part is done.
      run_(body_, static_cast<int64_t>(part));
      left_.fetch_sub(1, std::memory_order_release);
    }
    return true;
  }

  void help() {
    for (int idle = 0; !ended_.load(std::memory_order_acquire); ++idle) take() ? void() : pause(idle);
  }

 public:
  explicit Team(int threads) : threads_(threads) {}

  // The team of the call that this thread is in.
  static Team*& present() {
    thread_local Team* team = nullptr;
    return team;
  }

  int threads() const { return threads_; }

  // body(part) for each of up to 65,535 parts.
  template <class Body>
  void run(int64_t parts, const Body& body) {
    body_ = &body;
    run_ = [](const void* given, int64_t part) { (*static_cast<const Body*>(given))(part); };
    left_.store(parts, std::memory_order_relaxed);
    state_.store(++task_ << 32 | uint64_t(parts) << 16, std::memory_order_release);
    while (take()) {
    }
    for (int spins = 0; left_.load(std::memory_order_acquire) > 0; ++spins) pause(spins);
  }

  // call(), with the team for all that is `parallel` in it.
  template <class Call>
  void lead(const Call& call) {
    std::exception_ptr error;
#pragma omp parallel num_threads(threads_)
    {
      if (omp_get_thread_num() == 0) {
        present() = this;
        try {
          call();
        } catch (...) {
          error = std::current_exception();
        }
        present() = nullptr;
        ended_.store(true, std::memory_order_release);
      } else {
        help();
      }
    }
    if (error) std::rethrow_exception(error);
  }
};

template <class Call>
void with_team(int threads, const Call& call) {
  if (threads <= 1 || omp_in_parallel()) return call();
  Team(threads).lead(call);
}

// body(begin, end) for pieces of a range, of `grain` or more: by the team of the call, or by OpenMP.
template <class Body>
void parallel(int64_t begin, int64_t end, int64_t grain, const Body& body) {
  Team* const team = Team::present();
  if (!team) return at::parallel_for(begin, end, grain, body);
  const int64_t count = end - begin;
  const int64_t parts = std::min<int64_t>(3 * team->threads(), count / std::max<int64_t>(1, grain));
  if (count <= 0) return;
  if (parts <= 1) return body(begin, end);
  team->run(parts, [&](int64_t part) {
    body(begin + count * part / parts, begin + count * (part + 1) / parts);
  });
}

}  // namespace
}  // namespace fxopt
