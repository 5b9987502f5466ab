// Memory on huge pages, which spares streams through it most address translations and page faults.
#pragma once

#include <cstddef>

namespace pairclip {

constexpr std::size_t kHugePage = 2u << 20;

// Asks the system to put what lies whole in [memory, memory + bytes) on huge pages, if it has them to give.
void prefer_huge_pages(void* memory, std::size_t bytes);

}  // namespace pairclip
