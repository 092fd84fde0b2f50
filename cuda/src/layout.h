// Which bytes of a tensor a step wants, and in which form they go into the ring. Knows nothing of how bytes are moved.
#pragma once

#include <cstddef>
#include <cstdint>

#include "rows.h"

namespace dmi {

// Bytes of an element of a dmi_dtype; 0 for none.
uint32_t dtype_bytes(uint32_t dtype);

// A dimension in bytes.
struct Extent {
  uint64_t size;
  uint64_t stride;
};

// A tensor's wanted rows as a dense stream: rows in row-list order, each row its remaining dimensions in order.
struct Gather {
  const std::byte* base = nullptr;
  const std::vector<Run>* runs = nullptr;
  uint64_t batch_stride = 0;  // bytes
  uint64_t row_stride = 0;
  uint32_t outer_dims = 0;  // dimensions of a row above its innermost contiguous piece; collapsed
  Extent outer[DMI_MAX_DIMS] = {};
  uint64_t piece_bytes = 0;  // contiguous in source and stream alike
  uint64_t row_bytes = 0;
};

struct Layout {
  bool fits = false;     // false: the tensor's shape is not that of the site or the step
  uint64_t rows = 0;     // that the site owes
  dmi_record form = {};  // size, stride, role, dtype, ndim, flags, key_base of a GATHERED record; size[0] left to the writer
  Gather gather;
  int key_dim = -1;                        // of form; -1: none
  const std::vector<Own>* owns = nullptr;  // the keys that each row has
  uint64_t whole_bytes = 0;                // not 0: one copy of the source from gather.base serves as well, with `whole` as its form
  dmi_record whole = {};
};

// `keys`: slots of the key-value cache in use, 0 where unknown.
void plan_layout(Layout& layout, const dmi_tensor& tensor, const dmi_site& site, const RowLists& lists, uint32_t keys);

}  // namespace dmi
