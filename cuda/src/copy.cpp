#include "copy.h"

#include <algorithm>
#include <atomic>
#include <cstring>

// ThreadSanitizer does not see streaming stores.
#if defined(__SSE2__) && !defined(__SANITIZE_THREAD__)
#include <emmintrin.h>
#define DMI_STREAMING_STORES 1
#endif

namespace dmi {
namespace {

#ifdef DMI_STREAMING_STORES
constexpr uint64_t kStreamFrom = 16 << 10;
#endif
// From here on a copy is worth other threads, each of which gets as much at least: one alone does not fill the memory's bandwidth.
constexpr uint64_t kShareFrom = 512 << 10, kShare = 256 << 10, kLine = 64;

std::atomic<dmi_share> sharing{nullptr};

template <typename Element>
void copy_elements(const std::byte* from, uint64_t stride, uint64_t count, std::byte* to) {
  for (uint64_t i = 0; i < count; ++i) std::memcpy(to + i * sizeof(Element), from + i * stride, sizeof(Element));
}

struct Wide {
  uint64_t low, high;
};

// `count` pieces, `stride` apart, behind each other.
void copy_pieces(const std::byte* from, uint64_t stride, uint64_t piece, uint64_t count, std::byte* to) {
  switch (piece) {
    case 1:
      return copy_elements<uint8_t>(from, stride, count, to);
    case 2:
      return copy_elements<uint16_t>(from, stride, count, to);
    case 4:
      return copy_elements<uint32_t>(from, stride, count, to);
    case 8:
      return copy_elements<uint64_t>(from, stride, count, to);
    case 16:
      return copy_elements<Wide>(from, stride, count, to);
    default:
      for (uint64_t i = 0; i < count; ++i) std::memcpy(to + i * piece, from + i * stride, piece);
  }
}

// Dimensions [dim, outer_dims) of a row and the pieces below. Returns the end of what was written.
std::byte* copy_row(const Gather& g, uint32_t dim, const std::byte* from, std::byte* to) {
  if (dim == g.outer_dims) {
    std::memcpy(to, from, g.piece_bytes);
    return to + g.piece_bytes;
  }
  const Extent& extent = g.outer[dim];
  if (dim + 1 == g.outer_dims) {
    copy_pieces(from, extent.stride, g.piece_bytes, extent.size, to);
    return to + extent.size * g.piece_bytes;
  }
  for (uint64_t i = 0; i < extent.size; ++i) to = copy_row(g, dim + 1, from + i * extent.stride, to);
  return to;
}

// Bytes [begin, begin + bytes) of one row.
void copy_within_row(const Gather& g, const std::byte* row, uint64_t begin, uint64_t bytes, std::byte* to) {
  while (bytes > 0) {
    uint64_t piece = begin / g.piece_bytes;
    const uint64_t skip = begin % g.piece_bytes;
    const uint64_t length = std::min(g.piece_bytes - skip, bytes);
    const std::byte* from = row + skip;
    for (uint32_t d = g.outer_dims; d-- > 0;) {
      from += piece % g.outer[d].size * g.outer[d].stride;
      piece /= g.outer[d].size;
    }
    std::memcpy(to, from, length);
    to += length;
    begin += length;
    bytes -= length;
  }
}

void copy_rows(const Gather& g, const std::byte* first, uint64_t count, std::byte* to) {
  if (g.outer_dims == 0) return copy_pieces(first, g.row_stride, g.row_bytes, count, to);
  for (uint64_t i = 0; i < count; ++i) to = copy_row(g, 0, first + i * g.row_stride, to);
}

void copy_alone(std::byte* to, const std::byte* from, uint64_t bytes) {
#ifdef DMI_STREAMING_STORES
  if (bytes >= kStreamFrom && reinterpret_cast<uintptr_t>(to) % sizeof(__m128i) == 0) {
    auto* target = reinterpret_cast<__m128i*>(to);
    auto* source = reinterpret_cast<const __m128i*>(from);
    const uint64_t lines = bytes / 64;
    for (uint64_t i = 0; i < lines; ++i, target += 4, source += 4) {
      const __m128i a = _mm_loadu_si128(source), b = _mm_loadu_si128(source + 1);
      const __m128i c = _mm_loadu_si128(source + 2), d = _mm_loadu_si128(source + 3);
      _mm_stream_si128(target, a);
      _mm_stream_si128(target + 1, b);
      _mm_stream_si128(target + 2, c);
      _mm_stream_si128(target + 3, d);
    }
    std::memcpy(target, source, bytes % 64);
    _mm_sfence();  // streaming stores are not ordered by the release that publishes the record
    return;
  }
#endif
  std::memcpy(to, from, bytes);
}

}  // namespace

void share_copies(dmi_share share) { sharing.store(share, std::memory_order_release); }

void copy_bytes(std::byte* to, const std::byte* from, uint64_t bytes) {
  const dmi_share share = bytes < kShareFrom ? nullptr : sharing.load(std::memory_order_acquire);
  if (share == nullptr) return copy_alone(to, from, bytes);
  struct Copy {
    std::byte* to;
    const std::byte* from;
  } copy{to, from};
  const auto work = [](int64_t first, int64_t last, void* context) {
    const Copy& c = *static_cast<Copy*>(context);
    copy_alone(c.to + uint64_t(first) * kLine, c.from + uint64_t(first) * kLine, uint64_t(last - first) * kLine);
  };
  const uint64_t lines = bytes / kLine;
  share(0, int64_t(lines), int64_t(kShare / kLine), work, &copy);
  std::memcpy(to + lines * kLine, from + lines * kLine, bytes % kLine);
}

void copy_gathered(const Gather& g, uint64_t begin, uint64_t bytes, std::byte* to) {
  if (bytes == 0) return;
  uint64_t row = begin / g.row_bytes;  // still to be skipped in the runs
  uint64_t skip = begin % g.row_bytes;
  for (const Run& run : *g.runs) {
    if (row >= run.count) {
      row -= run.count;
      continue;
    }
    const std::byte* from = g.base + run.batch * g.batch_stride + (run.first + row) * g.row_stride;
    uint64_t left = run.count - row;
    row = 0;
    while (left > 0 && bytes > 0) {
      if (skip != 0 || bytes < g.row_bytes) {
        const uint64_t length = std::min(g.row_bytes - skip, bytes);
        copy_within_row(g, from, skip, length, to);
        skip = 0;
        to += length;
        bytes -= length;
        from += g.row_stride;
        --left;
        continue;
      }
      const uint64_t rows = std::min(left, bytes / g.row_bytes);
      if (g.outer_dims == 0 && g.row_stride == g.row_bytes) {
        copy_bytes(to, from, rows * g.row_bytes);
      } else {
        copy_rows(g, from, rows, to);
      }
      to += rows * g.row_bytes;
      bytes -= rows * g.row_bytes;
      from += rows * g.row_stride;
      left -= rows;
    }
    if (bytes == 0) return;
  }
}

}  // namespace dmi
