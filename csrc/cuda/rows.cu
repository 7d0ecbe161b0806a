// row_statistics: everything that is known of a token from its row of logits, with and without a reference.
//
// Reads 4·V bytes a row, 8·V with a reference; writes some 60 bytes. About 25 operations a logit, 90 with a reference.
// Floor: 4·N·V (8·N·V) / HBM bandwidth: 0.16 ms (0.31 ms) per 1,024 tokens at V = 128,256 and 3.35 TB/s (data sheet of
// the H100; estimated, not measured).
// Without a reference one pass is enough. With one a second pass needs the totals of the first: a cluster of blocks
// holds the row in its shared memory and reads it once (sm_90 and later); elsewhere the row is read twice, 16·V bytes.
// The second is also better where a cluster's blocks leave no room for others on their multiprocessors and there are
// rows enough for all of these. At V = 128,256 a cluster has 8 blocks of 128 KB: 16 warps a multiprocessor, 16 rows at
// a time on 132 of them, loading, computing and waiting for each other in turn. That took 0.42 ms for 256 rows on an
// H200. Rows read twice, one a block, have 32 warps a multiprocessor (56 registers a thread) and 64 KB of loads in
// flight; the operations on a pair of logits, some 200, then cost more than the 16·V bytes.
#include "common.cuh"

namespace fused_losses::cuda {
namespace {

constexpr int THREADS = 512, WARPS = THREADS / 32;
// A block with less than this leaves room for a second one on the same multiprocessor: one loads while the other
// computes.
constexpr int64_t SHARED_FOR_TWO = 100 << 10, SHARED_AT_MOST = 200 << 10;

// The sum over logits but the label's, kept so that nothing cancels: the largest apart, the others relative to it.
struct Sums {
  float top;       // −inf: none
  int index;       // of the largest; the lowest of equals
  float rest;      // Σ e^{z − top} without the largest; −1 where there is none, so that rest + 1 is the sum with it
  float weighted;  // Σ e^{z − top} (top − z)
  float sloped;    // Σ e^{z − top} slope, the largest included

  __device__ __forceinline__ void clear() {
    top = minus_infinity(), index = 0x7fffffff, rest = -1, weighted = 0, sloped = 0;
  }

  // Logits x of columns [first, first + WIDTH), ascending from call to call; −inf: not counted. NaN goes into `rest`.
  template <int WIDTH>
  __device__ __forceinline__ void add(const float (&x)[WIDTH], int first, const Softcap& cap) {
    float largest = x[0];
#pragma unroll
    for (int i = 1; i < WIDTH; i++) largest = fmaxf(largest, x[i]);
    if (largest > top) {
      const float factor = expf(top - largest), sum = rest + 1;
      weighted = factor == 0 ? 0 : factor * (weighted + (largest - top) * sum);
      sloped *= factor;
      rest = sum * factor;
      top = largest;
#pragma unroll
      for (int i = WIDTH - 1; i >= 0; i--)
        if (x[i] == largest) index = first + i;
    }
#pragma unroll
    for (int i = 0; i < WIDTH; i++) {
      const bool is_top = first + i == index;
      const float e = is_top || x[i] == minus_infinity() ? 0 : expf(x[i] - top);
      rest += e;
      weighted += e == 0 ? 0 : e * (top - x[i]);
      if (cap.cap > 0) sloped += is_top ? cap.slope(x[i]) : e == 0 ? 0 : e * cap.slope(x[i]);
    }
  }

  __device__ __forceinline__ void merge(Sums other) {
    if (other.top > top || (other.top == top && other.index < index)) {
      const Sums mine = *this;
      *this = other;
      other = mine;
    }
    const float sum = other.rest + 1;
    if (other.top == minus_infinity()) {
      rest += sum;  // 0, or NaN where only NaN was seen
      return;
    }
    const float factor = other.top == top ? 1 : expf(other.top - top);
    rest += sum * factor;
    weighted += factor == 0 ? 0 : factor * (other.weighted + (top - other.top) * sum);
    sloped += factor * other.sloped;
  }

