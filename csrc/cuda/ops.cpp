// The CUDA implementations of the operators GPU_SCHEMAS of fused_losses/kernels/schemas.py: checks, then the launch.
// Built on PyTorch's stable ABI, and without libtorch_cuda, so that one library serves CPU and CUDA builds of torch
// 2.11 and later. Labels, columns and offsets are trusted: looking at them would wait for the device.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <dlfcn.h>

#include <initializer_list>
#include <optional>
#include <string>

#include "kernels.h"

namespace fused_losses::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

constexpr int64_t ANY = -1;

std::string shape_of(const int64_t* sizes, size_t count) {
  std::string text = "[";
  for (size_t i = 0; i < count; i++) {
    if (i) text += ", ";
    text += sizes[i] == ANY ? "any" : std::to_string(sizes[i]);
  }
  return text + "]";
}
std::string name_of(ScalarType type) { return torch::headeronly::toString(type); }

// The checks of one call: every tensor is on the device of the first, of the dtype and shape asked for, and contiguous.
class Checks {
 public:
  Checks(const char* op, const Tensor& first) : op_(op), device_(first.get_device_index()), cpu_(first.is_cpu()) {}

  template <class T>
  T* data(const Tensor& t, const char* name, ScalarType type, std::initializer_list<int64_t> shape) const {
    STD_TORCH_CHECK(t.is_cpu() == cpu_ && t.get_device_index() == device_, op_, ": ", name,
                    ": expected a tensor on device ", device_, " like the first argument, got device ",
                    t.get_device_index());
    STD_TORCH_CHECK(t.scalar_type() == type, op_, ": ", name, ": expected dtype ", name_of(type), ", got ",
                    name_of(t.scalar_type()));
    bool fits = t.dim() == static_cast<int64_t>(shape.size());
    for (size_t i = 0; fits && i < shape.size(); i++)
      fits = shape.begin()[i] == ANY || shape.begin()[i] == t.size(static_cast<int64_t>(i));
    STD_TORCH_CHECK(fits, op_, ": ", name, ": expected shape ", shape_of(shape.begin(), shape.size()), ", got ",
                    shape_of(t.sizes().data(), t.sizes().size()));
    STD_TORCH_CHECK(t.is_contiguous(), op_, ": ", name, ": expected a contiguous tensor, got strides ",
                    shape_of(t.strides().data(), t.strides().size()));
    return static_cast<T*>(t.data_ptr());
  }
  template <class T>
  T* data(const Optional& t, const char* name, ScalarType type, std::initializer_list<int64_t> shape) const {
    return t ? data<T>(*t, name, type, shape) : nullptr;
  }

  float* floats(const Tensor& t, const char* name, std::initializer_list<int64_t> shape) const {
    return data<float>(t, name, ScalarType::Float, shape);
  }
  float* floats(const Optional& t, const char* name, std::initializer_list<int64_t> shape) const {
    return t ? floats(*t, name, shape) : nullptr;
  }
  int64_t* longs(const Tensor& t, const char* name, std::initializer_list<int64_t> shape) const {
    return data<int64_t>(t, name, ScalarType::Long, shape);
  }
  int32_t* ints(const Tensor& t, const char* name, std::initializer_list<int64_t> shape) const {
    return data<int32_t>(t, name, ScalarType::Int, shape);
  }
  // Of any element type that the kernels know.
  void* elements(const Tensor& t, const char* name, std::initializer_list<int64_t> shape) const {
    element(t, name);
    return data<void>(t, name, t.scalar_type(), shape);
  }
  Element element(const Tensor& t, const char* name) const {
    switch (t.scalar_type()) {
      case ScalarType::Float: return Element::Float32;
      case ScalarType::BFloat16: return Element::BFloat16;
      case ScalarType::Half: return Element::Float16;
      default: break;
    }
    STD_TORCH_CHECK(false, op_, ": ", name, ": expected dtype Float, BFloat16 or Half, got ", name_of(t.scalar_type()));
  }
  // Grids have at most 2^31 − 1 blocks, and ids are 32-bit in registers.
  void at_most(int64_t value, const char* name, int64_t most) const {
    STD_TORCH_CHECK(value <= most, op_, ": ", name, ": expected at most ", most, ", got ", value);
  }
  void require(bool condition, const char* what) const { STD_TORCH_CHECK(condition, op_, ": ", what); }

