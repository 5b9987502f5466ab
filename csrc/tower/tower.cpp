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
  Run(const Engine& engine, int threads) : engine_(engine), threads_(threads) {}

  using Task = std::function<void(int task, int worker)>;
  void add(int tasks, Task body) {
    kinds_.push_back({total_, std::move(body)});
    total_ += tasks;
  }

  void operator()() {
    ThreadPool::shared().run(threads_, total_, [this](std::int64_t task, int worker) {
      auto kind = kinds_.rbegin();
      while (task < kind->first) ++kind;
      engine_.begin();
      kind->body(static_cast<int>(task) - kind->first, worker);
      engine_.end();
    });
  }

 private:
  struct Kind {
    int first;
    Task body;
  };
  const Engine& engine_;
  int threads_, total_ = 0;
  std::vector<Kind> kinds_;
};

Range part(int of, int task, int tasks) {
  return {static_cast<int>(std::int64_t{of} * task / tasks), static_cast<int>(std::int64_t{of} * (task + 1) / tasks)};
}

// Evenly many rows for every thread, in turns of `most_strips`.
int row_tasks(const Engine& engine, const Shape& shape, int threads) {
  const int strips = shape.strips();
  return std::min(threads * divided(strips, threads * most_strips(engine.number_bytes)), strips);
}

int attention_tasks(const Shape& shape, int threads) { return std::min(shape.batch, threads * kAttentionTasks); }

void add_packing(Run& run, const Engine& engine, const Pass& pass) {
  for (int block = 0; block < pass.shape.depth; ++block) {
    run.add(1, [&, block](int, int) { engine.copy_norms(pass, block); });
    for (int matrix = 0; matrix < kMatrices; ++matrix)
      run.add(outputs(pass.shape, matrix) / kBlock,
              [&, block, matrix](int panel, int) { engine.pack(pass, block, matrix, panel); });
  }
}

void add_weight_gradients(Run& run, const Engine& engine, const Pass& pass, int block) {
  for (int matrix = 0; matrix < kMatrices; ++matrix) {
    const int rows = outputs(pass.shape, matrix) / kBlock, columns = inputs(pass.shape, matrix) / kBlock;
    const int most = most_gradient_blocks(engine.number_bytes), down = divided(rows, most), across = divided(columns, most);
    run.add(down * across, [=, &engine, &pass](int task, int worker) {
      engine.weight_gradient(pass, block, matrix, part(rows, task / across, down), part(columns, task % across, across), worker);
    });
  }
}

struct Named {
  const char* name;
  Level least;
  const Engine& (*engine)();
};

const Named kEngines[] = {
    {"emulated", Level::portable, portable::engine<bf16>},
    {"portable", Level::portable, portable::engine<float>},
#if defined(PAIRCLIP_BUILT_avx2)
    {"avx2", Level::avx2, avx2::engine<float>},
#endif
#if defined(PAIRCLIP_BUILT_avx512)
    {"avx512", Level::avx512, avx512::engine<float>},
#endif
#if defined(PAIRCLIP_BUILT_avx512_bf16)
    {"avx512_bf16", Level::avx512_bf16, avx512_bf16::engine<bf16>},
#endif
#if defined(PAIRCLIP_BUILT_amx)
    {"amx", Level::amx, amx::engine<bf16>},
#endif
};

}  // namespace

std::vector<std::string> engine_names() {
  std::vector<std::string> names;
  for (const Named& one : kEngines)
    if (one.least <= best_level()) names.emplace_back(one.name);
  return names;
}

Activation activation(const std::string& name) {
  if (name == "gelu") return Activation::gelu;
  if (name == "relu") return Activation::relu;
  if (name == "silu") return Activation::silu;
  throw std::invalid_argument("tower: the activation is gelu, relu or silu, not '" + name + "'");
}

const Engine& engine(const std::string& name) {
  for (const Named& one : kEngines)
    if (name == one.name && one.least <= best_level()) return one.engine();
  throw std::invalid_argument("tower: no engine named '" + name + "' here");
}

void forward(const Engine& engine, const Pass& pass, int threads) {
  const Shape& shape = pass.shape;
  const int rows = row_tasks(engine, shape, threads), attentions = attention_tasks(shape, threads);
  Run packing(engine, threads);
  add_packing(packing, engine, pass);
  packing();
  for (int block = 0; block <= shape.depth; ++block) {
    Run run(engine, threads);
    run.add(rows, [&](int task, int worker) { engine.forward_rows(pass, block, part(shape.strips(), task, rows), worker); });
    run();
    if (block == shape.depth) break;
    Run attention(engine, threads);
    attention.add(attentions, [&](int task, int worker) {
      engine.forward_attention(pass, block, part(shape.batch, task, attentions), worker);
    });
    attention();
  }
}

void backward(const Engine& engine, const Pass& pass, int threads) {
  const Shape& shape = pass.shape;
  const int rows = row_tasks(engine, shape, threads), attentions = attention_tasks(shape, threads);
  for (int block = shape.depth; block >= 0; --block) {
    if (block < shape.depth) {
      Run attention(engine, threads);
      attention.add(attentions, [&](int task, int worker) {
        engine.backward_attention(pass, block, part(shape.batch, task, attentions), worker);
      });
      attention();
    }
    Run run(engine, threads);
    run.add(rows, [&](int task, int worker) { engine.backward_rows(pass, block, part(shape.strips(), task, rows), worker); });
    // They need nothing of these rows, and fill up what the rows leave idle at the end.
    if (block < shape.depth) add_weight_gradients(run, engine, pass, block);
    run();
  }
  Run norms(engine, threads);
  norms.add(2 * shape.depth, [&](int task, int) { engine.norm_gradient(pass, task / 2, task % 2); });
  norms();
}

}  // namespace pairclip::tower
