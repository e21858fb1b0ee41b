// SPDX-License-Identifier: Apache-2.0
// The kernels as functions on NumPy arrays, so that the property tests reach every backend without torch.
//
//   backend = tritool_bridge.Backend("cpu:avx2", threads=3)
//   points_3d = tritool_bridge.triangulate(backend, points, projections, weights)
//
// Arrays are read in place through their strides; batch dimensions broadcast as in NumPy. All of a call have one dtype,
// float32 or float64; logits may also be float16, or bfloat16 as its bits in uint16. Results start out as garbage, so
// that an element which a kernel forgets is seen.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <cstring>
#include <new>
#include <optional>

#include "emulator.h"
#include "run_kernels.h"

namespace py = pybind11;

namespace {

using namespace tritool;
using testing::Array;
using testing::Backend;
using testing::Sizes;
using Operand = std::optional<py::array>;

// ---- NumPy arrays ----

std::string dtype_name(const py::array& array) { return py::str(array.dtype()); }

// Whether the elements are of this type.
template <class T>
bool holds(const py::array& array) {
  return py::isinstance<py::array_t<T>>(array);
}
template <>
bool holds<Float16>(const py::array& array) {
  return array.dtype().char_() == 'e';
}
template <>
bool holds<BFloat16>(const py::array& array) {
  return py::isinstance<py::array_t<uint16_t>>(array);
}

template <class T>
Array operand(const py::array& array, const char* name) {
  if (!holds<T>(array))
    throw py::type_error(std::string(name) + " has another dtype than the other arguments: " + dtype_name(array));
  Array result{const_cast<void*>(array.data()), Sizes(array.shape(), array.shape() + array.ndim()),
               Sizes(array.strides(), array.strides() + array.ndim())};
  for (int64_t& stride : result.stride) {
    if (stride % int64_t(sizeof(T)) != 0)
      throw py::value_error(std::string(name) + " has strides that are no multiple of its elements");
    stride /= int64_t(sizeof(T));
  }
  return result;
}
template <class T>
Array operand(const Operand& array, const char* name) {
  return array.has_value() ? operand<T>(*array, name) : Array{};
}

// New, filled with garbage, aligned as PyTorch's memory is: where results lie decides how kernels write them.
py::array aligned_array(const py::dtype& dtype, const Sizes& size, const Sizes& byte_stride) {
  constexpr size_t kAlignment = 64;
  size_t bytes = static_cast<size_t>(dtype.itemsize());
  for (const int64_t n : size) bytes *= static_cast<size_t>(n);
  bytes = (bytes / kAlignment + 1) * kAlignment;
  void* memory = std::aligned_alloc(kAlignment, bytes);
  if (memory == nullptr) throw std::bad_alloc();
  const py::capsule owner(memory, [](void* owned) { std::free(owned); });
  std::memset(memory, 0x5a, bytes);
  return py::array(dtype, size, byte_stride, memory, owner);
}

// The same, with the sizes and the order of dimensions of another array.
py::array new_array_like(const py::array& other) {
  const py::array like = py::module_::import("numpy").attr("empty_like")(other, py::arg("subok") = false);
  return aligned_array(like.dtype(), Sizes(like.shape(), like.shape() + like.ndim()),
                       Sizes(like.strides(), like.strides() + like.ndim()));
}

// In which NumPy keeps such elements.
template <class T>
py::dtype dtype_of() {
  return py::dtype::of<T>();
}
template <>
py::dtype dtype_of<Float16>() {
  return py::dtype("e");
}
template <>
py::dtype dtype_of<BFloat16>() {
  return py::dtype::of<uint16_t>();
}

// A new contiguous array [batch..., trailing...].
template <class T>
py::array new_array(Sizes batch, std::initializer_list<int64_t> trailing = {}) {
  batch.insert(batch.end(), trailing);
  Sizes byte_stride(batch.size());
  int64_t step = sizeof(T);
  for (size_t d = batch.size(); d-- > 0; step *= batch[d]) byte_stride[d] = step;
  return aligned_array(dtype_of<T>(), batch, byte_stride);
}
template <class T>
Operand new_array_if(bool wanted, const Sizes& batch, std::initializer_list<int64_t> trailing = {}) {
  return wanted ? Operand(new_array<T>(batch, trailing)) : std::nullopt;
}

template <class Function>
py::object dispatch_real(const py::array& array, Function&& function) {
  if (holds<float>(array)) return function(float{});
  if (holds<double>(array)) return function(double{});
  throw py::type_error("float32 or float64 expected, got " + dtype_name(array));
}
template <class Function>
py::object dispatch_logits(const py::array& array, Function&& function) {
  if (holds<Float16>(array)) return function(Float16{});
  if (holds<BFloat16>(array)) return function(BFloat16{});
  return dispatch_real(array, function);
}

// ---- Backends ----

std::vector<std::string> backends() {
  std::vector<std::string> names{"cpu:baseline"};
  if (isa() >= Isa::kAvx2) names.push_back("cpu:avx2");
  if (isa() >= Isa::kAvx512) names.push_back("cpu:avx512");
  names.push_back("cuda-emulated");
  return names;
}

Backend backend(const std::string& name, int threads, int64_t items_per_unit) {
  bool known = false;
  for (const std::string& one : backends()) known = known || one == name;
  if (!known) throw py::value_error("no backend " + name + " on this machine");
  if (threads < 1 || items_per_unit < 0) throw py::value_error("threads must be 1 or more, items_per_unit 0 or more");
  Backend result;
  result.emulated_cuda = name == "cuda-emulated";
  result.isa = name == "cpu:avx512" ? Isa::kAvx512 : name == "cpu:avx2" ? Isa::kAvx2 : Isa::kBaseline;
  result.threads = threads;
  result.items_per_unit = items_per_unit;
  return result;
}

// ---- The ops ----

Sizes batch_of_views(const Array& points, const Array& projections, const Array& weights) {
  testing::check_trailing(points, "points", {-1, 2});
  testing::check_trailing(projections, "projections", {points.size_at(2), 3, 4});
  Sizes batch = testing::broadcast(testing::batch_of(points, 2), testing::batch_of(projections, 3));
  if (weights.data == nullptr) return batch;
  testing::check_trailing(weights, "weights", {points.size_at(2)});
  return testing::broadcast(batch, testing::batch_of(weights, 1));
}

py::object triangulate(const Backend& backend, const py::array& points, const py::array& projections,
                       const Operand& weights, bool homogeneous) {
  return dispatch_real(points, [&](auto real) -> py::object {
    using T = decltype(real);
    const Array x = operand<T>(points, "points"), p = operand<T>(projections, "projections"),
                w = operand<T>(weights, "weights");
    py::array result = new_array<T>(batch_of_views(x, p, w), {3});
    testing::triangulate<T>(backend, x, p, w, homogeneous, operand<T>(result, "result"));
    return std::move(result);
  });
}

// Gradients to points and weights in the batch of all arguments, to projections in their own shape; None if not wanted.
py::object triangulate_backward(const Backend& backend, const py::array& grad, const py::array& points,
                                const py::array& projections, const Operand& weights, bool homogeneous,
                                bool want_points, bool want_projections, bool want_weights) {
  return dispatch_real(points, [&](auto real) -> py::object {
    using T = decltype(real);
    const Array g = operand<T>(grad, "grad"), x = operand<T>(points, "points"),
                p = operand<T>(projections, "projections"), w = operand<T>(weights, "weights");
    testing::check_trailing(g, "grad", {3});
    const Sizes batch = testing::broadcast(batch_of_views(x, p, w), testing::batch_of(g, 1));
    const int64_t views = x.size_at(2);
    const Operand grad_points = new_array_if<T>(want_points, batch, {views, 2});
    const Operand grad_projections = new_array_if<T>(want_projections, p.size);
    const Operand grad_weights = new_array_if<T>(want_weights && weights.has_value(), batch, {views});
    testing::triangulate_backward<T>(backend, g, x, p, w, homogeneous, batch, operand<T>(grad_points, "grad_points"),
                                     operand<T>(grad_projections, "grad_projections"),
                                     operand<T>(grad_weights, "grad_weights"));
    return py::make_tuple(grad_points, grad_projections, grad_weights);
  });
}

Sizes batch_of_matrices(const Array& points, const Array& projections) {
  testing::check_trailing(points, "points", {3});
  testing::check_trailing(projections, "projections", {-1, 3, 4});
  return testing::broadcast(testing::batch_of(points, 1), testing::batch_of(projections, 3));
}

py::object project(const Backend& backend, const py::array& points, const py::array& projections) {
  return dispatch_real(points, [&](auto real) -> py::object {
    using T = decltype(real);
    const Array x = operand<T>(points, "points"), p = operand<T>(projections, "projections");
    py::array result = new_array<T>(batch_of_matrices(x, p), {p.size_at(3), 2});
    testing::project<T>(backend, x, p, operand<T>(result, "result"));
    return std::move(result);
  });
}

py::object project_backward(const Backend& backend, const py::array& grad, const py::array& points,
                            const py::array& projections, bool want_points, bool want_projections) {
  return dispatch_real(points, [&](auto real) -> py::object {
    using T = decltype(real);
    const Array g = operand<T>(grad, "grad"), x = operand<T>(points, "points"),
                p = operand<T>(projections, "projections");
    Sizes batch = batch_of_matrices(x, p);
    testing::check_trailing(g, "grad", {p.size_at(3), 2});
    batch = testing::broadcast(batch, testing::batch_of(g, 2));
    const Operand grad_points = new_array_if<T>(want_points, batch, {3});
    const Operand grad_projections = new_array_if<T>(want_projections, p.size);
    testing::project_backward<T>(backend, g, x, p, batch, operand<T>(grad_points, "grad_points"),
                                 operand<T>(grad_projections, "grad_projections"));
    return py::make_tuple(grad_points, grad_projections);
  });
}

// What every operand but the grid has in common: the sizes of the batch, without the trailing dimensions.
Sizes batch_of_volume(const testing::UnprojectInputs& inputs) {
  Sizes batch = testing::broadcast(testing::batch_of(inputs.features, 4), testing::batch_of(inputs.projections, 3));
  batch = testing::broadcast(batch, testing::batch_of(inputs.grid, 2));
  return inputs.confidences.data == nullptr ? batch
                                            : testing::broadcast(batch, testing::batch_of(inputs.confidences, 2));
}

template <class In>
testing::UnprojectInputs unproject_inputs(const py::array& features, const py::array& projections,
                                          const py::array& grid, const Operand& confidences, const Sizes& size,
                                          int aggregation, bool exclude, bool official) {
  using T = Accumulator<In>;
  return {operand<In>(features, "features"),
          operand<T>(projections, "projections"),
          operand<T>(grid, "grid"),
          operand<T>(confidences, "confidences"),
          size,
          aggregation,
          exclude,
          official};
}

int64_t points_of(const testing::UnprojectInputs& inputs) {
  int64_t points = inputs.size.empty() ? inputs.grid.size_at(2) : 1;
  for (const int64_t n : inputs.size) points *= n;
  return points;
}

// [batch, K, N]; channels_last: lies in memory as [batch, N, K].
py::object unproject(const Backend& backend, const py::array& features, const py::array& projections,
                     const py::array& grid, const Operand& confidences, const Sizes& size, int aggregation,
                     bool exclude, bool official, bool channels_last) {
  return dispatch_logits(features, [&](auto element) -> py::object {
    using In = decltype(element);
    const auto inputs =
        unproject_inputs<In>(features, projections, grid, confidences, size, aggregation, exclude, official);
    const int64_t channels = inputs.features.size_at(3), points = points_of(inputs);
    py::array volume = channels_last ? new_array<In>(batch_of_volume(inputs), {points, channels})
                                     : new_array<In>(batch_of_volume(inputs), {channels, points});
    if (channels_last) volume = volume.attr("swapaxes")(-1, -2);
    testing::unproject<In>(backend, inputs, operand<In>(volume, "volume"));
    return std::move(volume);
  });
}

// Gradients in the batch of all operands; to the features in the order of `like`, an array of their shape.
py::object unproject_backward(const Backend& backend, const py::array& grad, const py::array& features,
                              const py::array& projections, const py::array& grid, const Operand& confidences,
                              const Sizes& size, int aggregation, bool exclude, bool official, bool deterministic,
                              bool channels_last, bool want_features, bool want_projections, bool want_grid,
                              bool want_confidences) {
  return dispatch_logits(features, [&](auto element) -> py::object {
    using In = decltype(element);
    using T = Accumulator<In>;
    const auto inputs =
        unproject_inputs<In>(features, projections, grid, confidences, size, aggregation, exclude, official);
    const Array g = operand<In>(grad, "grad");
    const Sizes batch = testing::broadcast(batch_of_volume(inputs), testing::batch_of(g, 2));
    const int64_t views = inputs.features.size_at(4), channels = inputs.features.size_at(3),
                  height = inputs.features.size_at(2), width = inputs.features.size_at(1);
    Operand grad_features = channels_last ? new_array_if<In>(want_features, batch, {views, height, width, channels})
                                          : new_array_if<In>(want_features, batch, {views, channels, height, width});
    if (channels_last && want_features)
      grad_features = grad_features->attr("swapaxes")(-1, -2).attr("swapaxes")(-2, -3);
    const Operand grad_projections = new_array_if<T>(want_projections, batch, {views, 3, 4});
    const Operand grad_grid = new_array_if<T>(want_grid, batch, {inputs.grid.size_at(2), 3});
    const Operand grad_confidences =
        new_array_if<T>(want_confidences && confidences.has_value(), batch, {views, channels});
    testing::unproject_backward<In>(
        backend, g, inputs, deterministic,
        {operand<In>(grad_features, "grad_features"), operand<T>(grad_projections, "grad_projections"),
         operand<T>(grad_grid, "grad_grid"), operand<T>(grad_confidences, "grad_confidences")});
    return py::make_tuple(grad_features, grad_projections, grad_grid, grad_confidences);
  });
}

Sizes batch_of_points(const Array& source, const Array& target, const Array& weights) {
  testing::check_trailing(source, "source", {-1, 3});
  testing::check_trailing(target, "target", {source.size_at(2), 3});
  const Sizes batch = testing::broadcast(testing::batch_of(source, 2), testing::batch_of(target, 2));
  if (weights.data == nullptr) return batch;
  testing::check_trailing(weights, "weights", {source.size_at(2)});
  return testing::broadcast(batch, testing::batch_of(weights, 1));
}

// (rotation, translation, scale)
py::object rigid_align(const Backend& backend, const py::array& source, const py::array& target, const Operand& weights,
                       bool with_scale) {
  return dispatch_real(source, [&](auto real) -> py::object {
    using T = decltype(real);
    const Array x = operand<T>(source, "source"), y = operand<T>(target, "target"), w = operand<T>(weights, "weights");
    const Sizes batch = batch_of_points(x, y, w);
    const py::array rotation = new_array<T>(batch, {3, 3}), translation = new_array<T>(batch, {3}),
                    scale = new_array<T>(batch);
    testing::rigid_align<T>(
        backend, x, y, w, with_scale,
        {operand<T>(rotation, "rotation"), operand<T>(translation, "translation"), operand<T>(scale, "scale")});
    return py::make_tuple(rotation, translation, scale);
  });
}

// Gradients to source, target and weights in the batch of all arguments; None if not wanted.
py::object rigid_align_backward(const Backend& backend, const Operand& grad_rotation, const Operand& grad_translation,
                                const Operand& grad_scale, const py::array& source, const py::array& target,
                                const Operand& weights, bool with_scale, bool want_source, bool want_target,
                                bool want_weights) {
  return dispatch_real(source, [&](auto real) -> py::object {
    using T = decltype(real);
    const Array x = operand<T>(source, "source"), y = operand<T>(target, "target"), w = operand<T>(weights, "weights");
    const Sizes batch = batch_of_points(x, y, w);
    const int64_t points = x.size_at(2);
    const Operand grad_source = new_array_if<T>(want_source, batch, {points, 3});
    const Operand grad_target = new_array_if<T>(want_target, batch, {points, 3});
    const Operand grad_weights = new_array_if<T>(want_weights && weights.has_value(), batch, {points});
    testing::rigid_align_backward<T>(
        backend,
        {operand<T>(grad_rotation, "grad_rotation"), operand<T>(grad_translation, "grad_translation"),
         operand<T>(grad_scale, "grad_scale")},
        x, y, w, with_scale, batch, operand<T>(grad_source, "grad_source"), operand<T>(grad_target, "grad_target"),
        operand<T>(grad_weights, "grad_weights"));
    return py::make_tuple(grad_source, grad_target, grad_weights);
  });
}

void check_maps(const py::array& logits, int dims) {
  if ((dims != 2 && dims != 3) || logits.ndim() < dims)
    throw py::value_error("dims must be 2 or 3, and logits [..., H, W] or [..., X, Y, Z]");
}

// (mean, covariance or None, log_partition, partition)
py::object softmax_moments(const Backend& backend, const py::array& logits, int dims, double inverse_temperature,
                           bool with_covariance) {
  check_maps(logits, dims);
  return dispatch_logits(logits, [&](auto element) -> py::object {
    using In = decltype(element);
    using T = Accumulator<In>;
    const Array maps = operand<In>(logits, "logits");
    const Sizes batch = testing::batch_of(maps, dims);
    const py::array mean = new_array<T>(batch, {dims}), log_partition = new_array<T>(batch),
                    partition = new_array<T>(batch, {2});
    const Operand covariance = new_array_if<T>(with_covariance, batch, {dims, dims});
    testing::softmax_moments<In>(backend, maps, {}, dims, inverse_temperature,
                                 {operand<T>(mean, "mean"), operand<T>(covariance, "covariance"),
                                  operand<T>(log_partition, "log_partition"), operand<T>(partition, "partition")});
    return py::make_tuple(mean, covariance, log_partition, partition);
  });
}

// An argument [batch..., trailing...] that the kernels read without strides.
template <class T>
Array contiguous_operand(const Operand& array, const char* name, const Sizes& batch,
                         std::initializer_list<int64_t> trailing = {}) {
  Array result = operand<T>(array, name);
  if (result.data == nullptr) return result;
  Sizes expected = batch;
  expected.insert(expected.end(), trailing);
  if (result.size != expected || (array->flags() & py::array::c_style) == 0)
    throw py::value_error(std::string(name) + " must be contiguous " + testing::text_of(expected) + ", got " +
                          testing::text_of(result.size));
  return result;
}

// The gradient to the logits, which lie in memory as the logits do.
py::object softmax_moments_backward(const Backend& backend, const Operand& grad_mean, const Operand& grad_covariance,
                                    const Operand& grad_log_partition, const py::array& logits, const py::array& mean,
                                    const Operand& covariance, const py::array& partition, int dims,
                                    double inverse_temperature) {
  check_maps(logits, dims);
  if (grad_covariance.has_value() && !covariance.has_value())
    throw py::value_error("grad_covariance needs the covariance");
  return dispatch_logits(logits, [&](auto element) -> py::object {
    using In = decltype(element);
    using T = Accumulator<In>;
    const Array maps = operand<In>(logits, "logits");
    const Sizes batch = testing::batch_of(maps, dims);
    const testing::Moments grad{contiguous_operand<T>(grad_mean, "grad_mean", batch, {dims}),
                                contiguous_operand<T>(grad_covariance, "grad_covariance", batch, {dims, dims}),
                                contiguous_operand<T>(grad_log_partition, "grad_log_partition", batch),
                                {}};
    const testing::Moments moments{contiguous_operand<T>(Operand(mean), "mean", batch, {dims}),
                                   contiguous_operand<T>(covariance, "covariance", batch, {dims, dims}),
                                   {},
                                   contiguous_operand<T>(Operand(partition), "partition", batch, {2})};
    py::array grad_logits = new_array_like(logits);
    testing::softmax_moments_backward<In>(backend, grad, maps, {}, moments, dims, inverse_temperature,
                                          operand<In>(grad_logits, "grad_logits"), {});
    return std::move(grad_logits);
  });
}

template <class In>
Array depth_operand(const Array& heatmaps, const py::array& depth_maps) {
  Array result = operand<In>(depth_maps, "depth_maps");
  if (result.size != heatmaps.size)
    throw py::value_error("depth_maps must be " + testing::text_of(heatmaps.size) + " as heatmaps, got " +
                          testing::text_of(result.size));
  return result;
}

// (position, partition)
py::object soft_argmax25d(const Backend& backend, const py::array& heatmaps, const py::array& depth_maps,
                          double inverse_temperature) {
  check_maps(heatmaps, 2);
  return dispatch_logits(heatmaps, [&](auto element) -> py::object {
    using In = decltype(element);
    using T = Accumulator<In>;
    const Array maps = operand<In>(heatmaps, "heatmaps"), values = depth_operand<In>(maps, depth_maps);
    const Sizes batch = testing::batch_of(maps, 2);
    const py::array position = new_array<T>(batch, {3}), partition = new_array<T>(batch, {2});
    testing::softmax_moments<In>(backend, maps, values, 2, inverse_temperature,
                                 {operand<T>(position, "position"), {}, {}, operand<T>(partition, "partition")});
    return py::make_tuple(position, partition);
  });
}

// The gradients to both maps, which lie in memory as they do.
py::object soft_argmax25d_backward(const Backend& backend, const py::array& grad, const py::array& heatmaps,
                                   const py::array& depth_maps, const py::array& position, const py::array& partition,
                                   double inverse_temperature) {
  check_maps(heatmaps, 2);
  return dispatch_logits(heatmaps, [&](auto element) -> py::object {
    using In = decltype(element);
    using T = Accumulator<In>;
    const Array maps = operand<In>(heatmaps, "heatmaps"), values = depth_operand<In>(maps, depth_maps);
    const Sizes batch = testing::batch_of(maps, 2);
    const testing::Moments of_grad{contiguous_operand<T>(Operand(grad), "grad", batch, {3}), {}, {}, {}};
    const testing::Moments moments{contiguous_operand<T>(Operand(position), "position", batch, {3}),
                                   {},
                                   {},
                                   contiguous_operand<T>(Operand(partition), "partition", batch, {2})};
    const py::array grad_heatmaps = new_array_like(heatmaps);
    const py::array grad_depth_maps = new_array_like(depth_maps);
    testing::softmax_moments_backward<In>(backend, of_grad, maps, values, moments, 2, inverse_temperature,
                                          operand<In>(grad_heatmaps, "grad_heatmaps"),
                                          operand<In>(grad_depth_maps, "grad_depth_maps"));
    return py::make_tuple(grad_heatmaps, grad_depth_maps);
  });
}

}  // namespace

