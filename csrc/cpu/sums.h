// Sums over the rows of every code, without one-hot and without atomics, the same bits for every thread count:
//   sum[g, k] = sum over the rows n with indices[n, g] = k of rows[n, g], in row order, accumulated in double.
// A code adds its rows in row order whatever the way and however many threads there are. Two ways:
//   near  the sums of all codes lie in the last-level cache. Threads share the codes; each reads all ids in order and
//         adds the rows of its own codes, so that rows stream and the sums are what is met at random. No two threads
//         meet, not even at a barrier. Moved: ids and rows once, 16 bytes a number of the table.
//   far   larger tables, or few rows. 2^shift neighbouring codes make a bucket, whose sums stay in a core's
//   second-level
//         cache. A stable counting sort brings the rows of a bucket together; each bucket adds its rows and writes each
//         of its codes once. Moved: ids twice, 8 bytes a row written and read for the members, the rows once, or a
//         cache line of them where they are shorter; what `finish` writes.
// Who owns what: members, starts and sums are scratch of the call.
#pragma once
#include <omp.h>

#include "cpu/rows.h"
#include "cpu/simd.h"

TOKENFLOW_BEGIN

struct SumSpace {
  bool near;
  int64_t* members;  // far: [G, N]: n << shift | id inside the bucket, by bucket, in row order
  int64_t* starts;   // far: [G, J, buckets]: where part j of the rows puts its next member of a bucket; J threads
  double* sums;      // near: [G, K, C]; far: [J, 2^shift, C + 1], 2^shift sums [C], then 2^shift notes, one int64 each
  int64_t* notes;    // near: [G, K]
  int64_t threads, shift, buckets, stride;
};

constexpr int64_t kBucketNumbers = 1 << 15;  // sums of one bucket, in double: a quarter of a core's second-level cache
constexpr int64_t kAloneNumbers = 1 << 15;   // below these of rows and codes a second thread costs more than it brings

constexpr int64_t kNearNumbers =
    1 << 20;  // sums of all codes, in double: what a last-level cache holds beside the rows

// Scratch for ids [N, G] into K codes. A bucket is as many codes as the cache holds, fewer where that leaves threads
// without work.
static inline SumSpace take_sums(Call& call, int64_t rows, int64_t groups, int64_t codes, int64_t channels) {
  SumSpace s = {};
  s.threads = groups * (rows + codes) * channels > kAloneNumbers ? call.threads : 1;
  s.near = groups * codes * channels <= kNearNumbers && rows > codes / 4;
  if (s.near) {
    s.sums = take<double>(call, groups * codes * channels);
    s.notes = take<int64_t>(call, groups * codes);
    return s;
  }
  const int64_t share = s.threads == 1 ? codes : (groups * codes + 2 * s.threads - 1) / (2 * s.threads);
  while (int64_t{1} << s.shift < share && (int64_t{2} << s.shift) * channels <= kBucketNumbers) ++s.shift;
  s.buckets = (codes + (int64_t{1} << s.shift) - 1) >> s.shift;
  s.stride = (channels + 1) << s.shift;
  s.members = take<int64_t>(call, s.buckets > 1 ? groups * rows : 0);
  s.starts = take<int64_t>(call, s.buckets > 1 ? groups * s.threads * s.buckets : 0);
  s.sums = take<double>(call, s.threads * s.stride);
  return s;
}

typedef Register<double>::V Wide;
typedef float Narrow __attribute__((vector_size(kRegisterBytes / 2)));  // as many lanes

static inline Wide to_doubles(const double* x) { return load_register(x); }
static inline Wide to_doubles(const float* x) {
  Narrow v;
  memcpy(&v, x, sizeof(v));
#if defined(__AVX512F__)
  return (Wide)_mm512_maskz_cvtps_pd(0xff, (__m256)v);  // the compiler converts halves and joins them
#else
  return __builtin_convertvector(v, Wide);
#endif
}

