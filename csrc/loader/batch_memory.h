// Memory of batches: whoever has the last reference to a batch gives it back, and the next batch takes it again.
//
// Memory that was written a moment ago has its pages already, and here they are huge ones: nothing is asked of the system, nor
// of the allocator, while batches come and go.
#pragma once

#include <cstddef>
#include <memory>

namespace pairclip::loader {

class BatchMemory {
 public:
  BatchMemory();

  // Memory for `bytes`, uninitialised, on a cache line. It may outlive this object, and be let go by any thread.
  std::shared_ptr<void> take(std::size_t bytes);

 private:
  struct Shelf;
  std::shared_ptr<Shelf> shelf_;
};

}  // namespace pairclip::loader
