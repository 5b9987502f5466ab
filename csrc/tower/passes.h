// The steps of a transformer block in their order, for the rows of some strips: everything between two attentions is one task.
//
// Rows meet each other only in attention, so a task takes its strips through projection, residual, norm, MLP, and on into the
// next block, while they are still in the second-level cache. The two products of the MLP alternate, 512 hidden columns at a
// time.
#pragma once

#include "tower/activation.h"
#include "tower/layer_norm.h"
#include "tower/products.h"

namespace pairclip::tower::PAIRCLIP_VARIANT {

template <class T>
class RowPass {
 public:
  RowPass(const Pass& pass, Range strips, const Scratch<T>& scratch)
      : pass_(pass), shape_(pass.shape), strips_(strips), scratch_(scratch), panels_(shape_.panels()) {}

  void forward(int number) const {
    if (number == 0) {
      read_tokens(pass_.block<T>(0).in);
    } else {
      finish(pass_.block<T>(number - 1));
    }
    if (number == shape_.depth) {
      write_tokens(pass_.block<T>(number - 1).out);
    } else {
      start(pass_.block<T>(number));
    }
  }

  void backward(int number) const {
    T* between = shape_.pre_norm ? nullptr : pass_.rolling<T>();
    if (number == shape_.depth) {
      read_tokens(between != nullptr ? between : pass_.block<T>(number - 1).out);
    } else {
      start_backward(pass_.block<T>(number), between);
    }
    if (number == 0) {
      write_tokens(between != nullptr ? between : pass_.block<T>(0).in);
    } else {
      finish_backward(pass_.block<T>(number - 1), between);
    }
  }

 private:
  // The caller's rows, which are in one piece each; zeros after the last.
  void read_tokens(T* to) const {
    for (std::int64_t row = std::int64_t{strips_.begin} * kBlock; row < std::int64_t{strips_.end} * kBlock; ++row)
      for (int panel = 0; panel < panels_; ++panel)
        write_row(row_at(to, panels_, row, panel),
                  row < shape_.rows() ? read_row(pass_.tokens + row * shape_.width + panel * kBlock) : Row{});
  }
  void write_tokens(T* from) const {
    const std::int64_t end = std::int64_t{strips_.end} * kBlock;
    for (std::int64_t row = std::int64_t{strips_.begin} * kBlock; row < (end < shape_.rows() ? end : shape_.rows()); ++row)
      for (int panel = 0; panel < panels_; ++panel)
        write_row(pass_.result + row * shape_.width + panel * kBlock, read_row(row_at(from, panels_, row, panel)));
  }

  Product<T> product(const T* left, int left_panels, const T* weight, int panels) const {
    return {.left = block_at(left, left_panels, strips_.begin, 0),
            .left_panels = left_panels,
            .strips = strips_.end - strips_.begin,
            .weight = weight,
            .weight_blocks = left_panels,
            .panels = panels,
            .sums = scratch_.sums};
  }

  T* row_of(T* matrix, int panels, int strip, int panel, int row) const {
    return block_at(matrix, panels, strips_.begin + strip, panel) + row * kBlock;
  }

  // norm1 if it comes first, then queries, keys and values.
  void start(const BlockBuffers<T>& block) const {
    if (shape_.pre_norm) normalise(block.in, block.normed, panels_, strips_, block.norm1);
    const int panels = 3 * panels_;
    multiply_whole(
        product(block.normed, panels_, block.forward[kQkv], panels), [&](int strip, int panel, int row, const float* sums) {
          write_row(row_of(block.qkv, panels, strip, panel, row), read_row(sums) + read_row(block.bias[kQkv] + panel * kBlock));
        });
  }

  // Output projection, residual and MLP, with a norm between.
  void finish(const BlockBuffers<T>& block) const {
    const auto add_to = [&](T* residual, const float* bias, T* to) {
      return [=, this](int strip, int panel, int row, const float* sums) {
        const Row old = read_row(row_of(residual, panels_, strip, panel, row));
        write_row(row_of(to, panels_, strip, panel, row), read_row(sums) + read_row(bias + panel * kBlock) + old);
      };
    };
    multiply_whole(product(block.attended, panels_, block.forward[kOut], panels_),
                   add_to(block.in, block.bias[kOut], block.sum1));
    normalise(block.sum1, block.mlp_in, panels_, strips_, shape_.pre_norm ? block.norm2 : block.norm1);
    with_activation<T>(shape_.activation, [&](auto activation) {
      mlp(block, activation, add_to(shape_.pre_norm ? block.sum1 : block.mlp_in, block.bias[kDown], block.sum2));
    });
    if (!shape_.pre_norm) normalise(block.sum2, block.out, panels_, strips_, block.norm2);
  }

