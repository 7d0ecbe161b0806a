// The CPU implementations of the operators whose schemas are in fused_losses/kernels/schemas.py. Shapes and dtypes are
// checked there; here they are trusted. Built on PyTorch's stable ABI: one binary serves 2.11 and later.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif
#endif

#include "kernels.h"

namespace fused_losses {

using torch::stable::Tensor;

void parallel(int64_t count, Range range, const void* context) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) { range(begin, end, context); });
}

void fault_in(void* data, int64_t bytes) {
#if defined(__linux__)
  if (bytes < FRESH_BYTES) return;
  constexpr int64_t page = 4096, piece = 1 << 21;
  char* start = (char*)(((uintptr_t)data + page - 1) / page * page);
  const int64_t size = ((char*)data + bytes - start) / page * page;
  parallel((size + piece - 1) / piece, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++)
      if (madvise(start + i * piece, std::min(piece, size - i * piece), MADV_POPULATE_WRITE)) return;
  });
#endif
}

int threads() { return (int)torch::stable::get_num_threads(); }

namespace {

Element element(const Tensor& t) {
  return t.scalar_type() == torch::headeronly::ScalarType::BFloat16 ? Element::BFloat16 : Element::Float32;
}
template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}
template <class T>
T* data(const std::optional<Tensor>& t) {
  return t ? data<T>(*t) : nullptr;
}

// Parts of [0, count) of about equal work, where item i costs offsets[i + 1] − offsets[i] + each.
std::vector<int64_t> balanced(const int64_t* offsets, int64_t count, int64_t each) {
  const int64_t parts = std::min<int64_t>(count, 4 * threads());
  std::vector<int64_t> bounds(parts + 1, count);
  const int64_t total = offsets[count] - offsets[0] + each * count;
  int64_t i = 0;
  for (int64_t part = 0; part < parts; part++) {
    while (i < count && (offsets[i] - offsets[0]) + each * i < total * part / parts) i++;
    bounds[part] = i;
  }
  bounds[0] = 0;
  return bounds;
}

bool logits_op(const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias, Tensor out) {
  return logits(hidden.data_ptr(), weight.data_ptr(), element(hidden), data<float>(bias), data<float>(out),
                hidden.size(0), weight.size(0), hidden.size(1));
}

bool large_numbers_op(const Tensor& direction, Tensor large_from) {
  return large_numbers(data<float>(direction), data<float>(large_from), direction.size(0), direction.size(1));
}

bool add_outer_op(const Tensor& direction, const Tensor& large_from, const Tensor& hidden, Tensor total) {
  return add_outer(data<float>(direction), data<float>(large_from), (const uint16_t*)hidden.data_ptr(),
                   data<float>(total), hidden.size(0), total.size(0), total.size(1));
}

bool times_weight_op(const Tensor& direction, const Tensor& large_from, const Tensor& weight, Tensor narrow, Tensor out,
                     Tensor lost) {
  return times_weight(data<float>(direction), data<float>(large_from), (const uint16_t*)weight.data_ptr(),
                      (uint16_t*)narrow.data_ptr(), data<float>(out), data<float>(lost), direction.size(0), weight.size(0),
                      weight.size(1));
}

Int8Head int8_head_of(const Tensor& weight, const std::optional<Tensor>& channel, const std::optional<Tensor>& mean,
                      const Tensor& blocks, const Tensor& scales, const Tensor& sums) {
  return {weight.data_ptr(), element(weight), data<float>(channel), data<float>(mean), weight.size(0), weight.size(1),
          blocks.size(0),
          data<uint8_t>(blocks), data<float>(scales), data<int32_t>(sums)};
}

void int8_head_op(const Tensor& weight, const std::optional<Tensor>& channel, Tensor blocks, Tensor scales,
                  Tensor sums, const std::optional<Tensor>& hidden, const std::optional<Tensor>& bias,
                  std::optional<Tensor> out, std::optional<Tensor> all_scales) {
  const Int8Head head = int8_head_of(weight, channel, std::nullopt, blocks, scales, sums);
  if (!hidden) return int8_head(head);
  const int64_t count = hidden->size(0), size = count * head.hidden;
  const int64_t padded = (count + FEW_TOKENS - 1) / FEW_TOKENS * FEW_TOKENS * head.hidden;
  const Aligned<float> tokens(padded);
  std::copy(data<float>(*hidden), data<float>(*hidden) + size, tokens.data);
  std::fill(tokens.data + size, tokens.data + padded, 0.0f);
  int8_head(head, tokens.data, count, data<float>(bias), data<float>(out), data<float>(all_scales));
}

