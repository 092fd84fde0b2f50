// Rows at the levels that are not copies: quantised, or summed up.
#pragma once

#include <unordered_map>

#include "layout.h"
#include "watch.h"

namespace dmi {

// Bytes [begin, begin + bytes) of the stream of a layout's rows at a level, as dmi_level says them.
void encode_gathered(const Layout& layout, uint32_t level, uint32_t top, uint64_t begin, uint64_t bytes, std::byte* to);

// Holds each of a layout's rows against the watches whose bits are set, and notes by request those that were met.
void watch_gathered(const Layout& layout, const std::vector<Watch>& watches, uint64_t bits, std::unordered_map<uint64_t, uint64_t>& met);

}  // namespace dmi
