// The search of search.h: which way a row goes, and the memory of each. Compiled here once, for every op.
#include "cpu/search.h"

TOKENFLOW_BEGIN

static inline int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// Hands out pieces of the workspace; without one it only counts.
struct Carve {
  char* at;
  int64_t used;
  template <class P>
  P* take(int64_t n) {
    P* p = reinterpret_cast<P*>(at + used);
    used += aligned(n * static_cast<int64_t>(sizeof(P)));
    return p;
  }
};

template <class T>
static bool certify(int64_t rows, int64_t codes, int64_t channels) {
  if (sizeof(T) != 4 || !can_certify() || channels > kMaxChannels8 || rows <= kRowBlock) return false;
  if (search_state.precision != kAuto) return search_state.precision == kCertified;
  return pays_to_certify(rows, codes, channels);
}

// Lays out the workspace of a search for `rows` rows (in one call, all scales together) and returns its bytes.
template <class T>
static int64_t layout(int64_t rows, int64_t codes, int64_t channels, bool certified, int threads, char* workspace,
                      T** panels, Index<T>* index, float** spare) {
  Carve carve = {workspace, 0};
  const int64_t stride = kPanel * (channels + 1);
  *panels = nullptr;
  if (rows > kRowBlock) *panels = carve.take<T>(panels_of(codes) * stride);
  index->scratch_bytes = rows > kRowBlock ? 0 : aligned(2 * stride * sizeof(T));
#ifdef TOKENFLOW_INT8
  if (certified) {
    Codes8 c = layout8(codes, channels);
    c.quantized = carve.take<Sum>(c.segments() * c.length * c.words);
    c.offsets = carve.take<Sum>(c.segments() * c.length * c.chunks);
    c.starts = carve.take<Start>(c.segments() * c.length);
    c.norms = carve.take<float>(c.segments());
    c.gaps = carve.take<float>(c.segments());
    *spare = carve.take<float>(3 * panels_of(codes) * kPanel);
    index->codes8 = c;
    index->scratch_bytes = aligned(kRowBlock * (c.segments() * static_cast<int64_t>(sizeof(Sum)) + c.words * 4));
  }
#endif
  index->scratch = carve.take<char>(threads * index->scratch_bytes);
  return carve.used + 64;
}

template <class T>
int64_t bytes_of_search(int64_t rows, int64_t codes, int64_t channels, int threads) {
  Index<T> index;
  T* panels;
  float* spare;
  return layout(rows, codes, channels, certify<T>(rows, codes, channels), threads, nullptr, &panels, &index, &spare);
}

template <class T>
Index<T> make_index(const T* codebook, int64_t codes, int64_t channels, const Tables& tables, int64_t rows,
                           const View& workspace, int threads) {
  Index<T> index = {};
  T* panels;
  float* spare = nullptr;
  char* memory = static_cast<char*>(workspace.data);
  memory += aligned(reinterpret_cast<uintptr_t>(memory)) - reinterpret_cast<uintptr_t>(memory);
  // The precision may have been changed since the bytes were counted: what fits decides.
  index.certify = certify<T>(rows, codes, channels) &&
                  layout(rows, codes, channels, true, threads, nullptr, &panels, &index, &spare) <= workspace.shape[0];
  layout(rows, codes, channels, index.certify, threads, memory, &panels, &index, &spare);
  index.codebook = codebook;
  index.packed = {panels, codes, channels};
  index.tables = &tables;
  if (!panels) return index;
  pack(codebook, codes, channels, tables, panels, threads);
#ifdef TOKENFLOW_INT8
  if constexpr (sizeof(T) == 4) {
    if (!index.certify) return index;
    pack8(index.packed, spare, &index.codes8, threads);
    index.certify = index.codes8.usable;
    index.bound = {channels, tables.l2, tables.l2, 0};
    for (int t = 0; t < tables.count; ++t) {
      index.bound.clip &= tables.weight[t] == 1;
      if (tables.weight[t] > index.bound.max_weight) index.bound.max_weight = tables.weight[t];
    }
  }
#endif
  return index;
}