  template <class Of, class Finish>
  void mlp(const BlockBuffers<T>& block, Of activation, Finish finish) const {
    const int panels = shape_.mlp_panels();
    in_pieces(
        product(block.mlp_in, panels_, block.forward[kUp], panels), product(block.hidden, panels, block.forward[kDown], panels_),
        [&](int strip, int panel, int row, const float* sums) {
          const Row in = read_row(sums) + read_row(block.bias[kUp] + panel * kBlock);
          Row value, slope;
#pragma GCC unroll 8
          for (int i = 0; i < kVecs; ++i) {
            const Activated found = activation(in.part[i]);
            value.part[i] = found.value;
            slope.part[i] = found.slope;
          }
          write_row(row_of(block.hidden, panels, strip, panel, row), value);
          write_row(row_of(block.slope, panels, strip, panel, row), slope);
        },
        finish);
  }

  // `first` makes the columns that are the depth of `second`, and both go on together.
  template <class FinishFirst, class FinishSecond>
  void in_pieces(Product<T> first, const Product<T>& second, FinishFirst finish_first, FinishSecond finish_second) const {
    const int blocks = second.weight_blocks;
    const T* weight = first.weight;
    for (int from = 0; from < blocks; from += kPiece) {
      const int count = blocks - from < kPiece ? blocks - from : kPiece;
      first.weight = weight + static_cast<std::size_t>(from) * first.weight_blocks * kBlockNumbers;
      first.panels = count;
      first.sums = scratch_.hidden_sums;
      multiply_whole(first,
                     [&](int strip, int panel, int row, const float* sums) { finish_first(strip, from + panel, row, sums); });
      multiply(second, {.left = from, .weight = from, .blocks = count, .first = from == 0, .last = from + count == blocks},
               finish_second);
    }
  }

  // From the gradient of the block's result to that of what attention gave.
  void finish_backward(const BlockBuffers<T>& block, T* between) const {
    if (!shape_.pre_norm)
      normalise_backward<T>({block.sum2, from_here(between), nullptr, block.sum2}, panels_, strips_, block.norm2);
    const int panels = shape_.mlp_panels();
    in_pieces(
        product(block.sum2, panels_, block.backward[kDown], panels), product(block.slope, panels, block.backward[kUp], panels_),
        [&](int strip, int panel, int row, const float* sums) {
          T* slope = row_of(block.slope, panels, strip, panel, row);
          write_row(slope, read_row(sums) * read_row(slope));
        },
        [&](int strip, int panel, int row, const float* sums) {
          Row found = read_row(sums);
          if (!shape_.pre_norm) found = found + read_row(row_of(block.sum2, panels_, strip, panel, row));
          write_row(block_at(scratch_.rows, panels_, strip, panel) + row * kBlock, found);
        });
    normalise_backward<T>({block.sum1, scratch_.rows, shape_.pre_norm ? block.sum2 : nullptr, block.sum1}, panels_, strips_,
                          shape_.pre_norm ? block.norm2 : block.norm1);
    T* attended = pass_.attended<T>();
    multiply_whole(product(block.sum1, panels_, block.backward[kOut], panels_),
                   [&](int strip, int panel, int row, const float* sums) {
                     write_row(row_of(attended, panels_, strip, panel, row), read_row(sums));
                   });
  }

  // From the gradients of queries, keys and values to that of the block's tokens.
  void start_backward(const BlockBuffers<T>& block, T* between) const {
    multiply_whole(product(block.qkv, 3 * panels_, block.backward[kQkv], panels_), [&](int strip, int panel, int row,
                                                                                       const float* sums) {
      const Row found = read_row(sums);
      if (shape_.pre_norm) {
        write_row(block_at(scratch_.rows, panels_, strip, panel) + row * kBlock, found);
      } else {
        write_row(row_of(between, panels_, strip, panel, row), found + read_row(row_of(block.sum1, panels_, strip, panel, row)));
      }
    });
    if (shape_.pre_norm) normalise_backward<T>({block.in, scratch_.rows, block.sum1, block.in}, panels_, strips_, block.norm1);
  }

  const T* from_here(T* matrix) const { return block_at(matrix, panels_, strips_.begin, 0); }

  const Pass& pass_;
  const Shape& shape_;
  Range strips_;
  const Scratch<T>& scratch_;
  int panels_;
};

}  // namespace pairclip::tower::PAIRCLIP_VARIANT
