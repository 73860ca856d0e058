// Included by the per-ISA translation units only, like vec.h. A row's arithmetic depends on its length and type alone.
#pragma once

#include "producer_rows.h"
#include "vec_math.h"

namespace mtk::cpu::MTK_ISA {

template <class T>
MTK_INLINE vf load_some(const T* p, int n) {
  return n == kWidth ? vload(p) : vload(p, n);
}

template <class T>
MTK_INLINE void store_some(T* p, vf v, int n) {
  n == kWidth ? vstore(p, v) : vstore(p, v, n);
}

// f(column, count) over a row of n, whole vectors first.
template <class F>
MTK_INLINE void for_vectors(int64_t n, const F& f) {
  int64_t k = 0;
  for (; k + kWidth <= n; k += kWidth) f(k, kWidth);
  if (k < n) f(k, static_cast<int>(n - k));
}

// Four sums hide the latency of the adds; the tail joins the first.
template <class F>
MTK_INLINE float sum_vectors(int64_t n, const F& term) {
  vf sum[4] = {vzero(), vzero(), vzero(), vzero()};
  int64_t k = 0;
  for (; k + 4 * kWidth <= n; k += 4 * kWidth)
    for (int u = 0; u < 4; ++u) sum[u] = vadd(sum[u], term(k + u * kWidth, kWidth));
  for_vectors(n - k, [&](int64_t c, int count) { sum[0] = vadd(sum[0], term(k + c, count)); });
  return reduce_sum(vadd(vadd(sum[0], sum[1]), vadd(sum[2], sum[3])));
}

template <class T, bool kRoundFirst>
MTK_INLINE vf xhat(const T* x, float rstd, int count) {
  const vf v = vmul(load_some(x, count), vset(rstd));
  if constexpr (kRoundFirst) return vround(x, v);
  return v;
}

template <class T, bool kRoundFirst>
MTK_INLINE void normalize_as(const T* x, const float* w, int64_t n, float rstd, T* xn) {
  for_vectors(n, [&](int64_t k, int count) { store_some(xn + k, vmul(load_some(w + k, count), xhat<T, kRoundFirst>(x + k, rstd, count)), count); });
}

template <class T>
static void normalize_row(const void* row, const float* w, int64_t n, float rstd, bool round_first, void* out) {
  const T* x = static_cast<const T*>(row);
  T* xn = static_cast<T*>(out);
  round_first ? normalize_as<T, true>(x, w, n, rstd, xn) : normalize_as<T, false>(x, w, n, rstd, xn);
}

template <class T>
static float rmsnorm_row(const void* row, const float* w, int64_t n, float eps, bool round_first, void* out) {
  const T* x = static_cast<const T*>(row);
  const float square = sum_vectors(n, [&](int64_t k, int count) {
    const vf v = load_some(x + k, count);
    return vmul(v, v);
  });
  const float rstd = 1.f / __builtin_sqrtf(square / static_cast<float>(n) + eps);
  normalize_row<T>(row, w, n, rstd, round_first, out);
  return rstd;
}

template <class T, bool kRoundFirst>
MTK_INLINE void add_dgamma(const T* x, int64_t n, float rstd, const T* dxn, float* dgamma) {
  for_vectors(n, [&](int64_t k, int count) {
    store_some(dgamma + k, vfma(load_some(dxn + k, count), xhat<T, kRoundFirst>(x + k, rstd, count), load_some(dgamma + k, count)), count);
  });
}

template <class T>
static void rmsnorm_bwd_row(const void* row, const float* w, int64_t n, float rstd, bool round_first, bool keep, void* gradient, float* dgamma) {
  const T* x = static_cast<const T*>(row);
  T* d = static_cast<T*>(gradient);
  if (dgamma) round_first ? add_dgamma<T, true>(x, n, rstd, d, dgamma) : add_dgamma<T, false>(x, n, rstd, d, dgamma);
  if (keep) return;
  const float dot = sum_vectors(n, [&](int64_t k, int count) {
    return vmul(vmul(load_some(w + k, count), load_some(d + k, count)), load_some(x + k, count));
  });
  const vf r = vset(rstd), mean = vset(-(dot * rstd) / static_cast<float>(n));
  for_vectors(n, [&](int64_t k, int count) {
    const vf direct = vmul(load_some(w + k, count), load_some(d + k, count));
    store_some(d + k, vmul(r, vfma(vmul(load_some(x + k, count), r), mean, direct)), count);
  });
}

// act(z) = z p with p = sigmoid(q(z)): q = z is SiLU, q = 2 sqrt(2 / pi) (z + 0.044715 z^3) the tanh form of GELU.
struct Gate {
  vf p, slope;  // slope = act'(z) = p + z p (1 - p) q'(z)
};

template <bool kTanhGelu>
MTK_INLINE Gate gate_of(vf z) {
  constexpr float c = 1.5957691216057308f;
  const vf square = vmul(z, z);
  const vf q = kTanhGelu ? vmul(vmul(z, vset(c)), vfma(square, vset(0.044715f), vset(1.f))) : z;
  const vf p = vset(1.f) / vadd(vset(1.f), vexp(-q));
  const vf dq = kTanhGelu ? vfma(square, vset(c * 0.134145f), vset(c)) : vset(1.f);
  return {p, vfma(vmul(vmul(z, p), vset(1.f) - p), dq, p)};
}

template <class T, bool kTanhGelu>
MTK_INLINE void gate_as(const T* gate, const T* up, int64_t n, T* h) {
  for_vectors(n, [&](int64_t k, int count) {
    const vf z = load_some(gate + k, count);
    store_some(h + k, vmul(vround(gate, vmul(z, gate_of<kTanhGelu>(z).p)), load_some(up + k, count)), count);
  });
}

template <class T>
static void gate_row(const void* gate, const void* up, int64_t n, bool tanh_gelu, void* h) {
  const T *g = static_cast<const T*>(gate), *u = static_cast<const T*>(up);
  tanh_gelu ? gate_as<T, true>(g, u, n, static_cast<T*>(h)) : gate_as<T, false>(g, u, n, static_cast<T*>(h));
}

template <class T, bool kTanhGelu>
MTK_INLINE void gate_bwd_as(const T* gate, const T* up, int64_t n, T* dh, T* dup) {
  for_vectors(n, [&](int64_t k, int count) {
    const vf z = load_some(gate + k, count), d = load_some(dh + k, count);
    const Gate g = gate_of<kTanhGelu>(z);
    store_some(dup + k, vmul(d, vround(gate, vmul(z, g.p))), count);
    store_some(dh + k, vmul(vmul(d, load_some(up + k, count)), g.slope), count);
  });
}

template <class T>
static void gate_bwd_row(const void* gate, const void* up, int64_t n, bool tanh_gelu, void* dh, void* dup) {
  const T *g = static_cast<const T*>(gate), *u = static_cast<const T*>(up);
  T *dgate = static_cast<T*>(dh), *to = static_cast<T*>(dup);
  tanh_gelu ? gate_bwd_as<T, true>(g, u, n, dgate, to) : gate_bwd_as<T, false>(g, u, n, dgate, to);
}

template <class T>
constexpr ProducerRows producer = {rmsnorm_row<T>, normalize_row<T>, rmsnorm_bwd_row<T>, gate_row<T>, gate_bwd_row<T>};

}  // namespace mtk::cpu::MTK_ISA
