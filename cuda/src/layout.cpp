#include "layout.h"

#include <array>

namespace dmi {
namespace {

// By dmi_dtype.
constexpr std::array<uint8_t, 21> kElementBytes = {0, 1, 1, 1, 2, 2, 4, 4, 8, 8, 2, 2, 4, 8, 1, 1, 1, 1, 1, 8, 16};
static_assert(kElementBytes[DMI_DTYPE_BF16] == 2 && kElementBytes[DMI_DTYPE_F8_E8M0] == 1 && kElementBytes[DMI_DTYPE_C128] == 16);

struct Roles {
  uint8_t role[DMI_MAX_DIMS];
  int row[2];  // dimensions with DMI_ROLE_ROW
  int rows;
};

bool roles_of(Roles& roles, const dmi_tensor& tensor, const dmi_site& site) {
  if (tensor.ndim < 1 || tensor.ndim > DMI_MAX_DIMS || (site.ndim != 0 && site.ndim != tensor.ndim)) return false;
  roles.rows = 0;
  for (int d = 0; d < tensor.ndim; ++d) {
    roles.role[d] = site.ndim != 0 ? site.role[d] : d == 0 ? uint8_t{DMI_ROLE_ROW} : uint8_t{DMI_ROLE_INNER};
    if (roles.role[d] == DMI_ROLE_ROW) roles.row[roles.rows++] = d;
  }
  return true;
}

// Whether the rows are all inside the tensor, and the tensor what the step says that its sources are. A cache's width is
// not checked: layers with a sliding window have fewer slots than others.
bool rows_inside(const dmi_tensor& t, const Roles& roles, const RowList& list, bool cache) {
  const uint64_t last = uint64_t(t.size[roles.row[roles.rows - 1]]);
  if (roles.rows == 2) {
    if (list.width != 0 && !cache && last != list.width) return false;
    return list.batches <= uint64_t(t.size[roles.row[0]]) && list.end <= last;
  }
  if (list.width != 0 && !cache && last % list.width != 0) return false;
  return list.flat_end <= last;
}

// True where the elements fill a contiguous piece of memory, in whatever order.
bool dense(const dmi_tensor& t) {
  int64_t elements = 1, piece = 1;
  for (int d = 0; d < t.ndim; ++d) elements *= t.size[d];
  // Grow the piece by the dimension that continues it, until it is everything or none does.
  for (int found = 0; piece != elements && found >= 0;) {
    found = -1;
    for (int d = 0; d < t.ndim; ++d) {
      if (t.size[d] != 1 && t.stride[d] == piece) found = d;
    }
    if (found >= 0) piece *= t.size[found];
  }
  return piece == elements;
}

// Everything a row has besides its index, outermost first, with neighbours that lie behind each other made one.
void collapse(Gather& g, const Extent* inner, int n, uint64_t element) {
  g.outer_dims = 0;
  g.piece_bytes = element;
  g.row_bytes = element;
  for (int i = 0; i < n; ++i) {
    g.row_bytes *= inner[i].size;
    if (inner[i].size == 1) continue;
    if (g.outer_dims > 0 && g.outer[g.outer_dims - 1].stride == inner[i].stride * inner[i].size) {
      g.outer[g.outer_dims - 1].size *= inner[i].size;
      g.outer[g.outer_dims - 1].stride = inner[i].stride;
    } else {
      g.outer[g.outer_dims++] = inner[i];
    }
  }
  if (g.outer_dims > 0 && g.outer[g.outer_dims - 1].stride == element) {
    g.piece_bytes = element * g.outer[--g.outer_dims].size;
  }
}

void offer_whole(Layout& layout, const dmi_tensor& t, const Roles& roles, const RowList& list, uint64_t element, bool cut) {
  layout.whole_bytes = 0;
  const Gather& g = layout.gather;
  uint64_t source_rows = 1, elements = 1;
  for (int i = 0; i < roles.rows; ++i) source_rows *= uint64_t(t.size[roles.row[i]]);
  for (int d = 0; d < t.ndim; ++d) elements *= uint64_t(t.size[d]);
  if (cut || elements == 0 || source_rows != list.rows) return;
  // Gathering that is a single copy anyway gives the engine the simpler form.
  if (g.outer_dims == 0 && g.row_stride == g.row_bytes && g.runs->size() == 1) return;
  if (!dense(t)) return;
  dmi_record& form = layout.whole;
  form = {};
  for (int d = 0; d < t.ndim; ++d) {
    // A stride along a dimension of one element means nothing, and may be anything.
    const uint64_t stride = t.size[d] == 1 ? 1 : uint64_t(t.stride[d]);
    if (stride > UINT32_MAX) return;
    form.size[d] = uint32_t(t.size[d]);
    form.stride[d] = uint32_t(stride);
    form.role[d] = roles.role[d];
  }
  form.ndim = t.ndim;
  form.dtype = t.dtype;
  form.key_base = layout.form.key_base;
  layout.whole_bytes = elements * element;
}

}  // namespace

uint32_t dtype_bytes(uint32_t dtype) { return dtype < kElementBytes.size() ? kElementBytes[dtype] : 0; }

void plan_layout(Layout& layout, const dmi_tensor& t, const dmi_site& site, const RowLists& lists, uint32_t keys) {
  const RowList& list = lists[site.space];
  layout.rows = list.rows;
  layout.fits = false;
  const uint64_t element = t.device < 0 ? dtype_bytes(t.dtype) : 0;  // a device's tensor is not ours to read
  Roles roles;
  if (element == 0 || !roles_of(roles, t, site)) return;
  for (int d = 0; d < t.ndim; ++d) {
    if (t.size[d] < 0 || t.size[d] > int64_t{UINT32_MAX} || t.stride[d] < 0) return;
  }
  if (!rows_inside(t, roles, list, site.space == DMI_SPACE_CACHE)) return;

  dmi_record& form = layout.form;
  form = {};
  form.role[0] = DMI_ROLE_ROW;
  form.ndim = 1;
  form.dtype = t.dtype;
  form.flags = DMI_RECORD_GATHERED;
  Extent inner[DMI_MAX_DIMS];
  int inners = 0;
  layout.key_dim = -1;
  layout.owns = &list.owns;
  bool cut = false;
  for (int d = 0; d < t.ndim; ++d) {
    if (roles.role[d] == DMI_ROLE_ROW) continue;
    uint64_t size = uint64_t(t.size[d]);
    if (roles.role[d] == DMI_ROLE_KEY && keys != 0) {
      if (size > keys) {  // a static cache: what lies beyond is not in use yet
        size = keys;
        cut = true;
      } else {  // a sliding window: its last slot is the cache's last
        form.key_base = keys - uint32_t(size);
      }
    }
    if (roles.role[d] == DMI_ROLE_KEY) layout.key_dim = form.ndim;
    form.size[form.ndim] = uint32_t(size);
    form.role[form.ndim++] = roles.role[d];
    inner[inners++] = {size, uint64_t(t.stride[d]) * element};
  }
  uint64_t stride = 1;
  for (int d = form.ndim - 1; d >= 0; --d) {
    if (stride > UINT32_MAX) return;
    form.stride[d] = uint32_t(stride);
    stride *= form.size[d];
  }

  Gather& g = layout.gather;
  collapse(g, inner, inners, element);
  g.base = static_cast<const std::byte*>(t.data);
  g.row_stride = uint64_t(t.stride[roles.row[roles.rows - 1]]) * element;
  g.batch_stride = 0;
  g.runs = &list.flat;
  if (roles.rows == 2) {
    g.batch_stride = uint64_t(t.stride[roles.row[0]]) * element;
    const uint64_t width = uint64_t(t.size[roles.row[1]]);
    // Two ROW dimensions that lie behind each other are one, and runs then cross from one batch row to the next.
    const bool one = list.width == width && (width == 1 || uint64_t(t.size[roles.row[0]]) == 1 || g.batch_stride == g.row_stride * width);
    if (!one) {
      g.runs = &list.runs;
    } else if (width == 1) {
      g.row_stride = g.batch_stride;
    }
  }
  layout.fits = true;
  offer_whole(layout, t, roles, list, element, cut);
}

}  // namespace dmi
