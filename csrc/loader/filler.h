// Fills batches: many tiles, from records or decoded pictures, on several threads.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "core/huge_pages.h"
#include "core/parallel.h"
#include "loader/decode.h"
#include "loader/records.h"
#include "loader/tile.h"

namespace pairclip::loader {

// CPU seconds of the threads beside the caller's, and what was wrong: ids of damaged records, ascending, each once.
struct Outcome {
  double cpu_seconds = 0.0;
  std::vector<std::int64_t> damaged;
};

class Filler {
 public:
  // tiles: of a sample.
  Filler(const TileSettings& settings, int tiles, int threads, TileKernel kernel);

  // A batch from raw records (tile-major RGB bytes, checked against their checksums).
  //
  // sources: [rows * tiles], tile number `sample * tiles + tile` of each; table: [rows * tiles * columns]; out: rows pictures
  // of 3 x height x (tiles * width), float32 or bfloat16. Rows with a damaged record are left as they are.
  // Throws std::invalid_argument if a source is not one of the records'.
  Outcome fill(const Records& records, std::span<const std::int64_t> sources, std::span<const float> table, void* out);

  // The same from decoded pictures, height x (tiles * width) RGB bytes each, which need no check.
  Outcome fill(std::span<const std::uint8_t> pictures, std::span<const std::int64_t> sources, std::span<const float> table,
               void* out);

  // Decodes records into pictures[row] for each of ids[row]; rows whose record is damaged, or not of the plain kind that
  // `decode` knows, are reported and left undefined.
  Outcome decode(const Records& records, Encoding encoding, std::span<const std::int64_t> ids, std::span<const std::int64_t> rows,
                 std::span<std::uint8_t> pictures);

  std::int64_t picture_bytes() const { return 3LL * settings_.height * settings_.width * tiles_; }

 private:
  template <class Tile>
  Outcome fill_from(const Tile& tile, std::int64_t limit, std::span<const std::int64_t> sources, std::span<const float> table,
                    void* out);

  TileSettings settings_;
  int tiles_, threads_;
  TileKernel kernel_;
  std::vector<Buffer> scratch_;  // of each thread
  ThreadPool pool_;
};

}  // namespace pairclip::loader