void int8_logits_op(const Tensor& hidden, const std::optional<Tensor>& inverse, const Tensor& weight,
                    const std::optional<Tensor>& channel, const std::optional<Tensor>& mean,
                    const Tensor& blocks, const Tensor& scales, const Tensor& sums, const std::optional<Tensor>& bias,
                    Tensor out) {
  int8_logits(hidden.data_ptr(), element(hidden), data<float>(inverse),
              int8_head_of(weight, channel, mean, blocks, scales, sums), data<float>(bias), data<float>(out),
              hidden.size(0));
}

HalfChunk half_chunk_of(const Tensor& weight_or_profile, const Tensor& z, const Tensor& largest,
                        const Tensor& label_logits, const Tensor* labels) {
  return {weight_or_profile.size(0), data<uint16_t>(z), data<uint16_t>(largest), data<float>(label_logits),
          labels ? data<int64_t>(*labels) : nullptr};
}

Operands operands_of(const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias, double scale) {
  return {data<float>(hidden), nullptr, weight.data_ptr(), element(weight), weight.size(1), nullptr, nullptr, nullptr, 0,
          data<float>(bias), (float)scale, 0};
}

void label_logits_op(const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias, double scale,
                     const Tensor& labels, Tensor out) {
  const Operands operands = operands_of(hidden, weight, bias, scale);
  parallel(hidden.size(0), [&](int64_t begin, int64_t end) {
    kernels().label_logits(operands, data<int64_t>(labels), data<float>(out), begin, end);
  });
}

void half_logits_op(const Tensor& hidden, const std::optional<Tensor>& inverse, const Tensor& weight,
                    const std::optional<Tensor>& channel, const std::optional<Tensor>& mean,
                    const Tensor& blocks, const Tensor& scales, const Tensor& sums, const std::optional<Tensor>& bias,
                    double scale, const Tensor& label_logits,
                    Tensor out, Tensor largest) {
  half_logits(hidden.data_ptr(), element(hidden), data<float>(inverse),
              int8_head_of(weight, channel, mean, blocks, scales, sums), data<float>(bias), (float)scale,
              half_chunk_of(weight, out, largest, label_logits, nullptr), hidden.size(0));
}

RowDirections row_directions(const std::optional<Tensor>& directions, const std::optional<Tensor>& pairs) {
  RowDirections d = {};
  if (!directions) return d;
  d.width = directions->size(1), d.matrix = directions->data_ptr(), d.element = element(*directions);
  d.pairs = data<uint16_t>(pairs);
  return d;
}

void compact_half_op(Tensor z, Tensor largest, const Tensor& label_logits, const Tensor& labels, double threshold,
                     Tensor nll, Tensor prediction, Tensor lse, std::optional<Tensor> entropy, Tensor tail,
                     Tensor nll_l1, Tensor counts, Tensor columns, Tensor values, const std::optional<Tensor>& directions,
                     const std::optional<Tensor>& pairs, std::optional<Tensor> low, std::optional<Tensor> square,
                     const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias, double scale) {
  const HalfChunk chunk = half_chunk_of(weight, z, largest, label_logits, &labels);
  const Operands operands = operands_of(hidden, weight, bias, scale);
  const RowResults results = {
      data<float>(nll), nullptr, data<float>(entropy), nullptr, nullptr, data<int64_t>(prediction), nullptr, nullptr,
      data<float>(lse), data<float>(tail), data<float>(nll_l1), nullptr, nullptr, nullptr, data<int64_t>(counts)};
  const RowEntries entries = {columns.size(1), (float)threshold, data<int32_t>(columns), data<float>(values), nullptr};
  RowDirections of_rest = row_directions(directions, pairs);
  of_rest.nll = data<float>(low), of_rest.nll_square = data<float>(square);
  shared(nll.size(0), 8, [&](auto& next) {
    for (int64_t begin, end; next(begin, end);)
      kernels().compact_half(chunk, results, entries, of_rest, operands, begin, end);
  });
}

void half_tail_profile_op(const Tensor& z, const Tensor& label_logits, const Tensor& lse, const Tensor& counts,
                          const Tensor& which, int64_t first, Tensor profile) {
  const HalfChunk chunk = half_chunk_of(profile, z, z, label_logits, nullptr);
  std::vector<int64_t> rows;
  for (int64_t i = 0; i < which.size(0); i++) {
    const int64_t t = data<int64_t>(which)[i] - first;
    if (data<int64_t>(counts)[t] >= 0 && std::isfinite(data<float>(lse)[t])) rows.push_back(t);
  }
  const int64_t V = chunk.vocabulary, width = 4096;
  parallel((V + width - 1) / width, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; block++)
      kernels().half_tail_profile(chunk, data<float>(lse), rows.data(), (int64_t)rows.size(), data<float>(profile),
                                  block * width, std::min(V, (block + 1) * width));
  });
}