  __device__ __forceinline__ void merge_warp() {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      Sums other;
      other.top = __shfl_xor_sync(ALL_LANES, top, offset);
      other.index = __shfl_xor_sync(ALL_LANES, index, offset);
      other.rest = __shfl_xor_sync(ALL_LANES, rest, offset);
      other.weighted = __shfl_xor_sync(ALL_LANES, weighted, offset);
      other.sloped = __shfl_xor_sync(ALL_LANES, sloped, offset);
      merge(other);
    }
  }
};

struct SumsOfBoth {
  Sums z, r;
};
struct GapSums {
  float gap, excess, sloped, l1;
};

// What a block exchanges, at the start of its dynamic shared memory, where other blocks of the cluster find it.
struct Exchange {
  SumsOfBoth warps[WARPS], block, all;
  GapSums gap_warps[WARPS], gap_block;
};
constexpr int64_t EXCHANGE_BYTES = (sizeof(Exchange) + 15) / 16 * 16;

// What follows from the sums over the others and the label's logit.
struct Totals {
  float top, log_sum, nll, rest, entropy;
  int index;

  __device__ __forceinline__ Totals(const Sums& others, float at_label, int label, bool capped) {
    const bool label_is_top = at_label > others.top || (at_label == others.top && label < others.index);
    top = label_is_top ? at_label : others.top;
    index = label_is_top ? label : others.index;
    const float infinite = (top - top) + (at_label - at_label);  // NaN where they are
    // log R − z[label], R the sum over the others: a common offset cancels, and tiny probabilities of error stay exact.
    const float delta = (others.top - at_label) + log1pf(others.rest);
    nll = (delta > 0 ? delta + log1pf(expf(-delta)) : log1pf(expf(delta))) + infinite;
    const float sum = others.rest + 1;
    log_sum = (label_is_top ? log1pf(sum == 0 ? sum : sum * expf(others.top - at_label))
                            : log1pf(others.rest + expf(at_label - others.top))) + infinite;
    const float wrong = -expm1f(-nll);
    // lse − the largest of the others ≥ 0: every term of the entropy is positive.
    const float from_others = (top - others.top) + log_sum, share = expf(-from_others);
    rest = capped ? share * others.sloped + infinite : wrong;
    const float spread = share == 0 ? 0 : share * (others.weighted + from_others * sum);
    entropy = spread + (1 - wrong) * nll;
  }
};

struct Logits {
  float z, r, d;
};

// From z and r as they are read to finished logits; `held` and `of_held` keep these as two numbers.
struct Finish {
  bool difference, keeps_difference;  // a soft-cap is not linear
  float scale, reference_scale;
  Softcap cap, reference_cap;

  __device__ __forceinline__ explicit Finish(const RowStatistics& a)
      : difference(a.difference),
        keeps_difference(a.difference && a.softcap == 0),
        scale(a.scale),
        reference_scale(a.difference ? a.scale : a.reference_scale),
        cap(a.softcap),
        reference_cap(a.difference ? a.softcap : a.reference_softcap) {}

  __device__ __forceinline__ float alone(float z) const { return cap(scale * at_least(z)); }

  __device__ __forceinline__ Logits operator()(float z, float r) const {
    r = at_least(r);
    Logits out;
    out.r = reference_cap(reference_scale * r);
    if (keeps_difference) {
      out.d = scale * z;
      out.z = out.r + out.d;
    } else {
      out.z = difference ? cap(scale * (z + r)) : alone(z);
      out.d = out.z - out.r;
    }
    return out;
  }

  // The number kept beside r.
  __device__ __forceinline__ float held(const Logits& x) const { return keeps_difference ? x.d : x.z; }
  __device__ __forceinline__ Logits of_held(float x, float r) const {
    return keeps_difference ? Logits{r + x, r, x} : Logits{x, r, x - r};
  }
};

template <int WIDTH>
struct alignas(4 * WIDTH) Floats {
  float x[WIDTH];
};

template <int WIDTH>
__device__ __forceinline__ Floats<WIDTH> load(const float* p, int64_t piece, int64_t end) {
  Floats<WIDTH> out;
  if constexpr (WIDTH == 4) {
    const float4 v = piece < end ? __ldg(reinterpret_cast<const float4*>(p) + piece) : make_float4(0, 0, 0, 0);
    out.x[0] = v.x, out.x[1] = v.y, out.x[2] = v.z, out.x[3] = v.w;
  } else {
    out.x[0] = piece < end ? __ldg(p + piece) : 0;
  }
  return out;
}

// A thread's place: its row, and the block's part [begin, end) of it in pieces of WIDTH floats.
template <int WIDTH>
struct Place {
  const float *z, *r;  // r: null without a reference
  int label, thread, lane, warp;
  int64_t begin, end, per_block;
  Floats<WIDTH>* held;  // the part in shared memory: per_block pieces of what is kept beside r, and as many of r