 private:
  const char* op_;
  int32_t device_;
  bool cpu_;
};

constexpr int64_t MOST_BLOCKS = 0x7fffffff;

// The tensors' device is made current, and their current stream taken: neither need be those of the caller's thread.
// The function is looked up in the library that torch has loaded, since it is not linked.
class OnDevice {
 public:
#ifdef FUSED_LOSSES_ON_CPU
  explicit OnDevice(const Tensor&) {}
  Stream stream() const { return nullptr; }
#else
  explicit OnDevice(const Tensor& t) : index_(t.get_device_index()), guard_(index_) {}
  Stream stream() const {
    using Function = AOTITorchError (*)(int32_t, void**);
    static const auto current = [] {
      void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
      return reinterpret_cast<Function>(library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr);
    }();
    STD_TORCH_CHECK(current,
                    "the current CUDA stream: expected torch to be a CUDA build, got one without libtorch_cuda");
    void* stream = nullptr;
    STD_TORCH_CHECK(current(index_, &stream) == 0, "the current CUDA stream of device ", index_, " cannot be had");
    return static_cast<Stream>(stream);
  }

 private:
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

// z, r [N, V]; labels, nll, prediction, kl, entropy, reference_nll, reference_entropy [N]; rows [9, N]
void row_statistics_op(const Tensor& z, const Optional& r, bool difference, const Tensor& labels, double scale,
                       double softcap, double reference_scale, double reference_softcap, Tensor nll, Tensor prediction,
                       Optional kl, Optional entropy, Optional reference_nll, Optional reference_entropy, Tensor rows) {
  const Checks check("row_statistics", z);
  check.floats(z, "z", {ANY, ANY});
  const int64_t N = z.size(0), V = z.size(1);
  check.at_most(N, "tokens", MOST_BLOCKS / 8);
  check.at_most(V, "vocabulary", 0x7fffff00);
  check.require(N == 0 || V > 0, "z: expected at least one column, got none");
  check.require(r || !(difference || kl || reference_nll || reference_entropy),
                "r: expected the reference's products, which difference and the reference's results need, got None");
  RowStatistics a;
  a.tokens = N, a.vocabulary = V;
  a.z = check.floats(z, "z", {N, V});
  a.r = check.floats(r, "r", {N, V});
  a.difference = difference;
  a.labels = check.longs(labels, "labels", {N});
  a.scale = static_cast<float>(scale), a.softcap = static_cast<float>(softcap);
  a.reference_scale = static_cast<float>(reference_scale);
  a.reference_softcap = static_cast<float>(reference_softcap);
  a.nll = check.floats(nll, "nll", {N});
  a.prediction = check.longs(prediction, "prediction", {N});
  a.kl = check.floats(kl, "kl", {N});
  a.entropy = check.floats(entropy, "entropy", {N});
  a.reference_nll = check.floats(reference_nll, "reference_nll", {N});
  a.reference_entropy = check.floats(reference_entropy, "reference_entropy", {N});
  a.rows = check.floats(rows, "rows", {ROWS, N});
  const OnDevice device(z);
  row_statistics(a, device.stream());
}

// bits [N, words]; labels, counts [N]
void count_bits_op(const Tensor& bits, const Tensor& labels, int64_t capacity, Tensor counts) {
  const Checks check("count_bits", bits);
  const int32_t* data = check.ints(bits, "bits", {ANY, ANY});
  const int64_t N = bits.size(0);
  check.at_most(N, "tokens", MOST_BLOCKS);
  check.at_most(bits.size(1), "words", 0x3ffffff);
  const int64_t* label = check.longs(labels, "labels", {N});
  int64_t* count = check.longs(counts, "counts", {N});
  const OnDevice device(bits);
  count_bits(reinterpret_cast<const uint32_t*>(data), N, bits.size(1), label, capacity, count, device.stream());
}

// bits [N, words]; labels [N]; offsets [N + 1]; columns [entries]
void columns_of_bits_op(const Tensor& bits, const Tensor& labels, const Tensor& offsets, Tensor columns) {
  const Checks check("columns_of_bits", bits);
  const int32_t* data = check.ints(bits, "bits", {ANY, ANY});
  const int64_t N = bits.size(0);
  check.at_most(N, "tokens", MOST_BLOCKS);
  check.at_most(bits.size(1), "words", 0x3ffffff);
  const int64_t* label = check.longs(labels, "labels", {N});
  const int64_t* offset = check.longs(offsets, "offsets", {N + 1});
  int32_t* column = check.ints(columns, "columns", {ANY});
  const OnDevice device(bits);
  columns_of_bits(reinterpret_cast<const uint32_t*>(data), N, bits.size(1), label, offset, column, device.stream());
}

// hidden [N, D], weight [V, D] of one dtype; bias [V]; offsets [N + 1]; columns, out [entries]
void entry_logits_op(const Tensor& hidden, const Tensor& weight, const Optional& bias, const Tensor& offsets,
                     const Tensor& columns, Tensor out) {
  const Checks check("entry_logits", hidden);
  const Element element = check.element(hidden, "hidden");
  check.elements(hidden, "hidden", {ANY, ANY});
  EntryLogits a;
  a.tokens = hidden.size(0), a.width = hidden.size(1);
  check.at_most(a.tokens, "tokens", MOST_BLOCKS);
  a.hidden = hidden.data_ptr();
  a.weight = check.data<void>(weight, "weight", hidden.scalar_type(), {ANY, a.width});
  a.bias = check.floats(bias, "bias", {weight.size(0)});
  a.offsets = check.longs(offsets, "offsets", {a.tokens + 1});
  a.columns = check.ints(columns, "columns", {ANY});
  a.out = check.floats(out, "out", {columns.size(0)});
  const OnDevice device(hidden);
  entry_logits(a, element, device.stream());
}

// hidden, difference [N, D], weight [V, D] of one dtype; bias [V]; labels, nll [N]; offsets [N + 1]; columns,
// entry_reference, nll_values, kl_values [entries]; rows [9, N]; kept [4, N]; nll_rows, kl_rows [N, D] float32 or that
// dtype
void attention_op(const Tensor& hidden, const Optional& difference, const Optional& entry_reference,
                  const Tensor& weight, const Optional& bias, const Tensor& labels, const Tensor& offsets,
                  const Tensor& columns, const Tensor& rows, const Tensor& nll, double scale, double softcap,
                  Tensor nll_values, Optional kl_values, Tensor kept, Optional nll_rows, Optional kl_rows) {
  const Checks check("attention", hidden);
  const Element element = check.element(hidden, "hidden");
  check.elements(hidden, "hidden", {ANY, ANY});
  const ScalarType type = hidden.scalar_type();
  const int64_t N = hidden.size(0), D = hidden.size(1), entries = columns.numel();
  const bool reference = difference || entry_reference;
  check.at_most(N, "tokens", MOST_BLOCKS);
  check.at_most(D, "hidden size", 0x3fffffff);
  check.require(!(difference && entry_reference), "expected difference or entry_reference, got both");
  check.require(reference == kl_values.has_value(), "kl_values: expected with a reference, and only then");
  check.require(reference || !kl_rows, "kl_rows: expected only with a reference, got it without");
  Attention a;
  a.tokens = N, a.width = D;
  a.hidden = hidden.data_ptr();
  a.difference = check.data<void>(difference, "difference", type, {N, D});
  a.entry_reference = check.floats(entry_reference, "entry_reference", {entries});
  a.weight = check.data<void>(weight, "weight", type, {ANY, D});
  a.bias = check.floats(bias, "bias", {weight.size(0)});
  a.labels = check.longs(labels, "labels", {N});
  a.offsets = check.longs(offsets, "offsets", {N + 1});
  a.columns = check.ints(columns, "columns", {entries});
  a.rows = check.floats(rows, "rows", {ROWS, N});
  a.nll = check.floats(nll, "nll", {N});
  a.scale = static_cast<float>(scale), a.softcap = static_cast<float>(softcap);
  a.nll_values = check.floats(nll_values, "nll_values", {entries});
  a.kl_values = check.floats(kl_values, "kl_values", {entries});
  a.kept = check.floats(kept, "kept", {KEPTS, N});
  const Optional& some_rows = nll_rows ? nll_rows : kl_rows;
  a.rows_in_float = some_rows && some_rows->scalar_type() == ScalarType::Float;
  const ScalarType rows_type = a.rows_in_float ? ScalarType::Float : type;
  a.nll_rows = check.data<void>(nll_rows, "nll_rows", rows_type, {N, D});
  a.kl_rows = check.data<void>(kl_rows, "kl_rows", rows_type, {N, D});
  const OnDevice device(hidden);
  attention(a, element, device.stream());
}

// offsets [I + 1]; columns, values [entries]; matrix [M, D]; scale [I]; vector [D]; base [I, D]; hot [H];
// hot_first [H + 1]; partial [slots, D]; out [I, D]
void segment_product_op(const Tensor& offsets, const Tensor& columns, const Tensor& values, const Tensor& matrix,
                        const Tensor& scale, const Tensor& vector, const Optional& base, double base_scale,
                        const Tensor& hot, const Tensor& hot_first, Tensor partial, Tensor out) {
  const Checks check("segment_product", matrix);
  const Element element = check.element(matrix, "matrix"), out_element = check.element(out, "out");
  check.elements(out, "out", {ANY, ANY});
  const int64_t I = out.size(0), D = out.size(1), entries = columns.numel(), H = hot.numel();
  SegmentProduct a;
  a.segments = I, a.width = D;
  a.offsets = check.longs(offsets, "offsets", {I + 1});
  a.columns = check.ints(columns, "columns", {entries});
  a.values = check.floats(values, "values", {entries});
  a.matrix = check.elements(matrix, "matrix", {ANY, D});
  a.scale = check.floats(scale, "scale", {I});
  a.vector = check.floats(vector, "vector", {D});
  a.base = check.floats(base, "base", {I, D});
  a.base_scale = static_cast<float>(base_scale);
  a.hot_segments = H;
  a.hot = check.longs(hot, "hot", {H});
  a.hot_first = check.longs(hot_first, "hot_first", {H + 1});
  a.partial = check.floats(partial, "partial", {ANY, D});
  a.slots = H ? partial.size(0) : 0;
  a.out = out.data_ptr();
  check.at_most(I + a.slots, "segments", MOST_BLOCKS);
  check.at_most(D, "width", 0x3fffffff);
  const OnDevice device(matrix);
  segment_product(a, element, out_element, device.stream());
}

[[maybe_unused]] int64_t interface_op() { return 2; }  // CUDA_INTERFACE of fused_losses/kernels/schemas.py

}  // namespace

#ifdef FUSED_LOSSES_ON_CPU
STABLE_TORCH_LIBRARY_IMPL(fused_losses, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(fused_losses, CompositeExplicitAutograd, m) {
  m.impl("cuda_interface", TORCH_BOX(&interface_op));
}
STABLE_TORCH_LIBRARY_IMPL(fused_losses, CUDA, m) {
#endif
  m.impl("row_statistics", TORCH_BOX(&row_statistics_op));
  m.impl("count_bits", TORCH_BOX(&count_bits_op));
  m.impl("columns_of_bits", TORCH_BOX(&columns_of_bits_op));
  m.impl("entry_logits", TORCH_BOX(&entry_logits_op));
  m.impl("attention", TORCH_BOX(&attention_op));
  m.impl("segment_product", TORCH_BOX(&segment_product_op));
}

}  // namespace fused_losses::cuda