// Panels [first, first + count) to read, from all of them or packed on the fly into `scratch`; ids count from first
// * kPanel.
template <class T>
static Packed<T> panels_at(const Index<T>& index, int64_t first, int64_t count, T* scratch) {
  const int64_t channels = index.packed.channels, at = first * kPanel, rest = index.packed.codes - at;
  const int64_t codes = rest < count * kPanel ? rest : count * kPanel;
  if (index.packed.panels) return {index.packed.panels + first * index.packed.stride(), codes, channels};
  const Packed<T> packed = {scratch, codes, channels};
  for (int64_t p = 0; p * kPanel < codes; ++p)
    pack_panel(index.codebook + (at + p * kPanel) * channels, codes - p * kPanel < kPanel ? codes - p * kPanel : kPanel,
               channels, *index.tables, scratch + p * packed.stride());
  return packed;
}

template <class T>
static void merge(const Best<T>* from, int64_t rows, Best<T>* best) {
#pragma omp critical(tokenflow_search_merge)
  for (int64_t r = 0; r < rows; ++r)
    if (from[r].id >= 0 && (best[r].id < 0 || better(from[r], best[r]))) best[r] = from[r];
}

// Two panels packed, scored for all rows, forgotten; a thread has a range of them.
template <class T>
static void search_unpacked(const Index<T>& index, const T* staged, int64_t rows, Best<T>* best, int threads) {
  const int64_t channels = index.packed.channels, codes = index.packed.codes, pairs = (panels_of(codes) + 1) / 2;
  const int parts = codes * channels > 16384 ? threads : 1;
  for_each(parts, parts, [&](int64_t part) {
    Best<T> mine[kRowBlock];
    for (int64_t r = 0; r < rows; ++r) mine[r] = {static_cast<T>(__builtin_inf()), -1};
    T* scratch = reinterpret_cast<T*>(index.scratch + part * index.scratch_bytes);
    for (int64_t i = part * pairs / parts; i < (part + 1) * pairs / parts; ++i) {
      const Packed<T> two = panels_at(index, 2 * i, 2, scratch);
      for (int64_t r = 0; r < rows; ++r)
        best_in_panels(staged + r * channels, two, 0, panels_of(two.codes), 2 * i * kPanel, mine + r);
    }
    merge(mine, rows, best);
  });
}

template <class T>
static void search_packed(const Index<T>& index, const T* staged, int64_t rows, Best<T>* best, int threads) {
  const Packed<T>& packed = index.packed;
  const int64_t panels = panels_of(packed.codes), segment = segment_panels(panels);
  const int64_t segments = (panels + segment - 1) / segment;
  const int parts = packed.codes * packed.channels * rows > 65536 ? threads : 1;
  for_each(parts, parts, [&](int64_t part) {
    const int64_t from = part * segments / parts * segment, to = (part + 1) * segments / parts * segment;
    Best<T> mine[kRowBlock];
    scan(staged, rows, packed, from, to < panels ? to : panels, mine);
    merge(mine, rows, best);
  });
}

#ifdef TOKENFLOW_INT8

