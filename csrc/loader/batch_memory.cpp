#include "loader/batch_memory.h"

#include <mutex>
#include <utility>
#include <vector>

#include "core/huge_pages.h"

namespace pairclip::loader {
namespace {

constexpr std::size_t kMostKept = 4;  // two ready or being filled, one in use, one of partners that are mixed in

}  // namespace

struct BatchMemory::Shelf {
  std::mutex mutex;
  std::vector<Buffer> buffers;

  Buffer take(std::size_t bytes) {
    const std::lock_guard lock(mutex);
    while (!buffers.empty()) {
      Buffer buffer = std::move(buffers.back());
      buffers.pop_back();
      if (buffer.size() >= bytes) return buffer;  // else it is too small for the batches of today, and goes
    }
    return Buffer(bytes);
  }

  void put(Buffer buffer) {
    const std::lock_guard lock(mutex);
    if (buffers.size() < kMostKept) buffers.push_back(std::move(buffer));
  }
};

BatchMemory::BatchMemory() : shelf_(std::make_shared<Shelf>()) {}

std::shared_ptr<void> BatchMemory::take(std::size_t bytes) {
  auto buffer = std::make_shared<Buffer>(shelf_->take(bytes));
  void* const data = buffer->at(0);
  return {data, [shelf = shelf_, buffer = std::move(buffer)](void*) { shelf->put(std::move(*buffer)); }};
}

}  // namespace pairclip::loader
