// dmi::capture, the torch op: unpacks its arguments and calls dmi_capture. Built on libtorch's stable ABI, so that one
// library serves every torch from 2.11 on; it takes neither the GIL nor memory of torch's.
//
// Of its tensors the last `held` have no site: they are those of the call before, where that was `beside`, and stand here so that nothing
// takes their memory until then. A recording that may branch captures beside what follows, up to the next call.
//
// Where a site is above 32 bits, what is there says as what dtype a tensor's bits are to be read: Inductor gives the op no other dtype's
// view of a tensor that it has made, but makes another.
//
// dmi::copy is a clone of a tensor that waits for its capture, while others write where it was. Compilers let it stand where it is, as
// they do captures: `ring` is mutated.
//
// `ring` is an int64[1] tensor, declared as mutated: that is what keeps the compilers from dropping captures or changing their
// order. On the CPU it holds the ring's handle; on a device, where reading it would be a wait, its address says which ring it is.
#include <dlfcn.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <utility>
#include <vector>

#include "../src/layout.h"
#include "dmi/dmi.h"

namespace {

struct Dtypes {
  std::array<uint8_t, 128> of{};  // by torch's number

  Dtypes() {
    put(aoti_torch_dtype_bool(), DMI_DTYPE_BOOL);
    put(aoti_torch_dtype_uint8(), DMI_DTYPE_U8);
    put(aoti_torch_dtype_int8(), DMI_DTYPE_I8);
    put(aoti_torch_dtype_uint16(), DMI_DTYPE_U16);
    put(aoti_torch_dtype_int16(), DMI_DTYPE_I16);
    put(aoti_torch_dtype_uint32(), DMI_DTYPE_U32);
    put(aoti_torch_dtype_int32(), DMI_DTYPE_I32);
    put(aoti_torch_dtype_uint64(), DMI_DTYPE_U64);
    put(aoti_torch_dtype_int64(), DMI_DTYPE_I64);
    put(aoti_torch_dtype_float16(), DMI_DTYPE_F16);
    put(aoti_torch_dtype_bfloat16(), DMI_DTYPE_BF16);
    put(aoti_torch_dtype_float32(), DMI_DTYPE_F32);
    put(aoti_torch_dtype_float64(), DMI_DTYPE_F64);
    put(aoti_torch_dtype_float8_e4m3fn(), DMI_DTYPE_F8_E4M3);
    put(aoti_torch_dtype_float8_e5m2(), DMI_DTYPE_F8_E5M2);
    put(aoti_torch_dtype_float8_e4m3fnuz(), DMI_DTYPE_F8_E4M3FNUZ);
    put(aoti_torch_dtype_float8_e5m2fnuz(), DMI_DTYPE_F8_E5M2FNUZ);
    put(torch_dtype_float8_e8m0fnu(), DMI_DTYPE_F8_E8M0);
    put(aoti_torch_dtype_complex64(), DMI_DTYPE_C64);
    put(aoti_torch_dtype_complex128(), DMI_DTYPE_C128);
  }
  void put(int32_t torch, uint8_t ours) {
    if (torch >= 0 && size_t(torch) < of.size()) of[size_t(torch)] = ours;
  }
  uint8_t operator[](int32_t torch) const { return torch >= 0 && size_t(torch) < of.size() ? of[size_t(torch)] : uint8_t{DMI_DTYPE_NONE}; }
};

// An argument is ours to delete, whatever happens.
class TensorArgument {
 public:
  explicit TensorArgument(StableIValue value) : handle_(torch::stable::detail::to<AtenTensorHandle>(value)) {}
  ~TensorArgument() {
    if (handle_ != nullptr) aoti_torch_delete_tensor_object(handle_);
  }
  TensorArgument(TensorArgument&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  TensorArgument(const TensorArgument&) = delete;
  TensorArgument& operator=(const TensorArgument&) = delete;
  AtenTensorHandle get() const { return handle_; }

 private:
  AtenTensorHandle handle_;
};

class ListArgument {
 public:
  explicit ListArgument(StableIValue value) : handle_(torch::stable::detail::to<StableListHandle>(value)) {}
  ~ListArgument() { torch_delete_list(handle_); }
  ListArgument(const ListArgument&) = delete;
  ListArgument& operator=(const ListArgument&) = delete;
  size_t size() const {
    size_t size = 0;
    TORCH_ERROR_CODE_CHECK(torch_list_size(handle_, &size));
    return size;
  }
  StableIValue operator[](size_t i) const {
    StableIValue value{};
    TORCH_ERROR_CODE_CHECK(torch_list_get_item(handle_, i, &value));
    return value;
  }

