#include "kernels/stream.h"

#include <unistd.h>

#include <algorithm>

#include "core/parallel.h"

namespace pairclip::kernels {
namespace {

// Half of a core's second-level cache holds packed bank, a quarter a group's queries and, where there is one, its mean. The next
// cache is slow on servers: with a chunk as large as the second-level cache itself ranks took a fifth longer.
std::size_t cache_bytes() {
  constexpr long kTypical = 1 << 20;
#if defined(_SC_LEVEL2_CACHE_SIZE)
  static const long found = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (found > 0) return static_cast<std::size_t>(found);
#endif
  return kTypical;
}

std::int64_t divided(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// The steps of one task, between the engine's begin and end.
class Session {
 public:
  explicit Session(const Engine& engine) : engine_(engine) { engine_.begin(); }
  ~Session() { engine_.end(); }
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

 private:
  const Engine& engine_;
};

void require(bool representable) {
  if (!representable) throw Unrepresentable();
}

}  // namespace

Stream::Stream(const Engine& engine, const Matrix& emb, std::int64_t begin, std::int64_t end, const Matrix& bank, int threads)
    : engine_(engine),
      emb_(emb),
      bank_(bank),
      begin_(begin),
      rows_(end - begin),
      blocks_(divided(rows_, engine.rows)),
      threads_(threads),
      queries_(blocks_ * engine.query_bytes(emb.depth)) {
  const std::size_t bytes = engine.query_bytes(emb.depth);
  ThreadPool::shared().run(threads_, blocks_, [&](std::int64_t block, int) {
    std::vector<const void*> rows(rows_of(block));
    for (std::size_t r = 0; r < rows.size(); ++r) rows[r] = emb_.row(begin_ + block * engine_.rows + r);
    require(engine_.pack_queries(rows.data(), static_cast<int>(rows.size()), emb_.type, emb_.depth, queries_.at(block * bytes)));
  });
}

int Stream::rows_of(std::int64_t block) const {
  return static_cast<int>(std::min<std::int64_t>(engine_.rows, rows_ - block * engine_.rows));
}

void Stream::pack_tile(std::int64_t tile, void* keys, void* values) const {
  const std::int64_t first = tile * engine_.tile, count = std::min<std::int64_t>(engine_.tile, bank_.rows - first);
  std::vector<const void*> rows(count);
  for (std::int64_t j = 0; j < count; ++j) rows[j] = bank_.row(first + j);
  require(engine_.pack_keys(rows.data(), static_cast<int>(count), bank_.type, bank_.depth, keys));
  if (values) require(engine_.pack_values(rows.data(), static_cast<int>(count), bank_.type, bank_.depth, values));
}

void Stream::run(bool with_values, const Visit& visit) const {
  const int depth = bank_.depth;
  const std::size_t query_bytes = engine_.query_bytes(depth), key_bytes = engine_.key_bytes(depth);
  const std::size_t value_bytes = with_values ? engine_.value_bytes(depth) : 0, tile_bytes = key_bytes + value_bytes;
  const std::size_t score_bytes = sizeof(float) * engine_.rows * engine_.tile;
  const std::int64_t tiles = divided(bank_.rows, engine_.tile);
  const std::int64_t chunk = std::clamp<std::int64_t>(cache_bytes() / 2 / tile_bytes, 1, tiles);
  const std::size_t block_bytes = query_bytes + (with_values ? sizeof(float) * engine_.rows * depth : 0);
  // Two groups per thread and more, so that a thread that lost its core to another process holds up little.
  const std::int64_t group = std::clamp<std::int64_t>(cache_bytes() / 4 / block_bytes, 1, divided(blocks_, 2 * threads_));
  const Buffer packed(chunk * tile_bytes), scores(threads_ * score_bytes);
  for (std::int64_t begin = 0; begin < tiles; begin += chunk) {
    const std::int64_t count = std::min(chunk, tiles - begin);
    ThreadPool::shared().run(threads_, count, [&](std::int64_t tile, int) {
      char* to = packed.at(tile * tile_bytes);
      pack_tile(begin + tile, to, with_values ? to + key_bytes : nullptr);
    });
    ThreadPool::shared().run(threads_, divided(blocks_, group), [&](std::int64_t task, int worker) {
      const Session session(engine_);
      const std::int64_t end = std::min(blocks_, (task + 1) * group);
      for (std::int64_t tile = 0; tile < count; ++tile) {
        const std::int64_t first = (begin + tile) * engine_.tile;
        const char* keys = packed.at(tile * tile_bytes);
        Step step{.queries = nullptr,
                  .keys = keys,
                  .values = with_values ? keys + key_bytes : nullptr,
                  .depth = depth,
                  .rows = 0,
                  .captions = static_cast<int>(std::min<std::int64_t>(engine_.tile, bank_.rows - first)),
                  .first = first,
                  .scores = reinterpret_cast<float*>(scores.at(worker * score_bytes))};
        for (std::int64_t block = task * group; block < end; ++block) {
          step.queries = queries_.at(block * query_bytes);
          step.rows = rows_of(block);
          visit(step, block * engine_.rows);
        }
      }
    });
  }
}

void Stream::for_blocks(const std::function<void(std::int64_t row, int count)>& visit) const {
  ThreadPool::shared().run(threads_, blocks_, [&](std::int64_t block, int) { visit(block * engine_.rows, rows_of(block)); });
}

void Stream::run_chosen(const Chosen& chosen, const VisitChosen& visit) const {
  const int depth = bank_.depth;
  const std::size_t query_bytes = engine_.query_bytes(depth), key_bytes = engine_.key_bytes(depth);
  const std::size_t score_bytes = sizeof(float) * engine_.rows * engine_.tile;
  const Buffer keys(threads_ * key_bytes), scores(threads_ * score_bytes);
  ThreadPool::shared().run(threads_, blocks_, [&](std::int64_t block, int worker) {
    const Session session(engine_);
    const std::int64_t first_row = block * engine_.rows;
    const int count = rows_of(block);
    std::vector<std::pair<int, std::int64_t>> pairs;  // row of the block, caption
    for (int r = 0; r < count; ++r)
      for (std::int64_t i = chosen.first[first_row + r]; i < chosen.last[first_row + r]; ++i)
        pairs.emplace_back(r, chosen.captions[i]);
    std::vector<float> found(pairs.size());
    std::vector<const void*> rows;
    Step step{.queries = queries_.at(block * query_bytes),
              .keys = keys.at(worker * key_bytes),
              .values = nullptr,
              .depth = depth,
              .rows = count,
              .captions = 0,
              .first = 0,
              .scores = reinterpret_cast<float*>(scores.at(worker * score_bytes))};
    for (std::size_t begin = 0; begin < pairs.size(); begin += engine_.tile) {
      const std::size_t end = std::min(pairs.size(), begin + engine_.tile);
      rows.clear();
      for (std::size_t i = begin; i < end; ++i) rows.push_back(bank_.row(std::max<std::int64_t>(pairs[i].second, 0)));
      step.captions = static_cast<int>(rows.size());
      require(engine_.pack_keys(rows.data(), step.captions, bank_.type, depth, keys.at(worker * key_bytes)));
      engine_.scores(step);
      for (std::size_t i = begin; i < end; ++i) found[i] = step.scores[pairs[i].first * engine_.tile + (i - begin)];
    }
    std::size_t at = 0;
    for (int r = 0; r < count; ++r) {
      const std::size_t length = chosen.last[first_row + r] - chosen.first[first_row + r];
      visit(first_row + r, std::span(found).subspan(at, length));
      at += length;
    }
  });
}

}  // namespace pairclip::kernels