// sum [n] += row [n].
template <class T>
static inline void add_row(const T* row, int64_t n, double* sum) {
  int64_t d = 0;
  for (constexpr int kLanes = Register<double>::kLanes; d + kLanes <= n; d += kLanes) {
    const Wide wide = load_register(sum + d) + to_doubles(row + d);
    memcpy(sum + d, &wide, sizeof(wide));
  }
  for (; d < n; ++d) sum[d] += row[d];
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

constexpr int64_t kSpan = 64;  // channels that are converted at a time

// What adds rows [N, G, C] of any float, read as T. Rows are added unchecked; only where a sum is not finite, and rows
// that are not are left out, all starts again, `careful`, and looks at each row.
template <class T>
struct Adder {
  const View& rows;
  int64_t channels;
  bool finite_only, careful;
  const T* direct;  // the rows, where they need no conversion
  int64_t bad;      // rows left out

  Adder(const View& rows, bool finite_only)
      : rows(rows),
        channels(rows.shape[2]),
        finite_only(finite_only),
        careful(false),
        direct(rows.type == type_of<T>() ? static_cast<const T*>(rows.data) : nullptr),
        bad(0) {}

  void ask_for(int64_t i) const {
    if (direct) fetch(direct + i * channels, channels);
  }
  // sum [C] += row i of [N G, C]; false where it is left out.
  __attribute__((always_inline)) bool add(int64_t i, double* sum) {
    T span[kSpan];
    if (careful) {
      bool good = true;
      for (int64_t c = 0; c < channels; c += kSpan) {
        const int64_t width = channels - c < kSpan ? channels - c : kSpan;
        load(rows, i * channels + c, width, span);
        good &= all_finite(span, width);
      }
      bad += !good;
      if (!good) return false;
    }
    if (direct) {
      add_row(direct + i * channels, channels, sum);
    } else {
      for (int64_t c = 0; c < channels; c += kSpan) {
        const int64_t width = channels - c < kSpan ? channels - c : kSpan;
        load(rows, i * channels + c, width, span);
        add_row(span, width, sum + c);
      }
    }
    return true;
  }
  // Whether all has to start again; clean() tells whether the sums are finite.
  template <class Clean>
  bool again(Clean clean) {
    if (!finite_only || careful || clean()) return false;
    return careful = true;
  }
};

constexpr int64_t kListed = 256;       // ids that are looked through at a time
constexpr int64_t kSumsAhead = 8;      // rows whose sums are on their way
constexpr int64_t kPieceBytes = 8192;  // of rows that are asked for together

// Codes [first, last) of [G K] by one thread of `threads`. The threads ask for the next rows in turns: all read them.
template <class T, class Note, class Finish>
static Left sum_near(const int64_t* ids, const View& rows, int64_t codes, bool finite_only, const SumSpace& space,
                     int64_t thread, Note note, Finish finish) {
  const int64_t groups = rows.shape[1], channels = rows.shape[2], all = rows.shape[0] * groups;
  const int64_t first = groups * codes * thread / space.threads, last = groups * codes * (thread + 1) / space.threads;
  const uint64_t count = static_cast<uint64_t>(last - first);
  int64_t listed = kPieceBytes / (channels * static_cast<int64_t>(sizeof(T)));
  listed = listed < 16 ? 16 : listed < kListed ? listed : kListed;
  int64_t row[kListed], key[kListed], outside;
  Adder<T> adder(rows, finite_only);
  do {
    memset(space.sums + first * channels, 0, (last - first) * channels * sizeof(double));
    memset(space.notes + first, 0, (last - first) * sizeof(int64_t));
    outside = 0;
    int64_t g = 0;
    for (int64_t from = 0; from < all; from += listed) {
      const int64_t to = from + listed < all ? from + listed : all;
      int64_t n = 0;
      for (int64_t i = from; i < to; ++i) {
        const bool in = inside(ids[i], codes);
        row[n] = i;
        key[n] = g * codes + (in ? ids[i] : 0);
        outside += !in;
        n += in & (static_cast<uint64_t>(key[n] - first) < count);
        if (++g == groups) g = 0;
      }
      const int64_t next = to + listed * thread / space.threads, end = to + listed * (thread + 1) / space.threads;
      for (int64_t i = next; i < end && i < all; ++i) adder.ask_for(i);
      for (int64_t j = 0; j < n; ++j) {
        if (j + kSumsAhead < n) fetch(space.sums + key[j + kSumsAhead] * channels, channels);
        if (adder.add(row[j], space.sums + key[j] * channels)) note(space.notes[key[j]], row[j] / groups);
      }
    }
  } while (adder.again([&] { return all_finite(space.sums + first * channels, (last - first) * channels); }));
  for (int64_t k = first, end; k < last; k = end) {
    const int64_t of = k / codes;
    end = (of + 1) * codes < last ? (of + 1) * codes : last;
    finish(of, k - of * codes, end - k, space.sums + k * channels, space.notes + k);
  }
  return {thread == 0 ? outside : 0, adder.bad};
}

// For all codes, some at a time: finish(g, k, codes, sums [codes, C], notes [codes]) with the first code k. A note is
// an int64 that starts at 0 and that note(slot, n) sees with each row n of its code. Where few codes of a bucket have
// rows, blank(g, k, codes) writes zeros and finish sees the others one by one, perhaps more than once. ids [N, G]; rows
// [N, G, C] any float, T is what they are read as. finite_only leaves out rows with NaN or inf.
template <class T, class Note, class Finish, class Blank>
static Left sum_by_code(const int64_t* ids, const View& rows, int64_t codes, bool finite_only, const SumSpace& space,
                        Note note, Finish finish, Blank blank) {
  const int64_t count = rows.shape[0], groups = rows.shape[1], channels = rows.shape[2];
  const int64_t shift = space.shift, size = int64_t{1} << shift, mask = size - 1;
  const int64_t ahead = 1 + kAheadBytes / (channels * static_cast<int64_t>(sizeof(T)));
  int64_t outside = 0, bad = 0;
  if (space.near) {
#pragma omp parallel for num_threads(space.threads) schedule(static) reduction(+ : outside, bad) if (space.threads > 1)
    for (int64_t j = 0; j < space.threads; ++j) {
      const Left left = sum_near<T>(ids, rows, codes, finite_only, space, j, note, finish);
      outside += left.outside;
      bad += left.bad;
    }
    return {outside, bad};
  }
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
      Adder<T> adder(rows, finite_only);
      // visit(n, k): every row n of the bucket and the place k of its code, in row order.
      int64_t missed = 0;
      const auto each = [&](auto visit) __attribute__((always_inline)) {
        if (space.buckets > 1) {
          for (int64_t j = from; j < to; ++j) {
            if (j + ahead < to) adder.ask_for((members[j + ahead] >> shift) * groups + g);
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
      do {
        if (sparse) {
          each([&](int64_t, int64_t k) {
            memset(sums + k * channels, 0, channels * sizeof(double));
            notes[k] = 0;
          });
        } else {
          memset(sums, 0, used * channels * sizeof(double));
          memset(notes, 0, used * sizeof(int64_t));
        }
        each([&](int64_t n, int64_t k) __attribute__((always_inline)) {
          if (adder.add(n * groups + g, sums + k * channels)) note(notes[k], n);
        });
      } while (adder.again([&] {
        bool clean = sparse || all_finite(sums, used * channels);
        if (sparse) each([&](int64_t, int64_t k) { clean &= all_finite(sums + k * channels, channels); });
        return clean;
      }));
      outside += missed;
      bad += adder.bad;
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
