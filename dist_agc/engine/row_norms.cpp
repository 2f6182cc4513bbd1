// L2 norms of rows that lie one behind another in memory. Built by row_norms.py, without any header of torch's.
#include <algorithm>
#include <cmath>
#include <cstdint>

// One binary for every x86 processor: the loader picks the widest vectors that this one has.
#if defined(__x86_64__) && defined(__gnu_linux__)
#define FOR_EVERY_PROCESSOR __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FOR_EVERY_PROCESSOR
#endif

namespace {

// Sums side by side: as many as hide the latency of an addition, and together as exact as a sum of few numbers.
constexpr int64_t kLanes = 64;
// What one sum of float32 may take in; longer rows are added up in float64 from such pieces.
constexpr int64_t kPiece = 1 << 13;
// How far ahead memory is asked for: beyond the end of a row or of a page, where the processor itself does not look.
constexpr int64_t kAhead = 2048 / sizeof(float);
constexpr int64_t kCacheLine = 64 / sizeof(float);
// Elements for which a second thread is worth waking; torch's own grain.
constexpr int64_t kGrain = 1 << 15;

FOR_EVERY_PROCESSOR float sum_of_squares(const float* x, int64_t count) {
  float sums[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int64_t j = 0; j < kLanes; j += kCacheLine) __builtin_prefetch(x + i + j + kAhead);
    for (int64_t j = 0; j < kLanes; ++j) sums[j] += x[i + j] * x[i + j];
  }
  float rest = 0;
  for (; i < count; ++i) rest += x[i] * x[i];
  for (int64_t width = kLanes / 2; width > 0; width /= 2)
    for (int64_t j = 0; j < width; ++j) sums[j] += sums[j + width];
  return sums[0] + rest;
}

}  // namespace

// x: (rows, length), out: (rows,), both without gaps.
extern "C" void row_norms(const float* x, int64_t rows, int64_t length, float* out, int threads) {
#pragma omp parallel for num_threads(threads) if (rows * length > kGrain) schedule(static)
  for (int64_t row = 0; row < rows; ++row) {
    const float* from = x + row * length;
    double sum = 0;
    for (int64_t at = 0; at < length; at += kPiece) sum += sum_of_squares(from + at, std::min(kPiece, length - at));
    out[row] = static_cast<float>(std::sqrt(sum));
  }
}
