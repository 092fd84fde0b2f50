// A build without CUDA.
#include "device.h"
#include "error.h"

namespace dmi {

std::unique_ptr<Device> make_device(const Mapping&, int, uint64_t) {
  invalid("create ring: this libdmi was built without CUDA; install the wheel with CUDA, or build it where nvcc is on PATH (make setup)");
}

bool has_devices() { return false; }

}  // namespace dmi