Chunk chunk_of(const Tensor& z, const std::optional<Tensor>& r, bool difference, const Tensor& labels, double softcap) {
  return {z.size(1), data<float>(z), data<float>(r), difference, data<int64_t>(labels), (float)softcap};
}

void compact_op(const Tensor& z, const std::optional<Tensor>& r, bool difference, const Tensor& labels, double softcap,
                double threshold, Tensor nll, Tensor prediction, std::optional<Tensor> kl,
                std::optional<Tensor> entropy, std::optional<Tensor> reference_nll,
                std::optional<Tensor> reference_entropy, Tensor rows, Tensor counts, Tensor columns, Tensor nll_values,
                std::optional<Tensor> kl_values, const std::optional<Tensor>& directions,
                const std::optional<Tensor>& pairs, std::optional<Tensor> nll_low, std::optional<Tensor> kl_low,
                std::optional<Tensor> squares, const std::optional<Tensor>& hidden,
                const std::optional<Tensor>& reference, const std::optional<Tensor>& weight,
                const std::optional<Tensor>& low_rank, const std::optional<Tensor>& low_hidden,
                const std::optional<Tensor>& low_reference, const std::optional<Tensor>& bias, double scale) {
  const Chunk chunk = chunk_of(z, r, difference, labels, softcap);
  const Operands operands = {
      data<float>(hidden), data<float>(reference), weight ? weight->data_ptr() : nullptr,
      weight ? element(*weight) : Element::Float32, weight ? weight->size(1) : 0, data<float>(low_rank),
      data<float>(low_hidden), data<float>(low_reference), low_rank ? low_rank->size(1) : 0, data<float>(bias),
      (float)scale, (float)softcap};
  const int64_t n = z.size(0), stride = rows.size(1);
  float* v = data<float>(rows);  // [8, rows]: see fused_losses/kernels/schemas.py
  const RowResults results = {
      data<float>(nll), data<float>(kl), data<float>(entropy), data<float>(reference_nll),
      data<float>(reference_entropy), data<int64_t>(prediction), v, v + stride, v + 2 * stride, v + 3 * stride,
      v + 4 * stride, v + 5 * stride, v + 6 * stride, v + 7 * stride, data<int64_t>(counts)};
  const RowEntries entries = {columns.size(1), (float)threshold, data<int32_t>(columns), data<float>(nll_values),
                              data<float>(kl_values)};
  float* square = data<float>(squares);  // [2, N]
  RowDirections low = row_directions(directions, pairs);
  low.nll = data<float>(nll_low), low.kl = data<float>(kl_low);
  low.nll_square = square, low.kl_square = square ? square + n : nullptr;
  shared(n, 8, [&](auto& next) {
    for (int64_t begin, end; next(begin, end);)
      kernels().compact(chunk, results, entries, low, hidden ? &operands : nullptr, begin, end);
  });
}

// Where each row begins, of rows with so many entries; of one with a negative count there are none.
std::vector<int64_t> offsets_of(const Tensor& counts) {
  const int64_t n = counts.size(0);
  std::vector<int64_t> offsets(n + 1, 0);
  for (int64_t t = 0; t < n; t++) offsets[t + 1] = offsets[t] + std::max<int64_t>(data<int64_t>(counts)[t], 0);
  return offsets;
}

void scale_entries_op(const Tensor& counts, const Tensor& values, double scale, const Tensor& factor, Tensor out) {
  const std::vector<int64_t> offsets = offsets_of(counts);
  const bool half = values.scalar_type() == torch::headeronly::ScalarType::Half;
  shared(counts.size(0), 64, [&](auto& next) {
    for (int64_t begin, end; next(begin, end);)
      kernels().scale_entries(offsets.data(), values.data_ptr(), half, (float)scale, data<float>(factor),
                              data<float>(out), begin, end);
  });
}

void halve_entries_op(const Tensor& counts, const Tensor& values, double half_scale, Tensor out, Tensor scales,
                      Tensor l1, Tensor l2) {
  const std::vector<int64_t> offsets = offsets_of(counts);
  shared(counts.size(0), 64, [&](auto& next) {
    for (int64_t begin, end; next(begin, end);)
      kernels().halve_entries(offsets.data(), data<float>(values), (float)half_scale, data<uint16_t>(out),
                              data<float>(scales), data<float>(l1), data<float>(l2), begin, end);
  });
}

