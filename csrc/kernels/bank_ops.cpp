#include "kernels/bank_ops.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <numbers>

namespace pairclip::kernels {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr std::size_t kQueryBytes = 4u << 20;       // of packed queries: training counts its memory
constexpr std::size_t kCandidateBytes = 32u << 20;  // of candidates of all rows that are under way

// Before any logit: below all of them, and finite, so that a logit of -inf has a weight (of 0).
constexpr SoftmaxRow kNothing{std::numeric_limits<float>::lowest(), 1.0f, 0.0};

// Scores were multiplied by a rounded `scale * kLog4E`, of which this undoes the rounding too: exactly for captions near the
// best.
float log_partition(const SoftmaxRow& row, float scale) {
  const double nats = scale == 0.0f ? 2 * std::numbers::ln2 : scale / static_cast<double>(scale * kLog4E);
  return static_cast<float>(row.high * nats + std::log(row.total));
}

std::int64_t all_at_once(const Engine&) { return kMostRows; }

// Calls work(engine, begin, end) for batches of at most most(engine) rows; once more with the fallback if the engine refuses the
// numbers.
template <class Most, class Work>
void in_batches(const Call& call, const Most& most, const Work& work) {
  for (const Engine* engine = &call.engine; engine != nullptr; engine = engine->fallback) try {
      const std::int64_t rows = std::clamp<std::int64_t>(most(*engine), 1, kMostRows);
      for (std::int64_t begin = 0; begin < call.emb.rows; begin += rows)
        work(*engine, begin, std::min(call.emb.rows, begin + rows));
      return;
    } catch (const Unrepresentable&) {
      if (engine->fallback == nullptr) throw;
    }
}

}  // namespace

void bank_softmax(const Call& call, float scale, float* lse, float* mean) {
  const int depth = call.bank.depth;
  const auto most = [&](const Engine& engine) { return engine.rows * (kQueryBytes / engine.query_bytes(depth)); };
  in_batches(call, most, [&](const Engine& engine, std::int64_t begin, std::int64_t end) {
    const Stream stream(engine, call.emb, begin, end, call.bank, call.threads);
    std::vector<MixedRow> rows(end - begin, {kNothing, 0.0});
    std::fill(mean + begin * depth, mean + end * depth, 0.0f);
    stream.run(
        true, [&](const Step& step, std::int64_t row) { engine.softmax(step, scale, &rows[row], mean + (begin + row) * depth); });
    stream.for_blocks([&](std::int64_t first, int count) {
      float* sums = mean + (begin + first) * depth;
      std::vector<float> copy(static_cast<std::size_t>(count) * depth);
      engine.unpack_mean(sums, count, depth, copy.data());
      for (std::int64_t i = first; i < first + count; ++i, sums += depth) {
        lse[begin + i] = log_partition(rows[i].softmax, scale);
        const float total = static_cast<float>(rows[i].mixed);
        for (int d = 0; d < depth; ++d) sums[d] /= total;
      }
    });
  });
}

void bank_stats(const Call& call, float scale, const Chosen& positives, float* lse, float* best, std::int32_t* greater,
                std::int32_t* equal) {
  in_batches(call, all_at_once, [&](const Engine& engine, std::int64_t begin, std::int64_t end) {
    const Stream stream(engine, call.emb, begin, end, call.bank, call.threads);
    std::vector<StatsRow> rows(end - begin, {kNothing, -kInfinity, 0, 0, false});
    const Chosen chosen{positives.captions, positives.first.subspan(begin, end - begin),
                        positives.last.subspan(begin, end - begin)};
    stream.run_chosen(chosen, [&](std::int64_t row, std::span<const float> scores) {
      // No positive is above the best one, and those that equal it will be counted once each: taken off in advance.
      float top = -kInfinity;
      for (const float score : scores) top = score > top || std::isnan(score) ? score : top;
      rows[row].best = top;
      rows[row].equal = -static_cast<std::int32_t>(std::count(scores.begin(), scores.end(), top));
    });
    stream.run(false, [&](const Step& step, std::int64_t row) { engine.stats(step, scale, &rows[row]); });
    for (std::int64_t i = begin; i < end; ++i) {
      const StatsRow& row = rows[i - begin];
      lse[i] = log_partition(row.softmax, scale);
      best[i] = row.best;
      greater[i] = row.damaged ? static_cast<std::int32_t>(call.bank.rows) : row.greater;
      equal[i] = row.damaged ? 0 : row.equal;
    }
  });
}

void pair_scores(const Call& call, const std::int64_t* indices, std::int64_t chosen, float* scores) {
  in_batches(call, all_at_once, [&](const Engine& engine, std::int64_t begin, std::int64_t end) {
    const Stream stream(engine, call.emb, begin, end, call.bank, call.threads);
    std::vector<std::int64_t> first(end - begin + 1);
    for (std::size_t i = 0; i < first.size(); ++i) first[i] = static_cast<std::int64_t>(i) * chosen;
    const std::span all(first);
    const std::size_t rows = first.size() - 1;
    const std::span captions(indices + begin * chosen, rows * chosen);
    stream.run_chosen({captions, all.first(rows), all.last(rows)}, [&](std::int64_t row, std::span<const float> found) {
      for (std::int64_t j = 0; j < chosen; ++j)
        scores[(begin + row) * chosen + j] = captions[row * chosen + j] < 0 ? -kInfinity : found[j];
    });
  });
}

void bank_topk(const Call& call, int k, float* scores, std::int64_t* indices) {
  const TopkSize size{.k = k, .capacity = (std::max(2 * k, k + 128) + kMostOffered + 2 * kSlack - 1) / kSlack * kSlack};
  const auto most = [&](const Engine&) { return kCandidateBytes / (2 * sizeof(std::int32_t) * size.capacity); };
  in_batches(call, most, [&](const Engine& engine, std::int64_t begin, std::int64_t end) {
    const Stream stream(engine, call.emb, begin, end, call.bank, call.threads);
    const Buffer numbers((end - begin) * 2 * sizeof(std::int32_t) * size.capacity);
    std::int32_t* at = reinterpret_cast<std::int32_t*>(numbers.at(0));
    std::vector<TopkRow> rows;
    for (std::int64_t i = begin; i < end; ++i, at += 2 * size.capacity) rows.push_back({kNaN, 0, at, at + size.capacity});
    stream.run(false, [&](const Step& step, std::int64_t row) { engine.topk(step, size, &rows[row]); });
    stream.for_blocks([&](std::int64_t first, int count) {
      for (std::int64_t i = first; i < first + count; ++i) {
        TopkRow& row = rows[i];
        engine.sort(size, &row);
        for (int j = 0; j < k; ++j) {
          const std::int32_t key = row.keys[j];
          scores[(begin + i) * k + j] = std::bit_cast<float>(key ^ ((key >> 31) & 0x7fffffff));
          indices[(begin + i) * k + j] = row.indices[j];
        }
      }
    });
  });
}

}  // namespace pairclip::kernels
