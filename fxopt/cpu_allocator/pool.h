// Tensors of a call that is marked by `enter` and `leave` on its thread take blocks that tensors of
// such calls gave back; all others go on to the allocator that was there before.
#include <ATen/Context.h>
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <map>
#include <mutex>
#include <unordered_map>
#include <utility>
#include <vector>

namespace fxopt {

// Smaller blocks malloc keeps by thread, faster than a lock.
constexpr size_t kSmallest = 1024;
// A block may serve what is at least half as large.
constexpr size_t kLargestPart = 2;
constexpr int64_t kIdleCalls = 64;

struct Block {
  c10::DataPtr memory;
  size_t size;
  int64_t last_call;
};

static thread_local int marked_calls = 0;

class KeptMemory final : public c10::Allocator {
  using Blocks = std::unordered_map<void*, Block>;

 public:
  explicit KeptMemory(c10::Allocator* before) : before_(before) {}

  c10::DataPtr allocate(size_t size) override {
    if (marked_calls == 0 || size < kSmallest) return before_->allocate(size);
    void* data = lend_kept(size);
    if (!data) data = lend(fresh(size), size);
    return {data, data, &give_back, c10::Device(c10::DeviceType::CPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &give_back; }

  void copy_data(void* to, const void* from, size_t count) const override {
    default_copy_data(to, from, count);
  }

  // Give back to the allocator before this one what calls before `call` used last.
  void release(int64_t call) {
    std::vector<Blocks::node_type> released;  // freed without the lock
    std::lock_guard<std::mutex> guard(lock_);
    for (auto at = kept_.begin(); at != kept_.end();) {
      auto& blocks = at->second;
      const auto first_needed = std::find_if(blocks.begin(), blocks.end(), [&](auto& block) {
        return block.mapped().last_call >= call;
      });
      std::move(blocks.begin(), first_needed, std::back_inserter(released));
      blocks.erase(blocks.begin(), first_needed);
      at = blocks.empty() ? kept_.erase(at) : std::next(at);
    }
  }

  void end_call() {
    int64_t call;
    {
      std::lock_guard<std::mutex> guard(lock_);
      call = ++calls_;
    }
    if (call % kIdleCalls == 0) release(call - kIdleCalls);
  }

  size_t bytes() {
    std::lock_guard<std::mutex> guard(lock_);
    size_t sum = 0;
    for (const auto& [size, blocks] : kept_) sum += size * blocks.size();
    return sum;
  }

  static KeptMemory* instance;

 private:
  // The smallest block that fits, if there is one; null if not.
  void* lend_kept(size_t size) {
    std::lock_guard<std::mutex> guard(lock_);
    for (auto at = kept_.lower_bound(size); at != kept_.end(); ++at) {
      if (at->first > kLargestPart * size) break;
      if (at->second.empty()) continue;
      void* data = at->second.back().key();
      lent_.insert(std::move(at->second.back()));
      at->second.pop_back();
      return data;
    }
    return nullptr;
  }

  c10::DataPtr fresh(size_t size) {
    try {
      return before_->allocate(size);
    } catch (...) {
      release(INT64_MAX);
    }
    return before_->allocate(size);
  }

  void* lend(c10::DataPtr memory, size_t size) {
    std::lock_guard<std::mutex> guard(lock_);
    void* data = memory.get();
    lent_.emplace(data, Block{std::move(memory), size, 0});
    return data;
  }

  static void give_back(void* data) {
    if (!instance->keep(data)) instance->before_->raw_deallocate(data);
  }

  // Whether `data` is a block of this pool, which is then kept.
  bool keep(void* data) {
    std::lock_guard<std::mutex> guard(lock_);
    Blocks::node_type block = lent_.extract(data);
    if (!block) return false;
    block.mapped().last_call = calls_;
    kept_[block.mapped().size].push_back(std::move(block));
    return true;
  }

  c10::Allocator* before_;
  std::mutex lock_;
  int64_t calls_ = 0;
  Blocks lent_;                                            // by address
  std::map<size_t, std::vector<Blocks::node_type>> kept_;  // the one used last at the end
};

// Never destroyed: tensors may outlive everything else in the process.
KeptMemory* KeptMemory::instance = nullptr;

}  // namespace fxopt

using fxopt::KeptMemory;

extern "C" void install() {
  if (KeptMemory::instance) return;
  KeptMemory::instance = new KeptMemory(at::getCPUAllocator());
  c10::SetCPUAllocator(KeptMemory::instance);
}

extern "C" void enter() { ++fxopt::marked_calls; }

extern "C" void leave() {
  if (--fxopt::marked_calls == 0) KeptMemory::instance->end_call();
}

extern "C" void release() { KeptMemory::instance->release(INT64_MAX); }

extern "C" size_t kept_bytes() { return KeptMemory::instance->bytes(); }
