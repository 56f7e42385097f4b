// Sums over the rows of every code, without one-hot and without atomics, the same bits for every thread count:
//   sum[g, k] = sum over the rows n with indices[n, g] = k of rows[n, g], in row order, accumulated in double.
// 2^shift neighbouring codes make a bucket, whose sums stay in a core's second-level cache. A stable counting sort
// brings the rows of a bucket together; then each bucket adds its rows, nearly in sequence, and writes each of its
// codes once. A code adds its rows in row order however many buckets and threads there are. Moved: ids twice, 8 bytes a
// row written and read for the members, the rows once, what `finish` writes; where one bucket holds the table nothing
// is sorted and the ids are read once. Who owns what: members, starts and sums are scratch of the call.
#pragma once
#include <omp.h>

#include "cpu/rows.h"

TOKENFLOW_BEGIN

struct SumSpace {
  int64_t* members;  // [G, N]: n << shift | id inside the bucket, by bucket, in row order
  int64_t* starts;   // [G, J, buckets]: where part j of the rows puts its next member of a bucket; J threads
  double* sums;      // [J, 2^shift, C + 1]: 2^shift sums [C], then 2^shift notes, one int64 each
  int64_t threads, shift, buckets, stride;
};

constexpr int64_t kBucketNumbers = 1 << 15;  // sums of one bucket, in double: a quarter of a core's second-level cache
constexpr int64_t kAloneNumbers = 1 << 15;   // below these of rows and codes a second thread costs more than it brings

// Scratch for ids [N, G] into K codes. A bucket is as many codes as the cache holds, fewer where that leaves threads
// without work.
static inline SumSpace take_sums(Call& call, int64_t rows, int64_t groups, int64_t codes, int64_t channels) {
  SumSpace s = {};
  s.threads = groups * (rows + codes) * channels > kAloneNumbers ? call.threads : 1;
  const int64_t share = s.threads == 1 ? codes : (groups * codes + 2 * s.threads - 1) / (2 * s.threads);
  while (int64_t{1} << s.shift < share && (int64_t{2} << s.shift) * channels <= kBucketNumbers) ++s.shift;
  s.buckets = (codes + (int64_t{1} << s.shift) - 1) >> s.shift;
  s.stride = (channels + 1) << s.shift;
  s.members = take<int64_t>(call, s.buckets > 1 ? groups * rows : 0);
  s.starts = take<int64_t>(call, s.buckets > 1 ? groups * s.threads * s.buckets : 0);
  s.sums = take<double>(call, s.threads * s.stride);
  return s;
}

// sum [n] += row [n]; a lane of *poison becomes NaN where a number is not finite.
template <class T>
static inline void add_row(const T* row, int64_t n, double* sum, Double8* poison) {
  int64_t d = 0;
  for (; d + 8 <= n; d += 8) {
    const Double8 wide = to_double(load_eight(row + d));
    store_eight(sum + d, load_eight(sum + d) + wide);
    *poison += wide * 0.0;
  }
  for (; d < n; ++d) sum[d] += row[d], (*poison)[0] += row[d] * 0.0;
}

static inline bool inside(int64_t id, int64_t codes) {
  return static_cast<uint64_t>(id) < static_cast<uint64_t>(codes);
}

// The members of every bucket, by all threads of the region that calls it. Returns how many ids of this thread's share
// were outside the table.
static inline int64_t sort_members(const int64_t* ids, int64_t rows, int64_t groups, int64_t codes, const SumSpace& s) {
  const int64_t shift = s.shift, buckets = s.buckets, threads = s.threads, mask = (int64_t{1} << shift) - 1;
  int64_t outside = 0;
#pragma omp for schedule(static)
  for (int64_t i = 0; i < groups * threads; ++i) {
    const int64_t g = i / threads, from = rows * (i % threads) / threads, to = rows * (i % threads + 1) / threads;
    int64_t* count = s.starts + i * buckets;
    memset(count, 0, buckets * sizeof(int64_t));
    for (int64_t n = from; n < to; ++n) {
      const int64_t id = ids[n * groups + g];
      if (inside(id, codes))
        ++count[id >> shift];
      else
        ++outside;
    }
  }
#pragma omp for schedule(static)
  for (int64_t g = 0; g < groups; ++g) {
    int64_t total = 0;
    for (int64_t b = 0; b < buckets; ++b)
      for (int64_t j = 0; j < threads; ++j) {
        int64_t* start = s.starts + (g * threads + j) * buckets + b;
        const int64_t count = *start;
        *start = total;
        total += count;
      }
  }
#pragma omp for schedule(static)
  for (int64_t i = 0; i < groups * threads; ++i) {
    const int64_t g = i / threads, from = rows * (i % threads) / threads, to = rows * (i % threads + 1) / threads;
    int64_t* next = s.starts + i * buckets;
    int64_t* members = s.members + g * rows;
    for (int64_t n = from; n < to; ++n) {
      const int64_t id = ids[n * groups + g];
      if (inside(id, codes)) members[next[id >> shift]++] = n << shift | (id & mask);
    }
  }
  return outside;
}

struct Left {
  int64_t outside, bad;  // ids outside the table; rows left out because they are not finite
};

