// Compiled once per instruction set: fills in that set's table.
#include "core/variant.h"

#include "tower/attention.h"
#include "tower/passes.h"
#include "tower/weight_gradient.h"

namespace pairclip::tower::PAIRCLIP_VARIANT {
namespace {

// Denormal numbers count as zero, as the tiles have it anyway: gradients fade out, and each denormal costs a hundred others.
// The thread may be the caller's, so it gets its own setting back.
#if defined(__SSE__)
constexpr unsigned kDenormalsAreZero = 0x8040;  // flush to zero, denormals are zero (Intel SDM, volume 1, 10.2.3)
thread_local unsigned setting_of_the_caller;
#endif

void begin() {
  Tiles::begin();
#if defined(__SSE__)
  setting_of_the_caller = __builtin_ia32_stmxcsr();
  __builtin_ia32_ldmxcsr(setting_of_the_caller | kDenormalsAreZero);
#endif
}

void end() {
  Tiles::end();
#if defined(__SSE__)
  __builtin_ia32_ldmxcsr(setting_of_the_caller);
#endif
}

template <class T>
void pack(const Pass& pass, int number, int matrix, int panel) {
  const BlockBuffers<T> block = pass.block<T>(number);
  const float* const* parameters = pass.parameters + number * kParametersPerBlock;
  const int from = inputs(pass.shape, matrix), in_blocks = from / kBlock, out_blocks = outputs(pass.shape, matrix) / kBlock;
  const float* weight = parameters[kWeightOf[matrix]] + static_cast<std::size_t>(panel) * kBlock * from;
  alignas(64) T narrow[kBlockNumbers];
  for (int k = 0; k < in_blocks; ++k) {
    for (int r = 0; r < kBlock; ++r)
      write_row(narrow + r * kBlock, read_row(weight + static_cast<std::size_t>(r) * from + k * kBlock));
    pack_rows_as_columns(narrow, block.forward[matrix] + (static_cast<std::size_t>(panel) * in_blocks + k) * kBlockNumbers);
    pack_rows_as_depth(narrow, block.backward[matrix] + (static_cast<std::size_t>(k) * out_blocks + panel) * kBlockNumbers);
  }
  std::memcpy(block.bias[matrix] + panel * kBlock, parameters[kBiasOf[matrix]] + panel * kBlock, kBlock * sizeof(float));
}

template <class T>
void copy_norms(const Pass& pass, int number) {
  const BlockBuffers<T> block = pass.block<T>(number);
  const float* const* parameters = pass.parameters + number * kParametersPerBlock;
  const std::size_t bytes = pass.shape.width * sizeof(float);
  std::memcpy(block.norm1.weight, parameters[kNorm1Weight], bytes);
  std::memcpy(block.norm1.bias, parameters[kNorm1Bias], bytes);
  std::memcpy(block.norm2.weight, parameters[kNorm2Weight], bytes);
  std::memcpy(block.norm2.bias, parameters[kNorm2Bias], bytes);
}

template <class T>
void forward_rows(const Pass& pass, int block, Range strips, int worker) {
  RowPass<T>(pass, strips, pass.scratch<T>(worker)).forward(block);
}
template <class T>
void backward_rows(const Pass& pass, int block, Range strips, int worker) {
  RowPass<T>(pass, strips, pass.scratch<T>(worker)).backward(block);
}

// Attention writes the rows of its samples; those of the padding come with the last sample.
template <class T>
void clear_padding(const Shape& shape, int panels, T* matrix) {
  for (std::int64_t row = shape.rows(); row < std::int64_t{shape.strips()} * kBlock; ++row)
    for (int panel = 0; panel < panels; ++panel) std::memset(row_at(matrix, panels, row, panel), 0, kBlock * sizeof(T));
}

template <class T>
void forward_attention(const Pass& pass, int number, Range samples, int worker) {
  const BlockBuffers<T> block = pass.block<T>(number);
  char* const memory = pass.scratch<T>(worker).packed;
  for (int sample = samples.begin; sample < samples.end; ++sample)
    for (int head = 0; head < pass.shape.heads; ++head) Head<T>(pass.shape, sample, head, memory).forward(block);
  if (samples.end == pass.shape.batch) clear_padding(pass.shape, pass.shape.panels(), block.attended);
}

template <class T>
void backward_attention(const Pass& pass, int number, Range samples, int worker) {
  const BlockBuffers<T> block = pass.block<T>(number);
  const T* gradient = pass.attended<T>();
  char* const memory = pass.scratch<T>(worker).packed;
  for (int sample = samples.begin; sample < samples.end; ++sample)
    for (int head = 0; head < pass.shape.heads; ++head) Head<T>(pass.shape, sample, head, memory).backward(block, gradient);
  if (samples.end == pass.shape.batch) clear_padding(pass.shape, 3 * pass.shape.panels(), block.qkv);
}

template <class T>
void weight_gradient(const Pass& pass, int number, int matrix, Range output_blocks, Range input_blocks, int worker) {
  const BlockBuffers<T> block = pass.block<T>(number);
  const T* const gradients[] = {block.qkv, block.sum1, block.slope, block.sum2};
  const T* const factors[] = {block.normed, block.attended, block.mlp_in, block.hidden};
  float* const* found = pass.gradients + number * kParametersPerBlock;
  const WeightGradient<T> call{.gradients = gradients[matrix],
                               .inputs = factors[matrix],
                               .gradient_panels = outputs(pass.shape, matrix) / kBlock,
                               .input_panels = inputs(pass.shape, matrix) / kBlock,
                               .outputs = output_blocks,
                               .depth = input_blocks,
                               .strips = pass.shape.strips(),
                               .weight = found[kWeightOf[matrix]],
                               .bias = input_blocks.begin == 0 ? found[kBiasOf[matrix]] : nullptr};
  WeightGradientTask<T>(call, pass.scratch<T>(worker)).run();
}

template <class T>
void norm_gradient(const Pass& pass, int number, int norm) {
  const BlockBuffers<T> block = pass.block<T>(number);
  const float* sums = (norm == 0 ? block.norm1 : block.norm2).sums;
  float* const* found = pass.gradients + number * kParametersPerBlock + (norm == 0 ? kNorm1Weight : kNorm2Weight);
  const int width = pass.shape.width;
  for (int which = 0; which < 2; ++which)
    for (int i = 0; i < width; i += kBlock) {
      Row total{};
      for (int strip = 0; strip < pass.shape.strips(); ++strip)
        total = total + read_row(sums + (static_cast<std::size_t>(strip) * 2 + which) * width + i);
      write_row(found[which] + i, total);
    }
}

template <class T>
void activate(Activation activation, const float* numbers, int count, float* values, float* slopes) {
  with_activation<T>(activation, [&](auto chosen) {
    for (int i = 0; i < count; i += kLanes) {
      const Activated found = chosen(load(numbers + i));
      store(values + i, found.value);
      store(slopes + i, found.slope);
    }
  });
}

template <class T>
constexpr Engine kEngine{.number_bytes = sizeof(T),
                         .workspace_bytes = workspace_bytes<T>,
                         .begin = begin,
                         .end = end,
                         .pack = pack<T>,
                         .copy_norms = copy_norms<T>,
                         .forward_rows = forward_rows<T>,
                         .backward_rows = backward_rows<T>,
                         .forward_attention = forward_attention<T>,
                         .backward_attention = backward_attention<T>,
                         .weight_gradient = weight_gradient<T>,
                         .norm_gradient = norm_gradient<T>,
                         .activate = activate<T>};

}  // namespace

template <class T>
const Engine& engine() {
  return kEngine<T>;
}

// Those that engine.h names for this instruction set.
#if !defined(__AVX2__) || defined(__AVX512BF16__)
template const Engine& engine<bf16>();
#endif
#if !defined(__AVX512BF16__)
template const Engine& engine<float>();
#endif

}  // namespace pairclip::tower::PAIRCLIP_VARIANT
