// Softmax over codes without the N x K matrix: p_nk = exp(s_nk - m_n) / Z_n with logits s_nk = x_n . c_k, for
// entropy_loss and soft_quantize. m_n is the row's highest logit, from the search; Z_n = sum_k exp(s_nk - m_n).
//
// Rows pass in blocks of 256, and a block meets the codes in chunks of panels (at most 1024 codes), one task each:
//   sweep   all pairs of the block: Z_n, or a mean of something under p; and which rows each panel matters to ("mask")
//   visit   the marked pairs again, up to 32 rows at a time against one panel, where the caller builds d loss / d s
//   [rows, 32] spread  that tile's share of the gradients: of the panel's codes, and of the rows as one partial sum a
//   chunk
// Sums run in this order: 16 lanes, panels, chunks, blocks; so neither threads nor instruction sets change a bit.
// A row's mask leaves out panels where p < exp(-cut), cut = log K + 20 (float64: 44): all that is left out of a row
// weighs less than e^-20 = 2.1e-9 (7.8e-20) of its softmax, 1/28 (1/1400) of the unit roundoff; the gradients of a row
// lose that share of its largest d loss / d s times cut.
//
// Arithmetic is one kernel, `product`: 8 rows by 32 columns in registers. Codes are packed as panels [C][32] + [32]
// starting scores (0, or -inf where there is no code or it is not finite), and, for the gradient of rows, as rows
// [32][C up to 16]. Memory: (3 C + 2) K numbers, and C of 256 rows for each chunk, as scratch of the call. Source:
// online softmax and recomputation as in FlashAttention, 2205.14135; the mask is ours.
#pragma once
#include "cpu/exp.h"

TOKENFLOW_BEGIN

constexpr int64_t kCodes = 32;   // a panel
constexpr int64_t kBlock = 256;  // rows
constexpr int64_t kTile = 8;     // rows of a product
constexpr int64_t kGroup = 32;   // rows of a visit
constexpr int64_t kTiles = kBlock / kTile;
constexpr int64_t kSum = 16;  // lanes of a running sum