PYBIND11_MODULE(tritool_bridge, m) {
  m.def("backends", &backends, "The names of the backends that this machine runs.");
  m.def("set_seed", &emulator::set_seed, "The emulated device's order of threads: 0 ascending, else a shuffle.");
  py::class_<Backend>(m, "Backend")
      .def(py::init(&backend), py::arg("name"), py::kw_only(), py::arg("threads") = 1, py::arg("items_per_unit") = 0);
  m.def("triangulate", &triangulate, py::arg("backend"), py::arg("points"), py::arg("projections"),
        py::arg("weights") = py::none(), py::kw_only(), py::arg("homogeneous") = true);
  m.def("triangulate_backward", &triangulate_backward, py::arg("backend"), py::arg("grad"), py::arg("points"),
        py::arg("projections"), py::arg("weights") = py::none(), py::kw_only(), py::arg("homogeneous") = true,
        py::arg("want_points") = true, py::arg("want_projections") = true, py::arg("want_weights") = true);
  m.def("project", &project, py::arg("backend"), py::arg("points"), py::arg("projections"));
  m.def("project_backward", &project_backward, py::arg("backend"), py::arg("grad"), py::arg("points"),
        py::arg("projections"), py::kw_only(), py::arg("want_points") = true, py::arg("want_projections") = true);
  m.def("unproject", &unproject, py::arg("backend"), py::arg("features"), py::arg("projections"), py::arg("grid"),
        py::arg("confidences"), py::kw_only(), py::arg("size"), py::arg("aggregation"), py::arg("exclude"),
        py::arg("official"), py::arg("channels_last"));
  m.def("unproject_backward", &unproject_backward, py::arg("backend"), py::arg("grad"), py::arg("features"),
        py::arg("projections"), py::arg("grid"), py::arg("confidences"), py::kw_only(), py::arg("size"),
        py::arg("aggregation"), py::arg("exclude"), py::arg("official"), py::arg("deterministic"),
        py::arg("channels_last"), py::arg("want_features") = true, py::arg("want_projections") = true,
        py::arg("want_grid") = true, py::arg("want_confidences") = true);
  m.def("rigid_align", &rigid_align, py::arg("backend"), py::arg("source"), py::arg("target"),
        py::arg("weights") = py::none(), py::kw_only(), py::arg("with_scale") = false);
  m.def("rigid_align_backward", &rigid_align_backward, py::arg("backend"), py::arg("grad_rotation"),
        py::arg("grad_translation"), py::arg("grad_scale"), py::arg("source"), py::arg("target"),
        py::arg("weights") = py::none(), py::kw_only(), py::arg("with_scale") = false, py::arg("want_source") = true,
        py::arg("want_target") = true, py::arg("want_weights") = true);
  m.def("softmax_moments", &softmax_moments, py::arg("backend"), py::arg("logits"), py::kw_only(), py::arg("dims"),
        py::arg("inverse_temperature") = 1.0, py::arg("with_covariance") = true);
  m.def("softmax_moments_backward", &softmax_moments_backward, py::arg("backend"), py::arg("grad_mean"),
        py::arg("grad_covariance"), py::arg("grad_log_partition"), py::arg("logits"), py::arg("mean"),
        py::arg("covariance"), py::arg("partition"), py::kw_only(), py::arg("dims"),
        py::arg("inverse_temperature") = 1.0);
  m.def("soft_argmax25d", &soft_argmax25d, py::arg("backend"), py::arg("heatmaps"), py::arg("depth_maps"),
        py::kw_only(), py::arg("inverse_temperature") = 1.0);
  m.def("soft_argmax25d_backward", &soft_argmax25d_backward, py::arg("backend"), py::arg("grad"), py::arg("heatmaps"),
        py::arg("depth_maps"), py::arg("position"), py::arg("partition"), py::kw_only(),
        py::arg("inverse_temperature") = 1.0);
}
