// The table between the outer loops (stream.cpp, compiled once) and the inner ones (variant.cpp, compiled per instruction set).
//
// Vocabulary: scores are dot products of queries (image features) with keys (the rows of the bank), and the softmax mean is a
// mix of values (again the rows of the bank, packed the other way round). Queries come in blocks of `Engine::rows`, bank rows
// in tiles of `Engine::tile`; a step is one block against one tile. No more scores than those of a step ever exist.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pairclip::kernels {

enum class Element { float32, bfloat16 };

// What a row carries from tile to tile for its softmax: the highest logit so far times log4(e), the sum of the
// weights, and the factor by which a higher maximum of this step has shrunk what was summed before.
struct SoftmaxRow {
  float high;
  float shrink;
  double total;
};

// With a mean of the bank: `mixed` is the sum of the weights as the second product takes them, rounded or not; where a later
// panel of the tile raised the maximum, the weights were rounded once more than their sum.
struct MixedRow {
  SoftmaxRow softmax;
  double mixed;
};

struct StatsRow {
  SoftmaxRow softmax;
  float best;  // score of the best positive, known before the first step
  std::int32_t greater, equal;
  bool damaged;  // a score was NaN
};

// The candidates of a row for its k best, in order of index; those below `threshold` cannot be among them any more.
struct TopkRow {
  float threshold;
  std::int32_t count;
  std::int32_t* keys;     // scores as integers of the same order
  std::int32_t* indices;  // rows of the bank
};

// What scores are multiplied by. How a logit comes back from such a product is `log_partition`'s business (bank_ops.cpp).
constexpr float kLog4E = 0x1.715476p-1f;

struct TopkSize {
  int k;
  int capacity;  // of keys and indices: a multiple of kSlack, at least k + kMostOffered + kSlack
};
constexpr int kSlack = 16;        // lanes of the widest vector: a compressed store may write so far past the end
constexpr int kMostOffered = 32;  // candidates at a time

struct Step {
  const void* queries;  // packed block
  const void* keys;     // packed tile
  const void* values;   // packed tile; null where nothing is mixed
  int depth;
  int rows;            // of the block, the rest is padding
  int captions;        // of the tile, likewise
  std::int64_t first;  // index in the bank of the tile's first row
  float* scores;       // where `Engine::scores` leaves them, [Engine::rows, Engine::tile]; the others keep theirs to themselves
};

// Scores of a step on their way: rows [begin, end) of a panel of captions, the tile's `first` and those after it; the panel's
// scores lie row after row.
struct Part {
  const float* scores;
  int first, begin, end;
};

constexpr int kMostTop = 1024;  // of a top-k

struct Engine {
  const char* precision;
  int rows, tile;
  const Engine* fallback;  // takes over where packing refuses (below); null where it never does

  std::size_t (*query_bytes)(int depth);  // of one packed block
  std::size_t (*key_bytes)(int depth);    // of one packed tile
  std::size_t (*value_bytes)(int depth);

  // Pack `count` rows, given one by one, filling up with zeros. False: a number that this engine cannot represent.
  bool (*pack_queries)(const void* const* rows, int count, Element type, int depth, void* out);
  bool (*pack_keys)(const void* const* rows, int count, Element type, int depth, void* out);
  bool (*pack_values)(const void* const* rows, int count, Element type, int depth, void* out);

  // Around the steps of a task, on the thread that runs them.
  void (*begin)();
  void (*end)();

  void (*scores)(const Step& step);
  void (*softmax)(const Step& step, float scale, MixedRow* rows,
                  float* mean);                                        // mean: rows * depth numbers in an order of
                                                                       // its own, of which `unpack_mean` makes [rows, depth]
  void (*unpack_mean)(float* mean, int rows, int depth, float* copy);  // copy: as many numbers
  void (*stats)(const Step& step, float scale, StatsRow* rows);
  void (*topk)(const Step& step, TopkSize size, TopkRow* rows);
  void (*sort)(TopkSize size, TopkRow* row);  // the k best, best first

  // For tests: 4^x in place; a multiple of kSlack numbers. For benchmarks: the flop of that many rounds of multiply-adds that
  // wait for nothing, on this thread.
  void (*powers_of_four)(float* numbers, std::int64_t count);
  double (*multiply_adds)(std::int64_t rounds);
};

}  // namespace pairclip::kernels