// The stored entries of [rows, capacity] one after the other.
void pack_op(const Tensor& counts, const Tensor& from, Tensor to) {
  const int64_t n = counts.size(0), capacity = from.size(1);
  const std::vector<int64_t> offsets = offsets_of(counts);
  const int32_t* source = data<int32_t>(from);
  int32_t* target = data<int32_t>(to);
  parallel(n, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++)
      std::copy(source + t * capacity, source + t * capacity + offsets[t + 1] - offsets[t], target + offsets[t]);
  });
}

void tail_profile_op(const Tensor& z, const std::optional<Tensor>& r, bool difference, const Tensor& labels,
                     double softcap, const Tensor& rows, const Tensor& which, Tensor profile) {
  const Chunk chunk = chunk_of(z, r, difference, labels, softcap);
  const float* v = data<float>(rows);
  const int64_t stride = rows.size(1), V = chunk.vocabulary, width = 4096;
  parallel((V + width - 1) / width, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; block++)
      kernels().tail_profile(chunk, v, v + stride, v + 2 * stride, data<int64_t>(which), which.size(0),
                             data<float>(profile), block * width, std::min(V, (block + 1) * width));
  });
}

void exact_statistics_op(const Tensor& z, const std::optional<Tensor>& r, bool difference, const Tensor& labels,
                         double beta, Tensor nll, Tensor prediction, Tensor lse, std::optional<Tensor> kl,
                         std::optional<Tensor> entropy, std::optional<Tensor> reference_nll,
                         std::optional<Tensor> reference_entropy, std::optional<Tensor> log_p2,
                         std::optional<Tensor> rank, std::optional<Tensor> divergence, Tensor rows) {
  const Chunk chunk = chunk_of(z, r, difference, labels, 0);
  const ExactResults results = {
      data<float>(nll), data<int64_t>(prediction), data<float>(lse), data<float>(kl), data<float>(entropy),
      data<float>(reference_nll), data<float>(reference_entropy), data<float>(log_p2), data<int64_t>(rank),
      data<float>(divergence), data<float>(rows), rows.size(1)};
  parallel(z.size(0), [&](int64_t begin, int64_t end) {
    kernels().exact_statistics(chunk, beta, results, begin, end);
  });
}

void exact_directions_op(const Tensor& z, const std::optional<Tensor>& r, bool difference, const Tensor& labels,
                         double softcap, double beta, const Tensor& nll, const Tensor& rows,
                         const std::optional<Tensor>& nll_weight, const std::optional<Tensor>& kl_weight,
                         const std::optional<Tensor>& entropy_weight, const std::optional<Tensor>& divergence_weight,
                         const std::optional<Tensor>& label_weight, Tensor out) {
  const Chunk chunk = chunk_of(z, r, difference, labels, softcap);
  const ExactWeights weights = {data<float>(nll_weight), data<float>(kl_weight), data<float>(entropy_weight),
                                data<float>(divergence_weight), data<float>(label_weight)};
  parallel(z.size(0), [&](int64_t begin, int64_t end) {
    kernels().exact_directions(chunk, beta, data<float>(nll), data<float>(rows), rows.size(1), weights,
                               data<float>(out), begin, end);
  });
}

Sparse sparse_of(const Tensor& offsets, const Tensor& columns, const Tensor& values, int64_t columns_count, int64_t D) {
  return {offsets.size(0) - 1, columns_count, D, data<int64_t>(offsets), data<int32_t>(columns), data<float>(values)};
}

void rows_product_op(const Tensor& offsets, const Tensor& columns, const Tensor& values, const Tensor& matrix,
                     const Tensor& scale, const Tensor& vector, Tensor out) {
  const Sparse s = sparse_of(offsets, columns, values, matrix.size(0), matrix.size(1));
  const std::vector<int64_t> bounds = balanced(s.offsets, s.rows, 1);
  shared((int64_t)bounds.size() - 1, 1, [&](auto& next) {
    for (int64_t begin, end; next(begin, end);)
      kernels().rows_product(s, matrix.data_ptr(), element(matrix), data<float>(scale), data<float>(vector),
                             out.data_ptr(), element(out), bounds[begin], bounds[end]);
  });
}

