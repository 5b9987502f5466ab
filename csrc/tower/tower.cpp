#include "tower/tower.h"

#include <algorithm>
#include <functional>
#include <stdexcept>

#include "core/cpu.h"
#include "core/parallel.h"

namespace pairclip::tower {
namespace {

constexpr int kAttentionTasks = 8;  // per thread: even work at the end, and few enough to cost nothing

int divided(int a, int b) { return (a + b - 1) / b; }

// The tasks of a run, in kinds that follow each other.
class Run {
 public:
  Run(const Engine& engine, const Pass& pass, int threads) : engine_(engine), pass_(pass), threads_(threads) {}

  using Task = std::function<void(int task, const Scratch& scratch)>;
  void add(int tasks, Task body) {
    kinds_.push_back({total_, std::move(body)});
    total_ += tasks;
  }

  void operator()() {
    ThreadPool::shared().run(threads_, total_, [this](std::int64_t task, int worker) {
      auto kind = kinds_.rbegin();
      while (task < kind->first) ++kind;
      engine_.begin();
      kind->body(static_cast<int>(task) - kind->first, pass_.scratch(worker));
      engine_.end();
    });
  }

 private:
  struct Kind {
    int first;
    Task body;
  };
  const Engine& engine_;
  const Pass& pass_;
  int threads_, total_ = 0;
  std::vector<Kind> kinds_;
};

Range part(int of, int task, int tasks) {
  return {static_cast<int>(std::int64_t{of} * task / tasks), static_cast<int>(std::int64_t{of} * (task + 1) / tasks)};
}

// Evenly many rows for every thread, in turns of `kMostStrips` at most.
int row_tasks(const Shape& shape, int threads) {
  const int strips = shape.strips();
  return std::min(threads * divided(strips, threads * kMostStrips), strips);
}

int attention_tasks(const Shape& shape, int threads) { return std::min(shape.batch, threads * kAttentionTasks); }

void add_packing(Run& run, const Engine& engine, const Pass& pass) {
  for (int block = 0; block < pass.shape.depth; ++block) {
    run.add(1, [&, block](int, const Scratch&) { engine.copy_norms(pass, block); });
    for (int matrix = 0; matrix < kMatrices; ++matrix)
      run.add(outputs(pass.shape, matrix) / kBlock,
              [&, block, matrix](int panel, const Scratch&) { engine.pack(pass, block, matrix, panel); });
  }
}

void add_weight_gradients(Run& run, const Engine& engine, const Pass& pass, int block) {
  for (int matrix = 0; matrix < kMatrices; ++matrix) {
    const int rows = outputs(pass.shape, matrix) / kBlock, columns = inputs(pass.shape, matrix) / kBlock;
    const int down = divided(rows, kMostGradientBlocks), across = divided(columns, kMostGradientBlocks);
    run.add(down * across, [=, &engine, &pass](int task, const Scratch& scratch) {
      engine.weight_gradient(pass, block, matrix, part(rows, task / across, down), part(columns, task % across, across), scratch);
    });
  }
}

}  // namespace

std::vector<std::string> engine_names() {
  std::vector<std::string> names{"emulated"};
#if defined(PAIRCLIP_BUILT_avx512_bf16)
  if (best_level() >= Level::avx512_bf16) names.emplace_back(name(Level::avx512_bf16));
#endif
#if defined(PAIRCLIP_BUILT_amx)
  if (best_level() >= Level::amx) names.emplace_back(name(Level::amx));
#endif
  return names;
}

Activation activation(const std::string& name) {
  if (name == "gelu") return Activation::gelu;
  if (name == "relu") return Activation::relu;
  if (name == "silu") return Activation::silu;
  throw std::invalid_argument("tower: the activation is gelu, relu or silu, not '" + name + "'");
}

const Engine& engine(const std::string& name) {
  if (name == "emulated") return portable::engine();
#if defined(PAIRCLIP_BUILT_avx512_bf16)
  if (name == pairclip::name(Level::avx512_bf16) && best_level() >= Level::avx512_bf16) return avx512_bf16::engine();
#endif
#if defined(PAIRCLIP_BUILT_amx)
  if (name == pairclip::name(Level::amx) && best_level() >= Level::amx) return amx::engine();
#endif
  throw std::invalid_argument("tower: no engine named '" + name + "' here");
}

void forward(const Engine& engine, const Pass& pass, int threads) {
  const Shape& shape = pass.shape;
  const int rows = row_tasks(shape, threads), attentions = attention_tasks(shape, threads);
  Run packing(engine, pass, threads);
  add_packing(packing, engine, pass);
  packing();
  for (int block = 0; block <= shape.depth; ++block) {
    Run run(engine, pass, threads);
    run.add(rows, [&](int task, const Scratch& scratch) {
      engine.forward_rows(pass, block, part(shape.strips(), task, rows), scratch);
    });
    run();
    if (block == shape.depth) break;
    Run attention(engine, pass, threads);
    attention.add(attentions, [&](int task, const Scratch& scratch) {
      engine.forward_attention(pass, block, part(shape.batch, task, attentions), scratch);
    });
    attention();
  }
}

void backward(const Engine& engine, const Pass& pass, int threads) {
  const Shape& shape = pass.shape;
  const int rows = row_tasks(shape, threads), attentions = attention_tasks(shape, threads);
  for (int block = shape.depth; block >= 0; --block) {
    if (block < shape.depth) {
      Run attention(engine, pass, threads);
      attention.add(attentions, [&](int task, const Scratch& scratch) {
        engine.backward_attention(pass, block, part(shape.batch, task, attentions), scratch);
      });
      attention();
    }
    Run run(engine, pass, threads);
    run.add(rows, [&](int task, const Scratch& scratch) {
      engine.backward_rows(pass, block, part(shape.strips(), task, rows), scratch);
    });
    // They need nothing of these rows, and fill up what the rows leave idle at the end.
    if (block < shape.depth) add_weight_gradients(run, engine, pass, block);
    run();
  }
  Run norms(engine, pass, threads);
  norms.add(2 * shape.depth, [&](int task, const Scratch&) { engine.norm_gradient(pass, task / 2, task % 2); });
  norms();
}

}  // namespace pairclip::tower
