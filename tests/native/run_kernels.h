// SPDX-License-Identifier: Apache-2.0
// Every op on every backend, called directly: arrays of any strides in, the kernels' parameters filled, the work split.
// What the NumPy bridge and the sanitizer executables stand on; the torch binding does the same for tensors.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <limits>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "kernels/project.h"
#include "kernels/rigid_align.h"
#include "kernels/soft_argmax.h"
#include "kernels/triangulate.h"
#include "kernels/unproject.h"

namespace tritool::testing {

using Sizes = std::vector<int64_t>;

// Memory as NumPy sees it; strides count elements. Without data: an operand that is absent.
struct Array {
  void* data = nullptr;
  Sizes size, stride;

  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
  int dims() const { return static_cast<int>(size.size()); }
  // Of the dimension `from_end` places before the end.
  int64_t size_at(int from_end) const { return size[size.size() - static_cast<size_t>(from_end)]; }
  int64_t stride_at(int from_end) const { return stride[stride.size() - static_cast<size_t>(from_end)]; }
};

struct Backend {
  bool emulated_cuda = false;
  Isa isa = Isa::kBaseline;
  int threads = 1;             // the CPU kernels' work is cut into as many ranges, each run by a thread of its own
  int64_t items_per_unit = 0;  // of the sums in kernels/shared_sum.h; 0: as the package does it
};

inline std::string text_of(const Sizes& sizes) {
  std::string text = "(";
  for (size_t d = 0; d < sizes.size(); ++d) text += (d == 0 ? "" : ", ") + std::to_string(sizes[d]);
  return text + ")";
}

// The array is [batch..., trailing...]; -1: any size.
inline void check_trailing(const Array& array, const char* name, std::initializer_list<int64_t> trailing) {
  const int count = static_cast<int>(trailing.size());
  bool fits = array.dims() >= count;
  int from_end = count;
  for (const int64_t size : trailing) {
    fits = fits && (size < 0 || array.size_at(from_end) == size);
    --from_end;
  }
  if (!fits)
    throw std::invalid_argument(std::string(name) + " must end in " + text_of(trailing) + ", got " +
                                text_of(array.size));
}

inline Sizes batch_of(const Array& array, int trailing_dims) {
  return Sizes(array.size.begin(), array.size.end() - trailing_dims);
}

// NumPy's rule: aligned at the end, size 1 stands for any size.
inline Sizes broadcast(const Sizes& a, const Sizes& b) {
  Sizes result(a.size() > b.size() ? a.size() : b.size());
  for (size_t from_end = 1; from_end <= result.size(); ++from_end) {
    const int64_t of_a = from_end <= a.size() ? a[a.size() - from_end] : 1;
    const int64_t of_b = from_end <= b.size() ? b[b.size() - from_end] : 1;
    if (of_a != of_b && of_a != 1 && of_b != 1)
      throw std::invalid_argument("batch dimensions " + text_of(a) + " and " + text_of(b) + " do not broadcast");
    result[result.size() - from_end] = of_a == 1 ? of_b : of_a;
  }
  return result;
}

inline Sizes batch_strides(const Array& array, int trailing_dims, const Sizes& batch) {
  Sizes strides(batch.size(), 0);
  const Sizes own = array.data == nullptr ? Sizes() : batch_of(array, trailing_dims);
  for (size_t from_end = 1; from_end <= own.size(); ++from_end)
    if (own[own.size() - from_end] != 1) strides[strides.size() - from_end] = array.stride[own.size() - from_end];
  return strides;
}

struct Operand {
  const Array& array;
  int trailing_dims;
};

template <int kOperands>
void set_batch(Batch<kOperands>& result, const Sizes& batch, const Operand (&operands)[kOperands], int owner = -1) {
  Sizes strides[kOperands];
  const int64_t* pointers[kOperands];
  for (int o = 0; o < kOperands; ++o) {
    strides[o] = batch_strides(operands[o].array, operands[o].trailing_dims, batch);
    pointers[o] = strides[o].data();
  }
  if (!make_batch(batch.data(), static_cast<int>(batch.size()), pointers, result, owner))
    throw std::invalid_argument("too many batch dimensions that cannot be merged");
}

template <class T>
void set_zero(const Array& contiguous) {
  int64_t count = 1;
  for (const int64_t size : contiguous.size) count *= size;
  for (int64_t i = 0; i < count; ++i) contiguous.as<T>()[i] = T(0);
}

// Scratch of which nothing may be read before it is written.
template <class T>
std::vector<T> scratch(int64_t count) {
  return std::vector<T>(static_cast<size_t>(count), std::numeric_limits<T>::quiet_NaN());
}

template <class Function>
void in_threads(int threads, int64_t count, Function&& run) {
  std::vector<std::thread> pool;
  for (int64_t part = 1; part < threads; ++part)
    pool.emplace_back([&run, part, threads, count] { run(part * count / threads, (part + 1) * count / threads); });
  run(int64_t(0), count / threads);
  for (std::thread& thread : pool) thread.join();
}

inline void check_launch(int error) {
  if (error != 0) throw std::runtime_error("the launch failed with " + std::to_string(error));
}

template <class Params>
SharedSumPlan plan_of(const Backend& backend, const Params& params, bool summed, int64_t entries) {
  const int64_t shared = params.batch.shared;
  int64_t items = backend.emulated_cuda ? warp_items_per_unit(shared) : kCpuItemsPerUnit;
  if (backend.items_per_unit > 0) items = backend.items_per_unit;
  if (backend.emulated_cuda && summed && items > shared) items = shared;  // a warp serves one owner
  return shared_sum_plan(params.batch, summed, entries, items);
}

template <class Params, class Kernels>
void run_shared_sum(const Backend& backend, const Params& params, const SharedSumPlan& plan, const Kernels& kernels) {
  in_threads(backend.threads, plan.units,
             [&](int64_t begin, int64_t end) { kernels.backward(params, plan, begin, end); });
  if (plan.units_per_owner == 1) return;
  in_threads(backend.threads, params.batch.count / params.batch.shared,
             [&](int64_t begin, int64_t end) { kernels.backward_sum(params, plan, begin, end); });
}

// ---- Triangulation ----

template <class Params>
void set_views(Params& params, const Array& points, const Array& projections, const Array& weights) {
  check_trailing(points, "points", {-1, 2});
  params.views = static_cast<int>(points.size_at(2));
  check_trailing(projections, "projections", {params.views, 3, 4});
  if (weights.data != nullptr) check_trailing(weights, "weights", {params.views});
  params.points_stride[0] = points.stride_at(2);
  params.points_stride[1] = points.stride_at(1);
  for (int d = 0; d < 3; ++d) params.projections_stride[d] = projections.stride_at(3 - d);
  params.weights_stride = weights.data != nullptr ? weights.stride_at(1) : 0;
}

// points_3d: contiguous, in the batch of all operands.
template <class T>
void triangulate(const Backend& backend, const Array& points, const Array& projections, const Array& weights,
                 bool homogeneous, const Array& points_3d) {
  TriangulateParams<T> params{};
  params.points = points.as<T>();
  params.projections = projections.as<T>();
  params.weights = weights.as<T>();
  params.points_3d = points_3d.as<T>();
  params.homogeneous = homogeneous;
  set_views(params, points, projections, weights);
  set_batch(params.batch, batch_of(points_3d, 1), {{points, 2}, {projections, 3}, {weights, 1}, {points_3d, 1}});
  if (backend.emulated_cuda) return check_launch(cuda::triangulate(params, nullptr));
  const auto& kernels = TRITOOL_KERNELS_OF(backend.isa, triangulate_kernels, T);
  in_threads(backend.threads, params.batch.count,
             [&](int64_t begin, int64_t end) { kernels.forward(params, begin, end); });
}

// Gradients to points and weights: contiguous, in the batch of all operands; to projections: in their own shape.
template <class T>
void triangulate_backward(const Backend& backend, const Array& grad, const Array& points, const Array& projections,
                          const Array& weights, bool homogeneous, const Sizes& batch, const Array& grad_points,
                          const Array& grad_projections, const Array& grad_weights) {
  using Params = TriangulateBackwardParams<T>;
  Params params{};
  params.grad = grad.as<T>();
  params.points = points.as<T>();
  params.projections = projections.as<T>();
  params.weights = weights.as<T>();
  params.grad_points = grad_points.as<T>();
  params.grad_projections = grad_projections.as<T>();
  params.grad_weights = grad_weights.as<T>();
  params.homogeneous = homogeneous;
  check_trailing(grad, "grad", {3});
  params.grad_stride = grad.stride_at(1);
  set_views(params, points, projections, weights);
  const bool summed = grad_projections.data != nullptr;
  set_batch(params.batch, batch,
            {{grad, 1},
             {points, 2},
             {projections, 3},
             {weights, 1},
             {grad_points, 2},
             {grad_projections, 3},
             {grad_weights, 1}},
            summed ? int(Params::kGradProjections) : -1);
  if (params.batch.count == 0) return summed ? set_zero<T>(grad_projections) : void();
  const SharedSumPlan plan = plan_of(backend, params, summed, 12 * int64_t(params.views));
  std::vector<T> partial_sums = scratch<T>(plan.partial_count);
  params.partial_sums = partial_sums.data();
  if (backend.emulated_cuda) return check_launch(cuda::triangulate_backward(params, plan, nullptr));
  run_shared_sum(backend, params, plan, TRITOOL_KERNELS_OF(backend.isa, triangulate_kernels, T));
}

// ---- Projection ----

template <class Params>
void set_matrices(Params& params, const Array& points, const Array& projections) {
  check_trailing(points, "points", {3});
  check_trailing(projections, "projections", {-1, 3, 4});
  params.views = static_cast<int>(projections.size_at(3));
  params.points_stride = points.stride_at(1);
  for (int d = 0; d < 3; ++d) params.projections_stride[d] = projections.stride_at(3 - d);
}

template <class T>
void project(const Backend& backend, const Array& points, const Array& projections, const Array& pixels) {
  ProjectParams<T> params{};
  params.points = points.as<T>();
  params.projections = projections.as<T>();
  params.pixels = pixels.as<T>();
  set_matrices(params, points, projections);
  set_batch(params.batch, batch_of(pixels, 2), {{points, 1}, {projections, 3}, {pixels, 2}});
  if (backend.emulated_cuda) return check_launch(cuda::project(params, nullptr));
  const auto& kernels = TRITOOL_KERNELS_OF(backend.isa, project_kernels, T);
  in_threads(backend.threads, params.batch.count,
             [&](int64_t begin, int64_t end) { kernels.forward(params, begin, end); });
}

template <class T>
void project_backward(const Backend& backend, const Array& grad, const Array& points, const Array& projections,
                      const Sizes& batch, const Array& grad_points, const Array& grad_projections) {
  using Params = ProjectBackwardParams<T>;
  Params params{};
  params.grad = grad.as<T>();
  params.points = points.as<T>();
  params.projections = projections.as<T>();
  params.grad_points = grad_points.as<T>();
  params.grad_projections = grad_projections.as<T>();
  set_matrices(params, points, projections);
  check_trailing(grad, "grad", {params.views, 2});
  params.grad_stride[0] = grad.stride_at(2);
  params.grad_stride[1] = grad.stride_at(1);
  const bool summed = grad_projections.data != nullptr;
  set_batch(params.batch, batch, {{grad, 2}, {points, 1}, {projections, 3}, {grad_points, 1}, {grad_projections, 3}},
            summed ? int(Params::kGradProjections) : -1);
  if (params.batch.count == 0) return summed ? set_zero<T>(grad_projections) : void();
  const SharedSumPlan plan = plan_of(backend, params, summed, 12 * int64_t(params.views));
  std::vector<T> partial_sums = scratch<T>(plan.partial_count);
  params.partial_sums = partial_sums.data();
  if (backend.emulated_cuda) return check_launch(cuda::project_backward(params, plan, nullptr));
  run_shared_sum(backend, params, plan, TRITOOL_KERNELS_OF(backend.isa, project_kernels, T));
}

// ---- Unprojection ----

struct UnprojectInputs {
  Array features, projections, grid, confidences;
  Sizes size;  // of a frame; empty: the grid is points
  int aggregation;
  bool exclude, official;
};

struct UnprojectOutputs {
  Array features, projections, grid, confidences;
};

template <int64_t kCount>
void set_strides(int64_t (&strides)[kCount], const Array& array) {
  for (int64_t d = 0; d < kCount; ++d) strides[d] = array.stride_at(int(kCount - d));
}

// volume: [batch, K, N], in the batch of all operands. `stored`: where staged features lie.
template <class In>
UnprojectParams<In> unproject_params(const Backend& backend, const UnprojectInputs& inputs, const Array& volume,
                                     const Array& grad_features, std::vector<uint64_t>& stored) {
  using T = Accumulator<In>;
  check_trailing(inputs.features, "features", {-1, -1, -1, -1});
  UnprojectParams<In> params{};
  params.features = inputs.features.template as<In>();
  params.projections = inputs.projections.template as<T>();
  params.grid = inputs.grid.template as<T>();
  params.confidences = inputs.confidences.template as<T>();
  params.volume = volume.as<In>();
  params.views = static_cast<int>(inputs.features.size_at(4));
  params.channels = inputs.features.size_at(3);
  params.height = inputs.features.size_at(2);
  params.width = inputs.features.size_at(1);
  check_trailing(inputs.projections, "projections", {params.views, 3, 4});
  check_trailing(inputs.grid, "grid", {inputs.size.empty() ? -1 : 4, 3});
  params.points = inputs.size.empty() ? inputs.grid.size_at(2) : 1;
  for (size_t d = 0; d < inputs.size.size(); ++d) {
    params.grid_size[d] = inputs.size[d];
    params.points *= inputs.size[d];
  }
  check_trailing(volume, "volume", {params.channels, params.points});
  set_strides(params.features_stride, inputs.features);
  set_strides(params.projections_stride, inputs.projections);
  set_strides(params.grid_stride, inputs.grid);
  if (inputs.confidences.data != nullptr) {
    check_trailing(inputs.confidences, "confidences", {params.views, params.channels});
    set_strides(params.confidences_stride, inputs.confidences);
  }
  set_strides(params.volume_stride, volume);
  params.aggregation = inputs.aggregation;
  params.exclude = inputs.exclude;
  params.official = inputs.official;
  params.rows = backend.emulated_cuda ? cuda::unproject_rows(params) : cpu::unproject_rows(params);
  const Sizes batch = batch_of(volume, 2);
  const Sizes strides[] = {batch_strides(inputs.features, 4, batch),    Sizes(batch.size(), 0),
                           batch_strides(inputs.projections, 3, batch), batch_strides(inputs.grid, 2, batch),
                           batch_strides(inputs.confidences, 2, batch), batch_strides(volume, 2, batch),
                           batch_strides(grad_features, 4, batch)};
  const int64_t* pointers[UnprojectParams<In>::kOperands];
  for (int o = 0; o < UnprojectParams<In>::kOperands; ++o) pointers[o] = strides[o].data();
  if (!set_unproject_batch(params, batch.data(), static_cast<int>(batch.size()), pointers))
    throw std::invalid_argument("too many batch dimensions that cannot be merged");
  // More than is asked for: the emulated device wants rows that start at a multiple of 16 bytes.
  const int64_t bytes = staged_count(params) * int64_t(backend.emulated_cuda ? sizeof(In) : sizeof(T));
  stored.assign(static_cast<size_t>(bytes / 8 + 3), 0x5a5a5a5a5a5a5a5a);
  params.staged = stored.data() + (reinterpret_cast<uintptr_t>(stored.data()) % 16 != 0);
  return params;
}

template <class In>
void stage(const Backend& backend, const UnprojectParams<In>& params, const cpu::UnprojectKernels<In>& kernels) {
  if (!params.rows.staged) return;
  in_threads(backend.threads, params.own_maps.count * params.views * params.height,
             [&](int64_t begin, int64_t end) { kernels.stage(params, begin, end); });
}

template <class In>
void unproject(const Backend& backend, const UnprojectInputs& inputs, const Array& volume) {
  std::vector<uint64_t> stored;
  const UnprojectParams<In> params = unproject_params<In>(backend, inputs, volume, {}, stored);
  if (backend.emulated_cuda) return check_launch(cuda::unproject(params, nullptr));
  const auto& kernels = TRITOOL_KERNELS_OF(backend.isa, unproject_kernels, In);
  stage(backend, params, kernels);
  in_threads(backend.threads, params.batch.count * cpu::unproject_blocks(params.points),
             [&](int64_t begin, int64_t end) { kernels.forward(params, begin, end); });
}

// Gradients in the batch of all operands, contiguous but for the features', which may have any strides.
template <class In>
void unproject_backward(const Backend& backend, const Array& grad, const UnprojectInputs& inputs, bool deterministic,
                        const UnprojectOutputs& outputs) {
  using T = Accumulator<In>;
  std::vector<uint64_t> stored;
  const UnprojectParams<In> params = unproject_params<In>(backend, inputs, grad, outputs.features, stored);
  UnprojectGradients<In> gradients{};
  gradients.features = outputs.features.template as<In>();
  gradients.projections = outputs.projections.template as<T>();
  gradients.grid = outputs.grid.template as<T>();
  gradients.confidences = outputs.confidences.template as<T>();
  if (gradients.features != nullptr) set_strides(gradients.features_stride, outputs.features);
  const UnprojectPlan plan = backend.emulated_cuda ? cuda::unproject_plan(params, gradients, deterministic)
                                                   : cpu::unproject_plan(params, gradients);
  std::vector<double> sums(static_cast<size_t>(plan.sums_count) + 2, 0.0 / 0.0),
      partial(static_cast<size_t>(plan.partial_bytes / 8) + 1, 0.0 / 0.0);
  gradients.sums = reinterpret_cast<T*>(sums.data() + (reinterpret_cast<uintptr_t>(sums.data()) % 16 != 0));
  gradients.partial = partial.data();
  if (backend.emulated_cuda) return check_launch(cuda::unproject_backward(params, gradients, plan, nullptr));
  const auto& kernels = TRITOOL_KERNELS_OF(backend.isa, unproject_kernels, In);
  if (unproject_backward_samples(params, gradients)) stage(backend, params, kernels);
  in_threads(backend.threads, plan.units,
             [&](int64_t begin, int64_t end) { kernels.backward(params, gradients, plan, begin, end); });
  if (gradients.features != nullptr && !gradients.direct)
    in_threads(backend.threads, params.batch.count * params.views * params.height,
               [&](int64_t begin, int64_t end) { kernels.backward_rows(params, gradients, plan, begin, end); });
  in_threads(backend.threads, params.batch.count,
             [&](int64_t begin, int64_t end) { kernels.backward_sums(params, gradients, plan, begin, end); });
}

// ---- Rigid alignment ----

template <class Params>
void set_points(Params& params, const Array& source, const Array& target, const Array& weights, bool with_scale) {
  check_trailing(source, "source", {-1, 3});
  params.points = static_cast<int>(source.size_at(2));
  check_trailing(target, "target", {params.points, 3});
  if (weights.data != nullptr) check_trailing(weights, "weights", {params.points});
  for (int d = 0; d < 2; ++d) {
    params.source_stride[d] = source.stride_at(2 - d);
    params.target_stride[d] = target.stride_at(2 - d);
  }
  params.weights_stride = weights.data != nullptr ? weights.stride_at(1) : 0;
  params.with_scale = with_scale;
}

// The three results of an alignment, or their gradients: contiguous as results; absent gradients count as zero.
struct Alignment {
  Array rotation, translation, scale;
};

template <class T>
void rigid_align(const Backend& backend, const Array& source, const Array& target, const Array& weights,
                 bool with_scale, const Alignment& result) {
  RigidAlignParams<T> params{};
  params.source = source.as<T>();
  params.target = target.as<T>();
  params.weights = weights.as<T>();
  params.rotation = result.rotation.as<T>();
  params.translation = result.translation.as<T>();
  params.scale = result.scale.as<T>();
  set_points(params, source, target, weights, with_scale);
  set_batch(params.batch, result.scale.size,
            {{source, 2}, {target, 2}, {weights, 1}, {result.rotation, 2}, {result.translation, 1}, {result.scale, 0}});
  if (backend.emulated_cuda) return check_launch(cuda::rigid_align(params, nullptr));
  const auto& kernels = TRITOOL_KERNELS_OF(backend.isa, rigid_align_kernels, T);
  in_threads(backend.threads, params.batch.count,
             [&](int64_t begin, int64_t end) { kernels.forward(params, begin, end); });
}

// Gradients: contiguous, in the batch of all operands.
template <class T>
void rigid_align_backward(const Backend& backend, const Alignment& grad, const Array& source, const Array& target,
                          const Array& weights, bool with_scale, const Sizes& batch, const Array& grad_source,
                          const Array& grad_target, const Array& grad_weights) {
  RigidAlignBackwardParams<T> params{};
  params.grad_rotation = grad.rotation.as<T>();
  params.grad_translation = grad.translation.as<T>();
  params.grad_scale = grad.scale.as<T>();
  params.source = source.as<T>();
  params.target = target.as<T>();
  params.weights = weights.as<T>();
  params.grad_source = grad_source.as<T>();
  params.grad_target = grad_target.as<T>();
  params.grad_weights = grad_weights.as<T>();
  set_points(params, source, target, weights, with_scale);
  if (grad.rotation.data != nullptr) {
    check_trailing(grad.rotation, "grad_rotation", {3, 3});
    for (int d = 0; d < 2; ++d) params.grad_rotation_stride[d] = grad.rotation.stride_at(2 - d);
  }
  if (grad.translation.data != nullptr) {
    check_trailing(grad.translation, "grad_translation", {3});
    params.grad_translation_stride = grad.translation.stride_at(1);
  }
  set_batch(params.batch, batch,
            {{grad.rotation, 2},
             {grad.translation, 1},
             {grad.scale, 0},
             {source, 2},
             {target, 2},
             {weights, 1},
             {grad_source, 2},
             {grad_target, 2},
             {grad_weights, 1}});
  if (backend.emulated_cuda) return check_launch(cuda::rigid_align_backward(params, nullptr));
  const auto& kernels = TRITOOL_KERNELS_OF(backend.isa, rigid_align_kernels, T);
  in_threads(backend.threads, params.batch.count,
             [&](int64_t begin, int64_t end) { kernels.backward(params, begin, end); });
}

// ---- Softmax moments ----

// The last `dims` dimensions as three axes, the first of size 1 for a 2D map.
inline void set_axes(const Array& maps, int dims, int64_t (&size)[3], int64_t (&stride)[3]) {
  for (int axis = 0; axis < 3; ++axis) {
    const bool there = axis >= 3 - dims;
    size[axis] = there ? maps.size_at(3 - axis) : 1;
    stride[axis] = there ? maps.stride_at(3 - axis) : 0;
  }
}

template <class In>
Accumulator<In> base_two(double inverse_temperature) {
  return Accumulator<In>(inverse_temperature * 1.4426950408889634074);  // log2(e)
}

// Without values: covariance and log_partition may be absent. With them: both are, and the mean has one number more.
struct Moments {
  Array mean, covariance, log_partition, partition;
};

template <class In>
void softmax_moments(const Backend& backend, const Array& logits, const Array& values, int dims,
                     double inverse_temperature, const Moments& moments) {
  using T = Accumulator<In>;
  using Params = SoftmaxMomentsParams<In>;
  const Array& second = values.data != nullptr ? values : logits;
  Params params{};
  params.logits = logits.as<In>();
  params.values = values.as<In>();
  params.mean = moments.mean.as<T>();
  params.covariance = moments.covariance.as<T>();
  params.log_partition = moments.log_partition.as<T>();
  params.partition = moments.partition.as<T>();
  params.dims = dims;
  params.c = base_two<In>(inverse_temperature);
  set_axes(logits, dims, params.size, params.stride[Params::kLogits]);
  set_axes(second, dims, params.size, params.stride[Params::kValues]);
  set_batch(params.maps, batch_of(logits, dims), {{logits, dims}, {second, dims}});
  params.maps_adjacent =
      are_maps_adjacent(params.maps, {params.stride[Params::kLogits][2], params.stride[Params::kValues][2]});
  if (backend.emulated_cuda) {
    const int64_t elements = params.size[0] * params.size[1] * params.size[2];
    const int64_t splits = cuda::softmax_moments_splits(params.maps.count, elements);
    std::vector<T> partial = scratch<T>(splits > 1 ? params.maps.count * splits * cuda::kMomentStateSize : 0);
    params.partial = partial.data();
    return check_launch(cuda::softmax_moments(params, nullptr));
  }
  const auto& kernels = TRITOOL_KERNELS_OF(backend.isa, softmax_moments_kernels, In);
  in_threads(backend.threads, kernels.work(params),
             [&](int64_t begin, int64_t end) { kernels.forward(params, begin, end); });
}

// What comes in for the moments' gradients and is absent counts as zero; all but the logits is contiguous.
template <class In>
void softmax_moments_backward(const Backend& backend, const Moments& grad, const Array& logits, const Array& values,
                              const Moments& moments, int dims, double inverse_temperature, const Array& grad_logits,
                              const Array& grad_values) {
  using T = Accumulator<In>;
  using Params = SoftmaxMomentsBackwardParams<In>;
  Params params{};
  params.logits = logits.as<In>();
  params.grad_logits = grad_logits.as<In>();
  params.values = values.as<In>();
  params.grad_values = grad_values.as<In>();
  params.mean = moments.mean.as<T>();
  params.covariance = grad.covariance.data != nullptr ? moments.covariance.as<T>() : nullptr;
  params.partition = moments.partition.as<T>();
  params.grad_mean = grad.mean.as<T>();
  params.grad_covariance = grad.covariance.as<T>();
  params.grad_log_partition = grad.log_partition.as<T>();
  params.dims = dims;
  params.c = base_two<In>(inverse_temperature);
  params.inverse_temperature = T(inverse_temperature);
  const bool valued = values.data != nullptr;
  const Array* const operands[Params::kOperands] = {&logits, &grad_logits, valued ? &values : &logits,
                                                    valued ? &grad_values : &grad_logits};
  int64_t inner[Params::kOperands];
  for (int o = 0; o < Params::kOperands; ++o) {
    set_axes(*operands[o], dims, params.size, params.stride[o]);
    inner[o] = params.stride[o][2];
  }
  set_batch(params.maps, batch_of(logits, dims),
            {{*operands[0], dims}, {*operands[1], dims}, {*operands[2], dims}, {*operands[3], dims}});
  params.maps_adjacent = are_maps_adjacent(params.maps, inner);
  if (backend.emulated_cuda) return check_launch(cuda::softmax_moments_backward(params, nullptr));
  const auto& kernels = TRITOOL_KERNELS_OF(backend.isa, softmax_moments_kernels, In);
  in_threads(backend.threads, kernels.backward_work(params),
             [&](int64_t begin, int64_t end) { kernels.backward(params, begin, end); });
}

}  // namespace tritool::testing