constexpr int64_t kAheadBytes = 2048;  // of rows on their way to the cache: no prefetcher knows the order of members

// For every bucket: finish(g, k, codes, sums [codes, C], notes [codes]) with its first code k. A note is an int64 that
// starts at 0 and that note(slot, n) sees with each row n of its code. Where few codes of a bucket have rows, blank(g,
// k, codes) writes zeros and finish sees the others one by one, perhaps more than once. ids [N, G]; rows [N, G, C] any
// float, T is what they are read as. finite_only leaves out rows with NaN or inf.
template <class T, class Note, class Finish, class Blank>
static Left sum_by_code(const int64_t* ids, const View& rows, int64_t codes, bool finite_only, const SumSpace& space,
                        Note note, Finish finish, Blank blank) {
  constexpr int64_t kSpan = 64;  // channels that are converted at a time
  const int64_t count = rows.shape[0], groups = rows.shape[1], channels = rows.shape[2];
  const int64_t shift = space.shift, size = int64_t{1} << shift, mask = size - 1;
  const int64_t ahead = 1 + kAheadBytes / (channels * static_cast<int64_t>(sizeof(T)));
  const T* direct = rows.type == type_of<T>() ? static_cast<const T*>(rows.data) : nullptr;
  int64_t outside = 0, bad = 0;
#pragma omp parallel num_threads(space.threads) reduction(+ : outside, bad) if (space.threads > 1)
  {
    if (space.buckets > 1) outside += sort_members(ids, count, groups, codes, space);
    double* sums = space.sums + omp_get_thread_num() * space.stride;
    int64_t* notes = reinterpret_cast<int64_t*>(sums + size * channels);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < groups * space.buckets; ++i) {
      const int64_t g = i / space.buckets, b = i % space.buckets, first = b << shift;
      const int64_t used = codes - first < size ? codes - first : size;
      const int64_t* last = space.starts + ((g + 1) * space.threads - 1) * space.buckets;
      const int64_t from = b ? last[b - 1] : 0, to = space.buckets > 1 ? last[b] : count;
      const int64_t* members = space.members + g * count;
      const bool sparse = to - from < used / 4;
      // visit(n, k): every row n of the bucket and the place k of its code, in row order.
      int64_t missed = 0;
      const auto each = [&](auto visit) __attribute__((always_inline)) {
        if (space.buckets > 1) {
          for (int64_t j = from; j < to; ++j) {
            if (direct && j + ahead < to)
              fetch(direct + ((members[j + ahead] >> shift) * groups + g) * channels, channels);
            visit(members[j] >> shift, members[j] & mask);
          }
        } else {
          missed = 0;
          for (int64_t n = 0; n < count; ++n) {
            const int64_t id = ids[n * groups + g];
            if (inside(id, codes))
              visit(n, id);
            else
              ++missed;
          }
        }
      };
      // Rows are added unchecked; only a bucket that met a number that is not finite starts again and looks at each
      // row.
      for (bool careful = false;; careful = true) {
        if (sparse) {
          each([&](int64_t, int64_t k) {
            memset(sums + k * channels, 0, channels * sizeof(double));
            notes[k] = 0;
          });
        } else {
          memset(sums, 0, used * channels * sizeof(double));
          memset(notes, 0, used * sizeof(int64_t));
        }
        Double8 poison = {};
        const auto add = [&](int64_t n, int64_t k) __attribute__((always_inline)) {
          const int64_t at = (n * groups + g) * channels;
          T span[kSpan];
          if (careful) {
            bool good = true;
            for (int64_t c = 0; c < channels; c += kSpan) {
              const int64_t width = channels - c < kSpan ? channels - c : kSpan;
              load(rows, at + c, width, span);
              good &= all_finite(span, width);
            }
            bad += !good;
            if (!good) return;
          }
          if (direct) {
            add_row(direct + at, channels, sums + k * channels, &poison);
          } else {
            for (int64_t c = 0; c < channels; c += kSpan) {
              const int64_t width = channels - c < kSpan ? channels - c : kSpan;
              load(rows, at + c, width, span);
              add_row(span, width, sums + k * channels + c, &poison);
            }
          }
          note(notes[k], n);
        };
        each(add);
        bool clean = true;
        for (int l = 0; l < 8; ++l) clean &= poison[l] == 0;
        if (clean || !finite_only || careful) break;
      }
      outside += missed;
      if (sparse) {
        blank(g, first, used);
        each([&](int64_t, int64_t k) { finish(g, first + k, 1, sums + k * channels, notes + k); });
      } else {
        finish(g, first, used, sums, notes);
      }
    }
  }
  return {outside, bad};
}

// out[offset, offset + n) = sums [n], rounded to the type of out.
template <class T>
static inline void store_sums(const View& out, int64_t offset, int64_t n, const double* sums) {
  if (out.type != type_of<T>()) {
    for (int64_t d = 0; d < n; ++d) {
      const T x = static_cast<T>(sums[d]);
      store(out, offset + d, 1, &x);
    }
    return;
  }
  T* to = static_cast<T*>(out.data) + offset;
  for (int64_t d = 0; d < n; ++d) to[d] = static_cast<T>(sums[d]);
}

TOKENFLOW_END
