// nearest_code: indices[n, g, j] = id of the j-th best canonical score of row x[n, g] over codes [lo, hi) of group g.
// Bytes moved per row: C of x, 8 topk of indices; the packed codebook comes from cache.
#include "common/ops.h"
#include "cpu/search.h"

TOKENFLOW_BEGIN

// Best `topk` of all packed codes for one staged row, best first, ties by lowest id; ids without a number score last.
template <class T>
static void search_topk(const T* staged, const Packed<T>& packed, int64_t topk, T* scores, int64_t* ids) {
  constexpr int64_t kAtOnce = 32;  // codes
  int64_t found = 0;
  for (int pass = 0; pass < 2 && found < topk; ++pass) {  // second pass: codes with NaN, where nothing else is left
    for (int64_t first = 0; first < packed.codes; first += kAtOnce) {
      T scored[kAtOnce];
      score_panels<kAtOnce / kPanel>(staged, packed, first / kPanel, scored);
      for (int64_t l = 0; l < kAtOnce && first + l < packed.codes; ++l) {
        const T score = scored[l];
        if ((score == score) != (pass == 0) || (found == topk && !(score < scores[topk - 1]))) continue;
        int64_t j = found < topk ? found++ : topk - 1;
        for (; j > 0 && score < scores[j - 1]; --j) scores[j] = scores[j - 1], ids[j] = ids[j - 1];
        scores[j] = score;
        ids[j] = first + l;
      }
    }
  }
}

// More than one best code needs all panels, however few the rows.
static int64_t rows_to_pack(int64_t rows, int64_t topk) { return topk > 1 && rows <= kRowBlock ? kRowBlock + 1 : rows; }

template <class T>
static void run(Call& call, const View& x, const View& codebook, const Tables& tables, int64_t topk, int64_t lo,
                int64_t hi, const View& indices, const View& scores) {
  const int64_t rows = x.shape[0], groups = x.shape[1], channels = x.shape[2], codes = codebook.shape[1];
  const int64_t to_pack = rows_to_pack(rows, topk);
  T* stage_rows = take<T>(call, rows * channels);
  const View workspace = take_rest(call, bytes_of_search<T>(to_pack, hi - lo, channels, call.threads));
  if (call.counting) return;
  T* score_out = static_cast<T*>(scores.data);
  int64_t* ids = static_cast<int64_t*>(indices.data);
  for (int64_t g = 0; g < groups; ++g) {
    const Index<T> index = make_index(static_cast<const T*>(codebook.data) + (g * codes + lo) * channels, hi - lo,
                                      channels, tables, to_pack, workspace, call.threads);
    for_row_blocks(index, rows, call.threads, topk == 1, [&](int64_t first, int64_t count, int inside) {
      bool good[kRowBlock];
      Best<T> best[kRowBlock];
      T* block = stage_rows + first * channels;
      for (int64_t r = 0; r < count; ++r) {
        load(x, ((first + r) * groups + g) * channels, channels, block + r * channels);
        good[r] = stage<T>(tables, block + r * channels, block + r * channels);
        if (!good[r]) tokenflow_ext::count(&call.rows_not_finite, 1);
      }
      if (topk == 1) search(index, block, count, best, inside);
      for (int64_t r = 0; r < count; ++r) {
        const int64_t out = ((first + r) * groups + g) * topk;
        T kept[64];
        T* row_scores = score_out ? score_out + out : topk <= 64 ? kept : nullptr;
        if (!good[r]) {
          for (int64_t j = 0; j < topk; ++j) ids[out + j] = lo + j;
          for (int64_t j = 0; score_out && j < topk; ++j) score_out[out + j] = __builtin_nan("");
        } else if (topk == 1) {
          ids[out] = lo + best[r].id;
          if (score_out) score_out[out] = best[r].score;
        } else {
          search_topk(block + r * channels, index.packed, topk, row_scores, ids + out);
          for (int64_t j = 0; j < topk; ++j) ids[out + j] += lo;
        }
      }
    });
  }
}

Error nearest_code(Call& call, View x, View codebook, Tables tables, int64_t topk, int64_t lo, int64_t hi, View indices,
                   View scores) noexcept {
  x = by_group(x, codebook.rank == 3, 1);
  codebook = with_groups(codebook);
  if (!dense(x, 3) || !dense(codebook, 3) || !floating(x))
    return "nearest_code: wanted contiguous floats x [..., G, C] and codebook [G, K, C]";
  if (x.shape[2] != codebook.shape[2] || x.shape[1] != codebook.shape[0] || !covers(tables, x.shape[2]))
    return "nearest_code: codebook: wanted the groups and the width of x";
  if (lo < 0 || hi > codebook.shape[1] || topk < 1 || hi - lo < topk) return "nearest_code: window: wanted topk codes";
  if (!holds(indices, kInt64, x.shape[0] * x.shape[1] * topk) ||
      (scores.type != kNone && !holds(scores, codebook.type, x.shape[0] * x.shape[1] * topk)))
    return "nearest_code: wanted outputs that fit the rows";
  if (scores.type == kNone && topk > 64) return "nearest_code: topk: wanted a scores tensor above 64";
  if (codebook.type == kFloat64)
    run<double>(call, x, codebook, tables, topk, lo, hi, indices, scores);
  else if (codebook.type == kFloat32)
    run<float>(call, x, codebook, tables, topk, lo, hi, indices, scores);
  else
    return "nearest_code: codebook: wanted float32 or float64";
  return nullptr;
}

TOKENFLOW_END
