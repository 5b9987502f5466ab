// Memory on huge pages, which spares streams through it most address translations and page faults.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <memory>

namespace pairclip {

constexpr std::size_t kHugePage = 2u << 20;

// Asks the system to put what lies whole in [memory, memory + bytes) on huge pages, if it has them to give.
void prefer_huge_pages(void* memory, std::size_t bytes);

// Uninitialised memory on a cache line; large ones on huge pages.
class Buffer {
 public:
  explicit Buffer(std::size_t bytes);
  char* at(std::size_t offset) const { return data_.get() + offset; }
  std::size_t size() const { return size_; }

 private:
  struct Free {
    void operator()(char* data) const { std::free(data); }
  };
  std::size_t size_;
  std::unique_ptr<char, Free> data_;
};

}  // namespace pairclip