 private:
  StableListHandle handle_;
};

// The stream that torch is on. Looked up when it is first needed: in a torch without CUDA there is no such function to link with.
void* current_stream(int32_t device) {
  using Ask = AOTITorchError (*)(int32_t, void**);
  static const Ask ask = [] {
    void* torch = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return torch == nullptr ? nullptr : reinterpret_cast<Ask>(dlsym(torch, "aoti_torch_get_current_cuda_stream"));
  }();
  STD_TORCH_CHECK(ask != nullptr, "dmi::capture: the ring is on a CUDA device, but this torch has no CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(ask(device, &stream));
  return stream;
}

// Sizes, strides and data are borrowed from the tensor.
dmi_tensor describe(const TensorArgument& tensor, int64_t site) {
  static const Dtypes dtypes;
  static const int32_t cpu = aoti_torch_device_type_cpu(), cuda = aoti_torch_device_type_cuda();
  static const int32_t strided = aoti_torch_layout_strided();
  dmi_tensor out{};
  const uint64_t as = site >= 0 ? uint64_t(site) >> 32 : 0;
  site -= int64_t(as << 32);
  out.site = site >= 0 && site < DMI_MAX_SITES ? uint32_t(site) : UINT32_MAX;
  int32_t device = 0, layout = 0, dtype = 0;
  int64_t ndim = 0;
  int64_t *size = nullptr, *stride = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &device));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(tensor.get(), &layout));
  int32_t index = -1;
  if (device == cuda) TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor.get(), &index));
  out.device = int16_t(index);
  if ((device != cpu && device != cuda) || layout != strided) return out;  // DMI_DTYPE_NONE: booked as a mismatch
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(tensor.get(), &ndim));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(tensor.get(), &size));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(tensor.get(), &stride));
  TORCH_ERROR_CODE_CHECK(torch_get_const_data_ptr(tensor.get(), &out.data));
  out.size = size;
  out.stride = stride;
  out.dtype = dtypes[dtype];
  if (as != 0)
    out.dtype = as < UINT8_MAX && dmi::dtype_bytes(uint32_t(as)) == dmi::dtype_bytes(out.dtype) ? uint8_t(as) : uint8_t{DMI_DTYPE_NONE};
  out.ndim = uint8_t(ndim <= UINT8_MAX ? ndim : UINT8_MAX);
  return out;
}

struct Target {
  int64_t ring = 0;
  void* stream = nullptr;
};

Target target_of(const TensorArgument& ring) {
  static const int32_t cpu = aoti_torch_device_type_cpu(), cuda = aoti_torch_device_type_cuda();
  int32_t dtype = 0, device = 0, index = 0;
  int64_t elements = 0;
  const void* data = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(ring.get(), &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(ring.get(), &device));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_numel(ring.get(), &elements));
  STD_TORCH_CHECK(dtype == aoti_torch_dtype_int64() && (device == cpu || device == cuda) && elements == 1,
                  "dmi::capture: `ring` must be the ring's own tensor (Ring.tensor), one int64");
  TORCH_ERROR_CODE_CHECK(torch_get_const_data_ptr(ring.get(), &data));
  if (device == cpu) return {*static_cast<const int64_t*>(data), nullptr};
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(ring.get(), &index));
  const int64_t handle = dmi_ring_of_token(data);
  STD_TORCH_CHECK(
      handle >= 0,
      "dmi::capture: `ring` is a copy of a ring's tensor, which on a CUDA device is known by where it lies. Compilers' backends that "
      "copy what an operation changes, as torch.compile(backend=\"aot_eager\") does, cannot capture there; use the default backend");
  return {handle, current_stream(index)};
}

// The threads that compute the model's own operations, which do nothing else while it captures.
void share(int64_t begin, int64_t end, int64_t grain, void (*work)(int64_t, int64_t, void*), void* context) {
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(begin, end, grain, work, context));
}

[[maybe_unused]] const bool shares = [] {
  dmi_share_copies(share);
  return true;
}();

void capture(StableIValue* stack, uint64_t arguments, uint64_t) {
  STD_TORCH_CHECK(arguments == 5, "dmi::capture: takes ring, tensors, sites, held and beside");
  const TensorArgument ring(stack[0]);
  const ListArgument tensors(stack[1]), sites(stack[2]);
  const auto behind = torch::stable::detail::to<int64_t>(stack[3]);
  const bool beside = torch::stable::detail::to<bool>(stack[4]);
  const size_t count = sites.size();
  STD_TORCH_CHECK(behind >= 0 && count + size_t(behind) == tensors.size(), "dmi::capture: ", tensors.size(), " tensors, but ", count,
                  " sites and ", behind, " that are held");
  const Target target = target_of(ring);

  // What a group needs to be described keeps its memory from call to call, so that a steady state allocates nothing of ours.
  thread_local std::vector<dmi_tensor> group;
  thread_local std::vector<TensorArgument> held;  // a list's item is the only reference to a temporary, a resolved conjugate say
  group.clear();
  held.clear();
  for (size_t i = 0; i < count; ++i) {
    held.emplace_back(tensors[i]);
    group.push_back(describe(held.back(), torch::stable::detail::to<int64_t>(sites[i])));
  }
  dmi_capture(target.ring, group.data(), uint32_t(count), beside ? 1 : 0, target.stream);
  held.clear();
}

void copy(StableIValue* stack, uint64_t arguments, uint64_t) {
  STD_TORCH_CHECK(arguments == 2, "dmi::copy: takes ring and a tensor");
  const TensorArgument ring(stack[0]), tensor(stack[1]);
  AtenTensorHandle copied = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_clone(tensor.get(), &copied));
  stack[0] = torch::stable::detail::from(copied);
}

}  // namespace

// capture is defined in native.py, where it can have a tag.
STABLE_TORCH_LIBRARY_FRAGMENT(dmi, library) { library.def("copy(Tensor(a!) ring, Tensor tensor) -> Tensor"); }

STABLE_TORCH_LIBRARY_IMPL(dmi, CompositeExplicitAutograd, library) {
  library.impl("capture", capture);
  library.impl("copy", copy);
}