void columns_product_op(const Tensor& offsets, const Tensor& columns, const Tensor& values, const Tensor& matrix,
                        const Tensor& scale, const Tensor& vector, const std::optional<Tensor>& base, double base_scale,
                        Tensor out) {
  const int64_t V = out.size(0);
  const Sparse s = sparse_of(offsets, columns, values, V, matrix.size(1));
  // By column: a counting sort, stable, so that every sum runs over the rows in order.
  const int64_t entries = s.offsets[s.rows];
  std::vector<int64_t> starts(V + 1, 0);
  for (int64_t j = 0; j < entries; j++) starts[s.columns[j] + 1]++;
  std::partial_sum(starts.begin(), starts.end(), starts.begin());
  std::vector<int64_t> next(starts.begin(), starts.end() - 1);
  std::vector<int32_t> rows(entries);
  std::vector<float> sorted(entries);
  for (int64_t t = 0; t < s.rows; t++)
    for (int64_t j = s.offsets[t]; j < s.offsets[t + 1]; j++) {
      const int64_t at = next[s.columns[j]]++;
      rows[at] = (int32_t)t;
      sorted[at] = s.values[j];
    }
  fault_in(out.data_ptr(), V * s.hidden * (element(out) == Element::Float32 ? 4 : 2));
  const std::vector<int64_t> bounds = balanced(starts.data(), V, 2);
  shared((int64_t)bounds.size() - 1, 1, [&](auto& next) {
    for (int64_t begin, end; next(begin, end);)
      kernels().columns_product(s.hidden, starts.data(), rows.data(), sorted.data(), matrix.data_ptr(), element(matrix),
                                data<float>(scale), data<float>(vector), data<float>(base), (float)base_scale,
                                out.data_ptr(), element(out), bounds[begin], bounds[end]);
  });
}

// out = Σ_v scale[v] · matrix[v], by fixed blocks: the same from run to run whatever the number of threads.
void weighted_sum_op(const Tensor& matrix, const Tensor& scale, Tensor out) {
  const int64_t V = matrix.size(0), D = matrix.size(1), blocks = std::min<int64_t>(V, 64);
  std::vector<float> partial(blocks * D, 0.0f);
  parallel(blocks, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; b++)
      kernels().weighted_sum(D, matrix.data_ptr(), element(matrix), data<float>(scale), partial.data() + b * D,
                             V * b / blocks, V * (b + 1) / blocks);
  });
  float* sum = data<float>(out);
  for (int64_t d = 0; d < D; d++) {
    double total = 0;
    for (int64_t b = 0; b < blocks; b++) total += partial[b * D + d];
    sum[d] = (float)total;
  }
}

int64_t interface_op() { return 8; }  // INTERFACE of fused_losses/kernels/schemas.py

std::string simd_op() { return kernels().name; }

bool has_half_logits_op() { return kernels().compact_half; }

bool has_pairs_op() { return kernels().has_pairs(); }

bool int8_is_fast_op() { return int8_is_fast(); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_losses, CPU, m) {
  m.impl("logits", TORCH_BOX(&logits_op));
  m.impl("large_numbers", TORCH_BOX(&large_numbers_op));
  m.impl("times_weight", TORCH_BOX(&times_weight_op));
  m.impl("add_outer", TORCH_BOX(&add_outer_op));
  m.impl("int8_logits", TORCH_BOX(&int8_logits_op));
  m.impl("int8_head", TORCH_BOX(&int8_head_op));
  m.impl("label_logits", TORCH_BOX(&label_logits_op));
  m.impl("half_logits", TORCH_BOX(&half_logits_op));
  m.impl("compact_half", TORCH_BOX(&compact_half_op));
  m.impl("half_tail_profile", TORCH_BOX(&half_tail_profile_op));
  m.impl("compact", TORCH_BOX(&compact_op));
  m.impl("scale_entries", TORCH_BOX(&scale_entries_op));
  m.impl("halve_entries", TORCH_BOX(&halve_entries_op));
  m.impl("pack", TORCH_BOX(&pack_op));
  m.impl("tail_profile", TORCH_BOX(&tail_profile_op));
  m.impl("exact_statistics", TORCH_BOX(&exact_statistics_op));
  m.impl("exact_directions", TORCH_BOX(&exact_directions_op));
  m.impl("rows_product", TORCH_BOX(&rows_product_op));
  m.impl("columns_product", TORCH_BOX(&columns_product_op));
  m.impl("weighted_sum", TORCH_BOX(&weighted_sum_op));
}
STABLE_TORCH_LIBRARY_IMPL(fused_losses, CompositeExplicitAutograd, m) {
  m.impl("simd", TORCH_BOX(&simd_op));
  m.impl("has_pairs", TORCH_BOX(&has_pairs_op));
  m.impl("has_half_logits", TORCH_BOX(&has_half_logits_op));
  m.impl("int8_is_fast", TORCH_BOX(&int8_is_fast_op));
  m.impl("interface", TORCH_BOX(&interface_op));
}

}  // namespace fused_losses