  __device__ __forceinline__ Place(const RowStatistics& a, unsigned char* shared, int64_t t, unsigned rank,
                                   unsigned blocks)
      : z(a.z + t * a.vocabulary),
        r(a.r ? a.r + t * a.vocabulary : nullptr),
        label(static_cast<int>(a.labels[t])),
        thread(static_cast<int>(threadIdx.x)),
        lane(thread % 32),
        warp(thread / 32),
        held(reinterpret_cast<Floats<WIDTH>*>(shared + EXCHANGE_BYTES)) {
    const int64_t pieces = a.vocabulary / WIDTH;
    per_block = (pieces + blocks - 1) / blocks;
    begin = rank * per_block;
    end = begin + per_block < pieces ? begin + per_block : pieces;
  }

  // Without the label's logit, if it is among those of columns [first, first + WIDTH).
  __device__ __forceinline__ void leave_out_label(Floats<WIDTH>& logits, int first) const {
#pragma unroll
    for (int i = 0; i < WIDTH; i++)
      if (first + i == label) logits.x[i] = minus_infinity();
  }
};

// First pass: a thread's sums over logits but the label's. HELD: the finished part stays in shared memory.
template <bool REFERENCE, bool HELD, int WIDTH>
__device__ __forceinline__ SumsOfBoth sums_of_logits(const Place<WIDTH>& place, const Finish& finish) {
  constexpr int BATCH = REFERENCE ? 2 : 4;  // loads in flight, of each of z and r
  SumsOfBoth sums;
  sums.z.clear(), sums.r.clear();
  for (int64_t batch = place.begin + place.thread; batch < place.end; batch += BATCH * THREADS) {
    Floats<WIDTH> z[BATCH], r[BATCH];
#pragma unroll
    for (int k = 0; k < BATCH; k++) {
      z[k] = load<WIDTH>(place.z, batch + k * THREADS, place.end);
      if constexpr (REFERENCE) r[k] = load<WIDTH>(place.r, batch + k * THREADS, place.end);
    }
#pragma unroll
    for (int k = 0; k < BATCH; k++) {
      const int64_t piece = batch + k * THREADS;
      if (piece >= place.end) continue;
      const int first = static_cast<int>(piece * WIDTH);
      Floats<WIDTH> kept;
#pragma unroll
      for (int i = 0; i < WIDTH; i++) {
        if constexpr (REFERENCE) {
          const Logits x = finish(z[k].x[i], r[k].x[i]);
          z[k].x[i] = x.z, r[k].x[i] = x.r, kept.x[i] = finish.held(x);
        } else {
          z[k].x[i] = finish.alone(z[k].x[i]);
        }
      }
      if constexpr (HELD) {
        place.held[piece - place.begin] = kept;
        place.held[place.per_block + piece - place.begin] = r[k];
      }
      place.leave_out_label(z[k], first);
      sums.z.add(z[k].x, first, finish.cap);
      if constexpr (REFERENCE) {
        place.leave_out_label(r[k], first);
        sums.r.add(r[k].x, first, Softcap(0));
      }
    }
  }
  return sums;
}

// The sums of the cluster, in every thread.
template <bool REFERENCE, bool HELD, int WIDTH>
__device__ __forceinline__ SumsOfBoth merged(SumsOfBoth sums, Exchange& exchange, const Place<WIDTH>& place,
                                             unsigned blocks) {
  sums.z.merge_warp();
  if constexpr (REFERENCE) sums.r.merge_warp();
  if (place.lane == 0) exchange.warps[place.warp] = sums;
  __syncthreads();
  if (place.warp == 0) {
    if (place.lane < WARPS) sums = exchange.warps[place.lane];
    else sums.z.clear(), sums.r.clear();
    sums.z.merge_warp();
    if constexpr (REFERENCE) sums.r.merge_warp();
    if (place.lane == 0) (HELD ? exchange.block : exchange.all) = sums;
  }
#if FL_CLUSTERS
  if constexpr (HELD) {
    cluster_sync();
    if (place.thread == 0) {
      sums = *of_rank(&exchange.block, 0);
      for (unsigned other = 1; other < blocks; other++) {
        const SumsOfBoth theirs = *of_rank(&exchange.block, other);
        sums.z.merge(theirs.z);
        sums.r.merge(theirs.r);
      }
      exchange.all = sums;
    }
  }
#else
  (void)blocks;
#endif
  __syncthreads();
  return exchange.all;
}

// Second pass: a thread's sums over p − p_ref.
template <bool HELD, int WIDTH>
__device__ __forceinline__ GapSums sums_of_gaps(const Place<WIDTH>& place, const Finish& finish, const Totals& total,
                                                const Totals& reference, float shift) {
  constexpr int BATCH = 2;
  GapSums gaps = {0, 0, 0, 0};
  for (int64_t batch = place.begin + place.thread; batch < place.end; batch += BATCH * THREADS) {
    Floats<WIDTH> z[BATCH], r[BATCH];
#pragma unroll
    for (int k = 0; k < BATCH; k++) {
      const int64_t piece = batch + k * THREADS;
      if constexpr (HELD) {
        if (piece < place.end)
          z[k] = place.held[piece - place.begin], r[k] = place.held[place.per_block + piece - place.begin];
      } else {
        z[k] = load<WIDTH>(place.z, piece, place.end);
        r[k] = load<WIDTH>(place.r, piece, place.end);
      }
    }
#pragma unroll
    for (int k = 0; k < BATCH; k++) {
      if (batch + k * THREADS >= place.end) continue;
#pragma unroll
      for (int i = 0; i < WIDTH; i++) {
        const Logits x = HELD ? finish.of_held(z[k].x[i], r[k].x[i]) : finish(z[k].x[i], r[k].x[i]);
        const Gap gap((x.z - total.top) - total.log_sum, (x.r - reference.top) - reference.log_sum, x.d - shift);
        const float sloped = finish.cap.cap > 0 ? gap.gap * finish.cap.slope(x.z) : gap.gap;
        gaps.gap += gap.gap;
        gaps.excess += gap.excess;
        gaps.sloped += sloped;
        gaps.l1 += fabsf(sloped);
      }
    }
  }
  return gaps;
}

// The sums of the cluster, in the first thread of its first block.
template <bool HELD, int WIDTH>
__device__ __forceinline__ GapSums merged(GapSums gaps, Exchange& exchange, const Place<WIDTH>& place, unsigned rank,
                                          unsigned blocks) {
  gaps = {warp_sum(gaps.gap), warp_sum(gaps.excess), warp_sum(gaps.sloped), warp_sum(gaps.l1)};
  if (place.lane == 0) exchange.gap_warps[place.warp] = gaps;
  __syncthreads();
  if (place.warp == 0) {
    gaps = place.lane < WARPS ? exchange.gap_warps[place.lane] : GapSums{0, 0, 0, 0};
    gaps = {warp_sum(gaps.gap), warp_sum(gaps.excess), warp_sum(gaps.sloped), warp_sum(gaps.l1)};
    if (place.lane == 0) exchange.gap_block = gaps;
  }
#if FL_CLUSTERS
  if constexpr (HELD) {
    cluster_sync();
    if (place.thread == 0 && rank == 0)
      for (unsigned other = 1; other < blocks; other++) {
        const GapSums theirs = *of_rank(&exchange.gap_block, other);
        gaps = {gaps.gap + theirs.gap, gaps.excess + theirs.excess, gaps.sloped + theirs.sloped, gaps.l1 + theirs.l1};
      }
  }
#else
  (void)rank, (void)blocks;
#endif
  return gaps;
}

// One row a cluster (of one block where not HELD). HELD: the finished row stays in shared memory between the passes;
// each thread reads what it wrote itself. WIDTH: floats a load.
template <bool REFERENCE, bool HELD, int WIDTH>
__device__ __forceinline__ void row(const RowStatistics& a, unsigned char* shared, unsigned rank, unsigned blocks) {
  Exchange& exchange = *reinterpret_cast<Exchange*>(shared);
  const int64_t t = blockIdx.x / blocks, N = a.tokens;
  const Place<WIDTH> place(a, shared, t, rank, blocks);
  const Finish finish(a);
  const bool writes = place.thread == 0 && rank == 0;
  float* rows = a.rows + t;

  const SumsOfBoth sums =
      merged<REFERENCE, HELD>(sums_of_logits<REFERENCE, HELD>(place, finish), exchange, place, blocks);
  const float label_z = place.z[place.label];
  const Logits at_label = REFERENCE ? finish(label_z, place.r[place.label]) : Logits{finish.alone(label_z), 0, 0};
  const Totals total(sums.z, at_label.z, place.label, finish.cap.cap > 0);
  if (writes) {
    a.nll[t] = total.nll;
    a.prediction[t] = total.index < a.vocabulary ? total.index : 0;  // NaN everywhere: still an id
    if (a.entropy) a.entropy[t] = total.entropy;
    rows[TOP * N] = total.top;
    rows[LOG_SUM * N] = total.log_sum;
    rows[REST * N] = total.rest;
  }
  if constexpr (!REFERENCE) {
    if (writes)
      for (const Row row : {REF_TOP, REF_LOG_SUM, SHIFT, GAP, GAP_L1, MISSED}) rows[row * N] = 0;
  } else {
    const Totals reference(sums.r, at_label.r, place.label, false);
    // The largest logit may be a rounded sum. Of its rounding log_sum has what is not its share of p.
    const int best = total.index < a.vocabulary ? total.index : 0;
    const Logits at_top = finish(place.z[best], place.r[best]);
    const float rounding = (total.top - at_top.r) - at_top.d, share = expf(-total.log_sum);
    const float shift = ((total.top - reference.top) - share * rounding) + (total.log_sum - reference.log_sum);
    const GapSums own = sums_of_gaps<HELD>(place, finish, total, reference, shift);
    const GapSums gaps = merged<HELD>(own, exchange, place, rank, blocks);
    if (writes) {
      // Σ gap is expm1 of what the shift misses; by its own excess the sum is too large.
      const float missed = log1pf(gaps.gap), g = gaps.gap;
      const float kl = gaps.excess - (fabsf(g) < 0.05f ? 0.5f * g * g * (1 - g * (2.f / 3)) : g - missed);
      if (a.kl) a.kl[t] = kl < 0 ? 0 : kl;
      if (a.reference_nll) a.reference_nll[t] = reference.nll;
      if (a.reference_entropy) a.reference_entropy[t] = reference.entropy;
      rows[REF_TOP * N] = reference.top;
      rows[REF_LOG_SUM * N] = reference.log_sum;
      rows[SHIFT * N] = shift;
      // By p times it each gap is off: where one id has nearly all of p, that is more than its gap.
      const float sloped_p = total.rest + expf(-total.nll) * (finish.cap.cap > 0 ? finish.cap.slope(at_label.z) : 1);
      rows[GAP * N] = gaps.sloped - gaps.gap * sloped_p;
      rows[GAP_L1 * N] = gaps.l1;
      rows[MISSED * N] = missed;
    }
#if FL_CLUSTERS
    if constexpr (HELD) cluster_sync();  // shared memory must last until the others have read it
#endif
  }
}

template <bool REFERENCE, int WIDTH>
__global__ __launch_bounds__(THREADS, 2) void row_kernel(const RowStatistics a) {
  FL_DYNAMIC_SHARED(shared);
  row<REFERENCE, false, WIDTH>(a, shared, 0, 1);
}

template <int WIDTH>
__global__ __launch_bounds__(THREADS, 2) void row_cluster_kernel(const RowStatistics a) {
#if FL_CLUSTERS
  FL_DYNAMIC_SHARED(shared);
  row<true, true, WIDTH>(a, shared, cluster_rank(), cluster_blocks());
#else
  (void)a;  // never launched: cluster_shared_limit is 0
#endif
}

// Shared memory of each of `blocks` blocks that hold a row together.
int64_t held_bytes(int64_t vocabulary, int blocks) {
  return EXCHANGE_BYTES + 8 * ((vocabulary + 4 * blocks - 1) / (4 * blocks) * 4);
}

template <int WIDTH>
bool launch_held(const RowStatistics& a, Stream stream) {
  const auto kernel = row_cluster_kernel<WIDTH>;
  const int64_t limit = cluster_shared_limit(kernel);
  if (limit == 0) return false;
  const bool few = 2 * a.tokens <= multiprocessors();  // then a block a row would leave most of them idle
  for (const int64_t wanted : {SHARED_FOR_TWO, few ? SHARED_AT_MOST : SHARED_FOR_TWO})
    for (int blocks = 1; blocks <= 8; blocks *= 2) {
      const int64_t bytes = held_bytes(a.vocabulary, blocks);
      if (bytes <= (wanted < limit ? wanted : limit))
        return launch_clusters(kernel, a.tokens, blocks, THREADS, bytes, stream, a, "row_cluster_kernel");
    }
  return false;
}

template <int WIDTH>
void launch(const RowStatistics& a, Stream stream) {
  if (a.r && launch_held<WIDTH>(a, stream)) return;
  const auto kernel = a.r ? row_kernel<true, WIDTH> : row_kernel<false, WIDTH>;
  FL_LAUNCH("row_kernel", kernel, static_cast<unsigned>(a.tokens), THREADS, EXCHANGE_BYTES, stream, a);
}

}  // namespace

void row_statistics(const RowStatistics& a, Stream stream) {
  if (a.tokens == 0) return;
  if (a.vocabulary % 4 == 0 && aligned(a.z) && aligned(a.r)) launch<4>(a, stream);
  else launch<1>(a, stream);
}

}  // namespace fused_losses::cuda
