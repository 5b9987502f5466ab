// Pooling, normalisation and activation as one layer in training: which tasks there are and in which order they run.
//
// Batch normalisation takes two passes over memory each way: the statistics need all numbers before the first result.
// Normalisation over channels takes one. Sums are float32 within a picture and float64 from there on, over pieces of a fixed
// number of pictures: the same bits for any number of threads.
#pragma once

#include "conv/engine.h"

namespace pairclip::conv {

// The best engine for this machine.
const Engine& engine();

// Per channel, float32; variance is the biased one.
struct Statistics {
  float *mean, *variance;
};

template <class T>
void forward(const Layer& layer, const Forward<T>& pass, const float* weight, const float* bias, double epsilon,
             Statistics statistics, int threads);

// Fills in `pass`'s means itself.
template <class T>
void backward(const Layer& layer, Backward<T> pass, const float* weight, const float* bias, double epsilon, Statistics statistics,
              float* weight_gradient, float* bias_gradient, int threads);

// Of normalisation over the channels of each pixel.
template <class T>
void channel_forward(const Layer& layer, const Forward<T>& pass, const Affine& affine, int threads);
template <class T>
void channel_backward(const Layer& layer, const Backward<T>& pass, const Affine& affine, float* weight_gradient,
                      float* bias_gradient, int threads);

}  // namespace pairclip::conv
