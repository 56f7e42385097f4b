// What one scale adds to the map, row by row: step_s = phi_s(Up q_s), and its transpose with phi's own gradients.
// With phi, Up goes into a padded map, of which three rows make one row of the step. phi's transpose is phi with the
// kernel turned around and no bias. Per number of the map: 4 products of Up's last pass, 9 C of phi.
#pragma once
#include "cpu/multiscale.h"

TOKENFLOW_BEGIN

// phi(u) = (1 - ratio) u + ratio (conv(u) + bias) on a padded map u, as phi_s or its transpose.
template <class T>
struct Refinement {
  const Loop<T>& loop;
  const T *kernel, *bias;  // [9, C, D]; [D] or null

  // Row y, out [W, C], of a padded map.
  void row(const T* map, int64_t y, T* out) const {
    conv3x3_row(map, loop.size, loop.channels, y, kernel, bias, out);
    const T keep = 1 - loop.ratio;
    const T* u = inner(map, y);
    for (int64_t i = 0; i < loop.width(); ++i) out[i] = keep * u[i] + loop.ratio * out[i];
  }
  // Row y of a padded map without the padding.
  template <class P>
  P* inner(P* map, int64_t y) const {
    return map + (y * (loop.size.w + 2) + 1) * loop.channels;
  }
  void clear_padding(T* map, int64_t first, int64_t last) const {
    for (int64_t y = first; y < last; ++y) {
      memset(inner(map, y) - loop.channels, 0, loop.channels * sizeof(T));
      memset(inner(map, y) + loop.width(), 0, loop.channels * sizeof(T));
    }
  }
};

template <class T>
static Refinement<T> refinement(const Loop<T>& loop, int64_t s) {
  const int64_t p = loop.phi_row(s);
  return {loop, loop.kernels + p * loop.kernel(), loop.start + p * padded(loop.channels)};
}

// The step of scale s for map rows [first, last): `begin` once, then `row` by row. Two pieces of scratch.
template <class T>
struct Step {
  const Loop<T>& loop;
  int64_t s;
  T *across, *up;  // [h, W, C]; padded [H, W + 2, C]

  Step(const Loop<T>& loop, int64_t s, T* spare) : loop(loop), s(s), across(spare + piece(loop)), up(spare) {}

  // codes [h w, C]; with phi, rows at both ends need their neighbours.
  void begin(const T* codes, int64_t first, int64_t last) const {
    if (loop.weight && first > 0) --first;
    if (loop.weight && last < loop.size.h) ++last;
    const Axes<T> bicubic = loop.bicubic(s);
    widen(bicubic, codes, loop.channels, first, last, across);
    if (!loop.weight) return;
    const Refinement<T> phi = refinement(loop, s);
    phi.clear_padding(up, first, last);
    for (int64_t y = first; y < last; ++y) blend(bicubic.rows[y], across, loop.width(), loop.width(), phi.inner(up, y));
  }
  // Row y of the step, out [W, C].
  void row(int64_t y, T* out) const {
    if (loop.weight)
      refinement(loop, s).row(up, y, out);
    else
      blend(loop.bicubic(s).rows[y], across, loop.width(), loop.width(), out);
  }
};

// grad_codes [h w, C] from grad_step [H W, C], and phi's share onto grad_phi, [P, 9, out, in] and [P, C]. Codes
// that are not numbers are left out. Three pieces of scratch.
template <class T>
static void step_transposed(const Loop<T>& loop, int64_t s, const T* codes, const T* grad_step, T* grad_codes,
                            T* grad_phi, T* spare) {
  T* grad_up = spare + 2 * piece(loop);
  T* across = spare + piece(loop);
  if (!loop.weight) {
    up_transposed(loop.bicubic(s), grad_step, loop.channels, grad_codes, across);
    return;
  }
  const int64_t p = loop.phi_row(s), channels = loop.channels, width = loop.width();
  const Step<T> step(loop, s, spare);
  step.begin(codes, 0, loop.size.h);
  T* map = step.up;
  for (int64_t i = 0; i < loop.size.h * (loop.size.w + 2) * channels; ++i) map[i] = map[i] == map[i] ? map[i] : 0;
  for (int64_t tap = 0; tap < 9; ++tap)
    conv3x3_grad_tap(map, grad_step, loop.size, channels, tap, loop.ratio, grad_phi + p * 9 * channels * channels);
  T* grad_bias = grad_phi + loop.phi_rows * 9 * channels * channels + p * channels;
  for (int64_t i = 0; i < loop.map(); i += channels)
    for (int64_t d = 0; d < channels; ++d) grad_bias[d] += loop.ratio * grad_step[i + d];
  const Refinement<T> turned = {loop, loop.turned + p * loop.kernel(), nullptr};
  for (int64_t y = 0; y < loop.size.h; ++y) memcpy(turned.inner(map, y), grad_step + y * width, width * sizeof(T));
  for (int64_t y = 0; y < loop.size.h; ++y) turned.row(map, y, grad_up + y * width);
  up_transposed(loop.bicubic(s), grad_up, channels, grad_codes, across);
}

TOKENFLOW_END
