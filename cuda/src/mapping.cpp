#include "mapping.h"

#include <fcntl.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <string>

#include "error.h"
#include "shared.h"

namespace dmi {
namespace {

constexpr uint64_t kPage = 4096;
constexpr uint64_t kLargest = uint64_t{1} << 40;       // of any region: a bound that only a mistake exceeds
constexpr uint64_t kLargestTable = uint64_t{1} << 31;  // dmi_table.bytes has 32 bits

uint64_t pages(uint64_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }

uint64_t region(const char* name, uint64_t bytes, uint64_t least, uint64_t most = kLargest) {
  if (bytes < least || bytes > most) {
    invalid(std::string("create ring: ") + name + " is " + std::to_string(bytes) + " bytes; give " + std::to_string(least) + " to " +
            std::to_string(most));
  }
  return pages(bytes);
}

// Complete mode has what it is given. Best-effort mode has a little, for what is little: what finds no room there still has the payload
// ring.
uint64_t spill_bytes(const dmi_ring_options& o) {
  return o.mode == DMI_MODE_COMPLETE ? o.spill_bytes : std::min(o.spill_bytes, o.payload_bytes / 8);
}

uint32_t capacity(const char* name, uint32_t count, uint32_t least, uint32_t most) {
  if (count < least || count > most) {
    invalid(std::string("create ring: ") + name + " is " + std::to_string(count) + "; give " + std::to_string(least) + " to " +
            std::to_string(most));
  }
  return std::bit_ceil(count);
}

dmi_header plan(const dmi_ring_options& o) {
  if (o.mode != DMI_MODE_BEST_EFFORT && o.mode != DMI_MODE_COMPLETE) {
    invalid("create ring: mode " + std::to_string(o.mode) + " is neither best-effort (0) nor complete (1)");
  }
  if (o.lanes < 1 || o.lanes > DMI_MAX_LANES) {
    invalid("create ring: " + std::to_string(o.lanes) + " lanes; give 1 to " + std::to_string(DMI_MAX_LANES));
  }
  dmi_header h{};
  h.magic = DMI_MAGIC;
  h.version = DMI_ABI_VERSION;
  h.mode = o.mode;
  h.device = o.device < 0 ? DMI_DEVICE_CPU : DMI_DEVICE_CUDA;
  h.lanes = o.lanes;
  h.record_capacity = capacity("record_capacity", o.record_capacity, 16, 1u << 24);
  h.command_capacity = capacity("command_capacity", o.command_capacity, 1, 1u << 20);
  h.site_capacity = capacity("site_capacity", o.site_capacity, 1, DMI_MAX_SITES);
  h.payload_bytes = region("payload", o.payload_bytes, kPage);
  h.table_bytes = region("row tables", o.table_bytes, kPage, kLargestTable);
  h.staging_bytes = region("staging", o.staging_bytes, kPage);
  h.spill_bytes = region("spill", spill_bytes(o), 0);

  uint64_t end = kPage;
  auto place = [&end](uint64_t bytes) {
    uint64_t at = end;
    end += pages(bytes);
    return at;
  };
  h.control_offset = place(sizeof(dmi_control));
  h.sites_offset = place(uint64_t{h.site_capacity} * sizeof(dmi_site));
  h.gates_offset = place(uint64_t{h.site_capacity} * (sizeof(dmi_gate) + sizeof(dmi_keep)) + DMI_MAX_CLAUSES * sizeof(dmi_clause) +
                         DMI_MAX_WATCHES * sizeof(dmi_watch) + DMI_PROBE_FLOATS * sizeof(float));
  h.records_offset = place(uint64_t{h.lanes} * h.record_capacity * sizeof(dmi_record));
  h.tables_offset = place(h.lanes * h.table_bytes);
  h.commands_offset = place(uint64_t{h.command_capacity} * sizeof(dmi_command));
  h.staging_offset = place(h.staging_bytes);
  h.spill_offset = place(h.spill_bytes);
  h.total_bytes = end;

  timespec now{};
  clock_gettime(CLOCK_REALTIME, &now);
  h.created_unix_ns = uint64_t(now.tv_sec) * 1'000'000'000 + uint64_t(now.tv_nsec);
  if (getrandom(h.producer, sizeof h.producer, 0) != sizeof h.producer) {
    system_error("create ring: draw its random name");
  }
  return h;
}

}  // namespace

uint64_t Mapping::bytes(const dmi_ring_options& options) { return plan(options).total_bytes; }

Mapping::Mapping(const dmi_ring_options& options) : header_(plan(options)) {
  try {
    memfd_ = memfd_create("dmi-ring", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (memfd_ < 0) system_error("create ring: memfd_create");
    if (ftruncate(memfd_, off_t(header_.total_bytes)) != 0) {
      system_error("create ring: size shared memory to " + std::to_string(header_.total_bytes) + " bytes");
    }
    // Sealed before anyone else has it: a mapping that its owner may shrink is a SIGBUS for those who read it.
    if (fcntl(memfd_, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0) system_error("create ring: seal shared memory");
    void* base = mmap(nullptr, header_.total_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, memfd_, 0);
    if (base == MAP_FAILED) system_error("create ring: map " + std::to_string(header_.total_bytes) + " bytes");
    base_ = static_cast<std::byte*>(base);
    engine_bell_ = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    pump_bell_ = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (engine_bell_ < 0 || pump_bell_ < 0) system_error("create ring: eventfd");
  } catch (...) {
    this->~Mapping();
    throw;
  }
  *at<dmi_header>(0) = header_;
  // Pairs with the engine's acquire of state, after it has received the memfd.
  store_release(control().state.value, DMI_STATE_RUNNING);
}

Mapping::~Mapping() {
  if (base_ != nullptr) munmap(base_, header_.total_bytes);
  base_ = nullptr;
  drop_descriptors();
}

void Mapping::drop_descriptors() {
  for (int* fd : {&memfd_, &engine_bell_, &pump_bell_}) {
    if (*fd >= 0) close(*fd);
    *fd = -1;
  }
}

void ring_bell(int eventfd) {
  const uint64_t one = 1;
  // Fails only with EAGAIN, when the counter is at its limit: then the other side is awake anyway.
  [[maybe_unused]] ssize_t written = write(eventfd, &one, sizeof one);
}

}  // namespace dmi
