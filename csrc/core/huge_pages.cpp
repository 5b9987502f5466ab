#include "core/huge_pages.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdint>
#include <new>

namespace pairclip {

void prefer_huge_pages(void* memory, std::size_t bytes) {
#if defined(__linux__)
  const std::uintptr_t from = reinterpret_cast<std::uintptr_t>(memory), begin = (from + kHugePage - 1) / kHugePage * kHugePage,
                       end = (from + bytes) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  static_cast<void>(memory), static_cast<void>(bytes);
#endif
}

Buffer::Buffer(std::size_t bytes) {
  constexpr std::size_t kLine = 64;
  const std::size_t step = bytes >= kHugePage ? kHugePage : kLine;
  size_ = (bytes + step - 1) / step * step;
  data_.reset(static_cast<char*>(std::aligned_alloc(step, size_)));
  if (data_ == nullptr) throw std::bad_alloc();
  prefer_huge_pages(data_.get(), size_);
}

}  // namespace pairclip