// Rows [0, rows) in tiles; false in done[r] where the bound could not rule out enough.
static void search_certified(const Index<float>& index, const float* staged, int64_t rows, Best<float>* best,
                             bool* done, int threads) {
  const Codes8& codes = index.codes8;
  const int64_t channels = index.packed.channels, segments = codes.segments();
  char* scratch = index.scratch + (threads == 1 ? omp_get_thread_num() * index.scratch_bytes : 0);
  Sum* table = reinterpret_cast<Sum*>(scratch);
  int32_t* q = reinterpret_cast<int32_t*>(table + kRowBlock * segments);
  Row8 row[kRowBlock];
  for (int64_t first = 0; first < rows; first += kTile8) {
    // The starting scores are sums of one unit a tile.
    const int64_t end = first + kTile8 < rows ? first + kTile8 : rows;
    float scale[kTile8], of_tile = 0;
    for (int64_t r = first; r < end; ++r) {
      scale[r - first] = scale8(staged + r * channels, channels, codes);
      of_tile = scale[r - first] > of_tile ? scale[r - first] : of_tile;
    }
    for (int64_t r = first; r < end; ++r)
      row[r] = quantize8(staged + r * channels, channels, index.bound.starts ? of_tile : scale[r - first], codes,
                         q + r * codes.words);
  }
  for (int64_t r = rows; r % kTile8; ++r) memset(q + r * codes.words, 0, codes.words * 4);
  int64_t chunk = kBlockBytes8 / (codes.length * codes.words * kRegisterBytes);
  chunk = chunk < 1 ? 1 : chunk;
  const int64_t chunks = (codes.blocks + chunk - 1) / chunk;
  const Scan8 scan = scan_of(codes, index.bound.starts);
  for_each(chunks, threads, [&](int64_t c) {
    const int64_t from = c * chunk, to = from + chunk < codes.blocks ? from + chunk : codes.blocks;
    for (int64_t r = 0; r < rows; r += kTile8)
      scan(q + r * codes.words, codes, from, to, start_factor(codes, row[r].unit), table + r * segments);
  });
  const int64_t limit = segments / 4 + 8;
  for_each(rows / 8 + 1, threads, [&](int64_t eighth) {
    int64_t scored = 0;
    for (int64_t r = 8 * eighth; r < rows && r < 8 * eighth + 8; ++r) {
      const float* z = staged + r * channels;
      done[r] = false;
      if (row[r].norm == 0 && !index.bound.starts) {  // every code scores zero
        best[r] = {__builtin_inff(), -1};
        best_in_panels(z, index.packed, 0, 1, 0, best + r);
        done[r] = true;
      } else if (row[r].usable) {
        const int64_t n = resolve8(z, row[r], table + r * segments, codes, index.packed, index.bound, limit, best + r);
        scored += n;
        done[r] = n > 0;
      }
    }
    count(&search_state.rescored, scored);
  });
}

#endif

// The first code whose score is a number; code 0 where none is.
template <class T>
static Best<T> first_number(const Index<T>& index, const T* staged) {
  for (int64_t p = 0; p < panels_of(index.packed.codes); ++p) {
    T scores[kPanel];
    const Packed<T> panel = panels_at(index, p, 1, reinterpret_cast<T*>(index.scratch));
    score_panels<1>(staged, panel, 0, scores);
    for (int64_t l = 0; l < kPanel && l < panel.codes; ++l)
      if (scores[l] == scores[l]) return {scores[l], p * kPanel + l};
  }
  return {static_cast<T>(__builtin_nan("")), 0};
}

template <class T>
void search(const Index<T>& index, const T* staged, int64_t rows, Best<T>* best, int threads) {
  for (int64_t r = 0; r < rows; ++r) best[r] = {static_cast<T>(__builtin_inf()), -1};
  bool done[kRowBlock] = {};
  int64_t certified = 0;
#ifdef TOKENFLOW_INT8
  if constexpr (sizeof(T) == 4) {
    if (index.certify && index.gave_up * 2 <= index.tried + 2 * kRowBlock) {
      search_certified(index, staged, rows, best, done, threads);
      for (int64_t r = 0; r < rows; ++r) certified += done[r];
      count(&index.tried, rows);
      count(&index.gave_up, rows - certified);
      count(&search_state.int8_rows, certified);
      count(&search_state.fallback_rows, rows - certified);
    }
  }
#endif
  if (certified < rows) count(&search_state.float_rows, rows - certified);
  for (int64_t r = 0, end; r < rows; r = end + 1) {  // runs of rows that have no answer yet
    for (end = r; end < rows && !done[end];) ++end;
    if (end == r) continue;
    const auto rest = index.packed.panels ? search_packed<T> : search_unpacked<T>;
    rest(index, staged + r * index.packed.channels, end - r, best + r, threads);
  }
  for (int64_t r = 0; r < rows; ++r)
    if (best[r].id < 0) best[r] = first_number(index, staged + r * index.packed.channels);
}

template int64_t bytes_of_search<float>(int64_t, int64_t, int64_t, int);
template int64_t bytes_of_search<double>(int64_t, int64_t, int64_t, int);
template Index<float> make_index(const float*, int64_t, int64_t, const Tables&, int64_t, const View&, int);
template Index<double> make_index(const double*, int64_t, int64_t, const Tables&, int64_t, const View&, int);
template void search(const Index<float>&, const float*, int64_t, Best<float>*, int);
template void search(const Index<double>&, const double*, int64_t, Best<double>*, int);

TOKENFLOW_END