static inline int64_t pad(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// out[r][0, W) = start[0, W), or out[r] itself where start is null, + sum_i a[r row + i step] b[i b_step + (0, W)].
template <class T, int W>
static inline void product(const T* a, int64_t row, int64_t step, const T* b, int64_t b_step, int64_t steps,
                           const T* start, T* const* out) {
  using V = typename Register<T>::V;
  constexpr int kLanes = Register<T>::kLanes, kWide = W / kLanes, kSums = kRegisterBytes == 64 ? 16 : 8;
  constexpr int kRows = kSums / kWide > kTile ? kTile : kSums / kWide > 0 ? kSums / kWide : 1;
  for (int64_t first = 0; first < kTile; first += kRows) {
    V sum[kRows][kWide];
    for (int r = 0; r < kRows; ++r)
      for (int h = 0; h < kWide; ++h) sum[r][h] = load_register((start ? start : out[first + r]) + h * kLanes);
    const T* left = a + first * row;
    for (int64_t i = 0; i < steps; ++i) {
      V right[kWide];
      for (int h = 0; h < kWide; ++h) right[h] = load_register(b + i * b_step + h * kLanes);
      for (int r = 0; r < kRows; ++r) {
        const V x = broadcast(left[r * row + i * step]);
        for (int h = 0; h < kWide; ++h) sum[r][h] = fused(x, right[h], sum[r][h]);
      }
    }
    for (int r = 0; r < kRows; ++r)
      for (int h = 0; h < kWide; ++h) memcpy(out[first + r] + h * kLanes, &sum[r][h], sizeof(V));
  }
}

// The codes of one group, a block of its rows, and what the two have to do with each other.
template <class T>
struct Softmax {
  int64_t codes, channels, panels, span, chunks;  // K, C, panels of 32, panels a chunk
  int threads;
  T cut;          // of a logarithm of p, negative
  T* panel;       // [panels][C + 1][32]
  T* code_rows;   // [panels][32][C up to 16], or null where no row needs a gradient
  T* grad_panel;  // [panels][C up to 8][32], or null where no code needs a gradient
  T* x;           // [256][C up to 8], the block
  T* top;         // [256] m_n; +inf for rows that are left out
  T* log_total;   // [256] log Z_n
  T* mean;        // [256] set by `gather`
  T* total;       // [256] set by `gather`
  T* partial;     // [chunks][2][256]
  T* grad_x;      // [chunks][256][C up to 16], or null
  T* scratch;     // [threads][scratch_size]
  int64_t scratch_size, rows;
  uint8_t* mask;  // [panels][32]: bit r of tile t

  int64_t padded() const { return pad(channels, kTile); }
  int64_t wide() const { return pad(channels, kSum); }
  T* panel_of(int64_t p) const { return panel + p * kCodes * (channels + 1); }
  int64_t last_panel(int64_t chunk) const { return (chunk + 1) * span < panels ? (chunk + 1) * span : panels; }
};

// Takes what one group needs; `width` is that of soft_quantize's values, of which a visit keeps 32 rows.
template <class T>
static Softmax<T> take_softmax(Call& call, int64_t rows, int64_t codes, int64_t channels, int64_t width, bool to_rows,
                               bool to_codes) {
  Softmax<T> s = {};
  s.codes = codes, s.channels = channels;
  s.threads = rows * codes * (channels + width) > 65536 ? call.threads : 1;  // under that, waking them costs more
  s.panels = pad(codes, kCodes) / kCodes;
  s.span = (s.panels + 31) / 32 < 32 ? (s.panels + 31) / 32 : 32;
  s.chunks = (s.panels + s.span - 1) / s.span;
  s.cut = -static_cast<T>(__builtin_log(static_cast<double>(codes)) + (sizeof(T) == 4 ? 20 : 44));
  s.panel = take<T>(call, s.panels * kCodes * (channels + 1));
  s.x = take<T>(call, kBlock * s.padded());
  s.top = take<T>(call, kBlock), s.log_total = take<T>(call, kBlock);
  s.mean = take<T>(call, kBlock), s.total = take<T>(call, kBlock);
  s.partial = take<T>(call, s.chunks * 2 * kBlock);
  s.scratch_size = pad(kGroup * (s.padded() + pad(width, kTile) + 2 * kCodes) + s.wide(), 16);
  s.scratch = take<T>(call, s.threads * s.scratch_size);
  if (to_rows) s.code_rows = take<T>(call, s.panels * kCodes * s.wide());
  if (to_rows) s.grad_x = take<T>(call, s.chunks * kBlock * s.wide());
  if (to_codes) s.grad_panel = take<T>(call, s.panels * kCodes * s.padded());
  s.mask = take<uint8_t>(call, s.panels * kTiles);
  return s;
}

// Rows [count, width] of a table as a panel [width][32], zeros for those that are not finite and behind the last.
template <class T>
static inline void transpose_panel(const T* rows, int64_t count, int64_t width, T* panel) {
  for (int64_t l = 0; l < kCodes; ++l) {
    const bool good = l < count && all_finite(rows + l * width, width);
    for (int64_t d = 0; d < width; ++d) panel[d * kCodes + l] = good ? rows[l * width + d] : 0;
  }
}

// The codebook [K, C] of a group into panels, and into rows where those are wanted.
template <class T>
static void pack_codes(const Softmax<T>& s, const T* codebook) {
#pragma omp parallel for num_threads(s.threads) schedule(static)
  for (int64_t p = 0; p < s.panels; ++p) {
    const int64_t count = s.codes - p * kCodes < kCodes ? s.codes - p * kCodes : kCodes;
    const T* codes = codebook + p * kCodes * s.channels;
    T* panel = s.panel_of(p);
    transpose_panel(codes, count, s.channels, panel);
    T* start = panel + s.channels * kCodes;
    if (s.code_rows) memset(s.code_rows + p * kCodes * s.wide(), 0, kCodes * s.wide() * sizeof(T));
    if (s.grad_panel) memset(s.grad_panel + p * kCodes * s.padded(), 0, kCodes * s.padded() * sizeof(T));
    for (int64_t l = 0; l < kCodes; ++l) {
      const bool good = l < count && all_finite(codes + l * s.channels, s.channels);
      start[l] = good ? 0 : -__builtin_inf();
      if (s.code_rows && good)
        memcpy(s.code_rows + (p * kCodes + l) * s.wide(), codes + l * s.channels, s.channels * sizeof(T));
    }
  }
}

// Rows [first, first + rows) of group g, from x [N, G, C], as the block; ids [N, G] name their best codes, -1 leaves
// out.
template <class T>
static void load_block(Softmax<T>* s, const View& x, const View& codebook, const View& ids, int64_t g, int64_t first) {
  const int64_t groups = x.shape[1], rows = x.shape[0] - first < kBlock ? x.shape[0] - first : kBlock;
  const int64_t channels = s->channels, padded = s->padded();
  const T* codes = static_cast<const T*>(codebook.data) + g * s->codes * channels;
  s->rows = rows;
  memset(s->x, 0, kBlock * padded * sizeof(T));
  for (int64_t r = 0; r < kBlock; ++r) {
    s->top[r] = __builtin_inf();
    s->log_total[r] = 0;
    if (r >= rows) continue;
    const int64_t row = (first + r) * groups + g, id = static_cast<const int64_t*>(ids.data)[row];
    if (id < 0 || id >= s->codes) continue;
    const T* in = static_cast<const T*>(x.data) + row * channels;
    T score = 0;
    for (int64_t d = 0; d < channels; ++d) score = fused(in[d], codes[id * channels + d], score);
    if (!finite(score)) continue;
    memcpy(s->x + r * padded, in, channels * sizeof(T));
    s->top[r] = score;
  }
}

// One chunk of codes against the block: partial sums over its codes of e and of e a, e = exp(u), u = s - m - log Z;
// `of(row, tile row, panel, first code, u)` gives a for a register of codes, after `tile(tile, panel)` saw which tile.
template <class T, class Prepare, class Of>
static void sweep(const Softmax<T>& s, int64_t chunk, T* scratch, Prepare prepare, Of of) {
  using V = typename Register<T>::V;
  constexpr int kLanes = Register<T>::kLanes;
  T* scores = scratch;  // [8][32]
  T* out[kTile];
  for (int64_t r = 0; r < kTile; ++r) out[r] = scores + r * kCodes;
  for (int64_t t = 0; t * kTile < s.rows; ++t) {
    V sums[kTile][2][kSum / kLanes] = {};
    for (int64_t p = chunk * s.span; p < s.last_panel(chunk); ++p) {
      const T* panel = s.panel_of(p);
      product<T, kCodes>(s.x + t * kTile * s.padded(), s.padded(), 1, panel, kCodes, s.channels,
                         panel + s.channels * kCodes, out);
      uint8_t marked = 0;
      for (int64_t r = 0; r < kTile; ++r) {
        V high = load_register(out[r]);
        for (int64_t l = kLanes; l < kCodes; l += kLanes) {
          const V score = load_register(out[r] + l);
          high = score > high ? score : high;
        }
        const int64_t row = t * kTile + r;
        // Differences first: top + cut would round to top where logits are large, and leave out the best code itself.
        if (!any_above(high - broadcast(s.top[row]) - broadcast(s.log_total[row]), broadcast(s.cut))) continue;
        if (!marked) prepare(t, p);
        marked |= 1 << r;
        for (int64_t l = 0; l < kCodes; l += kLanes) {
          V u = load_register(out[r] + l) - broadcast(s.top[row]) - broadcast(s.log_total[row]);
          u = u > broadcast(Exp<T>::kLowest) ? u : broadcast(Exp<T>::kLowest);
          const V e = exp_register<T>(u);
          V(&sum)[2][kSum / kLanes] = sums[r];
          sum[0][l / kLanes % (kSum / kLanes)] += e;
          sum[1][l / kLanes % (kSum / kLanes)] += e * of(row, r, p, l, u);
        }
      }
      s.mask[p * kTiles + t] = marked;
    }
    for (int64_t r = 0; r < kTile; ++r)
      for (int part = 0; part < 2; ++part) {
        T sum = 0;
        for (int h = 0; h < kSum / kLanes; ++h)
          for (int l = 0; l < kLanes; ++l) sum += sums[r][part][h][l];
        s.partial[(chunk * 2 + part) * kBlock + t * kTile + r] = sum;
      }
  }
}

// total[r] = sum of e, mean[r] = sum of e a / sum of e, over all chunks; 0 for rows that are left out.
template <class T>
static void gather(const Softmax<T>& s) {
  for (int64_t r = 0; r < s.rows; ++r) {
    T total = 0, weighted = 0;
    for (int64_t q = 0; q < s.chunks; ++q) {
      total += s.partial[q * 2 * kBlock + r];
      weighted += s.partial[(q * 2 + 1) * kBlock + r];
    }
    s.total[r] = total;
    s.mean[r] = total > 0 ? weighted / total : 0;
  }
}

// Up to 32 rows that a panel matters to.
template <class T>
struct Visit {
  int64_t count, panel;
  int64_t row[kGroup];  // in the block
  T* x;                 // [32][C up to 8]; zeros behind the last
  T* u;                 // [32][32] log p; below the cut behind the last
  T* values;            // [32][width up to 8], free for the caller
  T* spare;             // [32][32], free for the caller
  T* dump;              // [C up to 16]
};

// use(visit) for the marked rows of panel p, in order.
template <class T, class Use>
static void visit(const Softmax<T>& s, int64_t p, T* scratch, Use use) {
  using V = typename Register<T>::V;
  const int64_t padded = s.padded();
  Visit<T> v;
  v.x = scratch, v.u = v.x + kGroup * padded, v.spare = v.u + kGroup * kCodes;
  v.dump = v.spare + kGroup * kCodes, v.values = v.dump + s.wide();
  v.panel = p, v.count = 0;
  const T* panel = s.panel_of(p);
  for (int64_t row = 0; row <= s.rows; ++row) {
    if (row < s.rows && (s.mask[p * kTiles + row / kTile] >> row % kTile & 1)) v.row[v.count++] = row;
    if (v.count == 0 || (v.count < kGroup && row < s.rows)) continue;
    for (int64_t i = 0; i < v.count; ++i) memcpy(v.x + i * padded, s.x + v.row[i] * padded, padded * sizeof(T));
    memset(v.x + v.count * padded, 0, (pad(v.count, kTile) - v.count) * padded * sizeof(T));
    for (int64_t i = 0; i < v.count; i += kTile) {
      T* out[kTile];
      for (int64_t r = 0; r < kTile; ++r) out[r] = v.u + (i + r) * kCodes;
      product<T, kCodes>(v.x + i * padded, padded, 1, panel, kCodes, s.channels, panel + s.channels * kCodes, out);
    }
    for (int64_t i = 0; i < pad(v.count, kTile); ++i) {
      const V top = broadcast(i < v.count ? s.top[v.row[i]] : static_cast<T>(__builtin_inf()));
      const V log_total = broadcast(i < v.count ? s.log_total[v.row[i]] : 0);
      for (int64_t l = 0; l < kCodes; l += Register<T>::kLanes) {
        V u = load_register(v.u + i * kCodes + l) - top - log_total;
        u = u > broadcast(Exp<T>::kLowest) ? u : broadcast(Exp<T>::kLowest);
        memcpy(v.u + i * kCodes + l, &u, sizeof(V));
      }
    }
    use(v);
    v.count = 0;
  }
}

// Adds what d loss / d s = slope [32][32] gives to the gradients of the panel's codes and of the visit's rows.
template <class T>
static inline void spread(const Softmax<T>& s, int64_t chunk, const Visit<T>& v, const T* slope) {
  T* out[kTile];
  const int64_t padded = s.padded(), wide = s.wide();
  for (int64_t d = 0; s.grad_panel && d < padded; d += kTile) {
    for (int64_t r = 0; r < kTile; ++r) out[r] = s.grad_panel + (v.panel * padded + d + r) * kCodes;
    product<T, kCodes>(v.x + d, 1, padded, slope, kCodes, v.count, nullptr, out);
  }
  const T* codes = s.code_rows + v.panel * kCodes * wide;
  for (int64_t i = 0; s.grad_x && i < v.count; i += kTile)
    for (int64_t d = 0; d < wide; d += kSum) {
      for (int64_t r = 0; r < kTile; ++r)
        out[r] = (i + r < v.count ? s.grad_x + (chunk * kBlock + v.row[i + r]) * wide : v.dump) + d;
      product<T, kSum>(slope + i * kCodes, kCodes, 1, codes + d, wide, kCodes, nullptr, out);
    }
}

// Gradients of the block's rows, the sum of its chunks in order, into grad [N, G, C].
template <class T>
static void store_rows(const Softmax<T>& s, const View& grad, int64_t g, int64_t first) {
  const int64_t groups = grad.shape[1], channels = s.channels;
#pragma omp parallel for num_threads(s.threads) schedule(static)
  for (int64_t r = 0; r < s.rows; ++r) {
    T* out = static_cast<T*>(grad.data) + ((first + r) * groups + g) * channels;
    for (int64_t d = 0; d < channels; ++d) out[d] = 0;
    for (int64_t q = 0; q < s.chunks; ++q)
      for (int64_t d = 0; d < channels; ++d) out[d] += s.grad_x[(q * kBlock + r) * s.wide() + d];
  }
}

// Gradients of the group's codes into grad [K, C].
template <class T>
static void store_codes(const Softmax<T>& s, T* grad) {
#pragma omp parallel for num_threads(s.threads) schedule(static)
  for (int64_t k = 0; k < s.codes; ++k)
    for (int64_t d = 0; d < s.channels; ++d)
      grad[k * s.channels + d] = s.grad_panel[(k / kCodes * s.padded() + d) * kCodes + k % kCodes];
}

TOKENFLOW_END
